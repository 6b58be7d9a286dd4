"""Which recurrent layers of MLX are the layers and directions of one recurrent layer of PyTorch, or a cell of it.

`mlx.nn.LSTM`, `GRU` and `RNN` have one layer and one direction. In copies of the module of PyTorch, a layer with
several of them is divided into one module for each (`icenet_torch.tools.recurrent_parts`): `rnn.l0`,
`rnn.l0_reverse`. A cell has a layer of its weights within, `cell.l0`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from icenet.core import backends
from icenet.core.weights import layout
from icenet.core.weights.rename import Rename, all_match, apply_rename, call_rename
from icenet.parity.calls.sides import Side
from icenet.parity.trace import class_name

_MLX = "mlx.nn.layers.recurrent."
_REVERSE = re.compile(r"(?:^|[._])(?:r|b|bw|bwd|rtl|back\w*|rev\w*)\d*(?:[._]|$)|backward|reverse", re.IGNORECASE)
"""Names that users give to the reverse direction."""


def divided(a: Any, b: Any) -> Any:
    """Returns the module of PyTorch, with its recurrent layers divided if that of MLX has as many as parts."""
    names = {p: class_name(m) for p, m in backends.module("mlx", "nn.tree").distinct_modules(a).items()}
    layers = [path for path, name in names.items() if name.startswith(_MLX)]
    counts = Counter(names[path].removeprefix(_MLX) for path in layers)
    if not counts:
        return b
    kept = [
        path for path in names if path and not any(other == path or other.startswith(f"{path}.") for other in layers)
    ]
    return backends.module("torch", "tools.recurrent_parts").with_parts(b, counts, kept)


def parts_of(b: Side) -> dict[str, tuple[str, ...]]:
    """Returns the names of the parts of each divided layer, by its path."""
    found = {path: getattr(module, "part_names", ()) for path, module in b.modules.items()}
    return {path: names for path, names in found.items() if names}


def is_part(a: Side, ours: str, b: Side, theirs: str) -> bool:
    """Returns whether a layer of MLX has the path of a divided layer, one of whose parts it is."""
    return a.classes.get(ours, "").startswith(_MLX) and theirs in parts_of(b)


def part_weights(b: Side) -> dict[str, str]:
    """Returns the name in the whole layer of a weight of each part, such as `rnn.weight_hh_l0`, by its path."""
    return {
        layout.join(path, name): layout.join(path, f"weight_hh_{name}")
        for path, names in parts_of(b).items()
        for name in names
    }


def renamed_parts(a: Side, b: Side, rename: Rename) -> dict[str, str]:
    """Returns the path in `b` of parts by that in `a`, if `rename` is one of `icenet.from_torch`.

    It has names of PyTorch on the left, and so a place for each weight of the whole layer.
    """
    weights = part_weights(b)
    if not weights or rename is None:
        return {}
    names = [*weights.values(), *b.modules, *b.shapes]
    if callable(rename):
        given = {name: call_rename(rename, name) for name in weights.values()}
    elif all_match(rename, names):
        given = apply_rename(rename, names)
    else:
        return {}
    places = {part: (given[weight] or "").rpartition(".")[0] for part, weight in weights.items()}
    return {ours: part for part, ours in places.items() if a.classes.get(ours, "").startswith(_MLX)}


def match_parts(a: Side, b: Side, found: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Returns the path in `a` of each part without one, and a note, by its path in `b`.

    The reverse ones are those whose name says so, otherwise every other one. Of each, the first that fits is taken.

    Args:
        a, b: The sides.
        found: The modules that are matched, by the path in `b`: path in `a`, note.
    """
    matched: dict[str, tuple[str, str]] = {}
    for path, names in parts_of(b).items():
        missing = [name for name in names if layout.join(path, name) not in found]
        taken = {ours for ours, _ in (*found.values(), *matched.values())}
        own = found[path][0] if path in found else ""
        free = [other for other in a.modules if a.classes[other].startswith(_MLX) and other not in taken]
        within = [other for other in free if not own or other.startswith(f"{own}.")]
        if len(within) >= len(missing):
            free = within
        are_named = any(_REVERSE.search(other) for other in free)
        for name in missing:
            is_reverse = name.endswith("_reverse")
            pool = [o for o in free if not are_named or bool(_REVERSE.search(o)) == is_reverse]
            ours = next((other for other in pool if _fits(a, other, b, layout.join(path, name))), None)
            if ours is not None:
                free.remove(ours)
                which = f"{'reverse' if is_reverse else 'forward'} direction of layer {name[1:].partition('_')[0]} of"
                which = kind if (kind := b.classes[path].rpartition(".")[2]).endswith("Cell") else which
                matched[layout.join(path, name)] = ours, f"{ours or 'a'} is compared with the {which} {path or 'b'}"
    return matched


def _fits(a: Side, ours: str, b: Side, theirs: str) -> bool:
    """Returns whether two recurrent layers have the same class and sizes."""
    same = a.classes[ours].rpartition(".")[2] == b.classes[theirs].rpartition(".")[2]
    weights = [
        sorted(side.shapes[name] for name in side.own_names(path) if len(side.shapes[name]) == 2)
        for side, path in ((a, ours), (b, theirs))
    ]
    return same and weights[0] == weights[1]
