"""Makes modules of the class of a module with other arguments."""

from __future__ import annotations

import contextlib
import inspect
import io
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from icenet_torch.porting import inputs
from icenet_torch.porting.export import same_attributes
from icenet_torch.porting.run import to_torch


def arguments_of(module: nn.Module, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns arguments with which the class of a module makes one like it; None if one of them is not known.

    Args:
        module: The module.
        known: The values of some arguments. Others are the module's attributes of these names, or the defaults.
    """
    found = {}
    for item in list(inspect.signature(type(module).__init__).parameters.values())[1:]:
        if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
            continue
        kept = getattr(module, item.name, item.default)
        if item.name in known:
            found[item.name] = known[item.name]
        elif not isinstance(kept, (nn.Module, torch.Tensor)) and not inspect.ismethod(kept):
            found[item.name] = kept
        else:
            found[item.name] = item.default
        if found[item.name] is item.empty:
            return None
    return found


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Restores the state of the random numbers of numpy and of Python."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def made(module: nn.Module, arguments: Mapping[str, Any]) -> nn.Module | None:
    """Returns a new module of the class of another one; None if its constructor raises an error or ends the process.

    What a constructor prints is not shown, and the random numbers of torch, numpy and Python stay as they are.
    Weights that are constant, such as those of a layer that begins with zeros, get random numbers: they would hide
    what is before the layer.
    """
    with (
        torch.random.fork_rng(devices=[]),
        _same_random_numbers(),
        torch.no_grad(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            found = type(module)(**arguments)
            for value in found.parameters():
                if value.is_floating_point() and value.numel() > 1 and bool((value == value.flatten()[0]).all()):
                    value.add_(0.2 * torch.randn_like(value))
        except (Exception, SystemExit):  # whatever the code of a user raises
            return None
    return found.eval()


def is_like(module: nn.Module, other: nn.Module) -> bool:
    """Returns whether two modules have the same weights and buffers, and gives the second those of the first."""
    ours, theirs = ({name: value.shape for name, value in item.state_dict().items()} for item in (module, other))
    if ours == theirs:
        other.load_state_dict(module.state_dict())
    return ours == theirs


def first_calls(module: nn.Module, args: Any, kwargs: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the arguments, as numpy arrays, of the first call of each module within a module, by path.

    Args:
        module: The module, in evaluation mode for the call. It stays unchanged.
        args, kwargs: The arguments of its call: numpy arrays and constants.
    """
    found: dict[str, tuple[Any, Any]] = {}

    def hook(path: str) -> Any:
        def keep(inner: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in found:
                found[path] = inputs.to_numpy((args, kwargs))

        return keep

    inner = [(path, item) for path, item in module.named_modules() if path]
    modes = [(item, item.training) for item in module.modules()]
    handles = [item.register_forward_pre_hook(hook(path), with_kwargs=True) for path, item in inner]
    try:
        with same_attributes(module), torch.no_grad(), inputs.unchanged([*module.parameters(), *module.buffers()]):
            module.eval()(*to_torch(args), **to_torch(kwargs))
    finally:
        for handle in handles:
            handle.remove()
        for item, training in modes:
            item.training = training
    return found


def dropout_rates(module: nn.Module) -> set[float]:
    """Returns the rates of the dropout of the layers of a module."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    found = {item.p for item in module.modules() if isinstance(item, kinds)}
    return found | {
        item.dropout for item in module.modules() if isinstance(item, (nn.MultiheadAttention, nn.RNNBase))
    }
