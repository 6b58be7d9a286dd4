"""Several processes that train one model, PyTorch. The mirror is `icenet/engine/distributed.py`.

Each process computes the gradients of its rows, and they are summed. Either every process holds all parameters (data
parallelism, `DistributedDataParallel`), or each holds a shard of every parameter and of its optimizer state
(`training.sharded`, `torch.distributed.fsdp.fully_shard`).
"""

from __future__ import annotations

import atexit
import contextlib
import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from icenet.core.config.custom import is_custom
from icenet.core.distributed import launch, processes
from icenet.core.errors import BackendError, UsageError
from icenet.core.messages import first_line
from icenet_torch.models import BaseModel


class ProcessGroup(processes.ProcessGroup):
    """See `icenet.core.distributed.processes.ProcessGroup`."""

    shards: Shards | None

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        super().__init__(rank, size)
        self._parallel: Any = None

    @property
    def device(self) -> torch.device:
        """The device of the tensors that the group exchanges."""
        return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def broadcast_or_shard(self, model: BaseModel, sharded: bool) -> None:
        if self.size == 1:
            return
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        if sharded:
            self.shards = Shards(model, self)

    def parallel(self, model: BaseModel) -> Callable[..., Tensor]:
        """Returns the callable that computes the model in training. Data-parallel gradients are then averaged."""
        if self.size == 1 or self.shards is not None:
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # running statistics are averaged when they are needed, instead of copied from rank 0 in every pass
            names = inspect.signature(nn.parallel.DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
            self._parallel = nn.parallel.DistributedDataParallel(
                model, init_sync=False, find_unused_parameters=is_custom(model.config.type), **{buffers: False}
            )
        return self._parallel

    def local_parameters(self, model: BaseModel) -> Any:
        """Returns the model or, if it is sharded, the `Shards` with this process's pieces of its parameters."""
        return model if self.shards is None else self.shards

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Computes the passes of a micro-batch without an exchange of gradients, unless it is the last one."""
        with contextlib.nullcontext() if last or self._parallel is None else self._parallel.no_sync():
            yield

    def all_gather(self, array: np.ndarray) -> np.ndarray:
        own = torch.from_numpy(array).to(self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return torch.cat(found).cpu().numpy()

    def all_reduce_gradients(self, gradients: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        if self.shards is not None:
            self.shards.take_gradients()
        elif self._parallel is not None:
            torch._foreach_mul_([p.grad for p in gradients.values() if p.grad is not None], self.size)
        for p in gradients.values():
            if p.grad is None:  # a parameter that a user's model did not use has a gradient of zero, as in MLX
                p.grad = torch.zeros_like(p)
        return {path: p.grad for path, p in gradients.items()}

    def _all_sum(self, array: Tensor) -> Tensor:
        dist.all_reduce(array)
        return array

    def _append(self, scalar: Tensor, numbers: Sequence[float]) -> Tensor:
        return torch.cat([scalar.reshape(1), torch.tensor(numbers, dtype=scalar.dtype, device=scalar.device)])


def join(device: str = "auto") -> ProcessGroup:
    """Returns a new group of this process, after it has connected to the others that a launcher started.

    Args:
        device: Device, as in the configuration. It selects the communication library of PyTorch.

    Raises:
        BackendError: The other processes are not reachable, or their launcher is not PyTorch's.
    """
    launched = launch.detect_for("torch")
    if launched is None:
        return ProcessGroup()
    if not dist.is_initialized():
        if device != "cpu" and torch.backends.mps.is_available():
            raise BackendError(
                "PyTorch's processes cannot share the GPU of a Mac: use --backend mlx, started with mlx.launch"
            )
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(launched.local_rank)
        try:
            dist.init_process_group("nccl" if cuda else "gloo")
        except (RuntimeError, ValueError) as error:
            raise launch.connection_error(launched, first_line(error, "")) from error
        atexit.register(_leave)
    return ProcessGroup(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    # gloo's threads need the interpreter to release the last tensors, and crash if it has ended
    time.sleep(0.1)
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(name: str) -> str:
    """Returns the device of this process: with CUDA, the GPU of its local rank."""
    launched = launch.detect_for("torch")
    if launched is None or not torch.cuda.is_available() or name == "cpu":
        return name
    if ":" in name:
        raise UsageError(f"--device {name}: each process uses the GPU of its own rank; use --device cuda")
    return f"cuda:{launched.local_rank}"


# ---- sharding ---------------------------------------------------------------------------------------------


class Shards(processes.Shards):
    """The parameters of a model, split along their first axis, of which each process holds one piece.

    `fully_shard` (Zhao et al., "PyTorch FSDP", 2023) gathers the parameters of each unit of the model (a block, or
    the model for parameters outside of blocks) when it is called and releases them when it returns. `parameters` are
    this process's pieces as plain tensors, which any elementwise optimizer can update.

    Optimizer and weight average use it in place of the model: it has `named_parameters`, `layer_kinds` and `config`.
    """

    def __init__(self, model: BaseModel, process_group: ProcessGroup) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        parameters = dict(model.named_parameters())
        super().__init__(model, parameters, process_group)
        mesh = init_device_mesh(process_group.device.type, (process_group.size,))
        for parameter in parameters.values():
            parameter.data = parameter.data.contiguous()  # fully_shard takes no other memory format
        for path in reversed(processes.unit_paths(model, parameters)):
            unit = model.get_submodule(path)
            # by default the outermost unit keeps what an evaluation gathered, perhaps averaged weights, for training
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
            if not hasattr(unit, "set_force_sum_reduction_for_comms"):
                raise BackendError("training.sharded needs PyTorch 2.8 or later: pip install -U torch")
            unit.set_gradient_divide_factor(1.0)  # a sum, not a mean
            unit.set_force_sum_reduction_for_comms(True)  # the only reduction of gloo
        # it warns of outputs that are views, which are never changed in place here
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        self.sources = {path: p for path, p in model.named_parameters() if p.requires_grad}
        self.parameters = {path: nn.Parameter(p.detach().to_local()) for path, p in self.sources.items()}
        self.config, self.layer_kinds = model.config, model.layer_kinds

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields this process's pieces by path."""
        return iter(self.parameters.items())

    def take_gradients(self) -> None:
        """Moves the summed gradients of the model's parameters to this process's pieces."""
        for path, source in self.sources.items():
            if source.grad is not None:
                self.parameters[path].grad, source.grad = source.grad.to_local(), None
