"""Causes in integers and booleans that a module passes to another one: positions, masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.parity.causes.operands import find_operands
from icenet.parity.causes.passed import argument_name
from icenet.parity.causes.trial import Trial

Array = npt.NDArray[Any]


def find_integers(trial: Trial) -> str:
    """Returns how the integers or booleans of the array that differs are changed: by an offset, or inverted."""
    ours, exact = (np.asarray(values[trial.name].array) for values in (trial.ours, trial.exact))
    if ours.shape != exact.shape or not exact.size:
        return ""
    if exact.dtype == bool:
        return _mask(trial, ours.astype(bool), exact)
    offset = ours.astype(np.int64) - exact.astype(np.int64)
    by = int(offset.flat[0])
    if by and (offset == by).all():
        first = f", from {ours.min()} on in a and from {exact.min()} on in b" if _counts(exact) else ""
        return (
            f"each integer is {abs(by)} {'larger' if by > 0 else 'smaller'} in a: an offset, as of positions{first}"
        )
    for axis in range(exact.ndim):
        if np.array_equal(ours, np.flip(exact, axis)):
            return f"the order along axis {axis} is reversed in a"
    if _counts(ours) and not _counts(exact):
        return "a counts the positions of each row from its first element on, b does not: it may leave out padding"
    return (_function(trial, ours) or find_operands(trial)) if np.ptp(ours) else ""


def find_ignored(trial: Trial) -> str:
    """Returns which mask among the inputs has no effect in `a`: as if it hid nothing, or everything."""
    if not trial.is_forward:
        return ""
    for index, ((source, number), value) in enumerate(
        zip(trial.pair.input_places(), trial.given.values, strict=True)
    ):
        if not np.isin(value.array, (0, 1)).all() or len(np.unique(value.array)) < 2:
            continue
        for fill in (1, 0):
            values = list(trial.given.values)
            values[index] = replace(value, array=np.full_like(value.array, fill))
            if trial.explains(trial.replay(values=values)):
                event = trial.pair.b
                what = f"the argument {argument_name(trial.c.b, event, number)}"
                what = what if source is None else f"the output of {source.path}"
                return f"{what}, a mask, has no effect in a, as if all its elements were {fill}"
    return ""


def _mask(trial: Trial, ours: Array, exact: Array) -> str:
    """Returns how a mask of booleans differs: inverted, or in the keys that it shows at each position."""
    if np.array_equal(ours, ~exact):
        return "the mask is inverted in a"
    if trial.c.reference.backend != "torch":
        return ""
    shown = backends.module("torch", "tools.variants").shown_keys
    for invert, what in ((False, "shows"), (True, "hides")):  # True may mean either
        keys = [shown(~mask if invert else mask) for mask in (ours, exact)]
        if all(keys):
            return f"the mask {what} {keys[0]} of each position in a, {keys[1].removeprefix('the keys ')} in b"
    return ""


def _function(trial: Trial, ours: Array) -> str:
    """Returns the variant of the functions of the reference that computes the integers of `a`."""
    if trial.c.reference.backend != "torch" or not trial.c.computes_reference:
        return ""
    variants = backends.module("torch", "tools.variants")
    with variants.spying() as calls:
        trial.replay()
    called = {call.name for call in calls}
    table = (*variants.number_variants(calls, ()), *variants.TABLE)
    for variant in sorted(table, key=lambda variant: variant.names.isdisjoint({"argmin", "argmax"})):
        if called & variant.names:
            with variants.applied(variant):
                new = trial.replay().get(trial.name)
            if new is not None and np.array_equal(new.array, ours):
                return str(variant.text)
    return ""


def _counts(array: Array) -> bool:
    """Returns whether integers count along the last axis."""
    return array.ndim > 0 and array.shape[-1] > 1 and bool((np.diff(array, axis=-1) == 1).all())
