"""Kernels of the recurrent layers, MLX on a GPU: all steps of a layer in one launch on CUDA, one step on Metal.

The loops of `icenet.nn.recurrent` launch about eight kernels per step, and MLX's CUDA build spends about 20
microseconds on each. Here one launch computes all steps, as cuDNN's persistent kernels do (Diamos et al., 2016).

A thread block owns some of the hidden units and some of the rows of the batch. It keeps the weights of its units in
shared memory for all steps. At each step it multiplies the values that all blocks computed in the step before (the
state in the forward pass, the gradients of the gates in the backward pass) by its weights, and computes its units.
Then the blocks with the same rows wait for each other.

One source serves CUDA and Metal. Metal guarantees no progress of all thread groups at once, so they cannot wait for
each other, and each launch computes one step. The Metal kernels are tested in an emulation only and unmeasured.

Shapes: T steps, B rows, H hidden_size, G gates, K values per row that a step reads (H forward, G*H backward).
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from string import Template
from typing import Any, NamedTuple

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.core.errors import UsageError
from icenet.nn.arrays import Array, device_index, on_cpu

LANES = 32
"""Threads of a warp (CUDA) or of a SIMD group (Metal)."""
WARPS = 8
"""Warps of a thread block. With 256 threads, each may use 255 registers, the most there is, so any launch fits."""
SMALLEST_HIDDEN_SIZE = 8
"""Metal passes arrays of fewer elements in another address space."""

# What differs between CUDA and Metal: address spaces, shared memory, shuffles, barriers and functions. `arrive` and
# `wait_for` order the memory of the device: values that a block stored before it arrived are seen after the wait.
_CUDA_HEADER = """
#define FUNCTION __device__ inline
#define DEVICE
#define SHARED
#define SHARED_ARRAY(type, name, size) __shared__ type name[size]
#define DYNAMIC_ARRAY(type, name) \\
  extern __shared__ __align__(16) unsigned char dynamic_memory[]; \\
  type* name = (type*)dynamic_memory
#define BLOCK_BARRIER __syncthreads()
#define SHUFFLE_XOR(value, mask) __shfl_xor_sync(0xffffffff, value, mask)
#define TANH tanhf
#define EXP expf
#define IS_ALIGNED(pointer, bytes) (((size_t)(pointer)) % (bytes) == 0)
"""
CUDA_ORDER = """
__device__ inline void arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" : : "l"(counter) : "memory");
}
__device__ inline void wait_for(unsigned* counter, unsigned arrivals) {
  unsigned arrived, polls = 0;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
    if (++polls > 1u << 27) __trap();  // after about a minute: an error, not a program that hangs
  } while (arrived < arrivals);
}
"""
_METAL_HEADER = """
#define FUNCTION inline
#define DEVICE device
#define SHARED threadgroup
#define SHARED_ARRAY(type, name, size) threadgroup type name[size]
#define BLOCK_BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define SHUFFLE_XOR(value, mask) simd_shuffle_xor(value, (ushort)(mask))
#define TANH metal::precise::tanh
#define EXP metal::precise::exp
#define IS_ALIGNED(pointer, bytes) true
"""
_COMMON_HEADER = """
#define SIGMOID(x) (1.f / (1.f + EXP(-(x))))
template <typename E, int N>
struct alignas(sizeof(E) * N) Vector {
  E values[N];
};
#define LOAD_VECTOR(space, E, N, pointer, aligned) \\
  ((aligned) ? *(const space Vector<E, N>*)(pointer) : load_elements<E, N>(pointer))
template <typename E, int N>
FUNCTION Vector<E, N> load_elements(const DEVICE E* pointer) {
  Vector<E, N> result;
  for (int i = 0; i < N; i++) result.values[i] = pointer[i];
  return result;
}
"""
_CUDA_START = """
    DYNAMIC_ARRAY(T, own_weights);
    const int block = blockIdx.x, blocks = gridDim.x, thread = threadIdx.x;
"""
_METAL_START = """
    const int block = threadgroup_position_in_grid.x, blocks = threadgroups_per_grid.x;
    const int thread = thread_position_in_threadgroup.x;
"""

# A warp computes the sums of M rows of the batch and of R = GATES * U rows of the weights (GATES gates of U units).
# Its lanes divide the K terms of each sum, V neighbours at a time, so that all loads of a warp are contiguous. At
# the end, each round of `SHUFFLE_XOR` halves the number of sums that a lane holds, so lane i is left with the i-th
# part of them. The warps of a block are WB along the batch, WU along the units and KS along the terms.
#
# $load reads what the units of a thread need from memory before the product, so that the latencies overlap; $cell
# computes the units.
_SKELETON = """
    constexpr int LANES = 32, THREADS = LANES * WB * WU * KS;
    constexpr int R = GATES * U, UNITS = U * WU, OWNED = UNITS * GROUPS, TILE = M * WB;
    constexpr int HELD = (M * R + LANES - 1) / LANES, SUMS = HELD * LANES;
    constexpr int OWN = (TILE * UNITS + THREADS - 1) / THREADS;
    $start
    SHARED_ARRAY(float, sums, KS * WB * WU * SUMS);
    const int steps = ${rows}_shape[0], batch = ${rows}_shape[1];
    const int warp = thread / LANES, lane = thread % LANES;
    const int split = warp % KS, warp_u = warp / KS % WU, warp_b = warp / (KS * WU);
    const int unit_blocks = (H + OWNED - 1) / OWNED, parts = blocks / unit_blocks, part = block / unit_blocks;
    const int first_owned = block % unit_blocks * OWNED;
    const int tiles = (batch + TILE - 1) / TILE, share = (tiles + parts - 1) / parts;
    const int begin = part * share * GROUPS, end = min((part + 1) * share, tiles) * GROUPS;
    const bool weight_aligned = IS_ALIGNED(weight, V * sizeof(T));

    $keep_weights
    for (int count = 0; count < steps; count++) {
      const int step = BACKWARD ? steps - 1 - count : count;
      const bool has_product = !BACKWARD || HAS_LATER || count > 0;
      const DEVICE S* read = $read;
      const bool read_aligned = count > 0 || IS_ALIGNED(read, V * sizeof(S));
      for (int index = begin; index < end; index++) {
        const int first_row = index / GROUPS * TILE, group = index % GROUPS * UNITS;
        const int first_unit = first_owned + group;
        float own[OWN][FIELDS];
        for (int o = 0; o < OWN; o++) {
          const int pair = thread + o * THREADS;
          const int row = first_row + pair / UNITS, unit = first_unit + pair % UNITS;
          if (pair < TILE * UNITS && row < batch && unit < H) {
            const size_t at = (size_t)step * batch + row;
            const size_t here = (size_t)row * H + unit;
            $load
          }
        }

        float sum[SUMS];
#pragma unroll
        for (int i = 0; i < SUMS; i++) sum[i] = 0.f;
        if (has_product) {
          for (int start = split * LANES * V; start < K; start += KS * LANES * V) {
            const int k = start + lane * V;
            if (k < K) {
              float w[R][V];
#pragma unroll
              for (int r = 0; r < R; r++) {
                const int local = r / U * OWNED + group + warp_u * U + r % U;
                Vector<T, V> loaded;
                $load_weights
#pragma unroll
                for (int v = 0; v < V; v++) w[r][v] = (float)loaded.values[v];
              }
#pragma unroll
              for (int m = 0; m < M; m++) {
                const size_t row = min(first_row + warp_b * M + m, batch - 1);
                const Vector<S, V> x = LOAD_VECTOR(DEVICE, S, V, read + row * K + k, read_aligned);
#pragma unroll
                for (int v = 0; v < V; v++) {
                  const float rounded = (float)(T)(float)x.values[v];
#pragma unroll
                  for (int r = 0; r < R; r++) sum[m * R + r] += rounded * w[r][v];
                }
              }
            }
          }
#pragma unroll
          for (int round = 0; round < 5; round++) {
            const int width = SUMS >> (round + 1), bit = 16 >> round;
            const bool upper = lane & bit;
#pragma unroll
            for (int i = 0; i < SUMS / 2; i++) {
              if (i < width) {
                const float kept = upper ? sum[i + width] : sum[i];
                const float sent = upper ? sum[i] : sum[i + width];
                sum[i] = kept + SHUFFLE_XOR(sent, bit);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < HELD; i++) sums[warp * SUMS + lane * HELD + i] = sum[i];
        BLOCK_BARRIER;

        for (int o = 0; o < OWN; o++) {
          const int pair = thread + o * THREADS, b = pair / UNITS, u = pair % UNITS;
          const int row = first_row + b, unit = first_unit + u;
          if (pair < TILE * UNITS && row < batch && unit < H) {
            const size_t at = (size_t)step * batch + row;
            const size_t here = (size_t)row * H + unit;
            float product[GATES];
            for (int g = 0; g < GATES; g++) {
              const int place = (b / M * WU + u / U) * KS * SUMS + b % M * R + g * U + u % U;
              product[g] = 0.f;
              for (int s = 0; s < KS; s++) product[g] += sums[place + s * SUMS];
            }
            $cell
          }
        }
        BLOCK_BARRIER;
      }
      $wait
    }
"""

# The weights of the units that the block owns: the first SHARED_K terms of each row stay in shared memory.
_KEEP_WEIGHTS = """
    constexpr int KEPT = SHARED_K / V, COLUMNS = KEPT > 0 ? KEPT : 1;
    for (int i = thread; i < GATES * OWNED * KEPT; i += THREADS) {
      const int local = i / COLUMNS, k = i % COLUMNS * V;
      const size_t row = local / OWNED * H + min(first_owned + local % OWNED, H - 1);
      *(Vector<T, V>*)(own_weights + local * SHARED_K + k) =
          LOAD_VECTOR(DEVICE, T, V, weight + row * K + k, weight_aligned);
    }
    BLOCK_BARRIER;
"""
_LOAD_WEIGHTS = """
                const size_t row = (size_t)(r / U) * H + min(first_unit + warp_u * U + r % U, H - 1);
                loaded = LOAD_VECTOR(DEVICE, T, V, weight + row * K + k, weight_aligned);
"""
_LOAD_OWN_WEIGHTS = f"""
                if (start < SHARED_K) {{
                  loaded = *(Vector<T, V>*)(own_weights + local * SHARED_K + k);
                }} else {{{_LOAD_WEIGHTS}
                }}
"""
# All blocks of a launch run at once: there are at most as many as multiprocessors, each of which has room for one. Of
# two launches at the same time, such as the directions of a layer, the GPU starts all blocks of one before those of
# the other. Blocks with other rows compute nothing that this one reads.
_WAIT = """
      if (count + 1 < steps) {
        if (thread == 0) {
          unsigned* counter = const_cast<unsigned*>(counters) + part;
          arrive(counter);
          wait_for(counter, (unsigned)(unit_blocks * (count + 1)));
        }
        BLOCK_BARRIER;
      }
"""


@dataclass(frozen=True)
class Cell:
    """The code of one kind of layer in one direction of time.

    Args:
        inputs: Names of the input arrays in addition to those that all cells have.
        outputs: Names of the output arrays.
        fields: Number of values that a thread loads per unit.
        load: Code that loads them into `own[o]`.
        cell: Code that computes a unit from `own[o]` and `product`.
        records: Names of outputs in training only.
        record: Code that writes them.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fields: int
    load: str
    cell: str
    records: tuple[str, ...] = ()
    record: str = ""


_IS_PADDING = "MASKED && (float)mask[at] == 0.f"

FORWARD = {
    "lstm": Cell(
        ("c",),
        ("hs", "cs"),
        6,
        """
            for (int g = 0; g < 4; g++) own[o][g] = (float)projected[at * 4 * H + g * H + unit];
            own[o][4] = (float)(step == 0 ? c[here] : RECORD ? cs[(size_t)(step - 1) * batch * H + here] : cs[here]);
            if (MASKED) own[o][5] = (float)read[here];
        """,
        f"""
            const float i = SIGMOID(own[o][0] + product[0]), f = SIGMOID(own[o][1] + product[1]);
            const float g = TANH(own[o][2] + product[2]), out = SIGMOID(own[o][3] + product[3]);
            const bool padding = {_IS_PADDING};
            const S new_c = (S)(padding ? own[o][4] : f * own[o][4] + i * g);
            const float tanh_c = TANH((float)new_c);
            hs[at * H + unit] = (S)(padding ? own[o][5] : out * tanh_c);
            cs[RECORD ? at * H + unit : here] = new_c;
        """,
        ("tanh_cs", "gates"),
        """
            tanh_cs[at * H + unit] = (S)tanh_c;
            gates[at * 4 * H + unit] = (S)i;
            gates[at * 4 * H + H + unit] = (S)f;
            gates[at * 4 * H + 2 * H + unit] = (S)g;
            gates[at * 4 * H + 3 * H + unit] = (S)out;
        """,
    ),
    "gru": Cell(
        ("bias",),
        ("hs",),
        5,
        """
            for (int g = 0; g < 3; g++) own[o][g] = (float)projected[at * 3 * H + g * H + unit];
            own[o][3] = (float)read[here];
            own[o][4] = (float)bias[unit];
        """,
        f"""
            const float r = SIGMOID(own[o][0] + product[0]), z = SIGMOID(own[o][1] + product[1]);
            const float recurrent_n = product[2] + own[o][4], n = TANH(own[o][2] + r * recurrent_n);
            hs[at * H + unit] = (S)({_IS_PADDING} ? own[o][3] : n + z * (own[o][3] - n));
        """,
        ("gates", "candidates", "recurrent"),
        """
            gates[at * 2 * H + unit] = (S)r;
            gates[at * 2 * H + H + unit] = (S)z;
            candidates[at * H + unit] = (S)n;
            recurrent[at * H + unit] = (S)recurrent_n;
        """,
    ),
    "rnn": Cell(
        (),
        ("hs",),
        2,
        """
            own[o][0] = (float)projected[at * H + unit];
            if (MASKED) own[o][1] = (float)read[here];
        """,
        f"""
            const float sum = own[o][0] + product[0];
            const float value = RELU ? (sum < 0.f ? 0.f : sum) : TANH(sum);
            hs[at * H + unit] = (S)({_IS_PADDING} ? own[o][1] : value);
        """,
    ),
}

# `later_h` and `later_c` are the gradients that bypass the gates of the step after the range; the product is added.
BACKWARD = {
    "lstm": Cell(
        ("c", "cs", "tanh_cs", "gates", "later_c"),
        ("d_gates", "carried_h", "carried_c"),
        9,
        """
            for (int g = 0; g < 4; g++) own[o][g] = (float)gates[at * 4 * H + g * H + unit];
            own[o][4] = (float)tanh_cs[at * H + unit];
            own[o][5] = (float)(step == 0 ? c[here] : cs[(at - batch) * H + unit]);
            own[o][6] = (float)d_hs[at * H + unit];
            if (MASKED) own[o][7] = (float)(count == 0 ? later_h[here] : carried_h[here]);
            own[o][8] = (float)(count == 0 ? later_c[here] : carried_c[here]);
        """,
        f"""
            const float i = own[o][0], f = own[o][1], g = own[o][2], out = own[o][3], tanh_c = own[o][4];
            const bool padding = {_IS_PADDING};
            const float dh = own[o][6] + product[0] + (MASKED ? own[o][7] : 0.f);
            const float dc = own[o][8] + (padding ? 0.f : dh * out * (1.f - tanh_c * tanh_c));
            d_gates[at * 4 * H + unit] = (S)(padding ? 0.f : dc * g * i * (1.f - i));
            d_gates[at * 4 * H + H + unit] = (S)(padding ? 0.f : dc * own[o][5] * f * (1.f - f));
            d_gates[at * 4 * H + 2 * H + unit] = (S)(padding ? 0.f : dc * i * (1.f - g * g));
            d_gates[at * 4 * H + 3 * H + unit] = (S)(padding ? 0.f : dh * tanh_c * out * (1.f - out));
            if (MASKED) carried_h[here] = (S)(padding ? dh : 0.f);
            carried_c[here] = (S)(padding ? dc : dc * f);
        """,
    ),
    "gru": Cell(
        ("h", "hs", "gates", "candidates", "recurrent"),
        ("d_gates", "d_projected", "carried_h"),
        7,
        """
            own[o][0] = (float)gates[at * 2 * H + unit];
            own[o][1] = (float)gates[at * 2 * H + H + unit];
            own[o][2] = (float)candidates[at * H + unit];
            own[o][3] = (float)recurrent[at * H + unit];
            own[o][4] = (float)(step == 0 ? h[here] : hs[(at - batch) * H + unit]);
            own[o][5] = (float)d_hs[at * H + unit];
            own[o][6] = (float)(count == 0 ? later_h[here] : carried_h[here]);
        """,
        f"""
            const float r = own[o][0], z = own[o][1], n = own[o][2];
            const bool padding = {_IS_PADDING};
            const float dh = own[o][5] + product[0] + own[o][6];
            const float d_n = padding ? 0.f : dh * (1.f - z) * (1.f - n * n);
            const S d_r = (S)(d_n * own[o][3] * r * (1.f - r));
            const S d_z = (S)(padding ? 0.f : dh * (own[o][4] - n) * z * (1.f - z));
            d_gates[at * 3 * H + unit] = d_r;
            d_gates[at * 3 * H + H + unit] = d_z;
            d_gates[at * 3 * H + 2 * H + unit] = (S)(d_n * r);
            d_projected[at * 3 * H + unit] = d_r;
            d_projected[at * 3 * H + H + unit] = d_z;
            d_projected[at * 3 * H + 2 * H + unit] = (S)d_n;
            carried_h[here] = (S)(padding ? dh : dh * z);
        """,
    ),
    "rnn": Cell(
        ("hs",),
        ("d_gates", "carried_h"),
        3,
        """
            own[o][0] = (float)hs[at * H + unit];
            own[o][1] = (float)d_hs[at * H + unit];
            if (MASKED) own[o][2] = (float)(count == 0 ? later_h[here] : carried_h[here]);
        """,
        f"""
            const float value = own[o][0], dh = own[o][1] + product[0] + (MASKED ? own[o][2] : 0.f);
            const bool padding = {_IS_PADDING};
            const float slope = RELU ? (value > 0.f ? 1.f : 0.f) : 1.f - value * value;
            d_gates[at * H + unit] = (S)(padding ? 0.f : dh * slope);
            if (MASKED) carried_h[here] = (S)(padding ? dh : 0.f);
        """,
    ),
}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


# ---- sizes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a kernel may use.

    Args:
        multiprocessors: Number of thread blocks that run at once, one on each multiprocessor.
        shared_memory: Bytes of shared memory for weights, of each block; 0 to read the weights from the device's
            memory at each step.
        rows: Largest number of rows of the batch of a warp: its sums, eight per row, must fit in registers.
        vector: Largest number of values that a thread loads at once.
    """

    multiprocessors: int
    shared_memory: int
    rows: int = 16
    vector: int = 4


@dataclass(frozen=True)
class Tiles:
    """How the units and rows are divided; the fields are the names of the kernel's constants.

    A block computes `U * WU` units and `M * WB` rows at a time. It owns GROUPS times as many units; `parts` blocks
    own the same units and other rows.
    """

    M: int
    U: int
    WB: int
    WU: int
    KS: int
    GROUPS: int
    V: int
    SHARED_K: int
    unit_blocks: int
    parts: int


@lru_cache(maxsize=256)
def choose_tiles(gates: int, hidden: int, terms: int, batch: int, item_size: int, limits: Limits) -> Tiles:
    """Returns the division with the shortest step by the estimate of `divisions`, with the same arguments."""
    return min(divisions(gates, hidden, terms, batch, item_size, limits), key=lambda found: found[0])[1]


def divisions(
    gates: int, hidden: int, terms: int, batch: int, item_size: int, limits: Limits
) -> list[tuple[float, Tiles]]:
    """Returns all divisions, each with an estimate of the time of a step, in clock cycles.

    A multiprocessor multiplies 128 pairs of numbers per cycle and reads 128 bytes from shared memory or its cache.
    From the second-level cache it reads about 48 bytes, and the waits grow with the number of blocks.

    Args:
        gates: Rows of the weights per unit: G in the forward pass, 1 in the backward pass.
        hidden: H.
        terms: K.
        batch: B.
        item_size: Bytes per weight.
        limits: What a kernel may use.
    """
    units = 2 if gates > 1 else 8  # of a warp
    rows = gates * units
    vector = next(size for size in (4, 2, 1) if hidden % size == 0 and size <= limits.vector)
    span = LANES * vector  # terms that a warp reads at once
    candidates: list[tuple[float, Tiles]] = []
    for m, (wb, wu) in itertools.product(
        (16, 8, 4), [(wb, wu) for wb in (1, 2, 4, 8) for wu in (1, 2, 4, 8) if wb * wu <= WARPS]
    ):
        groups = -(-hidden // (units * wu * limits.multiprocessors))
        unit_blocks = -(-hidden // (units * wu * groups))
        tiles = -(-batch // (m * wb))
        parts = min(tiles, limits.multiprocessors // unit_blocks)
        if m > limits.rows:
            continue
        splits = WARPS // (wb * wu)
        bytes_per_term = rows * wu * groups * item_size
        kept = min(terms, limits.shared_memory // bytes_per_term)
        if kept < terms:
            kept -= kept % span
        passes = -(-terms // (splits * span))
        multiply = passes * m * rows * vector * WARPS / 4  # four schedulers, one warp each per cycle
        read = passes * (m + rows) * -(-span * 4 // 128) * WARPS
        first_read = (m * wb * terms * 4 + (terms - kept) * bytes_per_term / groups) / 48
        reduce = 4 * m * rows * WARPS / 4
        cycles = -(-tiles // parts) * groups * (max(multiply, read) + first_read + reduce + 500) + 4 * unit_blocks
        candidates.append((cycles, Tiles(m, units, wb, wu, splits, groups, vector, kept, unit_blocks, parts)))
    return candidates


def _device_attribute(attribute: int, index: int) -> int:
    """Returns an attribute of a CUDA device from the driver; MLX does not report it."""
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    device, value = ctypes.c_int(), ctypes.c_int()
    errors = [
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), index),
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device),
    ]
    if any(errors):
        raise OSError(f"the CUDA driver returned the errors {errors}")
    return value.value


def on_metal() -> bool:
    """Returns whether MLX's GPU is Apple's."""
    return mx.metal.is_available()


@lru_cache
def device_limits(index: int = 0) -> Limits | None:
    """Returns what a kernel may use on a GPU, or None where there are no kernels."""
    if on_metal():
        return Limits(multiprocessors=64, shared_memory=0, rows=8, vector=1)
    try:
        multiprocessors = _device_attribute(16, index)  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        shared_memory = _device_attribute(97, index)  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    except (OSError, AttributeError):
        return None
    return Limits(multiprocessors, shared_memory - _BYTES_OF_SUMS)


_BYTES_OF_SUMS = 8 * 1024
"""Shared memory that a kernel needs in addition to the weights, with a margin."""


class Fused(NamedTuple):
    """Kernels that compute a loop over time.

    Args:
        forward: Returns the results, and with `record=True` also the records, each joined over the steps.
        backward: As that of the loop.
    """

    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[Any, ...]]


def are_used(projected: Array, weight: Array) -> bool:
    """Returns whether the kernels compute a layer. The environment variable ICENET_RECURRENT_KERNELS decides.

    Without it they run on CUDA, and not on Metal, where they are unmeasured. `mx.vmap` over a layer needs "off": MLX
    cannot vectorize kernels.

    Args:
        projected: Contribution of the inputs to the gates, `[T, B, G*H]`.
        weight: Recurrent weights, `[G*H, H]`.
    """
    if on_cpu() or weight.shape[1] < SMALLEST_HIDDEN_SIZE or not projected.size:
        return False
    default = "off" if on_metal() else "on"
    chosen = os.environ.get("ICENET_RECURRENT_KERNELS", default)
    if chosen not in ("on", "off"):
        raise UsageError(f"ICENET_RECURRENT_KERNELS is {chosen!r}; it must be on or off")
    return chosen == "on" and device_limits(device_index(mx.default_device())) is not None


# ---- launches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One kernel: its source and what its launches need.

    Args:
        cell: The code of its units.
        backward: Whether it runs back through time.
        record: Whether it writes the records, which the gradient needs.
        metal: Whether it is for Metal, where a launch computes one step.
    """

    cell: Cell
    backward: bool
    record: bool
    metal: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        rows = ("d_hs", "later", "later_h") if self.backward else ("projected", "h")
        names = (*rows, "weight", "mask", *self.cell.inputs)
        return names if self.metal else (*names, "counters")

    @property
    def outputs(self) -> tuple[str, ...]:
        return (*self.cell.outputs, *(self.cell.records if self.record else ()))

    @property
    def header(self) -> str:
        return _METAL_HEADER + _COMMON_HEADER if self.metal else _CUDA_HEADER + _COMMON_HEADER + CUDA_ORDER

    @property
    def source(self) -> str:
        before = "(size_t)(step + 1) * batch * K" if self.backward else "(size_t)(step - 1) * batch * H"
        first, following = ("later", "d_gates") if self.backward else ("h", "hs")
        return Template(_SKELETON).substitute(
            start=(_METAL_START if self.metal else _CUDA_START).strip(),
            rows="d_hs" if self.backward else "projected",
            read=f"count == 0 ? {first} : {following} + {before}",
            keep_weights="" if self.metal else _KEEP_WEIGHTS.strip(),
            load_weights=(_LOAD_WEIGHTS if self.metal else _LOAD_OWN_WEIGHTS).strip(),
            load=self.cell.load.strip(),
            cell=self.cell.cell.strip() + (self.cell.record if self.record else ""),
            wait="" if self.metal else _WAIT.strip(),
        )


@lru_cache(maxsize=256)
def build(kernel: Kernel, shared_memory: int) -> Any:
    """Returns MLX's callable of a kernel with this many bytes of shared memory for the weights."""
    arguments: dict[str, Any] = {
        "name": "icenet_recurrent_" + ("backward" if kernel.backward else "forward"),
        "input_names": list(kernel.inputs),
        "output_names": list(kernel.outputs),
        "source": kernel.source,
        "header": kernel.header,
    }
    if kernel.metal:
        return mx.fast.metal_kernel(**arguments)
    return mx.fast.cuda_kernel(**arguments, shared_memory=shared_memory)


@lru_cache
def _no_counters() -> Array:
    """Returns an array for a launch of one step, which needs no counters."""
    counters = mx.zeros((1,), mx.uint32)
    mx.eval(counters)  # not lazy: another thread may use it
    return counters


@lru_cache
def _zeros_kernel() -> Any:
    source = "if (threadIdx.x < SIZE) counters[threadIdx.x] = 0;"
    return mx.fast.cuda_kernel("icenet_zeros", ["after"], ["counters"], source)


def new_counters(after: Array, size: int) -> Array:
    """Returns zeros, uint32 `[size]`, for one launch.

    `mx.compile` would give equal calls of `mx.zeros` the same array, and two launches must not share it.
    """
    [counters] = _zeros_kernel()(
        inputs=[after],
        template=[("SIZE", size)],
        grid=(1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[mx.uint32],
    )
    return counters


def launch(
    kernel: Kernel, arrays: dict[str, Array], shapes: dict[str, tuple[int, ...]], **constants: Any
) -> list[Array]:
    """Runs one kernel.

    Args:
        kernel: The kernel.
        arrays: Its inputs by name; `mask` and `later` may be missing.
        shapes: Shapes of its outputs by name.
        constants: HAS_LATER and RELU.

    Returns:
        The outputs.
    """
    weight, rows = arrays["weight"], arrays["d_hs" if kernel.backward else "projected"]
    steps, batch = rows.shape[:2]
    states = rows.dtype
    hidden = shapes["carried_h" if kernel.backward else "hs"][-1]
    terms = weight.shape[1]
    gates = weight.shape[0] // hidden
    limits = device_limits(device_index(mx.default_device()))
    assert limits is not None
    if steps == 1:
        limits = replace(limits, shared_memory=0)  # each weight is read once
    tiles = choose_tiles(gates, hidden, terms, batch, weight.itemsize, limits)
    template = {
        **{"T": weight.dtype, "S": states, "GATES": gates, "H": hidden, "K": terms, "FIELDS": kernel.cell.fields},
        **{name: getattr(tiles, name) for name in ("M", "U", "WB", "WU", "KS", "GROUPS", "V", "SHARED_K")},
        **{"BACKWARD": kernel.backward, "RECORD": kernel.record, "MASKED": "mask" in arrays},
        **{"HAS_LATER": False, "RELU": False, **constants},
    }
    given = {"mask": rows, "later": rows, "later_h": rows, **arrays}
    if not kernel.metal:
        given["counters"] = new_counters(rows, tiles.parts) if steps > 1 else _no_counters()
    return build(kernel, tiles.SHARED_K * gates * tiles.U * tiles.WU * tiles.GROUPS * weight.itemsize)(
        inputs=[given[name] for name in kernel.inputs],
        template=list(template.items()),
        grid=(tiles.unit_blocks * tiles.parts * LANES * WARPS, 1, 1),
        threadgroup=(LANES * WARPS, 1, 1),
        output_shapes=[shapes[name] for name in kernel.outputs],
        output_dtypes=[states] * len(kernel.outputs),
    )


def forward(
    kind: str,
    projected: Array,
    weight: Array,
    state: tuple[Array, ...],
    mask: Array | None,
    bias: Array | None = None,
    *,
    record: bool,
    relu: bool = False,
) -> dict[str, Array]:
    """Runs a layer over all steps.

    Args:
        kind: "lstm", "gru" or "rnn".
        projected: Contribution of the inputs to the gates, `[T, B, G*H]`.
        weight: Recurrent weights `[G*H, H]`, in the dtype of products.
        state: h, and c of an LSTM, before the first step, `[B, H]` each.
        mask: bool `[T, B, 1]`, False for padding, or None.
        bias: `bias_hn` of a GRU, `[H]`.
        record: Whether to return what `backward` needs.
        relu: Whether an RNN's activation is relu.

    Returns:
        The outputs of the kernel by name, `[T, B, ...]`: `hs`; of an LSTM `cs`, which is the last c `[B, H]` without
        records; and the records.
    """
    metal = on_metal()
    kernel = Kernel(FORWARD[kind], False, record, metal)
    steps, batch, _ = projected.shape
    hidden = weight.shape[1]
    running = {"h": state[0], **({"c": state[1]} if kind == "lstm" else {})}
    fixed = {"weight": weight, **({} if bias is None else {"bias": bias})}
    results: list[dict[str, Array]] = []
    for begin, end in _ranges(steps, metal):
        widths = {"gates": (GATES[kind] if kind == "lstm" else 2) * hidden}
        shapes: dict[str, tuple[int, ...]] = {
            name: (end - begin, batch, widths.get(name, hidden)) for name in kernel.outputs
        }
        if not record and "cs" in shapes:
            shapes["cs"] = (batch, hidden)
        arrays = {"projected": projected[begin:end], **running, **fixed}
        if mask is not None:
            arrays["mask"] = mask[begin:end]
        results.append(dict(zip(kernel.outputs, launch(kernel, arrays, shapes, RELU=relu), strict=True)))
        running["h"] = results[-1]["hs"][-1]
        if kind == "lstm":
            running["c"] = results[-1]["cs"][-1] if record else results[-1]["cs"]
    joined = _join(results)
    if kind == "lstm" and not record:
        joined["cs"] = running["c"]
    return joined


def backward(
    kind: str,
    weight: Array,
    state: tuple[Array, ...],
    mask: Array | None,
    records: dict[str, Array],
    d_hs: Array,
    d_c: Array | None = None,
    *,
    relu: bool = False,
) -> dict[str, Array]:
    """Runs a layer's gradient back through all steps.

    Args:
        kind, weight, state, mask, relu: See `forward`.
        records: Results of `forward`.
        d_hs: Gradient of the outputs, `[T, B, H]`.
        d_c: Gradient of an LSTM's last c, `[B, H]`.

    Returns:
        The outputs of the kernel by name: `d_gates` `[T, B, G*H]`, the gradient of the recurrent products; of a GRU
        `d_projected`, that of the inputs' contributions (of the others they are equal); `carried_h` and `carried_c`,
        the gradients of h and c before the first step, `[B, H]`. To `carried_h` the product of the first `d_gates`
        and the weights must be added. Except for a GRU it is only set with a mask.
    """
    metal = on_metal()
    kernel = Kernel(BACKWARD[kind], True, False, metal)
    steps, batch, hidden = d_hs.shape
    # contiguous rows, so that all lanes of a warp read neighbours
    fixed = {"weight": mx.contiguous(weight.T)}
    running: dict[str, Array] = {"later_h": mx.zeros((batch, hidden), d_hs.dtype)}
    if d_c is not None:
        running["later_c"] = d_c
    first = {"h": state[0], **({"c": state[1]} if kind == "lstm" else {})}
    results: list[dict[str, Array]] = []
    for begin, end in reversed(_ranges(steps, metal)):
        shapes: dict[str, tuple[int, ...]] = {}
        for name in kernel.outputs:
            wide = (end - begin, batch, GATES[kind] * hidden)
            shapes[name] = wide if name in ("d_gates", "d_projected") else (batch, hidden)
        arrays = {"d_hs": d_hs[begin:end], **fixed, **running}
        arrays |= {name: array[begin:end] for name, array in records.items() if name in kernel.inputs}
        before = {"h": "hs", "c": "cs"}
        arrays |= {name: array if begin == 0 else records[before[name]][begin - 1] for name, array in first.items()}
        if mask is not None:
            arrays["mask"] = mask[begin:end]
        found = launch(kernel, arrays, shapes, RELU=relu, HAS_LATER=bool(results))
        results.append(dict(zip(kernel.outputs, found, strict=True)))
        running["later"], running["later_h"] = results[-1]["d_gates"][0], results[-1]["carried_h"]
        if kind == "lstm":
            running["later_c"] = results[-1]["carried_c"]
    joined = _join(results[::-1])
    return {**joined, **{name: results[-1][name] for name in joined if name.startswith("carried")}}


def _ranges(steps: int, metal: bool) -> list[tuple[int, int]]:
    """Returns the first step and the end of each launch."""
    return [(step, step + 1) for step in range(steps)] if metal else [(0, steps)]


def _join(results: list[dict[str, Array]]) -> dict[str, Array]:
    """Joins the outputs of launches along the steps."""
    if len(results) == 1:
        return results[0]
    return {name: mx.concatenate([result[name] for result in results]) for name in results[0]}
