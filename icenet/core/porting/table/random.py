"""Random numbers, from MLX's own generator."""

from __future__ import annotations

from icenet.core.porting.table.arrays import sizes_of
from icenet.core.porting.table.base import Operation, entry, mlx_dtype, training_flag


def _input(n: Operation) -> str:
    """Returns the name of the input, which is another one in place."""
    return "input" if "input" in n.args else "self"


@entry("dropout", "native_dropout")
def dropout(n: Operation) -> str:
    if n.args["p"] == 0:
        return n[_input(n)]
    return n.call("dropout", n[_input(n)], n["p"], training_flag(n, "train"))


@entry("feature_dropout")
def feature_dropout(n: Operation) -> str:
    return n.call("feature_dropout", n[_input(n)], n["p"], training_flag(n, "train"))


@entry("alpha_dropout", "feature_alpha_dropout")
def alpha_dropout(n: Operation) -> str:
    whole = repr(n.node.base.startswith("feature"))
    return n.call("alpha_dropout", n[_input(n)], n["p"], training_flag(n, "train"), whole)


def _dtype(n: Operation) -> str:
    dtype = mlx_dtype(n.out.dtype)
    return "" if dtype == "float32" else f", dtype=mx.{dtype}"


@entry("rand", "randn")
def rand(n: Operation) -> str:
    return f"mx.random.{'uniform' if n.node.base == 'rand' else 'normal'}(shape={sizes_of(n)}{_dtype(n)})"


@entry("rand_like", "randn_like")
def rand_like(n: Operation) -> str:
    return (
        f"mx.random.{'uniform' if n.node.base == 'rand_like' else 'normal'}(shape={n.atom('self')}.shape{_dtype(n)})"
    )


@entry("randint", "randint_like")
def randint(n: Operation) -> str:
    shape = f"{n.atom('self')}.shape" if "self" in n.args else sizes_of(n)
    drawn = f"mx.random.randint({n.source(n.args.get('low', 0))}, {n['high']}, {shape})"
    return f"{drawn}.astype(mx.{mlx_dtype(n.out.dtype)})"


@entry("randperm")
def randperm(n: Operation) -> str:
    return f"mx.random.permutation({n['n']}).astype(mx.{mlx_dtype(n.out.dtype)})"


@entry("bernoulli")
def bernoulli(n: Operation) -> str:
    p = n.args.get("p")
    text = n["self"] if p is None else n.source(p)
    return f"mx.random.bernoulli({text}, {n.atom('self')}.shape).astype(mx.{mlx_dtype(n.out.dtype)})"


@entry("normal", "normal_functional")
def normal(n: Operation) -> str:
    if n.tensor("self") is not None:
        return f"{n['mean']} + {n['std']} * mx.random.normal({n.atom('self')}.shape)"
    return n.call(
        "normal", n.source(n.args.get("mean", 0.0)), n.source(n.args.get("std", 1.0)), n.source(n.args.get("size"))
    )


@entry("uniform")
def uniform(n: Operation) -> str:
    low, high = n.source(n.args.get("from", 0.0)), n.source(n.args.get("to", 1.0))
    return f"mx.random.uniform({low}, {high}, {n.atom('self')}.shape)"


@entry("exponential")
def exponential(n: Operation) -> str:
    return f"-mx.log1p(-mx.random.uniform(shape={n.atom('self')}.shape)) / {n['lambd']}"


@entry("log_normal")
def log_normal(n: Operation) -> str:
    return f"mx.exp({n['mean']} + {n['std']} * mx.random.normal({n.atom('self')}.shape))"


@entry("cauchy")
def cauchy(n: Operation) -> str:
    drawn = f"mx.random.uniform(shape={n.atom('self')}.shape)"
    return f"{n['median']} + {n['sigma']} * mx.tan(math.pi * ({drawn} - 0.5))"


@entry("geometric")
def geometric(n: Operation) -> str:
    drawn = f"mx.random.uniform(shape={n.atom('self')}.shape)"
    return f"mx.ceil(mx.log1p(-{drawn}) / math.log1p(-{n['p']})).astype(mx.{mlx_dtype(n.out.dtype)})"


@entry("multinomial")
def multinomial(n: Operation) -> str:
    return n.call("multinomial", n["self"], n["num_samples"], n["replacement"])
