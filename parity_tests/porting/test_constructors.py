"""Constructors of a port: the arguments of the original's, and the expressions that it gives to its layers."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import torch
from made_ports import close, ported
from torch import nn

from icenet.core.porting import build
from icenet.parity.ports.model_file import model_file
from icenet.parity.ports.original import Original


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int = 4, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        inner = heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=bias)
        self.out = nn.Linear(inner, out_features=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int | None = None, drop: float = 0.1) -> None:
        super().__init__()
        hidden = hidden or 4 * dim
        self.gain = nn.Parameter(torch.ones(dim))
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(drop))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x)) * self.gain
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, width: int = 12, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, 2) for _ in range(depth)])
        self.last = Block(width, heads=3, hidden=5 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def test_a_class_has_the_arguments_of_the_original() -> None:
    module, x = Model().eval(), torch.randn(2, 5, 12)
    model, source = ported(module, x)
    assert "def __init__(self, dim, heads):" in source and "self.head_dim = dim // heads" in source
    assert "nn.Linear(dim, 3 * inner, bias=False)" in source and "nn.Linear(inner, dim)" in source
    assert "def __init__(self, dim, heads, hidden, drop=0.1):" in source and "Attention(dim, heads)" in source
    assert "nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(drop)" in source
    assert "mx.ones((dim,))" in source
    assert "def __init__(self, width=12, depth=2):" in source
    assert "[Block(width, 2, 48) for _ in range(depth)]" in source and "Block(width, 3, 5 * width)" in source
    close(model(mx.array(x.numpy())), module(x))
    names: dict[str, Any] = {}
    exec(source, names)  # another size
    assert names["Model"](width=18, depth=1)(mx.zeros((1, 3, 18))).shape == (1, 3, 18)


class Stack(nn.Module):
    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.hidden = dim * ratio
        inner = dim * 3
        self.a = nn.Sequential(nn.Conv2d(dim, self.hidden, 1), nn.BatchNorm2d(self.hidden), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(self.hidden, inner, 1), nn.BatchNorm2d(inner), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(inner, 2 * dim, 1), nn.BatchNorm2d(2 * dim), nn.ReLU())
        self.d = nn.Sequential(nn.Conv2d(2 * dim, dim, 1), nn.BatchNorm2d(dim), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x))))


def test_a_repeated_sequence_takes_expressions_of_arguments() -> None:
    module, x = Stack(3).eval(), torch.randn(2, 3, 4, 5)
    model, source = ported(module, x)
    assert "self.b = conv_block(self.hidden, inner)" in source and "conv_block(inner, 2 * dim)" in source
    assert "self.hidden = dim * ratio" in source and "inner = dim * 3" in source
    close(model(mx.array(x.numpy())), module(x))


class Layer(nn.Module):
    def __init__(self, config: SimpleNamespace, index: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        hidden = config.inner if config.inner is not None else 3 * self.hidden_size
        self.norm = nn.LayerNorm(self.hidden_size, eps=config.eps)
        self.up, self.down = nn.Linear(config.hidden_size, hidden), nn.Linear(hidden, config.hidden_size)
        self.drop, self.scale = nn.Dropout(config.drop), 1 / (index + 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(self.up(self.norm(x)).relu())) * self.scale


class Configured(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(config.vocab_size, config.hidden_size), nn.Dropout(config.embed_drop)
        self.layers = nn.ModuleList([Layer(config, index) for index in range(config.num_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.embed(ids))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_numbers_of_a_configuration_are_one_argument() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 12, "num_layers": 3, "inner": None}
    config = SimpleNamespace(eps=1e-6, drop=0.1, embed_drop=0.2, **sizes)
    module, ids = Configured(config).eval(), torch.randint(0, 20, (2, 5))
    model, source = ported(module, ids)
    export = Original(module, (ids,)).export(open_loops=True)
    plan = build.plan(export.graph, export.train, False, "A port.")
    written = model_file(plan.source, plan, [ids.numpy()], is_nhwc=False)
    assert "\n\nfrom dataclasses import dataclass\nfrom pathlib import Path\n\nimport mlx" in written
    assert (
        "    vocab_size: int = 20\n    hidden_size: int = 12\n    embed_drop: float = 0.2\n    eps: float = 1e-6"
        in source
    )
    assert "def __init__(self, config=Config()):" in source and "def __init__(self, config, scale):" in source
    assert "nn.LayerNorm(config.hidden_size, eps=config.eps)" in source and "Layer(config, 0.5)" in source
    assert "hidden = 3 * config.hidden_size" in source and "nn.Linear(config.hidden_size, hidden)" in source
    close(model(mx.array(ids.numpy())), module(ids))


class Scaled(nn.Module):
    """Numbers in the method are those of attributes, which are arguments or computed from them."""

    def __init__(self, dim: int, slope: float = 0.2, eps: float = 1e-3) -> None:
        super().__init__()
        self.scale, self.slope, self.eps = dim**-0.5, slope, eps
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x) * self.scale + self.slope
        return y / (y.pow(2).mean(-1, keepdim=True) + self.eps)


def test_numbers_of_methods_are_attributes() -> None:
    module, x = Scaled(16).eval(), torch.randn(2, 16)
    model, source = ported(module, x)
    assert "self.scale = dim**-0.5" in source and "* self.scale + self.slope" in source and "+ self.eps" in source
    assert "def __init__(self, dim=16, slope=0.2, eps=0.001):" in source
    close(model(mx.array(x.numpy())), module(x))


class WithOption(nn.Module):
    """Its call has an argument with a default that is written as a number or a boolean."""

    def __init__(self, dim: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, is_causal: bool = False, power: int = 2) -> torch.Tensor:
        y = self.fc(x).reshape(x.shape[0] * self.heads, 1, -1)
        return y**power if not is_causal else y


def test_defaults_of_a_method_are_not_the_numbers_in_its_statements() -> None:
    module, x = WithOption().eval(), torch.randn(2, 6)
    model, source = ported(module, x)
    assert "reshape(x.shape[0] * self.heads, 1, -1)" in source and "is_causal=False, power=2" in source
    close(model(mx.array(x.numpy())), module(x))


class Classifier(nn.Module):
    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


def test_a_layer_that_was_replaced_has_its_own_numbers() -> None:
    module, x = Classifier().eval(), torch.randn(2, 6)
    module.head = nn.Linear(6, 7)
    model, source = ported(module, x)
    assert "self.body = nn.Linear(dim, dim)" in source and "self.head = nn.Linear(dim, 7)" in source
    close(model(mx.array(x.numpy())), module(x))


class Circular(nn.Module):
    """Variables and attributes that are computed from each other."""

    def __init__(self, size: tuple[int, int] = (16, 24), heads: int = 4, wrap: bool = False) -> None:
        super().__init__()
        height, width = size
        if height > width:
            height = width
        else:
            width = height
        self.inner = size[0]
        self.head_dim = self.inner // heads
        self.inner = self.head_dim * heads
        self.input = nn.Linear(height, width)
        self.query = nn.Linear(width, self.inner)
        self.layers = nn.ModuleList()
        for layer in (nn.Linear(self.inner, heads), nn.Linear(heads, self.inner)):
            layer = nn.Sequential(layer, nn.ReLU()) if wrap else layer
            self.layers.append(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.query(self.input(x))
        q = q.view(len(x), -1, self.head_dim).flip(1).reshape(len(x), -1)
        for layer in self.layers:
            q = layer(q)
        return q * self.inner


def test_what_is_computed_from_itself_is_no_expression() -> None:
    module, x = Circular().eval(), torch.randn(2, 16)
    model, source = ported(module, x)
    assert "def __init__(self, heads=4, head_dim=4):" in source and "self.inner = self.head_dim * heads" in source
    close(model(mx.array(x.numpy())), module(x))


class Literals(nn.Module):
    """Attributes that have by chance the numbers which the method writes."""

    def __init__(self, dim: int = 8, alpha: float = 0.3, temperature: float = 0.5) -> None:
        super().__init__()
        self.alpha, self.num_heads, self.temperature = alpha, 4, temperature
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x) + 0.3 * x - self.alpha
        return y.reshape(-1, 4, 2).softmax(-1) / self.num_heads


class Halved(Literals):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).sigmoid() * self.temperature


def test_numbers_that_a_method_writes_are_no_attributes() -> None:
    _, source = ported(Literals().eval(), torch.randn(2, 8))
    assert "0.3 * x" in source.replace("x * 0.3", "0.3 * x") and "self.alpha" not in source
    assert "reshape(-1, 4, 2)" in source
    _, source = ported(Halved().eval(), torch.randn(2, 8))
    assert "* self.temperature" in source and "temperature=0.5" in source


class Swapped(nn.Linear):
    def __init__(self, out: int, size: int) -> None:
        super().__init__(size, out)


class Multiple(nn.Linear):
    def __init__(self, size: int, mult: int = 3) -> None:
        super().__init__(size, size * mult)


class Called(nn.Module):
    """Layers that something else than their class makes, with the arguments in another order."""

    def __init__(self, a: int = 6, b: int = 8, c: int = 2) -> None:
        super().__init__()
        turned, begun = lambda out, size: nn.Linear(size, out), partial(nn.Linear, a)
        self.own = Swapped(a, b)
        self.turned, self.begun = turned(b, a), begun(c)
        self.last = Multiple(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.begun(self.own(self.turned(self.own(x)))))


def test_arguments_of_what_makes_a_layer_are_not_taken_for_those_of_the_layer() -> None:
    module, x = Called().eval(), torch.randn(2, 8)
    model, source = ported(module, x)
    assert "self.own = nn.Linear(b, a)" in source and "self.turned = nn.Linear(a, b)" in source
    assert "self.begun = nn.Linear(a, c)" in source and "self.last = nn.Linear(c, c * 3)" in source
    close(model(mx.array(x.numpy())), module(x))


class Chance(nn.Module):
    """Numbers that are equal by chance: 2 * dim and heads * dim, max(dim, 4) and max(dim, 6)."""

    def __init__(self, dim: int = 8, heads: int = 2, is_wide: bool = False, least: int = 4) -> None:
        super().__init__()
        if is_wide:
            self.a = nn.Linear(dim, 2 * dim)
        else:
            self.a = nn.Linear(dim, heads * dim)
        self.b = nn.Linear(dim, max(dim, least))
        self.c = nn.Linear(dim, dim if heads is None else dim * heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x)], -1)


def test_an_expression_that_agrees_by_chance_is_not_written() -> None:
    _, source = ported(Chance(least=6).eval(), torch.randn(2, 8))
    assert "self.a = nn.Linear(dim, 16)" in source and "self.b = nn.Linear(dim, 8)" in source
    assert "self.c = nn.Linear(dim, dim * heads)" in source and "least" not in source


class Changed(nn.Module):
    """Arguments that change: their numbers in layers are not those that were given."""

    def __init__(self, dim: int = 4, width: int = 5) -> None:
        super().__init__()
        dim = dim * 2
        width = max(width, 3)
        self.a, self.b = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def test_an_argument_that_the_constructor_changes_is_a_number() -> None:
    _, source = ported(Changed().eval(), torch.randn(2, 8))
    assert "def __init__(self, width=5)" in source and "self.a = nn.Linear(8, width)" in source


class Heads(nn.Module):
    def __init__(self, dim: int = 8, heads: int = 2, rate: float = 0.25) -> None:
        super().__init__()
        self.heads, self.head_dim, self.rate = heads, dim // heads, rate
        self.q = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (self.q(x) * self.head_dim**-0.5).softmax(-1)
        return y / math.sqrt(self.head_dim) * (1 - self.rate)


class Both(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.a, self.b = Heads(dim), Heads(dim, 4, rate=0.125)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x)


def test_formulas_of_attributes_in_a_method_serve_other_arguments() -> None:
    _, source = ported(Both().eval(), torch.randn(2, 8))
    assert "self.head_dim**-0.5" in source and "math.sqrt(self.head_dim) * (1 - self.rate)" in source
    other, x = Both(dim=12).eval(), torch.randn(2, 12)
    names: dict[str, Any] = {}
    exec(source, names)
    model = names["Both"](dim=12)
    model.load_weights([(name, mx.array(value.numpy())) for name, value in other.state_dict().items()])
    close(model(mx.array(x.numpy())), other(x))
