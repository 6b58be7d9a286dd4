"""Random correct pairs of plain layers of MLX and PyTorch, for the search of false alarms.

    python parity_tests/parity/random_pairs.py --seed 7 --count 200

Prints each false alarm, and the number of models.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import with_equal_weights

from icenet.parity import compare


class Residual(M.Module):
    def __init__(self, *layers: M.Module) -> None:
        super().__init__()
        self.inner = M.Sequential(*layers)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.inner(x)


class TorchResidual(T.Module):
    def __init__(self, *layers: T.Module) -> None:
        super().__init__()
        self.inner = T.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class SelfAttention(M.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = M.Linear(width, 3 * width), M.Linear(width, width)
        self.heads, self.causal = heads, causal

    def __call__(self, x: mx.array) -> mx.array:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        mask = "causal" if self.causal else None
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=(d // self.heads) ** -0.5, mask=mask)
        return self.out(y.transpose(0, 2, 1, 3).reshape(b, n, d))


class TorchSelfAttention(T.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = T.Linear(width, 3 * width), T.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, n, d))


ACTIVATIONS = [
    (M.ReLU, T.ReLU),
    (M.GELU, T.GELU),
    (M.SiLU, T.SiLU),
    (M.Tanh, T.Tanh),
    (M.Sigmoid, T.Sigmoid),
    (M.ELU, T.ELU),
    (M.Softplus, T.Softplus),
    (M.Mish, T.Mish),
    (lambda: M.LeakyReLU(0.1), lambda: T.LeakyReLU(0.1)),
    (lambda: M.GELU("tanh"), lambda: T.GELU("tanh")),
]


def tokens_pair(draw: random.Random) -> tuple[Any, Any, Any]:
    width = draw.choice([8, 16, 24, 64])
    ours: list[M.Module] = []
    theirs: list[T.Module] = []
    is_text = draw.random() < 0.5
    if is_text:
        ours.append(M.Embedding(37, width))
        theirs.append(T.Embedding(37, width))
    for _ in range(draw.randint(1, 4)):
        act = draw.choice(ACTIVATIONS)
        norm = draw.choice([(M.LayerNorm, T.LayerNorm), (M.RMSNorm, lambda w: T.RMSNorm(w, eps=1e-5))])
        inner = draw.choice([width, 4 * width])
        kind = draw.randrange(3)
        if kind == 0:
            ours.append(Residual(norm[0](width), M.Linear(width, inner), act[0](), M.Linear(inner, width)))
            theirs.append(TorchResidual(norm[1](width), T.Linear(width, inner), act[1](), T.Linear(inner, width)))
        elif kind == 1:
            heads, causal = draw.choice([1, 2, 4]), draw.random() < 0.5
            ours.append(Residual(norm[0](width), SelfAttention(width, heads, causal), M.Dropout(0.1)))
            theirs.append(TorchResidual(norm[1](width), TorchSelfAttention(width, heads, causal), T.Dropout(0.1)))
        else:
            ours += [M.Linear(width, width), act[0](), norm[0](width)]
            theirs += [T.Linear(width, width), act[1](), norm[1](width)]
    ours.append(M.Linear(width, 5))
    theirs.append(T.Linear(width, 5))
    shape = (draw.randint(1, 4), draw.randint(1, 40))
    generator = np.random.default_rng(draw.randrange(1 << 30))
    x = generator.integers(0, 37, shape).astype(np.int32)
    scale = draw.choice([0.01, 1.0, 10.0])
    floats = (scale * generator.standard_normal((*shape, width))).astype(np.float32)
    return M.Sequential(*ours), T.Sequential(*theirs), x if is_text else floats


def images_pair(draw: random.Random) -> tuple[Any, Any, Any]:
    width, channels = draw.choice([4, 8, 16]), draw.choice([1, 3])
    ours: list[M.Module] = [M.Conv2d(channels, width, 3, padding=1)]
    theirs: list[T.Module] = [T.Conv2d(channels, width, 3, padding=1)]
    side = draw.choice([8, 12, 16])
    for _ in range(draw.randint(1, 3)):
        act = draw.choice(ACTIVATIONS)
        norm = draw.choice(
            [
                (M.BatchNorm, T.BatchNorm2d),
                (lambda w: M.GroupNorm(2, w, pytorch_compatible=True), lambda w: T.GroupNorm(2, w)),
            ]
        )
        kind = draw.randrange(3)
        if kind == 0:
            conv = M.Conv2d(width, width, 3, padding=1), T.Conv2d(width, width, 3, padding=1)
            ours.append(Residual(conv[0], norm[0](width), act[0]()))
            theirs.append(TorchResidual(conv[1], norm[1](width), act[1]()))
        elif kind == 1:
            ours += [norm[0](width), act[0](), M.Conv2d(width, width, 3, padding=1, groups=width)]
            theirs += [norm[1](width), act[1](), T.Conv2d(width, width, 3, padding=1, groups=width)]
        else:
            pool = draw.choice([(M.MaxPool2d, T.MaxPool2d), (M.AvgPool2d, T.AvgPool2d)])
            if side >= 4:
                side //= 2
                ours += [act[0](), pool[0](2)]
                theirs += [act[1](), pool[1](2)]
    shape = (draw.randint(2, 6), *2 * (draw.choice([16, 24]),), channels)
    scale = draw.choice([0.05, 1.0, 8.0])
    x = np.random.default_rng(draw.randrange(1 << 30)).standard_normal(shape).astype(np.float32) * np.float32(scale)
    return M.Sequential(*ours), T.Sequential(*theirs), x


def _overflows(ours: M.Module) -> bool:
    """Returns whether a layer of MLX gives infinity or NaN for large values or in fp16 where PyTorch does not."""
    return any(isinstance(m, M.BatchNorm) or type(m).__name__ in ("Mish", "ELU") for m in ours.modules())


def make(seed: int) -> tuple[Any, Any, Any, str]:
    """Returns a random pair, its input, and a dtype."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    ours, theirs, x = draw.choice([tokens_pair, images_pair])(draw)
    ours, theirs = with_equal_weights(ours, theirs, seed)
    with torch.no_grad():
        size = draw.choice([0.1, 1.0, 1.0, 1.0 if _overflows(ours) else 3.0])
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter *= size
    from icenet.core.models.modules import copy_weights

    copy_weights(theirs, ours)
    dtype = draw.choice(["fp32", "fp32", "bf16", "fp16"])
    is_large = size > 1 or np.abs(x).max() > 4
    return ours, theirs, x, "bf16" if dtype == "fp16" and (is_large or _overflows(ours)) else dtype


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--only", type=int)
    parser.add_argument("--dtype")
    options = parser.parse_args()
    alarms = 0
    seeds = (
        [options.only]
        if options.only is not None
        else range(options.seed * 10000, options.seed * 10000 + options.count)
    )
    for seed in seeds:
        ours, theirs, x, dtype = make(seed)
        report = compare(ours, theirs, x, dtype=options.dtype or dtype)
        if not report.passed:
            alarms += 1
            print(f"{seed} {options.dtype or dtype}: {report.verdict}", flush=True)
        if options.only is not None:
            print(report)
    print(f"{len(seeds)} models, {alarms} false alarms")


if __name__ == "__main__":
    main()
