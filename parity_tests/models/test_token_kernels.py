"""The kernels of MLX for the first and the last step of a token: on CUDA, and on the CPU as C++."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (first: it decides which BLAS MLX finds)

# isort: split
import emulated_gpu
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from icenet.nn import token_kernels
from icenet.nn.arrays import to_numpy
from icenet.nn.linear_kernels import Packed


@pytest.fixture(
    params=[
        pytest.param("gpu", marks=pytest.mark.gpu),
        pytest.param("cpu", marks=pytest.mark.skipif(emulated_gpu.COMPILER is None, reason="needs g++")),
    ],
    autouse=True,
)
def device(request: Any, tmp_path: Path, monkeypatch: Any) -> None:
    if request.param == "gpu":
        if not mx.cuda.is_available():
            pytest.skip("needs CUDA")
        return

    def emulated(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str) -> Any:
        return emulated_gpu.kernel(
            tmp_path, name=name, input_names=list(inputs), output_names=list(outputs), source=source
        )

    monkeypatch.setattr(token_kernels, "_kernel", emulated)
    monkeypatch.setattr(token_kernels, "limits", lambda: "on a GPU")


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"), [(4, 64, mx.bfloat16), (8, 32, mx.float16), (3, 32, mx.float32)]
)
def test_rows_of_a_packed_table_are_those_of_mlx(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    table = mx.array(np.random.default_rng(0).standard_normal((50, 192)), dtype)
    layer = nn.QuantizedEmbedding.from_embedding(_embedding(table), group_size, bits)
    parts = layer.weight, layer.scales, layer.biases
    joined = mx.concatenate([part.reshape(-1).view(mx.uint32) for part in parts])
    ids = mx.array([[0, 49, 7]], mx.uint32)
    packed = Packed(layer.scales, layer.biases, bits, group_size, joined)
    rows = token_kernels.packed_rows(ids, 50, 192, packed)
    assert rows is not None
    assert (rows.shape, rows.dtype) == ((1, 3, 192), dtype)
    # half precision: MLX may round the product before it adds the bias
    spacing = {mx.float32: 2.0**-23, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}[dtype]
    np.testing.assert_allclose(_float(rows), _float(layer(ids)), atol=8 * spacing, rtol=0)


def _embedding(table: mx.array) -> nn.Embedding:
    embedding = nn.Embedding(*table.shape)
    embedding.weight = table
    return embedding


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_best_token_is_that_of_numpy(dtype: mx.Dtype) -> None:
    values = np.random.default_rng(1).standard_normal((6, 1500)).astype(np.float32)
    values[1, [1400, 33, 1057]] = 7  # the first of equal ones
    values[2] = -np.inf
    values[3, 1499] = np.inf
    values[4, 1100] = np.nan
    scores = mx.array(values, dtype)
    token, best = token_kernels.best_token(scores)
    assert token.dtype == mx.uint32
    own = [row for row in range(6) if row != 4]
    np.testing.assert_array_equal(np.array(token)[own], _float(scores).argmax(-1)[own])
    np.testing.assert_array_equal(_float(best), _float(scores).max(-1))
    assert int(token[4].item()) < 1500


def _float(array: mx.array) -> np.ndarray:
    return to_numpy(array.astype(mx.float32))
