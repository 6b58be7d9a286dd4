"""The table of ATen operations, in modules by subject."""

from icenet.core.porting.table import (  # noqa: F401  (each adds its entries)
    convolution,
    elementwise,
    indexing,
    linear_algebra,
    normalization,
    random,
    recurrent,
    reductions,
    shapes,
    sizes,
)
from icenet.core.porting.table.base import TABLE

__all__ = ["TABLE"]
