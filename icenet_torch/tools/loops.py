"""Training loops of users of PyTorch, for `icenet bench train`. The mirror is `icenet/tools/loops.py`.

The models have the sizes of a configuration of IceNet and PyTorch's own layers; ResNets are torchvision's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icenet.core.config import Config
from icenet.core.engine import Batch
from icenet.core.errors import UsageError
from icenet_torch.nn.arrays import DTYPES


class Block(nn.Module):
    """A block of a transformer with the norm first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """A decoder with learned positions."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        width = options.hidden_size
        self.tokens = nn.Embedding(options.vocab_size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(options.max_seq_length, width))
        self.blocks = nn.ModuleList(Block(width, options.num_heads) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, options.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))  # type: ignore[no-any-return]


class LSTM(nn.Module):
    """A language model on PyTorch's LSTM, which runs cuDNN's on CUDA."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        width = options.hidden_size
        self.tokens = nn.Embedding(options.vocab_size, width)
        self.layers = nn.LSTM(width, width, options.num_layers, batch_first=True)
        self.output = nn.Linear(width, options.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.layers(self.tokens(ids))[0])  # type: ignore[no-any-return]


class Loop:
    """A loop: model, cross-entropy, fused AdamW and, for texts, clipping.

    Args:
        config: Sizes of the model, and the precision: fp32 or bf16, by `torch.autocast`.
        device: The device.
        compiled: Whether `torch.compile` compiles the model with its loss, so that no logits are written in fp32.
    """

    def __init__(self, config: Config, device: torch.device, compiled: bool) -> None:
        options, self._device = config.model, device
        torch.manual_seed(0)
        self._is_images = options.type == "cnn"
        if self._is_images:
            self.model = _resnet(options)
        else:
            self.model = {"transformer": Transformer, "lstm": LSTM}[options.type](options)
        self.model = self.model.to(device)
        if self._is_images and device.type == "cuda":  # PyTorch's CPU computes it wrongly in this format
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._loss: Any = torch.compile(self._loss_of) if compiled else self._loss_of
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self._dtype = DTYPES[config.training.mixed_precision]

    def run(self, batches: list[Batch]) -> float:
        """Trains one step per batch. Returns the loss of the last one, which waits for the device."""
        for batch in batches:
            inputs, labels = (torch.from_numpy(batch[name]).to(self._device) for name in ("inputs", "labels"))
            inputs = inputs.permute(0, 3, 1, 2) if self._is_images else inputs
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                loss = self._loss(inputs, labels)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if not self._is_images:
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
        return loss.item()

    def _loss_of(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten().long())


def _resnet(options: Any) -> nn.Module:
    try:
        from torchvision.models import resnet
    except ImportError:
        raise UsageError("torchvision is not installed (pip install torchvision)") from None
    if (options.stem, options.block, options.classifier) != ("conv7", "bottleneck", "linear"):
        raise UsageError("torchvision has ResNets only: model.stem conv7, block bottleneck, classifier linear")
    if options.stage_widths != [64, 128, 256, 512] or options.image_channels != 3:
        raise UsageError("torchvision's ResNets have 64, 128, 256 and 512 channels, and images of 3")
    found: nn.Module = resnet.ResNet(resnet.Bottleneck, options.stage_depths, num_classes=options.vocab_size)
    return found
