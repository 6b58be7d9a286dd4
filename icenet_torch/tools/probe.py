"""Records and replays the modules of any PyTorch model. The mirror is `icenet/tools/probe.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from icenet.parity.trace import ArrayConverter, Call, Trace, Value
from icenet_torch.nn.arrays import to_channels_first

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@contextlib.contextmanager
def recording(model: nn.Module, trace: Trace) -> Iterator[Trace]:
    """Adds every call of a module within `model` to the trace while the context is open."""

    def recorder(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
            _CONVERTER.add_call(trace, path, args, kwargs, outputs)

        return hook

    handles = []
    try:
        for path, module in model.named_modules():
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
    module = dict(model.named_modules())[path]
    first = next(model.parameters(), torch.empty(0))
    inputs: list[torch.Tensor] = []

    def fill(value: Value) -> torch.Tensor:
        tensor = _tensor(value, first)
        if value.is_float:
            inputs.append(tensor.requires_grad_(cotangents is not None))
        return tensor

    filled = call.map(fill)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients: list[torch.Tensor] = []
    with torch.set_grad_enabled(cotangents is not None):
        outputs = _CONVERTER.arrays(module(*filled.args, **filled.kwargs))
        if cotangents is not None:
            by = [*inputs, *parameters.values()]
            seeds = [_tensor(value, first) for value in cotangents]
            computed = torch.autograd.grad(outputs, by, seeds, allow_unused=True) if by else []
            gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(by, computed, strict=True)]
    by_name = {name: _host(tensor) for name, tensor in zip(parameters, gradients[len(inputs) :], strict=False)}
    return _CONVERTER.replayed(outputs, gradients[: len(inputs)], by_name)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Returns an activation as numpy, in the layout of traces; bf16 as float32.

    Floats with four axes are taken for images `[B, C, H, W]` and become channels-last.
    """
    return _host(tensor.permute(0, 2, 3, 1) if _is_image(tensor) else tensor)


_CONVERTER = ArrayConverter(torch.Tensor, to_numpy)


def _host(tensor: torch.Tensor) -> np.ndarray:
    """Returns a tensor as numpy in its own layout; bf16 as float32."""
    tensor = tensor.detach().cpu()
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy().copy()
    return array


def _tensor(value: Value, like: torch.Tensor) -> torch.Tensor:
    """Returns a value as a tensor on the device of `like`; floats in their dtype, or float64 if `like` is."""
    tensor = torch.from_numpy(np.array(value.array)).to(like.device)
    if not value.is_float:
        return tensor
    tensor = to_channels_first(tensor) if _is_image(tensor) else tensor
    return tensor.to(torch.float64 if like.dtype == torch.float64 else DTYPES[value.dtype])


def _is_image(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_floating_point()
