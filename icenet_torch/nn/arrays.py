"""Arrays of PyTorch: dtypes, devices, and in and out of numpy."""

from __future__ import annotations

import warnings
from typing import TypeAlias

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor

from icenet.core.weights.safetensors import BFLOAT16, DTYPES, dtype_name

Array: TypeAlias = Tensor


def on_cpu(x: Array) -> bool:
    """True where products in half precision are slow and are better done in fp32 (20x on x86)."""
    return x.device.type == "cpu"


def is_half(x: Array) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def to_channels_first(x: Array) -> Array:
    """Images `[B, H, W, C]` as PyTorch's models take them, `[B, C, H, W]`.

    On CUDA a view, which is the memory format channels_last. Elsewhere a copy: on MPS batch norm's gradient is
    wrong for images that are not contiguous, and for the CPU see `conv2d`.
    """
    x = x.permute(0, 3, 1, 2)
    return x if x.is_cuda else x.contiguous()


_TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


def to_numpy(tensor: torch.Tensor) -> Array:
    """The tensor's values and bits as a C-contiguous numpy array on the host; a view where it can be.

    bfloat16 becomes `icenet.core.weights.safetensors.BFLOAT16`.
    """
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def from_numpy(array: Array) -> torch.Tensor:
    """The inverse of `to_numpy`, sharing memory where it can: do not write into the tensor."""
    array = array if array.flags.c_contiguous else array.copy(order="C")
    name = dtype_name(array.dtype)
    if name == "BF16":
        array = array.view(np.int16)
    elif array.dtype != DTYPES[name].newbyteorder("="):
        array = array.astype(DTYPES[name].newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).view(_TORCH_DTYPES[name])
