"""Causes in the code of a module: windows of masks, loops, transforms, losses, and what it passes on."""

from __future__ import annotations

import math
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

from icenet.parity import compare

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)


# ---- windows of attention -----------------------------------------------------------------------------------


def attention(ours: Function, theirs: Function) -> Pair:
    """Returns an attention of two heads, given what computes it of queries, keys and values."""

    def mlx_call(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        heads = (layer(x).reshape(b, n, 2, 8).transpose(0, 2, 1, 3) for layer in (m.q, m.k, m.v))
        return m.out(ours(*heads).transpose(0, 2, 1, 3).reshape(b, n, 16))

    def torch_call(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        heads = (layer(x).view(b, n, 2, 8).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.out(theirs(*heads).transpose(1, 2).reshape(b, n, 16))

    return net(mlx_call, torch_call, **{name: linear(16, 16) for name in ("q", "k", "v", "out")})


def mlx_window(size: int) -> Function:
    def attend(q: Any, k: Any, v: Any) -> Any:
        distance = mx.arange(q.shape[2])[:, None] - mx.arange(q.shape[2])
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5, mask=(distance >= 0) & (distance < size))

    return attend


def torch_window(how: str, size: int = 4) -> Function:
    def attend(q: Any, k: Any, v: Any) -> Any:
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        keep = (distance >= 0) & (distance < size)
        if how == "function":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        scores = q @ k.transpose(-1, -2) * 8**-0.5
        if how == "fill":
            return scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v
        return (scores + torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, -torch.inf)).softmax(-1) @ v

    return attend


@pytest.mark.parametrize("how", ["function", "fill", "add"])
@pytest.mark.parametrize(
    "size, words", [(5, "1 key longer"), (3, "1 key shorter"), (8, "4 keys longer"), (50, "left out")]
)
def test_windows(how: str, size: int, words: str) -> None:
    cause = verdict(attention(mlx_window(size), torch_window(how)), draw(2, 10, 16))
    assert f"the window of the attention mask is {words} in a" in cause, cause


def test_a_window_that_the_model_hands_to_its_layers() -> None:
    layer = net(
        lambda m, x, keep: m.out(mx.softmax(mx.where(keep, m.q(x) @ m.k(x).swapaxes(1, 2), -1e9), axis=-1) @ x),
        lambda m, x, keep: m.out((m.q(x) @ m.k(x).mT).masked_fill(~keep, -1e9).softmax(-1) @ x),
        q=linear(8, 8), k=linear(8, 8), out=linear(8, 8),
    )  # fmt: skip

    def call(m: Any, x: Any, arange: Any, size: int) -> Any:
        distance = arange(x.shape[1])[:, None] - arange(x.shape[1])
        return m.layer(x, (distance >= 0) & (distance < size))

    pair = net(lambda m, x: call(m, x, mx.arange, 4), lambda m, x: call(m, x, torch.arange, 3), layer=layer)
    cause = verdict(pair, draw(2, 8, 8))
    assert "the mask shows the keys from -3 to itself of each position in a, from -2 to itself in b" in cause, cause


# ---- loops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours, theirs", [(2, 3), (3, 2), (3, 5)])
@pytest.mark.parametrize("has_layer", [False, True])
def test_loops(ours: int, theirs: int, has_layer: bool) -> None:
    def call(m: Any, x: Any, count: int, zeros: Any, tanh: Any) -> Any:
        h = m.enter(x)
        z = zeros(h)
        for _ in range(count):
            z = tanh((m.layer(z) if has_layer else 0.5 * z) + h)
        return m.leave(z)

    layers = {"layer": linear(6, 6)} if has_layer else {}
    pair = net(
        lambda m, x: call(m, x, ours, mx.zeros_like, mx.tanh),
        lambda m, x: call(m, x, theirs, torch.zeros_like, torch.tanh),
        enter=linear(4, 6), leave=linear(6, 4), **layers,
    )  # fmt: skip
    cause = verdict(pair, draw(3, 4))
    assert f"a loop of {theirs} iterations in b has {ours} in a" in cause, cause


def test_a_layer_that_is_left_out_is_named_before_what_it_computes() -> None:
    def call(m: Any, x: Any, count: int, tanh: Any) -> Any:
        for layer in m.layers[:count]:
            x = x + tanh(layer(x))
        return m.out(x)

    layers = [linear(4, 4) for _ in range(3)]
    pair = net(
        lambda m, x: call(m, x, 2, mx.tanh), lambda m, x: call(m, x, 3, torch.tanh), layers=layers, out=linear(4, 4)
    )
    cause = verdict(pair, draw(3, 4))
    assert "layers.2 is called in b, but not in a" in cause, cause


# ---- single functions ---------------------------------------------------------------------------------------


def fourier(xp: Any, x: Any, kernel: Any, padded: int) -> Any:
    """Returns the convolution of signals [B, L, C] with a kernel [L, C]."""
    name = "axis" if xp is mx else "dim"
    n = padded * x.shape[1]
    product = xp.fft.rfft(x, n=n, **{name: 1}) * xp.fft.rfft(kernel, n=n, **{name: 0})[None]
    return xp.fft.irfft(product, n=n, **{name: 1})[:, : x.shape[1]]


def window(size: int) -> Any:
    return 0.5 - 0.5 * mx.cos(2 * math.pi * mx.arange(8) / size)


FUNCTIONS: dict[str, tuple[Function, Function, str]] = {
    "circular": (
        lambda m, x: fourier(mx, x, x[0], 1),
        lambda m, x: fourier(torch, x, x[0], 2),
        "half as long in a: a product of transforms that are not padded is a circular convolution",
    ),
    "linear": (lambda m, x: fourier(mx, x, x[0], 2), lambda m, x: fourier(torch, x, x[0], 1), "twice as long in a"),
    "symmetric window": (
        lambda m, x: x * window(7),
        lambda m, x: x * torch.hann_window(8, dtype=x.dtype),
        "the window is symmetric in a, periodic in b",
    ),
    "exclusive sum": (
        lambda m, x: x * mx.cumsum(x, axis=1, inclusive=False),
        lambda m, x: x * x.cumsum(1),
        "the cumulative sum leaves out the element itself in a",
    ),
    "sigmoid": (lambda m, x: mx.sigmoid(x), lambda m, x: x.softmax(-1), "sigmoid in a, softmax in b"),
    "layer norm": (
        lambda m, x: mx.fast.layer_norm(x, None, None, 1e-6),
        lambda m, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        "the mean of the output of up is subtracted in a: a layer norm in a, an RMS norm in b",
    ),
    "rms norm": (
        lambda m, x: mx.fast.rms_norm(x, None, 1e-5),
        lambda m, x: F.layer_norm(x, (8,)),
        "RMS norm in a, layer norm in b",
    ),
    "unit length": (lambda m, x: x, lambda m, x: F.normalize(x, dim=-1), "normalization to unit length is left out"),
    "clipped": (
        lambda m, x: mx.maximum(mx.logaddexp(x, 0.0), 0.75),
        lambda m, x: F.softplus(x),
        "clipped at 0.75 from below in a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    ours, theirs, words = FUNCTIONS[name]
    pair = net(
        lambda m, x: m.down(ours(m, m.up(x))),
        lambda m, x: m.down(theirs(m, m.up(x))),
        up=linear(6, 8), down=linear(8, 6),
    )  # fmt: skip
    cause = verdict(pair, draw(2, 5, 6))
    assert words in cause, cause


LOSSES: dict[str, tuple[Function, Function, str]] = {
    "sum": (
        lambda ce, keep: (ce * keep).sum(),
        lambda s, y: F.cross_entropy(s, y),
        "the loss is the sum of its terms in a",
    ),
    "ignored": (
        lambda ce, keep: ce.mean(),
        lambda s, y: F.cross_entropy(s, y),
        "labels that are left out (ignore_index) count in a",
    ),
    "divided": (
        lambda ce, keep: (ce * keep).mean(),
        lambda s, y: F.cross_entropy(s, y),
        "divided by the number of all labels in a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_that_a_model_computes(name: str) -> None:
    ours, theirs, words = LOSSES[name]

    def mlx_call(m: Any, x: Any, labels: Any) -> Any:
        ce = M.losses.cross_entropy(m.head(x), mx.maximum(labels, 0))
        return ours(ce, (labels >= 0).astype(ce.dtype))

    labels = tokens(6, below=5)
    labels[2:4] = -100
    pair = net(mlx_call, lambda m, x, labels: theirs(m.head(x), labels.long()), head=linear(4, 5))
    cause = verdict(pair, (draw(6, 4), labels))
    assert words in cause, cause


def test_keys_and_values_that_are_appended_on_the_other_side() -> None:
    """Two of three concatenations: the third one would hide the cause."""

    def turned(x: Any, cat: Any) -> Any:
        return cat([-x[..., 4:], x[..., :4]], -1)

    def mlx_call(m: Any, x: Any, past: Any) -> Any:
        q, k, v = turned(m.q(x), mx.concatenate), m.k(x), m.v(x)
        k, v = mx.concatenate([k, past], axis=1), mx.concatenate([v, past], axis=1)
        return m.out(mx.softmax(q @ k.swapaxes(1, 2) + mx.arange(k.shape[1]) * 0.1, axis=-1) @ v)

    def torch_call(m: Any, x: Any, past: Any) -> Any:
        q, k, v = turned(m.q(x), torch.cat), m.k(x), m.v(x)
        k, v = torch.cat([past, k], 1), torch.cat([past, v], 1)
        return m.out((q @ k.mT + torch.arange(k.shape[1], dtype=x.dtype) * 0.1).softmax(-1) @ v)

    pair = net(mlx_call, torch_call, **{name: linear(8, 8) for name in ("q", "k", "v", "out")})
    cause = verdict(pair, (draw(2, 3, 8), draw(2, 4, 8, seed=1)))
    assert "the parts are concatenated in the reverse order in a" in cause, cause


# ---- what is passed on --------------------------------------------------------------------------------------


def test_a_number_that_the_model_passes_to_a_layer() -> None:
    """The layer itself is right, so the model is the culprit, although each side keeps its own number."""

    def call(m: Any, x: Any, start: int, arange: Any) -> Any:
        return m.out(x + 0.1 * arange(start, start + x.shape[1])[:, None])

    inner = net(
        lambda m, x, start: call(m, x, start, mx.arange), lambda m, x, start: call(m, x, start, torch.arange),
        out=linear(4, 4),
    )  # fmt: skip
    outer = net(lambda m, x, start: m.inner(x, start), lambda m, x, start: m.inner(x, start), inner=inner)
    pair = net(lambda m, x: m.outer(m.up(x), 3), lambda m, x: m.outer(m.up(x), 2), outer=outer, up=linear(4, 4))
    cause = verdict(pair, draw(2, 5, 4))
    assert cause.startswith("differs in the model") and "outer gets 1 = 3 in a, 2 in b" in cause, cause


def test_rows_of_ids_that_are_taken_in_the_other_order() -> None:
    pair = net(
        lambda m, x, edges: m.out(m.up(x)[edges[1]] * m.up(x)[edges[0]].sum(axis=-1, keepdims=True)),
        lambda m, x, edges: m.out(m.up(x)[edges[0]] * m.up(x)[edges[1]].sum(-1, keepdim=True)),
        up=linear(4, 4), out=linear(4, 2),
    )  # fmt: skip
    edges = np.array([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]], np.int32)
    cause = verdict(pair, (draw(5, 4), edges))
    assert "the input is taken in the reverse order along axis 0 in a" in cause, cause


def test_a_layer_in_the_place_of_another_one() -> None:
    norms = {name: Pair(M.LayerNorm(6), T.LayerNorm(6)) for name in ("first", "second")}
    pair = net(
        lambda m, x: m.first(m.up(m.first(x))), lambda m, x: m.second(m.up(m.first(x))), up=linear(6, 6), **norms
    )
    cause = verdict(pair, draw(4, 6))
    assert "a calls first where b calls second" in cause, cause


# ---- gradients ----------------------------------------------------------------------------------------------


def test_gradients_that_stop_in_a_only() -> None:
    def call(m: Any, x: Any, tanh: Any, stop: Any) -> Any:
        h = tanh(m.trunk(x))
        return m.depth(h), m.normal(stop(h))

    layers = {"trunk": linear(6, 8), "depth": linear(8, 2), "normal": linear(8, 2)}
    pair = net(
        lambda m, x: call(m, x, mx.tanh, mx.stop_gradient), lambda m, x: call(m, x, torch.tanh, lambda h: h), **layers
    )
    cause = verdict(pair, draw(5, 6), stages=["forward", "gradients"])
    assert "the gradient of the input of normal is not passed on in a, as by stop_gradient" in cause, cause
    assert "differs in the model" in cause


def test_gradients_that_stop_in_b_only() -> None:
    """A straight-through estimator that is left out."""
    pair = net(
        lambda m, x: m.down(mx.tanh(m.up(x))),
        lambda m, x: m.down((lambda z: z + (torch.tanh(z) - z).detach())(m.up(x))),
        up=linear(6, 8), down=linear(8, 2),
    )  # fmt: skip
    cause = verdict(pair, draw(5, 6), stages=["forward", "gradients"])
    assert "detach of b is left out in a" in cause, cause


def test_an_error_of_the_backward_pass_does_not_hide_what_the_forward_pass_has() -> None:
    """MLX has no gradient by indices; whoever ports a mixture of experts for inference does not need one."""

    def mlx_call(m: Any, x: Any, act: Any) -> Any:
        x = m.moe(act(m.up(x)))
        return m.down(x)

    def route(m: Any, x: Any) -> Any:
        return mx.take_along_axis(x, mx.argsort(-m.gate(x), axis=-1)[..., :2], axis=-1)

    def torch_route(m: Any, x: Any) -> Any:
        return x.gather(-1, (-m.gate(x)).argsort(-1)[..., :2])

    for act, place, stage in ((M.relu, "", "forward"), (M.silu, "moe", "gradients")):
        pair = net(
            lambda m, x, act=act: mlx_call(m, x, act),
            lambda m, x: m.down(m.moe(F.silu(m.up(x)))),
            up=linear(6, 8), down=linear(2, 2), moe=net(route, torch_route, gate=linear(8, 8)),
        )  # fmt: skip
        report = compare(*pair, draw(5, 6), copy_weights=True)
        assert report.failed_stage is not None
        assert (report.culprit, report.failed_stage.name) == (place, stage), report.verdict


# ---- layers of another kind ---------------------------------------------------------------------------------


def test_a_quantized_layer() -> None:
    pair = net(lambda m, x: m.up(x), lambda m, x: m.up(x), up=linear(64, 8))
    M.quantize(pair.ours, group_size=64, bits=8)
    report = compare(*pair, draw(2, 64))
    assert report.culprit == "up" and "quantized in a" in report.cause, report.verdict
