"""Random numbers that a model draws without a key, from the generators of the framework, Python and numpy."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from icenet.core.errors import UsageError

_FRAMEWORKS = {"mlx": "MLX", "torch": "PyTorch"}


def host_states() -> tuple[object, ...]:
    """Returns the states of the generators of Python's `random` and `numpy.random`."""
    state: Any = np.random.get_state(legacy=False)
    return random.getstate(), state["state"]["key"].tobytes(), state["state"]["pos"], state["gauss"]


def unkeyed_draw(backend: str, path: str, module: Any) -> UsageError:
    """Returns the error about a module that draws random numbers without a key.

    Args:
        backend: mlx or torch.
        path, module: The module and its path; the path of the model itself is empty.
    """
    name = f"{path} ({type(module).__name__})" if path else f"forward of {type(module).__name__}"
    return UsageError(
        f"{name} draws random numbers without a key, so they differ between MLX and PyTorch: use nn.Dropout of "
        f"{_FRAMEWORKS[backend]}, or set training.rng to native, with which the backends cannot be compared"
    )
