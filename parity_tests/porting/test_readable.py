"""The source of a port as an MLX engineer would have written it: names of sizes, numbers, heads, classes."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import pytest
import torch
from made_ports import close, ported
from torch import nn

from icenet.core.porting.record import Tensor
from icenet.core.porting.source.simplify import simplified, text
from icenet.core.porting.source.sizes import named, shape_comment


@pytest.mark.parametrize(
    ("code", "written"),
    [
        ("y = x + 1e-06", "y = x + 1e-6"),
        ("y = mx.where(m, -1000000000.0, x)", "y = mx.where(m, -1e9, x)"),
        ("y = x * 8 ** -0.5", "y = x * 8**-0.5"),
        ("y = [int(b**v) for v in f(x ** (-n))]", "y = [int(b**v) for v in f(x**-n)]"),
        ("y = (x + 1) ** 0.3", "y = (x + 1) ** 0.3"),
        ("y = f(x) ** 0.3", "y = f(x) ** 0.3"),
        ("y = f('at 1e-06')", 'y = f("at 1e-06")'),
        ("y = x - 250.0", "y = x - 250.0"),
    ],
)
def test_numbers_are_written_in_the_shortest_way(code: str, written: str) -> None:
    assert text(simplified(code)) == written


def test_sizes_have_the_letters_of_their_axes() -> None:
    names = named([("s0", 3, "s1", "s2")], set())
    assert names == {"s0": "B", "s1": "H", "s2": "W"}
    assert shape_comment(Tensor(("s0", "2*((s1//2))", "((s2//2)) + 1", 8), "float32"), names) == (
        "[B, 2*(H//2), W//2 + 1, 8]"
    )
    assert shape_comment(Tensor(("s0", "s2*s1"), "float32"), names) == "[B, H*W]"
    assert shape_comment(Tensor(("s0", "u7"), "float32"), names) == ""  # a size of no argument
    assert named([("s0", 4, "s1", 8), ("s0", "s2", 8)], set()) == {"s0": "B", "s1": "T", "s2": "T2"}
    assert named([("s0", "s1", 8)], {"B", "C"}) == {"s0": "b", "s1": "T"}  # B and C are matrices here


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        q = self.q(x).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        k = self.k(memory).view(memory.shape[0], memory.shape[1], 2, 4).transpose(1, 2)
        x = (q @ k.transpose(-2, -1)) @ k
        return x.transpose(1, 2).reshape(q.shape[0], q.shape[2], 8)


class Translation(nn.Module):
    """Two sequences of other lengths, each of which is the first argument of the same class once, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.first, self.second = Attention(), Attention()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = self.table(a), self.table(b)
        x, y = self.first(a, b), self.second(b, a)
        return torch.nn.functional.linear(x[:, [-1]], self.table.weight), y


def test_a_class_has_the_names_of_its_own_sizes() -> None:
    module, a, b = Translation().eval(), torch.randint(0, 9, (2, 5)), torch.randint(0, 9, (2, 3))
    model, source = ported(module, a, b)
    assert source.count("class Attention") == 1, source
    assert "B, T, _ = x.shape" in source and "# [B, 2, T, 4]" in source and "x_2" not in source.partition("Trans")[0]
    assert "self.table.as_linear(x[:, -1:])" in source
    for ours, theirs in zip(model(mx.array(a.numpy()), mx.array(b.numpy())), module(a, b), strict=True):
        close(ours, theirs)


class Heads(nn.Module):
    """Parts of one statement, one that a later statement names, and variables with the names of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.view(part.shape[0], -1, 2, 2) for part in qkv)
        a, b = q[..., :1], k[..., 1:]
        a, b = b + v.mean(), a
        std = a * b
        attention = std.exp() + std
        return attention / (1 + attention)


def test_variables_have_the_names_of_the_original() -> None:
    module, x = Heads(), torch.randn(2, 3, 4)
    model, source = ported(module, x)
    close(model(mx.array(x.numpy())), module(x))
    assert "q, k, v = mx.split(self.qkv(x), 3, axis=-1)" in source
    assert "a, b = q[..., :1], k[..., 1:]" in source
    assert "std = " in source and "attention = mx.exp(std) + std" in source, source


class Causal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            x, x, x, dropout_p=0.1 if self.training else 0.0, is_causal=True
        )


def test_a_branch_for_a_mask_that_is_always_made_is_folded() -> None:
    _, source = ported(Causal(), torch.randn(2, 2, 5, 4))
    assert "mask = mx.tril" in source and "mask is None" not in source


class Thirds(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = x.chunk(3, dim=1)
        return (a - b).cumsum(1) + c.sum()


def test_parts_of_an_open_size() -> None:
    model, _ = ported(Thirds(), torch.randn(2, 8))
    for length in (8, 11):
        x = torch.randn(2, length)
        close(model(mx.array(x.numpy())), Thirds()(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight[:, None, None] * self.conv(x)


def test_a_vector_of_channels_needs_no_axes_before_channels_that_are_last() -> None:
    module, x = Scaled().eval(), torch.randn(2, 3, 4, 5)
    model, source = ported(module, x)
    close(model(mx.array(x.numpy())), module(x))
    assert "self.weight * self.conv(" in source or "= self.weight * " in source, source
    assert "self.weight[" not in source
