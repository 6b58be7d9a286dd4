"""A working copy of a user's module: its weights, its modes, its dropout masks. The user's module is not changed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.core.models import randomness
from icenet.core.nn import dropout
from icenet.core.weights import layout
from icenet.parity.calls.events import Event, Run
from icenet.parity.calls.pairs import FRAMEWORK_LAYERS, Sample
from icenet.parity.calls.sides import Side
from icenet.parity.calls.structures import rebuild
from icenet.parity.nearby import Perturbation
from icenet.parity.trace import Value, class_name

Array = npt.NDArray[Any]


class ModuleCopy(Side):
    """A side with a copy of a module.

    Args:
        module: The module of the user; a copy of it is used.
        dtype: Compute dtype under test.
        exact: Whether it is the reference, which computes in float64 if it is of PyTorch.
        perturbed: Whether all values are moved by an ulp: the noise of a module of MLX.

    Attributes:
        is_test: Whether it is the module under test, whose axes may differ from those of the reference.
        ran_backward: Whether a run computed its gradients.
    """

    is_test = False
    ran_backward = False

    def __init__(self, module: Any, dtype: str, exact: bool = False, perturbed: bool = False) -> None:
        backend = backends.backend_of(module)
        self.tools = backends.module(backend, "tools.calls")
        self.nn = backends.module(backend, "nn")
        self.module = self.tools.working_copy(module, dtype, exact and backend == "torch")
        self.modules = backends.module(backend, "nn.tree").distinct_modules(self.module)
        modes = {path: bool(getattr(inner, "training", True)) for path, inner in self.modules.items()}
        super().__init__(backend, dtype, exact, modes)
        self.kinds = backends.module(backend, "nn.kinds").call_kinds(self.modules.items())
        self.layer_kinds = self._tree.layer_kinds(self.module)
        self.classes = {path: class_name(inner) for path, inner in self.modules.items()}
        self.perturbation = Perturbation(dtype, 0) if perturbed else None
        self._off: set[str] = set()
        self._dropouts: dict[str, Any] = {}
        self._channels: dict[str, bool] = {}
        self._sequence_first: set[str] = set()
        self._rows = 1
        self._run: Run | None = None
        self._changed: dict[str, list[str]] = {}

    @property
    def _tree(self) -> Any:
        return backends.module(self.backend, "nn.tree")

    def describe(self) -> dict[str, str]:
        device = backends.module(self.backend, "tools.probe").device_of(self.module)
        name = str(getattr(device, "type", device)).rpartition(".")[2]
        described = backends.module(self.backend, "tools.environment").describe(name)
        uses = backends.module(self.backend, "nn.arithmetic").uses_tf32(device)
        return {**described, "dtype": "fp64" if self.exact else self.dtype, "tf32": "on" if uses else "off"}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:  # type: ignore[override]
        """The canonical shape of each array, by path."""
        found: dict[str, tuple[int, ...]] = self._tree.weight_shapes(self.module)
        return found

    @functools.cached_property
    def trainable_names(self) -> set[str]:  # type: ignore[override]
        """The paths of the trainable parameters, those of shared ones at each place."""
        return {path for path, _, is_trainable in self._tree.named_arrays(self.module) if is_trainable}

    @functools.cached_property
    def depends_on_mode(self) -> bool:  # type: ignore[override]
        """Whether the module may compute something else in training mode than in evaluation mode."""
        return any(map(_depends_on_mode, self.modules.values()))

    @functools.cached_property
    def is_mode_of_norms(self) -> bool:  # type: ignore[override]
        return all(_is_norm(module) or not _may_depend_on_mode(module) for module in self.modules.values())

    def depends_on_mode_at(self, path: str) -> bool:
        return _depends_on_mode(self.modules[path])

    def dropout_rate(self, path: str) -> float:
        layer = self._dropouts.get(path)
        return float(layer.p) if layer is not None else 0.0

    def dropouts(self) -> list[str]:
        return [path for path in dropout.dropout_layers(self.modules.items()) if path in self.names]

    # ---- weights --------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Array]:
        found: dict[str, Array] = self._tree.weights(self.module)
        return found

    def native_weights(self, names: Sequence[str]) -> dict[str, Array]:
        """Returns some parameters with the axes of the framework, by path; of PyTorch on a CPU without a copy."""
        to_numpy, arrays = backends.module(self.backend, "nn.arrays").to_numpy, self._tree.native_arrays(self.module)
        return {name: to_numpy(arrays[name]) for name in names}

    def own_arrays(self, path: str) -> dict[str, Array]:
        return self.some_weights(self.own_names(path), f"{path}." if path else "")

    def parameters_within(self, path: str) -> list[str]:
        found: list[str] = self.tools.trainable(self.modules[path])
        return found

    def unshare(self) -> None:
        """Gives the copy parameters of its own."""
        self.use(self.tools.detached(self.module))

    def assign(self, values: Mapping[str, Array]) -> None:
        """Sets canonical weights of the copy."""
        with self.tools.assigned(self.module, values):
            self.module = self.tools.detached(self.module)
        self.modules = self._tree.distinct_modules(self.module)

    def use(self, module: Any) -> None:
        """Computes with another copy."""
        self.module = module
        self.modules = self._tree.distinct_modules(module)
        self._dropouts = dropout.dropout_layers(self.modules.items()) if self.train else {}

    def some_weights(self, names: Any, prefix: str) -> dict[str, Array]:
        """Returns the canonical values of some parameters, by path within the module at `prefix`."""
        tree = self._tree
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
                if self.backend == "mlx":
                    kind = layout.parameter_kind(self.layer_kinds, path)
                    numpy = layout.tree_to_torch({path: numpy}, {layout.split(path)[0]: kind})[path]
                found[path[len(prefix) :]] = numpy
        return found

    def _holder(self, name: str) -> str:
        """Returns the path of the module that holds a parameter."""
        path = name
        while path:
            path = path.rpartition(".")[0]
            if path in self.modules:
                return path
        return ""

    # ---- modes ----------------------------------------------------------------------------------------------

    def eager(self) -> contextlib.AbstractContextManager[None]:
        context: contextlib.AbstractContextManager[None] = self.tools.eager()
        return context

    def set_mode(self, train: bool) -> None:
        self.train = train
        self.module.train(train)
        if train and self._modes[""]:
            for path, inner in self.modules.items():
                if not self._modes[path] and self.backend == "torch":
                    inner.training = False
                elif not self._modes[path]:
                    inner._training = False
        for path in self._off if train else ():
            setattr(self.modules[path], "training" if self.backend == "torch" else "_training", False)
        self._dropouts = {}
        if train:
            self.nn.dropout.key_dropouts(self.modules.items())
            self._dropouts = dropout.dropout_layers(self.modules.items())
            for path, is_moved in self._channels.items():  # of layers that have keys in training mode only
                self.set_channels(path, is_moved)
            for path in self._sequence_first & self._dropouts.keys():
                layer = self._dropouts[path]
                object.__setattr__(layer, "__class__", _of_sequence_first(layer.__class__))

    def switch_off(self, path: str) -> bool:
        changed = False
        for own in self.modules:
            nearest = own
            while nearest and nearest not in self.names:
                nearest = nearest.rpartition(".")[0]
            if self.names.get(nearest) == path and own not in self._off:
                self._off.add(own)
                changed = True
        return changed

    def set_channels(self, path: str, is_moved: bool) -> None:
        self._channels[path] = is_moved
        if hasattr(self.modules[path], "images"):
            self.modules[path].images = is_moved

    def set_sequence_first(self, path: str) -> None:
        self._sequence_first.add(path)

    def drawing_module(self, given: Any, inputs: Sequence[Value]) -> str | None:
        """Returns the path of a module that draws random numbers without a key in a call; None without one."""
        arrays = [self.tools.native(item, self.exact, self.module) for item in inputs]

        def call() -> None:
            args, kwargs = rebuild(given, arrays)
            self.module(*args, **kwargs)

        with self.opened(None):
            found = self.nn.random.find_draw(self.modules.items(), call, lambda: randomness.generator_states(self.nn))
        return None if found is None else str(found[0])

    def convolution_weights(self, given: Any, inputs: Sequence[Value]) -> tuple[dict[str, str], set[Any]]:
        """Returns which arrays are the weight of a convolution in a call, and the weights that it computes.

        Returns:
            The function by the path of the array, and (function, shape) of each weight that the module computes.

        Raises:
            Exception: Whatever the module raises.
        """
        arrays = [self.tools.native(item, self.exact, self.module) for item in inputs]
        args, kwargs = rebuild(given, arrays)
        with self.opened(None), self.tools.convolution_weights() as found:
            self.module(*args, **kwargs)
        names = {_memory(array): path for path, array in self._tree.native_arrays(self.module).items()}
        own = {names[_memory(weight)]: function for function, weight in found if _memory(weight) in names}
        return own, {(function, tuple(weight.shape)) for function, weight in found if _memory(weight) not in names}

    def set_layer_kind(self, path: str, kind: str) -> None:
        """Names the kind of a layer of the copy, whose canonical weights and shapes it determines."""
        self.modules[path].layer_kind = kind
        self.layer_kinds = self._tree.layer_kinds(self.module)
        self.__dict__.pop("shapes", None)

    def set_weight_shape(self, path: str, shape: tuple[int, ...]) -> bool:
        """Gives a linear layer or a convolution of size 1 of PyTorch the shape of the other one's weight.

        Returns:
            False if the layer at the path is neither, or another module has its weight, too, by any name.
        """
        points = backends.module("torch", "tools.pointwise")
        layer = self.modules[path]
        if self.backend != "torch" or not points.is_pointwise(layer, self.module):
            return False
        self.module = points.with_weight_shape(self.module, path, shape)
        self.modules = self._tree.distinct_modules(self.module)
        for name in ("shapes", "trainable_names"):
            self.__dict__.pop(name, None)
        return True

    def _seed_dropouts(self, before: Event | None) -> None:
        """Sets the keys of the dropout layers, as they are when an event begins."""
        for path, layer in self._dropouts.items():
            if self.draws is not None and path not in self.shared_dropouts:
                layer.seed(None)
                continue
            keys = dropout.dropout_keys(0, 0, range(self._rows), [self.names.get(path, path)])
            layer.seed(self.nn.random.to_keys(keys)[0])
            if before is not None and self._run is not None:
                layer._calls = sum(event.path == path for event in self._run.events[: before.number])

    @contextlib.contextmanager
    def nearby(self, sample: Sample, inputs: Sequence[Value]) -> Iterator[list[Value]]:
        """Sets the weights to those of a nearby problem while the context is open; yields its inputs."""
        perturb = Perturbation(self.dtype, sample.number, sample.rounds)
        weights = self.weights()
        moved = {name: perturb.array(weights[name], "weight", name) for name in self.tools.trainable(self.module)}
        with self.tools.assigned(self.module, moved), self.perturbed(self.module, perturb, sample):
            yield [perturb(item, "input", index) for index, item in enumerate(inputs)]

    @contextlib.contextmanager
    def perturbed(self, module: Any, perturb: Perturbation, sample: Sample) -> Iterator[None]:
        """Moves what a module of PyTorch computes by ulps, and takes its sums term by term, as a sample wants it."""
        with contextlib.ExitStack() as stack:
            if sample.rounds and self.backend == "torch":
                stack.enter_context(backends.module("torch", "tools.probe").perturbing(module, perturb.rounded))
            if sample.in_order:
                stack.enter_context(backends.module("torch", "tools.sums").summing_in_order(sample.number))
            if sample.constant_maxima:
                stack.enter_context(backends.module("torch", "tools.maxima").constant_maxima())
            yield

    @contextlib.contextmanager
    def opened(self, before: Event | None) -> Iterator[None]:
        """Keeps the buffers and generators, and seeds the dropouts, while the context is open.

        Args:
            before: The call that is replayed; None for a run.
        """
        changed = list(self.modules) if before is None else self._changed_by(before.path)
        modules = [self.modules[path] for path in changed]
        with self.nn.norm.keep_buffers(self.module, modules), self.tools.generators_kept():
            self._seed_dropouts(before)
            if self.draws is None:
                yield
                return
            self.draws.begin()
            with backends.module(self.backend, "tools.draws").replaced(self.draws.draw):
                yield

    def _changed_by(self, path: str) -> list[str]:
        """Returns the paths of the modules whose buffers a call of the module at a path may change.

        A layer of the frameworks changes none of another layer. To copy those of the whole model in each replay
        takes longer than the replays of a model of many layers.
        """
        if path not in self._changed:
            inner = [p for p in self.classes if p == path or p.startswith(f"{path}.")]
            is_closed = bool(path) and all(self.classes[p].startswith(FRAMEWORK_LAYERS) for p in inner)
            self._changed[path] = inner if is_closed else list(self.modules)
        return self._changed[path]

    @contextlib.contextmanager
    def moved_weights(self, names: Sequence[str]) -> Iterator[None]:
        """Moves weights by an ulp while the context is open, if all values of this side are moved."""
        if self.perturbation is None or not names:
            yield
            return
        perturb, weights = self.perturbation, self.weights()
        moved = {name: perturb.array(weights[name], "weight", name) for name in names if name in weights}
        with self.tools.assigned(self.module, moved):
            yield


def _memory(array: Any) -> Any:
    """Returns what only one array has: the place of its values in PyTorch with its shape, the object in MLX."""
    return (array.data_ptr(), tuple(array.shape)) if hasattr(array, "data_ptr") else id(array)


def _depends_on_mode(module: Any) -> bool:
    """Returns whether a module may compute something else in training mode, by its class and its code."""
    name = type(module).__name__
    if "BatchNorm" in name or ("InstanceNorm" in name and getattr(module, "track_running_stats", False)):
        return True
    if "Dropout" in name:
        return bool(getattr(module, "p", 0.0) or getattr(module, "_p_1", 1.0) < 1.0)
    if isinstance(getattr(module, "dropout", None), float) and module.dropout > 0:
        return True
    held = [item for item in vars(module).values() if isinstance(item, FunctionType) and is_of_user(item)]
    cls: Any = type(module)
    return _reads_mode(cls) or _any_reads_mode(held)


def _is_norm(module: Any) -> bool:
    """Returns whether a module is a norm of the frameworks, which has running statistics in evaluation mode."""
    name = class_name(module)
    return name.startswith(FRAMEWORK_LAYERS) and ("BatchNorm" in name or "InstanceNorm" in name)


def _may_depend_on_mode(module: Any) -> bool:
    """Returns whether a module may depend on the mode, also by the code of a framework.

    In evaluation mode, attention and transformers of PyTorch compute what is padded in another way.
    """
    if "Dropout" in type(module).__name__:  # its rate tells
        return _depends_on_mode(module)
    own = [cls for cls in type(module).__mro__ if cls.__name__ != "Module"]
    return _depends_on_mode(module) or any(map(_code_reads_mode, own))


@functools.cache
def _code_reads_mode(cls: type) -> bool:
    """Returns whether a method of a class itself, of a user or a framework, reads the mode."""
    functions = (item for item in vars(cls).values() if isinstance(item, FunctionType))
    return any("training" in code.co_names for function in functions for code in _codes(function.__code__))


@functools.cache
def _reads_mode(cls: type) -> bool:
    """Returns whether the code of a user's class, or of a function that it names, reads its mode or drops values."""
    return _any_reads_mode(_functions(cls))


def _any_reads_mode(functions: Sequence[FunctionType]) -> bool:
    left, seen = list(functions), set[FunctionType]()
    while left:
        function = left.pop()
        if function in seen:
            continue
        seen.add(function)
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        if {"training", "dropout"} & names:
            return True
        known = [*(function.__globals__.get(name) for name in names), *_enclosed(function)]
        left += [item for item in known if isinstance(item, FunctionType) and is_of_user(item)]
    return False


def _enclosed(function: FunctionType) -> Iterator[Any]:
    """Yields what a function reads of the functions around it."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a cell without a value yet
            yield cell.cell_contents


_DRAWS = frozenset({"bernoulli", "bernoulli_", "rand", "rand_like", "uniform", "uniform_", "random", "random_"})


def may_draw(module: Any) -> bool:
    """Returns whether a module drops values, or draws the random numbers that masks are made of, by its code."""
    names = _names_in_code(type(module))  # type: ignore[arg-type]
    # a layer that it holds as `dropout` draws itself; a number, such as `drop_prob`, is its own
    own = {name for name in names if not hasattr(module, name) or isinstance(getattr(module, name), float)}
    return "Dropout" in type(module).__name__ or bool(_DRAWS & own) or any("drop" in name for name in own)


def is_of_user(item: Any) -> bool:
    """Returns whether a class or function is defined outside of the frameworks and IceNet."""
    return str(item.__module__).partition(".")[0] not in ("mlx", "torch", "builtins", "icenet", "icenet_torch")


@functools.cache
def _names_in_code(cls: type) -> frozenset[str]:
    """Returns the names of functions and attributes in the methods of a user's class."""
    codes = (code for function in _functions(cls) for code in _codes(function.__code__))
    return frozenset(name for code in codes for name in code.co_names)


def _functions(cls: type) -> list[FunctionType]:
    """Returns the methods of a user's class, and the getters of its properties."""
    items = [item for base in cls.__mro__ if is_of_user(base) for item in vars(base).values()]
    functions = [getattr(getattr(item, "fget", item), "__wrapped__", getattr(item, "fget", item)) for item in items]
    return [function for function in functions if isinstance(function, FunctionType)]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yields the code of a function, and of those within it, such as a comprehension."""
    yield code
    for item in code.co_consts:
        if isinstance(item, CodeType):
            yield from _codes(item)


@functools.cache
def _of_sequence_first(kind: Any) -> Any:
    """Returns the class of a dropout of MLX whose masks are those of inputs with the first axes exchanged."""

    def call(self: Any, x: Any) -> Any:
        return kind.__call__(self, x.swapaxes(0, 1)).swapaxes(0, 1)

    own = {"__call__": call, "is_exchanged": True}
    return kind if hasattr(kind, "is_exchanged") else type(kind.__name__, (kind,), own)
