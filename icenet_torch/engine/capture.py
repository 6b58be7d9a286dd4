"""The passes of a training step as a CUDA graph. MLX submits a step as one graph by itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from icenet.core.engine import MicroBatch

Passes: TypeAlias = Callable[[Sequence[MicroBatch], Tensor], Tensor]
"""Sets `grad` of the parameters, and returns the loss, of micro-batches and `factors` (see `CapturedPasses`)."""

EAGER_STEPS = 2
"""Steps of a shape before it is captured. Libraries are initialized in them."""
MAX_GRAPHS = 4
"""Number of shapes that are captured. Batches of texts of many lengths are computed without a graph."""


class CapturedPasses:
    """Forward and backward passes whose kernels are started together: the host needs 0.1 ms instead of 10 to 40 ms.

    The graph reads and writes the same memory each time: the batch is copied there, and the gradients of a step
    replace those of the step before. The results are those of the passes, bit for bit.

    Args:
        passes: The passes. They depend on their arguments and on the arrays of the model only.
        model: The model. It is not captured while one of its modules has a hook, which a graph would not call.
    """

    def __init__(self, passes: Passes, model: nn.Module) -> None:
        self._passes = passes
        self._model = model
        self._seen: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, parts: Sequence[MicroBatch], factors: Tensor) -> Tensor:
        """Sets `grad` of the parameters, and returns the loss.

        Args:
            parts: The micro-batches.
            factors: For each, its share and its share times the loss scale, `[N, 2]` on the device.
        """
        key = tuple((tuple(array.shape), array.dtype) for array in _arrays(parts))
        graph = self._graphs.get(key)
        if graph is not None:
            return graph.replay(parts, factors)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= EAGER_STEPS or len(self._graphs) == MAX_GRAPHS or self._has_hooks():
            return self._passes(parts, factors)
        try:
            self._graphs[key] = graph = _Graph(self._passes, self._model, parts, factors)
        except torch.cuda.OutOfMemoryError:  # the memory of a graph is not shared with that of other passes
            self._seen[key] = -(2**62)
            return self._passes(parts, factors)
        return graph.replay(parts, factors)

    def _has_hooks(self) -> bool:
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._model.modules())


class _Graph:
    """A graph and its memory."""

    def __init__(self, passes: Passes, model: nn.Module, parts: Sequence[MicroBatch], factors: Tensor) -> None:
        self._parts = [
            part._replace(arrays=_clones(part.arrays), dropout_keys=_clone(part.dropout_keys)) for part in parts
        ]
        self._factors = factors.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = passes(self._parts, self._factors)
        self._gradients = [(parameter, parameter.grad) for parameter in model.parameters()]

    def replay(self, parts: Sequence[MicroBatch], factors: Tensor) -> Tensor:
        for own, new in zip([*_arrays(self._parts), self._factors], [*_arrays(parts), factors], strict=True):
            own.copy_(new)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss


def _arrays(parts: Sequence[MicroBatch]) -> list[Tensor]:
    return [array for part in parts for array in (*part.arrays.values(), part.dropout_keys) if array is not None]


def _clones(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: array.clone() for name, array in arrays.items()}


def _clone(array: Tensor | None) -> Tensor | None:
    return None if array is None else array.clone()
