"""Causes of mistakes in ports of published models: signs, triangles, order, helpers, means, dropouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import icenet.blas

import mlx.core as mx
import mlx.nn as M
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw
from written_pairs import Pair, between, linear, net, verdict

import icenet
from icenet.parity import compare

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)


FUNCTIONS: dict[str, tuple[Function, Function, str]] = {
    "1 - sigmoid": (
        lambda m, x: (1 - mx.sigmoid(x)) * mx.tanh(x),
        lambda m, x: torch.sigmoid(x) * torch.tanh(x),
        "the input of sigmoid has the other sign in a",
    ),
    "a sign of softplus": (
        lambda m, x: M.softplus(x) + x,
        lambda m, x: -F.softplus(x) + x,
        "a sign, -x, is left out in a",
    ),
    "logcumsumexp": (
        lambda m, x: mx.logcumsumexp(x, axis=-1),
        lambda m, x: torch.logcumsumexp(x, dim=1),
        "the cumulative logsumexp over the axis 2 in a",
    ),
    "absolute values": (
        lambda m, x: x / mx.maximum(mx.abs(x).sum(-1, keepdims=True), 1),
        lambda m, x: x / x.sum(-1, keepdim=True).abs().clamp(min=1),
        "the absolute values are summed in a",
    ),
    "other sign of all terms": (
        lambda m, x: x * mx.sum(mx.square(x) + 1, axis=-1, keepdims=True),
        lambda m, x: x * -(x.square() + 1).sum(-1, keepdim=True),
        "a sign, -x, is left out in a",
    ),
    "linspace": (
        lambda m, x: x * (mx.arange(0, 16, 2) / 16),
        lambda m, x: x * torch.linspace(0, 1, 8, dtype=x.dtype),
        "linspace leaves out its end in a",
    ),
    "an end of linspace": (
        lambda m, x: x * mx.linspace(0, 1, 8),
        lambda m, x: x * torch.linspace(-1, 1, 8, dtype=x.dtype),
        "an end of linspace is 0 in a, -1 in b",
    ),
    "a folded theta": (
        lambda m, x: x * mx.sin(mx.exp(mx.arange(8) * -(math.log(1000.0) / 16))),
        lambda m, x: x * torch.sin(torch.exp(torch.arange(8, dtype=x.dtype) * -(math.log(10000.0) / 16))),
        "theta is 1000 in a, 10000 in b",
    ),
    "a scale of one term": (
        lambda m, x: mx.square(x) / 3 + mx.sin(x),
        lambda m, x: (x.square() + x.sin()) / 3,
        "the second term of a sum is not divided by 3 in a",
    ),
    "a sum for a product": (
        lambda m, x: mx.sin(x) + mx.cos(x),
        lambda m, x: x.sin() * x.cos(),
        "a sum in a, a product in b",
    ),
    "other end of a slice": (
        lambda m, x: mx.sin(x) * mx.sum(x[:, :-1], axis=1, keepdims=True),
        lambda m, x: x.sin() * x[:, 1:].sum(1, keepdim=True),
        "cuts them off at the other end in a",
    ),
    "triangle of a weight": (
        lambda m, x: mx.matmul(mx.tril(mx.matmul(x, x.swapaxes(1, 2))), x),
        lambda m, x: (x @ x.transpose(1, 2)).masked_fill(torch.ones(4, 4).tril(-1).bool(), 0.0) @ x,
        "the mask of masked_fill is transposed in a: the other triangle",
    ),
    "no triangle": (
        lambda m, x: mx.matmul(mx.matmul(x, x.swapaxes(1, 2)), x),
        lambda m, x: (x @ x.transpose(1, 2)).tril() @ x,
        "tril or triu is left out in a",
    ),
    "equal values": (
        lambda m, x: x * (mx.floor(x) > 0),
        lambda m, x: x * (x.floor() >= 0),
        "> in a, >= in b: equal values",
    ),
    "einsum": (
        lambda m, x: mx.einsum("bij,bid->bjd", mx.matmul(x, mx.cumsum(x, axis=1).swapaxes(1, 2)), x),
        lambda m, x: torch.einsum("bij,bjd->bid", x @ x.cumsum(1).transpose(1, 2), x),
        "the first factor of a product is transposed in a",
    ),
    "the order of columns": (
        lambda m, x: x[..., mx.array([0, 1, 2, 4, 3, 6, 5, 7])],
        lambda m, x: x.clone(),
        "along axis 2, a has other elements of b from position 3 on: [4, 3, 6, 5, 7]",
    ),
    "a whole sum": (
        lambda m, x: mx.sin(x) * (x + mx.cos(x)),
        lambda m, x: x.sin() * x + x.cos(),
        "a whole sum is multiplied in a, one of its terms in b",
    ),
    "one term": (
        lambda m, x: x + mx.cos(x) * mx.sin(x),
        lambda m, x: (x + x.cos()) * x.sin(),
        "one term of a sum is multiplied in a, the whole sum in b",
    ),
    "a factor of the argument": (
        lambda m, x: 3 * mx.sin(x),
        lambda m, x: (3 * x).sin(),
        "a number multiplies the result of a function in a, its argument in b",
    ),
    "even and odd places": (
        lambda m, x: mx.repeat(x[..., 1::2] * mx.sin(x[..., ::2]), 2, axis=-1),
        lambda m, x: (x[..., ::2] * x[..., 1::2].sin()).repeat_interleave(2, -1),
        "the elements of even and odd places are exchanged in a",
    ),
    "halves for pairs, not of positions": (
        lambda m, x: mx.repeat(x[..., :4] * mx.tanh(x[..., 4:]), 2, axis=-1),
        lambda m, x: (x[..., ::2] * x[..., 1::2].tanh()).unsqueeze(-1).expand(-1, -1, -1, 2).flatten(-2),
        "halves in a, pairs (x[..., ::2]) in b",
    ),
    "a bound on both sides": (
        lambda m, x: mx.clip(x, -0.5, 0.5),
        lambda m, x: x.clamp(max=0.5),
        "in a, on one side in b|clipped at -0.5 from below in a|a bound is",
    ),
    "half of the output of a layer": (
        lambda m, x: x,
        lambda m, x: x * 2,
        "it is multiplied by 0.5 in a|a scale is 1",
    ),
    "half of a layer": (lambda m, x: x, lambda m, x: x + x, "a sum is left out in a"),
    "a part of a term": (
        lambda m, x: mx.sin(m.gate(x)) + x / 2,
        lambda m, x: m.gate(x).sin() + x,
        "the output of up is added 0.5 times less in a",
    ),
    "no causal mask": (
        lambda m, x: mx.softmax(x @ x.swapaxes(1, 2), axis=-1) @ x,
        lambda m, x: (x @ x.mT).masked_fill(torch.ones(4, 4).triu(1).bool(), -1e9).softmax(-1) @ x,
        "the attention mask is left out in a: each query attends to all keys",
    ),
    "no upper bound": (
        lambda m, x: mx.maximum(x, -0.3),
        lambda m, x: x.clamp(-0.3, 0.3),
        "the upper bound is left out in a",
    ),
    "elements in turn": (
        lambda m, x: mx.tile(x[..., :4], (1, 1, 2)),
        lambda m, x: x[..., :4].repeat_interleave(2, -1),
        "elements, such as heads, repeated in turn (tile) in a",
    ),
    "no bounds": (
        lambda m, x: mx.sin(x),
        lambda m, x: x.clamp(-0.5, 0.5).sin(),
        "bounds are left out in a",
    ),
    "a gate that is left out": (
        lambda m, x: m.gate(x) * 0 + x * x,
        lambda m, x: torch.sigmoid(m.gate(x)) * x * x,
        "a product is left out in a",
    ),
    "a sink": (
        lambda m, x: mx.softmax(x, axis=-1),
        lambda m, x: torch.cat([x, x[..., :1] * 0], -1).softmax(-1)[..., :-1],
        "the last part of a concatenation has no effect in a",
    ),
    "the absolute error": (
        lambda m, x: x * mx.abs(mx.sin(x) - x).mean(),
        lambda m, x: x * F.mse_loss(x.sin(), x),
        "the absolute error in a, the squared error in b",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    ours, theirs, words = FUNCTIONS[name]
    cause = verdict(between(ours, theirs, gate=linear(8, 1)), draw(2, 4, 6))
    assert any(word in cause for word in words.split("|")), cause


# ---- functions of the user ----------------------------------------------------------------------------------


def swirl(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([second.sin() + first, second * 2], -1)


def differ(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x - y.sin()


def mlx_swirl(x: Any) -> Any:
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([mx.sin(second) + first, second * 2], axis=-1)


@pytest.mark.parametrize(
    "ours, words",
    [
        (lambda x: x - mx.sin(mlx_swirl(mx.square(x))), "swirl of b is left out in a, in call 1 of 2"),
        (lambda x: mlx_swirl(x) - mx.sin(mx.square(x)), "swirl of b is left out in a, in call 2 of 2"),
        (lambda x: x - mx.sin(mx.square(x)), "swirl of b is left out in a"),
        (
            lambda x: mlx_swirl(mx.square(x)) - mx.sin(mlx_swirl(x)),
            "the first two arguments of differ of b are exchanged in a",
        ),
    ],
)
def test_functions_that_the_code_calls(ours: Function, words: str) -> None:
    cause = verdict(between(lambda m, x: ours(x), lambda m, x: differ(swirl(x), swirl(x.square()))), draw(2, 4, 6))
    assert cause.endswith(words), cause


# ---- modules ------------------------------------------------------------------------------------------------


NORM = Pair(M.LayerNorm(8), T.LayerNorm(8))


class Scale(M.Module):
    def __call__(self, x: Any) -> Any:
        return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True))


class TorchScale(T.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True))


@pytest.mark.parametrize("is_before", [True, False])
def test_a_mean_on_the_other_side_of_a_norm(is_before: bool) -> None:
    if is_before:
        pair = between(lambda m, x: m.norm(x.mean(1)), lambda m, x: m.norm(x).mean(1), norm=NORM)
    else:
        pair = between(lambda m, x: m.norm(x).mean(1), lambda m, x: m.norm(x.mean(1)), norm=NORM)
    cause = verdict(pair, draw(2, 4, 6))
    where = "before norm in a, after it in b" if is_before else "after norm in a, before it in b"
    assert f"the mean over positions is taken {where}" in cause, cause


def test_layers_in_another_order_where_shapes_differ() -> None:
    pair = between(lambda m, x: m.norm(m.wide(x)), lambda m, x: m.wide(m.norm(x)), wide=linear(8, 8), norm=NORM)
    narrow = net(
        lambda m, x: m.down(m.norm(m.wide(x))),
        lambda m, x: m.down(m.wide(m.norm(x))),
        norm=Pair(Scale(), TorchScale()),
        wide=linear(6, 8),
        down=linear(8, 6),
    )
    assert "wide is called before norm in a, after it in b" in verdict(pair, draw(2, 4, 6))
    assert "wide is called before norm in a, after it in b" in verdict(narrow, draw(2, 4, 6))


def test_an_activation_of_one_of_two_terms() -> None:
    pair = between(lambda m, x: x + M.silu(m.mix(x)), lambda m, x: x + m.mix(x), mix=linear(8, 8))
    cause = verdict(pair, draw(2, 4, 6))
    assert "SiLU is applied to the output of mix in a" in cause, cause


def test_the_array_that_is_added_within_a_product() -> None:
    pair = between(
        lambda m, x: (m.mix(mx.sin(x)) + mx.sin(x)) * 0.5, lambda m, x: (m.mix(x.sin()) + x) * 0.5, mix=linear(8, 8)
    )
    cause = verdict(pair, draw(2, 4, 6))
    assert "a adds the input of mix where b adds the output of up, each multiplied by 0.5" in cause, cause


def test_the_two_outputs_of_a_module_are_exchanged() -> None:
    both = net(lambda m, x: (m.a(x), m.b(x)), lambda m, x: (m.a(x), m.b(x)), a=linear(6, 5), b=linear(6, 5))
    pair = net(lambda m, x: ours(*m.both(x)), lambda m, x: theirs(*m.both(x)), both=both)

    def ours(mean: Any, log: Any) -> Any:
        return log + mx.exp(mean)

    def theirs(mean: Any, log: Any) -> Any:
        return mean + log.exp()

    cause = verdict(pair, draw(2, 6))
    assert "the output of both and the output[1] of both are exchanged in a" in cause, cause


def dropouts(rate: float) -> Pair:
    """Returns a module with one dropout that is called twice, next to one with two of them."""
    ours = net(lambda m, x: m.drop(m.down(m.drop(m.up(x)))), lambda m, x: x, drop=Pair(M.Dropout(rate), T.Identity()))
    theirs = net(
        lambda m, x: x,
        lambda m, x: m.drop2(m.down(m.drop1(m.up(x)))),
        drop1=Pair(None, T.Dropout(0.1)),
        drop2=Pair(None, T.Dropout(0.1)),
    )
    for name, layer in (("up", linear(6, 8)), ("down", linear(8, 6))):
        setattr(ours.ours, name, layer.ours)
        setattr(theirs.theirs, name, layer.theirs)
    return Pair(ours.ours, theirs.theirs)


def test_one_dropout_in_place_of_two() -> None:
    pair = dropouts(0.1)
    icenet.from_torch(pair.theirs, pair.ours)
    assert compare(pair.ours, pair.theirs, draw(2, 4, 6)).passed
    cause = verdict(dropouts(0.3), draw(2, 4, 6))
    assert "the rate p of the dropout is 0.3 in a, 0.1 in b" in cause, cause
