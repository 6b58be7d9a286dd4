"""Measured parity: compares MLX with PyTorch, relative to the rounding error of PyTorch. Imports no framework.

    from icenet.parity import compare

    report = compare(mlx_module, torch_module, inputs)
    print(report)                                 # the culprit, the stages, the tree of the modules

The criterion, for all comparisons:

yardstick    error of MLX over noise of PyTorch, both relative to PyTorch in float64
resampling   the same with the noise of nearby problems, for all values of a run
curves       the same for training curves
nearby       values of nearby problems, in which the noise is sampled
measures     sizes, distances and roundings of arrays
ties         gradients at ties and edges
align        which axes of MLX and PyTorch correspond
layer        what one layer computes, on equal inputs
fp16         scales of a loss whose gradients would overflow
trace        the arrays that a run computes, in order

Any two modules:

comparison   `compare` of two modules, and the smallest input that differs
state        what the stages, replays and causes of a comparison share
arguments    checks of its arguments
inputs       inputs of the user and random ones, their axes, and the smallest that differs
stages/      one file for each stage, or for two that belong together, and their `order`
calls/       the calls of both sides: `sides` says what a side computes, `module_side` does it with a copy of a module
             (`module_copy`, `module_replays`), `events` are the calls of a run, `pairing` finds those of both sides
             (`pairs`) and `mismatches` the first whose shapes differ, `runs` and `replays` compute them, `draws` are
             equal random numbers, `forced` is a run of the reference at the values of the other side, `culprit` is
             the first difference
causes/      known causes, tried on the reference (`search`)
results/     what was found (`result`), and the `report` of it: its tree, its page (`html`, `charts`, `style`)
recordings/  a reference on another machine: `recording` writes what a comparison needs, `trace` reads it,
             `trace_comparison` compares a module with it

A configuration (`icenet parity CONFIG`):

configuration/  the `run` of a parity comparison, its three `engines`, the `randomness` of its models, the layers at
                which a difference begins (`locate`), the `report`, and the comparison of generated `texts`

A port (`icenet port`):

ports/       `port` exports a module (`original`) and tries ports of it (`attempts`) until the `proof` of one passes,
             which compares both on several sizes (`inputs`, `pair`) and finds the `limits` of the sizes;
             `size_checks` writes these into the source, `model_file` and `page` write the files of a port
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["ALL_STAGES", "Report", "compare", "read_trace", "record"]

_MODULES = {
    "ALL_STAGES": "icenet.parity.results.status",
    "Report": "icenet.parity.results.report",
    "compare": "icenet.parity.comparison",
    "read_trace": "icenet.parity.recordings.trace",
    "record": "icenet.parity.recordings.recording",
}
"""Where each name is. The module is imported when the name is first read: few users of this package need all."""

if TYPE_CHECKING:
    from icenet.parity.comparison import compare
    from icenet.parity.recordings.recording import record
    from icenet.parity.recordings.trace import read_trace
    from icenet.parity.results.report import Report
    from icenet.parity.results.status import ALL_STAGES
else:  # a type checker that reads `__getattr__` takes every name for one of this package

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
