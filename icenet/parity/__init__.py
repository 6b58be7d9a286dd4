"""Measured parity: compares MLX with PyTorch, relative to the rounding error of PyTorch. Imports no framework.

    from icenet.parity import compare

    report = compare(mlx_module, torch_module, inputs)
    print(report)                                 # the culprit, the stages, the tree of the modules

comparison  `compare`: any two modules, stage by stage
result      its report: stages, rows, modules, culprit and cause
yardstick   the criterion: error of MLX over noise of PyTorch, both relative to PyTorch in float64
trace       the arrays that a run computes, in order
align       which axes of MLX and PyTorch correspond
locate      comparison of traces; the layers at which a difference begins
report      tables, verdict, JSON
engines     the three engines of a parity run: build, record, replay
run         the parity run of a configuration
modules     the comparison of an MLX module with its PyTorch twin, without a configuration
texts       comparison of generated texts
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icenet.parity.comparison import compare
    from icenet.parity.result import ALL_STAGES, Report

__all__ = ["ALL_STAGES", "Report", "compare"]

_PLACES = {"compare": "comparison", "ALL_STAGES": "result", "Report": "result"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first read: this package is imported where only a part of it is needed."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
