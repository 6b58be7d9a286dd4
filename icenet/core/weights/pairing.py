"""Which arrays of an MLX module are which weights of a PyTorch module, and the conversion of their values.

The MLX module determines the layers. A weight of PyTorch belongs to the array with its name, or with the name that
the counterpart of the layer has in PyTorch (`icenet.core.weights.counterparts`): `attn.in_proj_weight` belongs to the
three matrices of the `mlx.nn.MultiHeadAttention` at `attn`. Everything that does not fit is collected, for one error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import WeightsError
from icenet.core.messages import some
from icenet.core.weights import layout, prefixes
from icenet.core.weights.counterparts import (
    ATTENTION_OF,
    CHILD_NAMES,
    NOT_CONVERTED,
    PROJECTIONS,
    Counterpart,
    counterpart,
)
from icenet.core.weights.layer_paths import LayerPaths
from icenet.core.weights.rename import Rename, apply_rename, from_torch_names

Array = NDArray[Any]
Shape = tuple[int, ...]

_MOST_NAMES = 200
"""Names of one kind of problem in a message."""
_MOST_GUESSES = 5
_SECOND_LAYER = re.compile(r"(weight|bias)_(ih|hh)_l(\d+_reverse|[1-9]\d*)")


@dataclass(frozen=True)
class MLXWeights:
    """What an MLX module holds.

    Attributes:
        shapes: Canonical shape (PyTorch's axes) of each array, by canonical path.
        kinds: Layer kind by path (`icenet.core.weights.layout`).
        counterparts: Kind of counterpart by path (`icenet.core.weights.counterparts`).
        mlx_names: Canonical path by MLX's own path, where the two differ.
        shared: Owner's path of each further path of a shared array.
    """

    shapes: Mapping[str, Shape]
    kinds: Mapping[str, str]
    counterparts: Mapping[str, str]
    mlx_names: Mapping[str, str]
    shared: Mapping[str, str]


@dataclass(frozen=True)
class TorchWeights:
    """What a PyTorch module or a state dict holds.

    Attributes:
        shapes: Shape by name.
        kinds: Layer kind by path; empty for a state dict.
        shared: Owner's name of each further name of a shared tensor.
        transposed: Names of the weights of linear layers that have the axes (in, out).
    """

    shapes: Mapping[str, Shape]
    kinds: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    transposed: Collection[str] = ()


class _Place(NamedTuple):
    """An array of MLX, or an array that the counterpart of one of its layers has in PyTorch."""

    layer: Counterpart | None
    name: str


class Pairing:
    """The weights of a PyTorch module by the arrays of its MLX twin.

    Attributes:
        problems: What does not fit, one text for each kind of problem; empty if the weights can be converted.
        added: Shape of each bias that the MLX module lacks because its class has no option for it, by path.
        removed: Paths of biases that the PyTorch module lacks, in layers of MLX without an option for it.
    """

    def __init__(self, mlx: MLXWeights, torch: TorchWeights, rename: Rename = None) -> None:
        """
        Args:
            mlx: What the MLX module holds.
            torch: What the PyTorch module or the state dict holds.
            rename: See `icenet.core.weights.rename`.

        Raises:
            UsageError: `rename` is invalid.
        """
        self._mlx, self._torch = mlx, torch
        self._addable, self._removable = _optional_biases(mlx)
        self._shapes = {**mlx.shapes, **self._addable}
        self._below = _below(self._shapes)
        self._paths = LayerPaths(mlx.kinds, mlx.counterparts, mlx.mlx_names)
        self._layers = self._find_layers()
        self._places = self._find_places()
        self._is_renamed = rename is not None
        self._renamed = apply_rename(from_torch_names(rename, torch.shapes, self._places), torch.shapes)
        self._hits: dict[_Place, str] = {}
        self.problems: list[str] = []
        self.added: dict[str, Shape] = {}
        self.removed: list[str] = []
        self._match()

    # ---- matching ---------------------------------------------------------------------------------------------

    def _find_layers(self) -> list[Counterpart]:
        found = []
        for path, kind in self._mlx.counterparts.items():
            start = f"{path}." if path else ""
            own = {name.removeprefix(start): self._shapes[name] for name in self._below.get(path, ())}
            layer = counterpart(kind, path, own)
            found += [layer] if layer else []
        return found

    def _find_places(self) -> dict[str, _Place]:
        places = {path: _Place(None, path) for path in self._shapes}
        own_names = [(theirs, _Place(None, path)) for path in self._shapes for theirs in self._paths.aliases(path)]
        layer_names = [
            (layout.join(alias, name), _Place(layer, name))
            for layer in self._layers
            for alias in (layer.path, *self._paths.aliases(layer.path))
            for name in layer.theirs
        ]
        # a cell of PyTorch, for which MLX has a layer that gets a sequence of one step, has no number
        cell_names = [(name.removesuffix("_l0"), place) for name, place in layer_names if name.endswith("_l0")]
        for name, place in (*own_names, *layer_names, *cell_names):
            places.setdefault(name, place)
        return places

    def _match(self) -> None:
        unknown, twice = [], []
        for theirs, name in self._renamed.items():
            if name is None or self._is_counter(name):
                continue
            place = self._places.get(name)
            if place is None:
                unknown.append(theirs)
            elif place in self._hits and self._owner(self._hits[place]) != self._owner(theirs):
                twice.append(f"{self._hits[place]} and {theirs}")
            else:
                self._hits[place] = theirs
        owners = {self._owner(theirs) for theirs in self._hits.values()}
        unknown = [theirs for theirs in unknown if self._owner(theirs) not in owners]  # a tied weight has its place
        self._settle_biases()
        blocked = self._blocked()
        hidden = tuple(f"{path}." if path else "" for paths in blocked.values() for path in paths)
        missing = [name for name in self._missing() if not name.startswith(hidden)]
        twice += self._given_twice()
        self._say("there is no place in the MLX module for", self._with_guesses(unknown, missing))
        self._say("the PyTorch weights have no values for", [self._both_names(name) for name in missing])
        self._say("two PyTorch weights have one place", twice)
        self._say("the shapes differ", self._misshapen(hidden))
        self._say("the kinds of the layers differ", self._other_kinds())
        for kind, paths in blocked.items():
            names = [path or "the module itself" for path in paths]
            self._say(f"{kind} layers of MLX have no counterpart ({NOT_CONVERTED[kind]})", names)
        if hint := self._hint(unknown, missing):
            self.problems.append(hint)

    def _is_counter(self, name: str) -> bool:
        """Returns whether a name is that of a counter of batches, which MLX lacks."""
        path, _, last = name.rpartition(".")
        kind = self._mlx.kinds.get(self._paths.module(path), "")
        return last in layout.LEFT_OUT.get(kind, ())

    def _owner(self, theirs: str) -> str:
        return self._torch.shared.get(theirs, theirs)

    def _settle_biases(self) -> None:
        """Decides which biases of transformer layers are added to the MLX module or removed from it."""
        hit = {path for place in self._hits for path in self._covered(place)}
        self.added = {path: shape for path, shape in self._addable.items() if path in hit}
        groups = {group for path, group in self._addable_groups().items() if path in hit}
        self.added |= {path: self._addable[path] for path, group in self._addable_groups().items() if group in groups}
        self.removed = [
            path
            for path, group in self._removable.items()
            if not any(name.startswith(group) and name.endswith("bias") for name in hit)
            and any(name.startswith(group) for name in hit)
        ]

    def _addable_groups(self) -> dict[str, str]:
        """Returns the path of the attention of each bias that could be added."""
        return {path: path.rpartition(".")[0].rpartition(".")[0] for path in self._addable}

    def _covered(self, place: _Place) -> list[str]:
        """Returns the canonical paths whose values an array of PyTorch contains."""
        if place.layer is None:
            return [place.name]
        return [layout.join(place.layer.path, own) for own in place.layer.sources(place.name)]

    def _missing(self) -> list[str]:
        """Returns what has no value, by the names in PyTorch where a part of a layer has one."""
        missing: list[str] = []
        covered = {path for place in self._hits for path in self._covered(place)}
        covered |= {self._mlx.shared.get(path, path) for path in covered}
        in_layers: set[str] = set()
        for layer in self._layers:
            paths = {path for name in layer.theirs for path in self._covered(_Place(layer, name))}
            needed = [
                name
                for name in layer.theirs
                if self._is_needed(layer, name) and _Place(layer, name) not in self._hits
            ]
            is_used = any(_Place(layer, name) in self._hits for name in layer.theirs)
            is_direct = any(_Place(None, path) in self._hits for path in paths)
            is_shared = all(self._mlx.shared.get(path, path) in covered for path in paths if path in self._mlx.shapes)
            if is_used or not (is_direct or is_shared):
                missing += [layout.join(self._paths.torch(layer.path), name) for name in needed]
                in_layers |= paths
        needed_paths = [path for path in self._shapes if path not in self._addable or path in self.added]
        missing += [
            path
            for path in needed_paths
            if path not in in_layers
            and path not in self.removed
            and self._mlx.shared.get(path, path) not in covered
            and path not in covered
        ]
        return missing

    def _both_names(self, path: str) -> str:
        theirs = self._paths.torch(path)
        return path if theirs == path else f"{path} ({theirs} in PyTorch)"

    def _given_twice(self) -> list[str]:
        """Returns the weights of PyTorch that a layer has under the names of both frameworks."""
        texts = []
        for layer in self._layers:
            for name in layer.theirs:
                theirs = self._hits.get(_Place(layer, name))
                paths = self._covered(_Place(layer, name)) if theirs else []
                texts += [f"{theirs} and {hit}" for path in paths if (hit := self._hits.get(_Place(None, path)))]
        return texts

    def _is_needed(self, layer: Counterpart, name: str) -> bool:
        paths = self._covered(_Place(layer, name))
        return not all(path in self.removed or (path in self._addable and path not in self.added) for path in paths)

    def _misshapen(self, hidden: tuple[str, ...]) -> list[str]:
        texts = []
        for place, theirs in self._hits.items():
            shape = self._shapes[place.name] if place.layer is None else place.layer.theirs[place.name]
            given = tuple(self._torch.shapes[theirs])[:: -1 if self._is_transposed(place, theirs) else 1]
            if given != tuple(shape) and not place.name.startswith(hidden) and not self._is_point(place, theirs):
                reason = self._reason(place, given, shape)
                texts.append(f"{theirs} is {list(given)} in PyTorch, and MLX needs {list(shape)}{reason}")
        return texts

    def _reason(self, place: _Place, given: Shape, shape: Shape) -> str:
        module, name = layout.split(place.name)
        kind = self._mlx.kinds.get(module, "") if place.layer is None else ""
        is_weight = name == "weight" and len(given) == len(shape)
        has_no_groups = kind == "conv3d" or kind.startswith("conv_transpose")
        if has_no_groups and is_weight and given[0] == shape[0] and given[1] < shape[1] and shape[1] % given[1] == 0:
            return " (Conv3d and transposed convolutions of MLX have no groups)"
        if kind == "linear" and layout.is_of_size_1(given, shape):
            return " (a convolution of size 1 has this shape: give the module of PyTorch, which tells the kinds)"
        if kind == "plain" and sorted(given) == sorted(shape):
            return (
                " (an array that a module of yours holds has the same axes on both sides; for a convolution give its "
                "class layer_kind = 'conv2d', for example)"
            )
        return ""

    def _other_kinds(self) -> list[str]:
        texts = []
        for place, theirs in self._hits.items():
            if place.layer is not None:
                continue
            (module, name), (their_module, their_name) = layout.split(place.name), layout.split(theirs)
            own, other = self._mlx.kinds.get(module, "plain"), self._torch.kinds.get(their_module, "plain")
            has_other_axes = other != "plain" and _axes(own, name) != _axes(other, their_name)
            if has_other_axes and not self._is_point(place, theirs):
                texts.append(f"{theirs} is of {_article(other)} layer in PyTorch and of {_article(own)} layer in MLX")
        return texts

    def _blocked(self) -> dict[str, list[str]]:
        """Returns the layers without a counterpart, by kind, unless the PyTorch weights have their names."""
        hit = {place.name for place in self._hits if place.layer is None}
        found: dict[str, list[str]] = {}
        for path, kind in self._mlx.counterparts.items():
            is_equal = kind == "quantized" and layout.join(path, "scales") in hit
            if kind in NOT_CONVERTED and not is_equal and path in self._below:
                found.setdefault(kind, []).append(path)
        return found

    # ---- messages ---------------------------------------------------------------------------------------------

    def _say(self, problem: str, names: Sequence[str]) -> None:
        if names:
            self.problems.append(f"{problem}: {some(names, _MOST_NAMES)}")

    def _with_guesses(self, unknown: list[str], missing: list[str]) -> list[str]:
        texts = list(unknown)
        for index, name in enumerate(unknown[:_MOST_GUESSES]):
            near = difflib.get_close_matches(name, missing, n=1)
            texts[index] += f" (nearest is {near[0]})" if near else ""
        return texts

    def _hint(self, unknown: Sequence[str], missing: Sequence[str]) -> str:
        """Returns what to do about names that do not fit; empty if nothing is known."""
        if not unknown:
            direct = [
                path
                for path in missing
                if path in self._mlx.shapes and self._mlx.kinds.get(layout.split(path)[0]) == "plain"
            ]
            return "MLX takes no array whose name begins with _ for a weight" if direct else ""
        in_layers = {
            path for layer in self._layers for name in layer.theirs for path in self._covered(_Place(layer, name))
        }
        expected = {self._paths.torch(path) for path in self._mlx.shapes if path not in in_layers}
        expected |= {
            layout.join(self._paths.torch(layer.path), name) for layer in self._layers for name in layer.theirs
        }
        if not self._is_renamed and (found := prefixes.suggest_prefixes(self._torch.shapes, expected)):
            value = found[0] if len(found) == 1 else found
            call = f"icenet.core.weights.strip_prefix(state_dict, {value!r})"
            by_rename = len(found) == 1 and not found[0].startswith("_")
            way = f"rename={{{found[0][:-1]!r}: ''}}" if by_rename else call
            return f"the names have the prefix {' and '.join(found)}, which {way} removes"
        ends = [path.removesuffix(f".{unknown[0]}") for path in expected if path.endswith(f".{unknown[0]}")]
        for prefix in ends if not self._is_renamed else ():
            if all(layout.join(prefix, name) in expected for name in unknown):
                return f"rename={{'': {prefix!r}}} adds the first part of the names"
        if any(".parametrizations." in f".{name}" for name in unknown):
            return "torch.nn.utils.parametrize.remove_parametrizations gives a parametrized weight its name"
        if any(name.endswith(("weight_orig", "weight_g")) for name in unknown):
            return (
                "prune.remove, remove_spectral_norm and remove_weight_norm of torch.nn.utils give a weight its name"
            )
        if parts := [name for name in unknown if _SECOND_LAYER.fullmatch(name.rpartition(".")[2])]:
            holder, leaf = layout.split(parts[0])
            part = f"{layout.join(holder, '*')}_l{leaf.rpartition('_l')[2]}"
            return (
                "the layers and directions of torch.nn.LSTM, GRU and RNN are modules of their own in MLX: "
                f"rename={{{part!r}: 'PATH.*_l0'}}, if PATH is the module for these weights"
            )
        biases = [layout.split(self._renamed[name] or "")[0] for name in unknown if name.endswith("in_proj_bias")]
        if any(self._mlx.counterparts.get(self._paths.module(path)) == "attention" for path in biases):
            return "mlx.nn.MultiHeadAttention has biases with bias=True"
        if all("bias" in name.rpartition(".")[2] for name in (*unknown, *missing)):
            return "give the layers of both modules the same option bias"
        return "rename={name in PyTorch: name in MLX} pairs other names, and rename={name: None} leaves a weight out"

    def check(self, where: str) -> None:
        """Raises WeightsError with all problems in one line."""
        if self.problems:
            raise WeightsError(f"{where}: nothing is copied; {'; '.join(self.problems)}")

    # ---- values -----------------------------------------------------------------------------------------------

    def pairs(self) -> dict[str, list[str]]:
        """Returns the canonical paths in MLX that belong to each name in PyTorch."""
        return {theirs: self._covered(place) for place, theirs in self._hits.items()}

    def to_mlx(self, values: Mapping[str, Array], gradients: bool = False) -> dict[str, Array]:
        """Returns the canonical weights of the MLX module.

        Args:
            values: Arrays by name in PyTorch.
            gradients: The arrays are gradients of the weights. Those of frozen weights may be missing.
        """
        found = {
            place.name: self._turned(place, theirs, values[theirs])
            for place, theirs in self._hits.items()
            if place.layer is None and (theirs in values or not gradients)
        }
        for layer, hits in self._hits_of_layers():
            given = {
                name: self._turned(_Place(layer, name), theirs, values[theirs])
                for name, theirs in hits.items()
                if theirs in values or not gradients
            }
            own = layer.to_mlx(given, gradients)
            found |= {layout.join(layer.path, name): array for name, array in own.items()}
        return found

    def to_torch(self, values: Mapping[str, Array], gradients: bool = False) -> dict[str, Array]:
        """Returns arrays by their names in PyTorch. Biases that the MLX module lacks are zeros.

        Args:
            values: Canonical weights of the MLX module, or gradients of them. Those of frozen weights may be missing.
            gradients: The arrays are gradients of the weights.
        """
        dtype = next((array.dtype for array in values.values()), np.dtype(np.float32))
        if not gradients:
            values = {**{path: np.zeros(shape, dtype) for path, shape in self.added.items()}, **values}
        found = {
            theirs: self._turned(place, theirs, values[place.name], to_torch=True)
            for place, theirs in self._hits.items()
            if place.layer is None and (place.name in values or not gradients)
        }
        for layer, hits in self._hits_of_layers():
            own = {name: values[path] for name in layer.own if (path := layout.join(layer.path, name)) in values}
            made = layer.to_torch(own, gradients)
            found |= {
                theirs: self._turned(_Place(layer, name), theirs, made[name])
                for name, theirs in hits.items()
                if name in made
            }
        return found

    def _is_transposed(self, place: _Place, theirs: str) -> bool:
        """Returns whether a weight of PyTorch has the axes (in, out), and the linear layer of MLX (out, in)."""
        kind = "linear" if place.layer is not None else self._mlx.kinds.get(layout.split(place.name)[0])
        return kind == "linear" and theirs in self._torch.transposed

    def _is_point(self, place: _Place, theirs: str) -> bool:
        """Returns whether a weight is of a linear layer on one side, and of a convolution of size 1 on the other."""
        if place.layer is not None or len(self._shapes[place.name]) == len(self._torch.shapes[theirs]):
            return False
        (module, name), (their_module, their_name) = layout.split(place.name), layout.split(theirs)
        kinds = sorted((self._mlx.kinds.get(module, ""), self._torch.kinds.get(their_module, "")))
        short, long = sorted((tuple(self._shapes[place.name]), tuple(self._torch.shapes[theirs])), key=len)
        are_kinds = kinds[0] in ("conv1d", "conv2d", "conv3d") and kinds[1] == "linear"
        return are_kinds and name == their_name == "weight" and layout.is_of_size_1(long, short)

    def _turned(self, place: _Place, theirs: str, array: Array, to_torch: bool = False) -> Array:
        if self._is_point(place, theirs):
            return array.reshape(self._torch.shapes[theirs] if to_torch else self._shapes[place.name])
        return array.T if self._is_transposed(place, theirs) else array

    def _hits_of_layers(self) -> list[tuple[Counterpart, dict[str, str]]]:
        """Returns the layers that have their counterpart's arrays, and the names of these in PyTorch."""
        found = []
        for layer in self._layers:
            hits = {name: self._hits[place] for name in layer.theirs if (place := _Place(layer, name)) in self._hits}
            found += [(layer, hits)] if hits else []
        return found


def _below(paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns the arrays in and below each layer, by its path."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")[:-1]
        for length in range(len(parts) + 1):
            found.setdefault(".".join(parts[:length]), []).append(path)
    return found


def _optional_biases(mlx: MLXWeights) -> tuple[dict[str, Shape], dict[str, str]]:
    """Returns the biases of transformer layers for which MLX has no option.

    Returns:
        The shape of each bias that an attention lacks, by path; and the path of the layer, with a dot, of each other
        bias.
    """
    addable: dict[str, Shape] = {}
    removable: dict[str, str] = {}
    for path, kind in mlx.counterparts.items():
        start = f"{path}." if path else ""
        for attention in ATTENTION_OF.get(kind, ()):
            weights = {name: f"{start}{attention}.{name}" for name in (*PROJECTIONS, "out_proj")}
            kinds = {mlx.kinds.get(layer) for layer in weights.values()}
            if mlx.counterparts.get(f"{start}{attention}") == "attention" and kinds == {"linear"}:
                for layer in weights.values():
                    if f"{layer}.bias" not in mlx.shapes and f"{layer}.scales" not in mlx.shapes:
                        addable[f"{layer}.bias"] = mlx.shapes[f"{layer}.weight"][:1]
        if kind in CHILD_NAMES:
            names = ("linear1", "linear2", *CHILD_NAMES[kind], *_attention_layers(kind))
            removable |= {bias: start for name in names if (bias := f"{start}{name}.bias") in mlx.shapes}
    return addable, removable


def _attention_layers(kind: str) -> Iterable[str]:
    return (f"{attention}.{name}" for attention in ATTENTION_OF.get(kind, ()) for name in (*PROJECTIONS, "out_proj"))


def _axes(kind: str, name: str) -> object:
    try:
        return layout.rule(kind, name)
    except WeightsError:  # the layer has no such weight, which is another problem
        return layout.SAME


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
