"""CUDA kernel for linear layers of a few rows, MLX: norm, product, bias, activation and residual in one.

Weights are floating or packed ones in the format of `icenet.core.weights.packed`.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, NamedTuple

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array, is_half, on_cpu
from icenet.nn.device_limits import Limits, device_limits

STEP, PACKED_STEP = 512, 1024
"""Inputs that a warp reads at a time: more need so many registers that fewer warps run at once."""
WARPS = 8
"""Most warps of a thread block."""
BLOCKS_OF_A_PROCESSOR = 3
"""Thread blocks that a multiprocessor is given. Each computes the norm, then several groups of outputs."""
SHARED_MEMORY = (16000, 48000, 90112, 180224)
"""Bytes of shared memory of a block. Each size is a kernel of its own."""
KINDS = ("none", "layer", "rms", "rms_offset")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")

_HEADER = """
#define DYNAMIC_ARRAY(type, name) \\
  extern __shared__ __align__(16) unsigned char dynamic_memory[]; \\
  type* name = (type*)dynamic_memory
"""

# A warp computes R outputs (of gated layers R / 2 and what they multiply) for all rows; `blockDim.y` warps share the
# inputs of these outputs, and `blockDim.z` such teams are in a block. Each thread multiplies packs of 8 inputs
# at a time, and reads the weights of the next ones before that, across groups of outputs, and the first ones before
# the norm. The packs of inputs are in shared memory in the order in which the threads of a warp read them.
#
# A packed number is put into the mantissa of 2^23, where it is 2^23 + 2^at q; one multiplication and addition then
# give it exactly, which takes less than conversion of integers. With q minus the middle of its range, which the bias
# makes up for, scale (sum q x) + bias (sum x) cancels less.
_SOURCE = """
constexpr int R = OUTPUTS, EACH = GATED ? R / 2 : R, PACKS = BITS ? 4 : 2, STEP = PACKS * 256;
constexpr int WORDS = BITS ? BITS : 1, MIDDLE = 1 << (WORDS - 1);
struct alignas(16) Pack { T values[8]; };
struct alignas(WORDS % 4 == 0 ? 16 : WORDS % 2 == 0 ? 8 : 4) Words { unsigned values[WORDS]; };
struct Weights { Pack packs[BITS ? 1 : R][PACKS]; Words words[BITS ? R : 1]; float scale[R], offset[R]; };
const int lane = threadIdx.x, part = threadIdx.y, own = threadIdx.z, parts = blockDim.y, teams = blockDim.z;
const int warp = part + parts * own, thread = lane + 32 * warp, threads = 32 * parts * teams;
const int size = x_shape[x_ndim - 1], steps = (size + STEP - 1) / STEP, packs = steps * PACKS * 32;
const int outputs = weight_shape[0] / (GATED ? 2 : 1), total = (outputs + EACH - 1) / EACH;
const bool aligned = ((size_t)x | (size_t)weight) % 16 == 0;
int rows = 1;
for (int i = 0; i + 1 < x_ndim; i++) rows *= x_shape[i];

DYNAMIC_ARRAY(float, partial);
float* moments = partial + 8 * R * ROWS;
Pack* inputs = (Pack*)(moments + 8 * ROWS);

auto read = [&](const T* from) {
  if (aligned) return *(const Pack*)from;
  Pack pack;
  for (int i = 0; i < 8; i++) pack.values[i] = from[i];
  return pack;
};
auto fetch = [&](Weights& w, int team, int step) {
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int n = team * EACH + r % EACH, k = step * STEP + lane * 32;
    const size_t row = n + (size_t)(r / EACH) * outputs;
    if (BITS == 0) {
#pragma unroll
      for (int s = 0; s < PACKS; s++) {
        const int at = step * STEP + s * 256 + lane * 8;
        w.packs[r % (BITS ? 1 : R)][s] = n < outputs && at < size ? read((const T*)weight + row * size + at) : Pack{};
      }
    } else if (n < outputs && k < size) {
      const unsigned* from = (const unsigned*)weight + (row * size + k) / 32 * BITS;
      Words& words = w.words[r % (BITS ? R : 1)];
      if (aligned) {
        words = *(const Words*)from;
      } else {
        for (int i = 0; i < WORDS; i++) words.values[i] = from[i];
      }
      w.scale[r] = (float)scales[(row * size + k) / GROUP];
      w.offset[r] = (float)biases[(row * size + k) / GROUP] + w.scale[r] * MIDDLE;
    } else {
      w.words[r % (BITS ? R : 1)] = Words{};
      w.scale[r] = w.offset[r] = 0.f;
    }
  }
};
auto number = [&](const unsigned* words, int i) -> float {
  const int bit = i * WORDS;
  int at = bit % 32;
  unsigned word = words[bit / 32];
  if (at + WORDS > 32) {
    word = word >> at | words[bit / 32 + 1] << (32 - at);
    at = 0;
  } else if (at + WORDS > 23) {
    word >>= 16;
    at -= 16;
  }
  const float found = __uint_as_float((word & ((1u << WORDS) - 1) << at) | 0x4b000000u);
  return fmaf(found, 1.f / (1 << at), -(float)((1 << (23 - at)) + MIDDLE));
};

const int first = blockIdx.x * teams;
Weights now, next;
fetch(now, first + own, part);

float sums[ROWS] = {}, mean[ROWS] = {};
auto place = [&](int p) { return BITS ? p / 128 * 128 + p % 4 * 32 + p / 4 % 32 : p; };
auto join = [&]() {
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    for (int offset = 16; offset > 0; offset /= 2) sums[row] += __shfl_xor_sync(0xffffffff, sums[row], offset);
    if (lane == 0) moments[row * 8 + warp] = sums[row];
  }
  __syncthreads();
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    sums[row] = 0.f;
    for (int w = 0; w < parts * teams; w++) sums[row] += moments[row * 8 + w];
  }
  __syncthreads();
};
float gain[8], shift[8];
auto read_norm = [&](int p) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    gain[i] = p * 8 < size ? (float)norm_weight[p * 8 + i] + (NORM == 3 ? 1.f : 0.f) : 0.f;
    shift[i] = NORM_BIAS && p * 8 < size ? (float)norm_bias[p * 8 + i] : 0.f;
  }
};
if (NORM) read_norm(thread);
for (int p = thread; p < packs; p += threads) {
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    const Pack pack = row < rows && p * 8 < size ? read(x + (size_t)row * size + p * 8) : Pack{};
    inputs[row * packs + place(p)] = pack;
    for (int i = 0; i < 8; i++) {
      const float value = (float)pack.values[i];
      sums[row] += NORM == 1 ? value : value * value;
    }
  }
}
if (NORM == 1) {
  join();
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    mean[row] = sums[row] / size;
    sums[row] = 0.f;
    for (int p = thread; p * 8 < size; p += threads) {
      for (int i = 0; i < 8; i++) {
        const float difference = (float)inputs[row * packs + place(p)].values[i] - mean[row];
        sums[row] += difference * difference;
      }
    }
  }
}
if (NORM) {
  join();
#pragma unroll
  for (int row = 0; row < ROWS; row++) sums[row] = 1.f / sqrtf(sums[row] / size + __uint_as_float(EPS));
  for (int p = thread; p * 8 < size; p += threads) {
    if (p != thread) read_norm(p);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      Pack& at = inputs[row * packs + place(p)];
      Pack pack = at;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        pack.values[i] = (T)(((float)pack.values[i] - mean[row]) * sums[row] * gain[i] + shift[i]);
      }
      at = pack;
    }
  }
}
__syncthreads();

for (int base = first; base < total; base += gridDim.x * teams) {
  const int team = base + own, o = lane % EACH, end_row = lane / EACH, n = team * EACH + o;
  const bool ends = part == 0 && end_row < rows && end_row < ROWS && n < outputs;
  float value = 0.f, up = 0.f, added = 0.f;
  if (ends) {
    if (BIAS) value = (float)bias[n];
    if (BIAS && GATED) up = (float)bias[outputs + n];
    if (RESIDUAL) added = (float)residual[(size_t)end_row * outputs + n];
  }
  float products[R][ROWS] = {};
  for (int step = part; step < steps; step += parts) {
    const bool is_last = step + parts >= steps;
    fetch(next, is_last ? team + gridDim.x * teams : team, is_last ? part : step + parts);
    float dots[R][ROWS] = {}, plain[ROWS] = {};
#pragma unroll
    for (int s = 0; s < PACKS; s++) {
      if (BITS == 0 && step * STEP + s * 256 >= size) continue;
      float values[ROWS][8];
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        const Pack pack = inputs[row * packs + (step * PACKS + s) * 32 + lane];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          values[row][i] = (float)pack.values[i];
          if (BITS) plain[row] += values[row][i];
        }
      }
#pragma unroll
      for (int r = 0; r < R; r++) {
        float w[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          w[i] = BITS ? number(now.words[r % (BITS ? R : 1)].values, s * 8 + i)
                      : (float)now.packs[r % (BITS ? 1 : R)][BITS ? 0 : s].values[i];
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
#pragma unroll
          for (int i = 0; i < 8; i++) dots[r][row] = fmaf(w[i], values[row][i], dots[r][row]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        products[r][row] += BITS ? now.scale[r] * dots[r][row] + now.offset[r] * plain[row] : dots[r][row];
      }
    }
    now = next;
  }
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      for (int i = 16; i > 0; i /= 2) products[r][row] += __shfl_xor_sync(0xffffffff, products[r][row], i);
      if (lane == 0) partial[(warp * R + r) * ROWS + row] = products[r][row];
    }
  }
  if (parts > 1) __syncthreads(); else __syncwarp();
  if (ends) {
    for (int i = 0; i < parts; i++) {
      value += partial[((warp + i) * R + o) * ROWS + end_row];
      if (GATED) up += partial[((warp + i) * R + EACH + o) * ROWS + end_row];
    }
    value = (float)(T)value;
    if (ACTIVATION == 1) value = value * 0.5f * (1.f + erff(value * 0.70710678f));
    if (ACTIVATION == 2) {
      const float inner = 0.79788456f * (value + 0.044715f * value * value * value);
      value = value * 0.5f * (1.f + tanhf(inner));
    }
    if (ACTIVATION == 3) value = value / (1.f + expf(-value));
    if (ACTIVATION == 4) value = value < 0.f ? 0.f : value;
    if (GATED) value = (float)(T)value * (float)(T)up;
    if (RESIDUAL) value = (float)(T)value + added;
    out[(size_t)end_row * outputs + n] = (T)value;
  }
  if (parts > 1) __syncthreads(); else __syncwarp();
}
"""
_INPUTS = ["x", "weight", "scales", "biases", "bias", "norm_weight", "norm_bias", "residual"]


class Norm(NamedTuple):
    """A normalization of the inputs: `kind` is "layer", "rms" or "rms_offset", which multiplies by 1 + weight."""

    kind: str
    weight: Array
    bias: Array | None
    eps: float


class Packed(NamedTuple):
    """What describes packed numbers: `scales` and `biases` `[out, in / group_size]`, and the settings."""

    scales: Array
    biases: Array
    bits: int
    group_size: int


class Blocks(NamedTuple):
    """The parts of a product that thread blocks compute.

    Attributes:
        rows: Rows that the kernel is compiled for; those that are missing are zero.
        outputs: Rows of the weight that a warp multiplies.
        parts: Warps that share the inputs of these outputs.
        teams: Number of such groups of warps in a block.
        number: Number of blocks.
        shared_memory: Bytes of each block, one of `SHARED_MEMORY`.
    """

    rows: int
    outputs: int
    parts: int
    teams: int
    number: int
    shared_memory: int


def fused_linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    norm: Norm | None = None,
    activation: str | None = None,
    is_gated: bool = False,
    residual: Array | None = None,
    packed: Packed | None = None,
    blocks: Blocks | None = None,
) -> Array:
    """Computes residual + activation(norm(x) W^T + b), rounded where the separate operations round.

    Args:
        x: `[..., in]`, where `in` is a multiple of 8.
        weight: `[out, in]` in the dtype of x, or packed numbers. If it is gated, its first half is that of the gate,
            and the result is activation(gate) * up, `[..., out / 2]`.
        bias: `[out]`.
        norm: The norm of x; None: x is used as it is.
        activation: See `icenet.nn.activation`; None: none.
        is_gated: See `weight`.
        residual: Added to the result, with its shape.
        packed: None: the weight is not packed.
        blocks: None: `choose_blocks`.

    Returns:
        `[..., out]` in the dtype of x.
    """
    size = x.shape[-1]
    outputs = weight.shape[0] // (2 if is_gated else 1)
    if blocks is None:
        bits = 0 if packed is None else packed.bits
        blocks = choose_blocks(x.size // size, outputs, size, is_gated, x.itemsize, bits, limits())
    assert blocks is not None
    [out] = _kernel(blocks.shared_memory)(
        inputs=[
            *(x, weight, *((x, x) if packed is None else packed[:2]), x if bias is None else bias),
            *(x if norm is None else norm.weight, x if norm is None or norm.bias is None else norm.bias),
            x if residual is None else residual,
        ],
        template=[
            ("T", x.dtype),
            ("ROWS", blocks.rows),
            ("OUTPUTS", blocks.outputs),
            ("BITS", 0 if packed is None else packed.bits),
            ("GROUP", 1 if packed is None else packed.group_size),
            ("NORM", 0 if norm is None else KINDS.index(norm.kind)),
            ("NORM_BIAS", norm is not None and norm.bias is not None),
            ("EPS", 0 if norm is None else struct.unpack("<i", struct.pack("<f", norm.eps))[0]),
            ("BIAS", bias is not None),
            ("ACTIVATION", ACTIVATIONS.index(activation or "none")),
            ("GATED", is_gated),
            ("RESIDUAL", residual is not None),
        ],
        grid=(32 * blocks.number, blocks.parts, blocks.teams),
        threadgroup=(32, blocks.parts, blocks.teams),
        output_shapes=[(*x.shape[:-1], outputs)],
        output_dtypes=[x.dtype],
    )
    return out


@lru_cache
def choose_blocks(
    rows: int, outputs: int, size: int, is_gated: bool, itemsize: int, bits: int, limits: Limits | None
) -> Blocks | None:
    """Returns the parts of a product that thread blocks compute; None if the kernel cannot compute it.

    Warps share outputs if there are too few outputs for all warps of a GPU, and blocks are small if there are too few
    for all multiprocessors.
    """
    if limits is None or size % (32 if bits else 8):
        return None
    padded = 1 << (rows - 1).bit_length()
    each = 4 if 0 < bits <= 4 and padded <= 2 else 2
    step = PACKED_STEP if bits else STEP
    steps = -(-size // step)
    needed = 4 * (WARPS * each * padded + WARPS * padded) + padded * steps * step * itemsize
    shared_memory = next((most for most in SHARED_MEMORY if needed <= most), None)
    if shared_memory is None or shared_memory > limits.shared_memory:
        return None
    groups = -(-outputs // (each // 2 if is_gated else each))
    parts = max(1, min(steps, WARPS, -(-limits.multiprocessors * WARPS // groups)))
    teams = max(1, min(WARPS // parts, -(-groups // limits.multiprocessors)))
    count = -(-groups // teams)
    count = -(-count // -(-count // (BLOCKS_OF_A_PROCESSOR * limits.multiprocessors)))
    return Blocks(padded, each, parts, teams, count, shared_memory)


def most_rows(x: Array) -> int:
    """Returns the number of rows up to which the kernel is used. With more, the sums do not fit in registers."""
    return 8 if is_half(x) else 4


def can_compute(x: Array, weight: Array, packed: Packed | None = None) -> bool:
    """Returns whether the kernel computes a product of these arrays: on CUDA, for few rows and of these sizes."""
    size = x.shape[-1]
    if x.size == 0 or x.size > most_rows(x) * size or x.dtype not in (mx.float32, mx.float16, mx.bfloat16):
        return False
    if packed is None and weight.dtype != x.dtype:
        return False
    bits = 0 if packed is None else packed.bits
    return choose_blocks(x.size // size, weight.shape[0], size, False, x.itemsize, bits, limits()) is not None


def packed_weight(layer: Any) -> Packed | None:
    """Returns the scales and biases of a quantized layer; None for a layer with a floating weight."""
    return Packed(layer.scales, layer.biases, layer.bits, layer.group_size) if "scales" in layer else None


def limits() -> Limits | None:
    """Returns what the kernel may use on the GPU; None where it is not used."""
    return None if on_cpu() or not mx.cuda.is_available() else device_limits()


@lru_cache
def _kernel(shared_memory: int) -> Any:
    name = f"icenet_linear_{shared_memory}"
    source = "\n".join(line.strip() for line in _SOURCE.splitlines())  # MLX hashes it at each launch
    return mx.fast.cuda_kernel(name, _INPUTS, ["out"], source, _HEADER, shared_memory=shared_memory)
