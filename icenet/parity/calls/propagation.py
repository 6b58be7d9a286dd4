"""The error that the values of a run have if every module is as far off as on equal inputs.

The replays found that each module agrees. A run adds up their errors, and a batch norm or a division may enlarge
them. The errors of the replays do not show how large they are in the run: its gradients are not random, and where
their terms cancel, as in the derivative of a softmax of nearly equal scores or of the norm of a single value, the
error is far larger than the gradient. So each module is replayed once more with the gradients of the run, and `b`
runs again with sums term by term, in which all that a module receives and returns is moved by a random error of that
size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.parity import align
from icenet.parity.calls.events import Store
from icenet.parity.calls.pairs import Pair, Sample, rounded
from icenet.parity.measures import half_ulp, rms, squared_distance
from icenet.parity.resampling import FEW, REPEATS
from icenet.parity.results.rows import index_of, split_at
from icenet.parity.state import Comparison
from icenet.parity.trace import Value

Array = npt.NDArray[Any]

Places = dict[tuple[str, str], float]
"""By what of a module ("output", "argument", "gradient", "argument gradient", "gradient:NAME"), and its path."""


def propagated(
    c: Comparison, exact: Mapping[str, Value], pairs: list[Pair], gradients: bool = True, quick: bool = False
) -> dict[str, Array]:
    """Returns the error of each element of some values of the run.

    Args:
        c, pairs: The comparison, and the calls of the run.
        exact: Values of the reference by name: `output:NUMBER` or `gradient:PATH`.
        gradients: Whether the run has gradients; `exact` may have some only then.
        quick: Whether to take only the sums term by term into account, in one run.
    """
    if c.b.backend != "torch":
        return {}
    errors = {} if quick else own_errors(c, pairs, gradients)
    count = 1 if quick else FEW
    least = float(half_ulp(0.0, c.dtype))  # a replay has no values as small as this, but the run may have
    probe, sums = (backends.module("torch", f"tools.{name}") for name in ("probe", "sums"))
    squares: dict[str, Array] = {}
    for index in range(count):
        generator = np.random.default_rng([c.seed, index])

        def moved(
            value: Value, what: str, path: str, number: int, generator: np.random.Generator = generator
        ) -> Value:
            noise = _error(generator, value.array.shape) * max(errors.get((what, path), 0.0), least)
            return Value((value.array + noise).astype(value.array.dtype), value.dtype)

        store = Store()
        perturbing = contextlib.nullcontext() if quick else probe.perturbing(c.b.module, moved, arguments=True)
        with perturbing, sums.summing_in_order(index):
            run = c.b.record(c.inputs_a.given, c.inputs_b, store, *_loss(c, gradients), inner=False)
        found = {f"output:{j}": item for j, item in enumerate(run.events[0].outputs)}
        found |= {f"gradient:{name}": item for name, item in run.gradients.items()}
        for name, item in exact.items():
            holder, part = split_at(name.partition(":")[2], c.b.modules)
            own = max(errors.get((f"gradient:{part}", holder), 0.0), least)
            square = squared_distance(found[name].array, item.array) + own**2
            squares[name] = squares.get(name, np.zeros(square.shape)) + square / count
        store.close()
    return {name: np.sqrt(square) for name, square in squares.items()}


def own_errors(c: Comparison, pairs: list[Pair], gradients: bool) -> Places:
    """Returns the RMS error of `a` in each module by itself, at the inputs and with the gradients of the run."""
    cotangents = _cotangents(c) if gradients else {}
    total = {
        id(item): Value(np.asarray(gradient.array), item.dtype)
        for pair in pairs
        for item, gradient in zip(pair.b.outputs, pair.b.gradients, strict=True)
        if item.is_float and gradient is not None
    }
    found: Places = defaultdict(float)
    for pair in pairs:
        if pair.obstacle:
            continue
        given = c.replay_of(pair, False)
        if gradients:
            given = replace(
                given, cotangents=_seeds(pair, cotangents), others=[total.get(id(v)) for v in pair.inputs("b")]
            )
        try:
            ours, exact = (side.replay(given) for side in (c.a, c.reference))
        except align.ReplayError:
            continue
        for name, item in exact.items():
            if item.is_float and name in ours and ours[name].array.shape == item.array.shape:
                place = _place(pair, name)
                found[place] = max(found[place], rms(np.sqrt(squared_distance(ours[name].array, item.array))))
    return found


def repeated(c: Comparison, exact: Mapping[str, Value]) -> Iterator[dict[str, Array]]:
    """Yields gradients of `a` by parameters in nearby problems: the error there, at the value of the reference here.

    A value of the run may be on the other side of an edge in `a`, such as the 0 of a ReLU. That changes the gradients
    of the run, and of no other.
    """
    for index in range(REPEATS):
        runs = []
        for side, inputs, targets in ((c.a, c.inputs_a.values, c.targets_a), (c.reference, c.inputs_b, c.targets_b)):
            store = Store()
            loss = (c.losses or (None, None))[0 if side is c.a else 1]
            with side.nearby(Sample(index), inputs) as moved:
                found = side.record(c.inputs_a.given, moved, store, loss, targets, True, inner=False).gradients
            runs.append({name: np.asarray(value.array, np.float64) for name, value in found.items()})
            store.close()
        own = {f"gradient:{c.parameter_names.get(name, name)}": array for name, array in runs[0].items()}
        yield {name: item.array + (own[name] - runs[1][name.partition(":")[2]]) for name, item in exact.items()}


def _loss(c: Comparison, gradients: bool) -> tuple[Any, Any, bool]:
    """Returns the loss, the targets and whether there are gradients, as `Side.record` takes them."""
    return ((c.losses or (None, None))[1], c.targets_b, True) if gradients else (None, None, False)


def _cotangents(c: Comparison) -> dict[tuple[str, int, int], Array]:
    """Returns the gradients by arguments: by path, number of the call, and number of the argument."""
    arrays: dict[tuple[str, int], Array] = {}

    def watch(value: Value, what: str, path: str, number: int) -> Value:
        if what == "argument gradient":
            arrays[path, number] = value.array
        return value

    store = Store()
    probe = backends.module("torch", "tools.probe")
    with probe.perturbing(c.reference.module, watch, arguments=True):
        run = c.reference.record(c.inputs_a.given, c.inputs_b, store, *_loss(c, True))
    numbers: dict[str, itertools.count[int]] = defaultdict(itertools.count)
    found = {}
    for event in run.events:
        for index, item in enumerate(event.arguments):
            if item.is_float and (array := arrays.get((event.path, next(numbers[event.path])))) is not None:
                found[event.path, event.call, index] = array
    store.close()
    return found


def _seeds(pair: Pair, cotangents: Mapping[tuple[str, int, int], Array]) -> list[Value]:
    """Returns the gradients of the run by the results of a replay, rounded to their dtypes; 0 if absent."""
    known: list[Any] = [None if (g := pair.b.gradients[j]) is None else g.array for _, j, _ in pair.outputs]
    for child in pair.children:
        known += [cotangents.get((child.path, child.b.call, j)) for _, j, _ in child.arguments]
    found = []
    for array, item, noise in zip(known, pair.results("b"), pair.results("noise"), strict=True):
        values = np.zeros(item.array.shape) if array is None or not item.is_float else array
        values = np.where(np.isfinite(item.array), values, 0.0)
        found.append(rounded(Value(values, "fp64"), noise.dtype) if item.is_float else Value(values, item.dtype))
    return found


def _place(pair: Pair, name: str) -> tuple[str, str]:
    """Returns which value of a module a result of the replay of a call is."""
    if name.startswith("gradient "):
        holder, _, part = name[9:].rpartition(".")
        return f"gradient:{part}", ".".join(filter(None, (pair.path, holder)))
    if name.startswith("input "):
        floats = [place for place, item in zip(pair.input_places(), pair.inputs("b"), strict=True) if item.is_float]
        child = floats[int(name[6:])][0]
        return ("argument gradient", pair.path) if child is None else ("gradient", child.path)
    child = pair.places()[index_of(name)][0] if name.startswith("output") else None
    return ("output", pair.path) if child is None else ("argument", child.path)


def _error(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Returns random errors: one for each element, and one for each channel, as of a mean that is subtracted."""
    error = generator.standard_normal(shape)
    for axis in {1, len(shape) - 1} if len(shape) > 1 else ():
        error = error + generator.standard_normal([n if k == axis else 1 for k, n in enumerate(shape)])
    found: Array = error
    return found
