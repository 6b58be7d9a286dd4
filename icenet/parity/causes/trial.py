"""A difference of a call, and the replays of the reference that are tried to explain it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity.calls.culprit import first_name
from icenet.parity.calls.pairs import Pair
from icenet.parity.measures import rms_distance
from icenet.parity.state import Comparison
from icenet.parity.trace import Value
from icenet.parity.yardstick import FACTOR, Judgement, judge

Array = npt.NDArray[Any]

ACCEPTED = 4 * FACTOR
"""Largest ratio with which a cause explains a difference. The noise is one run of the reference, without samples."""
_MOSTLY = 1e-3
"""Largest part of a difference that is left if a change explains most of it."""
_MOST = 800
"""Number of replays that are tried for one difference."""


class Trial:
    """A difference, and what replays of the reference must compute to explain it.

    Args:
        comparison, pair, judgements: See `suggest`.
    """

    def __init__(self, comparison: Comparison, pair: Pair, judgements: Mapping[str, Judgement]) -> None:
        self.c, self.pair = comparison, pair
        failing = [name for name, judgement in judgements.items() if not judgement.passed]
        outputs = [name for name in failing if name.startswith("output")]
        statistics = [name for name in failing if name.startswith("statistic ")]
        first = first_name(pair, judgements)
        self.name = first if first in outputs or not outputs else outputs[0]
        self.is_forward = bool(outputs or statistics)
        if not outputs and statistics:
            self.name = statistics[0]
        self.given = comparison.replay_of(pair, gradients=not self.is_forward)
        self.ours = self.named(comparison.a.replay(self.given))
        self.theirs = self.named(comparison.b_replay(self.given))
        self.exact = self.named(comparison.reference.replay(self.given))
        passing = [n for n in judgements if judgements[n].passed and n in self.exact and n in self.ours]
        kinds = ("output", "statistic") if self.is_forward else ("input", "gradient")
        self.checked = [self.name, *(n for n in passing if n.startswith(kinds) and self.exact[n].is_float)]
        self.before = self.ratio(self.exact) if self.exact[self.name].is_float else math.inf
        self.left = _MOST

    def named(self, results: Mapping[str, Value]) -> dict[str, Value]:
        return {name.replace("gradient ", "gradient:", 1): value for name, value in results.items()}

    def ratio(
        self,
        new: Mapping[str, Value],
        theirs: Mapping[str, Value] | None = None,
        own: Mapping[str, Value] | None = None,
    ) -> float:
        """Returns the largest ratio of the error of `a` to the noise, if the reference computes `new`.

        Args:
            new: What the reference computes.
            theirs: What `b` computes in the dtype under test, if that is changed in the same way; None if it is not.
            own: What `a` computes, if that is changed; None if it is not.
        """
        worst, results = 0.0, self.ours if own is None else own
        for name in self.checked:
            if name not in new:
                return math.inf
            if np.iscomplexobj(new[name].array) or (theirs is not None and name not in theirs):
                return math.inf
            exact, found = self.exact[name].array, np.asarray(new[name].array, np.float64)
            ours, stored = results[name], self.theirs[name].dtype
            if found.shape != exact.shape or ours.array.shape != found.shape:
                return math.inf
            if _overflows(found, exact, ours.array, self.c.dtype):
                return math.inf
            changed = (theirs or self.theirs)[name].array
            noise = np.asarray(changed, np.float64) - (exact if theirs is None else found)
            noise = np.where(np.isfinite(noise), noise, 0.0)  # masked values are -inf
            stored = self.c.dtype if stored == "fp64" else stored
            worst = max(worst, judge(ours.array, found + noise, found, self.c.dtype, stored=stored).ratio)
            if worst > ACCEPTED:
                break
        return worst

    def explains(self, new: Mapping[str, Value], theirs: Callable[[], Mapping[str, Value]] | None = None) -> bool:
        """Returns whether the difference is gone if the reference computes `new`.

        Args:
            new: What it computes.
            theirs: Returns what `b` computes with the same change. It is called if most of the difference is gone:
                the noise may be larger there, as with a denominator near zero.
        """
        found = self.ratio(new)
        if found > ACCEPTED and theirs is not None and self.distance(new) < _MOSTLY * self.distance(self.exact):
            found = self.ratio(new, theirs())
        return found <= ACCEPTED and found < self.before / 4

    def distance(self, new: Mapping[str, Value]) -> float:
        """Returns how far `a` is from what the reference computes, in the first result that differs."""
        if self.name not in new or new[self.name].array.shape != self.ours[self.name].array.shape:
            return math.inf
        if np.iscomplexobj(new[self.name].array):
            return math.inf
        return rms_distance(np.asarray(self.ours[self.name].array, np.float64), new[self.name].array)

    def explains_array(self, array: Array) -> bool:
        """Returns whether the difference is gone if the reference has this value."""
        if array.shape != self.exact[self.name].array.shape:
            return False
        return self.explains({**self.exact, self.name: Value(array, "fp64")})

    def replay(
        self,
        weights: Mapping[str, Array] | None = None,
        values: Sequence[Value] | None = None,
        cotangents: Sequence[Value] | None = None,
    ) -> dict[str, Value]:
        """Returns what the reference computes, which may be changed meanwhile; empty if it fails."""
        self.left -= 1
        if self.left < 0:
            return {}
        try:
            given = replace(self.given, weights=weights)
            given = given if values is None else replace(given, values=values)
            given = given if cotangents is None else replace(given, cotangents=cotangents)
            return self.named(self.c.reference.replay(given))
        except align.ReplayError:
            return {}

    @property
    def modules(self) -> tuple[Any, Any]:
        """The module of `a`, and that of the reference."""
        return self.c.a.modules[self.pair.a.path], self.c.reference.modules[self.pair.path]


def _overflows(new: Array, exact: Array, ours: Array, dtype: str) -> bool:
    """Returns whether a value that the dtype holds becomes one that it does not, although `a` has a finite one there.

    Such values are not compared.
    """
    largest = float(np.finfo(np.float16 if dtype == "fp16" else np.float32).max)
    held = np.isfinite(exact) & (np.abs(exact) <= largest) & np.isfinite(ours)
    return not (np.abs(new[held]) <= largest).all()
