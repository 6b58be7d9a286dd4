"""Causes in rotary positions: the base of the angles, and the values that are turned together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.parity.calls.events import Event
from icenet.parity.calls.pairing import relative
from icenet.parity.causes.numbers import attributes
from icenet.parity.causes.trial import Trial
from icenet.parity.trace import Value

Array = npt.NDArray[Any]


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
    if not trial.is_forward or not turns_positions(trial):
        return ""
    floats = [index for index in _float_inputs(trial) if trial.given.values[index].array.ndim >= 3]
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


def _float_inputs(trial: Trial) -> list[int]:
    """Returns the numbers of the inputs that are floats and come from the call."""
    places = trial.pair.input_places()
    return [
        index
        for index, ((source, _), value) in enumerate(zip(places, trial.given.values, strict=True))
        if source is not None and value.is_float
    ]


def find_partial(trial: Trial) -> str:
    """Returns whether rotary positions turn another part of each head, or positions at another scale.

    Queries and keys are turned as in `a` and then back by the angles of the reference, before that turns them.
    """
    if not trial.is_forward or not turns_positions(trial):
        return ""
    floats = [index for index in _float_inputs(trial) if trial.given.values[index].array.ndim in (3, 4)]
    held = _held(trial)
    if text := _turned_on_one_side(trial, floats, held):
        return text
    for indices in _queries_and_keys(trial, floats):
        arrays = [trial.given.values[index].array for index in indices]
        if arrays[0].ndim != arrays[1].ndim or arrays[0].shape[:-1] != arrays[1].shape[:-1]:
            continue
        sizes = _head_sizes(math.gcd(*(array.shape[-1] for array in arrays)), arrays[0].ndim)
        for size, theta, is_half in itertools.product(reversed(sizes), held.bases, held.halves):
            for own, other in _dimensions(size, held.dims):
                turns = _Turn(other, theta, is_half, 1.0), _Turn(own, theta, is_half, 1.0)
                if trial.explains(trial.replay(values=_moved(trial, indices, size, *turns))):
                    return f"rotary positions turn {own} of the {size} values of a head in a, {other} in b"
            scales = (held.scale,) if held.scale != 1 else (0.5, 0.25, 0.125, 2.0, 4.0, 8.0)
            for scale in scales:
                turns = _Turn(size, theta, is_half, 1.0), _Turn(size, theta, is_half, scale)
                if trial.explains(trial.replay(values=_moved(trial, indices, size, *turns))):
                    return f"rotary positions are multiplied by {scale:g} in a, relative to those of b"
    return ""


def _turned_on_one_side(trial: Trial, floats: Sequence[int], held: _Held) -> str:
    """Returns which queries or keys are turned on one side only, by the positions along their axis."""
    exact = np.sort(np.asarray(trial.exact[trial.name].array), axis=None)
    places = trial.pair.input_places()
    names = {i: source.path.rpartition(".")[2].lower() for i in floats if (source := places[i][0]) is not None}
    named = [index for index, name in names.items() if name.startswith(("q", "k"))]
    for index in named[::-1] or floats[:2]:
        array = np.asarray(trial.given.values[index].array)
        # what holds the same numbers as its input is not turned in b
        is_plain = array.size == exact.size and np.allclose(np.sort(array, axis=None), exact)
        sizes = _head_sizes(array.shape[-1], array.ndim)
        turns = itertools.product(reversed(sizes), held.bases, held.halves, range(1, array.ndim - 1))
        for size, theta, is_half, axis in turns:
            none, turn = _Turn(size, theta, is_half, 0.0), _Turn(size, theta, is_half, 1.0)
            back, forward = (none, turn) if is_plain else (turn, none)
            if trial.explains(trial.replay(values=_moved(trial, [index], size, back, forward, axis))):
                source = places[index][0]
                what = "the input" if source is None else f"the output of {relative(source.path, trial.pair.path)}"
                if is_plain:
                    return f"rotary positions turn {what} here in a, not in b"
                return f"rotary positions do not turn {what} in a"
    return ""


def _head_sizes(width: int, ndim: int) -> list[int]:
    """Returns the even numbers of values that a head may have, of an array [B, L, D] or [B, H, L, E]."""
    return [size for size in range(4, width + 1, 2) if width % size == 0 and (ndim == 3 or size == width)]


def _queries_and_keys(trial: Trial, indices: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the inputs that may be queries and keys: those of such a name, or else the first two."""
    places = trial.pair.input_places()

    def named(letter: str) -> list[int]:
        sources = ((index, places[index][0]) for index in indices)
        return [i for i, source in sources if source and source.path.rpartition(".")[2].lower().startswith(letter)]

    found = [pair for pair in itertools.product(named("q"), named("k")) if pair[0] != pair[1]]
    return found[:1] or list(itertools.combinations(indices[:2], 2))


class _Turn(NamedTuple):
    """Rotary positions: how many values of a head they turn, their base, whether halves, and a scale of positions."""

    dims: int
    theta: float
    is_half: bool
    scale: float


class _Held(NamedTuple):
    """What the layers of rotary positions within the module of `a` hold, or else what is usual."""

    bases: list[float]
    halves: tuple[bool, ...]
    dims: int | None
    scale: float


def _held(trial: Trial) -> _Held:
    prefix = f"{trial.pair.a.path}." if trial.pair.a.path else ""
    held = [module for path, module in trial.c.a.modules.items() if f"{path}.".startswith(prefix)]
    values = [attributes(module) for module in held]
    layer = next((found for found in values if {"dims", "traditional", "theta"} <= found.keys()), None)
    if layer is None:
        return _Held((bases(trial) or [10000.0])[:2], (True, False), None, 1.0)
    number = {name: layer[name][1] for name in ("dims", "traditional", "theta")}
    scale = layer["scale"][1] if "scale" in layer else 1.0
    return _Held([float(number["theta"])], (not number["traditional"],), int(number["dims"]), float(scale))


def _dimensions(size: int, own: int | None) -> list[tuple[int, int]]:
    """Returns the numbers of values that may be turned in `a` and in `b`, of the values of a head."""
    usual = [n for n in dict.fromkeys((size, size // 2, size // 4, size * 3 // 4)) if n >= 2 and n % 2 == 0]
    return [(a, b) for a in ([own] if own is not None else usual) for b in usual if a != b and a <= size]


def _moved(
    trial: Trial, indices: Sequence[int], size: int, back: _Turn, forward: _Turn, positions: int | None = None
) -> list[Value]:
    """Returns the inputs of the call with queries and keys that are turned by one turn, and back by the other.

    Args:
        trial, indices, size: The difference, the numbers of the inputs, and the width of a head.
        back, forward: The turns.
        positions: The axis of the positions; default: that of [B, L, D] or [B, H, L, E].
    """
    values = list(trial.given.values)
    for index in indices:
        array = np.asarray(values[index].array, np.float64)
        heads = array.reshape(*array.shape[:2], -1, size) if array.ndim == 3 else array
        axis = positions or (1 if array.ndim == 3 else 2)
        heads = _rotated(_rotated(heads, axis, forward, 1), axis, back, -1)
        values[index] = Value(np.ascontiguousarray(heads.reshape(array.shape)), values[index].dtype)
    return values


def _rotated(heads: Array, axis: int, turn: _Turn, sign: int) -> Array:
    """Returns heads [..., E] turned by the positions along an axis."""
    frequencies = turn.theta ** (-np.arange(0, turn.dims, 2) / turn.dims)
    angles = sign * turn.scale * np.arange(heads.shape[axis])[:, None] * frequencies
    shape = [1] * heads.ndim
    shape[axis], shape[-1] = angles.shape
    cos, sin = (function(angles).reshape(shape) for function in (np.cos, np.sin))
    half = turn.dims // 2
    first, second = (slice(0, half), slice(half, turn.dims)) if turn.is_half else (slice(0, turn.dims, 2),) * 2
    second = second if turn.is_half else slice(1, turn.dims, 2)
    x, y = heads[..., first], heads[..., second]
    found = heads.copy()
    found[..., first], found[..., second] = x * cos - y * sin, x * sin + y * cos
    return found


def turns_positions(trial: Trial) -> bool:
    """Returns whether a module has rotary positions: sines of its own, tables of them, or a layer of that name."""
    if trial.c.reference.backend != "torch" or not trial.c.computes_reference:
        return True
    inner = [path.rpartition(".")[2].lower() for event in (trial.pair.a, trial.pair.b) for path in _paths(event)]
    held = [name.lower() for module in trial.modules for name in vars(module)]
    if any(part in name for name in (*inner, *held) for part in ("rot", "rope", "freq", "cos", "sin", "theta")):
        return True
    if any("cos" in name or "sin" in name or "freq" in name for name in trial.pair.b.names):
        return True
    variants = backends.module("torch", "tools.variants")
    if any(
        source is None and _is_table(value)
        for (source, _), value in zip(trial.pair.input_places(), trial.given.values, strict=True)
    ):
        return True
    with variants.spying() as calls:
        trial.replay()
    return bool({"cos", "sin", "polar", "view_as_complex"} & {call.name for call in calls})


def _is_table(value: Value) -> bool:
    """Returns whether an array is a table of angles, their cosines or sines, also of several next to each other."""
    array = np.asarray(value.array)
    if not value.is_float or array.ndim < 2 or array.size > 1 << 20:
        return False
    with_theta = backends.module("torch", "tools.variants").with_theta
    parts = [array, *(np.moveaxis(array, -2, 0) if array.ndim > 2 and array.shape[-2] <= 4 else ())]
    return any(part.size and with_theta(part, 10000.0) is not None for part in parts)


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
