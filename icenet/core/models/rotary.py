"""Rotary positions (Su et al., "RoFormer", 2021): tables of cosines and sines, and scaling for longer contexts.

A pair of values of a query or key at position p is rotated by the angle p * frequency. The product of a query and a
key then depends on the difference of their positions.

Scaling: linear (Chen et al., 2023), YaRN (Peng et al., 2023), and that of Llama 3.1 (Grattafiori et al., 2024).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import RotaryScaling

Floats = NDArray[np.float32]


def rotary_table(length: int, size: int, theta: float, scaling: RotaryScaling | None = None) -> Floats:
    """Returns cosines and sines of the angles of each position, float32 `[length, 2, size / 2]`.

    They are computed in float64 from angles in float32, because the frameworks' sines of large angles differ.
    """
    factor = 1.0 if scaling is None else attention_factor(scaling)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies(size, theta, scaling)
    exact = angles.astype(np.float64)
    return np.stack([np.cos(exact), np.sin(exact)], axis=1).astype(np.float32) * np.float32(factor)


def frequencies(size: int, theta: float, scaling: RotaryScaling | None = None) -> Floats:
    """Returns theta^(-2i / size) for each of the size / 2 pairs, float32 `[size / 2]`, scaled for longer contexts.

    Each operation is rounded to float32 as in Hugging Face's models: at position 5,000 the rounding of a frequency
    changes an angle by up to 3e-4.
    """
    exponents = np.arange(0, size, 2).astype(np.float32) / np.float32(size)
    powers = np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    if scaling is None:
        return plain
    slow = plain / np.float32(scaling.factor)
    if scaling.type == "linear":
        return slow
    assert scaling.original_length is not None
    if scaling.type == "yarn":
        ramp = _yarn_ramp(size, theta, scaling, scaling.original_length)
        return np.float32(1) / (np.float32(scaling.factor) * powers) * ramp + plain * (np.float32(1) - ramp)
    return _llama3(plain, slow, scaling, scaling.original_length)


def attention_factor(scaling: RotaryScaling) -> float:
    """Returns the factor of queries and keys. YaRN's is 0.1 ln(factor) + 1 by default."""
    if scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0


def _llama3(plain: Floats, slow: Floats, scaling: RotaryScaling, length: int) -> Floats:
    """Returns the frequencies of Llama 3.1.

    Wavelengths below length / high_frequency_factor are kept, those above length / low_frequency_factor are scaled,
    and those between are interpolated.
    """
    low, high = np.float32(scaling.low_frequency_factor), np.float32(scaling.high_frequency_factor)
    turns = np.float32(length) / (np.float32(2 * math.pi) / plain)  # in the original context
    share = (turns - low) / (high - low)
    between = (np.float32(1) - share) * plain / np.float32(scaling.factor) + share * plain
    return np.where(turns < low, slow, np.where(turns > high, plain, between))


def _yarn_ramp(size: int, theta: float, scaling: RotaryScaling, length: int) -> Floats:
    """Returns which part of each frequency is scaled, from 0 (beta_fast turns and more) to 1 (beta_slow and less)."""

    def pair_of(turns: float) -> float:
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    pairs = np.arange(size // 2, dtype=np.float32)
    span = last - first if last != first else 0.001
    return np.clip((pairs - np.float32(first)) / np.float32(span), 0, 1)
