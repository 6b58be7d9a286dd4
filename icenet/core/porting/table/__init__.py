"""The table of ATen operations, in modules by subject. Importing it imports all of them; each adds its entries."""

from __future__ import annotations

import icenet.core.porting.table.activations
import icenet.core.porting.table.arrays
import icenet.core.porting.table.convolution
import icenet.core.porting.table.decompositions
import icenet.core.porting.table.elementwise
import icenet.core.porting.table.indexing
import icenet.core.porting.table.linear_algebra
import icenet.core.porting.table.normalization
import icenet.core.porting.table.quantization
import icenet.core.porting.table.random
import icenet.core.porting.table.recurrent
import icenet.core.porting.table.reductions
import icenet.core.porting.table.shapes
import icenet.core.porting.table.sizes
import icenet.core.porting.table.special
import icenet.core.porting.table.writes  # noqa: F401
from icenet.core.porting.table.base import TABLE

for _name in [
    "alias",
    "detach",
    "diagonal",
    "expand",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unfold",
    "unsqueeze",
    "view",
    "view_as_complex",
    "view_as_real",
]:
    TABLE[f"{_name}_copy"] = TABLE[_name]  # MLX's arrays are values: a view is a copy

__all__ = ["TABLE"]
