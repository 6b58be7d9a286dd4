"""The names of floating-point dtypes in configurations, commands and files."""

from __future__ import annotations

from typing import Literal

FloatDtype = Literal["fp32", "bf16", "fp16"]
"""A dtype of weights and arithmetic, by its name in configurations and commands."""

FLOAT_DTYPES: dict[FloatDtype, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""The name of each dtype in numpy, MLX and PyTorch, by its name in configurations and commands."""
