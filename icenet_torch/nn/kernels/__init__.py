"""Triton kernels for NVIDIA GPUs: dropout masks, the loss and its gradient, attention to a cache, rotary positions.

The package is imported only on a GPU and with Triton, which PyTorch's CUDA builds include.
"""

from __future__ import annotations

from icenet_torch.nn.kernels.attention import attend, rotate
from icenet_torch.nn.kernels.dropout_masks import dropout, dropout_mask
from icenet_torch.nn.kernels.losses import cross_entropy

__all__ = ["attend", "cross_entropy", "dropout", "dropout_mask", "rotate"]
