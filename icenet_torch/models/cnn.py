"""A convolutional network for images (He et al., "Deep residual learning", 2015), PyTorch.

    images -> stem -> stages of conv and residual blocks -> mean over height and width -> classifier

The stem keeps the resolution or divides it by four. Each stage after the first halves it and by default doubles the
channels. `icenet.core.config.cnn_plan` lists the blocks. ResNet-18, 34 and 50 are configurations of this model.

Shapes: B batch, H height, W width, C channels in, O channels out, s stride, D hidden_size, K classes
(vocab_size). Images are [B, C, H, W]. The mirror is `icenet/models/cnn.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from icenet.core.config import CNNConfig, cnn_plan
from icenet_torch import nn as ops
from icenet_torch.models.base import BaseModel


class ConvNorm(nn.Module):
    """Convolution and batch norm, and what follows it. The convolution has no bias, because the norm has one."""

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, stride: int = 1, activation: str | None = None
    ) -> None:
        super().__init__()
        self.activation = activation
        self.conv = ops.Conv2d(inputs, outputs, kernel_size, stride)
        self.norm = ops.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Returns activation(norm(conv(x)) + residual)."""
        return self.norm(self.conv(x), residual, self.activation)  # H x W pixels of C -> H/s x W/s pixels of O


class ConvBlock(ConvNorm):
    """Convolution, batch norm, activation, dropout."""

    def __init__(self, config: CNNConfig, inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel_size, stride, config.activation)
        self.dropout = ops.Dropout(config.dropout, images=True)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.dropout(super().forward(x, residual))


class ResidualBlock(nn.Module):
    """The sum of a branch of convolutions and a shortcut, which is a 1x1 convolution if the shape changes.

    The last layer of the branch computes the sum and the activation after it.
    """

    def __init__(self, config: CNNConfig, block: cnn_plan.Block) -> None:
        super().__init__()
        _, inputs, outputs, stride = block
        if block.kind == "bottleneck":
            inner = outputs // cnn_plan.EXPANSION
            strides = (stride, 1) if config.bottleneck_stride == "conv1" else (1, stride)
            branch = [
                ConvBlock(config, inputs, inner, 1, strides[0]),
                ConvBlock(config, inner, inner, 3, strides[1]),
                ConvNorm(inner, outputs, 1, 1, config.activation),
            ]
        else:
            branch = [
                ConvBlock(config, inputs, outputs, 3, stride),
                ConvNorm(outputs, outputs, 3, 1, config.activation),
            ]
        self.branch = nn.ModuleList(branch)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *first, last = self.branch
        y = x
        for layer in first:
            y = layer(y)
        return last(y, self.shortcut(x))  # H/s x W/s pixels of O


class CNNModel(BaseModel):
    """An image classifier."""

    config: CNNConfig

    def __init__(self, config: CNNConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        kernel_size, stride = (7, 2) if config.stem == "conv7" else (3, 1)
        self.stem = ConvBlock(config, config.image_channels, config.base_channels, kernel_size, stride)
        plan = cnn_plan.blocks(config)
        blocks = [
            ConvBlock(config, block.inputs, block.outputs, 3, block.stride)
            if block.kind == "conv"
            else ResidualBlock(config, block)
            for block in plan
        ]
        self.blocks = nn.ModuleList(blocks)
        if config.classifier == "hidden":
            self.hidden = ops.Linear(plan[-1].outputs, config.hidden_size)
        self.dropout = ops.Dropout(config.dropout)
        self.output = ops.Linear(config.hidden_size, config.vocab_size)
        if seed is not None:
            self.init_weights(seed)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, K]` of images. The smallest size is `icenet.core.config.cnn_plan.min_image_size`."""
        return self.output(self.extract_features(images))

    def extract_features(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the input of the last layer, `[B, D]`."""
        self.check_images(images, channel_axis=1)
        x = self.stem(images.to(self.compute_dtype))  # pixels of base_channels
        if self.config.stem == "conv7":
            x = ops.max_pool(x, size=3, stride=2, padding=1)
        for block in self.blocks:
            x = ops.checkpoint(block, x) if self.gradient_checkpointing and self.training else block(x)
        x = ops.global_average_pool(x)  # [B, C]
        if self.config.classifier == "hidden":
            x = ops.activation(self.config.activation, self.hidden(x))
        return self.dropout(x)
