"""Reductions, sorts and cumulative operations."""

# The text of these functions is copied into ports, without types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.porting.functions.shapes import triu_indices


def amax(x, axis=None, keepdims=False):
    """Returns the maximum; equal maxima share the gradient."""
    return x.max(axis, keepdims=keepdims)


def amin(x, axis=None, keepdims=False):
    """Returns the minimum; equal minima share the gradient."""
    return x.min(axis, keepdims=keepdims)


def argmax(x, axis=None, keepdims=False):
    """Returns the index of the first maximum."""
    if x.ndim == 0:
        return mx.array(0, mx.int64)
    return mx.argmax(mx.stop_gradient(x), axis=axis, keepdims=keepdims).astype(mx.int64)


def argmin(x, axis=None, keepdims=False):
    """Returns the index of the first minimum."""
    if x.ndim == 0:
        return mx.array(0, mx.int64)
    return mx.argmin(mx.stop_gradient(x), axis=axis, keepdims=keepdims).astype(mx.int64)


def _at_index(x, index, axis, keepdims):
    index = mx.stop_gradient(index)  # as a function of x it has no gradient
    values = mx.take_along_axis(x, index, axis=axis)
    return (values, index) if keepdims else (values.squeeze(axis), index.squeeze(axis))


def max_with_indices(x, axis, keepdims=False):
    """Returns the maxima and the indices of the first ones, which get the gradient."""
    if x.ndim == 0:
        return x, mx.array(0, mx.int64)
    return _at_index(x, argmax(x, axis, True), axis, keepdims)


def min_with_indices(x, axis, keepdims=False):
    """Returns the minima and the indices of the first ones, which get the gradient."""
    if x.ndim == 0:
        return x, mx.array(0, mx.int64)
    return _at_index(x, argmin(x, axis, True), axis, keepdims)


def _count(x, axis):
    axes = range(x.ndim) if axis is None else [axis] if isinstance(axis, int) else axis
    return math.prod(x.shape[index] for index in axes)


def var(x, axis=None, correction=1, keepdims=False):
    """Returns the variance."""
    if x.ndim == 0:
        axis = None
    if not _count(x, axis):  # MLX's reduction of an empty array that is not contiguous may not end
        return _nothing(x, axis, keepdims)
    deviation = x - x.mean(axis, keepdims=True)
    squares = mx.square(mx.abs(deviation)).sum(axis, keepdims=keepdims)
    freedom = max(_count(x, axis) - correction, 0)
    return squares / freedom if freedom else squares / mx.array(0.0)


def std(x, axis=None, correction=1, keepdims=False):
    """Returns the standard deviation."""
    return mx.sqrt(var(x, axis, correction, keepdims))


def var_mean(x, axis=None, correction=1, keepdims=False):
    """Returns variance and mean."""
    return var(x, axis, correction, keepdims), _mean(x, axis, keepdims)


def std_mean(x, axis=None, correction=1, keepdims=False):
    """Returns standard deviation and mean."""
    return std(x, axis, correction, keepdims), _mean(x, axis, keepdims)


def _mean(x, axis, keepdims):
    axis = axis if x.ndim else None
    return x.mean(axis, keepdims=keepdims) if _count(x, axis) else _nothing(x, axis, keepdims)


def _nothing(x, axis, keepdims, value=math.nan):
    axes = range(x.ndim) if axis is None else [axis] if isinstance(axis, int) else axis
    axes = [index % x.ndim for index in axes]
    if keepdims:
        return mx.full([1 if index in axes else size for index, size in enumerate(x.shape)], value, x.dtype)
    return mx.full([size for index, size in enumerate(x.shape) if index not in axes], value, x.dtype)


def nanmean(x, axis=None, keepdims=False):
    """Returns the mean of the elements that are not NaN."""
    missing = mx.isnan(x)
    return mx.where(missing, 0, x).sum(axis, keepdims=keepdims) / (~missing).sum(axis, keepdims=keepdims)


def vector_norm(x, order=2, axis=None, keepdims=False):
    """Returns the p-norm of the elements."""
    if x.ndim == 0:
        axis = None
    size = mx.abs(x)
    if order == math.inf:
        return size.max(axis, keepdims=keepdims)
    if order == -math.inf:
        return size.min(axis, keepdims=keepdims)
    if order == 0:
        return (x != 0).astype(size.dtype).sum(axis, keepdims=keepdims)
    if order == 1:
        return size.sum(axis, keepdims=keepdims)
    if order == 2:
        squares = mx.square(size).sum(axis, keepdims=keepdims)
        zero = squares == 0
        return mx.where(zero, 0, mx.sqrt(mx.where(zero, 1, squares)))
    powers = mx.where(size == 0, 0, mx.power(mx.where(size == 0, 1, size), order)).sum(axis, keepdims=keepdims)
    zero = powers == 0
    return mx.where(zero, 0, mx.power(mx.where(zero, 1, powers), 1 / order))


def safe_softmax(x, axis):
    """Returns the softmax, 0 where all are -inf."""
    empty = (x == -math.inf).all(axis, keepdims=True)
    return mx.where(empty, 0, mx.softmax(mx.where(empty, 0, x), axis=axis))


def sort(x, axis=-1, descending=False):
    """Returns the sorted values and their indices; equal values keep their order."""
    if x.ndim == 0:
        return x, mx.array(0, mx.int64)
    if x.dtype == mx.bool_:
        values, index = sort(x.astype(mx.int32), axis, descending)
        return values.astype(mx.bool_), index
    keys = mx.stop_gradient(x)
    if descending:
        turned = -keys if x.dtype not in (mx.uint8, mx.uint16, mx.uint32, mx.uint64) else mx.max(keys) - keys
        index = mx.argsort(turned, axis=axis)
    else:
        index = mx.argsort(keys, axis=axis)
    index = index.astype(mx.int64)
    return mx.take_along_axis(x, index, axis=axis), index


def topk(x, k, axis=-1, largest=True):
    """Returns the k largest or smallest values in order, and their indices."""
    if x.ndim == 0:
        return x, mx.array(0, mx.int64)
    values, index = sort(x, axis, largest)
    part = mx.arange(k)
    return mx.take(values, part, axis=axis), mx.take(index, part, axis=axis)


def kthvalue(x, k, axis=-1, keepdims=False):
    """Returns the k-th smallest value and its index."""
    if x.ndim == 0:
        return x, mx.array(0, mx.int64)
    values, index = sort(x, axis)
    part = mx.array([k - 1])
    values, index = mx.take(values, part, axis=axis), mx.take(index, part, axis=axis)
    return (values, index) if keepdims else (values.squeeze(axis), index.squeeze(axis))


def median(x):
    """Returns the lower median of all elements, NaN if one of them is."""
    return median_with_indices(x.flatten(), 0)[0]


def median_with_indices(x, axis=-1, keepdims=False):
    """Returns the lower medians and their indices; a NaN is the median of its row."""
    if x.ndim == 0:
        return x, mx.array(0, mx.int64)
    _, index = kthvalue(x, (x.shape[axis] - 1) // 2 + 1, axis, True)
    if mx.issubdtype(x.dtype, mx.floating):
        missing = mx.isnan(x)
        index = mx.where(missing.any(axis, keepdims=True), argmax(missing.astype(mx.int32), axis, True), index)
    return _at_index(x, index, axis, keepdims)


def nanmedian(x):
    """Returns the lower median of the elements that are not NaN."""
    return nanmedian_with_indices(x.flatten(), 0)[0]


def nanmedian_with_indices(x, axis=-1, keepdims=False):
    """Returns the lower medians of the elements that are not NaN, and their indices."""
    if x.ndim == 0 or not mx.issubdtype(x.dtype, mx.floating):
        return median_with_indices(x, axis, keepdims)
    missing = mx.isnan(x)
    order = mx.argsort(mx.where(missing, math.inf, mx.stop_gradient(x)), axis=axis)
    place = mx.maximum((~missing).sum(axis, keepdims=True) - 1, 0) // 2
    return _at_index(x, mx.take_along_axis(order, place, axis=axis).astype(mx.int64), axis, keepdims)


def _cumulative(x, axis, function):
    values = function(mx.stop_gradient(x), axis=axis)
    position = mx.arange(x.shape[axis]).reshape([-1] + [1] * (x.ndim - 1 - axis % x.ndim))
    index = mx.cummax(
        mx.where(mx.stop_gradient(x) == values, mx.broadcast_to(position, x.shape), 0), axis=axis
    ).astype(mx.int64)
    return mx.take_along_axis(x, index, axis=axis), index


def cummax(x, axis):
    """Returns the running maxima and their last indices."""
    return _cumulative(x, axis, mx.cummax) if x.ndim else (x, mx.array(0, mx.int64))


def cummin(x, axis):
    """Returns the running minima and their last indices."""
    return _cumulative(x, axis, mx.cummin) if x.ndim else (x, mx.array(0, mx.int64))


def bincount(x, weights=None, minlength=0):
    """Returns how often each number occurs. The shape depends on the values."""
    size = max(int(x.max()) + 1 if x.size else 0, minlength)
    return occurrences(x, weights, size)


def occurrences(x, weights, size):
    """Returns how often each number below a size occurs. Larger ones are left out."""
    if weights is None:  # a GPU adds no int64 at places
        return occurrences(x, mx.ones(x.shape, mx.int32), size).astype(mx.int64)
    return mx.zeros((size + 1,), weights.dtype).at[mx.minimum(x, size)].add(weights)[:size]


def histc(x, bins, low, high):
    """Returns how many elements are in each of some intervals of equal widths; the last one has its end."""
    if not x.size:
        return mx.zeros((bins,), x.dtype)
    low, high = (x.min(), x.max()) if low == high else (mx.array(low, x.dtype), mx.array(high, x.dtype))
    low, high = mx.where(low == high, low - 1, low), mx.where(low == high, high + 1, high)
    place = mx.floor((x - low) / (high - low) * bins)
    place = mx.where(x == high, bins - 1, place)
    return (place.flatten() == mx.arange(bins)[:, None]).sum(1).astype(x.dtype)


def mode(x, axis=-1, keepdims=False):
    """Returns the most frequent values, of several the smallest one, and the indices of their last occurrences."""
    if x.ndim == 0:
        return x, mx.array(0, mx.int64)
    keys = mx.moveaxis(mx.stop_gradient(x), axis, -1)
    count = (keys[..., None] == keys[..., None, :]).sum(-1)
    frequent = count == count.max(-1, keepdims=True)
    value = mx.where(frequent, keys, keys.max(-1, keepdims=True)).min(-1, keepdims=True)
    place = mx.where(frequent & (keys == value), mx.arange(keys.shape[-1]), -1)
    index = mx.moveaxis(place.max(-1, keepdims=True), -1, axis).astype(mx.int64)
    return _at_index(x, index, axis, keepdims)


def quantile(x, q, axis=None, keepdims=False, interpolation="linear", skip_nan=False):
    """Returns quantiles; those of several fractions q [Q] have a first axis more."""
    q = mx.array(q, x.dtype)
    if axis is None:
        shape = [1] * x.ndim
        flat = quantile(x.flatten(), q, 0, False, interpolation, skip_nan)
        return flat.reshape(*q.shape, *shape) if keepdims else flat
    ordered = mx.moveaxis(sort(x, axis)[0] if x.ndim else x.reshape(1), axis, -1)
    missing = mx.isnan(ordered)  # sorted to the end
    count = (~missing).sum(-1, keepdims=True) if skip_nan else mx.array([ordered.shape[-1]])
    place = q.flatten() * mx.maximum(count - 1, 0).astype(x.dtype)
    if interpolation in ("lower", "higher", "nearest"):
        place = {"lower": mx.floor, "higher": mx.ceil, "nearest": mx.round}[interpolation](place)
    low, high = mx.floor(place), mx.ceil(place)
    weight = mx.array(0.5, x.dtype) if interpolation == "midpoint" else place - low
    lead = (*ordered.shape[:-1], q.size)
    below, above = (
        mx.take_along_axis(ordered, mx.broadcast_to(mx.stop_gradient(part).astype(mx.int32), lead), axis=-1)
        for part in (low, high)
    )
    result = below + mx.where(low == place, 0, weight * (above - below))
    if not skip_nan:
        result = mx.where(missing.any(-1, keepdims=True), math.nan, result)
    result = mx.moveaxis(result, -1, 0)
    result = mx.expand_dims(result, axis % x.ndim + 1) if keepdims and x.ndim else result
    return result if q.ndim else result[0]


def covariance(x, correction=1, frequencies=None, weights=None):
    """Returns the covariances of the rows of a matrix, whose columns are observations."""
    x = x.reshape(1, -1) if x.ndim < 2 else x
    w = mx.ones((x.shape[1],)) if frequencies is None else frequencies.astype(mx.float32)
    squares = w if weights is None else w * weights * weights
    w = w if weights is None else w * weights
    total = w.sum()
    mean = (x * w).sum(1, keepdims=True) / total
    freedom = total - correction * (1 if weights is None else squares.sum() / total)
    centered = x - mean
    result = (centered * w) @ centered.T / mx.maximum(freedom, 0)
    return result if result.size > 1 else result.reshape(())


def correlation(x):
    """Returns the correlation coefficients of the rows of a matrix."""
    c = covariance(x)
    if c.ndim == 0:
        return c / c
    deviation = mx.sqrt(mx.diagonal(c))
    return mx.clip(c / deviation[:, None] / deviation, -1, 1)


def differences(x, spacings, axes, edge_order=1):
    """Returns the derivatives along axes by differences. A spacing is a step, or the coordinates along an axis."""
    results = []
    for axis, spacing in zip(axes, spacings):  # noqa: B905  (copied into ports)
        y = mx.moveaxis(x, axis, 0)
        count = y.shape[0]
        shape = [-1] + [1] * (y.ndim - 1)
        is_step = not isinstance(spacing, mx.array) or spacing.ndim == 0
        where = mx.arange(count).astype(mx.float32) * spacing if is_step else spacing
        step = (where[1:] - where[:-1]).reshape(shape)
        slope = (y[1:] - y[:-1]) / step
        before, after = step[:-1], step[1:]
        inner = (slope[:-1] * after + slope[1:] * before) / (before + after)
        first, last = slope[:1], slope[-1:]
        if edge_order == 2:
            first = first - (slope[1:2] - slope[:1]) * before[:1] / (before[:1] + after[:1])
            last = last + (slope[-1:] - slope[-2:-1]) * after[-1:] / (before[-1:] + after[-1:])
        results.append(mx.moveaxis(mx.concatenate([first, inner, last], axis=0), 0, axis))
    return results


def sum_to(x, shape):
    """Returns the sums over axes that an array of some shape would be repeated along."""
    lead = x.ndim - len(shape)
    axes = [*range(lead), *(lead + axis for axis, size in enumerate(shape) if size == 1 != x.shape[lead + axis])]
    return x.sum(axes, keepdims=True).reshape(shape) if axes else x


def cdist(a, b, p=2.0):
    """Returns the distances between all rows."""
    return vector_norm(a[..., :, None, :] - b[..., None, :, :], p, -1)


def pdist(x, p=2.0):
    """Returns the distances between all pairs of rows."""
    rows, columns = triu_indices(x.shape[0], x.shape[0], 1)
    return vector_norm(x[rows] - x[columns], p, -1)


def cosine_similarity(a, b, axis=1, eps=1e-8):
    """Returns the cosine of the angle between vectors."""
    a, b = mx.broadcast_arrays(a, b)
    axis = axis if a.ndim else None
    size_a, size_b = vector_norm(a, 2, axis, True), vector_norm(b, 2, axis, True)
    return ((a / mx.maximum(size_a, eps)) * (b / mx.maximum(size_b, eps))).sum(axis)


def pairwise_distance(a, b, p=2.0, eps=1e-6, keepdims=False):
    """Returns the distance of vectors."""
    return vector_norm(a - b + eps, p, -1, keepdims)


def trapezoid(y, x=None, dx=1, axis=-1):
    """Returns the integral by the trapezoidal rule."""
    return _trapezoids(y, x, dx, axis).sum(axis)


def cumulative_trapezoid(y, x=None, dx=1, axis=-1):
    """Returns the running integral by the trapezoidal rule."""
    return mx.cumsum(_trapezoids(y, x, dx, axis), axis=axis)


def _trapezoids(y, x, dx, axis):
    size = y.shape[axis]
    first, second = mx.take(y, mx.arange(size - 1), axis=axis), mx.take(y, mx.arange(1, size), axis=axis)
    if x is not None:
        if x.ndim < y.ndim and x.ndim == 1:
            x = x.reshape([-1] + [1] * (y.ndim - 1 - axis % y.ndim))
            dx = x[1:] - x[:-1]
        else:
            dx = diff(x, 1, axis)
    return (first + second) * dx / 2


def diff(x, n=1, axis=-1, prepend=None, append=None):
    """Returns the differences of neighbours."""
    if not n:
        return x
    parts = [part for part in (prepend, x, append) if part is not None]
    x = mx.concatenate(parts, axis=axis) if len(parts) > 1 else x
    for _ in range(min(n, x.shape[axis])):
        size = x.shape[axis]
        first, second = mx.take(x, mx.arange(size - 1), axis=axis), mx.take(x, mx.arange(1, size), axis=axis)
        x = second != first if x.dtype == mx.bool_ else second - first
    return x


def renorm(x, p, axis, maxnorm):
    """Returns x with the norm of each slice at most maxnorm."""
    others = tuple(index for index in range(x.ndim) if index != axis % x.ndim)
    size = vector_norm(x, p, others, True)
    return x * mx.where(size > maxnorm, maxnorm / (size + 1e-7), 1.0)
