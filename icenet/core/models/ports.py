"""The weights of a port and of its original, which the plan of the port pairs."""

from __future__ import annotations

from typing import Any

from icenet.core import backends
from icenet.core.errors import WeightsError
from icenet.core.porting.build import Plan

_PLAN = "icenet_plan"


def mark(mlx_module: Any, plan: Plan) -> None:
    """Notes the plan of a port at its class."""
    setattr(type(mlx_module), _PLAN, plan)


def plan_of(mlx_module: Any, torch_module: Any) -> Plan | None:
    """Returns the plan of a port, None if the modules are not a port and a module with its original's arrays."""
    plan: Plan | None = getattr(type(mlx_module), _PLAN, None)
    if plan is None:
        return None
    tensors = backends.module("torch", "porting.weights").tensors(torch_module)
    return plan if all(path in tensors for path in _paths(plan)) else None


def to_torch(plan: Plan, mlx_module: Any, torch_module: Any) -> None:
    """Copies the arrays of a port to its original, with its buffers that are not persistent.

    Raises:
        WeightsError: A shape differs; nothing is copied.
    """
    ours, theirs = backends.module("mlx", "porting.weights"), backends.module("torch", "porting.weights")
    found, tensors = ours.arrays(mlx_module), theirs.arrays(torch_module)
    wanted = plan.wanted()
    values = {path: plan.to_torch(path, found[wanted[path]]) for path in _paths(plan)}
    _check("to_torch", {path: (tuple(tensors[path].shape), value.shape) for path, value in values.items()})
    theirs.assign(torch_module, values)


def from_torch(plan: Plan, torch_module: Any, mlx_module: Any) -> None:
    """Copies the arrays of the original to its port.

    Raises:
        WeightsError: A shape differs; nothing is copied.
    """
    ours, theirs = backends.module("mlx", "porting.weights"), backends.module("torch", "porting.weights")
    found, tensors = ours.arrays(mlx_module), theirs.arrays(torch_module)
    wanted = plan.wanted()
    values = plan.native(tensors, partial=True)
    shapes = {path: (values[wanted[path]].shape, found[wanted[path]].shape) for path in _paths(plan)}
    _check("from_torch", shapes)
    ours.assign(mlx_module, values)


def _paths(plan: Plan) -> list[str]:
    """Returns the paths of the original's parameters and buffers that the port has; constants belong to the graph."""
    constants = {
        array.path
        for graph in (plan.graph, plan.train)
        if graph is not None
        for array in graph.arrays.values()
        if array.kind == "constant"
    }
    return [path for path in plan.wanted() if path not in constants]


def _check(function: str, shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    problems = [
        f"{path} has the shape {list(torch_shape)}, in the port {list(own_shape)}"
        for path, (torch_shape, own_shape) in shapes.items()
        if tuple(torch_shape) != tuple(own_shape)
    ]
    if problems:
        raise WeightsError(f"{function}: nothing is copied; {'; '.join(problems)}")
