"""Reading and writing at indices."""

# The text of these functions is copied into ports, without types.
# mypy: ignore-errors
# ruff: noqa: B905

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.porting.functions.reductions import vector_norm
from icenet.porting.functions.shapes import put, stream_of_places


def embedding(weight, ids, padding):
    """Returns rows of a table; the row of the padding gets no gradient."""
    keep = (mx.arange(weight.shape[0]) != padding)[:, None]
    return mx.where(keep, weight, mx.stop_gradient(weight))[ids]


def by_frequency(rows, ids):
    """Returns rows of a table whose gradient is divided by the number of times that their id occurs."""
    flat = ids.flatten()
    count = (flat[:, None] == flat).sum(-1).reshape(*ids.shape, 1)
    part = rows / count.astype(rows.dtype)
    return mx.stop_gradient(rows - part) + part


def embedding_renorm(weight, ids, max_norm, order):
    """Returns a table whose rows of the ids have at most a norm."""
    size = vector_norm(weight, order, -1, True)
    used = (mx.arange(weight.shape[0])[:, None] == ids.flatten()).any(-1, keepdims=True)
    new = mx.where(used & (size > max_norm), weight * (max_norm / (size + 1e-7)), weight)
    return new


def embedding_bag(
    weight, ids, offsets, mode, sample_weights=None, include_last=False, padding=None, scale_by_frequency=False
):
    """Returns the sum, mean or maximum of the rows of each bag."""
    if offsets is None:
        count, size = ids.shape
        offsets, ids = mx.arange(count) * size, ids.flatten()
        if sample_weights is not None:
            sample_weights = sample_weights.flatten()
    elif include_last:
        offsets = offsets[:-1]
    bags = (mx.arange(ids.shape[0])[:, None] >= offsets[None]).sum(1) - 1
    rows = by_frequency(weight[ids], ids) if scale_by_frequency else weight[ids]
    if sample_weights is not None:
        rows = rows * sample_weights[:, None]
    valid = mx.ones((ids.shape[0], 1), weight.dtype)
    if padding is not None and padding >= 0:
        valid = (ids != padding)[:, None].astype(weight.dtype)
        rows = rows * valid
    member = (bags[None] == mx.arange(offsets.shape[0])[:, None]).astype(weight.dtype)  # [bags, ids]
    if mode == 2:
        inside = (member[..., None] * valid[None]) != 0
        largest = mx.where(inside, rows[None], -math.inf).max(1)
        return mx.where(inside.any(1), largest, 0), None, None, None
    total = member @ rows
    if mode == 1:
        total = total / mx.maximum(member @ valid, 1)
    return total, None, None, None


def masked_index(x, indices):
    """Returns elements at indices some of which are masks. The shape depends on the values."""
    whole = []
    for index in indices:
        if index is not None and index.dtype == mx.bool_:
            whole.extend(mx.moveaxis(nonzero(index), -1, 0))
        else:
            whole.append(slice(None) if index is None else index)
    return x[tuple(whole)]


def nonzero(x):
    """Returns the indices of the elements that are not 0, one row each. The shape depends on the values."""
    if x.ndim == 0:
        return mx.zeros((int(x != 0), 0), mx.int64)
    flat = (x != 0).flatten()
    count = int(flat.sum())
    places = mx.argsort(mx.where(flat, 0, 1))[:count].astype(mx.int64)
    parts = []
    for size in reversed(x.shape):
        parts.append(places % size)
        places = places // size
    return mx.stack(parts[::-1], axis=1) if parts else mx.zeros((count, 0), mx.int64)


def nonzero_static(x, count, fill=-1):
    """Returns the indices of the first elements that are not 0, one row each, and then rows of a number."""
    flat = (x != 0).flatten()
    places = mx.argsort(mx.where(flat, 0, 1))[:count].astype(mx.int64)
    places = mx.pad(places, [(0, max(count - flat.size, 0))])
    valid = (mx.arange(count) < flat.sum())[:, None]
    parts = []
    for size in reversed(x.shape):
        parts.append(places % size)
        places = places // size
    rows = mx.stack(parts[::-1], axis=1) if parts else mx.zeros((count, 0), mx.int64)
    return mx.where(valid, rows, fill)


def masked_select(x, mask):
    """Returns the elements under a mask. The shape depends on the values."""
    x, mask = mx.broadcast_arrays(x, mask)
    flat = mask.flatten()
    count = int(flat.sum())
    return x.flatten()[mx.argsort(mx.where(flat, 0, 1))[:count]]


def masked_scatter(x, mask, source):
    """Returns x with the elements of the source, in order, under a mask."""
    x, mask = mx.broadcast_arrays(x, mask)
    mask = mask.flatten()
    index = mx.maximum(mx.cumsum(mask.astype(mx.int32)) - 1, 0)
    values = mx.take(source.flatten(), mx.minimum(index, max(source.size - 1, 0)))
    return mx.where(mask, values, x.flatten()).reshape(x.shape)


def index_put(x, indices, values, accumulate=False):
    """Returns a copy of x with other values at indices."""
    index = []
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype == mx.bool_ and values.size == 1:
        mask = indices[0].reshape(*indices[0].shape, *[1] * (x.ndim - indices[0].ndim))
        return mx.where(mask, x + values.reshape(()) if accumulate else values.reshape(()).astype(x.dtype), x)
    for item in indices:
        if item is None:
            index.append(slice(None))
        elif item.dtype == mx.bool_:
            index.extend(mx.moveaxis(nonzero(item), -1, 0))
        else:
            index.append(item)
    if accumulate:
        with stream_of_places(x):
            return x.at[tuple(index)].add(values)
    return put(x, tuple(index), values)


def take_along(x, index, axis):
    """Returns elements along an axis; the other axes are broadcast."""
    shape = [max(a, b) if axis % x.ndim != number else 0 for number, (a, b) in enumerate(zip(x.shape, index.shape))]
    wide = [size or x.shape[number] for number, size in enumerate(shape)]
    deep = [size or index.shape[number] for number, size in enumerate(shape)]
    return mx.take_along_axis(mx.broadcast_to(x, wide), mx.broadcast_to(index, deep), axis=axis)


def gather(x, axis, index):
    """Returns elements along an axis; the index may be smaller along the others."""
    if index.size == 0:
        return mx.zeros(index.shape, x.dtype)
    if x.ndim == 0:
        return mx.broadcast_to(x, index.shape)
    if index.ndim == 0:
        return x[index]
    axis = axis % x.ndim
    part = tuple(slice(None) if number == axis else slice(0, size) for number, size in enumerate(index.shape))
    return mx.take_along_axis(x[part], index, axis=axis)


def scatter(x, axis, index, source, mode=None, include_self=True):
    """Returns x with values written or reduced at places along an axis."""
    if x.ndim == 0:
        x, index = x.reshape(1), mx.array(index).reshape(1)
        source = source.reshape(1) if isinstance(source, mx.array) else source
        return scatter(x, 0, index, source, mode, include_self).reshape(())
    if index.size == 0:
        return x
    if mode is not None and x.dtype == mx.bool_:
        return scatter(x.astype(mx.int32), axis, index, source, mode, include_self) != 0
    if index.ndim == 0:
        index = index.reshape(1)
    axis = axis % x.ndim
    if not isinstance(source, mx.array):
        source = mx.full(index.shape, source, x.dtype)
    source = source.reshape(1) if source.ndim == 0 else source
    source = source[tuple(slice(0, size) for size in index.shape)].astype(x.dtype)
    places = [
        index
        if number == axis
        else mx.arange(size).reshape([-1 if other == number else 1 for other in range(index.ndim)])
        for number, size in enumerate(index.shape)
    ]
    places = tuple(mx.broadcast_arrays(*places))
    if mode is None:
        return put(x, places, source)
    if mode == "amax" or mode == "amin":
        return extreme_at(x, places, source, mode == "amax", include_self)
    if not include_self:
        written = mx.zeros(x.shape).at[places].add(mx.ones(source.shape)) > 0
        start = mx.where(written, mx.array(1 if mode == "prod" else 0, x.dtype), x)
    else:
        start = x
    if mode == "sum":
        with stream_of_places(x):
            return start.at[places].add(source)
    if mode == "prod":
        return multiply_at(start, places, source)
    count = mx.zeros(x.shape, mx.float32).at[places].add(mx.ones(source.shape, mx.float32))
    count = mx.maximum(count + 1 if include_self else count, 1)
    with stream_of_places(x):
        total = start.at[places].add(source)
    return total / count if mx.issubdtype(x.dtype, mx.floating) else mx.floor(total / count).astype(x.dtype)


def multiply_at(x, places, source):
    """Returns x with places multiplied by values. The gradient of a factor is the product of the others."""

    @mx.custom_function
    def multiply(x, source):
        with stream_of_places(x):
            return x.at[places].multiply(source)

    @multiply.vjp
    def gradient(inputs, cotangent, y):
        x, source = inputs
        products = mx.where(x == 0, 1, x).at[places].multiply(mx.where(source == 0, 1, source))
        zeros = (x == 0).astype(mx.int32).at[places].add((source == 0).astype(mx.int32))

        def of(value, cotangent, product, count):
            others = mx.where(count == (value == 0), product / mx.where(value == 0, 1, value), 0)
            return cotangent * others

        return of(x, cotangent, products, zeros), of(source, cotangent[places], products[places], zeros[places])

    return multiply(x, source)


def extreme_at(x, places, source, is_largest, include_self=True):
    """Returns x with the largest or the smallest values at places. Equal values share the gradient, as in PyTorch."""
    written = mx.zeros(x.shape).at[places].add(mx.ones(source.shape)) > 0

    @mx.custom_function
    def extreme(x, source):
        if not include_self:
            if mx.issubdtype(x.dtype, mx.floating):
                limits = -math.inf, math.inf
            else:
                limits = mx.iinfo(x.dtype).min, mx.iinfo(x.dtype).max
            x = mx.where(written, mx.array(limits[0] if is_largest else limits[1], x.dtype), x)
        with stream_of_places(x):
            return x.at[places].maximum(source) if is_largest else x.at[places].minimum(source)

    @extreme.vjp
    def gradient(inputs, cotangent, y):
        x, source = inputs
        own, other = x == y, source == y[places]
        # PyTorch counts x also if it is not included, and gives its share to none
        share = cotangent / mx.maximum(own.astype(mx.int32).at[places].add(other.astype(mx.int32)), 1)
        share = share.astype(cotangent.dtype)
        of_x = mx.where(own if include_self else own & ~written, share, 0)
        return of_x, mx.where(other, share[places], 0)

    return extreme(x, source)


def _along(x, axis, index):
    if x.ndim == 0:
        return ()
    return (*[slice(None)] * (axis % x.ndim), index.reshape(-1))


def index_add(x, axis, index, source, alpha=1):
    """Returns x with slices added at indices."""
    if x.ndim == 0:
        return x + source.reshape(()) * alpha
    with stream_of_places(x):
        return x.at[_along(x, axis, index)].add((source if source.ndim else source.reshape(1)) * alpha)


def index_copy(x, axis, index, source):
    """Returns x with other slices at indices."""
    if x.ndim == 0:
        return source.reshape(())
    return put(x, _along(x, axis, index), source if source.ndim else source.reshape(1))


def index_fill(x, axis, index, value):
    """Returns x with a value at indices."""
    value = mx.array(value, x.dtype)
    if x.ndim == 0:
        return value
    filled = mx.zeros(x.shape[axis], mx.bool_)
    filled[index] = True
    return mx.where(filled.reshape([-1] + [1] * (x.ndim - 1 - axis % x.ndim)), value, x)


def index_reduce(x, axis, index, source, mode, include_self=True):
    """Returns x with slices reduced at indices."""
    places = index.reshape([-1 if number == axis % x.ndim else 1 for number in range(x.ndim)])
    return scatter(x, axis, mx.broadcast_to(places, source.shape), source, mode, include_self)


def put_flat(x, index, source, accumulate=False):
    """Returns x with other values at places of the flattened array."""
    if index.size == 0:
        return x
    flat, index, source = x.flatten(), index.flatten(), source.flatten()
    if not accumulate:
        return put(flat, index, source).reshape(x.shape)
    with stream_of_places(x):
        return flat.at[index].add(source).reshape(x.shape)


def put_view(x, view, values):
    """Returns x with other values in a part of it. `view` is a function that returns the part."""
    return put_flat(x, view(mx.arange(x.size).reshape(x.shape)), values)


def as_strided_scatter(x, source, sizes, strides, offset=0):
    """Returns x with other values at the places of `mx.as_strided`."""
    return put_view(x, lambda places: mx.as_strided(places, sizes, strides, offset), source)


def segment_reduce(x, mode, lengths=None, offsets=None, axis=0, initial=None):
    """Returns the reductions of the segments, one after the other, along an axis; the axes before it are batches."""
    starts = mx.cumsum(lengths, axis=-1) - lengths if offsets is None else offsets[..., :-1]
    ends = starts + lengths if offsets is None else offsets[..., 1:]
    flat = x.reshape(*x.shape[: axis + 1], -1)  # [..., elements, features]
    place = mx.arange(x.shape[axis])
    member = (place >= starts[..., None]) & (place < ends[..., None])  # [..., segments, elements]
    empty = {"max": -math.inf, "min": math.inf, "prod": 1.0}.get(mode, 0.0)
    parts = mx.where(member[..., None], flat[..., None, :, :], empty)
    start = empty if initial is None else initial
    count = (ends - starts)[..., None].astype(x.dtype)
    if mode in ("max", "min"):
        parts = mx.concatenate([parts, mx.full((*parts.shape[:-2], 1, parts.shape[-1]), start, x.dtype)], axis=-2)
        total = parts.max(-2) if mode == "max" else parts.min(-2)
    else:
        total = parts.prod(-2) * start if mode == "prod" else parts.sum(-2) + start
    if mode == "mean":
        nothing = math.nan if initial is None else initial
        total = mx.where(count == 0, nothing, total / mx.maximum(count, 1))
    return total.reshape(*starts.shape, *x.shape[axis + 1 :])


def one_hot(ids, classes=-1):
    """Returns vectors with 1 at an id. Without a number of classes the shape depends on the values."""
    classes = int(ids.max()) + 1 if classes < 0 else classes
    return (ids[..., None] == mx.arange(classes)).astype(mx.int64)


def searchsorted(table, x, right=False):
    """Returns the places at which values would be inserted into sorted rows."""
    x = mx.array(x)
    if table.ndim == 1:
        less = table <= x[..., None] if right else table < x[..., None]
    else:
        less = table[..., None, :] <= x[..., None] if right else table[..., None, :] < x[..., None]
    return less.sum(-1).astype(mx.int64)


def isin(x, values, invert=False):
    """Returns whether elements are among some values."""
    x, values = mx.array(x), mx.array(values)
    found = (x[..., None] == values.flatten()).any(-1)
    return ~found if invert else found
