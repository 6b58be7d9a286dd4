"""The model guide as printed, on `icenet` and on `icenet_torch`, as far as no test of a family runs it; the commands
and configurations of the pages; a model family added as the documentation describes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import icenet.blas

import click
import numpy as np
import pytest
import yaml
from helpers import BACKENDS, PACKAGES, ROOT, losses, native, train, write_text
from pages import PAGES, code

import icenet as front_door
from icenet.cli.main import cli
from icenet.core import backends
from icenet.core.config import CNNConfig, Config, RecurrentConfig, TransformerConfig, presets
from icenet.core.families import FAMILIES
from icenet.core.training.trainer import Trainer

pytest.importorskip("mlx")
torch: Any = pytest.importorskip("torch")

TRAIN = "\ndata: {source: text.txt, seq_length: 16}\ntraining: {max_steps: 2, batch_size: 2, eval_every: null}\n"


@pytest.fixture(autouse=True)
def text_file(here: Path, no_plots: None) -> None:
    """Puts a text into the working folder."""
    write_text(here / "text.txt", 2000)


# ---- the guide's configurations ---------------------------------------------------------------------------

CNN = """
model:
  type: cnn
  hidden_size: 512        # Classifier hidden size
  num_layers: 5           # Number of conv layers
  dropout: 0.2            # Dropout rate
  vocab_size: 1000        # Number of classes
  activation: relu        # Activation function
"""

RNN = """
model:
  type: lstm              # lstm, gru, or rnn
  hidden_size: 512        # Hidden state size
  num_layers: 4           # Number of RNN layers
  dropout: 0.3            # Dropout between layers
  vocab_size: 10000       # Vocabulary size
"""


def test_the_cnns_yaml(here: Path) -> None:
    (here / "my.yaml").write_text(CNN)
    config = Config.from_yaml("my.yaml").model
    assert isinstance(config, CNNConfig)
    assert (config.hidden_size, config.num_layers, config.dropout) == (512, 5, 0.2)
    assert (config.vocab_size, config.activation) == (1000, "relu")
    shapes = {}
    for backend in BACKENDS:
        model = front_door.build("my.yaml", backend, "cpu")
        images = np.zeros((2, 16, 16, 3), np.float32)
        given = native(backend, images, images=True)
        assert tuple(model(given).shape) == (2, 1000)
        assert tuple(model.extract_features(given).shape) == (2, 512)
        shapes[backend] = model.weight_shapes()
    assert shapes["mlx"] == shapes["torch"]


@pytest.mark.parametrize("family", ["lstm", "gru", "rnn"])
def test_the_rnns_yaml(family: str, here: Path) -> None:
    (here / "my.yaml").write_text(RNN.replace("type: lstm  ", f"type: {family}  "))
    config = Config.from_yaml("my.yaml").model
    assert isinstance(config, RecurrentConfig) and config.type == family
    assert (config.hidden_size, config.num_layers, config.dropout, config.vocab_size) == (512, 4, 0.3, 10000)


# ---- optimization -----------------------------------------------------------------------------------------

ASSIGNMENTS = (
    '# Automatic in training pipeline\nconfig.training.mixed_precision = "fp16"\n',
    "config.model.compile_model = True\n",
    "config.training.gradient_checkpointing = True\n",
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_assignments_as_printed(backend: str, here: Path) -> None:
    """A model and an engine built afterwards use the assigned values."""
    model = "model: {type: transformer, hidden_size: 16, num_layers: 2, num_heads: 2, vocab_size: 257}"
    (here / "my.yaml").write_text(model + TRAIN)
    scope: dict[str, Any] = {}
    exec(f"from {PACKAGES[backend]}.core.config import Config\nconfig = Config.from_yaml('my.yaml')", scope)
    for snippet in ASSIGNMENTS:
        exec(snippet, scope)
    config = scope["config"]
    assert config.training.mixed_precision == "fp16" and config.model.compile_model is True
    config.model.compile_model = False  # test_compile.py has the compiled step
    made = backends.engine(config, backend, "cpu")
    assert "float16" in str(made.model.compute_dtype) and made.model.gradient_checkpointing is True
    Trainer.start(config, here / "run", backend=backend, device="cpu", quiet=True).fit()
    assert np.isfinite(losses(here / "run")).all()


# ---- custom architectures ---------------------------------------------------------------------------------

CUSTOM = """
from icenet.models.base import BaseModel
import torch.nn as nn

class CustomModel(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        # Define layers
        self.custom_layer = nn.Linear(
            config.hidden_size,
            config.vocab_size
        )

    def forward(self, x):
        # Define forward pass
        return self.custom_layer(x)
"""
CUSTOM_YAML = "model: {type: custom_model.py:CustomModel, hidden_size: 8, vocab_size: 20}\ndevice: cpu\n"


def test_the_custom_model_as_printed(here: Path) -> None:
    """On `icenet` it is a PyTorch layer in an MLX model: it can be built and called, not trained."""
    scope: dict[str, Any] = {}
    exec(CUSTOM, scope)
    (here / "custom_model.py").write_text(CUSTOM)
    (here / "my.yaml").write_text(CUSTOM_YAML)
    config = Config.from_yaml("my.yaml").model
    model = scope["CustomModel"](config)
    inputs = torch.randn(2, 5, 8)
    for output in (model(inputs), model.forward(inputs)):
        assert tuple(output.shape) == (2, 5, 20)
        assert torch.equal(output, model.custom_layer(inputs))
    assert model.config is config


def test_the_custom_model_under_icenet_torch_trains(here: Path) -> None:
    (here / "custom_model.py").write_text(CUSTOM.replace("icenet.", "icenet_torch."))
    (here / "my.yaml").write_text(CUSTOM_YAML)
    model = front_door.build("my.yaml", "torch")
    assert list(model.weights()) == ["custom_layer.weight", "custom_layer.bias"]
    assert model.num_params == 8 * 20 + 20
    inputs = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    assert tuple(model(torch.from_numpy(inputs)).shape) == (4, 6, 20)
    engine = backends.engine(Config.from_yaml("my.yaml"), "auto")
    assert engine.backend == "torch"  # the only one it is written for
    batch = {"inputs": inputs, "labels": np.arange(24, dtype=np.int32).reshape(4, 6) % 20}
    found = [engine.read(engine.train_step(batch, step, 1e-2)).loss for step in range(3)]
    assert found[2] < found[1] < found[0]


def test_the_custom_model_of_the_page(here: Path) -> None:
    """The custom model of `docs/custom-models.md` as printed, and its PyTorch version as the page describes it."""
    (source,) = (block for block in code("docs/custom-models.md", "python") if "class CustomModel" in block)
    (settings,) = (block for block in code("docs/custom-models.md", "yaml") if "CustomModel" in block)
    (here / "my_models.py").write_text(source)
    twin = source.replace("import mlx.nn", "import torch.nn").replace("icenet.models", "icenet_torch.models")
    (here / "my_models_torch.py").write_text(twin)
    (here / "my.yaml").write_text(settings)
    short = ["training.max_steps=2", "training.batch_size=2", "data.source=text.txt", "device=cpu"]
    config = Config.from_yaml("my.yaml", short)
    for backend in BACKENDS:
        train(config, here / backend, backend)
    assert losses(here / "mlx") == pytest.approx(losses(here / "torch"), rel=1e-6)
    texts = {
        backend: front_door.generate(
            front_door.load(here / "mlx", backend, "cpu", trust_code=True), "def ", max_new_tokens=12, seed=1
        )
        for backend in BACKENDS
    }
    assert texts["mlx"] == texts["torch"]


# ---- the pages --------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """Returns every `icenet ...` of the pages, as (page, arguments): shell blocks and code in the text."""
    found = []
    for page in PAGES:
        lines = [line for block in code(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
        prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        lines += [" ".join(code.split()) for code in re.findall(r"`(icenet [^`]+)`", prose)]
        for line in lines:
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words and Path(words[0]).name == "icenet":
                    found.append((page, shlex.join(words[1:])))
    return list(dict.fromkeys(found))


def test_the_pages_have_commands() -> None:
    assert len(commands()) > 20
    assert {shlex.split(line)[0] for _, line in commands()} >= set(cli.commands) - {"schema"}


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_the_pages_parses(page: str, line: str) -> None:
    """Its options, presets and configuration keys exist."""
    words = shlex.split(line.split(" > ")[0])
    assert words[0] in cli.commands, line
    if len(words) == 1 and words[0] in (
        "bench",
        "chat",
        "convert",
        "generate",
        "parity",
        "plot",
        "predict",
        "prepare",
    ):
        return  # the page only names the command; it needs arguments
    above = click.Context(cli, info_name="icenet", **cli.context_settings)
    with cli.commands[words[0]].make_context(words[0], words[1:], parent=above) as context:
        given = context.params
    target = given.get("config") or (given.get("target") if words[0] in ("parity", "info") else None)
    # a model at a path needs the path
    overrides = [text for text in given.get("overrides") or () if not text.startswith("model.path=")]
    if target in presets.names():
        Config.from_yaml(target, overrides)
    elif overrides:
        Config.from_yaml("quickstart", overrides)
    if target is not None and target.startswith("configs/"):
        assert (ROOT / target).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_the_configurations_of_the_pages(page: str, here: Path) -> None:
    """Each is accepted, with a model added to those that have none."""
    for block in code(page, "yaml"):
        values = yaml.safe_load(block)
        (here / "page.yaml").write_text(block if "model" in values else f"{block}\nmodel: {{type: transformer}}\n")
        config = Config.from_yaml("page.yaml")
        for section in ("data", "training", "generation", "model"):
            for key, value in (values.get(section) or {}).items():  # an empty section is null
                found = getattr(getattr(config, section), key)
                if key == "parameter_groups":
                    assert [given.parameters for given in found] == [group["parameters"] for group in value]
                    continue
                assert found == (float(value) if isinstance(found, float) else value)  # PyYAML reads 5e-3 as a text


def test_the_python_of_the_readme(here: Path) -> None:
    """Both blocks run with smaller models, the second on both backends."""
    first, second = code("README.md", "python")
    first = first.replace("transformer-tiny", "my.yaml")
    second = second.replace("hidden_size=512, num_layers=6", "hidden_size=32, num_layers=1")
    for backend, package in PACKAGES.items():
        ids = np.zeros((1, 3), np.int64)
        scope: dict[str, Any] = {"input_ids": native(backend, ids)}
        exec(second.replace("icenet.", f"{package}."), scope)
        assert tuple(scope["logits"].shape) == (1, 3, 50000)
    model = "model: {type: transformer, hidden_size: 16, num_layers: 1, num_heads: 2, vocab_size: 257}"
    (here / "my.yaml").write_text(model + TRAIN)
    Trainer.start(Config.from_yaml("my.yaml"), here / "runs/quickstart/mlx", quiet=True).fit()
    scope = {}
    exec(first, scope)
    assert scope["model"].backend == "torch"


def test_the_number_of_types_in_the_readme() -> None:
    assert f"Hugging Face folders of {len(FAMILIES)} types" in (ROOT / "README.md").read_text(encoding="utf-8")


# ---- a new family -------------------------------------------------------------------------------------------

BAG = '''"""A bag of embeddings: the running sum of the embeddings, {name}."""

from __future__ import annotations

{imports}


class BagModel(BaseModel):
    """Embedding, running sum, output projection."""

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        self.embedding = ops.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = ops.Dropout(config.dropout)
        self.output = ops.Linear(config.hidden_size, config.vocab_size)
        self.power = config.power
        if seed is not None:
            self.init_weights(seed)

    def forward(self, input_ids: {array}) -> {array}:
        """Logits `[B, T, V]` of tokens `[B, T]`."""
        bags = {framework}.cumsum(self.embedding(input_ids), {axis}=1)
        return self.output(self.dropout(bags) ** self.power)
'''
BAG_CONFIG = '''class BagConfig(ModelConfig):
    """A bag."""

    type: Literal["bag"] = "bag"
    power: int = 1


'''
MLX_IMPORTS = """import icenet.blas  # noqa: F401

import mlx.core as mx

from icenet import nn as ops
from icenet.core.config import ModelConfig
from icenet.models.base import BaseModel"""
TORCH_IMPORTS = """import torch

from icenet.core.config import ModelConfig
from icenet_torch import nn as ops
from icenet_torch.models.base import BaseModel"""

PROGRAM = """
import json
from pathlib import Path

import numpy as np

import icenet
from icenet.core.config import Config
from icenet.commands.convert import convert_model
from icenet.core.training.trainer import Trainer
from icenet.parity.configuration.run import run

config = Config.from_yaml("bag.yaml")
models = {backend: icenet.build(config, backend) for backend in ("mlx", "torch")}
weights = [model.weights() for model in models.values()]
report = run(config, steps=3)
trainers = [Trainer.start(config, Path(backend), backend=backend, quiet=True).fit() for backend in models]
Trainer.resume(Path("mlx"), backend="torch", overrides=["training.max_steps=4"], quiet=True).fit()
convert_model(Path("torch"), Path("x.pt"), "torch", None, None, False)
texts = [icenet.generate(icenet.load("torch", backend=b), "a", max_new_tokens=5, seed=1) for b in models]
print(json.dumps({
    "place": icenet.__file__,
    "types": [type(model).__module__ for model in models.values()],
    "equal": all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0] | weights[1]),
    "moved": bool(np.abs(weights[0]["output.weight"]).max() > 0),
    "parity": report.passed,
    "steps": [trainer.step for trainer in trainers],
    "texts": texts,
}))
"""


def insert(file: Path, before: str, line: str) -> None:
    """Inserts lines into a file before a text that it contains once."""
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1
    file.write_text(text.replace(before, line + before), encoding="utf-8")


def test_a_family_added_as_the_readme_says(tmp_path: Path) -> None:
    """It needs one file per backend, the exports and its options, and no other change."""
    steps = (ROOT / "README.md").read_text(encoding="utf-8").split("## Add a model family")[1].split("\n## ")[0]
    for word in ("icenet/core/config/model.py", "FAMILIES", "icenet/models/NAME.py", "icenet_torch/models/NAME.py",
                 "models/__init__.py", "self.init_weights(seed)"):  # fmt: skip
        assert word in steps
    checkout = tmp_path / "checkout"
    for part in ("icenet", "icenet_torch", "configs"):  # with the compiled modules, which save seconds
        shutil.copytree(presets.folder() if part == "configs" else ROOT / part, checkout / part)

    families = checkout / "icenet/core/config/model.py"
    insert(families, "FAMILIES: dict", BAG_CONFIG)
    insert(families, '    "cnn": CNNConfig,\n', '    "bag": BagConfig,\n')
    words = {
        "icenet": {"name": "MLX", "imports": MLX_IMPORTS, "array": "mx.array", "framework": "mx", "axis": "axis"},
        "icenet_torch": {
            "name": "PyTorch",
            "imports": TORCH_IMPORTS,
            "array": "torch.Tensor",
            "framework": "torch",
            "axis": "dim",
        },
    }
    for package, change in words.items():
        models = checkout / package / "models"
        (models / "bag.py").write_text(BAG.format(**change), encoding="utf-8")
        insert(models / "__init__.py", f"from {package}.models.base", f"from {package}.models.bag import BagModel\n")
        insert(models / "__init__.py", '    "cnn": CNNModel,\n', '    "bag": BagModel,\n')

    write_text(tmp_path / "text.txt", 2000)
    settings = "device: cpu\nmodel: {type: bag, hidden_size: 16, vocab_size: 257, power: 2, dropout: 0.1}"
    (tmp_path / "bag.yaml").write_text(settings + TRAIN)
    paths = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "ICENET_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["place"]).is_relative_to(checkout)
    assert found["types"] == ["icenet.models.bag", "icenet_torch.models.bag"]
    assert found["equal"] and found["moved"] and found["parity"] and found["steps"] == [2, 2]
    assert found["texts"][0] == found["texts"][1]


def test_the_guides_families_have_their_own_sections() -> None:
    sections = {"transformer": TransformerConfig, "cnn": CNNConfig, "lstm": RecurrentConfig}
    for family, section in sections.items():
        assert isinstance(Config.from_dict({"model": {"type": family}}).model, section)
