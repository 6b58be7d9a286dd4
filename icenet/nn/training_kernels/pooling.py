"""CUDA kernels of max-pooling and its gradient, MLX."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array
from icenet.nn.training_kernels.common import THREADS

# One thread computes one value. `chosen` is the place of the maximum in its window.
_MAX_POOL = """
    const int height = x_shape[1], width = x_shape[2], channels = x_shape[3];
    const int rows = (height + 2 * PADDING - SIZE) / STRIDE + 1, columns = (width + 2 * PADDING - SIZE) / STRIDE + 1;
    const long long index = blockIdx.x * 512LL + threadIdx.x;
    if (index >= (long long)x_shape[0] * rows * columns * channels) return;
    const int channel = index % channels;
    const int column = index / channels % columns * STRIDE - PADDING;
    const int row = index / channels / columns % rows * STRIDE - PADDING;
    const T* image = x + index / channels / columns / rows * height * width * channels + channel;
    float best = -INFINITY;
    int place = -1;
    for (int i = 0; i < SIZE; i++) {
      for (int j = 0; j < SIZE; j++) {
        const int y = row + i, z = column + j;
        if (y < 0 || y >= height || z < 0 || z >= width) continue;
        const float value = (float)image[((long long)y * width + z) * channels];
        if (place < 0 || value > best || value != value) {  // the first of equal ones; NaN stays
          best = value;
          place = i * SIZE + j;
        }
      }
    }
    out[index] = (T)best;
    chosen[index] = place;
"""
_MAX_POOL_GRADIENT = """
    const int height = x_shape[1], width = x_shape[2], channels = x_shape[3];
    const int rows = chosen_shape[1], columns = chosen_shape[2];
    const long long index = blockIdx.x * 512LL + threadIdx.x;
    if (index >= (long long)x_shape[0] * height * width * channels) return;
    const int channel = index % channels;
    const int column = index / channels % width + PADDING, row = index / channels / width % height + PADDING;
    const long long batch = index / channels / width / height;
    float sum = 0.f;
    for (int i = row % STRIDE; i < SIZE && i <= row; i += STRIDE) {
      for (int j = column % STRIDE; j < SIZE && j <= column; j += STRIDE) {
        const int y = (row - i) / STRIDE, z = (column - j) / STRIDE;
        if (y >= rows || z >= columns) continue;
        const long long place = ((batch * rows + y) * columns + z) * channels + channel;
        if (chosen[place] == i * SIZE + j) sum += (float)cotangent[place];
      }
    }
    out[index] = (T)sum;
"""


def max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """Computes `icenet.nn.conv.max_pool`, whose formula passes over the images nine times for windows of 3 x 3."""
    (batch, *lengths, channels) = x.shape
    shape = (batch, *((length + 2 * padding - size) // stride + 1 for length in lengths), channels)
    template = [("T", x.dtype), ("SIZE", size), ("STRIDE", stride), ("PADDING", padding)]

    def run(
        name: str, inputs: list[Array], values: int, shapes: list[tuple[int, ...]], dtypes: list[mx.Dtype]
    ) -> Any:
        return _max_pool()[name](
            inputs=inputs,
            template=template,
            grid=(-(-values // THREADS) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=shapes,
            output_dtypes=dtypes,
        )

    @mx.custom_function
    def pool(x: Array) -> list[Array]:
        return run("pool", [x], math.prod(shape), [shape, shape], [x.dtype, mx.uint8])  # type: ignore[no-any-return]

    @pool.vjp
    def gradient(x: Array, cotangents: list[Array], outputs: list[Array]) -> Array:
        inputs = [x, cotangents[0], outputs[1]]
        return run("gradient", inputs, x.size, [x.shape], [x.dtype])[0]  # type: ignore[no-any-return]

    outputs: Any = pool(x)
    return outputs[0]  # type: ignore[no-any-return]


@lru_cache
def _max_pool() -> dict[str, Any]:
    return {
        "pool": mx.fast.cuda_kernel("icenet_max_pool", ["x"], ["out", "chosen"], _MAX_POOL),
        "gradient": mx.fast.cuda_kernel(
            "icenet_max_pool_gradient", ["x", "cotangent", "chosen"], ["out"], _MAX_POOL_GRADIENT
        ),
    }
