"""Ports without the proof, for tests of what they compute."""

from __future__ import annotations

import contextlib
from typing import Any

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import numpy as np
import torch
from torch import nn

from icenet.core.errors import PortError
from icenet.core.porting import build
from icenet.parity.ports.original import Original


def ported(module: nn.Module, *args: Any) -> tuple[Any, str]:
    """Returns a port without the proof, and its source."""
    original = Original(module, args)
    for open_loops in (True, False):
        export = original.export(open_loops=open_loops)
        with contextlib.suppress(PortError) if export.graph.loops else contextlib.nullcontext():
            plan = build.plan(export.graph, export.train, False, "A port.")
            break
    return export.make(plan), plan.source


def close(ours: mx.array, theirs: torch.Tensor) -> None:
    """Checks that two results are equal but for rounding."""
    np.testing.assert_allclose(np.array(ours), theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
