"""CUDA kernel that casts several arrays at a time, MLX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array
from icenet.nn.training_kernels.common import THREADS, choice, chunks, floats

# A block casts `VALUES` neighbours of one array, a thread four at a time if the size allows it.
_CAST = """
    constexpr int THREADS = 512, N = 4, PACKS = 4, VALUES = THREADS * N * PACKS;
    struct alignas(sizeof(S) * N) From { S values[N]; };
    struct alignas(sizeof(T) * N) To { T values[N]; };
    const S* x;
    T* out;
    CHOICE
    if (size % N == 0 && (size_t)x % sizeof(From) == 0) {
      for (int i = 0; i < PACKS; i++) {
        const int index = (block * PACKS + i) * THREADS + threadIdx.x;
        if (index * N >= size) break;
        const From from = reinterpret_cast<const From*>(x)[index];
        To to;
        for (int j = 0; j < N; j++) to.values[j] = (T)(float)from.values[j];
        reinterpret_cast<To*>(out)[index] = to;
      }
    } else {
      for (int i = 0; i < N * PACKS; i++) {
        const int index = (block * N * PACKS + i) * THREADS + threadIdx.x;
        if (index < size) out[index] = (T)(float)x[index];
      }
    }
"""
_VALUES_OF_A_BLOCK = 16 * THREADS

ARRAYS_OF_A_CAST = 24
"""Number of arrays of a kernel. Fewer are filled up, so that there is one kernel to compile."""


def cast(arrays: Sequence[Array], dtype: mx.Dtype) -> list[Array]:
    """Returns arrays of one dtype, each `[...]`, in another dtype; their gradients are cast back in the same way.

    A model has as many casts of weights as weights, and as many of their gradients: 144 of the 36 linear layers of
    the guide's Small. Starting a kernel takes longer than each of them.
    """

    @mx.custom_function
    def forward(*arrays: Array) -> list[Array]:
        return _cast(arrays, dtype)

    @forward.vjp
    def gradient(arrays: tuple[Array, ...], cotangents: list[Array], _: list[Array]) -> list[Array]:
        return _cast(cotangents, arrays[0].dtype)

    results: Any = forward(*arrays)  # MLX types the result as an object
    return list(results)


def _cast(arrays: Sequence[Array], dtype: mx.Dtype) -> list[Array]:
    found: list[Array] = []
    source = arrays[0].dtype
    for start, chunk in enumerate(chunks([array.reshape(-1) for array in arrays], ARRAYS_OF_A_CAST, _filler(source))):
        own = arrays[start * ARRAYS_OF_A_CAST : (start + 1) * ARRAYS_OF_A_CAST]
        shapes = [*(array.shape for array in own), *[(1,)] * (len(chunk) - len(own))]
        blocks = sum(-(-math.prod(shape) // _VALUES_OF_A_BLOCK) for shape in shapes)
        results = _kernel()(
            inputs=chunk,
            template=[("S", source), ("T", dtype)],
            grid=(blocks * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=shapes,
            output_dtypes=[dtype] * len(chunk),
        )
        found += results[: len(own)]
    return found


@lru_cache
def _filler(dtype: mx.Dtype) -> Array:
    filler = floats(0.0).astype(dtype)
    mx.eval(filler)  # not lazy: another thread may use it
    return filler


@lru_cache
def _kernel() -> Any:
    names = [f"x{index}" for index in range(ARRAYS_OF_A_CAST)]
    results = [f"out{index}" for index in range(ARRAYS_OF_A_CAST)]
    source = _CAST.replace("CHOICE", choice(ARRAYS_OF_A_CAST, "x", ["x", "out"]))
    return mx.fast.cuda_kernel("icenet_cast", names, results, source)
