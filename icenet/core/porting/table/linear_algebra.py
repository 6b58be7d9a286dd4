"""Products, attention, einsum and Fourier transforms."""

from __future__ import annotations

from typing import Any

from icenet.core.errors import PortError
from icenet.core.porting.table.base import Operation, atom, entry, in_floating_point


@entry("mm", "bmm", "matmul", "mv", "linalg_matmul", "__matmul__")
def matmul(n: Operation) -> str:
    other = next(name for name in ("other", "mat2", "vec") if name in n.args)
    return product(n, "self", other)


def product(n: Operation, a: str, b: str) -> str:
    if not n.out.is_floating and not n.out.is_complex:  # MLX multiplies floating-point matrices only
        return n.call("integer_matmul", n[a], n[b])
    return f"{n.atom(a)} @ {n.atom(b)}"


@entry("dot", "vdot", "inner", "linalg_vecdot")
def dot(n: Operation) -> str:
    if n.node.base == "linalg_vecdot":
        return (
            f"(mx.conj({n['x']}) * {n.atom('y')}).sum({n['dim']})"
            if n.out.is_complex
            else f"({n.atom('x')} * {n.atom('y')}).sum({n['dim']})"
        )
    other = n.args.get("other", n.args.get("tensor"))
    text = n.source(other)
    first = f"mx.conj({n['self']})" if n.node.base == "vdot" and n.out.is_complex else n.atom("self")
    if n.node.base == "inner":
        return n.call("inner", n["self"], text)
    return f"({first} * {atom(text)}).sum()"


entry("outer", "ger")(lambda n: f"{n.atom('self')}[:, None] * {n.atom('vec2')}")
entry("kron")(lambda n: f"mx.kron({n['self']}, {n['other']})")
entry("cross", "linalg_cross")(lambda n: n.call("cross", n["self"], n["other"], n["dim"]))
entry("trace")(lambda n: f"mx.trace({n['self']})")


@entry("addmm", "addbmm", "baddbmm", "addmv", "addr")
def addmm(n: Operation) -> str:
    names = {
        "addmm": ("mat1", "mat2"),
        "addbmm": ("batch1", "batch2"),
        "baddbmm": ("batch1", "batch2"),
        "addmv": ("mat", "vec"),
        "addr": ("vec1", "vec2"),
    }
    a, b = names[n.node.base]
    beta, alpha = n.get("beta", 1), n.args.get("alpha", 1)
    if not n.out.is_floating and not n.out.is_complex:
        beta, alpha = int(beta), int(alpha)
    if n.node.base == "addmm" and alpha == beta == 1 and n.out.is_floating:
        return f"mx.addmm({n['self']}, {n[a]}, {n[b]})"
    if n.out.dtype == "bool":
        text = f"{n.atom(a)}[:, None] & {n.atom(b)}" if alpha else f"mx.zeros_like({n['self']})"
        return f"{n.atom('self')} | {atom(text)}" if beta else text
    if n.node.base == "addr":
        text = f"{n.atom(a)}[:, None] * {n.atom(b)}"
    elif n.node.base == "addbmm":
        text = f"({product(n, a, b)}).sum(0)"
    else:
        text = product(n, a, b)
    if alpha != 1:
        text = f"{n.source(alpha)} * ({text})"
    if beta == 0:
        return text
    return f"{n.atom('self') if beta == 1 else f'{n.source(beta)} * ' + n.atom('self')} + {text}"


@entry("linear")
@in_floating_point
def linear(n: Operation) -> str:
    text = f"{n.atom('input')} @ {n.atom('weight')}.T"
    return text if n.args.get("bias") is None else f"{text} + {n.atom('bias')}"


@entry("bilinear")
@in_floating_point
def bilinear(n: Operation) -> str:
    return n.call("bilinear", n["input1"], n["input2"], n["weight"], n["bias"])


@entry("einsum")
@in_floating_point
def einsum(n: Operation) -> str:
    equation = n.args["equation"].replace(" ", "")
    return f"mx.einsum({equation!r}, {', '.join(n.source(item) for item in n.args['tensors'])})"


@entry("tensordot")
@in_floating_point
def tensordot(n: Operation) -> str:
    a, b = n.tensor("self"), n.tensor("other")
    assert a is not None and b is not None
    pairs = zip(n.args["dims_self"], n.args["dims_other"], strict=True)
    if any((a.shape[i] == 1) != (b.shape[j] == 1) for i, j in pairs):
        return n.call("tensordot", n["self"], n["other"], n["dims_self"], n["dims_other"])
    return f"mx.tensordot({n['self']}, {n['other']}, ({n['dims_self']}, {n['dims_other']}))"


@entry("chain_matmul", "linalg_multi_dot")
@in_floating_point
def chain_matmul(n: Operation) -> str:
    parts: Any = n.args.get("matrices", n.args.get("tensors"))
    return " @ ".join(atom(n.source(part)) for part in parts)


@entry("matrix_power", "linalg_matrix_power")
def matrix_power(n: Operation) -> str:
    return n.call("matrix_power", n["self"], n["n"])


@entry("scaled_dot_product_attention", "_scaled_dot_product_attention_math")
def attention(n: Operation) -> str:
    q = n.tensor("query")
    k = n.tensor("key")
    assert q is not None and k is not None
    dropout = n.get("dropout_p", 0.0)
    scale = n.get("scale")
    head = q.shape[-1]
    plain = q.ndim == 4 and dropout == 0 and isinstance(head, int)
    scale_text = n.source(scale) if scale is not None else f"{head} ** -0.5"
    mask = "None"
    if n.args.get("is_causal"):
        mask = '"causal"' if q.shape[-2] == k.shape[-2] else ""
    if n.args.get("attn_mask") is not None:
        mask = n["attn_mask"]
    grouped = bool(n.args.get("enable_gqa"))
    mask_meta = n.tensor("attn_mask")
    boolean = mask_meta is not None and mask_meta.dtype == "bool"
    if plain and mask and not boolean and (grouped or q.shape[1] == k.shape[1]):
        if n.get("hides_rows"):
            return n.call("biased_attention", n["query"], n["key"], n["value"], mask, scale_text)
        given = "" if mask == "None" else f", mask={mask}"
        return (
            f"mx.fast.scaled_dot_product_attention({n['query']}, {n['key']}, {n['value']}, scale={scale_text}{given})"
        )
    v = n.tensor("value")
    assert v is not None
    same = q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1] == v.shape[1]
    if plain and boolean and same and (grouped or k.shape[1] in (1, q.shape[1])):
        return n.call("masked_attention", n["query"], n["key"], n["value"], n["attn_mask"], scale_text)
    keywords = {"mask": n["attn_mask"], "causal": repr(bool(n.args.get("is_causal"))), "scale": n.source(scale)}
    if dropout:
        keywords["dropout"] = n.source(dropout)
    if grouped and (q.ndim < 3 or q.shape[-3] != k.shape[-3]):
        keywords["grouped"] = "True"
    return n.call(
        "attention",
        n["query"],
        n["key"],
        n["value"],
        **{k: v for k, v in keywords.items() if v not in ("None", "False")},
    )


# ---- Fourier transforms ------------------------------------------------------------------------------------


def _fft(name: str):  # type: ignore[no-untyped-def]
    def write(n: Operation) -> str:
        size = n.args.get("n", n.args.get("s"))
        dims = n.args.get("dim")
        norm = n.get("norm", "backward")
        if isinstance(size, (list, tuple)) and -1 in size:
            return n.call("fft", repr(name), n["self"], n.source(size), n.source(dims), repr(norm))
        sizes, axes = ("s", "axes") if name[-1] in "2n" else ("n", "axis")
        default = {"2": [-2, -1], "n": None}.get(name[-1], -1)
        if size is not None and dims is None and sizes == "s":
            dims = list(range(-len(size), 0))
        given = "" if size is None else f", {sizes}={n.source(size)}"
        given += "" if dims in (None, default) else f", {axes}={n.source(dims)}"
        given += "" if norm == "backward" else f", norm={norm!r}"
        return f"mx.fft.{name}({n['self']}{given})"

    return write


for _name in ("fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn", "rfftn", "irfftn"):
    entry(f"fft_{_name}")(_fft(_name))


@entry("fft_hfft", "fft_ihfft", "fft_hfft2", "fft_ihfft2", "fft_hfftn", "fft_ihfftn")
def hfft(n: Operation) -> str:
    size = n.source(n.args.get("n", n.args.get("s")))
    return n.call("hfft", repr(n.node.base[4:]), n["self"], size, n["dim"], repr(n.get("norm", "backward")))


entry("fft_fftshift")(lambda n: f"mx.fft.fftshift({n['self']}, {n.dims()})")
entry("fft_ifftshift")(lambda n: f"mx.fft.ifftshift({n['self']}, {n.dims()})")


@entry("fft_fftfreq", "fft_rfftfreq")
def fftfreq(n: Operation) -> str:
    return n.call(n.node.base.removeprefix("fft_"), n["n"], n["d"])


@entry("stft")
def stft(n: Operation) -> str:
    names = ("self", "n_fft", "hop_length", "win_length", "window", "normalized", "onesided", "return_complex")
    center = n.args.get("center", False)
    return n.call(
        "stft",
        *(n.source(n.args.get(name)) for name in names),
        repr(bool(center)),
        repr(n.get("pad_mode", "reflect")),
    )


@entry("istft")
def istft(n: Operation) -> str:
    names = ("self", "n_fft", "hop_length", "win_length", "window", "center", "normalized", "onesided", "length")
    return n.call("istft", *(n.source(n.args.get(name)) for name in (*names, "return_complex")))


@entry("grouped_mm", "_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(n: Operation) -> str:
    given = [n.args.get(first, n.args.get(second)) for first, second in (("self", "input"), ("mat2", "weight"))]
    if any(tensor is None or tensor.ndim != ndim for tensor, ndim in zip(map(n.of, given), (2, 3), strict=True)):
        raise PortError(f"{n.node.place or n.node.name}: a grouped product has rows and a matrix for each group only")
    return n.call("grouped_mm", *map(n.source, given), n["offs"])
