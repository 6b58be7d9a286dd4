"""Names, layouts and shapes of the tensors of a family, and lazy views of its weights under our names and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from icenet.core.config import TransformerConfig, transformer_plan
from icenet.core.errors import WeightsError
from icenet.core.weights.files import Array, Weights

if TYPE_CHECKING:
    from icenet.core.families.family import Family

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


def tensors(family: Family, config: TransformerConfig) -> dict[str, Tensor]:
    """Returns the tensors of a model by their names in the family's files."""
    shapes = parameter_shapes(config)
    found: dict[str, Tensor] = {}
    for row in family.rows:
        for index in range(config.num_layers if "{i}" in row.theirs else 1):
            for kind in ("weight", "bias"):
                paths = [f"{name.replace('{i}', str(index))}.{kind}" for name in row.ours]
                if paths[0] in shapes:
                    name = f"{row.theirs.replace('{i}', str(index))}.{kind}"
                    found[name] = Tensor(row, config.num_heads, paths, [shapes[path] for path in paths])
    return found


class ImportedWeights(Mapping[str, Array]):
    """The weights of a family under our names. Each is made from a memory map when it is looked up.

    Args:
        family: The family.
        config: The options of the model.
        weights: The files.

    Raises:
        WeightsError: They have other tensors or shapes. The message lists all of them.
    """

    def __init__(self, family: Family, config: TransformerConfig, weights: Weights) -> None:
        self._weights = weights
        self.left_out: list[str] = []
        """Names of tensors that are not weights, and of a copy of tied ones."""
        if config.num_layers > len(weights):
            raise WeightsError(
                f"{weights.path}: has {len(weights)} tensors, and its config.json {config.num_layers} layers; "
                "copy or save the folder again"
            )
        wanted = tensors(family, config)
        bare = not any(name.startswith(family.prefix) for name in weights)
        expected = {name.removeprefix(family.prefix) if bare else name: tensor for name, tensor in wanted.items()}
        unknown: list[str] = []
        for name in weights:
            if name not in expected:
                is_copy = config.tie_embeddings and name == family.head
                is_buffer = any(re.fullmatch(pattern, name) for pattern in family.buffers)
                (self.left_out if is_copy or is_buffer else unknown).append(name)
        missing = [name for name in expected if name not in weights]
        misshapen = [
            f"{name} is {list(weights.entries[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and tuple(weights.entries[name].shape) != tensor.shape
        ]
        problems = [("unknown", unknown), ("missing", missing), ("of another shape", misshapen)]
        if any(names for _, names in problems):
            listed = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems if names)
            raise WeightsError(
                f"{weights.path}: its tensors are not those of its config.json ({family.model_type}): {listed}"
            )
        self._places = {
            path: (name, tensor, index)
            for name, tensor in expected.items()
            for index, path in enumerate(tensor.paths)
        }

    def __getitem__(self, path: str) -> Array:
        name, tensor, index = self._places[path]
        return tensor.split(self._weights[name], index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class ExportedWeights(Mapping[str, Array]):
    """Our weights under the names of a family. Packed tensors are made when they are looked up.

    Args:
        family: The family.
        config: The options of the model.
        weights: Canonical weights. Further names of tied ones are not used.
    """

    def __init__(self, family: Family, config: TransformerConfig, weights: Mapping[str, Array]) -> None:
        self._weights = weights
        self._tensors = tensors(family, config)

    def __getitem__(self, name: str) -> Array:
        return self._tensors[name].join(self._weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def is_tied(embedding: Array, head: Array) -> bool:
    """Returns whether two tensors of the same shape have the same bits; compares some rows at a time."""
    if embedding.dtype != head.dtype or embedding.shape != head.shape:
        return False
    rows = max(1, 2**22 // max(1, embedding[0].nbytes)) if len(embedding) else 1
    return all(
        np.array_equal(embedding[start : start + rows].view(np.uint8), head[start : start + rows].view(np.uint8))
        for start in range(0, len(embedding), rows)
    )
