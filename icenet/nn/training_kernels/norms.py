"""CUDA kernels of batch norm, layer norm and RMSNorm and of sums over rows, MLX."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array
from icenet.nn.training_kernels.activations import activation_gradient
from icenet.nn.training_kernels.common import BLOCKS, THREADS, floats, integers

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
# 2: dy and dy * (x - mean) * scale, with a mean and a scale for each channel; 3: the same with those of the row;
# 4: as 2, where dy counts only if the ReLU of the normalized value is above zero.
# Sums are fp32, of few terms each. (MLX's own sums of half precision are in half precision.)
_SUMS = (
    _LAYOUT
    + """
    float first[N] = {}, second[N] = {}, center[N] = {}, factor[N] = {}, slope[N] = {}, shift[N] = {};
    if (column < channels) {
      for (int i = 0; i < N; i++) {
        if (KIND == 1) center[i] = (float)x[column + i];
        if (KIND == 2 || KIND == 4) {
          center[i] = mean[column + i];
          factor[i] = scale[column + i];
        }
        if (KIND == 4) {
          slope[i] = weight[column + i] * factor[i];
          shift[i] = bias[column + i];
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
            const float difference = (float)pack.values[i] - (KIND == 3 ? row_mean : center[i]);
            float g = (float)other.values[i];
            if (KIND == 4 && (float)(T)(difference * slope[i] + shift[i]) <= 0.f) g = 0.f;
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

# The sums of all parts `[P, 2, C]`, the first only or both, rounded to T: 3.4 us on an H200 for 16384 rows of 512 to
# 2048 channels. MLX's own sum takes 5.5, and rounding is another kernel.
_TOTALS = """
    constexpr int THREADS = 512, LANES = 32;
    const int count = parts_shape[0], channels = parts_shape[2], width = SUMS * channels;
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    const int place = blockIdx.x * LANES + lane;
    __shared__ float totals[THREADS];
    float total = 0.f;
    if (place < width) {
      for (int part = group; part < count; part += THREADS / LANES) total += parts[2LL * part * channels + place];
    }
    totals[threadIdx.x] = total;
    __syncthreads();
    if (group == 0 && place < width) {
      for (int other = 1; other < THREADS / LANES; other++) total += totals[other * LANES + lane];
      out[place] = (float)(T)total;
    }
"""

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
    float center[N], a[N], b[N], c[N], shift[N];
    for (int i = 0; i < N; i++) {
      center[i] = mean[column + i];
      const float inverse = scale[column + i], factor = weight[column + i] * inverse;
      if (GRADIENT) {  // (dy - (sum dy + normal * sum dy normal) / rows) * weight / deviation
        a[i] = factor;
        shift[i] = bias[column + i];
        b[i] = -factor * sums[column + i] / (float)rows;
        c[i] = -factor * inverse * sums[channels + column + i] / (float)rows;
      } else {
        a[i] = factor;
        b[i] = bias[column + i];
        c[i] = 0.f;
      }
    }
    for (long long row = begin; row < rows; row += step) {
      Pack pack = *reinterpret_cast<const Pack*>(x + row * channels + column);
      if constexpr (GRADIENT) {
        const Pack other = *reinterpret_cast<const Pack*>(dy + row * channels + column);
        for (int i = 0; i < N; i++) {
          const float difference = (float)pack.values[i] - center[i];
          float g = (float)other.values[i];
          if (RELU && (float)(T)(difference * a[i] + shift[i]) <= 0.f) g = 0.f;
          pack.values[i] = (T)(a[i] * g + b[i] + c[i] * difference);
        }
      } else {
        Pack other;
        if (RESIDUAL) other = *reinterpret_cast<const Pack*>(dy + row * channels + column);
        for (int i = 0; i < N; i++) {
          T value = (T)(((float)pack.values[i] - center[i]) * a[i] + b[i]);
          if (RESIDUAL) value = (T)((float)value + (float)other.values[i]);
          pack.values[i] = RELU && (float)value < 0.f ? (T)0.f : value;
        }
      }
      *reinterpret_cast<Pack*>(out + row * channels + column) = pack;
    }
"""
)


# A warp computes a row. It reads the row three times, the second and third time from the cache. `parameters` reads
# neighbouring weights together. One by one, each read of a warp touches 32 sectors: 16384 rows of 512 values in bf16
# took 33 us on an H200, not 23, and their gradient 32, not 16.
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
    struct alignas(16) Four { float values[4]; };
    auto parameters = [&](const float* array, int column, float* values) {
      if (N % 4 == 0 && (size_t)array % sizeof(Four) == 0) {
        for (int i = 0; i < N / 4; i++) {
          const Four four = reinterpret_cast<const Four*>(array + column)[i];
          for (int j = 0; j < 4; j++) values[i * 4 + j] = four.values[j];
        }
      } else {
        for (int i = 0; i < N; i++) values[i] = array[column + i];
      }
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
      float factors[N], shifts[N];
      parameters(weight, column, factors);
      if (CENTERED) parameters(bias, column, shifts);
      for (int i = 0; i < N; i++) {
        const float normal = ((float)pack.values[i] - average) * inverse * factors[i];
        pack.values[i] = (T)(CENTERED ? normal + shifts[i] : normal);
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
      float factors[N];
      parameters(weight, column, factors);
      for (int i = 0; i < N; i++) {
        const float g = (float)other.values[i] * factors[i];
        sum += g;
        products += g * ((float)pack.values[i] - average) * inverse;
      }
    }
    sum = CENTERED ? total(sum) / channels : 0.f;
    products = total(products) / channels;
    for (int column = lane * N; column < channels; column += 32 * N) {
      Pack pack = load(x, column);
      const Pack other = load(dy, column);
      float factors[N];
      parameters(weight, column, factors);
      for (int i = 0; i < N; i++) {
        const float normal = ((float)pack.values[i] - average) * inverse;
        pack.values[i] = (T)(inverse * ((float)other.values[i] * factors[i] - sum - normal * products));
      }
      *reinterpret_cast<Pack*>(out + row * channels + column) = pack;
    }
"""
)


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
        return cls(vector, (lanes, tiles, max(min(BLOCKS // tiles, count // (THREADS // lanes)), 1)))

    def run(
        self, name: str, inputs: list[Array], options: dict[str, Any], shape: tuple[int, ...], dtype: Any
    ) -> Array:
        """Returns the output of the kernel `sums` or `normalize`; the first input is the array."""
        _, tiles, parts = self.layout
        [out] = _rows_kernels()[name](
            inputs=[*inputs, integers(*self.layout)],
            template=[("T", inputs[0].dtype), ("VECTOR", self.vector), *options.items()],
            grid=(THREADS * tiles * parts, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[shape],
            output_dtypes=[dtype],
        )
        return out

    def sums(self, kind: int, rows: Array, *inputs: Array) -> Array:
        """Returns the two sums of each part and channel, fp32 `[parts, 2, C]`; see `_SUMS` for kinds and inputs."""
        shape = self.layout[2], 2, rows.shape[1]
        given = [*inputs, *[floats(0.0)] * (5 - len(inputs))]
        return self.run("sums", [rows, *given], {"KIND": kind}, shape, mx.float32)


def column_sums(x: Array) -> Array:
    """Returns sums over all axes but the last, rounded to the dtype of x: `[..., C]` to fp32 `[C]`."""
    rows = x.reshape(-1, x.shape[-1])
    return _totals(_Rows.of(rows).sums(0, rows, rows), 1, x.dtype).reshape(-1)


def _totals(parts: Array, count: int = 2, dtype: mx.Dtype = mx.float32) -> Array:
    """Returns the first sum or both of all parts, fp32 `[count, C]`, rounded to a dtype."""
    channels = parts.shape[-1]
    [out] = _rows_kernels()["totals"](
        inputs=[parts],
        template=[("T", dtype), ("SUMS", count)],
        grid=(-(-count * channels // 32) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(count, channels)],
        output_dtypes=[mx.float32],
    )
    return out


def batch_norm(
    x: Array,
    weight: Array,
    bias: Array,
    running_mean: Array,
    running_var: Array,
    eps: float,
    momentum: float,
    relu: bool = False,
    residual: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Computes batch norm of images `[B, H, W, C]` in training, in two passes over them and two in the gradient.

    MLX's own operations need 20 passes in fp32 and as many in the gradient. A sum and a ReLU after it are of the same
    pass. Without a sum, the gradient of ReLU needs no pass of its own: it is computed from x again.

    Args:
        x: The images.
        weight, bias, running_mean, running_var: fp32 `[C]`.
        eps: Added to the variance.
        momentum: The part by which the running statistics move.
        relu: Whether to apply ReLU to the result.
        residual: Images to add before, in the dtype and shape of x.

    Returns:
        The images in their own dtype, and the new running mean and variance.
    """
    channels = x.shape[-1]
    division = _Rows.of(x.reshape(-1, channels))

    @mx.custom_function
    def normalize(x: Array, weight: Array, bias: Array, *residual: Array) -> list[Array]:
        rows = x.reshape(-1, channels)
        sums = division.sums(1, rows, rows)
        mean, scale, new_mean, new_var = _rows_kernels()["statistics"](
            inputs=[sums, rows, running_mean, running_var, floats(eps, momentum, 1 - momentum)],
            template=[("T", x.dtype)],
            grid=(-(-channels // 32) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(channels,)] * 4,
            output_dtypes=[mx.float32] * 4,
        )
        added = residual[0].reshape(-1, channels) if residual else rows
        inputs = [rows, added, mean, scale, weight, bias, weight]
        options = {"GRADIENT": False, "RELU": relu, "RESIDUAL": bool(residual)}
        y = division.run("normalize", inputs, options, rows.shape, x.dtype)
        return [y.reshape(x.shape), new_mean, new_var, mean, scale]

    @normalize.vjp
    def gradient(inputs: tuple[Array, ...], cotangents: list[Array], outputs: list[Array]) -> list[Array]:
        (x, weight, bias, *residual), (dy, *_) = inputs, cotangents
        y, _, _, mean, scale = outputs
        if relu and residual:  # also the gradient of the residual
            dy = activation_gradient("relu", y, dy)
        masked = relu and not residual
        rows, slopes = x.reshape(-1, channels), dy.reshape(-1, channels)
        sums = _totals(division.sums(4 if masked else 2, rows, slopes, mean, scale, weight, bias))
        arrays = [rows, slopes, mean, scale, weight, bias, sums]
        options = {"GRADIENT": True, "RELU": masked, "RESIDUAL": False}
        dx = division.run("normalize", arrays, options, rows.shape, x.dtype)
        # views; sums[1] would be a kernel
        return [dx.reshape(x.shape), sums[1:].reshape(-1), sums[:1].reshape(-1), *([dy] if residual else [])]

    outputs: Any = normalize(x, weight, bias, *([] if residual is None else [residual]))  # MLX types it as an object
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
        inputs = [rows, weight, bias[0] if bias else weight, floats(eps)]
        y, mean, scale = run("normalize", inputs, [rows.shape, (count,), (count,)], [x.dtype, mx.float32, mx.float32])
        return [y.reshape(x.shape), mean, scale]

    @normalize.vjp
    def gradient(inputs: tuple[Array, ...], cotangents: list[Array], outputs: list[Array]) -> list[Array]:
        x, weight = inputs[:2]
        rows, dy = x.reshape(-1, channels), cotangents[0].reshape(-1, channels)
        mean, scale = outputs[1:]
        [dx] = run("gradient", [rows, dy, weight, mean, scale], [rows.shape], [x.dtype])
        sums = _totals(_Rows.of(rows).sums(3, rows, dy, mean, scale))
        return [dx.reshape(x.shape), sums[1:].reshape(-1), *([sums[:1].reshape(-1)] if centered else [])]

    outputs: Any = normalize(x, weight, *([] if bias is None else [bias]))
    return outputs[0]  # type: ignore[no-any-return]


_ROWS_OF_A_BLOCK = 8


@lru_cache
def _rows_kernels() -> dict[str, Any]:
    def kernel(name: str, inputs: list[str], outputs: list[str], source: str) -> Any:
        return mx.fast.cuda_kernel(f"icenet_rows_{name}", inputs, outputs, source)

    arrays = ["x", "dy", "mean", "scale", "weight", "bias"]
    statistics = ["parts", "x", "running_mean", "running_var", "constants"]
    return {
        "sums": kernel("sums", [*arrays, "layout"], ["out"], _SUMS),
        "totals": kernel("totals", ["parts"], ["out"], _TOTALS),
        "statistics": kernel("statistics", statistics, ["mean", "scale", "new_mean", "new_var"], _STATISTICS),
        "normalize": kernel("normalize", [*arrays, "sums", "layout"], ["out"], _NORMALIZE),
    }


@lru_cache
def _layer_norm() -> dict[str, Any]:
    forward, backward = ["x", "weight", "bias", "eps"], ["x", "dy", "weight", "mean", "scale"]
    return {
        "normalize": mx.fast.cuda_kernel("icenet_layer_norm", forward, ["out", "mean", "scale"], _LAYER_NORM),
        "gradient": mx.fast.cuda_kernel("icenet_layer_norm_gradient", backward, ["out"], _LAYER_NORM_GRADIENT),
    }
