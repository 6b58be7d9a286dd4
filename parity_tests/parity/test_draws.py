"""Modules that draw random numbers of their own are compared in training mode, with equal numbers on both sides."""

from __future__ import annotations

import threading
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from function_nets import Net, TorchNet
from pairs import draw

from icenet.parity import compare
from icenet.tools import draws as our_draws
from icenet_torch.tools import draws as their_draws

RATE = 0.4


class DropPath(M.Module):
    """Stochastic depth: `how` is what the mask is made of, or a mistake."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def __call__(self, x: Any) -> Any:
        if not self.training:
            return x
        shape = x.shape if self.how == "elements" else (x.shape[0], *[1] * (x.ndim - 1))
        mask = (
            mx.random.uniform(shape=shape) < 1 - RATE if self.how == "less" else mx.random.bernoulli(1 - RATE, shape)
        )
        return x * mask / (RATE if self.how == "scale" else 1 - RATE)


class TorchDropPath(T.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Any) -> Any:
        if not self.training:
            return x
        shape = (x.shape[0], *[1] * (x.ndim - 1))
        if self.how == "floor":  # as timm did
            mask = (1 - RATE + torch.rand(shape)).floor_()
        elif self.how == "less":
            mask = torch.rand(shape) < 1 - RATE
        else:
            mask = x.new_empty(shape).bernoulli_(1 - RATE)
        return x * mask / (1 - RATE)


class Block(M.Module):
    def __init__(self, how: str, momentum: float, is_sum: bool) -> None:
        super().__init__()
        self.norm, self.fc = M.BatchNorm(6, momentum=momentum), M.Linear(6, 6)
        self.path, self.drop = DropPath(how), M.Dropout(0.2)
        self.is_sum = is_sum

    def __call__(self, x: Any) -> Any:
        y = self.drop(self.fc(self.norm(x)))
        return self.path(x + y) if self.is_sum else x + self.path(y)


class TorchBlock(T.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.fc = T.BatchNorm1d(6), T.Linear(6, 6)
        self.path, self.drop = TorchDropPath(how), T.Dropout(0.2)

    def forward(self, x: Any) -> Any:
        return x + self.path(self.drop(self.fc(self.norm(x))))


def stacks(ours: str = "", theirs: str = "", momentum: float = 0.1, is_sum: bool = False) -> tuple[Any, Any]:
    return (
        M.Sequential(*(Block(ours, momentum, is_sum) for _ in range(2))),
        T.Sequential(*(TorchBlock(theirs) for _ in range(2))),
    )


@pytest.mark.parametrize("theirs", ["", "floor", "less"])
def test_stochastic_depth_has_equal_masks_however_they_are_made(theirs: str) -> None:
    report = compare(*stacks("", theirs), draw(8, 6), copy_weights=True)
    assert report.passed and "not compared" not in report.verdict, report


@pytest.mark.parametrize(
    ("fault", "culprit", "words"),
    [
        ({"ours": "scale"}, "layers.0.path", "it is multiplied by 1.5 in a"),
        ({"ours": "elements"}, "layers.0.path", "output"),
        ({"is_sum": True}, "layers.0", "between drop and path"),
        ({"momentum": 0.9}, "layers.0.norm", "momentum is 0.9 in a, 0.1 in b"),
    ],
)
def test_faults_beside_stochastic_depth_are_found(fault: dict[str, Any], culprit: str, words: str) -> None:
    report = compare(*stacks(**fault), draw(8, 6), copy_weights=True)
    assert report.culprit == culprit.removeprefix("layers.") and words in report.verdict, report.verdict


@pytest.mark.parametrize(("rate", "passes"), [(0.3, True), (0.2, False)])
def test_a_function_has_the_masks_of_a_layer(rate: float, passes: bool) -> None:
    ours = Net(
        lambda m, x: m.fc(m.drop(M.relu(m.conv(x))).mean((1, 2))),
        conv=M.Conv2d(3, 8, 3), fc=M.Linear(8, 4), drop=M.Dropout(rate),
    )  # fmt: skip
    theirs = TorchNet(
        lambda m, x: m.fc(F.dropout(F.relu(m.conv(x)), 0.3, m.training).mean((2, 3))),
        conv=T.Conv2d(3, 8, 3), fc=T.Linear(8, 4),
    )  # fmt: skip
    report = compare(ours, theirs, draw(4, 8, 8, 3), copy_weights=True)
    assert report.passed == passes and (passes or report.where == "between conv and fc"), report


@pytest.mark.parametrize(("factor", "passes"), [(0.5, True), (1.0, False)])
def test_noise_that_is_drawn_in_both_modes(factor: float, passes: bool) -> None:
    def ours(m: Any, x: Any) -> Any:
        mean, log = mx.split(m.enter(x), 2, -1)
        return m.leave(mean + mx.random.normal(mean.shape) * mx.exp(factor * log))

    def theirs(m: Any, x: Any) -> Any:
        mean, log = m.enter(x).chunk(2, -1)
        return m.leave(torch.distributions.Normal(mean, (0.5 * log).exp()).rsample())

    pair = (
        Net(ours, enter=M.Linear(6, 8), leave=M.Linear(4, 6)),
        TorchNet(theirs, enter=T.Linear(6, 8), leave=T.Linear(4, 6)),
    )
    report = compare(*pair, draw(5, 6), copy_weights=True)
    assert report.passed == passes and (passes or report.where == "between enter and leave"), report


def choose(m: Any, x: Any) -> Any:
    logits = m.fc(x)
    return mx.softmax((logits + mx.random.gumbel(logits.shape)) / 0.5, -1) @ m.codes.weight


def test_gumbel_softmax_and_a_random_order() -> None:
    def shuffled(m: Any, x: Any) -> Any:
        order = (
            mx.argsort(mx.random.uniform(shape=x.shape[:2]), 1)[:, :3] if m.training else mx.zeros((2, 3), mx.int32)
        )
        return choose(m, mx.take_along_axis(x, order[..., None], 1))

    def torch_shuffled(m: Any, x: Any) -> Any:
        order = torch.rand(x.shape[:2]).argsort(1)[:, :3] if m.training else torch.zeros(2, 3, dtype=torch.int64)
        rows = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        return F.gumbel_softmax(m.fc(rows), tau=0.5) @ m.codes.weight

    pair = (
        Net(shuffled, fc=M.Linear(6, 5), codes=M.Embedding(5, 4)),
        TorchNet(torch_shuffled, fc=T.Linear(6, 5), codes=T.Embedding(5, 4)),
    )
    report = compare(*pair, draw(2, 7, 6), copy_weights=True)
    assert report.passed and "not compared" not in report.verdict, report


@pytest.mark.parametrize("momentum", [0.1, 0.9])
def test_numbers_that_cannot_be_equal_switch_off_their_module_only(momentum: float) -> None:
    def drop(x: Any, training: bool) -> Any:
        kind = mx.array if isinstance(x, mx.array) else torch.from_numpy
        return x * kind(np.random.rand(*x.shape) < 0.5) if training else x

    ours = M.Sequential(
        M.Linear(6, 6), M.BatchNorm(6, momentum=momentum), Net(lambda m, x: drop(x, m.training)), M.Linear(6, 2)
    )
    theirs = T.Sequential(
        T.Linear(6, 6), T.BatchNorm1d(6), TorchNet(lambda m, x: drop(x, m.training)), T.Linear(6, 2)
    )
    report = compare(ours, theirs, draw(9, 6), copy_weights=True)
    assert report.passed == (momentum == 0.1) and report.modes_off == ["2"], report
    assert "of 2 itself was not compared" in report.verdict if report.passed else report.culprit == "1"


def test_generators_of_the_frameworks_are_left_alone() -> None:
    pair, function, state = stacks(), mx.random.bernoulli, torch.get_rng_state()
    compare(*pair, draw(8, 6), copy_weights=True, stages=["forward"])
    assert mx.random.bernoulli is function and torch.equal(torch.get_rng_state(), state)


def uniform(distribution: str, shape: tuple[int, ...]) -> Any:
    return np.full(shape, 0.25, np.float32)


def test_calls_with_a_key_at_its_place_and_other_threads_draw_as_usual() -> None:
    key, found = mx.random.key(3), []
    expected = mx.random.normal((2,), mx.float32, None, None, key), mx.random.bernoulli(0.5, (2,), key)
    with our_draws.replaced(uniform):
        got = mx.random.normal((2,), mx.float32, None, None, key), mx.random.bernoulli(0.5, (2,), key)
        own = mx.random.uniform(0, 2, [3], mx.float16, None)
        thread = threading.Thread(target=lambda: found.append(mx.random.uniform(shape=(3,)).tolist()))
        thread.start()
        thread.join()
    assert all(mx.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    assert own.dtype == mx.float16 and own.tolist() == [0.5] * 3 and found[0] != [0.25] * 3


def test_normal_numbers_of_a_shape_are_replaced_and_complex_ones_are_not() -> None:
    with their_draws.replaced(uniform):
        normal = torch.normal(1.0, 2.0, (3,))
        z, like = torch.randn(3, dtype=torch.complex64), torch.randn_like(torch.zeros(3, dtype=torch.complex64))
        order = torch.randperm(20)  # of equal numbers, as in MLX
    assert normal.tolist() == [1.5] * 3 and order.tolist() == list(range(20))
    assert z.dtype == like.dtype == torch.complex64


def chosen(x: mx.array, indices: mx.array) -> mx.array:
    return mx.take_along_axis(x, mx.stop_gradient(indices), -1)


SEVERAL: dict[str, tuple[Any, Any, Any]] = {
    "randint_like": (
        lambda x: x * mx.random.randint(0, 3, x.shape),
        lambda x: x * torch.randint_like(x, 3),
        lambda x: x * mx.random.randint(0, 4, x.shape),
    ),
    "randint_like from": (
        lambda x: x * mx.random.randint(-2, 3, x.shape),
        lambda x: x * torch.randint_like(x, -2, 3),
        lambda x: x * mx.random.randint(-3, 3, x.shape),
    ),
    "random_": (
        lambda x: x * mx.random.randint(0, 5, x.shape),
        lambda x: x * torch.empty_like(x).random_(5),
        lambda x: x * mx.random.randint(0, 6, x.shape),
    ),
    "random_ from": (
        lambda x: x * mx.random.randint(1, 5, x.shape),
        lambda x: x * torch.empty_like(x).random_(1, 5),
        lambda x: x * mx.random.randint(0, 5, x.shape),
    ),
    "log_normal_": (
        lambda x: x * mx.exp(mx.random.normal(x.shape, scale=0.5)),
        lambda x: x * torch.empty_like(x).log_normal_(0.0, 0.5),
        lambda x: x * mx.random.normal(x.shape, scale=0.5),
    ),
    "multinomial": (
        lambda x: chosen(x, mx.random.categorical(x, num_samples=4)),
        lambda x: x.gather(-1, x.softmax(-1).multinomial(4, replacement=True)),
        lambda x: chosen(x, mx.random.categorical(-x, num_samples=4)),
    ),
    "multinomial without replacement": (
        lambda x: chosen(x, mx.argsort(-(x + mx.random.gumbel(x.shape)), -1)[:, :2]),
        lambda x: x.gather(-1, x.softmax(-1).multinomial(2)),
        lambda x: chosen(x, mx.argsort(x + mx.random.gumbel(x.shape), -1)[:, :2]),
    ),
    "Laplace": (
        lambda x: x + mx.random.laplace(x.shape, scale=0.5),
        lambda x: x + torch.distributions.Laplace(torch.zeros_like(x), 0.5).rsample(),
        lambda x: x + mx.random.laplace(x.shape, scale=0.4),
    ),
}
"""By name: code of MLX, that of PyTorch, and MLX's with a mistake."""


@pytest.mark.parametrize("name", SEVERAL)
def test_numbers_of_other_distributions_are_equal(name: str) -> None:
    right, theirs, wrong = SEVERAL[name]
    width = 2 if name == "multinomial without replacement" else 4
    for ours in (right, wrong):
        pair = (
            Net(lambda m, x, ours=ours: m.out(m.noise(m.fc(x))), fc=M.Linear(6, 4), out=M.Linear(width, 3),
                noise=Net(lambda m, x, ours=ours: ours(x) if m.training else x[:, :width])),
            TorchNet(lambda m, x: m.out(m.noise(m.fc(x))), fc=T.Linear(6, 4), out=T.Linear(width, 3),
                     noise=TorchNet(lambda m, x: theirs(x) if m.training else x[:, :width])),
        )  # fmt: skip
        report = compare(*pair, draw(5, 6), copy_weights=True)
        assert report.passed == (ours is right), report.verdict
        assert "not compared" not in report.verdict
        assert report.passed or report.verdict.startswith("differs in noise; output is off by"), report.verdict


@pytest.mark.parametrize("name", ["geometric_", "cauchy_"])
def test_numbers_that_mlx_has_no_function_for_name_their_module(name: str) -> None:
    ours, theirs = (
        net(lambda m, x: m.out(m.noise(x)), noise=noise, out=out)
        for net, noise, out in (
            (Net, Net(lambda m, x: x * mx.random.uniform(shape=x.shape) if m.training else x), M.Linear(6, 3)),
            (
                TorchNet,
                TorchNet(lambda m, x: x * getattr(torch.empty_like(x), name)(0.3) if m.training else x),
                T.Linear(6, 3),
            ),
        )
    )
    report = compare(ours, theirs, draw(5, 6), copy_weights=True)
    assert report.passed and "the training mode of noise itself was not compared" in report.verdict, report.verdict


def test_equal_numbers_have_the_distribution_that_the_code_asks_for() -> None:
    rng, p = np.random.default_rng(0), np.array([0.1, 0.2, 0.3, 0.4], np.float32)

    def source(distribution: str, shape: tuple[int, ...]) -> Any:
        return rng.standard_normal(shape, np.float32) if distribution == "normal" else rng.random(shape, np.float32)

    with our_draws.replaced(source), their_draws.replaced(source):
        rows = torch.from_numpy(p).repeat(2, 1)
        several = rows.multinomial(20000, replacement=True)
        others = rows[:1].repeat(20000, 1).multinomial(2)
        ours = mx.random.categorical(mx.log(mx.array(np.stack([p, p]))), num_samples=20000)
        shaped = mx.random.categorical(mx.log(mx.array(np.stack([p, p]))), shape=(20000, 2))
        laplace = np.array(mx.random.laplace((20000,), loc=1.0, scale=0.5))
        numbers = torch.empty(20000).log_normal_(0.5, 0.25).log()
    assert several.shape == ours.shape == (2, 20000) and shaped.shape == (20000, 2)
    for found in (several.numpy(), np.array(ours), np.array(shaped)):
        assert np.allclose(np.bincount(found.reshape(-1)) / found.size, p, atol=0.01)
    assert (others[:, 0] != others[:, 1]).all()
    second = [sum(p[i] * p[j] / (1 - p[i]) for i in range(4) if i != j) for j in range(4)]
    assert np.allclose(np.bincount(others[:, 1].numpy()) / 20000, second, atol=0.015)
    assert abs(laplace.mean() - 1) < 0.02 and abs(np.abs(laplace - 1).mean() - 0.5) < 0.02
    assert abs(numbers.mean() - 0.5) < 0.01 and abs(numbers.std() - 0.25) < 0.01
