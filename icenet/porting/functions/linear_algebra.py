"""Products, attention and Fourier transforms."""

# The text of these functions is copied into ports, without types.
# mypy: ignore-errors
# ruff: noqa: B905

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.porting.functions.decompositions import inverse
from icenet.porting.functions.shapes import pad, pad_reflect, unfold


def integer_matmul(a, b):
    """Returns the product of integer matrices, which MLX multiplies in floating point only."""
    if a.ndim == 1 and b.ndim == 1:
        return (a * b).sum()
    if b.ndim == 1:
        return (a * b).sum(-1)
    if a.ndim == 1:
        return (a[:, None] * b).sum(-2)
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def inner(a, b):
    """Returns the products of the last axes."""
    if a.ndim == 0 or b.ndim == 0:
        return a * b
    if not mx.issubdtype(a.dtype, mx.inexact):
        return (a.reshape(*a.shape[:-1], *[1] * (b.ndim - 1), a.shape[-1]) * b).sum(-1)
    return mx.tensordot(a, b, ([-1], [-1]))


def tensordot(a, b, axes_a, axes_b):
    """Returns the sums of products over axes; an axis of size 1 is repeated."""
    for i, j in zip(axes_a, axes_b):
        if a.shape[i] == 1:
            b = b.sum(j, keepdims=True)
        elif b.shape[j] == 1:
            a = a.sum(i, keepdims=True)
    return mx.tensordot(a, b, (axes_a, axes_b))


def cross(a, b, axis=-1):
    """Returns the cross product of vectors with 3 components."""
    axis = next(index for index, size in enumerate(a.shape) if size == 3) if axis is None else axis
    a, b = mx.broadcast_arrays(a, b)
    a1, a2, a3 = (x.squeeze(axis) for x in mx.split(a, 3, axis=axis))
    b1, b2, b3 = (x.squeeze(axis) for x in mx.split(b, 3, axis=axis))
    return mx.stack([a2 * b3 - a3 * b2, a3 * b1 - a1 * b3, a1 * b2 - a2 * b1], axis=axis)


def bilinear(a, b, weight, bias=None):
    """Returns a W b of each output."""
    y = mx.einsum("...i,oij,...j->...o", a, weight, b)
    return y if bias is None else y + bias


def matrix_power(x, n):
    """Returns the n-th power of matrices."""
    if n < 0:
        x, n = inverse(x), -n
    result = mx.broadcast_to(mx.eye(x.shape[-1], dtype=x.dtype), x.shape)
    for _ in range(n):
        result = result @ x
    return result


def attention(q, k, v, mask=None, causal=False, scale=None, dropout=0.0, grouped=False):
    """Returns the attention of queries [..., T, D] to keys and values [..., S, D]; a masked row is 0."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if grouped and k.shape[-3] != 1:  # heads that share keys
        k = mx.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
        v = mx.repeat(v, q.shape[-3] // v.shape[-3], axis=-3)
    scores = (q * scale) @ k.swapaxes(-1, -2)
    if causal:
        mask = mx.tril(mx.ones(scores.shape[-2:], mx.int32)).astype(mx.bool_)
    if mask is None:
        weights = mx.softmax(scores, axis=-1, precise=True)
    elif mask.dtype == mx.bool_:
        empty = ~mask.any(-1, keepdims=True)
        weights = mx.softmax(mx.where(mask | empty, scores, -math.inf), axis=-1, precise=True)
        weights = mx.where(empty, 0, weights)
    else:
        scores = scores + mask
        empty = (scores == -math.inf).all(-1, keepdims=True)
        weights = mx.where(empty, 0, mx.softmax(mx.where(empty, 0, scores), axis=-1, precise=True))
    if dropout:
        weights = mx.where(mx.random.bernoulli(1 - dropout, weights.shape), weights / (1 - dropout), 0)
    return weights @ v


def masked_attention(q, k, v, mask, scale):
    """Returns the attention of queries [B, H, T, D] with a mask of booleans; a masked row is 0."""
    empty = ~mask.any(-1, keepdims=True)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask | empty)
    return mx.where(empty, 0, y)


def biased_attention(q, k, v, mask, scale):
    """Returns the attention of queries [B, H, T, D] with a mask that is added to the scores; a row of -inf is 0."""
    if mask is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    empty = (mask == -math.inf).all(-1, keepdims=True)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mx.where(empty, 0, mask))
    return mx.where(empty, 0, y)


def fft(name, x, size=None, axes=None, norm="backward"):
    """Returns a Fourier transform with the scale of a norm."""
    if name == "irfft" or name.startswith("irfft"):
        x = x.astype(mx.complex64)
    elif name.startswith("rfft"):
        x = x.astype(mx.float32)
    else:
        x = x.astype(mx.complex64)
    transform = getattr(mx.fft, name)
    if name in ("fft", "ifft", "rfft", "irfft"):
        axis = -1 if axes is None else axes
        y = transform(x, size, axis)
        count = (y.shape[axis] if name == "irfft" else x.shape[axis]) if size is None else size
    else:
        if axes is None:
            axes = (
                [-2, -1]
                if name.endswith("2")
                else list(range(x.ndim))
                if size is None
                else list(range(-len(size), 0))
            )
        full = [x.shape[axis] for axis in axes] if size is None else list(size)
        if size is None and name.startswith("irfft"):
            full[-1] = 2 * (full[-1] - 1)
        full = [x.shape[axis] if wanted == -1 else wanted for wanted, axis in zip(full, axes)]
        y = getattr(mx.fft, name.replace("2", "n"))(x, full, axes)
        count = math.prod(full)
    forward = "i" not in name
    if norm == "ortho":
        return y * (count**-0.5 if forward else count**0.5)
    if norm == "forward":
        return y / count if forward else y * count
    return y


def hfft(name, x, size=None, axes=None, norm="backward"):
    """Returns the Fourier transform of a signal that is symmetric in time, or its inverse (ihfft)."""
    other = {"backward": "forward", "forward": "backward"}.get(norm, norm)
    if name.startswith("i"):
        return mx.conj(fft(f"r{name[2:]}", x, size, axes, other))
    return fft(f"ir{name[1:]}", mx.conj(x), size, axes, other)


def fftfreq(n, d=1.0):
    """Returns the frequencies of a Fourier transform."""
    index = mx.arange(n)
    return mx.where(index < (n + 1) // 2, index, index - n).astype(mx.float32) / (n * d)


def rfftfreq(n, d=1.0):
    """Returns the frequencies of a real Fourier transform."""
    return mx.arange(n // 2 + 1).astype(mx.float32) / (n * d)


def stft(
    x,
    n_fft,
    hop=None,
    length=None,
    window=None,
    normalized=False,
    onesided=None,
    return_complex=None,
    center=False,
    pad_mode="reflect",
):
    """Returns the short-time Fourier transform [..., frequencies, frames]."""
    hop = n_fft // 4 if hop is None else hop
    length = n_fft if length is None else length
    window = mx.ones((length,)) if window is None else window
    left = (n_fft - length) // 2
    window = mx.pad(window, [(left, n_fft - length - left)])
    if center:
        widths = [n_fft // 2, n_fft // 2]
        x = pad_reflect(x, widths) if pad_mode == "reflect" else pad(x, widths)
    frames = unfold(x, -1, n_fft, hop) * window
    onesided = not mx.issubdtype(x.dtype, mx.complexfloating) if onesided is None else onesided
    y = mx.fft.rfft(frames) if onesided else mx.fft.fft(frames)
    y = y.swapaxes(-1, -2)
    y = y * n_fft**-0.5 if normalized else y
    return y if return_complex else mx.stack([mx.real(y), mx.imag(y)], axis=-1)


def istft(x, n_fft, hop, length, window, center, normalized, onesided, size, return_complex):
    """Returns the signal of a short-time Fourier transform [..., frequencies, frames]; None keeps its size."""
    window = mx.ones((length,)) if window is None else window
    left = (n_fft - length) // 2
    window = mx.pad(window, [(left, n_fft - length - left)])
    x = x.swapaxes(-1, -2) * n_fft**0.5 if normalized else x.swapaxes(-1, -2)
    if not onesided and not return_complex:
        x = x[..., : n_fft // 2 + 1]
    frames = mx.fft.ifft(x) if return_complex else mx.fft.irfft(x, n_fft)
    frames = frames * window  # [..., frames, n_fft]
    count = frames.shape[-2]
    total, start = n_fft + hop * (count - 1), n_fft // 2 if center else 0
    places = mx.arange(count)[:, None] * hop + mx.arange(n_fft)
    y = mx.zeros((*frames.shape[:-2], total), frames.dtype).at[..., places].add(frames)
    weight = mx.zeros((total,)).at[places].add(mx.broadcast_to(window * window, places.shape))
    end = total - start if size is None else min(start + size, total)
    y = y[..., start:end] / weight[start:end]
    if size is None:
        return y
    return mx.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, size - y.shape[-1])])


def grouped_mm(x, weights, ends):
    """Returns the products of the rows of x [rows, in] and the matrix of their group; `ends` has their last rows."""
    row = mx.arange(x.shape[0])
    group = (row[:, None] >= ends).sum(-1)
    inside = group < weights.shape[0]
    y = mx.gather_mm(x[:, None], weights, rhs_indices=mx.minimum(group, weights.shape[0] - 1))[:, 0]
    return mx.where(inside[:, None], y, 0)
