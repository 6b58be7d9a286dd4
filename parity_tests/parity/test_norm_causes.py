"""Causes in norms of queries and keys, in rotary positions before them, and in the calls of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw, tokens
from written_pairs import Pair, linear, net, verdict

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)


def rms(x: mx.array, axes: Any = -1) -> mx.array:
    return x * mx.rsqrt(mx.mean(x * x, axis=axes, keepdims=True) + 1e-6)


# ---- norms of each head, [B, L, H, E] -----------------------------------------------------------------------


def of_heads(prepare: Function, kv_heads: int = 4) -> Pair:
    """Returns an attention with four heads; `prepare` returns queries and keys [B, H, L, E], given the module."""

    def ours(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q, k, v = (layer(x).reshape(b, n, -1, 6).transpose(0, 2, 1, 3) for layer in (m.q, m.k, m.v))
        q, k = prepare(m, q, k)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=6**-0.5)
        return m.out(y.transpose(0, 2, 1, 3).reshape(b, n, 24))

    def theirs(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, 6) for layer in (m.q, m.k, m.v))
        q, k, v = (y.transpose(1, 2) for y in (m.q_norm(q), m.k_norm(k), v))
        q, k = torch_rope(q), torch_rope(k)
        return m.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    layers = {
        "q": linear(24, 24),
        "k": linear(24, 6 * kv_heads),
        "v": linear(24, 6 * kv_heads),
        "out": linear(24, 24),
    }
    norms = {name: Pair(M.RMSNorm(6, eps=1e-6), T.RMSNorm(6, eps=1e-6)) for name in ("q_norm", "k_norm")}
    return net(ours, theirs, **layers, **norms)


def rope(x: mx.array) -> mx.array:
    return mx.fast.rope(x, 6, traditional=False, base=10000.0, scale=1.0, offset=0)


def torch_rope(x: torch.Tensor) -> torch.Tensor:
    frequencies = 10000.0 ** -(torch.arange(0, 6, 2) / 6)
    angles = torch.arange(x.shape[2])[:, None] * frequencies
    cos, sin = (f(torch.cat([angles, angles], -1)).to(x.dtype) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., 3:], x[..., :3]], -1) * sin


@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda m, q, k: (q, k), "q_norm and k_norm are called in b, but not in a"),
        (lambda m, q, k: (q, m.k_norm(k)), "q_norm is called in b, but not in a"),
        (
            lambda m, q, k: (rms(q, (1, 3)) * m.q_norm.weight, rms(k, (1, 3)) * m.k_norm.weight),
            "q_norm and k_norm are computed over all heads together in a",
        ),
        (
            lambda m, q, k: (rms(q, 2) * m.q_norm.weight, rms(k, 2) * m.k_norm.weight),
            "q_norm and k_norm are computed over axis 1, not the last one, in a",
        ),
        (
            lambda m, q, k: tuple(
                mx.fast.layer_norm(x, norm.weight, None, 1e-6) for x, norm in ((q, m.q_norm), (k, m.k_norm))
            ),
            "q_norm and k_norm are computed as a layer norm, which subtracts the mean, in a",
        ),
        (lambda m, q, k: (rms(q), rms(k)), "q_norm and k_norm are computed without a weight in a"),
        (lambda m, q, k: (m.k_norm(q), m.q_norm(k)), "q_norm and k_norm are exchanged in a"),
    ],
)
def test_norms_of_queries_and_keys(prepare: Function, words: str) -> None:
    def turned(m: Any, q: Any, k: Any) -> Any:
        return map(rope, prepare(m, q, k))

    line = verdict(of_heads(turned), draw(2, 7, 24))
    assert words in line and "differs in the model (MlxNet) itself" in line, line


def test_norms_after_rotary_positions() -> None:
    line = verdict(of_heads(lambda m, q, k: (m.q_norm(rope(q)), m.k_norm(rope(k)))), draw(2, 7, 24))
    assert "and q_norm; input" in line and "rotary positions turn the output of q here in a, not in b" in line


def test_positions_of_keys_only() -> None:
    line = verdict(of_heads(lambda m, q, k: (m.q_norm(q), rope(m.k_norm(k)))), draw(2, 7, 24))
    assert "rotary positions do not turn the output of q_norm in a" in line, line


def test_exchanged_norms_of_fewer_key_heads() -> None:
    line = verdict(of_heads(lambda m, q, k: (rope(m.k_norm(q)), rope(m.q_norm(k))), kv_heads=2), draw(2, 7, 24))
    assert "q_norm gets in a what k_norm gets in b" in line, line


# ---- norms over all heads, [B, L, D] ------------------------------------------------------------------------


def test_a_norm_of_each_head_in_place_of_all_heads() -> None:
    def ours(m: Any, x: Any) -> Any:
        y = m.inner(x)
        heads = rms(y.reshape(*y.shape[:2], 4, 6)).reshape(y.shape) * m.q_norm.weight
        return m.out(mx.tanh(heads))

    norm = Pair(M.RMSNorm(24, eps=1e-6), T.RMSNorm(24, eps=1e-6))
    pair = net(
        ours,
        lambda m, x: m.out(torch.tanh(m.q_norm(m.inner(x)))),
        inner=linear(8, 24),
        out=linear(24, 4),
        q_norm=norm,
    )
    line = verdict(pair, draw(2, 5, 8))
    assert "q_norm is computed for each head of 6 values in a" in line, line


def test_a_norm_that_is_called_before_another_layer() -> None:
    pair = net(
        lambda m, x: x + m.out(m.norm(m.inner(x))),
        lambda m, x: x + m.norm(m.out(m.inner(x))),
        inner=linear(8, 8),
        out=linear(8, 8),
        norm=Pair(M.LayerNorm(8), T.LayerNorm(8)),
    )
    line = verdict(pair, draw(2, 5, 8))
    assert "norm is called before out in a, after it in b" in line, line


# ---- experts ------------------------------------------------------------------------------------------------


def experts(rows: Function, chosen: Function | None = None, weights: Function | None = None) -> Pair:
    """Returns a mixture of four experts, each called with the tokens that are routed to it.

    Args:
        rows: Returns where an expert is chosen, given the choices [N, 2] and its number.
        chosen: Returns the choices of the scores [N, 4]; default: the two largest.
        weights: Returns the weights of the choices, given the scores and them; default: softmax of their scores.
    """

    def ours(m: Any, x: Any) -> Any:
        scores = m.gate(x)
        ids = chosen(scores) if chosen else mx.argsort(-scores, axis=-1)[:, :2]
        of = weights(scores, ids) if weights else mx.softmax(mx.take_along_axis(scores, ids, -1), axis=-1)
        y = mx.zeros_like(x)
        for number, expert in enumerate(m.experts):
            row, place = (mx.array(found) for found in np.where(rows(np.array(ids), number)))
            if row.size:
                y = y.at[row].add(expert(x[row]) * of[row, place][:, None])
        return y

    def theirs(m: Any, x: Any) -> Any:
        scores, ids = torch.topk(m.gate(x), 2)
        of, y = scores.softmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(m.experts):
            row, place = torch.where(ids == number)
            y.index_add_(0, row, expert(x[row]) * of[row, place, None])
        return y

    return net(ours, theirs, gate=linear(8, 4), experts=[linear(8, 8) for _ in range(4)])


def equal(ids: Any, number: int) -> Any:
    return ids == number


@pytest.mark.parametrize(
    "pair, where, words",
    [
        (
            experts(lambda ids, number: ids == (number + 1) % 4),
            "between gate and experts.0",
            "experts.0 gets in a what experts.1 gets in b",
        ),
        (
            experts(equal, lambda scores: mx.argsort(scores, axis=-1)[:, :2]),
            "between gate and experts.0",
            "topk chooses the smallest in a, the largest in b",
        ),
        (
            experts(equal, weights=lambda scores, ids: mx.take_along_axis(mx.softmax(scores, axis=-1), ids, -1)),
            "after experts.3",
            "the softmax of all scores is taken at the chosen ones in a",
        ),
        (
            experts(equal, lambda scores: mx.argsort(-scores, axis=-1)[:, :1]),
            "",
            "topk chooses one less in a",
        ),
    ],
)
def test_experts(pair: Pair, where: str, words: str) -> None:
    line = verdict(pair, draw(12, 8))
    assert where in line and words in line, line


def test_ids_of_another_shape_are_a_difference_of_the_outermost_caller() -> None:
    class Decoder(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = M.Embedding(9, 8)

        def __call__(self, ids: mx.array) -> mx.array:
            return mx.tanh(self.embed(ids))

    class TorchDecoder(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = T.Embedding(9, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.embed(ids))

    pair = net(
        lambda m, ids: m.out(m.decoder(ids)),
        lambda m, ids: m.out(m.decoder(ids[:, :-1])),
        decoder=Pair(Decoder(), TorchDecoder()),
        out=linear(8, 4),
    )
    line = verdict(pair, tokens(2, 6, below=9))
    assert line.startswith("differs in the model (MlxNet) itself, before decoder; input of shape [2, 6] in a"), line
