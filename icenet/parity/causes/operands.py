"""Causes in single calls of the reference: left out, or with another variable or number in the place of an operand.

They are searched for last. Where many calls have the same effect, the first one is named.
"""

from __future__ import annotations

import numpy as np

from icenet.core import backends
from icenet.parity.causes.numbers import attributes, code_numbers
from icenet.parity.causes.trial import Trial
from icenet.parity.trace import Value

_MOST, _MOST_OF_LARGE, _LARGE = 500, 100, 1 << 18
"""Number of changes that are tried, fewer if a replay gets more than a number of values."""
_MOST_NUMBERS = 6
"""Number of numbers of `a` that are tried in place of those of `b`."""


def find_operands(trial: Trial) -> str:
    """Returns which call of the reference has another operand in `a`, or is left out there."""
    is_boolean = trial.exact[trial.name].array.dtype == bool
    if not trial.is_forward or is_boolean or trial.c.reference.backend != "torch" or not trial.c.computes_reference:
        return ""
    variants = backends.module("torch", "tools.variants")
    with variants.listing(*_numbers(trial)) as changes:
        trial.replay()
    most = _MOST if sum(value.array.size for value in trial.given.values) <= _LARGE else _MOST_OF_LARGE
    trial.left = most + 1
    for change in changes[:most]:
        with variants.changing(change):
            new = trial.replay()
        if new and _explains(trial, new):
            return str(change.text)
    return ""


def _explains(trial: Trial, new: dict[str, Value]) -> bool:
    if trial.exact[trial.name].is_float:
        return trial.explains(new)
    return trial.name in new and np.array_equal(new[trial.name].array, trial.ours[trial.name].array)


def _numbers(trial: Trial) -> tuple[list[float], list[float]]:
    """Returns the numbers that the module of `a` has in its code or holds, first those that the one of `b` lacks."""
    ours, theirs = (
        [
            *(number for kind in (float, int) for number in code_numbers(module, kind)),
            *(value for _, value in attributes(module).values() if isinstance(value, (int, float))),
        ]
        for module in trial.modules
    )
    known = {abs(number) for number in theirs}
    found = list(dict.fromkeys(abs(number) for number in ours if not isinstance(number, bool)))
    new, rest = ([n for n in found if (n in known) == is_known] for is_known in (False, True))
    return new[:_MOST_NUMBERS], rest[:_MOST_NUMBERS]
