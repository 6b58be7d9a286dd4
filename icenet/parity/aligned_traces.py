"""Traces and calls of MLX with the axes of PyTorch (`icenet.parity.align`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from icenet.parity.align import (
    DIFFERENT_CALLS,
    EQUAL,
    KINDS,
    MOVED,
    ReplayError,
    alignment,
    distance,
    nearer,
    remark,
    to_mlx,
    to_torch,
    unequal_shapes,
)
from icenet.parity.trace import Call, Trace, Value, output_name

_PORTED_MODEL = "icenet.models.ported.PortedModel"
"""The class of a model whose module is a port."""


def _known_shapes(mlx: Trace, torch: Trace) -> dict[tuple[int, ...], str]:
    """Returns the alignments that layer kinds or values determine, the first one by each shape in PyTorch."""
    found: dict[tuple[int, ...], str] = {}
    for name, value in mlx.values.items():
        if name.startswith("module:") and name in torch.values and value.array.ndim > 2:
            ours, theirs = value.array, torch.values[name].array
            known = KINDS.get(_common_kind(mlx, torch, name) or "")
            if known is None and ours.shape == theirs.shape == to_torch(MOVED, ours, copy=False).shape:
                known = nearer(ours, theirs)
            if known is not None:
                found.setdefault(theirs.shape, known)
    return found


def align_trace(mlx: Trace, torch: Trace) -> tuple[Trace, dict[str, str]]:
    """Returns a trace of MLX with PyTorch's axes, and remarks on its values by name.

    Args:
        mlx: A trace of any backend. One of PyTorch has PyTorch's axes already.
        torch: A trace of PyTorch, of the same run.
    """
    if mlx.backend == torch.backend:
        return mlx, {}
    values, remarks, shapes = dict(mlx.values), {}, _known_shapes(mlx, torch)
    for name, value in mlx.values.items():
        theirs = torch.values.get(name)
        if theirs is None or not name.startswith("module:"):
            continue
        kind = _common_kind(mlx, torch, name)
        found = alignment(kind, value.array, theirs.array, shapes)
        if found is None:
            remarks[name] = unequal_shapes(kind, value.array, theirs.array)
        else:
            values[name] = Value(to_torch(found, value.array), value.dtype)
            remarks[name] = remark(kind, found, value.array.ndim)
    return replace(mlx, values=values), remarks


def without_counterpart(mlx: Trace, torch: Trace) -> set[str]:
    """Returns the names of values that one side lacks because its layer has other parts (`DIFFERENT_CALLS`).

    A port computes some layers of its original by functions, such as a head with the weight of an embedding.
    """
    if mlx.backend == torch.backend:
        return set()
    is_port = mlx.classes.get("") == _PORTED_MODEL
    found = set()
    for name in (*mlx.values, *torch.values):
        kind, _, path = name.partition(":")
        is_further = "[" in path and _common_kind(mlx, torch, path) in DIFFERENT_CALLS
        is_of_one = is_port and (name not in mlx.values or name not in torch.values)
        if kind == "module" and path and (is_further or is_of_one or _is_within_different(mlx, torch, path)):
            found.add(name)
    return found


def flattened_input(path: str, mlx: Trace, torch: Trace) -> str:
    """Returns a remark if MLX flattened `[B, *space, C]` where PyTorch flattened `[B, C, *space]`; else empty.

    Args:
        path: The layer that receives the flat array.
        mlx, torch: Traces of the same run.
    """
    if mlx.backend == torch.backend or path not in mlx.calls:
        return ""
    for ours, theirs in zip(mlx.calls[path].values, torch.calls[path].values, strict=False):
        a, b = ours.array, theirs.array
        if a.ndim != 2 or a.shape != b.shape or not ours.is_float or distance(a, b) < EQUAL:
            continue
        shapes = dict.fromkeys(value.array.shape for value in torch.of("module").values())
        for shape in shapes:
            fits = len(shape) > 2 and shape[0] == len(b) and math.prod(shape) == b.size
            if fits and distance(a, to_mlx(MOVED, b.reshape(shape)).reshape(b.shape)) < EQUAL:
                return "its input is flattened channels last: in MLX, write mx.moveaxis(x, -1, 1).flatten(1)"
    return ""


class AlignedReplay:
    """Replays MLX's layers with arguments and results that have PyTorch's axes.

    Args:
        replay: Replay by MLX: called as `replay(path, call, cotangents)`.
        mlx, torch: Traces of the same run, whose calls are paired argument by argument.
    """

    def __init__(self, replay: Callable[..., dict[str, Value]], mlx: Trace, torch: Trace) -> None:
        self._replay, self._mlx, self._torch = replay, mlx, torch
        self._shapes = {} if mlx.backend == torch.backend else _known_shapes(mlx, torch)

    def __call__(self, path: str, call: Call, cotangents: list[Value] | None) -> dict[str, Value]:
        """Calls the layer at `path`, for which `obstacle` returned nothing.

        Args:
            path: Path of the layer.
            call: The call of PyTorch, with the values to use.
            cotangents: Of the outputs of PyTorch.

        Returns:
            The results with the names and axes of PyTorch's. Results without a counterpart are left out.

        Raises:
            ReplayError: MLX fails, or an output has no alignment.
        """
        if self._mlx.backend == self._torch.backend:
            return self._replay(path, call, cotangents)
        inputs, outputs = self._inputs(path), self._outputs(path)
        values = dict(call.named)
        filled = {
            ours: Value(to_mlx(how, values[theirs].array), values[theirs].dtype) for ours, theirs, how in inputs
        }
        drawn = cotangents or []
        seeds = [
            Value(to_mlx(outputs[index], drawn[index].array), drawn[index].dtype)
            if index in outputs
            else Value(np.zeros_like(value.array), value.dtype)
            for index, value in enumerate(self._mlx.outputs(path).values())
            if cotangents is not None
        ]
        try:
            replayed = self._replay(path, self._mlx.calls[path].fill(filled), seeds or None)
        except Exception as error:  # whatever a user's layer raises is a result of the comparison
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ReplayError(f"fails in MLX on PyTorch's inputs: {reason}") from error
        return dict(self._aligned(path, replayed, inputs, outputs))

    def by(self, replay: Callable[..., dict[str, Value]]) -> AlignedReplay:
        """Returns the same with another replay by MLX."""
        return AlignedReplay(replay, self._mlx, self._torch)

    def obstacle(self, path: str) -> str:
        """Returns why the layer at `path` cannot be called with equal inputs on both sides; empty if it can."""
        if self._mlx.backend == self._torch.backend:
            return ""
        if path not in self._mlx.calls:
            return "not replayed: it has no arguments that can be stored in MLX"
        ours, theirs = self._arguments(path)
        if len(ours) != len(theirs):
            return f"not replayed: called with {len(ours)} arrays in MLX, {len(theirs)} in PyTorch"
        kind = self._kind(path)
        for name, other in self._pairs(path):
            if alignment(kind, ours[name].array, theirs[other].array, self._shapes) is None:
                return f"not replayed: input of {unequal_shapes(kind, ours[name].array, theirs[other].array)}"
        return ""

    def comparable(self, path: str, results: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the results of PyTorch's replay that have a counterpart in MLX.

        Left out are gradients of masks that are numbers on one side only, and, for layers whose calls differ between
        the frameworks (`DIFFERENT_CALLS`), further outputs and the gradients of parameters.
        """
        if self._mlx.backend == self._torch.backend:
            return dict(results)
        numbers = _float_numbers(self._torch.calls[path])
        shared = {f"input {numbers[theirs]}" for _, theirs, _ in self._inputs(path) if theirs in numbers}
        if self._kind(path) in DIFFERENT_CALLS:
            shared.add("output")
        else:
            prefix = f"{path}." if path else ""
            shared |= {
                name
                for name in results
                if not name.startswith("input ")
                and not _is_within_different(self._mlx, self._torch, prefix + name.removeprefix("gradient:"))
            }
        return {name: value for name, value in results.items() if name in shared}

    def cotangents(self, path: str, drawn: list[Value]) -> list[Value]:
        """Returns cotangents of the outputs of PyTorch: zero for outputs that have no counterpart in MLX."""
        if self._mlx.backend == self._torch.backend or self._kind(path) not in DIFFERENT_CALLS:
            return drawn
        return [drawn[0], *(Value(np.zeros_like(value.array), value.dtype) for value in drawn[1:])]

    def _aligned(
        self, path: str, replayed: Mapping[str, Value], inputs: list[tuple[str, str, str]], outputs: Mapping[int, str]
    ) -> Iterator[tuple[str, Value]]:
        """Yields the results of MLX's replay with PyTorch's names and axes."""
        for index, how in outputs.items():
            value = replayed[output_name(index)]
            yield output_name(index), Value(to_torch(how, value.array), value.dtype)
        our_numbers, their_numbers = _float_numbers(self._mlx.calls[path]), _float_numbers(self._torch.calls[path])
        for ours, theirs, how in inputs:
            if ours in our_numbers:
                value = replayed[f"input {our_numbers[ours]}"]
                yield f"input {their_numbers[theirs]}", Value(to_torch(how, value.array), value.dtype)
        yield from ((name, value) for name, value in replayed.items() if name.startswith("gradient "))

    def _kind(self, path: str) -> str | None:
        return _common_kind(self._mlx, self._torch, path)

    def _arguments(self, path: str) -> tuple[dict[str, Value], dict[str, Value]]:
        return dict(self._mlx.calls[path].named), dict(self._torch.calls[path].named)

    def _pairs(self, path: str) -> list[tuple[str, str]]:
        """Returns the names of the arguments in MLX and in PyTorch, paired by name, or else by position."""
        ours, theirs = self._arguments(path)
        pairs = zip(ours, ours if ours.keys() == theirs.keys() else theirs, strict=True)
        # a mask may be booleans on one side and numbers on the other: then each side keeps its own
        return [(name, other) for name, other in pairs if ours[name].is_float == theirs[other].is_float]

    def _inputs(self, path: str) -> list[tuple[str, str, str]]:
        """Returns MLX's name, PyTorch's name and the alignment of each argument that both sides receive."""
        ours, theirs = self._arguments(path)
        kind, shapes = self._kind(path), self._shapes
        pairs = [(a, b, alignment(kind, ours[a].array, theirs[b].array, shapes)) for a, b in self._pairs(path)]
        return [(a, b, how) for a, b, how in pairs if how is not None]

    def _outputs(self, path: str) -> dict[int, str]:
        """Returns the alignment of each output by its number.

        Raises:
            ReplayError: An output has no alignment.
        """
        ours, theirs = (list(trace.outputs(path).values()) for trace in (self._mlx, self._torch))
        kind, found = self._kind(path), {}
        if kind in DIFFERENT_CALLS:
            ours, theirs = ours[:1], theirs[:1]
        if len(ours) != len(theirs):
            raise ReplayError(f"{len(ours)} outputs in MLX, {len(theirs)} in PyTorch")
        for index, (output, exact) in enumerate(zip(ours, theirs, strict=True)):
            how = alignment(kind, output.array, exact.array, self._shapes)
            if how is None:
                raise ReplayError(unequal_shapes(kind, output.array, exact.array))
            found[index] = how
        return found


def _common_kind(mlx: Trace, torch: Trace, name: str) -> str | None:
    """Returns the layer kind of a module, by its path or the name of its output, if both sides agree on it."""
    path = name.removeprefix("module:").partition("#")[0].partition("[")[0]
    kind = torch.layer_kinds.get(path)
    return kind if kind == mlx.layer_kinds.get(path) else None


def _is_within_different(mlx: Trace, torch: Trace, path: str) -> bool:
    """Returns whether a module or parameter is within a layer of `DIFFERENT_CALLS`."""
    different = [layer for layer, kind in torch.layer_kinds.items() if kind in DIFFERENT_CALLS]
    return any(
        path.startswith(f"{layer}." if layer else "") and mlx.layer_kinds.get(layer) == torch.layer_kinds[layer]
        for layer in different
    )


def _float_numbers(call: Call) -> dict[str, int]:
    """Returns the number of each float argument among the float arguments, by name: `input 0`, `input 1`, ..."""
    floats = [name for name, value in call.named if value.is_float]
    return {name: number for number, name in enumerate(floats)}
