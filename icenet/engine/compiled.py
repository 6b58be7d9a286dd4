"""Compiled functions of batches, MLX. PyTorch captures the passes of a step (`icenet_torch.engine.capture`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

MAX_SHAPES = 16
"""Number of shapes of batches for which a function is compiled. Each is traced, which takes about a second."""


class Compiled:
    """A compiled function of batches. Batches of further shapes are computed without compilation.

    Args:
        function: Takes a dictionary of arrays first.
        state: Arrays that the function reads (`inputs`) and replaces (`outputs`), for `mx.compile`.
    """

    def __init__(self, function: Any, **state: Any) -> None:
        self._function = function
        self._compiled = mx.compile(function, **state)
        self._shapes: set[Any] = set()

    def __call__(self, arrays: Mapping[str, mx.array], *arguments: Any) -> Any:
        shape = tuple((name, tuple(array.shape)) for name, array in arrays.items())
        if shape not in self._shapes and len(self._shapes) == MAX_SHAPES:
            return self._function(arrays, *arguments)
        self._shapes.add(shape)
        return self._compiled(arrays, *arguments)
