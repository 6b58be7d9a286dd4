"""Runs a `torch.nn.Module` for the comparison with its port."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from icenet_torch.porting import export


def to_torch(value: Any) -> Any:
    """Returns arguments with tensors in the place of numpy arrays."""
    if isinstance(value, np.ndarray):
        if value.dtype.name == "bfloat16":
            return torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16)
        return torch.from_numpy(np.array(value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_torch(item) for item in value)
    if isinstance(value, dict):
        return {key: to_torch(item) for key, item in value.items()}
    return value


def to_numpy(value: torch.Tensor) -> np.ndarray:
    """Returns a tensor as a numpy array."""
    value = value.detach().resolve_conj().resolve_neg().cpu()
    if value.dtype == torch.bfloat16:
        value = value.float()
    return np.asarray(value.numpy())


def outputs(result: Any) -> list[torch.Tensor]:
    """Returns the tensors of an output in order."""
    return [item for item in pytree.tree_leaves(result) if isinstance(item, torch.Tensor)]


class Reference:
    """A copy of a module in fp32 or float64, which can be run without a change of the module.

    Args:
        module: The module.
        double: Whether to compute in float64.
    """

    def __init__(self, module: nn.Module, double: bool) -> None:
        self.module = copy.deepcopy(module)
        self.double = double
        if double:
            self.module.double()

    def run(
        self, args: Any, kwargs: Any, training: bool, cotangents: list[np.ndarray] | None = None
    ) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Returns the outputs, and the gradients of their sum times cotangents."""
        module = self.module
        state = {key: value.clone() for key, value in module.state_dict().items()}
        module.train(training)
        module.zero_grad()
        default = torch.get_default_dtype()
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it sets the results of padding to zero
        if self.double:
            torch.set_default_dtype(torch.float64)
        try:
            args, kwargs = pytree.tree_map(self.given, (args, kwargs))
            if cotangents is None:
                with torch.no_grad():
                    found = outputs(module(*args, **kwargs))
                return [to_numpy(item) for item in found], {}
            found = outputs(module(*args, **kwargs))
            floats = [item for item in found if item.is_floating_point()]
            loss = sum(
                (item * torch.from_numpy(factor).to(item.dtype)).sum()
                for item, factor in zip(floats, cotangents, strict=False)
            )
            if isinstance(loss, torch.Tensor) and loss.requires_grad:
                loss.backward()
            gradients = {
                path: to_numpy(value.grad) for path, value in module.named_parameters() if value.grad is not None
            }
            return [to_numpy(item) for item in found], gradients
        finally:
            torch.set_default_dtype(default)
            torch.backends.mha.set_fastpath_enabled(fast)
            module.load_state_dict(state)

    def given(self, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = to_torch(leaf)
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.detach().clone()
            return leaf.double() if self.double and leaf.is_floating_point() else leaf
        return leaf


def weights(module: nn.Module, program: Any) -> dict[str, np.ndarray]:
    """Returns parameters, buffers and constants as numpy arrays by path."""
    import ml_dtypes

    found = {}
    for path, value in export.arrays(module, program).items():
        array = to_numpy(value)
        found[path] = array.astype(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else array
    return found


def intermediate(program: Any, args: Any, kwargs: Any) -> dict[str, np.ndarray]:
    """Returns the value of each operation of an exported program on some arguments, by name."""
    values: dict[str, np.ndarray] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: Any) -> Any:
            result = super().run_node(node)
            if isinstance(result, torch.Tensor):
                values[node.name] = to_numpy(result).copy()
            return result

    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
    )
    flat = program._graph_module_flat_inputs(args, kwargs)
    flat = [item.clone() if isinstance(item, torch.Tensor) else item for item in flat]
    with torch.no_grad():
        Recorder(program.graph_module).run(*flat)
    return values
