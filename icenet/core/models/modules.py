"""The weights of any `mlx.nn.Module` and `torch.nn.Module`, not only of IceNet's models.

`from_torch` and `to_torch` copy them between twins whose names may differ; `get_weights` and `set_weights` have the
canonical weights of one module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.errors import UsageError, WeightsError
from icenet.core.models import port_weights
from icenet.core.weights import arrays, layout, sharing
from icenet.core.weights import files as weight_files
from icenet.core.weights.pairing import MLXWeights, Pairing, TorchWeights
from icenet.core.weights.rename import Rename


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
    """Copies the weights of a module to its twin, on the same backend or the other one.

    Between the frameworks it is `from_torch` or `to_torch`, otherwise `set_weights`.
    """
    backends_of = backends.backend_of(source), backends.backend_of(destination)
    if backends_of == ("torch", "mlx"):
        from_torch(source, destination)
    elif backends_of == ("mlx", "torch"):
        to_torch(source, destination)
    else:
        set_weights(destination, get_weights(source))


def from_torch(torch_module: Any, mlx_module: Any, rename: Rename = None) -> Any:
    """Copies the weights of a PyTorch module to its MLX twin. The modules may be of any classes.

        net = icenet.from_torch(torch_net, MyNet())
        icenet.from_torch(state_dict, net, rename={"ln_f": "norm", "h.*.attn": "blocks.*.attention"})

    The layers of the MLX module determine the axes, and which weights of PyTorch are joined or divided:
    docs/weights.md lists all layers. Running statistics and other buffers are weights, too; counters of batches
    (`num_batches_tracked`) are left out.

    Args:
        torch_module: A `torch.nn.Module`, on any device, or a state dict: a mapping of names and tensors or numpy
            arrays, such as `torch.load(path, weights_only=True)` or `icenet.core.weights.read(path)`.
        mlx_module: The `mlx.nn.Module` to change. Each array keeps its dtype, to which the values are rounded.
        rename: Other names, if the two modules differ in them: a mapping with names of PyTorch on the left and names
            of the MLX module on the right, of layers or weights, with `*` for any text without a dot; or a function
            of a name in PyTorch that returns the name in the MLX module. None in place of a name leaves a weight out.
            A mapping with the two sides swapped is recognized by its names.

    Returns:
        `mlx_module`.

    Raises:
        UsageError: An argument is of another type, or `rename` is invalid.
        WeightsError: A weight has no place, an array gets no values, a shape or the kind of a layer differs, or a
            value is too large for the dtype. The message names all of them, and `mlx_module` is unchanged.
    """
    _check_mlx("from_torch", "second", mlx_module, torch_module)
    if rename is None and _backend(torch_module) == "torch":
        places = port_weights.places_of(mlx_module, torch_module)
        if places is not None:
            port_weights.from_torch(places, torch_module, mlx_module)
            return mlx_module
    values, torch = _torch_weights(torch_module)
    pairing = Pairing(mlx_weights(mlx_module), torch, rename)
    _check_pairing("from_torch", pairing, torch_module, mlx_module)
    tree = _tree(mlx_module)
    shared = shared_arrays(mlx_module)
    complete = sharing.complete(pairing.to_mlx(values), shared)
    dtypes = {path: str(array.dtype) for path, array, _ in tree.named_arrays(mlx_module)}
    dtypes |= {path: dtypes[layout.split(path)[0] + ".weight"] for path in pairing.added}
    _check_dtypes("from_torch", dtypes, complete)
    tree.set_biases(mlx_module, pairing.added, pairing.removed)
    tree.assign_weights(mlx_module, ((path, array) for path, array in complete.items() if path not in shared))
    return mlx_module


def to_torch(mlx_module: Any, torch_module: Any, rename: Rename = None) -> Any:
    """Copies the weights of an MLX module to its PyTorch twin; the inverse of `from_torch`.

        icenet.to_torch(net, torch_net, rename={"ln_f": "norm", "h.*.attn": "blocks.*.attention"})

    Args:
        mlx_module: An `mlx.nn.Module`.
        torch_module: The `torch.nn.Module` to change, on any device. Each tensor keeps its dtype and its device. The
            second bias of a recurrent layer becomes zeros. Counters of batches keep their values.
        rename: The same as for `from_torch`: names of PyTorch on the left, names of the MLX module on the right.

    Returns:
        `torch_module`.

    Raises:
        UsageError, WeightsError: As in `from_torch`; `torch_module` is unchanged.
    """
    _check_mlx("to_torch", "first", mlx_module, torch_module)
    if isinstance(torch_module, Mapping) and _backend(torch_module) is None:
        raise UsageError("to_torch: the second argument is a dict; give the torch.nn.Module that has the weights")
    _check_torch("to_torch", "second", torch_module)
    torch_module = getattr(torch_module, "_orig_mod", torch_module)  # torch.compile wraps it
    tree = _tree(torch_module)
    _check_has_values("to_torch", torch_module)
    places = port_weights.places_of(mlx_module, torch_module) if rename is None else None
    if places is not None:
        port_weights.to_torch(places, mlx_module, torch_module)
        return torch_module
    shared = shared_arrays(torch_module)
    pairing = Pairing(mlx_weights(mlx_module), _module_weights(torch_module, shared), rename)
    if pairing.removed:
        pairing.problems.append(f"there is no place in the PyTorch module for: {', '.join(pairing.removed)}")
    _check_pairing("to_torch", pairing, torch_module, mlx_module)
    complete = sharing.complete(pairing.to_torch(get_weights(mlx_module)), shared)
    _check_dtypes(
        "to_torch", {name: str(array.dtype) for name, array, _ in tree.named_arrays(torch_module)}, complete
    )
    tree.assign_weights(torch_module, ((name, array) for name, array in complete.items() if name not in shared))
    return torch_module


def pair(mlx_module: Any, torch_module: Any, rename: Rename = None) -> Pairing:
    """Returns which weights of a PyTorch module belong to which arrays of an MLX module.

    Args:
        mlx_module: An `mlx.nn.Module`.
        torch_module: A `torch.nn.Module`.
        rename: See `icenet.core.weights.rename`.

    Raises:
        UsageError: An argument is no module of its framework, or `rename` is invalid.
    """
    _check_mlx("pair", "first", mlx_module, torch_module)
    _check_torch("pair", "second", torch_module)
    return Pairing(mlx_weights(mlx_module), _module_weights(torch_module, shared_arrays(torch_module)), rename)


def mlx_weights(module: Any) -> MLXWeights:
    """Returns the names, shapes and layer kinds of the arrays of an MLX module."""
    tree = _tree(module)
    kinds = tree.layer_kinds(module)
    counterparts = backends.module("mlx", "nn.kinds").counterpart_kinds(tree.named_modules(module))
    shapes: dict[str, tuple[int, ...]] = {}
    problems = []
    for path, array in tree.native_arrays(module).items():
        try:
            shapes[path] = layout.torch_shape(layout.parameter_kind(kinds, path), layout.split(path)[1], array.shape)
        except WeightsError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise WeightsError(f"the axes of arrays of the MLX module are not known: {'; '.join(problems)}")
    return MLXWeights(shapes, kinds, counterparts, tree.mlx_names(module), shared_arrays(module))


def shared_arrays(module: Any) -> dict[str, str]:
    """Returns the owner's path of each further path of an array that a module shares (see `sharing`)."""
    return sharing.find_shared((path, array) for path, array, _ in _tree(module).named_arrays(module))


def _tree(module: Any) -> Any:
    return backends.module(backends.backend_of(module), "nn.tree")


# ---- the weights of PyTorch -----------------------------------------------------------------------------------


def _torch_weights(source: Any) -> tuple[Mapping[str, np.ndarray], TorchWeights]:
    """Returns the weights of a PyTorch module or a state dict, and their names, shapes and layer kinds."""
    if isinstance(source, Mapping) and _backend(source) is None:  # a module of MLX is a dict, too
        return _state_dict(source)
    if isinstance(source, (str, Path)):
        raise UsageError(
            f"from_torch: {str(source)!r} is a path; give a torch.nn.Module or a state dict, such as "
            "torch.load(path, weights_only=True) or icenet.core.weights.read(path)"
        )
    _check_torch("from_torch", "first", source)
    source = getattr(source, "_orig_mod", source)  # torch.compile wraps it
    _check_has_values("from_torch", source)
    torch = _module_weights(source, shared_arrays(source))
    return _numpy(_tree(source).native_arrays(source)), torch


def _module_weights(module: Any, shared: Mapping[str, str]) -> TorchWeights:
    tree, kinds = _tree(module), backends.module("torch", "nn.kinds")
    transposed = kinds.transposed_weights(tree.named_modules(module))
    return TorchWeights(tree.weight_shapes(module), tree.layer_kinds(module), shared, transposed)


def _state_dict(state: Mapping[str, Any]) -> tuple[Mapping[str, np.ndarray], TorchWeights]:
    if not state:
        raise UsageError("from_torch: the state dict is empty")
    if getattr(state, "metadata", {}).get("format") == "mlx":
        raise UsageError("from_torch: the file has MLX's layouts; mlx_module.load_weights(path) reads it")
    for name, value in state.items():
        if isinstance(value, (Mapping, list, tuple)) or not hasattr(value, "shape"):
            inner = next((key for key, item in state.items() if _has_tensors(item)), None)
            hint = "pass the names and tensors only" if inner is None else f"pass state_dict[{inner!r}]"
            raise UsageError(
                f"from_torch: {name!r} in the state dict is a {type(value).__name__}, not a tensor; {hint}"
            )
        if any(base.__module__ == "mlx.core" for base in type(value).__mro__):
            raise UsageError(
                f"from_torch: {name!r} in the state dict is an array of MLX, whose axes may differ from PyTorch's; "
                "give the state dict of a torch.nn.Module"
            )
    values = _numpy(state)
    places: dict[object, str] = {}
    shared = {}
    for name, value in state.items():
        owner = places.setdefault(_memory(value) or name, name)
        if owner != name:
            shared[name] = owner
    return values, TorchWeights({name: tuple(value.shape) for name, value in state.items()}, {}, shared)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(hasattr(item, "shape") for item in value.values())


def _numpy(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns tensors as numpy arrays, without a copy if they are on the CPU."""
    found, problems = {}, []
    given = arrays.NumpyWeights(values)
    for name in given:
        try:
            found[name] = given[name]
        except WeightsError as error:
            problems.append(str(error))
    if problems:
        raise WeightsError(f"from_torch: nothing is copied; {'; '.join(problems)}")
    return found


def _memory(value: Any) -> object:
    """Returns what two tensors or arrays have in common if they are the same memory; None for an empty one."""
    if not math.prod(value.shape):
        return None
    if hasattr(value, "data_ptr"):  # a dense tensor: a sparse one is no numpy array
        return str(value.device), value.data_ptr(), tuple(value.shape), value.stride(), str(value.dtype)
    interface = value.__array_interface__
    return interface["data"][0], tuple(value.shape), value.strides, str(value.dtype)


# ---- checks ---------------------------------------------------------------------------------------------------


def _check_mlx(function: str, position: str, module: Any, other: Any) -> None:
    if _backend(module) == "torch" and _backend(other) == "mlx":
        order = "the PyTorch module first" if function == "from_torch" else "the MLX module first"
        raise UsageError(f"{function}: the arguments are swapped; give {order}")
    if _backend(module) != "mlx":
        raise UsageError(f"{function}: the {position} argument must be an mlx.nn.Module, not {_described(module)}")


def _check_torch(function: str, position: str, module: Any) -> None:
    if _backend(module) != "torch":
        also = " or a state dict" if function == "from_torch" else ""
        raise UsageError(
            f"{function}: the {position} argument must be a torch.nn.Module{also}, not {_described(module)}"
        )


def _check_has_values(function: str, module: Any) -> None:
    tree = _tree(module)
    if tree.is_meta(module):
        raise UsageError(
            f"{function}: the parameters of the PyTorch module have no values (device meta, or lazy layers)"
        )
    sharded = [name for name, array, _ in tree.named_arrays(module) if hasattr(array, "to_local")]
    if sharded:
        raise UsageError(f"{function}: {sharded[0]} is sharded among processes; gather the weights first")


def _check_pairing(function: str, pairing: Pairing, *twins: Any) -> None:
    if pairing.problems:
        for module in twins:
            paths = _tree(module).unregistered(module) if _backend(module) else []
            if paths:
                framework = {"mlx": "MLX", "torch": "PyTorch"}[backends.backend_of(module)]
                containers = "lists" if framework == "MLX" else "torch.nn.ModuleList and ModuleDict"
                pairing.problems.append(
                    f"{framework} does not see the layers in {', '.join(paths)}: use {containers}"
                )
    pairing.check(function)


def _check_dtypes(function: str, expected: Mapping[str, str], values: Mapping[str, np.ndarray]) -> None:
    """Raises WeightsError with all arrays that lose more than digits in the dtype of the module."""
    problems = []
    for name, dtype in expected.items():
        try:
            arrays.check_dtypes({name: dtype}, values)
        except WeightsError as error:
            problems.append(str(error))
    if problems:
        raise WeightsError(f"{function}: nothing is copied; {'; '.join(problems)}")


def _backend(module: Any) -> str | None:
    try:
        return backends.backend_of(module)
    except UsageError:
        return None


def _described(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}; give an instance"
    names = {"mlx": "a module of MLX", "torch": "a module of PyTorch"}
    return names.get(_backend(value) or "", f"a {type(value).__name__}")
