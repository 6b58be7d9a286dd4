"""LU factors, Householder reflections, least squares, and systems of tensors."""

# The text of these functions is copied into ports, without types.
# mypy: ignore-errors

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.porting.functions.decompositions import (
    eigh,
    inverse,
    pseudo_inverse,
    singular_values,
    solve,
    solve_triangular,
)


def lu_factor(x):
    """Returns the factors L below the diagonal and U in one matrix, and the row, from 1, swapped with each row."""
    rows, columns = x.shape[-2:]
    count = min(rows, columns)
    if not x.size:
        return x, mx.ones((*x.shape[:-2], count), mx.int32)

    @mx.custom_function
    def factor(x):
        factors, pivots = mx.linalg.lu_factor(x, stream=mx.cpu)
        return factors, pivots.astype(mx.int32) + 1

    @factor.vjp
    def gradient(x, cotangents, outputs):
        (g, _), (y, pivots) = cotangents, outputs
        corner = y[..., :count, :count]
        lower = mx.tril(corner, -1) + mx.eye(count)
        in_lower = mx.tril(lower.swapaxes(-1, -2) @ mx.tril(g[..., :count, :count], -1), -1)
        in_upper = mx.triu(mx.triu(g[..., :count, :count]) @ mx.triu(corner).swapaxes(-1, -2))
        right, below = y[..., :count, count:], y[..., count:, :count]
        in_lower = in_lower - mx.tril(g[..., :count, count:] @ right.swapaxes(-1, -2), -1)
        in_upper = in_upper - mx.triu(below.swapaxes(-1, -2) @ g[..., count:, :count])
        left, up = (mx.linalg.inv(part, stream=mx.cpu).swapaxes(-1, -2) for part in (lower, mx.triu(corner)))
        inner = left @ (in_lower + in_upper) @ up
        inner = mx.concatenate([inner, left @ g[..., :count, count:]], axis=-1)
        inner = mx.concatenate([inner, mx.pad(g[..., count:, :count] @ up, _wider(x.ndim, columns - count))], axis=-2)
        return permutation(pivots, rows) @ inner

    return factor(x)


def _wider(ndim, count):
    return [(0, 0)] * (ndim - 1) + [(0, count)]


def permutation(pivots, rows):
    """Returns matrices P with A = P L U from the rows that were swapped."""
    pivots, index = mx.stop_gradient(pivots), mx.arange(rows)
    order = mx.broadcast_to(index, (*pivots.shape[:-1], rows))
    for step in range(pivots.shape[-1]):
        other = pivots[..., step : step + 1] - 1
        moved = mx.where(index == step, other, mx.where(index == other, step, index))
        order = mx.take_along_axis(order, moved, axis=-1)
    return (index[:, None] == order[..., None, :]).astype(mx.float32)


def lu_unpack(factors, pivots, unpack_data=True, unpack_pivots=True):
    """Returns P, L and U with A = P L U; what is not wanted is empty."""
    rows, columns = factors.shape[-2:]
    count = min(rows, columns)
    p = permutation(pivots, rows) if unpack_pivots else mx.zeros((0,))
    if not unpack_data:
        return p, mx.zeros((0,)), mx.zeros((0,))
    lower = mx.tril(factors[..., :count], -1) + mx.eye(rows, count)
    return p, lower, mx.triu(factors[..., :count, :])


def lu(x):
    """Returns P, L and U with A = P L U."""
    return lu_unpack(*lu_factor(x))


def lu_solve(factors, pivots, b, left=True, transposed=False):
    """Returns x with a x = b, or x a = b, from the LU factors of a, or of its transpose."""
    if not left:
        return lu_solve(factors, pivots, b.swapaxes(-1, -2), True, not transposed).swapaxes(-1, -2)
    p = permutation(pivots, factors.shape[-1])
    if transposed:
        turned = factors.swapaxes(-1, -2)
        return p @ solve_triangular(turned, solve_triangular(turned, b, False), True, True, True)
    return solve_triangular(factors, solve_triangular(factors, p.swapaxes(-1, -2) @ b, False, True, True), True)


def reflect(vectors, scales, x, left=True, transposed=False):
    """Returns Q x, or x Q, of the product Q of Householder reflections, whose vectors are below the diagonal."""
    if not left:
        return reflect(vectors, scales, x.swapaxes(-1, -2), True, not transposed).swapaxes(-1, -2)
    steps = range(scales.shape[-1])
    for step in steps if transposed else reversed(steps):
        index = mx.arange(vectors.shape[-2])[:, None]
        v = mx.where(index > step, vectors[..., step : step + 1], (index == step).astype(x.dtype))
        x = x - scales[..., step, None, None] * v * (v * x).sum(-2, keepdims=True)
    return x


def householder_product(vectors, scales):
    """Returns the first columns of the product of Householder reflections."""
    return reflect(vectors, scales, mx.eye(*vectors.shape[-2:]))


def matrix_rank(x, atol=None, rtol=None, hermitian=False):
    """Returns the number of singular values above the larger one of a bound and a part of the largest one."""
    if not x.size:
        return mx.zeros(x.shape[:-2], mx.int64)
    x = mx.stop_gradient(x)
    values = mx.abs(eigh(x)[0]) if hermitian else singular_values(x)
    default = max(x.shape[-2:]) * 2.0**-23
    if rtol is None:
        rtol = default if atol is None else mx.where(mx.array(atol) > 0, 0.0, default)
    part = mx.array(rtol) * values.max(-1)
    limit = part if atol is None else mx.maximum(part, mx.array(atol))
    return (values > limit[..., None]).sum(-1).astype(mx.int64)


def least_squares(a, b, rcond=None, residuals=False, rank=False, values=False):
    """Returns x with the smallest |a x - b|, the sums of the squares of a x - b, the rank and the singular values.

    Of the last three those that are not wanted are empty.
    """
    if b.ndim == a.ndim - 1 and b.shape == a.shape[:-1]:
        x, *rest = least_squares(a, b[..., None], rcond, residuals, rank, values)
        return x.squeeze(-1), *rest
    rcond = max(a.shape[-2:]) * 2.0**-23 if rcond is None else rcond
    x = pseudo_inverse(a, rcond) @ b
    return (
        x,
        mx.square(a @ x - b).sum(-2) if residuals else mx.zeros((0,)),
        matrix_rank(a, None, rcond) if rank else mx.zeros((0,), mx.int64),
        singular_values(a) if values else mx.zeros((0,)),
    )


def tensor_inverse(x, count):
    """Returns the inverse of the linear map from the last axes to the first ones."""
    size = math.prod(x.shape[:count])
    return inverse(x.reshape(size, size)).reshape(*x.shape[count:], *x.shape[:count])


def tensor_solve(a, b, axes=None):
    """Returns x with tensordot(a, x, x.ndim) = b; some axes of a are moved to the end before."""
    if axes is not None:
        a = a.transpose(*[axis for axis in range(a.ndim) if axis not in axes], *axes)
    shape = a.shape[b.ndim :]
    return solve(a.reshape(b.size, b.size), b.flatten()).reshape(shape)
