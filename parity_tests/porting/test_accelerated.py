"""The layers of a port that IceNet computes with its own operations: values, gradients and buffers of PyTorch."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from icenet.porting import layers

RNG = np.random.default_rng(0)
CASES = [
    (nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.nn.Conv2d(3, 5, 3, 2, 1)),
    (nn.Conv2d(3, 5, 1, stride=2, bias=False), torch.nn.Conv2d(3, 5, 1, 2, bias=False)),
    (nn.Conv2d(3, 5, 1, padding=1), torch.nn.Conv2d(3, 5, 1, padding=1)),
    (nn.Conv2d(3, 5, (1, 3), padding=(0, 1)), torch.nn.Conv2d(3, 5, (1, 3), padding=(0, 1))),
    (nn.Conv2d(3, 5, 3, stride=(2, 1), padding=1), torch.nn.Conv2d(3, 5, 3, (2, 1), 1)),
    (nn.Conv2d(3, 5, 3, stride=2, dilation=2, padding=1), torch.nn.Conv2d(3, 5, 3, 2, 1, 2)),
    (nn.Conv2d(3, 6, 3, groups=3), torch.nn.Conv2d(3, 6, 3, groups=3)),
    (nn.BatchNorm(3), torch.nn.BatchNorm2d(3)),
    (nn.BatchNorm(3, momentum=0.3, eps=1e-2), torch.nn.BatchNorm2d(3, momentum=0.3, eps=1e-2)),
    (nn.BatchNorm(3, affine=False), torch.nn.BatchNorm2d(3, affine=False)),
    (nn.BatchNorm(3, track_running_stats=False), torch.nn.BatchNorm2d(3, track_running_stats=False)),
    (nn.MaxPool2d(3, stride=2, padding=1), torch.nn.MaxPool2d(3, 2, 1)),
    (nn.MaxPool2d((2, 3), stride=(2, 3)), torch.nn.MaxPool2d((2, 3))),
    (nn.ReLU(), torch.nn.ReLU()),
    (nn.SiLU(), torch.nn.SiLU()),
    (nn.GELU(), torch.nn.GELU()),
    (nn.GELU(approx="tanh"), torch.nn.GELU(approximate="tanh")),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("mine", "theirs"), CASES, ids=lambda layer: repr(layer))
def test_layers(mine: nn.Module, theirs: torch.nn.Module, training: bool) -> None:
    for name, array in theirs.state_dict().items():
        if name in mine:
            values = array.numpy()
            mine[name] = mx.array(values.transpose(0, 2, 3, 1) if values.ndim == 4 else values)
    layers.accelerate(mine)
    assert type(mine).__module__ == layers.__name__
    mine.train(training)
    theirs.train(training).double().zero_grad()
    images = RNG.standard_normal((2, 9, 10, 3)).astype(np.float32)
    x = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float64, requires_grad=True)
    y = theirs(x)
    factors = RNG.standard_normal(tuple(y.shape)).astype(np.float32)
    (y * torch.tensor(factors)).sum().backward()

    def loss(parameters: dict[str, mx.array], x: mx.array) -> tuple[mx.array, mx.array]:
        mine.update(parameters)
        y = mine(x)
        return (y * mx.array(factors.transpose(0, 2, 3, 1))).sum(), y

    (_, y_mine), (gradients, dx) = mx.value_and_grad(loss, argnums=(0, 1))(
        mine.trainable_parameters(), mx.array(images)
    )
    pairs = [(y_mine, y.detach()), (dx, x.grad)]
    pairs += [(gradients[name], value.grad) for name, value in theirs.named_parameters()]
    pairs += [(mine[name], value) for name, value in theirs.named_buffers() if name in mine]
    for value, expected in pairs:
        assert expected is not None
        wanted = expected.numpy()
        wanted = wanted.transpose(0, 2, 3, 1) if wanted.ndim == 4 else wanted
        np.testing.assert_allclose(np.array(value), wanted, rtol=1e-4, atol=1e-5)


def test_other_layers_stay() -> None:
    class Mine(nn.ReLU):
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.linear, self.conv = Mine(), nn.Linear(2, 2), nn.Conv1d(2, 2, 1)

    model = layers.accelerate(Net())
    assert [type(model[name]) for name in ("act", "linear", "conv")] == [Mine, nn.Linear, nn.Conv1d]


def test_another_dtype_is_promoted() -> None:
    """An input of another type than the weight has the result of MLX's own layer."""
    for layer in (nn.Conv2d(2, 2, 1), nn.BatchNorm(2)):
        x = mx.random.normal((1, 4, 4, 2)).astype(mx.bfloat16)
        expected = layer(x)
        assert layers.accelerate(layer)(x).dtype == expected.dtype == mx.float32
