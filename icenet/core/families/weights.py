"""Lazy views of the weights of a family under our names, and of ours under the names of a family."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from icenet.core import backends
from icenet.core.config import Config
from icenet.core.errors import WeightsError
from icenet.core.families.family import Family
from icenet.core.families.tensors import Row, Shape, Tensor, tensors
from icenet.core.weights.arrays import RenamedWeights, WeightsView
from icenet.core.weights.files import FAMILY, Array, StoredWeights
from icenet.core.weights.packed import KINDS, PackedView, StoredPacked
from icenet.core.weights.quantization import Quantization
from icenet.core.weights.quantized import MlxWeights
from icenet.core.weights.safetensors import Spec, release, spec_of

_STATISTIC, _COUNTER = ".running_var", ".num_batches_tracked"


class ImportedWeights(WeightsView):
    """The weights of a family under our names. Each is made from a memory map when it is looked up.

    Args:
        family: The family.
        config: The configuration of the model.
        weights: The files.

    Raises:
        WeightsError: They have other tensors or shapes. The message lists all of them.
    """

    def __init__(self, family: Family, config: Config, weights: StoredWeights) -> None:
        self.stored = weights
        """The files."""
        self.metadata = {FAMILY: family.model_type}
        self.left_out: list[str] = []
        """Names of tensors that are not weights, and of a copy of tied ones."""
        self.unused: list[str] = []
        """Names of weights that our model does not have."""
        if config.model.num_layers > len(weights):
            raise WeightsError(
                f"{weights.path}: has {len(weights)} tensors, and its config.json {config.model.num_layers} layers; "
                "copy or save the folder again"
            )
        names = {family.canonical(name): name for name in weights}
        wanted = _tensors_of_files(family, config, set(names))
        bare = not any(name.startswith(family.prefix) for name in weights)
        wanted = {name.removeprefix(family.prefix) if bare else name: tensor for name, tensor in wanted.items()}
        expected = {names.get(name, name): tensor for name, tensor in wanted.items()}
        unknown: list[str] = []
        for name in weights:
            if name not in expected and not any(re.fullmatch(pattern, name) for pattern in family.copies):
                is_copy = getattr(config.model, "tie_embeddings", False) and name == family.head
                is_buffer = any(re.fullmatch(pattern, name) for pattern in family.buffers)
                norm = name.removesuffix(_COUNTER)
                if family.has_counters and name != norm and f"{norm}{_STATISTIC}" in expected:
                    continue
                if any(re.fullmatch(pattern, name) for pattern in family.unused):
                    self.unused.append(name)
                else:
                    (self.left_out if is_copy or is_buffer else unknown).append(name)
        missing = [name for name in expected if name not in weights]
        misshapen = [
            f"{name} is {list(weights.spec(name).shape)}, not {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights.spec(name).shape != tensor.shape
        ]
        problems = [("unknown", unknown), ("missing", missing), ("of another shape", misshapen)]
        if any(names for _, names in problems):
            listed = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems if names)
            raise WeightsError(
                f"{weights.path}: its tensors are not those of its config{'.json' if family.parts else ''} "
                f"({family.model_type}): {listed}"
            )
        self._names = self._places = dict[str, list[tuple[str, Tensor, int]]]()
        for name, tensor in expected.items():
            for index, path in enumerate(tensor.paths):
                self._places.setdefault(path, []).append((name, tensor, index))
        for places in self._places.values():  # several: those of the experts
            if len({weights.spec(name).dtype for name, _, _ in places}) > 1:
                listed = ", ".join(f"{name} is {weights.spec(name).dtype}" for name, _, _ in places)
                raise WeightsError(f"{weights.path}: experts of one layer must have the same dtype: {listed}")

    def __getitem__(self, path: str) -> Array:
        return _split(self.stored, self._places[path], self.spec(path))

    @property
    def packed(self) -> PackedImport | None:
        """The same weights with the quantized layers of an mlx-lm folder packed; None if there are none."""
        if not isinstance(self.stored, MlxWeights):
            return None
        found = PackedImport(self, self.stored.packed_weights, self._places)
        return found if found.layers else None

    def spec(self, path: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        places = self._places[path]
        name, tensor, index = places[0]
        experts = () if tensor.expert is None else (len(places),)
        return Spec(self.stored.spec(name).dtype, (*experts, *tensor.shapes[index]))


class PackedImport(PackedView):
    """Imported weights with the quantized layers packed, except for layers whose axes the family exchanges.

    Args:
        weights: The weights.
        stored: The tensors of the files.
        places: The name, the tensor and the part of it for each of our paths.
    """

    def __init__(
        self,
        weights: ImportedWeights,
        stored: StoredPacked,
        places: Mapping[str, Sequence[tuple[str, Tensor, int]]],
    ) -> None:
        layers: dict[str, Quantization] = {}
        for path, parts in places.items():
            names = [name.rpartition(".") for name, _, _ in parts]
            found = {stored.layers.get(layer) if kind == "weight" else None for layer, _, kind in names}
            moves = any(tensor.row.is_transposed or tensor.row.is_array for _, tensor, _ in parts)
            if len(found) == 1 and (quantization := found.pop()) is not None and not moves:
                layers[path.removesuffix(".weight")] = quantization
        super().__init__(weights, layers)
        self._stored, self._places = stored, places

    def parts(self, layer: str, kind: str) -> Array:
        places = [
            (f"{name.removesuffix('weight')}{kind}", tensor, index)
            for name, tensor, index in self._places[f"{layer}.weight"]
        ]
        return _split(self._stored, places, self.spec(f"{layer}.{kind}"))


def _split(stored: Mapping[str, Array], places: Sequence[tuple[str, Tensor, int]], spec: Spec) -> Array:
    """Returns one of our arrays from the tensors that contain its parts: one, or one of each expert."""
    name, tensor, index = places[0]
    if tensor.expert is None:
        return tensor.split(stored[name], index)
    stacked = np.empty(spec.shape, spec.dtype)
    for name, tensor, index in places:
        array = stored[name]
        stacked[tensor.expert] = tensor.split(array, index)
        release(array)  # otherwise the file would be in memory next to the copy
    return stacked


class OriginalWeights(RenamedWeights):
    """The weights of a folder under their own names, with those that our model does not have.

    Args:
        imported: The weights.
    """

    def __init__(self, imported: ImportedWeights) -> None:
        super().__init__(imported.stored, {}, set(imported.left_out))


class ExportedWeights(Mapping[str, Array]):
    """Our weights under the names of a family. Packed tensors are made when they are looked up.

    Args:
        family: The family.
        config: The configuration of the model.
        weights: Canonical weights. Further names of tied ones are not used.
        alternative: Rows that replace those of the same layers: one of the family's `alternatives`.
    """

    def __init__(
        self, family: Family, config: Config, weights: Mapping[str, Array], alternative: Sequence[Row] = ()
    ) -> None:
        self._weights = weights
        shapes = backends.meta_model(config).weight_shapes()
        for layer in getattr(weights, "layers", ()):  # quantized ones
            shapes |= {f"{layer}.{kind}": spec_of(weights, f"{layer}.{kind}").shape for kind in KINDS}
        self._tensors = _tensors(family, config, alternative, shapes)
        if getattr(config.model, "output", None) == "none":  # as the library writes a model without its head
            self._tensors = {name.removeprefix(family.prefix): tensor for name, tensor in self._tensors.items()}
        norms = [name.removesuffix(_STATISTIC) for name in self._tensors if name.endswith(_STATISTIC)]
        self._counters = [f"{name}{_COUNTER}" for name in norms if family.has_counters]

    def quantized_layers(self, layers: Mapping[str, Quantization]) -> dict[str, Quantization]:
        """Returns the settings of quantized layers by the family's names of the layers.

        Raises:
            WeightsError: Layers that the family joins to one have different settings.
        """
        found: dict[str, Quantization] = {}
        for name, tensor in self._tensors.items():
            layer, _, kind = name.rpartition(".")
            if kind != "weight":
                continue
            own = {layers.get(path.removesuffix(".weight")) for path in tensor.paths}
            if len(own) > 1:
                paths = ", ".join(tensor.paths)
                raise WeightsError(f"{paths}: are one layer in {layer}, and must be quantized in the same way")
            if (quantization := own.pop()) is not None:
                found[layer] = quantization
        return found

    def __getitem__(self, name: str) -> Array:
        if name in self._counters:
            return np.zeros((), np.int64)
        return self._tensors[name].join(self._weights)

    def spec(self, name: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        if name in self._counters:
            return Spec(np.dtype(np.int64), ())
        tensor = self._tensors[name]
        dtypes = {spec_of(self._weights, path).dtype for path in tensor.paths}
        array = self[name] if len(dtypes) > 1 else None
        return Spec(dtypes.pop() if array is None else array.dtype, tuple(tensor.shape))

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self._counters

    def __iter__(self) -> Iterator[str]:
        return iter([*self._tensors, *self._counters])

    def __len__(self) -> int:
        return len(self._tensors) + len(self._counters)


def family_tensors(family: Family, config: Config) -> dict[str, Tensor]:
    """Returns the tensors of a model by their names in the files of its family."""
    return _tensors(family, config, (), backends.meta_model(config).weight_shapes())


def _tensors(
    family: Family, config: Config, alternative: Sequence[Row], shapes: Mapping[str, Shape]
) -> dict[str, Tensor]:
    """Returns the tensors of a model whose parameters have some shapes, in one of the family's `alternatives`."""
    replaced = {name for row in alternative for name in row.ours}
    rows = [*family.rows, *(family.rows_of(config.model) if family.rows_of else ())]
    rows = [*(row for row in rows if replaced.isdisjoint(row.ours)), *alternative]
    return tensors(rows, getattr(config.model, "num_heads", 1), shapes)


def _tensors_of_files(family: Family, config: Config, names: set[str]) -> dict[str, Tensor]:
    """Returns the tensors of a model in the alternative of its family that has the most of some names."""
    shapes = backends.meta_model(config).weight_shapes()
    found = [_tensors(family, config, alternative, shapes) for alternative in ((), *family.alternatives)]
    return max(
        found, key=lambda wanted: sum(name in names or name.removeprefix(family.prefix) in names for name in wanted)
    )


def is_tied(embedding: Array, head: Array) -> bool:
    """Returns whether two tensors of the same shape have the same bits; compares some rows at a time."""
    if embedding.dtype != head.dtype or embedding.shape != head.shape:
        return False
    rows = max(1, 2**22 // max(1, embedding[0].nbytes)) if len(embedding) else 1
    return all(
        np.array_equal(embedding[start : start + rows].view(np.uint8), head[start : start + rows].view(np.uint8))
        for start in range(0, len(embedding), rows)
    )
