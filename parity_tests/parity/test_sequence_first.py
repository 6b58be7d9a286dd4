"""Layers of PyTorch that take the sequence first, [L, B, D], next to those of MLX, which take [B, L, D]."""

from __future__ import annotations

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

from icenet.parity import Report, compare


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    torch.manual_seed(0)


class Block(M.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.attn, self.norm = M.MultiHeadAttention(8, 2, bias=True), M.LayerNorm(8)
        self.up, self.down, self.drop = M.Linear(8, 16), M.Linear(16, 8), M.Dropout(0.1)
        self._fault = fault

    def __call__(self, x: mx.array) -> mx.array:
        y = self.norm(x)
        if self._fault == "axes":
            y = y.swapaxes(0, 1)
        y = self.attn(y, y, y)
        if self._fault == "axes":
            y = y.swapaxes(0, 1)
        x = y if self._fault == "residual" else x + y
        y = self.up(x)
        return x + self.drop(self.down(M.relu(y) if self._fault == "gelu" else M.gelu(y)))


class Net(M.Module):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.embed, self.head = M.Embedding(11, 8), M.Linear(8, 3)
        self.blocks = [Block(fault), Block("")]

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TorchBlock(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = T.MultiheadAttention(8, 2), T.LayerNorm(8)
        self.up, self.down, self.drop = T.Linear(8, 16), T.Linear(16, 8), T.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.drop(self.down(F.gelu(self.up(x))))


class TorchNet(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = T.Embedding(11, 8), T.Linear(8, 3)
        self.blocks = T.ModuleList([TorchBlock(), TorchBlock()])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids.t())
        for block in self.blocks:
            x = block(x)
        return self.head(x).transpose(0, 1)


def report_of(fault: str, ids: Any) -> Report:
    return compare(Net(fault), TorchNet(), ids, stages=["structure", "forward", "gradients"])


@pytest.mark.parametrize("shape", [(3, 7), (4, 4)])
def test_correct_twins_pass_in_all_modules(shape: tuple[int, int]) -> None:
    report = report_of("", tokens(*shape, below=11))
    assert report.passed, report
    assert not [note for note in report.notes if "other rows" in note]
    assert {"blocks.0.attn", "blocks.1.up"} <= {row.path for stage in report.stages for row in stage.rows}


@pytest.mark.parametrize(
    ("fault", "culprit", "cause"),
    [
        ("axes", "blocks.0.attn", "[L, B, D] in b (batch_first=False), [B, L, D] in a"),
        ("residual", "blocks.0", "the input is not added in a"),
        ("gelu", "blocks.0", "ReLU in a, exact GELU in b"),
    ],
)
def test_faults_are_named_at_their_module(fault: str, culprit: str, cause: str) -> None:
    report = report_of(fault, tokens(3, 7, below=11))
    assert report.culprit == culprit and cause in report.cause, report.verdict


class Series(M.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.lstm = M.Linear(4, 6), M.LSTM(6, 6)

    def __call__(self, x: mx.array) -> mx.array:
        return self.lstm(mx.tanh(self.up(x)))[0]


class TorchSeries(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.lstm = T.Linear(4, 6), T.LSTM(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(F.relu(self.up(x.transpose(0, 1))))[0].transpose(0, 1)


def test_a_recurrent_layer() -> None:
    report = compare(Series(), TorchSeries(), draw(2, 7, 4), stages=["forward"])
    assert report.culprit == "" and "tanh in a, ReLU in b" in report.cause, report.verdict


def test_axes_are_exchanged_only_in_models_that_have_such_layers() -> None:
    """Otherwise a swapped batch is a difference of the caller, and a layer within gets other rows."""

    class Swapped(M.Module):
        def __init__(self, is_restored: bool) -> None:
            super().__init__()
            self.up, self.down, self.is_restored = M.Linear(4, 6), M.Linear(6, 2), is_restored

        def __call__(self, x: mx.array) -> mx.array:
            y = self.down(self.up(x).swapaxes(0, 1))
            return y.swapaxes(0, 1) if self.is_restored else y

    class Straight(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = T.Linear(4, 6), T.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x))

    report = compare(Swapped(True), Straight(), draw(2, 7, 4), stages=["forward"])
    assert report.passed and any(note.startswith("down: called with other rows") for note in report.notes), report
    report = compare(Swapped(False), Straight(), np.asarray(draw(2, 7, 4)))
    assert report.culprit == "" and report.failed_stage is not None
    assert report.failed_stage.name == "structure", report.verdict
