"""Tables of positions, and the angles of rotary positions, MLX."""

from __future__ import annotations

from collections.abc import Mapping

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from icenet.core.config.transformer_plan import LayerType, RotaryPlan
from icenet.core.nn.position_tables import TableBase
from icenet.core.nn.rotary import RotaryRows
from icenet.nn.arrays import Array


class PositionTable(TableBase):
    """See `TableBase`."""

    def _joined(self, rows: list[NDArray[np.float32]]) -> Array:
        present = [] if self.array is None else [np.array(self.array)]
        return mx.array(np.concatenate([*present, *rows]))  # not lazy: another thread may use it

    def __getitem__(self, index: Array) -> Array:
        return self.array[index]


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
                turned = positions[..., None].astype(mx.float32) * angles
                cos, sin = mx.cos(turned), mx.sin(turned)
                angles = mx.stack([cos, -sin, sin], axis=-2)
            found[kind] = angles if angles.ndim == 3 else angles[:, None]  # [T, 3, R / 2] or [B, 1, T, 3, R / 2]
        return found
