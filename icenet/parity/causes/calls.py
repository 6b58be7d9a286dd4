"""Causes in the calls of modules: modes that differ, and modules that only one side calls, or more often."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from icenet.parity import align
from icenet.parity.calls.events import Event, Store
from icenet.parity.calls.pairing import relative
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.sides import Side
from icenet.parity.causes.numbers import changed
from icenet.parity.causes.trial import ACCEPTED, Trial
from icenet.parity.results.rows import index_of
from icenet.parity.state import Comparison
from icenet.parity.trace import Value
from icenet.parity.yardstick import judge

_MOST_POOLED = 2
"""Number of modules that are tried on a mean in place of what it is of."""
_MOST_MISSING = 6
"""Number of modules that are left out together."""


def find_mode(c: Comparison, pair: Pair) -> str:
    """Returns which norm or dropout is in another mode."""
    inner = {child.path for child in pair.children}
    for path, side in ((event.path, event) for event in pair.b.walk()):
        ours = c.a.own_path(path)
        if ours is None or (path in inner and path != pair.path) or side.path not in c.b.modules:
            continue
        flags = c.a.mode(ours), c.b.mode(path)
        if flags[0] != flags[1] and c.b.depends_on_mode_at(path):
            names = ["training" if flag else "evaluation" for flag in flags]
            return f"{path or 'the model'} is in {names[0]} mode in a, in {names[1]} mode in b"
    return ""


def find_recomputed(c: Comparison, name: str, noise: Value, exact: Value) -> str:
    """Returns whether a gradient of the run agrees if `a` computes nothing again in its backward pass.

    Args:
        c, name: The comparison, and the path in `b` of the parameter.
        noise, exact: The gradient of `b` in the dtype under test, and of the reference.
    """
    own = next((ours for ours, theirs in c.parameter_names.items() if theirs == name), "")
    if c.a.backend != "mlx" or not own:
        return ""
    store = Store()
    with c.a.tools.without_checkpoints():
        loss = (c.losses or (None, None))[0]
        run = c.a.record(c.inputs_a.given, c.inputs_a.values, store, loss, c.targets_a, True, inner=False)
    agrees = judge(run.gradients[own].array, noise.array, exact.array, c.dtype, stored=noise.dtype).ratio <= ACCEPTED
    store.close()
    if not agrees:
        return ""
    return (
        "mx.checkpoint in a: what it computes again draws other random numbers, and only the arguments of its "
        "function have gradients (mlx.nn.utils.checkpoint passes the parameters of a module)"
    )


def find_dropout(c: Comparison, pair: Pair) -> str:
    """Returns which dropout only one side calls, if that is in training mode."""
    if not c.a.train or c.draws is not None:  # a call of a function may have the place of a layer
        return ""
    for one, other, sides in ((pair.b, pair.a, (c.b, c.a)), (pair.a, pair.b, (c.a, c.b))):
        is_b = one is pair.b
        called = {c.a.names.get(event.path, event.path) if is_b else event.path for event in other.walk()}
        for event in one.walk():
            path = event.path if is_b else c.a.names.get(event.path, event.path)
            rate = sides[0].dropout_rate(event.path)
            if rate and path not in called:
                which = ("a", "b") if is_b else ("b", "a")
                return f"{path} (dropout {rate:g}) is not called in {which[0]}, but in {which[1]}"
    return ""


def find_calls(trial: Trial) -> str:
    """Returns which module within a call only one side calls, or more often, if without it the difference is gone."""
    c, pair = trial.c, trial.pair
    if pair.kind in align.DIFFERENT_CALLS:
        return ""
    ours, theirs = Counter(called_within(pair, pair.a)), Counter(called_within(pair, pair.b))
    named = Counter({c.a.names.get(path, f"{path} (of a)"): count for path, count in ours.items()})
    missing = [path for path, count in theirs.items() if count > named[path] and c.computes_reference]
    for path in missing:
        count = theirs[path]
        if any(trial.explains(_without(trial, c.reference, path, zero=zero)) for zero in (False, True)):
            return _extra(relative(path, pair.path), named[path], count)
        for own, number in ours.items():
            other = c.a.names.get(own, "")
            is_extra = number > theirs[other] and other in c.reference.modules
            if is_extra and trial.explains(_without(trial, c.reference, path, instead=other)):
                return f"a calls {relative(other, pair.path)} where b calls {relative(path, pair.path)}"
    if 1 < len(missing) <= _MOST_MISSING and trial.explains(_without(trial, c.reference, *missing)):
        names = " and ".join(relative(path, pair.path) for path in missing)
        return f"{names} are called in b, but not in a"
    for path, count in ours.items():
        name = c.a.names.get(path, f"{path} (of a)")
        if count <= theirs[name]:
            continue
        before, new = trial.ours, _without(trial, c.a, path)
        try:
            trial.ours = {**before, **new}
            if new and trial.explains(trial.exact):
                return _extra(relative(name, pair.path), count, theirs[name])
        finally:
            trial.ours = before
    return ""


def called_within(pair: Pair, event: Event) -> Iterator[str]:
    """Yields the paths of the modules that a call computes itself, and of those that it calls."""
    left_out = {id(inner) for child in pair.children for inner in (child.a, child.b)}
    for child in event.children:
        yield child.path
        if id(child) not in left_out:
            yield from called_within(pair, child)


def find_pooled(trial: Trial) -> str:
    """Returns which module gets a mean over positions in `a` where `b` takes that of its output, or the reverse."""
    c, pair = trial.c, trial.pair
    if c.reference.backend != "torch" or not trial.is_forward:
        return ""
    paired = {child.path for child in pair.children}
    called = {c.a.names.get(path, "") for path in called_within(pair, pair.a)}
    paths = [path for path in called_within(pair, pair.b) if path in called - paired]
    floats = [value for value in trial.given.values if value.is_float and value.array.ndim > 2]
    options = itertools.product(("mean", "amax"), ((1,), (2,), (1, 2), (2, 3)))
    for path, (kind, axes) in itertools.product(list(dict.fromkeys(paths))[:_MOST_POOLED], options):
        for handle, (ours, theirs) in (
            (_pooled_before(kind, axes), ("before", "after")),
            (_pooled_after(kind, axes, floats), ("after", "before")),
        ):
            with c.reference.tools.intercepting({path: c.reference.modules[path]}, handle):
                new = trial.replay()
            if new and trial.explains(new):
                what = f"the {'mean' if kind == 'mean' else 'maximum'} over positions is taken"
                return f"{what} {ours} {relative(path, pair.path)} in a, {theirs} it in b"
    return ""


def _pooled_before(kind: str, axes: tuple[int, ...]) -> Any:
    """Returns the handler of a call that gets the mean or maximum of its input over some axes."""

    def handle(path: str, call: Any, args: Any, kwargs: Any) -> Any:
        x, y = args[0], call(*args, **kwargs)
        if not max(axes) < x.ndim == y.ndim:
            return y
        return call(getattr(x, kind)(axes, keepdim=True), *args[1:], **kwargs).expand(y.shape)

    return handle


def _pooled_after(kind: str, axes: tuple[int, ...], inputs: Sequence[Value]) -> Any:
    """Returns the handler of a call that gets one of the inputs whole, where it gets the mean or maximum of it."""

    def handle(path: str, call: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        for value in inputs:
            if value.array.ndim == x.ndim + len(axes) and value.array.ndim > max(axes):
                whole = x.new_tensor(np.asarray(value.array))
                pooled = getattr(whole, kind)(axes)
                if pooled.shape == x.shape and bool((pooled - x).abs().max() <= 1e-9 * x.abs().max()):
                    return getattr(call(whole, *args[1:], **kwargs), kind)(axes)
        return call(*args, **kwargs)

    return handle


def find_rate(trial: Trial) -> str:
    """Returns the rate of dropouts without a counterpart of their own, if it is another one in `a`."""
    c, pair = trial.c, trial.pair
    if not c.a.train or not trial.is_forward or c.reference.backend != "torch" or not c.computes_reference:
        return ""
    rates = [
        {path: rate for path in called_within(pair, event) if (rate := side.dropout_rate(path))}
        for side, event in ((c.a, pair.a), (c.b, pair.b))
    ]
    ours, theirs = (set(found.values()) for found in rates)
    if len(ours) != 1 or len(theirs) != 1 or ours == theirs:
        return ""
    new, old = ours.pop(), theirs.pop()
    with contextlib.ExitStack() as stack:
        for path in rates[1]:
            stack.enter_context(changed(c.reference.modules[path], "p", new))
        return f"the rate p of the dropout is {new:g} in a, {old:g} in b" if trial.explains(trial.replay()) else ""


def find_call_order(trial: Trial) -> str:
    """Returns which of two calls `a` makes first, if a call so gets the output of another one, or does not get it."""
    pair = trial.pair
    source = pair.places()[index_of(trial.name)][0] if trial.name.startswith("output") else None
    if source is None:
        return ""
    exact = np.asarray(trial.exact[trial.name].array, np.float64)
    for (other, _), value in zip(pair.input_places(), trial.given.values, strict=True):
        if other is None or other is source or not value.is_float:
            continue
        is_first = other.a.number < source.a.number, other.b.number < source.b.number
        array = np.asarray(value.array, np.float64)
        names = [relative(child.path, pair.path) for child in (other, source)]
        if is_first == (True, False) and trial.explains_array(array):
            return f"{names[0]} is called before {names[1]} in a, after it in b"
        if is_first == (False, True) and array.shape == exact.shape and np.allclose(array, exact):
            known = (v for v in trial.given.values if v.is_float and v is not value)
            if any(trial.explains_array(np.asarray(v.array, np.float64)) for v in known):
                return f"{names[0]} is called after {names[1]} in a, before it in b"
    return ""


def _without(
    trial: Trial, side: Side, *paths: str, zero: bool = False, instead: str | None = None
) -> dict[str, Value]:
    """Returns what a side computes if the calls of modules that only it makes return their input, or zeros.

    With `instead`, the module of that path is called in their place.
    """

    def handle(path: str, original: Any, args: Any, kwargs: Any) -> Any:
        if instead is not None:
            return side.modules[instead](*args, **kwargs)
        if zero:
            result = original(*args, **kwargs)
            return 0 * result if hasattr(result, "shape") else result
        return next(iter((*args, *kwargs.values())))

    with side.tools.intercepting({path: side.modules[path] for path in paths}, handle):
        try:
            return trial.named(side.replay(trial.given))
        except (align.ReplayError, StopIteration):
            return {}


def _extra(name: str, ours: int, theirs: int) -> str:
    """Returns which side calls a module more often."""
    if not ours or not theirs:
        return f"{name} is called in {'b' if theirs else 'a'}, but not in {'a' if theirs else 'b'}"
    times = ["once" if count == 1 else f"{count} times" for count in (ours, theirs)]
    return f"{name} is called {times[0]} in a, {times[1]} in b"
