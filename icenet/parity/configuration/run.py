"""Compares the MLX backend with PyTorch on one configuration: layers, gradients, an optimizer step, training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import rng
from icenet.core.config import Config, CustomDataConfig, ImageDataConfig, ImageModelConfig, output_size
from icenet.core.data.datasets import dataset_for
from icenet.core.engine import Batch, Engine
from icenet.core.errors import NonFiniteError
from icenet.core.models import twins
from icenet.core.training import schedule
from icenet.core.training.loss_scale import LossScale
from icenet.core.weights.arrays import first_non_finite
from icenet.parity.arguments import Progress
from icenet.parity.configuration.engines import Engines, build, describe, has_foreign, perturbed, record, replay
from icenet.parity.configuration.locate import (
    DIFFERS,
    KINDS,
    PROPAGATED,
    Row,
    compare,
    locate,
)
from icenet.parity.configuration.randomness import check_randomness
from icenet.parity.configuration.report import Report, Section
from icenet.parity.curves import judge_curve
from icenet.parity.fp16 import FP16_SCALES, fits_fp16
from icenet.parity.layer import SampledReplay
from icenet.parity.measures import rms
from icenet.parity.resampling import F, Samples
from icenet.parity.trace import Call, Trace, Value, short_dtype

Array = npt.NDArray[Any]


def run(
    config: Config,
    weights: Mapping[str, Array] | None = None,
    batch: Batch | None = None,
    *,
    steps: int = 0,
    dtype: str | None = None,
    device_mlx: str | None = None,
    device_torch: str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Compares MLX with PyTorch on a configuration.

    Compares the initial weights bit for bit, the output of every layer, every layer on equal inputs, the gradient of
    every parameter (with dropout), a training step on equal gradients and, with `steps`, a training curve on the
    configuration's data.

    Args:
        config: Configuration of the model and its training.
        weights: Canonical weights; default: the initial weights.
        batch: Batch to compare on; default: `random_batch(config)`.
        steps: Number of training steps of the curve; 0 for none.
        dtype, device_mlx, device_torch: See `icenet.parity.configuration.engines.build`.
        progress: Called at each stage.

    Raises:
        BackendError: A backend is not installed, or a device does not exist.
        DataError: The data cannot be read (only with `steps`), or the batch has ids outside the vocabulary.
        UsageError: The model draws random numbers without a key (see `check_randomness`).
        NonFiniteError: A weight is NaN or infinite.
    """
    if progress is not None:
        progress("building", 0, 1)
    engines = build(config, dtype, device_mlx=device_mlx, device_torch=device_torch)
    if not have_equal_arrays(engines):  # no value of the two can be compared
        return _new_report(engines)
    if weights is not None:
        if (path := first_non_finite(weights)) is not None:
            raise NonFiniteError(f"parity: {path} has values that are NaN or infinite, so no result can be compared")
        for engine in engines:
            engine.set_weights(dict(weights))
    batch = batch or random_batch(config)
    check_randomness(engines, batch)
    report = compare_engines(engines, batch, progress=progress)
    if config.training.rng == "native":
        report.notes.append(
            "training.rng is native; keyed dropout masks are compared, because native ones are unequal"
        )
    if steps:
        start = engines.torch.weights(), engines.torch.optimizer_state()
        report.losses = curves(engines, steps, progress)
        samples = _samples(engines, partial(_sampled_curve, engines, start, steps))
        mlx, torch, reference = report.losses.values()
        report.curve = judge_curve(mlx, torch, reference, samples)
    return report


def have_equal_arrays(engines: Engines) -> bool:
    """Returns whether the models of MLX and PyTorch have the same arrays, and train and share the same ones."""
    ours, theirs = (twins.describe(engine.model).arrays for engine in engines[:2])
    return ours == theirs


def random_batch(config: Config, rows: int = 4, length: int = 64) -> Batch:
    """Returns a random batch, drawn with the configuration's seed.

    Tokens: `inputs` and `labels` int32 `[rows, length]`, at most one sequence of the data long.
    Images: `inputs` float32 `[rows, height, width, channels]` and `labels` int32 `[rows]`. The size is
    `data.image_size`, or a small size that the model accepts.
    A custom model on image data, and data of the user, get the first training batch, because only the data defines
    its arrays.
    """
    if isinstance(config.data, CustomDataConfig):
        return dataset_for(config).train_batch(0, rows)
    if isinstance(config.model, ImageModelConfig):
        size = getattr(config.data, "image_size", None)
        height, width = (size, size) if size else config.model.example_size
        classes = rng.uniform(rng.key(config.seed, "parity labels"), (rows,)) * config.model.vocab_size
        shape = (rows, height, width, config.model.image_channels)
        images = rng.normal(rng.key(config.seed, "parity batch"), shape)
        return {"inputs": images, "labels": classes.astype(np.int32)}
    if config.model.input_kind == "anything" and isinstance(config.data, ImageDataConfig):
        return dataset_for(config).train_batch(0, rows)
    longest: int = getattr(config.model, "max_seq_length", 64)
    columns = min(length, getattr(config.data, "seq_length", None) or longest) + 1
    words = rng.bits(rng.key(config.seed, "parity batch"), rows * columns).astype(np.uint64)
    tokens = ((words * np.uint64(config.model.vocab_size)) >> np.uint64(32)).astype(np.int32).reshape(rows, columns)
    labels = tokens[:, 1:] % output_size(config.model)  # of hidden states, if there are no logits
    return {"inputs": np.ascontiguousarray(tokens[:, :-1]), "labels": np.ascontiguousarray(labels)}


def compare_engines(engines: Engines, batch: Batch, step: int = 0, progress: Progress | None = None) -> Report:
    """Compares existing engines on one batch, with the dropout masks of `step`.

    Weights and optimizer state are unchanged afterwards.
    """
    tell = progress or (lambda stage, done, total: None)
    config = engines.torch.config
    dtype = config.training.mixed_precision
    report = _new_report(engines)
    dropouts = [engine.model.dropout_layers() for engine in engines[:2]]

    modes = [("evaluation", False)]
    # without dropout and batch norm both modes compute the same
    if any(dropouts) or "batch_norm" in engines.torch.model.layer_kinds().values():
        modes.append(("training", True))
    for mode, train in modes:
        title = f"layers, {mode}"
        tell(title, 0, 1)
        traces, rows_of = _record(engines, batch, dtype, step=step, train=train)
        mlx_replay, torch_replay, reference_replay = (
            partial(replay, engine, step=step, train=train) for engine in engines
        )
        replays = mlx_replay, torch_replay, reference_replay
        samples = _samples(engines, partial(_sampled_replay, engines, dtype, step, train))
        rows = locate(rows_of, *traces, replays, dtype, samples, partial(tell, title))
        report.sections.append(Section(title, rows))

    tell("gradients", 0, 1)
    kinds = ("loss", "gradient")
    scale = _loss_scale(engines, batch, step) if dtype == "fp16" else 1.0
    options: dict[str, Any] = {"step": step, "train": True, "gradients": True, "loss_scale": scale}
    traces, rows_of = _record(engines, batch, dtype, kinds, **options)
    rows = _mark_gradients(rows_of(bool(report.differing())), report)
    report.sections.append(Section("loss and gradients, training", rows))
    tell("training step", 0, 1)
    gradients = {path: value.array.astype(np.float32) for path, value in traces[2].of("gradient").items()}
    report.sections.append(Section(TRAINING_STEP, training_step_rows(engines, batch, step, gradients)))
    tell("done", 1, 1)
    return report


def _loss_scale(engines: Engines, batch: Batch, step: int) -> float:
    """Returns a scale of the loss with which no gradient overflows in fp16."""
    for scale in FP16_SCALES:
        *found, exact = (engine.gradients(batch, step, scale)[1] for engine in engines)
        if fits_fp16(exact, found, scale):
            break
    return scale


def _new_report(engines: Engines) -> Report:
    """Returns a report of the engines, their weights, and what their models hold, train and share."""
    roles = ("MLX", "PyTorch", "reference")
    dtype = engines.torch.config.training.mixed_precision
    report = Report(dtype, {role: describe(engine) for role, engine in zip(roles, engines, strict=True)})
    ours, theirs = engines.mlx.weights(), engines.torch.weights()
    report.num_weights = len(theirs)
    report.unequal_weights = unequal(ours, theirs)
    report.rounded_weights = rounded(ours, theirs, report.unequal_weights)
    report.shared = engines.torch.model.shared_arrays()
    report.differences = twins.differences(*(twins.describe(engine.model) for engine in engines[:2]))
    return report


ROUNDED = 1e-4
"""Largest relative error of a table that both frameworks compute in fp32: the sine of 2000 is off by this much."""

TRAINING_STEP = "training step on equal gradients"

STEP_RATE = 0.1
"""The least learning rate of the step that is compared. At 3e-4 an update changes the last few bits of a parameter,
and an error within it, such as weight decay in the wrong order, is smaller than the rounding of the parameter."""


def training_step_rows(engines: Engines, batch: Batch, step: int, exact: Mapping[str, Array]) -> list[Row]:
    """Compares parameters, optimizer state and running statistics after one training step.

    MLX runs its training step. PyTorch applies the gradients of MLX, with clipping, because the update of Adam is
    not a continuous function of a gradient that is zero but for rounding. The gradients are compared elsewhere.
    If loss or gradients of MLX are not finite, all engines apply the gradients `exact`. The learning rate is that of
    the configuration, but at least STEP_RATE.

    Weights and optimizer state are restored afterwards.
    """
    rate = _step_rate(engines)
    with _restored(engines.mlx):
        mlx_gradients = engines.mlx.gradients(batch, step)[1]
        finite = engines.mlx.read(engines.mlx.train_step(batch, step, rate)).finite
        mlx = _state(engines.mlx, mlx_gradients)
    if not finite:
        return optimizer_rows(engines, [dict(exact)], step)

    def trace(engine: Engine, gradients: Mapping[str, Array]) -> Trace:
        if engine is engines.mlx:
            with _restored(engine):
                engine.read(engine.train_step(batch, step, rate))
                return _state(engine, gradients)
        found = Trace()
        with _restored(engine):
            if mlx.of("statistic"):
                engine.read(engine.train_step(batch, step, rate))
                found = _state(engine, gradients)
        with _restored(engine):
            engine.apply_gradients(gradients, step, rate, clip=True)
            updated = _state(engine, gradients)
        updated.values.update({name: v for name, v in found.values.items() if name.startswith("statistic:")})
        return updated

    def sampled(dtype: str, role: str, in_order: bool) -> Callable[[int], Trace]:
        def sample(index: int) -> Trace:
            engine = getattr(engines, role)
            with perturbed(engine, dtype, index, role, in_order, state=True) as perturb:
                return trace(engine, {path: perturb.array(a, path) for path, a in mlx_gradients.items()})

        return sample

    torch, reference = (trace(engine, mlx_gradients) for engine in engines[1:])
    # the forward pass has the compute dtype, the update fp32
    dtype = engines.torch.config.training.mixed_precision
    forward, update = (_samples(engines, partial(sampled, name)) for name in (dtype, "fp32"))
    statistics = compare(mlx, torch, reference, dtype, ("statistic",), forward)
    # MLX has other gradients in a nearby problem, so its update is not repeated
    updates = compare(mlx, torch, reference, "fp32", ("parameter", "moment"), replace(update, mlx=None))
    return [*updates, *statistics]


def optimizer_rows(engines: Engines, gradients: list[dict[str, Array]], first_step: int = 0) -> list[Row]:
    """Compares parameters and moments after one optimizer step for each of `gradients`, which all engines receive.

    Weights and optimizer state are restored afterwards.
    """

    def trace(engine: Engine, gradients: list[dict[str, Array]]) -> Trace:
        with _restored(engine):
            for index, arrays in enumerate(gradients):
                engine.apply_gradients(arrays, first_step + index, _step_rate(engines))
            return _state(engine, gradients[0])

    def sampled(role: str, in_order: bool) -> Callable[[int], Trace]:
        def sample(index: int) -> Trace:
            engine = getattr(engines, role)
            with perturbed(engine, "fp32", index, role, in_order, state=True) as perturb:
                moved = [
                    {path: perturb.array(array, number, path) for path, array in arrays.items()}
                    for number, arrays in enumerate(gradients)
                ]
                return trace(engine, moved)

        return sample

    mlx, torch, reference = (trace(engine, gradients) for engine in engines)
    # weights and moments are fp32, whatever the compute dtype
    return compare(mlx, torch, reference, "fp32", samples=_samples(engines, sampled))


def _step_rate(engines: Engines) -> float:
    """Returns the learning rate of the training step that is compared."""
    return max(engines.torch.config.training.learning_rate, STEP_RATE)


def _samples(engines: Engines, sampled: Callable[[str, bool], F]) -> Samples[F]:
    """Returns the samples `sampled(role, in_order)`, with sums in order if the model has layers outside IceNet."""
    in_order = sampled("torch", True) if has_foreign(engines.mlx) else None
    return Samples(sampled("reference", False), sampled("torch", False), sampled("mlx", False), in_order)


def _state(engine: Engine, gradients: Mapping[str, Array]) -> Trace:
    """Returns the engine's weights and optimizer state; weights without a gradient are of kind "statistic".

    A shared array is there once, by its owner's path.
    """
    trace, shared = Trace(), engine.model.shared_arrays()
    for path, array in engine.weights().items():
        if path in shared:
            continue
        trace.add("parameter" if path in gradients else "statistic", path, Value(array, short_dtype(array.dtype)))
    for path, array in engine.optimizer_state().items():
        trace.add("moment", path, Value(array, short_dtype(array.dtype)))
    return trace


@contextlib.contextmanager
def _restored(engine: Engine) -> Iterator[None]:
    """Restores the engine's weights and optimizer state on exit."""
    weights, state = engine.weights(), engine.optimizer_state()
    try:
        yield
    finally:
        engine.set_weights(weights)
        engine.set_optimizer_state(state)


def curves(engines: Engines, steps: int, progress: Progress | None = None) -> dict[str, list[float]]:
    """Trains for `steps` steps on the configuration's data; returns the losses of MLX, PyTorch and the reference."""
    names = ("MLX", "PyTorch", "PyTorch float64")
    dtype = engines.torch.config.training.mixed_precision
    losses = _train(list(engines), [dtype, dtype, "fp32"], steps, progress)  # float64 needs no loss scale, as fp32
    return dict(zip(names, losses, strict=True))


def _train(
    engines: list[Engine], dtypes: list[str], steps: int, progress: Progress | None = None
) -> list[list[float]]:
    """Trains the engines side by side on the data of their configuration; returns the losses of each."""
    config = engines[0].config
    dataset = dataset_for(config)
    losses: list[list[float]] = [[] for _ in engines]
    scales = [LossScale.for_precision(dtype) for dtype in dtypes]
    for step in range(steps):
        batch = dataset.train_batch(step, config.training.batch_size)
        rate = schedule.learning_rate(step, config.training)
        handles = [e.train_step(batch, step, rate, scale.scale) for e, scale in zip(engines, scales, strict=True)]
        for engine, handle, scale, curve in zip(engines, handles, scales, losses, strict=True):
            result = engine.read(handle)
            if not result.finite:
                engine.check_embeddings(batch, step)
            scale.update(result.finite)
            curve.append(result.loss)
        if progress is not None:
            progress("training", step + 1, steps)
    return losses


def _sampled_curve(
    engines: Engines, start: tuple[dict[str, Array], dict[str, Array]], steps: int, role: str, in_order: bool
) -> Callable[[int], list[float]]:
    """Returns a function that trains an engine in a sample, from the given weights and state; returns the losses."""
    engine: Engine = getattr(engines, role)
    dtype = engine.config.training.mixed_precision

    def losses(index: int) -> list[float]:
        engine.set_weights(start[0])
        engine.set_optimizer_state(start[1])
        with perturbed(engine, dtype, index, role, in_order, state=True):
            return _train([engine], ["fp32" if role == "reference" else dtype], steps)[0]

    return losses


def unequal(a: Mapping[str, Array], b: Mapping[str, Array]) -> list[str]:
    """Returns the names whose arrays differ in any bit, or that are missing on one side.

    Integers are compared by value, because the frameworks' default widths differ.
    """
    names = dict.fromkeys([*b, *a])
    return [path for path in names if path not in a or path not in b or not _is_equal(a[path], b[path])]


def rounded(a: Mapping[str, Array], b: Mapping[str, Array], names: Iterable[str]) -> list[str]:
    """Returns those of the names whose arrays are equal but for rounding, such as sines of large numbers."""
    return [path for path in names if path in a and path in b and _is_rounded(a[path], b[path])]


def _is_rounded(a: Array, b: Array) -> bool:
    if a.shape != b.shape or not (np.issubdtype(a.dtype, np.floating) and np.issubdtype(b.dtype, np.floating)):
        return False
    ours, theirs = a.astype(np.float64), b.astype(np.float64)
    return rms(ours - theirs) <= ROUNDED * rms(theirs)


def _is_equal(a: Array, b: Array) -> bool:
    if np.issubdtype(a.dtype, np.integer) and np.issubdtype(b.dtype, np.integer):
        return np.array_equal(a, b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _record(
    engines: Engines, batch: Batch, dtype: str, kinds: tuple[str, ...] = KINDS, **options: Any
) -> tuple[tuple[Trace, Trace, Trace], Callable[[bool], list[Row]]]:
    """Records one trace of each engine with the options of `record`; returns them and `rows_of` of `locate`."""
    mlx, torch, reference = (record(engine, batch, **options) for engine in engines)

    def sampled(role: str, in_order: bool) -> Callable[[int], Trace]:
        def sample(index: int) -> Trace:
            engine = getattr(engines, role)
            with perturbed(engine, dtype, index, role, in_order) as perturb:
                inputs = {name: perturb(Value(a, short_dtype(a.dtype)), name).array for name, a in batch.items()}
                return record(engine, inputs, **options)

        return sample

    def rows_of(has_differences: bool) -> list[Row]:
        samples = _samples(engines, sampled)
        return compare(mlx, torch, reference, dtype, kinds, samples.few() if has_differences else samples)

    return (mlx, torch, reference), rows_of


def _sampled_replay(engines: Engines, dtype: str, step: int, train: bool, role: str, in_order: bool) -> SampledReplay:
    """Returns a replay by one engine in a sample."""
    engine = getattr(engines, role)

    def replayed(index: int, path: str, call: Call, cotangents: list[Value] | None) -> dict[str, Value]:
        with perturbed(engine, dtype, index, role, in_order, within=path) as perturb:
            moved = [perturb(cotangent, "cotangent", number) for number, cotangent in enumerate(cotangents or ())]
            return replay(engine, path, perturb.call(call), moved, step=step, train=train)

    return replayed


def _mark_gradients(rows: list[Row], report: Report) -> list[Row]:
    """Marks gradients over the tolerance: "differs here" if their layer does, else "propagated"."""
    layers = set(report.differing())

    def mark(row: Row) -> str:
        return DIFFERS if row.path.rpartition(".")[0] in layers else PROPAGATED

    return [row if row.passed else replace(row, mark=mark(row)) for row in rows]
