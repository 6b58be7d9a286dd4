"""Pairs of models of images as users write them, and faults that can be planted in each (`pair_faults`)."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw, with_equal_weights

# ---- U-Net --------------------------------------------------------------------------------------------------


class DoubleConv(M.Module):
    def __init__(self, i: int, o: int, fault: str = "") -> None:
        super().__init__()
        self.conv1 = M.Conv2d(i, o, 3, padding=0 if fault == "padding" else 1)
        self.norm1 = M.BatchNorm(
            o, eps=1e-3 if fault == "eps" else 1e-5, momentum=0.01 if fault == "momentum" else 0.1
        )
        self.conv2 = M.Conv2d(o, o, 3, padding=1)
        self.norm2 = M.BatchNorm(o)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        if self.fault == "padding":
            x = mx.concatenate([x[:, -1:], x, x[:, :1]], axis=1)
            x = mx.concatenate([x[:, :, -1:], x, x[:, :, :1]], axis=2)
        x = M.relu(self.norm1(self.conv1(x)))
        x = self.norm2(self.conv2(x))
        return M.leaky_relu(x, 0.01) if self.fault == "activation" else M.relu(x)


class BiasedNorm(M.BatchNorm):
    """Running variance as in MLX before 0.32.1."""

    def __call__(self, x: mx.array) -> mx.array:
        before = self.running_var
        y = super().__call__(x)
        if self.training:
            n = x.size // x.shape[-1]
            self.running_var = (
                before * (1 - self.momentum) + (self.running_var - before * (1 - self.momentum)) * (n - 1) / n
            )
        return y


class UNet(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.down1 = DoubleConv(3, 8, fault if fault in ("eps", "padding", "momentum", "activation") else "")
        self.down2 = DoubleConv(8, 16)
        if fault == "biased":
            self.down2.norm1 = BiasedNorm(16)
        if fault == "frozen":
            self.down2.norm2.eval()
        self.pool = M.AvgPool2d(2) if fault == "pool" else M.MaxPool2d(2)
        self.up = M.Upsample(2, "linear", align_corners=fault == "corners")
        self.up1 = DoubleConv(24, 8)
        self.head = M.Conv2d(8, 2, 1)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        skip = self.down1(x)
        x = self.up(self.down2(self.pool(skip)))
        parts = [x, skip] if self.fault == "order" else [skip, x]
        x = mx.concatenate(parts, axis=-1)
        if self.fault == "swap":
            x = x.transpose(0, 2, 1, 3)
        return self.head(self.up1(x))


class TorchDoubleConv(T.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1 = T.Conv2d(i, o, 3, padding=1)
        self.norm1 = T.BatchNorm2d(o)
        self.conv2 = T.Conv2d(o, o, 3, padding=1)
        self.norm2 = T.BatchNorm2d(o)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))


class TorchUNet(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = TorchDoubleConv(3, 8), TorchDoubleConv(8, 16)
        self.pool = T.MaxPool2d(2)
        self.up = T.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.up1 = TorchDoubleConv(24, 8)
        self.head = T.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down1(x)
        x = self.up(self.down2(self.pool(skip)))
        return self.head(self.up1(torch.cat([skip, x], dim=1)))


def unet(fault: str) -> tuple[Any, Any, Any]:
    return *with_equal_weights(UNet(fault), TorchUNet()), draw(2, 8, 8, 3)


# ---- ConvNeXt -----------------------------------------------------------------------------------------------


class ConvNeXtBlock(M.Module):
    def __init__(self, dim: int, fault: str = "") -> None:
        super().__init__()
        self.dwconv = M.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = M.LayerNorm(dim, eps=1e-5 if fault == "eps" else 1e-6)
        self.pwconv1 = M.Linear(dim, 4 * dim)
        self.pwconv2 = M.Linear(4 * dim, dim)
        self.gamma = mx.ones((dim,))
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        y = self.norm(self.dwconv(x))
        y = self.pwconv1(y)
        y = M.gelu_approx(y) if self.fault == "gelu" else M.silu(y) if self.fault == "silu" else M.gelu(y)
        y = self.pwconv2(y)
        if self.fault != "gamma":
            y = self.gamma * y
        if self.fault == "residual":
            return y
        if self.fault == "gradient":
            return mx.stop_gradient(x) + y
        return x + y


class ConvNeXt(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        stride = 4
        self.stem = M.Conv2d(3, 8, 4, stride=stride)
        self.blocks = [ConvNeXtBlock(8), ConvNeXtBlock(8, fault), ConvNeXtBlock(8)]
        self.norm = M.LayerNorm(8)
        self.head = M.Linear(8, 5)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = x.max(axis=(1, 2)) if self.fault == "pooling" else x.mean(axis=(1, 2))
        return self.head(self.norm(x))


class TorchConvNeXtBlock(T.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = T.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = T.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = T.Linear(dim, 4 * dim), T.Linear(4 * dim, dim)
        self.gamma = T.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class TorchConvNeXt(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = T.Conv2d(3, 8, 4, stride=4)
        self.blocks = T.ModuleList([TorchConvNeXtBlock(8) for _ in range(3)])
        self.norm, self.head = T.LayerNorm(8), T.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(dim=(2, 3))))


def convnext(fault: str) -> tuple[Any, Any, Any]:
    return *with_equal_weights(ConvNeXt(fault), TorchConvNeXt()), draw(2, 32, 32, 3)


# ---- vision transformer -------------------------------------------------------------------------------------


class Encoder(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.norm1, self.norm2 = M.LayerNorm(24), M.LayerNorm(24)
        self.attn = M.MultiHeadAttention(24, 4, bias=True)
        self.fc1, self.fc2 = M.Linear(24, 48), M.Linear(48, 24)
        self.drop = M.Dropout(0.1)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        if self.fault == "post":
            x = self.norm1(x + self.attn(x, x, x))
        else:
            h = self.norm1(x)
            x = x + self.attn(h, h, h)
        h = self.fc1(self.norm2(x))
        h = M.gelu_fast_approx(h) if self.fault == "quick" else M.gelu(h)
        h = self.fc2(h)
        return x + (h if self.fault == "dropout" else self.drop(h))


class ViT(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.patch = M.Conv2d(3, 24, 4, stride=4)
        self.cls_token = mx.zeros((1, 1, 24))
        self.pos_embed = mx.zeros((1, 5, 24))
        self.blocks = [Encoder(fault), Encoder()]
        self.norm, self.head = M.LayerNorm(24), M.Linear(24, 4)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        x = self.patch(x)
        if self.fault == "columns":
            x = x.transpose(0, 2, 1, 3)
        x = x.reshape(x.shape[0], -1, 24)
        cls = mx.broadcast_to(self.cls_token, (x.shape[0], 1, 24))
        x = mx.concatenate([x, cls] if self.fault == "last" else [cls, x], axis=1)
        if self.fault == "positions":
            x = mx.concatenate([x[:, :1], x[:, 1:] + self.pos_embed[:, 1:]], axis=1)
        else:
            x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(axis=1) if self.fault == "mean" else x[:, 0])


class TorchEncoder(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = T.LayerNorm(24), T.LayerNorm(24)
        self.attn = T.MultiheadAttention(24, 4, batch_first=True)
        self.fc1, self.fc2 = T.Linear(24, 48), T.Linear(48, 24)
        self.drop = T.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class TorchViT(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = T.Conv2d(3, 24, 4, stride=4)
        self.cls_token, self.pos_embed = T.Parameter(torch.zeros(1, 1, 24)), T.Parameter(torch.zeros(1, 5, 24))
        self.blocks = T.ModuleList([TorchEncoder(), TorchEncoder()])
        self.norm, self.head = T.LayerNorm(24), T.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def vit(fault: str) -> tuple[Any, Any, Any]:
    ours, theirs = with_equal_weights(ViT(fault), TorchViT())
    for block, other in zip(ours.blocks, theirs.blocks, strict=True):
        attention = other.attn
        weights = np.split(attention.in_proj_weight.detach().numpy(), 3)
        biases = np.split(attention.in_proj_bias.detach().numpy(), 3)
        for layer, w, bias in zip(
            (block.attn.query_proj, block.attn.key_proj, block.attn.value_proj), weights, biases, strict=True
        ):
            layer.weight, layer.bias = mx.array(w), mx.array(bias)
        if fault == "qkv" and block is ours.blocks[1]:
            block.attn.key_proj, block.attn.value_proj = block.attn.value_proj, block.attn.key_proj
    return ours, theirs, draw(2, 8, 8, 3)
