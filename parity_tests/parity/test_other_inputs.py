"""Inputs that cannot show a fault, such as masks of ones and ids without padding, are compared with other values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
from pairs import draw

from icenet.parity import compare

B, L, D, ROWS = 2, 6, 8, 20
IDS = np.array([[3, 4, 5, 6, 7, 8], [4, 9, 3, 5, 8, 6]], np.int32)
Call = Callable[..., Any]


class Ours(M.Module):
    def __init__(self, call: Call, **layers: Any) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


class Theirs(T.Module):
    def __init__(self, call: Call, **layers: Any) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


def report_of(ours: Call, theirs: Call, given: Any, **options: Any) -> Any:
    a = Ours(ours, embed=M.Embedding(ROWS, D), types=M.Embedding(3, D), fc=M.Linear(D, D))
    b = Theirs(theirs, embed=T.Embedding(ROWS, D), types=T.Embedding(3, D), fc=T.Linear(D, D))
    return compare(a, b, given, copy_weights=True, **{"stages": ["forward", "gradients"], **options})


def mean_of(m: Any, x: Any, mask: Any) -> Any:
    y = m.fc(x) * mask[..., None]
    return y.sum(1) / mask.sum(1)[:, None]


@pytest.mark.parametrize("mask", [np.ones((B, L), np.float32), np.ones((B, L), np.int32), np.ones((B, L), bool)])
def test_a_mask_of_ones_that_one_side_ignores(mask: Any) -> None:
    given = {"x": draw(B, L, D), "mask": mask}
    assert report_of(mean_of, mean_of, given, stages=["forward"]).passed
    report = report_of(lambda m, x, mask: m.fc(x).mean(1), mean_of, given, stages=["forward"])
    assert report.culprit == "" and "with other values of mask, which is 1 everywhere" in report.verdict, (
        report.verdict
    )


def test_states_of_zeros_and_types_of_zeros() -> None:
    def call(m: Any, x: Any, state: Any, types: Any, factor: float = 1.0) -> Any:
        return m.fc(x + m.types(types)) + factor * state[:, None]

    given = {"x": draw(B, L, D), "state": np.zeros((B, D), np.float32), "types": np.zeros((B, L), np.int32)}
    report = report_of(call, call, given)
    assert report.passed and "varied" not in str(report), report
    report = report_of(lambda m, x, state, types: call(m, x, state, types, 0.5), call, given, stages=["forward"])
    assert "with other values of state, which is 0 everywhere, and types, which is 0" in report.verdict, (
        report.verdict
    )
    assert report.culprit == "" and report.cause == "a scale is 0.5 in a, 1 in b"
    report = report_of(lambda m, x, state, types: call(m, x, state, types * 0), call, given)
    assert report.culprit == "" and report.where == "before types", report.verdict


@pytest.mark.parametrize("shift", [0, 1])
def test_lengths_that_are_all_equal(shift: int) -> None:
    def ours(m: Any, x: Any, lengths: Any) -> Any:
        return m.fc(mx.where((mx.arange(L) < mx.minimum(lengths + shift, L)[:, None])[..., None], x, 0.0).sum(1))

    def theirs(m: Any, x: Any, lengths: Any) -> Any:
        return m.fc(torch.where((torch.arange(L) < lengths[:, None])[..., None], x, 0.0).sum(1))

    report = report_of(ours, theirs, {"x": draw(B, L, D), "lengths": np.full((B,), L, np.int32)})
    assert report.passed == (shift == 0), report.verdict
    assert report.passed or (report.where == "before fc" and "of lengths, which is 6 everywhere" in report.verdict)


@pytest.mark.parametrize("ours", [
    lambda m, ids: m.fc(m.embed(mx.minimum(ids, ROWS - 2))),
    lambda m, ids: m.fc(m.embed(mx.where(ids == 0, 1, ids))),
])  # fmt: skip
def test_ids_that_the_inputs_do_not_have(ours: Call) -> None:
    def theirs(m: Any, ids: Any) -> Any:
        return m.fc(m.embed(ids))

    assert report_of(theirs, theirs, IDS).passed
    report = report_of(ours, theirs, IDS)
    assert report.culprit == "" and report.where == "before embed", report.verdict


class Table(M.Module):
    """`how` is a mistake in rows that the inputs do not select."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight, self.how = mx.random.normal((ROWS, D)), how

    def __call__(self, ids: mx.array) -> mx.array:
        rows = self.weight[ids]
        if self.how == "scaled":
            return rows * mx.where(ids == ROWS - 1, 2.0, 1.0)[..., None]
        padding = {"padding": 0, "other padding": 1}.get(self.how, -1)
        return mx.where((ids == padding)[..., None], mx.stop_gradient(rows), rows)


@pytest.mark.parametrize(("how", "passes"), [("padding", True), ("other padding", False), ("scaled", False)])
def test_rows_that_the_inputs_do_not_select(how: str, passes: bool) -> None:
    a = Ours(lambda m, ids: m.fc(m.embed(ids)), embed=Table(how), fc=M.Linear(D, D))
    b = Theirs(lambda m, ids: m.fc(m.embed(ids)), embed=T.Embedding(ROWS, D, padding_idx=0), fc=T.Linear(D, D))
    report = compare(a, b, IDS, copy_weights=True, stages=["forward", "gradients"])
    assert report.passed == passes, report.verdict
    assert passes or report.culprit == "embed", report.verdict


def test_padding_that_the_inputs_do_not_have_is_noted() -> None:
    """MLX's embedding has no row of padding: a port of such a model is no false alarm."""
    a = Ours(lambda m, ids: m.fc(m.embed(ids)), embed=M.Embedding(ROWS, D), fc=M.Linear(D, D))
    b = Theirs(lambda m, ids: m.fc(m.embed(ids)), embed=T.Embedding(ROWS, D, padding_idx=0), fc=T.Linear(D, D))
    report = compare(a, b, IDS, copy_weights=True, stages=["forward", "gradients"])
    assert report.passed and "embed: b does not train row 0 (padding_idx), a does" in str(report)
    assert not compare(a, b, IDS - 3, copy_weights=True, stages=["forward", "gradients"]).passed


def test_rows_of_a_norm_above_the_largest_one() -> None:
    """PyTorch's embedding divides them in the forward pass."""
    a = Ours(lambda m, ids: m.fc(m.embed(ids)), embed=M.Embedding(ROWS, D), fc=M.Linear(D, D))
    b = Theirs(lambda m, ids: m.fc(m.embed(ids)), embed=T.Embedding(ROWS, D, max_norm=2.0), fc=T.Linear(D, D))
    with torch.no_grad():
        b.embed.weight.copy_(torch.nn.functional.normalize(b.embed.weight))
        b.embed.weight[ROWS - 1] *= 3
    report = compare(a, b, IDS, copy_weights=True, stages=["forward"])
    assert report.culprit == "embed" and "at other ids" in report.verdict, report.verdict
    assert b.embed.weight[ROWS - 1].norm() > 2.9


def test_what_the_reference_does_not_take_is_noted() -> None:
    def theirs(m: Any, x: Any, mask: Any) -> Any:
        if not bool(mask.all()):
            raise ValueError("padding is not supported")
        return m.fc(x)

    given = {"x": draw(B, L, D), "mask": np.ones((B, L), bool)}
    report = report_of(lambda m, x, mask: m.fc(x), theirs, given)
    assert report.passed and "input mask, which is 1 everywhere: it was not varied, because b fails" in str(report)


def test_the_file_to_replay_has_the_other_values(tmp_path: Any) -> None:
    given = {"x": draw(B, L, D), "mask": np.ones((B, L), np.float32)}
    report = report_of(
        lambda m, x, mask: m.fc(x).mean(1), mean_of, given, replay=str(tmp_path / "small.npz"), stages=["forward"]
    )
    assert not np.load(report.replay)["mask"].all()


def test_a_mask_with_the_values_of_the_ids_gets_no_ids() -> None:
    """The two sides hide an element by other formulas, which agree for masks of 0 and 1 only."""

    def ours(m: Any, ids: Any, mask: Any) -> Any:
        return mx.softmax(m.fc(m.embed(ids)) + (1 - mask)[..., None] * -1e9, 1)

    def theirs(m: Any, ids: Any, mask: Any) -> Any:
        return torch.softmax(m.fc(m.embed(ids)).masked_fill((mask == 0)[..., None], -1e9), 1)

    ones = np.ones((1, 3), np.int32)
    report = report_of(ours, theirs, {"ids": ones, "mask": ones}, stages=["forward"])
    assert report.passed, report
