"""Recurrent layers as whole operations during an export.

`torch.export` takes `aten.lstm` apart or fixes its number of steps. These operations have the same arguments and keep
every dimension open.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules import rnn

_ARGUMENTS = (
    "Tensor input, Tensor[] hx, Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first"
)
_library = torch.library.Library("icenet_rnn", "DEF")
_library.define(f"lstm({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
for _name in ("gru", "rnn_tanh", "rnn_relu"):
    _library.define(f"{_name}({_ARGUMENTS.replace('Tensor[] hx', 'Tensor hx')}) -> (Tensor, Tensor)")


def _shapes(kind: str) -> Callable[..., Any]:
    def shapes(
        input: Any,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        states = list(hx) if kind == "lstm" else [hx]
        size = states[0].shape[-1] * (2 if bidirectional else 1)
        output = input.new_empty((*input.shape[:-1], size))
        return (output, *(torch.empty_like(state) for state in states))

    return shapes


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _library.impl(_name, getattr(torch, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"icenet_rnn::{_name}", _shapes(_name), lib=_library)


@contextlib.contextmanager
def whole_layers() -> Iterator[None]:
    """Records the layers of `torch.nn` as whole operations while the context is open."""
    functions = rnn._VF
    names = ("lstm", "gru", "rnn_tanh", "rnn_relu")
    before = {name: vars(functions).get(name) for name in names}

    def whole(name: str, original: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if (
                isinstance(args[1], torch.Tensor)
                and isinstance(args[2], torch.Tensor | tuple | list)
                and (isinstance(args[3], (list, tuple)))
            ):
                return original(*args)  # a packed sequence: (data, batch_sizes, hx, params, ...)
            return getattr(torch.ops.icenet_rnn, name)(*args)

        return call

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its kernel hides the layers
    for name in names:
        setattr(functions, name, whole(name, getattr(functions, name)))
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for name in names:
            if before[name] is None:
                delattr(functions, name)
            else:
                setattr(functions, name, before[name])
