"""Canonical weights: what is written is read back bit for bit, by us and by the safetensors package; what is
damaged, hostile or too large for the disk is one line, and nothing is lost by it."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from icenet.core.errors import WeightsError
from icenet.core.weights import files as weights
from icenet.core.weights import safetensors as tensor_file

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Any bits of any dtype, NaNs with payloads included; 0-d, empty and non-contiguous arrays too."""
    dtype = draw(st.sampled_from(list(tensor_file.DTYPES.values())))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    count = int(np.prod(shape))
    if dtype == np.bool_:
        raw = bytes(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    else:
        raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    array = np.frombuffer(bytearray(raw), dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


@settings(max_examples=150, deadline=None)
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
    tree = {name: array for name, array in tree.items() if array.dtype != weights.BFLOAT16}
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
    assert found["a"].dtype == weights.BFLOAT16 and found["a"].shape == (256, 256)
    weights.write(tmp_path / "n.safetensors", found)
    assert (tmp_path / "n.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()
    loaded = load_file(tmp_path / "n.safetensors")["a"]
    assert torch.equal(loaded.view(torch.int16), every.reshape(256, 256).view(torch.int16))
    wide = weights.bfloat16_to_float32(found["a"])
    assert wide.tobytes() == every.reshape(256, 256).float().numpy().tobytes()
    assert weights.bfloat16_to_float32(found["a"][3, 3]).shape == ()
    with pytest.raises(TypeError):
        found["a"] + found["a"]


def test_other_byte_orders_and_dtypes(tmp_path: Path) -> None:
    weights.write(tmp_path / "a.safetensors", {"a": np.arange(5, dtype=">f4")})
    assert weights.read(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(WeightsError, match="complex128 cannot be stored"):
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


@pytest.mark.parametrize("where", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "", "..",
                                   "C:\\x.safetensors", "x.json"])  # fmt: skip
def test_an_index_cannot_lead_elsewhere(tmp_path: Path, where: str) -> None:
    weights.write(tmp_path / "x.safetensors", {"a": np.zeros(9)})
    folder = tmp_path / "folder"
    index = sharded(folder)
    index["weight_map"]["a"] = where
    refuse_index(folder, index, "must be a .safetensors file in the same folder")


def refuse_index(folder: Path, index: Any, match: str) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    refused(folder, match)


def refused(path: Path, match: str) -> str:
    with pytest.raises(WeightsError, match=match) as caught:
        weights.read(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)), message
    assert len(message) < 400 + len(str(path))
    return message


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
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    sharded(tmp_path)
    refuse_index(tmp_path, text, "not an index of shards")


def test_an_index_at_odds_with_its_shards(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    both = dict.fromkeys("ab", SHARDS[0])
    refuse_index(tmp_path, {"weight_map": both}, "does not hold 'b', as it says")
    refuse_index(tmp_path, {"weight_map": {**index["weight_map"], "c": SHARDS[0]}}, "does not hold 'c'")
    weights.write(tmp_path / SHARDS[1], {"b": np.zeros(9), "c": np.zeros(1)})
    refuse_index(tmp_path, index, "does not list c")
    weights.write(tmp_path / SHARDS[1], {"b": np.zeros(9), "a": np.zeros(9)})
    refuse_index(tmp_path, index, "'a' is in both")
    refuse_index(tmp_path, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' is there twice")
    (tmp_path / SHARDS[1]).unlink()
    refuse_index(tmp_path, index, f"1 of 2 shards are missing .{SHARDS[1]}.; copy them")


# --- hostile and damaged files -----------------------------------------------------------------------------


def raw(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "raw.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


HOSTILE: dict[str, tuple[Any, bytes, int | None, str]] = {
    "length lies": (one(), bytes(8), 2**63, "header claims"),
    "length a little too long": (one(), bytes(8), 10_000, "header claims"),
    "length zero": (one(), bytes(8), 0, "not valid JSON"),
    "length too short": (one(), bytes(8), 10, "not valid JSON"),
    "not UTF-8": (b"\xff{}", b"", None, "not valid JSON"),
    "deep nesting": (b"[" * 200_000, b"", None, "nested too deeply"),
    "a list": ([], b"", None, "not a table"),
    "twice": (
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}',
        b"",
        None,
        "'a' is there twice",
    ),
    "no name": ({"": one()["a"]}, bytes(8), None, "no name"),
    "entry of another kind": ({"a": 3}, b"", None, "entry of 'a'"),
    "entry incomplete": ({"a": {"dtype": "F32"}}, b"", None, "entry of 'a'"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None, "metadata are not text"),
    "unknown dtype": (
        one(dtype="F8_E4M3"),
        bytes(8),
        None,
        "has dtype 'F8_E4M3', which IceNet does not read",
    ),
    "dtype of another kind": (one(dtype=[]), bytes(8), None, "which IceNet does not read"),
    "negative axis": (one(shape=[-2]), bytes(8), None, "whole numbers"),
    "axis true": (one(shape=[True, 2]), bytes(8), None, "whole numbers"),
    "fraction": (one(shape=[2.0]), bytes(8), None, "whole numbers"),
    "huge number": (
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 9999 + b'],"data_offsets":[0,8]}}',
        b"",
        None,
        "not valid JSON|whole",
    ),
    "shape beyond data": (one(shape=[3]), bytes(8), None, "cannot have 8 bytes"),
    "product overflows": (one(shape=[2**62, 4, 2]), bytes(8), None, "impossible"),
    "empty but huge": (one(shape=[0, 2**62], data_offsets=[0, 0]), b"", None, "impossible"),
    "too many axes": (one(shape=[1] * 70 + [2]), bytes(8), None, "impossible"),
    "offsets reversed": (one(data_offsets=[8, 0]), bytes(8), None, "in order"),
    "offset of three": (one(data_offsets=[0, 4, 8]), bytes(8), None, "in order"),
    "gap before": (one(data_offsets=[8, 16]), bytes(16), None, "overlap others or leave a gap"),
    "overlap": ({**one(), "b": one()["a"]}, bytes(8), None, "overlap others or leave a gap"),
    "cut short": (one(), bytes(7), None, "cut short"),
    "bytes left over": (one(), bytes(9), None, "belong to no array"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(tmp_path: Path, name: str) -> None:
    header, data, length, match = HOSTILE[name]
    refused(raw(tmp_path, header, data, length), match)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content, match in [
        (b"", "too few for a header"),
        (b"1234567", "too few for a header"),
        (b"PK\x03\x04 a zip, or what was one", "header claims"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ]:
        path.write_bytes(content)
        refused(path, match)
    refused(tmp_path / "none.safetensors", "no such file")
    refused(tmp_path / "none", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds neither model.safetensors nor its index")


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
            assert str(error).count("\n") == 0


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
def test_names_that_cannot_be(tmp_path: Path, name: Any) -> None:
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
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(WeightsError, match=r"no space to write it .*; free some or choose another disk") as caught:
        weights.write(tmp_path, {"a": np.ones(9), "b": np.ones(9)}, max_shard_bytes=limit)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_half_replaced_are_never_read_as_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path)
    real, calls = os.replace, []

    def fail_second(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(*paths)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(WeightsError, match="the files there are incomplete now: write them again"):
        weights.write(tmp_path, {"a": np.ones(9), "b": np.ones(9)}, max_shard_bytes=80)
    refused(tmp_path, "holds neither")


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_that_outgrows_its_room_leaves_the_old_one(tmp_path: Path) -> None:
    weights.write(tmp_path, {"a": np.zeros(9)})
    before = (tmp_path / "model.safetensors").read_bytes()
    script = (
        "import resource, signal, sys, numpy\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "from icenet.core import weights, errors\n"
        "try: weights.write(sys.argv[1], {'a': numpy.ones(9000), 'b': numpy.ones(3)})\n"
        "except errors.WeightsError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert "no space to write it" in done.stdout and done.stdout.count("\n") == 1, done
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be written"):
        weights.write(tmp_path / "file" / "x.safetensors", {"a": np.zeros(1)})


def test_a_failing_source_leaves_nothing(tmp_path: Path) -> None:
    class Shrinking(dict[str, Any]):
        reads = 0

        def __getitem__(self, name: str) -> Any:
            self.reads += 1
            return np.zeros(10 - self.reads)

    with pytest.raises(WeightsError, match="'a' changed while it was written"):
        weights.write(tmp_path, Shrinking(a=None))
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

    def told(found: dict[str, Any]) -> str:
        with pytest.raises(WeightsError) as caught:
            weights.check(shapes, found, "run/model.safetensors")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "9 missing (blocks.0.weight, blocks.1.weight, blocks.2.weight and 6 more)" in told({})
    assert "1 unexpected (head)" in told({**shapes, "head": ()})
    renamed = {("block.0.weight" if name == "blocks.0.weight" else name): s for name, s in shapes.items()}
    assert "1 missing (blocks.0.weight); 1 unexpected (block.0.weight, nearest is blocks.0.weight)" in told(renamed)
    assert "1 of another shape (blocks.3.weight is [3, 2], not [2, 3])" in told({**shapes, "blocks.3.weight": (3, 2)})
    assert told({}).startswith("run/model.safetensors: does not fit")
