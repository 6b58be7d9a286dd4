"""Records what one module computes, so that another is compared with it on a machine without the first framework.

    record(torch_module, inputs, "trace/")                 # writes all arrays as they come
    compare(mlx_module, read_trace("trace/"))              # as with the module itself

A comparison asks its reference for runs, replays of single calls, a loss, updates and training steps. `record`
computes them and writes the results, `icenet.parity.recordings.recorded_side` returns them. The noise of each result
is measured with them, by the samples that a comparison takes of a module (`icenet.parity.resampling`).

A replay leaves out the calls that both sides make. Those of the other side are not known yet, so the replays of a
module with others within are recorded for several sets of calls (`cuts`), and the finest is used that the other side
has.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends, rng
from icenet.core.errors import UsageError
from icenet.core.messages import option
from icenet.core.weights.layout import join
from icenet.parity import align, resampling
from icenet.parity import inputs as drawing
from icenet.parity.arguments import Progress, check_numbers
from icenet.parity.calls.events import Run, Store
from icenet.parity.calls.matching import Match
from icenet.parity.calls.module_side import ModuleSide
from icenet.parity.calls.pairing import pair_calls
from icenet.parity.calls.pairs import Pair, Replay, Sample, cotangents_of, rounded
from icenet.parity.calls.sides import ModuleError, Side
from icenet.parity.calls.targets import Targets, trains_first_only
from icenet.parity.causes.numbers import attributes
from icenet.parity.fp16 import scaled_for_fp16
from icenet.parity.inputs import Inputs
from icenet.parity.measures import round_to, squared_distance
from icenet.parity.nearby import Perturbation
from icenet.parity.recordings.cuts import cuts_of
from icenet.parity.recordings.trace_files import (
    EVALUATION,
    TRAINING,
    TraceStore,
    TraceWriter,
    encode,
)
from icenet.parity.resampling import FEW
from icenet.parity.stages.training import SMALL, default_rate, update_gradients
from icenet.parity.ties import may_be_kinks, moved_apart
from icenet.parity.trace import Call, Value

Array = npt.NDArray[Any]

SAMPLES = 4
"""Number of samples of the noise of a result. A comparison takes more only for values that are near the tolerance."""


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
    progress: Progress | None = None,
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
        progress: Called with the name of the stage, the finished part of its work, and all of it.

    Returns:
        The folder.

    Raises:
        UsageError: The module fails on the inputs, or an option is wrong.
        FileError: The folder cannot be written. After any error or interrupt, nothing is left in it.
    """
    check_numbers("record", dtype, steps, seed)
    if loss is not None and not callable(loss):
        raise UsageError(f"record: loss is a {type(loss).__name__}; give a function of the output")
    backends.backend_of(module)  # the error if it is none
    writer = TraceWriter(folder)
    try:
        recording = _Recording(module, writer, dtype, seed, loss, optimizer)
        recording.tell = progress or recording.tell
        recording.run(inputs, layout, steps)
    except BaseException:
        writer.discard()
        raise
    writer.close()
    return writer.folder


class _Recording:
    """The state of one recording."""

    def __init__(self, module: Any, writer: TraceWriter, dtype: str, seed: int, loss: Any, optimizer: Any) -> None:
        self.writer, self.dtype, self.seed, self.loss, self.optimizer = writer, dtype, seed, loss, optimizer
        self.store = TraceStore(writer)
        self.user, self.is_mlx = module, backends.backend_of(module) == "mlx"
        self.b = ModuleSide(module, dtype, perturbed=self.is_mlx)
        self.reference = ModuleSide(module, dtype, exact=True)
        self.moved: set[str] = set()
        self.manifest: dict[str, Any] = {"runs": {}, "replays": {}}
        self.tell: Progress = lambda stage, done, total: None

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
            "environment": {"b": self.b.describe(), "reference": side.describe()},
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
                with contextlib.closing(Store()) as store:
                    self.reference.record(given.given, values, store)
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
            f"{failures[0].reason}; give {option('inputs, or layout=')} that it accepts"
        )

    # ---- runs -----------------------------------------------------------------------------------------------

    def _run_in_mode(self, given: Inputs, train: bool, gradients: bool) -> None:
        """Records the runs in a mode, the noise of the whole run, and the replays."""
        mode = TRAINING if train else EVALUATION
        for side in (self.b, self.reference):
            side.set_mode(train)
            for path in self.moved:
                side.set_channels(path, True)
        self.tell(f"run in {mode} mode", 0, 1)
        self.targets = Targets(self.seed, self.reference.tools, first_only=trains_first_only(self.reference))
        arguments = (self.store, self.loss, self.targets, gradients)
        try:
            exact = self.reference.record(given.given, given.values, *arguments)
            noise = self.b.record(given.given, given.values, *arguments)
            for run in (exact, noise):  # read again when they are used
                run.gradients = {name: self.writer.keep(item) for name, item in run.gradients.items()}
        except ModuleError as error:
            raise UsageError(
                f"record: {type(self.user).__name__} fails in {mode} mode, in {error.path or 'the model itself'}: "
                f"{error.reason}"
            ) from None
        self.tell(f"noise of the run, {mode} mode", 0, 1)
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
        replays = self.manifest["replays"][mode] = {}
        for index, pair in enumerate(pairs):
            self.tell(f"modules in {mode} mode", index, len(pairs))
            if not pair.obstacle:
                cuts = cuts_of(pair, pairs, self.reference)
                replays[str(pair.b.number)] = [r for cut in cuts if (r := self._replayed(pair, cut, gradients))]
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
                "output_names": event.output_names,
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
            with side.nearby(Sample(index, rounds, in_order), given.values) as moved:
                run = side.record(given.given, moved, store, self.loss, self.targets, gradients, inner=False)
            outputs = {f"output:{i}": item for i, item in enumerate(run.events[0].outputs)}
            store.close()
            return {**outputs, **{f"gradient:{name}": item for name, item in run.gradients.items()}}

        return self._noise(lambda k, rounds, order: sampled(self.b if rounds else self.reference, k, rounds, order))

    def _noise(
        self, sample: Callable[[int, bool, bool], Mapping[str, Value]], count: int = 0, in_order: bool = True
    ) -> list[dict[str, int]]:
        """Returns the noise of each element of each result, by the samples of `icenet.parity.resampling`.

        Args:
            sample: Returns the results, given the number of the sample, whether values are rounded, and whether sums
                are taken in order.
            count: Number of samples; 0 for SAMPLES.
            in_order: Whether to take samples whose sums are taken in order.
        """
        kinds = (False, True) if in_order and not self.is_mlx else (False,)
        squares: list[dict[str, Array]] = [{} for _ in kinds]
        count = count or min(SAMPLES, resampling.SAMPLES)
        for index in range(count):
            exact = sample(index, False, False)
            for found, kind in zip(squares, kinds, strict=True):
                for name, value in sample(index, True, kind).items():
                    if value.is_float and name in exact and value.array.shape == exact[name].array.shape:
                        distance = squared_distance(value.array, exact[name].array)
                        if name in found and distance.ndim:
                            found[name] += distance
                        else:
                            found[name] = found[name] + distance if name in found else distance
        written = [
            {n: self.writer.add(np.sqrt(found.pop(n) / count).astype(np.float32)) for n in list(found)}
            for found in squares
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
            size = sum(math.prod(self.reference.shapes.get(join(pair.path, n), (0,))) for n in pair.parameters)
            if whole.children and not children and size > SMALL:
                pair.parameters = [name for name in pair.parameters if "." not in name]
        perturbed = self.b.perturbation is not None

        def theirs(path: str, call: Call, seeds: Any) -> dict[str, Value]:
            if perturbed:
                return self.b.sampled_replay(Replay(pair, call.args, seeds), Sample(0, rounds=True))
            return self.b.replay(Replay(pair, call.args, seeds))

        def exactly(path: str, call: Call, seeds: Any) -> dict[str, Value]:
            return self.reference.replay(Replay(pair, call.args, seeds))

        call = Call(tuple(values))
        try:
            if seeds is not None and self.dtype == "fp16":
                seeds = scaled_for_fp16(pair.key, call, seeds, (theirs, exactly))
            exact, noise = exactly(pair.key, call, seeds), theirs(pair.key, call, seeds)
            pair.parameters = [name for name in pair.parameters if f"gradient {name}" in exact]

            def sample(index: int, rounds: bool, in_order: bool) -> dict[str, Value]:
                side = self.b if rounds else self.reference
                return side.sampled_replay(Replay(pair, values, seeds), Sample(index, rounds, in_order))

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
        self.tell("training steps", 0, 1)
        sequence = update_gradients(gradients, list(gradients))
        rate = default_rate(list(gradients), self.reference.weights(), gradients)
        self.b.rate = self.reference.rate = rate

        def sample(index: int, rounds: bool, in_order: bool) -> dict[str, Value]:
            perturb = Perturbation("fp32", index, rounds)
            side = self.b if rounds else self.reference
            moved = ({n: perturb.array(g, "gradient", n, k) for n, g in s.items()} for k, s in enumerate(sequence))
            with side.nearby(Sample(index, rounds), []):
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
            with side.nearby(Sample(index, rounds, in_order), given.values) as moved:
                return {"curve": Value(np.asarray(losses(side, moved)), "fp64")}

        found["noise"], found["in_order"] = (noise.get("curve") for noise in self._noise(sample, FEW))
        return {name: [_number(x) for x in v] if isinstance(v, list) else v for name, v in found.items()}


def _number(value: float) -> Any:
    return value if math.isfinite(value) else str(value)
