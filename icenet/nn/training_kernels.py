"""CUDA kernels of training, MLX. Each replaces several passes of MLX's own operations over the same memory.

On Metal and on a CPU the formulas of the modules that call them are used.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array, on_cpu

THREADS = 512
"""Threads of a block."""

# One thread block computes the loss of one row and the gradient of its logits. The second reading of the row comes
# from the L2 cache. MLX's own operations pass over the logits in fp32 about eight times.
_CROSS_ENTROPY = """
    constexpr int N = 16 / sizeof(T), THREADS = 512, WARPS = THREADS / 32;
    constexpr bool ALIGNED = V % N == 0;
    struct alignas(16) Pack { T values[N]; };
    const size_t row = blockIdx.x;
    const T* x = logits + row * V;
    const int label = labels[row], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float cap = softcap[0];
    auto capped = [&](T logit) -> float {
      const float value = (float)logit;
      return CAPPED ? cap * tanhf(value / cap) : value;
    };
    auto load = [&](int start, float* values) {
      if constexpr (ALIGNED) {
        const Pack pack = *reinterpret_cast<const Pack*>(x + start);
        for (int i = 0; i < N; i++) values[i] = capped(pack.values[i]);
      } else {
        for (int i = 0; i < N; i++) values[i] = start + i < V ? capped(x[start + i]) : -INFINITY;
      }
    };

    float top = -INFINITY, total = 0.f;
    for (int start = threadIdx.x * N; start < V; start += THREADS * N) {
      float values[N], higher = top;
      load(start, values);
      for (int i = 0; i < N; i++) higher = fmaxf(higher, values[i]);
      if (higher > -INFINITY) {
        total *= expf(top - higher);
        for (int i = 0; i < N; i++) total += expf(values[i] - higher);
        top = higher;
      }
    }
    auto join = [](float& top, float& total, float other_top, float other_total) {
      const float higher = fmaxf(top, other_top);
      if (higher > -INFINITY) total = total * expf(top - higher) + other_total * expf(other_top - higher);
      top = higher;
    };
    for (int offset = 16; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(0xffffffff, total, offset);
      join(top, total, __shfl_xor_sync(0xffffffff, top, offset), other);
    }
    __shared__ float tops[WARPS], totals[WARPS];
    if (lane == 0) {
      tops[warp] = top;
      totals[warp] = total;
    }
    __syncthreads();
    top = -INFINITY;
    total = 0.f;
    for (int w = 0; w < WARPS; w++) join(top, total, tops[w], totals[w]);
    const float log_total = top + logf(total);
    if (threadIdx.x == 0) losses[row] = label >= 0 ? log_total - capped(x[label]) : 0.f;

    T* out = gradient + row * V;
    const float weight = label >= 0 ? 1.f / (float)count[0] : 0.f;
    for (int start = threadIdx.x * N; start < V; start += THREADS * N) {
      float values[N];
      Pack pack;
      load(start, values);
      for (int i = 0; i < N; i++) {
        float g = (expf(values[i] - log_total) - (start + i == label ? 1.f : 0.f)) * weight;
        if (CAPPED) g *= 1.f - values[i] * values[i] / (cap * cap);
        pack.values[i] = (T)(weight == 0.f ? 0.f : g);
      }
      if constexpr (ALIGNED) {
        *reinterpret_cast<Pack*>(out + start) = pack;
      } else {
        for (int i = 0; i < N; i++) if (start + i < V) out[start + i] = pack.values[i];
      }
    }
"""


# The kernels of batch norm see images as rows of channels `[M, C]`. A thread reads N neighbouring channels (a lane) of
# every few rows of a part of the images. `layout` is the number of lanes of a block, of blocks side by side (tiles),
# and of parts. Sums are fp32, of few terms each. Differences to the first row keep them small.
_LAYOUT = """
    constexpr int N = VECTOR, THREADS = 512;
    struct alignas(sizeof(T) * N) Pack { T values[N]; };
    const int lanes = layout[0], tiles = layout[1], parts = layout[2];
    const int channels = x_shape[1], lane = threadIdx.x % lanes, height = THREADS / lanes, y = threadIdx.x / lanes;
    const int part = blockIdx.x / tiles, column = (blockIdx.x % tiles * lanes + lane) * N;
    const long long rows = x_shape[0], begin = (long long)part * height + y, step = (long long)parts * height;
"""
_SUMS = (
    _LAYOUT
    + """
    float first[N] = {}, second[N] = {}, center[N], scale[N];
    if (column < channels) {
      for (int i = 0; i < N; i++) {
        center[i] = GRADIENT ? mean[column + i] : (float)x[column + i];
        scale[i] = GRADIENT ? deviation[column + i] : 1.f;
      }
      for (long long row = begin; row < rows; row += step) {
        const Pack pack = *reinterpret_cast<const Pack*>(x + row * channels + column);
        if constexpr (GRADIENT) {
          const Pack other = *reinterpret_cast<const Pack*>(cotangent + row * channels + column);
          for (int i = 0; i < N; i++) {
            const float g = (float)other.values[i];
            first[i] += g;
            second[i] += g * ((float)pack.values[i] - center[i]) * scale[i];
          }
        } else {
          for (int i = 0; i < N; i++) {
            const float difference = (float)pack.values[i] - center[i];
            first[i] += difference;
            second[i] += difference * difference;
          }
        }
      }
    }
    __shared__ float sums[THREADS * N * 2];
    const int width = lanes * N * 2;
    for (int i = 0; i < N; i++) {
      sums[y * width + lane * N + i] = first[i];
      sums[y * width + lanes * N + lane * N + i] = second[i];
    }
    __syncthreads();
    for (int place = threadIdx.x; place < width; place += THREADS) {
      float total = 0.f;
      for (int other = 0; other < height; other++) total += sums[other * width + place];
      const int which = place / (lanes * N), c = blockIdx.x % tiles * lanes * N + place % (lanes * N);
      if (c < channels) out[((long long)part * 2 + which) * channels + c] = total;
    }
"""
)

# The mean, 1 / deviation and the running statistics from the sums of the parts; constants are eps and momentum.
_STATISTICS = """
    constexpr int THREADS = 512, LANES = 32;
    const int count = parts_shape[0], channels = parts_shape[2];
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    const int c = blockIdx.x * LANES + lane;
    __shared__ float firsts[THREADS], seconds[THREADS];
    float first = 0.f, second = 0.f;
    if (c < channels) {
      for (int part = group; part < count; part += THREADS / LANES) {
        first += parts[(2LL * part) * channels + c];
        second += parts[(2LL * part + 1) * channels + c];
      }
    }
    firsts[threadIdx.x] = first;
    seconds[threadIdx.x] = second;
    __syncthreads();
    if (group == 0 && c < channels) {
      for (int other = 1; other < THREADS / LANES; other++) {
        first += firsts[other * LANES + lane];
        second += seconds[other * LANES + lane];
      }
      const float rows = (float)x_shape[0], shift = first / rows;
      const float average = (float)x[c] + shift, variance = fmaxf(second / rows - shift * shift, 0.f);
      const float momentum = constants[1], keep = constants[2];
      mean[c] = average;
      deviation[c] = 1.f / sqrtf(variance + constants[0]);
      new_mean[c] = keep * running_mean[c] + momentum * average;
      new_var[c] = keep * running_var[c] + momentum * (variance * (rows / (rows - 1.f)));
    }
"""

_NORMALIZE = (
    _LAYOUT
    + """
    if (column >= channels) return;
    float center[N], a[N], b[N], c[N];
    for (int i = 0; i < N; i++) {
      center[i] = mean[column + i];
      const float scale = deviation[column + i], factor = weight[column + i] * scale;
      if (GRADIENT) {  // (dy - (sum dy + normal * sum dy normal) / rows) * weight / deviation
        a[i] = factor;
        b[i] = -factor * sums[column + i] / (float)rows;
        c[i] = -factor * scale * sums[channels + column + i] / (float)rows;
      } else {
        a[i] = factor;
        b[i] = sums[column + i];  // the bias
        c[i] = 0.f;
      }
    }
    for (long long row = begin; row < rows; row += step) {
      Pack pack = *reinterpret_cast<const Pack*>(x + row * channels + column);
      if constexpr (GRADIENT) {
        const Pack other = *reinterpret_cast<const Pack*>(cotangent + row * channels + column);
        for (int i = 0; i < N; i++) {
          const float difference = (float)pack.values[i] - center[i];
          pack.values[i] = (T)(a[i] * (float)other.values[i] + b[i] + c[i] * difference);
        }
      } else {
        for (int i = 0; i < N; i++) pack.values[i] = (T)(((float)pack.values[i] - center[i]) * a[i] + b[i]);
      }
      *reinterpret_cast<Pack*>(out + row * channels + column) = pack;
    }
"""
)

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


def has_kernels() -> bool:
    """Returns whether the kernels of this module can be used: on CUDA."""
    return not on_cpu() and bool(mx.cuda.is_available())


def cross_entropy(logits: Array, labels: Array, count: Array, softcap: float | None) -> tuple[Array, Array]:
    """Computes `icenet.nn.loss._chunk`."""
    rows, width = logits.shape
    losses, gradient = _cross_entropy()(
        inputs=[logits, labels.astype(mx.int32), count.astype(mx.int32).reshape(1), _floats(softcap or 1.0)],
        template=[("T", logits.dtype), ("V", width), ("CAPPED", softcap is not None)],
        grid=(rows * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows,), (rows, width)],
        output_dtypes=[mx.float32, logits.dtype],
    )
    return losses, gradient


@lru_cache
def _cross_entropy() -> Any:
    names = ["logits", "labels", "count", "softcap"]
    return mx.fast.cuda_kernel("icenet_cross_entropy", names, ["losses", "gradient"], _CROSS_ENTROPY)


def batch_norm(
    x: Array, weight: Array, bias: Array, running_mean: Array, running_var: Array, eps: float, momentum: float
) -> tuple[Array, Array, Array]:
    """Computes batch norm of images `[B, H, W, C]` in training, in two passes over them and two in the gradient.

    MLX's own operations need 20 passes in fp32 and as many in the gradient.

    Returns:
        The images in their own dtype, and the new running mean and variance.
    """
    channels = x.shape[-1]
    vector = 16 // x.itemsize if channels % (16 // x.itemsize) == 0 else 1
    template = [("T", x.dtype), ("VECTOR", vector)]
    statistics = _floats(eps, momentum, 1 - momentum)
    lanes = min(32, 1 << (max(channels // vector, 1) - 1).bit_length())
    tiles = -(-channels // (vector * lanes))
    positions = x.size // channels
    parts = max(min(_BLOCKS // tiles, positions // (THREADS // lanes)), 1)
    layout = _integers(lanes, tiles, parts)

    def run(name: str, inputs: list[Array], gradient: bool, shape: tuple[int, ...], dtype: mx.Dtype) -> Array:
        [out] = _batch_norm()[name](
            inputs=[*inputs, layout],
            template=[*template, ("GRADIENT", gradient)],
            grid=(THREADS * tiles * parts, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[shape],
            output_dtypes=[dtype],
        )
        return out

    @mx.custom_function
    def normalize(x: Array, weight: Array, bias: Array) -> list[Array]:
        rows = x.reshape(-1, channels)
        sums = run("sums", [rows, rows, weight, weight], False, (parts, 2, channels), mx.float32)
        mean, deviation, new_mean, new_var = _batch_norm()["statistics"](
            inputs=[sums, rows, running_mean, running_var, statistics],
            template=template[:1],
            grid=(-(-channels // 32) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(channels,)] * 4,
            output_dtypes=[mx.float32] * 4,
        )
        y = run("normalize", [rows, rows, mean, deviation, weight, bias], False, rows.shape, x.dtype)
        return [y.reshape(x.shape), new_mean, new_var, mean, deviation]

    @normalize.vjp
    def gradient(inputs: tuple[Array, ...], cotangents: list[Array], outputs: list[Array]) -> list[Array]:
        x, weight, _ = inputs
        mean, deviation = outputs[3:]
        rows, cotangent = x.reshape(-1, channels), cotangents[0].reshape(-1, channels)
        sums = run("sums", [rows, cotangent, mean, deviation], True, (parts, 2, channels), mx.float32).sum(axis=0)
        dx = run("normalize", [rows, cotangent, mean, deviation, weight, sums], True, rows.shape, x.dtype)
        return [dx.reshape(x.shape), sums[1], sums[0]]

    y, new_mean, new_var, _, _ = normalize(x, weight, bias)
    return y, mx.stop_gradient(new_mean), mx.stop_gradient(new_var)


_BLOCKS = 528
"""Number of blocks that share the positions of the images: four for each multiprocessor of an H100."""


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

    return pool(x)[0]  # type: ignore[no-any-return]


@lru_cache
def _batch_norm() -> dict[str, Any]:
    def kernel(name: str, inputs: list[str], outputs: list[str], source: str) -> Any:
        return mx.fast.cuda_kernel(f"icenet_batch_norm_{name}", inputs, outputs, source)

    images = ["x", "cotangent", "mean", "deviation"]
    statistics = ["parts", "x", "running_mean", "running_var", "constants"]
    return {
        "sums": kernel("sums", [*images, "layout"], ["out"], _SUMS),
        "statistics": kernel("statistics", statistics, ["mean", "deviation", "new_mean", "new_var"], _STATISTICS),
        "normalize": kernel("normalize", [*images, "weight", "sums", "layout"], ["out"], _NORMALIZE),
    }


@lru_cache
def _max_pool() -> dict[str, Any]:
    return {
        "pool": mx.fast.cuda_kernel("icenet_max_pool", ["x"], ["out", "chosen"], _MAX_POOL),
        "gradient": mx.fast.cuda_kernel(
            "icenet_max_pool_gradient", ["x", "cotangent", "chosen"], ["out"], _MAX_POOL_GRADIENT
        ),
    }


@lru_cache
def _floats(*values: float) -> Array:
    return _evaluated(mx.array(values, mx.float32))


@lru_cache
def _integers(*values: int) -> Array:
    return _evaluated(mx.array(values, mx.int32))


def _evaluated(array: Array) -> Array:
    mx.eval(array)  # not lazy: another thread may use it
    return array
