"""The source of a port as an MLX engineer would have written it: names of sizes, numbers, heads, classes."""

from __future__ import annotations

from pathlib import Path

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import pytest
import torch
from made_ports import close, ported
from torch import nn

from icenet.core.porting.record import Tensor
from icenet.core.porting.source.originals import second_name
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
        ("y = f(mx.pad(x, [(0, 0), (0, 0)]))", "y = f(x)"),
        ("y = f(mx.pad(x, [(0, 0), (0, 10)]))", "y = f(mx.pad(x, [(0, 0), (0, 10)]))"),
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


class Repeated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        x = x.mean(1)
        return x[:, None].expand(-1, length, -1)


class Joint(nn.Module):
    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        q = x.view(x.shape[0], x.shape[1], 2, 2).transpose(1, 2)
        k = memory.view(memory.shape[0], memory.shape[1], 2, 2).transpose(1, 2)
        return q @ k.transpose(2, 3)


class Flat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(x.shape[0], 12)
        return x * 2


class Shifted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, 1:]
        length = x.shape[1]
        x = x.mean(1)
        return x[:, None].expand(-1, length, -1)


@pytest.mark.parametrize(
    ("module", "lengths", "written"),
    [
        (Repeated(), (3,), ["T = x.shape[1]", "x = x.mean(axis=1)"]),  # read after x has another value
        (Joint(), (3, 5), ["B, T, _ = x.shape", "memory.reshape(B, memory.shape[1], 2, 2)"]),  # one B for both
        (Flat(), (3,), ["x = x.reshape(x.shape[0], 12)"]),
        (Shifted(), (3,), ["x.shape[1], x_2.shape[2])"]),  # the length of the part, as in the original
    ],
    ids=["replaced", "two", "once", "part"],
)
def test_sizes_are_read_where_the_original_reads_them(
    module: nn.Module, lengths: tuple[int, ...], written: list[str]
) -> None:
    model, source = ported(module, *(torch.randn(2, length, 4) for length in lengths))
    assert all(text in source for text in written), source
    given = [torch.randn(3, length if isinstance(module, Flat) else length + 1, 4) for length in lengths]
    close(model(*(mx.array(x.numpy()) for x in given)), module(*given))


def test_a_second_name_is_that_of_the_value_and_of_its_function(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        """\
def forward(x):
    first = x
    shortcut = x
    def inner(x):
        own = x
        x = x + 1
        return own
    x = norm(x)
    x = inner(x) + shortcut
    return x, first
"""
    )
    assert second_name(str(file), "x", 0, 8) == "shortcut"  # the last one
    assert second_name(str(file), "x", 0, 6) == "own"
    assert second_name(str(file), "x", 8, 9) == ""  # both names are those of the parameter


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


class Rotated(nn.Module):
    """Takes a pair apart, and keeps its input under a second name while a variable has other values."""

    def __init__(self, dim: int, drop: float, rate: float) -> None:
        super().__init__()
        self.norm, self.fc, self.rate, self.drop = nn.LayerNorm(dim), nn.Linear(dim, dim), rate, drop

    def forward(self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cos, sin = tables
        shortcut = x
        x = self.norm(x)
        x = self.fc(x * cos + x.flip(-1) * sin)
        x = shortcut + x * self.rate
        residual = x
        x = self.norm(x).relu()
        x = residual - x
        return x


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(x.shape[1])[:, None] * self.angles
        return angles.cos(), angles.sin()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = Tables()
        self.layers = nn.ModuleList([Rotated(8, 0.0, 0.5), Rotated(8, 0.1, 0.25)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tables = self.tables(x)
        for layer in self.layers:
            residual = x
            x = layer(x, tables)
            x = layer(x + residual, tables) * residual
        return x


def test_second_names_parts_and_numbers_have_the_names_of_the_original() -> None:
    module, x = Layers().eval(), torch.randn(2, 3, 8)
    model, source = ported(module, x)
    assert "def __call__(self, x, cos, sin):" in source and "cos, sin = self.tables(x.shape[1])" in source, source
    assert "shortcut = x" in source and "return residual - " in source and "x_2" not in source
    assert "def __init__(self, dim, rate):" in source and "x * self.rate" in source
    assert "for layer in self.layers:" in source and "        residual = x" in source
    for B, T in ((2, 3), (1, 7)):
        x, factor = torch.randn(B, T, 8, requires_grad=True), torch.randn(B, T, 8)
        y = module(x)
        y.backward(factor)
        (ours,), (gradient,) = mx.vjp(model, [mx.array(x.detach().numpy())], [mx.array(factor.numpy())])
        assert x.grad is not None
        close(ours, y)
        close(gradient, x.grad)


class Kept(nn.Module):
    """A value that a later expression reads has no second name while its variable has another value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        y = x * 2
        x = x.exp()
        x = x + y
        z = first + x
        x = z * first
        return x


def test_a_second_name_changes_no_value() -> None:
    x = torch.randn(2, 3)
    model, source = ported(Kept(), x)
    close(model(mx.array(x.numpy())), Kept()(x))
    assert "first" in source


class Joined(nn.Module):
    """A value without a name, and the states of a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 4)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x.softmax(-1).transpose(1, 2), None

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, _ = self.heads(x)
        y = y.reshape(x.shape[0], 8)
        h, c = self.cell(y, (h, c))
        return h, c


def test_values_without_a_name_and_states_of_a_cell() -> None:
    given = torch.randn(2, 4, 2), torch.randn(2, 4), torch.randn(2, 4)
    module = Joined().eval()
    model, source = ported(module, *given)
    assert ".swapaxes(1, 2).reshape(" in source and "transpose" not in source, source
    assert "(self, input, h, c):" in source and "h, c = lstm_cell(" in source and "return self.cell(" not in source
    for ours, theirs in zip(model(*(mx.array(x.numpy()) for x in given)), module(*given), strict=True):
        close(ours, theirs)


class Recurrences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(8, 4, batch_first=True)
        self.second = nn.LSTM(4, 6, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, (h, c) = self.first(x)
        h = torch.cat([h, c], -1)[..., :6].repeat(2, 1, 1)
        x, _ = self.second(x, (h, h.tanh()))
        return x


def test_layers_of_one_kind_with_other_options_are_one_class() -> None:
    module, x = Recurrences().eval(), torch.randn(2, 3, 8)
    model, source = ported(module, x)
    assert source.count("class LSTM") == 1 and "LSTM(8, 4, num_layers=1, dropout=0.0)" in source, source
    for B, T in ((2, 3), (1, 7)):
        x = torch.randn(B, T, 8)
        close(model(mx.array(x.numpy())), module(x))
