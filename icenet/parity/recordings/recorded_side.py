"""A side of a comparison whose results are in a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity.calls.events import Event, Run, Store
from icenet.parity.calls.pairing import is_separable
from icenet.parity.calls.pairs import Pair, Replay, Sample
from icenet.parity.calls.sides import Side
from icenet.parity.recordings.trace import RecordedReplay, RecordedTrace
from icenet.parity.recordings.trace_files import EVALUATION, TRAINING
from icenet.parity.trace import Value, output_name

Array = npt.NDArray[Any]


class _Tools:
    """What a comparison asks the backend of a side for, of a trace."""

    ARRAY = SimpleNamespace

    @staticmethod
    def snapshot(array: Any) -> Any:
        return array

    @staticmethod
    def value(array: Any) -> Value:
        found: Value = array.value
        return found


class RecordedSide(Side):
    """A side of a comparison whose results are in a trace.

    Args:
        trace: The trace.
        exact: Whether it is the reference in float64, or the module in the dtype under test.
    """

    def __init__(self, trace: RecordedTrace, exact: bool) -> None:
        super().__init__(
            trace.backend, trace.dtype, exact, {path: bool(item["training"]) for path, item in trace.modules.items()}
        )
        self.trace = trace
        self._role = "reference" if exact else "b"
        self.tools = _Tools
        self.modules = {
            path: SimpleNamespace(**{str(name): value for name, value in item["attributes"].values()})
            for path, item in trace.modules.items()
        }
        self.kinds = {path: str(item["kind"]) for path, item in trace.modules.items() if item["kind"] is not None}
        self.layer_kinds = trace.layer_kinds
        self.classes = {path: str(item["class"]) for path, item in trace.modules.items()}
        self._nearby: Sample | None = None
        self.shapes = trace.shapes
        self.trainable_names = trace.trainable
        self.depends_on_mode = trace.depends_on_mode

    # ---- what a module is -----------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        return self.trace.environment[self._role]

    def depends_on_mode_at(self, path: str) -> bool:
        return bool(self.trace.modules[path]["depends_on_mode"])

    def dropout_rate(self, path: str) -> float:
        found = self.trace.modules[path]["attributes"].get("p")
        is_dropout = "Dropout" in self.classes[path] and found is not None
        return float(found[1]) if is_dropout and self.train else 0.0

    def own_arrays(self, path: str) -> dict[str, Array]:
        names = self.own_names(path)
        return {name[len(path) + 1 if path else 0 :]: self.trace.weights[name] for name in names}

    def weights(self) -> dict[str, Array]:
        return dict(self.trace.weights)

    def parameters_within(self, path: str) -> list[str]:
        return list(self.trace.modules[path]["parameters"])

    def set_mode(self, train: bool) -> None:
        self.train = train

    def set_sequence_first(self, path: str) -> None:
        """Does nothing: what a dropout returned is recorded."""

    def set_channels(self, path: str, is_moved: bool) -> None:
        """Does nothing: what a dropout returned is recorded."""

    @property
    def run_mode(self) -> str:
        """The mode of the run in the trace: a module that does the same in both is recorded once."""
        return TRAINING if self.train or EVALUATION not in self.trace.runs else EVALUATION

    # ---- runs -----------------------------------------------------------------------------------------------

    def record(
        self,
        given: Any,
        inputs: Sequence[Value],
        store: Store,
        loss: Any = None,
        targets: Any = None,
        cotangent: bool = False,
        inner: bool = True,
        only_gradients: bool = False,
    ) -> Run:
        run = self.trace.runs[self.run_mode][self._role]
        if targets is not None and cotangent:
            floats = [
                SimpleNamespace(value=v, shape=v.array.shape, dtype="float" if v.is_float else v.dtype)
                for v in run.events[0].outputs
            ]
            targets(floats, run.events[0].output_names)
        if self._nearby is None:
            return Run(run.events, run.loss if cotangent else None, run.gradients if cotangent else {})
        root = run.events[0]
        outputs = [self._sampled(f"output:{i}", value) for i, value in enumerate(root.outputs)]
        gradients = {name: self._sampled(f"gradient:{name}", value) for name, value in run.gradients.items()}
        return Run([replace(root, outputs=outputs)], run.loss, gradients if cotangent else {})

    @contextlib.contextmanager
    def nearby(self, sample: Sample, inputs: Sequence[Value]) -> Iterator[list[Value]]:
        self._nearby = sample
        try:
            yield list(inputs)
        finally:
            self._nearby = None

    def _sampled(self, name: str, value: Value) -> Value:
        """Returns a result of the run, of the exact one with the noise of the samples."""
        assert self._nearby is not None
        exact = self.trace.runs[self.run_mode]["reference"]
        kind, _, rest = name.partition(":")
        found = exact.events[0].outputs[int(rest)] if kind == "output" else exact.gradients[rest]
        return _moved(found, self.trace.samples[self.run_mode], name, self._nearby, value.dtype)

    def loss_of(
        self,
        event: Event,
        outputs: Sequence[Value],
        loss: Any,
        targets: Any,
        in_order: int | None = None,
    ) -> dict[str, Value]:
        if in_order is None:
            return self.trace.loss[self._role]
        exact = self.trace.loss["reference"]
        return {
            name: Value(np.asarray(exact[name].array, np.float64) + array, exact[name].dtype)
            for name, array in self.trace.loss_in_order.items()
        }

    def check_optimizer(self, given: Any, role: str) -> None:
        """Does nothing: the updates are recorded."""

    def updated(self, optimizer: Any, gradients: Any, change: Any = None, rows: Any = None) -> dict[str, Array]:
        if change is not None:
            raise align.ReplayError("is not there to be changed")
        if self._nearby is None:
            return dict(self.trace.updated[self._role])
        noise = self.trace.update_noise if self._nearby.rounds else {}
        return {
            name: np.asarray(a, np.float64) + noise.get(name, 0.0)
            for name, a in self.trace.updated["reference"].items()
        }

    def train_steps(
        self,
        given: Any,
        inputs: Sequence[Value],
        loss: Any,
        targets: Any,
        optimizer: Any,
        steps: int,
        first: Any = None,
        follow: Any = None,
    ) -> list[float]:
        curves = self.trace.curves[self.has_one_bias and True in self.trace.curves]
        if self._nearby is None:
            own: list[float] = curves[self._role]
            return own[: steps + 1]
        kind = "in_order" if self._nearby.in_order else "noise"
        noise = curves[kind] if self._nearby.rounds else None
        exact = np.asarray(curves["reference"])
        return list(exact if noise is None else exact + noise)[: steps + 1]

    # ---- replays --------------------------------------------------------------------------------------------

    def arrange(self, a: Side, pairs: list[Pair]) -> None:
        separable = {pair.b.number: pair for pair in pairs if is_separable(pair)}
        for pair in pairs:
            if a.backend == self.backend:  # dropout draws its masks for the axes of the recording
                a.set_channels(pair.a.path, bool(self.trace.modules[pair.path]["moved"]))
            within = {id(event) for event in pair.a.walk()} - {id(child.a) for child in pair.repeated}
            found: list[Pair] = []
            for item in self.trace.replays[self.run_mode].get(pair.b.number, []):
                children = [separable.get(number) for number in item.calls]
                if all(child is not None and id(child.a) in within for child in children):
                    found = [child for child in children if child is not None]
                    break
            pair.children = found
            if not pair.obstacle and self._entry(pair) is None:
                pair.obstacle = "not replayed: the trace has no replay of it"

    def _entry(self, pair: Pair) -> RecordedReplay | None:
        calls = [child.b.number for child in pair.children]
        items = self.trace.replays[self.run_mode].get(pair.b.number, [])
        return next((item for item in items if item.calls == calls), None)

    def _known(self, pair: Pair) -> RecordedReplay:
        found = self._entry(pair)
        if found is None:
            raise align.ReplayError("has no such replay in the trace")
        return found

    def replay_of(self, pair: Pair, gradients: bool) -> Replay:
        """Returns the inputs and the cotangents of a replay, as they were recorded."""
        entry = self._entry(pair)
        if entry is None:  # `replay` says so
            return Replay(pair, [], [] if gradients else None)
        values = [entry.inputs.get(_place(*place)) for place in pair.input_places()]
        seeds = dict(zip(entry.results, entry.cotangents or [], strict=False))
        found = [seeds.get(_place(*place)) for place in pair.places()] if gradients else None
        cotangents = None if found is None else [s for s in found if s is not None]
        return Replay(pair, [v for v in values if v is not None], cotangents)

    def replay(self, given: Replay) -> dict[str, Value]:
        entry = self._known(given.pair)
        self._check(entry, given)
        return self._results(entry, given, entry.values[self._role])

    def sampled_replay(self, given: Replay, sample: Sample) -> dict[str, Value]:
        entry = self._known(given.pair)
        exact, stored = entry.values["reference"], entry.values["b"]
        moved = {
            name: _moved(value, entry.samples, name, sample, stored[name].dtype)
            for name, value in exact.items()
            if name in stored
        }
        return self._results(entry, given, moved)

    def _check(self, entry: RecordedReplay, given: Replay) -> None:
        """Raises ReplayError if the trace has no replay with these inputs."""
        pair, values, cotangents = given.pair, given.values, given.cotangents
        if given.weights:
            raise align.ReplayError("has other weights in the trace")
        places = [_place(*place) for place in pair.input_places()]
        if len(places) != len(values):
            raise align.ReplayError("has other inputs in the trace")
        for place, value in zip(places, values, strict=True):
            known = entry.inputs.get(place)
            if known is None or (known is not value and not np.array_equal(known.array, value.array, equal_nan=True)):
                raise align.ReplayError("has other inputs in the trace")
        if cotangents is None:
            return
        if [_place(*place) for place in pair.places()] != entry.results or entry.cotangents is None:
            raise align.ReplayError("has gradients of other results in the trace")
        for seed, known in zip(cotangents, entry.cotangents, strict=True):
            if seed is not known and not np.array_equal(seed.array, known.array):
                raise align.ReplayError("has other cotangents in the trace")

    def _results(self, entry: RecordedReplay, given: Replay, found: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the results of a replay that a pair has, with its numbers."""
        pair = given.pair
        results: dict[str, Value] = {}
        for index, place in enumerate(pair.places()):
            results[output_name(index)] = found[output_name(entry.results.index(_place(*place)))]
        if given.cotangents is not None:
            floats = [where for where, value in entry.inputs.items() if value is not None and value.is_float]
            places = [_place(*item) for item in pair.input_places()]
            for number, where in enumerate(where for where in places if where in floats):
                results[f"input {number}"] = found[f"input {floats.index(where)}"]
            results |= {name: value for name, value in found.items() if name.startswith("gradient ")}
        results |= {name: value for name, value in found.items() if name.startswith("statistic ")}
        return pair.hidden(results)


def _moved(exact: Value, samples: Mapping[str, Mapping[str, Array]], name: str, sample: Sample, dtype: str) -> Value:
    """Returns an exact result, or one that is off by its noise: the root mean square of the samples is that noise."""
    kind = "in_order" if sample.in_order else "noise"
    noise = samples[kind].get(name) if sample.rounds else None
    if noise is None or not exact.is_float:
        return exact
    return Value(np.asarray(exact.array, np.float64) + noise, dtype)


def _place(child: Pair | None, number: int) -> tuple[int | None, int]:
    return (None if child is None else child.b.number), number
