"""The modules and arrays of any MLX model by canonical path. The mirror is `icenet_torch/nn/tree.py`.

Canonical paths are PyTorch's names. A list is a `ModuleList` or `ParameterList`, a dict a `ModuleDict` or
`ParameterDict`, and the parts of `nn.Sequential` are named `features.0`, where MLX has `features.layers.0`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from icenet.core.errors import UsageError
from icenet.core.weights import layout
from icenet.core.weights.copying import contiguous, copy_to
from icenet.core.weights.safetensors import read_ahead, read_into, release
from icenet.core.weights.sharing import OTHER_NAMES, find_shared
from icenet.nn.arrays import filled, from_numpy, on_cpu, to_numpy
from icenet.nn.kinds import kind_of

M = TypeVar("M", bound=nn.Module)


class _Node(NamedTuple):
    """A module, list or dict in a model."""

    path: str
    mlx_path: str
    holder: Any
    module: nn.Module
    """The module that contains it; a module contains itself."""
    key: str
    """Its key in that module, as in `nn.Module.freeze`; empty for a module."""
    is_hidden: bool
    """Whether it is below an attribute that begins with "_", whose arrays MLX takes for no parameters."""
    is_frozen: bool
    """Whether a container of it is frozen as a whole."""

    @property
    def items(self) -> list[tuple[Any, Any]]:
        return list(self.holder.items() if isinstance(self.holder, dict) else enumerate(self.holder))

    def key_of(self, name: Any) -> str:
        return f"{self.key}.{name}" if self.key else str(name)


class NamedArray(NamedTuple):
    """A place in a model that holds an array."""

    path: str
    array: mx.array
    is_trainable: bool


class _Place(NamedTuple):
    path: str
    mlx_path: str
    holder: Any
    key: Any
    is_trainable: bool


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields all modules with their paths, parents first; one that is used twice, under each of its paths."""
    return ((node.path, node.holder) for node in _nodes(model) if isinstance(node.holder, nn.Module))


def distinct_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns all modules by canonical path, parents first; a shared one under its first path."""
    first: dict[int, tuple[str, nn.Module]] = {}
    for path, module in named_modules(model):
        first.setdefault(id(module), (path, module))
    return dict(first.values())


def named_arrays(model: nn.Module) -> list[NamedArray]:
    """Returns parameters and buffers, those of a module before those of its children; shared ones at each place."""
    return [NamedArray(place.path, place.holder[place.key], place.is_trainable) for place in _places(model)]


def parameters(model: nn.Module) -> list[mx.array]:
    """Returns the floating parameters that are not frozen: frozen ones are as buffers in MLX."""
    return [array for _, array, is_trainable in named_arrays(model) if is_trainable]


def native_arrays(model: nn.Module) -> dict[str, mx.array]:
    """Returns `named_arrays` by path."""
    return {path: array for path, array, _ in named_arrays(model)}


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """Returns the kind of everything that holds arrays, by path (see `icenet.core.weights.layout`)."""
    nodes = _nodes(model)
    modules = ((node.path, node.holder) for node in nodes if isinstance(node.holder, nn.Module))
    kinds = {path: kind for path, module in modules if (kind := kind_of(module))}
    for node in nodes:
        if not isinstance(node.holder, nn.Module) and any(isinstance(value, mx.array) for _, value in node.items):
            kinds.setdefault(node.path, "plain")
    for other, owner in _other_names(nodes):
        (module, name), kind = layout.split(other.path), layout.parameter_kind(kinds, owner.path)
        kinds.setdefault(module, "plain")
        if layout.rule(kind, layout.split(owner.path)[1]) != layout.rule(kinds[module], name):
            kinds[module] += f" {name}={kind}"
    return kinds


def is_meta(model: nn.Module) -> bool:
    """Returns False: MLX's arrays are lazy, and a value that is not read is not computed."""
    return False


def mlx_names(model: nn.Module) -> dict[str, str]:
    """Returns the canonical path of each array by MLX's own path, where the two differ."""
    return {place.mlx_path: place.path for place in _places(model) if place.mlx_path != place.path}


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the canonical shape of each array, by path."""
    kinds = layer_kinds(model)
    return {
        path: layout.torch_shape(layout.parameter_kind(kinds, path), path.rpartition(".")[2], array.shape)
        for path, array in native_arrays(model).items()
    }


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Returns the canonical weights: arrays with PyTorch's axes by path; a shared one under each of its paths."""
    arrays = named_arrays(model)
    shared = find_shared((path, array) for path, array, _ in arrays)
    values = {path: to_numpy(array) for path, array, _ in arrays if path not in shared}
    return layout.tree_to_torch({path: values[shared.get(path, path)] for path, _, _ in arrays}, layer_kinds(model))


def assign_weights(model: nn.Module, values: Iterable[tuple[str, np.ndarray]]) -> None:
    """Sets arrays of a model to canonical weights with its names and shapes; a shared one has its owner's name.

    Each array is computed before the next value is read, so the values need not be in memory together. On a CPU,
    weights that generation joins become parts of one array here: joining them later would copy them. (First token of
    a Llama with 5 layers of the 1.5B shape: 0.82 of the processor time of the process, 185 MB less memory.)
    """
    own, kinds = Arrays(model, trainable=False), layer_kinds(model)
    before = own.get()
    dtypes = {path: array.dtype for path, array in before.items()}
    groups = {path: group for group in _joined_paths(model, before) for path in group} if on_cpu() else {}
    del before
    waiting: dict[str, np.ndarray] = {}

    def assign(paths: tuple[str, ...], arrays: list[np.ndarray]) -> None:
        found = _from_large_numpy(arrays, dtypes[paths[0]])
        own.set(dict(zip(paths, found, strict=True)))
        mx.eval(found)
        for array in arrays[:-1]:  # the caller has released them before they were copied
            release(array)

    for path, array in values:
        waiting[path] = layout.mlx_view(layout.parameter_kind(kinds, path), layout.split(path)[1], array)
        group = groups.get(path, (path,))
        if all(part in waiting for part in group):
            assign(group, [waiting.pop(part) for part in group])
    for path, array in waiting.items():
        assign((path,), [array])


def _joined_paths(model: nn.Module, arrays: Mapping[str, mx.array]) -> Iterator[tuple[str, ...]]:
    """Yields the paths of weights that generation joins (see `icenet.nn.linear.join`), in their order.

    Args:
        arrays: The arrays of the model by path, under one path if they are shared.
    """
    for path, module in named_modules(model):
        paths = tuple(_join(path, f"{name}.weight") for name in getattr(module, "joined_layers", ()))
        weights = [arrays[each] for each in paths if each in arrays]
        if paths and len(weights) == len(paths) and len({(each.dtype, each.shape[1:]) for each in weights}) == 1:
            yield paths


def _from_large_numpy(arrays: Sequence[np.ndarray], dtype: mx.Dtype) -> list[mx.array]:
    """Returns what `from_numpy` returns, in a dtype; on a CPU it is written by several threads.

    MLX copies and casts in one thread. (6 GB of fp32 weights of a bf16 file: 5 s of processor time instead of 14.)

    Args:
        arrays: One array, or several that become parts of one array along the first axis.
        dtype: The dtype.
    """
    if dtype == mx.float64:  # which MLX has on a CPU
        return [mx.array(contiguous(array), mx.float64) for array in arrays]
    if (
        not on_cpu()
        or any(str(array.dtype) not in _EXACT.get(dtype, ()) for array in arrays)
        or arrays[0].nbytes < _LARGE
    ):
        for array in arrays:
            read_ahead(array)
        return [from_numpy(array).astype(dtype) for array in arrays]
    ends = list(itertools.accumulate(array.shape[0] for array in arrays)) if len(arrays) > 1 else []
    shape = (ends[-1], *arrays[0].shape[1:]) if ends else arrays[0].shape

    def fill(target: np.ndarray) -> None:
        for part, array in zip(np.split(target, ends[:-1]) if ends else [target], arrays, strict=True):
            if not read_into(part, array):
                read_ahead(array)
                copy_to(part, array)

    found = filled(shape, _NUMPY[dtype], fill)
    return list(mx.split(found, ends[:-1])) if ends else [found]


_EXACT: dict[mx.Dtype, tuple[str, ...]] = {
    mx.float32: ("float32", "float16", "bfloat16"),
    mx.float16: ("float16",),
    mx.bfloat16: ("bfloat16",),
}
"""Dtypes of numpy whose values a dtype has without rounding."""
_NUMPY = {
    mx.float32: np.dtype(np.float32),
    mx.float16: np.dtype(np.float16),
    mx.bfloat16: np.dtype(ml_dtypes.bfloat16),
}
_LARGE = 1 << 20
"""Bytes from which an array takes longer to copy than a file object takes to make."""


def set_biases(model: nn.Module, added: Iterable[str], removed: Iterable[str]) -> None:
    """Gives linear and norm layers a bias of zeros, or takes it away, by path. They test whether they have one.

    A new bias has the dtype of the weight, and is frozen if the weight is.
    """
    modules = dict(named_modules(model))
    for path in added:
        layer = modules[layout.split(path)[0]]
        layer.bias = mx.zeros(layer.weight.shape[:1], layer.weight.dtype)
        if "weight" in layer._no_grad:
            layer.freeze(keys="bias", recurse=False)
    for path in removed:
        modules[layout.split(path)[0]].pop("bias", None)


def host_memory(model: nn.Module) -> dict[str, np.ndarray]:
    """Returns no arrays: those of a new model are lazy, and a view would compute values that are then replaced."""
    return {}


def set_dtype(model: nn.Module, dtype: mx.Dtype) -> None:
    """Changes the dtype of all floating parameters and buffers. Their values are undefined until they are set."""
    own = Arrays(model, trainable=False)
    for path, array in own.get().items():
        if mx.issubdtype(array.dtype, mx.floating):
            own.set({path: mx.zeros(array.shape, dtype)})


def unregistered(model: nn.Module) -> list[str]:
    """Returns the paths of tuples with layers or arrays, which MLX neither trains nor saves."""
    known = {id(value) for node in _nodes(model) for _, value in (("", node.holder), *node.items)}

    def is_unknown(value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return any(map(is_unknown, value))
        return isinstance(value, (nn.Module, mx.array)) and id(value) not in known

    return [
        _join(node.path, name)
        for node in _nodes(model)
        for name, value in node.items
        if not node.is_hidden and isinstance(value, tuple) and not str(name).startswith("_") and is_unknown(value)
    ]


class Arrays:
    """The parameters of a module by path, read and written in place. An array that is shared has one path.

    Args:
        model: Any module. Its modules, lists and dicts must stay the same objects.
        trainable: Leave out buffers.
    """

    def __init__(self, model: nn.Module, trainable: bool = True) -> None:
        places = _places(model)
        shared = find_shared((place.path, place.holder[place.key]) for place in places)
        self._places: dict[str, list[_Place]] = {}
        for place in places:
            if not trainable or place.is_trainable:
                self._places.setdefault(shared.get(place.path, place.path), []).append(place)

    def get(self) -> dict[str, mx.array]:
        """Returns the arrays by path."""
        return {path: own[0].holder[own[0].key] for path, own in self._places.items()}

    def set(self, arrays: Mapping[str, mx.array]) -> None:
        """Sets some arrays by path, each at all places that share it."""
        for path, array in arrays.items():
            for place in self._places[path]:
                place.holder[place.key] = array


def _places(model: nn.Module) -> list[_Place]:
    """Returns the places of the arrays; an array of a port also under the further names that its original has."""
    nodes = _nodes(model)
    return _own_places(nodes) + [other for other, _ in _other_names(nodes)]


def _other_names(nodes: list[_Node]) -> list[tuple[_Place, _Place]]:
    """Returns each further name of an array of a port in its original, as a place, and the owner's place."""
    named = [(node, names) for node in nodes if (names := getattr(type(node.holder), OTHER_NAMES, None))]
    own = {place.path: place for place in _own_places(nodes)} if named else {}
    return [
        (owner._replace(path=_join(node.path, other), mlx_path=_join(node.mlx_path, other)), owner)
        for node, names in named
        for other, path in names.items()
        if (owner := own.get(_join(node.path, path))) is not None
    ]


def _own_places(nodes: list[_Node]) -> list[_Place]:
    found = []
    for node in nodes:
        if node.is_hidden:
            continue
        for name, value in node.items:
            key = node.key_of(name)
            if isinstance(value, mx.array) and not key.startswith("_"):
                is_frozen = node.is_frozen or key in node.module._no_grad
                is_trainable = not is_frozen and mx.issubdtype(value.dtype, mx.floating)  # as in PyTorch
                paths = _join(node.path, name), _join(node.mlx_path, name)
                found.append(_Place(*paths, node.holder, name, is_trainable))
    return found


def _nodes(model: nn.Module) -> list[_Node]:
    """Returns the modules and containers of a model, parents first."""
    found: list[_Node] = []
    _walk(_Node("", "", model, model, "", False, False), (), found)
    return found


# Not a function inside the other one: a function that calls itself is a cycle, which would keep the model in memory.
def _walk(node: _Node, above: tuple[int, ...], found: list[_Node]) -> None:
    """Adds a module or container, and those inside it.

    Args:
        above: The ids of the containers that contain it.
    """
    if id(node.holder) in above:
        raise UsageError(f"{node.path}: a module that contains itself; keep a reference to a parent in a function")
    found.append(node)
    is_module = isinstance(node.holder, nn.Module)
    for name, value in node.items:
        if not isinstance(value, (dict, list)):
            continue
        key = node.key_of(name)
        inline = name == "layers" and isinstance(node.holder, nn.Sequential) and is_module
        is_child = isinstance(value, nn.Module)
        child = _Node(
            path=node.path if inline else _join(node.path, name),
            mlx_path=_join(node.mlx_path, name),
            holder=value,
            module=value if is_child else node.module,
            key="" if is_child else key,
            is_hidden=node.is_hidden or key.startswith("_"),
            is_frozen=node.is_frozen or key in node.module._no_grad,
        )
        _walk(child, (*above, id(node.holder)), found)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def copy_modules(model: M) -> M:
    """Returns a copy of a model with the same arrays. A module, list or dict that is used twice stays one."""
    return _copied(model, {})  # type: ignore[no-any-return]


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """Returns the copy of a part of a model.

    Args:
        copies: The copies that are made, by the id of the original.
    """
    if type(value) is tuple:
        return tuple(_copied(item, copies) for item in value)
    if not isinstance(value, (nn.Module, list, dict)):
        return value
    if id(value) not in copies:
        new = copies[id(value)] = value.__class__.__new__(value.__class__)
        if isinstance(value, nn.Module):
            new.__dict__.update(value.__dict__)
        if isinstance(value, list):
            new.extend(_copied(item, copies) for item in value)
        else:
            dict.update(new, {name: _copied(item, copies) for name, item in value.items()})
    return copies[id(value)]
