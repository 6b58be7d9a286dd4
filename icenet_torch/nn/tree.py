"""The modules and arrays of any PyTorch model by path. The mirror is `icenet/nn/tree.py`.

Canonical paths are PyTorch's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from icenet.core.errors import WeightsError
from icenet.core.weights import layout
from icenet.core.weights.safetensors import read_ahead, read_into
from icenet_torch.nn.arrays import from_numpy, to_numpy
from icenet_torch.nn.kinds import kind_of

M = TypeVar("M", bound=nn.Module)


class NamedArray(NamedTuple):
    """A place in a model that holds an array."""

    path: str
    array: torch.Tensor
    is_trainable: bool


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields all modules with their paths, parents first; one that is used twice, under each of its paths."""
    return model.named_modules(remove_duplicate=False)


def distinct_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns all modules by canonical path, parents first; a shared one under its first path."""
    return dict(model.named_modules())


def named_arrays(model: nn.Module) -> list[NamedArray]:
    """Returns parameters and buffers, those of a module before those of its children; shared ones at each place.

    Buffers that MLX lacks (`num_batches_tracked`) are left out.
    """
    kinds = layer_kinds(model)
    return [
        NamedArray(path, array, array.requires_grad)
        for path, array in model.state_dict(keep_vars=True).items()
        if isinstance(array, torch.Tensor) and not layout.is_left_out(kinds, path)
    ]


def parameters(model: nn.Module) -> list[torch.Tensor]:
    """Returns the floating parameters, frozen ones as well."""
    return [array for array in model.parameters() if array.is_floating_point()]


def native_arrays(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns `named_arrays` by path, without gradients; a parameter that is sharded among processes as its shard."""
    arrays = {path: array for path, array, _ in named_arrays(model)}
    return {path: (a.to_local() if hasattr(a, "to_local") else a).detach() for path, a in arrays.items()}


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """Returns the kind of everything that holds arrays, by path (see `icenet.core.weights.layout`)."""
    return {path: kind for path, module in named_modules(model) if (kind := kind_of(module))}


def is_meta(model: nn.Module) -> bool:
    """Returns whether a parameter has no values: on the device meta, or in a lazy layer before its first call."""
    return any(parameter.is_meta or is_lazy(parameter) for parameter in model.parameters())


def mlx_names(model: nn.Module) -> dict[str, str]:
    """Returns the canonical path of each array by the path that it has in MLX, where the two differ.

    The MLX model is taken to have `nn.Sequential` wherever this one does.
    """
    names: dict[str, str] = {"": ""}
    for path, module in named_modules(model):
        for name in module._modules:  # not `named_children`, which leaves out a layer that is used again
            inner = f"layers.{name}" if isinstance(module, nn.Sequential) and name.isdigit() else name
            names[_join(path, name)] = _join(names[path], inner)
    found = {}
    for path in model.state_dict():
        module, _, name = path.rpartition(".")
        mlx_path = _join(names[module], name) if module in names else path
        if mlx_path != path:
            found[mlx_path] = path
    return found


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array, by path, without those that MLX lacks (`num_batches_tracked`)."""
    return {path: tuple(array.shape) for path, array in native_arrays(model).items()}


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Returns the canonical weights: arrays by path; a shared one under each of its paths."""
    return {path: to_numpy(array).copy() for path, array in native_arrays(model).items()}


@torch.no_grad()
def assign_weights(model: nn.Module, values: Iterable[tuple[str, np.ndarray]]) -> None:
    """Sets arrays of a model to canonical weights with its names and shapes; a shared one has its owner's name.

    The values need not be in memory together. One that is a view of its array has been written in place.

    Raises:
        WeightsError: An expanded buffer, several of whose values have one place in memory, would get other values.
    """
    tensors = native_arrays(model)
    if any(_is_expanded(own) for own in tensors.values()):
        values = list(values)  # checked before anything is written
        _check_expanded(tensors, values)
    for path, array in values:
        own = tensors[path]
        # PyTorch transposes 5 times as fast as numpy; on MPS some copies of strided tensors are wrong
        source = from_numpy(array, contiguous=own.device.type == "mps")
        is_view = 0 <= source.data_ptr() - own.data_ptr() < own.nbytes
        is_written = is_view and source.data_ptr() == own.data_ptr() and source.stride() == own.stride()
        if not is_written and own.device.type == "cpu" and own.is_contiguous():
            is_written = read_into(to_numpy(own), array)
        if is_written:
            torch.autograd.graph.increment_version(own)
        elif not _is_expanded(own):  # a constant, to which PyTorch cannot write, has its values
            read_ahead(array)
            own.copy_(source.clone() if is_view else source)  # a view in another order: the transpose, for example


def _check_expanded(tensors: dict[str, torch.Tensor], values: Iterable[tuple[str, np.ndarray]]) -> None:
    for path, array in values:
        own = tensors[path]
        if _is_expanded(own) and not torch.equal(own, from_numpy(array).to(own)):
            raise WeightsError(
                f"{path}: the buffer is expanded, so it cannot be set to the other values of the file; register "
                "a copy, buffer.clone(), or leave it out of the weights with persistent=False"
            )


def _is_expanded(tensor: torch.Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def host_memory(model: nn.Module) -> dict[str, np.ndarray]:
    """Returns the contiguous float32 arrays on the CPU by path, as views to write to."""
    return {
        path: array.numpy()
        for path, array in native_arrays(model).items()
        if array.device.type == "cpu" and array.dtype == torch.float32 and array.is_contiguous()
    }


@torch.no_grad()
def set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Changes the dtype of all floating parameters and buffers. Their values are undefined until they are set."""
    for _, array, _ in named_arrays(model):
        if array.is_floating_point():
            array.data = torch.empty_like(array, dtype=dtype)


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


def copy_modules(model: M) -> M:
    """Returns a copy of a model with the same parameters and buffers. A module that is used twice stays one."""
    return _copied(model, {})  # type: ignore[return-value]


# Not a function inside the other one: a function that calls itself is a cycle, which would keep the model in memory.
def _copied(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    """Returns the copy of a module.

    Args:
        copies: The copies that are made, by the id of the original.
    """
    if id(module) not in copies:
        new = copies[id(module)] = module.__class__.__new__(module.__class__)
        new.__dict__.update(module.__dict__)
        for name in ("_parameters", "_buffers"):
            new.__dict__[name] = dict(module.__dict__[name])
        new.__dict__["_modules"] = {
            name: None if child is None else _copied(child, copies) for name, child in module._modules.items()
        }
    return copies[id(module)]
