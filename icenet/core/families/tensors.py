"""Names, layouts and shapes of the tensors of a family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from icenet.core.config import TransformerConfig, transformer_plan
from icenet.core.weights.files import Array

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A layer of a family, and the layers of ours that it contains.

    Attributes:
        theirs: Its name, with `{i}` for the index of the block.
        ours: Our names. The rows of several are stacked in this order.
        is_transposed: Whether its weight has the axes (in, out).
        is_per_head: Whether the rows of several are stacked within each head.
    """

    theirs: str
    ours: Sequence[str]
    is_transposed: bool = False
    is_per_head: bool = False


class Tensor(NamedTuple):
    """A tensor of a family, and the tensors of ours that it contains."""

    row: Row
    heads: int
    paths: Sequence[str]
    shapes: Sequence[Shape]

    @property
    def shape(self) -> Shape:
        """The shape in the family's file."""
        joined = (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])
        return joined[::-1] if self.row.is_transposed else joined

    def split(self, array: Array, index: int) -> Array:
        """Returns one of our tensors: a view, or for rows stacked within heads a copy."""
        array = array.T if self.row.is_transposed else array
        if len(self.paths) == 1:
            return array
        if self.row.is_per_head:
            parts = array.reshape(self.heads, len(self.paths), -1, *array.shape[1:])
            return parts[:, index].reshape(self.shapes[index])
        start = sum(shape[0] for shape in self.shapes[:index])
        return array[start : start + self.shapes[index][0]]

    def join(self, weights: Mapping[str, Array]) -> Array:
        """Returns the tensor of the family's file."""
        arrays = [weights[path] for path in self.paths]
        if self.row.is_per_head and len(arrays) > 1:
            parts = [array.reshape(self.heads, -1, *array.shape[1:]) for array in arrays]
            joined = np.concatenate(parts, axis=1).reshape(-1, *arrays[0].shape[1:])
        else:
            joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return joined.T if self.row.is_transposed else joined


def parameter_shapes(config: TransformerConfig) -> dict[str, Shape]:
    """Returns the shape of each parameter of a transformer by its path; tied ones once."""
    shapes: dict[str, Shape] = {}
    width = config.hidden_size

    def norm(name: str, size: int, kind: str) -> None:
        shapes[f"{name}.weight"] = (size,)
        if kind == "layer_norm":
            shapes[f"{name}.bias"] = (size,)

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    shapes["token_embedding.weight"] = (config.vocab_size, width)
    if config.positions == "learned":
        shapes["position_embedding.weight"] = (config.max_seq_length, width)
    for index, block in enumerate(transformer_plan.blocks(config)):
        attention, network, name = block.attention, block.feed_forward, f"blocks.{index}"
        queries, keys = attention.num_heads * attention.head_size, attention.num_kv_heads * attention.head_size
        norm(f"{name}.attention_norm", width, block.norm.kind)
        for part, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            linear(f"{name}.attention.{part}", rows, width, attention.bias)
        linear(f"{name}.attention.out_proj", width, queries, attention.output_bias)
        if attention.query_key_norm != "none":
            per_head = attention.query_key_norm == "head"
            for part, rows in (("q_norm", queries), ("k_norm", keys)):
                norm(f"{name}.attention.{part}", attention.head_size if per_head else rows, attention.norm.kind)
        norm(f"{name}.feed_forward_norm", width, block.norm.kind)
        for part in ("gate_proj", "up_proj") if network.is_gated else ("up_proj",):
            linear(f"{name}.feed_forward.{part}", network.inner, width, network.bias)
        linear(f"{name}.feed_forward.down_proj", width, network.inner, network.bias)
        if block.norm_position == "sandwich":
            norm(f"{name}.attention_post_norm", width, block.norm.kind)
            norm(f"{name}.feed_forward_post_norm", width, block.norm.kind)
    if config.norm_position != "post":
        norm("final_norm", width, config.norm)
    if not config.tie_embeddings:
        linear("output", config.vocab_size, width, config.output_bias)
    return shapes


def tensors(rows: Sequence[Row], config: TransformerConfig) -> dict[str, Tensor]:
    """Returns the tensors of a model by their names in the files of a family with these rows."""
    shapes = parameter_shapes(config)
    found: dict[str, Tensor] = {}
    for row in rows:
        for index in range(config.num_layers if "{i}" in row.theirs else 1):
            for kind in ("weight", "bias"):
                paths = [f"{name.replace('{i}', str(index))}.{kind}" for name in row.ours]
                if paths[0] in shapes:
                    name = f"{row.theirs.replace('{i}', str(index))}.{kind}"
                    found[name] = Tensor(row, config.num_heads, paths, [shapes[path] for path in paths])
    return found
