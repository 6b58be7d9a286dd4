"""The first and the last step of a token on CUDA, MLX: the row of a packed embedding, and the choice of the token.

The host decides the time of a token of a small model: MLX needs 3 to 5 us for each operation (H200). It computes the
row with four operations, and the best token and its score with two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array, is_half
from icenet.nn.linear_kernels import Packed, limits

# Each thread unpacks 8 values. They have one scale, because a group has 32 values or more.
_ROW = """
    const size_t row = (unsigned)ids[blockIdx.x];
    const T* scales = (const T*)(packed + (size_t)ROWS * D / 32 * BITS);
    const T* biases = scales + (size_t)ROWS * D / GROUP;
    for (int d = threadIdx.x * 8; d < D; d += 1024) {
      const size_t at = row * D + d;
      const float scale = (float)scales[at / GROUP], bias = (float)biases[at / GROUP];
      const unsigned* words = packed + at / 32 * BITS;
      for (int i = 0; i < 8; i++) {
        const int bit = (d % 32 + i) * BITS, shift = bit % 32;
        unsigned number = words[bit / 32] >> shift;
        if (shift + BITS > 32) number |= words[bit / 32 + 1] << (32 - shift);
        out[(size_t)blockIdx.x * D + d + i] = (T)(scale * (float)(number & ((1u << BITS) - 1)) + bias);
      }
    }
"""

# One block reads the scores of a row. NaN counts as the largest score; of equal ones, the first is chosen.
_BEST = """
    __shared__ float scores_of_threads[1024];
    __shared__ unsigned tokens_of_threads[1024];
    const T* row = scores + (size_t)blockIdx.x * V;
    float most = -INFINITY;
    unsigned chosen = threadIdx.x;
    #pragma unroll 8
    for (int i = threadIdx.x; i < V; i += 1024) {
      const float score = (float)row[i];
      if (score > most || score != score) most = score, chosen = i;
    }
    scores_of_threads[threadIdx.x] = most;
    tokens_of_threads[threadIdx.x] = chosen;
    for (int half = 512; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) {
        const float other = scores_of_threads[threadIdx.x + half];
        const unsigned its = tokens_of_threads[threadIdx.x + half];
        if (other > most || other != other || (other == most && its < chosen)) most = other, chosen = its;
        scores_of_threads[threadIdx.x] = most;
        tokens_of_threads[threadIdx.x] = chosen;
      }
    }
    if (threadIdx.x == 0) {
      token[blockIdx.x] = min(chosen, (unsigned)V - 1);
      best[blockIdx.x] = most;
    }
"""


def packed_rows(ids: Array, rows: int, size: int, packed: Packed) -> Array | None:
    """Returns rows of a packed table, `mx.dequantize` of the rows: ids `[...]` to `[..., D]`.

    Args:
        ids: int32 or uint32, below `rows`.
        rows, size: Shape of the table, `[V, D]`.
        packed: Its settings, and its numbers, scales and biases in one array.

    Returns:
        The rows in the dtype of the scales; None if the kernel cannot compute them.
    """
    is_supported = is_half(packed.scales) or packed.scales.dtype == mx.float32
    if packed.joined is None or limits() is None or not is_supported or ids.dtype not in (mx.int32, mx.uint32):
        return None
    [out] = _kernel("packed_rows", ("ids", "packed"), ("out",), _ROW)(
        inputs=[ids, packed.joined],
        template=[
            ("T", packed.scales.dtype),
            ("ROWS", rows),
            ("D", size),
            ("BITS", packed.bits),
            ("GROUP", packed.group_size),
        ],
        grid=(ids.size * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(*ids.shape, size)],
        output_dtypes=[packed.scales.dtype],
    )
    return out  # type: ignore[no-any-return]


def best_token(scores: Array) -> tuple[Array, Array]:
    """Returns the token with the highest score of each row, uint32 `[B]`, and that score, `[B]`.

    The score is NaN if one of the row is; the token is then any.

    Args:
        scores: `[B, V]`.
    """
    if limits() is None:
        # of half precision, MLX's functions take four times as long on a CPU (50,257 scores: 330 and 76 us)
        scores = scores.astype(mx.float32)
        return scores.argmax(-1), scores.max(-1)  # argmax passes over NaN, max does not
    batch, size = scores.shape
    found = _kernel("best_token", ("scores",), ("token", "best"), _BEST)(
        inputs=[scores],
        template=[("T", scores.dtype), ("V", size)],
        grid=(batch * 1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(batch,), (batch,)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    return found[0], found[1]


@lru_cache
def _kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str) -> Any:
    return mx.fast.cuda_kernel(f"icenet_{name}", list(inputs), list(outputs), source)
