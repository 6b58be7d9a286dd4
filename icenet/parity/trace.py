"""Traces: the arrays that a run computes, named and in the order of computation.

A backend's `tools.probe` records a trace and `icenet.parity.configuration.locate` compares traces. A value is named
`KIND:PATH`, identically on both backends:

    input:inputs                    the batch
    module:blocks.0.attention       output of a module, by module path. `PATH#2` is its second call, `PATH[1]` its
                                    second output. The model has the empty path; its output is the logits.
    loss:                           the mean loss
    gradient:blocks.0...weight      gradient of the loss by a parameter, in PyTorch's layout
    parameter:, moment:             weights and optimizer state after a step

Outputs and arguments of modules have the axes of their framework: PyTorch's images are `[B, C, H, W]`, MLX's
`[B, H, W, C]`. `icenet.parity.align` aligns them when traces are compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy.typing as npt

from icenet.core.dtypes import FLOAT_DTYPES
from icenet.core.errors import WeightsError
from icenet.core.weights import files as weight_files

Array = npt.NDArray[Any]

_SHORT = {"float64": "fp64", **{dtype: name for name, dtype in FLOAT_DTYPES.items()}}
_NOT_FOREIGN = ("icenet.", "icenet_torch.", "mlx.nn.layers.containers.", "torch.nn.modules.container.")
_FORMAT = "2"  # format 1 stored PyTorch's images channels-last


def short_dtype(dtype: Any) -> str:
    """Returns the short name of a framework's dtype: `torch.bfloat16` is bf16. Integers keep their names."""
    name = str(dtype).rpartition(".")[2]
    return _SHORT.get(name, name)


def class_name(module: object) -> str:
    """Returns the full name of a module's class, such as `mlx.nn.layers.linear.Linear`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_foreign(name: str) -> bool:
    """Returns whether the class with this full name is outside IceNet and computes something."""
    return not name.startswith(_NOT_FOREIGN)


@dataclass(frozen=True)
class Value:
    """A numpy array and the dtype that it had in the framework (bf16 is held as float32)."""

    array: Array
    dtype: str

    @property
    def is_float(self) -> bool:
        return self.dtype in _SHORT.values()


@dataclass(frozen=True)
class Call:
    """The arguments of a module's call: arrays as `Value`; None, strings and numbers unchanged."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> list[Value]:
        """The arrays among the arguments, in order."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Value)]

    @property
    def named(self) -> list[tuple[str, Value]]:
        """The arrays among the arguments, in order, by position (`0`, `1`, ...) or name."""
        items = [*((str(index), item) for index, item in enumerate(self.args)), *self.kwargs.items()]
        return [(name, item) for name, item in items if isinstance(item, Value)]

    def fill(self, values: Mapping[str, Value]) -> Call:
        """Returns the call with some arrays replaced, by the names of `named`."""
        args = tuple(values.get(str(index), item) for index, item in enumerate(self.args))
        return Call(args, {name: values.get(name, item) for name, item in self.kwargs.items()})

    def map(self, function: Callable[[Value], Any]) -> Call:
        """Returns the call with `function(value)` in place of each `Value`."""

        def apply(item: Any) -> Any:
            return function(item) if isinstance(item, Value) else item

        return Call(tuple(map(apply, self.args)), {name: apply(item) for name, item in self.kwargs.items()})


@dataclass
class Trace:
    """Named values in order, the calls that can be replayed, and a description of the run.

    Attributes:
        values: Values by `KIND:PATH`.
        calls: The first call of each module, by module path, if all its arguments could be stored.
        backend: "mlx" or "torch", which determines the axes of outputs and arguments; set by `recording`.
        layer_kinds: The kind of each module whose class defines the axes of its calls, by path; set by `recording`.
        classes: The class of each module by path, such as `mlx.nn.layers.linear.Linear`; set by `recording`.
        meta: Framework, version, device, ...
    """

    values: dict[str, Value] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    backend: str = ""
    layer_kinds: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, path: str, value: Value) -> None:
        """Appends a value. A name that exists gets the suffix `#2`, `#3`, ..."""
        name, count = f"{kind}:{path}", 1
        while name in self.values:
            count += 1
            name = f"{kind}:{path}#{count}"
        self.values[name] = value

    def add_call(self, path: str, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Value]) -> None:
        """Appends the outputs of a module, and its arguments if all of them can be stored."""
        for index, value in enumerate(outputs):
            self.add("module", _indexed(path, index), value)
        if path not in self.calls and all(map(_is_storable, (*args, *kwargs.values()))):
            self.calls[path] = Call(tuple(args), dict(kwargs))

    def describe_modules(self, backend: str, layer_kinds: dict[str, str], modules: Mapping[str, object]) -> None:
        """Sets `backend`, `layer_kinds` and `classes`."""
        self.backend, self.layer_kinds = backend, layer_kinds
        self.classes = {path: class_name(module) for path, module in modules.items()}

    def has_foreign(self, path: str) -> bool:
        """Returns whether the module at `path` or one within it computes with code outside IceNet."""
        return any(
            is_foreign(name)
            for inner, name in self.classes.items()
            if path in ("", inner) or inner.startswith(path + ".")
        )

    def of(self, kind: str) -> dict[str, Value]:
        """Returns the values of one kind by path, in order."""
        return {
            name.partition(":")[2]: value for name, value in self.values.items() if name.partition(":")[0] == kind
        }

    def outputs(self, path: str) -> dict[str, Value]:
        """Returns the outputs of a module's first call, by name (`module:PATH`, `module:PATH[1]`, ...)."""
        found: dict[str, Value] = {}
        while (name := f"module:{_indexed(path, len(found))}") in self.values:
            found[name] = self.values[name]
        return found

    @property
    def logits(self) -> Array:
        """The output of the model."""
        return self.values["module:"].array

    @property
    def loss(self) -> float:
        return float(self.values["loss:"].array)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .safetensors file.

        Raises:
            WeightsError: The file cannot be written.
        """
        arrays = {name: value.array for name, value in self.values.items()}
        calls: dict[str, Any] = {}
        for module, call in self.calls.items():
            items = {}
            for name, item in (*enumerate(call.args), *call.kwargs.items()):
                if isinstance(item, Value):
                    arrays[f"argument:{module}:{name}"] = item.array
                    items[str(name)] = {"dtype": item.dtype}
                else:
                    items[str(name)] = {"is": item}
            calls[module] = {"args": len(call.args), "items": items}
        header = {
            "values": {name: value.dtype for name, value in self.values.items()},
            "calls": calls,
            "backend": self.backend,
            "layer_kinds": self.layer_kinds,
            "classes": self.classes,
            "meta": self.meta,
        }
        metadata = {"icenet_trace": _FORMAT, "trace": json.dumps(header)}
        weight_files.write(path, arrays, metadata, max_shard_bytes=None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Reads a file that `save` wrote.

        Raises:
            WeightsError: The file is missing, damaged, or not a trace.
        """
        stored = weight_files.read(path)
        if stored.metadata.get("icenet_trace") != _FORMAT:
            found = stored.metadata.get("icenet_trace")
            what = f"a parity trace of format {found}, not {_FORMAT}" if found else "not a parity trace"
            raise WeightsError(f"{path}: {what}; record it again")
        try:
            header = json.loads(stored.metadata["trace"])
            values = {name: Value(stored[name], dtype) for name, dtype in header["values"].items()}
            calls = {}
            for module, call in header["calls"].items():
                items = {
                    name: Value(stored[f"argument:{module}:{name}"], item["dtype"]) if "dtype" in item else item["is"]
                    for name, item in call["items"].items()
                }
                positional = tuple(items.pop(str(index)) for index in range(call["args"]))
                calls[module] = Call(positional, items)
            facts = (header[name] for name in ("backend", "layer_kinds", "classes", "meta"))
            return cls(values, calls, *facts)
        except (KeyError, ValueError, TypeError, AttributeError):
            raise WeightsError(f"{path}: damaged parity trace; record it again") from None


class ArrayConverter:
    """Converts the arrays of one framework to trace values. Each backend's probe has one.

    Args:
        array_type: `mlx.core.array` or `torch.Tensor`.
        to_numpy: Converts an array to numpy, bf16 to float32.
    """

    def __init__(self, array_type: type, to_numpy: Callable[[Any], Array]) -> None:
        self._array_type = array_type
        self._to_numpy = to_numpy

    def value(self, item: Any) -> Any:
        """Returns an array as a `Value`, anything else unchanged."""
        if not isinstance(item, self._array_type):
            return item
        return Value(self._to_numpy(item), short_dtype(item.dtype))  # type: ignore[attr-defined]

    def arrays(self, outputs: Any) -> list[Any]:
        """Returns the arrays of an output: an array, or nested tuples, lists, dicts and dataclasses of arrays."""
        if isinstance(outputs, self._array_type):
            return [outputs]
        if is_dataclass(outputs) and not isinstance(outputs, (type, dict)):
            outputs = [getattr(outputs, item.name) for item in fields(outputs)]
        items = outputs.values() if isinstance(outputs, dict) else outputs
        return [array for item in items for array in self.arrays(item)] if isinstance(outputs, _NESTED) else []

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Returns the arguments of a call with a `Value` in place of each array."""
        return [self.value(item) for item in args], {name: self.value(item) for name, item in kwargs.items()}

    def add_call(self, trace: Trace, path: str, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> None:
        """Appends a module's call to a trace; the arguments are those that `arguments` returned."""
        trace.add_call(path, args, kwargs, [self.value(array) for array in self.arrays(outputs)])

    def replayed(
        self, outputs: Sequence[Any], input_gradients: Sequence[Any], parameter_gradients: Mapping[str, Array]
    ) -> dict[str, Value]:
        """Names the results of a replay: `output`, `output[1]`, ..., `input 0`, ..., `gradient PARAMETER`, ...

        Parameter gradients are numpy arrays in PyTorch's layout.
        """
        return {
            **{output_name(index): self.value(array) for index, array in enumerate(outputs)},
            **{f"input {index}": self.value(array) for index, array in enumerate(input_gradients)},
            **{f"gradient {name}": Value(a, short_dtype(a.dtype)) for name, a in parameter_gradients.items()},
        }


_NESTED = (tuple, list, dict)


def output_name(index: int) -> str:
    """Returns the name of an output in a replay: `output`, `output[1]`, ..."""
    return _indexed("output", index)


def _indexed(name: str, index: int) -> str:
    return f"{name}[{index}]" if index else name


def _is_storable(item: Any) -> bool:
    return item is None or isinstance(item, (Value, str, bool, int, float))
