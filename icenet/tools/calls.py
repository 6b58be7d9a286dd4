"""Calls of the modules within any MLX model: intercepts, computes and differentiates them.

What is done with the calls is in `icenet.parity.calls.sides`, which names no framework. The mirror is
`icenet_torch/tools/calls.py`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx import optimizers

from icenet.core.weights import layout
from icenet.nn import tree
from icenet.nn.arrays import DTYPES, from_numpy, on_cpu
from icenet.parity.trace import Value, short_dtype
from icenet.tools.probe import to_numpy

ARRAY: type = mx.array

_SHARED = (mx.float32, mx.float16, mx.int32)
"""Dtypes whose arrays numpy reads in the memory of MLX."""

Handler = Callable[[str, Callable[..., Any], Any, Any], Any]
"""Called as `handle(path, call, args, kwargs)` in place of `call(*args, **kwargs)`; returns its result."""

Cotangent = Callable[[int, tuple[int, ...]], Any]
"""Returns the cotangent of the output with a number and a shape, as a numpy array; None for zero."""


# ---- modules ------------------------------------------------------------------------------------------------


def working_copy(module: nn.Module, dtype: str = "fp32", exact: bool = False) -> nn.Module:
    """Returns a copy of a module whose calls, modes and buffers can be changed.

    Args:
        module: Any module.
        dtype: fp32, bf16 or fp16, to which floating parameters and buffers are rounded. In fp32 the parameters are
            those of `module`.
        exact: Not possible in MLX, whose float64 is not exact: the copy computes in `dtype`.
    """
    copied = tree.copy_modules(module)
    own = tree.Arrays(copied, trainable=False)  # a shared array stays shared
    floats = {name: array for name, array in own.get().items() if mx.issubdtype(array.dtype, mx.floating)}
    own.set({name: array.astype(DTYPES[dtype]) for name, array in floats.items() if array.dtype != DTYPES[dtype]})
    return copied


def detached(module: nn.Module, rows: Mapping[str, int] | None = None) -> nn.Module:
    """Returns a copy of a module whose parameters may be updated.

    Args:
        module: Any module.
        rows: How many of its first rows in PyTorch's axes a parameter keeps, by path. The others keep all. A module
            with less than all cannot be called.
    """
    copied = tree.copy_modules(module)
    if rows:
        own, kinds = tree.Arrays(copied, trainable=False), tree.layer_kinds(copied)
        whole = {name: array for name, array in own.get().items() if name in rows}
        views = layout.PermutedWeights({name: value(a).array for name, a in whole.items()}, kinds, "to_torch")
        for name, array in whole.items():
            kind, leaf = layout.parameter_kind(kinds, name), layout.split(name)[1]
            kept = from_numpy(layout.mlx_view(kind, leaf, views[name][: rows[name]]))
            own.set({name: kept.astype(array.dtype)})
    return copied


def buffers(module: nn.Module) -> dict[str, np.ndarray]:
    """Returns the floating buffers of a module itself, not of those within it, by name."""
    return {
        name: to_numpy(item)
        for name, item in module.items()
        if isinstance(item, mx.array)
        and not name.startswith("_")
        and (name in module._no_grad or name in layout.STATISTICS)
        and mx.issubdtype(item.dtype, mx.floating)
    }


@contextlib.contextmanager
def assigned(module: nn.Module, values: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Sets parameters and buffers of a module to canonical values, by path, while the context is open."""
    own, kinds = tree.Arrays(module, trainable=False), tree.layer_kinds(module)
    before = {name: array for name, array in own.get().items() if name in values}
    try:
        own.set(
            {
                name: from_numpy(
                    layout.mlx_view(layout.parameter_kind(kinds, name), layout.split(name)[1], values[name])
                ).astype(array.dtype)
                for name, array in before.items()
            }
        )
        yield
    finally:
        own.set(before)


@contextlib.contextmanager
def intercepting(modules: Mapping[str, nn.Module], handle: Handler) -> Iterator[None]:
    """Passes every call of the modules to a handler while the context is open.

    MLX looks `__call__` up on the class, so the class of each module is replaced by a subclass meanwhile.
    """
    paths = {id(module): path for path, module in modules.items()}
    classes: dict[type, type] = {}
    changed: list[tuple[nn.Module, type]] = []

    def intercepted(cls: type) -> type:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None:  # a module that was made meanwhile
                return cls.__call__(self, *args, **kwargs)
            return handle(path, lambda *a, **k: cls.__call__(self, *a, **k), args, kwargs)

        return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})

    try:
        for module in modules.values():
            cls = type(module)
            if cls not in classes:
                classes[cls] = intercepted(cls)
            object.__setattr__(module, "__class__", classes[cls])
            changed.append((module, cls))
        yield
    finally:
        for module, cls in changed:
            object.__setattr__(module, "__class__", cls)


CONVOLUTIONS = frozenset(f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3))
"""Functions whose second argument is the weight of a convolution."""


@contextlib.contextmanager
def convolution_weights() -> Iterator[list[tuple[str, mx.array]]]:
    """Yields a list to which the function and the weight of each convolution are added while the context is open."""
    found: list[tuple[str, mx.array]] = []
    before = {name: getattr(mx, name) for name in (*CONVOLUTIONS, "conv_general")}

    def spied(name: str) -> Callable[..., Any]:
        def call(input: mx.array, weight: mx.array, *args: Any, **kwargs: Any) -> Any:
            found.append((name if name in CONVOLUTIONS else f"conv{weight.ndim - 2}d", weight))
            return before[name](input, weight, *args, **kwargs)

        return call

    try:
        for name in before:
            setattr(mx, name, spied(name))
        yield found
    finally:
        for name, function in before.items():
            setattr(mx, name, function)


# ---- arrays -------------------------------------------------------------------------------------------------


def snapshot(array: mx.array) -> mx.array:
    """Returns what an array holds; the model may write to it later. `value` converts the result."""
    return mx.stop_gradient(array)


def version(array: mx.array) -> None:
    """Returns None: an array does not show whether it was changed in place."""


def value(taken: mx.array) -> Value:
    """Returns a snapshot as a value, after the computation; on a CPU without a copy."""
    if on_cpu() and taken.dtype in _SHARED:
        mx.eval(taken)
        shared: Any = taken
        return Value(np.asarray(memoryview(shared)), short_dtype(taken.dtype))
    return Value(to_numpy(taken), short_dtype(taken.dtype))


def tap(array: mx.array, store: Callable[[mx.array], None], is_passed_on: bool = False) -> mx.array:
    """Returns the array; its gradient is given to `store` when it is computed.

    Args:
        array, store: The array, and what takes its gradient.
        is_passed_on: Whether a module returns its argument. The gradient is that by this use of it anyway.
    """

    @mx.custom_function
    def identity(x: mx.array) -> mx.array:
        return mx.stop_gradient(x)

    @identity.vjp
    def backward(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
        store(cotangent)
        return cotangent

    tapped: Any = identity(array)
    return tapped  # type: ignore[no-any-return]


def native(value: Value, exact: bool = False, like: nn.Module | None = None) -> mx.array:
    """Returns a value as an array, floats in their dtype."""
    array = from_numpy(value.array)
    return array.astype(DTYPES.get(value.dtype, mx.float32)) if value.is_float else array


# ---- computation --------------------------------------------------------------------------------------------


def evaluate(
    function: Callable[..., Sequence[Any]],
    inputs: Sequence[Value],
    module: nn.Module,
    parameters: Sequence[str] = (),
    cotangent: Cotangent | None = None,
    exact: bool = False,
    constants: bool = False,
) -> tuple[list[Value], list[Value | None], dict[str, Value]]:
    """Computes a function, and the gradient of sum(outputs * cotangents).

    Args:
        function: Takes arrays and returns a sequence of arrays.
        inputs: Its arguments.
        module: The module that it calls.
        parameters: Paths of the trainable parameters of the module by which the gradient is computed.
        cotangent: Returns the cotangents; None to compute no gradient.
        exact: Has no effect.
        constants: Whether an input that determines ids counts as a constant, because MLX has no gradient by it, and
            the gradient of the whole model does not need it. Whole numbers always do, as a mask whose sums are ids.

    Returns:
        The outputs, the gradients by the floating inputs (None for others), and by the parameters in PyTorch's axes.
    """
    arrays = [native(item) for item in inputs]
    if cotangent is None:
        outputs = list(function(*arrays))
        mx.eval(outputs)
        return [value(output) for output in outputs], [None] * len(inputs), {}
    own = tree.Arrays(module)
    weights = {name: array for name, array in own.get().items() if name in set(parameters)} if parameters else {}
    floats = [index for index, item in enumerate(inputs) if item.is_float]

    def total(primals: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        own.set(dict(zip(weights, primals[len(floats) :], strict=True)))
        given = list(arrays)
        for index, primal in zip(floats, primals, strict=False):
            given[index] = primal
        outputs = list(function(*given))
        scores = [mx.array(0.0)]
        for index, output in enumerate(outputs):
            seed = cotangent(index, tuple(output.shape))
            if seed is not None and mx.issubdtype(output.dtype, mx.floating):
                scores.append((output * from_numpy(seed).astype(output.dtype)).sum().astype(mx.float32))
        return mx.stack(scores).sum(), outputs

    def differentiated() -> tuple[list[mx.array], list[mx.array]]:
        primals = [*(arrays[index] for index in floats), *weights.values()]
        if not primals:
            return total([])[1], []
        (_, outputs), computed = mx.value_and_grad(total)(primals)
        return outputs, computed

    refused = None
    try:
        for left_out in _left_out(inputs, floats, constants):
            floats = [n for n, item in enumerate(inputs) if item.is_float and n not in left_out]
            try:
                outputs, computed = differentiated()
                break
            except ValueError as error:
                if "with respect to indices" not in str(error):
                    raise
                refused = error
        else:
            assert refused is not None
            raise refused
    finally:
        own.set(weights)
    mx.eval(outputs, computed)
    gradients: list[Value | None] = [
        Value(np.zeros_like(item.array), item.dtype) if item.is_float else None for item in inputs
    ]
    for index, gradient in zip(floats, computed, strict=False):
        gradients[index] = value(gradient)
    by_name = {name: value(g) for name, g in zip(weights, computed[len(floats) :], strict=True)}
    moved = layout.tree_to_torch({name: item.array for name, item in by_name.items()}, tree.layer_kinds(module))
    used = {name: Value(array, by_name[name].dtype) for name, array in moved.items()}
    return [value(output) for output in outputs], gradients, used


def _left_out(inputs: Sequence[Value], floats: Sequence[int], constants: bool) -> Iterator[Sequence[int]]:
    """Yields the inputs by which no gradient is computed: none first, and then those that may determine ids."""
    yield ()
    whole = [n for n in floats if np.array_equal(inputs[n].array, np.rint(inputs[n].array))]
    if whole:
        yield whole
    if constants:
        yield from ([n] for n in floats)
        yield floats


def mean_square(outputs: Sequence[mx.array], targets: Sequence[Value | None], exact: bool = False) -> mx.array:
    """Returns the mean squared distance of the floating outputs from their targets, those without one left out."""
    terms = []
    for output, target in zip(outputs, targets, strict=True):
        if target is None:
            continue
        expected = native(target)
        terms.append(_mean(mx.square(output.astype(expected.dtype) - expected)))
    return mx.stack(terms).sum()


def _mean(x: mx.array) -> mx.array:
    """Returns the mean. MLX sums term by term, so parts are summed first, as PyTorch does."""
    size, x = x.size, x.reshape(-1)
    while x.size > 1:
        x = mx.pad(x, (0, -x.size % 64)).reshape(-1, 64).sum(axis=1)
    return x.reshape(()) / size


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Compiles nothing on a CPU in the context: a compilation takes seconds there, and gains nothing."""
    if not on_cpu() or not _compiles():
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


@contextlib.contextmanager
def on_another_device() -> Iterator[bool]:
    """Computes on the CPU in the context. Its value is whether that is another device than before."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield before != mx.Device(mx.cpu)
    finally:
        mx.set_default_device(before)


@contextlib.contextmanager
def without_checkpoints() -> Iterator[None]:
    """Keeps all values for the backward pass in the context: what `mx.checkpoint` wraps in it is computed once.

    A function that recomputes has no gradient by arrays that it does not get as arguments, such as given results of
    the layers within it.
    """
    before: Any = mx.checkpoint
    called: Any = _called
    mx.checkpoint = called
    try:
        yield
    finally:
        mx.checkpoint = before


def _called(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _compiles() -> bool:
    """Returns whether MLX compiles functions: then it traces one once."""
    traces: list[None] = []

    def probe(x: mx.array) -> mx.array:
        traces.append(None)
        return x + 1

    compiled = mx.compile(probe)
    for _ in range(2):
        compiled(mx.array(0.0))
    return len(traces) == 1


# ---- state of the process -----------------------------------------------------------------------------------


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the state of MLX's generator on exit."""
    state: Any = mx.random.state
    high, low = (int(word) for word in np.array(state[0]))
    try:
        yield
    finally:
        mx.random.seed((high << 32) | low)  # whose words are the key


# ---- optimizers ---------------------------------------------------------------------------------------------


UPDATE = "update"
"""The method of an optimizer that changes the parameters."""
OPTIMIZERS = "an optimizer of mlx.optimizers, or a function of the module that returns one"
"""What `make_optimizer` accepts."""


def make_optimizer(module: nn.Module, given: Any, rate: float = 0.1) -> Any:
    """Returns a new optimizer of the trainable parameters of a module.

    Args:
        module: The module.
        given: An optimizer of `mlx.optimizers`, of which a copy is used, or a function of the module; None for SGD
            with momentum.
        rate: Learning rate of SGD with momentum.
    """
    if given is None:
        optimizer: Any = optimizers.SGD(learning_rate=rate, momentum=0.9)
    elif isinstance(given, optimizers.Optimizer):
        optimizer = copy.deepcopy(given)
    else:
        optimizer = given() if isinstance(getattr(given, "func", given), type) else given(module)
    optimizer.init(module.trainable_parameters())
    return optimizer


def apply_gradients(module: nn.Module, optimizer: Any, gradients: Mapping[str, np.ndarray]) -> None:
    """Updates the parameters of a module in place, given canonical gradients by path."""
    native_names = {canonical: own for own, canonical in tree.mlx_names(module).items()}
    kinds = tree.layer_kinds(module)
    flat = {}
    for name, array in gradients.items():
        view = layout.mlx_view(layout.parameter_kind(kinds, name), layout.split(name)[1], array)
        flat[native_names.get(name, name)] = from_numpy(view)
    own = tree.Arrays(module, trainable=False)
    optimizer.update(module, _nested(flat))
    own.set({name: array for name, array in own.get().items() if name in gradients})  # at all places that share it
    mx.eval(module.parameters(), optimizer.state)


def _nested(flat: Mapping[str, mx.array]) -> Any:
    from mlx.utils import tree_unflatten

    return tree_unflatten(list(flat.items()))


def trainable(module: nn.Module) -> list[str]:
    """Returns the canonical paths of the trainable parameters; a shared one has one path."""
    return list(tree.Arrays(module).get())
