"""Layouts: the order of axes in which PyTorch and MLX store the parameters of each layer kind.

Canonical weights (`icenet.core.weights.files`) have PyTorch's layouts. The frameworks differ for convolutions,
where PyTorch stores channels before space and MLX after, and for bilinear layers. The table `RULES` contains the
permutation of axes for every parameter of every layer kind.

Arrays are permuted by the kind of their layer, which the model declares (`kinds`: module path -> kind), never by
their shape: an [8, 8, 8] array may be a Conv1d weight or not, and a guess that is right for most shapes is silently
wrong for the others. A parameter that is not in the table is an error.

Sources: torch.nn.Conv1d/2d/3d (out, in/groups, *space) and ConvTranspose (in, out/groups, *space);
mlx.nn.Conv1d/2d/3d (out, *space, in/groups) and ConvTranspose (out, *space, in), the latter without groups.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core.errors import WeightsError
from icenet.core.weights.copying import contiguous
from icenet.core.weights.safetensors import Spec, spec_of

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rule:
    """The permutations of one parameter: MLX's array is `torch_array.transpose(to_mlx)`, and vice versa.

    Both are None if the layouts are equal.
    """

    to_mlx: tuple[int, ...] | None = None
    to_torch: tuple[int, ...] | None = None


def _axes(*to_mlx: int) -> Rule:
    # the inverse is computed, so the two halves of an entry cannot disagree
    return Rule(to_mlx, tuple(int(axis) for axis in np.argsort(to_mlx)))


SAME = Rule()
ANY = "*"  # any name of a parameter
_AFFINE = {"weight": SAME, "bias": SAME}
_PACKED = {"scales": SAME, "biases": SAME}  # of a layer that is quantized (see `icenet.core.weights.quantization`)

RULES: dict[str, dict[str, Rule]] = {
    "linear": _AFFINE | _PACKED,  # [out, in]
    "stacked_linear": _AFFINE | _PACKED,  # [count, out, in], biases [count, out]
    "embedding": {"weight": SAME, **_PACKED},  # [count, size]
    "layer_norm": _AFFINE,
    "rms_norm": {"weight": SAME},
    "group_norm": _AFFINE,
    "batch_norm": {**_AFFINE, "running_mean": SAME, "running_var": SAME},
    "prelu": {"weight": SAME},
    "bilinear": {"weight": _axes(0, 2, 1), "bias": SAME},  # [out, in1, in2] -> [out, in2, in1]
    # grouped and depthwise convolutions have the same axes: the input axis is in/groups on both sides
    "conv1d": {"weight": _axes(0, 2, 1), "bias": SAME},  # OIL -> OLI
    "conv2d": {"weight": _axes(0, 2, 3, 1), "bias": SAME},  # OIHW -> OHWI
    "conv3d": {"weight": _axes(0, 2, 3, 4, 1), "bias": SAME},  # OIDHW -> ODHWI
    "conv_transpose1d": {"weight": _axes(1, 2, 0), "bias": SAME},  # IOL -> OLI
    "conv_transpose2d": {"weight": _axes(1, 2, 3, 0), "bias": SAME},  # IOHW -> OHWI
    "conv_transpose3d": {"weight": _axes(1, 2, 3, 4, 0), "bias": SAME},  # IODHW -> ODHWI
    "recurrent": {ANY: SAME},  # IceNet's own layers have the same names and shapes in both backends
    "plain": {ANY: SAME},  # arrays of the module itself: learned positions, a scale, a token
}

STATISTICS = frozenset({"running_mean", "running_var"})
"""The running statistics of batch norm: stored with the weights, but not trained and not counted as parameters."""

# Buffers of PyTorch that MLX lacks and that change no result. BatchNorm counts batches only to average with
# momentum=None, and load_state_dict(strict=True) fills in a missing counter.
LEFT_OUT: dict[str, frozenset[str]] = {"batch_norm": frozenset({"num_batches_tracked"})}


def split(path: str) -> tuple[str, str]:
    """Splits the path of a parameter into module path and name: "stem.conv.weight" -> ("stem.conv", "weight")."""
    module, _, name = path.rpartition(".")
    return module, name


def join(module: str, name: str) -> str:
    """Returns the path of a parameter or a layer in a module: ("stem.conv", "weight") -> "stem.conv.weight"."""
    return f"{module}.{name}" if module else name


def is_of_size_1(shape: Sequence[int], linear: Sequence[int]) -> bool:
    """Returns whether a shape is that of a convolution of size 1 with the matrix of a linear layer."""
    return len(linear) == 2 < len(shape) and tuple(shape) == (*linear, *[1] * (len(shape) - 2))


def parameter_kind(kinds: Mapping[str, str], path: str) -> str:
    """Returns the kind of the layer that owns the parameter at `path`.

    Args:
        kinds: Module path -> layer kind; "" is the model itself.
        path: Path of the parameter.

    Raises:
        WeightsError: The model has no module that owns `path`; the message names the most similar one.
    """
    module, _ = split(path)
    if module not in kinds:
        near = difflib.get_close_matches(module, kinds, n=1)
        hint = f"the nearest is {near[0]!r}" if near else f"{len(kinds)} modules are known"
        raise WeightsError(
            f"no layer kind is known for module {module!r}, which owns {path!r} ({hint}); "
            "use the config of these weights, or add the module to the model's kinds"
        )
    return kinds[module]


def rule(kind: str, name: str) -> Rule:
    """Returns the rule for parameter `name` of a layer of kind `kind`. Raises WeightsError if one is unknown.

    A kind such as "plain weight_v=conv1d" names the kind of whose weight a parameter has the axes.
    """
    kind, *own = kind.split(" ")
    for item in own:
        if item.partition("=")[0] == name:
            kind, name = item.partition("=")[2], "weight"
    rules = RULES.get(kind)
    if rules is None:
        near = difflib.get_close_matches(kind, RULES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise WeightsError(f"unknown layer kind {kind!r}: {hint}known are {', '.join(RULES)}")
    found = rules.get(name) or rules.get(ANY)
    if found is None:
        raise WeightsError(
            f"a layer of kind {kind!r} has no parameter {name!r}: it has {', '.join(rules)}; "
            "a module that owns arrays itself is of kind 'plain'"
        )
    return found


def is_left_out(kinds: Mapping[str, str], path: str) -> bool:
    """Returns whether canonical weights leave out the buffer `path`: `num_batches_tracked` of a batch norm."""
    module, name = split(path)
    return name in LEFT_OUT.get(kinds.get(module, ""), ())


def _permuted(array: Array, axes: tuple[int, ...] | None, kind: str, path: str) -> Array:
    if axes is None:
        return array
    if array.ndim != len(axes):
        raise WeightsError(
            f"{path!r} of a {kind!r} layer has shape {list(array.shape)}, but {len(axes)} axes are expected; "
            "use the config of these weights"
        )
    view: Array = array.transpose(axes)
    return view


def mlx_view(kind: str, name: str, array: Array) -> Array:
    """Returns parameter `name` of a layer of kind `kind` in MLX's layout, as a view of one in PyTorch's.

    Raises:
        WeightsError: The kind or the name is unknown, or the array has another number of axes.
    """
    return _permuted(array, rule(kind, name).to_mlx, kind, name)


def to_mlx(kind: str, name: str, array: Array) -> Array:
    """Converts parameter `name` of a layer of kind `kind` from PyTorch's layout to MLX's.

    The bits of the values stay. The result is C-contiguous, and is `array` itself if the layouts are equal. Raises
    like `mlx_view`.
    """
    return contiguous(mlx_view(kind, name, array))


def to_torch(kind: str, name: str, array: Array) -> Array:
    """Converts a parameter from MLX's layout to PyTorch's, the canonical one. The inverse of `to_mlx`."""
    return contiguous(_permuted(array, rule(kind, name).to_torch, kind, name))


def torch_shape(kind: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the canonical shape of a parameter that has the shape `shape` in MLX. Raises like `to_torch`."""
    # a broadcast view of one value takes the same path as an array, but no memory
    return _permuted(np.broadcast_to(np.int8(0), shape), rule(kind, name).to_torch, kind, name).shape


class PermutedWeights(Mapping[str, Array]):
    """A view of weights in another layout. Arrays are transposed when they are looked up, without a copy.

    Buffers that canonical weights do not contain are left out.

    Args:
        weights: The weights, such as a memory-mapped file of any size.
        kinds: Module path -> layer kind.
        direction: "to_mlx", "to_torch" or None, which keeps the layout.
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
        kind, (_, name) = parameter_kind(self._kinds, path), split(path)
        return _permuted(array, getattr(rule(kind, name), self._direction), kind, path)

    def spec(self, path: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        found = spec_of(self._weights, path)
        if self._direction is None:
            return found
        kind, (_, name) = parameter_kind(self._kinds, path), split(path)
        array = np.broadcast_to(np.zeros((), found.dtype), found.shape)
        return Spec(found.dtype, _permuted(array, getattr(rule(kind, name), self._direction), kind, path).shape)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._weights and not is_left_out(self._kinds, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def tree_to_mlx(weights: Mapping[str, Array], kinds: Mapping[str, str]) -> dict[str, Array]:
    """Converts all of `weights` from PyTorch's layouts to MLX's; see `to_mlx` and `parameter_kind`."""
    return {path: contiguous(array) for path, array in PermutedWeights(weights, kinds, "to_mlx").items()}


def tree_to_torch(weights: Mapping[str, Array], kinds: Mapping[str, str]) -> dict[str, Array]:
    """Converts all of `weights` from MLX's layouts to PyTorch's; the inverse of `tree_to_mlx`."""
    return {path: contiguous(array) for path, array in PermutedWeights(weights, kinds, "to_torch").items()}
