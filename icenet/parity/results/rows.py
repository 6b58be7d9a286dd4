"""What the rows of a report have in common: names of arrays and modules, remarks, histograms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity.results.result import Histogram

Array = npt.NDArray[Any]


def neutral(note: str) -> str:
    """Returns a remark of the yardstick with the names of the sides."""
    for framework, side in (("MLX", "a"), ("PyTorch", "b"), ("one backend", "one side")):
        note = note.replace(f"in {framework}", f"in {side}").replace(f"on {framework}", f"on {side}")
    return note


def split_at(name: str, modules: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the path of the module that holds an array, and the name of the array in it."""
    holder = name.rpartition(".")[0]
    while holder and holder not in modules:
        holder = holder.rpartition(".")[0]
    return holder, name[len(holder) + 1 :] if holder else name


def is_within(path: str, roots: Iterable[str]) -> bool:
    """Returns whether a path is one of some modules or within one."""
    return any(is_in(path, root) for root in roots)


def is_in(path: str, root: str) -> bool:
    """Returns whether a path is that of a module or within it."""
    return path == root or root == "" or path.startswith(f"{root}.")


def index_of(name: str) -> int:
    """Returns the number in `output[1]`; 0 without one."""
    return int(name.partition("[")[2].rstrip("]") or 0)


def histogram(x: Array, y: Array, bins: int = 40) -> Histogram | None:
    """Returns the histogram of the values of both sides; None without finite ones."""
    x, y = (np.asarray(v, np.float64).reshape(-1) for v in (x, y))
    x, y = x[np.isfinite(x)], y[np.isfinite(y)]
    if not x.size or not y.size:
        return None
    edges = np.histogram_bin_edges(np.concatenate([x, y]), bins)
    counts = [tuple(int(n) for n in np.histogram(v, edges)[0]) for v in (x, y)]
    return Histogram(tuple(float(edge) for edge in edges), counts[0], counts[1])
