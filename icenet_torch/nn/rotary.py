"""Tables of positions, and the angles of rotary positions, PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from icenet.core.config.transformer_plan import LayerType
from icenet.core.nn.position_tables import TableBase
from icenet.core.nn.rotary import RotaryPositionsBase
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


class RotaryPositions(RotaryPositionsBase):
    """See `RotaryPositionsBase`."""

    table = PositionTable

    def angles(self, positions: Array, lengths: Array) -> dict[LayerType | None, Array | None]:
        found: dict[LayerType | None, Array | None] = {None: None}
        for kind, rows in self.rows.items():
            angles = self.tables[kind][rows.index(positions, lengths)]
            if rows.is_dynamic:  # [..., R / 2] frequencies
                turned = positions[..., None].to(torch.float32) * angles
                cos, sin = torch.cos(turned), torch.sin(turned)
                angles = torch.stack([cos, -sin, sin], dim=-2)
            found[kind] = angles if angles.ndim == 3 else angles[:, None]  # [T, 3, R / 2] or [B, 1, T, 3, R / 2]
        return found
