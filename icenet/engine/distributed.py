"""Several processes that train one model, MLX. The mirror is `icenet_torch/engine/distributed.py`.

Each computes the gradients of its rows, and they are added up: with all parameters in every process (data parallel),
or with each process keeping a part of every parameter and of the optimizer's state (sharded).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from icenet.core.config.custom import is_custom
from icenet.core.distributed import launch, processes
from icenet.core.errors import BackendError
from icenet.nn.norm import running_statistics, set_running_statistics


class ProcessGroup:
    """The processes; see `icenet.core.distributed.processes.ProcessGroup`. A group of one does nothing."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size = rank, size
        self.group = group
        self.stop: str | None = None
        self.shards: Shards | None = None

    def gather(self, numbers: Sequence[float]) -> np.ndarray:
        own = np.array([numbers], np.float64)
        if self.size == 1:
            return own
        # as bytes: a GPU has no float64
        words = mx.distributed.all_gather(mx.array(own.view(np.uint32)), group=self.group)
        return np.array(words).view(np.float64)

    # ---- the model ---------------------------------------------------------------------------------------

    def broadcast_or_shard(self, model: Any, sharded: bool) -> None:
        """Makes the model that of all processes: the same values everywhere or, sharded, a part of them in each."""
        if self.size == 1:
            return
        # the initial values that a model of the user's own drew are those of the first process
        own = dict(tree_flatten(model.parameters()))
        first = {path: self._sum(a if self.rank == 0 else mx.zeros_like(a)) for path, a in own.items()}
        model.update(tree_unflatten(list(first.items())))
        mx.eval(model.parameters())
        if sharded:
            self.shards = Shards(model, self)

    def callable(self, model: Any) -> Any:
        """What to call to compute the model with gradients; `all_reduce_gradients` sums them over the processes."""
        return model

    def gather_full(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All of the parameters of which this process has parts, canonical, by `PATH` or `PATH.SLOT`.

        All processes must ask at once.
        """
        return {
            name: self.shards.gather_full(name, array) if self.shards else array for name, array in arrays.items()
        }

    def local_shard(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This process's parts of whole parameters; the reverse of `gather_full`."""
        return {
            name: self.shards.local_shard(name, array) if self.shards else array for name, array in arrays.items()
        }

    # ---- a step ------------------------------------------------------------------------------------------

    def all_reduce_gradients(self, gradients: Any) -> Any:
        """The gradients summed over the processes."""
        if self.size == 1 or self.shards is not None:  # shards are summed as they are taken
            return gradients
        averaged = nn.average_gradients(gradients, self.group)
        return tree_map(lambda gradient: gradient * self.size, averaged)

    def all_reduce_loss(self, loss: mx.array) -> mx.array:
        """The loss summed over the processes, and how many each of `processes.SIGNALS` asks to stop: `[1 + S]`.

        One process alone gives its loss as it is.
        """
        if self.size == 1:
            return loss
        asked = mx.array(processes.asked(self.stop), mx.float32)
        return self._sum(mx.concatenate([loss.reshape(1).astype(mx.float32), asked]))

    def all_reduce_norms(self, norm: mx.array, norms: mx.array) -> tuple[mx.array, mx.array]:
        """The norms of whole gradients, together and each, from those of this process's parts."""
        if self.shards is None:
            return norm, norms
        squares = self._sum(mx.square(norms))
        return mx.sqrt(squares.sum()), mx.sqrt(squares)

    def average_statistics(self, model: Any) -> None:
        """Gives the batch norms the mean of the processes' running statistics.

        They move linearly, so it is the same whether they are averaged after every step or when they are needed.
        """
        values = running_statistics(model)
        if self.size > 1 and values:
            means = [self._sum(value) / self.size for value in values]
            mx.eval(means)  # by all at this moment, whoever looks at them later
            set_running_statistics(model, means)

    def _sum(self, array: mx.array) -> mx.array:
        return mx.distributed.all_sum(array, group=self.group)


def read_loss(process_group: ProcessGroup, added: Any) -> tuple[float, str | None]:
    """What `ProcessGroup.all_reduce_loss` gave: the loss, and what asks all processes to stop."""
    if process_group.size == 1:
        return float(np.array(added)), None
    loss, *asked = np.array(added).tolist()
    return loss, processes.asked_for(asked)


_joined: list[ProcessGroup] = []


def join(device: str = "auto") -> ProcessGroup:
    """This process's group; it waits for the others that a launcher started.

    Args:
        device: as in the configuration; it decides what carries PyTorch's tensors.

    Raises:
        BackendError: they are not there, or their launcher is not MLX's.
    """
    if not _joined:
        place = launch.place_for("mlx")
        if place is None:
            return ProcessGroup()
        try:
            group = mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            first = next(iter(str(error).splitlines()), "")
            raise BackendError(launch.not_met(place, first)) from error
        if group.size() != place.size:
            raise BackendError(launch.not_met(place, f"MLX has no way here to what {place.launcher} started"))
        _joined.append(ProcessGroup(group.rank(), group.size(), group))
    return ProcessGroup(_joined[0].rank, _joined[0].size, _joined[0].group)


def own_device(name: str) -> str:
    """The device of this process; `mlx.launch` shows each process one GPU."""
    return name


# ---- sharding ---------------------------------------------------------------------------------------------


class Shards:
    """A model's parameters cut along their first axis, of which each process keeps one piece.

    Each block of the model, and the model for what is in none, puts its parameters together when it is called and
    lets go of them when it returns; in the backward pass each process gets the sum of all gradients for its piece.
    Pieces are of one size, the last filled up with zeros, which have no gradient and stay.

    It is `mlx.nn.fully_shard` for any first axis (a vocabulary of 257), which leaves running statistics and the
    names of parameters as they are and works over the ring, where MLX has no `sum_scatter`. As PyTorch's does, it
    changes the class of modules in place. (Zhao et al., "PyTorch FSDP", 2023.)
    """

    def __init__(self, model: Any, process_group: ProcessGroup) -> None:
        self.process_group = process_group
        self.shapes: dict[str, tuple[int, ...]] = {}
        kinds = model.layer_kinds()
        for path, array in tree_flatten(model.trainable_parameters()):
            processes.check_cut(path, array.ndim, kinds)
            self.shapes[path] = array.shape
        self.scatters = self._scatters()
        units = _units(model)
        for prefix, module in units.items():
            within = tuple(other for other in units if other != prefix and other.startswith(prefix))
            self._cut(module, prefix, within)
        mx.eval(model.parameters())

    def _scatters(self) -> bool:
        try:
            mx.eval(mx.distributed.sum_scatter(mx.zeros((self.process_group.size,)), group=self.process_group.group))
        except RuntimeError:
            return False
        return True

    def _cut(self, module: nn.Module, prefix: str, within: tuple[str, ...]) -> None:
        own = {
            path: array
            for path, array in tree_flatten(module.trainable_parameters())
            if not (prefix + path).startswith(within)
        }
        if not own:
            return
        module.update(tree_unflatten([(path, self._piece(array)) for path, array in own.items()]))
        paths = list(own)
        put_together = self._gatherer([self.shapes[prefix + path] for path in paths])
        plain = type(module)

        class Sharded(plain):  # type: ignore[valid-type, misc]
            def __call__(self, *inputs: Any, **options: Any) -> Any:
                held = dict(tree_flatten(self.parameters()))
                pieces = [held[path] for path in paths]
                self.update(tree_unflatten(list(zip(paths, put_together(pieces), strict=True))))
                try:
                    return super().__call__(*inputs, **options)
                finally:
                    self.update(tree_unflatten(list(zip(paths, pieces, strict=True))))

        Sharded.__name__, Sharded.__qualname__ = plain.__name__, plain.__qualname__
        module.__class__ = Sharded

    def _gatherer(self, shapes: list[tuple[int, ...]]) -> Any:
        """A function from pieces of parameters to whole ones, in one exchange; its gradient sums and cuts."""
        size, rank, group = self.process_group.size, self.process_group.rank, self.process_group.group
        padded = [(-(-shape[0] // size), *shape[1:]) for shape in shapes]
        lengths = [int(np.prod(shape)) for shape in padded]
        edges = np.cumsum(lengths)[:-1].tolist()

        @mx.custom_function
        def gather(pieces: list[mx.array]) -> list[mx.array]:
            row = mx.concatenate([piece.reshape(1, -1) for piece in pieces], axis=1)
            columns = mx.split(mx.distributed.all_gather(row, group=group), edges, axis=1)
            return [column.reshape(-1, *shape[1:])[: shape[0]] for column, shape in zip(columns, shapes, strict=True)]

        @gather.vjp
        def sums(pieces: list[mx.array], cotangents: list[mx.array], _: Any) -> list[mx.array]:
            rows = mx.concatenate([_filled(c, size).reshape(size, -1) for c in cotangents], axis=1)
            if self.scatters:
                row = mx.distributed.sum_scatter(rows, group=group).reshape(-1)
            else:
                row = mx.distributed.all_sum(rows, group=group)[rank]
            return [part.reshape(shape) for part, shape in zip(mx.split(row, edges), padded, strict=True)]

        return gather

    def _piece(self, array: mx.array) -> mx.array:
        size = self.process_group.size
        return mx.contiguous(mx.split(_filled(array, size), size)[self.process_group.rank])

    def local_shard(self, name: str, array: np.ndarray) -> np.ndarray:
        return array if self._length(name) is None else np.array(self._piece(mx.array(array)))

    def gather_full(self, name: str, array: np.ndarray) -> np.ndarray:
        length = self._length(name)
        if length is None:
            return array
        return np.array(mx.distributed.all_gather(mx.array(array), group=self.process_group.group))[:length]

    def _length(self, name: str) -> int | None:
        """The first axis of a parameter or its slot, which is the canonical form's too; None of what is not cut."""
        shape = self.shapes.get(name) or self.shapes.get(name.rpartition(".")[0])
        return shape[0] if shape else None


def _filled(array: mx.array, size: int) -> mx.array:
    """An array whose first axis can be cut into `size` parts, with zeros at its end."""
    more = -array.shape[0] % size
    return mx.pad(array, [(0, more)] + [(0, 0)] * (array.ndim - 1)) if more else array


def _units(model: Any) -> dict[str, nn.Module]:
    """What is put together and let go of as one, by the beginning of its paths, the innermost last.

    The blocks of the models that we know; a model of the user's own as a whole, since nobody knows how it is called.
    """
    blocks: dict[str, nn.Module] = {}
    if not is_custom(model.config.type):
        for name, parts in model.children().items():
            if isinstance(parts, list):
                blocks |= {f"{name}.{index}.": part for index, part in enumerate(parts)}
    return {"": model, **blocks}
