"""Weights as users have them: arrays of both frameworks and numpy of any dtype and stride, folders with two forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import icenet.blas  # before mlx: it decides which BLAS MLX finds

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from helpers import TINY_MODELS, both_backends, is_one_line

import icenet
from icenet.core import weights
from icenet.core.config import Config
from icenet.core.errors import UsageError, WeightsError
from icenet.core.models.modules import get_weights, set_weights

NAME = "output.weight"
GIVEN: dict[str, Callable[[np.ndarray], Any]] = {
    "PyTorch's bfloat16": lambda array: torch.tensor(array).bfloat16(),
    "MLX's bfloat16": lambda array: mx.array(array).astype(mx.bfloat16),
    "PyTorch's parameter": lambda array: torch.nn.Parameter(torch.tensor(array)),
    "PyTorch's float16": lambda array: torch.tensor(array).half(),
    "MLX's transposed": lambda array: mx.array(array.T.copy()).T,
}


@both_backends
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_arrays_of_both_frameworks(given: Callable[[np.ndarray], Any], backend: str) -> None:
    model = icenet.build(Config(device="cpu", model=TINY_MODELS["gru"]), backend)
    values = model.weights()
    array = values[NAME].astype(np.float32)
    array = np.round(array * 64) / 64  # exact in half precision
    model.set_weights({**values, NAME: given(array)})
    assert np.array_equal(model.weights()[NAME], array)


@pytest.mark.parametrize(
    "given",
    [
        lambda array: torch.tensor(array, device="meta"),
        lambda array: torch.tensor(array).to_sparse(),
        lambda array: torch.tensor(array).to(torch.float8_e4m3fn),
    ],
    ids=["meta", "sparse", "float8"],
)
def test_a_tensor_without_numpy_values_is_one_line(given: Callable[[np.ndarray], Any]) -> None:
    model = icenet.build(Config(device="cpu", model=TINY_MODELS["gru"]), "torch")
    values = model.weights()
    with pytest.raises(WeightsError) as error:
        model.set_weights({**values, NAME: given(values[NAME])})
    assert is_one_line(str(error.value), NAME)


@both_backends
def test_a_negative_stride_of_an_axis_of_length_one(backend: str) -> None:
    module = mlx.nn.Linear(6, 1) if backend == "mlx" else torch.nn.Linear(6, 1)
    values = {name: array[::-1] for name, array in get_weights(module).items()}
    assert values["weight"].flags.c_contiguous and values["weight"].strides[0] < 0
    set_weights(module, values)
    assert np.array_equal(get_weights(module)["weight"], values["weight"])


@both_backends
def test_a_state_that_is_no_array_of_the_framework(backend: str) -> None:
    model = icenet.build(Config(device="cpu", model=TINY_MODELS["lstm"]), backend)
    tokens = mx.array([[1, 2]]) if backend == "mlx" else torch.tensor([[1, 2]])
    for hidden in (3, (np.zeros((2, 1, 24), np.float32),) * 2):
        with pytest.raises(UsageError) as error:
            model(tokens, hidden=hidden)
        assert is_one_line(str(error.value), "hidden", type(hidden[0] if isinstance(hidden, tuple) else 3).__name__)


def test_a_folder_with_a_file_and_an_index_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"a": np.ones(4, np.float32), "b": np.zeros(4, np.float32)}
    weights.write(tmp_path, values, max_shard_bytes=16)
    assert weights.read(tmp_path)["a"].sum() == 4
    assert caplog.records == []
    weights.write(tmp_path / "other.safetensors", {"a": 2 * values["a"]})
    (tmp_path / "other.safetensors").rename(tmp_path / "model.safetensors")
    assert weights.read(tmp_path)["a"].sum() == 8
    (record,) = caplog.records
    assert is_one_line(record.getMessage(), "model.safetensors", "model.safetensors.index.json")
    assert weights.read(tmp_path / "model.safetensors.index.json")["a"].sum() == 4
