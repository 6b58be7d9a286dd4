"""Canonical weights: round trips are bit-exact, for us and for the safetensors package; damaged and hostile files and
full disks raise errors of one line, and existing files survive."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import is_one_line, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from icenet.core import weights as package
from icenet.core.errors import FileError, WeightsError
from icenet.core.weights import files as weights
from icenet.core.weights import safetensors as tensor_file
from icenet.core.weights import safetensors_writer

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Arrays of any dtype and any bits, including NaNs with payloads, and 0-d, empty and non-contiguous arrays."""
    dtype = draw(st.sampled_from(list(tensor_file.DTYPES.values())))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    count = int(np.prod(shape))
    if dtype == np.bool_:
        raw = bytes(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    else:
        raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    array = np.frombuffer(bytearray(raw), dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


@settings(max_examples=100, deadline=None)
@given(tree=st.dictionaries(NAMES, arrays(), max_size=5), limit=st.sampled_from([None, 1, 40, 10**9]))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, tree: Any, limit: Any) -> None:
    folder = tmp_path_factory.mktemp("w")
    files = weights.write(folder, tree, {"made_by": "a test"}, max_shard_bytes=limit)
    found = weights.read(folder)
    assert list(found) == sorted(tree)
    assert found.metadata == {"format": "pt", "made_by": "a test"}
    assert found.nbytes == sum(array.nbytes for array in tree.values())
    for name, array in tree.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert bits(found[name]) == bits(array)
        assert found[name].flags.c_contiguous and found[name].flags.aligned
        assert type(found[name]) is np.ndarray
    again = weights.write(folder / "again", found, {"made_by": "a test"}, max_shard_bytes=limit)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]
    assert not list(folder.glob(".*.tmp"))


@settings(max_examples=60, deadline=None)
@given(tree=st.dictionaries(NAMES, arrays(), min_size=1, max_size=5))
def test_the_bytes_are_those_of_the_safetensors_package(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    tree = {name: np.array(array, order="C") for name, array in tree.items()}
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    weights.write(path, tree)
    theirs = safetensors.numpy.save(tree, {"format": "pt"})
    assert path.read_bytes() == theirs
    path.write_bytes(theirs)
    assert {name: bits(array) for name, array in weights.read(path).items()} == {
        name: bits(array) for name, array in tree.items()
    }


def test_bfloat16_is_torchs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    save_file({"a": every.reshape(256, 256)}, tmp_path / "t.safetensors", {"format": "pt"})
    found = weights.read(tmp_path / "t.safetensors")
    assert found["a"].dtype == ml_dtypes.bfloat16 and found["a"].shape == (256, 256)
    weights.write(tmp_path / "n.safetensors", found)
    assert (tmp_path / "n.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()
    loaded = load_file(tmp_path / "n.safetensors")["a"]
    assert torch.equal(loaded.view(torch.int16), every.reshape(256, 256).view(torch.int16))
    assert found["a"].astype(np.float32).tobytes() == every.reshape(256, 256).float().numpy().tobytes()


def test_deprecated_names_for_bfloat16() -> None:
    array = np.array([1.5, -2], ml_dtypes.bfloat16)
    with pytest.warns(DeprecationWarning, match="ml_dtypes"):
        assert array.dtype == package.BFLOAT16
    with pytest.warns(DeprecationWarning, match="astype"):
        assert package.bfloat16_to_float32(array).tolist() == [1.5, -2]
    with pytest.raises(AttributeError):
        package.nothing  # noqa: B018


def test_other_byte_orders_and_dtypes(tmp_path: Path) -> None:
    weights.write(tmp_path / "a.safetensors", {"a": np.arange(5, dtype=">f4")})
    assert weights.read(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(WeightsError, match="complex128"):
        weights.write(tmp_path / "b.safetensors", {"a": np.zeros(2, np.complex128)})


def test_arrays_come_from_the_map_and_outlive_a_replacement(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights.write(path, {"a": np.arange(1000, dtype=np.float32)})
    old = weights.read(path)["a"]
    assert not old.flags.owndata and not old.flags.writeable
    weights.write(path, {"a": np.zeros(1000, np.float32)})
    assert old[-1] == 999 and weights.read(path)["a"][-1] == 0


def test_unaligned_files_of_others_are_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path = raw(tmp_path, header, b"\x07" + np.array([1, 2], "<f4").tobytes())
    assert weights.read(path)["b"].tolist() == [1, 2] and weights.read(path)["b"].flags.aligned


# --- shards ------------------------------------------------------------------------------------------------


def test_shards_and_index(tmp_path: Path) -> None:
    tree = {f"layers.{i}.weight": np.full(10, i, np.float32) for i in range(5)}
    tree["big"] = np.zeros(100, np.float32)
    seen: list[tuple[int, int]] = []
    files = weights.write(tmp_path, tree, max_shard_bytes=100, progress=lambda a, b: seen.append((a, b)))
    assert [file.name for file in files] == [
        *(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 600}
    # an independent reader: follow the index with the safetensors package
    for name, file in index["weight_map"].items():
        assert np.array_equal(safetensors.numpy.load_file(tmp_path / file)[name], tree[name])
    assert sorted(index["weight_map"]) == sorted(tree)
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"):
        assert sorted(weights.read(path)) == sorted(tree)
    assert seen[-1] == (600, 600) and len(seen) == 6


def test_one_form_replaces_the_other(tmp_path: Path) -> None:
    weights.write(tmp_path, {"a": np.zeros(9), "b": np.zeros(9)})
    weights.write(tmp_path, {"a": np.ones(9), "b": np.ones(9)}, max_shard_bytes=80)
    assert weights.read(tmp_path)["a"][0] == 1
    weights.write(tmp_path, {"a": np.full(9, 2.0)})
    assert list(weights.read(tmp_path)) == ["a"] and weights.read(tmp_path)["a"][0] == 2


def sharded(folder: Path) -> dict[str, Any]:
    weights.write(folder, {"a": np.zeros(9), "b": np.zeros(9)}, max_shard_bytes=80)
    content: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return content


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_shards_that_no_index_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other safetensors files, such as those of an optimizer or an adapter, are no shards of the weights."""
    sharded(tmp_path)
    for name in ("optimizer.safetensors", "adapter_model.safetensors", "modeling.py", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(b"")
    weights.read(tmp_path)
    assert not caplog.messages
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"")
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        caplog.clear()
        weights.read(path)
        assert is_one_line(*caplog.messages, "model-00003-of-00003", "model.safetensors.index.json does not list")
    (tmp_path / "model.safetensors.index.json").unlink()
    weights.write(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    caplog.clear()
    weights.read(tmp_path / "model.safetensors")
    assert not caplog.messages
    weights.read(tmp_path)
    assert is_one_line(*caplog.messages, *SHARDS, "model.safetensors is read")


@pytest.mark.parametrize("where", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "", "..",
                                   "C:\\x.safetensors", "x.json"])  # fmt: skip
def test_an_index_cannot_lead_elsewhere(tmp_path: Path, where: str) -> None:
    weights.write(tmp_path / "x.safetensors", {"a": np.zeros(9)})
    folder = tmp_path / "folder"
    index = sharded(folder)
    index["weight_map"]["a"] = where
    refuse_index(folder, index, f"shard {where!r}")


def refuse_index(folder: Path, index: Any, *names: str) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    refused(folder, *names)


def refused(path: Path, *names: str) -> None:
    """Reading `path` raises an error of one short line that begins with the path and contains `names`."""
    with pytest.raises(WeightsError) as caught:
        weights.read(path)
    message = str(caught.value)
    assert is_one_line(message, *names) and message.startswith(str(path)), message
    assert len(message) < 400 + len(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"metadata": {}}',
        '{"weight_map": 3}',
        '{"weight_map": {"a": 1}}',
        "\x00",
        "[" * 100_000,
    ],
)
def test_an_invalid_index(tmp_path: Path, text: str) -> None:
    sharded(tmp_path)
    refuse_index(tmp_path, text, "not an index of shards")


def test_an_index_that_contradicts_its_shards(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    both = dict.fromkeys("ab", SHARDS[0])
    refuse_index(tmp_path, {"weight_map": both}, "'b'", SHARDS[0])
    refuse_index(tmp_path, {"weight_map": {**index["weight_map"], "c": SHARDS[0]}}, "'c'", SHARDS[0])
    weights.write(tmp_path / SHARDS[1], {"b": np.zeros(9), "c": np.zeros(1)})
    refuse_index(tmp_path, index, "does not list c")
    weights.write(tmp_path / SHARDS[1], {"b": np.zeros(9), "a": np.zeros(9)})
    refuse_index(tmp_path, index, "'a' is in both", *SHARDS)
    refuse_index(tmp_path, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "duplicate name 'a'")
    (tmp_path / SHARDS[1]).unlink()
    refuse_index(tmp_path, index, "1 of 2 shards are missing", SHARDS[1])


# --- hostile and damaged files -----------------------------------------------------------------------------


def raw(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "raw.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


# name: (header, data, length of the header if not the true one, what the message names)
HOSTILE: dict[str, tuple[Any, bytes, int | None, str]] = {
    "length lies": (one(), bytes(8), 2**63, "header"),
    "length a little too long": (one(), bytes(8), 10_000, "header"),
    "length zero": (one(), bytes(8), 0, "JSON"),
    "length too short": (one(), bytes(8), 10, "JSON"),
    "not UTF-8": (b"\xff{}", b"", None, "UTF-8"),
    "deep nesting": (b"[" * 200_000, b"", None, "JSON"),
    "deep nesting of an entry": (b'{"a":' * 200_000, b"", None, "JSON"),
    "a list": ([], b"", None, "JSON"),
    "twice": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":1}', bytes(8), None, "JSON"),
    "twice, the same": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        None,
        "duplicate name 'a'",
    ),
    "twice, differently": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(8),
        None,
        "not fully covered",
    ),
    "no name": ({"": one()["a"]}, bytes(8), None, "no name"),
    "name of several lines": ({"a\n\x1b[31m": {**one()["a"], "data_offsets": [8, 0]}}, bytes(8), None, "offset"),
    "entry of another type": ({"a": 3}, b"", None, "JSON"),
    "entry incomplete": ({"a": {"dtype": "F32"}}, b"", None, "JSON"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None, "JSON"),
    "dtype that numpy lacks": (one(dtype="F8_E4M3", shape=[8]), bytes(8), None, "F8_E4M3"),
    "unknown dtype": (one(dtype="F3"), bytes(8), None, "F3"),
    "dtype of another type": (one(dtype=[]), bytes(8), None, "JSON"),
    "negative axis": (one(shape=[-2]), bytes(8), None, "-2"),
    "axis true": (one(shape=[True, 2]), bytes(8), None, "true"),
    "fraction": (one(shape=[2.0]), bytes(8), None, "2.0"),
    "huge number": (
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 9999 + b'],"data_offsets":[0,8]}}', b"", None, "out of range"),
    "shape beyond data": (one(shape=[3]), bytes(8), None, "shape"),
    "product overflows": (one(shape=[2**62, 4, 2]), bytes(8), None, "overflow"),
    "empty but huge": (one(shape=[0, 2**62], data_offsets=[0, 0]), b"", None, "'a'"),
    "too many axes": (one(shape=[1] * 70 + [2]), bytes(8), None, "'a'"),
    "offsets reversed": (one(data_offsets=[8, 0]), bytes(8), None, "offset"),
    "offset of three": (one(data_offsets=[0, 4, 8]), bytes(8), None, "JSON"),
    "gap before": (one(data_offsets=[8, 16]), bytes(16), None, "offset"),
    "overlap": ({**one(), "b": one()["a"]}, bytes(8), None, "offset"),
    "cut short": (one(), bytes(7), None, "not fully covered"),
    "bytes left over": (one(), bytes(9), None, "not fully covered"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(tmp_path: Path, name: str) -> None:
    header, data, length, named = HOSTILE[name]
    refused(raw(tmp_path, header, data, length), named)


def test_null_metadata(tmp_path: Path) -> None:
    """mlx.core.save_safetensors writes null for no metadata."""
    found = weights.read(raw(tmp_path, {"__metadata__": None, **one()}, bytes(8)))
    assert found.metadata == {} and list(found) == ["a"]


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content, named in [
        (b"", "empty"),
        (b"1234567", "text"),
        (b"\xff\xfe\xfd", "header"),
        (b"PK\x03\x04 a zip file, cut short", "zip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ]:
        path.write_bytes(content)
        refused(path, named)
    refused(tmp_path / "none.safetensors", "no such file")
    refused(tmp_path / "none", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "model.safetensors")


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 250))
def test_any_damage_is_a_weights_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    weights.write(path, {"a": np.arange(4, dtype=np.float32), "b": np.zeros((0, 3)), "c": np.zeros(())})
    content = bytearray(path.read_bytes())
    content[min(place, len(content) - 1)] = value
    for damaged in (bytes(content), bytes(content[:cut])):
        path.write_bytes(damaged)
        try:
            for array in weights.read(path).values():
                array.tobytes()
        except WeightsError as error:
            assert is_one_line(error, str(path))


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weights.write(path, {"a": np.arange(40, dtype=np.float32)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError):
            weights.read(path)


# --- writing that fails ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "__metadata__", "\ud800", 3])
def test_invalid_names(tmp_path: Path, name: Any) -> None:
    with pytest.raises(WeightsError, match="cannot be the name"):
        weights.write(tmp_path, {name: np.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="metadata must map text to text"):
        weights.write(tmp_path, {}, {"step": 3})  # type: ignore[dict-item]
    with pytest.raises(WeightsError, match="max_shard_bytes is 0"):
        weights.write(tmp_path, {}, max_shard_bytes=0)


@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, limit: int | None
) -> None:
    weights.write(tmp_path, {"a": np.zeros(9)})
    before = tree(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(FileError) as caught:
        weights.write(tmp_path, {"a": np.ones(9), "b": np.ones(9)}, max_shard_bytes=limit)
    assert is_one_line(caught.value, str(tmp_path), "no space")
    assert tree(tmp_path) == before


def test_half_replaced_shards_are_never_read_as_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path)
    real, calls = os.replace, []

    def fail_second(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(*paths)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(FileError, match="incomplete"):
        weights.write(tmp_path, {"a": np.ones(9), "b": np.ones(9)}, max_shard_bytes=80)
    refused(tmp_path, "model.safetensors")


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_limit_on_the_size_of_files_leaves_the_old_one(tmp_path: Path) -> None:
    """A real limit of the operating system, in a process of its own."""
    weights.write(tmp_path, {"a": np.zeros(9)})
    before = tree(tmp_path)
    script = (
        "import resource, signal, sys, numpy\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "from icenet.core import weights, errors\n"
        "try: weights.write(sys.argv[1], {'a': numpy.ones(9000), 'b': numpy.ones(3)})\n"
        "except errors.FileError as error: print(error)\n"
    )
    # Python would cut its own compiled modules off at the limit, and keep them
    done = subprocess.run([sys.executable, "-B", "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert is_one_line(done.stdout, "no space"), done
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        weights.write(tmp_path / "file" / "x.safetensors", {"a": np.zeros(1)})


def test_a_failing_source_leaves_nothing(tmp_path: Path) -> None:
    class Failing(dict[str, Any]):
        reads = 0

        def __getitem__(self, name: str) -> Any:
            self.reads += 1
            if self.reads == 4:  # while the second shard is written
                raise KeyError(name)
            return super().__getitem__(name)

    with pytest.raises(KeyError):
        weights.write(tmp_path, Failing(a=np.zeros(9), b=np.zeros(9)), max_shard_bytes=80)
    assert not list(tmp_path.iterdir())


def test_checksum(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2
    assert weights.checksum(tmp_path / "abc") == ("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(WeightsError, match="cannot be read"):
        weights.checksum(tmp_path / "none")


# --- check -------------------------------------------------------------------------------------------------


def test_check() -> None:
    shapes = {f"blocks.{i}.weight": (2, 3) for i in range(9)}
    weights.check(shapes, dict(shapes))
    weights.check(shapes, weights.shapes({name: np.zeros((2, 3)) for name in shapes}))

    def message(found: dict[str, Any]) -> str:
        with pytest.raises(WeightsError) as caught:
            weights.check(shapes, found, "run/model.safetensors")
        assert is_one_line(caught.value) and str(caught.value).startswith("run/model.safetensors: ")
        return str(caught.value)

    assert "9 missing (blocks.0.weight, blocks.1.weight, blocks.2.weight and 6 more)" in message({})
    assert "1 unexpected (head)" in message({**shapes, "head": ()})
    renamed = {("block.0.weight" if name == "blocks.0.weight" else name): s for name, s in shapes.items()}
    assert "1 missing (blocks.0.weight); 1 unexpected (block.0.weight, nearest is blocks.0.weight)" in message(
        renamed
    )
    swapped = message({**shapes, "blocks.3.weight": (3, 2)})
    assert "1 of another shape (blocks.3.weight is [3, 2], not [2, 3])" in swapped


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="only Linux copies from file to file")
@pytest.mark.parametrize("case", ["whole", "parts", "not supported"])
def test_arrays_of_files_are_copied_from_file_to_file(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {"a": np.arange(30, dtype=np.float32).reshape(5, 6), "b": np.arange(7, dtype=np.int8)}
    weights.write(tmp_path / "x.safetensors", arrays)
    found, real, copied = weights.read(tmp_path / "x.safetensors"), os.copy_file_range, []

    def copy(source: int, target: int, count: int, *offsets: int) -> int:
        if case == "not supported":
            raise OSError(errno.EXDEV, "another file system")
        copied.append(real(source, target, min(count, 11) if case == "parts" else count, *offsets))
        return copied[-1]

    monkeypatch.setattr(os, "copy_file_range", copy)
    weights.write(tmp_path / "y.safetensors", found)
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    assert sum(copied) == (0 if case == "not supported" else 127)
    # parts of arrays, and those that are no views in their order
    changed = {"a": found["a"].T, "b": found["b"][2:5], "c": found["a"][1:3], "d": found["a"][3:5]}
    weights.write(tmp_path / "z.safetensors", changed)
    again = weights.read(tmp_path / "z.safetensors")
    assert all(np.array_equal(again[name], array) for name, array in changed.items())


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("at_once", [1, 4096 + 17, 1 << 20])
def test_large_arrays_of_files_are_copied_at_the_same_place_of_a_page(
    shift: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header may end in more spaces. Other arrays are copied through memory. Two threads copy large parts."""
    monkeypatch.setattr(safetensors_writer, "_MOST_PENDING", at_once)
    monkeypatch.setattr(safetensors_writer, "PART", 2000)
    drawn = np.random.default_rng(1)
    arrays = {name: drawn.integers(0, 99, 5000).astype(np.int8) for name in "abc"}
    weights.write(tmp_path / "x.safetensors", arrays)
    found = weights.read(tmp_path / "x.safetensors")
    parts = {name: array[shift:] for name, array in found.items()}
    weights.write(tmp_path / "y.safetensors", {**parts, "d": np.ones(3, np.int8)}, {"about": "x" * 99})
    again = weights.read(tmp_path / "y.safetensors")
    assert [again[name].tobytes() for name in "abc"] == [array[shift:].tobytes() for array in arrays.values()]
    assert again["d"].tolist() == [1, 1, 1]
    starts = [file.entries["a"].start for file in (found, again)]
    assert starts[0] != starts[1] and ((starts[1] - starts[0] - shift) % mmap.PAGESIZE == 0) == (shift == 0)


def test_adjacent_arrays_of_two_files(tmp_path: Path) -> None:
    """They are at the same places of their files."""
    arrays = {name: np.full(5000, value) for value, name in enumerate("ab")}
    for file in "xy":
        weights.write(tmp_path / f"{file}.safetensors", {"a": arrays["a"] + ord(file), "b": arrays["b"] + ord(file)})
    found = {file: weights.read(tmp_path / f"{file}.safetensors") for file in "xy"}
    weights.write(tmp_path / "z.safetensors", {"a": found["x"]["a"], "b": found["y"]["b"], "c": found["y"]["a"]})
    again = weights.read(tmp_path / "z.safetensors")
    assert [again[name][0] for name in "abc"] == [ord("x"), 1 + ord("y"), ord("y")]


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="arrays are read from the map")
@pytest.mark.parametrize("part", [1000, 1 << 22])
def test_a_source_that_becomes_shorter_is_an_error(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading its memory map would end the process."""
    source, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    weights.write(source, {name: np.ones(5000) for name in "ab"})
    found = weights.read(source)
    arrays = {name: found[name] for name in "ab"}
    monkeypatch.setattr(safetensors_writer, "PART", part)
    os.truncate(source, 50_000)
    for read in (lambda: found["a"], lambda: weights.write(target, arrays)):
        with pytest.raises(WeightsError) as raised:
            read()
        assert is_one_line(raised.value, "x.safetensors", "became shorter")
    assert not target.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_arrays_are_read_at_once_and_released(tmp_path: Path) -> None:
    weights.write(tmp_path, {"a": np.ones(2**20), "b": np.ones(2**20)})
    found = weights.read(tmp_path)

    def mapped() -> int:
        """Returns the resident bytes of mapped files; those of a file system in memory count as shared memory."""
        status = Path("/proc/self/status").read_text()
        return 1024 * sum(int(size) for size in re.findall(r"Rss(?:File|Shmem):\s+(\d+)", status))

    before = mapped()
    tensor_file.read_ahead(found["b"])
    if mapped() == before:
        pytest.skip("Linux before 5.14")
    assert abs(mapped() - before - 2**23) < 2**20
    tensor_file.release(found["b"])
    assert mapped() - before < 2**20
    columns = found["a"].reshape(512, 2048)[::-1, 1024:]  # as a part of a fused layer
    columns.sum()
    assert mapped() - before > 2**22
    tensor_file.release(columns)
    assert mapped() - before < 2**20
    tensor_file.read_ahead(found["a"][:, None].T)  # any view
    tensor_file.read_ahead(np.ones(3))  # no array of a file


def test_arrays_of_another_order_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And they stay, also if a map of the user has changes that are not in its file."""
    for name, value in {"_PERMUTED": 64, "_LEAST_ROWS": 2, "_WRITTEN": 24}.items():
        monkeypatch.setattr(safetensors_writer, name, value)
    (tmp_path / "raw").write_bytes(bytes(4096 * 4))
    changed = np.memmap(tmp_path / "raw", np.float32, "c", shape=(64, 64))
    changed[:] = values = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    weights.write(tmp_path / "first", {"a": values.reshape(16, 8, 32)})
    own = weights.read(tmp_path / "first")["a"]
    views = {"a": own.transpose(2, 0, 1), "b": own[:, 3:5], "c": changed.T, "d": values.astype(">f4"), "e": own[0, 0]}
    weights.write(tmp_path / "second", {**views, "f": values[::2, ::-3].astype(ml_dtypes.bfloat16)})
    found = safetensors.numpy.load_file(tmp_path / "second" / "model.safetensors")
    for name, view in views.items():
        assert np.array_equal(found[name], view)
    assert np.array_equal(found["f"], values[::2, ::-3].astype(ml_dtypes.bfloat16))
    assert np.array_equal(changed, values)


def test_the_index_of_one_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As mlx-lm writes it. One that lists other files is said."""
    weights.write(tmp_path, {"a": np.ones(2, np.float32)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert list(weights.read(tmp_path)) == ["a"] and not caplog.messages
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert list(weights.read(tmp_path)) == ["a"] and "index" in caplog.text


def test_arrays_are_read_into_memory_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "PART", 8)
    arrays = {"a": np.arange(30, dtype=np.float32).reshape(5, 6), "b": np.array(2.5), "c": np.empty((0, 3))}
    weights.write(tmp_path, arrays)
    found = weights.read(tmp_path)
    for name, array in {**arrays, "part": arrays["a"][1:3]}.items():
        source = found["a"][1:3] if name == "part" else found[name]
        target = np.full_like(array, -1)
        is_read = tensor_file.read_into(target, source)
        assert is_read == (hasattr(os, "preadv") and array.size > 0)
        assert not is_read or np.array_equal(target, array)
    assert not tensor_file.read_into(np.empty((6, 5), np.float32), found["a"].T)
    assert not tensor_file.read_into(np.empty((5, 6), np.int32), found["a"])
    assert not tensor_file.read_into(np.empty((5, 6), np.float32), arrays["a"])
