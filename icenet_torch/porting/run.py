"""Runs a `torch.nn.Module` for the comparison with its port."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
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
        state = [(value, value.detach().clone()) for value in (*module.parameters(), *module.buffers())]
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
            with torch.no_grad():
                for value, before in state:
                    value.copy_(before)

    def perturbed(self, sample: int) -> Reference:
        """Returns a copy in float64 whose parameters are moved by one ulp of fp32."""
        moved = Reference(self.module, True)
        generator = torch.Generator().manual_seed(sample)
        with torch.no_grad():
            for value in moved.module.parameters():
                if value.is_floating_point():
                    signs = torch.randint(-1, 2, value.shape, generator=generator).to(value.dtype)
                    value.mul_(1 + signs * 2.0**-24)
        return moved

    def given(self, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = to_torch(leaf)
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.detach().clone()
            if leaf.is_floating_point():
                return leaf.double() if self.double else leaf.float() if leaf.dtype == torch.float64 else leaf
            return leaf
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

    args, kwargs = to_torch((args, kwargs))
    flat = program._graph_module_flat_inputs(args, kwargs)
    flat = [item.clone() if isinstance(item, torch.Tensor) else item for item in flat]
    with torch.no_grad():
        Recorder(program.graph_module).run(*flat)
    return values


@contextlib.contextmanager
def without_dropout() -> Iterator[None]:
    """Switches dropout off while the context is open: other random numbers are drawn on each side."""
    functional = torch.nn.functional
    names = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    before = {name: getattr(functional, name) for name in names}
    attention, plain = functional.scaled_dot_product_attention, torch.dropout

    def same(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return input

    def whole(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any
    ) -> Any:
        return attention(query, key, value, attn_mask, 0.0, *args, **kwargs)

    for name in names:
        setattr(functional, name, same)
    functional.scaled_dot_product_attention, torch.dropout = whole, same
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(functional, name, function)
        functional.scaled_dot_product_attention, torch.dropout = attention, plain


def perturbed(tree: Any, sample: int) -> Any:
    """Returns arguments whose floating-point arrays are moved by one ulp of fp32."""
    rng = np.random.default_rng(100 + sample)

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f":
            return leaf.astype(np.float64) * (1 + rng.choice([-1.0, 0.0, 1.0], leaf.shape) * 2.0**-24)
        return leaf

    return pytree.tree_map(moved, tree)


def accepts(program: Any, args: Any, kwargs: Any) -> bool:
    """Returns whether the guards of an exported program allow the sizes of some arguments."""
    try:
        with torch.no_grad():
            program.module()(*to_torch(args), **to_torch(kwargs))
    except Exception:
        return False
    return True
