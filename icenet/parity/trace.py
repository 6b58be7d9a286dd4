"""What a run computed, array by array, in the order in which it did.

A trace is recorded by a backend's `probe` and compared by `icenet.parity.locate`. Its values are named
`KIND:PATH`, the same on both backends:

    input:inputs                    the batch
    module:blocks.0.attention       a module's output, by its path; a second call is `PATH#2`, a second output
                                    `PATH[1]`; the model itself has the empty path, and its output is the logits
    loss:                           the mean loss
    gradient:blocks.0...weight      of the loss, by parameter, in PyTorch's layout
    parameter:, moment:             weights and optimizer state after a step

Activations are kept channels-last (NHWC); the probes' function `to_numpy` is the place for that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from icenet.core.errors import WeightsError
from icenet.core.weights import files as weight_files

Array = npt.NDArray[Any]

_SHORT = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_FORMAT = "1"


def short_dtype(dtype: Any) -> str:
    """The name of a framework's dtype: `torch.bfloat16` is bf16; integers keep their names."""
    name = str(dtype).rpartition(".")[2]
    return _SHORT.get(name, name)


@dataclass(frozen=True)
class Value:
    """An array and the dtype it had in the framework (numpy holds bf16 as float32)."""

    array: Array
    dtype: str

    @property
    def is_float(self) -> bool:
        return self.dtype in _SHORT.values()


@dataclass(frozen=True)
class Call:
    """What a module was called with: `Value`s, and None, texts and numbers as they are."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> list[Value]:
        """The arrays among the arguments, in order."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Value)]

    def map(self, change: Any) -> Call:
        """The same call with `change(value)` in place of each `Value`."""

        def put(item: Any) -> Any:
            return change(item) if isinstance(item, Value) else item

        return Call(tuple(map(put, self.args)), {name: put(item) for name, item in self.kwargs.items()})


@dataclass
class Trace:
    """Ordered named values, the calls that can be replayed, and what is known of the run."""

    values: dict[str, Value] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, path: str, value: Value) -> None:
        """Appends a value; a name that is there already gets `#2`, `#3`, ..."""
        name, count = f"{kind}:{path}", 1
        while name in self.values:
            count += 1
            name = f"{kind}:{path}#{count}"
        self.values[name] = value

    def add_call(self, path: str, args: Any, kwargs: Mapping[str, Any], outputs: list[Value]) -> None:
        """Appends a module's outputs, and its call where every argument can be kept."""
        for index, value in enumerate(outputs):
            self.add("module", path if index == 0 else f"{path}[{index}]", value)
        if path not in self.calls and all(map(_is_plain, (*args, *kwargs.values()))):
            self.calls[path] = Call(tuple(args), dict(kwargs))

    def of(self, kind: str) -> dict[str, Value]:
        """The values of one kind by path, in order."""
        return {
            name.partition(":")[2]: value for name, value in self.values.items() if name.partition(":")[0] == kind
        }

    @property
    def logits(self) -> Array:
        """The model's output."""
        return self.values["module:"].array

    @property
    def loss(self) -> float:
        return float(self.values["loss:"].array)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .safetensors file; raises WeightsError where it cannot be written."""
        arrays = {name: value.array for name, value in self.values.items()}
        calls: dict[str, Any] = {}
        for module, call in self.calls.items():
            named = [*enumerate(call.args), *call.kwargs.items()]
            listed = {}
            for name, item in named:
                if isinstance(item, Value):
                    arrays[f"argument:{module}:{name}"] = item.array
                    listed[str(name)] = {"dtype": item.dtype}
                else:
                    listed[str(name)] = {"is": item}
            calls[module] = {"args": len(call.args), "items": listed}
        described = {
            "values": {name: value.dtype for name, value in self.values.items()},
            "calls": calls,
            "meta": self.meta,
        }
        metadata = {"icenet_trace": _FORMAT, "trace": json.dumps(described)}
        weight_files.write(path, arrays, metadata, max_shard_bytes=None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Reads what `save` wrote.

        Raises:
            WeightsError: the file is missing, damaged, or not a trace.
        """
        stored = weight_files.read(path)
        if stored.metadata.get("icenet_trace") != _FORMAT:
            raise WeightsError(f"{path}: not a parity trace of format {_FORMAT}; record it again")
        try:
            described = json.loads(stored.metadata["trace"])
            values = {name: Value(stored[name], dtype) for name, dtype in described["values"].items()}
            calls = {}
            for module, call in described["calls"].items():
                items = {
                    name: Value(stored[f"argument:{module}:{name}"], item["dtype"]) if "dtype" in item else item["is"]
                    for name, item in call["items"].items()
                }
                positional = tuple(items.pop(str(index)) for index in range(call["args"]))
                calls[module] = Call(positional, items)
            return cls(values, calls, dict(described["meta"]))
        except (KeyError, ValueError, TypeError, AttributeError):
            raise WeightsError(f"{path}: a damaged parity trace; record it again") from None


def _is_plain(item: Any) -> bool:
    return item is None or isinstance(item, (Value, str, bool, int, float))
