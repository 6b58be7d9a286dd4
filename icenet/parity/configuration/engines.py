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

from icenet.core import backends
from icenet.core.config import Config, custom, user_code
from icenet.core.engine import Batch, Engine, check_ids
from icenet.core.models import modules
from icenet.parity import align
from icenet.parity.nearby import Perturbation
from icenet.parity.trace import Call, Trace, Value, class_name, is_foreign, short_dtype

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
    """Builds the three engines of a configuration, without TF32.

    Args:
        config: Configuration of the model and its training; masks are keyed, whatever `training.rng` says.
        dtype: fp32, bf16 or fp16; default: `training.mixed_precision`.
        weights: Canonical weights for all three; default: the initial weights.
        device_mlx: The device under test; default: the device of the configuration.
        device_torch: The device that measures the noise. The reference runs on the CPU.
    """
    precision = dtype or config.training.mixed_precision
    # the masks of the frameworks' own generators cannot be compared
    config = config.with_overrides(f"training.mixed_precision={precision}", "allow_tf32=false", "training.rng=keyed")
    eager = config.with_overrides("model.compile_model=false")
    engines = Engines(
        backends.engine(config, "mlx", device_mlx),
        backends.engine(eager, "torch", device_torch),
        backends.engine(eager, "torch", "cpu", dtype="float64"),
    )
    for engine in engines:
        if custom.is_custom(config.model.type):
            engine.model.guard_embeddings(reads_all=True)
        if weights is not None:
            engine.set_weights(dict(weights))
    return engines


def describe(engine: Engine) -> dict[str, str]:
    """Returns framework, version, device and TF32 of an engine."""
    described: dict[str, str] = backends.module(engine.backend, "tools.environment").describe(engine.device)
    return {**described, "tf32": engine.tf32}


def record(
    engine: Engine,
    batch: Batch,
    step: int = 0,
    *,
    train: bool = False,
    gradients: bool = False,
    loss_scale: float = 1.0,
) -> Trace:
    """Returns a trace of one batch: inputs, the output of every module in order of completion, and the loss.

    Args:
        engine: Engine that runs the model.
        batch: Batch, as in `Engine.evaluate`.
        step: Step whose dropout masks are used.
        train: Record training mode rather than evaluation mode.
        gradients: Also compute the loss and the gradient of every parameter as a training step does.
        loss_scale: Scale of the loss in the backward pass of fp16.
    """
    check_ids(batch, engine.config.model.vocab_size)
    inputs = {name: Value(array, short_dtype(array.dtype)) for name, array in batch.items()}
    trace = Trace(meta={**describe(engine), "mode": "training" if train else "evaluation", "step": str(step)})
    for name, value in inputs.items():
        trace.add("input", name, value)
    options = {name: value for name, value in inputs.items() if name == "attention_mask"}
    with backends.module(engine.backend, "tools.probe").recording(engine.model, trace):
        replay(engine, "", Call((_native(engine, inputs["inputs"]),), options), step=step, train=train)
    if gradients:
        loss, arrays = engine.gradients(batch, step, loss_scale)
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
        with model.arithmetic(), engine.nn.norm.keep_buffers(model):
            with user_code.explain_errors(call.values[0].array) if not path else contextlib.nullcontext():
                replayed: dict[str, Value] = probe.replay(model, path, call, cotangents)
            return replayed
    finally:
        model.gradient_checkpointing = checkpointing


def has_foreign(engine: Engine) -> bool:
    """Returns whether the engine's model computes with layers or code outside IceNet."""
    return any(is_foreign(class_name(module)) for _, module in engine.model.named_modules())


def _native(engine: Engine, value: Value) -> Value:
    """Returns the input of a batch with the axes of the engine's framework (see `Engine.to_device`)."""
    is_image = value.array.ndim == 4 and engine.backend == "torch"
    return Value(align.to_torch(align.MOVED, value.array), value.dtype) if is_image else value


@contextlib.contextmanager
def perturbed(
    engine: Engine,
    dtype: str,
    sample: int,
    role: str,
    in_order: bool = False,
    *,
    within: str = "",
    state: bool = False,
) -> Iterator[Perturbation]:
    """Sets the weights of an engine to those of a sample of the noise while the context is open.

    Args:
        engine: An engine of either backend.
        dtype: Compute dtype under test, to which the model rounds its weights.
        sample: Number of the sample, 0 to SAMPLES - 1.
        role: "torch": all that the engine computes is also moved by ulps, as floor 5 of the yardstick describes.
            "mlx" or "reference": it is not.
        in_order: Also take all sums of PyTorch term by term (floor 6).
        within: Path of the module whose weights are set; default: all.
        state: Whether to set the optimizer state too.

    Yields:
        The perturbation, for the inputs of what is computed.
    """
    perturb, perturb_state = (Perturbation(name, sample, rounds=role == "torch") for name in (dtype, "fp32"))
    # only the arrays of the layer, because a report replays each layer in up to 12 samples
    named = backends.module(engine.backend, "nn.tree").named_modules(engine.model)
    layer = next(module for path, module in named if path == within)
    with engine.model.arithmetic():
        weights, shared = modules.get_weights(layer), modules.shared_arrays(layer)
        own = {path: array for path, array in weights.items() if path not in shared}  # moved once, at its first place
        prefix = f"{within}." if within else ""
        modules.set_weights(layer, {p: perturb.array(a, "weight", prefix + p) for p, a in own.items()})
    slots = engine.optimizer_state() if state else {}
    if state:
        engine.set_optimizer_state({path: perturb_state.array(array, path) for path, array in slots.items()})
    probe = backends.module(engine.backend, "tools.probe")
    inner = probe.perturbing(layer, perturb.rounded) if perturb.rounds else contextlib.nullcontext()
    sums = backends.module("torch", "tools.sums").summing_in_order(sample) if in_order else contextlib.nullcontext()
    try:
        with inner, sums:
            yield perturb
    finally:
        with engine.model.arithmetic():
            modules.set_weights(layer, own)
        if state:
            engine.set_optimizer_state(slots)
