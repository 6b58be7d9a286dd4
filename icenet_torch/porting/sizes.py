"""Functions whose sizes stay open in an export.

`torch.export` fixes the number of steps of `torch.linspace`, the size of `F.affine_grid` and the window of a pool,
because they are no symbolic numbers in its schemas, the length of `F.max_pool1d` without indices, and `len(x)` and
`math.sqrt`, because Python's are numbers. Here they are operations that take them, a max pool with indices,
`x.shape[0]`, and `torch.sym_sqrt`. A pool over a whole image is an adaptive pool. The quotient of two sizes by
`torch.div` is a tensor whose value an export knows, if the sizes are fixed.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_library = torch.library.Library("icenet_size", "DEF")
_library.define("linspace(float start, float end, SymInt steps, ScalarType dtype) -> Tensor")
_library.define("affine_grid_generator(Tensor theta, SymInt[] size, bool align_corners) -> Tensor")


def _linspace(start: float, end: float, steps: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(start, end, steps, dtype=dtype)


def _linspace_shape(start: float, end: float, steps: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(steps, dtype=dtype)


_library.impl("linspace", _linspace, "CompositeExplicitAutograd")
torch.library.register_fake("icenet_size::linspace", _linspace_shape, lib=_library)


def _affine_grid_shape(theta: torch.Tensor, size: Any, align_corners: bool) -> torch.Tensor:
    return theta.new_empty((size[0], *size[2:], len(size) - 2))


_library.impl("affine_grid_generator", torch.affine_grid_generator, "CompositeExplicitAutograd")
torch.library.register_fake("icenet_size::affine_grid_generator", _affine_grid_shape, lib=_library)

_ADAPTIVE: dict[str, Callable[..., Any]] = {
    f"{kind}_pool{rank}d": getattr(F, f"adaptive_{kind}_pool{rank}d") for kind in ("avg", "max") for rank in (1, 2, 3)
}


_SQRT = math.sqrt


@contextlib.contextmanager
def open_names(module: nn.Module) -> Iterator[None]:
    """Keeps `len(x)` of a tensor, and `sqrt` of `from math import sqrt`, open in the files of a module's classes."""

    def opened(names: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {name: _sqrt for name, value in names.items() if value is _SQRT}
        return found if "len" in names else {**found, "len": _len}

    with changed_names(module, opened):
        yield


@contextlib.contextmanager
def changed_names(module: nn.Module, changed_in: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Gives global names of the files of a module's classes other values while the context is open.

    Args:
        module: The module.
        changed_in: Returns the values by their names, from the names of a file.
    """
    files = {id(names): names for names in map(_names, module.modules()) if names is not None}
    changed = []
    for names in files.values():
        opened = changed_in(names)
        changed.append((names, opened.keys(), {name: names[name] for name in opened if name in names}))
        names.update(opened)
    try:
        yield
    finally:
        for names, opened_names, before in changed:
            for name in opened_names:
                del names[name]
            names.update(before)


def _names(module: nn.Module) -> dict[str, Any] | None:
    """Returns the global names of the file of a module's class, None if it is one of PyTorch's."""
    function = inspect.unwrap(type(module).forward)
    names: dict[str, Any] = getattr(function, "__globals__", {})
    return None if str(names.get("__name__", "torch")).partition(".")[0] in ("torch", "builtins") else names


def _len(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else len(value)


@contextlib.contextmanager
def open_sizes() -> Iterator[None]:
    """Replaces the functions while the context is open."""
    linspace, affine_grid, divide = torch.linspace, F.affine_grid, torch.div
    pools = {name: getattr(F, name) for name in _ADAPTIVE}

    def with_open_steps(start: Any, end: Any, steps: Any = None, **options: Any) -> torch.Tensor:
        dtype = options.get("dtype") or torch.get_default_dtype()
        if isinstance(steps, torch.SymInt) and all(isinstance(item, (int, float)) for item in (start, end)):
            made: torch.Tensor = torch.ops.icenet_size.linspace(float(start), float(end), steps, dtype)
            return made
        return linspace(start, end, steps, **options)

    def with_open_size(theta: torch.Tensor, size: Any, align_corners: bool | None = None) -> torch.Tensor:
        if any(isinstance(item, torch.SymInt) for item in size):
            made: torch.Tensor = torch.ops.icenet_size.affine_grid_generator(theta, list(size), bool(align_corners))
            return made
        return affine_grid(theta, size, align_corners)

    def of_numbers(input: Any, other: Any, *, rounding_mode: str | None = None, **options: Any) -> torch.Tensor:
        sizes = all(type(item) is int or isinstance(item, torch.SymInt) for item in (input, other))
        if sizes and rounding_mode is not None and not options and input >= 0 and other > 0:
            return torch.tensor(input // other)  # an export knows the value
        return divide(input, other, rounding_mode=rounding_mode, **options)

    torch.linspace, torch.div = with_open_steps, of_numbers  # type: ignore[assignment]
    math.sqrt = _sqrt  # type: ignore[assignment]
    F.affine_grid = with_open_size
    for name, pool in pools.items():
        values = _values_of_max_pool1d if name == "max_pool1d" else pool
        setattr(F, name, _pool(values, _ADAPTIVE[name], int(name[-2])))
    try:
        yield
    finally:
        torch.linspace, torch.div, F.affine_grid = linspace, divide, affine_grid
        math.sqrt = _SQRT
        for name, pool in pools.items():
            setattr(F, name, pool)


def _sqrt(value: Any) -> Any:
    """Returns a square root, of a size as an expression."""
    is_open = isinstance(value, (torch.SymInt, torch.SymFloat))
    return torch.sym_sqrt(value) if is_open else _SQRT(value)  # type: ignore[attr-defined]


def _values_of_max_pool1d(input: torch.Tensor, *args: Any, **options: Any) -> Any:
    """Computes `F.max_pool1d`, which fixes the length without indices."""
    bound = inspect.signature(F.max_pool1d_with_indices).bind(input, *args, **options)
    with_indices = bound.arguments.pop("return_indices", False)
    found = F.max_pool1d_with_indices(*bound.args, **bound.kwargs)
    return found if with_indices else found[0]


def drop_indices(program: Any) -> None:
    """Turns the max pools of an exported program whose indices are not used into pools without them."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.max_pool1d_with_indices.default:
            used = [item for item in node.users if item.users]
            if len(used) == 1 and used[0].target is operator.getitem and used[0].args[1] == 0:
                used[0].target, used[0].args, used[0].kwargs = (
                    torch.ops.aten.max_pool1d.default,
                    node.args,
                    node.kwargs,
                )


def _pool(pool: Callable[..., Any], adaptive: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """Returns a pool that is adaptive where its window is the whole image."""

    def call(input: torch.Tensor, kernel_size: Any, *args: Any, **options: Any) -> Any:
        window = kernel_size if isinstance(kernel_size, (tuple, list)) else [kernel_size] * rank
        is_open = any(isinstance(size, torch.SymInt) for size in window)
        plain = all(item is None for item in args) and all(item is None for item in options.values())
        if is_open and plain and list(map(_text, window)) == list(map(_text, input.shape[-rank:])):
            return adaptive(input, 1)
        return pool(input, kernel_size, *args, **options)

    return call


def _text(size: Any) -> str:
    """Returns a size as an expression; a comparison of numbers would fix it."""
    return str(size)
