"""Arrays of MLX on a CPU whose memory several threads write: weights of files, views and casts."""

from __future__ import annotations

import os
from pathlib import Path

import icenet.blas

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from helpers import LLAMA, build_model, is_one_line, python

import icenet
from icenet.core.config import ModelConfig
from icenet.core.errors import WeightsError
from icenet.core.weights import files
from icenet.nn import arrays, tree

without_gpu = pytest.mark.skipif(
    mx.metal.is_available() or mx.cuda.is_available(), reason="the allocator of MLX is another one with a GPU"
)
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
        [found] = tree._from_large_numpy([view], DTYPES[held])
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
        tree._from_large_numpy([array], mx.float32)
    assert is_one_line(raised.value, "model.safetensors", "shorter")


@without_gpu
def test_weights_that_generation_joins_are_read_into_one_array(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 61, "max_seq_length": 40}
    config = ModelConfig(**{"type": "transformer", "dropout": 0.0, **sizes, **LLAMA})
    icenet.save(build_model("mlx", config, seed=3), tmp_path)
    model = icenet.load(tmp_path, "mlx", "cpu")
    block = model.blocks[0]
    for layer in (block.attention, block.feed_forward):
        assert arrays.array_of_parts([getattr(layer, name).weight for name in layer.joined_layers]) is not None
    copied = model.for_generation().blocks[0]
    for layer, original in ((copied.attention, block.attention), (copied.feed_forward, block.feed_forward)):
        own = [getattr(original, name) for name in original.joined_layers]
        assert np.array_equal(layer._joined.weight, np.concatenate([np.array(part.weight) for part in own]))
        assert arrays.address(layer._joined.weight) == arrays.address(own[0].weight)
    # a weight that is replaced is no part of it any more
    block.attention.k_proj.weight = block.attention.k_proj.weight * 2
    parts = [getattr(block.attention, f"{name}_proj").weight for name in "qkv"]
    assert arrays.array_of_parts(parts) is None
    joined = model.for_generation().blocks[0].attention._joined.weight
    assert np.array_equal(joined, np.concatenate([np.array(part) for part in parts]))


@without_gpu
def test_parts_that_do_not_follow_one_another_are_no_parts_of_one() -> None:
    whole = mx.arange(24).reshape(6, 4)
    first, second, third = mx.split(whole, 3)
    mx.eval(first, second, third)
    assert np.array_equal(arrays.array_of_parts([first, second]), np.array(whole)[:4])
    for parts in ([second, first], [first, third], [first, first], [first, second[:, :2]], [first, mx.array(second)]):
        assert arrays.array_of_parts(parts) is None
