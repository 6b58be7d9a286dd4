"""PyTorch modules of users to port: what people write by hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        if out.shape == x.shape:
            out += x
        return self.relu(out)


class ConvNet(nn.Module):
    """A residual network with a list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.ModuleList([Block(8, 8) for _ in range(3)])
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = x.mean((2, 3))
        return self.head(self.drop(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)).bool(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.heads)
        scores = scores.masked_fill(~self.mask[:T, :T], float("-inf"))
        weights = F.dropout(F.softmax(scores, dim=-1), 0.1, self.training)
        y = (weights @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.proj(y)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder with attention by hand and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 16), nn.Embedding(32, 16)
        self.layers = nn.ModuleList([Layer(16, 2) for _ in range(2)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        _, T = ids.shape
        x = self.tokens(ids) + self.positions(torch.arange(T))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Tagger(nn.Module):
    """Recurrent layers, assignments to slices, and a buffer that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 4, batch_first=True)
        self.out = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        h, (last, _) = self.lstm(self.embedding(ids))
        h, _ = self.gru(h)
        h[:, 0] = 0
        h[:, 1:] += h[:, :-1].clone()
        return {"logits": self.out(h), "last": last[-1]}


class UNet(nn.Module):
    """Skips, resizes to the size of another image, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.down2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.LeakyReLU(0.1))
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        u = F.interpolate(self.up(b), size=a.shape[2:], mode="bilinear", align_corners=False)
        return self.out(torch.cat([u, a], dim=1))


class Branches(nn.Module):
    """Another computation in training mode, and values that are kept between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            batch = x.detach().mean(0)
            self.mean.mul_(0.9).add_(0.1 * batch)
            return self.linear(x - batch)
        return self.linear(x - self.mean)


class Graph(nn.Module):
    """A layer of a graph: gather and scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges
        messages = self.linear(x)[source]
        total = torch.zeros(x.shape[0], 4).index_add(0, target, messages)
        count = torch.zeros(x.shape[0]).scatter_add_(0, target, torch.ones(target.shape[0]))
        return total / count.clamp(min=1).unsqueeze(-1)


class Pyramid(nn.Module):
    """Results that are appended to a list in a loop, from variables of one name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for layer in self.layers:
            y = layer(x)
            y = y + x
            results.append(self.act(y))
        return results


class Control(nn.Module):
    """A condition on the values of a tensor, which cannot be ported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = x * 2
        return x


class Missing(nn.Module):
    """Operations without a counterpart."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.special.bessel_j0(x)
        return torch.special.airy_ai(y) + torch.special.bessel_j0(y)


class Net(nn.Module):
    """For the command: a small image classifier without arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().amax((2, 3)))
