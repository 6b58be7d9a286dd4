"""Shapes: views, joins and repetitions."""

from __future__ import annotations

import itertools
import re
from typing import Any

from icenet.core.porting.record import Ref
from icenet.core.porting.table.arrays import dtype_option, sizes_of, tuple_source
from icenet.core.porting.table.base import Operation, atom, entry, mlx_dtype, shape_source


@entry("view", "reshape", "_unsafe_view", "_reshape_alias")
def view(n: Operation) -> str:
    if "dtype" in n.args:
        tensor = n.tensor("self")
        if tensor is not None and tensor.dtype == n.out.dtype:
            return n["self"]
        return f"mx.view({n['self']}, mx.{mlx_dtype(n.out.dtype)})"
    sizes: Any = n.args.get("size", n.args.get("shape"))
    source = n.tensor("self")
    if source is not None and tuple(n.out.shape) == tuple(source.shape):
        return n["self"]
    return f"{n.atom('self')}.reshape({shape_source(n, sizes)})" if sizes else f"{n.atom('self')}.reshape(())"


@entry("view_as", "reshape_as")
def view_as(n: Operation) -> str:
    return f"{n.atom('self')}.reshape({n.atom('other')}.shape)"


@entry("flatten")
def flatten(n: Operation) -> str:
    start, end = n.get("start_dim", 0), n.args.get("end_dim", -1)
    tensor = n.tensor("self")
    if tensor is not None and tensor.ndim and start % tensor.ndim == end % tensor.ndim:
        return n["self"]
    last = tensor is not None and tensor.ndim and end % tensor.ndim == tensor.ndim - 1
    return f"{n.atom('self')}.flatten({n.source(start)}{'' if last else f', {n.source(end)}'})"


@entry("unflatten")
def unflatten(n: Operation) -> str:
    return f"mx.unflatten({n['self']}, {n['dim']}, [{shape_source(n, n.args['sizes'])}])"


@entry("permute", "permute_copy")
def permute(n: Operation) -> str:
    dims = n.args["dims"]
    return f"{n.atom('self')}.transpose({', '.join(map(n.source, dims))})" if dims else n["self"]


@entry("transpose", "swapaxes", "swapdims")
def transpose(n: Operation) -> str:
    first = n.args.get("dim0", n.args.get("axis0"))
    second = n.args.get("dim1", n.args.get("axis1"))
    return f"{n.atom('self')}.swapaxes({n.source(first)}, {n.source(second)})" if n.out.ndim else n["self"]


@entry("t", "numpy_T", "mT", "mH", "adjoint", "H", "matrix_H", "T")
def t(n: Operation) -> str:
    name = n.node.base
    x = f"mx.conj({n['self']})" if name in ("mH", "adjoint", "H", "matrix_H") and n.out.is_complex else n.atom("self")
    if name in ("mT", "mH", "adjoint"):
        return f"{x}.swapaxes(-1, -2)"
    return f"{x}.T" if n.out.ndim > 1 else x


@entry("movedim", "moveaxis")
def movedim(n: Operation) -> str:
    if isinstance(n.args["source"], int):
        return f"mx.moveaxis({n['self']}, {n['source']}, {n['destination']})"
    return n.call("movedim", n["self"], n["source"], n["destination"])


@entry("unsqueeze")
def unsqueeze(n: Operation) -> str:
    dim = n.args["dim"]
    dim = dim if dim >= 0 else dim + n.out.ndim
    added = re.fullmatch(r"(.+)\[((?:(?::|None), )*None)\]", n.atom("self"))
    if added and dim <= 4 and dim >= added[2].count(",") + 1:  # y[:, None][:, :, None] is y[:, None, None]
        marks = added[2].split(", ")
        return f"{added[1]}[{', '.join([*marks, *[':'] * (dim - len(marks)), 'None'])}]"
    if dim <= 3:
        return f"{n.atom('self')}[{', '.join([':'] * dim + ['None'])}]"
    return f"mx.expand_dims({n['self']}, {dim})"


@entry("expand_rank")
def expand_rank(n: Operation) -> str:
    return f"{n.atom('self')}[{', '.join(['None'] * n.args['count'])}]"


@entry("squeeze")
def squeeze(n: Operation) -> str:
    tensor = n.tensor("self")
    assert tensor is not None
    dims = n.args.get("dim")
    if dims is None and any(isinstance(size, str) for size in tensor.shape):
        return f"{n.atom('self')}.squeeze()"  # at a size of 1 as well
    if dims is None:
        listed = [axis for axis, size in enumerate(tensor.shape) if size == 1]
    else:
        listed = [dim % max(tensor.ndim, 1) for dim in (dims if isinstance(dims, list) else [dims])]
        if len(listed) > tensor.ndim - n.out.ndim:  # else an open size is 1 as well
            listed = [dim for dim in listed if tensor.ndim and tensor.shape[dim] == 1]
    if not listed:
        return n["self"]
    return f"{n.atom('self')}.squeeze({listed[0] if len(listed) == 1 else tuple(listed)})"


@entry("expand", "broadcast_to")
def expand(n: Operation) -> str:
    sizes = n.args["size"]
    tensor = n.tensor("self")
    assert tensor is not None
    if tuple(sizes) == tensor.shape or all(size == -1 for size in sizes):
        return n["self"]
    added = len(sizes) - tensor.ndim
    sizes = [tensor.shape[index - added] if size == -1 else size for index, size in enumerate(sizes)]
    sizes = [size if isinstance(size, (int, Ref)) else -1 for size in sizes]
    if -1 in sizes and not n["self"].isidentifier():
        return n.call("expand", n["self"], n["size"])
    is_kept = [index >= added and size == tensor.shape[index - added] for index, size in enumerate(sizes)]
    first = len(sizes) - len([*itertools.takewhile(bool, reversed(is_kept))])
    is_number = any(type(size) is int and size not in (1, -1) for size in sizes[first:])
    if is_number and -1 not in sizes and re.fullmatch(r"[\w.]+", n["self"]):  # the operand's own sizes
        own = f"{n['self']}.shape"
        rest = f"*{own}[{first - added}:]" if len(sizes) - first > 1 else f"{own}[-1]"
        return f"mx.broadcast_to({n['self']}, ({', '.join([*map(n.source, sizes[:first]), rest])}))"
    given = [
        f"{n.atom('self')}.shape[{index - added}]" if size == -1 else n.source(size)
        for index, size in enumerate(sizes)
    ]
    return f"mx.broadcast_to({n['self']}, ({', '.join(given)}{',' if len(given) == 1 else ''}))"


@entry("expand_as")
def expand_as(n: Operation) -> str:
    return f"mx.broadcast_to({n['self']}, {n.atom('other')}.shape)"


@entry("broadcast_tensors")
def broadcast_tensors(n: Operation) -> str:
    return f"mx.broadcast_arrays({', '.join(n.source(item) for item in n.args['tensors'])})"


@entry("repeat", "tile")
def repeat(n: Operation) -> str:
    sizes = n.args.get("repeats", n.args.get("dims"))
    return f"mx.tile({n['self']}, {tuple_source(n, sizes)})" if sizes else n["self"]


@entry("repeat_interleave")
def repeat_interleave(n: Operation) -> str:
    if "repeats" in n.args and "self" not in n.args:
        return n.call("repeat_interleave", f"mx.arange({n.atom('repeats')}.shape[0])", n["repeats"], "0")
    if n.tensor("repeats") is None:
        dim = n.args.get("dim")
        if dim is None:
            return f"mx.repeat({n.atom('self')}.flatten(), {n['repeats']})"
        return f"mx.repeat({n['self']}, {n['repeats']}, axis={n.source(dim)})"
    return n.call("repeat_interleave", n["self"], n["repeats"], n["dim"])


@entry("cat", "concat", "concatenate", "_cat")
def cat(n: Operation) -> str:
    parts = n.args["tensors"]
    metas = [n.of(part) for part in parts]
    kept = [
        part for part, meta in zip(parts, metas, strict=True) if meta is None or meta.shape != (0,) or n.out.ndim == 1
    ]
    texts = []
    for part in kept:
        meta = n.of(part)
        text = n.source(part)
        if meta is not None and mlx_dtype(meta.dtype) != mlx_dtype(n.out.dtype):
            text = f"{atom(text)}.astype(mx.{mlx_dtype(n.out.dtype)})"
        texts.append(text)
    return f"mx.concatenate([{', '.join(texts)}], axis={n.source(n.get('dim', 0))})"


@entry("stack")
def stack(n: Operation) -> str:
    return f"mx.stack({n['tensors']}, axis={n['dim']})"


@entry("hstack", "vstack", "dstack", "column_stack", "row_stack", "block_diag")
def stacks(n: Operation) -> str:
    return n.call({"row_stack": "vstack"}.get(n.node.base, n.node.base), n["tensors"])


@entry("chunk", "unsafe_chunk")
def chunk(n: Operation) -> str:
    tensor = n.tensor("self")
    outs = n.node.out
    dim = n.args["dim"]
    assert tensor is not None
    sizes = [out.shape[dim] for out in outs]
    if len(set(sizes)) == 1:
        return f"mx.split({n['self']}, {len(outs)}, axis={n['dim']})"
    if not all(isinstance(size, int) for size in sizes):
        size = f"-(-{n.atom('self')}.shape[{dim}] // {n['chunks']})"  # rounded up
        return n.call("split_sizes", n["self"], size, repr(dim))
    return f"mx.split({n['self']}, {_ends(sizes)}, axis={n['dim']})"


def _ends(sizes: list[int]) -> str:
    ends, total = [], 0
    for size in sizes[:-1]:
        total += size
        ends.append(total)
    return repr(ends)


@entry("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(n: Operation) -> str:
    dim = n.args["dim"]
    outs = n.node.out
    sizes = [out.shape[dim] for out in outs]
    if all(isinstance(size, int) for size in sizes):
        if len(set(sizes)) == 1:
            return f"mx.split({n['self']}, {len(sizes)}, axis={dim})" if len(sizes) > 1 else f"[{n['self']}]"
        return f"mx.split({n['self']}, {_ends(sizes)}, axis={dim})"
    if len(set(map(str, sizes))) == 1:
        return f"mx.split({n['self']}, {len(sizes)}, axis={dim})"
    given = n.args.get("split_sizes", n.args.get("split_size"))
    return n.call("split_sizes", n["self"], n.source(given), repr(dim))


@entry("tensor_split", "hsplit", "vsplit", "dsplit")
def tensor_split(n: Operation) -> str:
    given = n.args.get("indices", n.args.get("sections"))
    if given is None:
        given = n.args.get("indices_or_sections", n.args.get("tensor_indices_or_sections"))
    tensor = n.tensor("self")
    assert tensor is not None
    dim = n.args.get("dim", {"vsplit": 0, "dsplit": 2, "hsplit": 0 if tensor.ndim == 1 else 1}.get(n.node.base, 0))
    return n.call("tensor_split", n["self"], n.source(given), n.source(dim))


@entry("unbind")
def unbind(n: Operation) -> str:
    tensor = n.tensor("self")
    assert tensor is not None
    dim = n.args["dim"] % tensor.ndim
    if dim == 0:
        return n["self"]
    return f"mx.moveaxis({n['self']}, {dim}, 0)" if not isinstance(n.node.out, list) or len(n.node.out) > 0 else "[]"


@entry("item")
def item(n: Operation) -> str:
    place = n.get("place", n.args["index"])
    return f"{n.atom('self')}{''.join(f'[{index}]' for index in (place if isinstance(place, tuple) else (place,)))}"


@entry("select")
def select(n: Operation) -> str:
    tensor = n.tensor("self")
    assert tensor is not None
    dim = n.args["dim"] % tensor.ndim
    return n.indexed("self", tensor.ndim, dim, n["index"])


@entry("slice")
def slice_(n: Operation) -> str:
    tensor = n.tensor("self")
    assert tensor is not None
    dim = n.args["dim"] % tensor.ndim
    return n.indexed("self", tensor.ndim, dim, slice_text(n)) if slice_text(n) != ":" else n["self"]


def slice_text(n: Operation) -> str:
    start, end, step = n.args.get("start"), n.args.get("end"), n.args.get("step", 1)
    first = "" if start in (None, 0) else n.source(start)
    final = "" if end is None or (isinstance(end, int) and end > 2**40) else n.source(end)
    return f"{first}:{final}" + (f":{n.source(step)}" if step not in (1, None) else "")


@entry("narrow", "narrow_copy")
def narrow(n: Operation) -> str:
    tensor = n.tensor("self")
    assert tensor is not None
    dim = n.args["dim"] % tensor.ndim
    start, length = n.args["start"], n.args["length"]
    if isinstance(start, int) and isinstance(length, int) and start >= 0:
        return n.indexed("self", tensor.ndim, dim, f"{start}:{start + length}")
    return n.call("narrow", n["self"], repr(dim), n["start"], n["length"])


@entry("resize", "resize_as")
def resize(n: Operation) -> str:
    """The elements in another shape; what an array grows by is undefined in PyTorch, and 0 here."""
    tensor = n.tensor("self")
    assert tensor is not None
    shape = f"{n.atom('the_template')}.shape" if n.node.base == "resize_as" else sizes_of(n)
    if tensor.shape == n.out.shape:
        return n["self"]
    if tensor.shape == (0,):
        return f"mx.zeros({shape}{dtype_option(n)})"
    return n.call("resize", n["self"], shape)


@entry("combinations")
def combinations(n: Operation) -> str:
    return n.call("combinations", n["self"], n.source(n.get("r", 2)), repr(bool(n.get("with_replacement"))))


@entry("with_values")
def with_values(n: Operation) -> str:
    """Values that x.detach() got in place: x has them, and its gradient is as before."""
    return n.call("with_values", n["self"], n["src"])


@entry(
    "pad",
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "_pad_circular",
)
def pad(n: Operation) -> str:
    base = n.node.base
    mode = n.get("mode", "constant")
    mode = (
        "reflect"
        if "reflection" in base
        else "replicate"
        if "replication" in base
        else "circular"
        if "circular" in base
        else mode
    )
    widths: Any = n.args.get("pad", n.args.get("padding"))
    tensor = n.tensor("self")
    assert tensor is not None
    pairs = [(widths[index], widths[index + 1]) for index in range(0, len(widths), 2)][::-1]
    if mode == "constant" and all(isinstance(size, int) for pair in pairs for size in pair):
        before = [(0, 0)] * (tensor.ndim - len(pairs))
        value = n.get("value", 0)
        text = repr([*before, *((max(a, 0), max(b, 0)) for a, b in pairs)])
        cut = [":"] * len(before) + [f"{-a if a < 0 else ''}:{b if b < 0 else ''}" for a, b in pairs]
        while cut and cut[-1] == ":":
            cut.pop()
        given = f"{n.atom('self')}[{', '.join(cut)}]" if cut else n["self"]
        return f"mx.pad({given}, {text}" + (f", constant_values={n.source(value)})" if value else ")")
    if mode == "constant":
        return n.call("pad", n["self"], n.source(widths), n.source(n.get("value", 0)))
    return n.call(f"pad_{mode}", n["self"], n.source(widths))


@entry("roll")
def roll(n: Operation) -> str:
    shifts, dims = n.args["shifts"], n.args.get("dims")
    if not dims:
        return f"mx.roll({n['self']}, {n.source(shifts[0] if isinstance(shifts, list) else shifts)})"
    if len(dims) == 1:
        return f"mx.roll({n['self']}, {n.source(shifts[0])}, axis={dims[0]})"
    return f"mx.roll({n['self']}, ({', '.join(map(n.source, shifts))}), axis={tuple(dims)})"


@entry("flip", "fliplr", "flipud")
def flip(n: Operation) -> str:
    dims = {"fliplr": [1], "flipud": [0]}.get(n.node.base) or n.args.get("dims")
    if not dims or not n.out.ndim:
        return n["self"]
    dims = [dim % n.out.ndim for dim in dims]
    parts = ["::-1" if axis in dims else ":" for axis in range(max(dims) + 1)]
    return f"{n.atom('self')}[{', '.join(parts)}]"


@entry("rot90")
def rot90(n: Operation) -> str:
    return n.call("rot90", n["self"], n["k"], n["dims"])


@entry("diagonal", "linalg_diagonal")
def diagonal(n: Operation) -> str:
    return f"mx.diagonal({n['self' if 'self' in n.args else 'A']}, {n['offset']}, {n['dim1']}, {n['dim2']})"


@entry("diag")
def diag(n: Operation) -> str:
    return f"mx.diag({n['self']}, {n['diagonal']})"


@entry("diag_embed", "diagflat")
def diag_embed(n: Operation) -> str:
    if n.node.base == "diagflat":
        return f"mx.diag({n.atom('self')}.flatten(), {n['offset']})"
    return n.call("diag_embed", n["self"], n["offset"], n["dim1"], n["dim2"])


@entry("tril", "triu")
def tril(n: Operation) -> str:
    diagonal = f", k={n['diagonal']}" if n.args["diagonal"] != 0 else ""
    return f"mx.{n.node.base}({n['self']}{diagonal})"


@entry("tril_indices", "triu_indices")
def tril_indices(n: Operation) -> str:
    return n.call(n.node.base, n["row"], n["col"], n["offset"])


@entry("meshgrid")
def meshgrid(n: Operation) -> str:
    indexing = n.get("indexing", "ij")
    return f"mx.meshgrid({', '.join(n.source(item) for item in n.args['tensors'])}, indexing={indexing!r})"


@entry("cartesian_prod")
def cartesian_prod(n: Operation) -> str:
    return n.call("cartesian_prod", n["tensors"])


@entry("unfold")
def unfold(n: Operation) -> str:
    return n.call("unfold", n["self"], n["dimension"], n["size"], n["step"])


@entry("im2col")
def im2col(n: Operation) -> str:
    return n.call("im2col", n["self"], n["kernel_size"], n["dilation"], n["padding"], n["stride"])


@entry("col2im")
def col2im(n: Operation) -> str:
    return n.call("col2im", n["self"], n["output_size"], n["kernel_size"], n["dilation"], n["padding"], n["stride"])


@entry("atleast_1d", "atleast_2d", "atleast_3d")
def atleast(n: Operation) -> str:
    if "tensors" in n.args:
        return f"[mx.{n.node.base}(x) for x in {n['tensors']}]"
    return f"mx.{n.node.base}({n['self']})"


@entry("ravel")
def ravel(n: Operation) -> str:
    return f"{n.atom('self')}.flatten()"


@entry("as_strided", "as_strided_copy")
def as_strided(n: Operation) -> str:
    offset = n.get("storage_offset", 0)
    return f"mx.as_strided(mx.contiguous({n['self']}), {n['size']}, {n['stride']}, {n.source(offset)})"


@entry("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(n: Operation) -> str:
    return n.call("channel_shuffle", n["self"], n["groups"])
