"""Layouts and conversion: the table of layouts against the frameworks' own layers, and bit-exact round trips."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from icenet.core import files
from icenet.core.errors import FileError, UsageError, WeightsError
from icenet.core.models import modules
from icenet.core.training.signals import Stopped
from icenet.core.weights import convert, layout
from icenet.core.weights import files as weights
from icenet.core.weights import safetensors as tensor_file

torch: Any = pytest.importorskip("torch")
pytest.importorskip("mlx")
importlib.import_module("icenet.blas")  # before mlx.core
mx: Any = importlib.import_module("mlx.core")
mnn: Any = importlib.import_module("mlx.nn")
tnn: Any = torch.nn
load_file: Any = importlib.import_module("safetensors.torch").load_file


def channels_last(x: Any) -> Any:
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def channels_first(x: Any) -> Any:
    return np.moveaxis(x, -1, 1)


def as_is(x: Any) -> Any:
    return x


# name: (kind, mlx layer, torch layer, shape of torch's input, its form in mlx, mlx's output in torch's form)
# Axes of unequal length throughout, so that a wrong permutation cannot fit.
LAYERS: dict[str, tuple[str, Any, Any, tuple[int, ...], Any, Any]] = {
    "linear": ("linear", lambda: mnn.Linear(5, 7), lambda: tnn.Linear(5, 7), (3, 5), as_is, as_is),
    "linear without bias": (
        "linear", lambda: mnn.Linear(5, 7, bias=False), lambda: tnn.Linear(5, 7, bias=False), (3, 5),
        as_is, as_is),
    "embedding": ("embedding", lambda: mnn.Embedding(11, 5), lambda: tnn.Embedding(11, 5), (), as_is, as_is),
    "layer norm": ("layer_norm", lambda: mnn.LayerNorm(6), lambda: tnn.LayerNorm(6), (4, 6), as_is, as_is),
    "rms norm": (
        "rms_norm", lambda: mnn.RMSNorm(6, eps=1e-5), lambda: tnn.RMSNorm(6, eps=1e-5), (4, 6), as_is, as_is),
    "group norm": (
        "group_norm", lambda: mnn.GroupNorm(2, 6, pytorch_compatible=True), lambda: tnn.GroupNorm(2, 6),
        (4, 6, 3, 5), channels_last, channels_first),
    "batch norm": (
        "batch_norm", lambda: mnn.BatchNorm(6), lambda: tnn.BatchNorm2d(6), (4, 6, 3, 5), channels_last,
        channels_first),
    "prelu": ("prelu", lambda: mnn.PReLU(6), lambda: tnn.PReLU(6), (4, 6), as_is, as_is),
    "conv1d": (
        "conv1d", lambda: mnn.Conv1d(4, 6, 3), lambda: tnn.Conv1d(4, 6, 3), (2, 4, 9), channels_last,
        channels_first),
    "grouped conv1d": (
        "conv1d", lambda: mnn.Conv1d(4, 6, 3, groups=2), lambda: tnn.Conv1d(4, 6, 3, groups=2), (2, 4, 9),
        channels_last, channels_first),
    "conv2d": (
        "conv2d", lambda: mnn.Conv2d(4, 6, (3, 2), stride=2, padding=1),
        lambda: tnn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (2, 4, 9, 8), channels_last, channels_first),
    "grouped conv2d": (
        "conv2d", lambda: mnn.Conv2d(4, 6, (3, 2), groups=2), lambda: tnn.Conv2d(4, 6, (3, 2), groups=2),
        (2, 4, 9, 8), channels_last, channels_first),
    "depthwise conv2d": (
        "conv2d", lambda: mnn.Conv2d(4, 4, (3, 2), groups=4), lambda: tnn.Conv2d(4, 4, (3, 2), groups=4),
        (2, 4, 9, 8), channels_last, channels_first),
    "conv3d": (
        "conv3d", lambda: mnn.Conv3d(3, 5, (2, 3, 4)), lambda: tnn.Conv3d(3, 5, (2, 3, 4)), (2, 3, 5, 6, 7),
        channels_last, channels_first),
    "transposed conv1d": (
        "conv_transpose1d", lambda: mnn.ConvTranspose1d(4, 6, 3, stride=2),
        lambda: tnn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), channels_last, channels_first),
    "transposed conv2d": (
        "conv_transpose2d", lambda: mnn.ConvTranspose2d(4, 6, (3, 2), stride=2),
        lambda: tnn.ConvTranspose2d(4, 6, (3, 2), stride=2), (2, 4, 5, 6), channels_last, channels_first),
    "transposed conv3d": (
        "conv_transpose3d", lambda: mnn.ConvTranspose3d(3, 5, (2, 3, 4), stride=2),
        lambda: tnn.ConvTranspose3d(3, 5, (2, 3, 4), stride=2), (2, 3, 3, 4, 2), channels_last,
        channels_first),
}  # fmt: skip


def random_weights(module: Any, seed: int = 0) -> dict[str, Any]:
    """Values for every parameter and statistic of a torch module, away from the initial zeros and ones."""
    draw = np.random.default_rng(seed)
    return {
        name: (draw.uniform(0.5, 1.5, tuple(value.shape))).astype(np.float32)
        for name, value in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


class Holder(mnn.Module):  # type: ignore[misc]
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_the_same_on_both_sides(tmp_path: Path, name: str) -> None:
    kind, make_mlx, make_torch, shape, into_mlx, from_mlx = LAYERS[name]
    mirror = tnn.Module()
    mirror.layer = make_torch()
    canonical = random_weights(mirror)
    weights.write(tmp_path / "c.safetensors", canonical)

    loaded = load_file(tmp_path / "c.safetensors")
    mirror.load_state_dict(loaded, strict=True)
    mirror.eval()
    draw = np.random.default_rng(1)
    x = draw.integers(0, 11, (2, 3)) if kind == "embedding" else draw.standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        fp32 = mirror.layer(torch.from_numpy(x)).numpy()
        exact = mirror.double().layer(torch.from_numpy(x if kind == "embedding" else x.astype(np.float64))).numpy()

    convert.convert(tmp_path / "c.safetensors", tmp_path / "m.safetensors", "mlx", kinds={"layer": kind})
    native = Holder(make_mlx())
    native.load_weights(str(tmp_path / "m.safetensors"), strict=True)
    native.eval()
    got = from_mlx(np.array(native.layer(mx.array(into_mlx(x)))))

    assert got.shape == exact.shape
    # the yardstick: 8 times PyTorch's own distance to float64; floor: one rounding of the largest value
    noise = max(np.abs(fp32 - exact).max(), np.finfo(np.float32).eps * np.abs(exact).max())
    assert np.abs(got - exact).max() <= 8 * noise

    convert.convert(tmp_path / "m.safetensors", tmp_path / "b.safetensors", "canonical", kinds={"layer": kind})
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    # and from a file that MLX itself has saved
    native.save_weights(str(tmp_path / "s.safetensors"))
    convert.convert(tmp_path / "s.safetensors", tmp_path / "d", "canonical", source_form="mlx", kinds={"layer": kind})
    same_tree(weights.read(tmp_path / "d"), canonical)


def test_every_kind_is_tested_above() -> None:
    # bilinear has two inputs, see parity/test_modules.py; the others have equal layouts by definition
    elsewhere = {"recurrent", "plain", "bilinear", "stacked_linear"}
    assert {entry[0] for entry in LAYERS.values()} | elsewhere == set(layout.RULES)


def same_tree(found: Any, expected: Any) -> None:
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert found[name].shape == expected[name].shape, name
        assert np.ascontiguousarray(found[name]).tobytes() == np.ascontiguousarray(expected[name]).tobytes(), name


# --- layout ------------------------------------------------------------------------------------------------

RANKS = {kind: len(rules["weight"].to_mlx) for kind, rules in layout.RULES.items()
         if "weight" in rules and rules["weight"].to_mlx}  # fmt: skip


@st.composite
def trees(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, str]]:
    """Weights of some layers of any kind, dtype and shape, empty ones too, and their kinds."""
    tree: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for number in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(sorted(layout.RULES)))
        kinds[f"blocks.{number}"] = kind
        for leaf in layout.RULES[kind]:
            rank = RANKS.get(kind) if leaf == "weight" else None
            rank = draw(st.integers(0, 3)) if rank is None else rank
            shape = tuple(draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank)))
            dtype = tensor_file.DTYPES[draw(st.sampled_from(sorted(set(tensor_file.DTYPES) - {"F64", "BOOL"})))]
            size = int(np.prod(shape)) * dtype.itemsize
            data = bytearray(draw(st.binary(min_size=size, max_size=size)))
            name = "anything" if leaf == layout.ANY else leaf
            tree[f"blocks.{number}.{name}"] = np.frombuffer(data, dtype).reshape(shape)
    return tree, kinds


@settings(max_examples=100, deadline=None)
@given(trees())
def test_there_and_back_in_memory(drawn: Any) -> None:
    tree, kinds = drawn
    there = layout.tree_to_mlx(tree, kinds)
    back = layout.tree_to_torch(there, kinds)
    assert all(array.flags.c_contiguous for array in [*there.values(), *back.values()])
    same_tree(back, tree)


@settings(max_examples=60, deadline=None)
@given(drawn=trees(), limit=st.sampled_from([None, 50]))
def test_there_and_back_on_disk(tmp_path_factory: pytest.TempPathFactory, drawn: Any, limit: Any) -> None:
    tree, kinds = drawn
    folder = tmp_path_factory.mktemp("c")
    before = weights.write(folder / "a", tree, {"step": "7"}, max_shard_bytes=limit)
    shapes = weights.shapes(tree)
    convert.convert(folder / "a", folder / "m.safetensors", "mlx", kinds=kinds, shapes=shapes)
    convert.convert(
        folder / "m.safetensors", folder / "b", "canonical", kinds=kinds, shapes=shapes, max_shard_bytes=limit
    )
    after = [folder / "b" / file.name for file in before]
    assert [file.read_bytes() for file in after] == [file.read_bytes() for file in before]
    # idempotent: canonical to canonical, mlx to mlx
    convert.convert(folder / "a", folder / "again", "canonical", max_shard_bytes=limit)
    assert [(folder / "again" / file.name).read_bytes() for file in before] == [f.read_bytes() for f in before]
    convert.convert(folder / "m.safetensors", folder / "n.safetensors", "mlx")
    assert (folder / "n.safetensors").read_bytes() == (folder / "m.safetensors").read_bytes()
    # what MLX reads is what numpy transposed
    expected = layout.tree_to_mlx(tree, kinds)
    for name, array in mx.load(str(folder / "m.safetensors")).items():
        assert array.shape == expected[name].shape
        if expected[name].dtype == tensor_file.DTYPES["BF16"]:
            assert array.dtype == mx.bfloat16
            array = array.view(mx.uint16) if array.size else mx.zeros(array.shape, mx.uint16)
        assert np.array(array).tobytes() == expected[name].tobytes()


def test_unknown_layouts() -> None:
    weight = np.zeros((2, 3, 4, 5))
    for call, names in [
        (lambda: layout.to_mlx("conv2", "weight", weight), ("'conv2'", "'conv2d'")),
        (lambda: layout.to_torch("conv2d", "kernel", weight), ("'conv2d'", "'kernel'", "weight, bias")),
        (lambda: layout.to_mlx("conv2d", "weight", np.zeros((2, 3))), ("'weight'", "[2, 3]", "4 axes")),
        (
            lambda: layout.tree_to_mlx({"stem.con.weight": weight}, {"stem.conv": "conv2d"}),
            ("'stem.con'", "'stem.con.weight'", "'stem.conv'"),
        ),
    ]:
        with pytest.raises(WeightsError) as caught:
            call()
        assert is_one_line(caught.value, *names)


def test_layouts_of_shapes_and_paths() -> None:
    weight = np.zeros((2, 3, 4, 5))
    assert layout.to_mlx("conv2d", "weight", weight).shape == (2, 4, 5, 3)
    assert layout.to_torch("conv_transpose2d", "weight", weight).shape == (5, 2, 3, 4)
    assert layout.torch_shape("conv_transpose2d", "weight", (2, 10**6, 10**6, 5)) == (5, 2, 10**6, 10**6)
    assert layout.torch_shape("linear", "weight", (2, 3)) == (2, 3)
    assert layout.parameter_kind({"": "plain", "a.b": "linear"}, "a.b.weight") == "linear"
    assert layout.parameter_kind({"": "plain", "a.b": "linear"}, "positions") == "plain"
    assert layout.split("a.b.weight") == ("a.b", "weight") and layout.split("scale") == ("", "scale")


# --- PyTorch state dicts -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(drawn=trees(), suffix=st.sampled_from(convert.PICKLED))
def test_state_dict_round_trip(tmp_path_factory: pytest.TempPathFactory, drawn: Any, suffix: str) -> None:
    tree, kinds = drawn
    folder = tmp_path_factory.mktemp("t")
    weights.write(folder / "a.safetensors", tree)
    convert.convert(folder / "a.safetensors", folder / f"t{suffix}", "torch")
    loaded = torch.load(folder / f"t{suffix}", weights_only=True)
    assert {name: tuple(value.shape) for name, value in loaded.items()} == weights.shapes(tree)
    convert.convert(folder / f"t{suffix}", folder / "b.safetensors", "canonical")
    assert (folder / "b.safetensors").read_bytes() == (folder / "a.safetensors").read_bytes()
    convert.convert(folder / f"t{suffix}", folder / "m.safetensors", "mlx", kinds=kinds)
    convert.convert(folder / "m.safetensors", folder / "u.pt", "torch", kinds=kinds)
    convert.convert(folder / "u.pt", folder / "c.safetensors", "canonical")
    assert (folder / "c.safetensors").read_bytes() == (folder / "a.safetensors").read_bytes()


def torch_model() -> Any:
    torch.manual_seed(0)
    model = tnn.Module()
    model.conv, model.norm, model.head = tnn.Conv2d(3, 4, 3), tnn.BatchNorm2d(4), tnn.Linear(4, 5)
    return model


KINDS = {"conv": "conv2d", "norm": "batch_norm", "head": "linear"}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_whose_name_ends_in_safetensors(tmp_path: Path, zipped: bool) -> None:
    """PyTorch takes such a name for a safetensors file."""
    path = tmp_path / "t.safetensors"
    torch.save(torch_model().state_dict(), path, _use_new_zipfile_serialization=zipped)
    convert.convert(path, tmp_path / "t.pt", "torch", kinds=KINDS)
    found, expected = torch.load(tmp_path / "t.pt"), torch_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_dict_of_torch_reaches_mlx_and_returns(tmp_path: Path, dtype: Any, zipped: bool) -> None:
    model = torch_model().to(dtype)
    torch.save(model.state_dict(), tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
    done = convert.convert(tmp_path / "t.pt", tmp_path / "m.safetensors", "mlx", kinds=KINDS)
    assert done.left_out == ["norm.num_batches_tracked"]
    assert (done.source.form, done.destination.form) == ("torch", "mlx")
    assert (done.source.tensors, done.destination.tensors) == (9, 8)
    native = mnn.Module()
    native.conv, native.norm, native.head = mnn.Conv2d(3, 4, 3), mnn.BatchNorm(4), mnn.Linear(4, 5)
    native.load_weights(str(tmp_path / "m.safetensors"), strict=True)
    convert.convert(tmp_path / "m.safetensors", tmp_path / "back.pt", "torch", kinds=KINDS)
    other = torch_model().to(dtype)
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True), strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped("SIGTERM"), OSError(errno.ENOSPC, "full")])
def test_a_stop_while_a_state_dict_is_written_stays_one(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second write on, PyTorch's zip writer raises a RuntimeError of its own on top of it."""

    class Stopping(io.RawIOBase):
        written = 0

        def write(self, content: Any) -> int:
            if self.written:
                raise error
            self.written = len(content)
            return self.written

    @contextlib.contextmanager
    def opened(stage: files.Stage, path: Path) -> Iterator[Any]:
        yield Stopping()

    weights.write(tmp_path / "a.safetensors", {"a": np.zeros(300, np.float32)})
    monkeypatch.setattr(files.Stage, "open", opened)
    with pytest.raises(FileError if isinstance(error, OSError) else type(error)):
        convert.convert(tmp_path / "a.safetensors", tmp_path / "a.pt", "torch")
    assert not (tmp_path / "a.pt").exists()


class Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("it-ran"),))


def test_state_dicts_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from icenet_torch.tools.state_dict import read_state_dict

    monkeypatch.chdir(tmp_path)
    good = torch.ones(300)
    for content, zipped, names in [
        ({"a": good, "b": Runs()}, True, ["unpickling"]),
        ({"a": good, "b": Runs()}, False, ["unpickling"]),
        (tnn.Linear(2, 2), True, ["unpickling"]),
        ({"model": {"a": good}, "step": 3}, True, ["--key model", "step"]),
        ({0: good}, True, ["0 is not a name"]),
        ([good], True, ["list"]),
        ({"a": good.to_sparse()}, True, ["'a'", "sparse_coo"]),
        ({"a": torch.empty(3, device="meta")}, True, ["'a'"]),
        ({"a": good.to(torch.float8_e4m3fn)}, True, ["'a'", "float8_e4m3fn"]),
    ]:
        torch.save(content, "x.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError) as caught:
            read_state_dict("x.pt")
        assert is_one_line(caught.value, "x.pt", *names)
    Path("x.pt").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(WeightsError, match=r"x\.pt: damaged"):
        read_state_dict("x.pt")
    for zipped in (True, False):
        torch.save({"a": good}, "x.pt", _use_new_zipfile_serialization=zipped)
        whole = Path("x.pt").read_bytes()
        for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
            Path("x.pt").write_bytes(whole[:length])
            with pytest.raises(WeightsError) as caught:
                read_state_dict("x.pt")
            assert is_one_line(caught.value, "x.pt")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_state_dict("none.pt")
    assert not Path("it-ran").exists()


def test_views_and_shared_tensors_of_a_state_dict(tmp_path: Path) -> None:
    from icenet_torch.tools.state_dict import read_state_dict

    table = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": table.T, "b": table, "c": table[1:, ::2], "d": torch.tensor(3.0)}, tmp_path / "x.pt")
    found = read_state_dict(tmp_path / "x.pt")
    same_tree(found, {"a": table.T.numpy(), "b": table.numpy(), "c": table[1:, ::2].numpy(), "d": np.float32(3)})
    assert all(array.flags.c_contiguous for array in found.values())


# --- invalid requests -------------------------------------------------------------------------------------


def source(tmp_path: Path, **metadata: str) -> Path:
    tree = {"conv.weight": np.zeros((2, 3, 4, 5), np.float32), "conv.bias": np.zeros(2, np.float32)}
    weights.write(tmp_path / "a.safetensors", tree, metadata)
    return tmp_path / "a.safetensors"


def test_requests_that_are_refused(tmp_path: Path) -> None:
    a, b, mlx = source(tmp_path), tmp_path / "b.safetensors", tmp_path / "m.safetensors"
    existing, shards, wide = tmp_path / "there.safetensors", tmp_path / "shards", tmp_path / "wide.safetensors"
    kinds = {"conv": "conv2d"}
    weights.write(existing, {})
    weights.write(shards / "x.safetensors", {"a": np.ones(3), "b": np.ones(3)}, max_shard_bytes=24)
    weights.write(wide, {"conv.weight": np.zeros((2, 3, 4, 5))})
    convert.convert(a, mlx, "mlx", kinds=kinds)
    other = {"conv.weight": (2, 3, 5, 4), "conv.bias": (2,)}
    larger = {**other, "head.weight": (2, 2)}

    for error, names, arguments, options in [
        (UsageError, ["'onnx'", "canonical, mlx, torch"], (a, b, "onnx"), {}),
        (UsageError, ["'x'", "canonical, mlx, torch"], (a, b, "mlx"), {"source_form": "x"}),
        (UsageError, [str(a), "--config"], (a, b, "mlx"), {}),
        (UsageError, [str(a), "same file"], (a, a, "canonical"), {"overwrite": True}),
        (UsageError, ["a.safetensors", "same file"], (a, shards / ".." / "a.safetensors", "canonical"), {}),
        (UsageError, ["same file"], (shards / "x.safetensors.index.json", shards / "x.safetensors", "torch"), {}),
        (UsageError, [str(existing), "exists", "--overwrite"], (a, existing, "torch"), {}),
        (UsageError, ["x.safetensors.index.json", "exists"], (a, shards / "x.safetensors", "canonical"), {}),
        (UsageError, ["b.pt", "mlx"], (a, tmp_path / "b.pt", "mlx"), {"kinds": kinds}),
        (UsageError, [".npz"], (a, tmp_path / "b.npz", "mlx"), {"kinds": kinds}),
        (WeightsError, ["none.pt", "no such file"], (tmp_path / "none.pt", b, "canonical"), {}),
        (WeightsError, ["none", "no such file"], (tmp_path / "none", b, "canonical"), {}),
        (
            WeightsError,
            ["1 missing (head.weight)", "1 of another shape (conv.weight is"],
            (a, b, "mlx"),
            {"kinds": kinds, "shapes": larger},
        ),
        (WeightsError, ["1 missing (head.weight)"], (mlx, b, "canonical"), {"kinds": kinds, "shapes": larger}),
        (WeightsError, ["not [2, 3, 5, 4]"], (mlx, b, "canonical"), {"kinds": kinds, "shapes": other}),
        (WeightsError, ["'conv'"], (a, b, "mlx"), {"kinds": {"cow": "conv2d"}}),
        (WeightsError, [str(wide), "float64", "float32"], (wide, b, "mlx"), {"kinds": kinds}),
    ]:
        with pytest.raises(error) as caught:
            convert.convert(*arguments, **options)
        assert is_one_line(caught.value, *names), caught.value
    assert not b.exists()
    convert.convert(a, existing, "torch", overwrite=True)
    assert list(weights.read(existing)) == ["conv.bias", "conv.weight"]


@pytest.mark.parametrize(("metadata", "match"), [(None, "no format"), ({"format": "np"}, "'np'")])
def test_a_form_is_never_guessed(tmp_path: Path, metadata: Any, match: str) -> None:
    import safetensors.numpy

    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"conv.weight": np.zeros((2, 3, 4, 5), np.float32)}, path, metadata)
    with pytest.raises(UsageError, match=f"{match}.*--from"):
        convert.convert(path, tmp_path / "b", "canonical")
    done = convert.convert(path, tmp_path / "b", "canonical", source_form="mlx", kinds={"conv": "conv2d"})
    assert weights.read(tmp_path / "b")["conv.weight"].shape == (2, 5, 3, 4)
    assert weights.read(tmp_path / "b").metadata["format"] == "pt"
    file = tmp_path / "b" / "model.safetensors"
    written = weights.read(file)
    assert done.destination == convert.summary(file, "canonical", written, written.metadata) and not done.note
    done = convert.convert(tmp_path / "b", tmp_path / "c", "canonical", source_form="mlx", kinds={"conv": "conv2d"})
    assert done.note == f"{tmp_path / 'b'}: was read as mlx, because --from says so, but its metadata say canonical"


def test_summary_and_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = convert.convert(
        source(tmp_path), tmp_path / "m.safetensors", "mlx", kinds={"conv": "conv2d"}, metadata={"step": "3"},
        progress=lambda *pair: seen.append(pair),
    )  # fmt: skip
    assert seen == [(480, 488), (488, 488)] or seen == [(8, 488), (488, 488)]
    summary = done.destination
    assert (summary.tensors, summary.values, summary.bytes, summary.dtypes) == (2, 122, 488, {"F32": 2})
    assert summary.metadata == {"format": "mlx", "step": "3"} and done.files == [tmp_path / "m.safetensors"]
    assert str(summary).endswith("m.safetensors: mlx, 2 tensors (2 F32), 122 values, 488 bytes")


def twins() -> tuple[Any, Any]:
    """Returns plain twins with a container, convolutions, statistics, and equal weights."""
    ours = mnn.Sequential(mnn.Conv1d(3, 4, 2), mnn.ReLU(), mnn.BatchNorm(4), mnn.ConvTranspose1d(4, 5, 3))
    theirs = tnn.Sequential(tnn.Conv1d(3, 4, 2), tnn.ReLU(), tnn.BatchNorm1d(4), tnn.ConvTranspose1d(4, 5, 3))
    modules.copy_weights(theirs, ours)
    return ours, theirs


def test_any_module_determines_its_own_layer_kinds(tmp_path: Path) -> None:
    ours, theirs = twins()
    x = np.random.default_rng(0).standard_normal((2, 3, 9)).astype(np.float32)
    expected = theirs.eval()(torch.from_numpy(x)).detach().numpy()
    found = channels_first(np.array(ours.eval()(mx.array(channels_last(x)))))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    modules.copy_weights(ours, theirs)
    np.testing.assert_array_equal(theirs(torch.from_numpy(x)).detach().numpy(), expected)
    with pytest.raises(WeightsError) as raised:
        modules.set_weights(ours, {"0.weight": np.zeros((4, 3, 2), np.float32)})
    assert is_one_line(raised.value, "0.bias")
    with pytest.raises(UsageError):
        modules.get_weights("model")


@pytest.mark.parametrize("side", [0, 1])
def test_files_of_any_module_are_converted(side: int, tmp_path: Path) -> None:
    ours, theirs = twins()
    torch.save(theirs.state_dict(), tmp_path / "t.pt")
    model = (ours, theirs)[side]
    convert.convert(tmp_path / "t.pt", tmp_path / "m.safetensors", "mlx", model=model)
    loaded = mnn.Sequential(mnn.Conv1d(3, 4, 2), mnn.ReLU(), mnn.BatchNorm(4), mnn.ConvTranspose1d(4, 5, 3))
    loaded.load_weights(str(tmp_path / "m.safetensors"), strict=True)
    expected = modules.get_weights(theirs)
    assert same_bits(modules.get_weights(loaded), expected)
    loaded.save_weights(str(tmp_path / "plain.safetensors"))
    convert.convert(
        tmp_path / "plain.safetensors", tmp_path / "c.safetensors", "canonical", model=model, source_form="mlx"
    )
    assert same_bits(dict(weights.read(tmp_path / "c.safetensors")), expected)
    with pytest.raises(WeightsError) as raised:
        convert.convert(tmp_path / "t.pt", tmp_path / "n.safetensors", "mlx", model=mnn.Linear(2, 2))
    assert is_one_line(raised.value, "weight")


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="Windows locks a mapped file")
def test_a_source_that_becomes_shorter_while_pytorch_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch reads the memory maps of all arrays at the end."""
    source = tmp_path / "x.safetensors"
    weights.write(source, {name: np.ones(5000) for name in "ab"})
    save = torch.save

    def save_later(*arguments: Any) -> None:
        os.truncate(source, 50_000)
        save(*arguments)

    monkeypatch.setattr(torch, "save", save_later)
    with pytest.raises(WeightsError) as raised:
        convert.convert(source, tmp_path / "y.pt", "torch")
    assert is_one_line(raised.value, "x.safetensors", "became shorter")
    assert os.listdir(tmp_path) == ["x.safetensors"]
