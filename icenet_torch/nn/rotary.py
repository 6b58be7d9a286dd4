"""Tables of positions, and the angles of rotary positions, PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from icenet.core.config.transformer_plan import LayerType, RotaryPlan
from icenet.core.nn.position_tables import TableBase
from icenet.core.nn.rotary import RotaryRows
from icenet_torch.nn.arrays import Array


class PositionTable(TableBase):
    """See `TableBase`. The first rows are made at once, so that a model can be traced before it has been called."""

    _earlier: Sequence[Array] = ()

    def __init__(self, make: Callable[[int, int], NDArray[np.float32]], limit: int) -> None:
        super().__init__(make, limit)
        if torch.get_default_device().type != "meta":
            self.reserve(1)

    def _grow(self, count: int) -> None:
        # torch.compile must not trace the call: it would compute the rows with its own functions
        grow = _grow_untraced if "torch._dynamo" in sys.modules else TableBase._grow
        grow(self, count)

    @torch.inference_mode(False)  # a tensor of inference mode could not be used in training
    def _joined(self, rows: list[NDArray[np.float32]]) -> Array:
        new = [torch.from_numpy(array) for array in rows]
        if self.array is not None and self.array.is_cuda:  # steps that are captured read the memory of this table
            self._earlier = [*self._earlier, self.array]
        return torch.cat(new if self.array is None else [self.array, *(array.to(self.array.device) for array in new)])

    def __getitem__(self, index: Array) -> Array:
        if self.array.device != index.device:  # the model was moved
            self.array = self.array.to(index.device)
        return self.array[index]


_grow_untraced = torch._disable_dynamo(TableBase._grow)  # imports the compiler at its first call


class RotaryPositions:
    """The angles of the rotary positions of a model.

    Args:
        plans: Size, base and scaling for each type of layers that has rotary positions.
        max_length: Maximum number of tokens in a sequence.
    """

    def __init__(self, plans: Mapping[LayerType, RotaryPlan], max_length: int) -> None:
        self.rows = {kind: RotaryRows(plan) for kind, plan in plans.items()}
        self.tables = {kind: PositionTable(rows.make, rows.count(max_length)) for kind, rows in self.rows.items()}

    @property
    def switch(self) -> int | None:
        """Number of tokens in a row above which the angles of earlier tokens are others; None if there is none."""
        return min((rows.switch for rows in self.rows.values() if rows.switch is not None), default=None)

    def reserve(self, length: int) -> None:
        """Makes the rows that sequences of at most `length` tokens need."""
        for kind, rows in self.rows.items():
            self.tables[kind].reserve(rows.count(length))

    def angles(self, positions: Array, lengths: Array) -> dict[LayerType | None, Array | None]:
        """Returns the cosines, negative sines and sines for `rotate`, for each type of layers.

        It is None for layers without rotation.

        Args:
            positions: Position of each token, int `[T]` or `[B, T]`.
            lengths: Number of tokens of each row, int `[1]` or `[B, 1]`.
        """
        found: dict[LayerType | None, Array | None] = {None: None}
        for kind, rows in self.rows.items():
            angles = self.tables[kind][rows.index(positions, lengths)]
            if rows.is_dynamic:  # [..., R / 2] frequencies
                turned = positions[..., None].to(torch.float32) * angles
                cos, sin = torch.cos(turned), torch.sin(turned)
                angles = torch.stack([cos, -sin, sin], dim=-2)
            found[kind] = angles if angles.ndim == 3 else angles[:, None]  # [T, 3, R / 2] or [B, 1, T, 3, R / 2]
        return found
