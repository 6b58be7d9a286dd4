"""`icenet.parity.compare` where both sides call the same layers in another way: other axes, rows, or arguments."""

from __future__ import annotations

from functools import partial
from typing import Any

import icenet.blas  # noqa: F401 - before mlx

import mlx.core as mx
import mlx.nn as M
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw

from icenet.parity import align, compare
from icenet.parity.causes.passed import hides_otherwise


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)
    mx.random.seed(0)


class Seq2Seq(M.Module):
    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.encoder, self.decoder, self.fc, self.wrong = M.LSTM(4, 6), M.LSTM(4, 6), M.Linear(6, 3), wrong

    def __call__(self, x: mx.array, y: mx.array) -> mx.array:
        h, c = self.encoder(x)
        if self.wrong == "state":
            return self.fc(self.decoder(y)[0])
        h, c = (c, h) if self.wrong == "order" else (h, c)
        return self.fc(self.decoder(y, hidden=h[:, -1], cell=c[:, -1])[0])


class TorchSeq2Seq(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = T.LSTM(4, 6, batch_first=True), T.LSTM(4, 6, batch_first=True)
        self.fc = T.Linear(6, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        _, state = self.encoder(x)
        return self.fc(self.decoder(y, state)[0])


@pytest.mark.parametrize("wrong", ["", "order", "state"])
def test_state_of_a_recurrent_layer_has_one_more_axis_in_pytorch(wrong: str) -> None:
    report = compare(Seq2Seq(wrong), TorchSeq2Seq(), (draw(2, 5, 4), draw(2, 3, 4)), copy_weights=True)
    assert report.passed == (not wrong), str(report)
    if wrong:
        assert report.verdict.startswith("differs in the model (Seq2Seq) itself, between encoder and decoder"), report
    assert ("gets the argument hx in b only" in report.cause) == (wrong == "state")


class Flat(M.Module):
    """Applies layers to each token of `[B, L, D]`."""

    def __init__(self, negated: bool = False) -> None:
        super().__init__()
        self.fc, self.norm, self.out, self.negated = M.Linear(4, 6), M.LayerNorm(6), M.Linear(6, 2), negated

    def __call__(self, x: mx.array) -> mx.array:
        y = self.norm(self.fc(x))
        return self.out(-y if self.negated else y)


class TorchFlat(T.Module):
    """Applies them to `[B * L, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = T.Linear(4, 6), T.LayerNorm(6), T.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.norm(self.fc(x.flatten(0, 1)))).unflatten(0, x.shape[:2])


def test_tokens_of_all_sequences_in_one_axis() -> None:
    report = compare(Flat(), TorchFlat(), draw(2, 3, 4), copy_weights=True)
    assert report.passed, str(report)
    report = compare(Flat(negated=True), TorchFlat(), draw(2, 3, 4), copy_weights=True)
    assert "itself, between norm and out" in report.verdict


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_alignment_goes_both_ways(dtype: str) -> None:
    ours, theirs = np.arange(24.0).reshape(2, 3, 4), np.arange(24.0).reshape(6, 4)
    how = align.rows(ours, theirs)
    assert how is not None
    assert np.array_equal(align.to_torch(how, ours), theirs)
    assert np.array_equal(align.to_mlx(how, theirs), ours)
    assert align.rows(ours, ours.transpose(1, 0, 2)) is None  # other tokens in each row
    assert align.rows(ours, np.zeros((2, 12))) is None


class Experts(M.Module):
    """A mixture of experts, each of which gets all tokens."""

    def __init__(self, softmax_first: bool = False) -> None:
        super().__init__()
        self.gate, self.experts, self.softmax_first = (
            M.Linear(4, 3),
            [M.Linear(4, 4) for _ in range(3)],
            softmax_first,
        )

    def __call__(self, x: mx.array) -> mx.array:
        scores = self.gate(x)
        chosen = mx.stop_gradient(mx.argpartition(-scores, 1, axis=-1)[..., :2])
        scores = mx.softmax(scores, axis=-1) if self.softmax_first else scores
        weights = mx.take_along_axis(scores, chosen, -1)
        weights = weights if self.softmax_first else mx.softmax(weights, axis=-1)
        return sum(((chosen == i) * weights).sum(-1, keepdims=True) * e(x) for i, e in enumerate(self.experts))


class TorchExperts(T.Module):
    """The same, each of which gets the tokens that are routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = T.Linear(4, 3), T.ModuleList(T.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        weights, chosen = self.gate(x).topk(2, dim=-1)
        weights, out = weights.softmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            *rows, nth = torch.where(chosen == i)
            out[tuple(rows)] += weights[(*rows, nth)].unsqueeze(-1) * expert(x[tuple(rows)])
        return out


def test_experts_get_all_tokens_or_those_routed_to_them() -> None:
    report = compare(Experts(), TorchExperts(), draw(2, 5, 4), copy_weights=True)
    assert report.passed, str(report)
    assert any("other rows in a" in note and "experts.0" in note for note in report.notes)
    report = compare(Experts(softmax_first=True), TorchExperts(), draw(2, 5, 4), copy_weights=True)
    assert not report.passed and report.culprit == "" and report.failed_stage.name == "forward", str(report)


class Masked(M.Module):
    """A layer within a layer that gets the mask."""

    def __init__(self, diagonal: int | None, bias: bool = False) -> None:
        super().__init__()
        self.layer = MaskedLayer()
        self.diagonal = diagonal

    def __call__(self, x: mx.array) -> mx.array:
        if self.diagonal is None:
            return self.layer(x, None)
        return self.layer(x, mx.triu(mx.full((x.shape[1],) * 2, -1e9), k=self.diagonal))


class MaskedLayer(M.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = M.MultiHeadAttention(8, 2, bias=True)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        return x + self.attn(x, x, x, mask=mask)


class TorchMasked(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = TorchMaskedLayer()

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1))


class TorchMaskedLayer(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = T.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        return x + self.attn(x, x, x, attn_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize(
    ("diagonal", "cause"),
    [(1, ""), (2, "hides other elements in a than in b: attention mask off by one"), (None, "in b only")],
)
def test_wrong_mask_is_found_where_it_is_made(diagonal: int | None, cause: str) -> None:
    report = compare(Masked(diagonal), TorchMasked(), draw(2, 5, 8), copy_weights=True)
    assert report.passed == (not cause), str(report)
    assert cause in report.cause
    if cause:
        assert report.verdict.startswith("differs in the model (Masked) itself, before layer; output of"), report


def test_masks_of_any_form_hide_the_same_elements() -> None:
    hidden = np.triu(np.ones((4, 4), bool), 1)
    added = np.where(hidden, -np.inf, 0.0).astype(np.float32)
    for other in (hidden, ~hidden, (~hidden).astype(np.float32), np.where(hidden, -1e9, 0.0)[None, None]):
        assert not hides_otherwise(added, other)
        assert hides_otherwise(np.where(np.triu(np.ones((4, 4)), 2) > 0, -np.inf, 0.0), other)
    assert hides_otherwise(added, np.where(hidden, 0.0, -np.inf))  # not inverted: -inf always hides


def test_losses_after_steps_of_adam_have_its_rounded_correction() -> None:
    ours = M.Sequential(M.Linear(6, 10), M.LayerNorm(10), M.ReLU(), M.Linear(10, 4))
    theirs = T.Sequential(T.Linear(6, 10), T.LayerNorm(10), T.ReLU(), T.Linear(10, 4))
    labels = np.array([0, 3, 1, 2, 2])
    report = compare(
        *(ours, theirs, draw(5, 6)),
        rename=lambda path: path.replace("layers.", ""),
        loss=(
            lambda y: M.losses.cross_entropy(y, mx.array(labels), reduction="mean"),
            lambda y: F.cross_entropy(y, torch.tensor(labels)),
        ),
        optimizer=(optim.AdamW(1e-2, bias_correction=True), partial(torch.optim.AdamW, lr=1e-2)),
        copy_weights=True,
    )
    assert report.passed, str(report)
