"""Element by element. Gradients at ties and edges are PyTorch's."""

# The text of these functions is copied into ports, without types.
# mypy: ignore-errors

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.porting.functions.indexing import nonzero
from icenet.porting.functions.reductions import sum_to


def pair(a, b):
    """Returns two arrays; a number has the dtype of the other one."""
    if not isinstance(a, mx.array):
        a = mx.array(a, b.dtype)
    return a, b if isinstance(b, mx.array) else mx.array(b, a.dtype)


def divide_floor(a, b):
    """Returns the quotient of a and b rounded down, from the exact remainder, as Python does: 1.0 // 0.1 is 9."""
    divisor = b
    a, b = pair(a, b)
    if mx.issubdtype(mx.result_type(a, b), mx.integer):
        quotient = a // b
        rest = a - quotient * b
        return quotient - ((rest != 0) & ((rest < 0) != (b < 0))).astype(quotient.dtype)
    dtype = mx.result_type(a, b)
    a = mx.stop_gradient(mx.array(a, mx.float32))
    b = mx.stop_gradient(mx.array(divisor, mx.float32))  # 0.1 is not rounded to fp16
    rest = fmod(a, b)
    quotient = (a - rest) / b
    quotient = mx.where((rest != 0) & ((b < 0) != (rest < 0)), quotient - 1, quotient)
    down = mx.floor(quotient)
    down = mx.where(quotient - down > 0.5, down + 1, down)
    return mx.where(b == 0, a / b, mx.where(quotient == 0, 0 * (a / b), down)).astype(dtype)


def divide_trunc(a, b):
    """Returns the quotient of a and b rounded to zero."""
    a, b = pair(a, b)
    if mx.issubdtype(mx.result_type(a, b), mx.integer):
        quotient = a // b
        rest = a - quotient * b
        return quotient + ((rest != 0) & ((rest < 0) != (a < 0))).astype(quotient.dtype)
    return trunc(mx.stop_gradient(a) / mx.stop_gradient(b))


def remainder(a, b):
    """Returns the remainder with the sign of the divisor."""
    a, b = pair(a, b)
    rest = fmod(a, b)
    return mx.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


def fmod(a, b):
    """Returns the remainder with the sign of the dividend."""
    a, b = pair(a, b)
    if mx.issubdtype(mx.result_type(a, b), mx.integer):
        return a - divide_trunc(a, b) * b
    negative = signbit(a)
    rest = mx.remainder(mx.where(negative, -a, a), mx.abs(b))
    return mx.where(negative, -rest, rest)


def integer_power(a, b):
    """Returns the power of integers."""
    a, b = mx.array(a), mx.array(b)
    power = mx.power(a, mx.maximum(b, 0))
    reciprocal = mx.where(a == 1, 1, mx.where(a == -1, mx.where(b % 2 == 0, 1, -1), 0))
    return mx.where(b < 0, reciprocal, power).astype(mx.result_type(a, b))


def maximum(a, b):
    """Returns the larger value; at ties each gets half of the gradient."""
    a, b = mx.array(a), mx.array(b)
    greater = mx.where(a > b, a, b)
    return (
        mx.where(a == b, (a + b) / 2, mx.where(mx.isnan(a), a, greater))
        if mx.issubdtype(a.dtype, mx.floating)
        else mx.maximum(a, b)
    )


def minimum(a, b):
    """Returns the smaller value; at ties each gets half of the gradient."""
    a, b = mx.array(a), mx.array(b)
    less = mx.where(a < b, a, b)
    return (
        mx.where(a == b, (a + b) / 2, mx.where(mx.isnan(a), a, less))
        if mx.issubdtype(a.dtype, mx.floating)
        else mx.minimum(a, b)
    )


def fmax(a, b):
    """Returns the larger value, and the other one of a NaN."""
    a, b = mx.array(a), mx.array(b)
    return mx.where(mx.isnan(b) | (a >= b), a, b)


def fmin(a, b):
    """Returns the smaller value, and the other one of a NaN."""
    a, b = mx.array(a), mx.array(b)
    return mx.where(mx.isnan(b) | (a <= b), a, b)


def logaddexp2(a, b):
    """Returns log2(2**a + 2**b)."""
    return mx.logaddexp(a * math.log(2), b * math.log(2)) / math.log(2)


def hypot(a, b):
    """Returns the length of (a, b)."""
    large, small = mx.maximum(mx.abs(a), mx.abs(b)), mx.minimum(mx.abs(a), mx.abs(b))
    ratio = small / mx.where(large == 0, 1, large)
    return large * mx.sqrt(1 + ratio * ratio)


def copysign(a, b):
    """Returns |a| with the sign of b."""
    a, b = mx.array(a, mx.float32), mx.array(b, mx.float32)
    return mx.where(signbit(b), -mx.abs(a), mx.abs(a))


def signbit(x):
    """Returns whether the sign is negative, that of a zero included."""
    if mx.issubdtype(x.dtype, mx.floating):
        return mx.view(mx.stop_gradient(x.astype(mx.float32)), mx.int32) < 0
    return x < 0


def xlogy(a, b):
    """Returns a * log(b), and 0 where a is 0."""
    a, b = mx.array(a), mx.array(b)
    zero = (a == 0) & ~mx.isnan(b)
    return mx.where(zero, 0, a * mx.log(mx.where(zero, 1, b)))


def special_xlog1py(a, b):
    """Returns a * log1p(b), and 0 where a is 0."""
    a, b = mx.array(a), mx.array(b)
    zero = (a == 0) & ~mx.isnan(b)
    return mx.where(zero, 0, a * mx.log1p(mx.where(zero, 0, b)))


def heaviside(x, value):
    """Returns 0 below 0, 1 above, and a value at 0."""
    return mx.where(x == 0, value, (x > 0).astype(x.dtype))


def ldexp(x, exponent):
    """Returns x * 2**exponent."""
    return x * mx.power(mx.array(2.0), exponent)


def exp2(x):
    """Returns 2**x."""
    return mx.power(mx.array(2.0, x.dtype), x)


def erfc(x):
    """Returns 1 - erf(x), accurate for large x (Numerical Recipes, erfcc, with a Chebyshev fit)."""
    t = 1 / (1 + 0.5 * mx.abs(x))
    poly = -1.26551223 + t * (
        1.00002368
        + t
        * (
            0.37409196
            + t
            * (
                0.09678418
                + t
                * (
                    -0.18628806
                    + t * (0.27886807 + t * (-1.13520398 + t * (1.48851587 + t * (-0.82215223 + t * 0.17087277))))
                )
            )
        )
    )
    large = t * mx.exp(-x * x + poly)
    return mx.where(mx.abs(x) < 2, 1 - mx.erf(x), mx.where(x >= 0, large, 2 - large))


def sinc(x):
    """Returns sin(pi x) / (pi x)."""
    scaled = math.pi * mx.where(x == 0, 1, x)
    return mx.where(x == 0, 1, mx.sin(scaled) / scaled)


def lgamma(x):
    """Returns log |gamma(x)| (Lanczos, g = 7; from 0.5 to 2.5, where it has its zeros, a series)."""
    reflected = x < 0.5
    z = mx.where(reflected, 1 - x, x) - 1
    total = mx.full(z.shape, 0.99999999999980993, z.dtype)
    for index, value in enumerate(
        (
            676.5203681218851,
            -1259.1392167224028,
            771.32342877765313,
            -176.61502916214059,
            12.507343278686905,
            -0.13857109526572012,
            9.9843695780195716e-6,
            1.5056327351493116e-7,
        )
    ):
        total = total + value / (z + index + 1)
    t = z + 7.5
    value = 0.5 * math.log(2 * math.pi) + (z + 0.5) * mx.log(t) - t + mx.log(total)
    is_low, is_near = x < 1.5, (x >= 0.5) & (x < 2.5)
    y = mx.where(is_near, mx.where(is_low, x - 1, x - 2), 0)
    series = mx.zeros_like(y)
    rest = (0.64493407, 0.20205690, 0.08232323, 0.03692776, 0.01734306, 0.00834928, 0.00407736, 0.00200839)
    rest = (
        *rest,
        0.000994575,
        0.000494189,
        0.000246087,
        0.000122713,
        0.0000612481,
    )  # those of zeta less 1, from k = 2 on
    for k in range(14, 1, -1):
        series = series * y + (-1) ** k * rest[k - 2] / k
    series = (series * y + 0.42278433509846714) * y  # 1 minus Euler's constant
    value = mx.where(is_near, mx.where(is_low, series - mx.log1p(y), series), value)
    part = mx.where(reflected, x - mx.floor(x), 0.5)  # 0 at the poles, where sin(pi x) is not
    return mx.where(reflected, math.log(math.pi) - mx.log(mx.sin(math.pi * part)) - value, value)


def digamma(x):
    """Returns the derivative of log gamma(x)."""
    reflected = x < 0.5
    z = mx.where(reflected, 1 - x, x)
    total = mx.zeros_like(z)
    for _ in range(8):
        total = total - mx.where(z < 8, 1 / z, 0)
        z = mx.where(z < 8, z + 1, z)
    reciprocal = 1 / (z * z)
    value = (
        total
        + mx.log(z)
        - 0.5 / z
        - reciprocal
        * (1 / 12 - reciprocal * (1 / 120 - reciprocal * (1 / 252 - reciprocal * (1 / 240 - reciprocal / 132))))
    )
    part = x - mx.floor(x)
    pole = mx.where(x == 0, -math.inf, math.nan)
    part = mx.where(reflected & (part != 0), part, 0.5)
    value = mx.where(reflected, value - math.pi / mx.tan(math.pi * part), value)
    return mx.where((x <= 0) & (x == mx.floor(x)), pole, value)


def polygamma(x, n):
    """Returns the n-th derivative of digamma: n! times the Hurwitz zeta function of n + 1, by its series."""
    if n == 0:
        return digamma(x)
    total = sum(mx.power(x + step, -n - 1) for step in range(12))
    y = x + 12
    total = total + mx.power(y, -n) / n + 0.5 * mx.power(y, -n - 1)  # and the rest by Euler and Maclaurin
    factor = 1.0
    for step, bernoulli in enumerate((1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66), 1):
        factor = factor * (n + 2 * step - 2 if step > 1 else 1) * (n + 2 * step - 1) / ((2 * step - 1) * 2 * step)
        total = total + bernoulli * factor * mx.power(y, -n - 2 * step)
    sign = 1 if n % 2 else -1
    pole = (x <= 0) & (x == mx.floor(x))
    return mx.where(pole, math.inf if n % 2 else -math.inf, sign * math.factorial(n) * total)


def multivariate_lgamma(x, p):
    """Returns the logarithm of the multivariate gamma function of dimension p."""
    return sum(lgamma(x - index / 2) for index in range(p)) + p * (p - 1) / 4 * math.log(math.pi)


def trunc(x):
    """Returns x rounded to zero."""
    if not mx.issubdtype(x.dtype, mx.floating):
        return x
    return mx.where(x < 0, mx.ceil(x), mx.floor(x))


def frac(x):
    """Returns the part after the point."""
    return x - trunc(x)


def sign(x):
    """Returns -1, 0 or 1."""
    return mx.sign(x) if x.dtype != mx.bool_ else x


def sgn(x):
    """Returns -1, 0 or 1, and z / |z| of complex numbers."""
    if not mx.issubdtype(x.dtype, mx.complexfloating):
        return sign(x)
    size = mx.abs(x)
    return mx.where(size == 0, 0, x / mx.where(size == 0, 1, size))


def angle(x):
    """Returns the argument of a number."""
    if mx.issubdtype(x.dtype, mx.complexfloating):
        return mx.arctan2(mx.imag(x), mx.real(x))
    return mx.where(mx.isnan(x), x, mx.where(x < 0, math.pi, 0.0))


def entr(x):
    """Returns -x log(x)."""

    @mx.custom_function
    def compute(x):
        value = mx.where(x > 0, -x * mx.log(mx.where(x > 0, x, 1)), mx.where(x == 0, 0.0, -math.inf))
        return mx.where(mx.isnan(x), x, value)

    @compute.vjp
    def gradient(x, cotangent, y):  # NaN below 0, as in PyTorch
        return cotangent * (-mx.log(x) - 1)

    return compute(x)


def ndtr(x):
    """Returns the distribution function of the standard normal distribution."""
    return 0.5 * erfc(-x * math.sqrt(0.5))


def log_ndtr(x):
    """Returns the logarithm of `ndtr`."""
    return mx.where(
        x < -1,
        mx.log(0.5 * erfc(-mx.minimum(x, -1) * math.sqrt(0.5))),
        mx.log1p(-0.5 * erfc(mx.maximum(x, -1) * math.sqrt(0.5))),
    )


def logit(x, eps=None):
    """Returns log(x / (1 - x))."""
    if eps is not None:
        x = clip(x, eps, 1 - eps)
    return mx.log(x / (1 - x))


def log_sigmoid_forward(x):
    """Returns log(sigmoid(x)), and an empty buffer."""
    return nn.log_sigmoid(x), mx.zeros((0,))


def clip(x, low=None, high=None):
    """Returns x within bounds. At a bound x gets the gradient."""
    if low is not None:
        x = mx.where(x < low, low, x)
    if high is not None:
        x = mx.where(x > high, high, x)
    return x


def softsign(x):
    """Returns x / (1 + |x|)."""
    return x / (1 + mx.abs(x))


def tanhshrink(x):
    """Returns x - tanh(x)."""
    return x - mx.tanh(x)


def hardswish(x):
    """Returns x * relu6(x + 3) / 6 (Howard et al., 2019)."""
    return mx.where(x <= -3, 0, mx.where(x < 3, x * (x + 3) / 6, x))


def hardsigmoid(x):
    """Returns relu6(x + 3) / 6."""
    return mx.where(x <= -3, 0.0, mx.where(x >= 3, 1.0, x / 6 + 0.5))


def relu6(x):
    """Returns min(max(x, 0), 6)."""
    return hardtanh(x, 0, 6)


def hardtanh(x, low, high):
    """Returns x within bounds, without a gradient at a bound."""
    return mx.where(x <= low, low, mx.where(x >= high, high, x))


def selu(x):
    """Returns the scaled exponential linear unit (Klambauer et al., 2017)."""
    return elu(x, 1.6732632423543772, 1.0507009873554805, 1.0)


def elu(x, alpha, scale=1.0, input_scale=1.0):
    """Returns the exponential linear unit."""
    negative = x <= 0
    return mx.where(negative, scale * alpha * mx.expm1(mx.where(negative, x * input_scale, 0)), scale * x)


def celu(x, alpha):
    """Returns the continuous exponential linear unit."""
    return elu(x, alpha, 1.0, 1.0 / alpha)


def leaky_relu(x, slope):
    """Returns x above 0, and slope * x otherwise."""
    return mx.where(x > 0, x, slope * x)


def hardshrink(x, size):
    """Returns 0 within [-size, size]."""
    return mx.where((x >= -size) & (x <= size), 0, x)


def softshrink(x, size):
    """Returns x moved by size to 0."""
    return mx.where(x > size, x - size, mx.where(x < -size, x + size, x * 0))


def threshold(x, size, value):
    """Returns a value where x is not above a size."""
    return mx.where(x <= size, value, x)


def softplus(x, beta=1, threshold=20):
    """Returns log(1 + exp(beta x)) / beta."""
    linear = x * beta > threshold
    return mx.where(linear, x, mx.logaddexp(mx.where(linear, 0, x * beta), 0) / beta)


def rrelu(x, lower, upper, training):
    """Returns the randomized leaky ReLU."""
    if not training:
        return leaky_relu(x, (lower + upper) / 2)
    return mx.where(x < 0, mx.random.uniform(lower, upper, x.shape) * x, x)


def glu(x, axis):
    """Returns a * sigmoid(b) of the halves a and b."""
    a, b = mx.split(x, 2, axis=axis)
    return a * mx.sigmoid(b)


def nan_to_num(x, nan=0.0, posinf=None, neginf=None):
    """Returns finite numbers in the place of NaN and infinities."""
    limit = mx.finfo(x.dtype).max
    x = mx.where(mx.isnan(x), nan, x)
    x = mx.where(x == math.inf, limit if posinf is None else posinf, x)
    return mx.where(x == -math.inf, -limit if neginf is None else neginf, x)


def exact_where(condition, a, b):
    """Returns `mx.where` with the gradient of PyTorch: 0 where a value is left out, also for one of NaN after it."""
    dtype = mx.result_type(*[item for item in (a, b) if isinstance(item, mx.array)])
    a, b = (item if isinstance(item, mx.array) else mx.array(item, dtype) for item in (a, b))

    @mx.custom_function
    def choose(a, b):
        return mx.where(condition, a, b)

    @choose.vjp
    def gradient(inputs, cotangent, y):
        chosen, other = mx.where(condition, cotangent, 0), mx.where(condition, 0, cotangent)
        return sum_to(chosen, inputs[0].shape), sum_to(other, inputs[1].shape)

    return choose(a, b)


def broadcast_like(x, other):
    """Returns x in the shape of another array."""
    return mx.broadcast_to(x, other.shape)


def nonzero_where(condition):
    """Returns the indices of the true elements along each axis. The shape depends on the values."""
    return tuple(mx.moveaxis(nonzero(mx.atleast_1d(condition)), -1, 0))
