"""Causes of differences in ports of transformers: each is planted in a small pair and named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw, tokens
from written_pairs import Pair, convolution, linear, net, verdict

from icenet.parity import compare

Function = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)


def same(x: Any) -> Any:
    return x


def attention(
    heads: int = 2,
    groups: int | None = None,
    turn: tuple[Function, Function] = (same, same),
    repeat: tuple[Function, Function] = (same, same),
    scores: tuple[Function, Function] = (same, same),
) -> Pair:
    """Returns an attention of width 16 whose queries and keys, repeated heads and scores functions change.

    Args:
        heads, groups: Number of heads, and of those of keys and values.
        turn: Changes queries and keys [B, H, T, E] on each side.
        repeat: Changes keys and values [B, G, T, E].
        scores: Changes the scores [B, H, T, T].
    """
    size, groups = 16 // heads, groups or heads

    def mlx_call(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q = m.q(x).reshape(b, n, heads, size).transpose(0, 2, 1, 3)
        k, v = (layer(x).reshape(b, n, groups, size).transpose(0, 2, 1, 3) for layer in (m.k, m.v))
        q, k = turn[0](q), turn[0](k)
        k, v = repeat[0](k), repeat[0](v)
        y = mx.softmax(scores[0](q @ k.transpose(0, 1, 3, 2) * size**-0.5), axis=-1) @ v
        return m.out(y.transpose(0, 2, 1, 3).reshape(b, n, -1))

    def torch_call(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q = m.q(x).view(b, n, heads, size).transpose(1, 2)
        k, v = (layer(x).view(b, n, groups, size).transpose(1, 2) for layer in (m.k, m.v))
        q, k = turn[1](q), turn[1](k)
        k, v = repeat[1](k), repeat[1](v)
        y = scores[1](q @ k.transpose(-1, -2) * size**-0.5).softmax(-1) @ v
        return m.out(y.transpose(1, 2).reshape(b, n, -1))

    widths = {"q": heads * size, "k": groups * size, "v": groups * size}
    return net(mlx_call, torch_call, **{n: linear(16, w) for n, w in widths.items()}, out=linear(16, 16))


# ---- rotary positions ---------------------------------------------------------------------------------------


def rotary(dims: int, scale: float = 1.0) -> Function:
    """Returns the function that turns the first values of a head by its halves, as Hugging Face's models do."""

    def turn(x: Any) -> Any:
        angles = scale * torch.outer(
            torch.arange(x.shape[-2]).float(), 10000.0 ** (-torch.arange(0, dims, 2).float() / dims)
        )
        cos, sin = (f(torch.cat([angles, angles], -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        first, rest = x[..., :dims], x[..., dims:]
        half = torch.cat([-first[..., dims // 2 :], first[..., : dims // 2]], -1)
        return torch.cat([first * cos + half * sin, rest], -1)

    return turn


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (M.RoPE(8), rotary(4), "rotary positions turn 8 of the 8 values of a head in a, 4 in b"),
        (M.RoPE(4), rotary(8), "rotary positions turn 4 of the 8 values of a head in a, 8 in b"),
        (M.RoPE(8, scale=0.25), rotary(8), "rotary positions are multiplied by 0.25 in a"),
    ],
)
def test_partial_and_scaled_rotary_positions(ours: Any, theirs: Any, words: str) -> None:
    pair = attention(turn=(lambda x: pair.ours.rope(x), theirs))
    pair.ours.rope = ours
    assert words in verdict(pair, draw(2, 6, 16))


# ---- heads --------------------------------------------------------------------------------------------------

TILED = "heads, repeated in turn (tile) in a"
HEADS: dict[str, tuple[Function, Function, str]] = {
    "tile and repeat_interleave": (
        lambda x: mx.tile(x, (1, 2, 1, 1)),
        lambda x: x.repeat_interleave(2, 1),
        TILED,
    ),
    "tile and expand": (
        lambda x: mx.concatenate([x, x], axis=1),
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], 4, x.shape[2], 4),
        "heads repeated in the other order in a",
    ),
    "repeat and repeat": (
        lambda x: mx.repeat(x, 2, axis=1),
        lambda x: x.repeat(1, 2, 1, 1),
        "heads, each repeated several times (repeat) in a, in turn (tile) in b",
    ),
    "repeat and cat": (
        lambda x: mx.repeat(x, 2, axis=1),
        lambda x: torch.cat([x, x], 1),
        "heads, each repeated several times (repeat) in a, in turn (tile) in b",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_repeated_heads(name: str) -> None:
    ours, theirs, words = HEADS[name]
    assert words in verdict(attention(4, 2, repeat=(ours, theirs)), draw(2, 6, 16))


def fused(tiled: bool, exchanged: bool = True, groups: int = 2) -> Pair:
    """Returns attention by the functions of both frameworks; the heads of keys may be repeated in turn."""

    def mlx_call(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q, k, v = (layer(x).reshape(b, n, -1, 4) for layer in (m.q, m.k, m.v))
        if exchanged:
            q, k, v = (item.transpose(0, 2, 1, 3) for item in (q, k, v))
        if tiled:
            k, v = (mx.tile(item, (1, 2, 1, 1)) for item in (k, v))
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5)
        return m.out((y.transpose(0, 2, 1, 3) if exchanged else y).reshape(b, n, -1))

    def torch_call(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.out(y.transpose(1, 2).reshape(b, n, -1))

    widths = {"q": 16, "k": 4 * groups, "v": 4 * groups, "out": 16}
    return net(mlx_call, torch_call, **{name: linear(16, width) for name, width in widths.items()})


def test_grouped_heads_of_the_fused_attention() -> None:
    assert TILED in verdict(fused(True), draw(2, 6, 16))


def test_heads_and_positions_that_are_not_exchanged() -> None:
    words = "heads and positions are not exchanged in a"
    assert words in verdict(fused(False, exchanged=False, groups=4), draw(2, 6, 16))


# ---- biases and caps ----------------------------------------------------------------------------------------

SLOPES = 2.0 ** (-8 * np.arange(1, 5) / 4)


def alibi(slopes: np.ndarray, symmetric: bool = False) -> Function:
    """Returns the function that adds the bias of MLX."""

    def add(x: Any) -> Any:
        i = mx.arange(x.shape[-1])
        distance = (i[None] - i[:, None]).astype(mx.float32)
        distance = -mx.abs(distance) if symmetric else distance
        return x + mx.array(slopes.astype(np.float32))[:, None, None] * distance

    return add


def torch_alibi(x: Any) -> Any:
    i = torch.arange(x.shape[-1])
    return x + torch.tensor(SLOPES, dtype=x.dtype)[:, None, None] * (i[None] - i[:, None]).to(x.dtype)


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (alibi(-SLOPES), "ALiBi has the other sign in a"),
        (alibi(SLOPES[::-1]), "the slopes of ALiBi are in the reverse order of the heads in a"),
        (alibi(SLOPES * 4), "the slopes of ALiBi are 2^(-8 i / heads) of i from 0 on in a"),
        (alibi(SLOPES / 2), "the slopes of ALiBi are half as large in a"),
        (alibi(SLOPES, symmetric=True), "ALiBi falls in both directions in a"),
        (same, "ALiBi is left out in a"),
    ],
)
def test_slopes(ours: Function, words: str) -> None:
    assert words in verdict(attention(4, scores=(ours, torch_alibi)), draw(2, 6, 16))


CAPS: list[tuple[Function, Function, str]] = [
    (same, lambda x: 30 * torch.tanh(x / 30), "the soft cap of b, 30 * tanh(x / 30), is left out in a"),
    (lambda x: 50 * mx.tanh(x / 50), lambda x: 30 * torch.tanh(x / 30), "the soft cap is 50 in a, 30 in b"),
    (lambda x: 30 * mx.tanh(x / 30), same, "a soft cap, 30 * tanh(x / 30), in addition in a"),
]


@pytest.mark.parametrize(("ours", "theirs", "words"), CAPS)
def test_soft_caps_of_logits(ours: Function, theirs: Function, words: str) -> None:
    pair = net(lambda m, x: ours(m.head(x)), lambda m, x: theirs(m.head(x)), head=linear(8, 20))
    assert words in verdict(pair, draw(4, 8, scale=10))


def test_a_soft_cap_of_scores() -> None:
    pair = attention(scores=(lambda x: 5 * mx.tanh(x / 5), same))
    assert "a soft cap, 5 * tanh(x / 5), of the scores in a" in verdict(pair, draw(2, 6, 16, scale=4))


def relative(x: Any, lib: Any, sign: int) -> Any:
    """Returns the buckets of relative positions, as T5 has them."""
    i = lib.arange(x.shape[1])
    return lib.clip(i[None] - i[:, None] if sign > 0 else i[:, None] - i[None], -3, 3) + 3


def test_the_codes_that_are_farthest() -> None:
    def codes(m: Any, x: Any, argmin: Function) -> Any:
        table = m.codes.weight
        return m.codes(argmin((x * x).sum(-1)[..., None] + (table * table).sum(-1) - 2 * (x @ table.T)))

    pair = net(
        lambda m, x: codes(m, x, lambda d: mx.argmax(d, axis=-1)),
        lambda m, x: codes(m, x, lambda d: d.argmin(-1)),
        codes=embedding(10),
    )
    assert "argmax in a, argmin in b" in verdict(pair, draw(3, 5, 8))


def test_the_sign_of_relative_positions() -> None:
    pair = net(
        lambda m, x: m.v(mx.softmax(m.bias(relative(x, mx, -1))[..., 0], axis=-1) @ x),
        lambda m, x: m.v(m.bias(relative(x, torch, 1))[..., 0].softmax(-1) @ x),
        bias=Pair(M.Embedding(7, 1), T.Embedding(7, 1)), v=linear(8, 8),
    )  # fmt: skip
    assert "the other sign of a difference in a" in verdict(pair, draw(2, 6, 8))


FUNCTIONS: list[tuple[Function, Function, str]] = [
    (lambda x: x[:, 3:9], lambda x: x[:, :6], "a slice, as of a table of positions, begins 3 later in a"),
    (lambda x: x[:, -1:].mean(axis=1), lambda x: x.mean(1), "position"),
    (lambda x: (x + x * x).mean(axis=1), lambda x: (x + x * x)[:, 0], "the mean in a, one position in b"),
    (lambda x: mx.abs(x), lambda x: x**2, "the absolute value in a, the square in b"),
    (lambda x: x / 2, lambda x: x / 8**0.5, "a scale is 2 in a, 2.82843 (the square root of 8) in b"),
    (lambda x: x * (1.0 - x), lambda x: x * (1.3 - x), "a number is 1 in a, 1.3 in b"),
]


@pytest.mark.parametrize(("ours", "theirs", "words"), FUNCTIONS)
def test_functions_in_the_code(ours: Function, theirs: Function, words: str) -> None:
    pair = net(
        lambda m, x: m.down(ours(m.up(x))), lambda m, x: m.down(theirs(m.up(x))), up=linear(8, 8), down=linear(8, 4)
    )
    assert words in verdict(pair, draw(2, 9, 8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"align_corners": True}, "align_corners of grid_sample is False in a"),
        ({"align_corners": False, "padding_mode": "border"}, "padding_mode of grid_sample is zeros in a"),
    ],
)
def test_options_of_grid_sample(options: dict[str, Any], words: str) -> None:
    """Both sides are of PyTorch: MLX has no such function."""

    class Sampled(T.Module):
        def __init__(self, **given: Any) -> None:
            super().__init__()
            self.conv, self.given = T.Conv2d(3, 4, 1), given

        def forward(self, x: Any, grid: Any) -> Any:
            return F.grid_sample(self.conv(x), grid, **self.given)

    theirs = Sampled(**options)
    ours = Sampled(align_corners=False)
    grid = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 4, 4, 2)).astype(np.float32)
    given = {"x": draw(2, 3, 6, 6), "grid": grid}
    report = compare(ours, theirs, given, copy_weights=True, stages=["forward"], layout="same")
    assert words in report.cause, report.verdict


# ---- embeddings ---------------------------------------------------------------------------------------------


def embedding(count: int) -> Pair:
    return Pair(M.Embedding(count, 8), T.Embedding(count, 8))


@pytest.mark.parametrize("offset", [1, 2])
def test_positions_that_begin_at_another_number(offset: int) -> None:
    """Those of OPT and RoBERTa begin at 2."""
    pair = net(
        lambda m, ids: m.out(m.tok(ids) + m.pos(mx.arange(ids.shape[1]))),
        lambda m, ids: m.out(m.tok(ids) + m.pos(torch.arange(ids.shape[1]) + offset)),
        tok=embedding(20), pos=embedding(12), out=linear(8, 8),
    )  # fmt: skip
    words = f"each integer is {offset} smaller in a: an offset, as of positions, from 0 on in a and from {offset} on"
    assert words in verdict(pair, tokens(2, 6, below=20))


def test_rows_of_a_table_that_begin_at_another_number() -> None:
    pair = net(
        lambda m, ids: m.out(m.tok(ids) + m.pos.weight[: ids.shape[1]]),
        lambda m, ids: m.out(m.tok(ids) + m.pos.weight[2 : 2 + ids.shape[1]]),
        tok=embedding(20), pos=embedding(12), out=linear(8, 8),
    )  # fmt: skip
    words = "a slice, as of a table of positions, begins 2 earlier in a"
    assert words in verdict(pair, tokens(2, 6, below=20))


def test_ids_that_an_embedding_changes() -> None:
    class Positions(T.Embedding):
        def forward(self, count: Any) -> Any:
            return super().forward(torch.arange(count) + 2)

    class MlxPositions(M.Embedding):
        def __call__(self, count: Any) -> Any:
            return super().__call__(mx.arange(count))

    pair = net(
        lambda m, ids: m.out(m.tok(ids) + m.pos(ids.shape[1])),
        lambda m, ids: m.out(m.tok(ids) + m.pos(ids.shape[1])),
        tok=embedding(20), pos=Pair(MlxPositions(12, 8), Positions(12, 8)), out=linear(8, 8),
    )  # fmt: skip
    assert "the rows of the embedding are 2 earlier in a" in verdict(pair, tokens(2, 6, below=20))


def test_positions_that_leave_out_padding() -> None:
    def positions(ids: Any) -> Any:
        mask = ids.ne(1).long()
        return (mask.cumsum(1) - 1) * mask

    pair = net(
        lambda m, ids: m.out(m.pos(mx.broadcast_to(mx.arange(ids.shape[1]), ids.shape))),
        lambda m, ids: m.out(m.pos(positions(ids))),
        pos=embedding(12), out=linear(8, 8),
    )  # fmt: skip
    ids = np.array([[1, 1, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9]], np.int32)
    assert "it may leave out padding" in verdict(pair, ids)


def test_a_scale_of_the_embedding() -> None:
    pair = net(
        lambda m, ids: m.out(m.tok(ids) + m.pos(mx.arange(ids.shape[1]))),
        lambda m, ids: m.out(m.tok(ids) * math.sqrt(8) + m.pos(torch.arange(ids.shape[1]))),
        tok=embedding(20), pos=embedding(12), out=linear(8, 8),
    )  # fmt: skip
    words = "a scale is 1 in a, 2.82843 (the square root of 8) in b"
    assert words in verdict(pair, tokens(2, 6, below=20))


def test_an_output_matrix_that_is_that_of_the_embedding() -> None:
    head, tied = linear(8, 20, False), "head.weight is a parameter of its own in a, tok.weight in b (tied weights)"
    pair = net(
        lambda m, ids: m.head(m.tok(ids)), lambda m, ids: F.linear(m.tok(ids), m.tok.weight),
        tok=embedding(20), head=head,
    )  # fmt: skip
    del pair.theirs.head
    report = compare(*pair, tokens(2, 6, below=20), copy_weights=True, stages=["forward"])
    assert tied in report.cause, report.verdict
    pair = net(
        lambda m, ids: m.tok.as_linear(m.tok(ids)), lambda m, ids: m.head(m.tok(ids)),
        tok=embedding(20), head=linear(8, 20, False),
    )  # fmt: skip
    del pair.ours["head"]
    report = compare(*pair, tokens(2, 6, below=20), copy_weights=True, stages=["forward"])
    assert "a takes tok.weight where b takes head.weight" in report.cause, report.verdict


# ---- norms and native layers --------------------------------------------------------------------------------


class MlxNorm(M.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = mx.ones((16,)), offset

    def __call__(self, x: Any) -> Any:
        return (self.offset + self.weight) * x * mx.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


class TorchNorm(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = T.Parameter(torch.ones(16))

    def forward(self, x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (Pair(M.RMSNorm(16, eps=1e-6), TorchNorm()), "weight in a, 1 + weight in b, as in a norm of Gemma"),
        (Pair(MlxNorm(0.0), TorchNorm()), "weight in a, 1 + weight in b, as in a norm of Gemma"),
        (Pair(MlxNorm(1.0), T.RMSNorm(16, eps=1e-6)), "1 + weight in a, weight in b, as in a norm of Gemma"),
    ],
)
def test_norms_of_gemma(norm: Pair, words: str) -> None:
    pair = net(lambda m, x: m.norm(m.up(x)), lambda m, x: m.norm(m.up(x)), up=linear(8, 16), norm=norm)
    assert words in verdict(pair, draw(4, 8))


NATIVE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"norm_first": True}, {"norm_first": False}, "norm_first is True in a, False in b"),
    ({"norm_first": True}, {"norm_first": True, "activation": "gelu"}, "ReLU in a, exact GELU in b"),
    ({"norm_first": False, "activation": M.gelu_approx}, {}, "the tanh approximation of GELU in a, ReLU in b"),
]


@pytest.mark.parametrize(("ours", "theirs", "words"), NATIVE)
def test_native_layers(ours: dict[str, Any], theirs: dict[str, Any], words: str) -> None:
    layer = Pair(
        M.TransformerEncoderLayer(8, 2, 16, **ours), T.TransformerEncoderLayer(8, 2, 16, batch_first=True, **theirs)
    )
    pair = net(lambda m, x: m.layer(x, None), lambda m, x: m.layer(x), layer=layer)
    assert words in verdict(pair, draw(2, 5, 8))


def test_the_layers_of_a_native_encoder() -> None:
    layer = T.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = Pair(
        M.TransformerEncoder(2, 8, 2, 16, norm_first=True), T.TransformerEncoder(layer, 2, norm=T.LayerNorm(8))
    )
    pair = net(lambda m, x: m.encoder(x, None), lambda m, x: m.encoder(x), encoder=encoder)
    assert "norm_first is True in a, False in b" in verdict(pair, draw(2, 5, 8))


# ---- pooling ------------------------------------------------------------------------------------------------

POOLS: dict[str, tuple[Function, Function, str]] = {
    "maximum": (M.MaxPool2d(2), lambda x: F.avg_pool2d(x, 2), "maximum pooling in a, average in b"),
    "average": (M.AvgPool2d(2), T.MaxPool2d(2), "average pooling in a, maximum in b"),
    "count_include_pad": (
        M.AvgPool2d(3, 2, 1),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        "average pooling counts the padding in a (count_include_pad)",
    ),
    "ceil_mode": (M.MaxPool2d(2), lambda x: F.max_pool2d(x, 2, ceil_mode=True), "ceil_mode is True in b"),
    "ceil_mode of an average": (M.AvgPool2d(2), T.AvgPool2d(2, ceil_mode=True), "ceil_mode is True in b"),
    "the whole image": (
        lambda x: x.max(axis=(1, 2)),
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        "the max over the axes 2 and 3 of the output of conv is taken in a",
    ),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling(name: str) -> None:
    ours, theirs, words = POOLS[name]
    pair = net(lambda m, x: ours(m.conv(x)), lambda m, x: theirs(m.conv(x)), conv=convolution(3, 4, 3))
    assert words in verdict(pair, draw(2, 9, 9, 3))


CUT: list[tuple[Function, Function, str]] = [
    (same, lambda x: x[..., :-2], "a slice that cuts the end off is left out in a"),
    (same, lambda x: F.interpolate(x, scale_factor=2), "resizing (interpolate) is left out in a"),
]


@pytest.mark.parametrize(("ours", "theirs", "words"), CUT)
def test_operations_that_change_a_shape(ours: Function, theirs: Function, words: str) -> None:
    pair = net(
        lambda m, x: m.last(ours(m.conv(x))),
        lambda m, x: m.last(theirs(m.conv(x))),
        conv=Pair(M.Conv1d(3, 4, 3, padding=2), T.Conv1d(3, 4, 3, padding=2)),
        last=Pair(M.Conv1d(4, 2, 1), T.Conv1d(4, 2, 1)),
    )
    assert words in verdict(pair, draw(2, 8, 3))
