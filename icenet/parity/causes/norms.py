"""Causes in norms: of queries and keys over all heads or each of them, over another axis, or of another kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity.calls.pairing import relative
from icenet.parity.causes.numbers import attributes
from icenet.parity.causes.trial import Trial

Array = npt.NDArray[Any]

_EXACT = 1e-6
"""Largest relative distance of what a norm computes from its formula."""
_MOST = 8
"""Number of norms that are tried."""


def find_norms(trial: Trial) -> str:
    """Returns how `a` computes the norms otherwise that it does not call, or the norm that differs."""
    c, pair = trial.c, trial.pair
    if c.reference.backend != "torch" or not c.computes_reference or not trial.is_forward:
        return ""
    called = Counter(c.a.names.get(event.path, "") for event in pair.a.walk())
    paths = [event.path for event in pair.b.walk() if not called[event.path] and event.path in c.reference.modules]
    paths = [path for path in dict.fromkeys(paths) if "norm" in path.rpartition(".")[2].lower()]
    is_own = pair.is_leaf and "norm" in f"{pair.path} {type(trial.modules[1]).__name__}".lower()
    paths = [pair.path] if is_own else paths[:_MOST]
    if not paths:
        return ""
    names = " and ".join(relative(path, pair.path) for path in paths) if not is_own else ""
    modules = {path: c.reference.modules[path] for path in paths}
    number, most = 0, 1
    while number < most:
        texts: list[str] = []

        def handle(path: str, original: Any, args: Any, kwargs: Any, number: int = number, texts: Any = texts) -> Any:
            nonlocal most
            y = original(*args, **kwargs)
            x = next(iter((*args, *kwargs.values())))
            found = list(_otherwise(_array(x), _array(y), _eps(modules[path])))
            most = max(most, len(found))
            if len(found) <= number:
                return y
            text, array = found[number]
            texts.append(text)
            return y.new_tensor(array)

        with c.reference.tools.intercepting(modules, handle):
            new = trial.replay()
        if texts and new and trial.explains(new):
            return f"{names or 'the norm'} {'are' if ' and ' in names else 'is'} {texts[0]} in a"
        number += 1
    return ""


def _array(tensor: Any) -> Array:
    found: Array = tensor.detach().numpy()
    return found


def _eps(module: Any) -> float:
    value = attributes(module).get("eps", ("", 1e-6))[1]
    return float(value) if isinstance(value, (int, float)) else 1e-6


def _otherwise(x: Array, y: Array, eps: float) -> Iterator[tuple[str, Array]]:
    """Yields other norms of an array with the weights of the norm that made y of it, and what they are."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    for inner, is_centred in ((x, False), (centred, True)):
        base = inner / np.sqrt(np.square(inner).mean(-1, keepdims=True) + eps)
        mean = y.mean(rows) if is_centred else 0.0
        spread = base - base.mean(rows) if is_centred else base
        gain = (spread * (y - mean)).sum(rows) / np.maximum(np.square(spread).sum(rows), 1e-30)
        bias = mean - gain * base.mean(rows) if is_centred else 0.0
        if np.abs(gain * base + bias - y).max() <= _EXACT * max(float(np.abs(y).max()), 1e-30):
            break
    else:
        return

    def normed(values: Array, axes: tuple[int, ...]) -> Array:
        return values / np.sqrt(np.square(values).mean(axes, keepdims=True) + eps)

    last = x.ndim - 1
    if x.ndim > 3:
        for axis in (2, 1):  # the axis of the heads
            yield "computed over all heads together", gain * normed(inner, (axis, last)) + bias
    if x.ndim == 3:
        for size in (size for size in range(2, x.shape[-1]) if x.shape[-1] % size == 0):
            heads = x.reshape(*x.shape[:-1], -1, size)
            heads = heads - heads.mean(-1, keepdims=True) if is_centred else heads
            text = f"computed for each head of {size} values"
            yield text, gain * normed(heads, (-1,)).reshape(x.shape) + bias
    for axis in range(1, last):
        values = x - x.mean(axis, keepdims=True) if is_centred else x
        yield f"computed over axis {axis}, not the last one,", gain * normed(values, (axis,)) + bias
    other = x if is_centred else centred
    text = "an RMS norm, which subtracts no mean," if is_centred else "a layer norm, which subtracts the mean,"
    yield f"computed as {text}", gain * normed(other, (last,)) + bias
    size = np.sqrt(np.square(inner).sum(-1, keepdims=True))
    yield "computed with the length of the vector, not its RMS,", gain * inner / np.maximum(size, 1e-12) + bias
    yield "computed without a weight", base
