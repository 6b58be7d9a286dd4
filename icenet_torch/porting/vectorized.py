"""`torch.vmap` as the operations on whole batches that it computes.

An export records the calls that begin and end a `vmap`, and between them operations on arrays without the batch. So
the function is traced below them first, and the export sees what was traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._functorch import apis
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.utils import _pytree as pytree


def is_vectorizing() -> bool:
    """Returns whether the code runs within a `vmap`, on arrays without the batch."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _enclosed(function: Any, seen: tuple[Any, ...] = ()) -> list[torch.Tensor]:
    """Returns the tensors that a function has from its surroundings; their sizes may be open."""
    values = [getattr(function, name, None) for name in ("args", "keywords", "func")]  # of functools.partial
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # it has no value yet
            values.append(cell.cell_contents)
    found: dict[int, torch.Tensor] = {}
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            found[id(leaf)] = leaf
        elif callable(leaf) and all(leaf is not other for other in seen):
            found.update((id(tensor), tensor) for tensor in _enclosed(leaf, (*seen, function)))
    return list(found.values())


@contextlib.contextmanager
def vectorized() -> Iterator[None]:
    """Replaces `vmap` while the context is open."""
    vmap = apis.vmap_impl

    def call(
        function: Any, in_dims: Any, out_dims: Any, randomness: str, chunk_size: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if is_vectorizing():  # the outer one is traced
            return vmap(function, in_dims, out_dims, randomness, chunk_size, *args, **kwargs)
        leaves, given = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        enclosed = [value for value in _enclosed(function) if all(value is not tensor for tensor in tensors)]
        returned: list[Any] = []

        def flat(*values: torch.Tensor) -> list[Any]:
            rest = iter(values)
            filled = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            own_args, own_kwargs = pytree.tree_unflatten(filled, given)
            with torch._C.DisableTorchFunction():  # which would record the calls that begin and end it
                result = vmap(function, in_dims, out_dims, randomness, chunk_size, *own_args, **own_kwargs)
            results, structure = pytree.tree_flatten(result)
            returned[:] = [structure]
            return results

        with disable_proxy_modes_tracing():
            traced = make_fx(flat)(*tensors, *enclosed)
        results = torch.fx.Interpreter(traced).run(*tensors, *enclosed)
        return pytree.tree_unflatten(results, returned[0])

    apis.vmap_impl = call
    try:
        yield
    finally:
        apis.vmap_impl = vmap
