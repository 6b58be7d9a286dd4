"""Equal random numbers on all sides: what modules draw without a key is a function of the module and the draw.

Each draw has its place: the module that makes it, the number of its call in the run, and the number of the draw in
that call. So a module draws the same numbers on each side, and in its replay. Modules that only one side has draw
for the module around them.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align

Array = npt.NDArray[np.float32]

Place = tuple[str, int, int]
"""The path of a module in the reference, the number of its call, and the number of the draw in the call."""

_MASKS = {"bernoulli", "uniform"}
"""The distributions of which a module can make a mask."""


@dataclass(frozen=True)
class Drawn:
    """A draw: its distribution, its shape, and the path of the module in its own side."""

    distribution: str
    shape: tuple[int, ...]
    path: str


class SharedDraws:
    """The random numbers of one side.

    Args:
        seed: Seed of the numbers.
        paths: The path in the reference of each module that both sides have, by its path in this side.
        reference: The numbers of the reference, whose axes those of this side are aligned with; None for itself.
        moved: Paths in the reference of the modules whose inputs have their channels last here, and first there.
        exchanged: Paths in the reference of the modules whose inputs are [B, L, ...] here, [L, B, ...] there.

    Attributes:
        made: The draws of the last run.
        mirrored: Modules of `mixed` whose uniform numbers `u` are replaced by `1 - u`.
    """

    def __init__(
        self,
        seed: int,
        paths: Mapping[str, str],
        reference: SharedDraws | None = None,
        moved: Collection[str] = (),
        exchanged: Collection[str] = (),
    ) -> None:
        self._seed, self._paths, self._reference, self._moved = seed, paths, reference, moved
        self._exchanged = exchanged
        self.made: dict[Place, Drawn] = {}
        self.mirrored: set[str] = set()
        self._aliases: dict[Place, Place] = {}
        self._known: dict[Place, Drawn] = {}
        self._open: list[tuple[str, int, str]] = [("", 0, "")]
        self._calls: dict[str, int] = {}
        self._counts: dict[tuple[str, int], int] = {}

    def begin(self, path: str = "", call: int = 0, calls: Mapping[str, int] | None = None) -> None:
        """Begins a run, or the replay of a call.

        Args:
            path, call: The path of the module in the reference, and the number of its call.
            calls: The numbers of the next calls of other modules, by path in the reference.
        """
        self.made, self._open = {}, [(path, call, path)]
        self._calls, self._counts = dict(calls or {}), {}

    @contextlib.contextmanager
    def within(self, path: str) -> Iterator[None]:
        """Makes a module of this side the one that draws while the context is open."""
        theirs = self._paths.get(path)
        if theirs is None:
            yield
            return
        call = self._calls.get(theirs, 0)
        self._calls[theirs] = call + 1
        self._open.append((theirs, call, path))
        try:
            yield
        finally:
            self._open.pop()

    def handle(self, path: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Makes a call of a module, as `tools.calls.intercepting` does."""
        with self.within(path):
            return call(*args, **kwargs)

    def draw(self, distribution: str, shape: tuple[int, ...]) -> Array:
        """Returns the numbers of the next draw: normal ones, or uniform ones in [0, 1) for other distributions."""
        path, call, own = self._open[-1]
        number = self._counts.get((path, call), 0)
        self._counts[path, call] = number + 1
        place = path, call, number
        self.made[place] = self._known[place] = Drawn(distribution, shape, own)
        place = self._aliases.get(place, place)
        theirs = None if self._reference is None else self._reference._known.get(place)
        order = None if theirs is None else self._order_at(path, shape, theirs.shape)
        if theirs is None or order is None:
            return self._numbers(place, distribution, shape)
        numbers = order(self._numbers(place, distribution, theirs.shape))
        if path in self.mirrored and {distribution, theirs.distribution} == _MASKS:
            numbers = np.float32(1 - 2.0**-24) - numbers
        return numbers

    def mixed(self) -> list[str]:
        """Returns the modules that draw a mask on one side, uniform numbers on the other, by path in the reference.

        With uniform numbers `u`, a mask with the rate p of zeros may be `u >= p` or `u < 1 - p`.
        """
        both = ((place, {drawn.distribution, theirs.distribution}) for place, drawn, theirs in self._pairs())
        return list(dict.fromkeys(place[0] for place, kinds in both if kinds == _MASKS))

    def pair_others(self) -> bool:
        """Pairs the draws of the last run that other modules make on each side, in order.

        Returns:
            Whether the run must be repeated, because their numbers change.
        """
        if self._reference is None:
            return False
        extra, missing = self._others()
        shapes = [(self.made[p].shape, self._reference.made[q].shape) for p, q in zip(extra, missing, strict=False)]
        if not extra or len(extra) != len(missing) or any(_order(*pair, False) is None for pair in shapes):
            return False
        self._aliases.update(zip(extra, missing, strict=True))
        return True

    def unmatched(self) -> str | None:
        """Returns the path of a module whose draws in the last run do not correspond to those of the reference.

        A module that draws on one side only, or more numbers there, is none: it computes something else.
        """
        for place, drawn, other in self._pairs():
            is_other = (drawn.distribution == "normal") != (other.distribution == "normal")
            sizes = math.prod(drawn.shape), math.prod(other.shape)
            # as many numbers in another order; more or fewer of them are a difference
            if is_other or (sizes[0] == sizes[1] and self._order_at(place[0], drawn.shape, other.shape) is None):
                return drawn.path
        extra, missing = self._others()
        return self.made[extra[0]].path if extra and missing else None

    def _pairs(self) -> Iterator[tuple[Place, Drawn, Drawn]]:
        """Yields the place of each draw of the last run that both sides made, and the draws of both."""
        made = {} if self._reference is None else self._reference.made
        for place, drawn in self.made.items():
            theirs = made.get(self._aliases.get(place, place))
            if theirs is not None:
                yield place, drawn, theirs

    def _others(self) -> tuple[list[Place], list[Place]]:
        """Returns the places of the draws of the last run that only this side made, and only the reference."""
        made = {} if self._reference is None else self._reference.made
        own = [self._aliases.get(place, place) for place in self.made]
        extra = [place for place in self.made if self._aliases.get(place, place) not in made]
        return extra, [place for place in made if place not in set(own)]

    def _order_at(
        self, path: str, shape: tuple[int, ...], theirs: tuple[int, ...]
    ) -> Callable[[Array], Array] | None:
        """Returns the function that gives numbers that a module of the reference draws the shape of this side."""
        is_exchanged = len(theirs) > 2 and (theirs[1], theirs[0], *theirs[2:]) == shape
        if is_exchanged and path in self._exchanged:
            return lambda array: np.ascontiguousarray(array.swapaxes(0, 1))
        return _order(shape, theirs, path in self._moved)

    def _numbers(self, place: Place, distribution: str, shape: tuple[int, ...]) -> Array:
        generator = np.random.Generator(np.random.SFC64(zlib.crc32(f"{self._seed} draw {place}".encode())))
        if distribution == "normal":
            return generator.standard_normal(shape, np.float32)
        return generator.random(shape, np.float32)


def _order(shape: tuple[int, ...], theirs: tuple[int, ...], is_moved: bool) -> Callable[[Array], Array] | None:
    """Returns the function that gives numbers of the reference the shape of this side; None without one."""
    moved = len(theirs) > 2 and (*theirs[:1], *theirs[2:], theirs[1]) == shape
    if moved and (is_moved or shape != theirs):
        return lambda array: np.ascontiguousarray(align.to_mlx(align.MOVED, array))
    if math.prod(shape) == math.prod(theirs) and [n for n in shape if n > 1] == [n for n in theirs if n > 1]:
        return lambda array: array.reshape(shape)
    return None
