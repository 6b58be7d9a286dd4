"""Custom models as users write them: containers, shared arrays, layers used twice, buffers. Both backends start and
train equal and continue each other's runs; what does not match is named when the model is built."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import icenet.blas

import numpy as np
import pytest
from helpers import BACKENDS, both_backends, is_one_line, losses, resume, same_bits, state, train

import icenet as front_door
from icenet.core.config import Config, custom
from icenet.core.errors import CheckpointError, UsageError, WeightsError
from icenet.core.models import twins
from icenet.core.runs import checkpoint
from icenet.core.weights import files as weight_files
from icenet.parity.configuration.engines import build
from icenet.parity.configuration.run import curves, run
from icenet.parity.curves import judge_curve

mx: Any = pytest.importorskip("mlx.core")
mx_nn: Any = pytest.importorskip("mlx.nn")
torch: Any = pytest.importorskip("torch")

HEADS = {
    "mlx": """
import mlx.core as mx
import mlx.nn as nn
from icenet.models.base import BaseModel as Base

class OneHot(nn.Module):
    def __init__(self, count, size):
        super().__init__()
        self.weight = mx.zeros((count, size))

    def __call__(self, x):
        return self.weight[x]
""",
    "torch": """
import torch
import torch.nn as nn
from icenet_torch.models.base import BaseModel as Base

def scalar(value):
    return nn.Parameter(torch.tensor(value))
""",
}

SEQUENTIAL = {
    "mlx": """
class Model(Base):
    def __init__(self, config):
        super().__init__(config)
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm(6)),
        )
        self.branches = {"wide": [nn.Linear(6, 8), nn.Linear(8, 6)], "gains": [mx.ones(6), mx.full((6,), 0.5)]}
        self.heads = [{"out": nn.Linear(6, config.vocab_size)}]

    def forward(self, x):
        x = nn.relu(self.features(x)).mean(axis=(1, 2))
        for layer, gain in zip(self.branches["wide"], self.branches["gains"]):
            x = layer(x)
        x = self.branches["gains"][0] * x + self.branches["gains"][1]
        return self.heads[0]["out"](x)
""",
    "torch": """
class Model(Base):
    def __init__(self, config):
        super().__init__(config)
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)),
        )
        gains = [nn.Parameter(torch.ones(6)), nn.Parameter(torch.full((6,), 0.5))]
        wide = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6)])
        self.branches = nn.ModuleDict({"wide": wide, "gains": nn.ParameterList(gains)})
        self.heads = nn.ModuleList([nn.ModuleDict({"out": nn.Linear(6, config.vocab_size)})])

    def forward(self, x):
        x = torch.relu(self.features(x)).mean(dim=(2, 3))
        for layer in self.branches["wide"]:
            x = layer(x)
        x = self.branches["gains"][0] * x + self.branches["gains"][1]
        return self.heads[0]["out"](x)
""",
}

TIED_HEAD = """
class Model(Base):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(FRAMEWORK.tanh(self.hidden(self.embedding(x))))
"""

TIED_EMBEDDING = """
class Model(Base):
    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.other = nn.Linear(config.hidden_size, config.hidden_size)
        self.other.bias = self.hidden.bias
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding.weight = self.head.weight
        self.init_weights(5)

    def forward(self, x):
        return self.head(self.other(FRAMEWORK.tanh(self.hidden(self.embedding(x)))))
"""

USED_TWICE = """
class Model(Base):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        layer = nn.Linear(config.hidden_size, config.hidden_size)
        self.layers = LIST([layer, nn.LayerNorm(config.hidden_size), layer])
        self.first = layer
        block = nn.Sequential(nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh())
        self.blocks = LIST([block, block])
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.scale = SCALAR(0.25)

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = FRAMEWORK.tanh(layer(x))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.scale * x)
"""

BUFFER = """
class Model(Base):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        TABLE

    def forward(self, x):
        return self.head(self.embedding(x) * self.table)
"""
TABLE = {
    "mlx": "self.table = mx.arange(1, 9) / 8\n        self.freeze(keys=['table'], recurse=False)",
    "torch": "self.register_buffer('table', torch.arange(1, 9) / 8)",
}


def both(text: str) -> dict[str, str]:
    """Returns the text of a model that differs in the framework's words only, for each backend."""
    return {
        "mlx": text.replace("FRAMEWORK", "mx").replace("LIST(", "list(").replace("SCALAR(", "mx.array("),
        "torch": text.replace("FRAMEWORK", "torch").replace("LIST(", "nn.ModuleList(").replace("SCALAR(", "scalar("),
    }


BUFFERS = {backend: text.replace("TABLE", TABLE[backend]) for backend, text in both(BUFFER).items()}
PAIRS = {
    "sequential": SEQUENTIAL,
    "tied head": both(TIED_HEAD),
    "tied embedding": both(TIED_EMBEDDING),
    "used twice": both(USED_TWICE),
    "buffer": BUFFERS,
}

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "seed": 3,
    "model": {"type": "model.py:Model", "hidden_size": 8, "vocab_size": 257},
    "data": {"source": "text.txt", "seq_length": 12},
    "training": {
        "max_steps": 8,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "ema_decay": 0.9,
        "eval_every": 4,
        "eval_batches": 1,
        "checkpoint_every": 4,
    },
}
IMAGES = {"model": {**SETTINGS["model"], "vocab_size": 10}, "data": {"kind": "images", "source": "digits"}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None) -> Path:
    """Returns the working directory, with a short text."""
    monkeypatch.setattr(custom, "_trusted", set())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    return tmp_path


def write(pair: dict[str, str], **changes: Any) -> Config:
    """Writes the two files of a pair to the working directory; returns the config, whose file is trusted."""
    for backend, name in (("mlx", "model.py"), ("torch", "model_torch.py")):
        if backend in pair:
            Path(name).write_text(HEADS[backend] + pair[backend])
    family = "model.py:Model"
    custom.trust(family)
    return Config.from_dict({**SETTINGS, **(IMAGES if "Conv2d" in pair["mlx"] else {}), **changes})


def models(config: Config) -> dict[str, Any]:
    return {backend: front_door.build(config, backend, "cpu") for backend in BACKENDS}


# ---- correct pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_both_backends_start_train_and_continue_equal(
    name: str, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Equal initial bits and curves, with weight decay and averaged weights, and one run that changes backend."""
    config = write(PAIRS[name])
    pair = models(config)
    assert not caplog.records  # the twins match
    assert same_bits(pair["mlx"].weights(), pair["torch"].weights())
    assert pair["mlx"].num_params == pair["torch"].num_params == sum(p.numel() for p in trained(pair["torch"]))
    assert pair["mlx"].part_sizes() == pair["torch"].part_sizes()
    assert pair["mlx"].mlx_names().items() <= pair["torch"].mlx_names().items()
    assert pair["mlx"].layer_kinds().items() >= pair["torch"].layer_kinds().items()
    ours, theirs = (twins.describe(model) for model in pair.values())
    assert ours == dataclasses.replace(theirs, backend="mlx")
    assert twins.Description.from_dict(json.loads(json.dumps(ours.as_dict()))) == ours

    engines = build(config)
    gradients = [engine.gradients(first_batch(config))[1] for engine in engines]
    assert gradients[0].keys() == gradients[1].keys() == pair["torch"].trainable_paths()
    three = curves(engines, 8)
    assert judge_curve(*three.values()).passed
    states = [engine.optimizer_state() for engine in engines[:2]]
    assert states[0].keys() == states[1].keys()
    for path in states[0]:
        np.testing.assert_allclose(states[0][path], states[1][path], atol=2e-5, err_msg=path)

    for first, second in (("mlx", "torch"), ("torch", "mlx")):
        if name != "tied head" and first == ("torch" if name == "sequential" else "mlx"):
            continue  # one direction each
        folder = here / first
        train(config, folder, first, until=4)
        resume(folder, second)
        assert judge_curve(losses(folder), three["PyTorch"], three["PyTorch float64"]).passed
        end = state(folder)
        assert states[0].keys() | pair["mlx"].weight_shapes().keys() == end.keys()
        for alias, owner in pair["mlx"].shared_arrays().items():
            assert end[alias].tobytes() == end[owner].tobytes()
            assert f"{alias}.exp_avg" not in end


def trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def first_batch(config: Config) -> dict[str, np.ndarray]:
    from icenet.core.data.datasets import dataset_for

    batch: dict[str, np.ndarray] = dataset_for(config).train_batch(0, 4)
    return batch


@pytest.mark.parametrize("name", PAIRS)
def test_parity_passes(name: str, here: Path) -> None:
    config = write(PAIRS[name])
    report = run(config)
    assert report.passed, report.verdict()
    assert report.shared == front_door.build(config, "torch").shared_arrays()


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_parity_finds_a_fault(name: str, here: Path) -> None:
    text = PAIRS[name]["torch"]
    old = "torch.relu(" if "torch.relu(" in text else "torch.tanh(" if "torch.tanh(" in text else "self.head("
    changed = text.replace(old, f"1.001 * {old}")
    assert changed != text
    report = run(write({**PAIRS[name], "torch": changed}))
    assert not report.passed and not report.differences


def test_a_table_of_each_framework(here: Path) -> None:
    """The exponentials of the two frameworks differ in the last bits, which is no fault of the model."""
    tables = {"mlx": "exp(mx.arange(1, 9) * 1.3)", "torch": "exp(torch.arange(1, 9) * 1.3)"}
    report = run(write({name: BUFFERS[name].replace("arange(1, 9) / 8", text) for name, text in tables.items()}))
    assert not report.passed and report.unequal_weights == report.rounded_weights == ["table"]
    assert "table: equal but for rounding" in report.verdict() and "numpy" in report.verdict()
    wrong = BUFFERS["mlx"].replace("arange(1, 9) / 8", "arange(1, 9) / 7.99")
    report = run(write({**BUFFERS, "mlx": wrong}))
    assert report.unequal_weights == ["table"] and not report.rounded_weights


@pytest.mark.parametrize("layer", ["LeakyReLU(0.2)", "LeakyReLU(2.0)", "PReLU(3)", "PReLU()", "CELU(1.5)"])
def test_activations_at_zero(layer: str, here: Path) -> None:
    """In a built model a layer of MLX has its values and PyTorch's gradients, at 0 too, where MLX has others."""
    body = SEQUENTIAL["mlx"].replace("nn.ReLU()", f"nn.{layer}")
    built = front_door.build(write({"mlx": body}), "mlx", "cpu").features.layers[1]
    plain, theirs = eval(f"nn.{layer}", {"nn": mx_nn}), eval(f"nn.{layer}", {"nn": torch.nn})
    assert isinstance(built, type(plain)) and built.parameters().keys() == plain.parameters().keys()
    values = np.repeat(np.float32([-2, -0.5, 0, 0, 1.5, 200]), 3).reshape(2, 3, 3)
    cotangent = np.linspace(-1, 2, 18, dtype=np.float32).reshape(2, 3, 3)
    x, g = mx.array(values), mx.array(cotangent)
    if layer != "LeakyReLU(2.0)":  # where MLX has another function
        np.testing.assert_array_equal(np.array(built(x)), np.array(plain(x)))
    found = {"input": mx.grad(lambda x: (built(x) * g).sum())(x)}
    if built.parameters():
        found |= mx_nn.value_and_grad(built, lambda x: (built(x) * g).sum())(x)[1]

    inputs = torch.from_numpy(values).moveaxis(-1, 1).requires_grad_()  # PReLU has its channels there
    inputs.retain_grad()
    outputs = theirs(inputs).moveaxis(1, -1)
    np.testing.assert_allclose(np.array(built(x)), outputs.detach(), rtol=1e-6)
    (outputs * torch.from_numpy(cotangent)).sum().backward()
    expected = {"input": inputs.grad.moveaxis(1, -1), **{n: p.grad for n, p in theirs.named_parameters()}}
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(np.array(found[name]), expected[name], rtol=1e-6, err_msg=name)


CENTERED = """
class Model(Base):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        TABLE

    def forward(self, x):
        x = self.embedding(x)
        if self.training:
            UPDATE
        return self.head(x - self.table)
"""
UPDATES = {
    "mlx": (
        "self.table = 0.9 * self.table + 0.1 * mx.stop_gradient(x).mean(axis=(0, 1))",
        "self.table += 0.1 * mx.stop_gradient(x).mean(axis=(0, 1))",
    ),
    "torch": (
        "self.table = 0.9 * self.table + 0.1 * x.detach().mean(dim=(0, 1))",
        "self.table += 0.1 * x.detach().mean(dim=(0, 1))",
    ),
}


@pytest.mark.parametrize("is_in_place", [False, True])
def test_a_buffer_that_forward_changes(is_in_place: bool, here: Path) -> None:
    """Training changes it on both backends. A comparison does not, and does not take the change for randomness."""
    pair = {
        backend: CENTERED.replace("TABLE", TABLE[backend]).replace("UPDATE", lines[is_in_place])
        for backend, lines in UPDATES.items()
    }
    config = write(pair)
    report = run(config)
    assert report.passed, report.verdict()
    assert "table" in {row.path for section in report.sections for row in section.rows}
    after = []
    for engine in build(config):
        before = engine.weights()["table"].copy()
        engine.gradients(first_batch(config))
        assert engine.weights()["table"].tobytes() == before.tobytes()
        engine.train_step(first_batch(config), 0, 1e-2)
        after.append(engine.weights()["table"])
        assert not np.array_equal(after[-1], before)
    np.testing.assert_allclose(after[0], after[2], rtol=1e-5)


def test_names_of_containers(here: Path) -> None:
    model = front_door.build(write(SEQUENTIAL), "mlx")
    assert list(model.weight_shapes()) == list(front_door.build(write(SEQUENTIAL), "torch").weight_shapes())
    assert {"features.0.weight", "features.2.1.running_mean", "branches.gains.0"} <= model.weight_shapes().keys()
    assert model.mlx_names()["features.layers.2.layers.0.weight"] == "features.2.0.weight"
    assert [path for path, _ in model.named_modules() if path == "features.layers.0"]  # MLX's own names stay


@both_backends
def test_files_with_mlx_names_are_read(backend: str, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Checkpoints of version 0.1 name the parts of `nn.Sequential` as MLX does."""
    config = write(SEQUENTIAL)
    train(config, here / "run", "mlx", until=4)
    before = state(here / "run")
    mlx_name = {new: old for old, new in front_door.build(config, "mlx").mlx_names().items()}

    def renamed(values: Any, slots: bool) -> dict[str, np.ndarray]:
        found = {}
        for name, array in values.items():
            path, dot, slot = name.rpartition(".") if slots else (name, "", "")
            found[f"{mlx_name.get(path, path)}{dot}{slot}"] = np.array(array)
        return found

    found = checkpoint.find(here / "run")
    facts = {key: value for key, value in found.state.items() if key not in ("model", "format", "step")}
    weights, slots = renamed(found.weights, False), renamed(found.optimizer, True)
    assert "features.layers.0.weight" in weights and "features.layers.0.weight.exp_avg" in slots
    checkpoint.save(here / "old", found.config, 4, weights, slots, facts)
    caplog.clear()
    resume(here / "old", backend)
    assert sum("features.layers.0" in message for message in caplog.messages) == 1
    resume(here / "run", backend)
    assert same_bits(state(here / "old"), state(here / "run")) and before.keys() == state(here / "old").keys()


# ---- shared arrays ----------------------------------------------------------------------------------------


def test_against_plain_pytorch_with_its_own_optimizer(here: Path) -> None:
    """A tied model in float64, trained by `torch.optim.AdamW`, is the reference of both backends."""
    config = write(both(TIED_HEAD), training={**SETTINGS["training"], "ema_decay": None, "max_grad_norm": None})
    engines = build(config)
    reference = torch.nn.ModuleDict(
        {"embedding": torch.nn.Embedding(257, 8), "hidden": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 257)}
    ).double()
    reference["head"].weight = reference["embedding"].weight
    start = {path: torch.from_numpy(array).double() for path, array in engines.mlx.weights().items()}
    reference.load_state_dict(start, strict=True)
    matrices = [p for p in reference.parameters() if p.ndim > 1]
    vectors = [p for p in reference.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, config.training.beta2), eps=config.training.eps)
    batch = first_batch(config)
    inputs, labels = (torch.from_numpy(batch[name]).long() for name in ("inputs", "labels"))
    for step in range(5):
        optimizer.zero_grad()
        hidden = torch.tanh(reference["hidden"](reference["embedding"](inputs)))
        loss = torch.nn.functional.cross_entropy(reference["head"](hidden).flatten(0, 1), labels.flatten())
        loss.backward()
        for engine in engines:
            result = engine.read(engine.train_step(batch, step, 1e-2))
            assert result.loss == pytest.approx(loss.item(), abs=1e-12 if engine is engines.reference else 2e-6)
        optimizer.step()
    expected = reference["embedding"].weight.detach().numpy()
    for engine, tolerance in zip(engines, (2e-5, 2e-5, 1e-12), strict=True):
        found = engine.weights()
        np.testing.assert_allclose(found["embedding.weight"], expected, atol=tolerance)
        assert found["embedding.weight"].tobytes() == found["head.weight"].tobytes()


def test_conversion_of_containers_and_shared_arrays(here: Path) -> None:
    """There and back; MLX's `load_weights` and PyTorch's strict `load_state_dict` read the results."""
    from icenet.core.weights.convert import convert

    for pair in (SEQUENTIAL, both(TIED_HEAD)):
        config = write(pair)
        ours, theirs = models(config).values()
        start = {name: array + 1 for name, array in theirs.weights().items()}
        given = {name: array for name, array in start.items() if name not in ours.shared_arrays()}
        weight_files.write("one.safetensors", given)
        convert("one.safetensors", "m.safetensors", "mlx", model=ours, overwrite=True)
        ours.load_weights("m.safetensors", strict=True)
        assert same_bits(ours.weights(), start)
        convert("m.safetensors", "t.pt", "torch", model=theirs, overwrite=True)
        theirs.load_state_dict(torch.load("t.pt", weights_only=True), strict=True)
        assert same_bits(theirs.weights(), start)


@both_backends
def test_averaged_weights_of_a_shared_array(backend: str, here: Path) -> None:
    config = write(both(TIED_HEAD))
    train(config, here / "run", backend, until=3)
    average = state(here / "run")["embedding.weight.ema"]
    for loaded in BACKENDS:
        weights = front_door.load(here / "run", loaded, "cpu", averaged=True).weights()
        assert weights["head.weight"].tobytes() == weights["embedding.weight"].tobytes() == average.tobytes()


@both_backends
def test_a_shared_array_is_stored_under_both_names_and_read_from_one(backend: str, here: Path) -> None:
    config = write(both(TIED_HEAD))
    model = front_door.build(config, backend, "cpu")
    assert model.shared_arrays() == {"head.weight": "embedding.weight"}
    assert "head.weight" not in model.trainable_paths()
    front_door.save(model, here / "saved")
    stored = weight_files.read(here / "saved")
    module = torch.nn.ModuleDict(
        {"embedding": torch.nn.Embedding(257, 8), "hidden": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 257)}
    )
    module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in stored.items()}, strict=True)
    values = {name: np.array(array) + 1 for name, array in stored.items()}
    for missing in ("head.weight", "embedding.weight"):
        other = front_door.build(config, backend, "cpu")
        other.set_weights({name: array for name, array in values.items() if name != missing})
        assert same_bits(other.weights(), values)
        assert other.head.weight is other.embedding.weight
    with pytest.raises(WeightsError) as caught:
        model.set_weights({**values, "head.weight": values["head.weight"] + 1})
    assert is_one_line(caught.value, "embedding.weight", "head.weight")
    with pytest.raises(WeightsError, match="1 missing"):
        model.set_weights({n: a for n, a in values.items() if n != "hidden.bias"})
    assert same_bits(model.weights(), {name: np.array(array) for name, array in stored.items()})


def test_the_initial_value_is_that_of_the_owner(here: Path) -> None:
    from icenet.core.models.init import initial_value

    model = front_door.build(write(both(TIED_EMBEDDING)), "mlx", "cpu")
    expected = initial_value("linear", "weight", "head.weight", (257, 8), 3)
    assert model.weights()["embedding.weight"].tobytes() == expected.tobytes()


def test_info_counts_a_shared_array_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from icenet.commands.info import model_report

    Path("my.yaml").write_text(write(both(TIED_HEAD)).to_yaml())
    report = model_report("my.yaml")
    assert report.num_params == sum(report.parts.values()) == 257 * 8 + 8 * 8 + 8 + 257
    report.render()
    assert "head.weight is tied to embedding.weight" in capsys.readouterr().out
    assert "head.weight is tied" not in str(report.as_dict()) and report.as_dict()["shared"]


def test_info_counts_a_buffer_as_a_value_that_is_not_trained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from icenet.commands.info import model_report

    Path("my.yaml").write_text(write(BUFFERS).to_yaml())
    report = model_report("my.yaml")
    assert report.num_values == sum(report.parts.values()) == report.num_params + 8
    assert report.as_dict()["bytes"]["fp32"] == 4 * report.num_values
    kept = 4 * report.num_params  # gradients, two moments and the average
    assert report.training_bytes == 4 * (report.num_values + kept)
    report.render()
    assert f"{report.num_params:,} are trained" in capsys.readouterr().out


def test_a_layer_used_twice_adds_its_gradients(here: Path) -> None:
    """The gradient of the shared layer is that of PyTorch's autograd on plain layers."""
    config = write(both(USED_TWICE))
    engines = build(config)
    batch = first_batch(config)
    model = front_door.build(config, "torch", "cpu").double()
    inputs, labels = (torch.from_numpy(batch[name]).long() for name in ("inputs", "labels"))
    torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
    expected = dict(model.named_parameters())["layers.0.weight"].grad.numpy()
    for engine in engines:
        found = engine.gradients(batch)[1]
        assert "layers.2.weight" not in found and "first.weight" not in found and "blocks.1.0.weight" not in found
        np.testing.assert_allclose(found["layers.0.weight"], expected, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_a_trained_number(optimizer: str, here: Path) -> None:
    """An array without axes, such as a learned scale, is trained by the optimizers that reduce axes, too."""
    from icenet.commands.info import model_report

    training = {**SETTINGS["training"], "optimizer": optimizer, "weight_decay": 0.0}
    config = write(both(USED_TWICE), training=training)
    engines = build(config)
    for engine in engines:
        engine.train_step(first_batch(config), 0, 1e-2)
    after = [float(engine.weights()["scale"]) for engine in engines]
    assert after[0] != 0.25 and np.allclose(after, after[2], rtol=1e-6)
    Path("my.yaml").write_text(config.to_yaml())
    model_report("my.yaml")  # which counts the optimizer's state


# ---- pairs that do not match ------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "trained in MLX only": ("mlx", TABLE["mlx"], "self.table = mx.arange(1, 9) / 8", ("table", "keys=['table']")),
    "trained in PyTorch only": (
        "torch",
        TABLE["torch"],
        "self.table = nn.Parameter(torch.arange(1, 9) / 8)",
        ("table", "frozen in MLX"),
    ),
    "not saved in PyTorch": (
        "torch",
        TABLE["torch"],
        TABLE["torch"][:-1] + ", persistent=False)",
        ("table", "MLX only", "_table"),
    ),
    "another name": ("torch", "self.head", "self.output", ("head.weight", "output.weight")),
    "another shape": ("mlx", "hidden_size, config.vocab_size)", "hidden_size, 258)", ("[258, 8]", "[257, 8]")),
    "another layer": ("mlx", "nn.Embedding(", "OneHot(", ("embedding.weight", "plain", "embedding")),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mismatch_is_named_when_the_model_is_built(name: str, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend, old, new, words = WRONG[name]
    pair = {**BUFFERS, backend: BUFFERS[backend].replace(old, new)}
    assert pair != BUFFERS
    config = write(pair)
    for built in BACKENDS:
        caplog.clear()
        front_door.build(config, built, "cpu")
        assert len(caplog.messages) == 1 and is_one_line(caplog.messages[0], *words), caplog.messages
    report = run(config)
    assert not report.passed and not report.sections
    assert is_one_line(report.verdict(), *words) and "allowed" not in report.verdict()
    train(config, here / "run", "mlx", until=1)
    with pytest.raises(CheckpointError) as caught:
        resume(here / "run", "torch")
    assert is_one_line(caught.value, *words, "--backend mlx")
    resume(here / "run", until=2)  # on its own backend it continues


FOREIGN = """
class Model(Base):
    def __init__(self, config):
        super().__init__(config)
        size = config.hidden_size
        self.lstm = nn.LSTM(size, size)
        self.attention = nn.ATTENTION(size, 2, bias=True)
        self.head = nn.Linear(size, size)
"""


def test_layers_whose_parameters_differ(here: Path) -> None:
    """One line for each layer, not one for each of its parameters."""
    both = {"mlx": "MultiHeadAttention", "torch": "MultiheadAttention"}
    pair = {name: FOREIGN.replace("ATTENTION", text) + "    forward = Base.__call__\n" for name, text in both.items()}
    found = twins.differences(*map(twins.describe, models(write(pair)).values()))
    assert len(found) == 2 and found[0].startswith("lstm: nn.LSTM") and found[1].startswith("attention: ")
    assert all("icenet.nn and icenet_torch.nn" in line for line in found)


def test_a_tie_on_one_side_is_named(here: Path) -> None:
    pair = both(TIED_HEAD)
    config = write({**pair, "mlx": pair["mlx"].replace("self.head.weight = self.embedding.weight", "")})
    assert run(config).differences == ["head.weight: an array of its own in MLX, tied to embedding.weight in PyTorch"]
    embedding = "        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)\n"
    tie = "        self.head.weight ="
    last = pair["torch"].replace(embedding, "").replace(tie, embedding + tie)
    found = run(write({**pair, "torch": last})).differences  # the first place owns the array
    assert "embedding.weight: an array of its own in MLX, tied to head.weight in PyTorch" in found


def test_dropout_rates_are_compared(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = TIED_HEAD.replace("        self.head =", "        self.drop = nn.Dropout(0.1)\n        self.head =")
    pair = both(text.replace("self.head(FRAMEWORK", "self.head(self.drop(FRAMEWORK").replace("(x))))", "(x)))))"))
    assert not twins.differences(*map(twins.describe, models(write(pair)).values()))
    models(write({**pair, "torch": pair["torch"].replace("Dropout(0.1)", "Dropout(0.3)")}))
    assert len(caplog.messages) == 2 and is_one_line(caplog.messages[0], "drop", "p=0.1 in MLX", "p=0.3 in PyTorch")


def test_a_twin_that_cannot_be_compared(here: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    config = write({**BUFFERS, "torch": BUFFERS["torch"].replace("self.head = ", "1 / 0\n        self.head = ")})
    front_door.build(config, "mlx", "cpu")
    assert len(caplog.messages) == 1 and is_one_line(caplog.messages[0], "was not compared", "division by zero")
    caplog.clear()
    monkeypatch.setattr("icenet.core.backends.installed", lambda name: name == "mlx")
    with caplog.at_level(logging.INFO):
        front_door.build(config, "mlx", "cpu")
    assert [record.levelname for record in caplog.records if "was not compared" in record.message] == ["INFO"]


def test_a_model_for_one_backend_needs_no_twin(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        front_door.build(write({"mlx": BUFFERS["mlx"]}), "mlx", "cpu")
    assert not caplog.messages


PLAIN = {
    "mlx": ("self.parts = (nn.Linear(2, 2), nn.Linear(2, 2))", "a list or a dict"),
    "torch": ("self.parts = [nn.Linear(2, 2)]", "nn.ModuleList"),
}


@both_backends
def test_layers_that_are_not_registered(backend: str, here: Path) -> None:
    line, remedy = PLAIN[backend]
    pair = {**BUFFERS, backend: BUFFERS[backend].replace("self.head =", f"{line}\n        self.head =")}
    with pytest.raises(UsageError) as caught:
        front_door.build(write(pair), backend, "cpu")
    assert is_one_line(caught.value, "parts", remedy)
    # a second reference to registered layers, and a hidden one, are what the user wants
    lines = ("self.head = nn.Linear(8, config.vocab_size)", "self.all = (self.head, 3)", "self._x = (nn.ReLU(),)")
    harmless = "\n        ".join(lines)
    old = "self.head = nn.Linear(config.hidden_size, config.vocab_size)"
    pair = {**BUFFERS, backend: BUFFERS[backend].replace(old, harmless)}
    assert front_door.build(write(pair), backend, "cpu").num_params == 257 * 8 + 257 * 9


def test_integer_tables(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Arrays of integers are buffers in both frameworks, whose default widths differ."""
    pair = {
        "mlx": BUFFER.replace("TABLE", "self.table = mx.arange(1, 9)"),
        "torch": BUFFER.replace("TABLE", "self.register_buffer('table', torch.arange(1, 9))"),
    }
    config = write(pair)
    report = run(config)
    assert report.passed, report.verdict()
    assert not caplog.messages
    train(config, here / "run", "torch", until=2)
    resume(here / "run", "mlx", until=3)


def test_a_shared_array_that_is_half_frozen(here: Path) -> None:
    pair = both(TIED_HEAD)
    pair["mlx"] = pair["mlx"].replace("embedding.weight\n", "embedding.weight\n        self.embedding.freeze()\n")
    with pytest.raises(UsageError) as caught:
        front_door.build(write(pair), "mlx", "cpu")
    assert is_one_line(caught.value, "embedding.weight is frozen", "head.weight", "freeze both")
