"""Random numbers as a pure function of a key, MLX. They equal those of `icenet.core.rng` bit for bit.

MLX's own generator is not used. `find_draw` finds the module that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from icenet.nn.arrays import Array


def random_bits(keys: Array, n: int) -> Array:
    """Returns `n` random words under each key: keys uint32 `[rows, 2]` to uint32 `[rows, n]`."""
    # MLX's random bits are not public, but `split` returns them: two words per key
    draw = mx.vmap(lambda key: mx.random.split(key, (n + 1) // 2))
    return draw(keys).reshape(keys.shape[0], -1)[:, :n]


def random_uniform(keys: Array, n: int) -> Array:
    """Returns uniform variates in [0, 1) under each key: keys uint32 `[..., 2]` to fp32 `[..., n]`."""
    draw = mx.vmap(lambda key: mx.random.uniform(shape=(n,), key=key))
    return draw(keys.reshape(-1, 2)).reshape(*keys.shape[:-1], n)


def to_keys(keys: np.ndarray) -> Array:
    """Returns keys, uint32 numpy `[..., 2]`, as an array of the framework, uint32."""
    return mx.array(keys)


def generator_state() -> bytes:
    """Returns the state of MLX's own generator."""
    state: Any = mx.random.state
    return np.array(state[0]).tobytes()


def find_draw(
    modules: Iterable[tuple[str, nn.Module]], call: Callable[[], object], states: Callable[[], object]
) -> tuple[str, nn.Module] | None:
    """Makes a call and returns the first module that changes the state of a random generator in it, and its path.

    Args:
        modules: All modules of a model, by path.
        call: Calls the model.
        states: Returns the states of the generators.

    Returns:
        The innermost module; None if the states stay.
    """
    paths: dict[int, str] = {}
    found: list[tuple[str, nn.Module]] = []
    watchers: dict[type, type] = {}
    changed: list[tuple[nn.Module, type]] = []

    def watcher(cls: type) -> type:
        def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            before = states()
            outputs = cls.__call__(self, *args, **kwargs)
            if states() != before:
                found.append((paths[id(self)], self))
            return outputs

        return type(cls.__name__, (cls,), {"__call__": watched})

    try:
        # MLX looks `__call__` up on the class, so the class of each module is replaced for the call
        for path, module in modules:
            if paths.setdefault(id(module), path) == path:
                cls = type(module)
                changed.append((module, cls))
                object.__setattr__(module, "__class__", watchers.setdefault(cls, watcher(cls)))
        call()
    finally:
        for module, cls in changed:
            object.__setattr__(module, "__class__", cls)
    return found[0] if found else None
