"""Recurrent layers of PyTorch with several layers or directions, next to a layer of MLX for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import icenet.blas  # before mlx: it decides which BLAS MLX finds

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
from pairs import draw

import icenet
from icenet.core.errors import WeightsError
from icenet.parity import compare, read_trace, record
from icenet_torch.tools.recurrent_parts import Parts, with_parts

BY_NAME = {"rnn.*_l0": "ahead.*_l0", "rnn.*_l0_reverse": "back.*_l0"}


def first(found: Any) -> mx.array:
    return found[0] if isinstance(found, tuple) else found


def both(ahead: Any, back: Any, x: mx.array) -> mx.array:
    return mx.concatenate([first(ahead(x)), first(back(x[:, ::-1]))[:, ::-1]], axis=-1)


class Tagger(M.Module):
    def __init__(self, kind: str = "GRU") -> None:
        super().__init__()
        self.ahead, self.back, self.head = getattr(M, kind)(5, 4), getattr(M, kind)(5, 4), M.Linear(8, 3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.head(both(self.ahead, self.back, x))


class Stack(M.Module):
    """Two layers with both directions in a list, and a dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = [M.GRU(size, 4) for size in (5, 5, 8, 8)]
        self.drop, self.head = M.Dropout(0.3), M.Linear(8, 3)

    def __call__(self, x: mx.array) -> mx.array:
        x = both(self.rnn[0], self.rnn[1], x)
        return self.head(both(self.rnn[2], self.rnn[3], self.drop(x)))


class TorchTagger(T.Module):
    def __init__(self, kind: str = "GRU", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"batch_first": True, **options}
        self.rnn, self.head = getattr(T, kind)(5, 4, bidirectional=True, **options), T.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rnn.flatten_parameters()
        if self.rnn.batch_first:
            return self.head(self.rnn(x)[0])
        return self.head(self.rnn(x.transpose(0, 1))[0]).transpose(0, 1)


def notes(report: Any) -> list[str]:
    return [note for module in report.modules for note in module.notes]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_two_layers_are_the_directions_of_one(kind: str) -> None:
    report = compare(Tagger(kind), TorchTagger(kind), draw(3, 7, 5), copy_weights=True)
    assert report.passed and report.failed_stage is None, report
    assert "back is compared with the reverse direction of layer 0 of rnn" in notes(report)
    judged = {row.path for stage in report.stages for row in stage.rows if stage.name == "weights"}
    assert {"rnn.l0", "rnn.l0_reverse", "head"} <= judged


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_in_a_list_with_a_dropout_between_them(batch_first: bool) -> None:
    theirs = TorchTagger(num_layers=2, dropout=0.3, batch_first=batch_first)
    report = compare(Stack(), theirs, draw(3, 7, 5), copy_weights=True, stages=["weights", "forward", "gradients"])
    assert report.passed and "rnn.3 is compared with the reverse direction of layer 1 of rnn" in notes(report), report


def test_the_model_itself_may_be_the_layer(tmp_path: Path) -> None:
    class Both(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forward_gru, self.backward_gru = M.GRU(5, 4), M.GRU(5, 4)

        def __call__(self, x: mx.array) -> mx.array:
            return both(self.forward_gru, self.backward_gru, x)

    theirs = T.GRU(5, 4, bidirectional=True, batch_first=True)
    assert compare(Both(), theirs, draw(3, 7, 5), copy_weights=True).passed
    theirs = T.GRU(5, 4, batch_first=True)
    single = compare(M.GRU(5, 4), theirs, draw(3, 7, 5), copy_weights=True)
    assert single.passed and single.losses, single  # the last state, which only PyTorch returns, is not trained
    record(theirs, draw(3, 7, 5), tmp_path / "trace")
    assert compare(M.GRU(5, 4), read_trace(tmp_path / "trace"), copy_weights=True).passed


def test_recurrent_layers_of_one_framework_have_the_same_weights() -> None:
    pairs = [(M.LSTM(5, 4), M.LSTM(5, 4)), (T.GRU(5, 4, batch_first=True), T.GRU(5, 4, batch_first=True))]
    for ours, theirs in pairs:
        options = {"stages": ["weights", "forward", "gradients"]}
        assert compare(ours, theirs, draw(3, 7, 5), copy_weights=True, **options).passed
        report = compare(ours, theirs, draw(3, 7, 5), copy_weights=False, **options)
        assert report.failed_stage is not None and report.failed_stage.name == "weights"


def test_faults_between_the_directions_are_named() -> None:
    class Wrong(Tagger):
        def __init__(self, call: Any) -> None:
            super().__init__()
            self.call = call

        def __call__(self, x: mx.array) -> mx.array:
            return self.head(self.call(self, x))

    calls = {
        "the order along axis 1 is reversed": lambda m, x: mx.concatenate([m.ahead(x), m.back(x)], -1),
        "the sequence is not reversed": lambda m, x: mx.concatenate([m.ahead(x), m.back(x[:, ::-1])], -1),
        "parts along axis 2 are in another order": lambda m, x: mx.roll(both(m.ahead, m.back, x), 4, axis=-1),
    }
    for cause, call in calls.items():
        report = compare(Wrong(call), TorchTagger(), draw(3, 7, 5), copy_weights=True, stages=["forward"])
        assert not report.passed and report.culprit == "" and cause in report.cause, report


def test_weights_that_the_user_copied_are_compared_by_rename() -> None:
    ours, theirs = Tagger(), TorchTagger()
    with pytest.raises(WeightsError, match=r"rename=\{'rnn\.\*_l0_reverse': 'PATH\.\*_l0'\}"):
        icenet.from_torch(theirs, ours)
    icenet.from_torch(theirs, ours, rename=BY_NAME)
    options = {"stages": ["weights", "forward"], "copy_weights": False}
    for rename in (None, BY_NAME, {"ahead": "rnn.l0", "back": "rnn.l0_reverse"}):
        assert compare(ours, theirs, draw(3, 7, 5), rename=rename, **options).passed
    report = compare(ours, theirs, draw(3, 7, 5), rename={"back": "rnn.l0", "ahead": "rnn.l0_reverse"}, **options)
    assert report.failed_stage.name == "weights" and "rnn.l0_reverse.weight_ih_l0" in report.verdict


def test_a_direction_that_is_missing_is_told() -> None:
    class One(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = M.GRU(5, 8), M.Linear(8, 3)

        def __call__(self, x: mx.array) -> mx.array:
            return self.head(self.gru(x))

    report = compare(One(), TorchTagger(), draw(3, 7, 5), copy_weights=True)
    assert report.culprit == "rnn" and "2 directions, a has gru of one layer and direction" in report.verdict


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("kind", ["input", "output", "weight"])
def test_a_layer_with_hooks_is_not_divided(kind: str) -> None:
    """The parts would compute without the hooks, and agree."""
    theirs = TorchTagger()
    if kind == "weight":
        torch.nn.utils.weight_norm(theirs.rnn, "weight_hh_l0")
    elif kind == "input":
        theirs.rnn.register_forward_pre_hook(lambda module, args: (torch.tanh(args[0]),))
    else:
        theirs.rnn.register_forward_hook(lambda module, args, found: (torch.tanh(found[0]), found[1]))
    report = compare(Tagger(), theirs, draw(3, 7, 5), copy_weights=True)
    assert report.culprit == "rnn" and "2 directions, a has ahead, back of one layer and direction" in report.verdict


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bias": False}, {"num_layers": 2, "dropout": 0.3}])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_the_parts_compute_what_the_layer_does(kind: str, options: dict[str, Any]) -> None:
    whole = getattr(T, kind)(5, 4, bidirectional=True, **options).double().eval()
    parts = with_parts(whole, {kind: 4})
    assert isinstance(parts, Parts) and with_parts(whole, {kind: 1}) is whole
    assert {id(p) for p in parts.parameters()} == {id(p) for p in whole.parameters()}
    held = T.Sequential(T.utils.weight_norm(T.Linear(5, 5)), whole)  # holds a result, which deepcopy refuses
    held[0](torch.zeros(1, 5))
    assert isinstance(with_parts(held, {kind: 4})[1], Parts)
    x = torch.from_numpy(draw(3, 7, 5)).double()
    states = torch.from_numpy(draw(2 * whole.num_layers, 3 if whole.batch_first else 7, 4, seed=1)).double()
    for given in ((x,), (x[0],), (x, (states, 2 * states) if kind == "LSTM" else states)):
        expected, found = whole(*given), parts(*given)
        flat = [[y[0], *(y[1] if kind == "LSTM" else y[1:])] for y in (expected, found)]
        assert all(np.allclose(p.detach(), q.detach(), atol=1e-12) for p, q in zip(*flat, strict=True))


class Steps(M.Module):
    """Calls a layer with one step at a time: MLX has no cells."""

    def __init__(self, kind: str, factor: float = 1.0, **options: Any) -> None:
        super().__init__()
        self.cell, self.head = getattr(M, kind)(5, 4, **options), M.Linear(4, 3)
        self.factor = factor

    def __call__(self, x: mx.array) -> mx.array:
        state: tuple[mx.array, ...] = ()
        found = []
        for t in range(x.shape[1]):
            states = self.cell(x[:, t : t + 1], *state)
            state = tuple(s[:, 0] for s in (states if isinstance(states, tuple) else (states,)))
            state = (*state[:-1], self.factor * state[-1])
            found.append(self.head(state[0]))
        return mx.stack(found, axis=1)


class TorchSteps(T.Module):
    def __init__(self, kind: str, reads: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head, self.reads = getattr(T, f"{kind}Cell")(5, 4, **options), T.Linear(4, 3), reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, found = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            found.append(self.head(state[0] if isinstance(state, tuple) else state))
        return torch.stack(found, 1) + (self.cell.weight_hh.sum() if self.reads else 0)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_layer_that_gets_one_step_is_a_cell(kind: str) -> None:
    ours, theirs = Steps(kind), TorchSteps(kind)
    icenet.from_torch(theirs, ours)
    for options in ({}, {"dtype": "bf16"}):
        report = compare(ours, theirs, draw(3, 4, 5), copy_weights=False, **options)
        assert report.passed and f"cell is compared with the {kind}Cell cell" in notes(report), report
    ours.factor = 1.001
    report = compare(ours, theirs, draw(3, 4, 5), copy_weights=False, stages=["forward"])
    assert report.culprit == "" and "multiplied by 1.001 in a" in report.cause, report
    back = TorchSteps(kind)
    icenet.to_torch(ours, back)
    total = [m.cell.bias_ih + m.cell.bias_hh for m in (theirs, back)]
    assert torch.allclose(*total) and torch.equal(theirs.cell.weight_ih, back.cell.weight_ih)


def test_a_state_that_is_detached_is_a_difference_of_the_caller() -> None:
    class Detached(Steps):
        def __call__(self, x: mx.array) -> mx.array:
            h, c = self.cell(x[:, :1])
            return self.head(self.cell(x[:, 1:], h[:, 0], mx.stop_gradient(c[:, 0]))[0])

    class TorchWhole(TorchSteps):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cell(x[:, 1], self.cell(x[:, 0]))[0])[:, None]

    report = compare(Detached("LSTM"), TorchWhole("LSTM"), draw(3, 2, 5), copy_weights=True)
    assert report.culprit == "" and "is not passed on in a" in report.cause, report


def test_options_of_cells_and_weights_that_the_code_reads() -> None:
    report = compare(Steps("RNN"), TorchSteps("RNN", nonlinearity="relu"), draw(3, 4, 5), copy_weights=True)
    assert report.culprit == "cell.l0" and report.failed_stage.name == "forward", report
    report = compare(Steps("GRU", bias=False), TorchSteps("GRU"), draw(3, 4, 5), copy_weights=True)
    assert report.culprit == "cell.l0" and "give the layers of both modules the same option bias" in report.verdict
    report = compare(
        Steps("GRU"), TorchSteps("GRU", reads=True), draw(3, 4, 5), copy_weights=True, stages=["forward"]
    )
    assert report.culprit == "" and "after" in report.where, report


def test_a_cell_in_a_trace_is_told(tmp_path: Path) -> None:
    record(TorchSteps("GRU"), draw(3, 1, 5), tmp_path / "trace", steps=1)
    report = compare(Steps("GRU"), read_trace(tmp_path / "trace"), copy_weights=True)
    assert report.culprit == "cell" and "a GRUCell with hooks or in a trace" in report.cause, report


def test_one_direction_may_have_the_name_of_the_whole_layer() -> None:
    class Named(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.rnn_back, self.head = M.GRU(5, 4), M.GRU(5, 4), M.Linear(8, 3)

        def __call__(self, x: mx.array) -> mx.array:
            return self.head(both(self.rnn, self.rnn_back, x))

    assert compare(Named(), TorchTagger(), draw(3, 7, 5), copy_weights=True, stages=["forward", "gradients"]).passed


def test_hooks_of_gradients_are_called() -> None:
    theirs = TorchTagger()
    theirs.rnn.weight_hh_l0_reverse.register_hook(lambda gradient: 2 * gradient)
    assert not compare(Tagger(), theirs, draw(3, 7, 5), copy_weights=True).passed
    options: dict[str, Any] = {"copy_weights": True, "stages": ["forward", "gradients"]}
    theirs = TorchTagger()
    theirs.rnn.register_full_backward_hook(lambda layer, inputs, outputs: (2 * inputs[0],))
    assert not compare(Tagger(), theirs, draw(3, 7, 5), **options).passed  # the layer stays whole
    theirs = TorchTagger()
    theirs.head.weight.register_hook(lambda gradient: 2 * gradient)
    report = compare(Tagger(), theirs, draw(3, 7, 5), **options)
    assert report.culprit == "head" and "multiplied by 0.5 in a" in report.cause, report


def test_a_cell_that_the_user_wrote_is_compared_with_that_of_pytorch() -> None:
    class Cell(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh = map(mx.zeros, ((4, 5), (4, 4), (4,), (4,)))

        def __call__(self, x: mx.array, h: mx.array) -> mx.array:
            return mx.tanh(mx.addmm(self.bias_ih, x, self.weight_ih.T) + mx.addmm(self.bias_hh, h, self.weight_hh.T))

    class Both(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.rnn = Cell(), M.RNN(4, 4)

        def __call__(self, x: mx.array) -> mx.array:
            return self.rnn(self.cell(x, mx.zeros((len(x), 4)))[:, None])[:, 0]

    class TorchBoth(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.rnn = T.RNNCell(5, 4), T.RNNCell(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(self.cell(x))

    report = compare(Both(), TorchBoth(), draw(3, 5), copy_weights=True, stages=["forward", "gradients"])
    assert report.passed and "rnn is compared with the RNNCell rnn" in notes(report), report
