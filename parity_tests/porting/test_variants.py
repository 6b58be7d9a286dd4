"""Variants of a class of the original are one class in the source of a port, and sizes are written as there."""

from __future__ import annotations

import math
import re
from collections import OrderedDict

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import pytest
import torch
from made_ports import close, ported
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Attention with sizes that its forward computes."""

    def __init__(self, dim: int, num_heads: int, is_causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.is_causal = num_heads, is_causal
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        if self.num_heads == 1:
            y = (q @ k.transpose(-2, -1) * (1.0 / math.sqrt(k.size(-1)))).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


class Attentions(nn.Module):
    def __init__(self, *heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(12, count, index == 0) for index, count in enumerate(heads)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def source_of(module: nn.Module, *args: torch.Tensor) -> str:
    """Ports a module, compares it on the arguments and returns the source."""
    model, source = ported(module.eval(), *args)
    close(model(*(mx.array(item.numpy()) for item in args)), module(*args))
    return source


def test_sizes_that_the_forward_computes_are_computed() -> None:
    source = source_of(Attentions(1), torch.randn(2, 5, 12))
    assert "B, T, C = x.shape" in source, source
    assert ".reshape(B, T, 3, self.num_heads, C // self.num_heads)" in source and ".reshape(B, T, C)" in source
    assert "* (1.0 / math.sqrt(k.shape[-1]))" in source


def test_a_causal_mask_is_an_argument_of_one_class() -> None:
    source = source_of(Attentions(2, 3), torch.randn(2, 5, 12))
    assert source.count("class Attention(") == 1 and "class Attention2" not in source, source
    assert (
        "scale=q.shape[-1] ** -0.5, mask=self.mask)" in source
        and 'Attention(12, 2, mask="causal"), Attention(12, 3)' in source
    )


class Layer(nn.Module):
    """A layer of a graph network, which joins its heads or takes their mean."""

    def __init__(self, dim: int, heads: int, concat: bool) -> None:
        super().__init__()
        self.dim, self.heads, self.concat = dim, heads, concat
        self.fc = nn.Linear(12, heads * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x).view(-1, self.heads, self.dim)
        y = y.tanh() * y.softmax(1)
        return y.reshape(-1, self.heads * self.dim) if self.concat else y.mean(1)


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Layer(4, 3, True), Layer(5, 1, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def test_a_flag_of_the_original_decides_between_two_variants() -> None:
    source = source_of(Graph(), torch.randn(7, 12))
    assert source.count("class Layer") == 1 and "if self.concat:" in source, source
    assert "Layer(4, 3, True)" in source and "Layer(5, 1, False)" in source
    assert ".reshape(-1, self.heads, self.dim)  # [B, heads, dim]" in source  # also where the heads are 1


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = self.fc(x)
        y = y if bias is None else y * bias
        y = y.tanh()
        return y + x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Biased(), Biased()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x), x.cos())


def test_a_further_argument_is_optional() -> None:
    source = source_of(Twice(), torch.randn(3, 4))
    assert source.count("class Biased") == 1 and "def __call__(self, x, bias=None):" in source, source
    assert "if bias is not None:" in source


class Given(nn.Module):
    """It computes the argument that some calls lack, and returns another number of values then."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.fc(x).tanh()
        if bias is None:
            bias = y.sum(0)
        y = y * bias
        return y + 1, bias


class GivenTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Given(), Given()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, bias = self.first(x)
        return self.last(x, bias)[0]


def test_an_argument_that_gets_a_value_decides_nothing_later() -> None:
    source_of(GivenTwice(), torch.randn(3, 4))


class Depth(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1.0 - self.p) if self.training and self.p > 0 else x


class Depths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.depths = nn.ModuleList([Depth(p) for p in (0.0, 0.25, 0.5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for depth in self.depths:
            x = depth(self.fc(x))
        return x


def test_a_rate_of_zero_is_no_class_of_its_own() -> None:
    source = source_of(Depths(), torch.randn(3, 4))
    assert source.count("class Depth") == 2 and "if self.training and self.p:" in source, source
    assert "[Depth(0.0), Depth(0.25), Depth(0.5)]" in source and "(1 - self.p)" in source


class Stack(nn.Module):
    def __init__(self, dim: int = 4, depth: int = 3) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(depth):
            layers[f"layer_{index}"] = nn.Linear(dim, dim)
        self.layers = nn.Sequential(layers)
        self.head = nn.Sequential(OrderedDict([("norm", nn.LayerNorm(dim)), ("fc", nn.Linear(dim, 2))]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


def test_a_sequence_with_names_is_called() -> None:
    source = source_of(Stack(), torch.randn(3, 4))
    assert '"layer_{i}": nn.Linear(dim, dim) for i in range(3)' in source, source
    assert '{"norm": nn.LayerNorm(dim), "fc": nn.Linear(dim, 2)}' in source
    assert "return self.head(self.layers(x))" in source and source.count("class NamedSequential") == 1


@pytest.mark.parametrize("name", ["B", "C", "T"])
def test_each_size_has_one_name(name: str) -> None:
    source = source_of(Attentions(3), torch.randn(2, 5, 12))
    [sizes] = re.findall(r"^ +(.*) = x\.shape$", source, re.MULTILINE)
    assert sizes.split(", ").count(name) == 1
