"""Random correct pairs of models as users write them: blocks with functional code, in random trees and sizes.

`make(seed)` returns an MLX model, its PyTorch twin, the inputs, and a dtype. A block is a pair of functions of a
module and its inputs, in the words of each framework, and the layers that both use. Widths are 1 to 128, weights are
up to ten times as large and a hundred times as small as usual.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import icenet.blas

import mlx.core as mx
import mlx.nn as M
import numpy as np
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import randomized

import icenet
from icenet.parity import compare
from icenet.tools.calls import working_copy

DTYPES = ("fp32", "fp32", "bf16", "fp16")


class Draw(random.Random):
    """The random numbers of a pair.

    Attributes:
        dtype: The dtype in which it is compared.
        hidden: Values of hidden scores that the dtype has.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(f"written {seed}")
        self.dtype = self.choice(DTYPES)
        self.hidden = (-1e4, -math.inf) if self.dtype == "fp16" else (-1e9, -math.inf)


class MlxNet(M.Module):
    """Layers, and the function that uses them."""

    def __init__(self, call: Callable[..., Any], arrays: dict[str, int], **layers: Any) -> None:
        super().__init__()
        self.call = call
        for name, size in arrays.items():
            setattr(self, name, mx.ones((size,)))
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


class TorchNet(T.Module):
    def __init__(self, call: Callable[..., Any], arrays: dict[str, int], **layers: Any) -> None:
        super().__init__()
        self.call = call
        for name, size in arrays.items():
            setattr(self, name, T.Parameter(torch.ones(size)))
        for name, layer in layers.items():
            setattr(self, name, T.ModuleList(layer) if isinstance(layer, list) else layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


class Pair(NamedTuple):
    """A module of each framework."""

    ours: Any
    theirs: Any


def verdict(pair: Pair, given: Any, **options: Any) -> str:
    """Returns the first line of the report of a pair with equal weights, which must differ."""
    randomized(pair.theirs)
    icenet.from_torch(pair.theirs, pair.ours)
    report = compare(pair.ours, pair.theirs, given, copy_weights=False, **{"stages": ["forward"], **options})
    assert not report.passed, report
    return report.verdict


def net(ours: Callable[..., Any], theirs: Callable[..., Any], *arrays: tuple[str, int], **layers: Any) -> Pair:
    """Returns a module of both frameworks; a layer is a `Pair` or a list of them."""

    def side(index: int) -> dict[str, Any]:
        return {n: [p[index] for p in item] if isinstance(item, list) else item[index] for n, item in layers.items()}

    return Pair(MlxNet(ours, dict(arrays), **side(0)), TorchNet(theirs, dict(arrays), **side(1)))


def linear(i: int, o: int, bias: bool = True) -> Pair:
    return Pair(M.Linear(i, o, bias=bias), T.Linear(i, o, bias=bias))


def between(ours: Callable[..., Any], theirs: Callable[..., Any], **layers: Any) -> Pair:
    """Returns two linear layers with functions `f(module, x)` between them, of x `[..., 6]` to `[..., 6]`."""
    return net(
        lambda m, x: m.down(ours(m, m.up(x))),
        lambda m, x: m.down(theirs(m, m.up(x))),
        up=linear(6, 8),
        down=linear(8, 6),
        **layers,
    )


ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "relu": (M.relu, F.relu),
    "gelu": (M.gelu, F.gelu),
    "tanh gelu": (M.gelu_approx, lambda x: F.gelu(x, approximate="tanh")),
    "quick gelu": (lambda x: x * mx.sigmoid(1.702 * x), lambda x: x * torch.sigmoid(1.702 * x)),
    "silu": (M.silu, F.silu),
    "tanh": (mx.tanh, torch.tanh),
    "sigmoid": (mx.sigmoid, torch.sigmoid),
    "leaky": (lambda x: M.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2)),
    "softplus": (lambda x: mx.logaddexp(x, 0.0), F.softplus),
    "square": (lambda x: mx.square(M.relu(x)), lambda x: F.relu(x).pow(2)),
    "maximum": (lambda x: mx.maximum(x, 0.0), lambda x: torch.clamp(x, min=0)),
    "clip": (lambda x: mx.clip(x, -2.0, 2.0), lambda x: x.clamp(-2.0, 2.0)),
    "sine": (mx.sin, torch.sin),
    "hard": (M.hardswish, F.hardswish),
}


def mlx_mean(x: Any, axis: int | tuple[int, ...], keepdims: bool = False) -> Any:
    """Returns the mean, of fp16 in fp32: MLX sums in fp16, and overflows where PyTorch does not, a difference."""
    if x.dtype != mx.float16:
        return x.mean(axis=axis, keepdims=keepdims)
    return x.astype(mx.float32).mean(axis=axis, keepdims=keepdims).astype(x.dtype)


# ---- norms --------------------------------------------------------------------------------------------------


def mlx_rms(m: Any, x: Any) -> Any:
    y = x.astype(mx.float32)
    y = y * mx.rsqrt(mx.mean(mx.square(y), axis=-1, keepdims=True) + 1e-6)
    return m.gain * y.astype(x.dtype)


def torch_rms(m: Any, x: Any) -> Any:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.gain * y.to(x.dtype)


def mlx_layer_norm(m: Any, x: Any) -> Any:
    y = x.astype(mx.float32)
    y = (y - y.mean(axis=-1, keepdims=True)) / mx.sqrt(y.var(axis=-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * m.gain + m.shift


def torch_layer_norm(m: Any, x: Any) -> Any:
    return F.layer_norm(x, x.shape[-1:], m.gain, m.shift, 1e-5)


def norm(draw: Draw, width: int) -> Pair:
    kinds = ["layer", "rms", "hand-written rms", "none"] + (["hand-written"] if width > 2 else [])
    kind = draw.choice(kinds)
    eps = draw.choice([1e-5, 1e-6, 1e-3])
    if kind == "layer":
        return Pair(M.LayerNorm(width, eps=eps), T.LayerNorm(width, eps=eps))
    if kind == "rms":
        return Pair(M.RMSNorm(width, eps=eps), T.RMSNorm(width, eps=eps))
    if kind == "none":
        return Pair(M.Identity(), T.Identity())
    if kind == "hand-written":
        return net(mlx_layer_norm, torch_layer_norm, ("gain", width), ("shift", width))
    return net(mlx_rms, torch_rms, ("gain", width))


# ---- blocks of sequences [B, T, D] --------------------------------------------------------------------------


def feed_forward(draw: Draw, width: int) -> Pair:
    """A residual branch, with the norm before or after it."""
    ours, theirs = draw.choice(list(ACTIVATIONS.values()))
    pre, dropout = draw.random() < 0.5, draw.choice([0.0, 0.1])
    inner = draw.choice([width, 2 * width, 3])

    def call(m: Any, x: Any, act: Any) -> Any:
        y = m.norm(x) if pre else x
        x = x + m.drop(m.down(act(m.up(y))))
        return x if pre else m.norm(x)

    return net(
        lambda m, x: call(m, x, ours),
        lambda m, x: call(m, x, theirs),
        norm=norm(draw, width),
        up=linear(width, inner),
        down=linear(inner, width, draw.random() < 0.5),
        drop=Pair(M.Dropout(dropout), T.Dropout(dropout)),
    )


def gated(draw: Draw, width: int) -> Pair:
    inner, joined = draw.choice([width, 2 * width]), draw.random() < 0.5
    if joined:  # one projection that is split

        def mlx_call(m: Any, x: Any) -> Any:
            gate, up = mx.split(m.up(m.norm(x)), 2, axis=-1)
            return x + m.down(M.silu(gate) * up)

        def torch_call(m: Any, x: Any) -> Any:
            gate, up = m.up(m.norm(x)).chunk(2, dim=-1)
            return x + m.down(F.silu(gate) * up)

        return net(
            mlx_call, torch_call, norm=norm(draw, width), up=linear(width, 2 * inner), down=linear(inner, width)
        )
    return net(
        lambda m, x: x + m.down(M.gelu(m.gate(x)) * m.up(m.norm(x))),
        lambda m, x: x + m.down(F.gelu(m.gate(x)) * m.up(m.norm(x))),
        norm=norm(draw, width),
        gate=linear(width, inner, False),
        up=linear(width, inner, False),
        down=linear(inner, width, False),
    )


def rotary(x: Any, halves: bool, is_mlx: bool) -> Any:
    """Returns heads [B, H, T, E] turned by their positions, as the two frameworks write it."""
    n, size = x.shape[2], x.shape[3]
    if is_mlx:
        frequencies = 10000.0 ** (-mx.arange(0, size, 2, dtype=mx.float32) / size)
        angles = mx.arange(n, dtype=mx.float32)[:, None] * frequencies
        cos, sin = mx.cos(angles).astype(x.dtype), mx.sin(angles).astype(x.dtype)
        a, b = (x[..., : size // 2], x[..., size // 2 :]) if halves else (x[..., ::2], x[..., 1::2])
        parts = a * cos - b * sin, a * sin + b * cos
        return mx.concatenate(parts, axis=-1) if halves else mx.stack(parts, axis=-1).reshape(x.shape)
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, size, 2).float() / size))
    angles = torch.outer(torch.arange(n).float(), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    if halves:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        turned = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cos + turned * sin
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def attention(draw: Draw, width: int) -> Pair:
    """Attention with the scores by hand or by the function of the framework; rotary positions, grouped heads."""
    heads = draw.choice([h for h in (1, 2, 4, 8) if width % h == 0])
    size, groups = width // heads, draw.choice([1, heads])
    causal, fused = draw.random() < 0.5, draw.random() < 0.4
    turns = draw.choice([None, True, False]) if size % 2 == 0 else None
    hide, torch_hide = draw.choice(draw.hidden), draw.choice(draw.hidden)

    def mlx_call(m: Any, x: Any, keep: Any = None) -> Any:
        b, n, _ = x.shape
        h = m.norm(x)
        q = m.q(h).reshape(b, n, heads, size).transpose(0, 2, 1, 3)
        k = m.k(h).reshape(b, n, groups, size).transpose(0, 2, 1, 3)
        v = m.v(h).reshape(b, n, groups, size).transpose(0, 2, 1, 3)
        if turns is not None:
            q, k = rotary(q, turns, True), rotary(k, turns, True)
        mask = mx.tri(n, dtype=mx.bool_) if causal else None
        if keep is not None:
            row = keep[:, None, None, :].astype(mx.bool_)
            mask = row if mask is None else mx.logical_and(mask, row)
        if fused:
            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=size**-0.5, mask=mask)
        else:
            k, v = mx.repeat(k, heads // groups, axis=1), mx.repeat(v, heads // groups, axis=1)
            scores = (q @ k.transpose(0, 1, 3, 2)) / math.sqrt(size)
            if mask is not None:
                scores = mx.where(mask, scores, mx.array(hide, scores.dtype))
            y = mx.softmax(scores, axis=-1, precise=True) @ v
        return x + m.out(y.transpose(0, 2, 1, 3).reshape(b, n, -1))

    def torch_call(m: Any, x: Any, keep: Any = None) -> Any:
        b, n, _ = x.shape
        h = m.norm(x)
        q = m.q(h).view(b, n, heads, size).transpose(1, 2)
        k = m.k(h).view(b, n, groups, size).transpose(1, 2).repeat_interleave(heads // groups, dim=1)
        v = m.v(h).view(b, n, groups, size).transpose(1, 2).repeat_interleave(heads // groups, dim=1)
        if turns is not None:
            q, k = rotary(q, turns, False), rotary(k, turns, False)
        mask = torch.ones(n, n, dtype=torch.bool).tril() if causal else None
        if keep is not None:
            row = keep[:, None, None, :].bool()
            mask = row if mask is None else mask & row
        if fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.transpose(-1, -2) * size**-0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, torch_hide)
            y = scores.softmax(-1) @ v
        return x + m.out(y.transpose(1, 2).reshape(b, n, -1))

    return net(
        mlx_call,
        torch_call,
        norm=norm(draw, width),
        q=linear(width, width),
        k=linear(width, groups * size),
        v=linear(width, groups * size),
        out=linear(width, width),
    )


def packed_attention(draw: Draw, width: int) -> Pair:
    """The attention layers of the frameworks."""
    heads = draw.choice([h for h in (1, 2, 4) if width % h == 0])

    def mlx_call(m: Any, x: Any, keep: Any = None) -> Any:
        mask = None
        if keep is not None:
            mask = mx.where(keep[:, None, None, :] > 0, 0.0, -1e9).astype(x.dtype)
        return m.norm(x + m.attn(x, x, x, mask))

    def torch_call(m: Any, x: Any, keep: Any = None) -> Any:
        padding = None if keep is None else keep == 0
        return m.norm(x + m.attn(x, x, x, key_padding_mask=padding, need_weights=False)[0])

    layer = Pair(M.MultiHeadAttention(width, heads, bias=True), T.MultiheadAttention(width, heads, batch_first=True))
    return net(mlx_call, torch_call, attn=layer, norm=norm(draw, width))


def recurrent(draw: Draw, width: int) -> Pair:
    kind, size = draw.choice(["LSTM", "GRU", "RNN"]), draw.choice([1, 3, width])
    both = draw.random() < 0.5

    def layer() -> Pair:
        return Pair(getattr(M, kind)(width, size), getattr(T, kind)(width, size, batch_first=True))

    def mlx_run(layer: Any, x: Any) -> Any:
        y = layer(x)
        return y[0] if kind == "LSTM" else y

    def mlx_call(m: Any, x: Any) -> Any:
        y = mlx_run(m.ahead, x)
        if both:
            y = mx.concatenate([y, mlx_run(m.back, x[:, ::-1])[:, ::-1]], axis=-1)
        return x + m.out(y)

    def torch_call(m: Any, x: Any) -> Any:
        y = m.ahead(x)[0]
        if both:
            y = torch.cat([y, m.back(x.flip(1))[0].flip(1)], dim=-1)
        return x + m.out(y)

    layers = {"ahead": layer(), **({"back": layer()} if both else {})}
    return net(mlx_call, torch_call, **layers, out=linear(size * (2 if both else 1), width))


def temporal(draw: Draw, width: int) -> Pair:
    """A causal convolution over time; PyTorch's has its channels first."""
    kernel, dilation = draw.choice([1, 2, 3, 5]), draw.choice([1, 2])
    groups = draw.choice([1, width])
    pad = (kernel - 1) * dilation

    def mlx_call(m: Any, x: Any) -> Any:
        return x + M.gelu(m.conv(mx.pad(m.norm(x), [(0, 0), (pad, 0), (0, 0)])))

    def torch_call(m: Any, x: Any) -> Any:
        y = F.pad(m.norm(x).transpose(1, 2), (pad, 0))
        return x + F.gelu(m.conv(y)).transpose(1, 2)

    return net(
        mlx_call,
        torch_call,
        norm=norm(draw, width),
        conv=Pair(
            M.Conv1d(width, width, kernel, dilation=dilation, groups=groups),
            T.Conv1d(width, width, kernel, dilation=dilation, groups=groups),
        ),
    )


def mixed(draw: Draw, width: int) -> Pair:
    """Functional code without layers: scale and shift, means over time, a soft cap, a product of all pairs."""
    kind = draw.randrange(5)
    ours, theirs = [
        (lambda m, x: x * (1 + m.scale) + m.shift, lambda m, x: x * (1 + m.scale) + m.shift),
        (
            lambda m, x: m.scale * (x - mlx_mean(x, 1, keepdims=True)) + m.shift,
            lambda m, x: m.scale * (x - x.mean(dim=1, keepdim=True)) + m.shift,
        ),
        (
            lambda m, x: 3.0 * mx.tanh(x * m.scale / 3.0) + m.shift,
            lambda m, x: 3.0 * torch.tanh(x * m.scale / 3.0) + m.shift,
        ),
        (
            lambda m, x: x + mx.einsum("btd,bsd->bts", x, x * m.scale) @ x / x.shape[1] + m.shift,
            lambda m, x: x + torch.einsum("btd,bsd->bts", x, x * m.scale) @ x / x.shape[1] + m.shift,
        ),
        (
            lambda m, x: mx.cumsum(x, axis=1) * m.scale / x.shape[1] + m.shift,
            lambda m, x: torch.cumsum(x, dim=1) * m.scale / x.shape[1] + m.shift,
        ),
    ][kind]
    return net(ours, theirs, ("scale", width), ("shift", width))


def both(draw: Draw, width: int, depth: int = 0) -> Pair:
    """A tree: two smaller sequences of blocks side by side, whose outputs are joined."""
    left, right = (sequence(draw, width, draw.randint(1, 2), depth + 1) for _ in range(2))
    return net(
        lambda m, x: m.join(mx.concatenate([m.left(x), m.right(x)], axis=-1)),
        lambda m, x: m.join(torch.cat([m.left(x), m.right(x)], dim=-1)),
        left=left,
        right=right,
        join=linear(2 * width, width),
    )


BLOCKS = (feed_forward, gated, attention, packed_attention, recurrent, temporal, mixed)
MASKED = (attention, packed_attention)


def sequence(draw: Draw, width: int, count: int, depth: int = 0) -> Pair:
    """Returns blocks that are called one after the other; those that can get the mask, if there is one."""
    kinds = [both if depth < 2 and draw.random() < 0.15 else draw.choice(BLOCKS) for _ in range(count)]
    layers = [kind(draw, width, depth) if kind is both else kind(draw, width) for kind in kinds]

    def call(m: Any, x: Any, keep: Any = None) -> Any:
        for kind, layer in zip(kinds, m.layers, strict=True):
            x = layer(x, keep) if keep is not None and kind in MASKED else layer(x)
        return x

    return net(call, call, layers=layers)


# ---- models -------------------------------------------------------------------------------------------------

Made = tuple[Pair, Any]
WIDTHS = (1, 2, 3, 4, 8, 16, 24, 64, 128)


def numbers(draw: Draw, *shape: int, large: float = 30.0) -> np.ndarray:
    scale = draw.choice([1e-3, 0.1, 1.0, 1.0, large])
    generator = np.random.default_rng(draw.randrange(1 << 30))
    return (scale * generator.standard_normal(shape)).astype(np.float32)


def ids(draw: Draw, below: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(draw.randrange(1 << 30)).integers(0, below, shape).astype(np.int32)


def sizes(draw: Draw) -> tuple[int, int]:
    return draw.randint(1, 4), draw.choice([1, 2, 5, 9, 16, 33])


def series(draw: Draw) -> Made:
    """Numbers, a projection, blocks, an output of each position or of one."""
    width, inputs = draw.choice(WIDTHS), draw.choice([1, 3, 7])
    end = draw.randrange(4)
    mlx_ends = (lambda x: x, lambda x: x[:, -1], lambda x: mlx_mean(x, 1), lambda x: x.max(axis=1))
    torch_ends = (lambda x: x, lambda x: x[:, -1], lambda x: x.mean(1), lambda x: x.amax(1))
    pair = net(
        lambda m, x: m.head(mlx_ends[end](m.body(m.enter(x)))),
        lambda m, x: m.head(torch_ends[end](m.body(m.enter(x)))),
        enter=linear(inputs, width),
        body=sequence(draw, width, draw.randint(1, 4)),
        head=linear(width, draw.choice([1, 4])),
    )
    return pair, numbers(draw, *sizes(draw), inputs)


def text(draw: Draw) -> Made:
    """Tokens with learned positions, and a mask of padding; the output matrix is that of the embedding or its own."""
    width, vocabulary, tied = draw.choice(WIDTHS), draw.choice([2, 11, 97]), draw.random() < 0.4
    batch, length = sizes(draw)
    pools = draw.random() < 0.5

    def mlx_call(m: Any, ids: Any, mask: Any = None) -> Any:
        x = m.tokens(ids) + m.positions(mx.arange(ids.shape[1]))
        x = m.norm(m.body(x, mask))
        if pools and mask is not None:
            weight = mask[..., None].astype(x.dtype)
            x = (x * weight).sum(axis=1) / mx.maximum(weight.sum(axis=1), 1e-6)
        return m.tokens.as_linear(x) if tied else m.head(x)

    def torch_call(m: Any, ids: Any, mask: Any = None) -> Any:
        x = m.tokens(ids) + m.positions(torch.arange(ids.shape[1]))
        x = m.norm(m.body(x, mask))
        if pools and mask is not None:
            weight = mask[..., None].to(x.dtype)
            x = (x * weight).sum(1) / weight.sum(1).clamp(min=1e-6)
        return x @ m.tokens.weight.T if tied else m.head(x)

    pair = net(
        mlx_call,
        torch_call,
        tokens=Pair(M.Embedding(vocabulary, width), T.Embedding(vocabulary, width)),
        positions=Pair(M.Embedding(40, width), T.Embedding(40, width)),
        body=sequence(draw, width, draw.randint(1, 3)),
        norm=norm(draw, width),
        **({} if tied else {"head": linear(width, vocabulary, False)}),
    )
    inputs = {"ids": ids(draw, vocabulary, batch, length)}
    if draw.random() < 0.6:
        real = np.random.default_rng(draw.randrange(1 << 30)).integers(1, length + 1, (batch, 1))
        inputs["mask"] = (np.arange(length) < real).astype(np.int32)
    return pair, inputs


def convolution(i: int, o: int, kernel: int, **options: Any) -> Pair:
    return Pair(M.Conv2d(i, o, kernel, **options), T.Conv2d(i, o, kernel, **options))


def norm_free() -> Pair:
    return Pair(M.Identity(), T.Identity())


def image_block(draw: Draw, width: int) -> Pair:
    ours, theirs = draw.choice(list(ACTIVATIONS.values()))
    kind = draw.randrange(5)
    groups = draw.choice([g for g in (1, 2, 4) if width % g == 0])
    norms = draw.choice(
        [
            # in fp16, MLX's computes the variance in fp16 and overflows where PyTorch's does not: a difference
            lambda: Pair(M.BatchNorm(width), T.BatchNorm2d(width)) if draw.dtype != "fp16" else norm_free(),
            lambda: Pair(M.GroupNorm(groups, width, pytorch_compatible=True), T.GroupNorm(groups, width)),
            norm_free,
        ]
    )
    if kind == 0:  # a residual of two convolutions
        return net(
            lambda m, x: ours(x + m.norm2(m.conv2(ours(m.norm1(m.conv1(x)))))),
            lambda m, x: theirs(x + m.norm2(m.conv2(theirs(m.norm1(m.conv1(x)))))),
            conv1=convolution(width, width, 3, padding=1, bias=False),
            norm1=norms(),
            conv2=convolution(width, width, 3, padding=1),
            norm2=norms(),
        )
    if kind == 1:  # a depthwise convolution, and linear layers over the channels
        return net(
            lambda m, x: x + m.down(ours(m.up(m.norm(m.conv(x))))),
            lambda m, x: x + m.down(theirs(m.up(m.norm(m.conv(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2),
            conv=convolution(width, width, 5, padding=2, groups=width),
            norm=Pair(M.LayerNorm(width, eps=1e-6), T.LayerNorm(width, eps=1e-6)),
            up=linear(width, 2 * width),
            down=linear(2 * width, width),
        )
    if kind == 2:  # a smaller image and back, with the first next to it
        return net(
            lambda m, x: m.join(mx.concatenate([x, m.up(ours(m.down(x)))], axis=-1)),
            lambda m, x: m.join(torch.cat([x, m.up(theirs(m.down(x)))], dim=1)),
            down=convolution(width, width, 2, stride=2),
            up=draw.choice(
                [
                    Pair(M.Upsample(2, "nearest"), T.Upsample(scale_factor=2, mode="nearest")),
                    Pair(M.Upsample(2, "linear"), T.Upsample(scale_factor=2, mode="bilinear")),
                    Pair(M.ConvTranspose2d(width, width, 2, stride=2), T.ConvTranspose2d(width, width, 2, stride=2)),
                ]
            ),
            join=convolution(2 * width, width, 1),
        )
    if kind == 3:  # a factor for each channel (squeeze and excitation)
        return net(
            lambda m, x: x * mx.sigmoid(m.fc2(M.relu(m.fc1(mlx_mean(x, (1, 2))))))[:, None, None],
            lambda m, x: x * torch.sigmoid(m.fc2(F.relu(m.fc1(x.mean(dim=(2, 3))))))[:, :, None, None],
            fc1=linear(width, 3),
            fc2=linear(3, width),
        )
    return net(  # a pooling of the same size by a residual
        lambda m, x: x + m.conv(ours(m.pool(x))),
        lambda m, x: x + m.conv(theirs(m.pool(x))),
        pool=draw.choice(
            [
                Pair(M.MaxPool2d(3, stride=1, padding=1), T.MaxPool2d(3, stride=1, padding=1)),
                Pair(M.AvgPool2d(3, stride=1, padding=1), T.AvgPool2d(3, stride=1, padding=1)),
            ]
        ),
        conv=convolution(width, width, 1),
    )


def image_body(draw: Draw, channels: int, width: int) -> Pair:
    def call(m: Any, x: Any) -> Any:
        x = m.stem(x)
        for block in m.blocks:
            x = block(x)
        return x

    stem = convolution(channels, width, 3, padding=1, stride=draw.choice([1, 2]))
    return net(call, call, stem=stem, blocks=[image_block(draw, width) for _ in range(draw.randint(1, 3))])


def images(draw: Draw) -> Made:
    width, channels, dense = draw.choice([1, 2, 4, 8, 16]), draw.choice([1, 3]), draw.random() < 0.3
    pair = net(
        lambda m, x: m.head(m.body(x)) if dense else m.head(mlx_mean(m.body(x), (1, 2))),
        lambda m, x: m.head(m.body(x)) if dense else m.head(m.body(x).mean(dim=(2, 3))),
        body=image_body(draw, channels, width),
        head=convolution(width, 2, 1) if dense else linear(width, 5),
    )
    return pair, numbers(draw, draw.randint(2, 4), *draw.choice([(8, 8), (12, 8), (16, 16)]), channels, large=8.0)


def images_and_text(draw: Draw) -> Made:
    """Features of images and of tokens, their norms by hand, and their products."""
    width = draw.choice([2, 8, 16])

    def mlx_call(m: Any, images: Any, ids: Any) -> Any:
        a = m.project(mlx_mean(m.body(images), (1, 2)))
        b = mlx_mean(m.text(m.tokens(ids)), 1)
        a, b = (v / mx.sqrt(mx.square(v).sum(axis=-1, keepdims=True) + 1e-6) for v in (a, b))
        return 10.0 * a @ b.T

    def torch_call(m: Any, images: Any, ids: Any) -> Any:
        a = m.project(m.body(images).mean(dim=(2, 3)))
        b = m.text(m.tokens(ids)).mean(1)
        a, b = (v / torch.sqrt(v.square().sum(-1, keepdim=True) + 1e-6) for v in (a, b))
        return 10.0 * a @ b.T

    pair = net(
        mlx_call,
        torch_call,
        body=image_body(draw, 3, width),
        project=linear(width, width),
        tokens=Pair(M.Embedding(13, width), T.Embedding(13, width)),
        text=sequence(draw, width, 1),
    )
    batch = draw.randint(2, 4)
    return pair, (numbers(draw, batch, 8, 8, 3, large=8.0), ids(draw, 13, batch, draw.choice([1, 4, 9])))


def diffusion(draw: Draw) -> Made:
    """Numbers and a time, whose angles make scale and shift."""
    width, inputs = draw.choice([2, 8, 32]), draw.choice([1, 4])

    def mlx_call(m: Any, x: Any, t: Any) -> Any:
        frequencies = mx.exp(-math.log(10000.0) * mx.arange(4) / 4)
        angles = t.astype(mx.float32)[:, None] * frequencies
        time = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1).astype(x.dtype)
        scale, shift = mx.split(m.modulation(M.silu(m.time(time))), 2, axis=-1)
        return m.leave(M.silu(m.norm(m.enter(x)) * (1 + scale) + shift))

    def torch_call(m: Any, x: Any, t: Any) -> Any:
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(4) / 4)
        angles = t.float()[:, None] * frequencies
        time = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1).to(x.dtype)
        scale, shift = m.modulation(F.silu(m.time(time))).chunk(2, dim=-1)
        return m.leave(F.silu(m.norm(m.enter(x)) * (1 + scale) + shift))

    pair = net(
        mlx_call,
        torch_call,
        time=linear(8, width),
        modulation=linear(width, 2 * width),
        enter=linear(inputs, width),
        norm=norm(draw, width),
        leave=linear(width, inputs),
    )
    batch = draw.randint(1, 5)
    return pair, {"x": numbers(draw, batch, inputs), "t": ids(draw, 1000, batch)}


def graph(draw: Draw) -> Made:
    """Messages along edges, summed at their targets."""
    width, nodes, edges = draw.choice([1, 4, 16]), draw.choice([3, 9]), draw.choice([1, 7, 30])
    # in fp16, MLX's sigmoid is 0 below -11, and so would be all outputs of a narrow layer: a difference
    ours, theirs = (M.relu, F.relu) if draw.dtype == "fp16" else (M.silu, F.silu)

    def mlx_layer(m: Any, x: Any, edges: Any) -> Any:
        source, target = edges
        messages = M.relu(m.message(mx.concatenate([x[source], x[target]], axis=-1)))
        total = mx.zeros((x.shape[0], messages.shape[1]), dtype=messages.dtype).at[target].add(messages)
        return ours(m.combine(mx.concatenate([x, total], axis=-1)))

    def torch_layer(m: Any, x: Any, edges: Any) -> Any:
        source, target = edges.long()
        messages = F.relu(m.message(torch.cat([x[source], x[target]], dim=-1)))
        total = torch.zeros(x.shape[0], messages.shape[1], dtype=messages.dtype).index_add_(0, target, messages)
        return theirs(m.combine(torch.cat([x, total], dim=-1)))

    def layer(inputs: int) -> Pair:
        return net(mlx_layer, torch_layer, message=linear(2 * inputs, width), combine=linear(inputs + width, width))

    def call(m: Any, x: Any, edges: Any) -> Any:
        for layer in m.layers:
            x = layer(x, edges)
        return m.head(x)

    pair = net(call, call, layers=[layer(3), layer(width)], head=linear(width, 2))
    return pair, (numbers(draw, nodes, 3), ids(draw, nodes, 2, edges))


MODELS = (series, series, text, text, images, images, images_and_text, diffusion, graph)
WITH_IMAGES = (images, images_and_text)
"""Models whose PyTorch twin has its channels first."""


def _is_finite(module: Any, inputs: Any, dtype: str, moves: bool) -> bool:
    """Returns whether the outputs of a module of PyTorch, and their squares in the loss, are finite; of fp16, any."""
    own = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]

    def convert(array: np.ndarray) -> torch.Tensor:
        if array.dtype.kind != "f":
            return torch.from_numpy(array)
        moved = np.moveaxis(array, -1, 1) if moves and array.ndim > 2 else array
        return torch.from_numpy(np.ascontiguousarray(moved)).to(own)

    module = copy.deepcopy(module).to(own).eval()
    if isinstance(inputs, dict):
        found = module(**{name: convert(array) for name, array in inputs.items()})
    else:
        found = module(*map(convert, inputs if isinstance(inputs, tuple) else (inputs,)))
    finite = found.float().square().isfinite()
    return bool(finite.any() if dtype == "fp16" else finite.all())


def _is_finite_in_mlx(module: Any, inputs: Any) -> bool:
    """Returns whether any output of a module of MLX is finite in fp16."""

    def convert(array: np.ndarray) -> mx.array:
        return mx.array(array).astype(mx.float16) if array.dtype.kind == "f" else mx.array(array)

    module = working_copy(module, "fp16")
    module.eval()
    if isinstance(inputs, dict):
        found = module(**{name: convert(array) for name, array in inputs.items()})
    else:
        found = module(*map(convert, inputs if isinstance(inputs, tuple) else (inputs,)))
    return bool(mx.isfinite(found).any())


def make(seed: int) -> tuple[Any, Any, Any, str]:
    """Returns a random pair, its inputs, and a dtype."""
    draw = Draw(seed)
    torch.manual_seed(seed)
    pair, inputs = MODELS[seed % len(MODELS)](draw)
    dtype = draw.dtype
    randomized(pair.theirs, seed)
    matrices = [parameter for parameter in pair.theirs.parameters() if parameter.ndim > 1]
    # more than one in three would exceed 65504, the largest number of fp16, and give scores whose softmax is 0 or 1
    changed = draw.sample(matrices, (len(matrices) + 2) // 3)
    gain = draw.choice([0.1, 0.01, 1.0, 1.0, 3.0, 10.0])
    with torch.no_grad():
        for parameter in changed:
            parameter *= min(gain, 3.0) if dtype == "fp16" else gain
        while not _is_finite(pair.theirs, inputs, dtype, moves=MODELS[seed % len(MODELS)] in WITH_IMAGES):
            for parameter in matrices:  # a model that overflows in both frameworks says nothing
                parameter *= 0.5
    icenet.from_torch(pair.theirs, pair.ours)
    # in fp16, the scores of MLX's attention overflow above 65504 where PyTorch's do not: a difference
    while dtype == "fp16" and not _is_finite_in_mlx(pair.ours, inputs):
        with torch.no_grad():
            for parameter in matrices:
                parameter *= 0.5
        icenet.from_torch(pair.theirs, pair.ours)
    return pair.ours, pair.theirs, inputs, dtype
