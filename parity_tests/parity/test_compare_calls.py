"""`icenet.parity.compare` where both sides call the same layers in another way: other axes, rows, or arguments."""

from __future__ import annotations

from functools import partial
from pathlib import Path
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

from icenet.parity import align, compare, read_trace, record
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


class Expert(M.Module):
    def __init__(self, act: Any = M.gelu) -> None:
        super().__init__()
        self.up, self.down, self.act = M.Linear(4, 8), M.Linear(8, 4), act

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(self.act(self.up(x)))


class TorchExpert(T.Module):
    def __init__(self, act: Any = F.gelu) -> None:
        super().__init__()
        self.up, self.down, self.act = T.Linear(4, 8), T.Linear(8, 4), act

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(self.act(self.up(x)))


class WithoutBias(M.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.T


@pytest.mark.parametrize("mistake", ["", "approximation", "bound", "gradient", "bias"])
def test_a_mistake_in_an_expert_that_gets_other_rows_is_found_there(mistake: str) -> None:
    ours, theirs = Experts(), TorchExperts()
    ours.experts = [Expert() for _ in range(3)]
    theirs.experts = T.ModuleList(TorchExpert() for _ in range(3))
    if mistake == "approximation":
        ours.experts[1].act = M.gelu_approx
    elif mistake == "bound":
        ours.experts[1].act, theirs.experts[1].act = M.relu, F.relu6
    elif mistake == "gradient":
        ours.experts[1].act = lambda x: mx.stop_gradient(M.gelu(x))
    elif mistake == "bias":
        ours.experts[1].up = WithoutBias(4, 8)
    report = compare(ours, theirs, draw(2, 15, 4), copy_weights=True)
    assert report.passed == (not mistake), str(report)
    place = "experts.1.up" if mistake == "bias" else "experts.1 itself, between up and down"
    assert report.passed or report.verdict.startswith(f"differs in {place}"), report.verdict


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


class Tied(M.Module):
    def __init__(self, untied: bool = False) -> None:
        super().__init__()
        self.embed = M.Embedding(7, 4)
        if untied:
            self.head = M.Linear(4, 7, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        x = mx.tanh(self.embed(ids))
        return self.head(x) if "head" in self else self.embed.as_linear(x)


class TorchTied(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = T.Embedding(7, 4), T.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize("untied", [False, True])
def test_weights_that_are_tied_in_the_reference_only(untied: bool) -> None:
    report = compare(Tied(untied), TorchTied(), np.arange(6).reshape(2, 3), copy_weights=True)
    assert report.passed != untied, str(report)
    if untied:
        assert report.culprit in ("embed", "head")
        assert "tied weights" in report.cause


def test_options_of_a_layer_that_gets_another_shape_are_named() -> None:
    class Padded(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = M.Conv1d(2, 3, 3)

        def __call__(self, x: mx.array) -> mx.array:
            return self.conv(mx.pad(x, [(0, 0), (0, 2), (0, 0)]))

    class TorchPadded(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = T.Conv1d(2, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(x)

    report = compare(Padded(), TorchPadded(), draw(2, 8, 2), copy_weights=True, layout="channels_last")
    assert report.verdict == (
        "differs in the model (Padded) itself, before conv; input of shape [2, 10, 2] in a, [2, 2, 8] in b, which is "
        "[2, 8, 2] with the axes of a (structure); cause: conv: padding is 0 in a, 1 in b"
    )


def heads(x: Any, order: tuple[int, ...], is_mlx: bool) -> Any:
    """Splits the last axis of `[B, L, 12]` into three axes of a given order, and brings them to that of 3, 2, 2."""
    sizes = [(3, 2, 2)[i] for i in order]
    back = [order.index(i) + 2 for i in range(3)]
    split = x.reshape(*x.shape[:2], *sizes)
    return split.transpose(0, 1, *back) if is_mlx else split.permute(0, 1, *back)


def in_a_loop(x: Any, halves: tuple[Any, Any]) -> Any:
    first, second = halves
    for _ in range(4):
        x = x + first(second(x) * 2.0)
    return x


@pytest.mark.parametrize(
    ("ours", "theirs", "cause"),
    [
        (
            lambda x: heads(x, (1, 0, 2), True).max(axis=2),
            lambda x: heads(x, (0, 1, 2), False).amax(2),
            "splits the last axis",
        ),
        (
            lambda x: x.reshape(2, 5, 3, 4).transpose(0, 1, 3, 2).reshape(2, 5, 12) ** 3,
            lambda x: x.unflatten(-1, (3, 4)).flatten(-2) ** 3,
            "merges the last two axes in the reverse order",
        ),
        (
            lambda x: (lambda p: p[1] * 2 + p[0] * mx.tanh(p[2]))(mx.split(x, 3, axis=-1)),
            lambda x: (lambda p: p[0] * 2 + p[1] * torch.tanh(p[2]))(x.chunk(3, -1)),
            "the parts of a split are in another order in a: [1, 0, 2]",
        ),
        (
            lambda x: (lambda p: p[1] * mx.sigmoid(p[0]))(mx.split(x, 2, axis=-1)),
            lambda x: F.glu(x, -1),
            "the halves of GLU are exchanged in a",
        ),
        (
            lambda x: mx.roll(x, 2, axis=1) * x,
            lambda x: torch.roll(x, -2, 1) * x,
            "a roll in the other direction in a",
        ),
        (lambda x: x * x.sum(), lambda x: x * x.exp().sum(), "exp is left out in a"),
        (lambda x: mx.square(x).sum(-1) * x[..., 0], lambda x: x.abs().sum(-1) * x[..., 0], "the square in a"),
        (
            lambda x: mx.softmax(x @ x.swapaxes(1, 2) / 12**0.5, axis=-1) @ x,
            lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
            "attention scores are multiplied by 1 / sqrt(size) in a",
        ),
        (
            lambda x: in_a_loop(x, (mx.sigmoid, mx.sigmoid)),
            lambda x: in_a_loop(x, (torch.tanh, torch.sigmoid)),
            "sigmoid in a, tanh in b",
        ),
    ],
)
def test_causes_in_the_code_between_layers(ours: Any, theirs: Any, cause: str) -> None:
    report = compare(Net(ours), TorchNet(theirs), draw(2, 5, 12), stages=["forward"], copy_weights=True)
    assert not report.passed
    assert cause in report.cause, str(report)


class Net(M.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.fc, self.call = M.Linear(12, 12), call

    def __call__(self, x: mx.array) -> mx.array:
        return self.call(self.fc(x))


class TorchNet(T.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.fc, self.call = T.Linear(12, 12), call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self.fc(x))


def test_no_rotary_positions_are_named_where_there_are_none() -> None:
    def split(x: Any) -> Any:
        return x.reshape(2, 5, 2, 3, 2)  # q, k, v of two heads

    def ours(x: mx.array) -> mx.array:
        q, k, v = (x[..., i * 4 : i * 4 + 4].reshape(2, 5, 2, 2).transpose(0, 3, 1, 2) for i in range(3))
        return (mx.softmax(q @ k.swapaxes(2, 3), axis=-1) @ v).transpose(0, 2, 1, 3).reshape(2, 5, 4)

    def theirs(x: torch.Tensor) -> Any:
        q, k, v = (x[..., i * 4 : i * 4 + 4].reshape(2, 5, 2, 2).permute(0, 2, 1, 3) for i in range(3))
        return ((q @ k.transpose(2, 3)).softmax(-1) @ v).permute(0, 2, 1, 3).reshape(2, 5, 4)

    report = compare(Net(ours), TorchNet(theirs), draw(2, 5, 12), stages=["forward"], copy_weights=True)
    assert not report.passed and "rotary" not in report.cause, str(report)


@pytest.mark.slow
def test_weights_of_a_recurrent_layer_are_copied_from_a_trace(tmp_path: Path) -> None:
    record(TorchSeq2Seq(), (draw(2, 3, 4), draw(2, 2, 4)), tmp_path / "trace")
    report = compare(Seq2Seq(), read_trace(tmp_path / "trace"), stages=["forward"], copy_weights=True)
    assert report.passed, str(report)
