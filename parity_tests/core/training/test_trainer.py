"""The training loop on both backends: its results, its files, and that a run can stop and resume at any moment."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    BACKENDS,
    both_backends,
    icenet,
    is_one_line,
    losses,
    metrics,
    python,
    resume,
    same_bits,
    start_icenet,
    state,
    tiny,
    train,
    tree,
)

from icenet.core import backends, rng
from icenet.core.config import Config
from icenet.core.data.datasets import open_dataset
from icenet.core.errors import CheckpointError, ConfigError, DataError, IceNetError, UsageError, WeightsError
from icenet.core.runs import checkpoint
from icenet.core.training.loss_scale import GROWTH_INTERVAL, LossScale
from icenet.core.training.schedule import adam_corrections, learning_rate
from icenet.core.training.signals import Interrupted
from icenet.core.training.trainer import Trainer
from icenet.parity.configuration.engines import build
from icenet.parity.configuration.run import curves
from icenet.parity.curves import judge_curve
from icenet.parity.yardstick import judge

torch: Any = pytest.importorskip("torch")
pytest.importorskip("mlx")


@pytest.fixture
def drawn() -> None:
    """Used by a test whose runs draw their plots."""


@pytest.fixture(autouse=True)
def plots_only_where_tested(request: pytest.FixtureRequest) -> None:
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("no_plots")


# ---- results and files ----------------------------------------------------------------------------------


@both_backends
def test_a_run(tmp_path: Path, backend: str, drawn: None) -> None:
    config, run = tiny(tmp_path), tmp_path / "run"
    result = train(config, run, backend)
    assert result.step == 20 and result.run == run
    assert result.checkpoint == run / "checkpoints" / "step-00000020"
    assert [path.name for path in checkpoint.list_checkpoints(run)] == [f"step-{n:08d}" for n in (5, 10, 15, 20)]
    steps = [record for record in metrics(run) if "loss" in record]
    assert losses(run)[-1] == result.loss < 0.8 * losses(run)[0]  # it learns
    assert all(record["backend"] == backend and record["grad_norm"] > 0 for record in steps)
    assert [record["learning_rate"] for record in steps] == [learning_rate(n, config.training) for n in range(20)]
    evaluations = [record for record in metrics(run) if "validation_loss" in record]
    assert [record["step"] for record in evaluations] == [10, 20]
    assert evaluations[-1]["validation_loss"] == result.validation_loss
    assert result.plot is not None and result.plot.read_bytes().startswith(b"\x89PNG")
    written = Config.from_yaml(run / "config.yaml")
    assert written.backend == backend  # so that --resume alone continues on it
    assert written.with_overrides("backend=auto") == config
    content = json.loads((result.checkpoint / "state.json").read_text())
    assert content["step"] == 20 and content["backend"] == backend and content["versions"]["numpy"] == np.__version__


@both_backends
def test_the_evaluation_is_the_mean_over_tokens(tmp_path: Path, backend: str) -> None:
    """Recomputed from the weights in the checkpoint, batch by batch, through log-softmax in float64."""
    config = tiny(tmp_path, "training.eval_batches=1000", "training.max_steps=4", "training.eval_every=4")
    result = train(config, tmp_path / "run", backend)
    engine = backends.engine(config, backend)
    engine.set_weights(dict(checkpoint.find(tmp_path / "run").weights))
    data = open_dataset(config.data, 32, config.seed)
    total, count, rows = 0.0, 0, set()
    for batch in data.validation_batches(4):
        logits = engine.forward(batch).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= np.take_along_axis(log_p, batch["labels"][..., None].astype(np.int64), -1).sum()
        count += batch["labels"].size
        rows.add(len(batch["labels"]))
    assert rows == {4, 1} or len(rows) > 1, "the last batch must be smaller, or means of means would do"
    assert result.validation_loss == pytest.approx(total / count, rel=1e-6)


@both_backends
def test_no_evaluation_where_none_is_asked_for(tmp_path: Path, backend: str) -> None:
    result = train(tiny(tmp_path, "training.eval_every=null", "training.max_steps=6"), tmp_path / "run", backend)
    assert result.validation_loss is None
    assert not [record for record in metrics(tmp_path / "run") if "validation_loss" in record]


@both_backends
def test_old_checkpoints_go(tmp_path: Path, backend: str) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-best").mkdir(parents=True)  # of the user: neither counted nor removed
    train(tiny(tmp_path, "training.keep_checkpoints=2", "training.checkpoint_every=3"), run, backend)
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step-00000018", "step-00000020"]
    assert (run / "checkpoints" / "step-best").is_dir()


def test_the_schedule_by_hand(tmp_path: Path) -> None:
    training = tiny(tmp_path, "training.max_steps=11", "training.warmup_steps=4").training
    rates = [learning_rate(step, training) for step in range(11)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01], rel=1e-15)  # a line that ends at the peak
    # then half a cosine over the six intervals between the steps 4 and 10
    by_hand = [1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(7)]
    assert rates[4:] == pytest.approx(by_hand, rel=1e-12)
    assert rates[4] == 1e-2 and rates[7] == pytest.approx(0.00505) and rates[10] == pytest.approx(1e-4)
    training.schedule = "constant"
    assert [learning_rate(step, training) for step in (3, 4, 10)] == [0.01] * 3
    training.warmup_steps = 0
    assert learning_rate(0, training) == 0.01
    training.schedule, training.max_steps = "cosine", 1
    assert learning_rate(0, training) == 0.01  # no division by an empty span
    assert adam_corrections(0, 0.9, 0.95) == pytest.approx((0.1, 0.05))


@both_backends
def test_adamw_20_steps(tmp_path: Path, backend: str) -> None:
    """Equal gradients, compared with AdamW written out in float64; the noise is the fp32 error of torch.optim."""
    config = tiny(tmp_path)
    training = config.training
    training.weight_decay = 0.3
    engine = backends.engine(config, backend)
    start = engine.weights()
    theirs = {name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in start.items()}
    matrices = [p for p in theirs.values() if p.ndim >= 2]
    vectors = [p for p in theirs.values() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}],
        betas=(training.beta1, training.beta2), eps=training.eps,
    )  # fmt: skip
    exact = {name: array.astype(np.float64) for name, array in start.items()}
    first = {name: np.zeros(array.shape) for name, array in start.items()}
    second = {name: np.zeros(array.shape) for name, array in start.items()}
    for step in range(20):
        rate = learning_rate(step, training)
        gradients = {}
        for index, (name, array) in enumerate(start.items()):
            scale = 10.0 ** -(index % 7)
            drawn = rng.normal(rng.key(1, "gradient", step, index), array.shape) * np.float32(scale)
            gradients[name] = g = np.asarray(drawn, np.float32)
            first[name] = 0.9 * first[name] + 0.1 * g.astype(np.float64)
            second[name] = 0.95 * second[name] + 0.05 * np.square(g.astype(np.float64))
            decay = 0.3 if array.ndim >= 2 else 0.0
            root = np.sqrt(second[name] / (1 - 0.95 ** (step + 1))) + 1e-8
            exact[name] = exact[name] * (1 - rate * decay) - rate * first[name] / (1 - 0.9 ** (step + 1)) / root
            theirs[name].grad = torch.from_numpy(g.copy())
        engine.apply_gradients(gradients, step, rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    ours, moments = engine.weights(), engine.optimizer_state()
    assert moments.keys() == {f"{name}.{slot}" for name in start for slot in ("exp_avg", "exp_avg_sq")}
    for name, parameter in theirs.items():
        verdict = judge(ours[name], parameter.detach().numpy(), exact[name])
        assert verdict.passed, (name, verdict)
        for slot, reference in (("exp_avg", first), ("exp_avg_sq", second)):
            verdict = judge(moments[f"{name}.{slot}"], optimizer.state[parameter][slot].numpy(), reference[name])
            assert verdict.passed, (name, slot, verdict)


@both_backends
def test_clipping(tmp_path: Path, backend: str) -> None:
    """The update uses the gradients scaled to the norm; the reported norm is the one before clipping."""
    loose = tiny(tmp_path, "training.max_grad_norm=null", "model.dropout=0")
    limit = 0.05
    tight = loose.with_overrides(f"training.max_grad_norm={limit}")
    batch = open_dataset(loose.data, 32, 3).train_batch(0, 4)
    clipped, by_hand, free = (backends.engine(config, backend) for config in (tight, loose, loose))
    _, gradients = by_hand.gradients(batch)
    norm = math.sqrt(sum(float(np.square(g.astype(np.float64)).sum()) for g in gradients.values()))
    assert norm > 10 * limit
    scaled = {name: (g * (limit / norm)).astype(np.float32) for name, g in gradients.items()}
    by_hand.apply_gradients(scaled, 0, 1e-3)
    found = clipped.read(clipped.train_step(batch, 0, 1e-3))
    free.read(free.train_step(batch, 0, 1e-3))
    assert found.grad_norm == pytest.approx(norm, rel=1e-5)
    ours, theirs, unclipped = clipped.optimizer_state(), by_hand.optimizer_state(), free.optimizer_state()
    total = 0.0
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=2e-5, atol=1e-12, err_msg=name)
        if name.endswith(".exp_avg"):
            total += float(np.square(array.astype(np.float64) / 0.1).sum())
            np.testing.assert_allclose(unclipped[name], array * (norm / limit), rtol=1e-4, atol=1e-9)
    assert math.sqrt(total) == pytest.approx(limit, rel=1e-4)


@both_backends
def test_a_norm_below_the_limit_is_not_clipped(tmp_path: Path, backend: str) -> None:
    free = tiny(tmp_path, "training.max_grad_norm=null")
    batch = open_dataset(free.data, 32, 3).train_batch(0, 4)
    engines = [
        backends.engine(config, backend) for config in (free, free.with_overrides("training.max_grad_norm=1e6"))
    ]
    for engine in engines:
        engine.read(engine.train_step(batch, 0, 1e-3))
    assert same_bits(engines[0].optimizer_state(), engines[1].optimizer_state())


# ---- stop and resume ------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_exact(tmp_path: Path, backend: str, precision: str) -> None:
    """Stopped at several steps, between and at checkpoints: the same bits, with dropout, clipping and evaluation."""
    sizes = ("training.max_steps=8", "training.eval_every=4", "training.checkpoint_every=2")
    config = tiny(tmp_path, f"training.mixed_precision={precision}", *sizes)
    train(config, tmp_path / "whole", backend)
    broken = tmp_path / "broken"
    train(config, broken, backend, until=1)
    for until in (2, 5, None):
        resume(broken, until=until)  # without a backend: the run continues on its own
    assert metrics(broken, 4) == metrics(tmp_path / "whole", 4)
    assert same_bits(state(broken), state(tmp_path / "whole"))
    assert same_bits(state(broken, 4), state(tmp_path / "whole", 4))


@both_backends
def test_two_runs_are_equal_and_another_seed_is_not(tmp_path: Path, backend: str) -> None:
    config = tiny(tmp_path)
    for name, given in (("a", config), ("b", config), ("c", config.with_overrides("seed=4"))):
        train(given, tmp_path / name, backend, until=5)
    assert same_bits(state(tmp_path / "a"), state(tmp_path / "b"))
    assert not same_bits(state(tmp_path / "a"), state(tmp_path / "c"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, list[float]]]:
    """A configuration and its uninterrupted loss curves, on both backends and in float64."""
    config = tiny(tmp_path_factory.mktemp("reference"), "training.checkpoint_every=5", "training.eval_every=10")
    return config, curves(build(config), 20)


@pytest.mark.parametrize("order", [("mlx", "torch"), ("torch", "mlx")])
def test_changing_backend(
    tmp_path: Path, order: tuple[str, str], reference: tuple[Config, dict[str, list[float]]]
) -> None:
    """Four parts on alternating backends, compared with the uninterrupted run by the yardstick."""
    config, curve = reference
    moved = tmp_path / "moved"
    train(config, moved, order[0], until=5)
    for backend, until in ((order[1], 10), (order[0], 15), (order[1], 20)):
        resume(moved, backend, until)
    named = [record["backend"] for record in metrics(moved) if "loss" in record]
    assert named == [order[0]] * 5 + [order[1]] * 5 + [order[0]] * 5 + [order[1]] * 5
    verdict = judge_curve(losses(moved), curve["PyTorch"], curve["PyTorch float64"])
    assert verdict.passed, (verdict.worst, verdict.worst_step)
    train(config, tmp_path / "whole", order[0])
    assert losses(tmp_path / "whole") == curve[{"mlx": "MLX", "torch": "PyTorch"}[order[0]]]
    # the yardstick detects a difference of 0.1 % in one step
    verdict = judge_curve(
        [*losses(moved)[:-1], losses(moved)[-1] * 1.001], curve["PyTorch"], curve["PyTorch float64"]
    )
    assert not verdict.passed


@pytest.mark.parametrize("steps", [30, pytest.param(60, marks=pytest.mark.slow)])
def test_a_curve_with_weight_decay(tmp_path: Path, steps: int) -> None:
    config = tiny(tmp_path, f"training.max_steps={steps}", "training.warmup_steps=6", "training.weight_decay=0.1")
    curve = curves(build(config), steps)
    verdict = judge_curve(*curve.values())
    assert verdict.passed, (verdict.worst, verdict.worst_step)
    assert curve["MLX"][-1] < 0.5 * curve["MLX"][0]
    assert len(set(curve["PyTorch float64"])) == steps and verdict.noise.max() < 1e-3


def test_another_folder_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    config, run, branch = tiny(tmp_path), tmp_path / "run", tmp_path / "branch"
    train(config, run, "mlx")
    before = tree(run)
    old = run / "checkpoints" / "step-00000010"
    with pytest.raises(UsageError, match=r"the run continued to step-00000020; resume .*run to continue"):
        Trainer.resume(old, quiet=True)
    resume(old, "mlx", run=branch)
    assert tree(run) == before
    assert same_bits(state(branch), state(run)) and metrics(branch) == metrics(run)
    with pytest.raises(UsageError, match="branch: contains a run already"):
        Trainer.resume(old, run=branch, quiet=True)
    assert tree(run) == before


def test_a_branch_killed_at_once_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, branch = tmp_path / "run", tmp_path / "branch"
    train(tiny(tmp_path), run, "mlx")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        resume(run / "checkpoints" / "step-00000010", run=branch)
    resume(branch)
    assert same_bits(state(branch), state(run)) and metrics(branch) == metrics(run)


@both_backends
def test_ended_before_the_first_checkpoint(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed in its first steps has a config, metrics and no checkpoint. It can be resumed."""
    config, run = tiny(tmp_path, "training.max_steps=8"), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        train(config, run, backend)
    assert len(losses(run)) == 5 and not checkpoint.list_checkpoints(run)
    with pytest.raises(UsageError, match=r"contains a run already; continue it with --resume"):
        train(config, run, backend)
    resumed = Trainer.resume(run, quiet=True)
    assert resumed.engine.backend == backend and len(resumed.notes) == 1
    assert is_one_line(resumed.notes[0], str(run), "before its first checkpoint")
    resumed.fit()
    train(config, tmp_path / "whole", backend)
    assert metrics(run) == metrics(tmp_path / "whole") and same_bits(state(run), state(tmp_path / "whole"))


def test_a_checkpoint_copied_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint outside of a run needs a folder for its continuation. The folder around it does not change."""
    import shutil

    train(tiny(tmp_path), tmp_path / "run", "mlx", until=5)
    (tmp_path / "home" / "deep").mkdir(parents=True)
    copy = tmp_path / "home" / "deep" / "best"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000005", copy)
    before = tree(tmp_path / "home")
    with pytest.raises(UsageError, match=r"best: .*not in the folder of a run; .*--run NEW"):
        Trainer.resume(copy, quiet=True)
    resume(copy, run=tmp_path / "new")
    assert tree(tmp_path / "home") == before
    train(tiny(tmp_path), tmp_path / "whole", "mlx")
    assert same_bits(state(tmp_path / "new"), state(tmp_path / "whole"))
    # inside the folder the run is found, also by a relative path
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    assert resume(Path("step-00000005"), until=6).run.resolve() == (tmp_path / "run").resolve()


def test_refusals(tmp_path: Path) -> None:
    config, run = tiny(tmp_path), tmp_path / "run"
    train(config, run, "torch")
    before = tree(run)
    with pytest.raises(UsageError, match=r"the run is complete at step 20; to continue: --set training.max_steps=40"):
        Trainer.resume(run)
    with pytest.raises(UsageError, match="contains a run already; continue it with --resume"):
        Trainer.start(config, run)
    with pytest.raises(WeightsError, match=r"not the parameters of this model: .*use the config"):
        Trainer.resume(run, overrides=["training.max_steps=40", "model.hidden_size=64"])
    with pytest.raises(ConfigError, match="max_step: unknown key"):
        Trainer.resume(run, overrides=["training.max_step=40"])
    with pytest.raises(CheckpointError, match="no such run"):
        Trainer.resume(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"model.vocab_size: 100 is less than the 257 tokens"):
        Trainer.start(config.with_overrides("model.vocab_size=100"), tmp_path / "small", backend="torch")
    with pytest.raises(DataError, match="one batch needs"):
        Trainer.start(config.with_overrides("training.batch_size=4000"), tmp_path / "small", backend="torch")
    assert tree(run) == before and not (tmp_path / "small").exists()  # nothing is written before all checks


def test_going_on_beyond_the_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(tmp_path), run, "mlx")
    assert resume(run, overrides=["training.max_steps=24"]).step == 24
    assert len(losses(run)) == 24
    assert Config.from_yaml(run / "config.yaml").training.max_steps == 24


def test_another_text_is_noticed(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    train(config, tmp_path / "run", "mlx", until=5)
    assert Trainer.resume(tmp_path / "run").notes == []
    (tmp_path / "text.txt").write_text("something else " * 3000)
    assert "is not what the checkpoint was trained on" in Trainer.resume(tmp_path / "run").notes[0]


def test_a_second_process_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    """The first process is between two checkpoints. What it wrote after the first of them must stay."""
    keys = ("max_steps=16", "checkpoint_every=4", "eval_every=3")
    config, run = tiny(tmp_path, *(f"training.{key}" for key in keys)), tmp_path / "run"
    first = Trainer.start(config, run, backend="mlx", quiet=True)
    second = Trainer.start(config, run, backend="torch", quiet=True)  # both find an empty folder
    seen: list[str] = []
    evaluate = first._evaluate

    def meanwhile(*arguments: Any) -> bool:
        if first.step == 6:
            first._writer.wait()  # the checkpoint of step 4
            before = tree(run)
            with pytest.raises(CheckpointError, match="another process trains this run; wait for it"):
                second.fit()
            with pytest.raises(CheckpointError, match="another process trains this run"):
                Trainer.resume(run, quiet=True).fit()
            other = icenet("train", "--resume", "run", folder=tmp_path, code=1)
            seen.append(other.stderr)
            assert tree(run) == before
        return evaluate(*arguments)

    first._evaluate = meanwhile  # type: ignore[method-assign]
    first.fit()
    assert is_one_line(seen[0], "icenet: run", "another process", "--run")
    assert len(losses(run)) == 16
    # the lock is free, but the second trainer was created before the first one trained
    with pytest.raises(UsageError, match="contains a run already; continue it with --resume"):
        second.fit()


# ---- failures -------------------------------------------------------------------------------------------


@both_backends
def test_a_loss_that_is_no_number(tmp_path: Path, backend: str) -> None:
    keys = ("checkpoint_every=2", "eval_every=null", "warmup_steps=0", "max_steps=10")
    config = tiny(tmp_path, *(f"training.{key}" for key in keys))
    run = tmp_path / "run"
    train(config, run, backend, until=6)
    before = tree(run / "checkpoints")
    with pytest.raises(IceNetError) as error:
        resume(run, overrides=["training.learning_rate=1e30", "training.checkpoint_every=100"])
    message = str(error.value)
    assert is_one_line(message, "step ", "nan", str(run / "checkpoints" / "step-00000006"), "training.on_nan=skip")
    assert re.search(r"\(largest: [\w.]+ nan, [\w.]+ nan, [\w.]+ nan\)", message)
    assert tree(run / "checkpoints") == before
    resume(run)  # with the original learning rate
    train(config, tmp_path / "whole", backend)
    assert same_bits(state(run), state(tmp_path / "whole")) and metrics(run) == metrics(tmp_path / "whole")


@both_backends
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, backend: str) -> None:
    """An update can overflow although loss and gradients are finite. No checkpoint may contain that."""
    run = tmp_path / "run"
    started = Trainer.start(tiny(tmp_path), run, backend=backend, quiet=True)
    weights = started.engine.weights()
    weights["output.weight"] = np.where(np.eye(257, 32, dtype=bool), np.float32(np.inf), weights["output.weight"])
    started.engine.set_weights(weights)
    with pytest.raises(IceNetError, match=r"^step 0: output\.weight is not finite; there is no checkpoint yet"):
        started.save(wait=True)
    assert checkpoint.list_checkpoints(run) == []


def test_the_loss_scale() -> None:
    assert LossScale.for_precision("fp32").scale == LossScale.for_precision("bf16").scale == 1.0
    scale = LossScale.for_precision("fp16")
    assert scale.scale == 65536.0
    scale.update(False)
    assert (scale.scale, scale.good_steps) == (32768.0, 0)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.update(True)
    assert (scale.scale, scale.good_steps) == (32768.0, GROWTH_INTERVAL - 1)
    scale.update(True)
    assert (scale.scale, scale.good_steps) == (65536.0, 0)
    scale.update(True)
    scale.update(False)
    assert (scale.scale, scale.good_steps) == (32768.0, 0)
    low, high = LossScale(1.0), LossScale(2.0**24, GROWTH_INTERVAL - 1)
    low.update(False)
    high.update(True)
    assert low.scale == 1.0 and high.scale == 2.0**24


def fp16_run(config: Config, run: Path, backend: str, until: int | None = None, scale: float = 2.0**22) -> None:
    started = Trainer.start(config, run, backend=backend, quiet=True)
    started.scale = LossScale(scale)
    started.fit(until)


@both_backends
def test_fp16_skips_and_halves(tmp_path: Path, backend: str) -> None:
    """Steps are skipped and weights stay the same until the scale fits. An interruption changes nothing."""
    config, whole, broken = tiny(tmp_path, "training.mixed_precision=fp16"), tmp_path / "a", tmp_path / "b"
    fp16_run(config, whole, backend)
    records = [record for record in metrics(whole) if "loss" in record]
    skipped = [record["skipped"] for record in records]
    number = skipped.index(False)
    assert number >= 3 and not all(skipped[number:])
    assert [record["loss_scale"] for record in records] == [2.0 ** (22 - sum(skipped[: n + 1])) for n in range(20)]
    for until in (2, number + 1, None):  # while steps are skipped, and at the first that is not
        if until == 2:
            fp16_run(config, broken, backend, until)
            initial = backends.engine(config, backend).weights()
            assert same_bits(dict(checkpoint.find(broken).weights), initial)
            assert not any(array.any() for array in checkpoint.find(broken).optimizer.values())
        else:
            resume(broken, until=until)
    assert metrics(broken, 10) == metrics(whole, 10)
    assert same_bits(state(broken), state(whole))
    content = json.loads((broken / "checkpoints" / "step-00000020" / "state.json").read_text())
    assert content["loss_scale"] == {
        "scale": records[-1]["loss_scale"],
        "good_steps": 19 - max(n for n in range(20) if skipped[n]),
    }


@both_backends
def test_fp16_gradients_do_not_depend_on_the_loss_scale(tmp_path: Path, backend: str) -> None:
    engine = backends.engine(tiny(tmp_path, "training.mixed_precision=fp16"), backend)
    tokens = np.random.default_rng(0).integers(257, size=(4, 17)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1].copy(), "labels": tokens[:, 1:].copy()}
    norms = [engine.read(engine.train_step(batch, 0, 0.0, scale)).grad_norm for scale in (1.0, 1024.0)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


def test_fp16_skipped_steps_count_alike(tmp_path: Path) -> None:
    """After skipped steps, the step number in the bias correction is the same on both backends."""
    config = tiny(tmp_path, "training.mixed_precision=fp16", "training.max_steps=10", "model.dropout=0")
    for backend in BACKENDS:
        fp16_run(config, tmp_path / backend, backend)
    np.testing.assert_allclose(losses(tmp_path / "mlx"), losses(tmp_path / "torch"), rtol=2e-3)


@both_backends
def test_bf16_learns(tmp_path: Path, backend: str) -> None:
    """The curve of bf16 is close to that of fp32 and not equal. Weights and moments are fp32."""
    config = tiny(tmp_path, "training.eval_every=null")
    train(config, tmp_path / "fp32", backend)
    train(config.with_overrides("training.mixed_precision=bf16"), tmp_path / "bf16", backend)
    full, half = np.array(losses(tmp_path / "fp32")), np.array(losses(tmp_path / "bf16"))
    assert 1e-5 < np.abs(full - half).max() < 0.1
    assert {array.dtype for array in state(tmp_path / "bf16").values()} == {np.dtype(np.float32)}


@pytest.mark.slow
@both_backends
def test_compiled(tmp_path: Path, backend: str) -> None:
    """A compiled step has the curve of the plain one, with a new dropout mask in every step."""
    config = tiny(tmp_path, "training.max_steps=8", "training.eval_every=8")
    train(config, tmp_path / "plain", backend)
    train(config.with_overrides("model.compile_model=true"), tmp_path / "compiled", backend, until=5)
    resume(tmp_path / "compiled")
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-5)


# ---- signals and kills ----------------------------------------------------------------------------------


def test_arguments_of_start(tmp_path: Path) -> None:
    config = Config.from_yaml("quickstart")
    with pytest.raises(UsageError) as caught:
        Trainer.start("quickstart", tmp_path)  # type: ignore[arg-type]
    assert is_one_line(caught.value, "Trainer.start", "Config", "not str", "Config.from_yaml")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="contains"):  # a path as text
        Trainer.start(config, str(tmp_path))
    with pytest.raises(ConfigError, match="must be a list"):
        Config.from_yaml("quickstart", "training.max_steps=3")


@pytest.mark.parametrize(
    ("backend", "number"),
    [
        ("mlx", signal.SIGTERM),
        ("torch", signal.SIGINT),
        pytest.param("mlx", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("torch", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_evaluating(tmp_path: Path, backend: str, number: signal.Signals) -> None:
    """The signal comes after the loop has decided not to save at this step. The step is saved anyway."""
    config = tiny(tmp_path, "training.checkpoint_every=20", "training.eval_every=3", "training.max_steps=9")
    run = tmp_path / "run"
    started = Trainer.start(config, run, backend=backend, quiet=True)
    evaluate = started._evaluate

    def interrupted(*arguments: Any) -> bool:
        best = evaluate(*arguments)
        if started.step == 6:
            os.kill(os.getpid(), number)
        return best

    started._evaluate = interrupted  # type: ignore[method-assign]
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as error:
        started.fit()
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert is_one_line(error.value, f"stopped by {name} after step 6", f"icenet train --resume {run}")
    assert signal.getsignal(number) is handler
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step-00000006"]
    assert len(losses(run)) == 6
    resume(run)
    train(config, tmp_path / "whole", backend)
    assert metrics(run) == metrics(tmp_path / "whole") and same_bits(state(run), state(tmp_path / "whole"))


def command_config(folder: Path, *overrides: str) -> None:
    (folder / "tiny.yaml").write_text(tiny(folder, *overrides).to_yaml(), encoding="utf-8")


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 120:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b'"loss"') >= steps:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {steps} steps: {process.communicate()[1]}")


@pytest.mark.parametrize(
    ("backend", "number"),
    [
        ("mlx", signal.SIGINT),
        pytest.param("mlx", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("torch", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("torch", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_the_command_stopped_by_a_signal(tmp_path: Path, backend: str, number: signal.Signals) -> None:
    command_config(tmp_path, "training.max_steps=100000", "training.checkpoint_every=100000")
    run = tmp_path / "run"
    process = start_icenet(["train", "tiny.yaml", "--run", "run", "--backend", backend, "--quiet"], tmp_path)
    wait_for_steps(run, 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    step = int(checkpoint.find(run).step)
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert (process.returncode, out) == (130 if number == signal.SIGINT else 1, "")
    assert is_one_line(err, f"stopped by {name} after step {step}", "icenet train --resume run")
    assert step >= 3 and len(losses(run)) == step
    assert Trainer.resume(run).step == step


def survive(folder: Path, backend: str, kills: int, steps: int, seed: int) -> None:
    """Kills a run at random moments, resumes it each time, and compares the result with an uninterrupted run."""
    command_config(
        folder, f"training.max_steps={steps}", "training.checkpoint_every=3", "training.keep_checkpoints=3",
        "training.eval_every=7",
    )  # fmt: skip
    draw = random.Random(seed)
    run, killed, done = folder / "run", 0, 0
    command = ["train", "tiny.yaml", "--run", "run", "--backend", backend, "--quiet"]
    while killed < kills:
        process = start_icenet(command, folder)
        # within the next steps, at any point of a step, of a checkpoint or of the start
        wait_for_steps(run, done + draw.randint(0, max(1, (steps - done) // (kills - killed + 1))), process)
        time.sleep(draw.random() * 0.03)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was complete before the kill: more steps are needed"
        killed += 1
        if (run / "metrics.jsonl").exists():
            command = ["train", "--resume", "run", "--quiet"]
        newest = checkpoint.newest(run)
        if newest is not None:
            checkpoint.verify(newest)  # complete or absent
            done = max(done, int(newest.name[5:]))
    last = Trainer.resume(run, quiet=True)
    assert last.notes == [] and last.fit().step == steps
    train(Config.from_yaml(folder / "tiny.yaml"), folder / "whole", backend)
    assert same_bits(state(run), state(folder / "whole"))
    assert metrics(run) == metrics(folder / "whole")
    assert not list((run / "checkpoints").glob(".*")), "leftovers of the kills"


def test_two_kills(tmp_path: Path) -> None:
    survive(tmp_path, "mlx", kills=2, steps=40, seed=24)


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("seed", [2, 3])
def test_twenty_kills(tmp_path: Path, backend: str, seed: int) -> None:
    survive(tmp_path, backend, kills=20, steps={"mlx": 1500, "torch": 800}[backend], seed=seed)


@pytest.mark.parametrize(
    "file", [".lock", *(pytest.param(name, marks=pytest.mark.slow) for name in ("config.yaml", "metrics.jsonl"))]
)
def test_killed_at_the_very_beginning(tmp_path: Path, file: str) -> None:
    """Killed as soon as a file exists: either the run can be resumed, or a new one can start in its folder."""
    command_config(tmp_path, "training.max_steps=4")
    config, run = Config.from_yaml(tmp_path / "tiny.yaml"), tmp_path / "run"
    process = start_icenet(["train", "tiny.yaml", "--run", "run", "--backend", "mlx", "--quiet"], tmp_path)
    began = time.monotonic()
    while not (run / file).exists():
        assert process.poll() is None and time.monotonic() - began < 120, process.communicate()[1]
        time.sleep(0.001)
    process.kill()
    process.communicate()
    if checkpoint.newest(run) != run / "checkpoints" / "step-00000004":
        resume(run) if (run / "config.yaml").exists() else train(config, run, "mlx")
    train(config, tmp_path / "whole", "mlx")
    assert same_bits(state(run), state(tmp_path / "whole"))


def test_an_environment_without_matplotlib(tmp_path: Path) -> None:
    """matplotlib is an optional dependency: a run without it succeeds and says so."""
    command_config(tmp_path, "training.max_steps=1")
    program = "import sys; from icenet.cli.main import main; sys.exit(main(sys.argv[1:]))"
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    out = python(program, "train", config, "--run", run, "--quiet", blocked=["matplotlib"])
    assert "pip install 'icenet[plot]'" in out
