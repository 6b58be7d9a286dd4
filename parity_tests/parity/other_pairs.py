"""Pairs of temporal, diffusion and graph networks as users write them, and faults of each (`pair_faults`)."""

from __future__ import annotations

import math
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw, tokens, with_equal_weights

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
