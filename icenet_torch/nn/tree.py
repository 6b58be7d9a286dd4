"""The modules and arrays of any PyTorch model by path. The mirror is `icenet/nn/tree.py`.

Canonical paths are PyTorch's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from icenet_torch.nn.kinds import kind_of


class NamedArray(NamedTuple):
    """A place in a model that holds an array."""

    path: str
    array: torch.Tensor
    is_trainable: bool


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields all modules with their paths, parents first; one that is used twice, under each of its paths."""
    return model.named_modules(remove_duplicate=False)


def named_arrays(model: nn.Module) -> list[NamedArray]:
    """Returns parameters and buffers, those of a module before those of its children; shared ones at each place."""
    arrays = model.state_dict(keep_vars=True)
    return [NamedArray(path, array, array.requires_grad) for path, array in arrays.items()]


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """Returns the kind of everything that holds arrays, by path (see `icenet.core.weights.layout`)."""
    return {path: kind for path, module in named_modules(model) if (kind := kind_of(module))}


def mlx_names(model: nn.Module) -> dict[str, str]:
    """Returns the canonical path of each array by the path that it has in MLX, where the two differ.

    The MLX model is taken to have `nn.Sequential` wherever this one does.
    """
    names: dict[str, str] = {"": ""}
    for path, module in named_modules(model):
        for name, _ in module.named_children():
            inner = f"layers.{name}" if isinstance(module, nn.Sequential) and name.isdigit() else name
            names[_join(path, name)] = _join(names[path], inner)
    found = {}
    for path in model.state_dict():
        module, _, name = path.rpartition(".")
        mlx_path = _join(names[module], name) if module in names else path
        if mlx_path != path:
            found[mlx_path] = path
    return found


def unregistered(model: nn.Module) -> list[str]:
    """Returns the paths of plain lists, tuples and dicts with layers, which PyTorch neither trains nor saves."""
    known = {id(module) for module in model.modules()} | {id(p) for p in model.parameters()}

    def is_unknown(value: Any) -> bool:
        if isinstance(value, (list, tuple, dict)):
            return any(map(is_unknown, value.values() if isinstance(value, dict) else value))
        return isinstance(value, (nn.Module, nn.Parameter)) and id(value) not in known

    return [
        _join(path, name)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (list, tuple, dict)) and not name.startswith("_") and is_unknown(value)
    ]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
