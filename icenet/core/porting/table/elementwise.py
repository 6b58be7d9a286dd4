"""Arithmetic, comparisons, functions of single numbers and casts, element by element."""

from __future__ import annotations

from icenet.core.porting.table.base import (
    Operation,
    atom,
    entry,
    helper_entry,
    mlx_dtype,
    number,
    promoted,
    templates,
)


def operands(n: Operation, *names: str, dtype: str | None = None) -> list[str]:
    """Returns the sources of operands whose result in MLX has the dtype of PyTorch's."""
    dtype = dtype or n.out.dtype
    tensors = [n.tensor(name) for name in names]
    found: list[str] = [item.dtype for item in tensors if item is not None]
    have = found[0] if found else dtype
    for other in found[1:]:
        have = promoted(mlx_dtype(have).rstrip("_"), mlx_dtype(other).rstrip("_"))
    scalars = [n.args.get(name) for name, item in zip(names, tensors, strict=True) if item is None]
    if found:
        if any(isinstance(value, float) for value in scalars) and not have.startswith(("float", "bfloat", "complex")):
            have = "float32"
        elif any(type(value) is int for value in scalars) and have == "bool":
            have = "int32"
        if any(isinstance(value, complex) for value in scalars):
            have = "complex64"
    if mlx_dtype(have) == mlx_dtype(dtype):
        return [n.atom(name) for name in names]
    return [
        atom(n.cast(name, dtype)) if item is not None and item.dtype != dtype else n.atom(name)
        for name, item in zip(names, tensors, strict=True)
    ]


def cast_result(n: Operation, text: str, have: str) -> str:
    """Returns the source of a result of dtype `have` in the dtype of PyTorch's result."""
    if mlx_dtype(have) == mlx_dtype(n.out.dtype):
        return text
    return f"{atom(text)}.astype(mx.{mlx_dtype(n.out.dtype)})"


def _binary(symbol: str):  # type: ignore[no-untyped-def]
    def write(n: Operation) -> str:
        a, b = operands(n, "self", "other")
        alpha = n.args.get("alpha", 1)
        if alpha not in (1, None):
            b = f"{n.source(alpha)} * {b}"
        return f"{a} {symbol} {b}"

    return write


entry("mul", "multiply")(_binary("*"))


@entry("add", "sub", "subtract", "add_relu")
def add(n: Operation) -> str:
    if n.out.dtype == "bool":
        return f"mx.logical_or({n['self']}, {n['other']})" if n.args.get("alpha", 1) else n["self"]
    return _binary("+" if n.node.base == "add" else "-")(n)


@entry("rsub")
def rsub(n: Operation) -> str:
    a, b = operands(n, "self", "other")
    alpha = n.args.get("alpha", 1)
    return f"{b} - {a}" if alpha == 1 else f"{b} - {n.source(alpha)} * {a}"


@entry("div", "divide", "true_divide")
def div(n: Operation) -> str:
    mode = n.get("rounding_mode")
    a, b = operands(n, "self", "other")
    if mode is None:
        return f"{a} / {b}"
    return n.call("divide_floor" if mode == "floor" else "divide_trunc", a, b)


@entry("floor_divide")
def floor_divide(n: Operation) -> str:
    return n.call("divide_floor", *operands(n, "self", "other"))


@entry("remainder")
def remainder(n: Operation) -> str:
    return n.call("remainder", *operands(n, "self", "other"))


@entry("fmod")
def fmod(n: Operation) -> str:
    return n.call("fmod", *operands(n, "self", "other"))


@entry("pow")
def power(n: Operation) -> str:
    exponent = n.args["exponent"]
    if n.tensor("exponent") is None and n.out.is_floating:
        x = atom(n.cast("self", n.out.dtype))
        small = {2: f"{x} * {x}", 3: f"{x} * {x} * {x}", 0.5: f"mx.sqrt({x})", -0.5: f"mx.rsqrt({x})", 1: x}
        if exponent in small and (exponent in (0.5, -0.5, 1) or x.isidentifier()):
            return small[exponent]
        if exponent == 2:
            return f"mx.square({n.cast('self', n.out.dtype)})"
        return f"{x} ** {n.atom('exponent')}" if n.tensor("self") else f"mx.power({n['self']}, {n['exponent']})"
    a, b = operands(n, "self", "exponent")
    if not n.out.is_floating and not n.out.is_complex:
        return n.call("integer_power", a, b)
    return f"mx.power({a}, {b})"


entry("float_power")(lambda n: f"mx.power({n.cast('self', n.out.dtype)}, {n.cast('exponent', n.out.dtype)})")


def _comparison(symbol: str):  # type: ignore[no-untyped-def]
    def write(n: Operation) -> str:
        return f"{n.atom('self')} {symbol} {n.atom('other')}"

    return write


for _names, _symbol in (
    (("eq",), "=="),
    (("ne", "not_equal"), "!="),
    (("lt", "less"), "<"),
    (("le", "less_equal"), "<="),
    (("gt", "greater"), ">"),
    (("ge", "greater_equal"), ">="),
):
    entry(*_names)(_comparison(_symbol))


@entry(
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "atan2",
    "arctan2",
    "logaddexp",
    "logaddexp2",
    "hypot",
    "copysign",
    "xlogy",
    "ldexp",
    "special_xlog1py",
)
def pair(n: Operation) -> str:
    a, b = operands(n, "self", "other")
    name = n.node.base
    if name in ("atan2", "arctan2"):
        return f"mx.arctan2({a}, {b})"
    if name == "logaddexp":
        return f"mx.logaddexp({a}, {b})"
    if name in ("maximum", "minimum") and not n.out.is_floating:
        return f"mx.{name}({a}, {b})"
    return n.call(name, a, b)


entry("heaviside")(lambda n: n.call("heaviside", n["self"], n["values"]))


@entry("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__")
def bitwise(n: Operation) -> str:
    symbol = {"and": "&", "or": "|", "xor": "^"}[n.node.base.strip("_").removeprefix("bitwise_")]
    a, b = operands(n, "self", "other")
    if n.out.dtype == "bool" and symbol == "^":
        return f"{a} != {b}"
    return f"{a} {symbol} {b}"


@entry("bitwise_left_shift", "__lshift__", "bitwise_right_shift", "__rshift__")
def shift(n: Operation) -> str:
    a, b = operands(n, "self", "other")
    return f"{a} {'<<' if n.node.base in ('bitwise_left_shift', '__lshift__') else '>>'} {b}"


@entry("logical_and", "logical_or", "logical_xor")
def logical(n: Operation) -> str:
    a, b = n.cast("self", "bool"), n.cast("other", "bool")
    name = n.node.base
    return f"{atom(a)} != {atom(b)}" if name == "logical_xor" else f"mx.{name}({a}, {b})"


entry("logical_not")(lambda n: f"mx.logical_not({n.cast('self', 'bool')})")
entry("bitwise_not")(lambda n: f"mx.logical_not({n['self']})" if n.out.dtype == "bool" else f"~{n.atom('self')}")


def _unary(function: str):  # type: ignore[no-untyped-def]
    def write(n: Operation) -> str:
        tensor = n.tensor("self")
        assert tensor is not None
        text = n.cast("self", n.out.dtype) if n.out.is_floating and not tensor.is_floating else n["self"]
        return f"mx.{function}({text})"

    return write


for _name in [
    "exp",
    "expm1",
    "log",
    "log2",
    "log10",
    "log1p",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "tanh",
    "sigmoid",
    "erf",
    "erfinv",
    "reciprocal",
]:
    entry(_name)(_unary(_name))
for _name in ("asin", "acos", "atan", "asinh", "acosh", "atanh"):
    entry(_name, f"arc{_name[1:]}")(_unary(f"arc{_name[1:]}"))
entry("special_expit")(_unary("sigmoid"))
entry("special_erf")(_unary("erf"))
entry("special_erfinv")(_unary("erfinv"))
entry("special_expm1")(_unary("expm1"))
entry("special_log1p")(_unary("log1p"))


def _rounded(name: str):  # type: ignore[no-untyped-def]
    return lambda n: f"mx.{name}({n['self']})" if n.out.is_floating else n["self"]


for _name in ("ceil", "floor"):
    entry(_name)(_rounded(_name))

templates(
    {
        "abs": "mx.abs({self})",
        "absolute": "mx.abs({self})",
        "neg": "-{self!a}",
        "negative": "-{self!a}",
        "positive": "{self}",
        "isnan": "mx.isnan({self})",
        "isinf": "mx.isinf({self})",
        "isfinite": "mx.isfinite({self})",
        "isposinf": "mx.isposinf({self})",
        "isneginf": "mx.isneginf({self})",
        "conj": "mx.conj({self})",
        "_conj": "mx.conj({self})",
        "conj_physical": "mx.conj({self})",
        "_conj_physical": "mx.conj({self})",
        "resolve_conj": "{self}",
        "resolve_neg": "{self}",
        "real": "mx.real({self})",
        "imag": "mx.imag({self})",
        "alias": "{self}",
        "argument": "{self}",
        "contiguous": "{self}",
        "detach": "mx.stop_gradient({self})",
        "detach_": "mx.stop_gradient({self})",
        "lift_fresh_copy": "{self}",
        "lift_fresh": "{self}",
        "lift": "{self}",
        "clone": "{self}",
        "deg2rad": "{self!a} * (math.pi / 180)",
        "rad2deg": "{self!a} * (180 / math.pi)",
    }
)


helper_entry("exp2", "special_exp2", function="exp2")
helper_entry("erfc", "special_erfc", function="erfc")
helper_entry("sinc", "special_sinc", function="sinc")
helper_entry("lgamma", "special_gammaln", function="lgamma")
helper_entry("digamma", "special_digamma", "special_psi", function="digamma")
helper_entry("trunc", "fix", function="trunc")
helper_entry("polygamma", "special_polygamma", function="polygamma", arguments=("self", "n"))
helper_entry("mvlgamma", "special_multigammaln", function="multivariate_lgamma", arguments=("self", "p"))
helper_entry("frac")
helper_entry("sign")
helper_entry("sgn", function="sgn")
helper_entry("signbit")
helper_entry("angle", function="angle")
helper_entry("special_entr", function="entr")
helper_entry("special_log_ndtr", function="log_ndtr")
helper_entry("special_ndtr", function="ndtr")


@entry("square")
def square(n: Operation) -> str:
    return f"mx.square({n.cast('self', n.out.dtype)})"


@entry("round")
def round_(n: Operation) -> str:
    if not n.out.is_floating:
        return n["self"]
    return f"mx.round({n['self']}" + (f", {n['decimals']})" if n.get("decimals") else ")")


@entry("clamp", "clip")
def clamp(n: Operation) -> str:
    low, high = n.args.get("min"), n.args.get("max")
    x = n.cast("self", n.out.dtype)
    return n.call("clip", x, n.source(low), n.source(high))


entry("clamp_min")(lambda n: n.call("clip", n.cast("self", n.out.dtype), n["min"], "None"))
entry("clamp_max")(lambda n: n.call("clip", n.cast("self", n.out.dtype), "None", n["max"]))


@entry("where", "exact_where")
def where(n: Operation) -> str:
    condition = n.cast("condition", "bool")
    if "self" not in n.args:
        return n.call("nonzero_where", condition)
    a, b = (_bare(text) for text in operands(n, "self", "other"))
    if n.tensor("self") is None and n.tensor("other") is None:  # MLX's dtypes of two numbers
        kinds = {type(n.args["self"]), type(n.args["other"])}
        have = "float32" if float in kinds else "int32" if int in kinds else n.out.dtype
        return cast_result(n, _where(n, condition, a, b), have)
    return _where(n, condition, number(n, a, "other"), number(n, b, "self"))


def _where(n: Operation, condition: str, a: str, b: str) -> str:
    is_exact = n.node.base.startswith("exact_") and n.out.is_floating
    return n.call("exact_where", condition, a, b) if is_exact else f"mx.where({condition}, {a}, {b})"


def _bare(text: str) -> str:
    """Returns an expression without the parentheses around it."""
    return text[1:-1] if text.startswith("(") and text.endswith(")") and text.count("(") == 1 else text


@entry("masked_fill", "exact_masked_fill")
def masked_fill(n: Operation) -> str:
    value = n.args["value"]
    tensor = n.tensor("value")
    text = number(n, n.cast("value", n.out.dtype), "self") if tensor is not None else n.source(value)
    if tensor is None and not n.out.is_floating and isinstance(value, (float, int)):
        text = repr(bool(value) if n.out.dtype == "bool" else int(value))
    return _where(n, n["mask"], text, n["self"])


entry("lerp")(lambda n: f"{n.atom('self')} + {n.atom('weight')} * ({n.atom('end')} - {n.atom('self')})")
entry("addcmul")(lambda n: _addc(n, "*"))
entry("addcdiv")(lambda n: _addc(n, "/"))


def _addc(n: Operation, symbol: str) -> str:
    value = n.get("value", 1)
    scale = "" if value == 1 else f"{n.source(value)} * "
    return f"{n.atom('self')} + {scale}({n.atom('tensor1')} {symbol} {n.atom('tensor2')})"


@entry("nan_to_num")
def nan_to_num(n: Operation) -> str:
    if not n.out.is_floating:
        return n["self"]
    nan = n.source(n.get("nan", 0.0))
    return n.call("nan_to_num", n["self"], nan, n["posinf"], n["neginf"])


@entry("to", "_to_copy", "type_as")
def to(n: Operation) -> str:
    tensor = n.tensor("self")
    if tensor is not None and tensor.is_floating and not (n.out.is_floating or n.out.is_complex):
        # MLX has a gradient through an array of integers that becomes one of floats again
        return f"mx.stop_gradient({n['self']}).astype(mx.{mlx_dtype(n.out.dtype)})"
    return n.cast("self", n.out.dtype) if tensor else n["self"]


for _name, _dtype in (
    ("float", "float32"),
    ("double", "float64"),
    ("half", "float16"),
    ("bfloat16", "bfloat16"),
    ("int", "int32"),
    ("long", "int64"),
    ("bool", "bool"),
):
    entry(f"_cast_{_name.capitalize()}")(lambda n: n.cast("self", n.out.dtype))


@entry("isclose")
def isclose(n: Operation) -> str:
    return f"mx.isclose({n['self']}, {n['other']}, {n['rtol']}, {n['atol']}, equal_nan={n['equal_nan']})"


entry("isreal")(lambda n: f"mx.imag({n['self']}) == 0" if _is_complex(n) else f"mx.ones_like({n['self']}) == 1")


def _is_complex(n: Operation) -> bool:
    tensor = n.tensor("self")
    return tensor is not None and tensor.is_complex


entry("complex")(lambda n: f"{n.atom('real')} + 1j * {n.atom('imag')}")
entry("polar")(lambda n: f"{n.atom('abs')} * (mx.cos({n['angle']}) + 1j * mx.sin({n['angle']}))")
entry("logit")(lambda n: n.call("logit", n.cast("self", n.out.dtype), n["eps"]))


@entry("view_as_real")
def view_as_real(n: Operation) -> str:
    return f"mx.stack([mx.real({n['self']}), mx.imag({n['self']})], axis=-1)"


@entry("view_as_complex")
def view_as_complex(n: Operation) -> str:
    return f"{n.atom('self')}[..., 0] + 1j * {n.atom('self')}[..., 1]"
