"""CUDA kernels of training, MLX. Each replaces several passes of MLX's own operations over the same memory.

On Metal and on a CPU the formulas of the modules that call them are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    constexpr int N = 16 / sizeof(T), THREADS = 1024, WARPS = THREADS / 32;
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


# These kernels see an array as rows of channels `[M, C]`. A thread reads N neighbouring channels (a lane) of every
# few rows of a part of the array. `layout` is the number of lanes of a block, of blocks next to each other (tiles),
# and of parts.
_LAYOUT = """
    constexpr int N = VECTOR, THREADS = 512;
    struct alignas(sizeof(T) * N) Pack { T values[N]; };
    const int lanes = layout[0], tiles = layout[1], parts = layout[2];
    const int channels = x_shape[1], lane = threadIdx.x % lanes, height = THREADS / lanes, y = threadIdx.x / lanes;
    const int part = blockIdx.x / tiles, column = (blockIdx.x % tiles * lanes + lane) * N;
    const long long rows = x_shape[0], begin = (long long)part * height + y, step = (long long)parts * height;
"""

# The sums of two values over the rows, for each channel and part. KIND decides what they are:
# 0: x, without the second; 1: x - p and its square, where p is the first row, which keeps the sums small;
# 2: dy and dy * (x - mean) * scale, with a mean and a scale for each channel; 3: the same with those of the row.
# Sums are fp32, of few terms each. (MLX's own sums of half precision are in half precision.)
_SUMS = (
    _LAYOUT
    + """
    float first[N] = {}, second[N] = {}, center[N] = {}, factor[N] = {};
    if (column < channels) {
      for (int i = 0; i < N; i++) {
        if (KIND == 1) center[i] = (float)x[column + i];
        if (KIND == 2) {
          center[i] = mean[column + i];
          factor[i] = scale[column + i];
        }
      }
      for (long long row = begin; row < rows; row += step) {
        const Pack pack = *reinterpret_cast<const Pack*>(x + row * channels + column);
        if constexpr (KIND < 2) {
          for (int i = 0; i < N; i++) {
            const float difference = (float)pack.values[i] - center[i];
            first[i] += difference;
            if (KIND == 1) second[i] += difference * difference;
          }
        } else {
          const Pack other = *reinterpret_cast<const Pack*>(dy + row * channels + column);
          const float row_mean = KIND == 3 ? mean[row] : 0.f, row_scale = KIND == 3 ? scale[row] : 0.f;
          for (int i = 0; i < N; i++) {
            const float g = (float)other.values[i];
            const float difference = (float)pack.values[i] - (KIND == 3 ? row_mean : center[i]);
            first[i] += g;
            second[i] += g * difference * (KIND == 3 ? row_scale : factor[i]);
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
      scale[c] = 1.f / sqrtf(variance + constants[0]);
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
      const float inverse = scale[column + i], factor = weight[column + i] * inverse;
      if (GRADIENT) {  // (dy - (sum dy + normal * sum dy normal) / rows) * weight / deviation
        a[i] = factor;
        b[i] = -factor * sums[column + i] / (float)rows;
        c[i] = -factor * inverse * sums[channels + column + i] / (float)rows;
      } else {
        a[i] = factor;
        b[i] = sums[column + i];  // the bias
        c[i] = 0.f;
      }
    }
    for (long long row = begin; row < rows; row += step) {
      Pack pack = *reinterpret_cast<const Pack*>(x + row * channels + column);
      if constexpr (GRADIENT) {
        const Pack other = *reinterpret_cast<const Pack*>(dy + row * channels + column);
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


# A warp computes a row. It reads the row three times, the second and third time from the cache.
_LAYER_NORM_ROW = """
    constexpr int N = VECTOR, ROWS = 8;
    struct alignas(sizeof(T) * N) Pack { T values[N]; };
    const int channels = x_shape[1], lane = threadIdx.x % 32;
    const long long row = blockIdx.x * (long long)ROWS + threadIdx.x / 32;
    if (row >= x_shape[0]) return;
    auto total = [](float value) -> float {
      for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
      return value;
    };
    auto load = [&](const T* array, int column) {
      return *reinterpret_cast<const Pack*>(array + row * channels + column);
    };
"""
_LAYER_NORM = (
    _LAYER_NORM_ROW
    + """
    float sum = 0.f, squares = 0.f;
    if (CENTERED) {
      for (int column = lane * N; column < channels; column += 32 * N) {
        const Pack pack = load(x, column);
        for (int i = 0; i < N; i++) sum += (float)pack.values[i];
      }
    }
    const float average = total(sum) / channels;
    for (int column = lane * N; column < channels; column += 32 * N) {
      const Pack pack = load(x, column);
      for (int i = 0; i < N; i++) {
        const float difference = (float)pack.values[i] - average;
        squares += difference * difference;
      }
    }
    const float inverse = 1.f / sqrtf(total(squares) / channels + eps[0]);
    if (lane == 0) {
      mean[row] = average;
      scale[row] = inverse;
    }
    for (int column = lane * N; column < channels; column += 32 * N) {
      Pack pack = load(x, column);
      for (int i = 0; i < N; i++) {
        const float normal = ((float)pack.values[i] - average) * inverse * weight[column + i];
        pack.values[i] = (T)(CENTERED ? normal + bias[column + i] : normal);
      }
      *reinterpret_cast<Pack*>(out + row * channels + column) = pack;
    }
"""
)
_LAYER_NORM_GRADIENT = (
    _LAYER_NORM_ROW
    + """
    const float average = mean[row], inverse = scale[row];
    float sum = 0.f, products = 0.f;
    for (int column = lane * N; column < channels; column += 32 * N) {
      const Pack pack = load(x, column), other = load(dy, column);
      for (int i = 0; i < N; i++) {
        const float g = (float)other.values[i] * weight[column + i];
        sum += g;
        products += g * ((float)pack.values[i] - average) * inverse;
      }
    }
    sum = CENTERED ? total(sum) / channels : 0.f;
    products = total(products) / channels;
    for (int column = lane * N; column < channels; column += 32 * N) {
      Pack pack = load(x, column);
      const Pack other = load(dy, column);
      for (int i = 0; i < N; i++) {
        const float normal = ((float)pack.values[i] - average) * inverse;
        pack.values[i] = (T)(inverse * ((float)other.values[i] * weight[column + i] - sum - normal * products));
      }
      *reinterpret_cast<Pack*>(out + row * channels + column) = pack;
    }
"""
)

_ACTIVATION = """
    constexpr int N = VECTOR;
    struct alignas(sizeof(T) * N) Pack { T values[N]; };
    const long long index = blockIdx.x * 512LL + threadIdx.x;
    if (index * N >= x_shape[0]) return;
    Pack pack = reinterpret_cast<const Pack*>(x)[index];
    const Pack other = reinterpret_cast<const Pack*>(dy)[index];
    for (int i = 0; i < N; i++) {
      const float value = (float)pack.values[i];
      float y, slope;
      if (KIND == 0) {  // x * Phi(x)
        const float probability = 0.5f * (1.f + erff(value * 0.70710678118654752f));
        y = value * probability;
        slope = probability + value * 0.39894228040143268f * expf(-0.5f * value * value);
      } else if (KIND == 1) {
        const float t = tanhf(0.79788456080286536f * (value + 0.044715f * value * value * value));
        y = 0.5f * value * (1.f + t);
        slope = 0.5f * (1.f + t)
            + 0.5f * value * (1.f - t * t) * 0.79788456080286536f * (1.f + 0.134145f * value * value);
      } else if (KIND == 2) {
        const float gate = 1.f / (1.f + expf(-value));
        y = value * gate;
        slope = gate * (1.f + value * (1.f - gate));
      } else {
        y = value < 0.f ? 0.f : value;
        slope = value <= 0.f ? 0.f : 1.f;
      }
      pack.values[i] = (T)(GRADIENT ? slope * (float)other.values[i] : y);
    }
    reinterpret_cast<Pack*>(out)[index] = pack;
"""

_SUM_OF_SQUARES = """
    constexpr int THREADS = 512;
    const long long size = x_shape[0], step = (long long)gridDim.x * THREADS;
    float total = 0.f;
    for (long long index = blockIdx.x * (long long)THREADS + threadIdx.x; index < size; index += step) {
      const float value = (float)x[index];
      total += value * value;
    }
    __shared__ float totals[THREADS];
    totals[threadIdx.x] = total;
    for (int half = THREADS / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) totals[threadIdx.x] += totals[threadIdx.x + half];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = totals[0];
"""

# The squares of several small arrays: `PARTS` blocks for each.
_SUMS_OF_SQUARES = """
    constexpr int THREADS = 512;
    const float* arrays[] = {ARRAYS};
    const int sizes[] = {SIZES};
    const int place = blockIdx.x / PARTS, size = sizes[place];
    const float* x = arrays[place];
    float total = 0.f;
    for (int index = blockIdx.x % PARTS * THREADS + threadIdx.x; index < size; index += PARTS * THREADS) {
      total += x[index] * x[index];
    }
    __shared__ float totals[THREADS];
    totals[threadIdx.x] = total;
    for (int half = THREADS / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) totals[threadIdx.x] += totals[threadIdx.x + half];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = totals[0];
"""

# Several arrays. A block computes 2048 values, each thread four neighbours if the size allows it.
_ADAM = """
    constexpr int THREADS = 512, N = 4;
    struct alignas(16) Pack { float values[N]; };
    const int sizes[] = {SIZES};
    int place = 0, block = blockIdx.x;
    while (block >= (sizes[place] + THREADS * N - 1) / (THREADS * N)) {
      block -= (sizes[place] + THREADS * N - 1) / (THREADS * N);
      place++;
    }
    const float *ps[] = {P}, *gs[] = {G}, *ms[] = {M}, *vs[] = {V};
    float *new_ps[] = {NEW_P}, *new_ms[] = {NEW_M}, *new_vs[] = {NEW_V};
    const float *p = ps[place], *g = gs[place], *m = ms[place], *v = vs[place];
    float *new_p = new_ps[place], *new_m = new_ms[place], *new_v = new_vs[place];
    const int size = sizes[place];
    auto update = [&](float& a, float& b, float& c, float d) {
      const float slope = d * factor[0] + scalars[8] * a;
      b = scalars[4] * b + scalars[5] * slope;
      c = scalars[6] * c + scalars[7] * slope * slope;
      const float denominator = sqrtf(c) / scalars[1] + scalars[2];
      a = a * scalars[3] - scalars[0] * (b / denominator);
    };
    if (size % N == 0) {
      const int index = block * THREADS + threadIdx.x;
      if (index * N >= size) return;
      Pack a = reinterpret_cast<const Pack*>(p)[index], b = reinterpret_cast<const Pack*>(m)[index];
      Pack c = reinterpret_cast<const Pack*>(v)[index];
      const Pack d = reinterpret_cast<const Pack*>(g)[index];
      for (int i = 0; i < N; i++) update(a.values[i], b.values[i], c.values[i], d.values[i]);
      reinterpret_cast<Pack*>(new_p)[index] = a;
      reinterpret_cast<Pack*>(new_m)[index] = b;
      reinterpret_cast<Pack*>(new_v)[index] = c;
    } else {
      for (int i = 0; i < N; i++) {
        const int index = (block * N + i) * THREADS + threadIdx.x;
        if (index >= size) break;
        float a = p[index], b = m[index], c = v[index];
        update(a, b, c, g[index]);
        new_p[index] = a;
        new_m[index] = b;
        new_v[index] = c;
      }
    }
"""


def has_kernels() -> bool:
    """Returns whether the kernels of this module can be used: on CUDA."""
    return not on_cpu() and bool(mx.cuda.is_available())


def is_worthwhile(x: Array) -> bool:
    """Returns whether an array has many values, on CUDA. For one token `mx.compile` merges the operations instead."""
    return x.size >= 1 << 18 and has_kernels()


def cross_entropy(logits: Array, labels: Array, count: Array, softcap: float | None) -> tuple[Array, Array]:
    """Computes `icenet.nn.loss._chunk`."""
    rows, width = logits.shape
    losses, gradient = _cross_entropy()(
        inputs=[logits, labels.astype(mx.int32), count.astype(mx.int32).reshape(1), _floats(softcap or 1.0)],
        template=[("T", logits.dtype), ("V", width), ("CAPPED", softcap is not None)],
        grid=(rows * 2 * THREADS, 1, 1),
        threadgroup=(2 * THREADS, 1, 1),  # so many that the rows in work fit in the L2 cache
        output_shapes=[(rows,), (rows, width)],
        output_dtypes=[mx.float32, logits.dtype],
    )
    return losses, gradient


@lru_cache
def _cross_entropy() -> Any:
    names = ["logits", "labels", "count", "softcap"]
    return mx.fast.cuda_kernel("icenet_cross_entropy", names, ["losses", "gradient"], _CROSS_ENTROPY)


@dataclass(frozen=True)
class _Rows:
    """How a kernel divides an array `[M, C]`, see `_LAYOUT`."""

    vector: int
    layout: tuple[int, int, int]

    @classmethod
    def of(cls, rows: Array) -> _Rows:
        count, channels = rows.shape
        packed = 16 // rows.itemsize
        vector = packed if channels % packed == 0 else 1
        lanes = min(32, 1 << (max(channels // vector, 1) - 1).bit_length())
        tiles = -(-channels // (vector * lanes))
        return cls(vector, (lanes, tiles, max(min(_BLOCKS // tiles, count // (THREADS // lanes)), 1)))

    def run(
        self, name: str, inputs: list[Array], option: tuple[str, Any], shape: tuple[int, ...], dtype: Any
    ) -> Array:
        """Returns the output of the kernel `sums` or `normalize`; the first input is the array."""
        _, tiles, parts = self.layout
        [out] = _rows_kernels()[name](
            inputs=[*inputs, _integers(*self.layout)],
            template=[("T", inputs[0].dtype), ("VECTOR", self.vector), option],
            grid=(THREADS * tiles * parts, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[shape],
            output_dtypes=[dtype],
        )
        return out

    def sums(self, rows: Array, dy: Array, mean: Array, scale: Array, kind: int) -> Array:
        """Returns the two sums of each part and channel, fp32 `[parts, 2, C]`; see `_SUMS`."""
        shape = self.layout[2], 2, rows.shape[1]
        return self.run("sums", [rows, dy, mean, scale], ("KIND", kind), shape, mx.float32)


def column_sums(x: Array) -> Array:
    """Returns sums over all axes but the last, fp32: `[..., C]` to `[C]`."""
    rows = x.reshape(-1, x.shape[-1])
    nothing = _floats(0.0)
    return _Rows.of(rows).sums(rows, rows, nothing, nothing, 0).sum(axis=0)[:1].reshape(-1)


def batch_norm(
    x: Array, weight: Array, bias: Array, running_mean: Array, running_var: Array, eps: float, momentum: float
) -> tuple[Array, Array, Array]:
    """Computes batch norm of images `[B, H, W, C]` in training, in two passes over them and two in the gradient.

    MLX's own operations need 20 passes in fp32 and as many in the gradient.

    Returns:
        The images in their own dtype, and the new running mean and variance.
    """
    channels = x.shape[-1]
    division = _Rows.of(x.reshape(-1, channels))

    @mx.custom_function
    def normalize(x: Array, weight: Array, bias: Array) -> list[Array]:
        rows = x.reshape(-1, channels)
        sums = division.sums(rows, rows, weight, weight, 1)
        mean, scale, new_mean, new_var = _rows_kernels()["statistics"](
            inputs=[sums, rows, running_mean, running_var, _floats(eps, momentum, 1 - momentum)],
            template=[("T", x.dtype)],
            grid=(-(-channels // 32) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(channels,)] * 4,
            output_dtypes=[mx.float32] * 4,
        )
        inputs = [rows, rows, mean, scale, weight, bias]
        y = division.run("normalize", inputs, ("GRADIENT", False), rows.shape, x.dtype)
        return [y.reshape(x.shape), new_mean, new_var, mean, scale]

    @normalize.vjp
    def gradient(inputs: tuple[Array, ...], cotangents: list[Array], outputs: list[Array]) -> list[Array]:
        x, weight, _ = inputs
        mean, scale = outputs[3:]
        rows, dy = x.reshape(-1, channels), cotangents[0].reshape(-1, channels)
        sums = division.sums(rows, dy, mean, scale, 2).sum(axis=0)
        arrays = [rows, dy, mean, scale, weight, sums]
        dx = division.run("normalize", arrays, ("GRADIENT", True), rows.shape, x.dtype)
        # views; sums[1] would be a kernel
        return [dx.reshape(x.shape), sums[1:].reshape(-1), sums[:1].reshape(-1)]

    outputs: Any = normalize(x, weight, bias)  # MLX types the result as an object
    y, new_mean, new_var, _, _ = outputs
    return y, mx.stop_gradient(new_mean), mx.stop_gradient(new_var)


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """Returns x `[..., C]` with each row normalized, in the dtype of x. Without a bias, as RMSNorm, with no mean.

    MLX's own functions take weights and x of the same dtype, so that bf16 would be copied to fp32 and back.

    Args:
        x: `[..., C]`.
        weight: fp32 `[C]`.
        bias: fp32 `[C]`, or None for RMSNorm.
        eps: Added to the variance, or to the mean square.
    """
    channels, centered = x.shape[-1], bias is not None

    def run(name: str, inputs: list[Array], shapes: list[tuple[int, ...]], dtypes: list[mx.Dtype]) -> Any:
        rows = inputs[0]
        packed = 16 // rows.itemsize
        return _layer_norm()[name](
            inputs=inputs,
            template=[
                ("T", rows.dtype),
                ("VECTOR", packed if channels % packed == 0 else 1),
                ("CENTERED", centered),
            ],
            grid=(-(-rows.shape[0] // _ROWS_OF_A_BLOCK) * 32 * _ROWS_OF_A_BLOCK, 1, 1),
            threadgroup=(32 * _ROWS_OF_A_BLOCK, 1, 1),
            output_shapes=shapes,
            output_dtypes=dtypes,
        )

    @mx.custom_function
    def normalize(x: Array, weight: Array, *bias: Array) -> list[Array]:
        rows = x.reshape(-1, channels)
        count = rows.shape[0]
        inputs = [rows, weight, bias[0] if bias else weight, _floats(eps)]
        y, mean, scale = run("normalize", inputs, [rows.shape, (count,), (count,)], [x.dtype, mx.float32, mx.float32])
        return [y.reshape(x.shape), mean, scale]

    @normalize.vjp
    def gradient(inputs: tuple[Array, ...], cotangents: list[Array], outputs: list[Array]) -> list[Array]:
        x, weight = inputs[:2]
        rows, dy = x.reshape(-1, channels), cotangents[0].reshape(-1, channels)
        mean, scale = outputs[1:]
        [dx] = run("gradient", [rows, dy, weight, mean, scale], [rows.shape], [x.dtype])
        sums = _Rows.of(rows).sums(rows, dy, mean, scale, 3).sum(axis=0)
        return [dx.reshape(x.shape), sums[1:].reshape(-1), *([sums[:1].reshape(-1)] if centered else [])]

    outputs: Any = normalize(x, weight, *([] if bias is None else [bias]))
    return outputs[0]  # type: ignore[no-any-return]


_ROWS_OF_A_BLOCK = 8


def activation(name: str, x: Array) -> Array:
    """Computes `icenet.nn.activation` in fp32 and in one kernel, and its gradient in another."""

    def run(arrays: list[Array], is_gradient: bool) -> Array:
        packed = 16 // x.itemsize
        vector = packed if x.size % packed == 0 else 1
        [out] = _activation()(
            inputs=[array.reshape(-1) for array in arrays],
            template=[
                ("T", x.dtype),
                ("VECTOR", vector),
                ("KIND", _ACTIVATIONS.index(name)),
                ("GRADIENT", is_gradient),
            ],
            grid=(-(-x.size // vector), 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )
        return out

    @mx.custom_function
    def compute(x: Array) -> Array:
        return run([x, x], False)

    @compute.vjp
    def gradient(x: Array, cotangent: Array, _: Array) -> Array:
        return run([x, cotangent], True)

    y: Any = compute(x)
    return y  # type: ignore[no-any-return]


_ACTIVATIONS = ["gelu", "gelu_tanh", "silu", "relu"]


def sums_of_squares(arrays: Sequence[Array]) -> Array:
    """Returns the sum of the squares of each array, fp32 `[N]`.

    Starting a kernel takes longer than reading a small array: ResNet-50 has 161 arrays.
    """
    flat = [array.astype(mx.float32).reshape(-1) for array in arrays]
    small = [index for index, array in enumerate(flat) if array.size < _LARGE]
    sums: list[Array] = [_sum_of_squares_of_one(array) for array in flat if array.size >= _LARGE]
    for chunk in _chunks([flat[index] for index in small], ARRAYS_OF_A_SUM, _floats(0.0)):
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
    return mx.concatenate(sums)[_integers(*places)]


ARRAYS_OF_A_SUM = 16
"""Number of arrays of a kernel. Fewer are filled up, so that there is one kernel to compile."""
_PARTS = 64
_LARGE = 1 << 22
"""Arrays with so many values have a kernel of their own, with more blocks."""


def _sum_of_squares_of_one(x: Array) -> Array:
    """Returns the sum of the squares of an fp32 array `[N]`, fp32 `[1]`."""
    blocks = max(min(_BLOCKS, x.size // (8 * THREADS)), 1)
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
    for start in range(0, len(arrays), size):
        part = list(arrays[start : start + size])
        yield part + [filler] * (size - len(part))


def adam(
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    m: Sequence[Array],
    v: Sequence[Array],
    factor: Array,
    scalars: Array,
) -> list[tuple[Array, Array, Array]]:
    """Computes a step of Adam in one pass over the arrays, which are fp32; MLX's own operations need 12.

    Args:
        parameters, gradients, m, v: The arrays of each parameter, of one shape.
        factor: Factor of the gradients, `[1]`.
        scalars: step_size, root_correction, eps, shrink, beta1, 1 - beta1, beta2, 1 - beta2, and the weight decay
            that is added to the gradient, `[9]`.

    Returns:
        The new parameter, m and v of each.
    """
    found: list[tuple[Array, Array, Array]] = []
    nothing = _floats(0.0)
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
        blocks = sum(-(-math.prod(shape) // (4 * THREADS)) for shape in outputs)
        new = _adam()(
            inputs=[*inputs, factor, scalars],
            template=[],
            grid=(blocks * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=outputs * 3,
            output_dtypes=[mx.float32] * (3 * ARRAYS_OF_ADAM),
        )
        found += [(new[i], new[i + ARRAYS_OF_ADAM], new[i + 2 * ARRAYS_OF_ADAM]) for i in range(len(shapes))]
    return found


ARRAYS_OF_ADAM = 8
"""Number of parameters of a kernel; see `ARRAYS_OF_A_SUM`."""


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

    outputs: Any = pool(x)
    return outputs[0]  # type: ignore[no-any-return]


@lru_cache
def _rows_kernels() -> dict[str, Any]:
    def kernel(name: str, inputs: list[str], outputs: list[str], source: str) -> Any:
        return mx.fast.cuda_kernel(f"icenet_rows_{name}", inputs, outputs, source)

    arrays = ["x", "dy", "mean", "scale"]
    statistics = ["parts", "x", "running_mean", "running_var", "constants"]
    return {
        "sums": kernel("sums", [*arrays, "layout"], ["out"], _SUMS),
        "statistics": kernel("statistics", statistics, ["mean", "scale", "new_mean", "new_var"], _STATISTICS),
        "normalize": kernel("normalize", [*arrays, "weight", "sums", "layout"], ["out"], _NORMALIZE),
    }


@lru_cache
def _layer_norm() -> dict[str, Any]:
    forward, backward = ["x", "weight", "bias", "eps"], ["x", "dy", "weight", "mean", "scale"]
    return {
        "normalize": mx.fast.cuda_kernel("icenet_layer_norm", forward, ["out", "mean", "scale"], _LAYER_NORM),
        "gradient": mx.fast.cuda_kernel("icenet_layer_norm_gradient", backward, ["out"], _LAYER_NORM_GRADIENT),
    }


@lru_cache
def _activation() -> Any:
    return mx.fast.cuda_kernel("icenet_activation", ["x", "dy"], ["out"], _ACTIVATION)


@lru_cache
def _sum_of_squares() -> Any:
    return mx.fast.cuda_kernel("icenet_sum_of_squares", ["x"], ["out"], _SUM_OF_SQUARES)


@lru_cache
def _sums_of_squares() -> Any:
    names = [f"x{index}" for index in range(ARRAYS_OF_A_SUM)]
    source = _SUMS_OF_SQUARES.replace("ARRAYS", ", ".join(names)).replace("SIZES", _sizes(names))
    return mx.fast.cuda_kernel("icenet_sums_of_squares", names, ["out"], source)


@lru_cache
def _adam() -> Any:
    names = {
        part: [f"{part}{index}" for index in range(ARRAYS_OF_ADAM)]
        for part in ("p", "g", "m", "v", "new_p", "new_m", "new_v")
    }
    source = _ADAM.replace("{SIZES}", f"{{{_sizes(names['p'])}}}")
    for part, own in names.items():
        source = source.replace(f"{{{part.upper()}}}", f"{{{', '.join(own)}}}")
    inputs = [name for part in ("p", "g", "m", "v") for name in names[part]]
    outputs = [name for part in ("new_p", "new_m", "new_v") for name in names[part]]
    return mx.fast.cuda_kernel("icenet_adam", [*inputs, "factor", "scalars"], outputs, source)


def _sizes(names: Sequence[str]) -> str:
    return ", ".join(f"{name}_shape[0]" for name in names)


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
