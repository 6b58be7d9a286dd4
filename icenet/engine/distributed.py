"""Several processes that train one model, MLX. The mirror is `icenet_torch/engine/distributed.py`.

Each process computes the gradients of its rows, and they are summed. Either every process holds all parameters (data
parallelism), or each holds a shard of every parameter and of its optimizer state (`training.sharded`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from icenet.core.distributed import launch, processes
from icenet.core.messages import first_line
from icenet.models import BaseModel
from icenet.nn import tree


class ProcessGroup(processes.ProcessGroup):
    """See `icenet.core.distributed.processes.ProcessGroup`."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        super().__init__(rank, size)
        self.group = group

    def broadcast_or_shard(self, model: BaseModel, sharded: bool) -> None:
        if self.size == 1:
            return
        own = tree.Arrays(model, trainable=False)
        own.set({p: self._all_sum(a if self.rank == 0 else mx.zeros_like(a)) for p, a in own.get().items()})
        mx.eval(model.parameters())
        if sharded:
            self.shards = Shards(model, self)

    def all_gather(self, array: np.ndarray) -> np.ndarray:
        # a GPU has no float64, so it is sent as its bytes
        words = array.view(np.uint32) if array.dtype == np.float64 else array
        return np.array(mx.distributed.all_gather(mx.array(words), group=self.group)).view(array.dtype)

    def all_reduce_gradients(self, gradients: dict[str, mx.array]) -> dict[str, mx.array]:
        if self.size == 1 or self.shards is not None:
            return gradients
        averaged = nn.average_gradients(list(gradients.values()), self.group)
        return {path: mean * self.size for path, mean in zip(gradients, averaged, strict=True)}

    def mean(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        means = super().mean(arrays)
        mx.eval(means)  # a lazy collective operation would wait until some process reads its result
        return means

    def _all_sum(self, array: mx.array) -> mx.array:
        return mx.distributed.all_sum(array, group=self.group)

    def _append(self, scalar: mx.array, numbers: Sequence[float]) -> mx.array:
        return mx.concatenate([scalar.reshape(1).astype(mx.float32), mx.array(list(numbers), mx.float32)])


_joined: list[ProcessGroup] = []


def join(device: str = "auto") -> ProcessGroup:
    """Returns a new group of this process, after it has connected to the others that a launcher started.

    Args:
        device: Device, as in the configuration. It selects the communication library of PyTorch.

    Raises:
        BackendError: The other processes are not reachable, or their launcher is not MLX's.
    """
    if not _joined:
        launched = launch.detect_for("mlx")
        if launched is None:
            return ProcessGroup()
        try:
            group = mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            raise launch.connection_error(launched, first_line(error, "")) from error
        if group.size() != launched.size:
            raise launch.connection_error(launched, f"MLX does not support {launched.launcher} here")
        _joined.append(ProcessGroup(group.rank(), group.size(), group))
    return ProcessGroup(_joined[0].rank, _joined[0].size, _joined[0].group)


def local_device(name: str) -> str:
    """Returns the device of this process: the given one, because `mlx.launch` shows each process one GPU."""
    return name


# ---- sharding ---------------------------------------------------------------------------------------------


class Shards(processes.Shards):
    """The parameters of a model, split along their first axis, of which each process holds one piece.

    Each unit of the model (a block, or the model for parameters outside of blocks) gathers its parameters when it is
    called and releases them when it returns. In the backward pass each process receives its piece of the sum of all
    gradients. The last pieces are padded with zeros, whose gradients are zero.

    Unlike `mlx.nn.fully_shard` it allows any length of the first axis (a vocabulary of 257), does not change running
    statistics and parameter paths, and works on the ring, which has no `sum_scatter`. Like PyTorch's `fully_shard` it
    changes the class of modules in place. (Zhao et al., "PyTorch FSDP", 2023.)
    """

    padded: ClassVar[bool] = True

    def __init__(self, model: BaseModel, process_group: ProcessGroup) -> None:
        parameters = tree.Arrays(model).get()
        super().__init__(model, parameters, process_group)
        self.group = process_group.group
        self.has_sum_scatter = self._has_sum_scatter()
        modules = dict(tree.named_modules(model))
        units = {f"{path}." if path else "": modules[path] for path in processes.unit_paths(model, parameters)}
        for prefix, module in units.items():
            inner = tuple(other for other in units if other != prefix and other.startswith(prefix))
            self._shard_unit(module, prefix, inner)
        mx.eval(model.parameters())

    def _has_sum_scatter(self) -> bool:
        try:
            mx.eval(mx.distributed.sum_scatter(mx.zeros((self.process_group.size,)), group=self.group))
        except RuntimeError:
            return False
        return True

    def _shard_unit(self, module: nn.Module, prefix: str, inner: tuple[str, ...]) -> None:
        """Splits the parameters of a unit, without those of its inner units, and changes its class."""
        parameters = tree.Arrays(module)
        paths = [path for path in parameters.get() if not (prefix + path).startswith(inner)]
        if not paths:
            return
        own = parameters.get()
        parameters.set({path: self._piece(own[path]) for path in paths})
        gather = self._gather_function([self.shapes[prefix + path] for path in paths])
        original = type(module)

        class Sharded(original):  # type: ignore[valid-type, misc]
            def __call__(self, *inputs: Any, **options: Any) -> Any:
                held = parameters.get()
                pieces = [held[path] for path in paths]
                parameters.set(dict(zip(paths, gather(pieces), strict=True)))
                try:
                    return super().__call__(*inputs, **options)
                finally:
                    parameters.set(dict(zip(paths, pieces, strict=True)))

        Sharded.__name__, Sharded.__qualname__ = original.__name__, original.__qualname__
        module.__class__ = Sharded

    def _gather_function(self, shapes: list[tuple[int, ...]]) -> Any:
        """Returns a function from pieces of parameters to full ones, in one exchange.

        Its gradient is this process's pieces of the sum of the gradients.
        """
        size, rank, group = self.process_group.size, self.process_group.rank, self.group
        piece_shapes = [(self._rows(shape[0]), *shape[1:]) for shape in shapes]
        edges = np.cumsum([int(np.prod(shape)) for shape in piece_shapes])[:-1].tolist()

        @mx.custom_function
        def gather(pieces: list[mx.array]) -> list[mx.array]:
            row = mx.concatenate([piece.reshape(1, -1) for piece in pieces], axis=1)
            columns = mx.split(mx.distributed.all_gather(row, group=group), edges, axis=1)
            return [column.reshape(-1, *shape[1:])[: shape[0]] for column, shape in zip(columns, shapes, strict=True)]

        @gather.vjp
        def sum_and_split(pieces: list[mx.array], cotangents: list[mx.array], _: Any) -> list[mx.array]:
            rows = mx.concatenate([_padded(c, size).reshape(size, -1) for c in cotangents], axis=1)
            if self.has_sum_scatter:
                row = mx.distributed.sum_scatter(rows, group=group).reshape(-1)
            else:
                row = mx.distributed.all_sum(rows, group=group)[rank]
            return [piece.reshape(shape) for piece, shape in zip(mx.split(row, edges), piece_shapes, strict=True)]

        return gather

    def _piece(self, array: mx.array) -> mx.array:
        size = self.process_group.size
        return mx.contiguous(mx.split(_padded(array, size), size)[self.process_group.rank])


def _padded(array: mx.array, size: int) -> mx.array:
    """Returns the array with zeros appended until its first axis is a multiple of `size`."""
    missing = -array.shape[0] % size
    return mx.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array
