"""The sizes beyond which a port computes something else than its original, found from the guards of the export.

An export computes with the sizes of the example: in `if x.shape[1] > 4:` it has one branch, and `x.shape[2] // 2` may
be a number. It keeps each such decision as a guard, a condition on the sizes of the inputs. Most guards change
nothing, or are those of the original itself. So inputs that violate a guard are tried, and the guard limits the port
if the original takes them and the port differs.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from icenet.parity.ports.inputs import Arguments, arrays_of, with_sizes

Place = tuple[int, int]
"""The number of an input, and a dimension."""
TRIES = 3
"""Inputs that are tried for a guard."""
MOST = 40
"""Inputs that are tried in all."""
LONGEST = 120
"""Characters of a condition that a source may have."""

_OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
}
_FUNCTIONS = {"math": math, "max": max, "min": min, "float": float, "int": int, "abs": abs, "round": round}


@functools.lru_cache(maxsize=1024)
def _compiled(text: str) -> types.CodeType:
    return compile(text, "<condition>", "eval")


@dataclass(frozen=True)
class Guard:
    """A condition on sizes, such as `s0 // 2 == 4`, and the places of each of its names."""

    text: str
    places: dict[str, tuple[Place, ...]]

    def holds(self, sizes: dict[str, int]) -> bool:
        try:
            return bool(eval(_compiled(self.text), {"__builtins__": {}, **_FUNCTIONS}, dict(sizes)))
        except (ArithmeticError, ValueError):  # it is not defined there
            return True

    def is_plain(self) -> bool:
        """Returns whether a source can have it."""
        names = {node.id for node in ast.walk(ast.parse(self.text)) if isinstance(node, ast.Name)}
        return names <= {*self.places, "max", "min"} and len(self.text) <= LONGEST

    def texts(self, size: Callable[[Place], str]) -> tuple[str, str]:
        """Returns the condition and its opposite, with an expression for the size at a place."""
        tree: Any = ast.parse(self.text, mode="eval").body
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in self.places:
                node.id = size(self.places[node.id][0])
        opposite: ast.expr = ast.UnaryOp(ast.Not(), tree)
        if isinstance(tree, ast.Compare) and len(tree.ops) == 1 and type(tree.ops[0]) in _OPPOSITES:
            opposite = ast.Compare(tree.left, [_OPPOSITES[type(tree.ops[0])]()], tree.comparators)
        return ast.unparse(tree), ast.unparse(opposite)


@dataclass
class Limits:
    """What limits the sizes of a port: by place the least and the largest size, None for any, and other guards."""

    ranges: dict[Place, tuple[int | None, int | None]]
    guards: list[Guard]
    untried: int = 0
    """The guards that were not tried at all sizes, because `MOST` inputs were."""


def find_limits(
    example: Arguments, guards: list[Guard], runs: Callable[[Arguments], bool], serves: Callable[[Arguments], bool]
) -> Limits:
    """Returns the limits of a port.

    Args:
        example: The example.
        guards: The guards of the export. The first that limits the port at some sizes is the one that counts there.
        runs: Whether the original takes some inputs.
        serves: Whether the original takes some inputs and the port computes the same on them.
    """
    shapes: list[tuple[int, ...]] = [array.shape for array in arrays_of(example)]
    tried: dict[tuple[tuple[Place, int], ...], bool] = {}
    found, limiting = Limits({}, []), list[Guard]()

    def sizes_of(guard: Guard, given: dict[Place, int]) -> dict[str, int]:
        return {name: int(given.get(of[0], shapes[of[0][0]][of[0][1]])) for name, of in guard.places.items()}

    for guard in guards:
        own, is_tried = sizes_of(guard, {}), True
        if not guard.holds(own):  # an example with a batch of 1, which the proof has compared
            continue
        for point in itertools.islice(_violations(guard, own), TRIES):
            changed = {
                place: size for name, size in point.items() if size != own[name] for place in guard.places[name]
            }
            key = tuple(sorted(changed.items()))
            if key not in tried:
                if not all(other.holds(sizes_of(other, changed)) for other in limiting):
                    continue
                if len(tried) == MOST:
                    is_tried = False
                    continue
                given = with_sizes(example, changed)
                tried[key] = serves(given) or not runs(given)  # in this order most need no further run
            if not tried[key] and (equal := _equality(example, shapes, changed, serves)):
                limiting.append(equal)
                found.guards.append(equal)
            elif not tried[key]:
                limiting.append(guard)
                _limit(found, guard, own, changed)
                break
        else:
            found.untried += not is_tried
    return found


def _equality(
    example: Arguments,
    shapes: list[tuple[int, ...]],
    changed: dict[Place, int],
    serves: Callable[[Arguments], bool],
) -> Guard | None:
    """Returns the guard that two sizes are equal, if the port serves a size that all equal ones have; None if not.

    An example is a batch of one mask for a batch of two sentences, which the original broadcasts. The port needs two
    equal batches, of any size.
    """
    for place, size in changed.items():
        before = shapes[place[0]][place[1]]
        others = [(i, d) for i, shape in enumerate(shapes) for d, n in enumerate(shape) if n == before]
        others = [other for other in others if other not in changed]
        for some in (others, *([other] for other in others if len(others) > 1)):
            given = with_sizes(example, {**changed, **dict.fromkeys(some, size)})
            if some and serves(given):
                return Guard("size == other", {"size": (place,), "other": (some[0],)})
    return None


def _violations(guard: Guard, own: dict[str, int]) -> Iterator[dict[str, int]]:
    """Yields sizes that violate a guard: near those of the example, and about twice as large."""
    if len(own) == 1:
        [(name, size)] = own.items()
        wrong = [other for other in _around(size) if not guard.holds({name: other})]
        above, below = [other for other in wrong if other > size], [other for other in wrong if other < size]
        twice = [other for other in above if other >= 2 * size]
        chosen = dict.fromkeys(other for others in (above[:1], below[-1:], twice[:1]) for other in others)
        yield from ({name: other} for other in chosen)
        return
    names = list(own)
    for count in range(1, min(len(names), 2) + 1):
        for some in itertools.combinations(names, count):
            near = [
                dict.fromkeys(n for n in (own[x] + 1, own[x] - 1, 2 * own[x], own[x] // 2, 1, own[x] + 31) if n > 0)
                for x in some
            ]
            for chosen_sizes in itertools.product(*near):
                point = {**own, **dict(zip(some, chosen_sizes, strict=True))}
                if not guard.holds(point):
                    yield point


def _around(size: int) -> range:
    return range(1, max(4 * size, 1100) + 1)


def _limit(found: Limits, guard: Guard, own: dict[str, int], changed: dict[Place, int]) -> None:
    """Adds what a guard allows: a range of sizes, the guard itself, or the sizes of the example."""
    if len(own) == 1:
        [(name, size)] = own.items()
        right = [other for other in _around(size) if guard.holds({name: other})]
        low, high = right[0], right[-1]
        if right == list(range(low, high + 1)):
            for place in guard.places[name]:
                _narrow(found, place, None if low == 1 else low, None if high == _around(size)[-1] else high)
            return
    if guard.is_plain():
        found.guards.append(guard)
        return
    for name, places in guard.places.items():
        for place in places:
            if place in changed:
                _narrow(found, place, own[name], own[name])


def _narrow(found: Limits, place: Place, low: int | None, high: int | None) -> None:
    before = found.ranges.get(place, (None, None))
    lows = [value for value in (before[0], low) if value is not None]
    highs = [value for value in (before[1], high) if value is not None]
    found.ranges[place] = max(lows, default=None), min(highs, default=None)
