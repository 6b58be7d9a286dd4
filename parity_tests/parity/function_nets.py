"""Modules of both frameworks whose call is given as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.nn as M
import torch.nn as T


class Net(M.Module):
    """A module whose call is a function of it and of its input, so that a test has both in one place."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, x: Any) -> Any:
        return self.function(self, x)


class TorchNet(T.Module):
    """See `Net`."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)
