"""The inputs on which a port is compared: random ones, of the sizes that its graph leaves open and of others."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from icenet.core.porting.build import Plan
from icenet.core.porting.record import OpenLoop

Array = np.ndarray
Arguments = tuple[Any, Any]
"""Arguments by position and by name: numpy arrays and constants."""


def arrays_of(tree: Any) -> list[Array]:
    """Returns the arrays of arguments in order."""
    if isinstance(tree, np.ndarray):
        return [tree]
    if isinstance(tree, dict):
        return [item for inner in tree.values() for item in arrays_of(inner)]
    if isinstance(tree, (list, tuple)):
        return [item for inner in tree for item in arrays_of(inner)]
    return []


def with_arrays(tree: Any, arrays: list[Array]) -> Any:
    """Returns arguments with other arrays, in the order of `arrays_of`."""
    rest = iter(arrays)

    def of(item: Any) -> Any:
        if isinstance(item, np.ndarray):
            return next(rest)
        if isinstance(item, dict):
            return {key: of(value) for key, value in item.items()}
        if isinstance(item, (list, tuple)):
            return type(item)(of(value) for value in item)
        return item

    return of(tree)


def sizes_text(given: Arguments) -> str:
    """Returns the sizes of arguments, such as `2x3 2x5`."""
    return " ".join("x".join(map(str, item.shape)) or "scalar" for item in arrays_of(given))


def port_axes(ndim: int, is_nhwc: bool) -> tuple[int, ...]:
    """Returns the axes of an input of the original in the order in which the port takes them."""
    return (0, *range(2, ndim), 1) if is_nhwc and ndim == 4 else tuple(range(ndim))


def other_sizes(plan: Plan, given: Arguments, accepts: Callable[[Arguments], bool]) -> list[Arguments]:
    """Returns random inputs of other sizes, as far as the graph is open: larger ones, odd ones, and a batch of 1.

    Args:
        plan: The plan, whose graph has a name for each size that is open.
        given: The example.
        accepts: Whether the guards of the graph allow some arguments, or the original takes them.
    """
    tensors = [plan.graph.tensors[ref.name] for ref in plan.graph.inputs]
    symbols: dict[str, int] = {}
    for tensor, array in zip(tensors, arrays_of(given), strict=True):
        for size, number in zip(tensor.shape, array.shape, strict=True):
            if isinstance(size, str) and size.isidentifier():
                symbols.setdefault(size, number)
    if not symbols:
        return []
    first = next(iter(symbols))

    def step(size: int) -> int:
        return 32 if size % 32 == 0 else 2

    def odd(name: str, size: int) -> int:
        return size if name == first else size + 1 + size % 2

    larger: list[Callable[[str, int], int]] = [
        lambda name, size: size + (1 if name == first else step(size)),
        lambda name, size: size + (1 if size == symbols[first] else step(size)),  # equal ones alike
        lambda name, size: size + (name == first),
        lambda name, size: size + (size == symbols[first]),
    ]
    unusual: list[list[Callable[[str, int], int]]] = [
        [odd, lambda name, size: size + 31 if size % 32 == 0 else odd(name, size)],
        [lambda name, size: 1 if name == first else size, lambda name, size: 1 if size == symbols[first] else size],
    ]
    if plan.graph.loops:  # whose steps may be a part of a size
        unusual.append([lambda name, size: 2 * size + 1])
        unusual += _other_steps(plan.graph.loops)
    found: list[Arguments] = []
    shapes = {sizes_text(given)}
    for ways in (larger, *unusual):
        for way in ways:
            new = _resized(given, {name: way(name, size) for name, size in symbols.items()}, plan)
            if new is not None and sizes_text(new) not in shapes and accepts(new):
                found.append(new)
                shapes.add(sizes_text(new))
                break
    return found


LONG = 62
"""The number of a condition for which a loop is tried without knowing one."""
MOST_NUMBERS = 12
"""The numbers of conditions for which a loop is tried."""


def _other_steps(loops: list[OpenLoop]) -> list[list[Callable[[str, int], int]]]:
    """Returns fewer steps of each loop than in the example, and those at which its turns may become others."""

    def fewer(symbols: set[str]) -> Callable[[str, int], int]:
        return lambda name, size: max(size // 2, 2) if name in symbols and size > 2 else size

    def beyond(loop: OpenLoop, number: int) -> Callable[[str, int], int]:
        steps = max(loop.high - loop.low, 1)
        return lambda name, size: (number + 2) * -(-size // steps) if name in loop.symbols() else size

    every = {symbol for loop in loops for symbol in loop.symbols()}
    found = []
    for loop in loops:
        found.append([fewer(set(loop.symbols())), fewer(every)])
        # each, since a later turn may hide the effect of one
        found += [[beyond(loop, number)] for number in (*loop.numbers[:MOST_NUMBERS], LONG)]
    return found


def _resized(given: Arguments, chosen: dict[str, int], plan: Plan) -> Arguments | None:
    """Returns random inputs with other sizes by name; None if a size would not be positive."""
    rng = np.random.default_rng(1)
    arrays = []
    for ref, array in zip(plan.graph.inputs, arrays_of(given), strict=True):
        shape = tuple(
            int(eval(size, {"__builtins__": {}}, dict(chosen)))
            if isinstance(size, str) and set(re.findall(r"[A-Za-z_]\w*", size)) <= set(chosen)
            else number
            for size, number in zip(plan.graph.tensors[ref.name].shape, array.shape, strict=True)
        )
        if any(size < 1 for size in shape):
            return None
        arrays.append(drawn_like(array, shape, rng))
    found: Arguments = with_arrays(given, arrays)
    return found


def with_sizes(given: Arguments, sizes: dict[tuple[int, int], int]) -> Arguments:
    """Returns random inputs with other sizes at some dimensions, given by (number of the input, dimension)."""
    rng = np.random.default_rng(1)
    arrays = []
    for number, array in enumerate(arrays_of(given)):
        shape = tuple(sizes.get((number, dim), old) for dim, old in enumerate(array.shape))
        arrays.append(array if shape == array.shape else drawn_like(array, shape, rng))
    found: Arguments = with_arrays(given, arrays)
    return found


def drawn_like(item: Array, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Returns random values of a shape, in the range of an example."""
    if item.dtype.kind == "f" or item.dtype.name == "bfloat16":
        values = item.astype(np.float64)
        deviation = float(values.std()) if values.size > 1 else 1.0
        values = rng.standard_normal(shape) * (deviation or 1.0) + float(values.mean() if values.size else 0)
        return np.asarray(values, item.dtype)
    if item.dtype.kind == "b":
        return rng.permutation(np.resize(item.ravel(), int(np.prod(shape)))).reshape(shape)
    if item.size == 0:
        return np.zeros(shape, item.dtype)
    if item.size > 1 and (np.diff(item.reshape(-1)) == 1).all():
        return np.arange(int(np.prod(shape)), dtype=item.dtype).reshape(shape) + item.reshape(-1)[0]
    flat = item.reshape(-1)
    if item.size > 1 and item.ndim == 1 and (np.diff(flat) >= 0).all():  # offsets, for example
        return np.sort(np.resize(flat, shape))
    # values of the example: others may have no meaning, such as labels below zero
    return np.asarray(rng.choice(flat, shape))
