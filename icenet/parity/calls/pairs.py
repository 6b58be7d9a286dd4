"""A call that both sides of a comparison make, and what is computed of it alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity.calls.events import Event
from icenet.parity.measures import round_to
from icenet.parity.trace import Value, output_name

Array = npt.NDArray[Any]

FRAMEWORK_LAYERS = ("mlx.nn.", "torch.nn.")
"""Beginnings of the names of the frameworks' own layers."""


@dataclass
class Pair:
    """A call that both sides make.

    Attributes:
        a, b: The event of the module under test, and that of the reference.
        noise: The event of `b` in the dtype under test.
        kind: Kind of the layer, if both sides agree on it.
        children: The calls within it that both sides make and that can be left out of a replay, in the order of `b`.
        apart: The calls within it that get other rows on each side. They are computed within it, and replayed alone
            with the rows of `b` if it differs.
        repeated: The calls within it that a side makes more than once, with equal arguments. They are computed within
            it, because the gradients by their results are divided among them, and replayed alone as well.
        arguments, outputs: Index in `a`, index in `b` and alignment of each array that both sides have.
        obstacle: Why it cannot be replayed; empty if it can.
        parameters: Paths in `b`, within the module, of the parameters that the replay has gradients of.
        is_opaque: Whether it is a layer of both frameworks that has other layers within it on each side.
        derived: For each side ("a", "b"), the outputs that are parts of others: number, and the index of the part.
        masked_arguments, masked_outputs: Numbers in `b` of the arrays that both sides mask, by other numbers. In the
            results of a replay, masked values are -inf on all sides; as an input, each side receives its own.
        own: Numbers in `b` of the arguments that have another form on each side. Each side keeps its own.
        larger: Inputs of a replay in place of those of the run, on which it differs (`calls.larger`); None without.
    """

    a: Event
    b: Event
    noise: Event
    kind: str | None = None
    children: list[Pair] = field(default_factory=list)
    apart: list[Pair] = field(default_factory=list)
    repeated: list[Pair] = field(default_factory=list)
    arguments: list[tuple[int, int, str]] = field(default_factory=list)
    outputs: list[tuple[int, int, str]] = field(default_factory=list)
    obstacle: str = ""
    parameters: list[str] = field(default_factory=list)
    is_opaque: bool = False
    derived: dict[str, dict[int, tuple[int, Any]]] = field(default_factory=dict)
    masked_arguments: set[int] = field(default_factory=set)
    masked_outputs: set[int] = field(default_factory=set)
    own: set[int] = field(default_factory=set)
    larger: list[Value] | None = None

    @property
    def path(self) -> str:
        """Path of the module in `b`."""
        return self.b.path

    @property
    def key(self) -> str:
        """The path, with the number of the call if it is not the first."""
        return f"{self.path}#{self.b.call + 1}" if self.b.call else self.path

    @property
    def is_leaf(self) -> bool:
        """Whether it calls no other module that both sides have."""
        return not self.children

    def inputs(self, side: str) -> list[Value]:
        """Returns what a replay receives, of a side ("a", "b" or "noise"): arguments, then results of its calls."""
        found = [getattr(self, side).arguments[i if side == "a" else j] for i, j, _ in self.arguments]
        for child in self.children:
            found += [getattr(child, side).outputs[i if side == "a" else j] for i, j, _ in child.outputs]
        return found

    def results(self, side: str) -> list[Value]:
        """Returns what a replay computes, of a side: outputs, then arguments of its calls."""
        found = [getattr(self, side).outputs[i if side == "a" else j] for i, j, _ in self.outputs]
        for child in self.children:
            found += [getattr(child, side).arguments[i if side == "a" else j] for i, j, _ in child.arguments]
        return [hidden(item) if is_masked else item for item, is_masked in zip(found, self.hides, strict=True)]

    @property
    def hides(self) -> list[bool]:
        """Whether each result is masked by other numbers on each side."""
        found = [j in self.masked_outputs for _, j, _ in self.outputs]
        for child in self.children:
            found += [j in child.masked_arguments for _, j, _ in child.arguments]
        return found

    @property
    def masks(self) -> list[Value | None]:
        """The array of `a` for each input that is masked by other numbers on each side, in the axes of `a`."""
        found = [self.a.arguments[i] if j in self.masked_arguments else None for i, j, _ in self.arguments]
        for child in self.children:
            found += [child.a.outputs[i] if j in child.masked_outputs else None for i, j, _ in child.outputs]
        return found

    def hidden(self, results: dict[str, Value]) -> dict[str, Value]:
        """Returns the results of a replay with -inf for masked values."""
        for index, is_masked in enumerate(self.hides):
            if is_masked and (name := output_name(index)) in results:
                results[name] = hidden(results[name])
        return results

    @property
    def input_hows(self) -> list[str]:
        """The alignment of each input."""
        return [how for _, _, how in (*self.arguments, *(item for c in self.children for item in c.outputs))]

    @property
    def result_hows(self) -> list[str]:
        """The alignment of each result."""
        return [how for _, _, how in (*self.outputs, *(item for c in self.children for item in c.arguments))]

    def unknown_gradients(self) -> set[str]:
        """Returns the names of the gradients by inputs of which `a` has a single part, and `b` copies."""
        floats = [how for value, how in zip(self.inputs("b"), self.input_hows, strict=True) if value.is_float]
        return {f"input {number}" for number, how in enumerate(floats) if align.is_single_in_mlx(how)}

    def places(self) -> list[tuple[Pair | None, int]]:
        """Returns for each result the call that gets it (None: it is an output of the module), and its number."""
        found: list[tuple[Pair | None, int]] = [(None, j) for _, j, _ in self.outputs]
        for child in self.children:
            found += [(child, j) for _, j, _ in child.arguments]
        return found

    def input_places(self) -> list[tuple[Pair | None, int]]:
        """Returns for each input the call that returned it (None: it is an argument of the module)."""
        found: list[tuple[Pair | None, int]] = [(None, j) for _, j, _ in self.arguments]
        for child in self.children:
            found += [(child, j) for _, j, _ in child.outputs]
        return found


@dataclass(frozen=True)
class Replay:
    """The arguments of a replay: what a module does itself in a call, given the results of the calls within it.

    Attributes:
        pair: The call.
        values: Its inputs in the axes of the reference, as `Pair.inputs`.
        cotangents: Of its results in the axes of the reference; None for no gradients.
        weights: Canonical parameters in place of its own, by path in the reference within the module.
        others: Gradients by its inputs from other uses, which are added to those of the replay; None without one.
        left_out: Numbers of arguments in place of which the side gets None.
    """

    pair: Pair
    values: Sequence[Value]
    cotangents: Sequence[Value] | None = None
    weights: Mapping[str, Array] | None = None
    others: Sequence[Value | None] = ()
    left_out: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Sample:
    """A nearby problem, in which the noise is measured (see `icenet.parity.resampling`).

    Attributes:
        number: Its number, from 0.
        rounds: Whether all values are also moved by an ulp, as by one more rounding.
        in_order: Whether PyTorch sums term by term.
        constant_maxima: Whether maxima of PyTorch have no gradient (`icenet_torch.tools.maxima`).
    """

    number: int
    rounds: bool = False
    in_order: bool = False
    constant_maxima: bool = False


def cotangents_of(pair: Pair, dtypes: Sequence[str], seed: int = 0) -> list[Value]:
    """Returns random cotangents of the results of a replay, rounded to their dtypes."""
    found, hides = [], pair.hides
    for index, (item, dtype) in enumerate(zip(pair.results("b"), dtypes, strict=True)):
        if not item.is_float:
            found.append(Value(np.zeros_like(item.array), item.dtype))
            continue
        key = zlib.crc32(f"{seed} {pair.key} {index}".encode())
        values = np.random.Generator(np.random.SFC64(key)).standard_normal(item.array.shape, np.float32)
        if hides[index]:  # softmax passes nothing on to masked values
            values[~np.isfinite(item.array)] = 0.0
        found.append(Value(round_to(values, dtype), dtype))
    return found


def rounded(item: Value, dtype: str) -> Value:
    """Returns a float value rounded to a dtype; others unchanged."""
    return replace(item, array=round_to(item.array, dtype), dtype=dtype) if item.is_float else item


def as_floats(item: Value) -> Value:
    """Returns complex numbers as pairs of floats, which are judged as such; others unchanged."""
    if item.array.dtype.kind != "c":
        return item
    return Value(np.stack([item.array.real, item.array.imag], axis=-1), "fp32")


def hidden(item: Value) -> Value:
    """Returns a value with -inf where it is masked."""
    where = align.masked(item.array)
    return (
        item if where is None else replace(item, array=np.where(where, -np.inf, item.array).astype(item.array.dtype))
    )
