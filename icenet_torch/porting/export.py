"""Exports a `torch.nn.Module` as a record of its graph, with `torch.export` at the level of ATen.

Each call of a module is surrounded by two operations without an effect, `enter` and `exit`, which carry its arguments
and results. So the writer of the source knows the tree of calls, the names of the arguments, and may take a whole
module as one layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from icenet.core.errors import PortError
from icenet.core.porting.record import Graph, OpenLoop
from icenet_torch.porting import attentions, constants, losses, recurrent, sizes, traceable, vectorized, whole
from icenet_torch.porting.failures import broken
from icenet_torch.porting.reader import NUMBERS, Reader
from icenet_torch.porting.repeated import Repeated
from icenet_torch.porting.steps import Steps

_library = torch.library.Library("icenet_port", "DEF")
for _name in ("enter", "exit"):
    _library.define(f"{_name}(Tensor[] values, str info) -> ()")
    _library.impl(_name, lambda values, info: None, "CompositeExplicitAutograd")
    torch.fx.node.has_side_effect(getattr(torch.ops.icenet_port, _name).default)


def export(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Any,
    training: bool,
    open_loops: bool = True,
) -> tuple[Graph, Any, Any]:
    """Exports a module in one mode.

    Args:
        module: The module; it is unchanged afterwards.
        args, kwargs: Example arguments.
        dynamic: What `torch.export.export` takes as `dynamic_shapes`. "auto" tries every dimension, then the first of
            each tensor, then none.
        training: Whether to export the training mode.
        open_loops: Whether the sizes over which loops run stay open.

    Returns:
        The record, the `ExportedProgram`, and the dynamic shapes that it has.

    Raises:
        PortError: The graph breaks; the message names the line.
    """
    with same_attributes(module):
        module.train(training)
        steps = Steps() if open_loops else None
        program, shapes, found = _program(module, args, kwargs, dynamic, repeated := Repeated(), steps)
        if repeated.varied():
            with contextlib.suppress(PortError):  # what the first export has is enough
                program, shapes, found = _program(module, args, kwargs, shapes, Repeated(repeated.varied()), steps)
    attentions.simplify_attentions(program)
    sizes.drop_indices(program)
    graph = Reader(module, program, args, kwargs, training).read()
    graph.functions, graph.constants, graph.loops = found
    return graph, program, shapes


@contextlib.contextmanager
def same_attributes(module: nn.Module) -> Iterator[None]:
    """Restores the attributes of all modules when the context is left: modes, and what a `forward` stores.

    An export calls `forward` with tensors that have no values; a proof calls it with sizes that it may store.
    """
    before = [(inner, dict(vars(inner)), _containers(inner)) for inner in module.modules()]
    try:
        yield
    finally:
        for inner, attributes, containers in before:
            vars(inner).clear()
            vars(inner).update(attributes)
            for container, content in containers:
                container.clear()
                container.update(content) if isinstance(container, dict) else container.extend(content)


_OF_TORCH = frozenset(vars(nn.Module())) - {"_buffers"}


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Returns the lists and dicts that are attributes of a module, and its hooks, with a copy of each."""
    own = [(name, value) for name, value in vars(module).items() if name not in _OF_TORCH or "_hooks" in name]
    return [(value, value.copy()) for _, value in own if type(value) in (list, dict, OrderedDict)]


BUDGET = 30.0
"""Seconds of processor time that an export with every dimension open may take; some models reason about sizes."""


Found: TypeAlias = tuple[list[str], dict[str, int], list[OpenLoop]]
"""What `Graph` has as functions, constants and loops."""


class _TooSlow(Exception):
    """The export with every dimension open takes too long."""


def _program(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Any,
    repeated: Repeated,
    steps: Steps | None,
) -> tuple[Any, Any, Found]:
    tries: list[tuple[Any, float | None]] = [(dynamic, None)]
    if dynamic == "auto":
        tries = [
            (_auto(module, args, kwargs, "all"), BUDGET),
            (_auto(module, args, kwargs, "batch"), None),
            (None, None),
        ]
    last: Exception | None = None
    found: tuple[Any, Any, Found] | None = None

    def with_constants() -> Iterator[tuple[Any, float | None, dict[str, torch.Tensor]]]:
        yield from ((*item, {}) for item in tries)
        with same_attributes(module):
            known = constants.integers(module, args, kwargs)
        if known:
            yield from ((*item, known) for item in tries)

    for shapes, budget, known in with_constants():
        deadline = None if budget is None else time.process_time() + budget
        try:
            with (
                traceable.traceable() as functions,
                _marked(module, repeated, deadline, known),
                warnings.catch_warnings(),
                _quiet(),
                recurrent.whole_layers(),
                losses.whole_losses(),
                whole.whole_functions(),
                sizes.open_sizes(),
                sizes.open_names(module),
                vectorized.vectorized(),
                steps.open(module) if steps is not None else contextlib.nullcontext(),
            ):
                warnings.simplefilter("ignore")
                program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
            loops = steps.loops() if steps is not None else []
            result = program, shapes, (functions, {path: int(value) for path, value in known.items()}, loops)
            if not _reads_numbers(program):
                return result
            found = found or result
        except Exception as error:  # whatever a user's forward raises
            if steps is not None and steps.found:
                return _program(module, args, kwargs, dynamic, repeated, None)
            if not isinstance(error, _TooSlow):
                last = error  # of the fewest open sizes: its cause is no size
            if isinstance(error, PortError):
                break  # other sizes change nothing
    if found is not None:
        return found
    assert last is not None
    raise broken(last) from None


def _reads_numbers(program: Any) -> bool:
    """Returns whether a size comes from a value: of the inputs, or of `torch.tensor(size)`, if the size is open."""
    return any(node.target in NUMBERS for node in program.graph.nodes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's logs and the graphs that it prints on an error from the streams while the context is open."""
    import io
    import logging

    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _auto(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], which: str) -> Any:
    """Returns dynamic shapes that leave the choice to torch: of every dimension, or of the first ones."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            return None
        return dict.fromkeys(range(leaf.ndim if which == "all" else 1), torch.export.Dim.AUTO)

    return pytree.tree_map(of, dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments))


# ---- the calls of modules ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _marked(
    module: nn.Module, repeated: Repeated, deadline: float | None, known: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Surrounds each call of a module with `enter` and `exit` while the context is open.

    Buffers whose values are known are constants in its calls.
    """
    handles = []
    attributes = constants.owners(module, known)
    for path, inner in module.named_modules():
        signature = inspect.signature(inner.forward)

        def before(called: nn.Module, args: Any, kwargs: Any, path: str = path, signature: Any = signature) -> Any:
            if vectorized.is_vectorizing():
                return None  # its arguments are parts of a batch
            if deadline is not None and time.process_time() > deadline:
                raise _TooSlow
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return None  # the call itself raises it
            apart = repeated.separated(called, bound) if path else None
            given = dict(bound.arguments)
            tensors: list[torch.Tensor] = []
            info = json.dumps({"path": path, "values": _describe(given, tensors)})
            torch.ops.icenet_port.enter(tensors, info)
            for own, name, value in attributes if path == "" else ():
                own[name] = torch.tensor(value.item(), dtype=value.dtype)
            return apart

        def after(called: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path) -> Any:
            if vectorized.is_vectorizing():
                return result
            tensors: list[torch.Tensor] = []
            info = json.dumps({"path": path, "values": _describe(result, tensors)})
            torch.ops.icenet_port.exit(tensors, info)
            for own, name, _ in attributes if path == "" else ():
                own.pop(name, None)
            return without_data_classes(result) if path == "" else result

        # what a hook of the module computes, such as the weight of weight_norm, is in its call
        handles.append(inner.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(inner.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _describe(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Returns a JSON description of a value, whose tensors are appended to a list."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_describe(item, tensors) for item in value]
    if isinstance(value, Mapping):
        return {"dict": {str(key): _describe(item, tensors) for key, item in value.items()}}
    if _is_data_class(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"dict": {name: _describe(item, tensors) for name, item in fields.items()}}
    return {"other": type(value).__name__}


def _is_data_class(value: Any) -> bool:
    """Returns whether a value is an instance of a data class that `torch.export` does not know."""
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping))


def without_data_classes(value: Any) -> Any:
    """Returns an output with dicts in the place of instances of data classes; a field that is None is left out."""
    if _is_data_class(value) and type(value) not in pytree.SUPPORTED_NODES:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: without_data_classes(item) for name, item in fields.items() if item is not None}
    if type(value) in (list, tuple):
        return type(value)(map(without_data_classes, value))
    if type(value) is dict:
        return {key: without_data_classes(item) for key, item in value.items()}
    return value


def arrays(module: nn.Module, program: Any) -> dict[str, torch.Tensor]:
    """Returns parameters, buffers and constants by path."""
    found = {path: value.detach() for path, value in module.named_parameters(remove_duplicate=False)}
    found.update({path: value.detach() for path, value in module.named_buffers(remove_duplicate=False)})
    for path, value in program.constants.items():
        if isinstance(value, torch.Tensor) and path not in found:  # of a buffer, PyTorch 2.11 may keep its shape only
            found[path] = value.detach()
    return found
