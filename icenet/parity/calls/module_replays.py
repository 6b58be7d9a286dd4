"""Replays of the calls of a module: each is computed alone.

A replay computes what a module does itself. The modules that it calls are not computed: each returns what it returned
in the reference, and the inputs that it would get are results of the replay. So the replays of all modules together
cost one run, and a difference is attributed to the module whose code has it, between two of its calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.core.messages import first_line
from icenet.parity import align
from icenet.parity.calls.events import Event
from icenet.parity.calls.module_copy import ModuleCopy
from icenet.parity.calls.pairs import Pair, Replay, Sample, as_floats
from icenet.parity.calls.structures import arrays_of, rebuild
from icenet.parity.nearby import Perturbation
from icenet.parity.trace import Value, output_name, short_dtype

Array = npt.NDArray[Any]


def replay(side: ModuleCopy, given: Replay) -> dict[str, Value]:
    """Computes a call alone; see `Side.replay`."""
    call = _ReplayedCall(side, given)
    inputs, cotangent = call.inputs(), call.cotangent()
    own, module = call.own, side.modules[call.own.path]
    prefix = f"{own.path}." if own.path else ""
    parameters = _own_names(side, given.pair, own)
    overrides = {parameters[name]: array for name, array in (given.weights or {}).items() if name in parameters}
    relative = [name[len(prefix) :] for name in parameters.values()] if given.cotangents is not None else []
    with side.opened(own), _overridden(side, own.path, prefix, overrides), side.tools.without_checkpoints():
        before = side.tools.buffers(module) if side.train else {}
        try:
            outputs, gradients, by_name = side.tools.evaluate(
                call, inputs, module, relative, cotangent, side.exact, side.ran_backward
            )
        except align.ReplayError:
            raise
        except Exception as error:  # whatever a user's layer raises is a result of the comparison
            reason = first_line(error)
            raise align.ReplayError(f"fails on the inputs of the reference: {reason}") from error
        after = side.tools.buffers(module) if side.train else {}
    found = call.named_outputs(outputs)
    if given.cotangents is not None:
        names = {ours: name for name, ours in parameters.items()}
        found |= call.named_gradients(gradients)
        found |= {f"gradient {names[prefix + name]}": item for name, item in by_name.items()}
    for name, array in after.items():
        if not np.array_equal(array, before[name], equal_nan=True):
            found[f"statistic {name}"] = Value(array, short_dtype(array.dtype))
    return given.pair.hidden(found)


class _ReplayedCall:
    """A call that a side computes alone, as a function of arrays: its inputs, and the results of the calls within it.

    It returns the outputs of the module, the arguments of the calls that are left out, and those of its inputs whose
    gradients by other calls are known (`Replay.others`).

    Attributes:
        own: The event of this side.
    """

    def __init__(self, side: ModuleCopy, given: Replay) -> None:
        pair = given.pair
        self._side, self._given, self._pair, self._is_test = side, given, pair, side.is_test
        self.own = pair.a if side.is_test else pair.b if side.is_reference else pair.noise
        self._hows = pair.input_hows if side.is_test else [align.SAME] * len(given.values)
        self._copied = [] if side.is_test else [n for n, h in enumerate(pair.input_hows) if align.is_single_in_mlx(h)]
        self._result_hows = pair.result_hows if side.is_test else [align.SAME] * len(pair.result_hows)
        self._others = [(index, item) for index, item in enumerate(given.others) if item is not None]
        self._stubs = _stubs(pair, self.own, side.is_test)
        self._inner, self._first_calls = self._intercepted()

    def _intercepted(self) -> tuple[dict[str, Any], dict[str, int]]:
        """Returns the modules whose calls are intercepted, and the number of the first call of each that may draw."""
        side, first_calls = self._side, dict[str, int]()
        inner = {path: side.modules[path] for path, _ in self._stubs}
        for event in self.own.walk() if side.draws is not None else ():
            inner[event.path] = side.modules[event.path]
            first_calls.setdefault(side.names.get(event.path, event.path), event.call)
        inner.pop(self.own.path, None)
        return inner, first_calls

    def inputs(self) -> list[Value]:
        """Returns the inputs with the axes of this side."""
        hows = zip(self._hows, self._given.values, strict=True)
        found = [Value(align.to_mlx(how, item.array), item.dtype) for how, item in hows]
        for index in self._copied:  # they are equal also where inputs are drawn or moved
            how, item = self._pair.input_hows[index], found[index]
            found[index] = replace(item, array=align.to_torch(how, align.to_mlx(how, item.array)))
        if not self._is_test:
            return found
        return [_filled_in(item, mask) for item, mask in zip(found, self._pair.masks, strict=True)]

    def cotangent(self) -> Callable[[int, tuple[int, ...]], Any] | None:
        """Returns a function of the number and shape of a result that returns its cotangent; None without."""
        if self._given.cotangents is None:
            return None
        seeds = [*self._given.cotangents, *(item for _, item in self._others)]
        hows = [*self._result_hows, *(self._hows[index] for index, _ in self._others)]

        def cotangent(index: int, shape: tuple[int, ...]) -> Any:
            seed = seeds[index]
            array = align.cotangent_to_mlx(hows[index], seed.array)
            return array if seed.is_float and array.shape == shape else None

        return cotangent

    def __call__(self, *arrays: Any) -> list[Any]:
        side, pair, count = self._side, self._pair, len(self._pair.arguments)
        if side.draws is not None:
            side.draws.begin(pair.path, pair.b.call, self._first_calls)
        args, kwargs = self._arguments(arrays)
        handle, captured = self._handler(_results_of_calls(side, pair, arrays[count:], self._is_test))
        with side.tools.intercepting(self._inner, handle):
            result = side.modules[self.own.path](*args, **kwargs)
        outputs = arrays_of(result, side.tools.ARRAY)
        try:
            found = [outputs[i if self._is_test else j] for i, j, _ in pair.outputs]
            for index, child in enumerate(pair.children):
                found += [captured[index][i if self._is_test else j] for i, j, _ in child.arguments]
        except (IndexError, KeyError):
            raise align.ReplayError("calls other modules in the replay than in the run") from None
        return found + [arrays[index] for index, _ in self._others]

    def _arguments(self, arrays: Sequence[Any]) -> tuple[Any, Any]:
        """Returns the positional and keyword arguments of the module."""
        left_out, numbers = self._given.left_out, zip(self._pair.arguments, arrays, strict=False)
        given = {i if self._is_test else j: array for (i, j, _), array in numbers}
        natives = _filled(self._side, self.own.arguments, given)
        args, kwargs = rebuild(
            self.own.given, [None if index in left_out else item for index, item in enumerate(natives)]
        )
        if left_out:
            return tuple(map(_without_empty, args)), {n: _without_empty(item) for n, item in kwargs.items()}
        return args, kwargs

    def _handler(self, results: Sequence[Any]) -> tuple[Callable[..., Any], dict[int, list[Any]]]:
        """Returns what takes the calls within the module, and the arguments that it gets of those left out."""
        side, calls, captured = self._side, dict[str, int](), dict[int, list[Any]]()

        def handle(path: str, original: Any, args: Any, kwargs: Any) -> Any:
            number = calls.get(path, 0)
            calls[path] = number + 1
            index = self._stubs.get((path, number))
            if index is None:
                draws = side.draws
                return original(*args, **kwargs) if draws is None else draws.handle(path, original, args, kwargs)
            captured[index] = arrays_of((args, kwargs), side.tools.ARRAY)
            return results[index]

        return handle, captured

    def named_outputs(self, outputs: Sequence[Value]) -> dict[str, Value]:
        """Returns the results by name, with the axes of the reference."""
        return {
            output_name(index): as_floats(Value(align.to_torch(how, item.array), item.dtype))
            for index, (item, how) in enumerate(zip(outputs, self._result_hows, strict=False))
        }

    def named_gradients(self, gradients: Sequence[Value | None]) -> dict[str, Value]:
        """Returns the gradients by the float inputs by name, with the axes of the reference."""
        found: dict[str, Value] = {}
        for item, gradient, how in zip(self._given.values, gradients, self._hows, strict=True):
            if item.is_float:
                assert gradient is not None
                found[f"input {len(found)}"] = Value(align.gradient_to_torch(how, gradient.array), gradient.dtype)
        return found


def sampled_replay(side: ModuleCopy, given: Replay, sample: Sample) -> dict[str, Value]:
    """Replays in a nearby problem."""
    pair, perturb = given.pair, Perturbation(side.dtype, sample.number, sample.rounds)
    moved = [perturb(item, "argument", index) for index, item in enumerate(given.values)]
    seeds = None
    if given.cotangents is not None:
        seeds = [perturb(item, "cotangent", index) for index, item in enumerate(given.cotangents)]
    own = pair.a if side.is_test else pair.b
    module = side.modules[own.path]
    weights = backends.module(side.backend, "nn.tree").weights(module) if not pair.children else None
    names = _own_names(side, pair, own)
    prefix = f"{own.path}." if own.path else ""
    if weights is None:
        weights = side.some_weights(names.values(), prefix)
    new = {
        name: perturb.array(weights[ours[len(prefix) :]], "weight", name)
        for name, ours in names.items()
        if ours[len(prefix) :] in weights
    }
    with side.perturbed(module, perturb, sample):
        found = replay(side, replace(given, values=moved, cotangents=seeds, weights=new))
    if not sample.rounds:
        return found
    # inputs of the calls within it are no outputs of a module, which are perturbed
    first = len(pair.outputs)
    return {
        name: perturb.rounded(item, "result", name)
        if name.startswith("output") and _number_of(name) >= first and item.is_float
        else item
        for name, item in found.items()
    }


def _own_names(side: ModuleCopy, pair: Pair, own: Event) -> dict[str, str]:
    """Returns the path in this side of each parameter of a replay, by its name in the reference."""
    return {name: own_name(side, pair, own, name) for name in pair.parameters}


def own_name(side: ModuleCopy, pair: Pair, own: Event, name: str) -> str:
    if not side.is_test:
        return f"{own.path}.{name}" if own.path else name
    holder, _, leaf = name.rpartition(".")
    ours = side.own_path(".".join(filter(None, (pair.path, holder))))
    if ours is None:  # a list of parameters within a module
        ours = ".".join(filter(None, (own.path, holder)))
    return f"{ours}.{leaf}" if ours else leaf


@contextlib.contextmanager
def _overridden(side: ModuleCopy, path: str, prefix: str, values: Mapping[str, Array]) -> Iterator[None]:
    if not values:
        yield
        return
    with side.tools.assigned(side.modules[path], {name[len(prefix) :]: a for name, a in values.items()}):
        yield


def _stubs(pair: Pair, own: Event, is_test: bool) -> dict[tuple[str, int], int]:
    """Returns the number of the child for each call that the replay leaves out, by path and number."""
    events = {id(child.a if is_test else child.b): index for index, child in enumerate(pair.children)}
    same = pair.b if not is_test else own  # the noise makes the calls of the reference
    calls: dict[str, int] = {}
    found: dict[tuple[str, int], int] = {}

    def walk(event: Event) -> None:
        for child in event.children:
            number = calls.get(child.path, 0)
            calls[child.path] = number + 1
            if id(child) in events:
                found[child.path, number] = events[id(child)]
            else:
                walk(child)

    walk(same)
    return found


def _results_of_calls(side: ModuleCopy, pair: Pair, arrays: Sequence[Any], is_test: bool) -> list[Any]:
    """Returns what each call that the replay leaves out returns."""
    found, start = [], 0
    for child in pair.children:
        event = child.a if is_test else child.b if side.is_reference else child.noise
        results = zip(child.outputs, arrays[start:], strict=False)
        given = {i if is_test else j: array for (i, j, _), array in results}
        start += len(child.outputs)
        natives = _filled(side, event.outputs, given)
        for index, (source, part) in child.derived.get("a" if is_test else "b", {}).items():
            natives[index] = natives[source][part].reshape(event.outputs[index].array.shape)
        found.append(rebuild(event.result, natives))
    return found


def _filled(side: ModuleCopy, recorded: Sequence[Value], given: Mapping[int, Any]) -> list[Any]:
    """Returns the given arrays by number, and those that were recorded for the others."""
    return [
        given[index] if index in given else side.tools.native(item, side.exact, side.module)
        for index, item in enumerate(recorded)
    ]


def _without_empty(item: Any) -> Any:
    """Returns None in place of a tuple or list of nothing else, such as the state of an LSTM."""
    return None if isinstance(item, (tuple, list)) and item and all(part is None for part in item) else item


def _filled_in(item: Value, own: Value | None) -> Value:
    """Returns an input with the numbers by which its own side masks."""
    where = align.masked(item.array) if own is not None else None
    if own is None or where is None:
        return item
    both = where if (hidden := align.masked(own.array)) is None else where & hidden
    return replace(item, array=np.where(both, own.array, item.array))


def _number_of(name: str) -> int:
    return int(name.partition("[")[2].rstrip("]") or 0)
