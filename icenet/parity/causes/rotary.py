"""Causes in rotary positions: the base of the angles, and the values that are turned together."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from icenet.core import backends
from icenet.parity.calls.events import Event
from icenet.parity.causes.numbers import attributes
from icenet.parity.causes.trial import Trial
from icenet.parity.trace import Value

if TYPE_CHECKING:
    pass


def bases(trial: Trial) -> list[float]:
    """Returns the bases of angles that the module of `a` and those within it hold."""
    prefix = f"{trial.pair.a.path}." if trial.pair.a.path else ""
    held = [module for path, module in trial.c.a.modules.items() if f"{path}.".startswith(prefix)]
    found = (attributes(module).get("theta", ("", None))[1] for module in held)
    return [float(value) for value in found if isinstance(value, (int, float)) and value >= 10]


def find_angles(trial: Trial) -> str:
    """Returns the base of a table of angles, cosines or sines, if another one explains the difference."""
    if trial.c.reference.backend != "torch" or not trial.is_forward:
        return ""
    variants = backends.module("torch", "tools.variants")
    exact = np.asarray(trial.exact[trial.name].array, np.float64)
    if exact.ndim < 2 or exact.size > 1 << 20:
        return ""
    for theta in dict.fromkeys((*bases(trial), *variants.THETA)):
        whole = variants.with_theta(exact, theta)
        if whole is None and exact.ndim > 2:  # cosines and sines next to each other
            parts = [variants.with_theta(part, theta) for part in np.moveaxis(exact, -2, 0)]
            if len(parts) <= 4 and any(part is not None for part in parts):
                olds = [part for part in parts if part is not None]
                if len(olds) < len(parts):  # negative sines
                    negated = [variants.with_theta(-part, theta) for part in np.moveaxis(exact, -2, 0)]
                    pairs = [
                        p if p is not None else (-n[0], n[1]) if n is not None else None
                        for p, n in zip(parts, negated, strict=True)
                    ]
                else:
                    pairs = parts
                if all(pair is not None for pair in pairs):
                    whole = np.stack([pair[0] for pair in pairs if pair is not None], axis=-2), olds[0][1]
        if whole is not None and whole[1] != theta and trial.explains_array(whole[0]):
            return f"theta is {theta:g} in a, {whole[1]:g} in b"
    return ""


def find_rotary(trial: Trial) -> str:
    """Returns whether the rotary positions turn halves of a head on one side, and pairs of neighbours on the other.

    Both are the same up to the order of the values of a head, which queries and keys have in common.
    """
    if not trial.is_forward or not _turns(trial):
        return ""
    places = trial.pair.input_places()
    floats = [
        index
        for index, ((source, _), value) in enumerate(zip(places, trial.given.values, strict=True))
        if source is not None and value.is_float and value.array.ndim >= 3
    ]
    chosen = [[index] for index in floats if trial.given.values[index].array.shape[-1] % 3 == 0]
    chosen += [list(pair) for pair in itertools.combinations(floats[:4], 2)]
    for indices in chosen:
        widths = [trial.given.values[index].array.shape[-1] for index in indices]
        parts = 3 if len(indices) == 1 else 1
        width = math.gcd(*widths) // parts
        for size in (size for size in range(4, width + 1, 2) if width % size == 0):
            for text, halves in (
                ("pairs (x[..., ::2]) in a, of halves in b", True),
                ("halves in a, of pairs (x[..., ::2]) in b", False),
            ):
                values = list(trial.given.values)
                for index in indices:
                    values[index] = _turned(values[index], size, parts, halves)
                if trial.explains(trial.replay(values=values)):
                    return f"rotary positions of {text}"
    return ""


def _turns(trial: Trial) -> bool:
    """Returns whether a module has rotary positions: sines of its own, tables of them, or a layer of that name."""
    if trial.c.reference.backend != "torch" or not trial.c.computes_reference:
        return True
    inner = [path.rpartition(".")[2].lower() for event in (trial.pair.a, trial.pair.b) for path in _paths(event)]
    held = [name.lower() for module in trial.modules for name in vars(module)]
    if any(part in name for name in (*inner, *held) for part in ("rot", "rope", "freq", "cos", "sin", "theta")):
        return True
    if any("cos" in name or "sin" in name or "freq" in name for name in trial.pair.b.names):
        return True
    with backends.module("torch", "tools.variants").spying() as calls:
        trial.replay()
    return bool({"cos", "sin", "polar", "view_as_complex"} & {call.name for call in calls})


def _paths(event: Event) -> list[str]:
    return [inner.path for inner in event.walk()]


def _turned(value: Value, size: int, parts: int, halves: bool) -> Value:
    """Returns queries and keys with the values of each head as halves in place of pairs, or the reverse."""
    array = np.asarray(value.array)
    order = np.arange(size).reshape(-1, 2).T if halves else np.arange(size).reshape(2, -1).T
    heads = array.reshape(*array.shape[:-1], -1, size)
    turned = heads[..., order.reshape(-1)]
    if parts == 3:  # the values are not turned
        keys = heads.shape[-2] * 2 // 3
        turned = np.concatenate([turned[..., :keys, :], heads[..., keys:, :]], axis=-2)
    return Value(np.ascontiguousarray(turned.reshape(array.shape)), value.dtype)
