"""Special functions, integers, and the parts of floating-point numbers."""

from __future__ import annotations

from icenet.core.porting.table.base import Operation, entry
from icenet.core.porting.table.elementwise import operands


def _unary(*names: str, function: str, scaled: bool = False) -> None:
    def write(n: Operation) -> str:
        argument = "self" if "self" in n.args else "x"
        return n.call(function, n.cast(argument, n.out.dtype), *(["True"] if scaled else []))

    entry(*names)(write)


_unary("i0", "special_i0", "special_modified_bessel_i0", function="i0")
_unary("special_i0e", function="i0", scaled=True)
_unary("special_i1", "special_modified_bessel_i1", function="i1")
_unary("special_i1e", function="i1", scaled=True)
_unary("special_modified_bessel_k0", function="k0")
_unary("special_modified_bessel_k1", function="k1")
_unary("special_scaled_modified_bessel_k0", function="k0", scaled=True)
_unary("special_scaled_modified_bessel_k1", function="k1", scaled=True)
_unary("special_spherical_bessel_j0", function="spherical_j0")
_unary("special_erfcx", function="scaled_erfc")
_unary("special_ndtri", function="normal_quantile")

entry("special_zeta")(lambda n: n.call("zeta", n["self"], n["other"]))
entry("igamma", "special_gammainc")(lambda n: n.call("gamma_tails", n["self"], n["other"]) + "[0]")
entry("igammac", "special_gammaincc")(lambda n: n.call("gamma_tails", n["self"], n["other"]) + "[1]")

FAMILIES = (
    *("chebyshev_t", "chebyshev_u", "chebyshev_v", "chebyshev_w"),
    *("shifted_chebyshev_t", "shifted_chebyshev_u", "shifted_chebyshev_v", "shifted_chebyshev_w"),
    *("hermite_h", "hermite_he", "laguerre_l", "legendre_p"),
)


@entry(*("special_{}_polynomial_{}".format(*name.rsplit("_", 1)) for name in FAMILIES))
def orthogonal_polynomial(n: Operation) -> str:
    family = n.node.base.removeprefix("special_").replace("_polynomial", "")
    return n.call("orthogonal_polynomial", repr(family), n["x"], n["n"])


@entry("gcd", "lcm")
def gcd(n: Operation) -> str:
    return n.call(n.node.base, *operands(n, "self", "other"))


entry("frexp")(lambda n: n.call("frexp", n["self"]))
entry("nextafter")(lambda n: n.call("nextafter", n["self"], n["other"]))
