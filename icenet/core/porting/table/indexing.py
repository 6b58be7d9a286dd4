"""Reading and writing at indices."""

from __future__ import annotations

import re
from typing import Any

from icenet.core.porting.table.base import Operation, entry, number


@entry("embedding")
def embedding(n: Operation) -> str:
    rows = f"{n.atom('weight')}[{n['indices']}]"
    if n.get("padding_idx", -1) >= 0:
        rows = n.call("embedding", n["weight"], n["indices"], n["padding_idx"])
    return n.call("by_frequency", rows, n["indices"]) if n.get("scale_grad_by_freq") else rows


@entry("embedding_renorm")
def embedding_renorm(n: Operation) -> str:
    return n.call("embedding_renorm", n["self"], n["indices"], n["max_norm"], n["norm_type"])


@entry("embedding_bag", "_embedding_bag")
def embedding_bag(n: Operation) -> str:
    names = ("weight", "indices", "offsets", "mode", "per_sample_weights", "include_last_offset", "padding_idx")
    values = {name: n.args.get(name) for name in (*names, "scale_grad_by_freq")}
    padding, weight = n.get("padding_idx", 0), n.tensor("weight")
    if n.node.base == "embedding_bag" and padding < 0 and weight is not None:  # from the end; in _embedding_bag none
        values["padding_idx"] = int(weight.shape[0]) + padding  # type: ignore[call-overload]
    return n.call("embedding_bag", *map(n.source, values.values()))


@entry("index", "_unsafe_index")
def index(n: Operation) -> str:
    indices = n.args["indices"]
    tensor = n.tensor("self")
    assert tensor is not None
    metas = [n.of(item) for item in indices]
    if any(meta is not None and meta.dtype in ("bool", "uint8") for meta in metas):
        return n.call("masked_index", n["self"], n.source(indices))
    while indices and indices[-1] is None:
        indices = indices[:-1]
    parts = [":" if item is None else n.source(item) for item in indices]
    if len(parts) - parts.count(":") == 1:
        parts[-1] = _slice(parts[-1]) or parts[-1]
    return f"{n.atom('self')}[{', '.join(parts)}]"


def _slice(index: str) -> str:
    """Returns the slice of an index of one constant, x[:, [-1]]; empty for another one."""
    match = re.fullmatch(r"mx\.array\(\[(-?\d+)\], mx\.int64\)", index)
    if match is None:
        return ""
    return f"{match[1]}:{'' if match[1] == '-1' else int(match[1]) + 1}"


@entry("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(n: Operation) -> str:
    indices, values = n.args["indices"], n.tensor("values")
    mask = n.of(indices[0]) if len(indices) == 1 else None
    is_one = values is not None and values.ndim <= n.out.ndim and all(size == 1 for size in values.shape)
    is_mask = mask is not None and mask.dtype == "bool" and mask.ndim == n.out.ndim
    if is_mask and is_one and not n.get("accumulate", False):
        value = number(n, n.cast("values", n.out.dtype), "self")
        return f"mx.where({n.source(indices[0])}, {value}, {n['self']})"
    return n.call(
        "index_put", n["self"], n["indices"], n.cast("values", n.out.dtype), n.source(n.get("accumulate", False))
    )


@entry("index_select")
def index_select(n: Operation) -> str:
    if not n.out.ndim:
        return n["self"]
    return f"mx.take({n['self']}, {n['index']}, axis={n['dim']})"


@entry("take")
def take(n: Operation) -> str:
    return f"mx.take({n.atom('self')}.flatten(), {n['index']})"


@entry("take_along_dim")
def take_along_dim(n: Operation) -> str:
    if n.get("dim") is None:
        return f"mx.take({n.atom('self')}.flatten(), {n.atom('indices')}.flatten())"
    return n.call("take_along", n["self"], n["indices"], n["dim"])


def _narrow(index: str, axes: list[int]) -> str:
    """Returns an index without `mx.broadcast_to`, as `mx.take_along_axis` broadcasts the other axes itself."""
    match = re.fullmatch(r"mx\.broadcast_to\((\w+)(\[[:, None]+\])?, \((.+)\)\)", index)
    if match is None or match[2] is None:
        return index
    parts = [part.strip() for part in match[2][1:-1].split(",")]
    is_added = [place for place, part in enumerate(parts) if part == "None"]
    is_whole = len(parts) == len(axes) + 1 and set(is_added) <= set(axes)
    return f"{match[1]}{match[2]}" if is_whole and set(parts) <= {":", "None"} else index


@entry("gather")
def gather(n: Operation) -> str:
    array, index, axis = n.tensor("self"), n.tensor("index"), n.args["dim"]
    if array is not None and index is not None and array.ndim and array.ndim == index.ndim and 0 not in index.shape:
        others = [other for other in range(array.ndim) if other != axis % array.ndim]
        if all(array.shape[other] == index.shape[other] for other in others):
            return f"mx.take_along_axis({n['self']}, {_narrow(n['index'], others)}, axis={n['dim']})"
    return n.call("gather", n["self"], n["dim"], n["index"])


_NOT_AT_PLACES = ("bool", "int64", "complex64")
"""Dtypes to which MLX adds nothing at places: bool, and on a GPU elements of 8 bytes."""


@entry("scatter", "scatter_add", "scatter_reduce")
def scatter(n: Operation) -> str:
    value = n.args.get("src", n.args.get("value"))
    mode: Any = n.args.get("reduce") or ("sum" if n.node.base == "scatter_add" else None)
    mode = {"add": "sum", "multiply": "prod"}.get(mode, mode)
    include = n.args.get("include_self", True)
    text = n.cast("src", n.out.dtype) if n.tensor("src") else n.source(value)
    index, source = n.tensor("index"), n.tensor("src")
    is_vector = index is not None and source is not None and source.shape == index.shape and index.ndim == 1
    if is_vector and mode == "sum" and include and n.out.ndim == 1 and n.out.dtype not in _NOT_AT_PLACES:
        return f"{n.atom('self')}.at[{n['index']}].add({text})"
    axis = n.args["dim"] % max(n.out.ndim, 1)
    is_whole = source is not None and index is not None and source.shape == index.shape
    shapes = [(*shape[:axis], *shape[axis + 1 :]) for shape in (n.out.shape, index.shape if index else ())]
    is_whole = is_whole and shapes[0] == shapes[1]
    if mode is None and is_whole and n.out.ndim and n.out.dtype != "bool":
        return f"mx.put_along_axis({n['self']}, {n['index']}, {text}, axis={n['dim']})"
    return n.call("scatter", n["self"], n["dim"], n["index"], text, repr(mode), repr(include))


@entry("index_add", "index_copy", "index_fill", "index_reduce")
def index_add(n: Operation) -> str:
    if n.node.base == "index_fill":
        return n.call("index_fill", n["self"], n["dim"], n["index"], n["value"])
    if n.node.base == "index_reduce":
        return n.call("index_reduce", n["self"], n["dim"], n["index"], n["source"], n["reduce"], n["include_self"])
    if n.node.base == "index_copy":
        return n.call("index_copy", n["self"], n["dim"], n["index"], n["source"])
    index, source = n.tensor("index"), n.tensor("source")
    is_plain = index is not None and index.ndim == 1 and source is not None and source.dtype == n.out.dtype
    if is_plain and n.out.ndim and n.args["alpha"] == 1 and n.out.dtype not in _NOT_AT_PLACES:
        places = ", ".join([":"] * (n.args["dim"] % n.out.ndim) + [n["index"]])
        return f"{n.atom('self')}.at[{places}].add({n['source']})"
    return n.call("index_add", n["self"], n["dim"], n["index"], n["source"], n["alpha"])


@entry("put")
def put(n: Operation) -> str:
    return n.call("put_flat", n["self"], n["index"], n["source"], n["accumulate"])


@entry("masked_scatter")
def masked_scatter(n: Operation) -> str:
    return n.call("masked_scatter", n["self"], n["mask"], n["source"])


@entry("masked_select")
def masked_select(n: Operation) -> str:
    return n.call("masked_select", n["self"], n["mask"])


@entry("nonzero", "argwhere")
def nonzero(n: Operation) -> str:
    return n.call("nonzero", n["self"])


@entry("one_hot")
def one_hot(n: Operation) -> str:
    return n.call("one_hot", n["self"], n["num_classes"])


@entry("searchsorted", "bucketize")
def searchsorted(n: Operation) -> str:
    table = "sorted_sequence" if n.node.base == "searchsorted" else "boundaries"
    right = bool(n.args.get("right")) or n.args.get("side") == "right"
    text = n.call("searchsorted", n[table], n["self"], repr(right))
    return text + (".astype(mx.int32)" if n.out.dtype == "int32" else "")


@entry("isin")
def isin(n: Operation) -> str:
    first = n.args.get("elements", n.args.get("element"))
    second = n.args.get("test_elements", n.args.get("test_element"))
    return n.call("isin", n.source(first), n.source(second), repr(bool(n.args.get("invert"))))


entry("nonzero_numpy")(lambda n: n.call("nonzero_where", n["self"]))


@entry("nonzero_static")
def nonzero_static(n: Operation) -> str:
    return n.call("nonzero_static", n["self"], n["size"], n.source(n.get("fill_value", -1)))


@entry("as_strided_scatter")
def as_strided_scatter(n: Operation) -> str:
    offset = n.source(n.get("storage_offset", 0))
    return n.call("as_strided_scatter", n["self"], n["src"], n["size"], n["stride"], offset)


@entry("segment_reduce")
def segment_reduce(n: Operation) -> str:
    arrays = [n.source(n.args.get(name)) for name in ("lengths", "offsets")]
    axis, initial = n.source(n.get("axis", 0)), n.source(n.args.get("initial"))
    return n.call("segment_reduce", n["data"], n["reduce"], *arrays, axis, initial)
