"""What `icenet parity` does: builds a model three times and judges MLX against PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from icenet.core import backends as backend
from icenet.core import rng
from icenet.core.config import CNNConfig, Config, ImageDataConfig, cnn_plan
from icenet.core.data.datasets import dataset_for
from icenet.core.engine import Batch, Engine
from icenet.core.training import open_model, schedule
from icenet.core.training.loss_scale import LossScale
from icenet.parity.locate import DIFFERS, INHERITS, Row, compare, locate
from icenet.parity.report import Report, Section
from icenet.parity.trace import Trace, Value, short_dtype
from icenet.parity.yardstick import SAMPLES, judge_curve, perturb_by_ulp

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
"""Told the stage, and how much of it is done, of how much."""


class Engines(NamedTuple):
    """The three: the one judged, the noise and the truth. `mlx` may be any engine that is to be judged."""

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
    """The three engines of a configuration.

    Args:
        config: of the model and its training.
        dtype: fp32, bf16 or fp16; that of `training.mixed_precision` when absent.
        weights: canonical weights for all three; the initial ones when absent.
        device_mlx: the device judged; the configuration's when absent.
        device_torch: where the noise is measured. The reference is on the CPU.
    """
    backend.exact_products()
    config = config.with_overrides(f"training.mixed_precision={dtype or config.training.mixed_precision}")
    plain = config.with_overrides("model.compile_model=false")
    engines = Engines(
        backend.engine(config, "mlx", device_mlx),
        backend.engine(plain, "torch", device_torch),
        backend.engine(plain, "torch", "cpu", dtype="float64"),
    )
    if weights is not None:
        for engine in engines:
            engine.set_weights(dict(weights))
    return engines


def random_batch(config: Config, rows: int = 4, length: int = 64) -> Batch:
    """A random batch, drawn from the configuration's seed.

    Tokens: `inputs` and `labels` int32 `[rows, length]`. Images: `inputs` float32 `[rows, size, size, channels]`
    and `labels` int32 `[rows]`, of the data's size where it names one, else of a size that the model reads.
    """
    if isinstance(config.model, CNNConfig):
        size = getattr(config.data, "image_size", None) or max(8, 2 * cnn_plan.min_image_size(config.model))
        classes = rng.uniform(rng.key(config.seed, "parity labels"), (rows,)) * config.model.vocab_size
        pixels = (rows, size, size, config.model.image_channels)
        images = rng.normal(rng.key(config.seed, "parity batch"), pixels)
        return {"inputs": images, "labels": classes.astype(np.int32)}
    if config.model.input_kind == "anything" and isinstance(config.data, ImageDataConfig):
        return dataset_for(config).train_batch(0, rows)  # what the model reads only its data can say
    shape = (rows, min(length, _length(config)) + 1)
    words = rng.bits(rng.key(config.seed, "parity batch"), shape[0] * shape[1]).astype(np.uint64)
    tokens = ((words * np.uint64(config.model.vocab_size)) >> np.uint64(32)).astype(np.int32).reshape(shape)
    return {"inputs": np.ascontiguousarray(tokens[:, :-1]), "labels": np.ascontiguousarray(tokens[:, 1:])}


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
    """Judges a configuration, or given weights, on MLX.

    Compares the initial weights bit for bit, every layer's output, its own values on equal inputs, the
    gradient of every parameter (with dropout), one optimizer step given equal gradients and, with `steps`, the
    loss of so many training steps on the configuration's data.

    Args:
        config: what is judged.
        weights: canonical weights in place of the initial ones.
        batch: in place of random tokens.
        steps: of training.
        dtype, device_mlx, device_torch: see `build`.
        progress: told what is being done.

    Raises:
        BackendError: one of the backends is not installed, or a device is not there.
        DataError: the data cannot be read (only with `steps`), or the batch has ids outside the vocabulary.
    """
    tell = progress or (lambda stage, done, total: None)
    tell("building", 0, 1)
    engines = build(config, dtype, weights, device_mlx, device_torch)
    report = judge_engines(engines, batch or random_batch(config), progress=progress)
    if steps:
        report.losses = curves(engines, steps, progress)
        report.curve = judge_curve(*report.losses.values())
    return report


def run_target(
    target: str, overrides: Sequence[str] = (), *, steps: int = 0, dtype: str | None = None, quiet: bool = False
) -> Report:
    """`run` for what a person names: a configuration, a preset, a run, a checkpoint or a saved model."""
    config, weights = open_model.open_target(Path(target), overrides)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("building", total=1)
        return run(
            config,
            weights,
            steps=steps,
            dtype=dtype,
            progress=lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total),
        )


def judge_engines(engines: Engines, batch: Batch, step: int = 0, progress: Progress | None = None) -> Report:
    """Judges three engines that are already there; leaves their weights and optimizers as they were."""
    tell = progress or (lambda stage, done, total: None)
    dtype = engines.torch.config.training.mixed_precision
    probes = [backend.module(engine.backend, "tools.probe") for engine in engines]
    names = ("MLX", "PyTorch", "reference")
    report = Report(dtype, {n: p.describe(e) for n, p, e in zip(names, probes, engines, strict=True)})
    initial = [engine.weights() for engine in engines[:2]]
    report.num_weights = len(initial[1])
    report.unequal_weights = unequal(*initial)

    modes = [("evaluation", False)]
    if engines.torch.config.model.dropout or "batch_norm" in engines.torch.model.layer_kinds().values():
        modes.append(("training", True))  # without either the two modes are one
    for mode, train in modes:
        title = f"layers, {mode}"
        tell(title, 0, 1)
        traces = [p.record(e, batch, step, train=train) for p, e in zip(probes, engines, strict=True)]
        replays = tuple(partial(_replay, p.replay, e, step, train) for p, e in zip(probes, engines, strict=True))
        again = _moved(replays[1], engines.torch, dtype)
        moved = partial(_samples, partial(probes[1].record, step=step, train=train), engines.torch, batch, dtype)
        rows = compare(traces[0], traces[1], traces[2], dtype, samples=moved)
        rows = locate(rows, traces[1], traces[2], (*replays, again), dtype, partial(tell, title))  # type: ignore[arg-type]
        report.sections.append(Section(title, rows))

    tell("gradients", 0, 1)
    traces = [p.record(e, batch, step, train=True, gradients=True) for p, e in zip(probes, engines, strict=True)]
    record = partial(probes[1].record, step=step, train=True, gradients=True)
    moved = partial(_samples, record, engines.torch, batch, dtype)
    rows = compare(traces[0], traces[1], traces[2], dtype, kinds=("loss", "gradient"), samples=moved)
    report.sections.append(Section("loss and gradients, training", _inherit(rows, report)))
    tell("optimizer step", 0, 1)
    gradients = {path: v.array.astype(np.float32) for path, v in traces[2].of("gradient").items()}
    report.sections.append(Section("optimizer step on equal gradients", optimizer_rows(engines, [gradients])))
    tell("done", 1, 1)
    return report


def optimizer_rows(engines: Engines, gradients: list[dict[str, Array]], first_step: int = 0) -> list[Row]:
    """Parameters and moments after one optimizer step for each of the given gradients, the same on all three.

    Weights and optimizer state are put back afterwards.
    """
    traces = []
    for engine in engines:
        weights, state = engine.weights(), engine.optimizer_state()
        for index, given in enumerate(gradients):
            rate = engine.config.training.learning_rate
            engine.apply_gradients(given, first_step + index, rate)
        trace = Trace()
        for kind, arrays in (("parameter", engine.weights()), ("moment", engine.optimizer_state())):
            for path, array in arrays.items():
                trace.add(kind, path, Value(array, short_dtype(array.dtype)))
        engine.set_weights(weights)
        engine.set_optimizer_state(state)
        traces.append(trace)
    return compare(traces[0], traces[1], traces[2], "fp32")  # weights and moments are fp32 whatever the arithmetic


def curves(engines: Engines, steps: int, progress: Progress | None = None) -> dict[str, list[float]]:
    """The losses of `steps` training steps on the configuration's data: MLX, PyTorch, PyTorch in float64."""
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


def _length(config: Config) -> int:
    """Tokens in one sequence of the configuration's data."""
    longest: int = getattr(config.model, "max_seq_length", 64)
    return getattr(config.data, "seq_length", None) or longest


def unequal(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> list[str]:
    """The names whose arrays are not equal bit for bit, or that only one of the two has."""
    return [
        path
        for path in dict.fromkeys([*theirs, *ours])
        if path not in ours
        or path not in theirs
        or ours[path].dtype != theirs[path].dtype
        or ours[path].shape != theirs[path].shape
        or ours[path].tobytes() != theirs[path].tobytes()
    ]


@contextlib.contextmanager
def _weights_anew(engine: Engine, dtype: str, index: int) -> Iterator[None]:
    """While it is open, the engine's weights are rounded anew (floor 5 of the yardstick)."""
    weights = engine.weights()
    moved = {p: perturb_by_ulp(a, dtype, rng.key(index, "rounded anew", p)) for p, a in weights.items()}
    engine.set_weights({path: moved[path].astype(array.dtype) for path, array in weights.items()})
    try:
        yield
    finally:
        engine.set_weights(weights)


def _samples(record: Callable[..., Trace], engine: Engine, batch: Batch, dtype: str) -> list[Trace]:
    """Traces of PyTorch, its weights rounded anew."""
    found = []
    for index in range(SAMPLES):
        with _weights_anew(engine, dtype, index):
            found.append(record(engine, batch))
    return found


def _moved(replay: Callable[..., dict[str, Value]], engine: Engine, dtype: str) -> Callable[..., dict[str, Value]]:
    """A replay of PyTorch with its weights rounded anew, by another draw at each call."""
    index = count()

    def moved(*layer: Any) -> dict[str, Value]:
        with _weights_anew(engine, dtype, next(index)):
            return replay(*layer)

    return moved


def _replay(replay: Any, engine: Engine, step: int, train: bool, path: str, call: Any, seeds: Any) -> Any:
    return replay(engine, path, call, seeds, step=step, train=train)


def _inherit(rows: list[Row], report: Report) -> list[Row]:
    """Marks gradients over the yardstick: "differs here" where their layer was found to, else "inherits"."""
    origins = set(report.differing())
    marks = {True: DIFFERS, False: INHERITS}
    return [row if row.passed else replace(row, mark=marks[row.path.rpartition(".")[0] in origins]) for row in rows]
