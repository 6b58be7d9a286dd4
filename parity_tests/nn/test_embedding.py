"""Ids outside the table of an embedding in a user's model: one line that names the layer and the id, and no access to
other memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icenet.blas

import numpy as np
import pytest
from helpers import BACKENDS, both_backends, is_one_line, native, plain, write_text

import icenet
from icenet.cli.main import main
from icenet.core import backends
from icenet.core.config import Config, custom
from icenet.core.data.text.packed import TextDataset
from icenet.core.errors import IceNetError, OutsideTableError
from icenet.core.training.trainer import Trainer
from icenet.parity import compare

mx: Any = pytest.importorskip("mlx.core")
M: Any = pytest.importorskip("mlx.nn")
torch: Any = pytest.importorskip("torch")

ROWS = 24

NET = """
import mlx.core as mx
import mlx.nn as nn

from icenet.models.base import BaseModel


class Net(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(24, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x):
        # with `scale`, the shape does not show the ids
        ids = mx.arange(x.shape[1]) + self.config.first + self.config.scale * x[:, :1]
        return self.head(self.embedding(x) + self.positions(ids))
"""
SAME_WORDS = {"mlx.core as mx": "torch", "mlx.nn": "torch.nn", "icenet.": "icenet_torch.", "mx.": "torch."}


def yaml(first: int = 0, scale: int = 0, more: str = "", steps: int = 4) -> str:
    return (
        f"device: cpu\nmodel: {{type: net.py:Net, hidden_size: 8, vocab_size: 257, first: {first}, scale: {scale}}}\n"
        f"data: {{source: text.txt, seq_length: {ROWS}}}\n"
        f"training: {{max_steps: {steps}, batch_size: 2, checkpoint_every: 100, eval_every: null{more}}}\n"
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt", 400)
    text = NET
    (tmp_path / "net.py").write_text(text)
    for old, new in SAME_WORDS.items():
        text = text.replace(old, new)
    (tmp_path / "net_torch.py").write_text(text)
    (tmp_path / "net.yaml").write_text(yaml())
    return tmp_path


def config(here: Path, text: str) -> Config:
    (here / "net.yaml").write_text(text)
    custom.trust(str(here / "net.py:Net"))
    return Config.from_yaml("net.yaml")


def tokens(backend: str, first: int, length: int) -> Any:
    return native(backend, np.full((2, length), first, np.int32))


# ---- layers -----------------------------------------------------------------------------------------------


def guarded(backend: str, layer: Any, **options: Any) -> Any:
    backends.module(backend, "nn.embedding").guard_embeddings([("blocks.0.table", layer)], **options)
    return layer


def make(backend: str, rows: int = 5, own: bool = False) -> Any:
    """Returns an embedding of the framework or of IceNet, with 3 columns, and values that include -0.0."""
    layer = (backends.module(backend, "nn") if own else {"mlx": M, "torch": torch.nn}[backend]).Embedding(rows, 3)
    values = np.random.default_rng(1).standard_normal((rows, 3)).astype(np.float32)
    values[0] = -0.0
    if backend == "mlx":
        layer.weight = mx.array(values)
    else:
        layer.load_state_dict({"weight": torch.from_numpy(values)})
    return layer


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("wrong", [5, -1, 2**31 - 1, -(2**31)])
@both_backends
def test_an_id_outside_the_table_is_named(backend: str, wrong: int, own: bool) -> None:
    layer = guarded(backend, make(backend, own=own))
    with pytest.raises(OutsideTableError) as caught:
        layer(native(backend, np.array([[0, 4], [wrong, 1]], np.int32)))
    assert is_one_line(caught.value, "blocks.0.table", str(wrong), "5 rows", "0 to 4")
    assert isinstance(caught.value, IndexError)  # as PyTorch's
    with pytest.raises(OutsideTableError):  # also the second time
        layer(native(backend, np.array([[0, 4], [wrong, 1]], np.int32)))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_that_the_host_does_not_read_give_nan(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call with the same shape, and a function that MLX traces."""
    layer, rows = guarded("mlx", make("mlx", rows=100)), 100
    layer(mx.zeros((2, 4), mx.int32))
    wrong = [rows, np.iinfo(dtype).max, np.iinfo(dtype).min or rows]
    ids = np.array([[0, rows - 1, wrong[0], 3], [1, wrong[1], wrong[2], 2]], dtype)
    expected = plain(layer.weight)[np.minimum(ids.astype(np.float64) % rows, rows - 1).astype(int)]
    expected[0, 2] = expected[1, 1] = expected[1, 2] = np.nan
    traced = mx.vmap(layer)  # as mx.compile, which would call a compiler
    for call in (layer, traced):
        np.testing.assert_array_equal(plain(call(mx.array(ids))), expected)

    looked_up = []
    lookup = M.Embedding.__call__
    monkeypatch.setattr(M.Embedding, "__call__", lambda self, ids: looked_up.append(plain(ids)) or lookup(self, ids))
    layer(mx.array(ids))
    assert looked_up[0].min() >= 0 and looked_up[0].max() < rows  # no other memory

    def total(weight: Any) -> Any:
        layer.weight = weight
        found = layer(mx.array(ids))
        return mx.where(mx.isnan(found), 0.0, found).sum()

    counts = np.zeros((rows, 3), np.float32)
    counts[[0, rows - 1, 3, 1, 2]] = 1
    np.testing.assert_array_equal(plain(mx.grad(total)(layer.weight)), counts)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_results_and_gradients_stay_the_same_to_the_bit(dtype: str) -> None:
    layer = make("mlx")
    layer.set_dtype(getattr(mx, dtype))
    checked = guarded("mlx", copy.deepcopy(layer))
    inputs = [mx.array(3), mx.array([[0, 4, 0], [2, 1, 0]]), mx.broadcast_to(mx.array([0, 1]), (3, 2)).T, 2, [1, 0]]
    for ids in inputs:

        def both(module: Any, ids: Any = ids) -> list[Any]:
            value = module(ids)
            gradient = mx.grad(lambda w: (module.update({"weight": w}), (module(ids) ** 2).sum())[1])(module.weight)
            return [value.view(mx.uint8), gradient.view(mx.uint8)]

        for ours, theirs in zip(both(checked), both(layer), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(plain(ours), plain(theirs))


@both_backends
def test_checked_layers_stay_the_users_layers(backend: str) -> None:
    """Text, copies, parameters and other methods are those of the framework's own layers; subclasses stay."""
    nn = {"mlx": M, "torch": torch.nn}[backend]

    class Mine(nn.Embedding):  # type: ignore[name-defined,misc]
        pass

    model = nn.Sequential(nn.Embedding(5, 3), Mine(5, 3), nn.Linear(3, 3))
    layers = list(model.layers if backend == "mlx" else model)
    module, nn_tree = (backends.module(backend, f"nn.{name}") for name in ("embedding", "tree"))
    text, kinds, paths = repr(model), nn_tree.layer_kinds(model), list(nn_tree.weight_shapes(model))
    with module.reading_ids(nn_tree.named_modules(model)):
        assert isinstance(layers[0], module.Embedding)
    assert type(layers[0]) is nn.Embedding and not {"_path", "_shapes", "_reads_all"} & set(vars(layers[0]))
    module.guard_embeddings(nn_tree.named_modules(model))
    assert isinstance(layers[0], nn.Embedding) and type(layers[1]) is Mine
    assert (repr(model), nn_tree.layer_kinds(model), list(nn_tree.weight_shapes(model))) == (text, kinds, paths)
    again = copy.deepcopy(layers[0])
    ids = native(backend, np.array([1, 4], np.int32))
    np.testing.assert_array_equal(plain(again(ids)), plain(layers[0].weight)[[1, 4]])
    if backend == "mlx":
        x = mx.ones((2, 3))
        assert mx.array_equal(layers[0].as_linear(x), x @ layers[0].weight.T)


# ---- models -----------------------------------------------------------------------------------------------


@both_backends
def test_positions_from_one_in_a_table_for_positions_from_zero(
    backend: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "net.yaml").write_text(yaml(first=1))
    assert main(["train", "net.yaml", "--run", "run", "--backend", backend]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert is_one_line(line, "positions", " 24 ", "24 rows")
    model = icenet.build("net.yaml", backend, "cpu")
    with pytest.raises(OutsideTableError):
        model(tokens(backend, 0, ROWS))
    model(tokens(backend, 0, ROWS - 1))


@both_backends
def test_generation_past_the_last_position(backend: str, here: Path) -> None:
    model = icenet.build("net.yaml", backend, "cpu")
    with pytest.raises(OutsideTableError) as caught:
        icenet.generate(model, "abcd", max_new_tokens=30)
    assert is_one_line(caught.value, "positions", " 24 ")


def test_logits_that_are_nan_because_of_an_id(here: Path) -> None:
    """The shapes have been seen with other ids."""
    config(here, yaml(scale=1))
    model = icenet.build("net.yaml", "mlx", "cpu")
    for length in range(1, 8):
        model(tokens("mlx", 0, length))
    assert np.isnan(plain(model(tokens("mlx", 60, 4)))).all()
    with pytest.raises(OutsideTableError) as caught:
        model.generate([[60, 61, 62, 63]], max_new_tokens=3)
    assert is_one_line(caught.value, "positions", " 6")


def calls(engine: Any, batch: dict[str, Any]) -> dict[str, Callable[[], object]]:
    return {"evaluate": lambda: engine.evaluate(batch), "forward": lambda: engine.forward(batch)}


@pytest.mark.parametrize("more", ["", ", on_nan: skip", ", mixed_precision: fp16", ", gradient_accumulation: 2"])
def test_a_later_batch_with_a_wrong_id(more: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX does not read the ids of a shape again, and finds the id after a loss that is not finite."""
    settings = config(here, yaml(scale=1, more=more, steps=3))
    original = TextDataset.train_batch

    def batches(self: Any, step: int, size: int) -> dict[str, Any]:
        batch = original(self, step, size)
        batch["inputs"] = np.where(step == 2, 100, 0) + np.zeros_like(batch["inputs"])
        return batch

    monkeypatch.setattr(TextDataset, "train_batch", batches)
    trainer = Trainer.start(settings, here / "run", backend="mlx", quiet=True)
    with pytest.raises(OutsideTableError) as caught:
        trainer.fit()
    assert is_one_line(caught.value, "positions", " 100 ")
    assert trainer.step == 3
    wrong = {"inputs": np.full((2, ROWS), 50, np.int32), "labels": np.zeros((2, ROWS), np.int32)}
    trainer.engine.evaluate({**wrong, "inputs": np.zeros((2, ROWS), np.int32)})
    for call in calls(trainer.engine, wrong).values():
        with pytest.raises(OutsideTableError):
            call()


def test_losses_are_those_of_unchecked_layers(here: Path) -> None:
    """And the file, the names and the kinds of the weights."""
    settings = config(here, yaml())
    found = []
    for checked in (True, False):
        engine = backends.engine(settings, "mlx")
        if not checked:
            for layer in (engine.model.embedding, engine.model.positions):
                object.__setattr__(layer, "__class__", M.Embedding)
        batch = {name: np.arange(2 * ROWS, dtype=np.int32).reshape(2, ROWS) for name in ("inputs", "labels")}
        losses = [engine.read(engine.train_step(batch, step, 1e-2))[:2] for step in range(3)]
        found.append((losses, list(engine.weights()), engine.model.layer_kinds(), repr(engine.model)))
    assert found[0] == found[1]


# ---- parity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2])
def test_parity_of_twins_with_a_wrong_id(steps: int, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "net.yaml").write_text(yaml(first=-1))
    assert main(["parity", "net.yaml", "--steps", str(steps)]) == 2
    assert is_one_line(capfd.readouterr().err.splitlines()[-1], "positions", " -1 ")


def test_parity_of_a_wrong_id_on_mlx_alone(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (here / "net_torch.py").read_text()
    (here / "net_torch.py").write_text(text.replace("self.config.first", "0"))
    (here / "net.yaml").write_text(yaml(first=3))
    assert main(["parity", "net.yaml"]) == 2
    assert is_one_line(capfd.readouterr().err.splitlines()[-1], "positions", " 24 ")


@pytest.mark.parametrize("reference", BACKENDS)
def test_modules_without_a_config(reference: str) -> None:
    """MLX would read and write other memory."""
    ours, theirs = make("mlx"), make(reference)
    good, bad = np.array([[0, 4], [2, 1]], np.int32), np.array([[0, 4], [5, 1]], np.int32)
    with pytest.raises(IceNetError) as caught:
        compare(ours, theirs, bad, copy_weights=True)
    assert is_one_line(caught.value, "Embedding", " 5 ")
    assert type(ours) is M.Embedding and type(theirs) in (M.Embedding, torch.nn.Embedding)
    assert compare(ours, theirs, good, copy_weights=True).passed


def test_an_id_that_only_one_module_computes() -> None:
    class Shifted(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = make("mlx")

        def __call__(self, ids: Any) -> Any:
            return self.table(ids + 1)

    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = make("torch")

        def forward(self, ids: Any) -> Any:
            return self.table(ids)

    report = compare(Shifted(), Table(), np.array([[0, 4], [2, 1]], np.int32), copy_weights=True)
    assert (report.culprit, report.where) == ("", "before table")  # the code around it computes the id
    assert is_one_line(report.verdict, "a raises an error", "the id 5 is outside its table of 5 rows")
