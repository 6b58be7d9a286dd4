"""The source of a port, next to what an MLX developer writes for the same module."""

from __future__ import annotations

import ast
import re
from itertools import pairwise

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn

from icenet.core.porting.graph.images import Images
from icenet.core.porting.record import Node, Ref, Tensor
from icenet.core.porting.source.simplify import simplified, text
from icenet.parity.ports.limits import Guard, Limits
from icenet.parity.ports.remainders import with_remainders


def checked(module: nn.Module, *args: torch.Tensor) -> str:
    """Returns the source of a port whose result is that of the module."""
    model, source = ported(module.eval(), *args)
    close(model(*(mx.array(item.numpy()) for item in args)), module(*args))
    return source


class Encoder(nn.Module):
    """Several statements on a line."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # fmt: off
        mu = torch.tanh(self.mean(x)); logvar = self.spread(x)  # noqa: E702
        total = mu + logvar; kept = total * mu  # noqa: E702
        # fmt: on
        return kept - logvar


def test_statements_on_one_line_have_their_variables() -> None:
    source = checked(Encoder(), torch.randn(2, 8))
    assert "mu, logvar = mx.tanh(self.mean(x)), self.spread(x)" in source, source
    assert "kept = (mu + logvar) * mu" in source and "return kept - logvar" in source


class Lists(nn.Module):
    """Statements on a line that assign to no variable, or of which one does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found, named = [], {}
        # fmt: off
        found.append(torch.tanh(x)); found.append(self.fc(x))  # noqa: E702
        named.update(a=x.exp()); named.update(b=self.fc(x)); y = x + 1  # noqa: E702
        # fmt: on
        return found[0] * found[1] + found[0] / found[1] + named["a"] * named["b"] + named["a"] / named["b"] + y * y


def test_values_of_other_statements_of_a_line_do_not_have_its_variable() -> None:
    source = checked(Lists(), torch.randn(2, 3))
    assert "y = x + 1" in source and source.count("y = ") == 1, source


class Unsure(nn.Module):
    """Lines whose statements do not tell which variable has which value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # fmt: off
        parts = [f(x) for f in (self.a, self.b)]; s = sum(parts)  # noqa: E702
        y = self.a(s) * s; size = y.shape[0]  # noqa: E702
        act = lambda v: v.sin() * v.cos()  # noqa: E731
        z = act(y) + size * y
        for t in x.unbind(1): z = torch.tanh(z + t[:, None] * z)  # noqa: E701
        # fmt: on
        return z * y + z * s


def test_no_variable_has_the_name_of_another_one() -> None:
    source = checked(Unsure(), torch.randn(2, 3))
    assert "add = self.a(x) + self.b(x)" in source and "y = self.a(add) * add" in source, source
    assert "z = mx.sin(y) * mx.cos(y) + y * x.shape[0]" in source and "for step in range(3):" in source
    assert not re.search(r"\b(parts|act|size|s|t)\b.* = ", source.partition("__call__")[2])


class Norm(nn.Module):
    """A layer norm by hand, over the last axis or the channels of images."""

    def __init__(self, size: int, is_image: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.bias = nn.Parameter(torch.randn(size)) if bias else None
        self.is_image = is_image

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_image:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.image, self.head = nn.Conv2d(3, 4, 1), Norm(4, True), Norm(4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.image(self.conv(x)).mean((2, 3)))


def test_a_layer_norm_by_hand_is_that_of_mlx() -> None:
    source = checked(Normed(), torch.randn(2, 3, 4, 5))
    assert "self.image = nn.LayerNorm(4, eps=1e-6)" in source, source
    assert "self.head = nn.LayerNorm(4, bias=False)" in source
    assert "class Norm(" not in source and source.count("transpose") == 1


def test_a_prelu_keeps_images_with_channels_last() -> None:
    convs = nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 4, 1), nn.PReLU(), nn.Conv2d(4, 2, 1), nn.PReLU(2)
    module = nn.Sequential(*convs)
    with torch.no_grad():
        module[1].weight.copy_(torch.arange(4) / 4)
    source = checked(module, torch.randn(2, 3, 4, 5))
    assert source.count("leaky_relu(input, self.weight)") == 1 and source.count("transpose") == 2, source


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.token = nn.Embedding(9, 4), nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        place = torch.arange(x.shape[1])
        x = x + self.table(place)[None] * (torch.arange(x.shape[1]) < 2)[:, None]
        step = torch.arange(x.shape[1])
        return torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1), step * 2


def test_a_range_has_a_dtype_only_if_a_result_has_it() -> None:
    x = torch.randn(2, 3, 4)
    model, source = ported(Positions().eval(), x)
    assert "place = mx.arange(T)" in source and "mx.arange(T) < 2" in source, source
    assert "mx.broadcast_to(self.token, (B, *self.token.shape[1:]))" in source and "def expand" not in source
    assert np.array(model(mx.array(x.numpy()))[1]).dtype == np.int64


class Choices(nn.Module):
    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ids = torch.min(ids, torch.full_like(ids, 3))
        x = torch.where(x > 0, x, torch.tensor(0.5))
        start = torch.empty(x.shape[0], 1).fill_(0)
        return torch.cat((start, x), dim=1) + ids[:, None]


def test_numbers_are_no_arrays() -> None:
    source = checked(Choices(), torch.randn(2, 3), torch.tensor([1, 7]))
    assert "mx.where(x > 0, x, 0.5)" in source and "mx.minimum(ids, " in source, source
    assert "mx.zeros((B, 1))" in source and "def minimum" not in source


@pytest.mark.parametrize(
    ("code", "written"),
    [
        ("y = mx.full((B, 1), 0, mx.int64)", "y = mx.zeros((B, 1), mx.int64)"),
        ("y = mx.full(x.shape, 1, mx.float32)", "y = mx.ones(x.shape)"),
        ("y = mx.full(x.shape, 2, mx.float32)", "y = mx.full(x.shape, 2, mx.float32)"),
        ("y = mx.full(mx.zeros((B, 1)).shape, 3, mx.int64)", "y = mx.full((B, 1), 3, mx.int64)"),
    ],
)
def test_new_arrays(code: str, written: str) -> None:
    assert text(simplified(code)) == written


class Causal(nn.Module):
    """Convolutions of sequences with their channels last, as in WaveNet and Mamba."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 4, 2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, C]
        x = F.relu(self.conv(F.pad(x.transpose(1, 2), (1, 0))))[:, :, : x.shape[1]]
        return self.head(x.transpose(1, 2))


class Scaled(nn.Module):
    """Images with a scale for each channel, as in a U-Net of a diffusion, and blocks that end with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time, self.mlp = nn.Conv2d(3, 4, 3), nn.Linear(5, 8), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        x = self.conv(x) * (scale + 1) + shift
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_strings_have_double_quotes_and_those_within_them_single_ones() -> None:
    """`ast.unparse` of Python 3.12 and later writes both with single quotes, which earlier versions cannot read."""
    for code in ("x = f\"{names['a']}_{i}\"", "x = f\"{f'{a}'}b\"", 'x = ["a", "it\'s", f"{n}", \'say "x"\']'):
        assert text(ast.parse(code).body[0]) == code


def test_axes_are_changed_once() -> None:
    assert "transpose" not in (source := checked(Causal(), torch.randn(2, 5, 4))), source
    source = checked(Scaled(), torch.randn(2, 3, 5, 6), torch.randn(2, 5))
    assert source.count("transpose") == 2 and "self.time(time)[:, None, None]" in source, source
    assert "self.conv(x.transpose(0, 2, 3, 1)) * (scale + 1) + shift" in source
    source = checked(Flat(), torch.randn(2, 3, 4, 5))
    assert "return input.transpose(0, 3, 1, 2).flatten(1)" in source, source
    assert "return self.net(x.transpose(0, 2, 3, 1))" in source


def test_a_value_may_have_any_number_of_operations_until_an_image() -> None:
    """More than Python has frames."""
    tensors = {f"x{number}": Tensor((2, 3, 4), "float32") for number in range(2000)}
    names = list(tensors)
    nodes = [Node(new, "mul.Tensor", {"self": Ref(old)}, tensors[new]) for old, new in pairwise(names)]
    for op, is_image in (("max_pool1d", True), ("sum", False)):
        images = Images(
            [*nodes, Node("y", op, {"self": Ref(names[-1])}, tensors["x0"])], {}, {**tensors, "y": tensors["x0"]}
        )
        assert images.ends_in_images("x1") == images.meets_images("x1") == is_image


class Chomp(nn.Module):
    def __init__(self, chomp_size: int) -> None:
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : -self.chomp_size, : -self.chomp_size] * 2


class Noise(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) / (1 - self.p)


class Chomps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.chomps = nn.ModuleList([Chomp(1), Chomp(2)])
        self.noises = nn.ModuleList([Noise(0.1), Noise(0.2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.blocks:
            x = x + name(x)
        x = F.linear(F.dropout(x, 0.0), self.blocks[0].weight, self.blocks[0].bias)
        for chomp, noise in zip(self.chomps, self.noises, strict=True):
            x = noise(chomp(x))
        return x


def test_loops_numbers_and_layers_have_the_names_of_the_original() -> None:
    source = checked(Chomps(), torch.randn(2, 6, 12))
    assert "for name in self.blocks:" in source and "self.blocks[0](x)" in source, source
    assert "return x[:, :-self.chomp_size, :-self.chomp_size] * 2" in source
    assert "/ (1 - self.p)" in source and "[Noise(0.1), Noise(0.2)]" in source
    assert "for noise, chomp in zip(self.noises, self.chomps):" in source and "dropout" not in source


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, 2, 4).permute(2, 0, 3, 1, 4)
        dropout = 0.1 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        y = self.out(y.transpose(1, 2).reshape(B, T, C))
        parts = y.split(4, dim=-1)
        y = torch.cat([part.sum(1) for part in parts], dim=-1)[:, None].expand(-1, T, -1) + y
        return y


def test_attention_is_a_statement_and_both_modes_share_the_rest() -> None:
    source = checked(Heads(), torch.randn(2, 3, 8))
    assert "            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=4**-0.5)" in source, source
    assert "            y = attention(q, k, v, dropout=0.1)" in source and source.count("reshape(B, T, C)") == 1


class Depth(nn.Module):
    """A stochastic depth: its argument in evaluation mode."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 1 - self.drop)) / (1 - self.drop)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, drop: float) -> None:
        super().__init__()
        self.conv, self.depth = nn.Conv2d(inputs, outputs, 1), Depth(drop)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depth(self.conv(x))
        return y + self.skip(x)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 1))
        self.blocks = nn.Sequential(Residual(4, 4, 0.1), Residual(4, 6, 0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.blocks(self.up(x)), scale_factor=(1, 3), mode="nearest")


def test_layers_that_do_nothing_in_a_mode_or_an_instance_are_in_one_class() -> None:
    source = checked(Decoder(), torch.randn(2, 3, 2, 3))
    assert "y = self.depth(self.conv(x))" in source
    assert "[Residual(4, 4, 0.1), Residual(4, 6, 0.2, skip=True)]" in source
    assert source.count("class ") == 4 and "else:\n            return x\n" in source and "Identity" not in source
    assert 'nn.Upsample(scale_factor=2, mode="nearest")' in source and "def upsample" not in source
    assert "mx.repeat(self.blocks(self.up(" in source


def test_guards_of_a_size_are_one_remainder() -> None:
    height, width = {"s0": ((0, 2),)}, {"s1": ((0, 3),)}
    guards = [Guard(text, height) for text in ("s0 % 4 == 0", "(s0 // 4) % 2 == 0", "s0 // 4 % 8 == 0")]
    others = [Guard("s1 < 5000 and s1 % 2 == 0", width), Guard("s0 <= s1", {**height, **width})]
    found = with_remainders(Limits({}, [*guards, *others]), [(1, 3, 64, 32)])
    assert [(guard.text, guard.places) for guard in found.guards[:1]] == [("s0 % 32 == 0", height)]
    assert found.guards[1:] == others
    assert with_remainders(Limits({}, guards), [(1, 3, 33, 32)]).guards == guards  # an example that violates them


class Messages(nn.Module):
    """The sums of a graph network, and a value that is replaced."""

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        row, col = edges
        count = torch.zeros(x.shape[0]).scatter_add_(0, col, torch.ones(col.shape[0])) ** -0.5
        count[count == float("inf")] = 0
        return torch.zeros_like(x).index_add_(0, col, count[row].unsqueeze(-1) * x[row])


def test_sums_at_indices() -> None:
    source = checked(Messages(), torch.randn(4, 3), torch.randint(0, 3, (2, 9)))
    assert ".at[col].add(" in source and "def " not in source.partition("class ")[0], source
    assert 'mx.where(count == float("inf"), 0.0, count)' in source
