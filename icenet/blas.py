"""Importing this module loads a fast BLAS for MLX on Linux CPUs (see `icenet.core.host.blas`).

Each module that uses MLX imports it before `mlx.core`, which binds its symbols when it is imported.
"""

from __future__ import annotations

from icenet.core.host.blas import BlasWarning, Status, choose, load, status

__all__ = ["BlasWarning", "Status", "choose", "load", "status"]

load()
