"""Several processes that train one model: the base class of their group, the rows of each, and what they agree on.

Every process builds each training batch in full, because batches are pure functions of the step, and computes its
rows of it. All processes therefore know the number of counted labels without communication. Only the main process,
rank 0, writes and prints.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from icenet.core.config.custom import is_custom
from icenet.core.config.training import TrainingConfig
from icenet.core.errors import CheckpointError, ConfigError, IceNetError
from icenet.core.messages import first_line
from icenet.core.weights import layout

ELEMENTWISE = ("adamw", "adam", "sgd", "lion")
"""Optimizers that update each value of a parameter independently, so that they can work on a shard of it."""

SIGNALS = ("SIGTERM", "Ctrl-C", "SIGHUP", "the end of its launcher")
"""The reasons to stop a run."""

Array = Any
"""An array of the backend: `mlx.core.array` or `torch.Tensor`."""

T = TypeVar("T")


class ProcessGroup(ABC):
    """The processes that train one model on one backend. In a group of one process every method is trivial.

    With data parallelism each process holds the whole model. With `training.sharded` each process holds a shard of
    every parameter and of its optimizer state.

    Attributes:
        rank: The index of this process.
        size: The number of processes.
        stop: Reason to stop that this process received, one of SIGNALS, or None. `all_reduce_loss` shares it.
        shards: The shards of the model's parameters, or None if every process holds the whole model.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.stop: str | None = None
        self.shards: Shards | None = None

    # ---- the model ---------------------------------------------------------------------------------------

    @abstractmethod
    def broadcast_or_shard(self, model: Any, sharded: bool) -> None:
        """Copies the parameters of rank 0 to all processes and, if `sharded`, keeps only a shard of them in each.

        Before, the processes can differ: a user's model may draw its own initial values.
        """

    def local_shard(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns this process's shards of full canonical arrays by `PATH` or `PATH.SLOT`."""
        return {name: self.shards.local_shard(name, a) if self.shards else a for name, a in arrays.items()}

    def gather_full(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns the full arrays of which each process holds a shard: the inverse of `local_shard`.

        A collective operation: all processes must call it.
        """
        return {name: self.shards.gather_full(name, a) if self.shards else a for name, a in arrays.items()}

    # ---- collective operations ---------------------------------------------------------------------------

    def gather(self, numbers: Sequence[float]) -> NDArray[np.float64]:
        """Returns the numbers of every process, float64 `[size, N]`. It waits for all processes."""
        own = np.array([numbers], np.float64)
        return own if self.size == 1 else self.all_gather(own)

    @abstractmethod
    def all_gather(self, array: NDArray[Any]) -> NDArray[Any]:
        """Returns the arrays of all processes, all of one shape, concatenated along the first axis."""

    @abstractmethod
    def all_reduce_gradients(self, gradients: Any) -> dict[str, Array]:
        """Returns the gradients of a step by path, summed over the processes unless the backward pass did so.

        Args:
            gradients: With MLX, this process's gradients by path; with PyTorch, the parameters by path, after the
                backward pass has set their `grad`.
        """

    def all_reduce_loss(self, loss: Array) -> Array:
        """Returns the loss summed over the processes and the stop flags counted over them, `[1 + len(SIGNALS)]`.

        `read_loss` reads it. In a group of one process it is the loss itself.
        """
        return loss if self.size == 1 else self._all_sum(self._append(loss, stop_flags(self.stop)))

    def read_loss(self, reduced: Array) -> tuple[float, str | None]:
        """Returns the loss and the reason to stop, one of SIGNALS or None, from the output of `all_reduce_loss`."""
        if self.size == 1:
            return float(reduced.item()), None
        loss, *counts = reduced.tolist()
        return loss, stop_reason(counts)

    def all_reduce_norms(self, norm: Array, norms: Array) -> tuple[Array, Array]:
        """Returns the norm of all gradients and of each, `[N]`, from the norms of this process's shards of them."""
        if self.shards is None:
            return norm, norms
        squares = self._all_sum(norms.square())
        return squares.sum().sqrt(), squares.sqrt()

    def mean(self, arrays: Sequence[Array]) -> list[Array]:
        """Returns the mean of each array over the processes."""
        return [self._all_sum(array) / self.size for array in arrays]

    @abstractmethod
    def _all_sum(self, array: Array) -> Array:
        """Returns the sum of an array over the processes."""

    @abstractmethod
    def _append(self, scalar: Array, numbers: Sequence[float]) -> Array:
        """Returns a scalar followed by numbers as one array, `[1 + N]`."""


class Shards:
    """The parameters of a model, split along their first axis, of which each process holds one piece.

    A piece has ceil(length / size) rows. The last pieces have fewer, or are padded with zeros if `padded`.

    Args:
        model: A `BaseModel` before it is split.
        parameters: Its trainable parameters by path.
        process_group: The processes.

    Raises:
        ConfigError: A parameter cannot be split.
    """

    padded: ClassVar[bool] = False

    def __init__(self, model: Any, parameters: Mapping[str, Array], process_group: ProcessGroup) -> None:
        self.process_group = process_group
        self.shapes: dict[str, tuple[int, ...]] = {}
        kinds = model.layer_kinds()
        for path, array in parameters.items():
            check_shardable(path, array.ndim, kinds)
            self.shapes[path] = tuple(array.shape)
        shared = model.shared_arrays().items()
        self.shapes |= {alias: self.shapes[owner] for alias, owner in shared if owner in self.shapes}

    def local_shard(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Returns this process's piece of a full canonical array."""
        length = self._length(name)
        if length is None:
            return array
        rows = self._rows(length)
        piece = array[self.process_group.rank * rows : (self.process_group.rank + 1) * rows]
        return _pad(piece, rows) if self.padded else piece

    def gather_full(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Returns the full canonical array. A collective operation: all processes must call it."""
        length = self._length(name)
        if length is None:
            return array
        return self.process_group.all_gather(_pad(array, self._rows(length)))[:length]

    def _rows(self, length: int) -> int:
        return -(-length // self.process_group.size)

    def _length(self, name: str) -> int | None:
        """Returns the length of the first axis, the same in all layouts; None for an array that is not split."""
        shape = self.shapes.get(name) or self.shapes.get(name.rpartition(".")[0])
        return shape[0] if shape else None


def _pad(array: NDArray[Any], rows: int) -> NDArray[Any]:
    missing = rows - len(array)
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array


def unit_paths(model: Any, parameters: Mapping[str, Array]) -> list[str]:
    """Returns the paths of the modules that gather their parameters as a unit: the model, "", and its blocks.

    A block is a numbered child that holds parameters, such as `blocks.0`. A user's model is one unit, because the
    order in which it calls its modules is unknown.
    """
    if is_custom(model.config.type):
        return [""]
    split = (path.split(".") for path in parameters)
    blocks = [f"{names[0]}.{names[1]}" for names in split if len(names) > 2 and names[1].isdigit()]
    return ["", *dict.fromkeys(blocks)]


# ---- the rows of each process -----------------------------------------------------------------------------


def local_rows(rows: int, rank: int, size: int) -> range:
    """Returns the consecutive rows of a batch that a process computes, split as `numpy.array_split` does."""
    each, more = divmod(rows, size)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


def local_batch(batch: dict[str, NDArray[Any]], process_group: ProcessGroup) -> dict[str, NDArray[Any]]:
    """Returns a process's rows of an evaluation batch.

    If there are fewer rows than processes, a process without rows computes the first row with all labels ignored.
    """
    rows = local_rows(len(batch["labels"]), process_group.rank, process_group.size)
    if rows:
        return {name: array[rows.start : rows.stop] for name, array in batch.items()}
    first = {name: array[:1] for name, array in batch.items()}
    ignored = -1 if first["labels"].dtype.kind in "iu" else np.nan
    return {**first, "labels": np.full_like(first["labels"], ignored)}


def check_training(training: TrainingConfig, size: int) -> None:
    """Checks that `size` processes can share a training run.

    Raises:
        ConfigError: A batch has too few rows, or parameters are sharded for an optimizer that needs them whole.
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
            f"training.sharded needs an optimizer that updates each value independently ({', '.join(ELEMENTWISE)}): "
            f"{training.optimizer} needs whole parameters; set another, or training.sharded=false"
        )


def check_shardable(path: str, ndim: int, kinds: Mapping[str, str]) -> None:
    """Checks that a parameter can be split along the same first axis on both backends.

    Raises:
        ConfigError: It is a scalar, or the weight of a transposed convolution, whose first axis differs in MLX.
    """
    transposed = "transpose" in layout.parameter_kind(kinds, path)
    if ndim == 0 or transposed:
        what = "the weight of a transposed convolution" if transposed else "a scalar"
        raise ConfigError(f"training.sharded: {path} is {what} and cannot be split; set training.sharded=false")


def main_process_first(process_group: ProcessGroup, work: Callable[[], T]) -> T:
    """Runs `work` in the main process and then in the others, which may find its result on the disk."""
    if process_group.rank > 0:
        process_group.gather([0.0])
    found = work()
    if process_group.rank == 0:
        process_group.gather([0.0])
    return found


# ---- what the processes agree on --------------------------------------------------------------------------


def check_same(process_group: ProcessGroup, texts: Mapping[str, str]) -> None:
    """Waits for all processes and checks that they have the same inputs.

    Args:
        process_group: The processes.
        texts: What must be the same everywhere, by the name that an error uses for it.

    Raises:
        CheckpointError: A text differs, for example because the run's folder is not the same on all machines.
    """
    sums = process_group.gather([float(zlib.crc32(text.encode())) for text in texts.values()])
    for name, column in zip(texts, sums.T, strict=True):
        other = next((rank for rank in range(process_group.size) if column[rank] != column[0]), None)
        if other is not None:
            raise CheckpointError(
                f"process {other} has another {name} than process 0: each machine needs the same config, data and "
                "run folder, shared or copied"
            )


_parent = os.getppid()


def stop_flags(stop: str | None) -> list[float]:
    """Returns a flag for each of SIGNALS: 1 for the reason why this process was requested to stop.

    A launcher that is killed may leave its processes running (`mlx.launch` does). They notice it by their parent.
    """
    stop = stop or (SIGNALS[-1] if os.getppid() != _parent else None)
    return [float(stop == name) for name in SIGNALS]


def stop_reason(counts: Sequence[float]) -> str | None:
    """Returns the first of SIGNALS that any process reported, from their flags summed over the processes."""
    return next((name for name, count in zip(SIGNALS, counts, strict=True) if count), None)


# ---- when a process is lost -------------------------------------------------------------------------------

_NETWORK_WORDS = ("connection", "peer", "gloo", "nccl", "[ring]", "[jaccl]", "[mpi]", "timed out")
"""Words of the frameworks' errors about a lost process."""


@contextlib.contextmanager
def explain_lost_processes(process_group: ProcessGroup, run: Path) -> Iterator[None]:
    """Replaces a framework's RuntimeError about a broken connection by an error of one line."""
    try:
        yield
    except RuntimeError as error:
        if process_group.size == 1 or not any(word in str(error).lower() for word in _NETWORK_WORDS):
            raise
        first = first_line(error)
        raise IceNetError(
            f"the connection to the other processes was lost ({first}); see their errors for the cause. "
            f"To continue: --resume {run}"
        ) from error
