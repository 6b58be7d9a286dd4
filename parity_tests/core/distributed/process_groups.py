"""Starts groups of processes that train, and the configuration of such a run."""

from __future__ import annotations

import contextlib
import json
import os
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
from helpers import ROOT, environment, tiny

from icenet.core.config import Config
from icenet.core.distributed import processes

BIN = Path(sys.executable).parent
LAUNCHER = {"mlx": BIN / "mlx.launch", "torch": BIN / "torchrun"}
SECONDS = 120
"""Time limit after which a group of processes counts as hanging."""

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
