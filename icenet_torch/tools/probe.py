"""Records and replays the modules of any PyTorch model. The mirror is `icenet/tools/probe.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import nn

from icenet.parity.trace import ArrayConverter, Call, Trace, Value, short_dtype
from icenet_torch.nn import arrays, tree
from icenet_torch.nn.arrays import DTYPES, from_numpy
from icenet_torch.nn.kinds import call_kinds


@contextlib.contextmanager
def recording(model: nn.Module, trace: Trace) -> Iterator[Trace]:
    """Adds every call of a module within `model` to the trace while the context is open."""

    started: list[tuple[Any, Any]] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # copied before the call, which may change its arguments in place
        started.append(_CONVERTER.arguments(args, kwargs))

    def recorder(path: str) -> Any:
        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
            _CONVERTER.add_call(trace, path, *started.pop(), outputs)

        return after

    handles = []
    modules = tree.distinct_modules(model)
    trace.describe_modules("torch", call_kinds(modules.items()), modules)
    try:
        for path, module in modules.items():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder(path), with_kwargs=True))
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def replay(model: nn.Module, path: str, call: Call, cotangents: list[Value] | None = None) -> dict[str, Value]:
    """Calls the module at `path` with given arguments, in its current mode (training or evaluation).

    Args:
        model: Any module. Arrays are moved to the device of its first parameter.
        path: Path of a module within it, as in a trace; empty for the model itself.
        call: The arguments; float arrays are converted to the dtype of their `Value`, or to float64 if the
            parameters are float64 (the reference).
        cotangents: One for each output, all of them floats, for the backward pass.

    Returns:
        `output`, `output[1]`, ... With cotangents also the gradients of sum(outputs * cotangents): `input 0`, ...
        for each float argument and `gradient PARAMETER` for each trainable parameter.
    """
    module = tree.distinct_modules(model)[path]
    first = next(model.parameters(), torch.empty(0))
    inputs: list[torch.Tensor] = []

    def fill(value: Value) -> torch.Tensor:
        tensor = _tensor(value, first)
        if value.is_float:
            inputs.append(tensor.requires_grad_(cotangents is not None))
            return tensor.clone()  # an operation in place is not possible on a leaf
        return tensor

    filled = call.map(fill)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients: list[torch.Tensor] = []
    with torch.set_grad_enabled(cotangents is not None):
        outputs = _CONVERTER.arrays(module(*filled.args, **filled.kwargs))
        if cotangents is not None:
            by = [*inputs, *parameters.values()]
            # integers, constants and results of a part without gradients have none
            pairs = [(o, _tensor(s, first)) for o, s in zip(outputs, cotangents, strict=True) if o.requires_grad]
            seeded, seeds = [output for output, _ in pairs], [seed for _, seed in pairs]
            computed: Any = [None] * len(by)
            if by and pairs:
                computed = torch.autograd.grad(seeded, by, seeds, allow_unused=True)
            gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(by, computed, strict=True)]
    by_name = {name: to_numpy(tensor) for name, tensor in zip(parameters, gradients[len(inputs) :], strict=False)}
    return _CONVERTER.replayed(outputs, gradients[: len(inputs)], by_name)


@contextlib.contextmanager
def perturbing(model: nn.Module, perturb: Callable[..., Value], arguments: bool = False) -> Iterator[None]:
    """Perturbs the outputs of all modules within `model`, and their gradients, while the context is open.

    Args:
        model: Any module.
        perturb: Called as `perturb(value, what, path, number)`, where `what` is "output", "gradient" (of an output),
            "argument" or "argument gradient", and `number` counts the outputs or arguments of a path; returns the
            perturbed value, of the same shape and dtype.
        arguments: Whether the arguments of modules and their gradients are perturbed, too.
    """
    numbers: dict[tuple[str, str], count[int]] = {}
    perturbed: dict[int, torch.Tensor] = {}  # holds the tensors, so that no other tensor gets their ids

    def hook_of(path: str) -> Any:
        def hook(module: nn.Module, args: Any, outputs: Any) -> Any:
            return _map_tensors(outputs, once)

        def once(tensor: torch.Tensor) -> torch.Tensor:
            # a container returns the output of its last module: one value, perturbed once
            if id(tensor) not in perturbed and tensor.is_floating_point():
                tensor = _Perturb.apply(tensor, perturb, "", path, next(numbers.setdefault(("", path), count())))
                perturbed[id(tensor)] = tensor
            return tensor

        return hook

    def before(path: str) -> Any:
        def perturbed_argument(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            number = next(numbers.setdefault(("argument", path), count()))
            return _Perturb.apply(tensor, perturb, "argument", path, number)

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return _map_tensors(args, perturbed_argument), _map_tensors(kwargs, perturbed_argument)

        return hook

    handles = [module.register_forward_hook(hook_of(path)) for path, module in model.named_modules()]
    if arguments:
        handles += [m.register_forward_pre_hook(before(path), with_kwargs=True) for path, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Perturb(torch.autograd.Function):
    """Perturbs a tensor in the forward pass and its gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, perturb: Any, what: str, path: str, number: int) -> torch.Tensor:
        ctx.arguments = perturb, f"{what} gradient".strip(), path, number
        return _perturbed(tensor, perturb, what or "output", path, number)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _perturbed(gradient, *ctx.arguments), None, None, None, None


def _perturbed(tensor: torch.Tensor, perturb: Any, what: str, path: str, number: int) -> torch.Tensor:
    array = perturb(Value(to_numpy(tensor), short_dtype(tensor.dtype)), what, path, number).array
    return torch.empty_like(tensor).copy_(torch.from_numpy(np.array(array, order="C")))  # a scalar keeps its shape


def _map_tensors(outputs: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Applies a function to each tensor of nested tuples, lists, dicts and dataclasses."""
    if isinstance(outputs, torch.Tensor):
        return function(outputs)
    if isinstance(outputs, dict):
        return {name: _map_tensors(item, function) for name, item in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        items = [_map_tensors(item, function) for item in outputs]
        return type(outputs)(*items) if hasattr(outputs, "_fields") else type(outputs)(items)
    if is_dataclass(outputs) and not isinstance(outputs, type):
        return replace(outputs, **{f.name: _map_tensors(getattr(outputs, f.name), function) for f in fields(outputs)})
    return outputs


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of a model's first parameter or buffer, the CPU without any."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Returns a tensor as numpy with the same axes; bf16 as float32."""
    # numpy widens bf16: a cast of PyTorch would be one that `tools.variants` leaves out
    array = arrays.to_numpy(tensor)
    return np.array(array, np.float32 if tensor.dtype == torch.bfloat16 else None, order="C")


_CONVERTER = ArrayConverter(torch.Tensor, to_numpy)


def _tensor(value: Value, like: torch.Tensor) -> torch.Tensor:
    """Returns a value as a tensor on the device of `like`; floats in their dtype, or float64 if `like` is."""
    tensor = from_numpy(value.array).clone().to(like.device)
    if not value.is_float:
        return tensor
    dtypes = {**DTYPES, "fp64": torch.float64}
    return tensor.to(torch.float64 if like.dtype == torch.float64 else dtypes[value.dtype])
