"""Tables of positions, and the angles of rotary positions, MLX."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from icenet.core.config.transformer_plan import LayerType
from icenet.core.nn.position_tables import TableBase
from icenet.core.nn.rotary import RotaryPositionsBase
from icenet.nn.arrays import Array


class PositionTable(TableBase):
    """See `TableBase`."""

    def _joined(self, rows: list[NDArray[np.float32]]) -> Array:
        present = [] if self.array is None else [np.array(self.array)]
        return mx.array(np.concatenate([*present, *rows]))  # not lazy: another thread may use it

    def __getitem__(self, index: Array) -> Array:
        return self.array[index]


class RotaryPositions(RotaryPositionsBase):
    """See `RotaryPositionsBase`."""

    table = PositionTable

    def angles(self, positions: Array, lengths: Array) -> dict[LayerType | None, Array | None]:
        found: dict[LayerType | None, Array | None] = {None: None}
        for kind, rows in self.rows.items():
            angles = self.tables[kind][rows.index(positions, lengths)]
            if rows.is_dynamic:  # [..., R / 2] frequencies
                turned = positions[..., None].astype(mx.float32) * angles
                cos, sin = mx.cos(turned), mx.sin(turned)
                angles = mx.stack([cos, -sin, sin], axis=-2)
            found[kind] = angles if angles.ndim == 3 else angles[:, None]  # [T, 3, R / 2] or [B, 1, T, 3, R / 2]
        return found
