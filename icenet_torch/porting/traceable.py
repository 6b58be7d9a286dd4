"""Layers of torch whose Python code reads values of tensors, in a form that an export can follow."""

from __future__ import annotations

import contextlib
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Distribution
from torch.fx.proxy import TracerBase
from torch.nn.modules import adaptive, batchnorm, rnn, transformer

from icenet.core.errors import PortError

_TORCH = str(Path(torch.__file__).parent)


@contextlib.contextmanager
def traceable() -> Iterator[list[str]]:
    """Replaces them while the context is open. Yields the calls of functions that have a backward of their own."""
    functions: list[str] = []
    norm, apply = batchnorm._BatchNorm.forward, torch.autograd.Function.__dict__["apply"]
    log_softmax, gaussian = nn.AdaptiveLogSoftmaxWithLoss.forward, F.gaussian_nll_loss
    to, validates = nn.Module.to, Distribution._validate_args
    causal, pack = transformer._detect_is_causal_mask, rnn._VF.__dict__.get("_pack_padded_sequence")

    def recorded(kind: Any, *args: Any, **kwargs: Any) -> Any:
        if not kind.__module__.startswith("torch."):
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
                frame = frame.f_back
            functions.append(f"{frame.f_code.co_filename}:{frame.f_lineno}: {kind.__name__}.apply")
        return apply.__get__(None, kind)(*args, **kwargs)

    frames = getattr(TracerBase, "_filter_traceback_frames", None)  # torch 2.6 has none
    if frames is not None:
        TracerBase._filter_traceback_frames = _user_frames  # type: ignore[method-assign]
    batchnorm._BatchNorm.forward = lambda self, input: _batch_norm(self, input, norm)  # type: ignore[method-assign]
    nn.AdaptiveLogSoftmaxWithLoss.forward = _adaptive_log_softmax  # type: ignore[method-assign]
    nn.Module.to = lambda self, *args, **kwargs: _to(self, to, *args, **kwargs)  # type: ignore[method-assign]
    F.gaussian_nll_loss = _gaussian_nll_loss  # type: ignore[assignment]
    torch.autograd.Function.apply = classmethod(recorded)  # type: ignore[assignment, method-assign]
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    rnn._VF._pack_padded_sequence = _refuse_packed
    Distribution.set_default_validate_args(False)  # a check reads values; the proof runs the original with it
    try:
        yield functions
    finally:
        if frames is not None:
            TracerBase._filter_traceback_frames = frames  # type: ignore[method-assign]
        batchnorm._BatchNorm.forward = norm  # type: ignore[method-assign]
        nn.AdaptiveLogSoftmaxWithLoss.forward = log_softmax  # type: ignore[method-assign]
        nn.Module.to = to  # type: ignore[method-assign]
        Distribution.set_default_validate_args(validates)
        F.gaussian_nll_loss = gaussian
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        transformer._detect_is_causal_mask = causal
        if pack is None:
            del rnn._VF._pack_padded_sequence
        else:
            rnn._VF._pack_padded_sequence = pack


def _user_frames(_tracer: Any, summary: traceback.StackSummary) -> traceback.StackSummary:
    """Returns the calls of `forward` and of the user's functions; torch keeps the first only."""
    first = next((index for index, frame in enumerate(summary) if frame.name == "forward"), len(summary))
    return traceback.StackSummary.from_list(
        [frame for frame in summary[first:] if frame.name == "forward" or not frame.filename.startswith(_TORCH)]
    )


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


def _to(self: nn.Module, to: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """Moves a module, as `layer.to(x.dtype)` in a forward. An export cannot replace the weights by equal ones."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    arrays = [*self.parameters(), *self.buffers()]
    is_same = all(
        (device is None or value.device == device)
        and (dtype is None or value.dtype == dtype or not (value.is_floating_point() or value.is_complex()))
        for value in arrays
    )
    made: nn.Module = self if is_same else to(self, *args, **kwargs)
    return made


def _adaptive_log_softmax(self: nn.AdaptiveLogSoftmaxWithLoss, input_: torch.Tensor, target_: torch.Tensor) -> Any:
    """Computes every cluster for every row, and takes what the target is in; torch selects the rows of a cluster."""
    input, target = (input_, target_) if target_.ndim else (input_.unsqueeze(0), target_.unsqueeze(0))
    output, index = torch.zeros_like(input[:, 0]), target
    for number, (low, high) in enumerate(zip(self.cutoffs, self.cutoffs[1:], strict=False)):
        inside = (target >= low) & (target < high)
        log_probabilities = F.log_softmax(self.tail[number](input), dim=1)
        place = (target - low).clamp(0, high - low - 1)
        output = torch.where(inside, log_probabilities.gather(1, place.unsqueeze(1)).squeeze(1), output)
        index = torch.where(inside, self.shortlist_size + number, index)
    output = output + F.log_softmax(self.head(input), dim=1).gather(1, index.unsqueeze(1)).squeeze(1)
    loss = (-output).mean()
    return adaptive._ASMoutput(output if target_.ndim else output.squeeze(0), loss)


def _gaussian_nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    var: Any,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> torch.Tensor:
    """Computes the loss without torch's check that no variance is negative."""
    var = var * torch.ones_like(input) if isinstance(var, float) else var
    if var.shape == input.shape[:-1] and var.shape != input.shape:
        var = var.unsqueeze(-1)
    var = var + (var.clamp(min=eps) - var).detach()
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def _refuse_packed(*args: Any) -> Any:
    raise PortError("a packed sequence has no counterpart; pass the padded batch to the layer, and mask its result")
