"""The targets of the default loss, which is the distance of the outputs from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity.calls.directions import parts_of
from icenet.parity.calls.sides import Side
from icenet.parity.calls.structures import numbers_by_name
from icenet.parity.measures import rms
from icenet.parity.trace import Value

Array = npt.NDArray[Any]


class AmbiguousAxes(Exception):
    """The shape of an output does not show which of its axes are which."""


def trains_first_only(side: Side) -> bool:
    """Returns whether a module is a layer whose further outputs differ between the frameworks."""
    return side.kinds.get("") in align.DIFFERENT_CALLS or "" in parts_of(side)


class Targets:
    """Random targets of the outputs of a module, as large as the outputs of the reference.

    Args:
        seed: Seed of the targets.
        tools: The `tools.calls` of the side.
        reference: For `a`: the targets of the reference, in its axes.
        hows: The alignment of each output of `a` by its number; None if only shapes are known.
        same: Whether both sides are of one framework.
        first_only: Whether only the first output is trained, because the layer has other states in each framework.
    """

    def __init__(
        self,
        seed: int,
        tools: Any,
        reference: Targets | None = None,
        hows: Mapping[int, str] | None = None,
        same: bool = False,
        first_only: bool = False,
    ) -> None:
        self._seed, self._tools, self._hows, self._same, self._first_only = seed, tools, hows, same, first_only
        self._is_a = reference is not None
        self._drawn: dict[int, Value] = {} if reference is None else reference._drawn
        self._names: list[str] = [] if reference is None else reference._names

    def on(self, tools: Any, hows: Mapping[int, str] | None, same: bool) -> Targets:
        """Returns the same targets for `a`."""
        return Targets(self._seed, tools, self, hows, same, self._first_only)

    def __call__(self, outputs: Sequence[Any], names: Sequence[str] = ()) -> list[Value | None]:
        """Returns the target of each floating output of a call; None for one that is not trained, or has no values.

        Args:
            outputs: The arrays.
            names: Their keys or fields (`Event.output_names`).
        """
        found: list[Value | None] = []
        if not self._is_a:
            self._names[:] = names
        numbers = numbers_by_name(names, self._names, len(outputs))
        for place, (index, output) in enumerate(zip(numbers, outputs, strict=True)):
            if "float" not in str(output.dtype):
                continue
            shape = tuple(output.shape)
            if (index and self._first_only) or 0 in shape:
                found.append(None)
                continue
            if not self._is_a and index not in self._drawn:
                size = rms(self._tools.value(self._tools.snapshot(output)).array) or 1.0
                values = np.random.Generator(np.random.SFC64(self._seed + index)).standard_normal(shape)
                self._drawn[index] = Value(np.asarray(values * size, np.float32), "fp32")
            target = self._drawn.get(index)
            array = (
                None if target is None else self._aligned(place, target.array, shape) if self._is_a else target.array
            )
            zeros = np.zeros(shape, np.float32)
            found.append(Value(zeros if array is None or array.shape != shape else array, "fp32"))
        return found

    def _aligned(self, index: int, target: Array, shape: tuple[int, ...]) -> Array:
        """Returns a target with the axes of `a`."""
        if self._same:
            return target
        if self._hows is not None:
            return align.to_mlx(self._hows.get(index, align.SAME), target)
        moved = align.to_mlx(align.MOVED, target)
        if target.ndim > 2 and moved.shape == target.shape == shape:
            raise AmbiguousAxes
        return moved if moved.shape == shape else target
