"""Normalizations and losses."""

# The text of these functions is copied into ports, without types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.porting.functions.elementwise import xlogy
from icenet.porting.functions.reductions import pairwise_distance, var, vector_norm


def layer_norm(x, count, weight=None, bias=None, eps=1e-5):
    """Returns x normalized over its last axes."""
    shape = x.shape
    flat = x.reshape(*shape[: len(shape) - count], math.prod(shape[len(shape) - count :]))
    y = mx.fast.layer_norm(flat, None, None, eps).reshape(shape)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def native_layer_norm(x, count, weight=None, bias=None, eps=1e-5):
    """Returns the normalized values, the means and the reciprocals of the deviations."""
    axes = tuple(range(x.ndim - count, x.ndim))
    mean = x.mean(axes, keepdims=True)
    scale = mx.rsqrt(mx.square(x - mean).mean(axes, keepdims=True) + eps)
    return layer_norm(x, count, weight, bias, eps), mean, scale


def native_batch_norm(x, mean=None, variance=None, weight=None, bias=None, eps=1e-5):
    """Returns the normalized values, the means and the reciprocals of the deviations; channels are the second axis.

    Without running statistics those of the batch are taken, and returned.
    """
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    shape = [1, -1] + [1] * (x.ndim - 2)
    saved = (mx.zeros((0,)), mx.zeros((0,)))
    if mean is None:
        mean = x.mean(axes)
        variance = mx.square(x - mean.reshape(shape)).mean(axes)
        saved = (mean, mx.rsqrt(variance + eps))
    y = (x - mean.reshape(shape)) * mx.rsqrt(variance + eps).reshape(shape)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape), *saved


def native_group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    """Returns the values normalized over groups of channels (axis 1), the means and 1 / deviation."""
    flat = x.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    mean = flat.mean(-1)
    scale = mx.rsqrt(mx.square(flat - mean[..., None]).mean(-1) + eps)
    y = ((flat - mean[..., None]) * scale[..., None]).reshape(x.shape)
    shape = [1, -1] + [1] * (x.ndim - 2)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape), mean, scale


def rms_norm(x, count, weight=None, eps=1e-5):
    """Returns x divided by its root mean square over its last axes."""
    axes = tuple(range(x.ndim - count, x.ndim))
    y = x * mx.rsqrt(mx.square(x).mean(axes, keepdims=True) + eps)
    return y if weight is None else y * weight


def group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    """Returns images, with their channels last, normalized over groups of channels."""
    shape = x.shape
    flat = x.reshape(shape[0], math.prod(shape[1:-1]), groups, shape[-1] // groups)
    mean = flat.mean((1, 3), keepdims=True)
    variance = mx.square(flat - mean).mean((1, 3), keepdims=True)
    y = ((flat - mean) * mx.rsqrt(variance + eps)).reshape(shape)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def instance_norm(x, weight=None, bias=None, eps=1e-5):
    """Returns each channel of each image normalized."""
    axes = tuple(range(1, x.ndim - 1))
    mean = x.mean(axes, keepdims=True)
    y = (x - mean) * mx.rsqrt(mx.square(x - mean).mean(axes, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def batch_norm(x, mean, variance, weight=None, bias=None, eps=1e-5):
    """Returns x normalized by running statistics; its channels are last."""
    y = (x - mean) * mx.rsqrt(variance + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def batch_norm_of_batch(x, weight=None, bias=None, eps=1e-5):
    """Returns x normalized by the statistics of the batch; its channels are last."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return batch_norm(x, mean, mx.square(x - mean).mean(axes), weight, bias, eps)


def batch_norm_statistics(x, running, momentum, which):
    """Returns the running mean or variance after a batch; its channels are the second axis."""
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    x = mx.stop_gradient(x)
    new = x.mean(axes) if which == "mean" else var(x, axes)
    return (1 - momentum) * running + momentum * new


def instance_norm_statistics(x, running, momentum, which):
    """Returns the running mean or variance after a batch, the mean of those of its instances."""
    x = mx.stop_gradient(x)
    axes = tuple(range(2, x.ndim))
    new = x.mean(axes) if which == "mean" else var(x, axes)
    return (1 - momentum) * running + momentum * new.mean(0)


def weight_norm(v, g, axis=0):
    """Returns v with the norms g (Salimans and Kingma, 2016)."""
    axes = tuple(index for index in range(v.ndim) if index != axis % v.ndim) if axis != -1 else None
    return v * (g / vector_norm(v, 2, axes, True))


# ---- losses ------------------------------------------------------------------------------------------------


def _reduced(loss, reduction):
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def mse_loss(x, target, reduction="mean"):
    """Returns the squared error."""
    return _reduced(mx.square(x - target), reduction)


def l1_loss(x, target, reduction="mean"):
    """Returns the absolute error."""
    return _reduced(mx.abs(x - target), reduction)


def smooth_l1_loss(x, target, beta=1.0, reduction="mean"):
    """Returns the squared error near 0 and the absolute error elsewhere."""
    size = mx.abs(x - target)
    loss = size if beta == 0 else mx.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)
    return _reduced(loss, reduction)


def huber_loss(x, target, delta=1.0, reduction="mean"):
    """Returns Huber's loss."""
    size = mx.abs(x - target)
    return _reduced(mx.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta)), reduction)


def soft_margin_loss(x, target, reduction="mean"):
    """Returns log(1 + exp(-target x))."""
    return _reduced(mx.log1p(mx.exp(-target * x)), reduction)


def binary_cross_entropy(p, target, weight=None, reduction="mean"):
    """Returns the cross-entropy of probabilities; logarithms are at least -100."""
    loss = (target - 1) * mx.maximum(mx.log1p(-p), -100) - target * mx.maximum(mx.log(p), -100)
    return _reduced(loss if weight is None else loss * weight, reduction)


def binary_cross_entropy_with_logits(x, target, weight=None, pos_weight=None, reduction="mean"):
    """Returns the cross-entropy of logits."""
    log_weight = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    loss = (1 - target) * x - log_weight * nn.log_sigmoid(x)
    return _reduced(loss if weight is None else loss * weight, reduction)


def kl_div(x, target, log_target=False, reduction="mean"):
    """Returns the Kullback-Leibler divergence of log-probabilities x from a target."""
    loss = mx.exp(target) * (target - x) if log_target else xlogy(target, target) - target * x
    return _reduced(loss, reduction)


def hinge_embedding_loss(x, target, margin=1.0, reduction="mean"):
    """Returns x for the target 1, and max(0, margin - x) for -1."""
    loss = mx.where(target != 1, mx.maximum(margin - x, 0), 0) + mx.where(target != -1, x, 0)
    return _reduced(loss, reduction)


def margin_ranking_loss(a, b, target, margin=0.0, reduction="mean"):
    """Returns max(0, -target (a - b) + margin)."""
    return _reduced(mx.maximum(-target * (a - b) + margin, 0), reduction)


def cosine_embedding_loss(a, b, target, margin=0.0, reduction="mean"):
    """Returns 1 - cos for the target 1, and max(0, cos - margin) for -1."""
    eps = 1e-12
    cosine = (a * b).sum(-1) / mx.sqrt(((a * a).sum(-1) + eps) * ((b * b).sum(-1) + eps))
    loss = mx.where(target == 1, 1 - cosine, mx.where(target == -1, mx.maximum(cosine - margin, 0), 0))
    return _reduced(loss, reduction)


def triplet_margin_loss(anchor, positive, negative, margin=1.0, p=2.0, eps=1e-6, swap=False, reduction="mean"):
    """Returns max(0, d(anchor, positive) - d(anchor, negative) + margin)."""
    near, far = pairwise_distance(anchor, positive, p, eps), pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = mx.minimum(far, pairwise_distance(positive, negative, p, eps))
    return _reduced(mx.maximum(margin + near - far, 0), reduction)


def poisson_nll_loss(x, target, log_input=True, full=False, eps=1e-8, reduction="mean"):
    """Returns the negative log-likelihood of a Poisson distribution."""
    loss = mx.exp(x) - target * x if log_input else x - target * mx.log(x + eps)
    if full:
        large = target > 1
        safe = mx.where(large, target, 2)
        stirling = safe * mx.log(safe) - safe + 0.5 * mx.log(2 * math.pi * safe)
        loss = loss + mx.where(large, stirling, 0)
    return _reduced(loss, reduction)


def nll_loss(x, target, weight=None, ignore=-100, reduction="mean"):
    """Returns the negative log-likelihood of the classes of a target; classes are the second axis."""
    axis = 1 if x.ndim > 1 else 0
    used = target != ignore
    index = mx.expand_dims(mx.where(used, target, 0), axis)
    picked = mx.take_along_axis(x, index, axis=axis).squeeze(axis)
    factor = used.astype(x.dtype)
    if weight is not None:
        factor = factor * weight[mx.where(used, target, 0)]
    loss = -picked * factor
    return loss.sum() / factor.sum() if reduction == "mean" else _reduced(loss, reduction)


def log_softmax(x, axis):
    """Returns the logarithm of the softmax. That of mlx.nn crashes if the axis has one element."""
    x = x - mx.stop_gradient(x.max(axis, keepdims=True))
    return x - mx.logsumexp(x, axis=axis, keepdims=True)


def cross_entropy(x, target, weight=None, ignore=-100, smoothing=0.0, reduction="mean"):
    """Returns the cross-entropy of logits; classes are the second axis."""
    axis = 1 if x.ndim > 1 else 0
    scores = log_softmax(x, axis)
    classes = x.shape[axis]
    shaped = None if weight is None else weight.reshape([-1] + [1] * (x.ndim - 1 - axis))
    if mx.issubdtype(target.dtype, mx.floating):
        if smoothing:
            target = target * (1 - smoothing) + smoothing / classes
        loss = -(scores * target * (1 if shaped is None else shaped)).sum(axis)
        if reduction == "mean":
            return loss.sum() / max(loss.size, 1)
        return _reduced(loss, reduction)
    loss = nll_loss(scores, target, weight, ignore, reduction)
    if not smoothing:
        return loss
    used = (target != ignore).astype(x.dtype)
    smooth = -(scores if shaped is None else scores * shaped).sum(axis) * used
    if reduction == "mean":
        factor = used if weight is None else used * weight[mx.where(target == ignore, 0, target)]
        smooth = smooth.sum() / factor.sum()
    else:
        smooth = _reduced(smooth, reduction)
    return (1 - smoothing) * loss + smoothing / classes * smooth


def multi_margin_loss(x, target, p=1, margin=1.0, weight=None, reduction="mean"):
    """Returns the mean over other classes of max(0, margin - x_target + x)^p."""
    single = x.ndim < 2
    x, target = (x.reshape(1, -1), target.reshape(1)) if single else (x, target)
    own = mx.take_along_axis(x, target[:, None], axis=1)
    loss = mx.maximum(margin - own + x, 0) ** p
    if weight is not None:
        loss = loss * weight[target][:, None]
    loss = mx.where(mx.arange(x.shape[1]) == target[:, None], 0, loss).sum(1) / x.shape[1]
    return _reduced(loss[0] if single and reduction == "none" else loss, reduction)


def multilabel_margin_loss(x, target, reduction="mean"):
    """Returns the margin loss of rows with several classes; their ids [..., C] end at the first -1."""
    x, target = mx.atleast_1d(x), mx.atleast_1d(target)
    valid = mx.cumprod((target >= 0).astype(mx.int32), axis=-1) > 0
    ids = mx.where(valid, target, 0)
    chosen = mx.take_along_axis(x, ids, axis=-1)
    hit = (ids[..., None] == mx.arange(x.shape[-1])) & valid[..., None]  # [..., target, class]
    is_target = hit.any(-2)
    margins = mx.maximum(1 - chosen[..., None] + x[..., None, :], 0)
    counted = valid[..., None] & ~is_target[..., None, :]
    return _reduced(mx.where(counted, margins, 0).sum((-1, -2)) / x.shape[-1], reduction)


def ctc_loss(x, targets, lengths, target_lengths, blank=0, reduction="mean", zero_infinity=False):
    """Returns the connectionist temporal classification loss (Graves et al., 2006) of log-probabilities [T, B, C].

    The gradient is that of PyTorch, which is right if the log-probabilities come from `log_softmax`.
    """
    unbatched = x.ndim == 2
    x = x[:, None] if unbatched else x
    steps = x.shape[0]
    lengths, target_lengths = lengths.reshape(-1), target_lengths.reshape(-1)
    if targets.ndim == 1:  # the sequences one after the other
        size = int(target_lengths.max())
        first = mx.cumsum(target_lengths) - target_lengths
        place = mx.minimum(first[:, None] + mx.arange(size), targets.shape[0] - 1)
        targets = targets[place]
    size = targets.shape[1]
    inside = mx.arange(size) < target_lengths[:, None]
    labels = mx.where(inside, targets, blank)
    row = mx.arange(2 * size + 1)  # blanks and labels in turn
    path = mx.where(row % 2 == 1, mx.take(labels, mx.minimum(row // 2, max(size - 1, 0)), axis=1), blank)
    never = -1e30  # finite, because the gradient of logaddexp at -inf is NaN
    skips = (row % 2 == 1) & (row > 1) & (path != mx.pad(path, [(0, 0), (2, 0)])[:, :-2])
    emitted = mx.maximum(mx.take_along_axis(x, mx.broadcast_to(path, (steps, *path.shape)), axis=-1), never)
    alpha = mx.where(row < 2, emitted[0], never)
    for step in range(1, steps):
        one = mx.pad(alpha, [(0, 0), (1, 0)], constant_values=never)[:, :-1]
        two = mx.where(skips, mx.pad(alpha, [(0, 0), (2, 0)], constant_values=never)[:, :-2], never)
        moved = mx.maximum(mx.logsumexp(mx.stack([alpha, one, two]), axis=0) + emitted[step], never)
        alpha = mx.where((step < lengths)[:, None], moved, alpha)
    last = 2 * target_lengths[:, None]
    ends = mx.take_along_axis(alpha, mx.concatenate([last, mx.maximum(last - 1, 0)], axis=1), axis=1)
    ends = mx.where(mx.concatenate([last >= 0, last > 0], axis=1), ends, never)
    loss = -mx.logsumexp(ends, axis=1)
    impossible = loss > 1e29
    weights = mx.exp(x) * (mx.arange(steps)[:, None] < lengths)[..., None]
    total = weights.sum((0, 2))
    loss = loss + (total - mx.stop_gradient(total))
    loss = mx.where(impossible, 0.0 if zero_infinity else math.inf, loss)
    if reduction == "mean":
        return (loss / mx.maximum(target_lengths, 1)).mean()
    return loss.sum() if reduction == "sum" else loss[0] if unbatched else loss
