"""What `icenet bench` needs of PyTorch. The mirror is `icenet/tools/bench.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from icenet.core.config import Config
from icenet.core.engine import Batch
from icenet.core.report import resident_memory
from icenet.core.training.parameter_groups import weight_decay
from icenet_torch.engine.build import build_model, choose_device
from icenet_torch.engine.engine import Engine
from icenet_torch.models import BaseModel
from icenet_torch.nn.arrays import is_half, to_channels_first
from icenet_torch.nn.dropout import Dropout


def synchronize(device: torch.device) -> None:
    """Waits for what a device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Gauge:
    """The most memory that an engine's step took, beyond what was there before it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._device = engine.model.device
        self._resident = resident_memory.ResidentMemory()
        self.source = {"cuda": "PyTorch's own count", "mps": "what Metal's driver had given at the end"}.get(
            self._device.type, resident_memory.SOURCE
        )

    def begin(self) -> None:
        """From now on; what an earlier step left is given back."""
        self._engine.optimizer.zero_grad(set_to_none=True)
        synchronize(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._held = torch.cuda.memory_allocated(self._device)
        elif self._device.type == "mps":
            torch.mps.empty_cache()
            self._held = torch.mps.driver_allocated_memory()
        else:
            self._resident.begin()

    def growth(self) -> int:
        """Bytes."""
        synchronize(self._device)
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._held
        if self._device.type == "mps":
            return max(torch.mps.driver_allocated_memory() - self._held, 0)
        return self._resident.growth()


class BareLoop:
    """A minimal training loop as a user of PyTorch writes it: model, loss, AdamW, clipping, and nothing else."""

    def __init__(self, config: Config, device: str) -> None:
        training = config.training
        self.model = with_own_dropouts(build_model(config, device, seed=config.seed))
        self.model.compute_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            training.mixed_precision
        ]
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
        self._limit = training.max_grad_norm

    def run(self, batches: list[Batch]) -> None:
        """One step a batch; what was asked of the device is done when it returns."""
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
            if self._limit is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self._limit)
            self.optimizer.step()
        self.synchronize()

    def synchronize(self) -> None:
        """Waits for the device."""
        synchronize(self.model.device)


def with_own_dropouts(model: BaseModel) -> BaseModel:
    """The model with the framework's own dropout in place of ours."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, Dropout):
            parent, _, name = path.rpartition(".")
            setattr(modules[parent], name, nn.Dropout(module.p))
    return model


class DropoutPair:
    """The framework's own dropout and the keyed one, on the same values."""

    def __init__(self, shape: tuple[int, ...], p: float, keys: np.ndarray, device: str) -> None:
        self._device = choose_device(device)
        self.device = str(self._device)
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(shape, generator=generator).to(self._device).requires_grad_()
        self._cotangent = torch.randn(shape, generator=generator).to(self._device)
        self._p = p
        self._keyed = Dropout(p)
        self._keyed.seed(torch.from_numpy(keys.view(np.int32)).to(self._device))

    def own(self, backward: bool) -> Any:
        """The values, or with `backward` their gradient."""
        return self._finished(F.dropout(self._x, self._p, True), backward)

    def keyed(self, backward: bool) -> Any:
        """The same of the keyed one."""
        return self._finished(self._keyed(self._x), backward)

    def _finished(self, y: torch.Tensor, backward: bool) -> Any:
        if not backward:
            return y.detach()
        self._x.grad = None
        y.backward(self._cotangent)
        return self._x.grad

    def synchronize(self) -> None:
        """Waits for the device."""
        synchronize(self._device)
