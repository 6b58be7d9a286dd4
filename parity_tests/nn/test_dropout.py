"""Dropout in a user's model, written with the framework's own layers: equal masks on both backends, independent
masks in each call, and no random numbers without a key."""

from __future__ import annotations

import copy
import functools
import math
import re
from pathlib import Path
from typing import Any

import icenet.blas

import numpy as np
import pytest
import yaml
from helpers import BACKENDS, both_backends, is_one_line, losses, native, plain, resume, train, write_text

import icenet.nn.dropout
import icenet_torch.nn.dropout
from icenet.core import backends, rng
from icenet.core.config import Config
from icenet.core.errors import UsageError
from icenet.core.models import twins
from icenet.core.models.modules import copy_weights
from icenet.parity import compare
from icenet.parity.configuration.run import random_batch, run
from icenet.parity.curves import judge_curve

mx: Any = pytest.importorskip("mlx.core")
mlx_nn: Any = pytest.importorskip("mlx.nn")
torch: Any = pytest.importorskip("torch")

MODELS = {
    "dropouts.py": """
import random

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from icenet.models.base import BaseModel

own_generator = np.random.default_rng(0)


class Text(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        h = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, h)
        self.drop = nn.Dropout(0.1)
        self.block = nn.Sequential(nn.Linear(h, h), nn.Dropout(config.rate), nn.ReLU(), nn.Linear(h, h))
        self.drops = [self.drop, nn.Dropout(0.2)]
        self.head = nn.Linear(h, config.vocab_size)
        self.start = mx.random.uniform(shape=(1,)).item()

    def forward(self, x):
        x = self.drop(self.embedding(x))
        x = x + self.drop(self.block(x))
        for drop in self.drops:
            x = drop(x)
        return self.head(x)


class Images(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(1, 6, 3)
        self.maps = nn.Dropout2d(0.25)
        self.pixels = nn.Dropout(0.2)
        self.features = nn.Dropout(0.4)
        self.head = nn.Linear(6, config.vocab_size)

    def forward(self, images):
        x = self.pixels(self.maps(nn.relu(self.conv(images))))
        return self.head(self.features(x.mean(axis=(1, 2))))


class Mine(nn.Dropout):
    pass


class Noise(nn.Module):
    def __call__(self, x):
        return x + mx.array(own_generator.normal(size=x.shape).astype(np.float32))


class Unkeyed(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.inner = nn.Sequential(nn.Linear(config.hidden_size, config.hidden_size))
        if config.way in ("subclass", "own generator"):
            self.inner.layers.append(Mine(0.5) if config.way == "subclass" else Noise())
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x):
        x = self.embedding(x)
        if self.config.way == "function" and self.training:
            x = x * mx.random.bernoulli(0.5, x.shape)
        if self.config.way == "python" and random.random() < 0.5:
            x = 2 * x
        return self.head(self.inner(x))
""",
    "dropouts_torch.py": """
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import icenet_torch
from icenet_torch.models.base import BaseModel

own_generator = np.random.default_rng(1)


class Text(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        h = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, h)
        self.drop = nn.Dropout(0.1)
        self.block = nn.Sequential(nn.Linear(h, h), nn.Dropout(0.15, inplace=True), nn.ReLU(), nn.Linear(h, h))
        self.drops = nn.ModuleList([self.drop, nn.Dropout(0.2)])
        self.head = nn.Linear(h, config.vocab_size)
        self.start = torch.rand(1).item()

    def forward(self, x):
        x = self.drop(self.embedding(x))
        x = x + self.drop(self.block(x))
        for drop in self.drops:
            x = drop(x)
        return self.head(x)


class Images(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(1, 6, 3)
        self.maps = nn.Dropout2d(0.25)
        self.pixels = nn.Dropout(0.2) if config.plain else icenet_torch.nn.Dropout(0.2, images=True)
        self.features = nn.Dropout(0.4)
        self.head = nn.Linear(6, config.vocab_size)

    def forward(self, images):
        x = self.pixels(self.maps(torch.relu(self.conv(images))))
        return self.head(self.features(x.mean(dim=(2, 3))))


class Mine(nn.Dropout):
    pass


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.from_numpy(own_generator.normal(size=tuple(x.shape))).to(x.dtype)


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


class Unkeyed(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        h = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, h)
        self.inner = nn.Sequential(nn.Linear(h, h))
        layers = {
            "subclass": lambda: Mine(0.5),
            "own generator": Noise,
            "alpha": lambda: nn.AlphaDropout(0.5),
            "rrelu": nn.RReLU,
            "attention": lambda: Attention(h, 2, dropout=0.1, batch_first=True),
            "lstm": lambda: Recurrent(h, h, 2, dropout=0.1, batch_first=True),
        }
        if config.way in layers:
            self.inner.append(layers[config.way]())
        self.head = nn.Linear(h, config.vocab_size)

    def forward(self, x):
        x = self.embedding(x)
        if self.config.way == "function":
            x = F.dropout(x, 0.5, self.training)
        if self.config.way == "numpy" and np.random.rand() < 0.5:
            x = 2 * x
        return self.head(self.inner(x))
""",
}

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "model": {"type": "dropouts.py:Text", "hidden_size": 16, "vocab_size": 257, "rate": 0.15},
    "data": {"source": "text.txt", "seq_length": 12},
    "training": {"max_steps": 8, "batch_size": 4, "learning_rate": 1e-2},
}


@pytest.fixture
def here(tmp_path: Path, no_plots: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the working directory, with the models and a text."""
    write_text(tmp_path / "text.txt", 2000)
    for name, text in MODELS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(name: str, **model: Any) -> Config:
    """Returns the configuration of a model in the working directory."""
    settings = {**SETTINGS, "model": {**SETTINGS["model"], "type": f"dropouts.py:{name}", **model}}
    if name == "Images":
        settings |= {"data": {"kind": "images", "source": "digits"}}
        settings["model"]["vocab_size"] = 10
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    return Config.from_yaml("config.yaml")


# ---- layers -----------------------------------------------------------------------------------------------


def row_keys(rows: int) -> np.ndarray:
    return rng.fold(rng.key(3, "dropout")[None, :], np.arange(rows, dtype=np.uint64))


def seeded(backend: str, layer: str, p: float, rows: int) -> Any:
    """Returns the framework's own layer, keyed as in a model, in training mode."""
    nn = backends.module(backend, "nn.dropout").nn
    dropout = getattr(nn, layer)(p)
    reference = dropout
    backends.module(backend, "nn.dropout").key_dropouts([("drop", dropout)])
    assert dropout is reference and isinstance(dropout, getattr(nn, layer))
    dropout.train()
    keys = row_keys(rows)
    dropout.seed(native(backend, keys if backend == "mlx" else keys.view(np.int32)))
    return dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_frameworks_dropout_has_equal_masks_and_the_right_rate(p: float) -> None:
    x = np.ones((64, 50, 40), np.float32)
    kept = {}
    for backend in BACKENDS:
        dropout = seeded(backend, "Dropout", p, 64)
        calls = [plain(dropout(native(backend, x))) for _ in range(3)]
        np.testing.assert_allclose(calls[0].max(), 1 / (1 - p), rtol=1e-6)
        kept[backend] = np.stack(calls) != 0
        dropout.eval()
        assert np.array_equal(plain(dropout(native(backend, x))), x)
    assert np.array_equal(kept["mlx"], kept["torch"])
    first = np.stack([rng.bits(key, 2000) for key in row_keys(64)]).reshape(x.shape) >= round(p * 2**32)
    assert np.array_equal(kept["mlx"][0], first)
    keep, size = 1 - p, x.size
    for mask in kept["mlx"]:
        assert abs(mask.mean() - keep) < 4 * math.sqrt(p * keep / size)
    for one, other in ((0, 1), (0, 2), (1, 2)):  # independent calls keep a value together at the rate of the product
        both = (kept["mlx"][one] & kept["mlx"][other]).mean()
        assert abs(both - keep**2) < 4 * math.sqrt(keep**2 * (1 - keep**2) / size)


@pytest.mark.parametrize(
    ("layer", "shape"), [("Dropout2d", (24, 5, 4, 30)), ("Dropout3d", (24, 3, 2, 4, 30)), ("Dropout1d", (24, 5, 30))]
)
def test_channel_dropout_drops_whole_channels(layer: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32)
    first, last = (0, len(shape) - 1, *range(1, len(shape) - 1)), (0, *range(2, len(shape)), 1)
    found = {}
    for backend in BACKENDS:
        inputs = native(backend, x if backend == "mlx" else np.ascontiguousarray(x.transpose(first)))
        if backend == "mlx" and layer == "Dropout1d":  # MLX has none
            dropout = icenet.nn.Dropout1d(0.4)
            dropout.seed(mx.array(row_keys(24)))
        else:
            dropout = seeded(backend, layer, 0.4, 24)
        outputs = [plain(dropout(inputs)) for _ in range(2)]
        found[backend] = np.stack([y if backend == "mlx" else y.transpose(last) for y in outputs])
    np.testing.assert_array_equal(found["mlx"], found["torch"])
    kept = found["mlx"] != 0
    channels = kept.all(axis=tuple(range(2, kept.ndim - 1)))
    assert np.array_equal(channels, kept.any(axis=tuple(range(2, kept.ndim - 1))))  # all of a channel or none
    assert abs(channels.mean() - 0.6) < 4 * math.sqrt(0.24 / channels.size)
    assert not np.array_equal(channels[0], channels[1])
    np.testing.assert_allclose(found["mlx"][0][kept[0]], (x / 0.6)[kept[0]], rtol=1e-6)


@both_backends
def test_channel_dropout_refuses_an_input_without_rows(backend: str) -> None:
    dropout = seeded(backend, "Dropout2d", 0.5, 4)
    with pytest.raises(UsageError) as caught:
        dropout(native(backend, np.ones((4, 5, 6), np.float32)))
    assert is_one_line(caught.value, "Dropout2d", "[4, 5, 6]", "B")


@pytest.mark.parametrize("layer", ["Dropout", "Dropout2d"])
def test_a_dropout_of_pytorch_in_place_changes_its_input(layer: str) -> None:
    dropout = seeded("torch", layer, 0.5, 4)
    dropout.inplace = True
    x = torch.ones(4, 6, 5, 5)
    y = dropout(x)
    assert y is x and (x == 0).any() and (x == 2).any()


@both_backends
def test_the_rate_of_a_layer_without_keys(backend: str) -> None:
    dropout = backends.module(backend, "nn").Dropout(0.1)
    dropout.train()
    kept = plain(dropout(native(backend, np.ones(4000, np.float32)))) != 0
    assert abs(kept.mean() - 0.9) < 4 * math.sqrt(0.09 / kept.size)


def test_a_subclass_of_a_convolution_takes_images_too() -> None:
    class Own(torch.nn.Conv2d):
        pass

    dropout = torch.nn.Dropout(0.5)
    icenet_torch.nn.dropout.key_dropouts([("conv", Own(3, 3, 1)), ("drop", dropout)])
    dropout.seed(torch.from_numpy(row_keys(4).view(np.int32)))
    dropout(torch.ones(4, 3))
    with pytest.raises(UsageError, match=r"drop: the input \[4, 3, 2, 2\] .* as that of conv"):
        dropout(torch.ones(4, 3, 2, 2))


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 5, 3), (4, 2, 3, 5, 3)])
def test_images_of_any_rank(shape: tuple[int, ...]) -> None:
    """`images=True` draws the mask of MLX's channels-last array."""
    x = np.ones(shape, np.float32)
    first, last = (0, len(shape) - 1, *range(1, len(shape) - 1)), (0, *range(2, len(shape)), 1)
    theirs = icenet_torch.nn.Dropout(0.5, images=True)
    theirs.seed(torch.from_numpy(row_keys(4).view(np.int32)))
    found = theirs(torch.from_numpy(np.ascontiguousarray(x.transpose(first)))).numpy().transpose(last)
    assert np.array_equal(found, plain(seeded("mlx", "Dropout", 0.5, 4)(mx.array(x))))


@both_backends
def test_keyed_layers_stay_the_users_layers(backend: str) -> None:
    """Attributes, text, copies and the state of a model are those of the framework's own layers; subclasses stay."""
    module = backends.module(backend, "nn.dropout")
    nn = module.nn

    class Mine(nn.Dropout):  # type: ignore[name-defined,misc]
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Dropout2d(0.5), Mine(0.2))
    text, layers = repr(model), list(model.layers if backend == "mlx" else model)
    module.key_dropouts([(str(index), layer) for index, layer in enumerate(layers)])
    assert repr(model) == text and type(layers[3]) is Mine
    assert [layer.p for layer in layers[1:3]] == [0.3, 0.5]
    again = copy.deepcopy(layers[1])
    assert type(again) is module.Dropout and again.p == 0.3
    if backend == "torch":
        assert list(model.state_dict()) == ["0.weight", "0.bias"]
        wide = seeded(backend, "Dropout", 1.0, 2)  # PyTorch allows it
        assert not plain(wide(torch.ones(2, 3))).any()
    model.eval()
    assert not layers[1].is_active
    model.train()
    x = native(backend, np.ones((200, 200), np.float32))
    assert abs((plain(layers[1](x)) != 0).mean() - 0.7) < 0.02  # without keys: the framework's generator


# ---- models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Text", "Images"])
def test_twins_with_the_frameworks_dropout_agree(name: str, here: Path) -> None:
    """Layers, gradients, a training curve, and a run that changes backend."""
    settings = config(name, plain=False)
    report = run(settings, steps=8)
    assert report.passed, report.verdict()
    assert report.curve is not None and report.differences == report.notes == []
    assert any(row.path == "drop#3" for section in report.sections for row in section.rows) is (name == "Text")
    train(settings, here / "run", "torch", until=4)
    resume(here / "run", "mlx")
    assert judge_curve(losses(here / "run"), *list(report.losses.values())[1:]).passed
    engine = backends.engine(settings, "mlx")
    layers = engine.model.dropout_layers()
    assert list(layers) == (["block.1", "drop", "drops.1"] if name == "Text" else ["features", "maps", "pixels"])
    assert list(layers) == list(backends.engine(settings, "torch").model.dropout_layers())


def test_masks_do_not_depend_on_micro_batches(here: Path) -> None:
    settings = config("Text")
    batch = random_batch(settings)
    for backend in BACKENDS:
        loss, gradients = backends.engine(settings, backend).gradients(batch, 3)
        two = settings.with_overrides("training.gradient_accumulation=2")
        loss2, gradients2 = backends.engine(two, backend).gradients(batch, 3)
        assert loss2 == pytest.approx(loss, rel=1e-6)
        for path, gradient in gradients.items():
            np.testing.assert_allclose(gradients2[path], gradient, atol=1e-6 * np.abs(gradient).max() + 1e-9)


def faulty(here: Path) -> Config:
    """Returns twins with another rate of block.1, and with drops.1 on MLX only."""
    file = here / "dropouts_torch.py"
    file.write_text(file.read_text().replace("nn.Dropout(0.2)]", "nn.Identity()]"))
    return config("Text", rate=0.3)


def check_differences(differences: list[str]) -> None:
    rate, one_twin = differences
    assert is_one_line(rate, "block.1", "0.3", "0.15") and is_one_line(one_twin, "drops.1", "0.2", "MLX only")


def test_another_rate_and_a_dropout_of_one_twin_only_are_named(here: Path) -> None:
    settings = faulty(here)
    ours, theirs = (backends.engine(settings, backend) for backend in BACKENDS)
    check_differences(twins.differences(twins.describe(ours.model), twins.describe(theirs.model)))
    batch = random_batch(settings)
    assert abs(ours.gradients(batch)[0] - theirs.gradients(batch)[0]) > 1e-4


@pytest.mark.slow
def test_another_rate_and_a_dropout_of_one_twin_only_are_found(here: Path) -> None:
    """They are named, and seen in the layers, the gradients and the curve."""
    report = run(faulty(here), steps=1)
    assert not report.passed and report.differing() == ["block.1", "drops.1"]
    check_differences(report.differences)
    assert "block.1" in report.verdict() and report.as_dict()["differences"] == report.differences
    assert report.curve is not None and not report.curve.passed
    rows = [row for section in report.sections for row in section.rows if row.kind == "gradient"]
    assert not next(row for row in rows if row.path == "block.0.weight").passed


def test_an_input_that_may_have_channels_first(here: Path) -> None:
    """In PyTorch, an input with as many axes as that of a convolution may be images or attention weights."""
    settings = config("Images", plain=True)
    engine = backends.engine(settings, "torch")
    with pytest.raises(UsageError) as caught:
        engine.train_step(random_batch(settings), 0, 1e-3)
    assert is_one_line(caught.value, "pixels", "conv", "[4, 6, 6, 6]", "images=True", "images=False")
    engine.evaluate(random_batch(settings))
    native_masks = backends.engine(settings.with_overrides("training.rng=native"), "torch")
    assert native_masks.read(native_masks.train_step(random_batch(settings), 0, 1e-3)).finite


# ---- random numbers without a key -------------------------------------------------------------------------

WAYS = [
    ("mlx", "function", "Unkeyed"),
    ("mlx", "subclass", "inner.1 (Mine)"),
    ("mlx", "python", "Unkeyed"),
    ("torch", "function", "Unkeyed"),
    ("torch", "subclass", "inner.1 (Mine)"),
    ("torch", "alpha", "inner.1 (AlphaDropout)"),
    ("torch", "rrelu", "inner.1 (RReLU)"),
    ("torch", "attention", "inner.1 (Attention)"),
    ("torch", "lstm", "inner.1 (Recurrent)"),
    ("torch", "numpy", "Unkeyed"),
]


@pytest.mark.parametrize(("backend", "way", "name"), WAYS)
def test_random_numbers_without_a_key_are_refused(backend: str, way: str, name: str, here: Path) -> None:
    settings = config("Unkeyed", way=way)
    engine, batch = backends.engine(settings, backend), random_batch(settings)
    weights = engine.weights()
    for call in (lambda: engine.train_step(batch, 0, 1e-3), lambda: engine.gradients(batch)):
        with pytest.raises(UsageError) as caught:
            call()
        assert is_one_line(caught.value, name, "nn.Dropout", "training.rng")
    assert all(np.array_equal(array, weights[path]) for path, array in engine.weights().items())
    if way not in ("attention", "lstm"):  # the MLX twin has no such parameters, which parity reports first
        with pytest.raises(UsageError, match=re.escape(name)):
            run(settings)
    own = backends.engine(settings.with_overrides("training.rng=native"), backend)
    assert own.read(own.train_step(batch, 0, 1e-3)).finite


@both_backends
def test_the_check_costs_nothing_after_the_first_step(
    backend: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("Text")
    engine, batch = backends.engine(settings, backend), random_batch(settings)
    engine.train_step(batch, 0, 1e-3)
    monkeypatch.setattr(type(engine), "_generators", lambda engine: pytest.fail("the state is read again"))
    engine.train_step(batch, 1, 1e-3)


def test_parity_finds_a_generator_of_the_user(here: Path) -> None:
    """The states of the known generators stay; two equal runs differ."""
    settings = config("Unkeyed", way="own generator")
    with pytest.raises(UsageError) as caught:
        run(settings)
    assert is_one_line(caught.value, "inner.1", "two runs of PyTorch")
    file = here / "dropouts_torch.py"
    file.write_text(
        file.read_text().replace("class Noise(nn.Module):", "class Noise(nn.Identity):\n    pass\n\n\nclass Unused:")
    )
    with pytest.raises(UsageError) as caught:
        run(settings)
    assert is_one_line(caught.value, "inner.1", "two runs of MLX")


def test_parity_of_native_masks_compares_keyed_ones(here: Path) -> None:
    settings = config("Text").with_overrides("training.rng=native")
    report = run(settings)
    assert report.passed and len(report.notes) == 1 and "training.rng" in report.notes[0]


@pytest.mark.slow
@both_backends
def test_a_compiled_model_draws_the_same_masks(backend: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once: the numbers of the calls and the keys cause no compilation in a later step."""
    # without the compiler of C++ code, which takes minutes for the generator
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    settings = config("Text", compile_model=True)
    batch = random_batch(settings)
    engines = [backends.engine(s, backend) for s in (settings, settings.with_overrides("model.compile_model=false"))]
    if backend == "torch":
        torch._dynamo.utils.counters.clear()
    found = []
    for step in range(4):
        found.append([engine.read(engine.train_step(batch, step, 1e-2)).loss for engine in engines])
    np.testing.assert_allclose(*np.array(found).T, rtol=1e-5)
    if backend == "torch":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]


def test_the_first_call_has_the_keys_of_earlier_versions(here: Path) -> None:
    """So that a run of version 0.1 continues with its masks."""
    engine = backends.engine(config("Text"), "mlx")
    engine.model.train()
    engine.seed_dropouts(5, range(4))
    drop = engine.model.drop
    words = [rng.bits(rng.fold(rng.key(0, "dropout", 5, "drop"), row), 16) for row in range(4)]
    expected = np.stack(words) >= round(0.1 * 2**32)
    assert np.array_equal(plain(drop(mx.ones((4, 16)))) != 0, expected)


def test_modules_without_a_config_have_equal_masks(here: Path) -> None:
    """`compare` in training mode: plain dropout agrees, another rate and other draws are found."""

    def twins_of(rate: float, *more: Any) -> tuple[Any, Any]:
        ours = mlx_nn.Sequential(mlx_nn.Linear(6, 5), mlx_nn.Dropout(rate))
        theirs = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(0.2), *more)
        if more:
            ours.layers.append(mlx_nn.Identity())
        copy_weights(theirs, ours)
        return ours, theirs

    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    ours, theirs = twins_of(0.2)
    stages = ("structure", "forward", "gradients")
    report = compare(ours, theirs, x, stages=stages)
    assert report.passed, report.verdict
    assert type(ours.layers[1]) is mlx_nn.Dropout and type(theirs[1]) is torch.nn.Dropout  # unchanged
    report = compare(*twins_of(0.3), x, stages=stages)
    assert report.culprit == "1" and "0.3 in a, 0.2 in b" in report.cause
    for more in (torch.nn.AlphaDropout(0.1), AlwaysDrops()):  # a passes on what b drops
        report = compare(*twins_of(0.2, more), x, stages=stages)
        assert report.culprit == "2" and "a takes the input in its place" in report.cause
    report = compare(*twins_of(0.3, torch.nn.AlphaDropout(0.1)), x, stages=stages)
    assert report.culprit == "1" and "0.3 in a, 0.2 in b" in report.cause


class AlwaysDrops(torch.nn.Module):  # type: ignore[name-defined,misc]
    """Calls `F.dropout` without `training=self.training`, so values are dropped in evaluation mode too."""

    def forward(self, x: Any) -> Any:
        return torch.nn.functional.dropout(x, 0.1)
