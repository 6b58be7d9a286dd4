"""PyTorch's part of `icenet bench`: memory, rates, a loop, dropout. The mirror is `icenet/tools/bench.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from icenet.core.config import Config
from icenet.core.engine import Batch
from icenet.core.engine.parameter_groups import weight_decay
from icenet.core.report import resident_memory
from icenet_torch.engine.build import build_model, choose_device
from icenet_torch.engine.engine import Engine
from icenet_torch.models import BaseModel
from icenet_torch.nn.arrays import DTYPES, is_half, to_channels_first
from icenet_torch.nn.dropout import Dropout


class PeakMemory:
    """Measures the peak memory of this process on a device, above the memory in use before.

    Args:
        device: The device.
        settle: Called before each reading: computes or frees what is not a part of the measurement.

    Attributes:
        source: The origin of the numbers, for reports.
    """

    def __init__(self, device: torch.device, settle: Callable[[], Any] = lambda: None) -> None:
        self._device = device
        self._settle = settle
        self._resident = resident_memory.ResidentMemory()
        self.source = {"cuda": "PyTorch's own counter", "mps": "memory of the Metal driver at the end"}.get(
            device.type, resident_memory.SOURCE
        )

    def begin(self) -> None:
        """Starts a measurement, after freeing what is kept for reuse."""
        self._settle()
        synchronize(self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif self._device.type == "mps":
            torch.mps.empty_cache()
            self._before = torch.mps.driver_allocated_memory()
        else:
            self._resident.begin()

    def growth(self) -> int:
        """Returns the peak since `begin` minus the memory in use at `begin`, in bytes."""
        self._settle()
        synchronize(self._device)
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        if self._device.type == "mps":
            return max(torch.mps.driver_allocated_memory() - self._before, 0)
        return self._resident.growth()


class Gauge(PeakMemory):
    """Measures the peak memory of an engine's step, above the memory in use before it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.model.device, lambda: engine.optimizer.zero_grad(set_to_none=True))


def synchronize(device: torch.device) -> None:
    """Waits until all submitted work of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matrix_product(size: int, dtype: str, device: torch.device) -> Callable[[int], None]:
    """Returns a function that computes a product of two matrices `[size, size]` a number of times, and waits for it.

    Args:
        size: Number of rows and columns.
        dtype: fp32, bf16 or fp16.
        device: The device.
    """
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn((size, size), generator=generator).to(device, DTYPES[dtype]) for _ in range(2)]

    def run(count: int) -> None:
        for _ in range(count):
            values[0] @ values[1]
        synchronize(device)

    return run


def memory_copy(nbytes: int, device: torch.device) -> Callable[[int], None]:
    """Returns a function that reads `nbytes` bytes and writes as many, a number of times, and waits for it."""
    values = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(values)

    def run(count: int) -> None:
        for _ in range(count):
            target.copy_(values)
        synchronize(device)

    return run


class BareLoop:
    """A minimal training loop as a user of PyTorch writes it: model, loss, AdamW and clipping."""

    def __init__(self, config: Config, device: str) -> None:
        training = config.training
        self.model = use_native_dropout(build_model(config, device, seed=config.seed))
        self.model.compute_dtype = DTYPES[training.mixed_precision]
        self.model.gradient_checkpointing = training.gradient_checkpointing
        self.model.train()
        self._call = torch.compile(self.model) if config.model.compile_model else self.model
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay(training)}, {"params": vectors, "weight_decay": 0.0}],
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.eps,
        )
        self._max_grad_norm = training.max_grad_norm

    def run(self, batches: list[Batch]) -> None:
        """Trains one step per batch, and waits for the device at the end."""
        with self.model.arithmetic():
            self._run(batches)

    def _run(self, batches: list[Batch]) -> None:
        device = self.model.device
        for batch in batches:
            inputs, labels = (torch.from_numpy(batch[name]).to(device) for name in ("inputs", "labels"))
            inputs = to_channels_first(inputs) if inputs.ndim == 4 else inputs
            masks = ["attention_mask"] if "attention_mask" in batch else []
            options = {name: torch.from_numpy(batch[name]).to(device) for name in masks}
            logits = self._call(inputs, **options)
            logits = logits.float() if is_half(logits) else logits  # as torch.autocast does
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self._max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
            self.optimizer.step()
        self.synchronize()

    def synchronize(self) -> None:
        """Waits for the device."""
        synchronize(self.model.device)


def use_native_dropout(model: BaseModel) -> BaseModel:
    """Turns the dropout layers of a model into the framework's own, in place, and returns the model."""
    for module in model.modules():
        if type(module) is Dropout:
            object.__setattr__(module, "__class__", nn.Dropout)
    return model


class DropoutPair:
    """The framework's own dropout and the keyed dropout, on the same random input.

    Args:
        shape: Shape of the input.
        p: Probability of zeroing an element.
        keys: Keys of the keyed dropout, uint32 `[rows, 2]`.
        device: auto, cpu, gpu, ...

    Attributes:
        device: The chosen device.
    """

    def __init__(self, shape: tuple[int, ...], p: float, keys: np.ndarray, device: str) -> None:
        self._device = choose_device(device)
        self.device = str(self._device)
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(shape, generator=generator).to(self._device).requires_grad_()
        self._cotangent = torch.randn(shape, generator=generator).to(self._device)
        self._p = p
        self._keyed = Dropout(p)
        self._keys = torch.from_numpy(keys.view(np.int32)).to(self._device)

    def native(self, backward: bool) -> Any:
        """Returns the output of the framework's dropout, or with `backward` the gradient of the input."""
        return self._evaluate(F.dropout(self._x, self._p, True), backward)

    def keyed(self, backward: bool) -> Any:
        """Returns the output of the keyed dropout, or with `backward` the gradient of the input."""
        self._keyed.seed(self._keys)
        return self._evaluate(self._keyed(self._x), backward)

    def _evaluate(self, y: torch.Tensor, backward: bool) -> Any:
        if not backward:
            return y.detach()
        self._x.grad = None
        y.backward(self._cotangent)
        return self._x.grad

    def synchronize(self) -> None:
        """Waits for the device."""
        synchronize(self._device)
