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
from icenet.nn import cuda
from icenet.nn.arrays import Array, on_cpu

COLUMNS_OF_A_BLOCK = 1024
"""Length of a buffer above which several thread blocks share the columns of a head."""
LARGEST_HEAD = 256

_SEPARATE = """
const size_t query_distance = q_strides[0], query_head_distance = q_strides[1];
const size_t key_distance = k_strides[0], key_head_distance = k_strides[1];
const size_t value_distance = v_strides[0], value_head_distance = v_strides[1];
"""
# Views of queries, keys and values, and of the result, would be a dozen operations of each layer and token for MLX.
_JOINED = """
const T *q = qkv, *k = q + H * E, *v = k + K * E;
const size_t query_distance = (H + 2 * K) * E, key_distance = query_distance, value_distance = query_distance;
const size_t query_head_distance = E, key_head_distance = E, value_head_distance = E;
"""
_MISSING = {"padding": "const int* padding = position;  // not read", "angles": "const float* angles = nullptr;"}

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


def in_device_memory(position: Array) -> Array:
    """Returns a position of all rows, int32 `[1]`, in memory of the device, `[1, 4]`; others as they are.

    MLX keeps arrays of at most 8 bytes in memory of the host. Each layer's kernel reads the position first, which
    takes 1.5 us from there (H200).
    """
    return mx.contiguous(mx.broadcast_to(position, (1, 4))) if position.shape[0] == 1 else position


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
        position: Column of the new token, int32 `[B]`, or `[1]` or `[1, 4]` of all rows (see `in_device_memory`).
        padding: Number of columns of padding on the left of each row, int32 `[B]`; None without padding.
        angles: See `rotate`; None without rotary positions.
        plan: Its scale, softcap, window and pairs of rotary positions are used.

    Returns:
        `[B, H, 1, E]` in the dtype of q.
    """
    batch, heads, _, size = q.shape
    out = _attend({"q": q, "k": k, "v": v}, batch, heads, keys, values, position, padding, angles, plan)
    return out.reshape(batch, heads, 1, size)


def joined_attention(
    qkv: Array,
    keys: Array,
    values: Array,
    position: Array,
    padding: Array | None,
    angles: Array | None,
    plan: AttentionPlan,
) -> Array:
    """Computes `cached_attention` of queries, keys and values that are side by side.

    Args:
        qkv: Queries, keys and values of the tokens, `[B, 1, (H + 2 K) E]`.
        keys, values, position, padding, angles, plan: See `cached_attention`.

    Returns:
        `[B, 1, H * E]` in the dtype of qkv.
    """
    heads = qkv.shape[-1] // keys.shape[3] - 2 * keys.shape[1]
    return _attend({"qkv": qkv}, qkv.shape[0], heads, keys, values, position, padding, angles, plan)


def _attend(
    new: dict[str, Array],
    batch: int,
    heads: int,
    keys: Array,
    values: Array,
    position: Array,
    padding: Array | None,
    angles: Array | None,
    plan: AttentionPlan,
) -> Array:
    """Returns `[B, 1, H * E]`."""
    _, kv_heads, columns, size = keys.shape
    dtype = keys.dtype
    parts = -(-columns // COLUMNS_OF_A_BLOCK)
    result = dtype if parts == 1 else mx.float32
    template = [
        ("T", dtype),
        ("R", result),
        ("H", heads),
        ("K", kv_heads),
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
        ("SCALE", cuda.bits_of_float(size**-0.5 if plan.scale is None else plan.scale)),
        ("CAP", cuda.bits_of_float(plan.softcap or 0.0)),
    ]
    optional = {"padding": padding, "angles": angles}
    inputs = {**new, "keys": keys, "values": values, "position": position}
    inputs |= {name: array for name, array in optional.items() if array is not None}
    [out] = _kernel(tuple(inputs))(
        inputs=list(inputs.values()),
        template=template,
        grid=(heads * 512, batch, parts),
        threadgroup=(512, 1, 1),
        output_shapes=[(batch, 1, heads * size) if parts == 1 else (batch, heads, parts, size + 2)],
        output_dtypes=[result],
    )
    if parts == 1:
        return out
    [out] = _join_kernel()(
        inputs=[out],
        template=[("T", dtype), ("E", size), ("PARTS", parts)],
        grid=(batch * heads * LARGEST_HEAD, 1, 1),
        threadgroup=(LARGEST_HEAD, 1, 1),
        output_shapes=[(batch, 1, heads * size)],
        output_dtypes=[dtype],
    )
    return out


def _source(names: tuple[str, ...]) -> str:
    missing = [line for name, line in _MISSING.items() if name not in names]
    return "\n".join([_JOINED if "qkv" in names else _SEPARATE, *missing, cuda.body("attention.cuh")])


@lru_cache
def _kernel(names: tuple[str, ...]) -> Any:
    """Returns the kernel with these inputs: MLX spends time on each input of a launch, and on strides."""
    is_joined = "qkv" in names
    return mx.fast.cuda_kernel("icenet_attend", list(names), ["out"], _source(names), ensure_row_contiguous=is_joined)


@lru_cache
def _join_kernel() -> Any:
    return mx.fast.cuda_kernel("icenet_join_attention", ["parts"], ["out"], _JOIN)
