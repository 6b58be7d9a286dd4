"""Tests training in several processes on loopback against one process.

Loss curves agree, checkpoints move between numbers of processes and backends, all processes end when one ends.
"""

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
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    ROOT,
    both_backends,
    build_model,
    environment,
    error_line,
    icenet,
    is_one_line,
    losses,
    metrics,
    same_bits,
    state,
    tiny,
)

from icenet.core import backends
from icenet.core.config import Config, custom
from icenet.core.data.datasets import dataset_for
from icenet.core.distributed import launch, processes
from icenet.core.engine import micro_batches
from icenet.core.errors import BackendError, CheckpointError, ConfigError, IceNetError
from icenet.core.runs import checkpoint
from icenet.core.training.schedule import learning_rate
from icenet.core.training.trainer import Trainer
from icenet.parity.curves import judge_curve
from icenet.parity.engines import build
from icenet.parity.run import curves

pytest.importorskip("torch")
pytest.importorskip("mlx")

BIN = Path(sys.executable).parent
LAUNCHER = {"mlx": BIN / "mlx.launch", "torch": BIN / "torchrun"}
SECONDS = 120
"""Time limit after which a group of processes counts as hanging."""

pytestmark = pytest.mark.usefixtures("no_plots")

DRIVER = """
import os, sys
from pathlib import Path
from icenet.core.distributed import launch
from icenet.core.report import plots
from icenet.core.training import trainer
from icenet.core.config import Config, custom
launched = launch.detect()
rank = launched.rank if launched else 0
Path(f"pid-{rank}").write_text(str(os.getpid()))
fails = os.environ.get("FAILS", "").partition(":")
if fails[0] == str(rank):
    plain = trainer.learning_rate
    def failing(step, training):
        if step == int(fails[2]):
            raise ValueError("an error of this process only")
        return plain(step, training)
    trainer.learning_rate = failing
if sys.argv[1] == "until":
    step, config, run, backend = sys.argv[2:]
    plots.plot_metrics = lambda *_, **__: None
    if Path(run).exists() and not config:
        trainer.Trainer.resume(Path(run), backend=backend, quiet=True).fit(int(step))
    else:
        trainer.Trainer.start(Config.from_yaml(config), Path(run), backend=backend, quiet=True).fit(int(step))
else:
    from icenet.cli.main import main
    sys.exit(main(sys.argv[1:]))
"""


class Group:
    """Several processes that run DRIVER, and their output."""

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
            stdin=subprocess.PIPE,  # mlx.launch loops forever if its input has ended
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL) and None,  # nohup ignores it
        )

    def _launched(self, backend: str, command: list[str]) -> list[str]:
        if not LAUNCHER[backend].exists():
            pytest.skip(f"{LAUNCHER[backend].name} is not installed")
        if backend == "mlx":
            port = next(port for port in free_ports(50) if all(is_free(port + n) for n in range(self.size)))
            return [str(LAUNCHER["mlx"]), "-n", f"{self.size}", "-p", f"{port}", "--", sys.executable, *command]
        return [str(LAUNCHER["torch"]), "--standalone", "--nproc-per-node", f"{self.size}", "--", *command]

    def _variables(self, backend: str) -> list[dict[str, str]]:
        """Returns the environment variables that the launcher sets for each process."""
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
        """Waits for all processes and returns their exit codes."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs:\n{self.output()}") from None

    def wait_for_steps(self, run: Path, steps: int) -> None:
        end = time.monotonic() + SECONDS
        while all(process.poll() is None for process in self.processes) and time.monotonic() < end:
            if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b'"loss"') >= steps:
                return
            time.sleep(0.01)
        raise AssertionError(f"no {steps} steps:\n{self.output()}")

    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("out-*")))

    def errors(self) -> list[str]:
        """Returns the error messages of icenet itself."""
        return [line for line in self.output().splitlines() if line.startswith("icenet: ")]

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for path in self.folder.glob("pid-*"):  # torchrun starts them in new sessions
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
    """Trains a new run, or continues it if `config` is None, in several processes."""
    if config is not None:
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    name = "config.yaml" if config is not None else ""
    with started(folder, backend, "until", f"{until}", name, run, backend, size=size, launcher=launcher) as group:
        assert group.wait() == [0] * len(group.processes), group.output()
        assert not group.errors(), group.output()


def training_config(folder: Path, *overrides: str, steps: int = 40) -> Config:
    """Returns a configuration with dropout, gradient accumulation and clipping."""
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


class FakeGroup(processes.ProcessGroup):
    """One process of a group whose other processes do not exist.

    Args:
        rank, size: the place in the group.
        others: the arrays that `all_gather` receives from each of the others.
    """

    def __init__(self, rank: int, size: int, others: Any = None) -> None:
        super().__init__(rank, size)
        self.others = others

    def all_gather(self, array: np.ndarray) -> np.ndarray:
        others = np.reshape(self.others, array.shape)
        return np.concatenate([array if rank == self.rank else others for rank in range(self.size)])

    def broadcast_or_shard(self, model: Any, sharded: bool) -> None: ...

    def all_reduce_gradients(self, gradients: Any) -> dict[str, Any]:
        return dict(gradients)

    def _all_sum(self, array: Any) -> Any:
        return array * self.size

    def _append(self, scalar: Any, numbers: Sequence[float]) -> Any:
        return np.concatenate([np.reshape(scalar, 1), numbers])


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


# ---- launchers --------------------------------------------------------------------------------------------


def test_launchers_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.detect() is None and launch.detect_for("mlx") is None and launch.detect_for("torch") is None
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    assert launch.detect_for("torch") == launch.Launch("torchrun", 1, 4, 1)
    with pytest.raises(BackendError) as error:
        launch.detect_for("mlx")
    assert is_one_line(error.value, "torchrun started 4 processes", "mlx.launch", "--backend torch")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch.detect_for("torch") is None and launch.detect_for("mlx") is None
    monkeypatch.delenv("RANK")
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"], ["127.0.0.1:3"]]')
    monkeypatch.setenv("MLX_RANK", "2")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    assert launch.detect_for("mlx") == launch.Launch("mlx.launch", 2, 3, 2)
    with pytest.raises(BackendError) as error:
        launch.detect_for("torch")
    assert is_one_line(error.value, "mlx.launch started 3 processes", "torchrun", "--backend mlx")
    hosts.write_text("")  # what mlx.launch -n 1 leaves
    assert launch.detect_for("mlx") is None
    monkeypatch.delenv("MLX_RANK")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert launch.detect_for("mlx") == launch.Launch("mpirun", 0, 2, 0)
    with pytest.raises(BackendError) as error:
        launch.detect_for("torch")
    assert is_one_line(error.value, "mpirun started 2 processes", "torchrun") and "--backend" not in str(error.value)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_processes_of_srun_do_not_train_separate_copies(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's variables of a job with two tasks, then of the second task of a step with two."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert launch.detect_for(backend) is None
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(BackendError) as error:
        launch.detect_for(backend)
    assert is_one_line(error.value, "srun started 2 processes", launch.LAUNCHERS[backend], "srun -n 1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert launch.detect_for(backend) is None


def test_an_incomplete_environment_of_torchrun_does_not_train_separate_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    from icenet_torch.engine import distributed

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackendError) as error:
        distributed.join("cpu")
    assert is_one_line(error.value, "process 1 of 2", "MASTER_ADDR")


def test_the_wrong_launcher_is_one_line(tmp_path: Path) -> None:
    """Two processes of torchrun with MLX as the backend would each train alone."""
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    (tmp_path / "tiny.yaml").write_text(tiny(tmp_path).to_yaml())
    done = icenet("train", "tiny.yaml", "--run", "run", "--backend", "mlx", folder=tmp_path, code=1, **launched)
    assert is_one_line(error_line(done.stderr), "torchrun", "mlx.launch") and not (tmp_path / "run").exists()


def test_processes_with_different_inputs() -> None:
    crc = float(zlib.crc32(b"same"))
    processes.check_same(FakeGroup(0, 2, [crc, crc]), {"step": "same", "config": "same"})
    with pytest.raises(CheckpointError) as error:
        processes.check_same(FakeGroup(0, 2, [crc, crc + 1]), {"step": "same", "config": "same"})
    assert is_one_line(error.value, "process 1", "config")


WATCHED = """
import os, signal, sys, threading
from pathlib import Path
from icenet.core.distributed import watchdog
class ProcessGroup: rank, size, stop = 1, 2, None
watchdog.Watchdog.min_seconds = 0.5
def stop(number, frame): ProcessGroup.stop = "SIGTERM"
signal.signal(signal.SIGTERM, stop)
with watchdog.Watchdog(ProcessGroup, Path("run")) as watch:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    if sys.argv[1] == "pauses":
        with watch.paused():
            threading.Event().wait(1.5)
    elif sys.argv[1] == "continues":
        for _ in range(15):
            threading.Event().wait(0.1)
            watch.beat()
    else:
        threading.Event().wait(30)
print(ProcessGroup.stop)
"""


@pytest.mark.parametrize(("what", "code"), [("hangs", 1), ("pauses", 0), ("continues", 0)])
def test_a_process_that_waits_for_lost_ones_ends(what: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, what], capture_output=True, text=True, timeout=20, cwd=ROOT, check=False
    )
    assert done.returncode == code, done.stderr
    if code:
        assert is_one_line(done.stderr, "icenet: process 1", "--resume run")
    else:
        assert done.stdout == "SIGTERM\n" and not done.stderr


def test_a_lost_connection_is_one_line() -> None:
    with pytest.raises(IceNetError) as error, processes.explain_lost_processes(FakeGroup(0, 2), Path("run")):
        raise RuntimeError("[ring] connection to a peer was lost\nin all_sum")
    assert is_one_line(error.value, "[ring] connection to a peer was lost", "--resume run")
    for process_group, message in ((FakeGroup(0, 1), "connection"), (FakeGroup(0, 2), "shapes do not fit")):
        with pytest.raises(RuntimeError, match=message), processes.explain_lost_processes(process_group, Path("run")):
            raise RuntimeError(message)


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


# ---- signals and failures ---------------------------------------------------------------------------------


def endless(folder: Path, *overrides: str) -> None:
    more = ["training.max_steps=100000", "training.checkpoint_every=100000", "training.eval_every=null"]
    (folder / "tiny.yaml").write_text(tiny(folder, *more, *overrides).to_yaml(), encoding="utf-8")


def check_stopped(run: Path, message: str, name: str = "SIGTERM") -> None:
    """Checks that a run was stopped by a signal after its last step and saved."""
    step = checkpoint.find(run).step
    assert step >= 3 and len(losses(run)) == step
    assert is_one_line(message, name, f"step {step}", "icenet train --resume run")


@pytest.mark.parametrize(
    ("backend", "number"),
    [
        ("mlx", signal.SIGTERM),
        pytest.param("torch", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("torch", signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_stops_all(tmp_path: Path, backend: str, number: signal.Signals) -> None:
    endless(tmp_path)
    run = tmp_path / "run"
    with started(tmp_path, backend, "train", "tiny.yaml", "--run", "run", "--backend", backend, "--quiet") as group:
        group.wait_for_steps(run, 3)
        os.kill(group.pid(1), number)
        assert group.wait(60) == [1, 1]
        check_stopped(run, group.errors()[0], number.name)
        assert [line.startswith("icenet: process 1: ") for line in group.errors()] == [False, True]


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_under_the_launcher(tmp_path: Path, backend: str, rank: int) -> None:
    endless(tmp_path)
    run = tmp_path / "run"
    arguments = ["train", "tiny.yaml", "--run", "run", "--backend", backend, "--quiet"]
    with started(tmp_path, backend, *arguments, launcher=True) as group:
        group.wait_for_steps(run, 3)
        os.kill(group.pid(rank), signal.SIGTERM)
        group.wait(60)
        wait_until_gone(group)
        check_stopped(run, group.errors()[0])
        assert len(group.errors()) == 1, "the launcher ends the others before they repeat it"


@pytest.mark.slow
def test_torchrun_forwards_its_signal(tmp_path: Path) -> None:
    endless(tmp_path)
    run = tmp_path / "run"
    arguments = ["train", "tiny.yaml", "--run", "run", "--backend", "torch", "--quiet"]
    with started(tmp_path, "torch", *arguments, launcher=True) as group:
        group.wait_for_steps(run, 3)
        group.processes[0].send_signal(signal.SIGTERM)
        group.wait(60)
        wait_until_gone(group)
        check_stopped(run, group.errors()[0])


@pytest.mark.slow
def test_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """mlx.launch leaves its processes running: they notice, save and end."""
    endless(tmp_path)
    run = tmp_path / "run"
    arguments = ["train", "tiny.yaml", "--run", "run", "--backend", "mlx", "--quiet"]
    with started(tmp_path, "mlx", *arguments, launcher=True) as group:
        group.wait_for_steps(run, 3)
        group.processes[0].kill()
        group.wait(10)
        wait_until_gone(group)
    assert checkpoint.find(run).step == len(losses(run)) >= 3


def wait_until_gone(group: Group, seconds: float = 60) -> None:
    """Waits until the processes that a launcher started have ended."""
    end = time.monotonic() + seconds
    for rank in range(group.size):
        while alive(group.pid(rank)):
            assert time.monotonic() < end, f"process {rank} is left behind:\n{group.output()}"
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
@both_backends
def test_all_processes_end_when_one_fails(tmp_path: Path, backend: str, how: str, rank: int) -> None:
    """It raises an error or is killed. Nothing hangs, and the run resumes from its last checkpoint."""
    endless(tmp_path, "training.checkpoint_every=5")
    run = tmp_path / "run"
    arguments = ["train", "tiny.yaml", "--run", "run", "--backend", backend, "--quiet"]
    fails = {"FAILS": f"{rank}:12"} if how == "raises" else {}
    with started(tmp_path, backend, *arguments, launcher=True, **fails) as group:
        if how == "killed":
            group.wait_for_steps(run, 12)
            os.kill(group.pid(rank), signal.SIGKILL)
        code = group.wait(90)[0]
        wait_until_gone(group)
        assert backend == "mlx" or code != 0  # the exit code of mlx.launch is always 0
        if how == "raises":
            assert any("an error of this process only" in line for line in group.errors()), group.output()
    step = checkpoint.find(run).step
    assert step >= 5 and step % 5 == 0
    shutil.copytree(run, tmp_path / "copy")
    Trainer.resume(run, backend="torch", quiet=True).fit(step + 2)


@pytest.mark.slow
def test_only_the_main_process_prints(tmp_path: Path) -> None:
    """One result and one progress bar; an error of all processes is printed once."""
    (tmp_path / "tiny.yaml").write_text(training_config(tmp_path, "training.max_steps=4").to_yaml())
    arguments = ["train", "tiny.yaml", "--run", "run", "--backend", "torch"]
    with started(tmp_path, "torch", *arguments, launcher=True) as group:
        assert group.wait() == [0]
        assert group.output().count("step 4: loss") == 1 and group.output().count("validation loss") == 2
    with started(tmp_path, "torch", *arguments, launcher=True) as group:
        group.wait()
        assert len(group.errors()) == 1 and is_one_line(group.errors()[0], "icenet: run: ", "--resume run", "--run")
