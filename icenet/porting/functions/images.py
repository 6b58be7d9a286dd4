"""Images with their channels last: convolutions, pools, resizes."""

# The text of these functions is copied into ports, without types.
# mypy: ignore-errors
# ruff: noqa: B905

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn


def grouped_conv3d(x, weight, groups, **options):
    """Returns a convolution of volumes by groups of channels."""
    parts = zip(mx.split(x, groups, axis=-1), mx.split(weight, groups, axis=0))
    return mx.concatenate([mx.conv3d(a, w, **options) for a, w in parts], axis=-1)


def conv_transpose(x, weight, rank, groups=1, stride=1, padding=0, dilation=1, output_padding=0):
    """Returns a transposed convolution; the weight has PyTorch's axes [in, out, ...].

    MLX has no groups here, and other shapes if the padding is larger than the kernel, or in the gradient if the
    output padding is larger than the padding: the borders are cut afterwards.
    """
    function = getattr(mx, f"conv_transpose{rank}d")
    axes = (1, *range(2, 2 + rank), 0)
    parts = zip(mx.split(x, groups, axis=-1), mx.split(weight, groups, axis=0))
    y = mx.concatenate([function(a, w.transpose(axes), stride, 0, dilation) for a, w in parts], axis=-1)
    cuts, widths = [slice(None)], [(0, 0)]
    for size, before, more in zip(y.shape[1:-1], _each(padding, rank), _each(output_padding, rank)):
        cuts.append(slice(before, min(size - before + more, size)))
        widths.append((0, max(more - before, 0)))
    return mx.pad(y[tuple(cuts)], [*widths, (0, 0)])


def _windows(x, rank, kernel, stride, padding, dilation, ceil_mode, value):
    """Returns the windows [B, *out, C, *kernel] of images, which are padded with a value."""
    sizes = []
    widths = [(0, 0)]
    for axis in range(rank):
        length = x.shape[1 + axis]
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        span = length + 2 * padding[axis] - reach
        count = span // stride[axis] + 1
        if ceil_mode:
            count = -(-span // stride[axis]) + 1
            if (count - 1) * stride[axis] >= length + padding[
                axis
            ]:  # a window begins within the image or its left padding
                count -= 1
        needed = (count - 1) * stride[axis] + reach
        widths.append((padding[axis], max(needed - length - padding[axis], 0)))
        sizes.append(count)
    x = mx.pad(x, [*widths, (0, 0)], constant_values=value)
    for axis in range(rank):
        index = mx.arange(sizes[axis])[:, None] * stride[axis] + mx.arange(kernel[axis]) * dilation[axis]
        x = mx.moveaxis(mx.take(x, index, axis=1 + axis), 2 + axis, -1)
    return x


def _each(value, rank):
    return [value] * rank if isinstance(value, int) else list(value)


def max_pool(x, rank, kernel, stride=None, padding=0, dilation=1, ceil_mode=False):
    """Returns the maximum of each window; of equal maxima each gets a part of the gradient."""
    stride = kernel if stride is None else stride
    if dilation == 1 and not ceil_mode:
        return getattr(nn, f"MaxPool{rank}d")(kernel, stride, padding)(x)
    given = (_each(value, rank) for value in (kernel, stride, padding, dilation))
    windows = _windows(x, rank, *given, ceil_mode, -math.inf)
    return windows.max(tuple(range(windows.ndim - rank, windows.ndim)))


def max_pool_with_indices(x, rank, kernel, stride, padding=0, dilation=1, ceil_mode=False):
    """Returns the maximum of each window and its place in the flattened image."""
    kernel, stride, padding, dilation = (_each(value, rank) for value in (kernel, stride, padding, dilation))
    place = mx.arange(math.prod(x.shape[1:-1])).reshape(1, *x.shape[1:-1], 1)
    values = _windows(x, rank, kernel, stride, padding, dilation, ceil_mode, -math.inf)
    places = _windows(place, rank, kernel, stride, padding, dilation, ceil_mode, 0)
    flat = values.reshape(*values.shape[: rank + 2], -1)
    index = mx.argmax(mx.stop_gradient(flat), axis=-1, keepdims=True)
    places = mx.broadcast_to(places.reshape(*places.shape[: rank + 2], -1), flat.shape)
    return tuple(mx.take_along_axis(part, index, axis=-1).squeeze(-1) for part in (flat, places.astype(mx.int64)))


def avg_pool(x, rank, kernel, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor=None):
    """Returns the mean of each window."""
    stride = kernel if stride is None else stride
    if not ceil_mode and divisor is None and (count_include_pad or padding == 0):
        return getattr(nn, f"AvgPool{rank}d")(kernel, stride, padding)(x)
    kernel, stride, padding = (_each(value, rank) for value in (kernel, stride, padding))
    ones = [1] * rank
    sums = _windows(x, rank, kernel, stride, padding, ones, ceil_mode, 0)
    axes = tuple(range(sums.ndim - rank, sums.ndim))
    total = sums.sum(axes)
    if divisor is not None:
        return total / divisor
    counted = mx.ones((1, *x.shape[1:-1], 1))
    if count_include_pad:  # what ceil_mode adds at the right does not count
        counted = mx.pad(counted, [(0, 0), *((size, size) for size in padding), (0, 0)], constant_values=1)
        padding = [0] * rank
    count = _windows(counted, rank, kernel, stride, padding, ones, ceil_mode, 0).sum(axes)
    return total / count


def adaptive_avg_pool(x, sizes):
    """Returns images of given sizes: means of windows that cover the image."""
    for axis, size in enumerate(sizes, 1):
        length = x.shape[axis]
        if size is None or size == length:
            continue
        if length % size == 0:
            x = x.reshape(*x.shape[:axis], size, length // size, *x.shape[axis + 1 :]).mean(axis + 1)
            continue
        rows = mx.arange(size)
        start, stop = rows * length // size, ((rows + 1) * length + size - 1) // size
        place = mx.arange(length)
        inside = ((place >= start[:, None]) & (place < stop[:, None])).astype(x.dtype)
        weights = inside / inside.sum(1, keepdims=True)  # [size, length]
        x = mx.moveaxis(mx.moveaxis(x, axis, -1) @ weights.T, -1, axis)
    return x


def global_max_pool(x):
    """Returns the maxima of whole images, and their places. A gradient goes to the first of equal ones."""
    flat = x.flatten(1, -2)
    place = mx.argmax(mx.stop_gradient(flat), axis=1, keepdims=True)
    shape = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
    return mx.take_along_axis(flat, place, axis=1).reshape(shape), place.reshape(shape).astype(mx.int64)


def adaptive_max_pool(x, sizes):
    """Returns images of given sizes: maxima of windows that cover the image, and their places."""
    rank = x.ndim - 2
    place = mx.broadcast_to(mx.arange(math.prod(x.shape[1:-1])).reshape(1, *x.shape[1:-1], 1), x.shape)
    for axis, size in enumerate(sizes, 1):
        length = x.shape[axis]
        size = length if size is None else size
        values, places = [], []
        for row in range(size):
            start, stop = row * length // size, -(-(row + 1) * length // size)
            part = mx.take(x, mx.arange(start, stop), axis=axis)
            index = mx.argmax(mx.stop_gradient(part), axis=axis, keepdims=True)
            values.append(mx.take_along_axis(part, index, axis=axis))
            places.append(mx.take_along_axis(mx.take(place, mx.arange(start, stop), axis=axis), index, axis=axis))
        x, place = mx.concatenate(values, axis=axis), mx.concatenate(places, axis=axis)
    assert rank > 0
    return x, place.astype(mx.int64)


def max_unpool(x, index, sizes):
    """Returns images [..., *sizes] with values at places of the flattened images, and 0 elsewhere."""
    lead = x.shape[: x.ndim - len(sizes)]
    flat = mx.zeros((*lead, math.prod(sizes)), x.dtype)
    values, index = x.reshape(*lead, -1), index.reshape(*lead, -1)
    return mx.put_along_axis(flat, index, values, axis=-1).reshape(*lead, *sizes)


def max_pool_backward(cotangent, index, sizes):
    """Returns the gradient of images [..., *sizes] from that of their maxima at places of the flattened images."""
    lead = cotangent.shape[: cotangent.ndim - len(sizes)]
    count = math.prod(sizes)
    flat, index = (part.reshape(math.prod(lead), -1) for part in (cotangent, index))
    start = mx.arange(flat.shape[0])[:, None] * count
    return mx.zeros((flat.shape[0] * count,)).at[index + start].add(flat).reshape(*lead, *sizes)


def fractional_max_pool(x, kernel, sizes, samples):
    """Returns the maxima of windows at random places, and their places (Graham, 2014); channels are first.

    Samples [B, C, axes] are between 0 and 1; those of two axes are of the last axis first.
    """
    rank = len(sizes)
    unbatched = x.ndim == rank + 1
    x = x[None] if unbatched else x
    if not x.size:
        return mx.zeros((*x.shape[:2], *sizes), x.dtype), mx.zeros((*x.shape[:2], *sizes), mx.int64)
    lengths = x.shape[2:]
    values, places = x, mx.broadcast_to(mx.arange(math.prod(lengths)).reshape(lengths), x.shape)
    for axis in range(rank):
        sample = samples[..., axis if rank == 3 else rank - 1 - axis][..., None]  # [B, C, 1]
        step = (lengths[axis] - kernel[axis]) / (sizes[axis] - 1) if sizes[axis] > 1 else 0
        row = mx.arange(sizes[axis])
        start = mx.floor((row + sample) * step) - mx.floor(sample * step)
        start = mx.where(row == sizes[axis] - 1, lengths[axis] - kernel[axis], start).astype(mx.int32)
        index = start[..., None] + mx.arange(kernel[axis])  # [B, C, size, kernel]
        flat = index.reshape(*index.shape[:2], sizes[axis] * kernel[axis], *[1] * (rank - 1))
        parts = []
        for part in (values, places):
            part = mx.moveaxis(part, 2 + axis, 2)
            wide = mx.broadcast_to(flat, (*part.shape[:2], flat.shape[2], *part.shape[3:]))
            part = mx.take_along_axis(part, wide, axis=2)
            parts.append(part.reshape(*part.shape[:2], sizes[axis], kernel[axis], *part.shape[3:]))
        best = mx.argmax(mx.stop_gradient(parts[0]), axis=3, keepdims=True)
        values, places = (
            mx.moveaxis(mx.take_along_axis(part, best, axis=3).squeeze(3), 2, 2 + axis) for part in parts
        )
    places = places.astype(mx.int64)
    return (values[0], places[0]) if unbatched else (values, places)


def _scale(length, size, scale, align_corners):
    if align_corners:
        return (length - 1) / (size - 1) if size > 1 else 0.0
    return 1 / scale if scale is not None else length / size


def _sizes(x, size, scales):
    if size is None:
        size = [int(length * scale) for length, scale in zip(x.shape[1:-1], scales)]
    return size, scales if scales is not None else [None] * len(size)


def upsample_nearest(x, size=None, scales=None, align_corners=False):
    """Returns images of another size: the nearest element, rounded down."""
    size, scales = _sizes(x, size, scales)
    for axis, (count, scale) in enumerate(zip(size, scales), 1):
        length = x.shape[axis]
        if count % length == 0 and (scale is None or scale == count / length):
            x = mx.repeat(x, count // length, axis=axis) if count != length else x
        else:
            index = mx.floor(mx.arange(count).astype(mx.float32) * _scale(length, count, scale, False)).astype(
                mx.int32
            )
            x = mx.take(x, mx.minimum(index, length - 1), axis=axis)
    return x


def upsample_nearest_exact(x, size=None, scales=None, align_corners=False):
    """Returns images of another size: the nearest element."""
    size, scales = _sizes(x, size, scales)
    for axis, (count, scale) in enumerate(zip(size, scales), 1):
        length = x.shape[axis]
        place = (mx.arange(count).astype(mx.float32) + 0.5) * _scale(length, count, scale, False)
        x = mx.take(x, mx.minimum(mx.floor(place).astype(mx.int32), length - 1), axis=axis)
    return x


def _places(length, count, scale, align_corners):
    index = mx.arange(count).astype(mx.float32)
    factor = _scale(length, count, scale, align_corners)
    return index * factor if align_corners else (index + 0.5) * factor - 0.5


def upsample_linear(x, size=None, scales=None, align_corners=False):
    """Returns images of another size by linear interpolation along each axis."""
    size, scales = _sizes(x, size, scales)
    for axis, (count, scale) in enumerate(zip(size, scales), 1):
        length = x.shape[axis]
        if count == length and (scale is None or scale == 1):
            continue
        place = mx.maximum(_places(length, count, scale, align_corners), 0)
        low = mx.minimum(mx.floor(place).astype(mx.int32), length - 1)
        high = mx.minimum(low + 1, length - 1)
        weight = mx.minimum(mx.maximum(place - low, 0), 1).reshape([-1] + [1] * (x.ndim - 1 - axis)).astype(x.dtype)
        x = mx.take(x, low, axis=axis) * (1 - weight) + mx.take(x, high, axis=axis) * weight
    return x


def _cubic(t, a=-0.75):
    t = mx.abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return mx.where(t <= 1, near, mx.where(t < 2, far, 0))


def upsample_cubic(x, size=None, scales=None, align_corners=False):
    """Returns images of another size by cubic interpolation (Keys, 1981, with a = -0.75)."""
    size, scales = _sizes(x, size, scales)
    for axis, (count, scale) in enumerate(zip(size, scales), 1):
        length = x.shape[axis]
        place = _places(length, count, scale, align_corners)
        low = mx.floor(place)
        total = 0
        for offset in (-1, 0, 1, 2):
            index = mx.minimum(mx.maximum(low + offset, 0), length - 1).astype(mx.int32)
            weight = _cubic(place - low - offset).reshape([-1] + [1] * (x.ndim - 1 - axis))
            total = total + mx.take(x, index, axis=axis) * weight.astype(x.dtype)
        x = total
    return x


def upsample_antialias(x, size, scales, mode, align_corners=False):
    """Returns images of another size, with a filter as wide as the step."""
    size, scales = _sizes(x, size, scales)
    for axis, (count, scale) in enumerate(zip(size, scales), 1):
        length = x.shape[axis]
        factor = _scale(length, count, scale, align_corners)
        width = max(factor, 1.0)
        center = factor * (mx.arange(count).astype(mx.float32) + 0.5)
        support = (2 if mode == "cubic" else 1) * width
        low = mx.maximum(mx.floor(center - support + 0.5), 0)
        high = mx.minimum(mx.floor(center + support + 0.5), length)
        place = mx.arange(length).astype(mx.float32)
        distance = (place - center[:, None] + 0.5) / width
        weights = _cubic(distance, -0.5) if mode == "cubic" else mx.maximum(1 - mx.abs(distance), 0)
        weights = mx.where((place >= low[:, None]) & (place < high[:, None]), weights, 0)
        weights = (weights / weights.sum(1, keepdims=True)).astype(x.dtype)
        x = mx.moveaxis(mx.moveaxis(x, axis, -1) @ weights.T, -1, axis)
    return x


def pixel_shuffle(x, factor):
    """Returns images [..., H*r, W*r, C] from [..., H, W, C*r*r] (Shi et al., 2016)."""
    *before, height, width, channels = x.shape
    x = x.reshape(*before, height, width, channels // factor**2, factor, factor)
    x = mx.moveaxis(mx.moveaxis(x, -2, -4), -1, -2)  # [..., H, r, W, r, C]
    return x.reshape(*before, height * factor, width * factor, channels // factor**2)


def pixel_unshuffle(x, factor):
    """Returns images [..., H, W, C*r*r] from [..., H*r, W*r, C]."""
    *before, height, width, channels = x.shape
    x = x.reshape(*before, height // factor, factor, width // factor, factor, channels)
    x = mx.moveaxis(mx.moveaxis(x, -2, -1), -4, -2)  # [..., H, W, C, r, r]
    return x.reshape(*before, height // factor, width // factor, channels * factor**2)


def grid_sample(x, grid, mode=0, padding=0, align_corners=False):
    """Returns images sampled at the places [B, ..., rank] of a grid in [-1, 1]; mode 0 linear, 1 nearest, 2 cubic."""
    rank = grid.shape[-1]
    sizes = x.shape[1:-1]
    places = []
    for axis in range(rank):
        size = sizes[rank - 1 - axis]
        place = grid[..., axis]
        place = (place + 1) / 2 * (size - 1) if align_corners else ((place + 1) * size - 1) / 2
        places.append(_reflected(place, size, padding, align_corners) if mode != 2 else place)
    places = places[::-1]  # [B, ...] along each axis of the image

    def read(indices):
        inside = mx.array(True)
        flat = 0
        for axis, index in enumerate(indices):
            size = sizes[axis]
            if mode == 2:
                index = _reflected(index, size, padding, align_corners)
            within = (index >= 0) & (index <= size - 1)  # not if it is NaN, which is no index
            inside = inside & within
            flat = flat * size + mx.stop_gradient(mx.where(within, index, 0)).astype(mx.int32)
        images = x.reshape(x.shape[0], -1, x.shape[-1])
        rows = mx.arange(x.shape[0]).reshape([-1] + [1] * (flat.ndim - 1))
        return mx.where(inside[..., None], images[rows, flat], 0)

    if mode == 1:
        return read([mx.round(place) for place in places])
    lows = [mx.floor(place) for place in places]
    offsets = (-1, 0, 1, 2) if mode == 2 else (0, 1)
    total = 0
    for number in range(len(offsets) ** rank):
        weight, indices, rest = 1, [], number
        for place, low in zip(places, lows):
            rest, which = divmod(rest, len(offsets))
            offset = offsets[which]
            distance = place - low - offset
            linear = 1 + distance if offset else 1 - distance  # not |distance|, whose gradient at 0 is 0
            weight = weight * (_cubic(distance) if mode == 2 else linear)
            indices.append(low + offset)
        total = total + read(indices) * weight[..., None]
    return total


def _reflected(place, size, padding, align_corners):
    if padding == 2:
        low, high = (0, 2 * (size - 1)) if align_corners else (-1, 2 * size - 1)
        low, span = low / 2, (high - low) / 2
        if span == 0:
            return mx.zeros_like(place)
        distance = mx.abs(place - low)
        extra = mx.remainder(distance, span)
        flips = mx.floor(distance / span)
        place = mx.where(flips % 2 == 0, extra + low, span - extra + low)
    if padding in (1, 2):
        place = mx.minimum(mx.maximum(place, 0), size - 1)
    return place


def affine_grid(theta, size, align_corners=False):
    """Returns the grid of an affine map for `grid_sample`."""
    axes = []
    for length in reversed(size[2:]):
        steps = mx.arange(length).astype(mx.float32)
        axes.append(
            steps / max(length - 1, 1) * 2 - 1
            if align_corners and length > 1
            else ((2 * steps + 1) / length - 1 if not align_corners else mx.zeros((length,)))
        )
    grids = mx.meshgrid(*axes[::-1], indexing="ij")[::-1]
    base = mx.stack([*grids, mx.ones_like(grids[0])], axis=-1)
    flat = base.reshape(-1, base.shape[-1]) @ theta.swapaxes(-1, -2)
    return flat.reshape(theta.shape[0], *size[2:], len(size) - 2)
