"""What `icenet bench` needs of MLX. The mirror is `icenet_torch/tools/bench.py`."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from icenet.core.config import Config
from icenet.core.engine import Batch
from icenet.core.training.parameter_groups import weight_decay
from icenet.engine.engine import Engine, build_model, choose_device
from icenet.models import BaseModel
from icenet.nn.arrays import is_half, on_cpu
from icenet.nn.dropout import Dropout, seed_dropouts


def synchronize() -> None:
    """Waits for what the device was given to do."""
    mx.synchronize()


class Gauge:
    """The most memory that an engine's step took, beyond what was there before it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.source = "MLX's own count"

    def begin(self) -> None:
        """From now on; what an earlier step left is given back."""
        mx.eval(self._engine.model.parameters(), self._engine.optimizer.state)
        synchronize()
        mx.clear_cache()
        self._held = mx.get_active_memory()
        mx.reset_peak_memory()

    def growth(self) -> int:
        """Bytes."""
        mx.eval(self._engine.model.parameters(), self._engine.optimizer.state)
        synchronize()
        return max(mx.get_peak_memory() - self._held, 0)


class BareLoop:
    """A minimal training loop as a user of MLX writes it: model, loss, AdamW, clipping, and nothing else."""

    def __init__(self, config: Config, device: str) -> None:
        training = config.training
        self.model = with_own_dropouts(build_model(config, device))
        self.model.compute_dtype = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}[
            training.mixed_precision
        ]
        self.model.gradient_checkpointing = training.gradient_checkpointing
        self.model.train()
        self.optimizer = optim.AdamW(
            training.learning_rate,
            betas=[training.beta1, training.beta2],
            eps=training.eps,
            weight_decay=weight_decay(training),
            bias_correction=True,
        )
        self._limit = training.max_grad_norm
        self._differentiate = nn.value_and_grad(self.model, self._loss)
        self._step: Any = self._update
        if config.model.compile_model:
            self.optimizer.init(self.model.trainable_parameters())
            state = [self.model.state, self.optimizer.state, mx.random.state]
            self._step = mx.compile(self._update, inputs=state, outputs=state)

    def run(self, batches: list[Batch]) -> None:
        """One step a batch; what was asked of the device is done when it returns."""
        for batch in batches:
            inputs, labels = (mx.array(batch[name]) for name in ("inputs", "labels"))
            masks = ["attention_mask"] if "attention_mask" in batch else []
            options = {name: mx.array(batch[name]) for name in masks}
            loss = self._step(inputs, labels, options)
            mx.eval(loss, self.model.parameters(), self.optimizer.state)
        self.synchronize()

    def _update(self, inputs: mx.array, labels: mx.array, options: dict[str, mx.array]) -> mx.array:
        loss, gradients = self._differentiate(inputs, labels, options)
        if self._limit is not None:
            gradients, _ = optim.clip_grad_norm(gradients, self._limit)
        self.optimizer.update(self.model, gradients)
        return loss

    def _loss(self, inputs: mx.array, labels: mx.array, options: dict[str, mx.array]) -> mx.array:
        logits = self.model(inputs, **options)
        logits = logits.astype(mx.float32) if is_half(logits) else logits
        if not options:
            return nn.losses.cross_entropy(logits, labels, reduction="mean")
        counted = labels >= 0  # of rows that are filled up
        losses = nn.losses.cross_entropy(logits, mx.where(counted, labels, 0), weights=counted)
        return losses.sum() / counted.sum()

    def synchronize(self) -> None:
        """Waits for the device."""
        synchronize()


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
        mx.set_default_device(choose_device(device))
        self.device = "cpu" if on_cpu() else "gpu"
        self._x = mx.random.normal(shape, key=mx.random.key(0))
        self._cotangent = mx.random.normal(shape, key=mx.random.key(1))
        self._own = nn.Dropout(p)
        self._keyed = Dropout(p)
        seed_dropouts([self._keyed], mx.array(keys)[None])
        mx.eval(self._x, self._cotangent)

    def own(self, backward: bool) -> Any:
        """The values, or with `backward` their gradient."""
        return self._finished(self._own, backward)

    def keyed(self, backward: bool) -> Any:
        """The same of the keyed one."""
        return self._finished(self._keyed, backward)

    def _finished(self, layer: Any, backward: bool) -> Any:
        if not backward:
            y = layer(self._x)
            mx.eval(y)
            return y
        values, gradients = mx.vjp(layer, [self._x], [self._cotangent])
        mx.eval(values, gradients)
        return gradients[0]

    def synchronize(self) -> None:
        """Waits for the device."""
        synchronize()
