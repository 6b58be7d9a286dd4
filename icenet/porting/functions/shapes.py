"""Shapes and new arrays."""

# The text of these functions is copied into ports, without types.
# mypy: ignore-errors
# ruff: noqa: B905, RUF007

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx


def stream_of_places(x):
    """Returns the stream that changes x at places: on a GPU, MLX changes no elements of 8 bytes, such as int64."""
    return mx.stream(mx.cpu if x.dtype.size == 8 else mx.default_device())


def put(x, index, values):
    """Returns a copy of x with other values at an index."""
    new = x + mx.zeros_like(x) if x.dtype != mx.bool_ else x | False
    if not any(isinstance(item, mx.array) for item in (index if isinstance(index, tuple) else (index,))):
        new[index] = values.astype(x.dtype)
        return new
    with stream_of_places(x):
        new[index] = values.astype(x.dtype)
    return new


def with_values(x, values):
    """Returns values with the gradient of x."""
    return mx.stop_gradient(values) + (x - mx.stop_gradient(x))


def resize(x, shape):
    """Returns the first elements in another shape, with 0 after the last one."""
    flat, size = x.flatten(), math.prod(shape)
    return mx.pad(flat[:size], [(0, max(size - flat.size, 0))]).reshape(shape)


def combinations(x, count, with_replacement=False):
    """Returns all combinations of elements, one in each row."""
    rows = [()]
    for _ in range(count):
        starts = [row[-1] + (not with_replacement) if row else 0 for row in rows]
        rows = [(*row, index) for row, start in zip(rows, starts) for index in range(start, x.shape[0])]
    return x[mx.array(rows)] if rows else mx.zeros((0, count), x.dtype)


def expand(x, sizes):
    """Returns x repeated along axes of size 1; -1 keeps a size."""
    added = len(sizes) - x.ndim
    return mx.broadcast_to(x, [x.shape[axis - added] if size == -1 else size for axis, size in enumerate(sizes)])


def movedim(x, source, destination):
    """Returns x with some axes at other places."""
    source = [axis % x.ndim for axis in source]
    destination = [axis % x.ndim for axis in destination]
    rest = iter([axis for axis in range(x.ndim) if axis not in source])
    order = [source[destination.index(axis)] if axis in destination else next(rest) for axis in range(x.ndim)]
    return x.transpose(order)


def repeat_interleave(x, repeats, axis=None):
    """Returns each element as often as `repeats` says. The shape depends on the values."""
    if axis is None:
        x, axis = x.flatten(), 0
    counts = repeats.tolist()
    counts = counts * x.shape[axis] if len(counts) == 1 else counts
    index = [position for position, count in enumerate(counts) for _ in range(count)]
    return mx.take(x, mx.array(index, mx.int32), axis=axis)


def hstack(arrays):
    """Returns the arrays next to each other."""
    arrays = [mx.atleast_1d(x) for x in arrays]
    return mx.concatenate(arrays, axis=0 if arrays[0].ndim == 1 else 1)


def vstack(arrays):
    """Returns the arrays below each other."""
    return mx.concatenate([mx.atleast_2d(x) for x in arrays], axis=0)


def dstack(arrays):
    """Returns the arrays behind each other."""
    return mx.concatenate([mx.atleast_3d(x) for x in arrays], axis=2)


def column_stack(arrays):
    """Returns vectors as columns."""
    return mx.concatenate([x.reshape(-1, 1) if x.ndim < 2 else x for x in arrays], axis=1)


def block_diag(arrays):
    """Returns a matrix with the arrays on its diagonal."""
    arrays = [mx.atleast_2d(x) for x in arrays]
    width, rows, before = sum(x.shape[1] for x in arrays), [], 0
    for x in arrays:
        rows.append(mx.pad(x, [(0, 0), (before, width - before - x.shape[1])]))
        before += x.shape[1]
    return mx.concatenate(rows, axis=0)


def split_sizes(x, sizes, axis):
    """Returns parts of some sizes."""
    if isinstance(sizes, int):
        return mx.split(x, list(range(sizes, x.shape[axis], sizes)), axis=axis)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
    return mx.split(x, ends, axis=axis)


def tensor_split(x, sections, axis=0):
    """Returns parts between indices, or a number of parts of nearly equal sizes."""
    if isinstance(sections, mx.array):
        sections = sections.tolist()
    if isinstance(sections, int):
        size, extra = divmod(x.shape[axis], sections)
        ends = [size * (index + 1) + min(index + 1, extra) for index in range(sections - 1)]
    else:
        ends = list(sections)
    bounds = [0, *ends, x.shape[axis]]
    return [mx.moveaxis(mx.moveaxis(x, axis, 0)[a:b], 0, axis) for a, b in zip(bounds[:-1], bounds[1:])]


def narrow(x, axis, start, length):
    """Returns a part of an axis."""
    return mx.take(x, mx.arange(length) + start % x.shape[axis], axis=axis)


def diagonal_scatter(x, values, offset=0, axis1=0, axis2=1):
    """Returns a copy of x with other values on a diagonal."""
    moved = mx.moveaxis(
        mx.moveaxis(x, (axis1 % x.ndim), -1), (axis2 % x.ndim) - ((axis2 % x.ndim) > (axis1 % x.ndim)), -1
    )
    count = values.shape[-1]
    rows, columns = mx.arange(count) + max(-offset, 0), mx.arange(count) + max(offset, 0)
    moved = put(moved, (..., rows, columns), values)
    back = mx.moveaxis(moved, -1, (axis2 % x.ndim) - ((axis2 % x.ndim) > (axis1 % x.ndim)))
    return mx.moveaxis(back, -1, axis1 % x.ndim)


def unexpand(values, x):
    """Returns the values of an expanded view in the shape of what it views."""
    while values.ndim > x.ndim:
        values = values[0]
    for axis in range(x.ndim):
        if x.shape[axis] == 1 and values.shape[axis] != 1:
            values = mx.take(values, mx.array([0]), axis=axis)
    return values


def pad(x, widths, value=0):
    """Returns x with values around it; a negative width cuts. The widths begin at the last axis, as in PyTorch."""
    for position in range(0, len(widths), 2):
        axis = x.ndim - 1 - position // 2
        before, after = widths[position], widths[position + 1]
        if before < 0 or after < 0:
            x = mx.take(x, mx.arange(max(-before, 0), x.shape[axis] - max(-after, 0)), axis=axis)
        wide = [(0, 0)] * x.ndim
        wide[axis] = (max(before, 0), max(after, 0))
        x = mx.pad(x, wide, constant_values=value)
    return x


def _pad_with(x, widths, index_of):
    for position in range(0, len(widths), 2):
        axis = x.ndim - 1 - position // 2
        before, after = widths[position], widths[position + 1]
        if before or after:
            places = mx.arange(-before, x.shape[axis] + after)
            x = mx.take(x, index_of(places, x.shape[axis]), axis=axis)
    return x


def pad_reflect(x, widths):
    """Returns x with its mirror image around it."""
    return _pad_with(x, widths, lambda places, size: (size - 1) - mx.abs((size - 1) - mx.abs(places)))


def pad_replicate(x, widths):
    """Returns x with its edge around it."""
    return _pad_with(x, widths, lambda places, size: mx.minimum(mx.maximum(places, 0), size - 1))


def pad_circular(x, widths):
    """Returns x with itself around it; a negative width cuts before."""
    if min(widths) < 0:
        x, widths = pad(x, [min(width, 0) for width in widths]), [max(width, 0) for width in widths]
    return _pad_with(x, widths, lambda places, size: (places + size) % size)


def rot90(x, k, axes):
    """Returns x turned by 90 degrees k times."""
    first, second = axes[0] % x.ndim, axes[1] % x.ndim
    for _ in range(k % 4):
        x = mx.take(x.swapaxes(first, second), mx.arange(x.shape[second] - 1, -1, -1), axis=first)
    return x


def diag_embed(x, offset=0, axis1=-2, axis2=-1):
    """Returns matrices with x on a diagonal."""
    size = x.shape[-1] + abs(offset)
    mask = mx.eye(size, k=offset) != 0
    rows = mx.arange(size)
    source = mx.minimum(mx.maximum(rows - max(-offset, 0), 0), x.shape[-1] - 1)
    filled = mx.where(mask, mx.take(x, source, axis=-1)[..., None], mx.array(0, x.dtype))
    ndim = filled.ndim
    axis1, axis2 = axis1 % ndim, axis2 % ndim
    order = list(range(ndim - 2))
    for axis, source_axis in sorted(((axis1, ndim - 2), (axis2, ndim - 1))):
        order.insert(axis, source_axis)
    return filled.transpose(order)


def tril_indices(rows, columns, offset=0):
    """Returns the indices of the lower triangle."""
    pairs = [(row, column) for row in range(rows) for column in range(max(0, min(columns, row + offset + 1)))]
    return mx.array(pairs, mx.int64).reshape(-1, 2).T


def triu_indices(rows, columns, offset=0):
    """Returns the indices of the upper triangle."""
    pairs = [(row, column) for row in range(rows) for column in range(max(0, row + offset), columns)]
    return mx.array(pairs, mx.int64).reshape(-1, 2).T


def cartesian_prod(arrays):
    """Returns all combinations of elements."""
    if len(arrays) == 1:
        return arrays[0]
    grids = mx.meshgrid(*arrays, indexing="ij")
    return mx.stack([grid.flatten() for grid in grids], axis=1)


def unfold(x, axis, size, step):
    """Returns all windows along an axis, in a new last axis."""
    if x.ndim == 0:
        return mx.broadcast_to(x, (size,))
    count = (x.shape[axis] - size) // step + 1
    index = mx.arange(count)[:, None] * step + mx.arange(size)
    windows = mx.take(x, index, axis=axis)
    return mx.moveaxis(windows, axis % x.ndim + 1, -1)


def im2col(x, kernel, dilation, padding, stride):
    """Returns the patches of images [B, C, H, W] as columns [B, C * kh * kw, L]."""
    unbatched = x.ndim == 3
    x = x[None] if unbatched else x
    x = mx.pad(x, [(0, 0), (0, 0), (padding[0], padding[0]), (padding[1], padding[1])])
    rows = (x.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (x.shape[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    down = mx.arange(kernel[0])[:, None] * dilation[0] + mx.arange(rows) * stride[0]
    across = mx.arange(kernel[1])[:, None] * dilation[1] + mx.arange(columns) * stride[1]
    patches = mx.take(mx.take(x, down, axis=2), across, axis=4)  # [B, C, kh, rows, kw, columns]
    patches = patches.transpose(0, 1, 2, 4, 3, 5).reshape(
        x.shape[0], x.shape[1] * kernel[0] * kernel[1], rows * columns
    )
    return patches[0] if unbatched else patches


def col2im(x, size, kernel, dilation, padding, stride):
    """Returns the sums of columns at their places in images; the inverse direction of `im2col`."""
    unbatched = x.ndim == 2
    x = x[None] if unbatched else x
    height, width = size[0] + 2 * padding[0], size[1] + 2 * padding[1]
    rows = (height - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    batch, channels = x.shape[0], x.shape[1] // (kernel[0] * kernel[1])
    patches = x.reshape(batch, channels, kernel[0], kernel[1], rows, columns).transpose(0, 1, 2, 4, 3, 5)
    down = (mx.arange(kernel[0])[:, None] * dilation[0] + mx.arange(rows) * stride[0])[:, :, None, None]
    across = (mx.arange(kernel[1])[:, None] * dilation[1] + mx.arange(columns) * stride[1])[None, None]
    place = (down * width + across).flatten()
    flat = (
        mx.zeros((batch, channels, height * width), x.dtype).at[:, :, place].add(patches.reshape(batch, channels, -1))
    )
    image = flat.reshape(batch, channels, height, width)[
        :, :, padding[0] : height - padding[0], padding[1] : width - padding[1]
    ]
    return image[0] if unbatched else image


def channel_shuffle(x, groups):
    """Returns images with the channels of their groups in turn."""
    size = x.shape[-1]
    return x.reshape(*x.shape[:-1], groups, size // groups).swapaxes(-1, -2).reshape(x.shape)


def arange(start, stop, step, dtype):
    """Returns numbers from start to stop."""
    if mx.issubdtype(dtype, mx.integer):
        return mx.arange(int(start), int(stop), int(step), dtype)
    count = max(math.ceil((stop - start) / step), 0)
    return (mx.arange(count).astype(mx.float32) * step + start).astype(dtype)


def linspace(start, stop, count, dtype):
    """Returns numbers at equal distances, both ends included. Of integers it reads the ends."""
    if mx.issubdtype(dtype, mx.integer):
        return mx.array([int(value) for value in _steps(_integer(start), _integer(stop), count)], dtype)
    if count == 1:
        return mx.broadcast_to(mx.array(start), (1,)).astype(dtype)
    index = mx.arange(count)
    step = (stop - start) / max(count - 1, 1)
    from_start, from_stop = start + index * step, stop - (count - 1 - index) * step
    return mx.where(index < count // 2, from_start, from_stop).astype(dtype)


def _integer(value):
    return int(value.item() if isinstance(value, mx.array) else value)


def _steps(start, stop, count):
    """Returns numbers at equal distances from integers on, counted from the nearer end, each rounded once."""
    step, unit = ((stop - start) / max(count - 1, 1)).as_integer_ratio()
    near = max(count // 2, 1)
    return [
        (start * unit + i * step) / unit if i < near else (stop * unit - (count - 1 - i) * step) / unit
        for i in range(count)
    ]


def logspace(start, stop, count, base, dtype):
    """Returns powers whose exponents have equal distances. Of integers it reads the ends."""
    if mx.issubdtype(dtype, mx.integer):
        steps = _steps(_integer(start), _integer(stop), count)
        return mx.array([int(base**value) for value in steps], dtype)
    return mx.power(mx.array(base, mx.float32), linspace(start, stop, count, mx.float32)).astype(dtype)


def vander(x, size=None, increasing=False):
    """Returns the powers of each element."""
    x = mx.atleast_1d(x)
    size = x.shape[-1] if size is None else size
    powers = [mx.ones_like(x)]
    for _ in range(size - 1):
        powers.append(powers[-1] * x)
    return mx.stack(powers[:size] if increasing else powers[:size][::-1], axis=-1)
