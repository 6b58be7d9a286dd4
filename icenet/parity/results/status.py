"""The statuses and stages of a comparison, and how its numbers are written."""

from __future__ import annotations

import math

PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"
"""Statuses of a stage. A stage is "not run" if an earlier one failed, "skipped" if the user left it out."""

DIFFERS, CONTAINS, INHERITS, LESS_EXACT = "differs", "contains", "inherits", "less exact"
"""Further statuses of a row or a module, next to "passed", "skipped" and "not run":

differs      over the tolerance on the inputs of the reference: the difference begins here
contains     a module within it differs
inherits     over the tolerance only because its inputs already differ
less exact   within the error of sums that are taken term by term in fp32 (floor 6 of the yardstick)
"""

ALL_STAGES = ("structure", "weights", "forward", "loss", "gradients", "optimizer", "training")
"""The stages in order. Each is run only if those before it passed.

structure    names and shapes: the modules, parameters and outputs of both sides
weights      the parameters and buffers after conversion to the same axes
forward      the outputs of every module, in the run and on the inputs of the reference
loss         the loss
gradients    the gradients of every parameter and activation
optimizer    one optimizer step on equal gradients, with the running statistics
training     the losses of free-running steps
"""


def number(value: float) -> str:
    """Returns a number with two digits: 0.99, 8.1, 810, 1900, 2.3e+06."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "∞" if math.isinf(value) else "NaN"
    return f"{float(f'{value:.2g}'):.0f}" if 100 <= value < 1e5 else f"{value:.2g}"
