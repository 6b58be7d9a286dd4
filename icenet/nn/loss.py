"""Loss and accuracy, MLX."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.core.nn.loss import rows_of_a_chunk
from icenet.nn import exact, training_kernels
from icenet.nn.arrays import Array, cast_weight, is_half


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Returns the mean cross-entropy in nats, fp32, and the number of labels that count.

    Args:
        logits: `[..., V]`.
        labels: int `[...]`; negative labels are ignored.
    """
    counted = labels >= 0
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.where(counted, labels, 0)[..., None], axis=-1).squeeze(-1)
    losses = exact.logsumexp(logits) - chosen
    count = counted.sum()
    return exact.weighted_mean(losses, counted / mx.maximum(count, 1)), count


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

    @mx.custom_function
    def loss_and_gradients(x: Array, weight: Array, *bias: Array) -> list[Array]:
        return _loss_and_gradients(x, weight, bias[0] if bias else None, labels.flatten(), softcap)

    @loss_and_gradients.vjp
    def scale(_: tuple[Array, ...], cotangents: list[Array], outputs: list[Array]) -> list[Array]:
        return [(gradient * cotangents[0]).astype(gradient.dtype) for gradient in outputs[1:]]

    rows = x.reshape(-1, x.shape[-1])
    outputs: Any = loss_and_gradients(rows, weight, *([] if bias is None else [bias]))
    return outputs[0]  # type: ignore[no-any-return]


def count_correct(logits: Array, labels: Array) -> Array:
    """Returns the number of rows of logits `[B, V]` with the maximum at their label, labels `[B]`."""
    return (logits.argmax(axis=-1) == labels).sum()


def _loss_and_gradients(
    x: Array, weight: Array, bias: Array | None, labels: Array, softcap: float | None
) -> list[Array]:
    """Returns the mean loss and its gradients for x `[N, D]`, the weight and the bias, if there is one.

    The gradients of the parameters are added up in the parameters' dtype. Those that nothing uses are not computed.
    """
    w = cast_weight(weight, x)
    counted = labels >= 0
    count = mx.maximum(counted.sum(), 1)
    losses, dx = [], []
    d_weight: Array | None = None
    d_bias: Array | None = None
    step = rows_of_a_chunk(x.shape[0], weight.shape[0])
    for start in range(0, x.shape[0], step):
        part = x[start : start + step].astype(w.dtype)
        logits = part @ w.T
        if bias is not None:
            logits = logits + cast_weight(bias, x)
        if is_half(x) and not is_half(w):
            logits = logits.astype(x.dtype).astype(w.dtype)  # rounded as the logits of the layer
        loss, gradient = _chunk(logits, labels[start : start + step], count, softcap)
        losses.append(loss)
        dx.append((gradient @ w).astype(x.dtype))
        d_weight = _add_product(d_weight, gradient.T, part, weight.dtype)
        if bias is not None:
            sums = exact.channel_sums(gradient.astype(bias.dtype))
            d_bias = sums if d_bias is None else d_bias + sums
    mean = exact.weighted_mean(mx.concatenate(losses), counted / count)
    assert d_weight is not None
    return [mean, mx.concatenate(dx), d_weight, *([] if d_bias is None else [d_bias])]


def _chunk(logits: Array, labels: Array, count: Array, softcap: float | None) -> tuple[Array, Array]:
    """Returns the losses of rows of logits, and the gradient of the logits."""
    if training_kernels.has_kernels():
        return training_kernels.cross_entropy(logits, labels, count, softcap)
    counted, chosen = labels >= 0, mx.maximum(labels, 0)[:, None]
    values = logits.astype(mx.float32)
    bounded = None
    if softcap is not None:
        bounded = mx.tanh(values / softcap)
        values = bounded * softcap
    terms, total, largest = exact.softmax_terms(values)
    losses = mx.log(total) + largest - mx.take_along_axis(values, chosen, axis=-1)
    weight = (counted / count)[:, None]
    gradient = terms * (weight / total)
    gradient = gradient.at[mx.arange(len(labels))[:, None], chosen].add(-weight)
    if bounded is not None:
        gradient = gradient * (1 - mx.square(bounded))
    return mx.where(counted, losses.squeeze(-1), 0), gradient.astype(logits.dtype)


def _add_product(total: Array | None, a: Array, b: Array, dtype: mx.Dtype) -> Array:
    """Returns the sum of an array and a product of matrices, in a dtype."""
    if total is None:
        return (a @ b).astype(dtype)
    return mx.addmm(total, a, b) if a.dtype == dtype else total + (a @ b).astype(dtype)
