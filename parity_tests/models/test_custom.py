"""Models in a user's Python file: they do what built-in models do, on both backends; errors are one line; a
file that only a checkpoint names is not run without --trust-code."""

from __future__ import annotations

import json
import py_compile
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import icenet.blas

import numpy as np
import pytest
import yaml
from helpers import (
    BACKENDS,
    both_backends,
    error_line,
    is_one_line,
    losses,
    metrics,
    native,
    resume,
    same_bits,
    start_python,
    state,
    train,
    tree,
    write_text,
)

import icenet as front_door
from icenet.cli.main import main
from icenet.core.config import Config, CustomConfig, custom, user_code
from icenet.core.errors import BackendError, ConfigError, IceNetError, UsageError, WeightsError
from icenet.core.runs import checkpoint
from icenet.core.training.trainer import Trainer
from icenet.core.weights import files as weight_files
from icenet.parity.curves import judge_curve
from icenet.parity.engines import build
from icenet.parity.run import curves, run

mx: Any = pytest.importorskip("mlx.core")
torch: Any = pytest.importorskip("torch")

TEXT = {
    "my_models.py": """
import mlx.core as mx
import mlx.nn as nn

from icenet.models.base import BaseModel


class CustomModel(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.gain = config.gain * mx.arange(1, config.hidden_size + 1)
        self.custom_layer = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x):
        past = mx.cumsum(self.embedding(x), axis=1)
        return self.custom_layer(self.gain * mx.tanh(self.hidden(self.norm(past))))


class ImageModel(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(1, config.hidden_size, 7)
        self.norm = nn.BatchNorm(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, images):
        x = nn.relu(self.norm(self.conv(images)))
        return self.classifier(x.mean(axis=(1, 2)))
""",
    "my_models_torch.py": """
import torch
import torch.nn as nn

from icenet_torch.models.base import BaseModel


class CustomModel(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.gain = nn.Parameter(config.gain * torch.arange(1, config.hidden_size + 1, dtype=torch.float32))
        self.custom_layer = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x):
        past = torch.cumsum(self.embedding(x), dim=1)
        return self.custom_layer(self.gain * torch.tanh(self.hidden(self.norm(past))))


class ImageModel(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(1, config.hidden_size, 7)
        self.norm = nn.BatchNorm2d(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, images):
        x = torch.relu(self.norm(self.conv(images)))
        return self.classifier(x.mean(dim=(2, 3)))
""",
    "one_mlx.py": """
import mlx.nn as nn

from icenet.models.base import BaseModel


class Only(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, x):
        return self.embedding(x)
""",
    "one_torch.py": """
import torch.nn as nn

from icenet_torch.models.base import BaseModel


class Only(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, x):
        return self.embedding(x)
""",
}

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "seed": 3,
    "model": {"type": "my_models.py:CustomModel", "hidden_size": 16, "vocab_size": 257, "gain": 0.125},
    "data": {"source": "text.txt", "seq_length": 24},
    "training": {
        "max_steps": 20,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "eval_every": 10,
        "eval_batches": 2,
        "checkpoint_every": 10,
    },
}
IMAGES: dict[str, Any] = {
    **SETTINGS,
    "model": {"type": "my_models.py:ImageModel", "hidden_size": 16, "vocab_size": 10},
    "data": {"kind": "images", "source": "digits"},
    "training": {"max_steps": 60, "batch_size": 32, "learning_rate": 3e-2, "eval_every": 30},
}
ONLY = {"type": "one_mlx.py:Only", "hidden_size": 1, "vocab_size": 257}


@pytest.fixture(autouse=True)
def distrust(no_plots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts each test like a new process: no file is trusted."""
    monkeypatch.setattr(custom, "_trusted", set())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the working directory, with the models, a text and the configurations."""
    write_text(tmp_path / "text.txt")
    for name, text in TEXT.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / "images.yaml").write_text(yaml.safe_dump(IMAGES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def failure(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must fail and returns its error."""
    capfd.readouterr()
    assert main(arguments) in (1, 2)
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err and "ICENET_DEBUG" not in err
    return error_line(err)


def with_model(**model: Any) -> dict[str, Any]:
    return {**SETTINGS, "model": {"hidden_size": 16, "vocab_size": 257, **model}}


# ---- like a built-in model --------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("mlx", "torch"), ("torch", "mlx")])
def test_a_run_that_changes_backend(first: str, second: str, here: Path) -> None:
    config = Config.from_yaml("my.yaml")
    Trainer.start(config, here / "run", backend=first, quiet=True).fit(until=10)
    result = Trainer.resume(here / "run", backend=second, quiet=True).fit()
    assert result.validation_loss is not None and np.isfinite(result.validation_loss)
    three = curves(build(config), 20)
    assert judge_curve(losses(here / "run"), three["PyTorch"], three["PyTorch float64"]).passed
    assert losses(here / "run")[-1] < 0.8 * losses(here / "run")[0]
    assert sum("validation_loss" in record for record in metrics(here / "run")) == 2


@both_backends
def test_a_resumed_run_is_the_uninterrupted_one(backend: str, here: Path) -> None:
    config = Config.from_yaml("my.yaml")
    train(config, here / "whole", backend)
    train(config, here / "parts", backend, until=10)
    resume(here / "parts")
    assert same_bits(state(here / "parts"), state(here / "whole"))
    assert {"gain", "gain.exp_avg"} <= state(here / "parts").keys()


def test_generation_without_a_cache(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The text equals that of a forward pass over the whole context per token, on both backends, streamed or not."""
    Trainer.start(Config.from_yaml("my.yaml"), here / "run", backend="mlx", quiet=True).fit()
    texts = {}
    for backend in BACKENDS:
        model = front_door.load(here / "run", backend, "cpu", trust_code=True)
        ids = [list(b"alpha")]
        found = model.generate(native(backend, np.array(ids)), max_new_tokens=8, temperature=0).tolist()
        for _ in range(8):
            logits = np.array(model(native(backend, np.array(ids))).tolist())
            ids[0].append(int(logits[0, -1].argmax()))
        assert found == ids
        options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.8, "top_k": 20, "seed": 4}
        texts[backend] = front_door.generate(model, "beta ", **options)
        assert "".join(front_door.generate(model, "beta ", stream=True, **options)) == texts[backend]
    assert texts["mlx"] == texts["torch"] and len(texts["mlx"]) > 20
    arguments = ["--prompt", "x", "--max-new-tokens", "3", "--temperature", "0", "--device", "cpu", "--trust-code"]
    capfd.readouterr()
    assert main(["generate", "run", *arguments]) == 0
    assert capfd.readouterr().out.startswith("x")


def test_conversion_there_and_back(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Trainer.start(Config.from_yaml("my.yaml"), here / "run", backend="torch", quiet=True).fit(until=2)
    for source, target, form in (("run", "m.safetensors", "mlx"), ("m.safetensors", "t.pt", "torch")):
        assert main(["convert", source, target, "--to", form, "--config", "my.yaml"]) == 0
    assert main(["convert", "t.pt", "back", "--to", "canonical", "--config", "my.yaml"]) == 0
    before, after = checkpoint.find(here / "run").weights, weight_files.read(here / "back")
    assert same_bits(dict(before), dict(after))
    model = front_door.build("my.yaml", "mlx")
    model.load_weights("m.safetensors")
    assert same_bits(model.weights(), dict(before))
    assert same_bits(front_door.load("back", "torch", trust_code=True).weights(), dict(before))


def test_convolutions_of_a_custom_model_are_converted(here: Path) -> None:
    models = {backend: front_door.build("images.yaml", backend, "cpu") for backend in BACKENDS}
    assert models["mlx"].conv.weight.shape == (16, 7, 7, 1)
    assert models["mlx"].weights()["conv.weight"].shape == (16, 1, 7, 7)
    assert same_bits(models["mlx"].weights(), models["torch"].weights())


def test_saved_and_loaded(here: Path) -> None:
    model = front_door.build("my.yaml", "mlx")
    front_door.save(model, here / "saved")
    again = front_door.load(here / "saved", "torch", "cpu", trust_code=True)
    assert same_bits(model.weights(), again.weights())
    assert again.config.gain == 0.125


def test_parity(here: Path) -> None:
    report = run(Config.from_yaml("my.yaml"), steps=20)
    assert report.passed and report.curve is not None
    assert report.num_weights == 8 and not report.unequal_weights  # two biases of linear layers, one of the norm
    judged = {row.path for section in report.sections for row in section.rows}
    assert any("gain" in path for path in judged)


def test_parity_finds_a_difference_between_the_backends(here: Path) -> None:
    file = here / "my_models_torch.py"
    file.write_text(file.read_text().replace("torch.tanh(", "1.001 * torch.tanh("))
    assert not run(Config.from_yaml("my.yaml")).passed


def test_an_image_classifier(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from icenet.core.data.datasets import dataset_for

    config = Config.from_yaml("images.yaml")
    data: Any = dataset_for(config)
    assert run(config, batch=data.train_batch(0, 8)).passed
    Trainer.start(config, here / "run", backend="mlx", quiet=True).fit(until=30)
    result = Trainer.resume(here / "run", backend="torch", quiet=True).fit()
    assert result.validation_accuracy is not None and result.validation_accuracy > 0.4  # by chance: 0.1
    rows = data.validation[:40]
    (here / "pictures").mkdir()
    for number, image in enumerate(data.source.images.take(rows)):
        Image.fromarray(np.kron(image[:, :, 0], np.ones((4, 4), np.uint8))).save(here / f"pictures/{number:03}.png")
    capfd.readouterr()
    tables = []
    for backend in BACKENDS:
        arguments = ["run", "pictures", "--json", "--trust-code", "--device", "cpu", "--backend", backend]
        assert main(["predict", *arguments]) == 0
        tables.append(json.loads(capfd.readouterr().out))
    assert [row["class"] for row in tables[0]] == [row["class"] for row in tables[1]]
    right = sum(row["class"] == str(data.source.labels[index]) for row, index in zip(tables[0], rows, strict=True))
    assert right >= 14


def test_the_parity_command_on_an_image_classifier(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "images.yaml", "--json"]) == 0, capfd.readouterr()


@both_backends
def test_arrays_that_a_module_creates_keep_their_values(backend: str, here: Path) -> None:
    model = front_door.build("my.yaml", backend, "cpu")
    weights = model.weights()
    np.testing.assert_array_equal(weights["gain"], 0.125 * np.arange(1, 17, dtype=np.float32))
    assert np.abs(weights["embedding.weight"]).max() < 2 and not weights["custom_layer.bias"].any()
    assert "gain" in model.trainable_paths()
    model.set_weights({**weights, "gain": np.full(16, 3, np.float32)})
    front_door.save(model, here / "saved")
    again = front_door.load(here / "saved", backend, "cpu", trust_code=True)
    assert (again.weights()["gain"] == 3).all()  # the stored value, not that of __init__


def test_initial_weights_are_a_function_of_the_seed(here: Path) -> None:
    found = [front_door.build(Config.from_yaml("my.yaml", [f"seed={seed}"]), "torch").weights() for seed in (3, 3, 4)]
    assert same_bits(found[0], found[1]) and not same_bits(found[0], found[2])


# ---- options ----------------------------------------------------------------------------------------------


def test_custom_options(here: Path) -> None:
    config = Config.from_yaml("my.yaml", ["model.gain=0.5", "model.more={a: [1, 2.5, x]}", "model.flag=true"])
    assert isinstance(config.model, CustomConfig)
    read: Any = config.model
    assert (read.gain, read.more, read.flag) == (0.5, {"a": [1, 2.5, "x"]}, True)
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config
    model = front_door.build(config, "torch")
    assert model.weights()["gain"][1] == 1.0
    with pytest.raises(ConfigError, match="hidden_size"):
        Config.from_yaml("my.yaml", ["model.hidden_size=-1"])


@both_backends
def test_a_missing_option(backend: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "bare.yaml").write_text(yaml.safe_dump(with_model(type="my_models.py:CustomModel")))
    line = failure(["train", "bare.yaml", "--run", "run", "--backend", backend], capfd)
    assert is_one_line(line, "model.gain", "my_models.py:CustomModel", "--set")


def test_a_missing_option_with_a_name_unlike_all_others() -> None:
    config: Any = CustomConfig(type="a.py:B", hidden_size=8, vocab_size=8)
    with pytest.raises(ConfigError) as caught:
        config.depth  # noqa: B018
    assert is_one_line(caught.value, "model.depth", "known: ", "dropout") and "did you mean" not in str(caught.value)


@both_backends
def test_an_option_that_only_forward_reads(backend: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also through `getattr` with a default, which returns the default."""
    for name, text in TEXT.items():
        text = text.replace("config.gain *", "getattr(config, 'more', 1.0) *")
        (here / name).write_text(text.replace("self.gain *", "self.config.gian *"))
    line = failure(["train", "my.yaml", "--run", "run", "--backend", backend], capfd)
    assert is_one_line(line, "model.gian", "did you mean gain?")
    assert not (here / "run" / "checkpoints").exists()


@both_backends
def test_a_class_that_does_not_call_super(backend: str, here: Path) -> None:
    """MLX notices nothing in `__init__`, PyTorch at the first layer."""
    for name, text in TEXT.items():
        (here / name).write_text(text.replace("super().__init__(config)", "self.config = config"))
    with pytest.raises(IceNetError) as caught:
        front_door.build("my.yaml", backend, "cpu")
    assert is_one_line(caught.value, "my_models.py:CustomModel", "__init__")


@both_backends
def test_a_class_that_calls_super_late(backend: str, here: Path) -> None:
    """In MLX a frozen array needs it, in PyTorch each layer."""
    for name, text in TEXT.items():
        late = (
            "self.layer = nn.Linear(2, 2)\n        self.freeze()" if "mlx" in text else "self.layer = nn.Linear(2, 2)"
        )
        (here / name).write_text(text.replace("super().__init__(config)", late))
    with pytest.raises(UsageError) as caught:
        front_door.build("my.yaml", backend, "cpu")
    assert is_one_line(caught.value, "CustomModel: __init__", "super().__init__", ".py, line ")


@both_backends
@pytest.mark.parametrize("method", ["__call__", "run"])
def test_a_class_without_forward(method: str, backend: str, here: Path) -> None:
    for name, text in TEXT.items():
        (here / name).write_text(text.replace("def forward(", f"def {method}("))
    with pytest.raises(UsageError) as caught:
        front_door.build("my.yaml", backend, "cpu")
    assert is_one_line(
        caught.value, "my_models.py:CustomModel", "method forward", "__call__" if method == "__call__" else "no"
    )


@both_backends
def test_logits_without_a_gradient(backend: str, here: Path) -> None:
    """MLX computes gradients of zero, PyTorch none."""
    file = here / ("my_models_torch.py" if backend == "torch" else "my_models.py")
    text = file.read_text()
    line = next(line for line in text.splitlines() if "return" in line and "self.norm(past)" in line)
    logits = line.split("return ")[1]
    new = f"{logits}.detach()" if backend == "torch" else f"mx.stop_gradient({logits})"
    file.write_text(text.replace(logits, new))
    with pytest.raises(UsageError) as caught:
        train(Config.from_yaml("my.yaml"), here / "run", backend, until=1)
    assert is_one_line(caught.value, "forward detaches", "detach()" if backend == "torch" else "mx.stop_gradient()")


def test_a_file_that_imports_mlx_first_gets_the_fast_blas(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bool] = []
    monkeypatch.setattr(icenet.blas.load.__module__ + ".load", lambda: loaded.append(True))
    (here / "imports.py").write_text("import math\n")
    user_code.run_file(here / "imports.py")
    assert not loaded
    (here / "imports.py").write_text("import math\nimport mlx.core as mx\n")
    user_code.run_file(here / "imports.py")
    assert loaded


def test_an_mlx_layer_with_the_method_forward(here: Path) -> None:
    layer = "import mlx.nn as nn\nclass Layer(nn.Module):\n    def forward(self, x):\n        return x\n"
    (here / "layer.py").write_text(f"{layer}def call(x):\n    return Layer()(x)\n")
    inputs = mx.zeros((2, 3), mx.int32)
    with pytest.raises(UsageError) as caught, user_code.explain_errors(inputs):
        user_code.run_file(here / "layer.py").call(inputs)
    assert is_one_line(caught.value, "layer.py, line 6", "__call__") and "images" not in str(caught.value)


@both_backends
def test_an_error_of_a_model_that_generates(backend: str, here: Path) -> None:
    for name, text in TEXT.items():
        (here / name).write_text(text.replace("self.gain *", "self.absent *"))
    model = front_door.build("my.yaml", backend, "cpu")
    with pytest.raises(UsageError) as caught:
        front_door.generate(model, "a", max_new_tokens=2)
    assert is_one_line(caught.value, ".py, line ", "absent")


def test_an_option_of_a_wrong_type(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = failure(["train", "my.yaml", "--run", "run", "--set", "model.gain=[]", "--backend", "torch"], capfd)
    assert "my_models.py:CustomModel" in line and "under model" in line


# ---- one backend only -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "other"), [("mlx", "torch"), ("torch", "mlx")])
def test_written_for_one_backend(given: str, other: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    family = f"one_{given}.py:Only"
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": family}})
    (here / "one.yaml").write_text(config.to_yaml())
    assert main(["train", "one.yaml", "--run", "run", "--quiet", "--set", "training.max_steps=2"]) == 0
    assert checkpoint.find(here / "run").step == 2
    assert front_door.build("one.yaml").backend == given
    line = failure(["train", "one.yaml", "--run", "no", "--backend", other], capfd)
    assert f"{family} is written for {given} only" in line and f"--backend {given}" in line
    assert f"_{other}.py:Only" in line
    assert "is written for" in failure(["parity", "one.yaml"], capfd)
    arguments = ["train", "--resume", "run", "--trust-code", "--set", "training.max_steps=4"]
    line = failure([*arguments, "--backend", other], capfd)
    assert f"written for {given} only" in line
    assert main(["info", "run", "--trust-code"]) == 0
    assert main(["convert", "run", "x.safetensors", "--to", "mlx", "--trust-code"]) == 0
    with pytest.raises(BackendError, match=f"written for {given} only"):
        front_door.load("run", other, trust_code=True)


def test_a_file_for_the_other_backend_without_the_class(here: Path) -> None:
    (here / "both.py").write_text(TEXT["one_mlx.py"].replace("Only", "Mine"))
    (here / "both_torch.py").write_text(TEXT["one_torch.py"].replace("Only", "Other"))
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "both.py:Mine"}})
    assert front_door.build(config, "mlx").backend == "mlx"
    with pytest.raises(BackendError, match="written for mlx only"):  # the class there has another name
        front_door.build(config, "torch")


def test_a_file_that_cannot_be_imported_is_not_reported_as_missing(here: Path) -> None:
    (here / "my_models_torch.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(UsageError, match=r"my_models_torch\.py.*a_package_that_is_not_there"):
        front_door.build("my.yaml", "torch")


# ---- errors ----------------------------------------------------------------------------------------------

WRONG = {
    "no file": (None, r"model\.type: bad\.py: no such file"),
    "a folder": ("FOLDER", r"bad\.py: no such file"),
    "syntax": ("def f(:\n    pass\n", r"bad\.py cannot be run: SyntaxError: invalid syntax .*line 1"),
    "raises": ("1 / 0\n", r"bad\.py cannot be run: ZeroDivisionError: division by zero"),
    "raises lines": (
        'raise ValueError("first\\nsecond")\n',
        r"bad\.py cannot be run: ValueError: first \(bad\.py, line 1\)$",
    ),
    "raises nothing": ("raise RuntimeError\n", r"bad\.py cannot be run: RuntimeError"),
    "exits": ("import sys\nsys.exit(0)\n", r"bad\.py cannot be run: SystemExit"),
    "imports a missing module": ("import nowhere_at_all\n", r"bad\.py.* imported: No module named 'nowhere"),
    "no text": ("\0\1", r"bad\.py cannot be run: (ValueError|SyntaxError): "),
    "no class": ("class Other: pass\n", r"bad\.py has no class Model that is a subclass of icenet(_torch)?\.models"),
    "no model": ("class Model: pass\n", r"bad\.py has no class Model that is a subclass of"),
    "a function": ("def Model(config): pass\n", r"bad\.py has no class Model that is a subclass of"),
    "a lookalike": (
        "class Model:\n    backend = 'torch'\n    def __init__(self, config): pass\n    def forward(self, x): pass\n",
        r"bad\.py has no class Model that is a subclass of",
    ),
    "the base itself": (
        "from icenet_torch.models.base import BaseModel as Model\n",
        r"bad\.py has no class Model that is a subclass of",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_file_is_an_error(name: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, message = WRONG[name]
    if text == "FOLDER":
        (here / "bad.py").mkdir()
    elif text is not None:
        (here / "bad.py").write_text(text)
    (here / "bad.yaml").write_text(yaml.safe_dump(with_model(type="bad.py:Model")))
    for backend in ("torch", "auto"):
        line = failure(["train", "bad.yaml", "--run", "run", "--backend", backend], capfd)
        assert re.search(message, line.strip()), line
    assert not (here / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "family", ["my_models.py", "my_models:CustomModel", "my_models.py:", ":X", "a.py:b c", "a.py:1"]
)
def test_invalid_types(family: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "bad.yaml").write_text(yaml.safe_dump(with_model(type=family)))
    assert "model.type" in failure(["train", "bad.yaml", "--run", "run"], capfd)


def test_a_changed_file_is_read_again(here: Path) -> None:
    """Also with the same length and modification time, which Python's compiled files do not detect."""
    file = here / "one_torch.py"
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "one_torch.py:Only"}})
    assert "embedding.weight" in front_door.build(config, "torch").weights()
    file.write_text(file.read_text().replace("self.embedding", "self.amendment"))
    assert list(front_door.build(config, "torch").weights()) == ["amendment.weight"]


def test_code_that_changes_after_training_is_named(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The weights compute something else then."""
    file = here / "one_torch.py"
    text = file.read_text()
    (here / "sub").mkdir()
    (here / "sub" / "factor.py").write_text("FACTOR = 1\n")
    file.write_text(text.replace("class Only", "from sub.factor import FACTOR\n\n\nclass Only"))
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "one_torch.py:Only"}})
    train(config, here / "run", "torch", 1)
    front_door.load(here / "run", "torch", trust_code=True)
    assert not caplog.messages
    (here / "sub" / "factor.py").write_text("FACTOR = 2\n")
    front_door.load(here / "run", "torch", trust_code=True)
    step = here / "run" / "checkpoints" / "step-00000001"
    expected = f"was trained with another version of {Path('sub', 'factor.py')}"
    assert len(caplog.messages) == 1 and is_one_line(caplog.messages[0], str(step), expected)
    with custom.everything_trusted():
        assert sum(expected in note for note in Trainer.resume(here / "run", quiet=True).notes) == 1


def test_code_that_changes_after_saving_is_named(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A saved model records its code, and so does a conversion of a checkpoint or of a saved model."""
    file = here / "one_torch.py"
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "one_torch.py:Only"}})
    train(config, here / "run", "torch", 1)
    front_door.save(front_door.build(config, "torch"), here / "saved")
    assert main(["convert", "run", "converted", "--to", "canonical", "--trust-code"]) == 0
    assert main(["convert", "saved", "again", "--to", "canonical", "--trust-code"]) == 0
    for name in ("saved", "converted", "again"):
        front_door.load(here / name, "torch", trust_code=True)
    assert not caplog.messages
    file.write_text(file.read_text() + "\n# another version\n")
    for name in ("saved", "converted", "again"):
        caplog.clear()
        front_door.load(here / name, "torch", trust_code=True)
        assert is_one_line(*caplog.messages, name, "saved with another version of one_torch.py")


def test_an_expanded_buffer(here: Path) -> None:
    """PyTorch's load_state_dict cannot write to it. Such constants are loaded; other values are named."""
    file = here / "one_torch.py"
    line = "        self.register_buffer('scale', torch.full((1,), 0.5).expand(257))\n"
    text = file.read_text().replace("import torch.nn", "import torch\nimport torch.nn")
    text = text.replace("\n    def forward", f"{line}\n    def forward").replace("(x)\n", "(x) * self.scale\n")
    file.write_text(text)
    config = Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "one_torch.py:Only"}})
    train(config, here / "run", "torch", 1)
    loaded = front_door.load(here / "run", "torch", trust_code=True).weights()
    assert (loaded["scale"] == 0.5).all()
    model = front_door.build(config, "torch")
    model.set_weights(loaded)
    assert same_bits(model.weights(), loaded)
    with pytest.raises(WeightsError) as caught:
        model.set_weights({**loaded, "scale": np.arange(257, dtype=np.float32)})
    assert is_one_line(caught.value, "scale", "expanded", "buffer.clone()")


# ---- modules next to the file -----------------------------------------------------------------------------

LAYERS = """
import torch.nn as nn

WIDTH = {width}


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x):
        from parts.gain import gain  # also when the layer is called

        return gain(self.linear(x))
"""
WITH_LAYERS = """
import random

import layers
import parts.gain
from icenet_torch.models.base import BaseModel
from layers import Scale
from parts import gain
from . import layers as again

assert again is layers and random.Random and parts.gain is gain


class Model(BaseModel):
    width = layers.WIDTH

    def __init__(self, config):
        super().__init__(config)
        self.scale = Scale(config.hidden_size)

    def forward(self, x):
        return self.scale(x)
"""


def write_with_layers(folder: Path, width: int = 1) -> None:
    """Writes a model for PyTorch that imports a module and a package next to it."""
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "__init__.py").touch()
    (folder / "parts" / "gain.py").write_text(f"def gain(x):\n    return {width} * x\n")
    (folder / "layers.py").write_text(LAYERS.format(width=width))
    (folder / "model.py").write_text(WITH_LAYERS)


def custom_model(file: str) -> Any:
    return front_door.build(Config.from_dict(with_model(type=f"{file}:Model", hidden_size=4)), "torch", "cpu")


def test_modules_next_to_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models whose siblings have the same names, also from another working directory, and after a change."""
    write_with_layers(here / "one", 1)
    write_with_layers(here / "two", 2)
    path, modules = list(sys.path), set(sys.modules)
    models = [custom_model("one/model.py"), custom_model("two/model.py")]
    monkeypatch.chdir(here / "two")
    x = torch.ones(1, 4)
    for model, width in zip(models, (1, 2), strict=True):
        assert model.width == width
        assert torch.equal(model(x), width * torch.nn.functional.linear(x, model.scale.linear.weight))
    assert sys.path == path and not {"layers", "parts", "parts.gain"} & (set(sys.modules) - modules)
    file = here / "one" / "layers.py"
    file.write_text(file.read_text().replace("WIDTH = 1", "WIDTH = 3"))
    assert custom_model(str(here / "one" / "model.py")).width == 3


def test_a_folder_of_data_hides_no_installed_module(here: Path) -> None:
    write_with_layers(here / "one")
    (here / "one" / "yaml").mkdir()
    file = here / "one" / "model.py"
    file.write_text("import yaml\nyaml.safe_load('a')\n" + file.read_text())
    assert custom_model("one/model.py").width == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nowhere", ["No module named 'nowhere'", "layers.py, line 2"]),
        ("from .nowhere import x", ["No module named 'nowhere'", "layers.py, line 2"]),
        ("from parts import nowhere", ["cannot import name 'nowhere' from 'parts'", "layers.py, line 2"]),
        ("1 / 0", ["ZeroDivisionError: division by zero", "layers.py, line 2"]),
        ("1 +", ["SyntaxError", "layers.py, line 2"]),
    ],
)
def test_errors_in_a_module_next_to_the_file(text: str, expected: list[str], here: Path) -> None:
    write_with_layers(here / "one")
    (here / "one" / "layers.py").write_text(f"\n{text}\n")
    with pytest.raises(UsageError) as caught:
        custom_model("one/model.py")
    assert is_one_line(str(caught.value), "one/model.py", *expected), caught.value
    write_with_layers(here / "again")  # nothing of the failed import remains
    (here / "one" / "layers.py").write_text((here / "again" / "layers.py").read_text())
    assert custom_model("one/model.py").width == 1


# ---- trust ------------------------------------------------------------------------------------------------

EVIL = "from pathlib import Path\nPath(r'{marker}').write_text('run')\n"


@pytest.fixture
def trap(here: Path) -> Path:
    """Runs, a checkpoint and a saved model from elsewhere. Their Python files write a mark when they are run."""
    for name, model in (("my.yaml", "run"), ("images.yaml", "pictures")):
        train(Config.from_yaml(name), here / model, "torch", until=2)
    front_door.save(front_door.build("my.yaml", "torch"), here / "saved")
    for name in ("my_models.py", "my_models_torch.py"):
        (here / name).write_text(EVIL.format(marker=here / "MARK") + TEXT[name])
    custom._trusted.clear()
    return here


NEWEST = "run/checkpoints/step-00000002"
COMMANDS = {
    "resume": "train --resume run",
    "resume a checkpoint": f"train --resume {NEWEST} --run other",
    "resume elsewhere": "train --resume run --backend mlx --set seed=3",
    "generate": "generate run --prompt x --max-new-tokens 1",
    "generate a checkpoint": f"generate {NEWEST} --prompt x --backend mlx",
    "generate a saved model": "generate saved --prompt x --max-new-tokens 1",
    "predict": "predict pictures picture.png",
    "convert": "convert run x.safetensors --to mlx",
    "convert a checkpoint": f"convert {NEWEST} x.safetensors --to mlx",
    "convert a saved model": "convert saved/model.safetensors y.pt --to torch",
    "convert to a folder": "convert saved folder --to canonical",
    "info": "info run",
    "info of a checkpoint": f"info {NEWEST}",
    "info of a saved model": "info saved",
    "parity": "parity run",
    "parity of a checkpoint": f"parity {NEWEST}",
    "parity of a saved model": "parity saved",
}


def picture(folder: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "picture.png")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_does_not_run_the_file_of_a_checkpoint(
    name: str, trap: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture(trap)
    before = tree(trap)
    line = failure(COMMANDS[name].split(), capfd)
    assert "--trust-code" in line and "my_models.py" in line
    assert not (trap / "MARK").exists()
    assert tree(trap) == before


def test_with_trust_code_the_commands_run(trap: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the same files, so the errors above are due to the missing flag."""
    picture(trap)
    for name in ("resume", "generate", "predict", "convert", "info of a saved model", "convert to a folder"):
        mark = trap / "MARK"
        mark.unlink(missing_ok=True)
        # a file is run once per process: write another version
        for file in ("my_models.py", "my_models_torch.py"):
            (trap / file).write_text((trap / file).read_text() + f"# {name}\n")
        quick = ["--quiet"] if name == "resume" else []
        assert main([*COMMANDS[name].split(), *quick, "--trust-code"]) == 0, (name, capfd.readouterr().err)
        assert mark.exists(), name


def test_the_flag_is_for_one_command(trap: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A program may call `main` more than once."""
    assert main([*COMMANDS["info"].split(), "--trust-code"]) == 0
    assert "--trust-code" in failure(COMMANDS["info"].split(), capfd)
    failure(["info", "nowhere", "--trust-code"], capfd)
    assert "--trust-code" in failure(COMMANDS["info"].split(), capfd)


@pytest.mark.parametrize("place", ["run", NEWEST, "saved"])
def test_load_needs_trust_code(place: str, trap: Path) -> None:
    with pytest.raises(UsageError, match="--trust-code"):
        front_door.load(place)
    with pytest.raises(UsageError, match="--trust-code"):
        front_door.generate(place, "x")
    assert not (trap / "MARK").exists()
    assert front_door.load(place, "torch", trust_code=True).num_params > 0
    assert (trap / "MARK").exists()


def test_trust_of_one_file_is_not_trust_of_another(trap: Path) -> None:
    front_door.load("run", "torch", trust_code=True)
    (trap / "MARK").unlink()
    (trap / "far").mkdir()
    shutil.copy(trap / "my_models_torch.py", trap / "far" / "my_models.py")
    text = (trap / "saved" / "config.yaml").read_text()
    (trap / "saved" / "config.yaml").write_text(text.replace("my_models.py:", "far/my_models.py:"))
    with pytest.raises(UsageError, match="--trust-code"):
        front_door.load("saved", "torch")
    assert not (trap / "MARK").exists()


@pytest.mark.parametrize("begun", ["metrics.jsonl", ".lock"])
def test_a_run_without_a_checkpoint_needs_trust_code(
    begun: str, trap: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed before its first checkpoint starts again from its config.yaml."""
    folder = trap / "sent"
    folder.mkdir()
    shutil.copy(trap / "run" / "config.yaml", folder)
    (folder / begun).touch()
    for model in ("my_models.py:CustomModel", str(trap / "my_models.py") + ":CustomModel"):
        text = yaml.safe_load((folder / "config.yaml").read_text())
        text["model"]["type"] = model
        (folder / "config.yaml").write_text(yaml.safe_dump(text))
        line = failure(["train", "--resume", str(folder), "--backend", "torch"], capfd)
        assert "--trust-code" in line
        assert not (trap / "MARK").exists()


@pytest.mark.parametrize("way", ["absolute", "parent", "next to it", "inside", "dots", "symlink"])
def test_paths_in_the_config_of_a_checkpoint(way: str, trap: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = trap / "saved"
    away = trap / "away"
    away.mkdir()
    (away / "x.py").write_text(EVIL.format(marker=trap / "MARK") + TEXT["my_models_torch.py"])
    shutil.copy(away / "x.py", saved / "x.py")
    if way == "symlink":
        (trap / "link.py").symlink_to(away / "x.py")
    file = {
        "absolute": str(away / "x.py"),
        "parent": "../away/x.py",  # from the folder of the config
        "next to it": "x.py",
        "inside": "saved/x.py",
        "dots": "./away/../away/./x.py",
        "symlink": "link.py",
    }[way]
    values = yaml.safe_load((saved / "config.yaml").read_text())
    values["model"]["type"] = f"{file}:CustomModel"
    (saved / "config.yaml").write_text(yaml.safe_dump(values))
    for command in ("generate saved --prompt x", "info saved", "convert saved/model.safetensors z.pt --to torch"):
        assert "--trust-code" in failure(command.split(), capfd)
    with pytest.raises(IceNetError, match="--trust-code"):
        front_door.load("saved")
    assert not (trap / "MARK").exists()
    assert front_door.load("saved", "torch", trust_code=True).num_params > 0
    assert (trap / "MARK").exists()


def test_another_config_does_not_grant_trust(trap: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither `--config` of a built-in model nor overrides run the checkpoint's file."""
    assert "--trust-code" in failure(["info", "run", "--set", "model.hidden_size=8"], capfd)
    assert main(["convert", "run", "x.pt", "--to", "torch", "--config", "transformer-tiny"]) in (1, 2)
    assert not (trap / "MARK").exists()


def test_compiled_files_are_not_run(here: Path) -> None:
    """A compiled file next to a harmless source file, which Python would load without a check."""
    from importlib.util import cache_from_source

    (here / "helper.py").touch()
    (here / "one_torch.py").write_text("import helper\n" + TEXT["one_torch.py"])
    evil, never = here / "evil.py", py_compile.PycInvalidationMode.UNCHECKED_HASH
    for name in ("one_torch.py", "helper.py"):
        evil.write_text(EVIL.format(marker=here / "MARK") + (here / name).read_text())
        cached = cache_from_source(str(here / name))
        py_compile.compile(str(evil), cfile=cached, dfile=str(here / name), invalidation_mode=never)
    front_door.build(Config.from_dict({**SETTINGS, "model": {**ONLY, "type": "one_torch.py:Only"}}), "torch")
    assert not (here / "MARK").exists()


def test_reading_a_config_does_not_run_the_file(trap: Path) -> None:
    Config.from_yaml("my.yaml").checked().to_yaml()
    checkpoint.find(trap / "run")
    assert not (trap / "MARK").exists()


# ---- paths and processes ----------------------------------------------------------------------------------


def test_a_file_next_to_the_yaml_from_another_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    config = Config.from_yaml("../my.yaml", [f"data.source={here / 'text.txt'}"])
    assert custom.split(config.model.type)[0].resolve() == here / "my_models.py"
    for backend in BACKENDS:
        assert front_door.build(config, backend, "cpu").backend == backend
    train(config, here / "run", "torch", until=2)
    assert front_door.load(here / "run", "mlx", trust_code=True).num_params > 0


def test_the_working_folder_comes_first(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (here / "work").mkdir()
    shutil.copy(here / "one_torch.py", here / "work" / "my_models.py")
    monkeypatch.chdir(here / "work")
    assert custom.resolve("my_models.py:X", here) == "my_models.py:X"
    assert custom.resolve("my_models_torch.py:X", here) == "../my_models_torch.py:X"
    assert custom.resolve(f"{here}/one_mlx.py:X", here) == f"{here}/one_mlx.py:X"
    assert [is_one_line(m, "my_models.py", "../my_models.py:X") for m in caplog.messages] == [True]
    monkeypatch.chdir(here)
    assert custom.resolve("my_models.py:X", here) == "my_models.py:X" and len(caplog.messages) == 1


def test_the_documented_commands(here: Path, no_plots: None) -> None:
    """Train, fail without trust, resume with trust on the other backend, the last two in a new process."""
    short = ["--set", "training.max_steps=4", "--set", "training.checkpoint_every=2", "--quiet"]
    assert main(["train", "my.yaml", "--run", "runs/mine", "--backend", "torch", *short]) == 0
    program = """
    import os, shlex, sys
    from icenet.cli.main import main
    os.chdir(sys.argv[1])
    print([main(shlex.split(line)) for line in sys.argv[2:]])
    """
    refused = 'generate runs/mine --prompt "def "'
    resumed = "train --resume runs/mine --backend mlx --trust-code --quiet --set training.max_steps=6"
    process = start_python(program, here, refused, resumed, blocked=["matplotlib"])
    out, err = process.communicate(timeout=120)
    assert out.startswith("step 6: loss") and out.splitlines()[-1] in ("[1, 0]", "[2, 0]") and "--trust-code" in err
    assert len(losses(here / "runs/mine")) == 6
