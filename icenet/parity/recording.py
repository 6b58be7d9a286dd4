"""Records what one module computes, and judges another module against it on a machine without the first framework.

    record(torch_module, inputs, "trace/")                 # writes all arrays as they come
    compare(mlx_module, read_trace("trace/"))              # as with the module itself

A comparison calls its reference for runs, replays of single calls, a loss, updates and training steps. `record` makes
these calls and writes the results; a `RecordedSide` returns them. The noise of each result is measured while it is
recorded, with the samples that a comparison takes of a module (`icenet.parity.yardstick`).

A replay leaves out the calls that both sides make. Those of the other side are not known yet, so the replays of a
module with others within are recorded for several sets of calls (`_cuts`), and the finest is used that the other side
has.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends, rng
from icenet.core.errors import UsageError
from icenet.parity import align, yardstick
from icenet.parity import inputs as drawing
from icenet.parity.arguments import DTYPES
from icenet.parity.causes import attributes
from icenet.parity.comparison import Comparison, describe
from icenet.parity.engines import Perturbation
from icenet.parity.events import Event, Run, Store
from icenet.parity.inputs import Inputs
from icenet.parity.locate import scaled_for_fp16
from icenet.parity.pairing import Match, is_separable, pair_calls
from icenet.parity.pairs import Pair, cotangents_of, rounded
from icenet.parity.result import Report
from icenet.parity.runs import Targets
from icenet.parity.sides import ModuleError, Side
from icenet.parity.stages.training import SMALL, default_rate, update_gradients
from icenet.parity.ties import may_be_kinks, moved_apart
from icenet.parity.trace import Call, Value, output_name
from icenet.parity.trace_files import TraceReader, TraceStore, TraceWriter, damaged, decode, encode
from icenet.parity.yardstick import FEW, round_to, squared_distance

Array = npt.NDArray[Any]

_EVALUATION, _TRAINING = "evaluation", "training"

SAMPLES = 4
"""Number of samples of the noise of a result. A comparison takes more only for values that are near the tolerance."""


# ---- recording ----------------------------------------------------------------------------------------------


def record(
    module: Any,
    inputs: Any,
    folder: str | os.PathLike[str],
    *,
    dtype: str = "fp32",
    layout: str | Mapping[str, str] | None = None,
    loss: Callable[..., Any] | None = None,
    optimizer: Any = None,
    steps: int | None = None,
    seed: int = 0,
) -> Path:
    """Runs a module and writes to a folder what a comparison with it needs. The module stays unchanged.

    Its layers are also computed alone, in float64 (PyTorch), and in nearby problems, which show the noise. The module
    is run in evaluation mode, and in training mode if that may differ; dropout has masks that the other side draws,
    too. Each array is written as it is computed.

    Args:
        module: Any `torch.nn.Module` or `mlx.nn.Module`.
        inputs: Its arguments: an array, a tuple of arrays, or a dict of keyword arguments. Images `[B, H, W, C]` or
            in the axes of the module. None: drawn for the signature and the first layer.
        folder: A new or empty folder, or one with a trace, which is replaced.
        dtype: Compute dtype: fp32, bf16 or fp16.
        layout: See `compare`.
        loss: The loss of the output; default: the mean squared distance from random targets.
        optimizer: See `compare`; default: SGD with momentum.
        steps: Number of training steps; default: 2, or 1 for more than a million parameters.
        seed: Seed of drawn inputs, cotangents and targets.

    Returns:
        The folder.

    Raises:
        UsageError: The module fails on the inputs, or an option is wrong.
        FileError: The folder cannot be written.
    """
    if dtype not in DTYPES:
        raise UsageError(f"record: dtype is {dtype!r}: give one of {', '.join(DTYPES)}")
    if steps is not None and steps < 0:
        raise UsageError(f"record: steps is {steps}; give 0 or more")
    backends.backend_of(module)  # the error if it is none
    writer = TraceWriter(folder)
    try:
        recording = _Recording(module, writer, dtype, seed, loss, optimizer)
        recording.run(inputs, layout, steps)
    finally:
        writer.close()
    return writer.folder


class _Recording:
    """The state of one recording."""

    def __init__(self, module: Any, writer: TraceWriter, dtype: str, seed: int, loss: Any, optimizer: Any) -> None:
        self.writer, self.dtype, self.seed, self.loss, self.optimizer = writer, dtype, seed, loss, optimizer
        self.store = TraceStore(writer)
        self.user, self.is_mlx = module, backends.backend_of(module) == "mlx"
        self.b = Side(module, dtype, perturbed=self.is_mlx)
        self.reference = Side(module, dtype, exact=True)
        self.moved: set[str] = set()
        self.manifest: dict[str, Any] = {"runs": {}, "replays": {}}

    def run(self, inputs: Any, layout: Any, steps: int | None) -> None:
        """Records everything and completes the trace."""
        self.manifest |= self._describe_modules()
        depends = self.reference.depends_on_mode
        given = self._inputs(inputs, layout)
        with self.b.eager():
            if depends:
                self._run_in_mode(given, train=False, gradients=False)
            self._run_in_mode(given, train=True, gradients=True)
            self._train(given, steps)
        for module in self.manifest["modules"]:
            module["moved"] = module["path"] in self.moved
        self.writer.finish(self.manifest)

    def keep(self, value: Value | None) -> list[Any] | None:
        """Returns the number of a value and its dtype, for the manifest."""
        return None if value is None else [self.writer.keep(value).index, value.dtype]

    def _describe_modules(self) -> dict[str, Any]:
        side = self.reference
        trainable = side.trainable_names
        modules = [
            {
                "path": path,
                "class": side.classes[path],
                "kind": side.kinds.get(path),
                "training": side.mode(path),
                "depends_on_mode": side.depends_on_mode_at(path),
                "parameters": side.parameters_within(path),
                "attributes": {
                    meaning: [name, value]
                    for meaning, (name, value) in attributes(module).items()
                    if type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
                },
            }
            for path, module in side.modules.items()
        ]
        return {
            "name": type(self.user).__name__,
            "backend": side.backend,
            "dtype": self.dtype,
            "seed": self.seed,
            "has_loss": self.loss is not None,
            "has_optimizer": self.optimizer is not None,
            "depends_on_mode": side.depends_on_mode,
            "layer_kinds": dict(side.layer_kinds),
            "trainable": sorted(trainable),
            "shapes": {name: list(shape) for name, shape in side.shapes.items()},
            "weights": {name: self.writer.add(array) for name, array in self.b.weights().items()},
            "environment": {"b": describe(self.b), "reference": describe(side)},
            "modules": modules,
        }

    def _inputs(self, inputs: Any, layout: Any) -> Inputs:
        """Returns the inputs in the axes of the module, with which it runs."""
        if inputs is None:
            given = next(drawing.draw(self.b, self.user, self.seed, 1, self.dtype))
            candidates = [given.values]
        else:
            given = drawing.read(inputs, self.dtype)
            candidates = [drawing.for_reference(given, self.b, layout, same=self.is_mlx)]
            if layout is None and not self.is_mlx:
                candidates += [drawing.moved(given, how) for how in (align.SAME, align.MOVED)]
        failures = []
        self.reference.set_mode(False)
        for values in candidates:
            try:
                self.reference.record(given.given, values, Store())
            except ModuleError as error:
                failures.append(error)
                continue
            names = [None if layout is None else drawing.layout_of(name, layout) for name in given.names]
            hows = [drawing.axes(v, self.b) if how is None else how for v, how in zip(values, names, strict=True)]
            self.manifest["inputs"] = {
                "given": encode(given.given, "an argument"),
                "values": [self.keep(value) for value in values],
                "axes": hows,
            }
            return Inputs(given.given, values)
        raise UsageError(
            f"record: {type(self.user).__name__} fails on the inputs, in {failures[0].path or 'the model itself'}: "
            f"{failures[0].reason}; give inputs that it accepts, or layout="
        )

    # ---- runs -----------------------------------------------------------------------------------------------

    def _run_in_mode(self, given: Inputs, train: bool, gradients: bool) -> None:
        """Records the runs in a mode, the noise of the whole run, and the replays."""
        mode = _TRAINING if train else _EVALUATION
        for side in (self.b, self.reference):
            side.set_mode(train)
            for path in self.moved:
                side.set_channels(path, True)
        self.targets = Targets(self.seed, self.reference.tools)
        arguments = (self.store, self.loss, self.targets, gradients)
        try:
            exact = self.reference.record(given.given, given.values, *arguments)
            noise = self.b.record(given.given, given.values, *arguments)
        except ModuleError as error:
            raise UsageError(
                f"record: {type(self.user).__name__} fails in {mode} mode, in {error.path or 'the model itself'}: "
                f"{error.reason}"
            ) from None
        samples = self._samples_of_run(given, exact, gradients)
        self.manifest["runs"][mode] = {
            "reference": self._run_manifest(exact),
            "b": self._run_manifest(noise),
            "noise": samples[0],
            "in_order": samples[1],
        }
        matches = [Match(path, path) for path in self.reference.modules]
        pairs, _ = pair_calls(self.b, self.reference, (noise, noise, exact), matches)
        if not pairs or not pairs[0].outputs:
            raise UsageError(
                f"record: {type(self.user).__name__} returns nothing that can be compared; return tensors, or "
                "tuples, lists, dicts or dataclasses of them"
            )
        self._find_moved(exact)
        self.manifest["replays"][mode] = {
            str(pair.b.number): [
                item for cut in _cuts(pair, pairs, self.reference) if (item := self._replayed(pair, cut, gradients))
            ]
            for pair in pairs
            if not pair.obstacle
        }
        if gradients:
            self.exact_run, self.noise_run = exact, noise
            self.manifest["loss"] = self._losses(pairs[0])

    def _find_moved(self, run: Run) -> None:
        """Finds the dropout layers whose inputs have channels first, as those of convolutions in PyTorch."""
        kinds = self.reference.kinds
        shapes = {
            value.array.shape
            for event in run.events
            if align.KINDS.get(kinds.get(event.path) or "") == align.MOVED
            for value in event.outputs
            if value.array.ndim > 2
        }
        for event in run.events:
            if event.arguments and event.arguments[0].array.shape in shapes:
                self.moved.add(event.path)

    def _run_manifest(self, run: Run) -> dict[str, Any]:
        events = [
            {
                "path": event.path,
                "call": event.call,
                "parent": None if event.parent is None else event.parent.number,
                "names": event.names,
                "arguments": [self.keep(item) for item in event.arguments],
                "outputs": [self.keep(item) for item in event.outputs],
                "gradients": [self.keep(item) for item in event.gradients],
                "is_storable": event.is_storable,
                "is_rebuildable": event.is_rebuildable,
            }
            for event in run.events
        ]
        gradients = {name: self.keep(item) for name, item in run.gradients.items()}
        return {"events": events, "loss": self.keep(run.loss), "gradients": gradients}

    def _samples_of_run(self, given: Inputs, exact: Run, gradients: bool) -> list[dict[str, int]]:
        """Returns the noise of the outputs and gradients of a whole run, rounded and with sums in order."""

        def sampled(side: Side, index: int, rounds: bool, in_order: bool) -> dict[str, Value]:
            store = Store()
            with side.nearby(index, given.values, rounds, in_order) as moved:
                run = side.record(given.given, moved, store, self.loss, self.targets, gradients)
            outputs = {f"output:{i}": item for i, item in enumerate(run.events[0].outputs)}
            store.close()
            return {**outputs, **{f"gradient:{name}": item for name, item in run.gradients.items()}}

        return self._noise(lambda k, rounds, order: sampled(self.b if rounds else self.reference, k, rounds, order))

    def _noise(
        self, sample: Callable[[int, bool, bool], Mapping[str, Value]], count: int = 0, in_order: bool = True
    ) -> list[dict[str, int]]:
        """Returns the noise of each element of each result, by the samples of the yardstick.

        Args:
            sample: Returns the results, given the number of the sample, whether values are rounded, and whether sums
                are taken in order.
            count: Number of samples; 0 for SAMPLES.
            in_order: Whether to take samples whose sums are taken in order.
        """
        kinds = (False, True) if in_order and not self.is_mlx else (False,)
        squares: list[dict[str, Array]] = [{} for _ in kinds]
        count = count or min(SAMPLES, yardstick.SAMPLES)
        for index in range(count):
            exact = sample(index, False, False)
            for found, kind in zip(squares, kinds, strict=True):
                for name, value in sample(index, True, kind).items():
                    if value.is_float and name in exact and value.array.shape == exact[name].array.shape:
                        distance = squared_distance(value.array, exact[name].array)
                        found[name] = found[name] + distance if name in found else distance
        written = [
            {n: self.writer.add(np.sqrt(s / count).astype(np.float32)) for n, s in found.items()} for found in squares
        ]
        return written if len(written) == 2 else [*written, {}]

    # ---- replays --------------------------------------------------------------------------------------------

    def _replayed(self, whole: Pair, children: list[Pair], gradients: bool) -> dict[str, Any] | None:
        """Records the replay of a call that leaves out some of the calls within it; None if it is not possible."""
        pair = replace(whole, children=children, parameters=[])
        dtypes = [item.dtype for item in pair.results("noise")]
        values = [rounded(v, n.dtype) for v, n in zip(pair.inputs("b"), pair.inputs("noise"), strict=True)]
        seeds = cotangents_of(pair, dtypes, self.seed) if gradients else None
        if gradients:
            values = [self._apart(pair, index, value) for index, value in enumerate(values)]
            pair.parameters = self.reference.parameters_within(pair.path)
            size = sum(math.prod(self.reference.shapes.get(_joined(pair.path, n), (0,))) for n in pair.parameters)
            if whole.children and not children and size > SMALL:
                pair.parameters = [name for name in pair.parameters if "." not in name]
        perturbed = self.b.perturbation is not None

        def theirs(path: str, call: Call, seeds: Any) -> dict[str, Value]:
            if perturbed:
                return self.b.sampled_replay(pair, 0, list(call.args), seeds, rounds=True)
            return self.b.replay(pair, list(call.args), seeds)

        def exactly(path: str, call: Call, seeds: Any) -> dict[str, Value]:
            return self.reference.replay(pair, list(call.args), seeds)

        call = Call(tuple(values))
        try:
            if seeds is not None and self.dtype == "fp16":
                seeds = scaled_for_fp16(pair.key, call, seeds, (theirs, exactly))
            exact, noise = exactly(pair.key, call, seeds), theirs(pair.key, call, seeds)
            pair.parameters = [name for name in pair.parameters if f"gradient {name}" in exact]

            def sample(index: int, rounds: bool, in_order: bool) -> dict[str, Value]:
                side = self.b if rounds else self.reference
                return side.sampled_replay(pair, index, values, seeds, rounds, in_order)

            sampled = self._noise(sample)
        except align.ReplayError:
            return None
        places = [[None if child is None else child.b.number, j] for child, j in pair.places()]
        return {
            "calls": [child.b.number for child in children],
            "inputs": [
                [None if child is None else child.b.number, j, self.keep(value)]
                for (child, j), value in zip(pair.input_places(), values, strict=True)
            ],
            "results": places,
            "cotangents": None if seeds is None else [self.keep(seed) for seed in seeds],
            "reference": {name: self.keep(value) for name, value in exact.items()},
            "b": {name: self.keep(value) for name, value in noise.items()},
            "noise": sampled[0],
            "in_order": sampled[1],
        }

    def _apart(self, pair: Pair, index: int, value: Value) -> Value:
        """Returns an input whose equal values are moved apart: the function may have no derivative where they are."""
        if not value.is_float or not may_be_kinks(value.array):
            return value
        key = rng.key(0, "ties", pair.key, index)
        return Value(round_to(moved_apart(value.array, value.dtype, key), value.dtype), value.dtype)

    # ---- loss, updates and training -------------------------------------------------------------------------

    def _losses(self, root: Pair) -> dict[str, Any]:
        """Records the loss of the outputs of the run, with its gradients, as a comparison computes it."""
        values = [rounded(v, n.dtype) for v, n in zip(root.b.outputs, root.noise.outputs, strict=True)]
        exact = self.reference.loss_of(root.b, values, self.loss, self.targets)
        noise = self.b.loss_of(root.noise, values, self.loss, self.targets)
        squares: dict[str, Array] = {}
        for index in range(0 if self.is_mlx else FEW):
            found = self.b.loss_of(root.noise, values, self.loss, self.targets, in_order=index)
            for name, value in found.items():
                squares[name] = squares.get(name, 0.0) + squared_distance(value.array, exact[name].array) / FEW
        return {
            "reference": {name: self.keep(value) for name, value in exact.items()},
            "b": {name: self.keep(value) for name, value in noise.items()},
            "in_order": {name: self.writer.add(np.sqrt(array)) for name, array in squares.items()},
        }

    def _train(self, given: Inputs, steps: int | None) -> None:
        """Records updates on equal gradients, and the losses of training steps."""
        gradients = {name: np.asarray(item.array) for name, item in self.exact_run.gradients.items()}
        if not gradients or self.dtype != "fp32":  # parameters are updated in fp32
            self.manifest["training"] = None
            return
        sequence = update_gradients(gradients, list(gradients))
        rate = default_rate(list(gradients), self.reference.weights(), gradients)
        self.b.rate = self.reference.rate = rate

        def sample(index: int, rounds: bool, in_order: bool) -> dict[str, Value]:
            perturb = Perturbation("fp32", index, rounds)
            side = self.b if rounds else self.reference
            moved = [{n: perturb.array(g, "gradient", n, k) for n, g in s.items()} for k, s in enumerate(sequence)]
            with side.nearby(index, [], rounds):
                return {n: Value(array, "fp32") for n, array in side.updated(self.optimizer, moved).items()}

        size = sum(math.prod(shape) for shape in self.reference.shapes.values())
        steps = steps if steps is not None else 2 if size <= SMALL else 1
        updated = {
            role: {name: self.writer.add(array) for name, array in side.updated(self.optimizer, sequence).items()}
            for role, side in (("b", self.b), ("reference", self.reference))
        }
        # MLX has one bias per gate, PyTorch two: their steps differ
        variants = {False, "native_recurrent" in self.reference.kinds.values() and not self.is_mlx}
        curves = {str(variant): self._curves(given, steps, variant) for variant in variants}
        noise = self._noise(sample, FEW, in_order=False)[0]
        self.manifest["training"] = {
            "rate": rate,
            "updated": updated,
            "noise": noise,
            "steps": steps,
            "curves": curves,
        }

    def _curves(self, given: Inputs, steps: int, has_one_bias: bool) -> dict[str, Any]:
        runs = {"b": self.noise_run, "reference": self.exact_run}
        found: dict[str, Any] = {}

        def losses(side: Side, values: Sequence[Value], first: Any = None) -> list[float]:
            side.has_one_bias = has_one_bias
            return side.train_steps(given.given, values, self.loss, self.targets, self.optimizer, steps, first)

        for role, side in (("b", self.b), ("reference", self.reference)):
            run = runs[role]
            assert run.loss is not None
            found[role] = losses(side, given.values, (float(np.asarray(run.loss.array)), run.gradients))

        def sample(index: int, rounds: bool, in_order: bool) -> dict[str, Value]:
            side = self.b if rounds else self.reference
            with side.nearby(index, given.values, rounds, in_order) as moved:
                return {"curve": Value(np.asarray(losses(side, moved)), "fp64")}

        found["noise"], found["in_order"] = (noise.get("curve") for noise in self._noise(sample, FEW))
        return {name: [_number(x) for x in v] if isinstance(v, list) else v for name, v in found.items()}


def _cuts(pair: Pair, pairs: list[Pair], side: Side) -> list[list[Pair]]:
    """Returns the sets of calls within a call that a replay may leave out, the finest one first.

    They are all calls one level down; those with parameters; the same with the calls within a container in its place;
    all layers with parameters at any depth; and none.
    """
    if not pair.children:
        return [[]]
    by_event = {id(item.b): item for item in pairs}
    has_weights = {item.path for item in pairs if side.parameters_within(item.path)}

    def weighted(items: list[Pair]) -> list[Pair]:
        return [item for item in items if item.path in has_weights]

    def within(items: list[Pair], is_expanded: Callable[[Pair], bool]) -> list[Pair]:
        found: list[Pair] = []
        for item in items:
            if is_expanded(item) and item.children:
                found += within(item.children, is_expanded)
            else:
                found.append(item)
        return found

    def is_container(item: Pair) -> bool:
        return side.classes[item.path].endswith((".Sequential", ".ModuleList", ".ModuleDict"))

    assert all(id(item.b) in by_event for item in pair.children)
    expanded = within(pair.children, is_container)
    candidates = [pair.children, expanded, weighted(pair.children), weighted(expanded)]
    candidates += [weighted(within(pair.children, lambda item: True)), []]
    found: list[list[Pair]] = []
    for candidate in candidates:
        if [id(item) for item in candidate] not in [[id(item) for item in other] for other in found]:
            found.append(candidate)
    return found


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _number(value: float) -> Any:
    return value if math.isfinite(value) else str(value)


# ---- traces -------------------------------------------------------------------------------------------------


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
        if _TRAINING not in self.runs:
            raise ValueError
        self.samples = {
            mode: {kind: {n: reader.array(i) for n, i in run[kind].items()} for kind in ("noise", "in_order")}
            for mode, run in manifest["runs"].items()
        }
        self.replays = {
            mode: {int(number): [_Replay(self, item) for item in items] for number, items in found.items()}
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


class _Replay:
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

    def replay_inputs(self, pair: Pair, gradients: bool) -> tuple[list[Value], list[Value] | None]:
        assert isinstance(self.reference, RecordedSide)
        return self.reference.replay_inputs(pair, gradients)

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
        self._nearby: tuple[bool, bool] | None = None
        self.shapes = trace.shapes
        self.trainable_names = trace.trainable
        self.depends_on_mode = trace.depends_on_mode
        self._used: dict[int, _Replay] = {}

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
        return _TRAINING if self.train or _EVALUATION not in self.trace.runs else _EVALUATION

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
    def nearby(
        self, sample: int, inputs: Sequence[Value], rounds: bool, in_order: bool = False
    ) -> Iterator[list[Value]]:
        self._nearby = rounds, in_order
        try:
            yield list(inputs)
        finally:
            self._nearby = None

    def _sampled(self, name: str, value: Value) -> Value:
        """Returns a result of the run, of the exact one with the noise of the samples."""
        assert self._nearby is not None
        rounds, in_order = self._nearby
        exact = self.trace.runs[self.run_mode]["reference"]
        kind, _, rest = name.partition(":")
        found = exact.events[0].outputs[int(rest)] if kind == "output" else exact.gradients[rest]
        return _moved(found, self.trace.samples[self.run_mode], name, rounds, in_order, value.dtype)

    def loss_of(
        self, event: Event, outputs: Sequence[Value], loss: Any, targets: Any, in_order: int | None = None
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
        noise = self.trace.update_noise if self._nearby[0] else {}
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
        rounds, in_order = self._nearby
        noise = curves["in_order" if in_order else "noise"] if rounds else None
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

    def _entry(self, pair: Pair) -> _Replay | None:
        calls = [child.b.number for child in pair.children]
        items = self.trace.replays[self.run_mode].get(pair.b.number, [])
        return next((item for item in items if item.calls == calls), None)

    def _known(self, pair: Pair) -> _Replay:
        found = self._entry(pair)
        if found is None:
            raise align.ReplayError("has no such replay in the trace")
        return found

    def replay_inputs(self, pair: Pair, gradients: bool) -> tuple[list[Value], list[Value] | None]:
        """Returns the inputs and the cotangents of a replay, as they were recorded."""
        entry = self._entry(pair)
        if entry is None:  # `replay` says so
            return [], [] if gradients else None
        values = [entry.inputs.get(_place(*place)) for place in pair.input_places()]
        seeds = dict(zip(entry.results, entry.cotangents or [], strict=False))
        found = [seeds.get(_place(*place)) for place in pair.places()] if gradients else None
        return [v for v in values if v is not None], None if found is None else [s for s in found if s is not None]

    def replay(
        self,
        pair: Pair,
        values: Sequence[Value],
        cotangents: Sequence[Value] | None,
        weights: Mapping[str, Array] | None = None,
    ) -> dict[str, Value]:
        entry = self._known(pair)
        self._check(entry, pair, values, cotangents, weights)
        return self._results(entry, pair, entry.values[self._role], cotangents is not None)

    def sampled_replay(
        self,
        pair: Pair,
        sample: int,
        values: Sequence[Value],
        cotangents: Sequence[Value] | None,
        rounds: bool,
        in_order: bool = False,
    ) -> dict[str, Value]:
        entry = self._known(pair)
        exact, stored = entry.values["reference"], entry.values["b"]
        moved = {
            name: _moved(value, entry.samples, name, rounds, in_order, stored[name].dtype)
            for name, value in exact.items()
            if name in stored
        }
        return self._results(entry, pair, moved, cotangents is not None)

    def _check(
        self,
        entry: _Replay,
        pair: Pair,
        values: Sequence[Value],
        cotangents: Sequence[Value] | None,
        weights: Mapping[str, Array] | None,
    ) -> None:
        """Raises ReplayError if the trace has no replay with these inputs."""
        if weights:
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

    def _results(self, entry: _Replay, pair: Pair, found: Mapping[str, Value], gradients: bool) -> dict[str, Value]:
        """Returns the results of a replay that a pair has, with its numbers."""
        results: dict[str, Value] = {}
        for index, place in enumerate(pair.places()):
            results[output_name(index)] = found[output_name(entry.results.index(_place(*place)))]
        if gradients:
            floats = [where for where, value in entry.inputs.items() if value is not None and value.is_float]
            places = [_place(*item) for item in pair.input_places()]
            for number, where in enumerate(where for where in places if where in floats):
                results[f"input {number}"] = found[f"input {floats.index(where)}"]
            results |= {name: value for name, value in found.items() if name.startswith("gradient ")}
        results |= {name: value for name, value in found.items() if name.startswith("statistic ")}
        return pair.hidden(results)


def _moved(
    exact: Value, samples: Mapping[str, Mapping[str, Array]], name: str, rounds: bool, in_order: bool, dtype: str
) -> Value:
    """Returns an exact result, or one that is off by its noise: the root mean square of the samples is that noise."""
    noise = samples["in_order" if in_order else "noise"].get(name) if rounds else None
    if noise is None or not exact.is_float:
        return exact
    return Value(np.asarray(exact.array, np.float64) + noise, dtype)
