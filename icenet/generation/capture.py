"""The captured step of a decoder, MLX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core.generation.decoder import Choice, State, Step
from icenet.core.nn.classes import change_classes
from icenet.nn import tree

CAPTURED_TYPES: dict[type, type] = {}
"""Classes of modules, and the classes that compute the same with fused kernels where a step is captured."""


def fuse_kernels(model: nn.Module) -> None:
    """Gives the modules of a model that generates their classes with fused kernels, in place; subclasses stay."""
    change_classes(tree.named_modules(model), CAPTURED_TYPES)


KEPT_STEPS = 8
"""Number of captured steps that a model keeps for later requests."""


def kept_steps(model: nn.Module) -> dict[Any, CapturedStep]:
    """Returns the captured steps of a model that generates, by what they were captured for, the latest last."""
    steps: dict[Any, CapturedStep] | None = getattr(model, "_captured_steps", None)
    if steps is None:
        steps = {}
        object.__setattr__(model, "_captured_steps", steps)  # MLX would take a dict for a part of the module
    return steps


class CapturedStep:
    """A step that `mx.compile` traces once and runs again with other arrays.

    Tracing fuses elementwise operations into one kernel, and the Python code of the operations runs only once.

    Args:
        step: `DecoderBase.decode_step`, which depends on its arrays only.
        state, token: The arguments of the first call.
    """

    def __init__(self, step: Step, state: State, token: mx.array) -> None:
        self.size = len(state.cache)
        self.has_keys, self.has_seen = state.keys is not None, state.seen is not None

        def run(token: mx.array, *arrays: mx.array) -> tuple[list[mx.array], list[mx.array]]:
            after, choice = step(self._join(arrays), token)
            return after.arrays, list(choice)

        self._run = mx.compile(run)

    def _join(self, arrays: Sequence[mx.array]) -> State:
        others = iter(arrays[self.size :])
        index = next(others)
        keys = next(others) if self.has_keys else None
        return State(list(arrays[: self.size]), index, keys, next(others) if self.has_seen else None)

    def __call__(self, state: State, token: mx.array) -> tuple[State, Choice]:
        arrays, choice = self._run(token, *state.arrays)
        return self._join(arrays), Choice(*choice)
