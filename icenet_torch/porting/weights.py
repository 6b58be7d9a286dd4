"""Every array of the original of a port by path."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from icenet_torch.porting.run import to_numpy, to_torch


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns parameters and buffers by path; buffers that are not persistent, too."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {path: value.detach() for path, value in named}


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """Returns parameters and buffers as numpy arrays."""
    return {path: to_numpy(value) for path, value in tensors(module).items()}


def assign(module: nn.Module, values: Mapping[str, np.ndarray]) -> None:
    """Sets parameters and buffers by path; they keep their dtypes."""
    own = tensors(module)
    with torch.no_grad():
        for path, value in values.items():
            own[path].copy_(to_torch(value))
