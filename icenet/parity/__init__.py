"""Measured parity: compares MLX with PyTorch, relative to the rounding error of PyTorch. Imports no framework.

    from icenet.parity import compare

    report = compare(mlx_module, torch_module, inputs)
    print(report)                                 # the culprit, the stages, the tree of the modules

Any two modules:

comparison  `compare`: the order of the stages, and what they share
arguments   checks of its arguments
inputs      inputs of the user and random ones, their axes, and the smallest that differs
stages      one file for each stage
pairing     which module, call and array of one side corresponds to which of the other
pairs       a call that both sides make
sides       a module as a side of the comparison: its runs, replays, updates
events      the calls of a run, as a tree
runs        runs of all sides
replays     each call alone, on the inputs of the reference
culprit     where a difference begins
causes      known causes, tried on the reference
result      the report: stages, rows, modules, culprit and cause
status      the stages and statuses of a report
rows        what its rows have in common
tree        the tree of its modules
html        its page

A reference on another machine:

recording   `record`: writes what a comparison needs
recorded    `read_trace`: a comparison with it
trace_files the files of a recording

The criterion, for all comparisons:

yardstick   error of MLX over noise of PyTorch, both relative to PyTorch in float64
ties        gradients at ties and edges
align       which axes of MLX and PyTorch correspond
trace       the arrays that a run computes, in order

A configuration (`icenet parity CONFIG`) and a port (`icenet port`):

run         the parity run of a configuration
engines     its three engines: build, record, replay
locate      comparison of their traces; the layers at which a difference begins
report      tables, verdict, JSON
modules     the same comparison for an MLX module and its PyTorch twin
texts       comparison of generated texts
port        `icenet.port`
proof       the comparison of a port with its original
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icenet.parity.comparison import compare
    from icenet.parity.recorded import read_trace
    from icenet.parity.recording import record
    from icenet.parity.result import Report
    from icenet.parity.status import ALL_STAGES

__all__ = ["ALL_STAGES", "Report", "compare", "read_trace", "record"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first read: this package is imported where only a part of it is needed."""
    if name == "compare":
        from icenet.parity.comparison import compare

        return compare
    if name == "read_trace":
        from icenet.parity.recorded import read_trace

        return read_trace
    if name == "record":
        from icenet.parity.recording import record

        return record
    if name == "Report":
        from icenet.parity.result import Report

        return Report
    if name == "ALL_STAGES":
        from icenet.parity.status import ALL_STAGES

        return ALL_STAGES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
