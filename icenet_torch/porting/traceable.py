"""Layers of torch whose Python code reads values of tensors, in a form that an export can follow."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import batchnorm, rnn, transformer

from icenet.core.errors import PortError

_TORCH = str(Path(torch.__file__).parent)


@contextlib.contextmanager
def traceable() -> Iterator[list[str]]:
    """Replaces them while the context is open. Yields the calls of functions that have a backward of their own."""
    functions: list[str] = []
    norm, apply = batchnorm._BatchNorm.forward, torch.autograd.Function.__dict__["apply"]
    causal, pack = transformer._detect_is_causal_mask, rnn._VF.__dict__.get("_pack_padded_sequence")

    def recorded(kind: Any, *args: Any, **kwargs: Any) -> Any:
        if not kind.__module__.startswith("torch."):
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
                frame = frame.f_back
            functions.append(f"{frame.f_code.co_filename}:{frame.f_lineno}: {kind.__name__}.apply")
        return apply.__get__(None, kind)(*args, **kwargs)

    batchnorm._BatchNorm.forward = lambda self, input: _batch_norm(self, input, norm)  # type: ignore[method-assign]
    torch.autograd.Function.apply = classmethod(recorded)  # type: ignore[assignment, method-assign]
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    rnn._VF._pack_padded_sequence = _refuse_packed
    try:
        yield functions
    finally:
        batchnorm._BatchNorm.forward = norm  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        transformer._detect_is_causal_mask = causal
        if pack is None:
            del rnn._VF._pack_padded_sequence
        else:
            rnn._VF._pack_padded_sequence = pack


def _batch_norm(self: nn.modules.batchnorm._BatchNorm, input: torch.Tensor, forward: Any) -> Any:
    """Computes a batch norm; without a momentum its factor is 1 / the number of batches, which torch reads."""
    if self.momentum is not None or not self.training or self.num_batches_tracked is None:
        return forward(self, input)
    self._check_input_dim(input)
    assert self.running_mean is not None and self.running_var is not None
    with torch.no_grad():
        self.num_batches_tracked.add_(1)
        factor = 1.0 / self.num_batches_tracked.to(self.running_mean.dtype)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        var, mean = torch.var_mean(input.detach(), axes, correction=1)
        self.running_mean.copy_(self.running_mean + factor * (mean - self.running_mean))
        self.running_var.copy_(self.running_var + factor * (var - self.running_var))
    return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)


def _refuse_packed(*args: Any) -> Any:
    raise PortError("a packed sequence has no counterpart; pass the padded batch to the layer, and mask its result")
