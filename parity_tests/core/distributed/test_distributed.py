"""Several processes against one, on loopback: the same curve, checkpoints that move between numbers of processes and
backends, and an end for all of them whatever becomes of one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import environment, icenet, losses, metrics, same_bits, state, tiny

from icenet.core.config import Config
from icenet.core.distributed import launch, processes
from icenet.core.engine import micro_batches
from icenet.core.errors import BackendError, CheckpointError, ConfigError, IceNetError
from icenet.core.training import checkpoint, trainer
from icenet.core.training.trainer import Trainer
from icenet.parity.run import build, curves
from icenet.parity.yardstick import judge_curve

pytest.importorskip("torch")
pytest.importorskip("mlx")

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
LAUNCHER = {"mlx": BIN / "mlx.launch", "torch": BIN / "torchrun"}
SECONDS = 120
"""After which a group of processes counts as hanging."""

DRIVER = """
import os, sys
from pathlib import Path
from icenet.core.backends import exact_products
exact_products()
from icenet.core.distributed import launch
from icenet.core.training import trainer
from icenet.core.config import Config
place = launch.started_by()
rank = place.rank if place else 0
Path(f"pid-{rank}").write_text(str(os.getpid()))
fails = os.environ.get("FAILS", "").partition(":")
if fails[0] == str(rank):
    plain = trainer.learning_rate
    def failing(step, training):
        if step == int(fails[2]):
            raise ValueError("something of this process alone")
        return plain(step, training)
    trainer.learning_rate = failing
if sys.argv[1] == "until":
    step, config, run, backend = sys.argv[2:]
    trainer.plots.plot_metrics = lambda *_, **__: None
    if Path(run).exists() and not config:
        trainer.Trainer.resume(Path(run), backend=backend, quiet=True).fit(int(step))
    else:
        trainer.Trainer.start(Config.from_yaml(config), Path(run), backend=backend, quiet=True).fit(int(step))
else:
    from icenet.cli.main import main
    sys.exit(main(sys.argv[1:]))
"""


class Group:
    """Several processes of the driver, and what they print."""

    def __init__(
        self, folder: Path, backend: str, arguments: Sequence[str | Path], size: int, launcher: bool, **more: str
    ) -> None:
        self.folder = folder
        self.size = size
        (folder / "driver.py").write_text(DRIVER)
        for old in folder.glob("pid-*"):
            old.unlink()
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.environ = environment(folder, PYTHONPATH=f"{ROOT}", **threads, **more)
        command = [str(folder / "driver.py"), *map(str, arguments)]
        if launcher:
            self.processes = [self._start(self._launched(backend, command))]
        else:
            self.processes = [
                self._start([sys.executable, *command], **variables) for variables in self._variables(backend)
            ]

    def _start(self, command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
        number = len(list(self.folder.glob("out-*")))
        out = (self.folder / f"out-{number}").open("w")
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**self.environ, **variables},
            stdin=subprocess.PIPE,  # mlx.launch turns in circles where its input has ended
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def _launched(self, backend: str, command: list[str]) -> list[str]:
        if not LAUNCHER[backend].exists():
            pytest.skip(f"{LAUNCHER[backend].name} is not installed")
        if backend == "mlx":
            port = next(port for port in free_ports(50) if all(is_free(port + n) for n in range(self.size)))
            return [str(LAUNCHER["mlx"]), "-n", f"{self.size}", "-p", f"{port}", "--", sys.executable, *command]
        return [str(LAUNCHER["torch"]), "--standalone", "--nproc-per-node", f"{self.size}", "--", *command]

    def _variables(self, backend: str) -> list[dict[str, str]]:
        """What the launchers say to the processes, without the launchers."""
        ports = free_ports(self.size)
        if backend == "torch":
            common = {"WORLD_SIZE": f"{self.size}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{ports[0]}"}
            return [{**common, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(self.size)]
        hosts = self.folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        return [{"MLX_RANK": f"{rank}", "MLX_HOSTFILE": f"{hosts}"} for rank in range(self.size)]

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid-{rank}").read_text())

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """Their exit codes."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs:\n{self.said()}") from None

    def wait_for_steps(self, run: Path, steps: int) -> None:
        end = time.monotonic() + SECONDS
        while all(process.poll() is None for process in self.processes) and time.monotonic() < end:
            if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b'"loss"') >= steps:
                return
            time.sleep(0.01)
        raise AssertionError(f"no {steps} steps:\n{self.said()}")

    def said(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("out-*")))

    def lines(self) -> list[str]:
        """What IceNet itself said in errors."""
        return [line for line in self.said().splitlines() if line.startswith("icenet: ")]

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for path in self.folder.glob("pid-*"):  # torchrun's are in sessions of their own
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)
        for process in self.processes:
            process.wait(10)
            if process.stdin is not None:
                process.stdin.close()
        for path in self.folder.glob("out-*"):
            path.unlink()


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def is_free(port: int) -> bool:
    with socket.socket() as each:
        return each.connect_ex(("127.0.0.1", port)) != 0


@contextlib.contextmanager
def started(
    folder: Path, backend: str, *arguments: str | Path, size: int = 2, launcher: bool = False, **more: str
) -> Iterator[Group]:
    group = Group(folder, backend, arguments, size, launcher, **more)
    try:
        yield group
    finally:
        group.end()


def train(
    folder: Path, config: Config | None, run: Path, backend: str, until: int, size: int = 2, launcher: bool = False
) -> None:
    """Trains a run, or goes on with it where no configuration is given, in several processes."""
    if config is not None:
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    name = "config.yaml" if config is not None else ""
    with started(folder, backend, "until", f"{until}", name, run, backend, size=size, launcher=launcher) as group:
        assert group.wait() == [0] * len(group.processes), group.said()
        assert not group.lines(), group.said()


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trainer.plots, "plot_metrics", lambda *_, **__: None)
    for name in ("RANK", "WORLD_SIZE", "MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)


def shared(folder: Path, *overrides: str, steps: int = 40) -> Config:
    """Dropout, accumulation and clipping on."""
    return tiny(
        folder,
        f"training.max_steps={steps}",
        "training.gradient_accumulation=2",
        "training.max_grad_norm=0.5",
        f"training.eval_every={steps // 2}",
        f"training.checkpoint_every={steps // 2}",
        *overrides,
    )


def judge(config: Config, *runs: Path) -> None:
    """Each run by the yardstick, against PyTorch in fp32 and in float64 on one process."""
    curve = curves(build(config.with_overrides("training.sharded=false")), config.training.max_steps)
    for run in runs:
        verdict = judge_curve(losses(run), curve["PyTorch"], curve["PyTorch float64"])
        assert verdict.passed, (run.name, verdict.worst, verdict.worst_step)
        off = judge_curve([*losses(run)[:-1], losses(run)[-1] * 1.001], curve["PyTorch"], curve["PyTorch float64"])
        assert not off.passed


OTHER = {"mlx": "torch", "torch": "mlx"}


# ---- what each takes on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_rows_are_shared_as_numpy_cuts_them(size: int) -> None:
    for rows in range(12):
        cut = np.array_split(np.arange(rows), size)
        assert [list(processes.own_rows(rows, rank, size)) for rank in range(size)] == [list(part) for part in cut]


class Alone:
    """A group of this process, that plays one of several."""

    def __init__(self, rank: int, size: int, others: Any = None) -> None:
        self.rank, self.size, self.stop = rank, size, None
        self.others = others

    def gather(self, numbers: Sequence[float]) -> np.ndarray:
        return np.array([numbers if rank == self.rank else self.others for rank in range(self.size)], np.float64)

    def average_statistics(self, model: Any) -> None: ...


def test_a_process_without_rows_counts_nothing() -> None:
    batch = {"inputs": np.arange(6).reshape(2, 3), "labels": np.arange(6).reshape(2, 3)}
    parts = [processes.share_rows(batch, Alone(rank, 3)) for rank in range(3)]
    assert [part["labels"].tolist() for part in parts] == [[[0, 1, 2]], [[3, 4, 5]], [[-1, -1, -1]]]
    assert all(part["inputs"].shape == (1, 3) for part in parts)
    assert batch["labels"].min() == 0, "the batch itself stays"
    assert processes.share_rows(batch, Alone(0, 1))["labels"].tolist() == batch["labels"].tolist()


@pytest.mark.parametrize(("rows", "size", "number"), [(5, 2, 1), (5, 2, 2), (8, 3, 2), (4, 4, 1), (6, 1, 3)])
def test_micro_batches_of_all_processes_make_the_batch(rows: int, size: int, number: int) -> None:
    """Each row once, in order, and shares by which the means of the parts add up to the mean of the whole."""
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
    processes.check(training, 4)
    with pytest.raises(ConfigError, match=r"^training\.batch_size 4 is too small for 5 processes: .* at least 5$"):
        processes.check(training, 5)
    training.gradient_accumulation = 2
    with pytest.raises(ConfigError, match=r"too small for 3 processes of 2 micro-batches: each needs a row"):
        processes.check(training, 3)
    training.sharded, training.optimizer = True, "muon"
    processes.check(training, 1)
    with pytest.raises(ConfigError, match=r"training\.sharded needs an optimizer .*: muon needs whole parameters"):
        processes.check(training, 2)


# ---- who started them -------------------------------------------------------------------------------------


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.started_by() is None and launch.place_for("mlx") is None and launch.place_for("torch") is None
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    assert launch.place_for("torch") == launch.Place("torchrun", 1, 4, 1)
    with pytest.raises(BackendError) as error:
        launch.place_for("mlx")
    assert str(error.value) == (
        "torchrun started 4 processes, which cannot train together on mlx: start them with mlx.launch, "
        "or say --backend torch"
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch.place_for("torch") is None and launch.place_for("mlx") is None
    monkeypatch.delenv("RANK")
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"], ["127.0.0.1:3"]]')
    monkeypatch.setenv("MLX_RANK", "2")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    assert launch.place_for("mlx") == launch.Place("mlx.launch", 2, 3, 2)
    with pytest.raises(BackendError, match=r"^mlx\.launch started 3 .* on torch: start them with torchrun, or say"):
        launch.place_for("torch")
    hosts.write_text("")  # what mlx.launch -n 1 leaves
    assert launch.place_for("mlx") is None
    monkeypatch.delenv("MLX_RANK")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert launch.place_for("mlx") == launch.Place("mpirun", 0, 2, 0)
    with pytest.raises(BackendError, match=r"^mpirun started 2 processes.* on torch: start them with torchrun$"):
        launch.place_for("torch")


def test_the_wrong_launcher_is_one_line(tmp_path: Path) -> None:
    """Two commands that torchrun starts, whose backend is MLX's, would train two copies."""
    tiny(tmp_path)
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    (tmp_path / "tiny.yaml").write_text(tiny(tmp_path).to_yaml())
    done = icenet("train", "tiny.yaml", "--run", "run", "--backend", "mlx", folder=tmp_path, code=1, **place)
    assert done.stderr.startswith("icenet: torchrun started 2 processes, which cannot train together on mlx: ")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_processes_that_were_given_different_things() -> None:
    crc = float(__import__("zlib").crc32(b"same"))
    processes.agree(Alone(0, 2, [crc, crc]), {"step": "same", "config": "same"})
    with pytest.raises(CheckpointError, match=r"^process 1 has another config than process 0: "):
        processes.agree(Alone(0, 2, [crc, crc + 1]), {"step": "same", "config": "same"})


WATCHED = """
import os, signal, sys, threading
from pathlib import Path
from icenet.core.distributed import watchdog
class ProcessGroup: rank, size, stop = 1, 2, None
watchdog.Watchdog.least_seconds = 0.5
def stop(number, frame): ProcessGroup.stop = "SIGTERM"
signal.signal(signal.SIGTERM, stop)
with watchdog.Watchdog(ProcessGroup, Path("run")) as watch:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    if sys.argv[1] == "rests":
        with watch.resting():
            threading.Event().wait(1.5)
    elif sys.argv[1] == "goes on":
        for _ in range(15):
            threading.Event().wait(0.1)
            watch.beat()
    else:
        threading.Event().wait(30)
print(ProcessGroup.stop)
"""


@pytest.mark.parametrize(("what", "code"), [("hangs", 1), ("rests", 0), ("goes on", 0)])
def test_a_process_that_waits_in_vain_ends(what: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, what], capture_output=True, text=True, timeout=20, cwd=ROOT, check=False
    )
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr == (
            "icenet: process 1 was asked to stop and ends, for the other processes do not answer. To go on from the "
            "last checkpoint: --resume run\n"
        )
    else:
        assert done.stdout == "SIGTERM\n" and not done.stderr


def test_a_lost_connection_is_one_line() -> None:
    told = r"^the other processes were lost \(\[ring\] connection to a peer was lost\); .* --resume run$"
    with pytest.raises(IceNetError, match=told), processes.explaining(Alone(0, 2), Path("run")):
        raise RuntimeError("[ring] connection to a peer was lost")
    for process_group, message in ((Alone(0, 1), "connection"), (Alone(0, 2), "shapes do not fit")):
        with pytest.raises(RuntimeError, match=message), processes.explaining(process_group, Path("run")):
            raise RuntimeError(message)


# ---- the same curve ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_two_processes_are_one(tmp_path: Path, backend: str) -> None:
    """By their launcher, half of a run; then one process on the other backend."""
    config, run = shared(tmp_path, steps=24), tmp_path / "run"
    train(tmp_path, config, run, backend, until=12, launcher=True)
    evaluated = [record for record in metrics(run) if "validation_loss" in record]
    assert [record["step"] for record in evaluated] == [12]
    Trainer.resume(run, backend=OTHER[backend], quiet=True).fit()
    judge(config, run)
    Trainer.start(config, tmp_path / "alone", backend=backend, quiet=True).fit(12)
    alone = [record for record in metrics(tmp_path / "alone") if "validation_loss" in record]
    assert evaluated[0]["validation_loss"] == pytest.approx(alone[0]["validation_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_numbers_of_processes_change(tmp_path: Path, backend: str, sharded: bool) -> None:
    """1, 2 and 3 processes in turn, on both backends; a batch of 5 rows is never cut evenly."""
    more = ["training.batch_size=5", "training.gradient_accumulation=1", "training.ema_decay=0.9"]
    config = shared(tmp_path, *more, f"training.sharded={str(sharded).lower()}")
    run = tmp_path / "run"
    Trainer.start(config, run, backend=backend, quiet=True).fit(10)
    train(tmp_path, None, run, backend, until=20)
    train(tmp_path, None, run, OTHER[backend], until=30, size=3)
    train(tmp_path, None, run, backend, until=40)
    judge(config, run)
    named = [record["backend"] for record in metrics(run) if "loss" in record]
    assert named == [backend] * 20 + [OTHER[backend]] * 10 + [backend] * 10


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
def test_sharded_and_whole_are_one(tmp_path: Path, backend: str, optimizer: str) -> None:
    """With recomputation, both kinds of clipping, and tied embeddings, which two places of the model read.

    Evaluations of the averages come without a checkpoint, which would put things right after them.
    """
    config = shared(
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


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_an_interruption_changes_no_bit(tmp_path: Path, backend: str) -> None:
    config = shared(tmp_path)
    train(tmp_path, config, tmp_path / "whole", backend, until=40)
    train(tmp_path, config, tmp_path / "broken", backend, until=7)
    train(tmp_path, None, tmp_path / "broken", backend, until=40)
    assert same_bits(state(tmp_path / "broken"), state(tmp_path / "whole"))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_batch_norm_takes_the_mean_of_the_processes_statistics(tmp_path: Path, backend: str) -> None:
    """Recomputed from two engines of this process, their gradients and in the end their statistics averaged."""
    pytest.importorskip("sklearn")
    config = Config.from_yaml(
        "cnn-digits",
        ["device=cpu", "model.base_channels=8", "training.max_steps=6", "training.batch_size=8", "model.dropout=0"],
    )
    train(tmp_path, config, tmp_path / "two", backend, until=6)
    found = state(tmp_path / "two")
    running = [name for name in found if name.endswith("running_mean")]
    assert running and all(np.isfinite(found[name]).all() and found[name].any() for name in running)
    by_hand = two_by_hand(config, backend)
    for name in running:
        np.testing.assert_allclose(found[name], by_hand[name], rtol=2e-4, atol=1e-6)


def two_by_hand(config: Config, backend: str) -> dict[str, np.ndarray]:
    """The weights of two processes that train on half of each batch."""
    from icenet.core import backends
    from icenet.core.data.datasets import dataset_for
    from icenet.core.training.schedule import learning_rate

    engines, data = [backends.engine(config, backend) for _ in range(2)], dataset_for(config)
    limit = config.training.max_grad_norm
    for step in range(config.training.max_steps):
        batch = data.train_batch(step, config.training.batch_size)
        gradients = []
        for rank, engine in enumerate(engines):
            rows = processes.own_rows(config.training.batch_size, rank, 2)
            part = {name: array[rows.start : rows.stop] for name, array in batch.items()}
            gradients.append(engine.gradients(part, step)[1])
            weights, slots = engine.weights(), engine.optimizer_state()
            engine.read(engine.train_step(part, step, 0.0))  # for the running statistics, which alone are kept
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


# ---- an end for all ---------------------------------------------------------------------------------------


def endless(folder: Path, *overrides: str) -> None:
    more = ["training.max_steps=100000", "training.checkpoint_every=100000", "training.eval_every=null"]
    (folder / "tiny.yaml").write_text(tiny(folder, *more, *overrides).to_yaml(), encoding="utf-8")


def stopped_well(folder: Path, run: Path, told: str) -> None:
    step = checkpoint.find(run).step
    assert step >= 3 and len(losses(run)) == step
    assert told == f"icenet: stopped by SIGTERM after step {step}; everything is saved: icenet train --resume run"


@pytest.mark.parametrize("backend", ["mlx", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_signal_to_one_stops_all(tmp_path: Path, backend: str) -> None:
    endless(tmp_path)
    run = tmp_path / "run"
    with started(tmp_path, backend, "train", "tiny.yaml", "--run", "run", "--backend", backend, "--quiet") as group:
        group.wait_for_steps(run, 3)
        os.kill(group.pid(1), signal.SIGTERM)
        assert group.wait(60) == [1, 1]
        stopped_well(tmp_path, run, group.lines()[0])
        assert [line.startswith("icenet: process 1: stopped by") for line in group.lines()] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_under_the_launcher(tmp_path: Path, backend: str, rank: int) -> None:
    endless(tmp_path)
    run = tmp_path / "run"
    arguments = ["train", "tiny.yaml", "--run", "run", "--backend", backend, "--quiet"]
    with started(tmp_path, backend, *arguments, launcher=True) as group:
        group.wait_for_steps(run, 3)
        os.kill(group.pid(rank), signal.SIGTERM)
        group.wait(60)
        gone(group)
        stopped_well(tmp_path, run, group.lines()[0])
        assert len(group.lines()) == 1, "the others are ended before they repeat it"


@pytest.mark.slow
def test_torchrun_hands_its_own_signal_on(tmp_path: Path) -> None:
    endless(tmp_path)
    run = tmp_path / "run"
    arguments = ["train", "tiny.yaml", "--run", "run", "--backend", "torch", "--quiet"]
    with started(tmp_path, "torch", *arguments, launcher=True) as group:
        group.wait_for_steps(run, 3)
        group.processes[0].send_signal(signal.SIGTERM)
        group.wait(60)
        gone(group)
        stopped_well(tmp_path, run, group.lines()[0])


@pytest.mark.slow
def test_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """mlx.launch leaves its processes behind: they see it, save and end."""
    endless(tmp_path)
    run = tmp_path / "run"
    arguments = ["train", "tiny.yaml", "--run", "run", "--backend", "mlx", "--quiet"]
    with started(tmp_path, "mlx", *arguments, launcher=True) as group:
        group.wait_for_steps(run, 3)
        group.processes[0].kill()
        group.wait(10)
        gone(group)
    assert checkpoint.find(run).step == len(losses(run)) >= 3


def gone(group: Group, seconds: float = 60) -> None:
    """Waits until the processes that a launcher started have ended."""
    end = time.monotonic() + seconds
    for rank in range(group.size):
        while alive(group.pid(rank)):
            assert time.monotonic() < end, f"process {rank} is left behind:\n{group.said()}"
            time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["raises", "killed"])
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_one_that_fails_ends_all(tmp_path: Path, backend: str, how: str, rank: int) -> None:
    """By an error of its own or by the system; nothing hangs, and the run resumes from its last checkpoint."""
    endless(tmp_path, "training.checkpoint_every=5")
    run = tmp_path / "run"
    arguments = ["train", "tiny.yaml", "--run", "run", "--backend", backend, "--quiet"]
    fails = {"FAILS": f"{rank}:12"} if how == "raises" else {}
    with started(tmp_path, backend, *arguments, launcher=True, **fails) as group:
        if how == "killed":
            group.wait_for_steps(run, 12)
            os.kill(group.pid(rank), signal.SIGKILL)
        code = group.wait(90)[0]
        gone(group)
        assert backend == "mlx" or code != 0  # mlx.launch itself always ends well
        if how == "raises":
            assert any("something of this process alone" in line for line in group.lines()), group.said()
    step = checkpoint.find(run).step
    assert step >= 5 and step % 5 == 0
    shutil.copytree(run, tmp_path / "copy")
    Trainer.resume(run, backend="torch", quiet=True).fit(step + 2)


@pytest.mark.slow
def test_the_rest_of_the_world_is_quiet(tmp_path: Path) -> None:
    """One result is printed and one bar; errors that all have are told once."""
    (tmp_path / "tiny.yaml").write_text(shared(tmp_path, "training.max_steps=4").to_yaml())
    arguments = ["train", "tiny.yaml", "--run", "run", "--backend", "torch"]
    with started(tmp_path, "torch", *arguments, launcher=True) as group:
        assert group.wait() == [0]
        assert group.said().count("step 4: loss") == 1 and group.said().count("validation loss") == 2
    with started(tmp_path, "torch", *arguments, launcher=True) as group:
        group.wait()
        assert group.lines() == [
            "icenet: run: holds a run already; continue it with --resume run, or choose another --run"
        ]
