"""Arrays of MLX on a CPU whose memory several threads write: weights of files, views and casts."""

from __future__ import annotations

import os
from pathlib import Path

import icenet.blas  # noqa: F401

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from helpers import is_one_line, python

from icenet.core.errors import WeightsError
from icenet.core.weights import files
from icenet.nn import arrays, tree

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(tree, "_LARGE", 0)  # every array
    with mx.stream(mx.cpu):
        yield


@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_an_array_has_the_values_of_numpy(tmp_path: Path, stored: str, held: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, stored, None) or stored)
    values = np.random.default_rng(1).normal(size=(6, 4, 3)).astype(dtype)
    files.write(tmp_path, {"a": values})
    source = files.read(tmp_path)["a"]
    for view in (source, source[1:3], source.transpose(2, 0, 1), source[:, :1], source[0, 0, 0], source[:0], values):
        found = tree._from_large_numpy(view, DTYPES[held])
        assert found.shape == view.shape and found.dtype == DTYPES[held]
        assert np.array_equal(arrays.to_numpy(found.astype(mx.float32)), np.asarray(view, held).astype(np.float32))


def test_an_error_while_an_array_is_written_is_raised() -> None:
    """MLX passes over the errors of the threads that read files."""

    def fails(memory: np.ndarray) -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        arrays.filled((2, 3), np.dtype(np.float32), fails)
    found = arrays.filled((2, 3), np.dtype(np.float32), lambda memory: memory.fill(7))
    assert found.tolist() == [[7.0] * 3] * 2


def test_a_process_can_end_after_an_array_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's thread frees the file object later than it computes the array."""
    monkeypatch.setenv("ICENET_BLAS", "none")
    program = """
import numpy as np
from icenet.nn.arrays import filled
found = filled((1 << 20,), np.dtype(np.float32), lambda memory: memory.fill(7))
print(found.shape)
"""
    assert python(program) == "(1048576,)"


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="the file is mapped")
def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    files.write(tmp_path, {"a": np.ones((64, 64), np.float32)})
    array = files.read(tmp_path)["a"]
    os.truncate(tmp_path / "model.safetensors", 4096)
    with pytest.raises(WeightsError) as raised:
        tree._from_large_numpy(array, mx.float32)
    assert is_one_line(raised.value, "model.safetensors", "shorter")
