"""Measures the time of comparisons in processor time: `python parity_tests/parity/timing.py --help`.

It prints the table of docs/parity.md. A pass is the forward and backward pass of both modules. Each model has its own
process, in which passes and comparisons take turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import icenet.blas

import mlx.core as mx
import mlx.nn as M
import numpy as np
import torch
import torch.nn as T
import torch.nn.functional as F

import icenet
from icenet.parity import compare


class Framework(NamedTuple):
    """What the models take from a framework.

    Attributes:
        nn: Its layers.
        ops: Its functions.
        act: Its activations.
        modules: Makes a list of modules.
        channels, axes: The axis of the channels, and those of the pixels.
        attention: Of queries, keys and values, causal or not.
    """

    nn: Any
    ops: Any
    act: Any
    modules: Callable[[list[Any]], Any]
    channels: int
    axes: tuple[int, int]
    attention: Callable[[Any, Any, Any, bool], Any]


def _attention(q: mx.array, k: mx.array, v: mx.array, causal: bool) -> mx.array:
    mask = "causal" if causal else None
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


MLX = Framework(M, mx, M, list, -1, (1, 2), _attention)
TORCH = Framework(
    T,
    torch,
    F,
    T.ModuleList,
    1,
    (2, 3),
    lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
)


def bases(f: Framework) -> type:
    """Returns the class of the modules, whose calls are their method `forward` in both frameworks."""
    if f is TORCH:
        return T.Module

    class Base(M.Module):
        def __call__(self, *args: Any) -> Any:
            return self.forward(*args)

    return Base


# ---- models -------------------------------------------------------------------------------------------------


def resnet(f: Framework, width: int, is_bottleneck: bool = False) -> Any:
    base: Any = bases(f)
    relu, norm = f.act.relu, f.nn.BatchNorm if f is MLX else f.nn.BatchNorm2d

    def conv(i: int, o: int, size: int, stride: int = 1) -> Any:
        return f.nn.Conv2d(i, o, size, stride=stride, padding=size // 2, bias=False)

    class Block(base):
        def __init__(self, i: int, inner: int, o: int, stride: int) -> None:
            super().__init__()
            sizes = [(i, inner, 1), (inner, inner, 3), (inner, o, 1)] if is_bottleneck else [(i, o, 3), (o, o, 3)]
            strided = 1 if is_bottleneck else 0
            self.convs = f.modules([conv(*size, stride if n == strided else 1) for n, size in enumerate(sizes)])
            self.norms = f.modules([norm(size[1]) for size in sizes])
            self.short = f.nn.Sequential(conv(i, o, 1, stride), norm(o)) if stride > 1 or i != o else None

        def forward(self, x: Any) -> Any:
            y = x
            for n, (layer, normalize) in enumerate(zip(self.convs, self.norms, strict=True)):
                y = normalize(layer(relu(y) if n else y))
            return relu(y + (self.short(x) if self.short is not None else x))

    class ResNet(base):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.pool = conv(3, width, 7, 2), norm(width), f.nn.MaxPool2d(3, 2, 1)
            blocks, i = [], width
            for level in range(4):
                for n in range(2):
                    inner = width * 2**level
                    o = 4 * inner if is_bottleneck else inner
                    blocks.append(Block(i, inner, o, 2 if level and not n else 1))
                    i = o
            self.blocks, self.head = f.modules(blocks), f.nn.Linear(i, 10)

        def forward(self, x: Any) -> Any:
            x = self.pool(relu(self.norm(self.stem(x))))
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(f.axes))

    return ResNet()


def unet(f: Framework, width: int) -> Any:
    base: Any = bases(f)

    def norm(o: int) -> Any:
        return f.nn.GroupNorm(8, o, pytorch_compatible=True) if f is MLX else f.nn.GroupNorm(8, o)

    class Convs(base):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.conv1, self.norm1 = f.nn.Conv2d(i, o, 3, padding=1), norm(o)
            self.conv2, self.norm2 = f.nn.Conv2d(o, o, 3, padding=1), norm(o)

        def forward(self, x: Any) -> Any:
            return f.act.silu(self.norm2(self.conv2(f.act.silu(self.norm1(self.conv1(x))))))

    class UNet(base):
        def __init__(self) -> None:
            super().__init__()
            self.down1, self.down2, self.down3 = Convs(3, width), Convs(width, 2 * width), Convs(2 * width, 4 * width)
            self.up2 = f.nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
            self.up1 = f.nn.ConvTranspose2d(2 * width, width, 2, stride=2)
            self.join2, self.join1 = Convs(4 * width, 2 * width), Convs(2 * width, width)
            self.pool, self.out = f.nn.MaxPool2d(2, 2), f.nn.Conv2d(width, 3, 1)

        def forward(self, x: Any) -> Any:
            one = self.down1(x)
            two = self.down2(self.pool(one))
            y = self.up2(self.down3(self.pool(two)))
            y = self.up1(self.join2(f.ops.concatenate([y, two], f.channels)))
            return self.out(self.join1(f.ops.concatenate([y, one], f.channels)))

    return UNet()


def transformer(f: Framework, width: int, blocks: int, outputs: int, patch: int = 0) -> Any:
    base: Any = bases(f)

    class Block(base):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = f.nn.LayerNorm(width), f.nn.LayerNorm(width)
            self.qkv, self.out = f.nn.Linear(width, 3 * width), f.nn.Linear(width, width)
            self.up, self.down = f.nn.Linear(width, 4 * width), f.nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            y = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, 8, -1)
            q, k, v = (y[:, :, n].swapaxes(1, 2) for n in range(3))
            x = x + self.out(f.attention(q, k, v, not patch).swapaxes(1, 2).reshape(*x.shape))
            return x + self.down(f.act.gelu(self.up(self.norm2(x))))

    class Transformer(base):
        def __init__(self) -> None:
            super().__init__()
            conv = f.nn.Conv2d(3, width, patch, stride=patch) if patch else None
            self.embed = f.nn.Embedding(outputs, width) if conv is None else conv
            self.blocks = f.modules([Block() for _ in range(blocks)])
            self.norm, self.head = f.nn.LayerNorm(width), f.nn.Linear(width, outputs)

        def forward(self, x: Any) -> Any:
            x = self.embed(x)
            if patch:
                x = x.flatten(1, 2) if f is MLX else x.flatten(2).swapaxes(1, 2)
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
            return self.head(x.mean(1) if patch else x)

    return Transformer()


def lstm(f: Framework, width: int, vocabulary: int) -> Any:
    base: Any = bases(f)
    options = {} if f is MLX else {"batch_first": True}

    class Tagger(base):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = f.nn.Embedding(vocabulary, width), f.nn.Linear(width, vocabulary)
            self.layers = f.modules([f.nn.LSTM(width, width, **options) for _ in range(2)])

        def forward(self, ids: Any) -> Any:
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x)[0]
            return self.head(x)

    return Tagger()


def scan(f: Framework, width: int, states: int, vocabulary: int) -> Any:
    base: Any = bases(f)

    class Block(base):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.value, self.gate = f.nn.LayerNorm(width), linear(width), linear(width)
            self.step, self.write, self.read = linear(width), linear(states), linear(states)
            self.out = linear(width)

        def forward(self, x: Any) -> Any:
            y = self.norm(x)
            value, keep, write, read = self.value(y), f.ops.sigmoid(self.step(y)), self.write(y), self.read(y)
            state, found = 0.0, []
            for t in range(x.shape[1]):
                state = keep[:, t, :, None] * state + value[:, t, :, None] * write[:, t, None]
                found.append((state * read[:, t, None]).sum(-1))
            return x + self.out(f.ops.stack(found, 1) * f.act.silu(self.gate(y)))

    def linear(o: int) -> Any:
        return f.nn.Linear(width, o)

    class Scan(base):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = f.nn.Embedding(vocabulary, width), f.nn.Linear(width, vocabulary)
            self.blocks = f.modules([Block() for _ in range(3)])

        def forward(self, ids: Any) -> Any:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    return Scan()


def images(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, side, side, 3)).astype(np.float32)


def tokens(rows: int, length: int, below: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, below, (rows, length)).astype(np.int32)


MODELS: dict[str, tuple[Callable[[Framework], Any], np.ndarray, str]] = {
    "long": (lambda f: transformer(f, 192, 3, 512), tokens(1, 2048, 512), "transformer, 2,048 tokens"),
    "unet": (lambda f: unet(f, 32), images(2, 64), "U-Net, 2 images of 64x64"),
    "lstm": (lambda f: lstm(f, 720, 1024), tokens(8, 64, 1024), "LSTM, 512 tokens"),
    "scan": (lambda f: scan(f, 320, 16, 512), tokens(4, 64, 512), "selective scan, 256 tokens"),
    "vit": (lambda f: transformer(f, 256, 6, 100, 8), images(8, 64), "vision transformer, 8 images of 64x64"),
    "60M": (lambda f: transformer(f, 640, 12, 1024), tokens(4, 64, 1024), "transformer, 256 tokens"),
    "resnet-128": (lambda f: resnet(f, 64), images(8, 128), "residual network, 8 images of 128x128"),
    "bottleneck": (lambda f: resnet(f, 32, True), images(2, 128), "bottleneck residual network, 2 images of 128x128"),
    "resnet-64": (lambda f: resnet(f, 64), images(4, 64), "residual network, 4 images of 64x64"),
}


# ---- measurement --------------------------------------------------------------------------------------------


def one_pass(ours: Any, theirs: Any, x: np.ndarray) -> float:
    """Returns the processor time of a forward and backward pass of both modules."""
    is_image = x.ndim == 4
    given = torch.from_numpy(np.moveaxis(x, -1, 1).copy() if is_image else x.astype(np.int64))
    start = time.process_time()
    mx.eval(M.value_and_grad(ours, lambda: mx.square(ours(mx.array(x))).mean())())
    theirs.zero_grad()
    theirs(given).square().mean().backward()
    return time.process_time() - start


def measure(name: str, count: int) -> str:
    """Returns the row of a model in the table."""
    torch.manual_seed(0)
    make, x, title = MODELS[name]
    theirs = make(TORCH)
    ours = icenet.from_torch(theirs, make(MLX))
    ours.train()
    one_pass(ours, theirs, x)
    icenet.from_torch(theirs, ours)  # the passes change the running statistics
    reports, passes, times = [compare(ours, theirs, x)], list[float](), list[float]()
    for _ in range(count):
        passes += [one_pass(ours, theirs, x) for _ in range(3)]
        icenet.from_torch(theirs, ours)
        start = time.process_time()
        reports.append(compare(ours, theirs, x))
        times.append(time.process_time() - start)
    failed = [str(report).splitlines()[0] for report in reports if not report.passed]
    size = sum(p.numel() for p in theirs.parameters()) / 1e6
    unit = statistics.median(passes)
    label = title.replace(", ", f", {size:.0f}M parameters, " if size >= 2 else f", {size:.1f}M parameters, ", 1)
    return f"| {label} | {unit:.1f} s | {statistics.median(times) / unit:.1f} |" + "".join(failed)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], help=f"some of {', '.join(MODELS)}; default: all")
    parser.add_argument("--count", type=int, default=3, help="comparisons of a model that are measured")
    options = parser.parse_args(given)
    if len(options.models) == 1:
        print(measure(options.models[0], options.count), flush=True)
        return
    for name in options.models or MODELS:
        subprocess.run([sys.executable, __file__, name, "--count", str(options.count)], check=True)


if __name__ == "__main__":
    main()
