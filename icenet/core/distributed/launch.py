"""Detects the launcher of this process from its environment variables. Uses the standard library only.

A launcher starts the same command several times: `mlx.launch` or `mpirun` for MLX, `torchrun` for PyTorch.
Without a launcher there is one process. Slurm's `srun` starts several too, which do not know each other's address.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from icenet.core.errors import BackendError

LAUNCHERS = {"mlx": "mlx.launch", "torch": "torchrun"}
"""The launcher to recommend for each backend."""


class Launch(NamedTuple):
    """The launcher of this process, and its rank."""

    launcher: str
    rank: int
    size: int
    """Number of processes."""
    local_rank: int
    """Rank among the processes of the same machine; 0 if the launcher does not set it."""


def detect() -> Launch | None:
    """Returns the launcher of this process and its rank; None without a launcher."""
    return _by_mlx() or _by_torchrun() or _by_mpi() or _by_srun()


def detect_for(backend: str) -> Launch | None:
    """Returns the launcher of this process for a backend; None if it is the only process.

    Raises:
        BackendError: The launcher of several processes is the other backend's, so each would train alone.
    """
    own = (_by_mlx() or _by_mpi()) if backend == "mlx" else _by_torchrun()
    found = own or detect()
    if found is None or found.size == 1:
        return None
    if own is None:
        other = "torch" if backend == "mlx" else "mlx"
        alternative = f", or use --backend {other}" if found.launcher == LAUNCHERS[other] else ""
        if found.launcher == "srun":
            alternative = ", or separate runs with srun -n 1"
        raise BackendError(
            f"{found.launcher} started {found.size} processes, which cannot train together on {backend}: start them "
            f"with {LAUNCHERS[backend]}{alternative}"
        )
    return own


def connection_error(launch: Launch, reason: str) -> BackendError:
    """Returns the error of a process that could not connect to the others."""
    return BackendError(
        f"process {launch.rank} of {launch.size} cannot connect to the others: {reason}; "
        "docs/distributed.md has the commands"
    )


def error_prefix() -> str:
    """Returns the beginning of an error message: the rank of this process, or nothing for rank 0 or one process.

    Processes other than rank 0 wait two seconds first. The launcher ends them when rank 0 ends, so an error that all
    processes have in common is printed only once.
    """
    launch = detect()
    if launch is None or launch.rank == 0:
        return ""
    time.sleep(2)
    return f"process {launch.rank}: "


def _by_mlx() -> Launch | None:
    rank = _number("MLX_RANK")
    if rank is None:
        return None
    size = _number("MLX_WORLD_SIZE") or _length("MLX_HOSTFILE") or _length("MLX_IBV_DEVICES") or 1
    return Launch("mlx.launch", rank, size, rank)


def _by_torchrun() -> Launch | None:
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if rank is None or size is None:
        return None
    return Launch("torchrun", rank, size, _number("LOCAL_RANK") or 0)


def _by_mpi() -> Launch | None:
    for prefix in ("OMPI_COMM_WORLD_", "PMI_"):  # Open MPI; MPICH and its derivatives
        rank, size = _number(prefix + "RANK"), _number(prefix + "SIZE")
        if rank is not None and size is not None:
            return Launch("mpirun", rank, size, _number(prefix + "LOCAL_RANK") or 0)
    return None


def _by_srun() -> Launch | None:
    # SLURM_NTASKS is the number of the whole job, which a batch script has too
    rank, size = _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS")
    if rank is None or size is None:
        return None
    return Launch("srun", rank, size, _number("SLURM_LOCALID") or 0)


def _number(name: str) -> int | None:
    """Returns the integer value of an environment variable; None if it has none."""
    with contextlib.suppress(ValueError):
        return int(os.environ.get(name, ""))
    return None


def _length(name: str) -> int:
    """Returns the length of the list in the JSON file that an environment variable names; 0 without one."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(Path(os.environ.get(name, "")).read_text(encoding="utf-8"))
        return len(content) if isinstance(content, list) else 0
    return 0
