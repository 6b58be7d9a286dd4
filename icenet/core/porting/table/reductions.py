"""Sums, means, extremes, sorts and cumulative operations."""

from __future__ import annotations

from icenet.core.porting.record import Ref
from icenet.core.porting.table.base import Operation, atom, entry, flag, mlx_dtype
from icenet.core.porting.table.elementwise import cast_result


def _over(n: Operation, name: str = "dim") -> str:
    """Returns the axes and `keepdims` as arguments."""
    dims = n.dims(name)
    parts = [] if dims == "None" else [f"axis={dims}"]
    if flag(n, "keepdim"):
        parts.append("keepdims=True")
    return ", ".join(parts)


def _reduce(n: Operation, function: str, dtype: str | None = None) -> str:
    x = n.cast("self", dtype or n.out.dtype)
    return f"{atom(x)}.{function}({_over(n)})"


def _of_nothing(n: Operation, value: str) -> str | None:
    """Returns the result of a reduction of no elements, which MLX may not end for an array that is not contiguous."""
    tensor, dims = n.tensor("self"), n.args.get("dim")
    if tensor is None or not tensor.ndim or not all(isinstance(size, int) for size in tensor.shape):
        return None
    axes = range(tensor.ndim) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    if all(tensor.shape[axis] for axis in axes):
        return None
    return f"mx.full({tuple(n.out.shape)}, {value}, mx.{mlx_dtype(n.out.dtype)})"


@entry("sum", "nansum")
def sum_(n: Operation) -> str:
    nothing = _of_nothing(n, "0")
    if nothing is not None:
        return nothing
    x = n.cast("self", n.out.dtype)
    if n.node.base == "nansum":
        x = f"mx.where(mx.isnan({n['self']}), 0, {x})"
    return cast_result(
        n,
        f"{atom(x)}.sum({_over(n)})",
        n.out.dtype if n.out.dtype not in ("int8", "int16", "uint8", "bool") else "int32",
    )


@entry("mean", "nanmean")
def mean(n: Operation) -> str:
    if n.node.base == "nanmean":
        return n.call("nanmean", n["self"], n.dims(), repr(flag(n, "keepdim")))
    return _of_nothing(n, 'float("nan")') or _reduce(n, "mean")


@entry("prod")
def prod(n: Operation) -> str:
    have = n.out.dtype if n.out.dtype not in ("int8", "int16", "uint8", "bool") else "int32"
    return _of_nothing(n, "1") or cast_result(n, _reduce(n, "prod"), have)


@entry("amax", "amin")
def amax(n: Operation) -> str:
    return f"{n.atom('self')}.{n.node.base[1:]}({_over(n)})"


@entry("max", "min")
def max_(n: Operation) -> str:
    if "other" in n.args:
        name = "maximum" if n.node.base == "max" else "minimum"
        is_exact = n.out.is_floating  # where both are equal, MLX gives the gradient to one
        return n.call(name, n["self"], n["other"]) if is_exact else f"mx.{name}({n['self']}, {n['other']})"
    if "dim" not in n.args:
        return f"{n.atom('self')}.{n.node.base}()"
    return n.call(f"{n.node.base}_with_indices", n["self"], n["dim"], repr(flag(n, "keepdim")))


@entry("aminmax")
def aminmax(n: Operation) -> str:
    keep = repr(flag(n, "keepdim"))
    return f"({n.call('amin', n['self'], n.dims(), keep)}, {n.call('amax', n['self'], n.dims(), keep)})"


@entry("argmax", "argmin")
def argmax(n: Operation) -> str:
    x = n.atom("self")
    if n.tensor("self") and n.tensor("self").dtype == "bool":  # type: ignore[union-attr]
        x = f"{x}.astype(mx.int32)"
    return n.call(n.node.base, x, n["dim"], repr(flag(n, "keepdim")))


@entry("any", "all")
def any_(n: Operation) -> str:
    nothing = _of_nothing(n, str(n.node.base == "all"))
    if nothing is not None:
        return nothing
    return f"{atom(n.cast('self', 'bool'))}.{n.node.base}({_over(n)})" + (
        ".astype(mx.uint8)" if n.out.dtype == "uint8" else ""
    )


@entry("var", "std", "var_mean", "std_mean")
def var(n: Operation) -> str:
    correction = n.args.get("correction", 1)
    if "unbiased" in n.args:
        correction = int(bool(n.args["unbiased"]))
    correction = 1 if correction is None else correction
    return n.call(n.node.base, n["self"], n.dims(), n.source(correction), repr(flag(n, "keepdim")))


@entry("logsumexp", "special_logsumexp")
def logsumexp(n: Operation) -> str:
    return f"mx.logsumexp({n.cast('self', n.out.dtype)}, {_over(n)})"


@entry("logcumsumexp")
def logcumsumexp(n: Operation) -> str:
    return f"mx.logcumsumexp({n['self']}, axis={n['dim']})" if n.out.ndim else n["self"]


@entry("cumsum")
def cumsum(n: Operation) -> str:
    return f"mx.cumsum({n.cast('self', n.out.dtype)}, axis={n['dim']})" if n.out.ndim else n.cast("self", n.out.dtype)


@entry("cumprod")
def cumprod(n: Operation) -> str:
    return (
        f"mx.cumprod({n.cast('self', n.out.dtype)}, axis={n['dim']})" if n.out.ndim else n.cast("self", n.out.dtype)
    )


@entry("cummax", "cummin")
def cummax(n: Operation) -> str:
    return n.call(n.node.base, n["self"], n["dim"])


@entry("count_nonzero")
def count_nonzero(n: Operation) -> str:
    return _of_nothing(n, "0") or f"({n.atom('self')} != 0).sum({_over(n)}).astype(mx.int64)"


@entry("norm", "linalg_vector_norm")
def norm(n: Operation) -> str:
    order = n.args.get("ord", n.args.get("p"))
    if order == "nuc":
        return n.call("matrix_norm", n["self"], repr("nuc"), n["dim"], repr(flag(n, "keepdim")))
    if order == "fro":
        order = 2
    if order not in (float("inf"), float("-inf")):
        nothing = _of_nothing(n, 'float("inf")' if order is not None and order < 0 else "0")
        if nothing is not None:
            return nothing
    return n.call(
        "vector_norm",
        n.cast("self", n.out.dtype),
        n.source(2 if order is None else order),
        n.dims(),
        repr(flag(n, "keepdim")),
    )


@entry("softmax", "_softmax", "special_softmax", "_safe_softmax")
def softmax(n: Operation) -> str:
    if 0 in n.out.shape:
        return n.cast("self", n.out.dtype)
    if not n.out.ndim:
        return f"mx.ones_like({n.cast('self', n.out.dtype)})"
    if n.node.base == "_safe_softmax":
        return n.call("safe_softmax", n.cast("self", n.out.dtype), n["dim"])
    if n.out.dtype in ("float16", "bfloat16"):
        return f"mx.softmax({n.cast('self', n.out.dtype)}, axis={n['dim']}, precise=True)"
    return f"mx.softmax({n.cast('self', n.out.dtype)}, axis={n['dim']})"


@entry("log_softmax", "_log_softmax", "special_log_softmax")
def log_softmax(n: Operation) -> str:
    if 0 in n.out.shape:
        return n.cast("self", n.out.dtype)
    if not n.out.ndim:
        return f"mx.zeros_like({n.cast('self', n.out.dtype)})"
    return n.call("log_softmax", n.cast("self", n.out.dtype), n["dim"])


@entry("softmin")
def softmin(n: Operation) -> str:
    if not n.out.ndim:
        return f"mx.ones_like({n['self']})"
    return f"mx.softmax(-{n.atom('self')}, axis={n['dim']})"


@entry("sort")
def sort(n: Operation) -> str:
    return n.call("sort", n["self"], n["dim"], repr(flag(n, "descending")))


@entry("argsort")
def argsort(n: Operation) -> str:
    return n.call("sort", n["self"], n["dim"], repr(flag(n, "descending"))) + "[1]"


@entry("msort")
def msort(n: Operation) -> str:
    return f"mx.sort({n['self']}, axis=0)" if n.out.ndim else n["self"]


@entry("topk")
def topk(n: Operation) -> str:
    return n.call("topk", n["self"], n["k"], n["dim"], repr(n.get("largest", False)))


@entry("kthvalue")
def kthvalue(n: Operation) -> str:
    return n.call("kthvalue", n["self"], n["k"], n["dim"], repr(flag(n, "keepdim")))


@entry("median", "nanmedian")
def median(n: Operation) -> str:
    if "dim" not in n.args:
        return n.call(n.node.base, n["self"])
    return n.call(f"{n.node.base}_with_indices", n["self"], n["dim"], repr(flag(n, "keepdim")))


@entry("bincount")
def bincount(n: Operation) -> str:
    least = n.args["minlength"]
    if n.out.shape[0] == (n.size(least) if isinstance(least, Ref) else least):  # what uses the counts has this size
        return n.call("occurrences", n["self"], n["weights"], n["minlength"])
    return n.call("bincount", n["self"], n["weights"], n["minlength"])


@entry("histc")
def histc(n: Operation) -> str:
    return n.call("histc", n["self"], n["bins"], n.source(n.get("min", 0)), n.source(n.get("max", 0)))


@entry("mode")
def mode(n: Operation) -> str:
    return n.call("mode", n["self"], n.source(n.get("dim", -1)), repr(flag(n, "keepdim")))


@entry("quantile", "nanquantile")
def quantile(n: Operation) -> str:
    interpolation = repr(n.get("interpolation", "linear"))
    given = [n["self"], n["q"], n["dim"], repr(flag(n, "keepdim")), interpolation]
    return n.call("quantile", *given, *(["True"] if n.node.base == "nanquantile" else []))


@entry("cov")
def cov(n: Operation) -> str:
    x = n.cast("self", n.out.dtype)
    return n.call("covariance", x, n.source(n.get("correction", 1)), n["fweights"], n["aweights"])


entry("corrcoef")(lambda n: n.call("correlation", n.cast("self", n.out.dtype)))


@entry("gradient")
def gradient(n: Operation) -> str:
    tensor, dims, spacing = n.tensor("self"), n.args.get("dim"), n.args.get("spacing")
    assert tensor is not None
    axes = list(range(tensor.ndim)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    spacing = [1 if spacing is None else spacing] * len(axes) if not isinstance(spacing, (list, tuple)) else spacing
    return n.call("differences", n["self"], n.source(spacing), n.source(axes), n.source(n.get("edge_order", 1)))


@entry("sum_to_size")
def sum_to_size(n: Operation) -> str:
    return n.call("sum_to", n.cast("self", n.out.dtype), n["size"])


@entry("dist")
def dist(n: Operation) -> str:
    return n.call("vector_norm", f"{n.atom('self')} - {n.atom('other')}", n["p"], "None", "False")


@entry("cdist", "_cdist_forward")
def cdist(n: Operation) -> str:
    return n.call("cdist", n["x1"], n["x2"], n["p"])


@entry("pdist", "_pdist_forward")
def pdist(n: Operation) -> str:
    return n.call("pdist", n["self"], n["p"])


@entry("cosine_similarity")
def cosine_similarity(n: Operation) -> str:
    return n.call("cosine_similarity", n["x1"], n["x2"], n["dim"], n["eps"])


@entry("pairwise_distance")
def pairwise_distance(n: Operation) -> str:
    return n.call("pairwise_distance", n["x1"], n["x2"], n["p"], n["eps"], n["keepdim"])


@entry("trapezoid", "trapz")
def trapezoid(n: Operation) -> str:
    return n.call("trapezoid", n["y"], n.source(n.args.get("x")), n.source(n.args.get("dx", 1)), n["dim"])


@entry("cumulative_trapezoid")
def cumulative_trapezoid(n: Operation) -> str:
    return n.call("cumulative_trapezoid", n["y"], n.source(n.args.get("x")), n.source(n.args.get("dx", 1)), n["dim"])


@entry("diff")
def diff(n: Operation) -> str:
    return n.call("diff", n["self"], n["n"], n["dim"], n["prepend"], n["append"])


@entry("renorm")
def renorm(n: Operation) -> str:
    return n.call("renorm", n["self"], n["p"], n["dim"], n["maxnorm"])
