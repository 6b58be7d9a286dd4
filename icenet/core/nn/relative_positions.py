"""Groups of distances between tokens, for learned biases of attention scores (Raffel et al., "T5", 2020)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def distance_buckets(length: int, buckets: int, max_distance: int) -> NDArray[np.int32]:
    """Returns the group of each distance from a query to a key, int32 `[2 * length - 1]`.

    Half of the groups are for keys after the query. In each half, the first groups have one distance each, and
    as many divide the distances up to `max_distance` evenly on a logarithmic scale.

    Args:
        length: Largest number of tokens. The distances are 1 - length to length - 1.
        buckets: Number of groups.
        max_distance: Distances from here on are in the last group.
    """
    exact = buckets // 4
    edges = [_first_distance(k, exact, max_distance) for k in range(1, exact)]
    distances = np.arange(length)
    groups = np.where(distances < exact, distances, exact + np.searchsorted(edges, distances, side="right"))
    before = groups.astype(np.int32)
    return np.concatenate([before[:0:-1], before[:1], before[1:] + np.int32(buckets // 2)])


def _first_distance(group: int, exact: int, max_distance: int) -> int:
    """Returns the least n with n / exact >= (max_distance / exact)^(group / exact), without rounding."""
    edge = exact ** (exact - group) * max_distance**group
    n = int(exact * (max_distance / exact) ** (group / exact))
    while n**exact < edge:
        n += 1
    while (n - 1) ** exact >= edge:
        n -= 1
    return n
