"""Pairs of RetNet and minGRU as users write them, and faults that can be planted in each (`pair_faults`)."""

from __future__ import annotations

import math
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import tokens, with_equal_weights

# ---- RetNet: retention in parallel --------------------------------------------------------------------------


class Retention(M.Module):
    def __init__(self, dim: int, heads: int, fault: str = "") -> None:
        super().__init__()
        self.heads, self.head_size, self.fault = heads, dim // heads, fault
        self.q_proj, self.k_proj = M.Linear(dim, dim, bias=False), M.Linear(dim, dim, bias=False)
        self.v_proj, self.g_proj = M.Linear(dim, 2 * dim, bias=False), M.Linear(dim, 2 * dim, bias=False)
        self.out_proj = M.Linear(2 * dim, dim, bias=False)
        self.group_norm = M.LayerNorm(2 * self.head_size, eps=1e-5 if fault == "eps" else 1e-6, affine=False)

    def rotate(self, x: mx.array) -> mx.array:
        theta = 10000 ** -mx.linspace(0, 1, self.head_size // 2)
        if self.fault == "halves":
            angles = mx.arange(x.shape[2])[:, None] * mx.tile(theta, 2)
            x1, x2 = mx.split(x, 2, axis=-1)
            return x * mx.cos(angles) + mx.concatenate([-x2, x1], axis=-1) * mx.sin(angles)
        angles = mx.arange(x.shape[2])[:, None] * mx.repeat(theta, 2)
        turned = mx.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
        return x * mx.cos(angles) + turned * mx.sin(angles)

    def decay(self, length: int) -> mx.array:
        gamma = 1 - 2.0 ** (-5 - mx.arange(self.heads).astype(mx.float32))
        steps = mx.arange(length)[:, None] - mx.arange(length)
        decay = mx.where(steps >= 0, gamma[:, None, None] ** mx.maximum(steps, 0), 0)
        return decay / mx.sqrt(decay.sum(axis=-1, keepdims=True))

    def __call__(self, x: mx.array) -> mx.array:
        batch, length, dim = x.shape
        q, k, v = (
            layer(x).reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        scale = 1.0 if self.fault == "scale" else self.head_size**-0.5
        scores = (self.rotate(q) @ self.rotate(k * scale).swapaxes(-1, -2)) * self.decay(length)
        total = mx.abs(scores.sum(axis=-1, keepdims=True))
        scores = scores / mx.maximum(total if self.fault == "total" else mx.stop_gradient(total), 1)
        y = self.group_norm((scores @ v).transpose(0, 2, 1, 3)).reshape(batch, length, 2 * dim)
        gate = self.g_proj(x)
        return self.out_proj((mx.sigmoid(gate) if self.fault == "gate" else M.silu(gate)) * y)


class RetNetBlock(M.Module):
    def __init__(self, dim: int, heads: int, fault: str = "") -> None:
        super().__init__()
        self.norm1, self.norm2 = M.RMSNorm(dim, eps=1e-6), M.RMSNorm(dim, eps=1e-6)
        self.retention = Retention(dim, heads, fault)
        self.fc1, self.gate, self.fc2 = (M.Linear(i, o, bias=False) for i, o in ((dim, 24), (dim, 24), (24, dim)))
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.retention(self.norm1(x))
        y = self.norm2(x)
        if self.fault == "glu":
            return x + self.fc2(self.gate(y) * M.gelu(self.fc1(y)))
        return x + self.fc2(M.gelu(self.gate(y)) * self.fc1(y))


class RetNet(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.embedding = M.Embedding(11, 16)
        self.layers = [RetNetBlock(16, 2), RetNetBlock(16, 2, fault)]
        self.norm, self.head = M.RMSNorm(16, eps=1e-6), M.Linear(16, 11, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class TorchRelativePositions(T.Module):
    """The angles and the decay, which PyTorch computes once for all layers."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        angle = 1.0 / (10000 ** torch.linspace(0, 1, dim // heads // 2))
        self.register_buffer("angle", angle.repeat_interleave(2), persistent=False)
        decay = torch.log(1 - 2 ** (-5 - torch.arange(heads, dtype=torch.float)))
        self.register_buffer("decay", decay, persistent=False)

    def forward(self, length: int) -> Any:
        index = torch.arange(length).to(self.decay)
        angles = index[:, None] * self.angle
        steps = index[:, None] - index[None]
        mask = torch.exp(steps.masked_fill(steps < 0, math.inf) * self.decay[:, None, None])
        return angles.sin(), angles.cos(), mask / mask.sum(dim=-1, keepdim=True).sqrt()


class TorchRetention(T.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, dim // heads
        self.q_proj, self.k_proj = T.Linear(dim, dim, bias=False), T.Linear(dim, dim, bias=False)
        self.v_proj, self.g_proj = T.Linear(dim, 2 * dim, bias=False), T.Linear(dim, 2 * dim, bias=False)
        self.out_proj = T.Linear(2 * dim, dim, bias=False)
        self.group_norm = T.LayerNorm(2 * self.head_size, eps=1e-6, elementwise_affine=False)

    def forward(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        (batch, length, dim), (sin, cos, mask) = x.shape, positions
        q, k, v, g = self.q_proj(x), self.k_proj(x) * self.head_size**-0.5, self.v_proj(x), self.g_proj(x)
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))

        def rotate(t: torch.Tensor) -> torch.Tensor:
            return t * cos + torch.stack((-t[..., 1::2], t[..., ::2]), dim=-1).flatten(-2) * sin

        scores = (rotate(q) @ rotate(k).transpose(-1, -2)) * mask
        scores = scores / scores.detach().sum(dim=-1, keepdim=True).abs().clamp(min=1)
        y = self.group_norm((scores @ v).transpose(1, 2)).reshape(batch, length, 2 * dim)
        return self.out_proj(F.silu(g) * y)


class TorchRetNetBlock(T.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = T.RMSNorm(dim, eps=1e-6), T.RMSNorm(dim, eps=1e-6)
        self.retention = TorchRetention(dim, heads)
        self.fc1, self.gate, self.fc2 = (T.Linear(i, o, bias=False) for i, o in ((dim, 24), (dim, 24), (24, dim)))

    def forward(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        x = x + self.retention(self.norm1(x), positions)
        y = self.norm2(x)
        return x + self.fc2(F.gelu(self.gate(y)) * self.fc1(y))


class TorchRetNet(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = T.Embedding(11, 16)
        self.positions = TorchRelativePositions(16, 2)
        self.layers = T.ModuleList([TorchRetNetBlock(16, 2), TorchRetNetBlock(16, 2)])
        self.norm, self.head = T.RMSNorm(16, eps=1e-6), T.Linear(16, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, positions = self.embedding(ids), self.positions(ids.shape[1])
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(self.norm(x))


def retnet(fault: str) -> tuple[Any, Any, Any]:
    return *with_equal_weights(RetNet(fault), TorchRetNet()), tokens(2, 9, below=11)


# ---- minGRU: a loop over time in MLX, a scan of logarithms in PyTorch ---------------------------------------


class MinGRU(M.Module):
    def __init__(self, dim: int, inner: int, fault: str = "") -> None:
        super().__init__()
        self.to_hidden_and_gate = M.Linear(dim, 2 * inner, bias=False)
        self.to_out = M.Linear(inner, dim, bias=False)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        hidden, gate = mx.split(self.to_hidden_and_gate(x), 2, axis=-1)
        if self.fault == "split":
            hidden, gate = gate, hidden
        offset = 1.0 if self.fault == "offset" else 0.5
        new, z = mx.where(hidden >= 0, hidden + offset, mx.sigmoid(hidden)), mx.sigmoid(gate)
        h, states = mx.zeros_like(z[:, 0]), []
        for t in range(x.shape[1]):
            if self.fault == "gates":
                h = z[:, t] * h + (1 - z[:, t]) * new[:, t]
            else:
                h = (1 - z[:, t]) * h + z[:, t] * new[:, t]
            states.append(h)
            if self.fault == "detached":
                h = mx.stop_gradient(h)
        if self.fault == "delay":
            states = [mx.zeros_like(h), *states[:-1]]
        return self.to_out(mx.stack(states, axis=1))


class MinGRUBlock(M.Module):
    def __init__(self, dim: int, fault: str = "") -> None:
        super().__init__()
        self.norm1, self.norm2 = M.RMSNorm(dim), M.RMSNorm(dim)
        self.depth, self.point = M.Conv1d(dim, dim, 3, groups=dim), M.Conv1d(dim, dim, 1)
        self.gru = MinGRU(dim, 18, fault)
        self.up, self.down = M.Linear(dim, 24), M.Linear(24, dim)
        self.fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        sides = (1, 1) if self.fault == "centre" else (2, 0)
        y = self.point(self.depth(mx.pad(x, [(0, 0), sides, (0, 0)])))
        x = y if self.fault == "residual" else x + y
        x = x + (self.norm1(self.gru(x)) if self.fault == "post" else self.gru(self.norm1(x)))
        return x + self.down(M.gelu(self.up(self.norm2(x))))


class MinGRUModel(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.embedding = M.Embedding(11, 12)
        self.layers = [MinGRUBlock(12), MinGRUBlock(12, fault)]
        self.norm, self.head = M.RMSNorm(12), M.Linear(12, 11, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class TorchMinGRU(T.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.to_hidden_and_gate = T.Linear(dim, 2 * inner, bias=False)
        self.to_out = T.Linear(inner, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, gate = self.to_hidden_and_gate(x).chunk(2, dim=-1)
        log_new = torch.where(hidden >= 0, (F.relu(hidden) + 0.5).log(), -F.softplus(-hidden))
        log_values, log_keep = -F.softplus(-gate) + log_new, (-F.softplus(gate)).cumsum(dim=1)
        states = (log_keep + (log_values - log_keep).logcumsumexp(dim=1)).exp()
        return self.to_out(states)


class TorchMinGRUBlock(T.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = T.RMSNorm(dim, eps=1e-5), T.RMSNorm(dim, eps=1e-5)
        self.depth, self.point = T.Conv1d(dim, dim, 3, groups=dim), T.Conv1d(dim, dim, 1)
        self.gru = TorchMinGRU(dim, 18)
        self.up, self.down = T.Linear(dim, 24), T.Linear(24, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.point(self.depth(F.pad(x.transpose(1, 2), (2, 0)))).transpose(1, 2)
        x = x + self.gru(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TorchMinGRUModel(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = T.Embedding(11, 12)
        self.layers = T.ModuleList([TorchMinGRUBlock(12), TorchMinGRUBlock(12)])
        self.norm, self.head = T.RMSNorm(12, eps=1e-5), T.Linear(12, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def mingru(fault: str) -> tuple[Any, Any, Any]:
    return *with_equal_weights(MinGRUModel(fault), TorchMinGRUModel()), tokens(2, 9, below=11)
