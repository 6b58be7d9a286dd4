"""Random correct pairs of what `written_pairs` lacks: rare layers and functions, edges, modes, sizes of 1.

    python -m parity_tests.parity.rare_pairs --seed 7 --count 200

Prints each false alarm, and the number of models. `make(seed)` returns a pair as that of `written_pairs` does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for `python -m`

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import torch
import torch.nn as T
import torch.nn.functional as F
import written_pairs as written
from pairs import randomized
from written_pairs import Draw, Made, Pair, ids, linear, net, numbers

from icenet.parity import compare

Layers = tuple[Callable[[], Any], Callable[[], Any]]

ACTIVATIONS: list[Layers] = [
    (M.ReLU6, T.ReLU6),
    (lambda: M.CELU(0.7), lambda: T.CELU(0.7)),
    (M.Hardswish, T.Hardswish),
    (lambda: M.HardTanh(), lambda: T.Hardtanh()),
    (lambda: M.HardShrink(), lambda: T.Hardshrink()),
    (lambda: M.Softshrink(0.3), lambda: T.Softshrink(0.3)),
    (M.Softsign, T.Softsign),
    (M.LogSigmoid, T.LogSigmoid),
    (lambda: M.Softmax(), lambda: T.Softmax(-1)),
    (lambda: M.LogSoftmax(), lambda: T.LogSoftmax(-1)),
    (M.Softmin, lambda: T.Softmin(-1)),
    (M.PReLU, T.PReLU),
    (lambda: M.LeakyReLU(0.01), lambda: T.LeakyReLU(0.01)),
    (lambda: M.Identity(), lambda: T.Identity()),
]

FUNCTIONS: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [
    (mx.abs, torch.abs),
    (lambda x: mx.sign(x) * mx.square(x), lambda x: x.sign() * x.square()),
    (lambda x: mx.where(x > 0, x, 0.25 * x), lambda x: torch.where(x > 0, x, 0.25 * x)),
    (lambda x: mx.where(x < -1, mx.zeros_like(x), x), lambda x: x.masked_fill(x < -1, 0.0)),
    (lambda x: mx.minimum(mx.maximum(x, -1.5), 1.5), lambda x: x.clamp(-1.5, 1.5)),
    (lambda x: x / (1 + mx.abs(x)), lambda x: x / (1 + x.abs())),
    (lambda x: mx.log1p(mx.square(x)), lambda x: x.square().log1p()),
    (lambda x: mx.sqrt(mx.square(x) + 1.0), lambda x: (x * x + 1).sqrt()),
    (lambda x: mx.arctan(x), torch.atan),
    (lambda x: mx.exp(-mx.square(x)), lambda x: (-x.pow(2)).exp()),
    (lambda x: mx.sin(x) * mx.cos(x), lambda x: x.sin() * x.cos()),
    (lambda x: x - mx.floor(x), lambda x: x - x.floor()),
    (lambda x: mx.power(mx.abs(x) + 0.5, 1.5), lambda x: (x.abs() + 0.5) ** 1.5),
    (lambda x: x * mx.stop_gradient(mx.sigmoid(x)), lambda x: x * x.sigmoid().detach()),
    (mx.erf, torch.erf),
]

OVER_TIME: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [
    (lambda x: mx.cumsum(x, axis=1), lambda x: x.cumsum(1)),
    (lambda x: mx.cummax(x, axis=1), lambda x: x.cummax(1).values),
    (lambda x: mx.sort(x, axis=1), lambda x: x.sort(1).values),
    (lambda x: x - x.max(axis=1, keepdims=True), lambda x: x - x.amax(1, keepdim=True)),
    (lambda x: x - mx.logsumexp(x, axis=1, keepdims=True), lambda x: x - x.logsumexp(1, keepdim=True)),
    (lambda x: mx.roll(x, 1, axis=1), lambda x: x.roll(1, 1)),
    (lambda x: x[:, ::-1], lambda x: x.flip(1)),
    (lambda x: mx.softmax(x, axis=1) * x, lambda x: x.softmax(1) * x),
    (
        lambda x: x / mx.sqrt(mx.square(x).sum(axis=1, keepdims=True) + 1e-3),
        lambda x: x / (x.square().sum(1, keepdim=True) + 1e-3).sqrt(),
    ),
    (
        lambda x: mx.concatenate([mx.zeros_like(x[:, :1]), x[:, :-1]], axis=1) + x,
        lambda x: F.pad(x[:, :-1], (0, 0, 1, 0)) + x,
    ),
    (
        lambda x: mx.einsum("btd,bsd->bts", x, x) @ x / x.shape[1],
        lambda x: torch.einsum("btd,bsd->bts", x, x) @ x / x.shape[1],
    ),
    (
        lambda x: mx.take_along_axis(x, mx.stop_gradient(mx.argsort(x[..., :1], axis=1)), axis=1),
        lambda x: torch.take_along_dim(x, x[..., :1].argsort(dim=1, stable=True), dim=1),
    ),
]


# ---- blocks of sequences [B, T, D] --------------------------------------------------------------------------


def activation(draw: Draw, width: int) -> Pair:
    """A rare activation between two linear layers; one in two is called as a function."""
    if draw.random() < 0.5:
        ours, theirs = draw.choice(ACTIVATIONS)
        layers = {"act": Pair(ours(), theirs())}
    else:
        mine, other = draw.choice(FUNCTIONS)
        layers = {"act": net(lambda m, x: mine(x), lambda m, x: other(x))}
    inner = draw.choice([1, width, 2 * width])

    def call(m: Any, x: Any) -> Any:
        return x + m.down(m.act(m.up(x)))

    return net(call, call, up=linear(width, inner), down=linear(inner, width), **layers)


def bare(draw: Draw, width: int) -> Pair:
    """A function of the values as they are, which may be on its edges."""
    ours, theirs = draw.choice(FUNCTIONS)
    return net(lambda m, x: ours(x) * m.scale, lambda m, x: theirs(x) * m.scale, ("scale", width))


def over_time(draw: Draw, width: int) -> Pair:
    ours, theirs = draw.choice(OVER_TIME)
    return net(lambda m, x: m.fc(ours(x)).astype(x.dtype), lambda m, x: m.fc(theirs(x)), fc=linear(width, width))


def twice(draw: Draw, width: int) -> Pair:
    """A module that is called twice, with a dropout that is."""
    rate = draw.choice([0.0, 0.2])

    def call(m: Any, x: Any) -> Any:
        return m.drop(m.fc(m.norm(x))) - m.fc(m.drop(x))

    return net(
        call,
        call,
        fc=linear(width, width, draw.random() < 0.5),
        norm=written.norm(draw, width),
        drop=Pair(M.Dropout(rate), T.Dropout(rate)),
    )


def divided(draw: Draw, width: int) -> Pair:
    """A recurrent layer of PyTorch of two directions or layers, and its parts in MLX."""
    kind, size = draw.choice(["LSTM", "GRU", "RNN"]), draw.choice([1, 3, width])
    both = draw.random() < 0.5
    theirs = getattr(T, kind)(width, size, num_layers=1 if both else 2, bidirectional=both, batch_first=True)
    ours = [getattr(M, kind)(width, size), getattr(M, kind)(width if both else size, size)]

    def run(layer: Any, x: Any) -> Any:
        y = layer(x)
        return y[0] if kind == "LSTM" else y

    def mlx_call(m: Any, x: Any) -> Any:
        if both:
            parts = [run(m.rnn[0], x), run(m.rnn[1], x[:, ::-1])[:, ::-1]]
            return m.out(mx.concatenate(parts, axis=-1))
        return m.out(run(m.rnn[1], run(m.rnn[0], x)))

    return net(
        mlx_call, lambda m, x: m.out(m.rnn(x)[0]), rnn=Pair(ours, theirs), out=linear(size * (1 + both), width)
    )


def native_transformer(draw: Draw, width: int) -> Pair:
    """The layers of the frameworks."""
    heads, first = draw.choice([h for h in (1, 2, 4) if width % h == 0]), draw.random() < 0.5
    return net(
        lambda m, x: m.layer(x, None),
        lambda m, x: m.layer(x),
        layer=Pair(
            M.TransformerEncoderLayer(width, heads, 2 * width, norm_first=first),
            T.TransformerEncoderLayer(width, heads, 2 * width, 0.0, batch_first=True, norm_first=first),
        ),
    )


def signal(draw: Draw, width: int) -> Pair:
    """Convolutions and poolings over time, of the same length."""
    kind = draw.randrange(4)
    if kind == 0:  # shorter and longer
        kernel, stride = draw.choice([(2, 2), (3, 2), (4, 2), (3, 3)])

        def mlx_call(m: Any, x: Any) -> Any:
            y = m.up(M.gelu(m.down(mx.pad(x, [(0, 0), (0, kernel), (0, 0)]))))
            return x + y[:, : x.shape[1]]

        def torch_call(m: Any, x: Any) -> Any:
            y = m.up(F.gelu(m.down(F.pad(x.transpose(1, 2), (0, kernel)))))
            return x + y.transpose(1, 2)[:, : x.shape[1]]

        options = {"stride": stride}
        return net(
            mlx_call,
            torch_call,
            down=Pair(M.Conv1d(width, width, kernel, **options), T.Conv1d(width, width, kernel, **options)),
            up=Pair(
                M.ConvTranspose1d(width, width, kernel + 2, **options),
                T.ConvTranspose1d(width, width, kernel + 2, **options),
            ),
        )
    if kind == 1:
        layer = draw.choice(
            [
                Pair(M.MaxPool1d(3, stride=1, padding=1), T.MaxPool1d(3, stride=1, padding=1)),
                Pair(M.AvgPool1d(3, stride=1, padding=1), T.AvgPool1d(3, stride=1, padding=1)),
            ]
        )
    elif kind == 2:
        groups = draw.choice([g for g in (1, 2, width) if width % g == 0])
        options = {"padding": 2, "dilation": 2, "groups": groups}
        layer = Pair(M.Conv1d(width, width, 3, **options), T.Conv1d(width, width, 3, **options))
    else:  # over the rows of a batch and all times, of which PyTorch requires two
        layer = Pair(M.BatchNorm(width), T.BatchNorm1d(width)) if draw.dtype == "fp32" else written.norm_free()
    doubles = kind == 3
    return net(
        lambda m, x: m.fc(m.layer(mx.concatenate([x, 1 - x], axis=1) if doubles else x)[:, : x.shape[1]]),
        lambda m, x: m.fc(
            m.layer((torch.cat([x, 1 - x], 1) if doubles else x).transpose(1, 2)).transpose(1, 2)[:, : x.shape[1]]
        ),
        layer=layer,
        fc=linear(width, width),
    )


BLOCKS = (activation, bare, over_time, twice, divided, native_transformer, signal)


def sequence(draw: Draw, width: int, count: int) -> Pair:
    """Returns blocks that are called one after the other, also those of `written_pairs`."""
    kinds = [draw.choice(written.BLOCKS if draw.random() < 0.2 else BLOCKS) for _ in range(count)]

    def call(m: Any, x: Any) -> Any:
        for layer in m.layers:
            x = layer(x)
        return x

    return net(call, call, layers=[kind(draw, width) for kind in kinds])


# ---- models -------------------------------------------------------------------------------------------------


def values(draw: Draw, *shape: int) -> np.ndarray:
    """Returns numbers; one in three arrays is of halves, which are on the edges of functions."""
    found = numbers(draw, *shape, large=8.0)
    return np.round(2 * found).astype(np.float32) / 2 if draw.random() < 0.33 else found


def small(draw: Draw) -> Made:
    """Sizes of 1, or a wide layer; several outputs."""
    width = draw.choice([1, 1, 2, 4, 12, 320])
    form = draw.randrange(4)

    def ends(m: Any, x: Any, argmax: Callable[[Any], Any], total: Callable[[Any], Any]) -> Any:
        y = m.head(m.body(m.enter(x)))
        if form == 0:
            return y
        if form == 1:
            return {"scores": y, "best": argmax(y), "sum": total(y)}
        return (y, [m.other(y), None]) if form == 2 else (total(y), y > 0, 1.5)

    pair = net(
        lambda m, x: ends(m, x, lambda y: mx.argmax(y, axis=-1), lambda y: y.astype(mx.float32).sum()),
        lambda m, x: ends(m, x, lambda y: y.argmax(-1), lambda y: y.to(torch.float32).sum()),
        enter=linear(3, width),
        body=sequence(draw, width, draw.randint(1, 2 if width > 99 else 4)),
        head=linear(width, 4),
        **({"other": linear(4, 1)} if form == 2 else {}),
    )
    return pair, values(draw, draw.choice([1, 1, 2, 5]), draw.choice([1, 1, 2, 7]), 3)


def maps(draw: Draw) -> Made:
    """Images: batch norms of few values, transposed and dilated convolutions, 1x1 maps."""
    width, side, batch = draw.choice([1, 2, 6]), draw.choice([1, 2, 7, 8]), draw.choice([1, 2, 5])
    groups = draw.choice([g for g in (1, 2) if width % g == 0])
    ours, theirs = draw.choice(ACTIVATIONS[:8])
    is_normal = batch * side * side > 4 and draw.dtype == "fp32" and draw.random() < 0.6
    norm = Pair(M.BatchNorm(width), T.BatchNorm2d(width)) if is_normal else written.norm_free()
    if not is_normal and side > 1 and draw.random() < 0.5:
        norm = Pair(M.InstanceNorm(width, affine=True), T.InstanceNorm2d(width, affine=True))
    up = {"stride": 2, "padding": 1, "output_padding": 1}
    inner = {"padding": 2, "dilation": 2, "groups": groups}

    def call(m: Any, x: Any) -> Any:
        return m.head(m.act(m.norm(m.inner(m.up(m.enter(x))))))

    pair = net(
        call,
        call,
        enter=written.convolution(3, width, 1),
        up=Pair(M.ConvTranspose2d(width, width, 3, **up), T.ConvTranspose2d(width, width, 3, **up)),
        inner=written.convolution(width, width, 3, **inner),
        norm=norm,
        act=Pair(ours(), theirs()),
        head=written.convolution(width, 2, 1, stride=draw.choice([1, 2])),
    )
    return pair, values(draw, batch, side, side, 3)


def volumes(draw: Draw) -> Made:
    """Convolutions of three axes."""
    width, options = draw.choice([1, 3]), {"stride": draw.choice([1, 2]), "padding": 1}

    def call(m: Any, x: Any) -> Any:
        return m.head(m.norm(m.enter(x)))

    pair = net(
        call,
        call,
        enter=Pair(M.Conv3d(2, width, 3, **options), T.Conv3d(2, width, 3, **options)),
        norm=Pair(M.GroupNorm(1, width, pytorch_compatible=True), T.GroupNorm(1, width)),
        head=Pair(M.ConvTranspose3d(width, 2, 2, stride=2), T.ConvTranspose3d(width, 2, 2, stride=2)),
    )
    return pair, values(draw, draw.choice([1, 2]), 4, 6, 5, 2)


def losses(draw: Draw) -> Made:
    """Tokens, their labels, some of which count not, and the loss within the model."""
    width, classes = draw.choice([1, 4, 16]), draw.choice([2, 9])

    def mlx_call(m: Any, ids: Any, labels: Any) -> Any:
        logits = m.head(m.body(m.tokens(ids))).astype(mx.float32)
        counts = (labels >= 0).astype(mx.float32)
        each = M.losses.cross_entropy(logits, mx.maximum(labels, 0)) * counts
        return {"loss": each.sum() / mx.maximum(counts.sum(), 1), "logits": logits}

    def torch_call(m: Any, ids: Any, labels: Any) -> Any:
        logits = m.head(m.body(m.tokens(ids))).float()
        counts = (labels >= 0).float()
        each = F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0).long(), reduction="none") * counts
        return {"logits": logits, "loss": each.sum() / counts.sum().clamp(min=1)}

    pair = net(
        mlx_call,
        torch_call,
        tokens=Pair(M.Embedding(11, width), T.Embedding(11, width)),
        body=sequence(draw, width, draw.randint(1, 2)),
        head=linear(width, classes),
    )
    shape = draw.choice([(1, 1), (2, 5), (3, 12)])
    return pair, {"ids": ids(draw, 11, *shape), "labels": ids(draw, classes + 1, *shape) - 1}


MODELS = (small, small, maps, losses, small, volumes)
WITH_IMAGES = (maps, volumes)


def make(seed: int) -> tuple[Any, Any, Any, str]:
    """Returns a random pair of other weights, its inputs, and a dtype.

    One in four is in evaluation mode, and of one in four the last layer is frozen.
    """
    draw = Draw(seed)
    torch.manual_seed(seed)
    kind = MODELS[seed % len(MODELS)]
    pair, inputs = kind(draw)
    randomized(pair.theirs, seed)
    gain = draw.choice([0.05, 1.0, 1.0, 2.0])
    with torch.no_grad():
        for parameter in pair.theirs.parameters():
            if parameter.ndim > 1 and draw.random() < 0.4:
                parameter *= gain
    if draw.random() < 0.25:
        pair.ours.eval()
        pair.theirs.eval()
    if draw.random() < 0.25 and hasattr(pair.ours, "head"):
        pair.ours.head.freeze()
        pair.theirs.head.requires_grad_(False)
    return pair.ours, pair.theirs, inputs, draw.dtype


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    first = options.seed * 10000
    seeds = [options.only] if options.only is not None else range(first, first + options.count)
    alarms = 0
    for seed in seeds:
        ours, theirs, given, dtype = make(seed)
        report = compare(ours, theirs, given, dtype=dtype, copy_weights=True)
        if not report.passed or options.only is not None:
            alarms += not report.passed
            print(f"{seed} {dtype}: {report if options.only is not None else report.verdict}", flush=True)
    print(f"{len(seeds)} models, {alarms} false alarms")
    return int(alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
