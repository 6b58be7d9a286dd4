"""A vision transformer (Dosovitskiy et al., "An image is worth 16x16 words", 2020), PyTorch.

    images -> patches -> class token + positions -> N x [attention, feed-forward] -> class token, or mean -> classes

The blocks are those of the transformer; `icenet.core.config.vit_plan` has their sizes. With `pooling: mean` there is
no class token (Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022). With `distillation` there is a
second token (Touvron et al., "Training data-efficient image transformers", 2021).

Shapes: B batch, H height, W width, C channels, T positions, D hidden_size, K classes (vocab_size). Images are
[B, C, H, W]. The mirror is `icenet/models/vit.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from icenet.core.config import ViTConfig, vit_plan
from icenet_torch import nn as ops
from icenet_torch.models.base import BaseModel
from icenet_torch.models.transformer import TransformerBlock


class ViTModel(BaseModel):
    """An image classifier."""

    config: ViTConfig

    def __init__(self, config: ViTConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        width, size = config.hidden_size, config.patch_size
        # no activation follows, so the initial values are smaller than those of other convolutions
        self.patch_embedding = ops.Conv2d(config.image_channels, width, size, size, 0, bias=True, init_scale=0.5**0.5)
        if config.pooling == "token":
            self.class_embedding = ops.Embedding(1, width)
        if config.distillation != "none":
            self.distillation_embedding = ops.Embedding(1, width)
        self.position_embedding = ops.Embedding(vit_plan.num_positions(config), width)
        self.embedding_dropout = ops.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(plan) for plan in vit_plan.blocks(config))
        self.final_norm = ops.make_norm(vit_plan.norm(config), width)
        self.output = ops.Linear(width, config.vocab_size)
        if config.distillation == "classifier":
            self.distillation_output = ops.Linear(width, config.vocab_size)
        if seed is not None:
            self.init_weights(seed)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, K]` of images, whose height and width are `config.image_size`."""
        x = self.encode(images)
        logits = self.output(self._pool(x))
        if self.config.distillation == "classifier":
            logits = (logits + self.distillation_output(x[:, 1])) / 2
        return logits

    def extract_features(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the input of the classifier `output`, `[B, D]`."""
        return self._pool(self.encode(images))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the tokens and patches after the blocks and the final norm, `[B, T, D]`."""
        self.check_images(images, channel_axis=1)
        x = ops.flatten_pixels(self.patch_embedding(images.to(self.compute_dtype)))
        tokens = [self.class_embedding] if self.config.pooling == "token" else []
        tokens += [self.distillation_embedding] if self.config.distillation != "none" else []
        rows = [torch.broadcast_to(token.weight, (x.shape[0], 1, x.shape[2])).to(x.dtype) for token in tokens]
        x = torch.cat([*rows, x], dim=1)
        x = (x + self.position_embedding.weight).to(self.compute_dtype)  # [B, T, D]
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = ops.checkpoint(block, x, None) if self.gradient_checkpointing and self.training else block(x, None)
        return self.final_norm(x)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] if self.config.pooling == "token" else ops.mean_of_patches(x)
