"""What a record says about the modules of the original: their settings, parameters, files and shared parts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from icenet.core.porting.record import Argument, Constructor, Module, refs

_SIMPLE = (bool, int, float, str, type(None))


def module_of(path: str, module: nn.Module) -> Module:
    """Returns the record of a module: its class, its plain attributes as settings, its children and parameters."""
    settings = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        if isinstance(value, _SIMPLE) or (
            isinstance(value, (tuple, list)) and all(isinstance(item, _SIMPLE) for item in value)
        ):
            settings[name] = tuple(value) if isinstance(value, list) else value
    for name in ("weight", "bias"):
        if name in module._parameters:
            settings[f"has_{name}"] = module._parameters[name] is not None
    settings["is_plain_call"] = type(module).forward is getattr(_base(type(module)), "forward", None)
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    base = _base(type(module))
    if base is not type(module) and settings["is_plain_call"] and base is not None:
        kind = f"{base.__module__}.{base.__qualname__}"  # a subclass that computes what its base does
    children = [name for name, child in module._modules.items() if child is not None]
    try:
        arguments = [
            name
            for name, item in inspect.signature(module.forward).parameters.items()
            if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
        ]
    except (TypeError, ValueError):
        arguments = []
    own_class = type(module).__name__ if kind.rpartition(".")[2] != type(module).__name__ else ""
    return Module(path, kind, settings, children, arguments, own_class, _constructor(type(module)))


def _constructor(kind: type) -> Constructor | None:
    """Returns where a class makes its modules, None for classes of torch."""
    owner = next(base for base in kind.__mro__ if "__init__" in vars(base))
    code = getattr(inspect.unwrap(vars(owner)["__init__"]), "__code__", None)
    if code is None or owner.__module__.startswith("torch."):
        return None
    numbers = [
        (name, value)
        for base in reversed(kind.__mro__)
        if not base.__module__.startswith("torch.")
        for name, value in vars(base).items()
        if type(value) in (int, float) and not name.startswith("_")
    ]
    return Constructor(code.co_filename, code.co_firstlineno, tuple(numbers))


def signature_of(module: nn.Module, input_tree: Any) -> list[Argument]:
    """Returns the parameters of a module with references; none if one of them takes any number of arguments."""
    args, kwargs = input_tree
    signature = inspect.signature(module.forward)
    given = signature.bind(*args, **kwargs).arguments
    found = []
    for name, item in signature.parameters.items():
        if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
            if given.get(name):
                return []
            continue
        value = given.get(name, item.default)
        has_default = _is_simple(item.default)
        if not any(refs(value)) and not _is_simple(value):
            if item.kind != item.KEYWORD_ONLY:
                return []  # a value without a source: a device, for example
            continue
        found.append(Argument(name, value, item.kind == item.KEYWORD_ONLY, has_default))
    return found


def _is_simple(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_simple, value))
    return type(value) in _SIMPLE


def _base(kind: type) -> type | None:
    """Returns the class of torch.nn from which a class is derived."""
    return next(
        (base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules") and base is not nn.Module),
        None,
    )


def shared_arrays(module: nn.Module) -> dict[str, str]:
    """Returns the first path of each further path of a parameter or buffer."""
    owners: dict[int, str] = {}
    shared = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for path, value in named:
        owner = owners.setdefault(id(value), path)
        if owner != path:
            shared[path] = owner
    return shared


def shared_modules(module: nn.Module) -> dict[str, str]:
    """Returns the first path of each further path of a module."""
    owners = {id(inner): path for path, inner in module.named_modules()}
    named = module.named_modules(remove_duplicate=False)
    return {path: owners[id(inner)] for path, inner in named if owners[id(inner)] != path}


def fill_of(value: torch.Tensor | None) -> float | None:
    """Returns the number that all elements of a tensor are, None if they differ."""
    if value is None or not value.is_floating_point() or value.numel() == 0:
        return None
    flat = value.detach().reshape(-1)
    return float(flat[0]) if flat[0] == flat[-1] and bool((flat == flat[0]).all()) else None


def file_of(kind: type) -> str:
    """Returns the file of a class, empty if there is none."""
    try:
        return inspect.getsourcefile(kind) or ""
    except TypeError:
        return ""
