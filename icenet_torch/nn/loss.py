"""Loss and accuracy, PyTorch."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from icenet.core.nn.loss import rows_of_a_chunk
from icenet_torch.nn import exact
from icenet_torch.nn.arrays import Array, cast_weight, is_half, triton_kernels
from icenet_torch.nn.linear import linear


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Returns the mean cross-entropy in nats, fp32 (fp64 for fp64 logits), and the number of labels that count.

    Args:
        logits: `[..., V]`.
        labels: int `[...]`; negative labels are ignored.
    """
    counted = (labels >= 0).flatten()
    logits = (logits.float() if is_half(logits) else logits).flatten(0, -2)
    count = counted.sum()
    if logits.is_cuda:  # CUDA sums pairwise, which is accurate in one pass; fewer kernels make small steps faster
        targets = torch.where(counted, labels.flatten(), -100).long()
        return F.cross_entropy(logits, targets, reduction="sum") / count.clamp(min=1), count
    losses = F.cross_entropy(logits, torch.where(counted, labels.flatten(), 0).long(), reduction="none")
    return exact.weighted_mean(losses, counted.to(losses.dtype) / count.clamp(min=1)), count


def linear_cross_entropy(
    x: Array, weight: Array, bias: Array | None, labels: Array, softcap: float | None = None
) -> Array:
    """Returns `cross_entropy` of the logits of a linear layer, which are never in memory together.

    The gradients of a chunk of rows are computed as soon as its logits are there, in the forward pass (Hsu et al.,
    "Liger Kernel", 2024), so nothing is computed twice. 16384 rows of 50000 logits in bf16 would need 10 GB.

    Args:
        x: Input of the layer `[..., D]`.
        weight: Its weight `[V, D]`.
        bias: Its bias `[V]`.
        labels: int `[...]`; negative labels are ignored.
        softcap: Limit c of the logits s, which become c * tanh(s / c); None: no limit.
    """
    if x.dtype == torch.float64:  # the reference of all comparisons has PyTorch's own gradients
        logits = linear(x, weight, bias)
        return cross_entropy(logits if softcap is None else softcap * torch.tanh(logits / softcap), labels)[0]
    needs_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    inputs = x.flatten(0, -2), weight, bias, labels.flatten(), softcap, needs_gradients
    loss: Array
    if torch.compiler.is_compiling():
        loss = torch.ops.icenet.linear_cross_entropy(*inputs)[0]
    else:
        loss = _LinearCrossEntropy.apply(*inputs)
    return loss


def count_correct(logits: Array, labels: Array) -> Array:
    """Returns the number of rows of logits `[B, V]` with the maximum at their label, labels `[B]`."""
    return (logits.argmax(dim=-1) == labels).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """`_loss_and_gradients` with its gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Array:
        output = _loss_and_gradients(*inputs)
        _keep(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        return _scale(ctx, *cotangents)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.has_bias = inputs[2] is not None
    ctx.save_for_backward(*output[1:])


def _scale(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
    dx, d_weight, d_bias = (gradient * cotangents[0] for gradient in ctx.saved_tensors)
    return dx, d_weight, d_bias if ctx.has_bias else None, None, None, None


@functools.cache
def register_for_compiler() -> None:
    """Makes `_LinearCrossEntropy` an operation that `torch.compile` calls as it is. It takes a second."""
    operation = torch.library.custom_op("icenet::linear_cross_entropy", _loss_and_gradients, mutates_args=())
    operation.register_fake(
        lambda x, weight, bias, labels, softcap, needs_gradients: _new_outputs(x, weight, bias, needs_gradients)
    )
    operation.register_autograd(_scale, setup_context=_keep)


def _loss_and_gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    softcap: float | None,
    needs_gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the mean loss and its gradients for x `[N, D]`, the weight and the bias; these are empty if not needed.

    The gradients of the parameters are added up in the parameters' dtype.
    """
    _, dx, d_weight, d_bias = _new_outputs(x, weight, bias, needs_gradients)
    w, b = cast_weight(weight, x), None if bias is None else cast_weight(bias, x)
    count = (labels >= 0).sum().clamp(min=1)
    losses = torch.empty(labels.shape, dtype=torch.float32, device=x.device)
    step = rows_of_a_chunk(len(x), len(weight))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        part = x[rows].to(w.dtype)
        logits = F.linear(part, w, b)
        if is_half(x) and not is_half(w):
            logits = logits.to(x.dtype).to(w.dtype)  # rounded as the logits of the layer
        losses[rows], gradient = _chunk(logits, labels[rows], count, softcap, needs_gradients)
        if gradient is None:
            continue
        dx[rows] = gradient @ w
        _add_product(d_weight, gradient.T, part, is_first=start == 0)
        if bias is not None:
            d_bias += gradient.sum(dim=0, dtype=d_bias.dtype)
    return exact.weighted_mean(losses, (labels >= 0).to(losses.dtype) / count), dx, d_weight, d_bias


def _new_outputs(x: Array, weight: Array, bias: Array | None, needs_gradients: bool) -> tuple[Array, ...]:
    if not needs_gradients:
        return x.new_empty((), dtype=torch.float32), x.new_empty(0), x.new_empty(0), x.new_empty(0)
    d_bias = torch.zeros_like(weight[:, 0] if bias is None else bias)
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight), d_bias


def _chunk(
    logits: Array, labels: Array, count: Array, softcap: float | None, needs_gradient: bool
) -> tuple[Array, Array | None]:
    """Returns the losses of rows of logits, and the gradient of the logits, in place if possible."""
    if kernels := triton_kernels(logits.device):
        return kernels.cross_entropy(logits, labels, count, softcap, needs_gradient)  # type: ignore[no-any-return]
    counted, chosen = labels >= 0, labels.clamp(min=0).long()[:, None]
    values = logits.float()
    bounded = None
    if softcap is not None:
        bounded = torch.tanh(values / softcap)
        values = bounded * softcap
    log_probabilities = torch.log_softmax(values, dim=-1)
    losses = torch.where(counted, -log_probabilities.gather(1, chosen).squeeze(1), 0)
    if not needs_gradient:
        return losses, None
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=gradient.dtype))
    gradient *= (counted / count).to(gradient.dtype)[:, None]
    if bounded is not None:
        gradient *= 1 - bounded * bounded
    return losses, gradient.to(logits.dtype)


def _add_product(total: Array, a: Array, b: Array, is_first: bool) -> None:
    """Adds the product of two matrices to `total`, or sets it."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if is_first else 1, out=total)
    elif total.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # PyTorch 2.8: half precision, added in fp32
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=0 if is_first else 1, out=total)
    elif is_first:
        total.copy_(a @ b)
    else:
        total += a @ b
