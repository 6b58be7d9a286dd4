"""A recorded reference: a comparison with the trace that `icenet.parity.record` wrote, without the module.

A comparison asks its reference for runs, replays of single calls, a loss, updates and training steps. A
`RecordedSide` returns what the trace has of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.core.errors import UsageError
from icenet.parity import align
from icenet.parity.arguments import DTYPES
from icenet.parity.calls.events import Event, Run, Store
from icenet.parity.calls.pairing import is_separable
from icenet.parity.calls.pairs import Pair, Replay, Sample
from icenet.parity.calls.sides import Side
from icenet.parity.causes.numbers import attributes
from icenet.parity.comparison import Comparison
from icenet.parity.inputs import Inputs
from icenet.parity.recordings.trace_files import (
    EVALUATION,
    TRAINING,
    TraceReader,
    damaged,
    decode,
)
from icenet.parity.results.result import Report
from icenet.parity.trace import Value, output_name

Array = npt.NDArray[Any]


def read_trace(folder: str | os.PathLike[str]) -> RecordedTrace:
    """Returns the trace in a folder. Its arrays are read when they are used.

    Raises:
        DataError: There is no trace, or it is incomplete or damaged.
    """
    reader = TraceReader(folder)
    try:
        return RecordedTrace(reader)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, OverflowError):
        raise damaged(reader.folder) from None


class RecordedTrace:
    """A trace: what a comparison needs of a module that is not there. `icenet.parity.compare` takes it as `b`.

    Args:
        reader: Reads its files.

    Attributes:
        name: Class name of the module.
        backend: "mlx" or "torch".
        dtype, seed: Those with which it was recorded.
        inputs: The inputs, in the axes of the module.
    """

    def __init__(self, reader: TraceReader) -> None:
        manifest = reader.manifest
        self.folder, self._reader = reader.folder, reader
        self.name, self.backend = str(manifest["name"]), str(manifest["backend"])
        self.dtype, self.seed = str(manifest["dtype"]), int(manifest["seed"])
        if self.backend not in backends.PACKAGES or self.dtype not in DTYPES:
            raise ValueError
        given, values = decode(manifest["inputs"]["given"]), self.values(manifest["inputs"]["values"])
        self.inputs = Inputs(given, [value for value in values if value is not None])
        if len(self.inputs.names) != len(values):
            raise ValueError
        self.axes = [str(how) for how in manifest["inputs"]["axes"]]
        self.has_loss, self.has_optimizer = bool(manifest["has_loss"]), bool(manifest["has_optimizer"])
        self.modules = {str(item["path"]): item for item in manifest["modules"]}
        if "" not in self.modules:
            raise ValueError
        for item in self.modules.values():
            _ = [str(item["class"]), item["kind"], item["training"], item["depends_on_mode"], item["moved"]]
            _ = [list(item["parameters"]), {k: (str(a), b) for k, (a, b) in item["attributes"].items()}]
        self.shapes = {str(name): tuple(int(n) for n in shape) for name, shape in manifest["shapes"].items()}
        self.weights = {str(name): reader.array(index) for name, index in manifest["weights"].items()}
        self.runs = {
            mode: {role: self._run(run[role]) for role in ("b", "reference")}
            for mode, run in manifest["runs"].items()
        }
        if TRAINING not in self.runs:
            raise ValueError
        self.samples = {
            mode: {kind: {n: reader.array(i) for n, i in run[kind].items()} for kind in ("noise", "in_order")}
            for mode, run in manifest["runs"].items()
        }
        self.replays = {
            mode: {int(number): [_RecordedReplay(self, item) for item in items] for number, items in found.items()}
            for mode, found in manifest["replays"].items()
        }
        self.loss = {role: self.named(manifest["loss"][role]) for role in ("b", "reference")}
        self.loss_in_order = {name: reader.array(index) for name, index in manifest["loss"]["in_order"].items()}
        self.environment = {role: dict(manifest["environment"][role]) for role in ("b", "reference")}
        self.trainable = set(map(str, manifest["trainable"]))
        self.depends_on_mode = bool(manifest["depends_on_mode"])
        self.layer_kinds = dict(manifest["layer_kinds"])
        self.training = manifest["training"]
        if self.training is not None:
            self.steps, self.rate = int(self.training["steps"]), float(self.training["rate"])
            self.update_noise = {str(n): reader.array(i) for n, i in self.training["noise"].items()}
            self.updated = {
                role: {name: reader.array(i) for name, i in self.training["updated"][role].items()}
                for role in ("b", "reference")
            }
            self.curves: dict[bool, dict[str, Any]] = {
                variant == "True": {
                    **{role: [float(x) for x in curves[role]] for role in ("b", "reference")},
                    **{kind: None if curves[kind] is None else reader.array(curves[kind])
                       for kind in ("noise", "in_order")},
                }
                for variant, curves in self.training["curves"].items()
            }  # fmt: skip

    def value(self, item: Any) -> Value | None:
        """Returns the value that an item of the manifest names."""
        return None if item is None else self._reader.value(*item)

    def values(self, items: Any) -> list[Any]:
        """Returns the values of a list of the manifest."""
        return [self.value(item) for item in items]

    def named(self, items: Any) -> dict[str, Value]:
        """Returns the values of a mapping of the manifest."""
        found = {str(name): self.value(item) for name, item in items.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _run(self, run: Any) -> Run:
        events: list[Event] = []
        for number, item in enumerate(run["events"]):
            parent = item["parent"]
            if parent is not None and not 0 <= parent < number:
                raise ValueError
            event = _RecordedEvent(
                str(item["path"]), int(item["call"]), number, None if parent is None else events[parent]
            )
            event.arguments, event.names = self.values(item["arguments"]), list(map(str, item["names"]))
            event.outputs, event.gradients = self.values(item["outputs"]), self.values(item["gradients"])
            event.storable, event.rebuildable = bool(item["is_storable"]), bool(item["is_rebuildable"])
            if len(event.arguments) != len(event.names) or len(event.outputs) != len(event.gradients):
                raise ValueError
            if event.parent is not None:
                event.parent.children.append(event)
            events.append(event)
        if not events or events[0].path != "":
            raise ValueError
        return Run(events, self.value(run["loss"]), self.named(run["gradients"]))

    def inputs_for(self, backend: str) -> Inputs:
        """Returns the inputs in the axes of a module of a backend."""
        if backend == self.backend:
            return self.inputs
        values = [
            Value(align.to_mlx(how, value.array), value.dtype)
            for how, value in zip(self.axes, self.inputs.values, strict=True)
        ]
        return Inputs(self.inputs.given, values)

    def judge(self, a: Any, stages: Sequence[str], dtype: str, steps: int | None, options: dict[str, Any]) -> Report:
        """Compares a module with the trace. Called by `icenet.parity.compare`.

        Raises:
            UsageError: The module is of PyTorch and the trace of MLX, or an option is not that of the recording.
        """
        backend = backends.backend_of(a)
        if (backend, self.backend) == ("torch", "mlx"):
            raise UsageError(
                f"{self.folder}: is a trace of MLX, which has no float64; record the module of PyTorch instead, and "
                "check that of MLX"
            )
        if dtype != self.dtype:
            raise UsageError(f"{self.folder}: was recorded in {self.dtype}, not {dtype}; pass dtype={self.dtype!r}")
        for name, was_given, action in (
            ("loss", self.has_loss, "loss=(function, None)"),
            ("optimizer", self.has_optimizer, "optimizer=(optimizer, None)"),
        ):
            if was_given and options[name] is None:
                raise UsageError(f"{self.folder}: was recorded with {name}=; pass that of the module, {action}")
            if options[name] is not None and not was_given:
                raise UsageError(f"{self.folder}: was recorded without {name}=; pass none, or record it with one")
        if "training" in stages and self.training is not None and steps is not None and steps > self.steps:
            raise UsageError(f"{self.folder}: has {self.steps} training steps, not {steps}")
        steps = self.steps if steps is None and self.training is not None else steps
        return _TraceComparison(a, self, stages, steps, options).run([self.inputs_for(backend)])


class _RecordedEvent(Event):
    storable = rebuildable = False

    @property
    def is_storable(self) -> bool:
        return self.storable

    @property
    def is_rebuildable(self) -> bool:
        return self.rebuildable


class _RecordedReplay:
    """The results of a replay in a trace."""

    def __init__(self, trace: RecordedTrace, item: Any) -> None:
        self.calls = [int(number) for number in item["calls"]]
        self.inputs = {(child, int(j)): trace.value(value) for child, j, value in item["inputs"]}
        self.results = [(child, int(j)) for child, j in item["results"]]
        seeds = item["cotangents"]
        self.cotangents = None if seeds is None else trace.values(seeds)
        self.values = {role: trace.named(item[role]) for role in ("b", "reference")}
        self.samples = {
            kind: {str(name): trace._reader.array(index) for name, index in item[kind].items()}
            for kind in ("noise", "in_order")
        }


def _place(child: Pair | None, number: int) -> tuple[int | None, int]:
    return (None if child is None else child.b.number), number


class _TraceComparison(Comparison):
    """A comparison with a trace."""

    computes_reference = False
    judges_ties = False  # the trace has inputs without ties

    def __init__(
        self, a: Any, trace: RecordedTrace, stages: Sequence[str], steps: int | None, options: dict[str, Any]
    ) -> None:
        self._trace = trace
        super().__init__(a, trace, stages, trace.dtype, trace.seed, steps, options)
        self.report.names = type(a).__name__, trace.name
        self.report.notes.append(f"b is the trace in {trace.folder}")

    def backend_of_reference(self, b: Any) -> str:
        return self._trace.backend

    def sides_of_reference(self, b: Any) -> tuple[Side, Side]:
        return RecordedSide(self._trace, exact=False), RecordedSide(self._trace, exact=True)

    def describe(self, side: Side) -> dict[str, str]:
        if isinstance(side, RecordedSide):
            return self._trace.environment["reference" if side.is_reference else "b"]
        return super().describe(side)

    def reference_run(self, inputs: Inputs, *arguments: Any) -> Run:
        self.inputs_b = self._trace.inputs.values
        return self.reference.record(inputs.given, self.inputs_b, self.store, *arguments)

    def replay_of(self, pair: Pair, gradients: bool) -> Replay:
        assert isinstance(self.reference, RecordedSide)
        return self.reference.replay_of(pair, gradients)

    def rate(self, names: Sequence[str], gradients: Mapping[str, Array]) -> float:
        return self._trace.rate

    def propagated(self, exact: Mapping[str, Value]) -> dict[str, Array]:
        kind = "in_order" if self.b.backend == "torch" and self.a.has_foreign("") else "noise"
        assert isinstance(self.b, RecordedSide)
        noise = self._trace.samples[self.b.run_mode][kind]
        return {name: noise[name] for name in exact if name in noise}

    def suggest(self, pair: Pair, judgements: Mapping[str, Any]) -> None:
        super().suggest(pair, judgements)
        if not self.report.cause and (hint := self._hint(pair)):
            self.report.cause = hint

    def _hint(self, pair: Pair) -> str:
        """Returns an attribute that differs, which is not tried: the reference is not there."""
        ours = attributes(self.a.modules[pair.a.path])
        for meaning, (name, value) in self._trace.modules[pair.path]["attributes"].items():
            own, other = ours.get(meaning, ("", None))
            if type(other) in (int, float) and other != value:
                return f"{own} is {other} in a" + (f", {value} in b" if own == name else f", {name} is {value} in b")
        return ""


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
        self.trace, self.exact, self.is_reference = trace, exact and trace.backend == "torch", exact
        self._role = "reference" if exact else "b"
        self.backend, self.dtype = trace.backend, trace.dtype
        self.tools: Any = _Tools
        self.modules = {
            path: SimpleNamespace(**{str(name): value for name, value in item["attributes"].values()})
            for path, item in trace.modules.items()
        }
        self.kinds = {path: str(item["kind"]) for path, item in trace.modules.items() if item["kind"] is not None}
        self.layer_kinds = trace.layer_kinds
        self.classes = {path: str(item["class"]) for path, item in trace.modules.items()}
        self._modes = {path: bool(item["training"]) for path, item in trace.modules.items()}
        self._names, self._back = {path: path for path in self.modules}, {}
        self.perturbation, self.train = None, False
        self._nearby: Sample | None = None
        self.shapes = trace.shapes
        self.trainable_names = trace.trainable
        self.depends_on_mode = trace.depends_on_mode

    # ---- what a module is -----------------------------------------------------------------------------------

    def depends_on_mode_at(self, path: str) -> bool:
        return bool(self.trace.modules[path]["depends_on_mode"])

    def dropout_rate(self, path: str) -> float:
        found = self.trace.modules[path]["attributes"].get("p")
        is_dropout = "Dropout" in self.classes[path] and found is not None
        return float(found[1]) if is_dropout and self.train else 0.0

    def own_arrays(self, path: str) -> dict[str, Array]:
        prefix = f"{path}." if path else ""
        names = [n for n in self.shapes if n.startswith(prefix) and "." not in n[len(prefix) :]]
        return {name[len(prefix) :]: self.trace.weights[name] for name in names}

    def weights(self) -> dict[str, Array]:
        return dict(self.trace.weights)

    def parameters_within(self, path: str) -> list[str]:
        return list(self.trace.modules[path]["parameters"])

    def eager(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def set_mode(self, train: bool) -> None:
        self.train = train

    def set_channels(self, path: str, is_moved: bool) -> None:
        """Does nothing: the masks of dropout are drawn."""

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
    ) -> Run:
        run = self.trace.runs[self.run_mode][self._role]
        if targets is not None and cotangent:
            floats = [
                SimpleNamespace(value=v, shape=v.array.shape, dtype="float" if v.is_float else v.dtype)
                for v in run.events[0].outputs
            ]
            targets(floats)
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

    def updated(self, optimizer: Any, gradients: Any, change: Any = None) -> dict[str, Array]:
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
            within = {id(event) for event in pair.a.walk()}
            found: list[Pair] = []
            for item in self.trace.replays[self.run_mode].get(pair.b.number, []):
                children = [separable.get(number) for number in item.calls]
                if all(child is not None and id(child.a) in within for child in children):
                    found = [child for child in children if child is not None]
                    break
            pair.children = found
            if not pair.obstacle and self._entry(pair) is None:
                pair.obstacle = "not replayed: the trace has no replay of it"

    def _entry(self, pair: Pair) -> _RecordedReplay | None:
        calls = [child.b.number for child in pair.children]
        items = self.trace.replays[self.run_mode].get(pair.b.number, [])
        return next((item for item in items if item.calls == calls), None)

    def _known(self, pair: Pair) -> _RecordedReplay:
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

    def _check(self, entry: _RecordedReplay, given: Replay) -> None:
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

    def _results(self, entry: _RecordedReplay, given: Replay, found: Mapping[str, Value]) -> dict[str, Value]:
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
