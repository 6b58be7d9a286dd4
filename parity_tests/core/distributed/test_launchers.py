"""Launchers of several processes, and signals to or failures of one of them: all processes end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from helpers import ROOT, both_backends, error_line, icenet, is_one_line, losses, tiny
from process_groups import FakeGroup, Group, started, training_config

from icenet.core.distributed import launch, processes
from icenet.core.errors import BackendError, CheckpointError, IceNetError
from icenet.core.runs import checkpoint
from icenet.core.training.trainer import Trainer

pytest.importorskip("torch")
pytest.importorskip("mlx")
pytestmark = pytest.mark.usefixtures("no_plots")


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
