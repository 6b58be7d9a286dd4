"""Names, layouts and shapes of the tensors of a family."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from icenet.core.weights.files import Array

Shape = tuple[int, ...]
_EXPERT = "{e}"


@dataclass(frozen=True)
class Row:
    """A layer of a family, and the layers of ours that it contains.

    Attributes:
        theirs: Its name, with `{i}` for the index of the block. With `{e}` for that of an expert there is a layer for
            each expert, and ours are stacked.
        ours: Our names. The rows of several are stacked in this order.
        is_transposed: Whether its weight has the axes (in, out).
        is_per_head: Whether the rows of several are stacked within each head.
        separator: What is between its name and `weight` or `bias`.
        is_array: Whether it is not a layer but an array, with one axis of length 1 in front of those of our weight.
        is_fused: Whether it is an array of the weights of all experts, with the rows of several after one another.
    """

    theirs: str
    ours: Sequence[str]
    is_transposed: bool = False
    is_per_head: bool = False
    separator: str = "."
    is_array: bool = False
    is_fused: bool = False

    def name_of(self, index: Sequence[str], kind: str) -> str:
        """Returns the name of its weight, bias or other parameter in the block of an index."""
        name = _numbered(self.theirs, index)
        return name if self.is_array or self.is_fused else f"{name}{self.separator}{kind}"


class Tensor(NamedTuple):
    """A tensor of a family, and the tensors of ours that it contains."""

    row: Row
    heads: int
    paths: Sequence[str]
    shapes: Sequence[Shape]
    expert: int | None = None
    """The index of an expert, whose part of our tensors it contains; None: all of them."""

    @property
    def axis(self) -> int:
        """The axis along which several of our tensors are joined."""
        return 1 if self.row.is_fused else 0

    @property
    def shape(self) -> Shape:
        """The shape in the family's file."""
        first, axis = self.shapes[0], self.axis
        joined = (*first[:axis], sum(shape[axis] for shape in self.shapes), *first[axis + 1 :])
        if self.row.is_array:
            return (1, *joined)
        return joined[::-1] if self.row.is_transposed else joined

    def split(self, array: Array, index: int) -> Array:
        """Returns one of our tensors: a view, or for rows stacked within heads a copy."""
        array = array[0] if self.row.is_array else array.T if self.row.is_transposed else array
        if len(self.paths) == 1:
            return array
        if self.row.is_per_head:
            parts = array.reshape(self.heads, len(self.paths), -1, *array.shape[1:])
            return parts[:, index].reshape(-1, *array.shape[1:])
        start = sum(shape[self.axis] for shape in self.shapes[:index])
        rows = slice(start, start + self.shapes[index][self.axis])
        return array[:, rows] if self.row.is_fused else array[rows]

    def join(self, weights: Mapping[str, Array]) -> Array:
        """Returns the tensor of the family's file."""
        arrays = [weights[path] if self.expert is None else weights[path][self.expert] for path in self.paths]
        if self.row.is_per_head and len(arrays) > 1:
            parts = [array.reshape(self.heads, -1, *array.shape[1:]) for array in arrays]
            joined = np.concatenate(parts, axis=1).reshape(-1, *arrays[0].shape[1:])
        else:
            joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=self.axis)
        if self.row.is_array:
            return joined[None]
        return joined.T if self.row.is_transposed else joined


def tensors(rows: Sequence[Row], heads: int, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Returns the tensors of a model by their names in the files of a family with these rows.

    Args:
        rows: Names of layers.
        heads: Number of attention heads, for rows that are stacked within each head.
        shapes: Shapes of our parameters by path.
    """
    found: dict[str, Tensor] = {}
    for row in rows:
        pattern = re.compile(re.escape(row.ours[0]).replace(r"\{i\}", r"(\d+)") + r"\.(\w+)")
        for path in shapes:
            if match := pattern.fullmatch(path):
                *index, kind = match.groups()
                paths = [f"{_numbered(name, index)}.{kind}" for name in row.ours]
                name, ours = row.name_of(index, kind), [shapes[name] for name in paths]
                if _EXPERT not in name:
                    found[name] = Tensor(row, heads, paths, ours)
                    continue
                parts = [shape[1:] for shape in ours]
                for expert in range(ours[0][0]):
                    found[name.replace(_EXPERT, str(expert))] = Tensor(row, heads, paths, parts, expert)
    return found


def _numbered(name: str, index: Sequence[str]) -> str:
    return name.replace("{i}", index[0]) if index else name
