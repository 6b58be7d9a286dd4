"""The stages of a comparison, one file for each or for two that belong together.

structure   names, parameters and shapes
weights     parameters and buffers
forward     modes and outputs
gradients   the loss and the backward pass
training    updates of the optimizer, and training steps

Each function takes the comparison (`icenet.parity.comparison`), adds rows to its stage, and names the module with the
first difference.
"""

from __future__ import annotations


class StageFailed(Exception):
    """A stage failed, so that no other is run."""
