"""Attention of one new token to a cache of fixed size, MLX.

MLX's fused kernel for one query takes no mask in its CUDA build, so a captured step would compute the scores, the
mask, the softmax and the sum with about ten kernels, over the whole buffer. The time per token there is that of
submitting kernels, 5 to 15 microseconds each. The kernel below needs one (two for long buffers), and reads only the
columns that have tokens. On Metal the fused kernel takes masks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.core.config.transformer_plan import AttentionPlan
from icenet.nn.arrays import Array, on_cpu

COLUMNS_OF_A_BLOCK = 1024
"""Length of a buffer above which several thread blocks share the columns of a head."""
LARGEST_HEAD = 256

# One thread block computes one head of queries of one row over a part of the columns. Each of its warps takes every
# 16th column and keeps a running maximum, sum and weighted sum of the values (Milakov and Gimelshein, 2018). The new
# column is read from `k` and `v`, because another block may store it later.
#
# The blocks write the new column into `keys` and `values`, which are inputs. As an output, MLX would copy the buffers
# whenever the step before has not ended. No kernel of the step reads that column, and the following step begins after
# this one, because it needs its token.
_ATTEND = """
    constexpr int WARPS = 16;
    constexpr int VALUES = (E + 31) / 32;  // of a head, for each thread
    const int head = blockIdx.x, row = blockIdx.y, part = blockIdx.z;
    const int kv_head = head / (H / K);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int last = position[PER_ROW ? row : 0];
    int first = PADDED ? padding[row] : 0;
    if (WINDOW > 0) first = max(first, last - WINDOW + 1);
    const int share = max((last - first + PARTS - 1) / PARTS, 0);
    const int begin = first + part * share, end = min(begin + share, last);

    // rotates a value of a head as `rotate` does; SIZE values are rotated, in pairs of neighbours or of halves
    const float* angle = angles + (ANGLES_PER_ROW ? row * 3 * (SIZE / 2) : 0);
    auto rotated = [&](const T* x, int e) -> float {
      if (e >= SIZE) return (float)x[e];
      const int pair = NEIGHBOURS ? e / 2 : e % (SIZE / 2);
      const bool is_first = NEIGHBOURS ? e % 2 == 0 : e < SIZE / 2;
      const int other = NEIGHBOURS ? e ^ 1 : (is_first ? e + SIZE / 2 : e - SIZE / 2);
      const float sine = angle[(is_first ? 1 : 2) * (SIZE / 2) + pair];
      return (float)(T)((float)x[e] * angle[pair] + (float)x[other] * sine);
    };

    const T* query_row = q + row * q_strides[0] + head * q_strides[1];
    const T* new_key = k + row * k_strides[0] + kv_head * k_strides[1];
    const T* new_value = v + row * v_strides[0] + kv_head * v_strides[1];
    const size_t buffer = (size_t)(row * K + kv_head) * S * E;
    float query[VALUES], sum[VALUES], total = 0.f, top = -INFINITY;
    for (int i = 0; i < VALUES; i++) {
      const int e = lane + 32 * i;
      query[i] = e < E ? rotated(query_row, e) * constants[0] : 0.f;
      sum[i] = 0.f;
    }
    auto add = [&](float score, const T* value) {
      for (int offset = 16; offset > 0; offset /= 2) score += __shfl_xor_sync(0xffffffff, score, offset);
      if (CAPPED) score = constants[1] * tanhf(score / constants[1]);
      const float higher = fmaxf(top, score), keep = expf(top - higher), weight = expf(score - higher);
      total = total * keep + weight;
      top = higher;
      for (int i = 0; i < VALUES; i++) {
        const int e = lane + 32 * i;
        if (e < E) sum[i] = sum[i] * keep + weight * (float)value[e];
      }
    };
    for (int column = begin + warp; column < end; column += WARPS) {
      const T* key = keys + buffer + (size_t)column * E;
      float score = 0.f;
      for (int i = 0; i < VALUES; i++) {
        const int e = lane + 32 * i;
        if (e < E) score += query[i] * (float)key[e];
      }
      add(score, values + buffer + (size_t)column * E);
    }
    if (part == 0 && warp == 0) {
      T* stored_key = const_cast<T*>(keys) + buffer + (size_t)last * E;
      T* stored_value = const_cast<T*>(values) + buffer + (size_t)last * E;
      float score = 0.f;
      for (int i = 0; i < VALUES; i++) {
        const int e = lane + 32 * i;
        if (e < E) {
          const float key = rotated(new_key, e);
          score += query[i] * key;
          if (head % (H / K) == 0) {
            stored_key[e] = (T)key;
            stored_value[e] = new_value[e];
          }
        }
      }
      add(score, new_value);
    }

    __shared__ float tops[WARPS], totals[WARPS], sums[WARPS][E];
    if (lane == 0) {
      tops[warp] = top;
      totals[warp] = total;
    }
    for (int i = 0; i < VALUES; i++) {
      const int e = lane + 32 * i;
      if (e < E) sums[warp][e] = sum[i];
    }
    __syncthreads();
    top = -INFINITY;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w]);
    total = 0.f;
    for (int w = 0; w < WARPS; w++) total += top == -INFINITY ? 0.f : totals[w] * expf(tops[w] - top);
    const size_t place = (size_t)(row * H + head) * PARTS + part;
    for (int e = threadIdx.x; e < E; e += 32 * WARPS) {
      float joined = 0.f;
      for (int w = 0; w < WARPS; w++) joined += top == -INFINITY ? 0.f : sums[w][e] * expf(tops[w] - top);
      if (PARTS == 1) {
        out[place * E + e] = (R)(joined / total);
      } else {
        out[place * (E + 2) + e] = (R)joined;
      }
    }
    if (PARTS > 1 && threadIdx.x == 0) {
      out[place * (E + 2) + E] = (R)total;
      out[place * (E + 2) + E + 1] = (R)top;
    }
"""

# The parts of a head: sums `[E]`, their total weight and their maximum, fp32 `[B * H, PARTS, E + 2]`.
_JOIN = """
    const float* part = parts + (size_t)blockIdx.x * PARTS * (E + 2);
    float top = -INFINITY, total = 0.f, sum = 0.f;
    for (int i = 0; i < PARTS; i++) top = fmaxf(top, part[i * (E + 2) + E + 1]);
    for (int i = 0; i < PARTS; i++) {
      const float weight = expf(part[i * (E + 2) + E + 1] - top);
      total += part[i * (E + 2) + E] * weight;
      if (threadIdx.x < E) sum += part[i * (E + 2) + threadIdx.x] * weight;
    }
    if (threadIdx.x < E) out[(size_t)blockIdx.x * E + threadIdx.x] = (T)(sum / total);
"""


def has_cached_attention(buffer: Array, columns: int) -> bool:
    """Returns whether `cached_attention` can read a buffer: for one query of each row, on CUDA.

    Args:
        buffer: Keys, `[B, K, S, E]`.
        columns: Number of queries of each row.
    """
    return columns == 1 and buffer.shape[-1] <= LARGEST_HEAD and not on_cpu() and mx.cuda.is_available()


def cached_attention(
    q: Array,
    k: Array,
    v: Array,
    keys: Array,
    values: Array,
    position: Array,
    padding: Array | None,
    angles: Array | None,
    plan: AttentionPlan,
) -> Array:
    """Stores the keys and values of one token of each row in the buffers, and attends to all tokens of the row.

    Queries and keys are rotated before.

    Args:
        q: Queries, `[B, H, 1, E]`.
        k, v: Keys and values of the tokens, `[B, K, 1, E]`.
        keys, values: Buffers, `[B, K, S, E]`, contiguous. They are written to.
        position: Column of the new token, int32 `[1]` or `[B]`.
        padding: Number of columns of padding on the left of each row, int32 `[B]`; None without padding.
        angles: See `rotate`; None without rotary positions.
        plan: Its scale, softcap, window and pairs of rotary positions are used.

    Returns:
        `[B, H, 1, E]` in the dtype of q.
    """
    batch, heads, _, size = q.shape
    columns = keys.shape[2]
    parts = -(-columns // COLUMNS_OF_A_BLOCK)
    constants = _constants(size**-0.5 if plan.scale is None else plan.scale, plan.softcap or 0.0)
    result = q.dtype if parts == 1 else mx.float32
    template = [
        ("T", q.dtype),
        ("R", result),
        ("H", heads),
        ("K", k.shape[1]),
        ("E", size),
        ("S", columns),
        ("PARTS", parts),
        ("SIZE", 0 if angles is None else 2 * angles.shape[-1]),
        ("NEIGHBOURS", plan.rotary_pairs == "interleaved"),
        ("ANGLES_PER_ROW", angles is not None and angles.shape[0] > 1),
        ("WINDOW", plan.window or 0),
        ("PADDED", padding is not None),
        ("PER_ROW", position.shape[0] > 1),
        ("CAPPED", plan.softcap is not None),
    ]
    [out] = _kernels()[0](
        inputs=[
            *(q, k, v, keys, values, constants, position),
            position if padding is None else padding,
            constants if angles is None else angles,
        ],
        template=template,
        grid=(heads * 512, batch, parts),
        threadgroup=(512, 1, 1),
        output_shapes=[(batch, heads, 1, size) if parts == 1 else (batch, heads, parts, size + 2)],
        output_dtypes=[result],
    )
    if parts == 1:
        return out
    [out] = _kernels()[1](
        inputs=[out],
        template=[("T", q.dtype), ("E", size), ("PARTS", parts)],
        grid=(batch * heads * LARGEST_HEAD, 1, 1),
        threadgroup=(LARGEST_HEAD, 1, 1),
        output_shapes=[(batch, heads, 1, size)],
        output_dtypes=[q.dtype],
    )
    return out


@lru_cache
def _kernels() -> tuple[Any, Any]:
    names = ["q", "k", "v", "keys", "values", "constants", "position", "padding", "angles"]
    attend = mx.fast.cuda_kernel("icenet_attend", names, ["out"], _ATTEND, ensure_row_contiguous=False)
    join = mx.fast.cuda_kernel("icenet_join_attention", ["parts"], ["out"], _JOIN)
    return attend, join


@lru_cache
def _constants(scale: float, softcap: float) -> Array:
    constants = mx.array([scale, softcap], mx.float32)
    mx.eval(constants)  # not lazy: another thread may use it
    return constants
