"""How the kernels of MLX's recurrent layers divide the units and the rows among thread blocks and warps.

Shapes: B rows, H hidden_size, G gates, K values per row that a step reads (H forward, G*H backward).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

from icenet.nn.device_limits import Limits

LANES = 32
"""Threads of a warp (CUDA) or of a SIMD group (Metal)."""
WARPS = 8
"""Warps of a thread block. With 256 threads, each may use 255 registers, the most there is, so any launch fits."""


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
