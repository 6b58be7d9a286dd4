"""Weights on disk: safetensors files, axis layouts, and conversion between the forms of the frameworks."""

from __future__ import annotations

import warnings
from typing import Any

from icenet.core.weights.files import Weights, read, write
from icenet.core.weights.prefixes import strip_prefix

__all__ = ["Weights", "read", "strip_prefix", "write"]


def __getattr__(name: str) -> Any:
    """Returns documented names of version 0.1, which had its own dtype for bfloat16."""
    if name not in ("BFLOAT16", "bfloat16_to_float32"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import ml_dtypes
    import numpy as np

    new, value = {
        "BFLOAT16": ("ml_dtypes.bfloat16", np.dtype(ml_dtypes.bfloat16)),
        "bfloat16_to_float32": ("array.astype(numpy.float32)", lambda array: array.astype(np.float32)),
    }[name]
    warnings.warn(f"{__name__}.{name} is deprecated; use {new}", DeprecationWarning, stacklevel=2)
    return value
