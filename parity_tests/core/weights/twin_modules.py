"""Modules of MLX and their twins in PyTorch: of one layer, and of a network; and how their results are compared."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
pytest.importorskip("mlx")
importlib.import_module("icenet.blas")  # before mlx.core
mx: Any = importlib.import_module("mlx.core")
mnn: Any = importlib.import_module("mlx.nn")
tnn: Any = torch.nn


class Net(mnn.Module):  # type: ignore[misc]
    """A module with one layer, or a list of layers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer


class TorchNet(tnn.Module):  # type: ignore[misc]
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer


class Mine(mnn.Module):  # type: ignore[misc]
    """A network as users write it: a list, a dict, a Sequential, arrays of its own, a tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = mnn.Embedding(11, 8)
        self.blocks = [Block() for _ in range(2)]
        self.heads = {"a": mnn.Linear(8, 3), "b": mnn.Linear(8, 4)}
        self.stem = mnn.Sequential(mnn.Conv2d(1, 4, 3), mnn.ReLU(), mnn.Sequential(mnn.Conv2d(4, 5, (2, 3))))
        self.position = mx.zeros((6, 8))
        self.table = mx.zeros((3,), mx.int32)
        self.freeze(keys=["table"], recurse=False)
        self._cache = mx.zeros((2,))


class Block(mnn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.attention = mnn.MultiHeadAttention(8, 2, bias=True)
        self.norm = mnn.LayerNorm(8)


class Theirs(tnn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.wte = tnn.Embedding(11, 8)
        self.h = tnn.ModuleList([TheirBlock() for _ in range(2)])
        self.heads = tnn.ModuleDict({"a": tnn.Linear(8, 3), "b": tnn.Linear(8, 4)})
        self.stem = tnn.Sequential(tnn.Conv2d(1, 4, 3), tnn.ReLU(), tnn.Sequential(tnn.Conv2d(4, 5, (2, 3))))
        self.position = tnn.Parameter(torch.zeros(6, 8))
        self.register_buffer("table", torch.tensor([3, 1, 2]))
        self.register_buffer("mask", torch.ones(4))
        self.lm_head = tnn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight


class TheirBlock(tnn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.attn = tnn.MultiheadAttention(8, 2, batch_first=True)
        self.ln = tnn.LayerNorm(8)


def randomize(module: Any, seed: int = 0) -> Any:
    """Sets all parameters and statistics of a PyTorch module to random values; variances are positive."""
    draw = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                values = draw.uniform(0.5, 1.5, tensor.shape) if "var" in name else draw.normal(0, 0.4, tensor.shape)
                tensor.copy_(torch.from_numpy(values))
    return module


def close(ours: Any, theirs: Any, exact: Any) -> bool:
    """Returns whether the error of ours is at most 8 times that of PyTorch, or 8 times the rounding of the values."""
    exact = np.asarray(exact, np.float64)
    noise = max(np.abs(np.asarray(theirs) - exact).max(), np.abs(exact).max() * 2.0**-24)
    return bool(np.abs(np.asarray(ours) - exact).max() <= 8 * noise)
