"""Several processes that train one model, PyTorch. The mirror is `icenet/engine/distributed.py`.

Each computes the gradients of its rows, and they are added up: with all parameters in every process (data parallel,
`DistributedDataParallel`), or with each process keeping a part of every parameter and of the optimizer's state
(sharded, `torch.distributed.fsdp.fully_shard`).
"""

from __future__ import annotations

import atexit
import contextlib
import inspect
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from icenet.core.config.custom import is_custom
from icenet.core.distributed import launch, processes
from icenet.core.errors import BackendError, UsageError
from icenet_torch.nn.norm import running_statistics, set_running_statistics


class ProcessGroup:
    """The processes; see `icenet.core.distributed.processes.ProcessGroup`. A group of one does nothing."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size = rank, size
        self.group = group
        self.stop: str | None = None
        self.shards: Shards | None = None
        self._parallel: Any = None

    @property
    def device(self) -> torch.device:
        """Where the group's tensors have to be."""
        return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def gather(self, numbers: Sequence[float]) -> np.ndarray:
        own = torch.tensor([list(numbers)], dtype=torch.float64)
        if self.size == 1:
            return own.numpy()
        return self._gather(own.to(self.device)).cpu().numpy()

    # ---- the model ---------------------------------------------------------------------------------------

    def broadcast_or_shard(self, model: Any, sharded: bool) -> None:
        """Makes the model that of all processes: the same values everywhere or, sharded, a part of them in each."""
        if self.size == 1:
            return
        # the initial values that a model of the user's own drew are those of the first process
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        if sharded:
            self.shards = Shards(model, self)

    def callable(self, model: Any) -> Any:
        """What to call to compute the model with gradients, which are averaged over the processes."""
        if self.size == 1 or self.shards is not None:
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # running statistics are averaged where they are needed, not those of the first process everywhere
            names = inspect.signature(nn.parallel.DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
            self._parallel = nn.parallel.DistributedDataParallel(
                model, init_sync=False, find_unused_parameters=is_custom(model.config.type), **{buffers: False}
            )
        return self._parallel

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """The forward and backward pass of a micro-batch; gradients are exchanged after the last one only."""
        with contextlib.nullcontext() if last or self._parallel is None else self._parallel.no_sync():
            yield

    def fitted(self, model: Any) -> Any:
        """The model, or this process's part of its parameters, as an optimizer takes it."""
        return model if self.shards is None else self.shards

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

    def all_reduce_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Turns what the backward pass left at the parameters into the gradients summed over the processes."""
        if self.shards is not None:
            self.shards.take_gradients()
        elif self._parallel is not None:
            torch._foreach_mul_([p.grad for p in parameters.values() if p.grad is not None], self.size)

    def all_reduce_loss(self, loss: Tensor) -> Tensor:
        """The loss summed over the processes, and how many each of `processes.SIGNALS` asks to stop: `[1 + S]`.

        One process alone gives its loss as it is.
        """
        if self.size == 1:
            return loss
        asked = torch.tensor(processes.asked(self.stop), dtype=loss.dtype, device=loss.device)
        return self._sum(torch.cat([loss.reshape(1), asked]))

    def all_reduce_norms(self, norm: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """The norms of whole gradients, together and each, from those of this process's parts."""
        if self.shards is None:
            return norm, norms
        squares = self._sum(norms.square())
        return squares.sum().sqrt(), squares.sqrt()

    def average_statistics(self, model: Any) -> None:
        """Gives the batch norms the mean of the processes' running statistics.

        They move linearly, so it is the same whether they are averaged after every step or when they are needed.
        """
        values = running_statistics(model)
        if self.size > 1 and values:
            set_running_statistics(model, [self._sum(value.clone()) / self.size for value in values])

    def _sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def _gather(self, tensor: Tensor) -> Tensor:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return torch.cat(found)


def read_loss(process_group: ProcessGroup, added: Tensor) -> tuple[float, str | None]:
    """What `ProcessGroup.all_reduce_loss` gave: the loss, and what asks all processes to stop."""
    if process_group.size == 1:
        return added.item(), None
    loss, *asked = added.tolist()
    return loss, processes.asked_for(asked)


def join(device: str = "auto") -> ProcessGroup:
    """This process's group; it waits for the others that a launcher started.

    Args:
        device: as in the configuration; it decides what carries PyTorch's tensors.

    Raises:
        BackendError: they are not there, or their launcher is not PyTorch's.
    """
    place = launch.place_for("torch")
    if place is None:
        return ProcessGroup()
    if not dist.is_initialized():
        if device != "cpu" and torch.backends.mps.is_available():
            raise BackendError("PyTorch's processes cannot share a Mac's GPU: --backend mlx, started with mlx.launch")
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(place.local_rank)
        try:
            dist.init_process_group("nccl" if cuda else "gloo")
        except (RuntimeError, ValueError) as error:
            first = next(iter(str(error).splitlines()), "")
            raise BackendError(launch.not_met(place, first)) from error
        atexit.register(_leave)
    return ProcessGroup(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    # gloo's threads need the interpreter to let go of the last tensors, and end the process where it has gone
    time.sleep(0.1)
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(name: str) -> str:
    """The device of this process: of several on one machine each takes a GPU of its own."""
    place = launch.place_for("torch")
    if place is None or not torch.cuda.is_available() or name == "cpu":
        return name
    if ":" in name:
        raise UsageError(f"--device {name}: each process takes a GPU of its own; say --device cuda")
    return f"cuda:{place.local_rank}"


# ---- sharding ---------------------------------------------------------------------------------------------


class Shards:
    """A model's parameters cut along their first axis, of which each process keeps one piece.

    `fully_shard` (Zhao et al., "PyTorch FSDP", 2023) puts the parameters of each block, and of the model for what is
    in none, together when it is called and lets go of them when it returns. `parameters` are this process's pieces as
    plain tensors, on which any optimizer works that fits each value by itself.
    """

    def __init__(self, model: Any, process_group: ProcessGroup) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.process_group = process_group
        self.shapes: dict[str, tuple[int, ...]] = {}
        kinds = model.layer_kinds()
        for path, parameter in model.named_parameters():
            processes.check_cut(path, parameter.ndim, kinds)
            self.shapes[path] = tuple(parameter.shape)
        mesh = init_device_mesh(process_group.device.type, (process_group.size,))
        units = _units(model)
        for unit in reversed(units):
            # else the outermost unit keeps what an evaluation put together, averaged weights maybe, for the next step
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
            if not hasattr(unit, "set_force_sum_reduction_for_comms"):
                raise BackendError("training.sharded needs PyTorch 2.8 or later: pip install -U torch")
            unit.set_gradient_divide_factor(1.0)  # a sum, not a mean
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        # it warns of outputs that are views, which nothing here changes in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        self.sources = {path: p for path, p in model.named_parameters() if p.requires_grad}
        self.parameters = {path: nn.Parameter(p.detach().to_local()) for path, p in self.sources.items()}
        self.config, self.layer_kinds = model.config, model.layer_kinds

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As a module has it, so that it can stand in for the model."""
        return iter(self.parameters.items())

    def take_gradients(self) -> None:
        """Moves the gradients of the parameters that are spread, summed over the processes, to this one's pieces."""
        for path, source in self.sources.items():
            if source.grad is not None:
                self.parameters[path].grad, source.grad = source.grad.to_local(), None

    def local_shard(self, name: str, array: np.ndarray) -> np.ndarray:
        length = self._length(name)
        if length is None:
            return array
        each = -(-length // self.process_group.size)
        return array[self.process_group.rank * each : (self.process_group.rank + 1) * each]

    def gather_full(self, name: str, array: np.ndarray) -> np.ndarray:
        length = self._length(name)
        if length is None:
            return array
        filled = np.zeros((-(-length // self.process_group.size), *array.shape[1:]), array.dtype)
        filled[: len(array)] = array
        return (
            self.process_group._gather(torch.from_numpy(filled).to(self.process_group.device)).cpu().numpy()[:length]
        )

    def _length(self, name: str) -> int | None:
        """The first axis of a parameter or its slot; None of what is not cut."""
        shape = self.shapes.get(name) or self.shapes.get(name.rpartition(".")[0])
        return shape[0] if shape else None


def _units(model: Any) -> list[nn.Module]:
    """What is put together and let go of as one, the innermost last.

    The blocks of the models that we know; a model of the user's own as a whole, since nobody knows how it is called.
    """
    blocks: list[nn.Module] = []
    if not is_custom(model.config.type):
        lists = [part for part in model.children() if isinstance(part, nn.ModuleList)]
        blocks = [part for parts in lists for part in parts if next(part.parameters(), None) is not None]
    return [model, *blocks]
