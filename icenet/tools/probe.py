"""Records what an MLX model computes, and replays one of its layers. The mirror is `icenet_torch/tools/probe.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import icenet.blas  # noqa: F401  (first: it decides which BLAS MLX finds)

import numpy as np

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from icenet.core.engine import Batch
from icenet.engine.engine import Engine
from icenet.nn.norm import keep_running_statistics
from icenet.parity.trace import Call, Trace, Value, short_dtype
from icenet.tools import environment

DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}


def describe(engine: Engine) -> dict[str, str]:
    """What a report says of the engine: framework, version, device, TF32."""
    kind = "cpu"
    if engine.device != "cpu":
        kind = "cuda" if mx.cuda.is_available() else "metal"
    state = environment.tf32(kind, str(mx.device_info().get("device_name", "")))
    return {
        "framework": "MLX",
        "version": mx.__version__,  # type: ignore[attr-defined]  # its stub lacks it
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
    with _mode(engine, train, step, len(batch["inputs"])), recording(engine.model, trace):
        mx.eval(engine._outputs(engine._arrays(batch)))
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
    """While it is open, every call of a module within `model` is added to the trace.

    MLX has no hooks, and looks `__call__` up on the class: each instance is given a subclass of its own class
    that records, and gets its class back.
    """
    modules = _modules(model)
    paths = {id(module): path for path, module in modules}
    classes: dict[type, type] = {}

    def recorder(cls: type) -> type:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            outputs = cls.__call__(self, *args, **kwargs)
            arguments = tuple(map(_value, args)), {name: _value(item) for name, item in kwargs.items()}
            trace.add_call(paths[id(self)], *arguments, [_value(array) for array in _arrays_in(outputs)])
            return outputs

        return type(cls.__name__, (cls,), {"__call__": call})

    changed: list[tuple[nn.Module, type]] = []
    try:
        for _, module in modules:
            cls = type(module)
            if cls not in classes:
                classes[cls] = recorder(cls)
            object.__setattr__(module, "__class__", classes[cls])
            changed.append((module, cls))
        yield trace
    finally:
        for module, cls in changed:
            object.__setattr__(module, "__class__", cls)


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
    module = dict(_modules(engine.model))[path]
    leaves = [mx.array(value.array).astype(DTYPES[value.dtype]) for value in call.values if value.is_float]
    names = [name for name, _ in tree_flatten(module.trainable_parameters())]
    own = module.parameters()

    def outputs(*arrays: mx.array) -> list[mx.array]:
        module.update(tree_unflatten(list(zip(names, arrays[len(leaves) :], strict=True))))
        floats = iter(arrays[: len(leaves)])
        filled = call.map(lambda value: next(floats) if value.is_float else mx.array(value.array))
        return _arrays_in(module(*filled.args, **filled.kwargs))

    gradients: list[mx.array] = []
    primals = [*leaves, *(array for _, array in tree_flatten(module.trainable_parameters()))]
    try:
        with _mode(engine, train, step, len(call.values[0].array)):
            if cotangents is None:
                found = outputs(*primals)
            else:
                seeds = [mx.array(value.array).astype(DTYPES[value.dtype]) for value in cotangents]
                found, gradients = mx.vjp(outputs, primals, seeds)
            mx.eval(found, gradients)
    finally:
        module.update(own)
    result = {f"output[{index}]" if index else "output": _value(array) for index, array in enumerate(found)}
    for index, array in enumerate(gradients[: len(leaves)]):
        result[f"input {index}"] = _value(array)
    prefix = f"{path}." if path else ""
    arrays = dict(zip((prefix + name for name in names), gradients[len(leaves) :], strict=False))
    for name, gradient in engine._canonical(arrays).items():
        result[f"gradient {name.removeprefix(prefix)}"] = Value(gradient, short_dtype(gradient.dtype))
    return result


@contextlib.contextmanager
def _mode(engine: Engine, train: bool, step: int, rows: int) -> Iterator[None]:
    """Training with a step's dropout masks, or evaluation; every module called plainly, so that it is seen."""
    model = engine.model
    checkpointing, model.gradient_checkpointing = model.gradient_checkpointing, False
    try:
        model.train(train)
        if train:
            engine._seed_dropouts(engine._keys(step, range(rows)))
        with keep_running_statistics(model):
            yield
    finally:
        model.gradient_checkpointing = checkpointing


def _modules(model: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """Modules by path, parents first, in the order of definition; a shared one under its first path."""
    found: dict[int, tuple[str, nn.Module]] = {}

    def walk(module: nn.Module, path: str) -> None:
        if id(module) in found:
            return
        found[id(module)] = path, module
        for name, child in tree_flatten(module.children(), is_leaf=nn.Module.is_module):
            if isinstance(child, nn.Module):
                walk(child, f"{path}.{name}" if path else name)

    walk(model, path)
    return list(found.values())


def _arrays_in(item: Any) -> list[mx.array]:
    """The arrays of an output, which may be one, or a tuple, list or dict of them."""
    return [array for _, array in tree_flatten([item]) if isinstance(array, mx.array)]


def _value(item: Any) -> Any:
    return Value(to_numpy(item), short_dtype(item.dtype)) if isinstance(item, mx.array) else item


def to_numpy(array: mx.array) -> np.ndarray:
    """An activation in the trace's layout, which is MLX's own."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
