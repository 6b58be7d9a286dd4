"""Decompositions of matrices, which MLX computes on the CPU and without gradients, and what is built on them."""

# The text of these functions is copied into ports, without types.
# mypy: ignore-errors
# ruff: noqa: B905

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.porting.functions.reductions import vector_norm


def inverse(x):
    """Returns the inverse of matrices."""
    if not x.size:
        return x

    @mx.custom_function
    def invert(x):
        return mx.linalg.inv(x, stream=mx.cpu)

    @invert.vjp
    def gradient(x, cotangent, y):
        return -(y.swapaxes(-1, -2) @ cotangent @ y.swapaxes(-1, -2))

    return invert(x)


def cholesky(x, upper=False):
    """Returns the Cholesky factor of matrices."""
    if not x.size:
        return x

    @mx.custom_function
    def factor(x):
        return mx.linalg.cholesky(x, False, stream=mx.cpu)

    @factor.vjp
    def gradient(x, cotangent, y):
        inner = mx.tril(y.swapaxes(-1, -2) @ cotangent)
        inner = inner - mx.eye(x.shape[-1]) * inner / 2
        inverted = mx.linalg.inv(y, stream=mx.cpu)
        whole = inverted.swapaxes(-1, -2) @ inner @ inverted
        return (whole + whole.swapaxes(-1, -2)) / 2

    lower = factor(x)
    return lower.swapaxes(-1, -2) if upper else lower


def cholesky_inverse(factor, upper=False):
    """Returns the inverse of matrices from their Cholesky factor, whose gradient is not that of a triangle."""
    other = mx.tril(factor, -1) if upper else mx.triu(factor, 1)
    inverted = inverse(factor - mx.stop_gradient(other))
    transposed = inverted.swapaxes(-1, -2)
    return inverted @ transposed if upper else transposed @ inverted


def cholesky_solve(b, factor, upper=False):
    """Returns x with a x = b from the Cholesky factor of a."""
    return cholesky_inverse(factor, upper) @ b


def solve(a, b):
    """Returns x with a x = b."""
    if b.ndim == a.ndim - 1 and b.shape == a.shape[:-1]:
        return (inverse(a) @ b[..., None]).squeeze(-1)
    return inverse(a) @ b


def solve_triangular(a, b, upper, left=True, unitriangular=False):
    """Returns x with a x = b, or x a = b, of triangular matrices a."""
    if unitriangular:
        a = mx.triu(a, 1) if upper else mx.tril(a, -1)
        a = a + mx.eye(a.shape[-1])
    else:
        a = mx.triu(a) if upper else mx.tril(a)
    return inverse(a) @ b if left else b @ inverse(a)


def pivots(x):
    """Returns the pivots of Gaussian elimination in the columns, whose product is the determinant."""
    found = []
    size = x.shape[-1] if x.size else 0
    for step in range(size):
        column = mx.abs(mx.stop_gradient(x[..., :, 0]))
        pivot = mx.argmax(column, axis=-1)
        row = mx.take_along_axis(x, mx.broadcast_to(pivot[..., None, None], (*x.shape[:-2], 1, x.shape[-1])), axis=-2)
        value = row[..., 0, 0]
        found.append(value * mx.where(pivot == 0, 1, -1))
        first = x[..., :1, :]
        is_pivot = mx.arange(x.shape[-2])[:, None] == pivot[..., None, None]
        x = mx.where(is_pivot, first, x)[..., 1:, :]
        if step + 1 < size:
            x = x[..., 1:] - x[..., :1] * (row[..., 1:] / mx.where(value == 0, 1, value)[..., None, None])
    return found


def determinant(x):
    """Returns the determinant of matrices."""
    return math.prod(pivots(x), start=mx.ones(x.shape[:-2]))


def sign_and_log_determinant(x):
    """Returns the sign of the determinant of matrices, and the logarithm of its absolute value."""
    found = pivots(x)
    sign = math.prod((mx.sign(mx.stop_gradient(value)) for value in found), start=mx.ones(x.shape[:-2]))
    return sign, sum((mx.log(mx.abs(value)) for value in found), start=mx.zeros(x.shape[:-2]))


def log_determinant(x):
    """Returns the logarithm of the determinant of matrices, NaN if it is negative."""
    sign, size = sign_and_log_determinant(x)
    return mx.where(sign < 0, math.nan, size)


def qr(x):
    """Returns the QR decomposition of matrices, in the reduced form."""
    lead, (rows, columns) = x.shape[:-2], x.shape[-2:]
    count = min(rows, columns)
    if not x.size:
        return mx.zeros((*lead, rows, count)), mx.zeros((*lead, count, columns))

    @mx.custom_function
    def factors(x):
        return mx.linalg.qr(x, stream=mx.cpu)

    @factors.vjp
    def gradient(x, cotangents, outputs):
        (gq, gr), (q, r) = cotangents, outputs
        inner = r @ gr.swapaxes(-1, -2) - gq.swapaxes(-1, -2) @ q
        lower = mx.tril(inner, -1)
        inner = lower + lower.swapaxes(-1, -2) + mx.eye(r.shape[-1]) * inner
        return (gq + q @ inner) @ mx.linalg.inv(r, stream=mx.cpu).swapaxes(-1, -2)

    q, r = factors(x[..., :count])
    if columns > rows:
        r = mx.concatenate([r, q.swapaxes(-1, -2) @ x[..., rows:]], axis=-1)
    return q, r


def svd(x, full=False):
    """Returns the singular value decomposition u, s, vt of matrices."""
    lead, (rows, columns) = x.shape[:-2], x.shape[-2:]
    count = min(rows, columns)
    if not x.size:
        sizes = (rows, columns) if full else (count, count)
        bases = [
            mx.broadcast_to(mx.eye(size, m=part), (*lead, size, part)) for size, part in zip((rows, columns), sizes)
        ]
        return bases[0], mx.zeros((*lead, count)), bases[1].swapaxes(-1, -2)

    @mx.custom_function
    def factors(x):
        return mx.linalg.svd(x, stream=mx.cpu)

    @factors.vjp
    def gradient(x, cotangents, outputs):
        (u, s, vt), (gu, gs, gvt) = outputs, cotangents
        u, gu, vt, gvt = u[..., :count], gu[..., :count], vt[..., :count, :], gvt[..., :count, :]
        squares = mx.square(s)
        gaps = squares[..., None, :] - squares[..., :, None] + mx.eye(count)
        along_u = u.swapaxes(-1, -2) @ gu
        along_v = vt @ gvt.swapaxes(-1, -2)
        along_u, along_v = ((part - part.swapaxes(-1, -2)) / gaps for part in (along_u, along_v))
        inner = along_u * s[..., None, :] + s[..., :, None] * along_v + mx.eye(count) * gs[..., None, :]
        result = u @ inner @ vt
        if x.shape[-2] > count:
            result = result + (gu - u @ (u.swapaxes(-1, -2) @ gu)) / s[..., None, :] @ vt
        if x.shape[-1] > count:
            result = result + u / s[..., None, :] @ (gvt - gvt @ vt.swapaxes(-1, -2) @ vt)
        return result

    u, s, vt = factors(x)
    return (u, s, vt) if full else (u[..., :count], s, vt[..., :count, :])


def svd_with_v(x, full=False):
    """Returns the singular value decomposition u, s, v of matrices."""
    u, s, vt = svd(x, full)
    return u, s, vt.swapaxes(-1, -2)


def singular_values(x):
    """Returns the singular values of matrices, in descending order."""
    if not x.size:
        return mx.zeros((*x.shape[:-2], min(x.shape[-2:])))

    @mx.custom_function
    def values_of(x):
        return mx.linalg.svd(x, compute_uv=False, stream=mx.cpu)

    @values_of.vjp
    def gradient(x, cotangent, y):
        u, _, vt = mx.linalg.svd(x, stream=mx.cpu)
        count = y.shape[-1]
        return (u[..., :, :count] * cotangent[..., None, :]) @ vt[..., :count, :]

    return values_of(x)


def eigh(x, triangle="L"):
    """Returns the eigenvalues, in ascending order, and the eigenvectors of symmetric matrices."""
    if not x.size:
        return mx.zeros(x.shape[:-1]), x

    @mx.custom_function
    def decompose(x):
        return mx.linalg.eigh(x, triangle, stream=mx.cpu)

    @decompose.vjp
    def gradient(x, cotangents, outputs):
        (values, vectors), (gvalues, gvectors) = outputs, cotangents
        eye = mx.eye(x.shape[-1])
        gaps = values[..., None, :] - values[..., :, None] + eye
        transposed = vectors.swapaxes(-1, -2)
        turned = transposed @ gvectors
        inner = (turned - turned.swapaxes(-1, -2)) / (2 * gaps) + eye * gvalues[..., None, :]
        return vectors @ inner @ transposed

    return decompose(x)


def condition(x):
    """Returns the ratio of the largest to the smallest singular value of matrices."""
    values = singular_values(x)
    return values[..., 0] / values[..., -1]


def pseudo_inverse(x, rtol=1e-15, atol=0.0, hermitian=False):
    """Returns the pseudo-inverse of matrices; singular values up to a bound count as 0.

    Of symmetric matrices (hermitian) only the lower triangle is read; the gradient is PyTorch's, that of whole ones.
    """
    if not x.size:
        return mx.zeros((*x.shape[:-2], x.shape[-1], x.shape[-2]))

    @mx.custom_function
    def invert(x):
        whole = mx.tril(x) + mx.tril(x, -1).swapaxes(-1, -2) if hermitian else x
        u, s, vt = mx.linalg.svd(whole, stream=mx.cpu)
        count = s.shape[-1]
        limit = mx.maximum(mx.array(rtol)[..., None] * s[..., :1], mx.array(atol)[..., None])
        reciprocal = mx.where(s > limit, 1 / s, 0)
        return vt[..., :count, :].swapaxes(-1, -2) * reciprocal[..., None, :] @ u[..., :count].swapaxes(-1, -2)

    @invert.vjp
    def gradient(x, cotangent, y):  # Golub and Pereyra, 1973
        yt, gt = y.swapaxes(-1, -2), cotangent.swapaxes(-1, -2)
        outside = gt - x @ (y @ gt)
        inside = gt - gt @ y @ x
        return -(yt @ cotangent @ yt) + outside @ y @ yt + yt @ y @ inside

    return invert(x)


def matrix_exp(x):
    """Returns the exponential of matrices, by scaling, a Taylor polynomial, and squaring."""
    if not x.size:
        return x
    dtype, x = x.dtype, x.astype(mx.float32)
    size = mx.stop_gradient(mx.abs(x)).sum(-2).max(-1)
    squarings = mx.maximum(mx.ceil(mx.log2(mx.maximum(size, 1e-30))) + 2, 0)[..., None, None]  # to a norm of 1/4
    scaled = x * mx.power(mx.array(0.5), squarings)
    result = term = mx.broadcast_to(mx.eye(x.shape[-1]), x.shape)
    for step in range(1, 11):
        term = term @ scaled / step
        result = result + term
    for step in range(32):
        result = mx.where(step < squarings, result @ result, result)
    return mx.where(squarings > 32, math.nan, result).astype(dtype)


def matrix_norm(x, order=None, axes=None, keepdims=False):
    """Returns the norm of matrices, or of all elements."""
    if axes is None and order is None:
        return vector_norm(x, 2, None, keepdims)
    axes = list(range(x.ndim))[-2:] if axes is None else [axes] if isinstance(axes, int) else list(axes)
    if len(axes) == 1 or x.ndim == 1:
        return vector_norm(x, 2 if order is None else order, axes[0], keepdims)
    order = "fro" if order is None else order
    if order == "fro":
        return vector_norm(x, 2, tuple(axes), keepdims)
    rows, columns = (axis % x.ndim for axis in axes)
    if not x.shape[rows] * x.shape[columns]:
        shape = [1 if axis in (rows, columns) else size for axis, size in enumerate(x.shape)]
        return mx.zeros(shape) if keepdims else mx.zeros(shape).squeeze((rows, columns))
    if order in (1, -1, math.inf, -math.inf):
        along, over = (rows, columns) if order in (1, -1) else (columns, rows)
        sums = mx.abs(x).sum(along, keepdims=True)
        result = sums.max(over, keepdims=True) if order in (1, math.inf) else sums.min(over, keepdims=True)
        return result if keepdims else result.squeeze((rows, columns))
    moved = mx.moveaxis(mx.moveaxis(x, rows, -1), columns - (columns > rows), -1)
    values = singular_values(moved)
    result = values.sum(-1) if order == "nuc" else values.max(-1) if order == 2 else values.min(-1)
    return mx.expand_dims(result, sorted((rows, columns))) if keepdims else result
