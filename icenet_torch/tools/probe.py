"""Records what a PyTorch model computes, and replays one of its layers. The mirror is `icenet/tools/probe.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from icenet.core.engine import Batch
from icenet.parity.trace import Call, Trace, Value, short_dtype
from icenet_torch.engine.engine import Engine
from icenet_torch.nn.arrays import to_channels_first
from icenet_torch.nn.norm import keep_running_statistics
from icenet_torch.tools import environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def describe(engine: Engine) -> dict[str, str]:
    """What a report says of the engine: framework, version, device, TF32."""
    state = environment.tf32(engine.device.partition(":")[0])
    return {
        "framework": "PyTorch",
        "version": torch.__version__,
        "device": engine.device,
        "tf32": "on" if state["enabled"] and state["matters"] else "off",
    }


def record(engine: Engine, batch: Batch, step: int = 0, *, train: bool = False, gradients: bool = False) -> Trace:
    """A trace of one batch: inputs, every module's output in order of completion, and the loss.

    `train` records training mode with the dropout masks of `step`; `gradients` adds the training step's loss
    and the gradient of every parameter, computed as the engine does in training.
    """
    trace = Trace(meta={**describe(engine), "mode": "training" if train else "evaluation", "step": str(step)})
    for name, array in batch.items():
        trace.add("input", name, Value(np.asarray(array), str(array.dtype)))
    with _mode(engine, train, step, len(batch["inputs"])), recording(engine.model, trace), torch.no_grad():
        engine._outputs(engine._arrays(batch))
    if gradients:
        loss, arrays = engine.gradients(batch, step)
        trace.add("loss", "", Value(np.asarray(loss), "fp32"))
        for path, array in arrays.items():
            trace.add("gradient", path, Value(array, short_dtype(array.dtype)))
    elif not train and "labels" in batch:
        trace.add("loss", "", Value(np.asarray(engine.evaluate(batch)[0]), "fp32"))
    return trace


@contextlib.contextmanager
def recording(model: nn.Module, trace: Trace) -> Iterator[Trace]:
    """While it is open, every call of a module within `model` is added to the trace."""
    handles = []

    def recorder(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
            arguments = tuple(map(_value, args)), {name: _value(item) for name, item in kwargs.items()}
            trace.add_call(path, *arguments, [_value(tensor) for tensor in _arrays_in(outputs)])

        return hook

    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_hook(recorder(path), with_kwargs=True))
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def replay(
    engine: Engine,
    path: str,
    call: Call,
    cotangents: list[Value] | None = None,
    *,
    step: int = 0,
    train: bool = False,
) -> dict[str, Value]:
    """What the module at `path` makes of given inputs: `output`, `output[1]`, ...

    With `cotangents`, one for each floating output, also the gradients of their inner product with the outputs:
    `input 0`, ... for each floating argument and `gradient PARAMETER` for each parameter of the module.
    """
    module = dict(engine.model.named_modules())[path]
    leaves: list[torch.Tensor] = []

    def fill(value: Value) -> torch.Tensor:
        tensor = _tensor(engine, value)
        if value.is_float:
            leaves.append(tensor.requires_grad_(cotangents is not None))
        return tensor

    filled = call.map(fill)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with _mode(engine, train, step, len(call.values[0].array)), torch.set_grad_enabled(cotangents is not None):
        found = _arrays_in(module(*filled.args, **filled.kwargs))
        gradients: list[torch.Tensor] = []
        if cotangents is not None:
            seeds = [_tensor(engine, value) for value in cotangents]
            wanted = [*leaves, *parameters.values()]
            computed = torch.autograd.grad(found, wanted, seeds, allow_unused=True) if wanted else []
            gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, computed, strict=True)]
    result = {f"output[{index}]" if index else "output": _value(tensor) for index, tensor in enumerate(found)}
    for index, tensor in enumerate(gradients[: len(leaves)]):
        result[f"input {index}"] = _value(tensor)
    for name, tensor in zip(parameters, gradients[len(leaves) :], strict=False):
        result[f"gradient {name}"] = Value(tensor.detach().cpu().numpy(), short_dtype(tensor.dtype))
    return result


@contextlib.contextmanager
def _mode(engine: Engine, train: bool, step: int, rows: int) -> Iterator[None]:
    """Training with a step's dropout masks, or evaluation; every module called plainly, so that it is seen."""
    model = engine.model
    checkpointing, model.gradient_checkpointing = model.gradient_checkpointing, False
    call, engine._call = engine._call, model
    try:
        model.train(train)
        if train:
            engine._seed_dropouts(engine._keys(step, range(rows)))
        with keep_running_statistics(model):
            yield
    finally:
        model.gradient_checkpointing = checkpointing
        engine._call = call


def _tensor(engine: Engine, value: Value) -> torch.Tensor:
    """A value on the engine's device; floats in their dtype, or in float64 where the engine is the reference."""
    tensor = torch.from_numpy(np.array(value.array)).to(engine.device)
    if not value.is_float:
        return tensor
    tensor = to_channels_first(tensor) if _is_image(tensor) else tensor
    return tensor.to(torch.float64 if engine.dtype == torch.float64 else DTYPES[value.dtype])


def _is_image(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_floating_point()


def _arrays_in(item: Any) -> list[torch.Tensor]:
    """The tensors of an output, which may be one, or a tuple, list or dict of them."""
    if isinstance(item, torch.Tensor):
        return [item]
    if isinstance(item, dict):
        item = list(item.values())
    return [tensor for part in item for tensor in _arrays_in(part)] if isinstance(item, (list, tuple)) else []


def _value(item: Any) -> Any:
    return Value(to_numpy(item), short_dtype(item.dtype)) if isinstance(item, torch.Tensor) else item


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """An activation in the trace's layout, which is MLX's: four axes of floats are images, channels last."""
    tensor = tensor.detach().cpu()
    tensor = tensor.permute(0, 2, 3, 1) if _is_image(tensor) else tensor
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy().copy()
    return array
