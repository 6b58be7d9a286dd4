"""Layouts: how each layer kind stores its parameters in PyTorch and in MLX.

Canonical weights (`icenet.core.weights.files`) have PyTorch's layouts. The two frameworks differ only in the order
of a parameter's axes, and only for convolutions: PyTorch keeps channels before space, MLX after. One table,
`RULES`, says for every parameter of every kind which permutation of axes leads from one to the other.

A parameter is moved by the kind of its layer, which its model states (`kinds`: module path -> kind), never by
its shape: a [8, 8, 8] array may be a Conv1d weight or not, and a guess that is right for most shapes is
silently wrong for the rest. What is not in the table is an error.

Sources: torch.nn.Conv1d/2d/3d (out, in/groups, *space) and ConvTranspose (in, out/groups, *space);
mlx.nn.Conv1d/2d/3d (out, *space, in/groups) and ConvTranspose (out, *space, in), the latter without groups.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core.errors import WeightsError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rule:
    """The axes of one parameter: `torch_array.transpose(to_mlx)` is MLX's array, and back by `to_torch`.

    None on both sides means that the arrays are the same.
    """

    to_mlx: tuple[int, ...] | None = None
    to_torch: tuple[int, ...] | None = None


def _axes(*to_mlx: int) -> Rule:
    # The way back is computed, so that no entry of the table can fail to be the inverse of its other half.
    return Rule(to_mlx, tuple(int(axis) for axis in np.argsort(to_mlx)))


SAME = Rule()
ANY = "*"  # a kind whose every parameter, whatever its name, is the same in both
_AFFINE = {"weight": SAME, "bias": SAME}

RULES: dict[str, dict[str, Rule]] = {
    "linear": _AFFINE,  # [out, in]
    "embedding": {"weight": SAME},  # [count, size]
    "layer_norm": _AFFINE,
    "rms_norm": {"weight": SAME},
    "group_norm": _AFFINE,
    "batch_norm": {**_AFFINE, "running_mean": SAME, "running_var": SAME},
    "prelu": {"weight": SAME},
    # Grouped and depthwise convolutions have the same axes, the input one being in/groups in both.
    "conv1d": {"weight": _axes(0, 2, 1), "bias": SAME},  # OIL -> OLI
    "conv2d": {"weight": _axes(0, 2, 3, 1), "bias": SAME},  # OIHW -> OHWI
    "conv3d": {"weight": _axes(0, 2, 3, 4, 1), "bias": SAME},  # OIDHW -> ODHWI
    "conv_transpose1d": {"weight": _axes(1, 2, 0), "bias": SAME},  # IOL -> OLI
    "conv_transpose2d": {"weight": _axes(1, 2, 3, 0), "bias": SAME},  # IOHW -> OHWI
    "conv_transpose3d": {"weight": _axes(1, 2, 3, 4, 0), "bias": SAME},  # IODHW -> ODHWI
    "recurrent": {ANY: SAME},  # IceNet's own layers name and shape their parameters alike on both
    "plain": {ANY: SAME},  # arrays a module holds itself: learned positions, a scale, a token
}

STATISTICS = frozenset({"running_mean", "running_var"})
"""What a batch norm keeps beside its parameters: part of the weights, not trained, and no parameter."""

# Buffers of PyTorch without a counterpart in MLX that change no result: BatchNorm counts batches only to
# average with momentum=None, and load_state_dict(strict=True) fills a missing counter in itself.
LEFT_OUT: dict[str, frozenset[str]] = {"batch_norm": frozenset({"num_batches_tracked"})}


def split(path: str) -> tuple[str, str]:
    """Module path and leaf name of a parameter: "stem.conv.weight" -> ("stem.conv", "weight")."""
    module, _, leaf = path.rpartition(".")
    return module, leaf


def parameter_kind(kinds: Mapping[str, str], path: str) -> str:
    """The kind of the layer that owns the parameter at `path`.

    `kinds` maps module paths to kinds, "" standing for the model itself. Raises WeightsError, naming the
    nearest module, where the model has no module that owns `path`.
    """
    module, _ = split(path)
    if module not in kinds:
        near = difflib.get_close_matches(module, kinds, n=1)
        hint = f"the nearest is {near[0]!r}" if near else f"it knows {len(kinds)} modules"
        raise WeightsError(
            f"no layer kind is known for module {module!r}, which owns {path!r} ({hint}); "
            "use the config these weights were made with, or add the module to the model's kinds"
        )
    return kinds[module]


def rule(kind: str, name: str) -> Rule:
    """The rule for parameter `name` of a layer of this `kind`. Raises WeightsError for either unknown."""
    rules = RULES.get(kind)
    if rules is None:
        near = difflib.get_close_matches(kind, RULES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise WeightsError(f"unknown layer kind {kind!r}: {hint}known are {', '.join(RULES)}")
    found = rules.get(name) or rules.get(ANY)
    if found is None:
        raise WeightsError(
            f"a layer of kind {kind!r} has no parameter {name!r}: it has {', '.join(rules)}; "
            "a parameter of a module's own is of kind 'plain'"
        )
    return found


def is_left_out(kinds: Mapping[str, str], path: str) -> bool:
    """Whether `path` is a buffer that canonical weights do without (a batch norm's `num_batches_tracked`)."""
    module, leaf = split(path)
    return leaf in LEFT_OUT.get(kinds.get(module, ""), ())


def _permuted(array: Array, axes: tuple[int, ...] | None, kind: str, path: str) -> Array:
    if axes is None:
        return array
    if array.ndim != len(axes):
        raise WeightsError(
            f"{path!r} of a {kind!r} layer has shape {list(array.shape)}, but {len(axes)} axes are expected; "
            "use the config these weights were made with"
        )
    view: Array = array.transpose(axes)
    return view


def _contiguous(array: Array) -> Array:
    # numpy.ascontiguousarray would turn a 0-d array into a 1-d one
    return array if array.flags.c_contiguous else array.copy(order="C")


def to_mlx(kind: str, name: str, array: Array) -> Array:
    """Parameter `name` of a layer of `kind`, from PyTorch's layout to MLX's.

    The values, the dtype and the bits are untouched; the result is C-contiguous, and is `array` itself where
    the layouts agree. Raises WeightsError for an unknown kind, an unknown name, or a wrong number of axes.
    """
    return _contiguous(_permuted(array, rule(kind, name).to_mlx, kind, name))


def to_torch(kind: str, name: str, array: Array) -> Array:
    """The inverse of `to_mlx`: from MLX's layout to PyTorch's (the canonical one)."""
    return _contiguous(_permuted(array, rule(kind, name).to_torch, kind, name))


def torch_shape(kind: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The canonical shape of a parameter whose shape in MLX is `shape`; errors as `to_torch`."""
    # a view of one value: the shape goes through the rule itself, and no memory is taken
    return _permuted(np.broadcast_to(np.int8(0), shape), rule(kind, name).to_torch, kind, name).shape


class Relaid(Mapping[str, Array]):
    """Weights seen in another layout: each array is a transposed view, made when it is asked for.

    A file of any size can be converted through it one array at a time. `direction` is "to_mlx", "to_torch" or
    None (no change of layout); buffers that canonical weights do without are not shown.
    """

    def __init__(self, weights: Mapping[str, Array], kinds: Mapping[str, str], direction: str | None) -> None:
        self._weights, self._kinds, self._direction = weights, kinds, direction
        self._names = [name for name in weights if not is_left_out(kinds, name)]

    def __getitem__(self, path: str) -> Array:
        if is_left_out(self._kinds, path):
            raise KeyError(path)
        array = self._weights[path]
        if self._direction is None:
            return array
        kind, (_, leaf) = parameter_kind(self._kinds, path), split(path)
        return _permuted(array, getattr(rule(kind, leaf), self._direction), kind, path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def tree_to_mlx(weights: Mapping[str, Array], kinds: Mapping[str, str]) -> dict[str, Array]:
    """All of `weights` from PyTorch's layouts to MLX's, contiguous; see `to_mlx` and `parameter_kind`."""
    return {path: _contiguous(array) for path, array in Relaid(weights, kinds, "to_mlx").items()}


def tree_to_torch(weights: Mapping[str, Array], kinds: Mapping[str, str]) -> dict[str, Array]:
    """The inverse of `tree_to_mlx`."""
    return {path: _contiguous(array) for path, array in Relaid(weights, kinds, "to_torch").items()}
