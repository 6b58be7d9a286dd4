"""Training options on both backends: accumulation, clipping, averages, early stopping, skipped steps."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import both_backends, is_one_line, losses, metrics, resume, same_bits, state, tiny, train

import icenet
from icenet.core import backends
from icenet.core.config import Config, TrainingConfig
from icenet.core.data.datasets import dataset_for
from icenet.core.engine import Evaluation, StepResult, micro_batches, step_result
from icenet.core.engine.ema import ema_weight
from icenet.core.errors import CheckpointError, IceNetError, UsageError
from icenet.core.report.metrics import MetricsLog
from icenet.core.runs import checkpoint
from icenet.core.runs.early_stopping import EarlyStopping
from icenet.core.training.background import Background
from icenet.core.training.skipped_steps import SkippedSteps
from icenet.core.training.trainer import Trainer
from icenet.parity.yardstick import judge

pytest.importorskip("torch")
pytest.importorskip("mlx")

pytestmark = pytest.mark.usefixtures("no_plots")


def batch_of(config: Config, step: int = 0, hide: bool = False) -> Any:
    """Returns a batch; with `hide`, its rows have different numbers of labels."""
    batch = dataset_for(config).train_batch(step, config.training.batch_size)
    if hide:
        for row, labels in enumerate(batch["labels"]):
            labels[: 5 * row] = -100
    return batch


# ---- accumulation ---------------------------------------------------------------------------------------


LSTM = "model={type: lstm, hidden_size: 24, num_layers: 3, vocab_size: 257, dropout: 0.2}"


@both_backends
@pytest.mark.parametrize("family", ["transformer", "lstm"])
@pytest.mark.parametrize("number", [2, 3, 6])
def test_micro_batches_give_the_gradients_of_the_whole(
    tmp_path: Path, backend: str, number: int, family: str
) -> None:
    """With dropout, and rows with different numbers of labels."""
    given = [LSTM, "data.seq_length=16"] if family == "lstm" else ["model.dropout=0.2"]
    config = tiny(tmp_path, "training.batch_size=6", *given)
    batch = batch_of(config, hide=True)
    cut = config.with_overrides(f"training.gradient_accumulation={number}")
    loss, found = backends.engine(cut, backend).gradients(batch, 5)
    noise_loss, noise = backends.engine(config, "torch").gradients(batch, 5)
    true_loss, truth = backends.engine(config, "torch", dtype="float64").gradients(batch, 5)
    assert judge(np.asarray(loss), np.asarray(noise_loss), np.asarray(true_loss)).passed
    for path, reference in truth.items():
        if np.abs(reference).max() < 1e-9:  # zero in exact arithmetic: a key's bias
            continue
        verdict = judge(found[path], noise[path], reference)
        assert verdict.passed, (path, verdict)


@both_backends
def test_the_mean_is_over_labels_and_not_over_micro_batches(tmp_path: Path, backend: str) -> None:
    config = tiny(tmp_path, "training.batch_size=6", "model.dropout=0", "training.gradient_accumulation=3")
    batch = batch_of(config, hide=True)
    engine = backends.engine(config, backend)
    logits = engine.forward(batch).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = batch["labels"] >= 0
    chosen = np.take_along_axis(logits, np.where(counted, batch["labels"], 0)[..., None].astype(np.int64), -1)[..., 0]
    expected = -chosen[counted].sum() / counted.sum()
    means = np.mean([-chosen[r][counted[r]].mean() for r in (slice(0, 2), slice(2, 4), slice(4, 6))])
    found = engine.read(engine.train_step(batch, 0, 1e-3)).loss
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(means - expected) > 1e-4  # a mean of means would be wrong


@both_backends
def test_accumulation_resumes_and_changes_no_curve(tmp_path: Path, backend: str) -> None:
    plain = tiny(tmp_path, "training.max_steps=12")
    cut = plain.with_overrides("training.gradient_accumulation=4")
    for name, config in (("plain", plain), ("cut", cut)):
        train(config, tmp_path / name, backend)
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(tmp_path / "plain"), rtol=2e-5)
    train(cut, tmp_path / "broken", backend, 7)
    resume(tmp_path / "broken")
    assert same_bits(state(tmp_path / "broken"), state(tmp_path / "cut"))


def test_cutting_a_batch() -> None:
    labels = np.array([[1, -100], [-100, -100], [2, 3], [4, 5]], np.int32)
    batch = {"inputs": np.arange(8, dtype=np.int32).reshape(4, 2), "labels": labels}
    parts = micro_batches(batch, 2)
    assert [rows for _, rows, _ in parts] == [range(0, 2), range(2, 4)]
    assert [share for *_, share in parts] == [1 / 5, 4 / 5]
    assert np.array_equal(np.concatenate([part["inputs"] for part, *_ in parts]), batch["inputs"])
    nothing = {"inputs": batch["inputs"], "labels": np.full((4, 2), -100, np.int32)}
    assert [share for *_, share in micro_batches(nothing, 2)] == [0, 0]  # no division by zero


# ---- clipping -------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("norm", [None, 0.01])
def test_clipping_by_value(tmp_path: Path, backend: str, norm: float | None) -> None:
    """Compared with numpy on the engine's raw gradients. Values are clipped before the norm."""
    limit = 1e-3
    config = tiny(tmp_path, "model.dropout=0", f"training.max_grad_norm={norm or 'null'}")
    cut = config.with_overrides(f"training.max_grad_value={limit}")
    batch = batch_of(config)
    clipped, by_hand = (backends.engine(c, backend) for c in (cut, config))
    _, raw = by_hand.gradients(batch)
    size = math.sqrt(sum(float(np.square(g.astype(np.float64)).sum()) for g in raw.values()))
    gradients = {path: np.clip(g, -limit, limit) for path, g in raw.items()}
    assert any((np.abs(g) > limit).any() for g in raw.values())
    if norm is not None:
        total = math.sqrt(sum(float(np.square(g.astype(np.float64)).sum()) for g in gradients.values()))
        assert total > norm
        gradients = {path: (g * (norm / total)).astype(np.float32) for path, g in gradients.items()}
    by_hand.apply_gradients(gradients, 0, 1e-3)
    found = clipped.read(clipped.train_step(batch, 0, 1e-3))
    assert found.grad_norm == pytest.approx(size, rel=1e-5)  # the norm before clipping
    for name, array in by_hand.optimizer_state().items():
        np.testing.assert_allclose(clipped.optimizer_state()[name], array, rtol=2e-5, atol=1e-12, err_msg=name)


# ---- averaged weights -----------------------------------------------------------------------------------


def test_the_weight_of_an_average() -> None:
    assert [1 - ema_weight(step, 0.9) for step in (0, 1, 8)] == pytest.approx([1 / 10, 2 / 11, 9 / 18])
    assert ema_weight(10_000, 0.9) == pytest.approx(0.1)


@both_backends
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_averaged_weights(tmp_path: Path, backend: str, compiled: bool) -> None:
    """Compared with the average in float64. Evaluations use the average, and training does not change."""
    if compiled and backend == "torch":
        pytest.skip("the average is outside of what PyTorch compiles")
    config = tiny(tmp_path, "training.ema_decay=0.8", f"model.compile_model={str(compiled).lower()}")
    engine, plain = backends.engine(config, backend), backends.engine(tiny(tmp_path), backend)
    average = {path: array.astype(np.float64) for path, array in engine.weights().items()}
    for step in range(8):
        batch = batch_of(config, step)
        engine.read(engine.train_step(batch, step, 1e-2))
        plain.read(plain.train_step(batch, step, 1e-2))
        weight = 1 - min(0.8, (1 + step) / (10 + step))
        for path, array in engine.weights().items():
            average[path] += weight * (array - average[path])
    stored = engine.optimizer_state()
    for path, array in average.items():
        np.testing.assert_allclose(stored[f"{path}.ema"], array, rtol=1e-5, atol=1e-6, err_msg=path)
    if not compiled:
        assert same_bits(engine.weights(), plain.weights())
    plain.set_weights({path: stored[f"{path}.ema"] for path in average})
    assert engine.evaluate(batch) == plain.evaluate(batch)
    weights = engine.weights()
    engine.evaluate(batch)
    assert same_bits(engine.weights(), weights)


@pytest.mark.parametrize("order", [("mlx", "torch"), ("torch", "mlx")])
def test_averages_go_on_on_the_other_backend(tmp_path: Path, order: tuple[str, str]) -> None:
    config = tiny(tmp_path, "training.ema_decay=0.9", "training.max_steps=10")
    train(config, tmp_path / "moved", order[0], 5)
    resume(tmp_path / "moved", order[1])
    train(config, tmp_path / "whole", order[0])
    moved, whole = state(tmp_path / "moved"), state(tmp_path / "whole")
    assert moved.keys() == whole.keys() and any(name.endswith(".ema") for name in moved)
    for name in whole:
        if name.endswith(".ema") and "k_proj.bias" not in name:  # its gradient is rounding error
            np.testing.assert_allclose(moved[name], whole[name], rtol=1e-3, atol=1e-5, err_msg=name)


@both_backends
def test_an_average_can_begin_in_the_middle_of_a_run(tmp_path: Path, backend: str) -> None:
    train(tiny(tmp_path), tmp_path / "run", backend, 5)
    resumed = Trainer.resume(tmp_path / "run", overrides=["training.ema_decay=0.9"], quiet=True)
    weights, stored = resumed.engine.weights(), resumed.engine.optimizer_state()
    assert all(np.array_equal(stored[f"{path}.ema"], weights[path]) for path in weights)
    resumed.fit(6)


@both_backends
def test_a_model_of_averaged_weights(tmp_path: Path, backend: str) -> None:
    config = tiny(tmp_path, "training.ema_decay=0.9")
    result = train(config, tmp_path / "run", backend)
    stored = checkpoint.load(result.checkpoint)
    model = icenet.load(tmp_path / "run", backend, averaged=True)
    assert all(np.array_equal(array, stored.optimizer[f"{path}.ema"]) for path, array in model.weights().items())
    train(tiny(tmp_path), tmp_path / "none", backend, 1)
    with pytest.raises(CheckpointError, match=r"has no averaged weights; train with training\.ema_decay"):
        icenet.load(tmp_path / "none", backend, averaged=True)


# ---- early stopping and the best checkpoint -------------------------------------------------------------


def evaluated(started: Trainer, found: list[float]) -> Trainer:
    """Replaces the results of the evaluations of a trainer by given losses."""
    numbers = iter(found)
    started.engine.evaluate = lambda batch: Evaluation(next(numbers), 1, None)  # type: ignore[method-assign]
    return started


def test_the_best_evaluation() -> None:
    best = EarlyStopping()
    assert [best.update(step, loss) for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0), (4, 2.5), (4, 2.5))] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert (best.step, best.validation_loss, best.num_bad_evals) == (2, 2.0, 3)
    assert best.should_stop(3) and not best.should_stop(4) and not best.should_stop(None)
    assert not best.update(2, 1.0)  # evaluated again at a resumed step
    first = EarlyStopping()
    assert (
        not first.update(1, math.nan)
        and first.update(2, 1.0)
        and not first.update(3, math.nan)
        and first.num_bad_evals == 1
    )
    for loss in ("y", math.nan, None):
        assert EarlyStopping.read({"step": 1, "validation_loss": loss}) == EarlyStopping()
    for stored in (None, 3, {}, {"step": "x"}):
        assert EarlyStopping.read(stored) == EarlyStopping()
    assert "1 evaluation without" in EarlyStopping(num_bad_evals=1).reason


@both_backends
def test_early_stopping_and_the_best_checkpoint(tmp_path: Path, backend: str) -> None:
    config = tiny(
        tmp_path, "training.eval_every=2", "training.eval_batches=1", "training.early_stopping=3",
        "training.keep_best=true", "training.keep_checkpoints=1", "training.checkpoint_every=5",
    )  # fmt: skip
    run = tmp_path / "run"
    result = evaluated(Trainer.start(config, run, backend=backend, quiet=True), [5.0, 4.0, 3.5, 4.5, 3.6, 9.0]).fit()
    assert result.stopped_early and result.step == 12
    assert (result.early_stopping.step, result.early_stopping.validation_loss) == (6, 3.5)
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step-00000006", "step-00000012"]
    assert (run / "best").resolve() == (run / "checkpoints" / "step-00000006").resolve()
    best = checkpoint.load(run / "checkpoints" / "step-00000006")
    assert same_bits(checkpoint.find(run / "best").weights, best.weights)
    content = json.loads((result.checkpoint / "state.json").read_text())
    assert content["best"] == {"step": 6, "validation_loss": 3.5, "num_bad_evals": 3}
    with pytest.raises(
        UsageError, match=r"stopped early at step 12; to continue: --set training\.early_stopping=null"
    ):
        Trainer.resume(run, quiet=True)
    resumed = Trainer.resume(run, overrides=["training.early_stopping=20"], quiet=True)
    assert resumed.early_stopping == result.early_stopping
    assert not evaluated(resumed, [3.0] + [2.0] * 9).fit().stopped_early
    assert (run / "best").resolve().name == "step-00000016"


@both_backends
def test_stopping_early_survives_a_stop(tmp_path: Path, backend: str) -> None:
    config = tiny(tmp_path, "training.eval_every=2", "training.eval_batches=1", "training.early_stopping=2")
    run = tmp_path / "run"
    evaluated(Trainer.start(config, run, backend=backend, quiet=True), [2.0, 3.0]).fit(4)
    result = evaluated(Trainer.resume(run, quiet=True), [3.0, 1.0]).fit()
    assert result.stopped_early and result.step == 6


# ---- steps that are not finite --------------------------------------------------------------------------


def overflowing(started: Trainer, steps: set[int]) -> Trainer:
    """Makes the gradients of a trainer overflow at given steps."""
    step_of = started.engine.train_step

    def train_step(batch: Any, step: int, rate: float, scale: float = 1.0) -> Any:
        return step_of(batch, step, rate, math.inf if step in steps else scale)

    started.engine.train_step = train_step  # type: ignore[method-assign]
    return started


@both_backends
def test_a_step_that_is_no_number_can_be_left_out(tmp_path: Path, backend: str) -> None:
    config = tiny(tmp_path, "training.on_nan=skip", "training.checkpoint_every=1", "training.max_steps=12")
    run = tmp_path / "run"
    overflowing(Trainer.start(config, run, backend=backend, quiet=True), {7}).fit()
    skipped = [record["step"] for record in metrics(run) if record.get("skipped")]
    assert skipped == [8]
    before, after, later = (checkpoint.load(run / "checkpoints" / f"step-{n:08d}") for n in (7, 8, 9))
    assert same_bits(before.weights, after.weights) and same_bits(before.optimizer, after.optimizer)
    assert not same_bits(later.weights, after.weights)
    with pytest.raises(IceNetError, match=r"^step 8: the loss is .* and the gradient norm nan \(largest: [\w.]+ nan"):
        stops = config.with_overrides("training.on_nan=stop")
        overflowing(Trainer.start(stops, tmp_path / "b", backend=backend, quiet=True), {7}).fit()


@both_backends
def test_ten_such_steps_end_a_run(tmp_path: Path, backend: str) -> None:
    config = tiny(tmp_path, "training.on_nan=skip")
    expected = r"^step 13: .* 10 times in a row .*the last good checkpoint is .*00010"
    with pytest.raises(IceNetError, match=expected) as error:
        overflowing(Trainer.start(config, tmp_path / "run", backend=backend, quiet=True), set(range(3, 20))).fit()
    assert "training.on_nan" not in str(error.value)  # it is set already


def test_only_steps_in_a_row_end_a_run() -> None:
    steps = SkippedSteps(TrainingConfig(on_nan="skip"))
    good, bad = StepResult(1.0, 1.0, True), StepResult(math.nan, math.nan, False)
    assert all(steps.count(result, 1.0) for result in 2 * [*9 * [bad], good])
    assert [steps.count(bad, 1.0) for _ in range(10)] == [*9 * [True], False]


@both_backends
def test_the_largest_gradients_are_named(tmp_path: Path, backend: str) -> None:
    engine = backends.engine(tiny(tmp_path, "model.dropout=0"), backend)
    batch = batch_of(engine.config)
    norms = {path: float(np.linalg.norm(g.astype(np.float64))) for path, g in engine.gradients(batch)[1].items()}
    huge = engine.read(engine.train_step(batch, 0, 1e-3, 1e38))  # some overflow, some do not
    assert not huge.finite and len(huge.largest) == 3 and {path for path, _ in huge.largest} <= norms.keys()
    assert not math.isfinite(huge.largest[0][1])
    fresh = backends.engine(engine.config, backend)
    assert fresh.read(fresh.train_step(batch, 0, 1e-3)).largest == ()
    found = step_result(math.nan, math.inf, None, lambda: {"a": 1.0, "b": math.inf, "c": math.nan, "d": 2.0})
    assert [path for path, _ in found.largest] == ["c", "b", "d"]


# ---- native random numbers ------------------------------------------------------------------------------


@both_backends
def test_native_random_numbers(tmp_path: Path, backend: str) -> None:
    """They are a function of seed and step, so a run resumes exactly. The masks differ from the keyed ones."""
    config = tiny(tmp_path, "training.rng=native", "training.max_steps=10", "training.gradient_accumulation=2")
    for name, given in (("a", config), ("b", config), ("c", config.with_overrides("training.rng=keyed"))):
        train(given, tmp_path / name, backend, 10)
    assert same_bits(state(tmp_path / "a"), state(tmp_path / "b"))
    assert not same_bits(state(tmp_path / "a"), state(tmp_path / "c"))
    train(config, tmp_path / "d", backend, 4)
    resume(tmp_path / "d")
    assert same_bits(state(tmp_path / "a"), state(tmp_path / "d"))
    loss = losses(tmp_path / "a")
    assert len(set(np.round(loss, 6))) == 10 and loss[0] != losses(tmp_path / "c")[0]


# ---- checkpoints in the background ----------------------------------------------------------------------


@both_backends
def test_steps_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 5 is delayed until step 8 is in the metrics. It has exactly the state of step 5."""
    config, run = tiny(tmp_path, "training.max_steps=10"), tmp_path / "run"
    save, threads = checkpoint.save, []

    def slow(folder: Path, config: Config, step: int, *rest: Any, **options: Any) -> Path:
        threads.append(threading.current_thread())
        deadline = time.monotonic() + 60
        while step == 5 and len(losses(run)) < 8:
            assert time.monotonic() < deadline, "the loop waits for the checkpoint"
            time.sleep(0.01)
        return save(folder, config, step, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", slow)
        train(config, run, backend)
    assert threading.main_thread() not in threads and len(threads) == 2
    train(config, tmp_path / "other", backend, 5)
    assert same_bits(state(run, 5), state(tmp_path / "other", 5))


@both_backends
def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = tiny(tmp_path), tmp_path / "run"

    def full(folder: Path, config: Config, step: int, *rest: Any, **options: Any) -> Path:
        if step == 10:
            raise CheckpointError("no space left")
        return save(folder, config, step, *rest, **options)

    save = checkpoint.save
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"^no space left$"):
        patch.setattr(checkpoint, "save", full)
        train(config, run, backend)
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step-00000005"]
    resume(run)
    train(config, tmp_path / "whole", backend)
    assert same_bits(state(run), state(tmp_path / "whole")) and metrics(run) == metrics(tmp_path / "whole")


def test_background_work() -> None:
    done: list[int] = []

    def fails() -> None:
        raise CheckpointError("late")

    with Background() as background:
        for number in range(3):
            background.start(lambda number=number: done.append(number))
        background.wait()
        assert done == [0, 1, 2] and not background.busy
        background.start(fails)
        with pytest.raises(CheckpointError, match="late"):
            while background.busy:
                background.check()
        background.check()  # an error is raised once
    with pytest.raises(ValueError, match="first"), Background() as background:
        background.start(fails)
        raise ValueError("first")
    with pytest.raises(CheckpointError, match="late"), Background() as background:
        background.start(fails)


def seconds_per_step(folder: Path, backend: str) -> list[float]:
    """Returns the logged times of 8 steps of at least 0.1 s, some before an evaluation or a checkpoint."""
    config = tiny(folder, "training.max_steps=8", "training.eval_every=4", "training.checkpoint_every=3")
    started = Trainer.start(config, folder / "run", backend=backend, quiet=True)
    step_of = started.engine.train_step

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return step_of(*arguments)

    started.engine.train_step = slow  # type: ignore[method-assign]
    started.fit()
    records = [record for record in MetricsLog.read(folder / "run" / "metrics.jsonl") if "loss" in record]
    return [4 * 32 / record["tokens_per_second"] for record in records]


@both_backends
def test_the_speed_that_is_logged(tmp_path: Path, backend: str) -> None:
    seconds = seconds_per_step(tmp_path, backend)
    assert len(seconds) == 8 and all(s >= 0.1 for s in seconds)


@pytest.mark.slow
@both_backends
def test_the_speed_that_is_logged_is_not_too_low(tmp_path: Path, backend: str) -> None:
    assert np.median(seconds_per_step(tmp_path, backend)) < 0.16


# ---- a trainer that continues after an error ------------------------------------------------------------


@both_backends
def test_fit_again_after_an_error(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: no step is repeated, a failed checkpoint is written later, a stop signal stops once."""
    config, run = tiny(tmp_path, "training.max_steps=12"), tmp_path / "run"
    started = Trainer.start(config, run, backend=backend, quiet=True)
    taken: list[int] = []
    step_of, record = started.engine.train_step, started._read_step

    def train_step(batch: Any, step: int, *rest: Any) -> Any:
        taken.append(step)
        return step_of(batch, step, *rest)

    def failing(pending: Any, *rest: Any) -> None:
        if pending.step == 1 and len(taken) == 3:
            raise IceNetError("no room for the metrics")
        record(pending, *rest)

    started.engine.train_step = train_step  # type: ignore[method-assign]
    started._read_step = failing  # type: ignore[method-assign]
    with pytest.raises(IceNetError, match="no room"):
        started.fit()
    save = checkpoint.save

    def full(*arguments: Any) -> Path:
        raise CheckpointError("no space left")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        patch.setattr(checkpoint, "save", full)
        started.fit(4)
    result = started.fit(4)
    assert result.checkpoint.is_dir() and taken == [0, 1, 2, 3]
    monkeypatch.setattr(checkpoint, "save", save)
    started._stop_signal = "SIGTERM"  # from an earlier stop
    assert started.fit().step == 12 and taken == list(range(12))
    assert started.save().is_dir()


def test_a_run_that_went_on_elsewhere_is_seen_each_time(tmp_path: Path) -> None:
    config, run = tiny(tmp_path), tmp_path / "run"
    first = Trainer.start(config, run, backend="torch", quiet=True)
    first.fit(5)
    resume(run)
    before = losses(run)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="another process continued this run"):
            first.fit()
    assert losses(run) == before and len(checkpoint.list_checkpoints(run)) == 4


def test_a_run_killed_at_birth_takes_no_other_runs_folder(tmp_path: Path) -> None:
    config, good, dead = tiny(tmp_path), tmp_path / "good", tmp_path / "dead"
    Trainer.start(config, good, backend="torch", quiet=True).fit(5)
    dead.mkdir()
    (dead / "config.yaml").write_text(config.to_yaml())
    (dead / ".lock").touch()
    with pytest.raises(UsageError, match="good: contains a run already"):
        Trainer.resume(dead, run=good, quiet=True)


def test_a_run_takes_no_checkpoints_or_saved_models_folder(tmp_path: Path) -> None:
    config, run = tiny(tmp_path, "training.keep_best=true"), tmp_path / "run"
    train(config, run, "torch")
    icenet.save(icenet.load(run, "torch"), tmp_path / "saved")
    five = checkpoint.path_of(run, 5)
    reasons = {run / "best": "checkpoint", five: "checkpoint", five / "new": "in the checkpoint"}
    for folder, reason in {**reasons, tmp_path / "saved": "model"}.items():
        with pytest.raises(UsageError) as error:
            Trainer.start(config, folder, backend="torch", quiet=True)
        assert is_one_line(error.value, str(folder), reason, "--run")
    with pytest.raises(UsageError, match="is a checkpoint"):
        Trainer.resume(run, run=run / "best", overrides=["training.max_steps=30"], quiet=True)


def test_the_link_to_the_best_follows_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny(tmp_path, "training.keep_best=true", "training.keep_checkpoints=1", "training.eval_batches=1",
                  "training.eval_every=5")  # fmt: skip
    run = tmp_path / "run"
    evaluated(Trainer.start(config, run, backend="torch", quiet=True), [2.0, 3.0]).fit(10)
    (run / "best").unlink()
    shutil.copytree(run / "checkpoints" / "step-00000005", run / "best")  # a copy that follows links
    resumed = Trainer.resume(run, quiet=True)
    assert resumed.early_stopping.step == 5
    evaluated(resumed, [4.0]).fit(15)
    assert (run / "best").resolve().name == "step-00000005"
    assert (run / "best-replaced" / "state.json").is_file()
    assert any("is kept as best-replaced" in message for message in caplog.messages)
    branch = Trainer.resume(run / "checkpoints" / "step-00000015", run=tmp_path / "branch", quiet=True)
    assert branch.early_stopping == EarlyStopping()  # the best is not in the branch's folder
    evaluated(Trainer.resume(run, overrides=["training.keep_best=false"], quiet=True), [5.0]).fit()
    assert not (run / "best").is_symlink()  # its checkpoint was removed with the old ones


def test_a_file_system_without_links_has_no_link_to_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", refuse)
    config = tiny(tmp_path, "training.keep_best=true", "training.keep_checkpoints=1", "training.eval_batches=1",
                  "training.eval_every=5")  # fmt: skip
    evaluated(Trainer.start(config, tmp_path / "run", backend="torch", quiet=True), [2.0, 3.0]).fit(10)
    assert not os.path.lexists(tmp_path / "run" / "best")
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()
    (note,) = (message for message in caplog.messages if "no symbolic links" in message)
    assert is_one_line(note, "run/best", "operation not permitted", "icenet runs")


def test_the_last_step_ends_a_run_as_planned(tmp_path: Path) -> None:
    """It is evaluated. A worse evaluation, a signal or a skipped step then changes nothing."""
    sizes = ("max_steps=5", "eval_every=2", "eval_batches=1", "early_stopping=1", "on_nan=skip")
    config = tiny(tmp_path, *(f"training.{size}" for size in sizes))
    started = evaluated(Trainer.start(config, tmp_path / "run", backend="torch", quiet=True), [2.0, 1.0, 3.0])
    read = started.engine.read

    def read_step(handle: Any) -> StepResult:
        result = read(handle)
        if started.step < 5:
            return result
        started._request_stop("SIGTERM")
        return result._replace(loss=math.nan, finite=False)

    started.engine.read = read_step  # type: ignore[method-assign]
    result = started.fit()
    assert (result.step, result.validation_loss, result.stopped_early) == (5, 3.0, False)
    assert math.isfinite(result.loss)


def test_early_stopping_where_no_evaluation_is_a_number(tmp_path: Path) -> None:
    config = tiny(tmp_path, "training.eval_every=2", "training.eval_batches=1", "training.early_stopping=2")
    result = evaluated(Trainer.start(config, tmp_path / "run", backend="torch", quiet=True), [math.nan] * 9).fit()
    assert result.stopped_early and result.step == 4 and result.early_stopping.step is None
    for key in ("keep_best=true", "keep_best=false"):  # the count continues in a resumed run
        found = Trainer.resume(
            tmp_path / "run", overrides=["training.early_stopping=3", f"training.{key}"], quiet=True
        )
        assert found.early_stopping.num_bad_evals == 2
    result = evaluated(found, [math.nan] * 9).fit()
    assert result.stopped_early and result.step == 6
