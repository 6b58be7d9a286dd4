"""Pairs of models as users write them, of plain layers of MLX and PyTorch, and faults that can be planted in each.

`PAIRS` holds a function per model: called with the name of a fault, or "", it returns the MLX model, the PyTorch
model, and the inputs of the MLX model. Every fault has the path of the module in which it is, and words of its cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import torch
import torch.nn as T
import torch.nn.functional as F

from icenet.core.models.modules import get_weights, set_weights


class Fault(NamedTuple):
    """A planted fault.

    Attributes:
        model, name: The model of `PAIRS`, and the name that its function takes.
        path: Path of the module that differs.
        cause: Words of the cause that the tool must name, separated by `|`; empty if none is known.
        kind: The kind of fault, for the count.
    """

    model: str
    name: str
    path: str
    cause: str = ""
    kind: str = ""


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def tokens(*shape: int, below: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape).astype(np.int32)


def randomized(theirs: T.Module, seed: int = 0) -> None:
    """Draws all parameters and running statistics of a PyTorch model, also those that begin as 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_scale = p.ndim == 1 and name.endswith("weight")
            p.copy_(1 + 0.2 * noise if is_scale else noise * (0.2 if p.ndim == 1 else 1 / math.sqrt(p[0].numel())))
        for name, b in theirs.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.1 * torch.randn(b.shape, generator=generator))
            if name.endswith("running_var"):
                b.copy_(1 + 0.3 * torch.rand(b.shape, generator=generator))


def with_equal_weights(ours: M.Module, theirs: T.Module, seed: int = 0) -> tuple[Any, Any]:
    randomized(theirs, seed)
    weights = get_weights(theirs)
    own = get_weights(ours)
    set_weights(ours, {name: weights.get(name, array) for name, array in own.items()})
    return ours, theirs


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


# ---- Llama --------------------------------------------------------------------------------------------------


class RMSNorm(M.Module):
    def __init__(self, dim: int, eps: float = 1e-6, casts: bool = True) -> None:
        super().__init__()
        self.weight = mx.ones((dim,))
        self.eps, self.casts = eps, casts

    def __call__(self, x: mx.array) -> mx.array:
        y = x.astype(mx.float32) if self.casts else x
        y = y * mx.rsqrt(mx.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return self.weight * y.astype(x.dtype)


class Attention(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = 4, 2, 8
        self.q_proj, self.o_proj = M.Linear(32, 32, bias=False), M.Linear(32, 32, bias=False)
        self.k_proj, self.v_proj = M.Linear(32, 16, bias=False), M.Linear(32, 16, bias=False)
        self.fault = fault

    def rotated(self, x: mx.array) -> mx.array:
        theta = 500000.0 if self.fault == "theta" else 10000.0
        frequencies = 1.0 / theta ** (mx.arange(0, self.size, 2).astype(mx.float32) / self.size)
        angles = mx.arange(x.shape[2]).astype(mx.float32)[:, None] * frequencies[None]
        cos, sin = mx.cos(angles), mx.sin(angles)
        if self.fault == "pairs":
            a, b = x[..., ::2], x[..., 1::2]
            return mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
        a, b = x[..., : self.size // 2], x[..., self.size // 2 :]
        if self.fault == "sign":
            return mx.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)
        return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def __call__(self, x: mx.array) -> mx.array:
        b, n, _ = x.shape
        q = self.q_proj(x).reshape(b, n, self.heads, self.size).transpose(0, 2, 1, 3)
        k = self.k_proj(x).reshape(b, n, self.kv_heads, self.size).transpose(0, 2, 1, 3)
        v = self.v_proj(x).reshape(b, n, self.kv_heads, self.size).transpose(0, 2, 1, 3)
        q, k = self.rotated(q), self.rotated(k)
        if self.fault == "tile":
            k, v = mx.tile(k, (1, 2, 1, 1)), mx.tile(v, (1, 2, 1, 1))
        else:
            k, v = mx.repeat(k, 2, axis=1), mx.repeat(v, 2, axis=1)
        scale = 1 / self.size if self.fault == "scale" else self.size**-0.5
        scores = (q @ k.transpose(0, 1, 3, 2)) * scale
        offset = 0 if self.fault == "mask" else 1
        mask = mx.triu(mx.full((n, n), -1e9), k=offset)
        if self.fault == "mask":  # the first row would have no key
            mask = mask * (mx.arange(n)[:, None] > 0)
        if self.fault != "causal":
            scores = scores + mask.astype(scores.dtype)
        weights = mx.softmax(scores, axis=-2 if self.fault == "softmax" else -1, precise=True)
        y = weights @ v
        if self.fault != "heads":
            y = y.transpose(0, 2, 1, 3)
        return self.o_proj(y.reshape(b, n, -1))


class SwiGLU(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.gate_proj, self.up_proj = M.Linear(32, 64, bias=False), M.Linear(32, 64, bias=False)
        self.down_proj = M.Linear(64, 32, bias=False)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        if self.fault == "gate":
            return self.down_proj(self.gate_proj(x) * M.silu(self.up_proj(x)))
        act = M.gelu if self.fault == "geglu" else M.silu
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(32, 1e-5 if fault == "eps" else 1e-6, fault != "cast")
        self.self_attn = Attention(fault)
        self.post_attention_layernorm = RMSNorm(32)
        self.mlp = SwiGLU(fault)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x))
        if self.fault == "branch":
            return x + self.mlp(self.post_attention_layernorm(h))
        return h + self.mlp(self.post_attention_layernorm(h))


class Llama(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.embed_tokens = M.Embedding(50, 32)
        self.layers = [LlamaBlock(), LlamaBlock(fault)]
        self.norm = RMSNorm(32)
        self.lm_head = M.Linear(32, 50, bias=False)
        self.fault = fault

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embed_tokens(ids)
        if self.fault == "embedding":
            x = x * math.sqrt(32)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class TorchRMSNorm(T.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = T.Parameter(torch.ones(dim))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


class TorchAttention(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = 4, 2, 8
        self.rope_theta = 10000.0
        self.q_proj, self.o_proj = T.Linear(32, 32, bias=False), T.Linear(32, 32, bias=False)
        self.k_proj, self.v_proj = T.Linear(32, 16, bias=False), T.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        frequencies = 1.0 / self.rope_theta ** (torch.arange(0, self.size, 2).float() / self.size)
        angles = torch.outer(torch.arange(n).float(), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, -1))


class TorchSwiGLU(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = T.Linear(32, 64, bias=False), T.Linear(32, 64, bias=False)
        self.down_proj = T.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TorchLlamaBlock(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = TorchRMSNorm(32)
        self.self_attn = TorchAttention()
        self.post_attention_layernorm = TorchRMSNorm(32)
        self.mlp = TorchSwiGLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class TorchLlama(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = T.Embedding(50, 32)
        self.layers = T.ModuleList([TorchLlamaBlock(), TorchLlamaBlock()])
        self.norm = TorchRMSNorm(32)
        self.lm_head = T.Linear(32, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def llama(fault: str) -> tuple[Any, Any, Any]:
    return *with_equal_weights(Llama(fault), TorchLlama()), tokens(2, 9, below=50)


# ---- bidirectional LSTM tagger ------------------------------------------------------------------------------


class Tagger(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.embedding = M.Embedding(20, 12)
        self.forward_lstm, self.backward_lstm = M.LSTM(12, 10), M.LSTM(12, 10)
        self.norm = M.LayerNorm(20)
        self.dropout = M.Dropout(0.3 if fault == "rate" else 0.2)
        self.classifier = M.Linear(20, 6)
        self.fault = fault

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embedding(ids)
        ahead, _ = self.forward_lstm(x)
        back, _ = self.backward_lstm(x if self.fault == "direction" else x[:, ::-1])
        if self.fault != "reversed":
            back = back[:, ::-1]
        if self.fault == "direction":
            back = back[:, ::-1]
        h = mx.concatenate([back, ahead] if self.fault == "order" else [ahead, back], axis=-1)
        h = self.norm(h)
        if self.fault == "tanh":
            h = mx.tanh(h)
        return self.classifier(self.dropout(h))


class TorchTagger(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = T.Embedding(20, 12)
        self.forward_lstm = T.LSTM(12, 10, batch_first=True)
        self.backward_lstm = T.LSTM(12, 10, batch_first=True)
        self.norm = T.LayerNorm(20)
        self.dropout = T.Dropout(0.2)
        self.classifier = T.Linear(20, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        ahead, _ = self.forward_lstm(x)
        back, _ = self.backward_lstm(x.flip(1))
        return self.classifier(self.dropout(self.norm(torch.cat([ahead, back.flip(1)], dim=-1))))


def tagger(fault: str) -> tuple[Any, Any, Any]:
    ours, theirs = with_equal_weights(Tagger(fault), TorchTagger())
    for name in ("forward_lstm", "backward_lstm"):
        layer, other = getattr(ours, name), getattr(theirs, name)
        weights = [p.detach().numpy() for p in (other.weight_ih_l0, other.weight_hh_l0)]
        bias = (other.bias_ih_l0 + other.bias_hh_l0).detach().numpy()
        order = [0, 1, 3, 2] if fault == "gates" and name == "backward_lstm" else [0, 1, 2, 3]  # i f o g
        parts = [np.concatenate([np.split(w, 4)[index] for index in order]) for w in (*weights, bias)]
        layer.Wx, layer.Wh, layer.bias = map(mx.array, parts)
    return ours, theirs, tokens(3, 7, below=20)


# ---- temporal convolutions ----------------------------------------------------------------------------------


class Temporal(M.Module):
    def __init__(self, i: int, o: int, dilation: int, fault: str = "") -> None:
        super().__init__()
        self.dilation = dilation
        self.conv1 = M.Conv1d(i, o, 3, dilation=1 if fault == "dilation" else dilation)
        self.norm = M.GroupNorm(2, o, pytorch_compatible=fault != "groups")
        self.conv2 = M.Conv1d(o, o, 3, dilation=dilation)
        self.downsample = M.Conv1d(i, o, 1)
        self.fault = fault

    def padded(self, x: mx.array, dilation: int) -> mx.array:
        if self.fault == "centre":
            return mx.pad(x, [(0, 0), (dilation, dilation), (0, 0)])
        if self.fault == "edge":
            return mx.pad(x, [(0, 0), (2 * dilation, 0), (0, 0)], mode="edge")
        return mx.pad(x, [(0, 0), (2 * dilation, 0), (0, 0)])

    def __call__(self, x: mx.array) -> mx.array:
        y = self.conv1(self.padded(x, 1 if self.fault == "dilation" else self.dilation))
        y = M.elu(self.norm(y))
        y = self.conv2(self.padded(y, self.dilation))
        y = M.relu(y) if self.fault == "relu" else M.elu(y)
        return y + self.downsample(x)


class TCN(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.body = M.Sequential(Temporal(4, 8, 1), Temporal(8, 8, 2, fault))
        self.head = M.Linear(8, 3)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        x = self.body(x)
        return self.head(x[:, 0] if self.fault == "step" else x[:, -1])


class TorchTemporal(T.Module):
    def __init__(self, i: int, o: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv1 = T.Conv1d(i, o, 3, dilation=dilation)
        self.norm = T.GroupNorm(2, o)
        self.conv2 = T.Conv1d(o, o, 3, dilation=dilation)
        self.downsample = T.Conv1d(i, o, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pad = (2 * self.dilation, 0)
        y = F.elu(self.norm(self.conv1(F.pad(x, pad))))
        return F.elu(self.conv2(F.pad(y, pad))) + self.downsample(x)


class TorchTCN(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = T.Sequential(TorchTemporal(4, 8, 1), TorchTemporal(8, 8, 2))
        self.head = T.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)[:, :, -1])


def tcn(fault: str) -> tuple[Any, Any, Any]:
    return *with_equal_weights(TCN(fault), TorchTCN()), draw(3, 10, 4)


# ---- diffusion ----------------------------------------------------------------------------------------------


class Diffusion(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.time1, self.time2 = M.Linear(16, 32), M.Linear(32, 32)
        self.enter, self.hidden, self.leave = M.Linear(6, 32), M.Linear(32, 32), M.Linear(32, 6)
        self.norm = M.LayerNorm(32, affine=False)
        self.modulation = M.Linear(32, 64)
        self.fault = fault

    def embedded(self, t: mx.array) -> mx.array:
        base = 1000.0 if self.fault == "base" else 10000.0
        count = 7 if self.fault == "count" else 8
        frequencies = mx.exp(-math.log(base) * mx.arange(8) / count)
        angles = t[:, None].astype(mx.float32) * frequencies[None]
        parts = [mx.sin(angles), mx.cos(angles)]
        return mx.concatenate(parts if self.fault == "sincos" else parts[::-1], axis=-1)

    def __call__(self, x: mx.array, t: mx.array) -> mx.array:
        time = self.time2(M.silu(self.time1(self.embedded(t).astype(x.dtype))))
        h = self.enter(x)
        scale, shift = mx.split(self.modulation(M.silu(time)), 2, axis=-1)
        if self.fault == "modulation":
            scale, shift = shift, scale
        h = self.norm(h) * ((0 if self.fault == "one" else 1) + scale) + shift
        h = M.silu(self.hidden(h))
        if self.fault == "bias":
            h = h + self.hidden.bias
        y = self.leave(h)
        if self.fault == "normalize":
            y = y / mx.sqrt(mx.var(y, axis=-1, keepdims=True, ddof=0) + 1e-6)
        else:
            y = y / mx.sqrt(mx.var(y, axis=-1, keepdims=True, ddof=1) + 1e-6)
        return y


class TorchDiffusion(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time1, self.time2 = T.Linear(16, 32), T.Linear(32, 32)
        self.enter, self.hidden, self.leave = T.Linear(6, 32), T.Linear(32, 32), T.Linear(32, 6)
        self.norm = T.LayerNorm(32, elementwise_affine=False)
        self.modulation = T.Linear(32, 64)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(8) / 8)
        angles = t[:, None].float() * frequencies[None]
        time = torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype)
        time = self.time2(F.silu(self.time1(time)))
        scale, shift = self.modulation(F.silu(time)).chunk(2, dim=-1)
        h = self.norm(self.enter(x)) * (1 + scale) + shift
        y = self.leave(F.silu(self.hidden(h)))
        return y / torch.sqrt(y.var(-1, keepdim=True) + 1e-6)


def diffusion(fault: str) -> tuple[Any, Any, Any]:
    times = tokens(5, below=1000, seed=3)
    return *with_equal_weights(Diffusion(fault), TorchDiffusion()), {"x": draw(5, 6), "t": times}


# ---- graph --------------------------------------------------------------------------------------------------


class GraphLayer(M.Module):
    def __init__(self, i: int, o: int, fault: str = "") -> None:
        super().__init__()
        self.message, self.combine = M.Linear(2 * i, o), M.Linear(i + o, o)
        self.fault = fault

    def __call__(self, x: mx.array, edges: mx.array) -> mx.array:
        source, target = (edges[1], edges[0]) if self.fault == "direction" else (edges[0], edges[1])
        messages = M.relu(self.message(mx.concatenate([x[source], x[target]], axis=-1)))
        total = mx.zeros((x.shape[0], messages.shape[-1])).at[target].add(messages)
        count = mx.zeros((x.shape[0], 1)).at[target].add(mx.ones((target.shape[0], 1)))
        if self.fault == "degree":
            count = count + 1
        mean = total if self.fault == "sum" else total / mx.maximum(count, 1)
        if self.fault == "maximum":
            mean = mx.full(total.shape, -mx.inf).at[target].maximum(messages)
            mean = mx.where(mx.isinf(mean), 0.0, mean)
        return self.combine(mx.concatenate([x, mean], axis=-1))


class Graph(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.layers = [GraphLayer(5, 8), GraphLayer(8, 8, fault)]
        self.readout = M.Linear(8, 2)
        self.fault = fault

    def __call__(self, x: mx.array, edges: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x, edges)
            x = M.leaky_relu(x, 0.2) if self.fault == "slope" else M.leaky_relu(x, 0.01)
        return self.readout(x.sum(axis=0) if self.fault == "readout" else x.mean(axis=0))


class TorchGraphLayer(T.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.message, self.combine = T.Linear(2 * i, o), T.Linear(i + o, o)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges.long()
        messages = F.relu(self.message(torch.cat([x[source], x[target]], dim=-1)))
        total = torch.zeros(x.shape[0], messages.shape[-1], dtype=x.dtype).index_add(0, target, messages)
        count = torch.zeros(x.shape[0], dtype=x.dtype).index_add(0, target, torch.ones_like(target, dtype=x.dtype))
        return self.combine(torch.cat([x, total / count.clamp(min=1)[:, None]], dim=-1))


class TorchGraph(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = T.ModuleList([TorchGraphLayer(5, 8), TorchGraphLayer(8, 8)])
        self.readout = T.Linear(8, 2)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = F.leaky_relu(layer(x, edges), 0.01)
        return self.readout(x.mean(dim=0))


def graph(fault: str) -> tuple[Any, Any, Any]:
    edges = tokens(2, 17, below=7, seed=1)
    return *with_equal_weights(Graph(fault), TorchGraph()), (draw(7, 5), edges)


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


PAIRS: dict[str, Callable[[str], tuple[Any, Any, Any]]] = {
    "unet": unet,
    "convnext": convnext,
    "llama": llama,
    "tagger": tagger,
    "tcn": tcn,
    "diffusion": diffusion,
    "graph": graph,
    "vit": vit,
}

FAULTS = [
    Fault("unet", "eps", "down1.norm1", "eps", "eps"),
    Fault("unet", "padding", "down1", "", "padding mode"),
    Fault("unet", "momentum", "down1.norm1", "momentum", "momentum"),
    Fault("unet", "activation", "down1", "leaky", "activation"),
    Fault("unet", "biased", "down2.norm1", "biased", "running variance"),
    Fault("unet", "frozen", "down2.norm2", "mode", "batch-norm mode"),
    Fault("unet", "pool", "pool", "average", "pooling"),
    Fault("unet", "corners", "up", "align_corners", "align_corners"),
    Fault("unet", "order", "", "order", "order of a concatenation"),
    Fault("unet", "swap", "", "transpose", "swapped axes"),
    Fault("convnext", "eps", "blocks.1.norm", "eps", "eps"),
    Fault("convnext", "gelu", "blocks.1", "tanh", "gelu"),
    Fault("convnext", "silu", "blocks.1", "SiLU", "activation"),
    Fault("convnext", "gamma", "blocks.1", "gamma|product", "missing scale"),
    Fault("convnext", "residual", "blocks.1", "not added|left out", "missing residual"),
    Fault("convnext", "gradient", "blocks.1", "stop_gradient", "wrong gradient"),
    Fault("convnext", "pooling", "", "maximum|max", "pooling"),
    Fault("llama", "theta", "layers.1.self_attn", "theta", "theta"),
    Fault("llama", "pairs", "layers.1.self_attn", "rotary", "rotary pairs"),
    Fault("llama", "sign", "layers.1.self_attn", "rotary", "rotary sign"),
    Fault("llama", "tile", "layers.1.self_attn", "tile", "order of grouped heads"),
    Fault("llama", "scale", "layers.1.self_attn", "scale", "attention scale"),
    Fault("llama", "mask", "layers.1.self_attn", "mask", "mask off by one"),
    Fault("llama", "causal", "layers.1.self_attn", "mask", "missing mask"),
    Fault("llama", "softmax", "layers.1.self_attn", "softmax", "axis of softmax"),
    Fault("llama", "heads", "layers.1.self_attn", "swapped axes", "swapped axes"),
    Fault("llama", "gate", "layers.1.mlp", "exchanged", "order of a gate"),
    Fault("llama", "geglu", "layers.1.mlp", "GELU", "activation"),
    Fault("llama", "eps", "layers.1.input_layernorm", "eps", "eps"),
    Fault("llama", "branch", "layers.1", "not added", "wrong residual"),
    Fault("llama", "embedding", "", "multiplied", "missing scale"),
    Fault("tagger", "rate", "dropout", "dropout", "dropout"),
    Fault("tagger", "direction", "", "reversed", "direction of a sequence"),
    Fault("tagger", "reversed", "", "reversed", "direction of a sequence"),
    Fault("tagger", "order", "", "order", "order of a concatenation"),
    Fault("tagger", "gates", "backward_lstm", "gate", "gate order"),
    Fault("tagger", "tanh", "", "tanh", "activation"),
    Fault("tcn", "dilation", "body.1", "", "dilation"),
    Fault("tcn", "groups", "body.1.norm", "pytorch_compatible", "grouping of a norm"),
    Fault("tcn", "centre", "body.1", "padding", "padding side"),
    Fault("tcn", "edge", "body.1", "padding", "padding mode"),
    Fault("tcn", "relu", "body.1", "ReLU", "activation"),
    Fault("tcn", "step", "", "position 0", "index"),
    Fault("diffusion", "base", "", "theta", "theta"),
    Fault("diffusion", "count", "", "", "off by one"),
    Fault("diffusion", "sincos", "", "order", "order of a concatenation"),
    Fault("diffusion", "modulation", "", "order", "order of a gate"),
    Fault("diffusion", "one", "", "not added", "missing scale"),
    Fault("diffusion", "bias", "", "bias", "bias twice"),
    Fault("diffusion", "normalize", "", "unbiased", "biased variance"),
    Fault("graph", "direction", "layers.1", "order", "gather"),
    Fault("graph", "degree", "layers.1", "", "scatter"),
    Fault("graph", "sum", "layers.1", "quotient", "scatter"),
    Fault("graph", "maximum", "layers.1", "", "scatter"),
    Fault("graph", "slope", "", "slope", "activation"),
    Fault("graph", "readout", "", "sum", "pooling"),
    Fault("vit", "post", "blocks.0", "output of attn", "place of a norm"),
    Fault("vit", "quick", "blocks.0", "GELU", "gelu"),
    Fault("vit", "dropout", "blocks.0", "dropout", "dropout"),
    Fault("vit", "columns", "", "", "swapped axes"),
    Fault("vit", "last", "", "order", "order of a concatenation"),
    Fault("vit", "positions", "", "", "position"),
    Fault("vit", "mean", "", "mean", "pooling"),
    Fault("vit", "qkv", "blocks.1.attn", "order", "swapped weights"),
]
