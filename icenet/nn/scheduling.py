"""When the operations of a forward pass start, MLX."""

from __future__ import annotations

import contextlib

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array, on_cpu


def start(x: Array) -> None:
    """Starts to compute x on a GPU, while Python describes the operations that follow.

    Otherwise the device waits until the whole graph is made: 1 to 2 ms for 12 layers, a quarter of the time of
    8 x 1024 tokens on an H200. It does nothing where MLX transforms the function (`mx.grad`, `mx.compile`).

    Args:
        x: An array of any shape and dtype.
    """
    if not on_cpu():
        with contextlib.suppress(ValueError):  # of a graph that is being transformed
            mx.async_eval(x)
