"""A side with a module: records a run of any module, trains it, and replays one of its calls alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.core.errors import FileError, UsageError
from icenet.core.messages import first_line
from icenet.core.models import randomness
from icenet.parity import align
from icenet.parity.calls import module_replays
from icenet.parity.calls.events import Event, Recorder, Run, Store
from icenet.parity.calls.module_copy import ModuleCopy
from icenet.parity.calls.pairs import Pair, Replay, Sample
from icenet.parity.calls.sides import Follow, ModuleError, Side, Targets
from icenet.parity.calls.structures import named_slots, rebuild, take_apart
from icenet.parity.trace import Value

Array = npt.NDArray[Any]


class ModuleSide(ModuleCopy):
    """A side that computes with a copy of a module."""

    def __init__(self, module: Any, dtype: str, exact: bool = False, perturbed: bool = False) -> None:
        super().__init__(module, dtype, exact, perturbed)
        self._within: dict[str, set[str]] = {}

    def as_test(self) -> ModuleSide:
        """Marks this side as the module under test, whose axes may differ from those of the reference."""
        self.is_test = True
        return self

    # ---- runs -----------------------------------------------------------------------------------------------

    def record(
        self,
        given: Any,
        inputs: Sequence[Value],
        store: Store,
        loss: Any = None,
        targets: Targets | None = None,
        cotangent: bool = False,
        inner: bool = True,
        only_gradients: bool = False,
    ) -> Run:
        recorder = Recorder(self.tools, store, cotangent, not only_gradients)
        run = Run(recorder.events)
        store.runs.append(run)  # also if it fails
        perturb = self.perturbation
        if perturb is not None:
            inputs = [perturb(item, "input", index) for index, item in enumerate(inputs)]
        self._rows = next((item.array.shape[0] for item in inputs if item.array.ndim), 1)
        before, self._run = self._run, None
        modules = self.modules if inner else {"": self.modules[""]}
        handle: Any = recorder
        if (draws := self.draws) is not None:
            modules = self.modules

            def handle(path: str, call: Any, args: Any, kwargs: Any) -> Any:
                with draws.within(path):
                    return recorder(path, call, args, kwargs) if inner or not path else call(*args, **kwargs)

        def call(*arrays: Any) -> list[Any]:
            args, kwargs = rebuild(given, list(arrays))
            output = self.module(*args, **kwargs)
            return [self._loss(output, loss, targets)] if cotangent else []

        names = self.tools.trainable(self.module) if cotangent else []

        def seed(index: int, shape: tuple[int, ...]) -> Array:
            return np.full(shape, self.loss_scale)

        # MLX reads and writes other memory if an id is outside a table
        checked = self.nn.embedding.reading_ids(self.modules.items())
        with checked, self.opened(None), self.tools.intercepting(modules, handle), self.moved_weights(names):
            states = randomness.generator_states(self.nn)
            try:
                outputs, by_input, gradients = self.tools.evaluate(
                    call, inputs, self.module, names, seed if cotangent else None, self.exact
                )
            except FileError:  # of a recording
                raise
            except Exception as error:  # whatever a user's module raises
                failed = recorder.failed or ""
                if cotangent:  # the arrays of a run with gradients cannot be read
                    is_late = bool(recorder.events) and recorder.events[0].is_complete
                    raise ModuleError(self, failed, error, Run([]), is_late) from error
                recorder.finish()
                raise ModuleError(self, failed, error, run) from error
            recorder.finish()
            self.drew = randomness.generator_states(self.nn) != states
        run.loss, run.gradients = outputs[0] if cotangent else None, gradients
        run.input_gradients = by_input if cotangent else []
        self.ran_backward = self.ran_backward or bool(cotangent)
        self._run = run if inner else before
        return run

    def _loss(self, output: Any, loss: Any, targets: Targets | None) -> Any:
        """Returns the loss of an output of the module: that of the user, or the distance from the targets."""
        if loss is not None:
            return loss(output)
        structure, outputs = take_apart(output, self.tools.ARRAY)
        floats = [array for array in outputs if "float" in str(array.dtype)]
        assert targets is not None
        return self.tools.mean_square(floats, targets(outputs, named_slots(structure)), self.exact)

    def loss_of(
        self,
        event: Event,
        outputs: Sequence[Value],
        loss: Any,
        targets: Targets,
        in_order: int | None = None,
    ) -> dict[str, Value]:
        if in_order is not None:
            with backends.module("torch", "tools.sums").summing_in_order(in_order):
                return self.loss_of(event, outputs, loss, targets)

        def call(*arrays: Any) -> list[Any]:
            if loss is not None:
                return [loss(rebuild(event.result, list(arrays)))]
            floats = [array for array in arrays if "float" in str(array.dtype)]
            return [self.tools.mean_square(floats, targets(arrays, event.output_names), self.exact)]

        found, gradients, _ = self.tools.evaluate(
            call, outputs, self.module, (), lambda index, shape: np.ones(shape), self.exact
        )
        named = {f"gradient[{index}]": item for index, item in enumerate(gradients) if item is not None}
        return {"loss": found[0], **named}

    # ---- updates --------------------------------------------------------------------------------------------

    def check_optimizer(self, given: Any, role: str) -> None:
        try:
            made = self.tools.make_optimizer(self.module, given)
            problem = "" if hasattr(made, self.tools.UPDATE) else f"it returns {type(made).__name__}"
        except Exception as error:  # of a function or class of the user
            problem = first_line(error)
        if problem:
            raise UsageError(f"compare: the optimizer of {role}: {problem}; give {self.tools.OPTIMIZERS}")

    def updated(
        self,
        optimizer: Any,
        gradients: Iterable[Mapping[str, Array]],
        change: Callable[[Any, int], None] | None = None,
        rows: Mapping[str, int] | None = None,
    ) -> dict[str, Array]:
        module = self.tools.detached(self.module, rows)
        made = self.tools.make_optimizer(module, optimizer, self.rate)
        for number, step in enumerate(gradients):
            if change is not None:
                change(made, number)
            self.tools.apply_gradients(module, made, step)
        found: dict[str, Array] = self._tree.weights(module)
        return found

    def train_steps(
        self,
        given: Any,
        inputs: Sequence[Value],
        loss: Any,
        targets: Targets,
        optimizer: Any,
        steps: int,
        first: tuple[float, Mapping[str, Value]] | None = None,
        follow: Follow | None = None,
    ) -> list[float]:
        module, own = self.tools.detached(self.module), self.module
        made = self.tools.make_optimizer(module, optimizer, self.rate)
        losses = []
        try:
            self.use(module)
            for step in range(steps + 1):
                if step or first is None:
                    value, gradients = self._step(given, inputs, loss, targets, step < steps)
                else:
                    value, gradients = first
                losses.append(value)
                if step < steps:
                    gradients = follow(step, gradients) if follow is not None else gradients
                    arrays = {name: item.array for name, item in gradients.items()}
                    self._merge_biases(arrays)
                    self.tools.apply_gradients(module, made, arrays)
        finally:
            self.use(own)
        return losses

    def _merge_biases(self, gradients: dict[str, Array]) -> None:
        """Sets the gradients of the second biases of PyTorch's recurrent layers to zero, in place.

        MLX has the sum of both, of which one step changes the sum of PyTorch's biases by twice as much.
        """
        if self.backend != "torch" or not self.has_one_bias:
            return
        for name in gradients:
            holder, _, leaf = name.rpartition(".")
            if self.kinds.get(holder) == "native_recurrent" and leaf.startswith("bias_hh"):
                count = len(gradients[name]) if "GRU" not in self.classes[holder] else 2 * len(gradients[name]) // 3
                gradients[name] = np.concatenate([np.zeros(count), gradients[name][count:]])

    def _step(
        self, given: Any, inputs: Sequence[Value], loss: Any, targets: Targets, backward: bool
    ) -> tuple[float, Mapping[str, Value]]:
        def call(*arrays: Any) -> list[Any]:
            args, kwargs = rebuild(given, list(arrays))
            return [self._loss(self.module(*args, **kwargs), loss, targets)]

        names = self.tools.trainable(self.module) if backward else []
        cotangent = (lambda index, shape: np.ones(shape)) if backward else None
        tracking = (
            self.tools.intercepting(self.modules, self.draws.handle) if self.draws else contextlib.nullcontext()
        )
        with self.opened(None), tracking:
            found, _, gradients = self.tools.evaluate(call, inputs, self.module, names, cotangent, self.exact)
        return float(np.asarray(found[0].array)), gradients

    # ---- replays --------------------------------------------------------------------------------------------

    def arrange(self, a: Side, pairs: list[Pair]) -> None:
        """Does nothing: any call can be left out."""

    def replay(self, given: Replay) -> dict[str, Value]:
        return module_replays.replay(self, given)

    def sampled_replay(self, given: Replay, sample: Sample) -> dict[str, Value]:
        return module_replays.sampled_replay(self, given, sample)

    def has_parameter(self, pair: Pair, name: str) -> bool:
        """Returns whether this side has a parameter, given its path in the reference within the module of a call."""
        if pair.is_opaque or pair.kind in align.DIFFERENT_CALLS:
            return False
        prefix = f"{pair.a.path}." if pair.a.path else ""
        whole = module_replays.own_name(self, pair, pair.a, name)
        if not whole.startswith(prefix):
            return False
        if pair.a.path not in self._within:
            self._within[pair.a.path] = set(self.parameters_within(pair.a.path))
        return whole[len(prefix) :] in self._within[pair.a.path]

    def statistics_of(self, pair: Pair) -> set[str]:
        """Returns the names of the buffers of the module of a call, of which it may change some."""
        return set(self.tools.buffers(self.modules[pair.a.path]))
