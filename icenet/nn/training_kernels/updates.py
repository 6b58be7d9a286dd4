"""CUDA kernels of an optimizer's step, MLX: squares of gradients and Adam, several arrays at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array
from icenet.nn.training_kernels.common import BLOCKS, THREADS, floats, integers

# The sum of the threads' totals.
_SUM_OF_A_BLOCK = """
    __shared__ float totals[THREADS];
    totals[threadIdx.x] = total;
    for (int half = THREADS / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) totals[threadIdx.x] += totals[threadIdx.x + half];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = totals[0];
"""

_SUM_OF_SQUARES = (
    """
    constexpr int THREADS = 512;
    const long long size = x_shape[0], step = (long long)gridDim.x * THREADS;
    float total = 0.f;
    for (long long index = blockIdx.x * (long long)THREADS + threadIdx.x; index < size; index += step) {
      const float value = (float)x[index];
      total += value * value;
    }
"""
    + _SUM_OF_A_BLOCK
)

# The squares of several small arrays: `PARTS` blocks for each.
_SUMS_OF_SQUARES = (
    """
    constexpr int THREADS = 512;
    const float* x = nullptr;
    int size = 0;
    switch (blockIdx.x / PARTS) { CASES }
    float total = 0.f;
    for (int index = blockIdx.x % PARTS * THREADS + threadIdx.x; index < size; index += PARTS * THREADS) {
      total += x[index] * x[index];
    }
"""
    + _SUM_OF_A_BLOCK
)

# Several arrays. A block computes `VALUES` neighbours of one of them; see `_choice`.
_ADAM = """
    constexpr int THREADS = 512, N = 4, PACKS = 4, VALUES = THREADS * N * PACKS;
    struct alignas(16) Pack { float values[N]; };
    const float *p, *g, *m, *v;
    float *new_p, *new_m, *new_v;
    CHOICE
    // read once: for the compiler, each store could change them
    const float step_size = rates[0], root_correction = rates[1], shrink = decays[0], added = decays[1];
    const float eps = constants[0], beta1 = constants[1], rest1 = constants[2];
    const float beta2 = constants[3], rest2 = constants[4];
    const float scale = factor[0];
    auto update = [&](float& a, float& b, float& c, float d) {
      const float slope = d * scale + added * a;
      b = beta1 * b + rest1 * slope;
      c = beta2 * c + rest2 * slope * slope;
      const float denominator = sqrtf(c) / root_correction + eps;
      a = a * shrink - step_size * (b / denominator);
    };
    if (size % N == 0 && ((size_t)p | (size_t)g | (size_t)m | (size_t)v) % sizeof(Pack) == 0) {
      for (int i = 0; i < PACKS; i++) {
        const int index = (block * PACKS + i) * THREADS + threadIdx.x;
        if (index * N >= size) break;
        Pack a = reinterpret_cast<const Pack*>(p)[index], b = reinterpret_cast<const Pack*>(m)[index];
        Pack c = reinterpret_cast<const Pack*>(v)[index];
        const Pack d = reinterpret_cast<const Pack*>(g)[index];
        for (int j = 0; j < N; j++) update(a.values[j], b.values[j], c.values[j], d.values[j]);
        reinterpret_cast<Pack*>(new_p)[index] = a;
        reinterpret_cast<Pack*>(new_m)[index] = b;
        reinterpret_cast<Pack*>(new_v)[index] = c;
      }
    } else {
      for (int i = 0; i < N * PACKS; i++) {
        const int index = (block * N * PACKS + i) * THREADS + threadIdx.x;
        if (index >= size) break;
        float a = p[index], b = m[index], c = v[index];
        update(a, b, c, g[index]);
        new_p[index] = a;
        new_m[index] = b;
        new_v[index] = c;
      }
    }
"""
_VALUES_OF_A_BLOCK = 16 * THREADS


def sums_of_squares(arrays: Sequence[Array]) -> Array:
    """Returns the sum of the squares of each array, fp32 `[N]`.

    Starting a kernel takes longer than reading a small array: ResNet-50 has 161 arrays.
    """
    flat = [array.astype(mx.float32).reshape(-1) for array in arrays]
    small = [index for index, array in enumerate(flat) if array.size < _LARGE]
    sums: list[Array] = [_sum_of_squares_of_one(array) for array in flat if array.size >= _LARGE]
    for chunk in _chunks([flat[index] for index in small], ARRAYS_OF_A_SUM, floats(0.0)):
        [parts] = _sums_of_squares()(
            inputs=chunk,
            template=[("PARTS", _PARTS)],
            grid=(ARRAYS_OF_A_SUM * _PARTS * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(ARRAYS_OF_A_SUM, _PARTS)],
            output_dtypes=[mx.float32],
        )
        sums.append(parts.sum(axis=1))
    order = [index for index, array in enumerate(flat) if array.size >= _LARGE] + small
    places = tuple(order.index(index) for index in range(len(flat)))
    return mx.concatenate(sums)[integers(*places)]


ARRAYS_OF_A_SUM = 16
"""Number of arrays of a kernel. Fewer are filled up, so that there is one kernel to compile."""
_PARTS = 64
_LARGE = 1 << 22
"""Arrays with so many values have a kernel of their own, with more blocks."""


def _sum_of_squares_of_one(x: Array) -> Array:
    """Returns the sum of the squares of an fp32 array `[N]`, fp32 `[1]`."""
    blocks = max(min(BLOCKS, x.size // (8 * THREADS)), 1)
    [parts] = _sum_of_squares()(
        inputs=[x],
        template=[("T", x.dtype)],
        grid=(blocks * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(blocks,)],
        output_dtypes=[mx.float32],
    )
    return parts.sum(axis=0, keepdims=True)


def _chunks(arrays: Sequence[Array], size: int, filler: Array) -> Iterator[list[Array]]:
    """Yields parts of arrays of one size; the last one is filled up."""
    for start in range(0, len(arrays), size):
        part = list(arrays[start : start + size])
        yield part + [filler] * (size - len(part))


def adam(
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    m: Sequence[Array],
    v: Sequence[Array],
    factor: Array,
    rates: Array,
    decays: Array,
    eps: float,
    betas: Sequence[float],
) -> list[tuple[Array, Array, Array]]:
    """Computes a step of Adam in one pass over the arrays, which are fp32; MLX's own operations need 12.

    Args:
        parameters, gradients, m, v: The arrays of each parameter, of one shape.
        factor: Factor of the gradients, `[1]`.
        rates: The step size and the root of the correction of v, `[2]`. The device reads arrays of 8 bytes in memory
            of the host; larger ones of the host are moved, and the first kernel that reads them waits.
        decays: The factor of the parameter, and the weight decay that is added to the gradient, `[2]`.
        eps, betas: Those of Adam.

    Returns:
        The new parameter, m and v of each.
    """
    found: list[tuple[Array, Array, Array]] = []
    nothing = floats(0.0)
    (beta1, beta2), numbers = betas, [factor, rates, decays]
    numbers.append(floats(eps, beta1, 1 - beta1, beta2, 1 - beta2))
    while len(found) < len(parameters):
        own = slice(len(found), len(found) + ARRAYS_OF_ADAM)
        shapes = [parameter.shape for parameter in parameters[own]]
        fill = ARRAYS_OF_ADAM - len(shapes)
        inputs = [
            array
            for arrays in (parameters, gradients, m, v)
            for array in [*(array.reshape(-1) for array in arrays[own]), *[nothing] * fill]
        ]
        outputs = [*shapes, *[(1,)] * fill]
        blocks = sum(-(-math.prod(shape) // _VALUES_OF_A_BLOCK) for shape in outputs)
        new = _adam()(
            inputs=[*inputs, *numbers],
            template=[],
            grid=(blocks * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=outputs * 3,
            output_dtypes=[mx.float32] * (3 * ARRAYS_OF_ADAM),
        )
        found += [(new[i], new[i + ARRAYS_OF_ADAM], new[i + 2 * ARRAYS_OF_ADAM]) for i in range(len(shapes))]
    return found


ARRAYS_OF_ADAM = 16
"""Number of parameters of a kernel; see `ARRAYS_OF_A_SUM`."""


@lru_cache
def _sum_of_squares() -> Any:
    return mx.fast.cuda_kernel("icenet_sum_of_squares", ["x"], ["out"], _SUM_OF_SQUARES)


@lru_cache
def _sums_of_squares() -> Any:
    names = [f"x{index}" for index in range(ARRAYS_OF_A_SUM)]
    cases = [f"case {index}: x = {name}; size = {name}_shape[0]; break;" for index, name in enumerate(names)]
    source = _SUMS_OF_SQUARES.replace("CASES", " ".join(cases))
    return mx.fast.cuda_kernel("icenet_sums_of_squares", names, ["out"], source)


@lru_cache
def _adam() -> Any:
    inputs, outputs = ("p", "g", "m", "v"), ("new_p", "new_m", "new_v")
    source = _ADAM.replace("CHOICE", _choice(ARRAYS_OF_ADAM, "p", [*inputs, *outputs]))
    names = [[f"{part}{index}" for part in parts for index in range(ARRAYS_OF_ADAM)] for parts in (inputs, outputs)]
    return mx.fast.cuda_kernel("icenet_adam", [*names[0], "factor", "rates", "decays", "constants"], names[1], source)


def _choice(count: int, first: str, pointers: Sequence[str]) -> str:
    """Returns source that selects the arrays of a block: an array has a block for each `VALUES` of its values.

    Branches select them. A table that is indexed at run time would be written to memory by each thread.

    Args:
        count: Number of arrays.
        first: The inputs whose sizes count, without their number.
        pointers: The variables to set, each to the input or output of its name and number. `size` becomes the number
            of values, and `block` that of the block within the array.
    """
    choices = []
    for index in range(count):
        chosen = " ".join(f"{pointer} = {pointer}{index};" for pointer in pointers)
        choices.append(f"if (is_in({first}{index}_shape[0])) {{ {chosen} }}")
    return """
    int block = blockIdx.x, size = 0;
    auto is_in = [&](int values) {
      const int blocks = (values + VALUES - 1) / VALUES;
      size = values;
      if (block < blocks) return true;
      block -= blocks;
      return false;
    };
    """ + " else ".join([*choices, "return;"])
