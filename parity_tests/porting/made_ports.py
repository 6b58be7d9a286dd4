"""Ports without the proof, for tests of what they compute."""

from __future__ import annotations

import contextlib
from typing import Any

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import numpy as np
import torch
from torch import nn

from icenet.core import backends
from icenet.core.errors import PortError
from icenet.core.porting import build
from icenet.parity.ports import port as porting


def ported(module: nn.Module, *args: Any) -> tuple[Any, str]:
    """Returns a port without the proof, and its source."""
    exporter, run = backends.module("torch", "porting.export"), backends.module("torch", "porting.run")
    load = backends.module("mlx", "porting.load")
    for open_loops in (True, False):
        graph, train, program, _ = porting._export(exporter, module, args, {}, None, open_loops=open_loops)
        with contextlib.suppress(PortError) if graph.loops else contextlib.nullcontext():
            plan = build.plan(graph, train, False, "A port.")
            break
    return load.make(plan.source, plan.class_name, plan.native(run.weights(module, program))), plan.source


def close(ours: mx.array, theirs: torch.Tensor) -> None:
    """Checks that two results are equal but for rounding."""
    np.testing.assert_allclose(np.array(ours), theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
