"""Causes in designs other than transformers and convolutional networks, such as vocoders, graphs and encodings."""

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


def between(ours: Function, theirs: Function, outputs: int = 8) -> Pair:
    """Returns two linear layers with a function between them."""
    return net(
        lambda m, x: m.out(ours(m.inner(x))),
        lambda m, x: m.out(theirs(m.inner(x))),
        inner=linear(5, 8),
        out=linear(outputs, 3),
    )


def interleaved(x: Any) -> Any:
    return mx.stack([mx.sin(x), mx.cos(x)], -1).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    ("ours", "theirs", "outputs", "words"),
    [
        (mx.cos, torch.sin, 8, "cosine in a, sine in b"),
        (lambda x: x, torch.sin, 8, "no sine in a"),
        (mx.sin, F.relu, 8, "sine in a, ReLU in b"),
        (
            lambda x: M.leaky_relu(x, 0.01),
            lambda x: F.leaky_relu(x, 0.2),
            8,
            "leaky ReLU with slope 0.01 in a, leaky ReLU with slope 0.2 in b",
        ),
        (interleaved, lambda x: torch.cat([x.sin(), x.cos()], -1), 16, "interleaved element by element in a (stack)"),
        (
            lambda x: mx.concatenate([mx.sin(x), mx.cos(x)], -1),
            lambda x: torch.stack([x.sin(), x.cos()], -1).flatten(-2),
            16,
            "parts are one after the other in a (cat)",
        ),
        (
            lambda x: x - x.mean(axis=0, keepdims=True),
            lambda x: x - x.mean(dim=1, keepdim=True),
            8,
            "the mean over the axis 0 in a, over another one in b",
        ),
        (
            lambda x: x / mx.sqrt((x * x).sum(-1, keepdims=True) + 1e-8),
            lambda x: x / (x * x).sum(-1, keepdim=True),
            8,
            "the root of a sum, as of a distance, in a",
        ),
        (
            lambda x: mx.log(mx.maximum(mx.abs(x), 1e-2)),
            lambda x: torch.log(x.abs().clamp(min=0.3)),
            8,
            "a bound is 0.01 in a, 0.3 in b",
        ),
        (
            lambda x: x * mx.arange(8).astype(mx.float32),
            lambda x: x * torch.arange(2, 10),
            8,
            "positions (arange) begin at 0 in a, at another number in b",
        ),
    ],
)
def test_functions(ours: Function, theirs: Function, outputs: int, words: str) -> None:
    line = verdict(between(ours, theirs, outputs), draw(6, 5))
    assert words in line and "between inner and out" in line, line


def test_a_change_that_overflows_explains_nothing() -> None:
    """Values that fp32 does not hold are not compared, so the exponents of the other sign seemed to agree."""
    pair = between(lambda x: mx.exp(-40 * mx.abs(x)), lambda x: 2 * torch.exp(-40 * x.abs()))
    line = verdict(pair, draw(6, 5))
    assert "it is multiplied by 0.5 in a" in line or "a scale is 1 in a, 2 in b" in line, line
    pair = between(
        lambda x: mx.exp(-50 * x * x) * (1 + 0.1 * mx.sin(7 * x)),
        lambda x: torch.exp(-0.5 * (10 * x) ** 2),  # of 0.5 * (10 * x) ** 2 most overflow
    )
    assert "cause:" not in verdict(pair, draw(6, 5))


def test_images_that_are_flattened_within_a_concatenation() -> None:
    def ours(m: Any, x: Any) -> Any:
        y = m.conv(x)
        return m.out(mx.concatenate([y.reshape(len(y), -1), y.mean((1, 2))], axis=1))

    def theirs(m: Any, x: Any) -> Any:
        y = m.conv(x)
        return m.out(torch.cat([y.flatten(1), y.mean((2, 3))], 1))

    pair = net(ours, theirs, conv=Pair(M.Conv2d(3, 4, 3), T.Conv2d(3, 4, 3)), out=linear(4 * 9 + 4, 2))
    assert "flattened channels last" in verdict(pair, draw(2, 5, 5, 3))


def test_channels_of_a_pixel_shuffle() -> None:
    def ours(m: Any, x: Any) -> Any:
        y = m.conv(x)
        b, h, w, _ = y.shape
        return y.reshape(b, h, w, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, -1)

    pair = net(ours, lambda m, x: F.pixel_shuffle(m.conv(x), 2), conv=Pair(M.Conv2d(3, 12, 1), T.Conv2d(3, 12, 1)))
    assert "the channels of pixel_shuffle are [r, r, C] in a" in verdict(pair, draw(2, 4, 5, 3))


class Encoding(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freqs", math.pi * 2.0 ** torch.arange(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x[..., None] * self.freqs).flatten(-2)


def test_a_table_that_is_multiplied_by_a_number() -> None:
    def frequencies(m: Any, x: Any) -> Any:
        return mx.sin(x[..., None] * 2.0 ** mx.arange(4)).reshape(len(x), -1)

    encode = Pair(net(frequencies, frequencies).ours, Encoding())
    pair = net(lambda m, x: m.out(m.encode(x)), lambda m, x: m.out(m.encode(x)), encode=encode, out=linear(12, 2))
    line = compare(*pair, draw(6, 3), copy_weights=True).verdict
    assert "differs in encode" in line and "freqs of b is multiplied by 1 / pi in a" in line, line


def test_a_mask_that_is_not_used() -> None:
    def ours(m: Any, x: Any, mask: Any) -> Any:
        h = mx.tanh(m.inner(x))
        return m.out((h / (1 + h * h)).sum(1))

    def theirs(m: Any, x: Any, mask: Any) -> Any:
        h = torch.tanh(m.inner(x)) * mask[..., None]
        return m.out((h / (mask[..., None] + h * h).clamp(min=1.0)).sum(1))

    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.float32)
    line = verdict(net(ours, theirs, inner=linear(5, 8), out=linear(8, 3)), (draw(2, 4, 5), mask))
    assert "the argument 1, a mask, has no effect in a, as if all its elements were 1" in line, line


def test_more_ids_than_those_that_the_model_passes() -> None:
    """A graph layer that gets no edges from each node to itself."""

    def ours(m: Any, x: Any, source: Any, target: Any) -> Any:
        return mx.zeros((len(x), 8)).at[target].add(m.inner(x)[source])

    def theirs(m: Any, x: Any, source: Any, target: Any) -> Any:
        y = m.inner(x)
        return torch.zeros(len(x), 8, dtype=x.dtype).index_add(0, target, y[source])

    def outer(m: Any, x: Any, source: Any, target: Any) -> Any:
        return m.layer(x, source, target)

    def torch_outer(m: Any, x: Any, source: Any, target: Any) -> Any:
        loops = torch.arange(len(x), dtype=source.dtype)
        return m.layer(x, torch.cat([source, loops]), torch.cat([target, loops]))

    pair = net(outer, torch_outer, layer=net(ours, theirs, inner=linear(5, 8)))
    edges = tokens(9, below=6), tokens(9, below=6, seed=1)
    line = verdict(pair, (draw(6, 5), *edges))
    assert "differs in the model" in line and "layer gets the argument 1 of shape [9] in a, [15] in b" in line, line


def test_an_argument_that_is_not_added() -> None:
    """Positions of a query, which b repeats for the rows of a batch."""
    pair = net(
        lambda m, x, p: m.out(mx.tanh(m.inner(x))), lambda m, x, p: m.out(torch.tanh(m.inner(x)) + p),
        inner=linear(5, 8), out=linear(8, 3),
    )  # fmt: skip
    line = verdict(pair, (draw(2, 4, 5), draw(1, 4, 8)))
    assert "the input is not added in a" in line, line


class Weighted(M.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_g, self.weight_v, self.bias = mx.zeros((6, 1)), mx.zeros((6, 5)), mx.zeros((6,))

    def __call__(self, x: mx.array) -> mx.array:
        v = self.weight_v
        return x @ (self.weight_g * v / mx.sqrt((v * v).sum(1, keepdims=True))).T + self.bias


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_the_old_weight_norm_and_weights_that_are_all_zero() -> None:
    """PyTorch keeps the weight that it computes, which is not copied; zeros of `a` are its initial values."""
    report = compare(Weighted(), torch.nn.utils.weight_norm(T.Linear(5, 6)), draw(4, 5))
    assert report.passed and report.copied_weights, report


class Turned(T.Module):
    """Rotary positions with a buffer of complex numbers, as in the code of Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.q = T.Linear(5, 8)
        angles = torch.outer(torch.arange(16.0), 10000.0 ** -(torch.arange(4) / 4))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(self.q(x).float().unflatten(-1, (4, 2)))
        return torch.view_as_real(pairs * self.turns[: x.shape[1]]).flatten(-2).type_as(x)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_buffers_of_complex_numbers(dtype: str) -> None:
    """`Module.double` and `Module.to` made them real: then the noise was as large as the values."""
    given = draw(2, 6, 5)
    for traditional in (True, False):
        rope = M.RoPE(8, traditional=traditional)
        ours = net(lambda m, x, rope=rope: rope(m.q(x)), None, q=linear(5, 8)).ours
        report = compare(ours, Turned(), given, dtype=dtype, stages=["forward", "gradients"], copy_weights=True)
        assert report.passed is traditional, report.verdict


def test_results_that_depend_on_rounding_are_said() -> None:
    pair = net(lambda m, x: mx.sin(3e6 * m.q(x)), lambda m, x: torch.sin(3e6 * m.q(x)), q=linear(5, 8))
    report = compare(*pair, draw(2, 5), stages=["forward"], copy_weights=True)
    assert report.passed and any("b in fp32 is off from float64 by" in note for note in report.notes), report


def mlx_cell(m: Any, x: Any, h: Any) -> Any:
    (xr, xz, xn), (hr, hz, hn) = mx.split(m.x2h(x), 3, -1), mx.split(m.h2h(h), 3, -1)
    z = mx.sigmoid(xz + hz)
    return (1 - z) * mx.tanh(xn + mx.sigmoid(xr + hr) * hn) + z * h


CELL = {
    f"cell.{own}.{part}": f"cell.{part}_{name}"
    for own, name in (("x2h", "ih"), ("h2h", "hh"))
    for part in ("weight", "bias")
}


@pytest.mark.parametrize("rename", [CELL, {theirs: ours for ours, theirs in CELL.items()}])
def test_parameters_that_rename_moves_to_another_module(rename: dict[str, str]) -> None:
    for fault in (0.0, 0.01):
        cell = Pair(net(mlx_cell, None, x2h=linear(5, 18), h2h=linear(6, 18)).ours, T.GRUCell(5, 6))
        pair = net(
            lambda m, x, h, fault=fault: m.cell(m.inner(x), h) + fault,
            lambda m, x, h: m.cell(m.inner(x), h),
            inner=linear(3, 5), cell=cell,
        )  # fmt: skip
        report = compare(*pair, (draw(4, 3), draw(4, 6)), rename=rename, stages=["forward", "gradients"])
        assert report.passed is not bool(fault) and report.copied_weights, report
        assert report.culprit == ("" if fault else None), report.verdict


@pytest.mark.parametrize("is_given", [True, False])
def test_an_array_that_the_model_hands_to_one_of_its_layers(is_given: bool) -> None:
    """A bias of attention scores, without which the layer of b cannot run."""

    def ours(m: Any, x: Any, bias: Any = None) -> Any:
        y = m.inner(x)
        return mx.softmax(y if bias is None else y + bias, axis=-1)

    layer = net(ours, lambda m, x, bias: torch.softmax(m.inner(x) + bias, -1), inner=linear(5, 8))
    pair = net(
        lambda m, x, bias: m.layer(x, bias) if is_given else m.layer(x),
        lambda m, x, bias: m.layer(x, bias),
        layer=layer,
    )
    report = compare(*pair, (draw(4, 5), draw(4, 8)), stages=["forward"], copy_weights=True)
    assert report.passed is is_given and report.culprit == (None if is_given else ""), report.verdict
    assert is_given or "layer gets the argument 1 in b only" in report.cause, report.cause
