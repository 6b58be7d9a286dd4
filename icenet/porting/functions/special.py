"""Special functions: of the normal distribution, gamma, zeta and Bessel functions, orthogonal polynomials."""

# The text of these functions is copied into ports, without types.
# mypy: ignore-errors
# ruff: noqa: B905

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.porting.functions.elementwise import erfc, lgamma


def horner(x, coefficients):
    """Returns a polynomial; the first coefficient is that of the highest power."""
    total = coefficients[0]
    for value in coefficients[1:]:
        total = total * x + value
    return total


def scaled_erfc(x):
    """Returns exp(x**2) * erfc(x) (Numerical Recipes, erfcc, a Chebyshev fit)."""

    @mx.custom_function
    def compute(x):
        size = mx.abs(x)
        t = 1 / (1 + 0.5 * size)
        fit = (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196)
        value = t * mx.exp(horner(t, (*fit, 1.00002368, -1.26551223)))
        return mx.where(x >= 0, value, 2 * mx.exp(x * x) - value)

    @compute.vjp
    def gradient(x, cotangent, y):
        return cotangent * (2 * x * y - 2 / math.sqrt(math.pi))

    return compute(x)


def normal_quantile(p):
    """Returns the inverse of the distribution function of the standard normal distribution (Cephes, ndtri)."""

    @mx.custom_function
    def compute(p):
        upper = p > 1 - math.exp(-2)
        y = mx.where(upper, 1 - p, p)
        middle = y > math.exp(-2)
        u = mx.where(middle, y, 0.5) - 0.5
        v = u * u
        top = (-59.9633501014107895267, 98.0010754185999661536, -56.6762857469070293439, 13.9312609387279679503)
        bottom = (1.0, 1.95448858338141759834, 4.67627912898881538453, 86.3602421390890590575)
        bottom = (*bottom, -225.462687854119370527, 200.260212380060660359, -82.0372256168333339912)
        bottom = (*bottom, 15.9056225126211695515, -1.18331621121330003142)
        inner = u + u * (v * horner(v, (*top, -1.23916583867381258016)) / horner(v, bottom))
        inner = inner * math.sqrt(2 * math.pi)
        z = mx.sqrt(-2 * mx.log(mx.where(middle, 0.1, y)))
        r = 1 / z
        top = (4.05544892305962419923, 31.5251094599893866154, 57.1628192246421288162, 44.0805073893200834700)
        top = (*top, 14.6849561928858024014, 2.18663306850790267539, -0.140256079171354495875)
        bottom = (1.0, 15.7799883256466749731, 45.3907635128879210584, 41.3172038254672030440)
        bottom = (*bottom, 15.0425385692907503408, 2.50464946208309415979, -0.142182922854787788574)
        near = horner(r, (*top, -0.0350424626827848203418, -8.57456785154685413611e-4)) / horner(
            r, (*bottom, -0.0380806407691578277194, -9.33259480895457427372e-4)
        )
        top = (3.23774891776946035970, 6.91522889068984211695, 3.93881025292474443415, 1.33303460815807542389)
        top = (*top, 0.201485389549179081538, 0.0123716634817820021358, 3.01581553508235416007e-4)
        bottom = (1.0, 6.02427039364742014255, 3.67983563856160859403, 1.37702099489081330271)
        bottom = (*bottom, 0.216236993594496635890, 0.0134204006088543189037, 3.28014464682127739104e-4)
        far = horner(r, (*top, 2.65806974686737550832e-6, 6.23974539184983293730e-9)) / horner(
            r, (*bottom, 2.89247864745380683936e-6, 6.79019408009981274425e-9)
        )
        tail = z - mx.log(z) / z - r * mx.where(z < 8, near, far)
        value = mx.where(middle, inner, mx.where(upper, tail, -tail))
        value = mx.where(p == 0, -math.inf, mx.where(p == 1, math.inf, value))
        return mx.where((p < 0) | (p > 1), math.nan, value)

    @compute.vjp
    def gradient(p, cotangent, y):
        return cotangent * math.sqrt(2 * math.pi) * mx.exp(y * y / 2)

    return compute(p)


def zeta(s, q):
    """Returns the Hurwitz zeta function, the sum of (q + k)**-s, by Euler and Maclaurin."""
    s, q = mx.array(s, mx.float32), mx.array(q, mx.float32)
    total = sum(mx.power(q + step, -s) for step in range(10))
    end = q + 9
    power = mx.power(end, -s)
    total = total + end * power / (s - 1) - 0.5 * power
    factor = mx.ones_like(s)
    for step, number in enumerate((1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6), 1):
        power = power / end if step == 1 else power / (end * end)
        factor = (
            s / 2 if step == 1 else factor * (s + 2 * step - 3) * (s + 2 * step - 2) / ((2 * step - 1) * 2 * step)
        )
        total = total + number * factor * power
    whole = mx.floor(q) == q
    total = mx.where((q <= 0) & ~whole & (s != mx.floor(s)), math.nan, total)
    total = mx.where((q <= 0) & whole, math.inf, total)
    return mx.where(s < 1, math.nan, mx.where(s == 1, math.inf, total))


def gamma_tails(a, x):
    """Returns the regularized incomplete gamma functions P(a, x) and Q(a, x) (Numerical Recipes, section 6.2).

    The gradient is that of x.
    """
    a, x = mx.broadcast_arrays(mx.array(a, mx.float32), mx.array(x, mx.float32))

    @mx.custom_function
    def compute(x):
        lower, upper = _gamma_of_small(a, x)
        lower, upper = (mx.where(a > 40, *pair) for pair in zip(_gamma_of_large(a, x), (lower, upper)))
        lower = mx.where((a == 0) | mx.isinf(x), 1, mx.where((x == 0) | mx.isinf(a), 0, lower))
        upper = mx.where((a == 0) | mx.isinf(x), 0, mx.where((x == 0) | mx.isinf(a), 1, upper))
        wrong = (a < 0) | (x < 0) | ((a == 0) & (x == 0)) | (mx.isinf(a) & mx.isinf(x))
        return mx.where(wrong, math.nan, lower), mx.where(wrong, math.nan, upper)

    @compute.vjp
    def gradient(x, cotangents, outputs):
        return (cotangents[0] - cotangents[1]) * mx.exp((a - 1) * mx.log(x) - x - lgamma(a))

    return compute(x)


def _gamma_of_small(a, x):
    """Returns the incomplete gamma functions, by a series below a + 1, and by a continued fraction above."""
    is_small = x < a + 1
    scale = mx.exp(a * mx.log(x) - x - lgamma(a))
    y = mx.where(is_small, x, 0)
    term = total = 1 / a
    for step in range(1, 70):
        term = term * y / (a + step)
        total = total + term
    b = mx.where(is_small, a + 1, x) + 1 - a
    c, d = mx.full(b.shape, 1e30), 1 / b
    fraction = d
    for step in range(1, 70):
        factor = -step * (step - a)
        b = b + 2
        d, c = factor * d + b, b + factor / c
        d, c = (mx.where(mx.abs(part) < 1e-30, 1e-30, part) for part in (d, c))
        d = 1 / d
        fraction = fraction * d * c
    lower, upper = total * scale, fraction * scale
    return mx.where(is_small, lower, 1 - upper), mx.where(is_small, 1 - lower, upper)


def _gamma_of_large(a, x):
    """Returns the incomplete gamma functions of a large a, by Temme's expansion to the second order in 1/a."""
    ratio = (x - a) / a
    near = mx.abs(ratio) < 0.3
    small = mx.where(near, ratio, 0.1)
    series = horner(small, [(-1) ** k / (k + 2) for k in range(12, -1, -1)])  # (r - log1p(r)) / r**2
    eta = mx.where(near, ratio * mx.sqrt(2 * series), 0)
    far = mx.sqrt(mx.maximum(2 * (ratio - mx.log1p(mx.maximum(ratio, -1))), 0))
    eta = mx.where(near, eta, mx.where(ratio < 0, -far, far))
    first = (-1 / 3, 1 / 12, -2 / 135, 1 / 864, 1 / 2835, -139 / 777600, 1 / 25515)
    second = (-1 / 540, -1 / 288, 25 / 12096, -223 / 1088640, -89 / 1088640)
    close = mx.minimum(mx.maximum(eta, -0.5), 0.5)
    wide = mx.where(mx.abs(eta) > 0.5, eta, 1)
    zero = mx.where(mx.abs(eta) > 0.5, 1 / mx.where(ratio == 0, 1, ratio) - 1 / wide, horner(close, first[::-1]))
    rest = zero + horner(close, second[::-1]) / a
    tail = mx.exp(-0.5 * a * eta * eta) / mx.sqrt(2 * math.pi * a) * rest
    scaled = eta * mx.sqrt(a / 2)
    return 0.5 * erfc(-scaled) - tail, 0.5 * erfc(scaled) + tail


def _bessel(x, small, large, scaled):
    size = mx.abs(x)
    t = mx.square(mx.minimum(size, 3.75) / 3.75)
    outer = mx.maximum(size, 3.75)
    below, above = horner(t, small), horner(3.75 / outer, large) / mx.sqrt(outer)
    if scaled:
        return mx.where(size < 3.75, below * mx.exp(-size), above)
    return mx.where(size < 3.75, below, mx.exp(size) * above)


def i0(x, scaled=False):
    """Returns the modified Bessel function of order 0, times exp(-|x|) if scaled (Abramowitz and Stegun, 9.8)."""
    small = (0.0045813, 0.0360768, 0.2659732, 1.2067492, 3.0899424, 3.5156229, 1.0)
    large = (0.00392377, -0.01647633, 0.02635537, -0.02057706, 0.00916281, -0.00157565, 0.00225319)
    return _bessel(x, small, (*large, 0.01328592, 0.39894228), scaled)


def i1(x, scaled=False):
    """Returns the modified Bessel function of order 1, times exp(-|x|) if scaled (Abramowitz and Stegun, 9.8)."""
    small = (0.00032411, 0.00301532, 0.02658733, 0.15084934, 0.51498869, 0.87890594, 0.5)
    large = (-0.00420059, 0.01787654, -0.02895312, 0.02282967, -0.01031555, 0.00163801, -0.00362018)
    size = mx.abs(x)
    scale = mx.where(size < 3.75, x, mx.sign(x))
    return scale * _bessel(x, small, (*large, -0.03988024, 0.39894228), scaled)


def k0(x, scaled=False):
    """Returns the modified Bessel function of the second kind of order 0, times exp(x) if scaled."""
    inner, outer = mx.minimum(x, 2), mx.maximum(x, 2)
    fit = (0.0000074, 0.0001075, 0.00262698, 0.0348859, 0.23069756, 0.4227842, -0.57721566)
    small = horner(mx.square(inner / 2), fit) - mx.log(inner / 2) * i0(inner)
    fit = (0.00053208, -0.0025154, 0.00587872, -0.01062446, 0.02189568, -0.07832358, 1.25331414)
    large = horner(2 / outer, fit) / mx.sqrt(outer)
    value = mx.where(x <= 2, small * mx.exp(inner), large) if scaled else mx.where(x <= 2, small, large * mx.exp(-x))
    return mx.where(x == 0, math.inf, value)


def k1(x, scaled=False):
    """Returns the modified Bessel function of the second kind of order 1, times exp(x) if scaled."""
    inner, outer = mx.minimum(x, 2), mx.maximum(x, 2)
    fit = (-0.00004686, -0.00110404, -0.01919402, -0.18156897, -0.67278579, 0.15443144, 1.0)
    small = horner(mx.square(inner / 2), fit) / inner + mx.log(inner / 2) * i1(inner)
    fit = (-0.00068245, 0.00325614, -0.00780353, 0.01504268, -0.0365562, 0.23498619, 1.25331414)
    large = horner(2 / outer, fit) / mx.sqrt(outer)
    value = mx.where(x <= 2, small * mx.exp(inner), large) if scaled else mx.where(x <= 2, small, large * mx.exp(-x))
    return mx.where(x == 0, math.inf, value)


def spherical_j0(x):
    """Returns sin(x) / x."""
    return mx.where(mx.isinf(x), 0, mx.where(x == 0, 1, mx.sin(x) / mx.where(x == 0, 1, x)))


def orthogonal_polynomial(kind, x, n):
    """Returns the n-th polynomial of a family, by its recurrence. For an array of degrees it reads their maximum."""
    x, n = mx.array(x, mx.float32), mx.array(n).astype(mx.int32)
    if kind.startswith("shifted_"):
        x, kind = 2 * x - 1, kind.removeprefix("shifted_")
    before = mx.ones_like(x)
    value = {
        "chebyshev_u": 2 * x,
        "chebyshev_v": 2 * x - 1,
        "chebyshev_w": 2 * x + 1,
        "hermite_h": 2 * x,
        "laguerre_l": 1 - x,
    }.get(kind, x)
    result = mx.where(n < 0, 0, mx.where(n == 0, before, value))
    for k in range(1, int(n.max()) if n.size else 0):
        factor = {"hermite_h": 2 * k, "hermite_he": k}.get(kind, 1)
        if kind == "laguerre_l":
            after = ((2 * k + 1 - x) * value - k * before) / (k + 1)
        elif kind == "legendre_p":
            after = ((2 * k + 1) * x * value - k * before) / (k + 1)
        else:
            after = (x if kind == "hermite_he" else 2 * x) * value - factor * before
        before, value = value, after
        result = mx.where(n > k, value, result)
    return result
