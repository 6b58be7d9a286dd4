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

# From PyTorch 2.9 on there is a switch per library and operation. `torch.backends` shows them as attributes; these
# functions of theirs are three times as fast, which counts in the decoding of one token.
_read: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_write: Any = getattr(torch._C, "_set_fp32_precision_setter", None)
_CUDA = (("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")) if _read else ()
_CPU = (("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")) if _read else ()


@contextlib.contextmanager
def tf32(allow: bool) -> Iterator[None]:
    """Decides whether fp32 products on CUDA may use TF32, while the context is open. On a CPU they are full fp32.

    PyTorch's switches are process-wide: threads that compute at the same time are affected. Afterwards they have
    their former values, so other models in the process keep their own arithmetic. Without this context, PyTorch uses
    TF32 for convolutions and recurrent layers on CUDA, and not for matrix products.

    A backward pass has the values at its own time, so it belongs into the context as well.
    """
    newer = _newer()
    if _are_set(newer, allow):
        yield
        return
    older = _older()
    try:
        _set(allow)
        yield
    finally:
        _restore(older, newer)


def switches() -> tuple[Any, ...]:
    """Returns the values of PyTorch's switches for TF32."""
    return tuple(_newer().values()) or tuple(_older())


def has_tf32(device: torch.device) -> bool:
    """Returns whether a device has TF32: GPUs with CUDA."""
    return device.type == "cuda"


def uses_tf32(device: torch.device) -> bool:
    """Returns whether a product of fp32 matrices on a device is computed in TF32. It computes one."""
    if device.type == "cpu":
        return False
    values = np.full((512, 512), 1 + 2**-12, np.float32)  # TF32 rounds it to 1
    product = torch.from_numpy(values).to(device) @ torch.eye(512, device=device)
    return not np.array_equal(product.cpu().numpy(), values)


def _are_set(newer: dict[tuple[str, str], str], allow: bool) -> bool:
    if not newer:
        return torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allow
    return all((newer[key] == "tf32") == allow for key in _CUDA) and all(_is_full(newer[key]) for key in _CPU)


def _is_full(precision: str) -> bool:
    return precision in ("none", "ieee")


def _set(allow: bool) -> None:
    # The older switches come first. They set the newer ones too; the other way round, PyTorch's own readers of the
    # older ones raise an error about a mixture.
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow
    for key, precision in _newer().items():
        if key in _CUDA and (precision == "tf32") != allow:
            _write(*key, "tf32" if allow else "ieee")
        elif key in _CPU and not _is_full(precision):
            _write(*key, "ieee")


def _newer() -> dict[tuple[str, str], str]:
    """Returns the values of the newer switches; none for an older PyTorch."""
    return {key: _read(*key) for key in (*_CUDA, *_CPU)}


def _older() -> list[Any]:
    """Returns the values of the older switches; None for one that PyTorch refuses to read."""
    values: list[Any] = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
    ):
        try:
            values.append(read())
        except RuntimeError:  # the user has set some of the newer ones only
            values.append(None)
    return values


def _restore(older: list[Any], newer: dict[tuple[str, str], str]) -> None:
    precision, matmul, cudnn = older
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
    elif matmul is not None:
        torch.backends.cuda.matmul.allow_tf32 = matmul
    if cudnn is not None:
        torch.backends.cudnn.allow_tf32 = cudnn
    for key, value in _newer().items():
        if newer[key] != value:
            _write(*key, newer[key])
