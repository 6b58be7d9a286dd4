"""Inputs of a comparison: those of the user, random ones, and their axes on each side."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from icenet.core.errors import UsageError
from icenet.core.messages import option
from icenet.core.weights.arrays import to_array
from icenet.parity import align
from icenet.parity.calls.structures import Slot, argument_names, map_leaves, rebuild
from icenet.parity.measures import round_to
from icenet.parity.trace import Value, short_dtype

Array = npt.NDArray[Any]

LAYOUTS = {"same": align.SAME, "channels_last": align.MOVED}


@dataclass(frozen=True)
class Inputs:
    """The arguments of a module.

    Attributes:
        given: `(args, kwargs)` with a `Slot` in place of each array.
        values: The arrays, with the axes of `a`.
    """

    given: Any
    values: list[Value]

    @property
    def names(self) -> list[str]:
        """The names of the arrays: position or keyword."""
        return argument_names(self.given)

    def describe(self) -> dict[str, str]:
        """Returns dtype and shape of each array by name."""
        return {name: f"{v.dtype} {list(v.array.shape)}" for name, v in zip(self.names, self.values, strict=True)}

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with numpy arrays."""
        args, kwargs = rebuild(self.given, [value.array for value in self.values])
        return tuple(args), kwargs


def read(inputs: Any, dtype: str = "fp32") -> Inputs:
    """Returns the inputs that a user gave: an array, a tuple or list of arguments, or a dict of keyword arguments.

    Args:
        inputs: Arrays of numpy, MLX or PyTorch, also nested; other arguments are given to both sides as they are.
        dtype: Dtype to which floats are rounded.

    Raises:
        UsageError: There is no array, or one has no values.
    """
    args: tuple[Any, ...]
    if isinstance(inputs, dict):
        args, kwargs = (), dict(inputs)
    elif isinstance(inputs, (tuple, list)):
        args, kwargs = tuple(inputs), {}
    else:
        args, kwargs = (inputs,), {}
    values: list[Value] = []

    def take(leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        array = to_array(f"input {len(values)}", leaf)
        if array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16:
            values.append(Value(round_to(np.asarray(array, np.float64), dtype), dtype))
        else:
            values.append(Value(array, short_dtype(array.dtype)))
        return Slot(len(values) - 1)

    given = map_leaves((args, kwargs), take)
    if not values:
        what = f"a {type(inputs).__name__}" if not isinstance(inputs, (tuple, list, dict)) else "no array"
        raise UsageError(
            f"compare: inputs is {what}: give an array, a tuple of arrays, or a dict of keyword arguments"
        )
    found = Inputs(given, values)
    for name, value in zip(found.names, values, strict=True):
        if value.array.size == 0:
            raise UsageError(f"compare: input {name} is an array without values; nothing would be compared")
        if value.is_float and np.isnan(value.array).any():
            raise UsageError(f"compare: input {name} has NaN, so that nothing could be compared; give finite values")
    return found


# ---- axes ---------------------------------------------------------------------------------------------------


def for_reference(inputs: Inputs, b: Any, layout: Any, same: bool) -> list[Value]:
    """Returns the inputs with the axes of `b`.

    Args:
        inputs: With the axes of `a`.
        b: The side of the reference.
        layout: See `icenet.parity.compare`.
        same: Whether both sides are of one framework.
    """
    by_name = layout if isinstance(layout, Mapping) else {}
    for name in by_name:
        if str(name) not in inputs.names:
            raise UsageError(f"compare: layout: there is no input {name!r}; the inputs are {', '.join(inputs.names)}")
    for name in by_name.values() if by_name else [layout]:
        if name is not None and name not in LAYOUTS:
            raise UsageError(f"compare: layout is {name!r}: give {' or '.join(LAYOUTS)}")
    by_name = {str(name): how for name, how in by_name.items()}
    found = []
    for name, value in zip(inputs.names, inputs.values, strict=True):
        chosen = by_name.get(name) if by_name else layout
        how = LAYOUTS[chosen] if chosen is not None else align.SAME if same else axes(value, b)
        found.append(Value(align.to_torch(how, value.array), value.dtype))
    return found


def layout_of(name: str, layout: str | Mapping[str, str]) -> str | None:
    """Returns the alignment that a user gave for an input; None if none is given."""
    chosen = {str(key): how for key, how in layout.items()}.get(name) if isinstance(layout, Mapping) else layout
    return None if chosen is None else LAYOUTS[chosen]


def moved(inputs: Inputs, how: str) -> list[Value]:
    """Returns the inputs with the last axis of floats at PyTorch's place for channels, or unchanged."""
    return [Value(align.to_torch(how, v.array) if v.is_float else v.array, v.dtype) for v in inputs.values]


def axes(value: Value, b: Any) -> str:
    """Returns the alignment of an input, by the first layer of `b` that defines one."""
    if not value.is_float or value.array.ndim < 3:
        return align.SAME
    for path in b.modules:
        kind = b.kinds.get(path)
        if kind is None:
            continue
        if kind.startswith("conv"):
            return align.MOVED if int(kind[-2]) + 2 == value.array.ndim else align.SAME
        if value.array.ndim == 4 or kind != "pool":
            return align.KINDS.get(kind, align.SAME)
    return align.SAME


# ---- random inputs ------------------------------------------------------------------------------------------

SCALES = (1.0, 0.05, 8.0)
"""Standard deviations of drawn floats, one for each draw."""
LENGTHS = (9, 5, 13)
"""Lengths of drawn sequences, one for each draw."""
SIDES = (32, 24, 40)
"""Sizes of drawn images, one for each draw."""
OTHER_LENGTHS, OTHER_SIDES = (4, 16, 2, 32, 64, 1), (8, 16, 28, 64, 96, 128, 224)
"""Sizes that are drawn if a module does not take the others, because it has learned positions, for example."""


def draw(a: Any, module: Any, seed: int, number: int, dtype: str) -> Iterator[Inputs]:
    """Yields random inputs for the signature and the layers of a module, of several sizes.

    One argument is drawn for the first layer. If there are several, their names tell tokens (`input_ids`, `text`),
    images (`images`, `pixel_values`), masks of padding (`attention_mask`), positions and times (`t`, `timesteps`).
    Any other argument is drawn for one layer after the other, until the module accepts all.

    Args:
        a: The side of the module under test.
        module: The module of the user, whose signature is read.
        seed: Seed of the inputs.
        number: Number of the draw, which determines the scale and the first size.
        dtype: Dtype to which floats are rounded.

    Raises:
        UsageError: The signature or the first layer does not show what the module takes.
    """
    names = _parameters(module)
    layers = [(path, kind) for path, kind in a.kinds.items() if kind != "plain"]
    if not layers or not names:
        what = "its signature has no argument" if not names else "none of its layers shows the shape of its input"
        raise UsageError(f"compare: {type(module).__name__}: {what}; pass {option('inputs')}")
    if len(names) > _MOST_ARGUMENTS:
        ours = option("inputs as a dict or a tuple")
        raise UsageError(f"compare: {describe_signature(module)}: too many to draw; pass {ours}")
    choices = [layers[:1]] if len(names) == 1 else [_choices(a, name, layers) for name in names]
    lengths = (LENGTHS[number % 3] + 4 * (number // 3), *OTHER_LENGTHS)
    sides = (SIDES[number % 3], *OTHER_SIDES)
    for length, side in itertools.zip_longest(lengths, sides, fillvalue=OTHER_LENGTHS[-1]):
        for chosen in itertools.islice(itertools.product(*choices), _MOST_CHOICES):
            generator = np.random.default_rng([seed, number])
            arrays = [_drawn(a, path, kind, generator, number, length, side) for path, kind in chosen]
            yield read(arrays[0] if len(names) == 1 else dict(zip(names, arrays, strict=True)), dtype)


_MOST_ARGUMENTS, _MOST_CHOICES = 6, 25
"""Largest number of arguments that are drawn, and of ways in which they are, for each size."""
_TOKENS = re.compile(r"(^|_)(ids?|tokens?|text|words|captions?|src|tgt|source|target)$")
_IMAGES = re.compile(r"(^|_)(images?|imgs?|pixel_values|pixels|frames)$")
_TIMES = re.compile(r"^(t|times?|timesteps?|sigmas?)$")
STEPS = 1000
"""Number of times of a diffusion."""


def _choices(a: Any, name: str, layers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the layers for which an argument may be drawn, as path and kind, or what else it may be."""
    if "mask" in name or "padding" in name:
        return [("", "mask")]
    if name == "position_ids":
        return [("", "positions")]
    distinct: dict[tuple[Any, ...], tuple[str, str]] = {}
    for path, kind in layers:
        shapes = tuple(shape for own, shape in a.shapes.items() if own.rpartition(".")[0] == path)
        distinct.setdefault((kind, shapes), (path, kind))
    embeddings = [layer for layer in layers if layer[1] == "embedding"]
    if _TOKENS.search(name) and embeddings:
        is_type = "type" in name or "segment" in name
        named = [layer for layer in embeddings if ("type" in layer[0] or "segment" in layer[0]) is is_type]
        return named or embeddings
    if _IMAGES.search(name) and (convs := [layer for layer in layers if layer[1].startswith("conv")]):
        return convs[:1]
    if _TIMES.search(name):
        return [("", "times"), *distinct.values()][:5]
    return list(distinct.values())[:5]


def describe_signature(module: Any) -> str:
    """Returns the class of a module, and the arguments that it requires."""
    return f"{type(module).__name__} takes {', '.join(_parameters(module))}"


def _parameters(module: Any) -> list[str]:
    """Returns the names of the arguments of a module that have no default."""
    call = getattr(type(module), "forward", None) or type(module).__call__
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    parameters = list(inspect.signature(call).parameters.values())[1:]
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def _drawn(
    a: Any, path: str, kind: str, generator: np.random.Generator, number: int, length: int, side: int
) -> Array:
    """Returns one array for the first layer, in the axes of MLX for MLX and of PyTorch for PyTorch."""
    shapes = {name[len(path) :].lstrip("."): shape for name, shape in a.shapes.items() if name.startswith(path)}
    batch = 2 + number % 2
    if kind == "mask":  # of rows of unequal lengths, the first without padding
        real = np.maximum(1, length - np.arange(batch) * (length // batch))
        return (np.arange(length) < real[:, None]).astype(np.int32)
    if kind == "positions":
        return np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)).copy()
    if kind == "times":
        return generator.integers(0, STEPS, (batch,)).astype(np.int32)
    if kind == "embedding":
        return generator.integers(0, shapes["weight"][0], (batch, length)).astype(np.int32)
    scale = SCALES[number % 3]
    if kind.startswith("conv"):
        weight = shapes["weight"]
        groups = int(getattr(a.modules[path], "groups", 1))
        channels = weight[0] if "transpose" in kind else weight[1] * groups
        axes = int(kind[-2])
        space = {1: (4 * length,), 2: (side, side), 3: (8, 8, 8 + 2 * number)}[axes]
        shape = (batch, *space, channels) if a.backend == "mlx" else (batch, channels, *space)
    elif kind == "linear":
        shape = (batch, length, shapes["weight"][1])
    elif kind in ("layer_norm", "rms_norm"):
        shape = (batch, length, shapes["weight"][0])
    elif kind == "batch_norm":
        shape = (4 * batch, shapes["running_mean"][0])
    elif kind == "native_recurrent":
        width = shapes.get("weight_ih_l0") or shapes.get("Wx") or shapes["Wxh"]
        shape = (batch, length, width[1])
    else:
        problem = f"the first layer, {path} of kind {kind}, does not show the input"
        raise UsageError(f"compare: {problem}; pass {option('inputs')}")
    return (scale * generator.standard_normal(shape)).astype(np.float32)
