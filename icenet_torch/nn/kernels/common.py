"""What the kernels share."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl


@lru_cache
def can_overlap(device: torch.device) -> bool:
    """Returns whether a kernel can start while the one before it runs (programmatic dependent launch).

    Such a kernel reads what other kernels write after `gdc_wait` only. It needs Hopper and Triton 3.4.
    """
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return is_hopper and hasattr(tl.extra.cuda, "gdc_wait")
