"""Tests training in several processes on loopback against one process.

Loss curves agree, and checkpoints move between numbers of processes and backends.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import both_backends, build_model, is_one_line, losses, metrics, same_bits, state, tiny
from process_groups import FakeGroup, train, training_config

from icenet.core import backends
from icenet.core.config import Config, custom
from icenet.core.data.datasets import dataset_for
from icenet.core.distributed import processes
from icenet.core.engine import micro_batches
from icenet.core.errors import ConfigError
from icenet.core.training.schedule import learning_rate
from icenet.core.training.trainer import Trainer
from icenet.parity.configuration.engines import build
from icenet.parity.configuration.run import curves
from icenet.parity.curves import judge_curve

pytest.importorskip("torch")
pytest.importorskip("mlx")
pytestmark = pytest.mark.usefixtures("no_plots")


def judge(config: Config, *runs: Path) -> None:
    """Checks each run by the yardstick, against PyTorch in fp32 and in float64 in one process."""
    curve = curves(build(config.with_overrides("training.sharded=false")), config.training.max_steps)
    for run in runs:
        verdict = judge_curve(losses(run), curve["PyTorch"], curve["PyTorch float64"])
        assert verdict.passed, (run.name, verdict.worst, verdict.worst_step)
        off = judge_curve([*losses(run)[:-1], losses(run)[-1] * 1.001], curve["PyTorch"], curve["PyTorch float64"])
        assert not off.passed


OTHER = {"mlx": "torch", "torch": "mlx"}

# ---- the rows and shards of each process ------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_rows_are_split_as_numpy_does(size: int) -> None:
    for rows in range(12):
        cut = np.array_split(np.arange(rows), size)
        assert [list(processes.local_rows(rows, rank, size)) for rank in range(size)] == [list(part) for part in cut]


def test_a_process_without_rows_counts_no_labels() -> None:
    batch = {"inputs": np.arange(6).reshape(2, 3), "labels": np.arange(6).reshape(2, 3)}
    parts = [processes.local_batch(batch, FakeGroup(rank, 3)) for rank in range(3)]
    assert [part["labels"].tolist() for part in parts] == [[[0, 1, 2]], [[3, 4, 5]], [[-1, -1, -1]]]
    assert all(part["inputs"].shape == (1, 3) for part in parts)
    assert batch["labels"].min() == 0, "the batch itself is unchanged"
    assert processes.local_batch(batch, FakeGroup(0, 1))["labels"].tolist() == batch["labels"].tolist()


@pytest.mark.parametrize(("rows", "size", "number"), [(5, 2, 1), (5, 2, 2), (8, 3, 2), (4, 4, 1), (6, 1, 3)])
def test_micro_batches_of_all_processes_are_the_batch(rows: int, size: int, number: int) -> None:
    """Each row once, in order; the means weighted by the shares add up to the mean of the batch."""
    draw = np.random.default_rng(rows * size)
    labels = draw.integers(0, 9, (rows, 7)).astype(np.int32)
    labels[draw.random((rows, 7)) < 0.3] = -1
    losses_of = draw.random((rows, 7))
    batch = {"inputs": labels, "labels": labels}
    parts = [part for rank in range(size) for part in micro_batches(batch, number, rank, size)]
    assert [row for _, own, _ in parts for row in own] == list(range(rows))
    assert len(parts) == number * size and all(len(part["labels"]) == len(own) > 0 for part, own, _ in parts)
    mean = sum(
        share * losses_of[own.start : own.stop][part["labels"] >= 0].mean()
        for part, own, share in parts
        if (part["labels"] >= 0).any()
    )
    assert mean == pytest.approx(losses_of[labels >= 0].mean(), rel=1e-12)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    training = tiny(tmp_path).training
    processes.check_training(training, 4)
    with pytest.raises(ConfigError) as error:
        processes.check_training(training, 5)
    assert is_one_line(error.value, "training.batch_size 4", "5 processes", "at least 5")
    training.gradient_accumulation = 2
    with pytest.raises(ConfigError) as error:
        processes.check_training(training, 3)
    assert is_one_line(error.value, "training.batch_size 4", "3 processes", "2 micro-batches", "at least 6")
    training.sharded, training.optimizer = True, "muon"
    processes.check_training(training, 1)
    with pytest.raises(ConfigError) as error:
        processes.check_training(training, 2)
    assert is_one_line(error.value, "training.sharded", "muon")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [1, 5, 6])
def test_shards_are_the_inverse_of_gathering(padded: bool, length: int) -> None:
    class Model:
        def layer_kinds(self) -> dict[str, str]:
            return {"layer": "linear", "up": "conv_transpose2d"}

        def shared_arrays(self) -> dict[str, str]:
            return {}

    class PaddedShards(processes.Shards):
        pass

    PaddedShards.padded = padded
    full = np.arange(2.0 * length, dtype=np.float32).reshape(length, 2)
    parameters = {"layer.weight": full}
    ranks = [PaddedShards(Model(), parameters, FakeGroup(rank, 3)) for rank in range(3)]
    for name in ("layer.weight", "layer.weight.exp_avg"):
        pieces = [shards.local_shard(name, full) for shards in ranks]
        rows = -(-length // 3)
        assert all(len(piece) == rows for piece in pieces) or not padded
        assert np.array_equal(np.concatenate(pieces)[:length], full)
        last = ranks[2]
        last.process_group.others = np.zeros((rows, 2))  # type: ignore[attr-defined]
        gathered = last.gather_full(name, pieces[2])
        assert gathered.shape == full.shape and np.array_equal(gathered[2 * rows :], full[2 * rows :])
    assert ranks[0].local_shard("running_mean", full) is full
    for path, array in (("layer.scale", np.array(1.0)), ("up.weight", full)):
        with pytest.raises(ConfigError) as error:
            PaddedShards(Model(), {path: array}, FakeGroup(0, 3))
        assert is_one_line(error.value, path, "training.sharded=false")


@both_backends
def test_the_units_of_a_sharded_model(backend: str, tmp_path: Path) -> None:
    for family, units in {"transformer": ["", "blocks.0"], "lstm": ["", "layers.0", "layers.1"]}.items():
        model = build_model(backend, tiny(tmp_path, family=family).model, seed=None)
        assert processes.unit_paths(model, dict.fromkeys(model.weight_shapes())) == units


def test_the_reason_to_stop_reaches_all_processes() -> None:
    group = FakeGroup(1, 2)
    group.stop = "Ctrl-C"
    assert group.read_loss(group.all_reduce_loss(np.float32(1.5))) == (3.0, "Ctrl-C")
    group.stop = None
    assert group.read_loss(group.all_reduce_loss(np.float32(1.5))) == (3.0, None)
    alone = FakeGroup(0, 1)
    alone.stop = "SIGTERM"
    assert alone.read_loss(alone.all_reduce_loss(np.float32(1.5))) == (1.5, None)


# ---- the same curve ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "launcher"),
    [("mlx", True), ("torch", False), pytest.param("torch", True, marks=pytest.mark.slow)],
)
def test_two_processes_train_like_one(tmp_path: Path, backend: str, launcher: bool) -> None:
    """Half of a run in two processes, of the launcher or with its variables, then one on the other backend."""
    config, run = training_config(tmp_path, steps=12), tmp_path / "run"
    train(tmp_path, config, run, backend, until=6, launcher=launcher)
    evaluated = [record for record in metrics(run) if "validation_loss" in record]
    assert [record["step"] for record in evaluated] == [6]
    Trainer.resume(run, backend=OTHER[backend], quiet=True).fit()
    judge(config, run)
    Trainer.start(config, tmp_path / "alone", backend=backend, quiet=True).fit(6)
    alone = [record for record in metrics(tmp_path / "alone") if "validation_loss" in record]
    assert evaluated[0]["validation_loss"] == pytest.approx(alone[0]["validation_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
@both_backends
def test_the_number_of_processes_changes(tmp_path: Path, backend: str, sharded: bool) -> None:
    """1, 2, 3 and 2 processes, on both backends; the 5 rows of a batch never divide evenly."""
    more = ["training.batch_size=5", "training.gradient_accumulation=1", "training.ema_decay=0.9"]
    config = training_config(tmp_path, *more, f"training.sharded={str(sharded).lower()}")
    run = tmp_path / "run"
    Trainer.start(config, run, backend=backend, quiet=True).fit(10)
    train(tmp_path, None, run, backend, until=20)
    train(tmp_path, None, run, OTHER[backend], until=30, size=3)
    train(tmp_path, None, run, backend, until=40)
    judge(config, run)
    named = [record["backend"] for record in metrics(run) if "loss" in record]
    assert named == [backend] * 20 + [OTHER[backend]] * 10 + [backend] * 10


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("sharded", [False, True])
def test_experts_in_several_processes(tmp_path: Path, backend: str, sharded: bool) -> None:
    """Two processes of two micro-batches are one of four, because each micro-batch has its loss of balance."""
    config = training_config(
        tmp_path,
        *("model.num_experts=4", "model.expert_size=16", "training.ema_decay=0.9"),
        *("model.router_aux_loss_coef=0.5", "training.gradient_checkpointing=true"),
        f"training.sharded={str(sharded).lower()}",
        steps=20,
    )
    run, one = tmp_path / "run", config.with_overrides("training.gradient_accumulation=4", "training.sharded=false")
    train(tmp_path, config, run, backend, until=20)
    judge(one, run)
    Trainer.start(one, tmp_path / "alone", backend=backend, quiet=True).fit(20)
    pairs = zip(metrics(run), metrics(tmp_path / "alone"), strict=True)
    evaluated = [
        (own["validation_loss"], alone["validation_loss"]) for own, alone in pairs if "validation_loss" in own
    ]
    assert len(evaluated) == 2 and all(own == pytest.approx(alone, rel=1e-4) for own, alone in evaluated)


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
def test_sharded_training_equals_data_parallel_training(tmp_path: Path, backend: str, optimizer: str) -> None:
    """With gradient checkpointing, both kinds of clipping, and tied embeddings, which the model reads twice.

    The averages are evaluated without a checkpoint, because saving one gathers all parameters again.
    """
    config = training_config(
        tmp_path,
        f"training.optimizer={optimizer}",
        "training.learning_rate=2e-3",
        "training.max_grad_value=0.05",
        "training.gradient_checkpointing=true",
        "training.ema_decay=0.9",
        "training.eval_every=6",
        "training.checkpoint_every=100",
        "model.tie_embeddings=true",
    )
    train(tmp_path, config, tmp_path / "whole", backend, until=40)
    train(tmp_path, config.with_overrides("training.sharded=true"), tmp_path / "sharded", backend, until=40)
    judge(config, tmp_path / "whole", tmp_path / "sharded")
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "sharded")
    assert {name: array.shape for name, array in whole.items()} == {name: array.shape for name, array in cut.items()}
    for first, second in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "sharded"), strict=True):
        for key in {"grad_norm", "validation_loss"} & first.keys():
            assert first[key] == pytest.approx(second[key], rel=1e-4), first["step"]


TIED = """
import {array} as array
import {nn} as nn
from {package}.models.base import BaseModel


class Tied(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        layer = nn.Linear(config.hidden_size, config.hidden_size)
        self.hidden = nn.Sequential(layer, nn.Tanh(), layer)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.hidden(self.embedding(x)))
"""


@pytest.mark.slow
@both_backends
def test_shared_arrays_in_several_processes(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's model with a tied head and a layer that is used twice: data parallel and sharded are one process."""
    monkeypatch.chdir(tmp_path)
    words = {"array": "mlx.core", "nn": "mlx.nn", "package": "icenet"}
    (tmp_path / "tied.py").write_text(TIED.format(**words))
    (tmp_path / "tied_torch.py").write_text(TIED.format(array="torch", nn="torch.nn", package="icenet_torch"))
    model = {"type": "tied.py:Tied", "hidden_size": 9, "vocab_size": 257}
    more = ["data.seq_length=16", "training.ema_decay=0.9", "training.weight_decay=0.1"]
    plain = training_config(tmp_path, *more, steps=10)
    config = Config.from_dict({**plain.model_dump(mode="python"), "model": model})
    runs = {sharded: tmp_path / f"sharded-{sharded}" for sharded in ("false", "true")}
    for sharded, run in runs.items():
        train(tmp_path, config.with_overrides(f"training.sharded={sharded}"), run, backend, until=10)
    custom.trust(config.model.type)
    judge(config, *runs.values())
    whole, cut = (state(run) for run in runs.values())
    assert whole.keys() == cut.keys()
    for found in (whole, cut):
        assert found["head.weight"].tobytes() == found["embedding.weight"].tobytes()
        assert found["head.weight"].shape == (257, 9) and "head.weight.exp_avg" not in found
        assert found["hidden.2.bias"].tobytes() == found["hidden.0.bias"].tobytes()
    for name in whole:
        np.testing.assert_allclose(whole[name], cut[name], atol=2e-4, err_msg=name)


@pytest.mark.slow
@both_backends
def test_an_interrupted_run_is_equal_bit_for_bit(tmp_path: Path, backend: str) -> None:
    config = training_config(tmp_path)
    train(tmp_path, config, tmp_path / "whole", backend, until=40)
    train(tmp_path, config, tmp_path / "broken", backend, until=7)
    train(tmp_path, None, tmp_path / "broken", backend, until=40)
    assert same_bits(state(tmp_path / "broken"), state(tmp_path / "whole"))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.mark.slow
@both_backends
def test_running_statistics_are_averaged_over_the_processes(tmp_path: Path, backend: str) -> None:
    """Against two engines in this process, whose gradients and final statistics are averaged."""
    pytest.importorskip("sklearn")
    config = Config.from_yaml(
        "cnn-digits",
        ["device=cpu", "model.base_channels=8", "training.max_steps=6", "training.batch_size=8", "model.dropout=0"],
    )
    train(tmp_path, config, tmp_path / "two", backend, until=6)
    found = state(tmp_path / "two")
    running = [name for name in found if name.endswith("running_mean")]
    assert running and all(np.isfinite(found[name]).all() and found[name].any() for name in running)
    expected = two_engines(config, backend)
    for name in running:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=1e-6)


def two_engines(config: Config, backend: str) -> dict[str, np.ndarray]:
    """Returns the weights of two processes that each train on half of every batch."""
    engines, data = [backends.engine(config, backend) for _ in range(2)], dataset_for(config)
    limit = config.training.max_grad_norm
    for step in range(config.training.max_steps):
        batch = data.train_batch(step, config.training.batch_size)
        gradients = []
        for rank, engine in enumerate(engines):
            rows = processes.local_rows(config.training.batch_size, rank, 2)
            part = {name: array[rows.start : rows.stop] for name, array in batch.items()}
            gradients.append(engine.gradients(part, step)[1])
            weights, slots = engine.weights(), engine.optimizer_state()
            engine.read(engine.train_step(part, step, 0.0))  # only its running statistics are kept
            moved = {name: array for name, array in engine.weights().items() if "running" in name}
            engine.set_weights({**weights, **moved})
            engine.set_optimizer_state(slots)
        mean = {name: (gradients[0][name] + gradients[1][name]) / 2 for name in gradients[0]}
        norm = float(np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in mean.values())))
        factor = 1.0 if limit is None else min(limit / (norm + 1e-6), 1.0)
        for engine in engines:
            clipped = {name: array * np.float32(factor) for name, array in mean.items()}
            engine.apply_gradients(clipped, step, learning_rate(step, config.training))
    both = [engine.weights() for engine in engines]
    return {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}
