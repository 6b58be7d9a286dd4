"""Weights of convolutions that a user's module holds itself: their axes are known from their use."""

from __future__ import annotations

from typing import Any

import icenet.blas

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw

import icenet
from icenet.parity import compare


class Conv(M.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight, self.bias = mx.random.normal(shape), mx.zeros(shape[:1])

    def __call__(self, x: mx.array) -> mx.array:
        return mx.conv2d(x, self.weight, padding=1) + self.bias


class TorchConv(T.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight, self.bias = T.Parameter(torch.randn(shape)), T.Parameter(torch.randn(shape[:1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


class KeptConv(Conv):
    """Holds the axes of PyTorch."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.conv2d(x, self.weight.moveaxis(1, -1), padding=1) + self.bias


class CastConv(Conv):
    def __call__(self, x: mx.array) -> mx.array:
        return mx.conv2d(x, self.weight.astype(x.dtype) * 1.0, padding=1) + self.bias


class Transposed(Conv):
    def __call__(self, x: mx.array) -> mx.array:
        return mx.conv_transpose2d(x, self.weight, stride=2, padding=1) + self.bias


class TorchTransposed(TorchConv):
    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.bias = T.Parameter(torch.randn(shape[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


class Normed(M.Module):
    """A convolution with a weight norm."""

    def __init__(self, o: int, size: int, i: int) -> None:
        super().__init__()
        self.weight_v, self.weight_g = mx.random.normal((o, size, i)), mx.ones((o, 1, 1))

    def __call__(self, x: mx.array) -> mx.array:
        length = mx.sqrt(mx.square(self.weight_v).sum(axis=(1, 2), keepdims=True))
        return mx.conv1d(x, self.weight_g * self.weight_v / length)


class TorchNormed(T.Module):
    def __init__(self, o: int, i: int, size: int) -> None:
        super().__init__()
        self.weight_v, self.weight_g = T.Parameter(torch.randn(o, i, size)), T.Parameter(torch.ones(o, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = self.weight_v.square().sum((1, 2), keepdim=True).sqrt()
        return F.conv1d(x, self.weight_g * self.weight_v / length)


IMAGES, SIGNALS = (2, 6, 6, 3), (2, 7, 4)
TWINS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "conv": (Conv(5, 4, 4, 3), TorchConv(5, 3, 4, 4), IMAGES),
    "a cube, which fits in two ways": (Conv(5, 3, 3, 3), TorchConv(5, 3, 3, 3), IMAGES),
    "a cube with the axes of PyTorch": (KeptConv(5, 3, 3, 3), TorchConv(5, 3, 3, 3), IMAGES),
    "computed": (CastConv(5, 4, 4, 3), TorchConv(5, 3, 4, 4), IMAGES),
    "transposed": (Transposed(5, 4, 4, 3), TorchTransposed(3, 5, 4, 4), IMAGES),
    "weight norm": (Normed(5, 3, 4), TorchNormed(5, 4, 3), SIGNALS),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.usefixtures("mlx_on_cpu")
def test_correct_twins_pass(name: str) -> None:
    ours, theirs, shape = TWINS[name]
    report = compare(ours, theirs, draw(*shape), layout="channels_last", copy_weights=True)
    assert report.passed, report
    assert ("PyTorch" not in name) == any("the weight of a convolution" in note for note in report.notes)


@pytest.mark.usefixtures("mlx_on_cpu")
def test_a_cube_whose_use_does_not_show_its_axes_is_explained() -> None:
    report = compare(
        CastConv(5, 3, 3, 3), TorchConv(5, 3, 3, 3), draw(*IMAGES), layout="channels_last", copy_weights=True
    )
    assert 'layer_kind = "plain weight=conv2d"' in report.cause, report.verdict


@pytest.mark.usefixtures("mlx_on_cpu")
def test_the_kind_that_the_note_names_is_that_of_from_torch() -> None:
    class Named(Normed):
        layer_kind = "plain weight_v=conv1d"

    ours, theirs = Named(5, 3, 4), TorchNormed(5, 4, 3)
    icenet.from_torch(theirs, ours)
    expected = theirs.weight_v.detach().numpy().transpose(0, 2, 1)
    assert np.array_equal(np.array(ours.weight_v), expected)
    assert compare(ours, theirs, draw(*SIGNALS), layout="channels_last", copy_weights=False).passed
