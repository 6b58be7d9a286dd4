"""What a model remembers of the tokens read so far, PyTorch."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of the positions read so far, in buffers that grow by `step` positions."""

    step = 256
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        self.room = 0
        self.length = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds T positions, `[B, H, T, D/H]` each; gives all S of them."""
        start, self.length = self.length, self.length + keys.shape[2]
        if self.length > self.room:
            batch, heads, _, width = keys.shape
            self.room = -(-self.length // self.step) * self.step
            room = keys.new_zeros((batch, heads, self.room - start, width))
            held = (self.keys, self.values) if start else (keys, values)
            self.keys, self.values = (torch.cat([part[:, :, :start], room], dim=2) for part in held)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]
