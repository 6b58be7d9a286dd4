"""PyTorch tensors: dtypes of products, memory layout of images, and conversion to and from numpy."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from icenet.core.dtypes import FLOAT_DTYPES

Array: TypeAlias = Tensor
Dtype: TypeAlias = torch.dtype

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in FLOAT_DTYPES.items()}
"""Dtypes of parameters and of activations by their name in configs and commands."""


def on_cpu(x: Array) -> bool:
    """Returns whether x is on the CPU."""
    return x.device.type == "cpu"


def is_half(x: Array) -> bool:
    """Returns whether x is fp16 or bf16."""
    return x.dtype in (torch.float16, torch.bfloat16)


def product_dtype(x: Array) -> torch.dtype:
    """Returns the dtype in which products with x are computed (matrix products, convolutions, attention).

    It is the dtype of x, or fp32 for half precision on a CPU, where such products are about 20 times slower.
    """
    return torch.float32 if is_half(x) and on_cpu(x) else x.dtype


def cast_weight(weight: Array, x: Array) -> Array:
    """Rounds a weight to the dtype of x and returns it in `product_dtype(x)`."""
    return weight.to(x.dtype).to(product_dtype(x))


def to_channels_first(x: Array) -> Array:
    """Returns images `[B, H, W, C]` as `[B, C, H, W]`, the layout of PyTorch's models.

    On CUDA the result is a view, which is the memory format channels_last. On other devices it is a copy: on MPS the
    gradient of batch norm is wrong for images that are not contiguous, and `conv2d` gives the reason for the CPU.
    """
    x = x.permute(0, 3, 1, 2)
    return x if x.is_cuda else x.contiguous()


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Returns a C-contiguous numpy array on the host, a view if possible; bfloat16 becomes `ml_dtypes.bfloat16`."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:  # PyTorch exports no bfloat16 to numpy
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_numpy(array: np.ndarray, contiguous: bool = True) -> torch.Tensor:
    """Returns a tensor on the host; `ml_dtypes.bfloat16` becomes bfloat16.

    The tensor shares memory with the array if possible and must not be written to. With `contiguous` it is.
    """
    if array.dtype == ml_dtypes.bfloat16:
        return from_numpy(array.view(np.int16), contiguous).view(torch.bfloat16)
    # PyTorch reads no negative strides, which an axis of length 1 may have in a contiguous array too
    if (contiguous and not array.flags.c_contiguous) or min(array.strides, default=0) < 0:
        array = array.copy(order="C")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def triton_kernels(device: torch.device) -> Any:
    """Returns `icenet_torch.nn.kernels` for eager code on CUDA with Triton, otherwise None."""
    return _import_kernels() if device.type == "cuda" and not torch.compiler.is_compiling() else None


@functools.cache
def _import_kernels() -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    from icenet_torch.nn import kernels

    return kernels
