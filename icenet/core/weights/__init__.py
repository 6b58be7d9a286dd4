"""Weights on disk: safetensors files, layouts, and conversion between the frameworks' forms."""

from __future__ import annotations

from icenet.core.weights.files import Weights, read, write

__all__ = ["Weights", "read", "write"]
