"""Rotary positions (Su et al., "RoFormer", 2021): tables of cosines and sines, and scaling for longer contexts.

A pair of values of a query or key at position p is rotated by the angle p * frequency. The product of a query and a
key then depends on the difference of their positions.

Scaling: linear (Chen et al., 2023), dynamic NTK (bloc97 and emozilla, 2023), YaRN (Peng et al., 2023), LongRoPE (Ding
et al., 2024), and that of Llama 3.1 (Grattafiori et al., 2024). With dynamic and longrope the frequencies depend on
the number of tokens in the row. Keys in a cache stay as they are; long-rope's are computed again when the row becomes
longer than the original context (see `RotaryRows.switch`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import RotaryScaling
from icenet.core.config.transformer_plan import LayerType, RotaryPlan
from icenet.core.nn.position_tables import TableBase

Floats = NDArray[np.float32]


class RotaryRows:
    """The rows of the table of a model's rotary positions, and which of them belong to a token.

    A row has the cosines and sines of a position, float32 `[2, R / 2]`. Long-rope has `original_length` rows for
    texts of at most that length, then those for longer ones. Dynamic scaling has other angles for each number of
    tokens: its rows are frequencies, float32 `[R / 2]`, for original_length, original_length + 1, ... tokens.

    Args:
        plan: Size, base and scaling.
    """

    def __init__(self, plan: RotaryPlan) -> None:
        self.plan = plan
        self.kind = "default" if plan.scaling is None else plan.scaling.type
        self.factor = np.float32(attention_factor(plan.scaling))

    @property
    def is_dynamic(self) -> bool:
        """Whether the rows are frequencies."""
        return self.kind == "dynamic"

    @property
    def switch(self) -> int | None:
        """Number of tokens in a row above which the angles of earlier tokens are others; None if there is none."""
        return self._original_length if self.kind == "longrope" else None

    @property
    def _original_length(self) -> int:
        assert self.plan.scaling is not None and self.plan.scaling.original_length is not None
        return self.plan.scaling.original_length

    def count(self, length: int) -> int:
        """Returns the number of rows that texts of at most `length` tokens need."""
        if self.is_dynamic:
            return max(length - self._original_length, 0) + 1
        has_two_tables = self.kind == "longrope" and length > self._original_length
        return length + self._original_length if has_two_tables else length

    def index(self, positions: Any, lengths: Any) -> Any:
        """Returns the row of each token, int `[T]` or `[B, T]`; for dynamic scaling `[1]` or `[B, 1]`.

        Args:
            positions: Position of each token, int `[T]` or `[B, T]`, a native array.
            lengths: Number of tokens of each row, int `[1]` or `[B, 1]`, a native array.
        """
        if self.is_dynamic:
            return (lengths - self._original_length) * (lengths > self._original_length)
        if self.kind == "longrope":
            return positions + self._original_length * (lengths > self._original_length)
        return positions

    def make(self, start: int, stop: int) -> Floats:
        """Returns the rows from `start` to `stop`, on the host."""
        size, theta, scaling = self.plan
        if scaling is not None and self.is_dynamic:
            return _dynamic(size, theta, scaling, np.arange(start, stop) + self._original_length)
        if self.kind != "longrope":
            return self._angles(start, stop, frequencies(size, theta, scaling))
        original = self._original_length
        parts = []
        if start < original:
            parts.append(self._angles(start, min(stop, original), frequencies(size, theta, scaling, original)))
        if stop > original:
            long = frequencies(size, theta, scaling, original + 1)
            parts.append(self._angles(max(start - original, 0), stop - original, long))
        return np.concatenate(parts)

    def _angles(self, start: int, stop: int, chosen: Floats) -> Floats:
        """Returns cosines, negative sines and sines of positions, `[stop - start, 3, R / 2]`, for `rotate`.

        They are computed in float64 from angles in float32, because the frameworks' sines of large angles differ.
        """
        exact = (np.arange(start, stop, dtype=np.float32)[:, None] * chosen).astype(np.float64)
        cos, sin = np.cos(exact), np.sin(exact)
        return np.stack([cos, -sin, sin], axis=1).astype(np.float32) * self.factor


class RotaryPositionsBase(ABC):
    """The angles of the rotary positions of a model.

    Args:
        plans: Size, base and scaling for each type of layers that has rotary positions.
        max_length: Maximum number of tokens in a sequence.
    """

    table: ClassVar[type[TableBase]]
    """The table of the backend."""

    def __init__(self, plans: Mapping[LayerType, RotaryPlan], max_length: int) -> None:
        self.rows = {kind: RotaryRows(plan) for kind, plan in plans.items()}
        self.tables = {kind: self.table(rows.make, rows.count(max_length)) for kind, rows in self.rows.items()}

    @property
    def switch(self) -> int | None:
        """Number of tokens in a row above which the angles of earlier tokens are others; None if there is none."""
        return min((rows.switch for rows in self.rows.values() if rows.switch is not None), default=None)

    def reserve(self, length: int) -> None:
        """Makes the rows that sequences of at most `length` tokens need."""
        for kind, rows in self.rows.items():
            self.tables[kind].reserve(rows.count(length))

    @abstractmethod
    def angles(self, positions: Any, lengths: Any) -> dict[LayerType | None, Any]:
        """Returns the cosines, negative sines and sines for `rotate`, for each type of layers.

        It is None for layers without rotation.

        Args:
            positions: Position of each token, int `[T]` or `[B, T]`.
            lengths: Number of tokens of each row, int `[1]` or `[B, 1]`.
        """


def frequencies(size: int, theta: float, scaling: RotaryScaling | None = None, length: int = 1) -> Floats:
    """Returns theta^(-2i / size) for each of the size / 2 pairs, float32 `[size / 2]`, scaled for longer contexts.

    Each operation is rounded to float32 as in Hugging Face's models: at position 5,000 the rounding of a frequency
    changes an angle by up to 3e-4.

    Args:
        size: Number of values that are rotated.
        theta: The base.
        scaling: Scaling for longer contexts.
        length: Number of tokens in the row, for the types dynamic and longrope.
    """
    if scaling is not None and scaling.type == "dynamic":
        return _dynamic(size, theta, scaling, np.array([length]))[0]
    powers = _powers(size, np.array([theta]))[0]
    plain = np.float32(1) / powers
    if scaling is None:
        return plain
    slow = plain / np.float32(scaling.factor)
    if scaling.type == "linear":
        return slow
    assert scaling.original_length is not None
    if scaling.type == "longrope":
        factors = scaling.short_factors if length <= scaling.original_length else scaling.long_factors
        return np.float32(1) / (np.array(factors, np.float32) * powers)
    if scaling.type == "yarn":
        ramp = _yarn_ramp(size, theta, scaling, scaling.original_length)
        return np.float32(1) / (np.float32(scaling.factor) * powers) * ramp + plain * (np.float32(1) - ramp)
    return _llama3(plain, slow, scaling, scaling.original_length)


def attention_factor(scaling: RotaryScaling | None) -> float:
    """Returns the factor of queries and keys.

    By default YaRN's is 0.1 ln(factor) + 1, and that of long-rope sqrt(1 + ln(factor) / ln(original_length)).
    """
    if scaling is None or scaling.type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.type == "yarn":
        return 0.1 * math.log(scaling.factor) + 1
    assert scaling.original_length is not None
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_length))


def _powers(size: int, theta: NDArray[Any]) -> Floats:
    """Returns theta^(2i / size), float32 `[N, size / 2]`, for N bases."""
    exponents = (np.arange(0, size, 2).astype(np.float32) / np.float32(size)).astype(np.float64)
    return np.power(theta.astype(np.float32).astype(np.float64)[:, None], exponents).astype(np.float32)


def _dynamic(size: int, theta: float, scaling: RotaryScaling, lengths: NDArray[np.int64]) -> Floats:
    """Returns the frequencies for N numbers of tokens, float32 `[N, size / 2]`.

    The base is theta * (factor * length / original_length - factor + 1)^(size / (size - 2)).
    """
    assert scaling.original_length is not None
    lengths = np.maximum(lengths, scaling.original_length)
    stretched = np.float32(scaling.factor) * lengths.astype(np.float32) / np.float32(scaling.original_length)
    ratio = (stretched - np.float32(scaling.factor - 1)).astype(np.float64)
    base = np.float32(theta) * np.power(ratio, np.float64(np.float32(size / (size - 2)))).astype(np.float32)
    return np.float32(1) / _powers(size, np.where(lengths > scaling.original_length, base, np.float32(theta)))


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
