"""Several processes that train one model: what each takes on, what they agree on, and what happens when one is gone.

Each makes every batch whole, since batches are pure functions of the step, and takes its rows of it: so all know how
many labels the batch counts without asking one another. The first process alone writes and prints.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from icenet.core.config.training import TrainingConfig
from icenet.core.errors import CheckpointError, ConfigError, IceNetError
from icenet.core.weights import layout

ELEMENTWISE = ("adamw", "adam", "sgd", "lion")
"""Optimizers that fit each value by itself, so that a part of a parameter needs no other part."""

T = TypeVar("T")


class ProcessGroup(Protocol):
    """The processes of a run, on one backend. Of a single one, all of it is nothing and costs nothing."""

    rank: int
    size: int
    stop: str | None
    """What asks this process to stop, one of SIGNALS; the result of the next step tells it to all of them."""

    def gather(self, numbers: Sequence[float]) -> NDArray[np.float64]:
        """The numbers of every process, float64 `[size, N]`; waits until all have given theirs."""

    def average_statistics(self, model: Any) -> None:
        """Gives the batch norms the mean of the processes' running statistics."""


# ---- what each takes on -----------------------------------------------------------------------------------


def own_rows(rows: int, rank: int, size: int) -> range:
    """The rows of a batch that are a process's: consecutive, as `numpy.array_split` cuts them."""
    each, more = divmod(rows, size)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


def share_rows(batch: dict[str, NDArray[Any]], process_group: ProcessGroup) -> dict[str, NDArray[Any]]:
    """A process's rows of a batch to be evaluated.

    Where there are too few it is the first row, its labels not counted: every process has something to compute.
    """
    rows = own_rows(len(batch["labels"]), process_group.rank, process_group.size)
    if rows:
        return {name: array[rows.start : rows.stop] for name, array in batch.items()}
    first = {name: array[:1] for name, array in batch.items()}
    return {**first, "labels": np.full_like(first["labels"], -1)}


def check(training: TrainingConfig, size: int) -> None:
    """Refuses a training that so many processes cannot share.

    Raises:
        ConfigError: too few rows in a batch, or an optimizer that needs whole parameters where they are sharded.
    """
    parts = size * training.gradient_accumulation
    if size > 1 and training.batch_size < parts:
        micro = f" of {training.gradient_accumulation} micro-batches" if training.gradient_accumulation > 1 else ""
        raise ConfigError(
            f"training.batch_size {training.batch_size} is too small for {size} processes{micro}: "
            f"each needs a row, so at least {parts}"
        )
    if size > 1 and training.sharded and training.optimizer not in ELEMENTWISE:
        raise ConfigError(
            f"training.sharded needs an optimizer that fits each value by itself ({', '.join(ELEMENTWISE)}): "
            f"{training.optimizer} needs whole parameters; set another, or training.sharded=false"
        )


def check_cut(path: str, ndim: int, kinds: Mapping[str, str]) -> None:
    """Refuses a parameter that cannot be cut along its first axis, the same one on both backends.

    Raises:
        ConfigError: it is a single value, or a transposed convolution, whose axes MLX has in another order.
    """
    transposed = "transpose" in layout.parameter_kind(kinds, path)
    if ndim == 0 or transposed:
        what = "a transposed convolution" if transposed else "a single value"
        raise ConfigError(f"training.sharded: {path} is {what} and cannot be cut; set training.sharded=false")


def in_turn(process_group: ProcessGroup, work: Callable[[], T]) -> T:
    """Does a piece of work in the first process, then in the others, which may find it done on the disk."""
    if process_group.rank > 0:
        process_group.gather([0.0])
    found = work()
    if process_group.rank == 0:
        process_group.gather([0.0])
    return found


# ---- what they agree on -----------------------------------------------------------------------------------


def agree(process_group: ProcessGroup, what: Mapping[str, str]) -> None:
    """Waits for all processes, and refuses to go on where they were given different things.

    Args:
        process_group: the processes.
        what: texts that must be the same, each under the name that an error calls it.

    Raises:
        CheckpointError: they differ; the run's folder is not the same everywhere, say.
    """
    sums = process_group.gather([float(zlib.crc32(text.encode())) for text in what.values()])
    for name, column in zip(what, sums.T, strict=True):
        other = next((rank for rank in range(process_group.size) if column[rank] != column[0]), None)
        if other is not None:
            raise CheckpointError(
                f"process {other} has another {name} than process 0: each machine needs the same config, data and "
                "run folder, shared or copied"
            )


SIGNALS = ("SIGTERM", "Ctrl-C", "the end of its launcher")
"""What can ask a run to stop."""
_parent = os.getppid()


def asked(stop: str | None) -> list[float]:
    """Which of SIGNALS asks this process to stop: 1 for one of them or none.

    A launcher that is killed need not end its processes (`mlx.launch` does not): they would train on, unseen.
    """
    stop = stop or (SIGNALS[-1] if os.getppid() != _parent else None)
    return [float(stop == name) for name in SIGNALS]


def asked_for(counts: Sequence[float]) -> str | None:
    """What asks a run to stop, from how many processes each of SIGNALS asked."""
    return next((name for name, count in zip(SIGNALS, counts, strict=True) if count), None)


# ---- when one is gone -------------------------------------------------------------------------------------


_OF_THE_NETWORK = ("connection", "peer", "gloo", "nccl", "[ring]", "[jaccl]", "[mpi]", "timed out")
"""In what a framework says when it lost another process."""


@contextlib.contextmanager
def explaining(process_group: ProcessGroup, run: Path) -> Iterator[None]:
    """Tells of a connection that broke in one line: the frameworks raise a RuntimeError of their own."""
    try:
        yield
    except RuntimeError as error:
        if process_group.size == 1 or not any(word in str(error).lower() for word in _OF_THE_NETWORK):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise IceNetError(
            f"the other processes were lost ({first}); one of them may have said why. To go on: --resume {run}"
        ) from error
