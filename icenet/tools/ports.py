"""A port and IceNet's own model with the same weights on MLX, for `icenet bench port`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt

from icenet.nn.arrays import DTYPES


class Side:
    """A classifier of images or tokens, timed on one batch.

    Args:
        module: The module, in `dtype`.
        call: Returns its logits `[..., classes]` from the inputs.
        inputs: The batch.
        labels: The class of each output, int32.
        dtype: fp32 or bf16, of the weights and the arithmetic.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[mx.array], mx.array],
        inputs: npt.NDArray[Any],
        labels: npt.NDArray[np.int32],
        dtype: str,
    ) -> None:
        module.set_dtype(DTYPES[dtype])
        is_float = np.issubdtype(inputs.dtype, np.floating)
        self._module, self._call = module, call
        self._inputs = mx.array(inputs).astype(DTYPES[dtype]) if is_float else mx.array(inputs)
        self._labels = mx.array(labels)

    def logits(self) -> npt.NDArray[np.float32]:
        """Returns the logits in evaluation mode."""
        self._module.eval()
        return np.array(self._call(self._inputs).astype(mx.float32))

    def forward(self, compiled: bool) -> Callable[[], None]:
        """Returns a function that computes the logits in evaluation mode."""
        call = mx.compile(self._call) if compiled else self._call
        self._module.eval()
        return lambda: mx.eval(call(self._inputs))

    def step(self, compiled: bool) -> Callable[[], None]:
        """Returns a function that trains a step with the cross-entropy and SGD with momentum."""
        module, optimizer = self._module.train(), optim.SGD(1e-4, momentum=0.9)
        optimizer.init(module.trainable_parameters())
        state = [module.state, optimizer.state]

        def loss(x: mx.array, labels: mx.array) -> mx.array:
            return nn.losses.cross_entropy(self._call(x).astype(mx.float32), labels, reduction="mean")

        differentiate = nn.value_and_grad(module, loss)

        def train(x: mx.array, labels: mx.array) -> mx.array:
            value, gradients = differentiate(x, labels)
            optimizer.update(module, gradients)
            return value

        run = mx.compile(train, inputs=state, outputs=state) if compiled else train
        return lambda: mx.eval(run(self._inputs, self._labels), state)


def calls(port: Any) -> Callable[[mx.array], mx.array]:
    """Returns the function of the logits of a port, also of one of a model of transformers, which gives a dict."""

    def call(x: mx.array) -> mx.array:
        found = port(x, use_cache=False) if "use_cache" in port.__call__.__code__.co_varnames else port(x)
        return found["logits"] if isinstance(found, dict) else found

    return call


def is_gpu(device: str) -> bool:
    """Chooses the default device, auto, cpu or gpu. Returns whether it is a GPU."""
    if device == "cpu":
        mx.set_default_device(mx.cpu)
    return bool(mx.default_device() == mx.gpu)
