"""Makes the module of a port from its source, and sets its weights."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, BinaryIO, TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from icenet.core.errors import PortError
from icenet.parity.trace import Value, short_dtype

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


def run(
    model: nn.Module, arguments: list[Any], structure: Structure, cotangents: list[np.ndarray] | None = None
) -> dict[str, Value]:
    """Returns the outputs of a model, the gradients of their sum times cotangents, and its arrays after the call.

    Their names are "output[0]", "gradient:PATH" and "array:PATH", with the paths of MLX. The gradients are those of
    the parameters; of a model without trainable parameters, those of the inputs, "input 0" and so on.

    Args:
        model: The model.
        arguments: Numpy arrays and constants.
        structure: Returns the arguments of the call.
        cotangents: float32 arrays in the shapes of the floating-point outputs; without them no gradients.
    """
    given = [to_array(item) if isinstance(item, np.ndarray) else item for item in arguments]
    found: list[mx.array] = []
    gradients: dict[str, mx.array] = {}
    if cotangents is None:
        found = flat(invoke(model, structure(given)))
    else:
        found, gradients = _with_gradients(model, given, structure, [to_array(item) for item in cotangents])
    arrays = dict(tree_flatten(model.parameters()))
    mx.eval(found, gradients, arrays)
    return {
        **{f"output[{number}]": _value(item) for number, item in enumerate(found)},
        **{f"gradient:{path}": _value(item) for path, item in gradients.items()},
        **{f"array:{path}": _value(item) for path, item in arrays.items()},
    }


def _value(array: mx.array) -> Value:
    return Value(to_numpy(array), short_dtype(array.dtype))


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
    has_dropout = "dropout" in inspect.signature(attention).parameters
    return lambda *args, **options: attention(*args, **(options | {"dropout": 0.0} if has_dropout else options))


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


def _with_gradients(
    model: nn.Module, given: list[Any], structure: Structure, factors: list[mx.array]
) -> tuple[list[mx.array], dict[str, mx.array]]:
    """Returns the outputs, and the gradients of their sum times factors."""

    def weighted(arguments: list[Any]) -> tuple[mx.array, list[mx.array]]:
        found = flat(invoke(model, structure(arguments)))
        outputs = [item for item in found if mx.issubdtype(item.dtype, mx.floating)]
        terms = [(item.astype(mx.float32) * factor).sum() for item, factor in zip(outputs, factors, strict=False)]
        return mx.stack(terms).sum(), found

    before = model.trainable_parameters()
    if not tree_flatten(before):
        variables = {
            str(number): item
            for number, item in enumerate(given)
            if isinstance(item, mx.array) and mx.issubdtype(item.dtype, mx.floating)
        }
        if not variables:
            return weighted(given)[1], {}

        def of_inputs(variables: dict[str, mx.array]) -> tuple[mx.array, list[mx.array]]:
            return weighted([variables.get(str(number), item) for number, item in enumerate(given)])

        (_, found), gradients = mx.value_and_grad(of_inputs)(variables)
        return found, {f"input {number}": value for number, value in gradients.items()}

    def loss(parameters: Any) -> tuple[mx.array, list[mx.array]]:
        model.update(parameters)
        return weighted(given)

    (_, found), gradients = mx.value_and_grad(loss)(before)
    model.update(before)
    return found, dict(tree_flatten(gradients))


def flat(value: Any) -> list[Any]:
    """Returns the arrays of a structure in order."""
    if isinstance(value, (mx.array, np.ndarray)):
        return [value]
    if isinstance(value, dict):
        return [item for inner in value.values() for item in flat(inner)]
    if isinstance(value, (list, tuple)):
        return [item for inner in value for item in flat(inner)]
    return []


def save_weights(file: BinaryIO, model: nn.Module) -> None:
    """Writes the arrays of a model in MLX's layout."""
    mx.save_safetensors(file, dict(tree_flatten(model.parameters())), {"format": "mlx"})


def set_dtype(model: nn.Module, dtype: str) -> None:
    """Converts the floating-point arrays of a model."""
    model.set_dtype(getattr(mx, dtype))
