"""Random numbers that a model draws without a key, from the generators of the framework, Python and numpy."""

from __future__ import annotations

import random
from collections.abc import Callable
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


def check_draws(backend: str, nn: Any, module: Any, call: Callable[[], object]) -> None:
    """Makes a call and checks that no module draws random numbers without a key in it.

    Args:
        backend: mlx or torch.
        nn: The backend's `nn` package.
        module: The module that is called; its parts are searched.
        call: Calls it.

    Raises:
        UsageError: A module draws from a generator of the framework, Python or numpy.
    """
    drawing = nn.random.find_draw(nn.tree.named_modules(module), call, lambda: generator_states(nn))
    if drawing is not None:
        raise unkeyed_draw(backend, *drawing)


def generator_states(nn: Any) -> tuple[object, ...]:
    """Returns the states of the generators of the framework of an `nn` package, Python and numpy."""
    return nn.random.generator_state(), *host_states()
