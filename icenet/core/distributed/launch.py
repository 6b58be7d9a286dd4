"""Who started this process as one of several, which its environment tells. Standard library only.

A launcher starts the same command several times: `mlx.launch` or `mpirun` for MLX, `torchrun` for PyTorch. Without
one there is one process.
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
"""What starts several processes of a backend."""


class Place(NamedTuple):
    """Which process this is."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    """Its number among those of its machine, where the launcher tells it."""


def started_by() -> Place | None:
    """This process's place among several; None where no launcher started it."""
    return _by_mlx() or _by_torchrun() or _by_mpi()


def place_for(backend: str) -> Place | None:
    """This process's place among those that train on a backend; None where it is alone.

    Raises:
        BackendError: it is one of several, whose launcher is the other backend's: each would train alone.
    """
    own = (_by_mlx() or _by_mpi()) if backend == "mlx" else _by_torchrun()
    found = own or started_by()
    if found is None or found.size == 1:
        return None
    if own is None:
        other = "torch" if backend == "mlx" else "mlx"
        ours = f", or say --backend {other}" if found.launcher == LAUNCHERS[other] else ""
        raise BackendError(
            f"{found.launcher} started {found.size} processes, which cannot train together on {backend}: start them "
            f"with {LAUNCHERS[backend]}{ours}"
        )
    return own


def not_met(place: Place, why: str) -> str:
    """What is said where a process waited for the others in vain."""
    return f"process {place.rank} of {place.size} does not find the others: {why}; docs/training.md has the commands"


def after_the_first(seconds: float = 2.0) -> str:
    """What an error begins with: nothing in the first process, its number in another.

    The others wait before: an error that all have is told by the first, whose end lets the launcher end them.
    """
    place = started_by()
    if place is None or place.rank == 0:
        return ""
    time.sleep(seconds)
    return f"process {place.rank}: "


def _by_mlx() -> Place | None:
    rank = _number("MLX_RANK")
    if rank is None:
        return None
    size = _number("MLX_WORLD_SIZE") or _length("MLX_HOSTFILE") or _length("MLX_IBV_DEVICES") or 1
    return Place("mlx.launch", rank, size, rank)


def _by_torchrun() -> Place | None:
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if rank is None or size is None or "MASTER_ADDR" not in os.environ:
        return None
    return Place("torchrun", rank, size, _number("LOCAL_RANK") or 0)


def _by_mpi() -> Place | None:
    for prefix in ("OMPI_COMM_WORLD_", "PMI_"):  # Open MPI; MPICH and those that follow it
        rank, size = _number(prefix + "RANK"), _number(prefix + "SIZE")
        if rank is not None and size is not None:
            return Place("mpirun", rank, size, _number(prefix + "LOCAL_RANK") or 0)
    return None


def _number(name: str) -> int | None:
    with contextlib.suppress(ValueError):
        return int(os.environ.get(name, ""))
    return None


def _length(name: str) -> int:
    """How many processes a file of JSON that the environment names speaks of."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(Path(os.environ.get(name, "")).read_text(encoding="utf-8"))
        return len(content) if isinstance(content, list) else 0
    return 0
