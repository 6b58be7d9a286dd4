"""Tables of the angles of rotary positions: their base theta."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from icenet_torch.tools.variants.variant import Run, Variant

THETA = (10000.0, 500000.0, 1000000.0, 100000.0, 1000.0, 160000.0, 100.0)
"""Bases of published models."""


def _frequencies(table: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Returns "cos", "sin" or "angle", and the frequencies of a table [..., T, D] of positions; None for others."""
    array = np.asarray(table, np.float64)
    while array.ndim > 2 and (array.shape[0] == 1 or np.array_equal(array[0], array[-1])):
        array = array[0]
    if array.ndim == 3 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 2 or len(array) < 3:
        return None
    positions = np.arange(len(array))[:, None]
    for kind, inverse, function in (("cos", np.arccos, np.cos), ("sin", np.arcsin, np.sin), ("angle", None, None)):
        first = np.clip(array[1], -1, 1) if inverse is not None else array[1]
        frequencies = inverse(first) if inverse is not None else first
        values = positions * frequencies if function is None else function(positions * frequencies)
        if frequencies.max() > 0.5 and (frequencies > 0).all() and np.abs(values - array).max() < 1e-2:
            return kind, frequencies
    return None


def _base(frequencies: np.ndarray) -> float | None:
    """Returns the base of frequencies base^(-k / n); None if they are others."""
    values = np.unique(np.round(np.log(frequencies), 3))[::-1]
    if len(values) < 2 or abs(values[0]) > 1e-3:
        return None
    logs = -values * len(values)
    steps = logs / np.maximum(np.arange(len(values)), 1)
    base = float(np.exp(np.median(steps[1:])))
    return base if base > 10 and np.allclose(steps[1:], steps[1], rtol=2e-2) else None


def with_theta(table: np.ndarray, theta: float) -> tuple[np.ndarray, float] | None:
    """Returns a table of angles, their cosines or sines with another base, and the base that it has."""
    found = _frequencies(table)
    old = _base(found[1]) if found is not None else None
    if found is None or old is None:
        return None
    kind, frequencies = found
    count = len(np.unique(np.round(np.log(frequencies), 3)))
    old = min((t for t in THETA if abs(math.log(t / old)) < 0.05), default=old)
    places = np.round(-np.log(frequencies) / math.log(old) * count)
    length = next(axis for axis in range(table.ndim - 2, -1, -1) if table.shape[axis] > 1)
    angles = np.arange(table.shape[length])[:, None] * theta ** (-places / count)
    values = angles if kind == "angle" else getattr(np, kind)(angles)
    shape = [1] * table.ndim
    shape[length], shape[-1] = values.shape
    return np.broadcast_to(values.reshape(shape), table.shape), old


def theta_variants(others: Sequence[float]) -> list[Variant]:
    """Returns the variants of the base of the angles that a module gets as tables of cosines and sines.

    Args:
        others: Numbers that the module under test holds.
    """

    def turned(theta: float) -> Run:
        def change(item: Any) -> Any:
            if not isinstance(item, torch.Tensor) or not item.is_floating_point() or item.ndim < 2:
                return item
            found = with_theta(item.detach().cpu().double().numpy(), theta)
            return item if found is None else torch.from_numpy(np.array(found[0])).to(item)

        def run(func: Any, args: Any, kwargs: Any) -> Any:
            changed = tuple(map(change, args))
            is_same = all(x is y for x, y in zip(changed, args, strict=True))
            return NotImplemented if is_same else func(*changed, **kwargs)

        return run

    bases = dict.fromkeys((*(float(n) for n in others if n >= 100), *THETA))
    return [
        Variant(f"theta is {theta:g} in a, another in b", frozenset({"mul", "rmul"}), turned(theta))
        for theta in bases
    ]
