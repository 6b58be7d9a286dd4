"""The layers of a port that IceNet computes with its own operations: values, gradients and buffers of PyTorch."""

from __future__ import annotations

from typing import Any

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
    (nn.Conv2d(3, 5, 1, stride=2, padding=1), torch.nn.Conv2d(3, 5, 1, 2, 1)),
    (nn.Conv2d(3, 5, 1, padding=1), torch.nn.Conv2d(3, 5, 1, padding=1)),
    (nn.Conv2d(3, 5, (1, 3), padding=(0, 1)), torch.nn.Conv2d(3, 5, (1, 3), padding=(0, 1))),
    (nn.Conv2d(3, 5, 3, stride=(2, 1), padding=1), torch.nn.Conv2d(3, 5, 3, (2, 1), 1)),
    (nn.Conv2d(3, 5, 3, stride=2, dilation=2, padding=1), torch.nn.Conv2d(3, 5, 3, 2, 1, 2)),
    (nn.Conv2d(3, 6, 3, groups=3), torch.nn.Conv2d(3, 6, 3, groups=3)),
    (nn.Conv2d(3, 3, (3, 2), stride=(2, 1), groups=3), torch.nn.Conv2d(3, 3, (3, 2), (2, 1), groups=3)),
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


@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (1, {"stride": 2, "padding": 2}),
        (1, {"dilation": 3, "padding": 1, "bias": False}),
        (1, {"groups": 2, "stride": 3}),
        (3, {"stride": (1, 2, 2), "padding": (1, 0, 1)}),
        (3, {"dilation": 2}),
    ],
)
def test_convolutions_of_sequences_and_volumes(rank: int, options: dict[str, Any]) -> None:
    """Values and gradients are those of PyTorch in float64."""
    mine, theirs = (getattr(module, f"Conv{rank}d")(4, 6, 3, **options) for module in (nn, torch.nn))
    theirs = theirs.double()
    to_mlx = lambda array: mx.array(array.detach().movedim(1, -1).numpy().astype(np.float32))  # noqa: E731
    layers.accelerate(mine)
    parameters = {"weight": to_mlx(theirs.weight)}
    if theirs.bias is not None:
        parameters["bias"] = mx.array(theirs.bias.detach().numpy().astype(np.float32))
    x = torch.from_numpy(RNG.standard_normal((2, 4, 11, 7, 6)[: rank + 2])).requires_grad_()
    y = theirs(x)
    cotangent = torch.from_numpy(RNG.standard_normal(y.shape))
    y.backward(cotangent)

    def compute(x: mx.array, *arrays: mx.array) -> list[mx.array]:
        mine.update(dict(zip(parameters, arrays, strict=True)))
        return [mine(x)]

    [y_mine], (dx, *gradients) = mx.vjp(compute, [to_mlx(x), *parameters.values()], [to_mlx(cotangent)])
    pairs = [(y_mine, to_mlx(y)), (dx, to_mlx(x.grad)), (gradients[0], to_mlx(theirs.weight.grad))]
    pairs += [(gradients[1], mx.array(theirs.bias.grad.float().numpy()))] if theirs.bias is not None else []
    for value, expected in pairs:
        np.testing.assert_allclose(np.array(value), np.array(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("mlx_on_cpu")  # the layers are changed for a CPU
@pytest.mark.parametrize(("channels", "options"), [(64, {"groups": 16}), (64, {"groups": 64}), (4, {"dilation": 2})])
def test_weight_gradients_are_exact(channels: int, options: dict[str, int]) -> None:
    """A sum of 4,096 terms one by one has an error of 13 half ulps; PyTorch's is 2 to 4 here."""
    x = torch.from_numpy(RNG.standard_normal((4, channels, 32, 32)).astype(np.float32))
    theirs, mine = (module.Conv2d(channels, channels, 3, bias=False, **options) for module in (torch.nn, nn))
    y = theirs.double()(x.double())
    cotangent = torch.from_numpy(RNG.standard_normal(y.shape).astype(np.float32))
    y.backward(cotangent.double())
    layers.accelerate(mine)

    def compute(weight: mx.array) -> list[mx.array]:
        mine.weight = weight
        return [mine(mx.array(x.movedim(1, -1).numpy()))]

    _, [gradient] = mx.vjp(compute, [mine.weight], [mx.array(cotangent.movedim(1, -1).numpy())])
    assert theirs.weight.grad is not None
    exact = theirs.weight.grad.movedim(1, -1).numpy()
    assert np.square(np.array(gradient) - exact).mean() ** 0.5 < 6 * 2**-24 * np.square(exact).mean() ** 0.5


@pytest.mark.parametrize("options", [{"groups": 2}, {"groups": 4}, {"dilation": 2}, {"stride": 2}])
def test_no_images(options: dict[str, int]) -> None:
    layer = layers.accelerate(nn.Conv2d(4, 4, 3, padding=1, **options))
    x = mx.zeros((0, 6, 6, 4))
    assert layer(x).shape == nn.Conv2d(4, 4, 3, padding=1, **options)(x).shape
    assert mx.grad(lambda x: layer(x).sum())(x).shape == x.shape


def test_other_layers_stay() -> None:
    class Mine(nn.ReLU):
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.linear, self.conv = Mine(), nn.Linear(2, 2), nn.ConvTranspose1d(2, 2, 1)

    model = layers.accelerate(Net())
    assert [type(model[name]) for name in ("act", "linear", "conv")] == [Mine, nn.Linear, nn.ConvTranspose1d]


def test_another_dtype_is_promoted() -> None:
    """An input of another type than the weight has the result of MLX's own layer."""
    for layer in (nn.Conv2d(2, 2, 1), nn.BatchNorm(2)):
        x = mx.random.normal((1, 4, 4, 2)).astype(mx.bfloat16)
        expected = layer(x)
        assert layers.accelerate(layer)(x).dtype == expected.dtype == mx.float32
