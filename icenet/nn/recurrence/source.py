"""The source of the kernels of MLX's recurrent layers, one for CUDA and Metal (see `icenet.nn.recurrence.kernels`).

Shapes: T steps, B rows, H hidden_size, G gates, K values per row that a step reads (H forward, G*H backward).
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

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
