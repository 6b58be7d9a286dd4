"""The three engines of a parity run: builds them, records a batch, replays a layer, perturbs the weights.

The engines supply the mode, the dropout masks and the gradients. Recording and replaying are done by `tools.probe` of
each backend, which works on any module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icenet.core import backends, rng
from icenet.core.config import Config
from icenet.core.engine import Batch, Engine, check_ids
from icenet.parity.trace import Call, Trace, Value, short_dtype
from icenet.parity.yardstick import perturb_by_ulp

Array = npt.NDArray[Any]


class Engines(NamedTuple):
    """The engine under test, the engine that measures the noise, and the float64 reference.

    `mlx` may be any engine.
    """

    mlx: Engine
    torch: Engine
    reference: Engine


def build(
    config: Config,
    dtype: str | None = None,
    weights: Mapping[str, Array] | None = None,
    device_mlx: str | None = None,
    device_torch: str = "cpu",
) -> Engines:
    """Builds the three engines of a configuration.

    Args:
        config: Configuration of the model and its training.
        dtype: fp32, bf16 or fp16; default: `training.mixed_precision`.
        weights: Canonical weights for all three; default: the initial weights.
        device_mlx: The device under test; default: the device of the configuration.
        device_torch: The device that measures the noise. The reference runs on the CPU.
    """
    backends.exact_products()
    config = config.with_overrides(f"training.mixed_precision={dtype or config.training.mixed_precision}")
    eager = config.with_overrides("model.compile_model=false")
    engines = Engines(
        backends.engine(config, "mlx", device_mlx),
        backends.engine(eager, "torch", device_torch),
        backends.engine(eager, "torch", "cpu", dtype="float64"),
    )
    if weights is not None:
        for engine in engines:
            engine.set_weights(dict(weights))
    return engines


def describe(engine: Engine) -> dict[str, str]:
    """Returns framework, version, device and TF32 of an engine."""
    described: dict[str, str] = backends.module(engine.backend, "tools.environment").describe(engine.device)
    return described


def record(engine: Engine, batch: Batch, step: int = 0, *, train: bool = False, gradients: bool = False) -> Trace:
    """Returns a trace of one batch: inputs, the output of every module in order of completion, and the loss.

    Args:
        engine: Engine that runs the model.
        batch: Batch, as in `Engine.evaluate`.
        step: Step whose dropout masks are used.
        train: Record training mode rather than evaluation mode.
        gradients: Also compute the loss and the gradient of every parameter as a training step does.
    """
    check_ids(batch, engine.config.model.vocab_size)
    inputs = {name: Value(array, short_dtype(array.dtype)) for name, array in batch.items()}
    trace = Trace(meta={**describe(engine), "mode": "training" if train else "evaluation", "step": str(step)})
    for name, value in inputs.items():
        trace.add("input", name, value)
    options = {name: value for name, value in inputs.items() if name == "attention_mask"}
    with backends.module(engine.backend, "tools.probe").recording(engine.model, trace):
        replay(engine, "", Call((inputs["inputs"],), options), step=step, train=train)
    if gradients:
        loss, arrays = engine.gradients(batch, step)
        trace.add("loss", "", Value(np.asarray(loss), "fp32"))
        for path, array in arrays.items():
            trace.add("gradient", path, Value(array, short_dtype(array.dtype)))
    elif not train and "labels" in batch:
        trace.add("loss", "", Value(np.asarray(engine.evaluate(batch).loss), "fp32"))
    return trace


def replay(
    engine: Engine,
    path: str,
    call: Call,
    cotangents: list[Value] | None = None,
    *,
    step: int = 0,
    train: bool = False,
) -> dict[str, Value]:
    """Calls the module at `path` of an engine's model; see `tools.probe.replay` for arguments and result.

    `train` selects training mode with the dropout masks of `step`. Running statistics are left unchanged.
    """
    model = engine.model
    probe = backends.module(engine.backend, "tools.probe")
    # with checkpointing, the blocks would be called again in the backward pass
    checkpointing, model.gradient_checkpointing = model.gradient_checkpointing, False
    try:
        model.train(train)
        if train:
            engine.seed_dropouts(step, range(len(call.values[0].array)))
        with engine.nn.norm.keep_running_statistics(model):
            replayed: dict[str, Value] = probe.replay(model, path, call, cotangents)
            return replayed
    finally:
        model.gradient_checkpointing = checkpointing


@contextlib.contextmanager
def perturbed_weights(engine: Engine, dtype: str, index: int) -> Iterator[None]:
    """Perturbs the engine's weights by an ulp of `dtype` while the context is open (see `perturb_by_ulp`).

    `index` selects the random draw.
    """
    weights = engine.weights()
    perturbed = {
        path: perturb_by_ulp(array, dtype, rng.key(index, "rounded anew", path)).astype(array.dtype)
        for path, array in weights.items()
    }
    engine.set_weights(perturbed)
    try:
        yield
    finally:
        engine.set_weights(weights)
