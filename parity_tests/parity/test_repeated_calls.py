"""`icenet.parity.compare` where a module is called in another order, more often, or with other rows on each side."""

from __future__ import annotations

from functools import partial
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

from icenet.parity import align, compare


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    torch.manual_seed(0)
    mx.random.seed(0)


class Call(M.Module):
    """A module whose call is a function of it and of its inputs."""

    def __init__(self, function: Any, **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class TorchCall(T.Module):
    def __init__(self, function: Any, **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def encoder(kind: str, factor: float = 1.0) -> tuple[Any, Any]:
    """An encoder of rows or of images, whose result is multiplied by a factor in MLX."""
    if kind == "rows":
        ours = Call(lambda m, x: M.gelu(factor * m.fc(x)), fc=M.Linear(6, 8))
        return ours, TorchCall(lambda m, x: F.gelu(m.fc(x)), fc=T.Linear(6, 8))
    ours = Call(lambda m, x: (factor * M.gelu(m.conv(x))).mean((1, 2)), conv=M.Conv2d(3, 8, 3))
    return ours, TorchCall(lambda m, x: F.gelu(m.conv(x)).mean((2, 3)), conv=T.Conv2d(3, 8, 3))


def ways(xp: Any, concatenate: Any) -> dict[str, Any]:
    """Ways to compute the distance of two codes."""

    def whole(m: Any, x: Any, y: Any) -> Any:
        codes = m.encoder(concatenate([x, y]))
        return m.head(xp.abs(codes[: len(x)] - codes[len(x) :]))

    def second_first(m: Any, x: Any, y: Any) -> Any:
        code = m.encoder(y)
        return m.head(xp.abs(m.encoder(x) - code))

    return {
        "twice": lambda m, x, y: m.head(xp.abs(m.encoder(x) - m.encoder(y))),
        "whole": whole,
        "second first": second_first,
    }


@pytest.mark.parametrize("kind", ["rows", "images"])
@pytest.mark.parametrize("calls", [("whole", "twice"), ("twice", "whole"), ("second first", "twice")])
def test_a_shared_encoder_may_be_called_in_another_way(calls: tuple[str, str], kind: str) -> None:
    shape = (3, 6) if kind == "rows" else (3, 5, 5, 3)
    given, layout = (draw(*shape), draw(*shape, seed=1)), None if kind == "rows" else "channels_last"
    for factor in (1.0, 1.01):
        ours, theirs = encoder(kind, factor)
        a = Call(ways(mx, mx.concatenate)[calls[0]], encoder=ours, head=M.Linear(8, 3))
        b = TorchCall(ways(torch, torch.cat)[calls[1]], encoder=theirs, head=T.Linear(8, 3))
        report = compare(a, b, given, copy_weights=True, layout=layout)
        assert report.passed == (factor == 1), report.verdict
        assert factor == 1 or (report.culprit, report.failed_stage.name) == ("encoder", "forward"), report.verdict


ORDERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "equal arguments": ((1, 0, 0), (0, 0, 1)),
    "one more": ((0, 1, 2), (1, 3, 2, 0)),
    "a new argument": ((2, 1, 0), (0, 1, 2)),
}
"""By name: the arguments of each call of an encoder in `a` and in `b`, as numbers of the inputs."""


@pytest.mark.parametrize("name", ORDERS)
def test_calls_correspond_by_their_arguments(name: str) -> None:
    """The results of two calls with equal arguments are used in different ways, in their order."""

    def call(m: Any, *given: Any, order: tuple[int, ...], factor: float = 1.0) -> Any:
        codes: dict[int, list[Any]] = {}
        for index in order:
            codes.setdefault(index, []).append(m.encoder(given[index] * (factor if index == 2 else 1.0)))
        last = codes.get(2, codes[0])[0]
        return m.head(codes[1][0] * codes[0][0] * codes[0][-1] * codes[0][-1] - last)

    ours, theirs = ORDERS[name]
    b = TorchCall(partial(call, order=theirs), encoder=T.Linear(6, 8), head=T.Linear(8, 3))
    given = tuple(draw(3, 6, seed=seed) for seed in range(4))
    for factor in (1.0, 1.1):
        a = Call(partial(call, order=ours, factor=factor), encoder=M.Linear(6, 8), head=M.Linear(8, 3))
        report = compare(a, b, given, copy_weights=True)
        assert report.passed == (factor == 1 or 2 not in ours), report.verdict
        assert report.passed or "; input of encoder is off by" in report.verdict, report.verdict


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_result_may_be_computed_again(times: int, layer: str) -> None:
    """Gradients by the result of each call are then other ones, their sum is equal."""

    def call(m: Any, x: Any, act: Any, count: int, hide: Any = lambda x: x) -> Any:
        y = m.fc(x)
        return m.head(act(hide(y)) * (y if count == 1 else m.fc(x)))

    def layers(nn: Any) -> dict[str, Any]:
        if layer == "linear":
            return {"fc": nn.Linear(6, 8), "head": nn.Linear(8, 3)}
        return {"fc": nn.Conv1d(6, 8, 2), "head": nn.Conv1d(8, 3, 1)}

    b = TorchCall(lambda m, x: call(m, x, torch.tanh, 3 - times), **layers(T))
    for hide in (lambda x: x, mx.stop_gradient):
        a = Call(partial(call, act=mx.tanh, count=times, hide=hide), **layers(M))
        x, layout = (draw(4, 6), None) if layer == "linear" else (draw(2, 4, 6), "channels_last")
        report = compare(a, b, x, copy_weights=True, layout=layout)
        assert report.passed == (hide is not mx.stop_gradient), report.verdict
        assert report.passed or (report.culprit == "" and "fc." in report.verdict), report.verdict


@pytest.mark.parametrize("way", ["whole", "second first"])
def test_dropouts_of_calls_that_do_not_correspond_are_left_out(way: str) -> None:
    """Their masks cannot be equal. All else is compared in training mode."""
    for rate in (0.2, 0.3):
        ours = Call(lambda m, x: m.drop(M.gelu(m.fc(x))), fc=M.Linear(6, 8), drop=M.Dropout(0.2))
        theirs = TorchCall(lambda m, x: m.drop(F.gelu(m.fc(x))), fc=T.Linear(6, 8), drop=T.Dropout(0.2))
        a = Call(
            lambda m, x, y: m.drop(ways(mx, mx.concatenate)[way](m, x, y)),
            encoder=ours,
            head=M.Linear(8, 3),
            drop=M.Dropout(rate),
        )
        b = TorchCall(
            lambda m, x, y: m.drop(ways(torch, torch.cat)["twice"](m, x, y)),
            encoder=theirs,
            head=T.Linear(8, 3),
            drop=T.Dropout(0.2),
        )
        report = compare(a, b, (draw(3, 6), draw(3, 6, seed=1)), copy_weights=True)
        assert report.passed == (rate == 0.2), report.verdict
        assert report.modes_off == ["encoder.drop"]
        assert rate == 0.2 or report.culprit == "drop"


def test_rows_of_an_embedding_may_be_of_two_batches() -> None:
    def call(m: Any, x: Any, y: Any, factor: float) -> Any:
        rows = m.encoder(mx.concatenate([x, y]))
        return m.head(factor * rows[: len(x)] * rows[len(x) :])

    b = TorchCall(
        lambda m, x, y: m.head(m.encoder(x) * m.encoder(y)), encoder=T.Embedding(20, 8), head=T.Linear(8, 3)
    )
    ids = tokens(2, 5, below=20), tokens(2, 5, below=20, seed=1)
    for factor in (1.0, 1.1):
        a = Call(partial(call, factor=factor), encoder=M.Embedding(20, 8), head=M.Linear(8, 3))
        report = compare(a, b, ids, copy_weights=True)
        assert report.passed == (factor == 1), report.verdict
        assert factor == 1 or report.verdict.startswith("differs in the model (Call) itself, before head"), (
            report.verdict
        )


class Experts(M.Module):
    """All experts compute all rows, if there are no others than those of a router."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.gate, self.experts, self.wrong = M.Linear(6, 4), [M.Linear(6, 6) for _ in range(4)], wrong

    def __call__(self, x: mx.array) -> mx.array:
        scores = mx.softmax(self.gate(x), -1)
        chosen = mx.stop_gradient(mx.argsort(-scores, -1))[:, :2]
        share = mx.take_along_axis(scores, chosen, -1)
        if self.wrong != "share":
            share = share / share.sum(-1, keepdims=True)
        rows = [mx.where(chosen == i, share, 0).sum(-1, keepdims=True) for i in range(4)]
        return sum(expert(x) * row for expert, row in zip(self.experts, rows, strict=True))


class TorchExperts(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = T.Linear(6, 4), T.ModuleList([T.Linear(6, 6) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share, chosen = torch.softmax(self.gate(x), -1).topk(2, -1)
        share, y = share / share.sum(-1, keepdim=True), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(chosen == i)
            y = y.index_add(0, row, expert(x[row]) * share[row, place, None])
        return y


@pytest.mark.parametrize("wrong", ["", "share", "before"])
def test_a_fault_in_the_routing_is_none_of_the_rows_of_experts(wrong: str) -> None:
    scale = 1.1 if wrong == "before" else 1.0
    a = Call(
        lambda m, x: m.moe(m.pre(x)), pre=Call(lambda m, x: scale * m.fc(x), fc=M.Linear(6, 6)), moe=Experts(wrong)
    )
    pre = TorchCall(lambda m, x: m.fc(x), fc=T.Linear(6, 6))
    report = compare(
        a, TorchCall(lambda m, x: m.moe(m.pre(x)), pre=pre, moe=TorchExperts()), draw(9, 6), copy_weights=True
    )
    assert report.passed == (not wrong), report.verdict
    place = {"share": "moe", "before": "pre"}.get(wrong)
    assert not wrong or (report.culprit, report.failed_stage.name) == (place, "forward"), report.verdict


class DropPath(M.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return mx.where(mx.random.bernoulli(0.7, (len(x), 1)), x / 0.7, 0.0) if self.training else x


class TorchDropPath(T.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1), 0.7)).to(x.dtype) / 0.7 if self.training else x


def test_a_stochastic_depth_that_is_called_in_another_order_is_left_out() -> None:
    def call(m: Any, x: Any) -> Any:
        left = m.drop_path(m.left(x))
        return left + m.drop_path(m.right(x))

    def reordered(m: Any, x: Any) -> Any:
        right = m.drop_path(m.right(x))
        return m.drop_path(m.left(x)) + right

    ours = Call(reordered, left=M.Linear(4, 4), right=M.Linear(4, 4), drop_path=DropPath())
    theirs = TorchCall(call, left=T.Linear(4, 4), right=T.Linear(4, 4), drop_path=TorchDropPath())
    report = compare(ours, theirs, draw(16, 4), copy_weights=True)
    assert report.passed and "the training mode of drop_path itself was not compared" in report.verdict, (
        report.verdict
    )


def test_a_weight_with_channels_last_in_a_users_module_is_explained() -> None:
    """As far as its use does not show it: a function that is imported by its name is not seen."""
    conv2d = mx.conv2d
    ours = Call(lambda m, x: conv2d(x, m.weight), weight=mx.zeros((8, 3, 3, 4)))
    theirs = TorchCall(lambda m, x: F.conv2d(x, m.weight), weight=T.Parameter(torch.randn(8, 4, 3, 3)))
    report = compare(ours, theirs, draw(2, 5, 5, 4), copy_weights=True, layout="channels_last")
    assert "weight has its channels last in a" in report.cause, report.verdict
    assert "self.weight.moveaxis(1, -1)" in report.cause


@pytest.mark.parametrize("factor", [1, 2])
def test_either_of_two_equal_calls_may_be_used_further(factor: int) -> None:
    a = Call(lambda m, x: (mx.argmax(m.fc(x), -1), factor * mx.square(m.fc(x))), fc=M.Linear(6, 8))
    b = TorchCall(lambda m, x: (lambda y: (m.fc(x).argmax(-1), y))(m.fc(x).square()), fc=T.Linear(6, 8))
    report = compare(a, b, draw(3, 6), copy_weights=True)
    assert report.passed == (factor == 1), report.verdict
    assert report.passed or report.cause == "it is multiplied by 2 in a", report.verdict


class Blocks(M.Module):
    """Blocks that get positions [1, L, D], as few as there are."""

    def __init__(self, offset: int = 0, factor: float = 1.0) -> None:
        super().__init__()
        self.table, self.offset = M.Embedding(9, 4), offset
        self.blocks = [
            Call(lambda m, x, p: x + M.gelu(m.fc(x + factor * p)), fc=M.Linear(4, 4)),
            Call(lambda m, x, p: x + M.gelu(m.fc(x + p)), fc=M.Linear(4, 4)),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        positions = self.table(mx.arange(x.shape[1])[None] + self.offset)
        for block in self.blocks:
            x = block(x, positions)
        return x


class TorchBlocks(T.Module):
    """The same, whose blocks get a copy of the positions for each row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = T.Embedding(9, 4)
        self.blocks = T.ModuleList(
            TorchCall(lambda m, x, p: x + F.gelu(m.fc(x + p)), fc=T.Linear(4, 4)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = self.table(torch.arange(x.shape[1])).expand(len(x), -1, -1)
        for block in self.blocks:
            x = block(x, positions)
        return x


def test_an_argument_may_be_a_single_row_or_copies_of_it() -> None:
    report = compare(Blocks(), TorchBlocks(), draw(3, 5, 4), copy_weights=True)
    assert report.passed, str(report)
    report = compare(Blocks(factor=2.0), TorchBlocks(), draw(3, 5, 4), copy_weights=True)
    assert (report.culprit, report.where) == ("blocks.0", "before fc"), str(report)
    report = compare(Blocks(offset=1), TorchBlocks(), draw(3, 5, 4), copy_weights=True)
    assert report.culprit == "", str(report)


@pytest.mark.parametrize("shapes", [((1, 2, 4), (3, 2, 4)), ((2, 4), (3, 2, 4)), ((3, 2, 4), (1, 2, 4))])
def test_cotangents_of_copies(shapes: Any) -> None:
    """The product of a cotangent with a value is the same on both sides."""
    value = draw(2, 4)
    ours, theirs = (np.ascontiguousarray(np.broadcast_to(value, shape)) for shape in shapes)
    how = align.copies(ours, theirs)
    cotangent = draw(*theirs.shape, seed=1)
    assert how is not None and np.array_equal(align.to_torch(how, ours), theirs)
    assert np.array_equal(align.to_mlx(how, theirs), ours)
    assert (align.cotangent_to_mlx(how, cotangent) * ours).sum() == pytest.approx(
        (cotangent * theirs).sum(), abs=1e-5
    )
    assert align.copies(ours + draw(*ours.shape, seed=2), theirs + draw(*theirs.shape, seed=3)) is None


def experts(act: Any = M.gelu, factor: float = 1.0) -> tuple[Any, Any]:
    """Experts of MLX that return the results of each row apart, and those of PyTorch, which add them."""
    inner = Call(lambda m, x, w: act(m.fc(x)).reshape(len(x), 2, -1), fc=M.Linear(4, 6))
    ours = Call(lambda m, x, w: m.head((factor * m.experts(x, w) * w[..., None]).sum(1)), experts=inner)
    ours.head = M.Linear(3, 2)
    summed = TorchCall(lambda m, x, w: (F.gelu(m.fc(x)).view(len(x), 2, -1) * w[..., None]).sum(1), fc=T.Linear(4, 6))
    theirs = TorchCall(lambda m, x, w: m.head(m.experts(x, w)), experts=summed, head=T.Linear(3, 2))
    return ours, theirs


def test_a_module_of_another_interface_is_computed_within_its_caller() -> None:
    inputs = draw(5, 4), draw(5, 2, seed=1)
    report = compare(*experts(), inputs, copy_weights=True)
    assert report.passed and any("experts" in note for note in report.notes), str(report)
    for ours, theirs in (experts(act=M.gelu_approx), experts(factor=1.1)):
        report = compare(ours, theirs, inputs, copy_weights=True)
        assert report.culprit == "" and report.failed_stage.name == "forward", str(report)
