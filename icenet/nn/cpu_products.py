"""Products of few rows with the weight of a layer on a CPU, in generation, MLX.

For x W^T with one row, MKL reads weights at half of the memory's rate on AMD processors, in one thread. W x^T with
two to four columns is faster, and uses all threads. One row is two columns: the halves of x, times the weight with
its rows in halves, of which two of four results are the parts of an output. Microseconds on an AMD EPYC with AVX-512:

               x W^T, one thread          W x^T, one thread       x W^T, two threads   W x^T, two threads
     rows    768 x 2304   768 x 3072    768 x 2304   768 x 3072        768 x 3072           768 x 3072
        1           426          580           353          440               573                  254
        2           771         1073           337          477               547                  246
        4           588          781           492          661

A large weight of half precision is cast to fp32 a part at a time, because a copy of all of it would take new pages
for each product. MLX's own product of half precision has no BLAS. Microseconds for 640 x 32000, one thread:

     rows    MLX's, bf16   all cast   in parts    MLX's, fp16   all cast   in parts
        1         16,202     43,651      7,180         31,845     54,223     22,880
        4         31,647     51,257      9,017         50,054     60,323     26,862
"""

from __future__ import annotations

from functools import lru_cache

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.core.host import blas, processor
from icenet.nn.arrays import Array, is_half, on_cpu

_MIN_WEIGHT, _MIN_WEIGHT_OF_ONE_THREAD = 2**19, 2**20
"""Number of weights from which the product is faster, and that of one row in one thread. Smaller ones stay in the
processor's cache."""
_MOST_ROWS = 4
_MOST_INPUTS, _MOST_INPUTS_OF_ONE_ROW = 1536, 4096
"""Inputs up to which it is faster, and those of one row with several threads: MKL computes longer columns otherwise.
For 3072 inputs and 768 outputs one thread takes 650 us, and 439 for x W^T; two threads take 309 and 415."""
_MIN_HALF, _PART, _MOST_HALF_ROWS = 2**21, 2**17, 16
"""Number of weights of half precision that are cast in parts, of a part, and of rows up to which this is faster."""


@lru_cache
def _is_faster() -> bool:
    """Returns whether the BLAS is MKL, on a processor where this was measured."""
    return blas.status().name == "torch" and processor.is_amd_with_avx512()


def can_compute(x: Array, weight: Array) -> bool:
    """Returns whether `product` computes x W^T: in fp32 on a CPU, for few rows and a large weight."""
    inputs = x.shape[-1]
    if weight.size < _MIN_WEIGHT or inputs != weight.shape[1]:  # sizes that do not fit are an error of the product
        return False
    rows = x.size // inputs
    most = _MOST_INPUTS_OF_ONE_ROW if rows == 1 else _MOST_INPUTS
    is_small = 1 <= rows <= _MOST_ROWS and inputs <= most and (rows > 1 or inputs % 2 == 0)
    is_fp32 = x.dtype == weight.dtype == mx.float32
    if not (is_small and is_fp32 and on_cpu() and _is_faster()):
        return False
    if rows > 1 or blas.num_threads() != 1:
        return True
    return weight.size >= _MIN_WEIGHT_OF_ONE_THREAD and inputs <= _MOST_INPUTS


def product(x: Array, weight: Array, bias: Array | None) -> Array:
    """Computes x W^T + b: x `[..., in]`, weight `[out, in]`, bias `[out]` to `[..., out]`, all fp32."""
    outputs, inputs = weight.shape
    if x.size > inputs:
        y = (weight @ x.reshape(-1, inputs).T).T
    else:
        parts = (weight.reshape(2 * outputs, -1) @ x.reshape(2, -1).T).reshape(outputs, 4)
        y = parts[:, 0] + parts[:, 3]
    y = y.reshape(*x.shape[:-1], outputs)
    return y if bias is None else y + bias


def can_compute_half(x: Array, weight: Array) -> bool:
    """Returns whether `half_product` computes x W^T: on a CPU, for few rows and a large weight of half precision."""
    if weight.size < _MIN_HALF or x.shape[-1] != weight.shape[1]:
        return False
    return x.size <= _MOST_HALF_ROWS * x.shape[-1] and x.dtype == weight.dtype and is_half(x)


def half_product(x: Array, weight: Array, bias: Array | None) -> Array:
    """Computes x W^T + b in fp32: x `[..., in]`, weight `[out, in]`, bias `[out]`, all half, to fp32 `[..., out]`."""
    outputs, inputs = weight.shape
    rows, y = max(1, _PART // inputs), x.astype(mx.float32)
    parts = [y @ weight[first : first + rows].astype(mx.float32).T for first in range(0, outputs, rows)]
    joined = mx.concatenate(parts, axis=-1)
    return joined if bias is None else joined + bias.astype(x.dtype).astype(mx.float32)
