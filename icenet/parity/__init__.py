"""Measured parity: compares MLX with PyTorch, relative to the rounding error of PyTorch. Imports no framework.

    from icenet.parity import compare

    report = compare(mlx_module, torch_module, inputs)
    print(report)                                 # the culprit, the stages, the tree of the modules

comparison  `compare`: any two modules, stage by stage
result      its report: stages, rows, modules, culprit and cause
recording   `record` and `read_trace`: a reference that is on another machine
trace_files the files of a recording
status      the stages and statuses of a report
html        its page
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

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icenet.parity.comparison import compare
    from icenet.parity.recording import read_trace, record
    from icenet.parity.result import Report
    from icenet.parity.status import ALL_STAGES

__all__ = ["ALL_STAGES", "Report", "compare", "read_trace", "record"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first read: this package is imported where only a part of it is needed."""
    if name == "compare":
        from icenet.parity.comparison import compare

        return compare
    if name in ("read_trace", "record"):
        from icenet.parity import recording

        return getattr(recording, name)
    if name == "Report":
        from icenet.parity.result import Report

        return Report
    if name == "ALL_STAGES":
        from icenet.parity.status import ALL_STAGES

        return ALL_STAGES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
