"""Canonical weights of any `mlx.nn.Module` and `torch.nn.Module`, not only of IceNet's models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.weights import arrays, sharing
from icenet.core.weights import files as weight_files


def get_weights(module: Any) -> dict[str, np.ndarray]:
    """Returns the canonical weights of a module: numpy arrays with PyTorch's names and axes.

    Args:
        module: Any `mlx.nn.Module` or `torch.nn.Module`.

    Raises:
        UsageError: It is neither.
        WeightsError: A layer has a parameter whose axes are not known.
    """
    found: dict[str, np.ndarray] = _tree(module).weights(module)
    return found


def set_weights(module: Any, values: Mapping[str, np.ndarray]) -> None:
    """Sets the weights of a module.

    Args:
        module: Any `mlx.nn.Module` or `torch.nn.Module`.
        values: Canonical weights: every weight of the module and no other, in PyTorch's axes, such as the result of
            `get_weights` of its twin or of `icenet.core.weights.read`.

    Raises:
        UsageError: It is no module.
        WeightsError: A name, a shape or a dtype does not match; the module is unchanged.
    """
    tree = _tree(module)
    shared = shared_arrays(module)
    complete = sharing.complete(sharing.renamed(arrays.NumpyWeights(values), tree.mlx_names(module)), shared)
    weight_files.check(tree.weight_shapes(module), {path: tuple(array.shape) for path, array in complete.items()})
    arrays.check_dtypes({path: str(array.dtype) for path, array, _ in tree.named_arrays(module)}, complete)
    tree.assign_weights(module, ((path, array) for path, array in complete.items() if path not in shared))


def copy_weights(source: Any, destination: Any) -> None:
    """Copies the weights of a module to its twin, on the same backend or the other one; see `set_weights`."""
    set_weights(destination, get_weights(source))


def shared_arrays(module: Any) -> dict[str, str]:
    """Returns the owner's path of each further path of an array that a module shares (see `sharing`)."""
    return sharing.find_shared((path, array) for path, array, _ in _tree(module).named_arrays(module))


def _tree(module: Any) -> Any:
    return backends.module(backends.backend_of(module), "nn.tree")
