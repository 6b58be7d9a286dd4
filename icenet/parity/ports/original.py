"""The PyTorch module that is ported, with the arguments of one call, and its export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.errors import PortError, UsageError
from icenet.core.messages import some
from icenet.core.porting import build
from icenet.core.porting.build import Plan
from icenet.core.porting.record import Graph, Tensor
from icenet.parity.ports.inputs import Arguments, arrays_of


@dataclass(frozen=True)
class Export:
    """The graphs of a module.

    Attributes:
        graph: The graph in evaluation mode.
        train: The graph in training mode; None if that mode cannot be ported.
        program: The exported program of the evaluation mode.
        weights: Parameters, buffers and constants of the module and the program, by path.
        notes: What the export does not have.
    """

    graph: Graph
    train: Graph | None
    program: Any
    weights: dict[str, np.ndarray]
    notes: list[str]

    @property
    def class_name(self) -> str:
        return self.graph.modules[""].class_name

    def missing(self) -> dict[str, list[str]]:
        """Returns the operations that the table lacks, with the places where the module uses them."""
        in_training = build.missing(self.train) if self.train is not None else {}
        return {**in_training, **build.missing(self.graph)}

    def make(self, plan: Plan) -> Any:
        """Returns the `mlx.nn.Module` of a plan with the weights of the original."""
        return backends.module("mlx", "porting.load").make(plan.source, plan.class_name, plan.native(self.weights))


class Original:
    """A PyTorch module and the example of its call.

    Args:
        module: A `torch.nn.Module` on the CPU.
        example_inputs, example_kwargs, dynamic: See `icenet.port`.

    Raises:
        UsageError: The module cannot be exported, or the arguments do not fit its `forward`.
        BackendError: PyTorch is not installed.
    """

    def __init__(
        self, module: Any, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None, dynamic: Any = None
    ) -> None:
        self._exporter = backends.module("torch", "porting.export")
        self._inputs = backends.module("torch", "porting.inputs")
        self._inputs.check_module(module)
        args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
        args, kwargs = self._inputs.checked_inputs((args, dict(example_kwargs or {})))
        self._inputs.check_arguments(module, args, kwargs)
        if isinstance(dynamic, (bool, int, str)):
            raise UsageError(
                f"dynamic={dynamic!r}: give the dynamic_shapes of torch.export.export, such as (None,) for one "
                "argument whose sizes are fixed, or leave it out, which opens every size"
            )
        self.module, self.dynamic = module, dynamic
        self._args, self._kwargs = args, kwargs
        self.example: Arguments = self._inputs.to_numpy((args, kwargs))

    @property
    def has_batch_of_one(self) -> bool:
        """Whether `export` gives the module another batch than the example."""
        return self.dynamic is None and any(array.shape[:1] == (1,) for array in arrays_of(self.example))

    def check_call(self) -> None:
        """Raises UsageError if the module raises an error on the example."""
        self._inputs.check_call(self.module, self._args, self._kwargs)

    def export(self, *, widened: bool = True, open_loops: bool = True) -> Export:
        """Exports the module in both modes.

        Args:
            widened: Whether a batch of 1 is exported as one of 2, since an export takes a size of 1 for a fixed one.
            open_loops: Whether the number of steps of a loop may stay open.

        Raises:
            PortError: The graph cannot be exported.
            UsageError: The module raises an error on the example.
        """
        example = self._args, self._kwargs
        given = self._inputs.widened(*example) if self.dynamic is None and widened else example
        is_wide = given[0] is not example[0] or given[1] is not example[1]
        shapes = "auto" if self.dynamic is None else self.dynamic

        def export(given: Arguments, shapes: Any, training: bool) -> tuple[Graph, Any, Any]:
            found: tuple[Graph, Any, Any] = self._exporter.export(self.module, *given, shapes, training, open_loops)
            return found

        try:
            graph, program, found_shapes = export(given, shapes, False)
        except PortError:
            self.check_call()
            if not is_wide:
                raise
            given, is_wide = example, False
            graph, program, found_shapes = export(given, shapes, False)
        if is_wide and _has_fixed_batch(graph, 2):  # the proof would find that, and cost a second one
            given = example
            graph, program, found_shapes = export(given, shapes, False)
        train, notes = None, []
        try:
            train, _, _ = export(given, found_shapes, True)
        except PortError as error:
            notes.append(f"training mode: {error}")
        if train is not None and _output_structure(train) != _output_structure(graph):
            notes.append(
                "the module returns another structure in training mode; the port has the evaluation mode only"
            )
            train = None
        if constants := {**graph.constants, **(train.constants if train is not None else {})}:
            texts = some(f"{path} = {value}" for path, value in constants.items())
            notes.append(f"buffers whose values are constants of the port: {texts}")
        weights = backends.module("torch", "porting.run").weights(self.module, program)
        return Export(graph, train, program, weights, notes)


def _has_fixed_batch(graph: Graph, size: int) -> bool:
    tensors = (graph.tensors[ref.name] for ref in graph.inputs)
    return any(isinstance(tensor, Tensor) and tensor.shape[:1] == (size,) for tensor in tensors)


def _output_structure(graph: Graph) -> str:
    """Returns the structure of the output as text, without the names of values."""
    return re.sub(r"name='\w+'", "", repr(graph.output_tree))
