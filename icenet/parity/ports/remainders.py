"""Guards of one size that allow its multiples, as one guard: `s0 % 32 == 0` for the ten of a Swin transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from icenet.parity.ports.limits import Guard, Limits, Place

NEAR, FAR = range(1, 1025), range(20000, 21025)
"""Sizes at which the guards are evaluated. A guard on a range, not on a remainder, differs at large ones."""


def with_remainders(limits: Limits, shapes: Sequence[Sequence[int]]) -> Limits:
    """Returns limits in which the guards of a size are one remainder, where they allow the same sizes.

    Args:
        limits: The limits of a port.
        shapes: The shapes of the inputs of the example.
    """
    groups: dict[tuple[Place, ...], list[Guard]] = {}
    for guard in limits.guards:
        places = next(iter(guard.places.values())) if len(guard.places) == 1 else ()
        groups.setdefault(places, []).append(guard)
    found: list[Guard] = []
    for places, guards in groups.items():
        joined = _remainder(guards, places) if places else None
        own = [shapes[number][dim] for number, dim in places[:1]]
        is_own = joined is not None and joined.holds(dict.fromkeys(joined.places, own[0]))
        found += [joined] if joined is not None and is_own else guards
    return replace(limits, guards=found)


def _remainder(guards: list[Guard], places: tuple[Place, ...]) -> Guard | None:
    """Returns the guard of a remainder that allows the sizes that some guards allow together, None without one."""
    name = next(iter(guards[0].places))
    sizes = [*NEAR, *FAR]
    right = [size for size in sizes if all(guard.holds(dict.fromkeys(guard.places, size)) for guard in guards)]
    step = math.gcd(*(size - right[0] for size in right)) if right else 0
    if step < 2 or right != [size for size in sizes if (size - right[0]) % step == 0]:
        return None
    return Guard(f"{name} % {step} == {right[0] % step}", {name: places})
