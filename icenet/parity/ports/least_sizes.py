"""The least sizes that a module takes: PyTorch raises an error below, and MLX may not.

A convolution of an image that is smaller than its kernel has no rows in MLX, and `x[:, 3]` of three rows has other
values of the memory.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from icenet.core.porting.build import Plan
from icenet.parity.ports.inputs import Arguments, arrays_of, with_sizes
from icenet.parity.ports.limits import Place


def least_sizes(plan: Plan, example: Arguments, runs: Callable[[Arguments], bool]) -> dict[Place, int]:
    """Returns the least size that the original takes at each place of an open size, where it does not take 1.

    Sizes of which it takes some alone, such as multiples of 8, are left out: the operations that need them raise an
    error in MLX, too. So are those of loops, which the proof tries.

    Args:
        plan: The port.
        example: The arguments of the example.
        runs: Whether the original takes some arguments.
    """
    shapes = [plan.graph.tensors[ref.name].shape for ref in plan.graph.inputs]
    given = [array.shape for array in arrays_of(example)]
    in_formulas = {
        name
        for shape in shapes
        for size in shape
        if isinstance(size, str) and not size.isidentifier()
        for name in re.findall(r"[A-Za-z_]\w*", size)
    }
    left = in_formulas.union(*(loop.symbols() for loop in plan.graph.loops))
    groups: dict[str, list[Place]] = {}
    for number, shape in enumerate(shapes):
        for dim, size in enumerate(shape):
            if isinstance(size, str) and size.isidentifier() and size not in left:
                groups.setdefault(size, []).append((number, dim))
    found: dict[Place, int] = {}

    def takes(places: list[Place], size: int) -> bool:
        return runs(with_sizes(example, dict.fromkeys(places, size)))

    for places in groups.values():
        number, dim = places[0]
        least = _least(int(given[number][dim]), functools.partial(takes, places))
        if least is not None:
            found.update(dict.fromkeys(places, least))
    return found


def _least(own: int, takes: Callable[[int], bool]) -> int | None:
    """Returns the least size that the original takes, at most that of the example; None for 1 or sizes with gaps."""
    if own < 2 or takes(1):
        return None
    low, high = 1, own
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if takes(middle) else (middle, high)
    below = {high - 2, high - 3, high // 2, high // 4}
    return None if any(takes(size) for size in below if 1 < size < low) or not takes(high + 1) else high
