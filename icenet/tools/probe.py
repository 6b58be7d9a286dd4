"""Records and replays the modules of any MLX model. The mirror is `icenet_torch/tools/probe.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from icenet.core.weights import layout
from icenet.nn import tree
from icenet.nn.arrays import DTYPES, from_numpy
from icenet.nn.kinds import call_kinds
from icenet.parity.trace import ArrayConverter, Call, Trace, Value


@contextlib.contextmanager
def recording(model: nn.Module, trace: Trace) -> Iterator[Trace]:
    """Adds every call of a module within `model` to the trace while the context is open.

    MLX has no forward hooks and looks `__call__` up on the class. So the class of each module is replaced
    by a subclass that records, and restored at the end.
    """
    modules = tree.distinct_modules(model)
    paths = {id(module): path for path, module in modules.items()}
    recorders: dict[type, type] = {}
    trace.describe_modules("mlx", call_kinds(modules.items()), modules)

    def recorder(cls: type) -> type:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            arguments = _CONVERTER.arguments(args, kwargs)
            outputs = cls.__call__(self, *args, **kwargs)
            _CONVERTER.add_call(trace, paths[id(self)], *arguments, outputs)
            return outputs

        return type(cls.__name__, (cls,), {"__call__": call})

    changed: list[tuple[nn.Module, type]] = []
    try:
        for module in modules.values():
            cls = type(module)
            if cls not in recorders:
                recorders[cls] = recorder(cls)
            object.__setattr__(module, "__class__", recorders[cls])
            changed.append((module, cls))
        yield trace
    finally:
        for module, cls in changed:
            object.__setattr__(module, "__class__", cls)


def replay(model: nn.Module, path: str, call: Call, cotangents: list[Value] | None = None) -> dict[str, Value]:
    """Calls the module at `path` with given arguments, in its current mode (training or evaluation).

    Args:
        model: Any module.
        path: Path of a module within it, as in a trace; empty for the model itself.
        call: The arguments; float arrays are converted to the dtype of their `Value`.
        cotangents: One for each output, all of them floats, for the backward pass.

    Returns:
        `output`, `output[1]`, ... With cotangents also the gradients of sum(outputs * cotangents): `input 0`, ...
        for each float argument and `gradient PARAMETER` for each trainable parameter, in PyTorch's layout.
    """
    module = tree.distinct_modules(model)[path]
    inputs = [_array(value) for value in call.values if value.is_float]
    own = tree.Arrays(module)
    parameters = own.get()

    def forward(*arrays: mx.array) -> list[mx.array]:
        own.set(dict(zip(parameters, arrays[len(inputs) :], strict=True)))
        floats = iter(arrays)
        filled = call.map(lambda value: next(floats) if value.is_float else _array(value))
        return _CONVERTER.arrays(module(*filled.args, **filled.kwargs))

    gradients: list[mx.array] = []
    primals = [*inputs, *parameters.values()]
    try:
        if cotangents is None:
            outputs = forward(*primals)
        else:
            outputs, gradients = mx.vjp(forward, primals, [_array(value) for value in cotangents])
        mx.eval(outputs, gradients)
    finally:
        own.set(parameters)
    by_name = {name: to_numpy(array) for name, array in zip(parameters, gradients[len(inputs) :], strict=False)}
    kinds = tree.layer_kinds(module)
    return _CONVERTER.replayed(outputs, gradients[: len(inputs)], layout.tree_to_torch(by_name, kinds))


def device_of(model: nn.Module) -> mx.Device:
    """Returns the device that computes a model: its own, or else MLX's default device."""
    device: mx.Device = getattr(model, "device", mx.default_device())
    return device


def to_numpy(array: mx.array) -> np.ndarray:
    """Returns an array as numpy with the same axes; bf16 as float32."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


_CONVERTER = ArrayConverter(mx.array, to_numpy)


def _array(value: Value) -> mx.array:
    """Returns a value as an array; floats in their dtype."""
    array = from_numpy(value.array)
    return array.astype(DTYPES[value.dtype]) if value.is_float else array
