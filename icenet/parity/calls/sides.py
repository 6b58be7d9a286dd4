"""The sides of a comparison: record a run of any module, and replay one of its calls alone.

A replay computes what a module does itself. The modules that it calls are not computed: each returns what it returned
in the reference, and the inputs that it would get are results of the replay. So the replays of all modules together
cost one run, and a difference is attributed to the module whose code has it, between two of its calls.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.core.errors import UsageError
from icenet.core.models import dropout, randomness
from icenet.core.weights import layout
from icenet.parity import align
from icenet.parity.calls.events import Event, Recorder, Run, Store, rebuild
from icenet.parity.calls.pairs import Pair, Replay, Sample
from icenet.parity.engines import Perturbation
from icenet.parity.trace import Value, class_name, is_foreign, output_name, short_dtype

Array = npt.NDArray[Any]

Targets = Callable[[Sequence[Any]], Sequence[Value]]
"""Returns the targets of the default loss, given the arrays that the module returns."""


class Side:
    """A module in a role of the comparison.

    Args:
        module: The module of the user; a copy of it is used.
        dtype: Compute dtype under test.
        exact: Whether the copy computes in float64 (PyTorch only).
        perturbed: Whether all values are moved by an ulp: the noise of a module of MLX.
    """

    def __init__(
        self,
        module: Any,
        dtype: str,
        exact: bool = False,
        perturbed: bool = False,
    ) -> None:
        self.backend = backends.backend_of(module)
        self.tools = backends.module(self.backend, "tools.calls")
        self.nn = backends.module(self.backend, "nn")
        self.dtype = dtype
        self.exact = exact and self.backend == "torch"
        self.module = self.tools.working_copy(module, dtype, self.exact)
        self.modules: dict[str, Any] = self.tools.distinct_modules(self.module)
        self.kinds: dict[str, str] = backends.module(self.backend, "nn.kinds").call_kinds(self.modules.items())
        self.layer_kinds: dict[str, str] = backends.module(self.backend, "nn.tree").layer_kinds(self.module)
        self.classes = {path: class_name(inner) for path, inner in self.modules.items()}
        self._modes = {path: bool(getattr(inner, "training", True)) for path, inner in self.modules.items()}
        self.is_reference = exact
        self._within: dict[str, set[str]] = {}
        self._back: dict[str, str] = {}
        self._names = {path: path for path in self.modules}
        self.perturbation = Perturbation(dtype, 0) if perturbed else None
        self.train = False
        self._dropouts: dict[str, Any] = {}
        self._channels: dict[str, bool] = {}
        self._rows = 1
        self._run: Run | None = None

    @property
    def names(self) -> dict[str, str]:
        """The path in the reference of each module, by its own path."""
        return self._names

    @names.setter
    def names(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        self._back = {theirs: ours for ours, theirs in names.items()}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical shape of each array, by path."""
        found: dict[str, tuple[int, ...]] = self._tree.weight_shapes(self.module)
        return found

    @functools.cached_property
    def trainable_names(self) -> set[str]:
        """The paths of the trainable parameters, those of shared ones at each place."""
        return {path for path, _, is_trainable in self._tree.named_arrays(self.module) if is_trainable}

    @functools.cached_property
    def depends_on_mode(self) -> bool:
        """Whether the module may compute something else in training mode than in evaluation mode."""
        return any(map(_depends_on_mode, self.modules.values()))

    def depends_on_mode_at(self, path: str) -> bool:
        """Returns whether the module at a path itself may compute something else in training mode."""
        return _depends_on_mode(self.modules[path])

    def mode(self, path: str) -> bool:
        """Returns whether the user's module at a path is in training mode."""
        return self._modes[path]

    def own_path(self, path: str) -> str | None:
        """Returns the path of a module of this side, by its path in the reference; None if it has none."""
        return self._back.get(path)

    def dropout_rate(self, path: str) -> float:
        """Returns the rate of a dropout layer; 0 for other modules."""
        layer = self._dropouts.get(path)
        return float(layer.p) if layer is not None else 0.0

    def own_arrays(self, path: str) -> dict[str, Array]:
        """Returns the parameters and buffers of the module at a path itself, not of those within it, by name."""
        prefix = f"{path}." if path else ""
        names = [n for n in self.shapes if n.startswith(prefix) and "." not in n[len(prefix) :]]
        return self._some_weights(names, prefix)

    def weights(self) -> dict[str, Array]:
        """Returns the canonical weights."""
        found: dict[str, Array] = self._tree.weights(self.module)
        return found

    def unshare(self) -> None:
        """Gives the copy parameters of its own."""
        self._use(self.tools.detached(self.module))

    def assign(self, values: Mapping[str, Array]) -> None:
        """Sets canonical weights of the copy."""
        with self.tools.assigned(self.module, values):
            self.module = self.tools.detached(self.module)
        self.modules = self.tools.distinct_modules(self.module)

    @property
    def _tree(self) -> Any:
        return backends.module(self.backend, "nn.tree")

    def eager(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which nothing is compiled: each replay is another function, called once."""
        context: contextlib.AbstractContextManager[None] = self.tools.eager()
        return context

    def arrange(self, a: Side, pairs: list[Pair]) -> None:
        """Changes the calls that replays leave out to those that this side has the results of: any, for a module."""

    # ---- modes ----------------------------------------------------------------------------------------------

    def set_mode(self, train: bool) -> None:
        """Sets the mode of the copy: evaluation, or that of training with the layers that the user froze."""
        self.train = train
        self.module.train(train)
        if train and self._modes[""]:
            for path, inner in self.modules.items():
                if not self._modes[path] and self.backend == "torch":
                    inner.training = False
                elif not self._modes[path]:
                    inner._training = False
        self._dropouts = {}
        if train:
            self.nn.dropout.key_dropouts(self.modules.items())
            self._dropouts = dropout.dropout_layers(self.modules.items())
            for path, is_moved in self._channels.items():  # of layers that have keys in training mode only
                self.set_channels(path, is_moved)

    def set_channels(self, path: str, is_moved: bool) -> None:
        """Tells a dropout layer whether its input has channels first in PyTorch and last in MLX."""
        self._channels[path] = is_moved
        if hasattr(self.modules[path], "images"):
            self.modules[path].images = is_moved

    def silence(self, path: str) -> bool:
        """Sets the rate of all dropouts within a layer to zero; returns whether one was above."""
        changed = False
        for inner, module in self.modules.items():
            if inner != path and not inner.startswith(f"{path}."):
                continue
            for name, none in (("p", 0.0), ("_p_1", 1.0), ("dropout", 0.0)):
                if isinstance(getattr(module, name, None), float) and getattr(module, name) != none:
                    setattr(module, name, none)
                    changed = True
        return changed

    def drawing_module(self, given: Any, inputs: Sequence[Value]) -> str | None:
        """Returns the path of a module that draws random numbers without a key in a call; None without one."""
        arrays = [self.tools.native(item, self.exact, self.module) for item in inputs]

        def call() -> None:
            args, kwargs = rebuild(given, arrays)
            self.module(*args, **kwargs)

        with self._open(None):
            found = self.nn.random.find_draw(self.modules.items(), call, lambda: randomness.generator_states(self.nn))
        return None if found is None else str(found[0])

    def _seed_dropouts(self, before: Event | None) -> None:
        """Sets the keys of the dropout layers, as they are when an event begins."""
        for path, layer in self._dropouts.items():
            keys = dropout.dropout_keys(0, 0, range(self._rows), [self.names.get(path, path)])
            layer.seed(self.nn.random.to_keys(keys)[0])
            if before is not None and self._run is not None:
                layer._calls = sum(event.path == path for event in self._run.events[: before.number])

    # ---- runs -----------------------------------------------------------------------------------------------

    def record(
        self,
        given: Any,
        inputs: Sequence[Value],
        store: Store,
        loss: Any = None,
        targets: Targets | None = None,
        cotangent: bool = False,
    ) -> Run:
        """Calls the module and records all events.

        Args:
            given: `(args, kwargs)` with slots for the inputs.
            inputs: The arrays of the arguments.
            store: Keeps the arrays.
            loss: The user's loss of the output; None for the distance from `targets`.
            targets: Returns the target of each floating output, in the axes of this side, given the outputs.
            cotangent: Whether to compute the loss and its gradients.

        Raises:
            ModuleError: The module raises an error.
        """
        recorder = Recorder(self.tools, store, cotangent)
        perturb = self.perturbation
        if perturb is not None:
            inputs = [perturb(item, "input", index) for index, item in enumerate(inputs)]
        self._rows = next((item.array.shape[0] for item in inputs if item.array.ndim), 1)
        self._run = None

        def call(*arrays: Any) -> list[Any]:
            args, kwargs = rebuild(given, list(arrays))
            output = self.module(*args, **kwargs)
            if not cotangent:
                return []
            if loss is not None:
                return [loss(output)]
            outputs = _arrays_of(output, self.tools.ARRAY)
            floats = [o for o in outputs if "float" in str(o.dtype)]
            assert targets is not None
            return [self.tools.mean_square(floats, targets(outputs), self.exact)]

        names = self.tools.trainable(self.module) if cotangent else []

        def seed(index: int, shape: tuple[int, ...]) -> Array:
            return np.full(shape, self.loss_scale)

        with self._open(None), self.tools.intercepting(self.modules, recorder), self._moved_weights("", names):
            states = randomness.generator_states(self.nn)
            try:
                outputs, _, gradients = self.tools.evaluate(
                    call, inputs, self.module, names, seed if cotangent else None, self.exact
                )
            except Exception as error:  # whatever a user's module raises
                failed = recorder.failed or ""
                if cotangent:  # the arrays of a run with gradients cannot be read
                    raise ModuleError(self, failed, error, Run([])) from error
                raise ModuleError(self, failed, error, Run(recorder.finish())) from error
            events = recorder.finish()
            self.drew = randomness.generator_states(self.nn) != states
        self._run = Run(events, outputs[0] if cotangent else None, gradients)
        store.runs.append(self._run)
        return self._run

    def loss_of(
        self,
        event: Event,
        outputs: Sequence[Value],
        loss: Any,
        targets: Targets,
        in_order: int | None = None,
    ) -> dict[str, Value]:
        """Returns the loss of given outputs, and its gradient by each of them.

        Args:
            event: The call of the module, for the structure of its result.
            outputs: The outputs, in the axes of this side.
            loss: The loss of the user; None for the distance from the targets.
            targets: See `record`.
            in_order: Number of a sample in which PyTorch sums term by term; None for a usual run.
        """
        if in_order is not None:
            with backends.module("torch", "tools.sums").summing_in_order(in_order):
                return self.loss_of(event, outputs, loss, targets)

        def call(*arrays: Any) -> list[Any]:
            if loss is not None:
                return [loss(rebuild(event.result, list(arrays)))]
            floats = [array for array in arrays if "float" in str(array.dtype)]
            return [self.tools.mean_square(floats, targets(arrays), self.exact)]

        found, gradients, _ = self.tools.evaluate(
            call, outputs, self.module, (), lambda index, shape: np.ones(shape), self.exact
        )
        named = {f"gradient[{index}]": item for index, item in enumerate(gradients) if item is not None}
        return {"loss": found[0], **named}

    def check_optimizer(self, given: Any, role: str) -> None:
        """Raises UsageError if no optimizer can be made of what the user gave."""
        try:
            made = self.tools.make_optimizer(self.module, given)
            problem = "" if hasattr(made, self.tools.UPDATE) else f"it returns {type(made).__name__}"
        except Exception as error:  # of a function or class of the user
            problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        if problem:
            raise UsageError(f"compare: the optimizer of {role}: {problem}; give {self.tools.OPTIMIZERS}")

    def updated(
        self,
        optimizer: Any,
        gradients: Sequence[Mapping[str, Array]],
        change: Callable[[Any, int], None] | None = None,
    ) -> dict[str, Array]:
        """Returns the canonical weights after a step of an optimizer on each of the gradients.

        Args:
            optimizer: The optimizer of the user; None for SGD.
            gradients: Of each step, by path.
            change: Changes the options of the optimizer before a step, given its number.
        """
        module = self.tools.detached(self.module)
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
    ) -> list[float]:
        """Returns the losses before the first and after each training step.

        Args:
            given, inputs, loss, targets: See `record`.
            optimizer: The optimizer of the user; None for SGD.
            steps: Number of steps.
            first: The loss and the gradients before the first step, if they are known.
        """
        module, own = self.tools.detached(self.module), self.module
        made = self.tools.make_optimizer(module, optimizer, self.rate)
        losses = []
        try:
            self._use(module)
            for step in range(steps + 1):
                if step or first is None:
                    value, gradients = self._step(given, inputs, loss, targets, step < steps)
                else:
                    value, gradients = first
                losses.append(value)
                if step < steps:
                    arrays = {name: item.array for name, item in gradients.items()}
                    self._merge_biases(arrays)
                    self.tools.apply_gradients(module, made, arrays)
        finally:
            self._use(own)
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

    drew = False
    """Whether the last run drew random numbers without a key."""
    rate = 0.1
    """Learning rate of the default optimizer."""
    has_one_bias = False
    """Whether the other side has one bias per gate in its recurrent layers."""

    def _use(self, module: Any) -> None:
        self.module = module
        self.modules = self.tools.distinct_modules(module)
        self._dropouts = dropout.dropout_layers(self.modules.items()) if self.train else {}

    def _step(
        self, given: Any, inputs: Sequence[Value], loss: Any, targets: Targets, backward: bool
    ) -> tuple[float, Mapping[str, Value]]:
        def call(*arrays: Any) -> list[Any]:
            args, kwargs = rebuild(given, list(arrays))
            output = self.module(*args, **kwargs)
            if loss is not None:
                return [loss(output)]
            outputs = _arrays_of(output, self.tools.ARRAY)
            floats = [o for o in outputs if "float" in str(o.dtype)]
            return [self.tools.mean_square(floats, targets(outputs), self.exact)]

        names = self.tools.trainable(self.module) if backward else []
        cotangent = (lambda index, shape: np.ones(shape)) if backward else None
        with self._open(None):
            found, _, gradients = self.tools.evaluate(call, inputs, self.module, names, cotangent, self.exact)
        return float(np.asarray(found[0].array)), gradients

    @contextlib.contextmanager
    def nearby(self, sample: Sample, inputs: Sequence[Value]) -> Iterator[list[Value]]:
        """Sets the weights to those of a nearby problem while the context is open; yields its inputs."""
        perturb = Perturbation(self.dtype, sample.number, sample.rounds)
        weights = self.weights()
        moved = {name: perturb.array(weights[name], "weight", name) for name in self.tools.trainable(self.module)}
        with self.tools.assigned(self.module, moved), self._perturbed(self.module, perturb, sample):
            yield [perturb(item, "input", index) for index, item in enumerate(inputs)]

    @contextlib.contextmanager
    def _perturbed(self, module: Any, perturb: Perturbation, sample: Sample) -> Iterator[None]:
        """Moves what a module of PyTorch computes by ulps, and takes its sums term by term, as a sample wants it."""
        with contextlib.ExitStack() as stack:
            if sample.rounds and self.backend == "torch":
                stack.enter_context(backends.module("torch", "tools.probe").perturbing(module, perturb.rounded))
            if sample.in_order:
                stack.enter_context(backends.module("torch", "tools.sums").summing_in_order(sample.number))
            yield

    @contextlib.contextmanager
    def _open(self, before: Event | None) -> Iterator[None]:
        """Keeps the buffers and generators, and seeds the dropouts, while the context is open."""
        with self.nn.norm.keep_buffers(self.module), self.tools.generators_kept():
            self._seed_dropouts(before)
            yield

    @contextlib.contextmanager
    def _moved_weights(self, prefix: str, names: Sequence[str]) -> Iterator[None]:
        if self.perturbation is None or not names:
            yield
            return
        perturb = self.perturbation
        module = self.modules[prefix]
        weights = backends.module(self.backend, "nn.tree").weights(module)
        moved = {name: perturb.array(weights[name], "weight", name) for name in names if name in weights}
        with self.tools.assigned(module, moved):
            yield

    # ---- replays --------------------------------------------------------------------------------------------

    def replay(self, given: Replay) -> dict[str, Value]:
        """Computes what a module does itself in a call, given its arguments and the results of the calls within it.

        Returns:
            `output`, `output[1]`, ... for the results, and `input 0`, ... for the gradients by the floating inputs,
            in the axes of the reference; `gradient NAME` for parameters and `statistic NAME` for running statistics.
        """
        pair, values, cotangents, weights = given.pair, given.values, given.cotangents, given.weights
        is_test = self._is_a
        own = pair.a if is_test else pair.b if self.is_reference else pair.noise
        module = self.modules[own.path]
        prefix = f"{own.path}." if own.path else ""
        hows = pair.input_hows if is_test else [align.SAME] * len(values)
        inputs = [Value(align.to_mlx(how, item.array), item.dtype) for how, item in zip(hows, values, strict=True)]
        if is_test:
            inputs = [_filled_in(item, mask) for item, mask in zip(inputs, pair.masks, strict=True)]
        count = len(pair.arguments)
        stubs = self._stubs(pair, own, is_test)
        inner = {path: self.modules[path] for path, _ in stubs}
        captured: dict[int, list[Any]] = {}

        def call(*arrays: Any) -> list[Any]:
            captured.clear()
            calls: dict[str, int] = {}
            results = self._results_of_calls(pair, arrays[count:], is_test)

            def handle(path: str, original: Any, args: Any, kwargs: Any) -> Any:
                number = calls.get(path, 0)
                calls[path] = number + 1
                index = stubs.get((path, number))
                if index is None:
                    return original(*args, **kwargs)
                captured[index] = _arrays_of((args, kwargs), self.tools.ARRAY)
                return results[index]

            given = {i if is_test else j: array for (i, j, _), array in zip(pair.arguments, arrays, strict=False)}
            natives = self._filled(own.arguments, given)
            args, kwargs = rebuild(own.given, natives)
            with self.tools.intercepting(inner, handle):
                result = module(*args, **kwargs)
            outputs = _arrays_of(result, self.tools.ARRAY)
            try:
                found = [outputs[i if is_test else j] for i, j, _ in pair.outputs]
                for index, child in enumerate(pair.children):
                    found += [captured[index][i if is_test else j] for i, j, _ in child.arguments]
            except (IndexError, KeyError):
                raise align.ReplayError("calls other modules in the replay than in the run") from None
            return found

        result_hows = pair.result_hows if is_test else [align.SAME] * len(pair.result_hows)
        cotangent = None
        if cotangents is not None:
            seeds = list(cotangents)

            def cotangent(index: int, shape: tuple[int, ...]) -> Any:
                seed = seeds[index]
                array = align.to_mlx(result_hows[index], seed.array)
                return array if seed.is_float and array.shape == shape else None

        parameters = self._own_names(pair, own)
        overrides = {parameters[name]: array for name, array in (weights or {}).items() if name in parameters}
        relative = [name[len(prefix) :] for name in parameters.values()] if cotangents is not None else []
        with self._open(own), self._overridden(own.path, prefix, overrides):
            before = self.tools.buffers(module) if self.train else {}
            try:
                outputs, gradients, by_name = self.tools.evaluate(
                    call, inputs, module, relative, cotangent, self.exact
                )
            except align.ReplayError:
                raise
            except Exception as error:  # whatever a user's layer raises is a result of the comparison
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise align.ReplayError(f"fails on the inputs of the reference: {reason}") from error
            after = self.tools.buffers(module) if self.train else {}
        found = {
            output_name(index): Value(align.to_torch(how, item.array), item.dtype)
            for index, (item, how) in enumerate(zip(outputs, result_hows, strict=True))
        }
        if cotangents is not None:
            number = 0
            for item, gradient, how in zip(values, gradients, hows, strict=True):
                if item.is_float:
                    assert gradient is not None
                    found[f"input {number}"] = Value(align.to_torch(how, gradient.array), gradient.dtype)
                    number += 1
            names = {own_name: name for name, own_name in parameters.items()}
            found |= {f"gradient {names[prefix + name]}": item for name, item in by_name.items()}
        for name, array in after.items():
            if not np.array_equal(array, before[name], equal_nan=True):
                found[f"statistic {name}"] = Value(array, short_dtype(array.dtype))
        return pair.hidden(found)

    loss_scale = 1.0
    """Factor of the gradients that `record` returns."""
    _is_a = False

    def as_test(self) -> Side:
        """Marks this side as the module under test, whose axes may differ from those of the reference."""
        self._is_a = True
        return self

    def parameters_within(self, path: str) -> list[str]:
        """Returns the trainable parameters of the module at a path, by path within it."""
        found: list[str] = self.tools.trainable(self.modules[path])
        return found

    def has_parameter(self, pair: Pair, name: str) -> bool:
        """Returns whether this side has a parameter, given its path in the reference within the module of a call."""
        if pair.is_opaque or pair.kind in align.DIFFERENT_CALLS:
            return False
        prefix = f"{pair.a.path}." if pair.a.path else ""
        whole = self._own_name(pair, pair.a, name)
        if not whole.startswith(prefix):
            return False
        if pair.a.path not in self._within:
            self._within[pair.a.path] = set(self.parameters_within(pair.a.path))
        return whole[len(prefix) :] in self._within[pair.a.path]

    def statistics_of(self, pair: Pair) -> set[str]:
        """Returns the names of the buffers of the module of a call, of which it may change some."""
        return set(self.tools.buffers(self.modules[pair.a.path]))

    def _own_names(self, pair: Pair, own: Event) -> dict[str, str]:
        """Returns the path in this side of each parameter of a replay, by its name in the reference."""
        return {name: self._own_name(pair, own, name) for name in pair.parameters}

    def _own_name(self, pair: Pair, own: Event, name: str) -> str:
        if not self._is_a:
            return f"{own.path}.{name}" if own.path else name
        holder, _, leaf = name.rpartition(".")
        ours = self._back.get(".".join(filter(None, (pair.path, holder))))
        if ours is None:  # a list of parameters within a module
            ours = ".".join(filter(None, (own.path, holder)))
        return f"{ours}.{leaf}" if ours else leaf

    @contextlib.contextmanager
    def _overridden(self, path: str, prefix: str, values: Mapping[str, Array]) -> Iterator[None]:
        if not values:
            yield
            return
        with self.tools.assigned(self.modules[path], {name[len(prefix) :]: a for name, a in values.items()}):
            yield

    def _stubs(self, pair: Pair, own: Event, is_test: bool) -> dict[tuple[str, int], int]:
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

    def _results_of_calls(self, pair: Pair, arrays: Sequence[Any], is_test: bool) -> list[Any]:
        """Returns what each call that the replay leaves out returns."""
        found, start = [], 0
        for child in pair.children:
            event = child.a if is_test else child.b if self.is_reference else child.noise
            results = zip(child.outputs, arrays[start:], strict=False)
            given = {i if is_test else j: array for (i, j, _), array in results}
            start += len(child.outputs)
            natives = self._filled(event.outputs, given)
            for index, (source, part) in child.derived.get("a" if is_test else "b", {}).items():
                natives[index] = natives[source][part].reshape(event.outputs[index].array.shape)
            found.append(rebuild(event.result, natives))
        return found

    def _filled(self, recorded: Sequence[Value], given: Mapping[int, Any]) -> list[Any]:
        """Returns the given arrays by number, and those that were recorded for the others."""
        return [
            given[index] if index in given else self.tools.native(item, self.exact, self.module)
            for index, item in enumerate(recorded)
        ]

    # ---- samples of the noise -------------------------------------------------------------------------------

    def sampled_replay(self, given: Replay, sample: Sample) -> dict[str, Value]:
        """Replays in a nearby problem."""
        pair, perturb = given.pair, Perturbation(self.dtype, sample.number, sample.rounds)
        moved = [perturb(item, "argument", index) for index, item in enumerate(given.values)]
        seeds = None
        if given.cotangents is not None:
            seeds = [perturb(item, "cotangent", index) for index, item in enumerate(given.cotangents)]
        own = pair.a if self._is_a else pair.b
        module = self.modules[own.path]
        weights = backends.module(self.backend, "nn.tree").weights(module) if not pair.children else None
        names = self._own_names(pair, own)
        prefix = f"{own.path}." if own.path else ""
        if weights is None:
            weights = self._some_weights(names.values(), prefix)
        new = {
            name: perturb.array(weights[ours[len(prefix) :]], "weight", name)
            for name, ours in names.items()
            if ours[len(prefix) :] in weights
        }
        with self._perturbed(module, perturb, sample):
            found = self.replay(Replay(pair, moved, seeds, new))
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

    def _some_weights(self, names: Any, prefix: str) -> dict[str, Array]:
        """Returns the canonical values of some parameters, by path within the module at `prefix`."""
        tree = backends.module(self.backend, "nn.tree")
        found = {}
        by_holder: dict[str, list[str]] = {}
        for name in names:
            by_holder.setdefault(self._holder(name), []).append(name)
        for holder, paths in by_holder.items():
            start = f"{holder}." if holder else ""
            arrays = dict(tree.native_arrays(self.modules[holder]))
            for path in paths:
                array = arrays[path[len(start) :]]
                numpy = np.asarray(backends.module(self.backend, "tools.probe").to_numpy(array))
                kind = layout.parameter_kind(self.layer_kinds, path)
                moved = layout.tree_to_torch({path: numpy}, {layout.split(path)[0]: kind})
                found[path[len(prefix) :]] = moved[path]
        return found

    def _holder(self, name: str) -> str:
        """Returns the path of the module that holds a parameter."""
        path = name
        while path:
            path = path.rpartition(".")[0]
            if path in self.modules:
                return path
        return ""

    def has_foreign(self, path: str) -> bool:
        """Returns whether the module at a path, or one within it, computes with code outside IceNet."""
        return any(
            is_foreign(name)
            for inner, name in self.classes.items()
            if path in ("", inner) or inner.startswith(path + ".")
        )


class ModuleError(Exception):
    """A module of the user raised an error.

    Attributes:
        side: The side.
        path: Path of the innermost module that raised.
        run: The events until then.
    """

    def __init__(self, side: Side, path: str, error: Exception, run: Run) -> None:
        self.side, self.path, self.run = side, path, run
        self.reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        super().__init__(f"{path or 'the model'}: {type(error).__name__}: {self.reason}")


def _depends_on_mode(module: Any) -> bool:
    """Returns whether a module may compute something else in training mode, by its class and its code."""
    name = type(module).__name__
    if "BatchNorm" in name or ("InstanceNorm" in name and getattr(module, "track_running_stats", False)):
        return True
    if "Dropout" in name:
        return bool(getattr(module, "p", 0.0) or getattr(module, "_p_1", 1.0) < 1.0)
    if isinstance(getattr(module, "dropout", None), float) and module.dropout > 0:
        return True
    found: bool = _reads_mode(type(module))  # type: ignore[arg-type]
    return found


@functools.cache
def _reads_mode(cls: type) -> bool:
    """Returns whether the code of a user's class reads its mode or drops values."""
    functions = (
        item
        for base in cls.__mro__
        if base.__module__.partition(".")[0] not in ("torch", "mlx", "builtins", "icenet", "icenet_torch")
        for item in vars(base).values()
    )
    codes = (getattr(getattr(item, "__wrapped__", item), "__code__", None) for item in functions)
    return any(bool({"training", "dropout"} & {*code.co_names}) for code in codes if code is not None)


def _filled_in(item: Value, own: Value | None) -> Value:
    """Returns an input with the numbers by which its own side masks."""
    where = align.masked(item.array) if own is not None else None
    if own is None or where is None:
        return item
    both = where if (hidden := align.masked(own.array)) is None else where & hidden
    return replace(item, array=np.where(both, own.array, item.array))


def _arrays_of(item: Any, array_type: type) -> list[Any]:
    from icenet.parity.calls.events import take_apart

    return take_apart(item, array_type)[1]


def _number_of(name: str) -> int:
    return int(name.partition("[")[2].rstrip("]") or 0)
