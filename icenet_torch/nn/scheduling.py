"""When the operations of a forward pass start, PyTorch."""

from __future__ import annotations

from icenet_torch.nn.arrays import Array


def start(x: Array) -> None:
    """Does nothing: PyTorch's operations start when they are called."""
