"""MLX's part of `icenet bench`: memory, rates, a loop, dropout. The mirror is `icenet_torch/tools/bench.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from icenet.core.config import Config
from icenet.core.engine import Batch
from icenet.core.engine.parameter_groups import weight_decay
from icenet.engine.build import build_model, choose_device
from icenet.engine.engine import Engine
from icenet.models import BaseModel
from icenet.nn.arrays import DTYPES, is_half
from icenet.nn.dropout import Dropout


class PeakMemory:
    """Measures the peak memory of this process on a device, above the memory in use before.

    Args:
        device: The device.
        settle: Called before each reading: computes or frees what is not a part of the measurement.

    Attributes:
        source: The origin of the numbers, for reports.
    """

    def __init__(self, device: mx.Device | None, settle: Callable[[], Any] = lambda: None) -> None:
        self._device = device
        self._settle = settle
        self.source = "MLX's own counter"

    def begin(self) -> None:
        """Starts a measurement, after freeing what is kept for reuse."""
        self._settle()
        synchronize(self._device)
        mx.clear_cache()
        self._before = mx.get_active_memory()
        mx.reset_peak_memory()

    def growth(self) -> int:
        """Returns the peak since `begin` minus the memory in use at `begin`, in bytes."""
        self._settle()
        synchronize(self._device)
        return max(mx.get_peak_memory() - self._before, 0)


class Gauge(PeakMemory):
    """Measures the peak memory of an engine's step, above the memory in use before it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.model.device, lambda: mx.eval(engine.model.parameters(), engine.optimizer.state))


def synchronize(device: mx.Device | None) -> None:
    """Waits until all submitted work of a device, by default the default one, is done."""
    mx.synchronize(mx.default_stream(device or mx.default_device()))


def matrix_product(size: int, dtype: str, device: mx.Device) -> Callable[[int], None]:
    """Returns a function that computes a product of two matrices `[size, size]` a number of times, and waits for it.

    Args:
        size: Number of rows and columns.
        dtype: fp32, bf16 or fp16.
        device: The device.
    """
    with mx.stream(device):
        values = [mx.random.normal((size, size), key=mx.random.key(seed)).astype(DTYPES[dtype]) for seed in (0, 1)]
        mx.eval(values)

    def run(count: int) -> None:
        with mx.stream(device):
            mx.eval([values[0] @ values[1] for _ in range(count)])

    return run


def memory_copy(nbytes: int, device: mx.Device) -> Callable[[int], None]:
    """Returns a function that reads `nbytes` bytes and writes as many, a number of times, and waits for it."""
    with mx.stream(device):
        values = mx.ones((nbytes // 4,), mx.float32)
        mx.eval(values)

    def run(count: int) -> None:
        with mx.stream(device):
            for _ in range(count):
                mx.eval(values + 1)

    return run


class BareLoop:
    """A minimal training loop as a user of MLX writes it: model, loss, AdamW and clipping."""

    def __init__(self, config: Config, device: str) -> None:
        training = config.training
        self.model = use_native_dropout(build_model(config, device, seed=config.seed))
        self.model.compute_dtype = DTYPES[training.mixed_precision]
        self.model.gradient_checkpointing = training.gradient_checkpointing
        self.model.train()
        self.optimizer = optim.AdamW(
            training.learning_rate,
            betas=[training.beta1, training.beta2],
            eps=training.eps,
            weight_decay=weight_decay(training),
            bias_correction=True,
        )
        self._max_grad_norm = training.max_grad_norm
        self._differentiate = nn.value_and_grad(self.model, self._loss)
        self._step: Any = self._update
        if config.model.compile_model:
            self.optimizer.init(self.model.trainable_parameters())
            state = [self.model.state, self.optimizer.state, mx.random.state]
            self._step = mx.compile(self._update, inputs=state, outputs=state)

    def run(self, batches: list[Batch]) -> None:
        """Trains one step per batch, and waits for the device at the end."""
        with self.model.arithmetic():
            self._run(batches)

    def _run(self, batches: list[Batch]) -> None:
        for batch in batches:
            inputs, labels = (mx.array(batch[name]) for name in ("inputs", "labels"))
            masks = ["attention_mask"] if "attention_mask" in batch else []
            options = {name: mx.array(batch[name]) for name in masks}
            loss = self._step(inputs, labels, options)
            mx.eval(loss, self.model.parameters(), self.optimizer.state)
        self.synchronize()

    def _update(self, inputs: mx.array, labels: mx.array, options: dict[str, mx.array]) -> mx.array:
        loss, gradients = self._differentiate(inputs, labels, options)
        if self._max_grad_norm is not None:
            gradients, _ = optim.clip_grad_norm(gradients, self._max_grad_norm)
        self.optimizer.update(self.model, gradients)
        return loss

    def _loss(self, inputs: mx.array, labels: mx.array, options: dict[str, mx.array]) -> mx.array:
        logits = self.model(inputs, **options)
        logits = logits.astype(mx.float32) if is_half(logits) else logits
        if not options:
            return nn.losses.cross_entropy(logits, labels, reduction="mean")
        counted = labels >= 0  # not padding
        losses = nn.losses.cross_entropy(logits, mx.where(counted, labels, 0), weights=counted)
        return losses.sum() / counted.sum()

    def synchronize(self) -> None:
        """Waits for the device."""
        mx.synchronize()


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
        self.device = "cpu" if self._device.type == mx.DeviceType.cpu else "gpu"
        with mx.stream(self._device):
            self._x = mx.random.normal(shape, key=mx.random.key(0))
            self._cotangent = mx.random.normal(shape, key=mx.random.key(1))
        self._native = nn.Dropout(p)
        self._keyed = Dropout(p)
        self._keys = mx.array(keys)
        mx.eval(self._x, self._cotangent)

    def native(self, backward: bool) -> Any:
        """Returns the output of the framework's dropout, or with `backward` the gradient of the input."""
        return self._evaluate(self._native, backward)

    def keyed(self, backward: bool) -> Any:
        """Returns the output of the keyed dropout, or with `backward` the gradient of the input."""
        self._keyed.seed(self._keys)
        return self._evaluate(self._keyed, backward)

    def _evaluate(self, layer: Any, backward: bool) -> Any:
        with mx.stream(self._device):
            if not backward:
                y = layer(self._x)
                mx.eval(y)
                return y
            values, gradients = mx.vjp(layer, [self._x], [self._cotangent])
            mx.eval(values, gradients)
            return gradients[0]

    def synchronize(self) -> None:
        """Waits for the device."""
        mx.synchronize()
