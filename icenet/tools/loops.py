"""Training loops of users of MLX, for `icenet bench train`. The mirror is `icenet_torch/tools/loops.py`.

The models have the sizes of a configuration of IceNet and the layers of `mlx.nn`, which has no ResNet.
"""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from icenet.core.config import Config
from icenet.core.engine import Batch
from icenet.core.errors import UsageError
from icenet.nn.arrays import DTYPES


class Block(nn.Module):
    """A block of a transformer with the norm first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def __call__(self, x: mx.array) -> mx.array:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).reshape(batch, length, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
        x = x + self.out(y.swapaxes(1, 2).reshape(batch, length, width))
        return x + self.down(nn.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """A decoder with learned positions."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        width = options.hidden_size
        self.tokens = nn.Embedding(options.vocab_size, width)
        self.positions = 0.02 * mx.random.normal((options.max_seq_length, width))
        self.blocks = [Block(width, options.num_heads) for _ in range(options.num_layers)]
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, options.vocab_size, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


class LSTM(nn.Module):
    """A language model on the LSTM of `mlx.nn`, which loops over the steps."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        width = options.hidden_size
        self.tokens = nn.Embedding(options.vocab_size, width)
        self.layers = [nn.LSTM(width, width) for _ in range(options.num_layers)]
        self.output = nn.Linear(width, options.vocab_size, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x)[0]
        return self.output(x)


class Loop:
    """A loop: model, cross-entropy, AdamW and clipping.

    Args:
        config: Sizes of the model, and the precision: fp32 or bf16, to which the parameters are cast in each step.
        device: The device.
        compiled: Whether `mx.compile` compiles the step.
    """

    def __init__(self, config: Config, device: mx.Device, compiled: bool) -> None:
        options, self._device = config.model, device
        self._dtype = DTYPES[config.training.mixed_precision]
        kinds: dict[str, Any] = {"transformer": Transformer, "lstm": LSTM}
        if options.type not in kinds:
            raise UsageError("mlx.nn has no ResNet")
        with mx.stream(device):
            mx.random.seed(0)
            self.model = kinds[options.type](options)
            self._optimizer = optim.AdamW(1e-4, bias_correction=True)
            self._optimizer.init(self.model.trainable_parameters())
            state = [self.model.state, self._optimizer.state]
            self._state = state
            self._step: Any = mx.compile(self._update, inputs=state, outputs=state) if compiled else self._update
            mx.eval(state)

    def run(self, batches: list[Batch]) -> float:
        """Trains one step per batch. Returns the loss of the last one, which waits for the device."""
        with mx.stream(self._device):
            for batch in batches:
                loss = self._step(mx.array(batch["inputs"]), mx.array(batch["labels"]))
                mx.async_eval(loss, self._state)
            found: float = loss.item()
        return found

    def _update(self, inputs: mx.array, labels: mx.array) -> mx.array:
        loss, gradients = mx.value_and_grad(self._loss)(self.model.trainable_parameters(), inputs, labels)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        self._optimizer.update(self.model, gradients)
        return loss

    def _loss(self, parameters: Any, inputs: mx.array, labels: mx.array) -> mx.array:
        self.model.update(tree_map(lambda array: array.astype(self._dtype), parameters))
        logits = self.model(inputs).astype(mx.float32)
        self.model.update(parameters)
        return nn.losses.cross_entropy(logits, labels, reduction="mean")
