"""Parity: two runs of one model, judged against a third that is exact. Knows no framework.

yardstick   the one judge: error of MLX over the noise of PyTorch, both against PyTorch in float64
trace       what a run computed, array by array, in order
locate      which layer differs, and which only inherits a difference
report      the table, the verdict, JSON
run         what `icenet parity` does
"""

from __future__ import annotations
