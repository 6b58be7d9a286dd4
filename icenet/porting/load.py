"""Makes the module of a port from its source, and sets its weights."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from icenet.core.errors import PortError

_NUMBERS = itertools.count(1)


def run_source(source: str, name: str = "ported") -> ModuleType:
    """Runs the source of a port as a module. Its lines appear in tracebacks."""
    number = next(_NUMBERS)
    module = ModuleType(f"icenet_{name}_{number}")
    file = f"<icenet.port {name} {number}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[module.__name__] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def make(source: str, class_name: str, weights: Mapping[str, np.ndarray]) -> nn.Module:
    """Returns an instance of a class of a source with weights, which have MLX's axes and names of PyTorch."""
    model: nn.Module = getattr(run_source(source, class_name), class_name)()
    assign(model, weights)
    return model.eval()


def assign(model: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Sets the arrays of a model by path."""
    missing = []
    for path, value in weights.items():
        holder: Any = model
        *parents, leaf = path.split(".")
        try:
            for part in parents:
                holder = holder[int(part)] if isinstance(holder, list) else holder[part]
            key: Any = int(leaf) if isinstance(holder, list) else leaf
            present = holder[key]
        except (KeyError, IndexError, AttributeError):
            missing.append(path)
            continue
        if tuple(present.shape) != tuple(value.shape):
            raise PortError(f"{path}: the port has the shape {list(present.shape)}, the weights {list(value.shape)}")
        holder[key] = to_array(value)
    if missing:
        raise PortError(f"the port has no {', '.join(missing[:5])}")


def to_array(value: np.ndarray) -> mx.array:
    """Returns an array of numpy as one of MLX, with float64 as float32."""
    if value.dtype == np.float64:
        value = value.astype(np.float32)
    if value.dtype == np.complex128:
        value = value.astype(np.complex64)
    if str(value.dtype) == "bfloat16":
        return mx.array(value.astype(np.float32)).astype(mx.bfloat16)
    return mx.array(np.ascontiguousarray(value).reshape(value.shape))


Structure: TypeAlias = Callable[[list[Any]], list[Any]]
"""Returns the arguments in the order of a model's parameters, from its arrays in their order."""


def invoke(model: nn.Module, arguments: list[Any]) -> Any:
    """Calls a model with the arguments of all of its parameters."""
    parameters = list(inspect.signature(model.__call__).parameters.values())
    named = {
        item.name: value
        for item, value in zip(parameters, arguments, strict=True)
        if item.kind == inspect.Parameter.KEYWORD_ONLY
    }
    return model(*arguments[: len(arguments) - len(named)], **named)


def call(model: nn.Module, arguments: list[Any], structure: Structure) -> Any:
    """Calls a model with numpy arrays, and returns its output as numpy arrays."""
    given = [to_array(item) if isinstance(item, np.ndarray) else item for item in arguments]
    result = invoke(model, structure(given))
    return to_numpy(result)


def to_numpy(value: Any) -> Any:
    """Returns the arrays of a structure as numpy arrays."""
    if isinstance(value, mx.array):
        return np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_numpy(item) for item in value)
    return value


_RANDOM = ("dropout", "feature_dropout", "alpha_dropout")


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Sets the mode of a model while the context is open, without dropout; its buffers stay unchanged."""
    from mlx.utils import tree_map

    before = tree_map(mx.array, model.parameters())  # an operation in place changes the array that is held
    namespace = sys.modules[type(model).__module__].__dict__
    functions = {name: namespace[name] for name in (*_RANDOM, "attention") if name in namespace}
    model.train(training)
    for _, inner in model.named_modules():
        if isinstance(inner, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)):
            inner._training = False
    for name in functions:
        namespace[name] = _without_dropout(functions[name]) if name == "attention" else lambda x, *rest: x
    try:
        yield
    finally:
        namespace.update(functions)
        model.update(before)
        model.eval()


def _without_dropout(attention: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, dropout=0.0, **options: attention(*args, **options)


def trace(
    source: str, class_name: str, weights: Mapping[str, np.ndarray], arguments: list[Any], structure: Structure
) -> dict[str, np.ndarray]:
    """Runs a source that records its values. Returns them by name."""
    found: dict[str, np.ndarray] = {}
    module = run_source(source, class_name)

    def record(name: str, value: Any) -> None:
        if isinstance(value, mx.array):
            found.setdefault(name, to_numpy(value))

    module.__dict__["_record"] = record
    model = getattr(module, class_name)()
    assign(model, weights)
    invoke(model.eval(), structure([to_array(item) for item in arguments]))
    return found


def gradients(
    model: nn.Module, arguments: list[Any], cotangents: list[np.ndarray], structure: Structure
) -> dict[str, np.ndarray]:
    """Returns the gradients of the sum of outputs times cotangents, by path.

    Those of a model without trainable parameters are of the inputs, "input 0" and so on.
    """
    from mlx.utils import tree_flatten

    given = [to_array(item) if isinstance(item, np.ndarray) else item for item in arguments]
    factors = [to_array(item) for item in cotangents]

    def weighted(arguments: list[Any]) -> mx.array:
        outputs = [
            item for item in flat(invoke(model, structure(arguments))) if mx.issubdtype(item.dtype, mx.floating)
        ]
        terms = [(item.astype(mx.float32) * factor).sum() for item, factor in zip(outputs, factors, strict=False)]
        return mx.stack(terms).sum()

    before = model.trainable_parameters()
    if not tree_flatten(before):
        variables = {
            str(number): item
            for number, item in enumerate(given)
            if isinstance(item, mx.array) and mx.issubdtype(item.dtype, mx.floating)
        }
        if not variables:
            return {}

        def of_inputs(variables: dict[str, mx.array]) -> mx.array:
            return weighted([variables.get(str(number), item) for number, item in enumerate(given)])

        return {f"input {number}": to_numpy(value) for number, value in mx.grad(of_inputs)(variables).items()}

    def loss(parameters: Any) -> mx.array:
        model.update(parameters)
        return weighted(given)

    found = mx.grad(loss)(before)
    model.update(before)
    return {path: to_numpy(value) for path, value in tree_flatten(found)}


def flat(value: Any) -> list[Any]:
    """Returns the arrays of a structure in order."""
    if isinstance(value, (mx.array, np.ndarray)):
        return [value]
    if isinstance(value, dict):
        return [item for inner in value.values() for item in flat(inner)]
    if isinstance(value, (list, tuple)):
        return [item for inner in value for item in flat(inner)]
    return []


def save_weights(path: str, model: nn.Module) -> None:
    """Writes the arrays of a model in MLX's layout."""
    from mlx.utils import tree_flatten

    mx.save_safetensors(path, dict(tree_flatten(model.parameters())), {"format": "mlx"})


def set_dtype(model: nn.Module, dtype: str) -> None:
    """Converts the floating-point arrays of a model."""
    model.set_dtype(getattr(mx, dtype))
