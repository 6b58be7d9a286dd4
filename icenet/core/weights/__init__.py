"""Weights on disk: safetensors files, axis layouts, and conversion between the forms of the frameworks."""

from __future__ import annotations

from icenet.core.weights.files import Weights, read, write

__all__ = ["Weights", "read", "write"]
