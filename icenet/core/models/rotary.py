"""Rotary positions (Su et al., "RoFormer", 2021): tables of cosines and sines.

A pair of values of a query or key at position p is rotated by the angle p * frequency. The product of a query and a
key then depends on the difference of their positions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def frequencies(size: int, theta: float) -> NDArray[np.float32]:
    """Returns theta^(-2i / size) for each of the size / 2 pairs, float32 `[size / 2]`.

    Each operation is rounded to float32 as in Hugging Face's models: at position 5,000 the rounding of a frequency
    changes an angle by up to 3e-4.
    """
    exponents = np.arange(0, size, 2).astype(np.float32) / np.float32(size)
    powers = np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers


def rotary_table(length: int, size: int, theta: float) -> NDArray[np.float32]:
    """Returns cosines and sines of the angles of each position, float32 `[length, 2, size / 2]`.

    They are computed in float64 from angles in float32, because the frameworks' sines of large angles differ.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies(size, theta)
    exact = angles.astype(np.float64)
    return np.stack([np.cos(exact), np.sin(exact)], axis=1).astype(np.float32)
