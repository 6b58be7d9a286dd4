"""The arithmetic of fp32 products, PyTorch: full fp32, or TF32 on GPUs that have it.

TF32 rounds the factors of a product to 10 bits of mantissa. `allow_tf32` of the configuration decides whether matrix
products, convolutions and attention in fp32 may use it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_CUDA: tuple[Any, ...] = ()
_CPU: tuple[Any, ...] = ()
if hasattr(torch.backends, "fp32_precision"):  # from PyTorch 2.9 on there is a setting per library and operation
    _CUDA = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    _CPU = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn)


@contextlib.contextmanager
def tf32(allow: bool) -> Iterator[None]:
    """Decides whether fp32 products on CUDA may use TF32, while the context is open. On a CPU they are full fp32.

    PyTorch's switches are process-wide: threads that compute at the same time are affected. Afterwards they have
    their former values, so other models in the process keep their own arithmetic. Without this context, PyTorch uses
    TF32 for convolutions and recurrent layers on CUDA, and not for matrix products.
    """
    if is_set(allow):
        yield
        return
    before = _settings()
    try:
        _set(allow)
        yield
    finally:
        _restore(before)


def is_set(allow: bool) -> bool:
    """Returns whether PyTorch's switches are as in the context `tf32(allow)`."""
    if not _CUDA:
        return torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allow
    return all((switch.fp32_precision == "tf32") == allow for switch in _CUDA) and not any(map(_is_reduced, _CPU))


def has_tf32(device: torch.device) -> bool:
    """Returns whether a device has TF32."""
    return device.type == "cuda"


def uses_tf32(device: torch.device) -> bool:
    """Returns whether a product of fp32 matrices on a device is computed in TF32. It computes one."""
    values = np.full((256, 256), 1 + 2**-12, np.float32)  # TF32 rounds it to 1
    product = torch.from_numpy(values).to(device) @ torch.eye(256, device=device)
    return not np.array_equal(product.cpu().numpy(), values)


def _set(allow: bool) -> None:
    # The older switches come first. They set the newer ones too; the other way round, PyTorch's own readers of the
    # older ones raise an error about a mixture.
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow
    for switch in _CUDA:
        if (switch.fp32_precision == "tf32") != allow:
            switch.fp32_precision = "tf32" if allow else "ieee"
    for switch in _CPU:
        if _is_reduced(switch):
            switch.fp32_precision = "ieee"


def _is_reduced(switch: Any) -> bool:
    return switch.fp32_precision not in ("none", "ieee")


def _settings() -> tuple[Any, ...]:
    """Returns the values of all switches; None for an older one that PyTorch refuses to read."""
    older: list[Any] = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
    ):
        try:
            older.append(read())
        except RuntimeError:  # the user has set some of the newer ones only
            older.append(None)
    return older, [switch.fp32_precision for switch in (*_CUDA, *_CPU)]


def _restore(settings: tuple[Any, ...]) -> None:
    (precision, matmul, cudnn), newer = settings
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
    elif matmul is not None:
        torch.backends.cuda.matmul.allow_tf32 = matmul
    if cudnn is not None:
        torch.backends.cudnn.allow_tf32 = cudnn
    for switch, value in zip((*_CUDA, *_CPU), newer, strict=True):
        if switch.fp32_precision != value:
            switch.fp32_precision = value
