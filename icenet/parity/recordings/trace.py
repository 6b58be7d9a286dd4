"""The content of a recorded trace: what a comparison needs of a module that is not there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from icenet.core import backends
from icenet.parity import align
from icenet.parity.arguments import DTYPES
from icenet.parity.calls.events import Event, Run
from icenet.parity.inputs import Inputs
from icenet.parity.recordings.trace_files import TRAINING, TraceReader, damaged, decode
from icenet.parity.trace import Value

Array = npt.NDArray[Any]


def read_trace(folder: str | os.PathLike[str]) -> RecordedTrace:
    """Returns the trace in a folder. Its arrays are read when they are used.

    Args:
        folder: The folder that `icenet.parity.record` wrote.

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
            mode: {int(number): [RecordedReplay(self, item) for item in items] for number, items in found.items()}
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
            event.named = list(map(str, item.get("output_names", ())))
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


class _RecordedEvent(Event):
    storable = rebuildable = False
    named: Sequence[str] = ()

    @property
    def output_names(self) -> list[str]:
        return list(self.named)

    @property
    def is_storable(self) -> bool:
        return self.storable

    @property
    def is_rebuildable(self) -> bool:
        return self.rebuildable


class RecordedReplay:
    """The results of a replay in a trace.

    Attributes:
        calls: Numbers of the events of the calls that it leaves out.
        inputs: Each argument and result of a call that it receives, by the event of the call (None: an argument) and
            its number.
        results: What it computes, by event and number in the same way.
        cotangents: Those of the results; None without gradients.
        values: The results by role ("b" or "reference") and name.
        samples: The noise of the results, by kind ("noise" or "in_order") and name.
    """

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
