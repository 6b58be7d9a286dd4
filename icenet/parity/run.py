"""Compares the MLX backend with PyTorch on one configuration: layers, gradients, an optimizer step, training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import rng
from icenet.core.config import CNNConfig, Config, ImageDataConfig, cnn_plan
from icenet.core.data.datasets import dataset_for
from icenet.core.engine import Batch
from icenet.core.training import schedule
from icenet.core.training.loss_scale import LossScale
from icenet.parity.engines import Engines, build, describe, perturbed_weights, record, replay
from icenet.parity.locate import DIFFERS, KINDS, PROPAGATED, Replay, Row, compare, locate
from icenet.parity.report import Report, Section
from icenet.parity.trace import Call, Trace, Value, short_dtype
from icenet.parity.yardstick import SAMPLES, judge_curve

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, the finished part of its work, and all of it."""


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
    every parameter (with dropout), one optimizer step on equal gradients and, with `steps`, a training curve on the
    configuration's data.

    Args:
        config: Configuration of the model and its training.
        weights: Canonical weights; default: the initial weights.
        batch: Batch to compare on; default: `random_batch(config)`.
        steps: Number of training steps of the curve; 0 for none.
        dtype, device_mlx, device_torch: See `icenet.parity.engines.build`.
        progress: Called at each stage.

    Raises:
        BackendError: A backend is not installed, or a device does not exist.
        DataError: The data cannot be read (only with `steps`), or the batch has ids outside the vocabulary.
    """
    if progress is not None:
        progress("building", 0, 1)
    engines = build(config, dtype, weights, device_mlx, device_torch)
    report = compare_engines(engines, batch or random_batch(config), progress=progress)
    if steps:
        report.losses = curves(engines, steps, progress)
        report.curve = judge_curve(*report.losses.values())
    return report


def random_batch(config: Config, rows: int = 4, length: int = 64) -> Batch:
    """Returns a random batch, drawn with the configuration's seed.

    Tokens: `inputs` and `labels` int32 `[rows, length]`, at most one sequence of the data long.
    Images: `inputs` float32 `[rows, size, size, channels]` and `labels` int32 `[rows]`. The size is
    `data.image_size`, or a small size that the model accepts.
    A custom model on image data gets the first training batch, because only the data defines its input.
    """
    if isinstance(config.model, CNNConfig):
        size = getattr(config.data, "image_size", None) or max(8, 2 * cnn_plan.min_image_size(config.model))
        classes = rng.uniform(rng.key(config.seed, "parity labels"), (rows,)) * config.model.vocab_size
        shape = (rows, size, size, config.model.image_channels)
        images = rng.normal(rng.key(config.seed, "parity batch"), shape)
        return {"inputs": images, "labels": classes.astype(np.int32)}
    if config.model.input_kind == "anything" and isinstance(config.data, ImageDataConfig):
        return dataset_for(config).train_batch(0, rows)
    longest: int = getattr(config.model, "max_seq_length", 64)
    columns = min(length, getattr(config.data, "seq_length", None) or longest) + 1
    words = rng.bits(rng.key(config.seed, "parity batch"), rows * columns).astype(np.uint64)
    tokens = ((words * np.uint64(config.model.vocab_size)) >> np.uint64(32)).astype(np.int32).reshape(rows, columns)
    return {"inputs": np.ascontiguousarray(tokens[:, :-1]), "labels": np.ascontiguousarray(tokens[:, 1:])}


def compare_engines(engines: Engines, batch: Batch, step: int = 0, progress: Progress | None = None) -> Report:
    """Compares existing engines on one batch, with the dropout masks of `step`.

    Weights and optimizer state are unchanged afterwards.
    """
    tell = progress or (lambda stage, done, total: None)
    config = engines.torch.config
    dtype = config.training.mixed_precision
    roles = ("MLX", "PyTorch", "reference")
    report = Report(dtype, {role: describe(engine) for role, engine in zip(roles, engines, strict=True)})
    initial = [engine.weights() for engine in engines[:2]]
    report.num_weights = len(initial[1])
    report.unequal_weights = unequal(*initial)

    modes = [("evaluation", False)]
    # without dropout and batch norm both modes compute the same
    if config.model.dropout or "batch_norm" in engines.torch.model.layer_kinds().values():
        modes.append(("training", True))
    for mode, train in modes:
        title = f"layers, {mode}"
        tell(title, 0, 1)
        rows, (_, torch, reference) = _record_and_compare(engines, batch, dtype, step=step, train=train)
        replays = tuple(partial(replay, engine, step=step, train=train) for engine in engines)
        perturbed = _perturbed_replay(engines, dtype, step, train)
        rows = locate(rows, torch, reference, (*replays, perturbed), dtype, partial(tell, title))
        report.sections.append(Section(title, rows))

    tell("gradients", 0, 1)
    kinds = ("loss", "gradient")
    rows, traces = _record_and_compare(engines, batch, dtype, kinds, step=step, train=True, gradients=True)
    report.sections.append(Section("loss and gradients, training", _mark_gradients(rows, report)))
    tell("optimizer step", 0, 1)
    gradients = {path: value.array.astype(np.float32) for path, value in traces[2].of("gradient").items()}
    report.sections.append(Section("optimizer step on equal gradients", optimizer_rows(engines, [gradients])))
    tell("done", 1, 1)
    return report


def optimizer_rows(engines: Engines, gradients: list[dict[str, Array]], first_step: int = 0) -> list[Row]:
    """Compares parameters and moments after one optimizer step for each of `gradients`, which all engines receive.

    Weights and optimizer state are restored afterwards.
    """
    traces = []
    for engine in engines:
        weights, state = engine.weights(), engine.optimizer_state()
        for index, arrays in enumerate(gradients):
            engine.apply_gradients(arrays, first_step + index, engine.config.training.learning_rate)
        trace = Trace()
        for kind, arrays in (("parameter", engine.weights()), ("moment", engine.optimizer_state())):
            for path, array in arrays.items():
                trace.add(kind, path, Value(array, short_dtype(array.dtype)))
        engine.set_weights(weights)
        engine.set_optimizer_state(state)
        traces.append(trace)
    mlx, torch, reference = traces
    return compare(mlx, torch, reference, "fp32")  # weights and moments are fp32, whatever the compute dtype


def curves(engines: Engines, steps: int, progress: Progress | None = None) -> dict[str, list[float]]:
    """Trains for `steps` steps on the configuration's data; returns the losses of MLX, PyTorch and the reference."""
    config = engines.torch.config
    dataset = dataset_for(config)
    losses: dict[str, list[float]] = {"MLX": [], "PyTorch": [], "PyTorch float64": []}
    scales = [LossScale.for_precision(config.training.mixed_precision) for _ in range(2)] + [LossScale()]
    for step in range(steps):
        batch = dataset.train_batch(step, config.training.batch_size)
        rate = schedule.learning_rate(step, config.training)
        handles = [e.train_step(batch, step, rate, scale.scale) for e, scale in zip(engines, scales, strict=True)]
        for engine, handle, scale, curve in zip(engines, handles, scales, losses.values(), strict=True):
            result = engine.read(handle)
            scale.update(result.finite)
            curve.append(result.loss)
        if progress is not None:
            progress("training", step + 1, steps)
    return losses


def unequal(a: Mapping[str, Array], b: Mapping[str, Array]) -> list[str]:
    """Returns the names whose arrays differ in any bit, or that are missing on one side."""
    return [
        path
        for path in dict.fromkeys([*b, *a])
        if path not in a
        or path not in b
        or a[path].dtype != b[path].dtype
        or a[path].shape != b[path].shape
        or a[path].tobytes() != b[path].tobytes()
    ]


def _record_and_compare(
    engines: Engines, batch: Batch, dtype: str, kinds: tuple[str, ...] = KINDS, **options: Any
) -> tuple[list[Row], list[Trace]]:
    """Records one trace of each engine with the options of `record`, and compares them."""
    mlx, torch, reference = traces = [record(engine, batch, **options) for engine in engines]

    def perturbed_traces() -> list[Trace]:
        found = []
        for index in range(SAMPLES):
            with perturbed_weights(engines.torch, dtype, index):
                found.append(record(engines.torch, batch, **options))
        return found

    return compare(mlx, torch, reference, dtype, kinds, perturbed_traces), traces


def _perturbed_replay(engines: Engines, dtype: str, step: int, train: bool) -> Replay:
    """Returns a replay by PyTorch that perturbs the weights by another draw at each call."""
    draws = count()

    def perturbed(path: str, call: Call, cotangents: list[Value]) -> dict[str, Value]:
        with perturbed_weights(engines.torch, dtype, next(draws)):
            return replay(engines.torch, path, call, cotangents, step=step, train=train)

    return perturbed


def _mark_gradients(rows: list[Row], report: Report) -> list[Row]:
    """Marks gradients over the tolerance: "differs here" if their layer does, else "propagated"."""
    layers = set(report.differing())

    def mark(row: Row) -> str:
        return DIFFERS if row.path.rpartition(".")[0] in layers else PROPAGATED

    return [row if row.passed else replace(row, mark=mark(row)) for row in rows]
