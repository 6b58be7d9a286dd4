"""Values that are written into views of arrays."""

from __future__ import annotations

from typing import Any

from icenet.core.errors import PortError
from icenet.core.porting.record import Node, Ref, Tensor
from icenet.core.porting.table.base import TABLE, Operation, entry, mlx_dtype

_RESHAPES = (
    "view",
    "reshape",
    "reshape_as",
    "flatten",
    "unflatten",
    "ravel",
    "squeeze",
    "unsqueeze",
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "view_as",
    "_unsafe_view",
)


def _joined(n: Operation, tensor: Tensor, parts: list[Any]) -> str:
    """Returns new values for the elements after an index as a concatenation; an empty string for other ones."""
    source, dim = n.tensor("src"), n.args["args"]["dim"] % max(tensor.ndim, 1)
    start, end, step = parts
    if type(start) is not int or start <= 0 or end is not None or step not in (1, None):
        return ""
    if source is None or source.dtype != tensor.dtype or source.ndim != tensor.ndim:
        return ""
    size, given = tensor.shape[dim], source.shape[dim]
    is_same = given == size - start if isinstance(size, int) else isinstance(given, str)
    others = [(*shape[:dim], *shape[dim + 1 :]) for shape in (tensor.shape, source.shape)]
    if not is_same or others[0] != others[1]:
        return ""
    return f"mx.concatenate([{n.indexed('self', tensor.ndim, dim, f':{start}')}, {n['src']}], axis={dim})"


@entry("scatter_view")
def scatter_view(n: Operation) -> str:
    """A view of an array gets new values: the array with them."""
    op, args = n.args["view"].partition(".")[0], n.args["args"]
    tensor = n.tensor("self")
    assert tensor is not None
    inner = n.changed({**args, "self": n.args["self"]})
    if op == "view" and "dtype" in args:
        return f"{n.atom('src')}.view(mx.{mlx_dtype(tensor.dtype)})"
    if op == "index":
        texts = [_slice(n, item) if isinstance(item, slice) else n.source(item) for item in args["index"]]
        return n.call("put", n["self"], f"({', '.join(texts)}{',' if len(texts) == 1 else ''})", n["src"])
    if op == "select":
        return n.call("put", n["self"], _slices(tensor.ndim, args["dim"], inner["index"]), n["src"])
    if op == "slice":
        parts = [args.get("start"), args.get("end"), args.get("step", 1)]
        parts[1] = None if isinstance(parts[1], int) and parts[1] > 2**40 else parts[1]
        text = f"slice({', '.join(map(n.source, parts if parts[2] not in (1, None) else parts[:2]))})"
        if parts[0] in (None, 0) and parts[1] is None and parts[2] in (1, None):
            text = "slice(None)"
        return _joined(n, tensor, parts) or n.call(
            "put", n["self"], _slices(tensor.ndim, args["dim"], text), n["src"]
        )
    if op == "narrow":
        start, length = n.source(args["start"]), n.source(args["length"])
        return n.call(
            "put", n["self"], _slices(tensor.ndim, args["dim"], f"slice({start}, {start} + {length})"), n["src"]
        )
    if op in _RESHAPES:
        return f"{n.atom('src')}.reshape({n.atom('self')}.shape)"
    if op in ("transpose", "swapaxes", "swapdims"):
        first, second = args.get("dim0", args.get("axis0")), args.get("dim1", args.get("axis1"))
        return f"{n.atom('src')}.swapaxes({first}, {second})"
    if op in ("mT", "mH", "adjoint") or (op in ("t", "numpy_T", "T", "matrix_H", "H") and tensor.ndim <= 2):
        is_conjugate = tensor.is_complex and op in ("mH", "adjoint", "matrix_H", "H")
        values = f"mx.conj({n['src']})" if is_conjugate else n.atom("src")
        return f"{values}.swapaxes(-1, -2)" if tensor.ndim > 1 else values
    if op == "permute":
        dims = [dim % tensor.ndim for dim in args["dims"]]
        return f"{n.atom('src')}.transpose({', '.join(str(dims.index(axis)) for axis in range(tensor.ndim))})"
    if op == "diagonal":
        return n.call(
            "diagonal_scatter", n["self"], n["src"], repr(args["offset"]), repr(args["dim1"]), repr(args["dim2"])
        )
    if op == "real":
        return f"{n.atom('src')} + 1j * mx.imag({n['self']})"
    if op == "imag":
        return f"mx.real({n['self']}) + 1j * {n.atom('src')}"
    if op == "view_as_real":
        return f"{n.atom('src')}[..., 0] + 1j * {n.atom('src')}[..., 1]"
    if op == "view_as_complex":
        return f"mx.stack([mx.real({n['src']}), mx.imag({n['src']})], axis=-1)"
    if op in ("conj", "_conj"):
        return f"mx.conj({n['src']})"
    if op in ("expand", "expand_as", "broadcast_to"):
        return n.call("unexpand", n["src"], n["self"])
    return _put_view(n)


def _put_view(n: Operation, out: Any = None, part: str = "") -> str:
    """Returns the source that writes values into any view, whose places are those of the view of their numbers."""
    view = Node(n.node.name, n.args["view"], {**n.args["args"], "self": n.args["self"]}, out or n.of(n.args["src"]))
    if view.base not in TABLE:
        raise PortError(
            f"aten.{view.base} of a value that is changed in place afterwards has no counterpart; "
            "write it with clone()"
        )

    def source(ref: Ref) -> str:
        return "places" if ref == n.args["self"] else n._source(ref)

    text = TABLE[view.base](Operation(view, source, n._tensors, n._uses, n.training))
    return n.call("put_view", n["self"], f"lambda places: {text}{part}", n["src"])


def _slice(n: Operation, item: slice) -> str:
    if item == slice(None):
        return "slice(None)"
    parts = [item.start, item.stop, item.step]
    return f"slice({', '.join(map(n.source, parts if item.step is not None else parts[:2]))})"


def written_at(n: Operation, index: list[Any]) -> str:
    """Returns the source of an index in brackets."""
    while len(index) > 1 and index[-1] == slice(None):
        index = index[:-1]
    tensor = n.tensor("self")
    rest = 0
    while rest < len(index) - 1 and index[rest] == slice(None):
        rest += 1
    texts = []
    for item in index:
        if isinstance(item, slice):
            ends = ["" if end is None else n.source(end) for end in (item.start, item.stop)]
            texts.append(":".join(ends) + (f":{n.source(item.step)}" if item.step is not None else ""))
        else:
            texts.append(n.source(item))
    if rest > 1 and tensor is not None and len(index) == tensor.ndim:
        texts = ["...", *texts[rest:]]
    return ", ".join(texts)


def _slices(ndim: int, dim: int, text: str) -> str:
    parts = ["slice(None)"] * (dim % ndim) + [text]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


@entry("scatter_item")
def scatter_item(n: Operation) -> str:
    op, args, index = n.args["view"].partition(".")[0], n.args["args"], n.args["index"]
    tensor, source = n.tensor("self"), n.tensor("src")
    assert tensor is not None and source is not None
    dim = args.get("dim", 0)
    if op == "unbind":
        return n.call("put", n["self"], _slices(tensor.ndim, dim, repr(index)), n["src"])
    sizes, size, length = args.get("split_sizes"), args.get("split_size"), source.shape[dim]
    start = index * size if type(size) is int else sum(sizes[:index]) if _are_numbers(sizes) else None
    if start is None or type(length) is not int:
        return _put_view(n, [source], f"[{index}]")
    return n.call("put", n["self"], _slices(tensor.ndim, dim, f"slice({start}, {start + length})"), n["src"])


def _are_numbers(sizes: Any) -> bool:
    return isinstance(sizes, (list, tuple)) and all(type(size) is int for size in sizes)


@entry("select_scatter", "slice_scatter", "diagonal_scatter")
def view_scatter(n: Operation) -> str:
    tensor = n.tensor("self")
    assert tensor is not None
    if n.node.base == "diagonal_scatter":
        return n.call("diagonal_scatter", n["self"], n["src"], n["offset"], n["dim1"], n["dim2"])
    if n.node.base == "select_scatter":
        return n.call("put", n["self"], _slices(tensor.ndim, n.args["dim"], n["index"]), n["src"])
    end = n.args.get("end")
    end = None if isinstance(end, int) and end > 2**40 else end
    text = f"slice({n['start']}, {n.source(end)}, {n['step']})"
    return n.call("put", n["self"], _slices(tensor.ndim, n.args["dim"], text), n["src"])
