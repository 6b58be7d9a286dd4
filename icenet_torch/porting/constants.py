"""Buffers that hold one integer, such as the stride of a convolution, whose values an export may know.

An export knows no values of buffers, so that `F.pad(x, (self.padding, 0))` has a size that depends on a value. Where
no call of the module changes them, they are `torch.tensor(value)` in the export, whose value it knows.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from icenet_torch.porting.inputs import unchanged


def integers(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the buffers of one integer or boolean that calls in evaluation and training mode leave as they are.

    The modes of the module and what its forward stores are the caller's to restore.
    """
    found: dict[str, torch.Tensor] = {
        path: value
        for path, value in module.named_buffers(remove_duplicate=False)
        if value.ndim == 0 and not value.is_floating_point() and not value.is_complex()
    }
    before = {path: (value._version, value.item()) for path, value in found.items()}
    for training in (False, True) if found else ():
        module.train(training)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), unchanged([*module.parameters(), *module.buffers()]):
            with contextlib.suppress(Exception):  # a mode that the module does not have
                module(*args, **kwargs)
            now: dict[str, Any] = dict(module.named_buffers(remove_duplicate=False))
            found = {
                path: value
                for path, value in found.items()
                if id(now.get(path)) == id(value) and (value._version, value.item()) == before[path]
            }
        before = {path: (value._version, value.item()) for path, value in found.items()}
    return found


def owners(module: nn.Module, found: dict[str, torch.Tensor]) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """Returns the attributes of the module that has each buffer, the buffer's name there, and its value."""
    parts = ((path.rpartition("."), value) for path, value in found.items())
    return [(vars(module.get_submodule(owner)), name, value) for (owner, _, name), value in parts]
