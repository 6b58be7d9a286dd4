"""The example inputs of a port and their checks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from icenet.core.errors import UsageError
from icenet.core.messages import first_line
from icenet_torch.porting.failures import hint, where


def check_module(module: Any) -> None:
    """Raises UsageError if an object is not a torch module that can be exported."""
    if not isinstance(module, nn.Module):
        raise UsageError(f"icenet.port takes a torch.nn.Module, not a {type(module).__name__}")
    if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise UsageError("icenet.port takes the torch.nn.Module from which a ScriptModule was made")
    for path, value in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(value):
            raise UsageError(f"{path}: a lazy layer has no weights before its first call; call the module once")
        if value.is_meta:
            raise UsageError(f"{path}: is on the device meta, without values; load the weights first")
        if value.device.type != "cpu":
            raise UsageError(f"{path}: is on the device {value.device}; move the module to the CPU with module.cpu()")


def check_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises UsageError if the example inputs do not fit the parameters of `forward`."""
    signature = inspect.signature(module.forward)
    takes_all = any(item.kind is item.VAR_KEYWORD for item in signature.parameters.values())
    unknown = [name for name in kwargs if name not in signature.parameters and not takes_all]
    if unknown:
        names = ", ".join(signature.parameters)
        raise UsageError(f"forward{signature} has no argument {unknown[0]!r}; its arguments are {names}")
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"the example inputs do not fit forward{signature}: {error}") from None


@contextlib.contextmanager
def unchanged(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Restores the values of tensors when the context is left: a call of a module may update its buffers."""
    state = [(value, value.detach().clone()) for value in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, before in state:
                value.copy_(before)


def check_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises UsageError if a module does not accept the example inputs; it is unchanged afterwards."""
    modes = {path: inner.training for path, inner in module.named_modules()}
    module.eval()
    try:
        with torch.no_grad(), unchanged([*module.parameters(), *module.buffers()]):
            module(*args, **kwargs)
    except Exception as error:  # whatever the code of a user raises
        raise UsageError(
            f"the module raises an error on the example inputs: {where(error)}{first_line(error)}{hint(error)}"
        ) from None
    finally:
        for path, inner in module.named_modules():
            inner.training = modes[path]


def checked_inputs(tree: Any) -> Any:
    """Returns example arguments with contiguous tensors, also in the place of numpy arrays.

    A tensor that is given twice, as in `(ids, ids)`, is copied: an export takes both for one argument.

    Raises:
        UsageError: An argument is an array of another framework.
    """

    def of(leaf: Any) -> Any:
        if type(leaf).__module__.startswith(("mlx.", "jax", "tensorflow")):
            kind = f"{type(leaf).__module__.partition('.')[0]} {type(leaf).__name__}"
            raise UsageError(f"example inputs: a {kind}; give torch tensors or numpy arrays")
        return leaf

    seen: set[int] = set()

    def apart(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and id(leaf) in seen:
            return leaf.detach().clone()
        seen.add(id(leaf))
        return leaf

    return pytree.tree_map(apart, contiguous(tensors(pytree.tree_map(of, tree))))


def widened(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Returns example arguments with a batch of 2 in the place of 1, which an export takes for a fixed size."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if not leaves or any(leaf.shape[0] != 1 for leaf in leaves):
        return args, kwargs

    def wide(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf

    wide_args, wide_kwargs = pytree.tree_map(wide, (args, kwargs))
    return wide_args, wide_kwargs


def contiguous(tree: Any) -> Any:
    """Returns arguments with contiguous tensors: an export guards the strides of others."""
    return pytree.tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf, tree)


def tensors(tree: Any) -> Any:
    """Returns arguments with tensors in the place of arrays."""
    return pytree.tree_map(lambda leaf: torch.from_numpy(leaf) if type(leaf).__name__ == "ndarray" else leaf, tree)


def to_numpy(tree: Any) -> Any:
    """Returns arguments with numpy arrays in the place of tensors."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.detach().resolve_conj().resolve_neg().cpu()
        if leaf.dtype == torch.bfloat16:
            import ml_dtypes

            return leaf.float().numpy().astype(ml_dtypes.bfloat16)
        return leaf.numpy()

    return pytree.tree_map(of, tree)
