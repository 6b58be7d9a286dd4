"""Runs and replays that are left out because others show the same, and what they must not hide."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw

from icenet.parity import compare
from icenet.parity.calls.module_side import ModuleSide

IMAGES = draw(4, 6, 6, 3)


class Images(M.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv, self.norm = M.Conv2d(3, 8, 3), M.BatchNorm(8, **options)

    def __call__(self, x: mx.array) -> mx.array:
        return M.relu(self.norm(self.conv(x)))


class TorchImages(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = T.Conv2d(3, 8, 3), T.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"eps": 1e-3}, {"momentum": 0.3}])
def test_a_model_of_batch_norms_runs_in_training_mode(options: dict[str, Any]) -> None:
    """Its norms are compared in evaluation mode, too. What differs is found in the mode in which it appears first."""
    torch.manual_seed(0)
    modes: list[bool] = []
    b = TorchImages()
    b.conv.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    report = compare(Images(**options), b, IMAGES, copy_weights=True)
    assert report.passed == (not options) == all(modes), report
    if report.passed:
        rows = [row for row in report.stages[2].rows if row.note == "in evaluation mode"]
        assert [row.path for row in rows] == ["norm"] and rows[0].ratio < 8
    else:
        assert report.culprit == "norm" and report.failed_stage.name == "forward", report.verdict
        assert next(iter(options)) in report.cause or "track" in next(iter(options)), report.verdict


@pytest.mark.parametrize(
    ("layer", "is_of_norms"),
    [
        (T.Sequential(T.Conv2d(3, 8, 3), T.BatchNorm2d(8), T.ReLU()), True),
        (T.Sequential(T.BatchNorm1d(8), T.Dropout(0.0)), True),
        (T.Sequential(T.BatchNorm1d(8), T.Dropout(0.1)), False),
        (T.Sequential(T.BatchNorm1d(8), T.RReLU()), False),
        (T.ModuleList([T.BatchNorm1d(8), T.MultiheadAttention(8, 2)]), False),  # has a fast path in evaluation mode
        (M.Sequential(M.Conv2d(3, 8, 3), M.BatchNorm(8)), True),
        (M.Sequential(M.BatchNorm(8), M.Dropout(0.1)), False),
    ],
)
def test_only_norms_depend_on_the_mode(layer: Any, is_of_norms: bool) -> None:
    assert ModuleSide(layer, "fp32").is_mode_of_norms == is_of_norms


class Block(M.Module):
    def __init__(self, largest: float, stops: bool) -> None:
        super().__init__()
        self.fc, self.largest, self.stops = M.Linear(6, 6), largest, stops

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.minimum(x, self.largest)
        return x + 1e-6 * self.fc(mx.stop_gradient(y) if self.stops else y)


class Blocks(M.Module):
    def __init__(self, largest: float, stops: bool) -> None:
        super().__init__()
        self.blocks = [Block(99, False), Block(99, False), Block(largest, stops)]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = block(x)
        return x


class TorchBlock(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.largest = T.Linear(6, 6), 99

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1e-6 * self.fc(x.clamp(max=self.largest))


class TorchBlocks(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = T.ModuleList([TorchBlock() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("largest", "stops"), [(99, False), (20, False), (99, True)])
def test_a_block_of_another_attribute_is_replayed(largest: float, stops: bool) -> None:
    """Of blocks with equal code and attributes only the first is computed on larger inputs, and backward."""
    torch.manual_seed(0)
    report = compare(Blocks(largest, stops), TorchBlocks(), draw(4, 6), copy_weights=True)
    is_equal = largest == 99 and not stops
    assert report.passed == is_equal, report
    assert report.culprit == (None if is_equal else "blocks.2"), report.verdict
