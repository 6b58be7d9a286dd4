"""A module of MLX with one layer and its twin in PyTorch, random values for both, and how results are compared."""

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
