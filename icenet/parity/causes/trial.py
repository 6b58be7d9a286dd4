"""A difference of a call, and the replays of the reference that are tried to explain it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity.calls.culprit import first_name
from icenet.parity.calls.pairs import Pair
from icenet.parity.state import Comparison
from icenet.parity.trace import Value
from icenet.parity.yardstick import FACTOR, Judgement, judge

Array = npt.NDArray[Any]

ACCEPTED = 4 * FACTOR
"""Largest ratio with which a cause explains a difference. The noise is one run of the reference, without samples."""
_MOST = 600
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

    def ratio(self, new: Mapping[str, Value]) -> float:
        """Returns the largest ratio of the error of `a` to the noise, if the reference computes `new`."""
        worst = 0.0
        for name in self.checked:
            if name not in new:
                return math.inf
            exact, found = self.exact[name].array, np.asarray(new[name].array, np.float64)
            if found.shape != exact.shape:
                return math.inf
            noise = np.asarray(self.theirs[name].array, np.float64) - exact
            noise = np.where(np.isfinite(noise), noise, 0.0)  # masked values are -inf
            ours, stored = self.ours[name], self.theirs[name].dtype
            if ours.array.shape != found.shape:
                return math.inf
            stored = self.c.dtype if stored == "fp64" else stored
            worst = max(worst, judge(ours.array, found + noise, found, self.c.dtype, stored=stored).ratio)
            if worst > ACCEPTED:
                break
        return worst

    def explains(self, new: Mapping[str, Value]) -> bool:
        """Returns whether the difference is gone if the reference computes `new`."""
        found = self.ratio(new)
        return found <= ACCEPTED and found < self.before / 4

    def explains_array(self, array: Array) -> bool:
        """Returns whether the difference is gone if the reference has this value."""
        if array.shape != self.exact[self.name].array.shape:
            return False
        return self.explains({**self.exact, self.name: Value(array, "fp64")})

    def replay(
        self, weights: Mapping[str, Array] | None = None, values: Sequence[Value] | None = None
    ) -> dict[str, Value]:
        """Returns what the reference computes, which may be changed meanwhile; empty if it fails."""
        self.left -= 1
        if self.left < 0:
            return {}
        try:
            given = replace(self.given, weights=weights, values=self.given.values if values is None else values)
            return self.named(self.c.reference.replay(given))
        except align.ReplayError:
            return {}

    @property
    def modules(self) -> tuple[Any, Any]:
        """The module of `a`, and that of the reference."""
        return self.c.a.modules[self.pair.a.path], self.c.reference.modules[self.pair.path]
