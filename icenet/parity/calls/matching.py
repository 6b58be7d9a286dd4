"""Which module of one side corresponds to which of the other side."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from icenet.core.errors import UsageError
from icenet.core.weights.rename import Rename, all_match, apply_rename, call_rename
from icenet.parity.calls.directions import is_part, match_parts, part_weights, renamed_parts
from icenet.parity.calls.sides import Side


@dataclass(frozen=True)
class Match:
    """A module of `a`, one of `b`, or one of each that correspond.

    Attributes:
        a, b: Paths; None where it does not exist.
        note: How it was matched, if not by its path.
    """

    a: str | None
    b: str | None
    note: str = ""


def match_modules(a: Side, b: Side, rename: Rename = None) -> list[Match]:
    """Returns the modules of both sides in the order of `b`, then those that only `a` has.

    They are matched by path, then by `rename`, then by order, kind and shapes.

    Raises:
        UsageError: `rename` names a module that does not exist.
    """
    names = {**_renamed(a, b, rename), **renamed_parts(a, b, rename)}
    found: dict[str, tuple[str, str]] = {}  # path in b: path in a, note
    for ours, theirs in names.items():
        if theirs in b.modules and theirs not in found and not is_part(a, ours, b, theirs):
            found[theirs] = ours, "" if ours == theirs else "renamed"
    found |= match_parts(a, b, found)
    taken = {ours for ours, _ in found.values()}
    opaque = opaque_layers(a, b, {theirs: ours for theirs, (ours, _) in found.items()})
    within = tuple(f"{found[path][0]}." for path in opaque), tuple(f"{path}." for path in opaque)
    rest_a = [path for path in a.modules if path not in taken and not path.startswith(within[0])]
    rest_b = [path for path in b.modules if path not in found and not path.startswith(within[1])]
    if rest_a and rest_b:
        signs_a, signs_b = ([_signature(side, path) for path in rest] for side, rest in ((a, rest_a), (b, rest_b)))
        for block in difflib.SequenceMatcher(None, signs_a, signs_b, autojunk=False).get_matching_blocks():
            for ours, theirs in zip(
                rest_a[block.a : block.a + block.size], rest_b[block.b : block.b + block.size], strict=True
            ):
                found[theirs] = ours, f"matched with {ours} by order and shape"
    for theirs in [theirs for theirs, (ours, note) in found.items() if note and _is_shared(a, ours, b, theirs)]:
        del found[theirs]
    for path in opaque_layers(a, b, {theirs: ours for theirs, (ours, _) in found.items()}):
        for theirs in [name for name in found if name.startswith(f"{path}.")]:
            del found[theirs]
    matches = [
        Match(found[path][0], path, found[path][1]) if path in found else Match(None, path) for path in b.modules
    ]
    taken = {ours for ours, _ in found.values()}
    return [*matches, *(Match(path, None) for path in a.modules if path not in taken)]


def _is_shared(a: Side, ours: str, b: Side, theirs: str) -> bool:
    """Returns whether a layer without parameters may have the place of several, as one dropout that is called twice.

    Then the module around it has another number of such layers on each side.
    """
    if any(name.startswith(f"{theirs}.") for name in (*b.shapes, *b.modules)):
        return False
    counts = [
        sum(
            path.rpartition(".")[0] == own.rpartition(".")[0]
            and plain_class(side.classes[path]) == plain_class(side.classes[own])
            for path in side.modules
        )
        for side, own in ((a, ours), (b, theirs))
    ]
    return counts[0] != counts[1]


def opaque_layers(a: Side, b: Side, to_a: Mapping[str, str]) -> list[str]:
    """Returns the paths in `b` of layers of both frameworks that have other layers within, which do not correspond.

    Examples are multi-head attention and the layers of a transformer. They are compared as one layer.
    """
    if a.backend == b.backend:
        return []
    found: list[str] = []
    for path, own in to_a.items():
        classes = a.classes[own], b.classes[path]
        native = classes[0].startswith("mlx.nn.") and classes[1].startswith("torch.nn.")
        has_layers = any(inner.startswith(f"{path}.") for inner in b.modules) or b.kinds.get(path) == "attention"
        is_list = ".containers." in classes[0] or ".container." in classes[1]
        if path and native and has_layers and not is_list:
            found.append(path)
    return found


def _renamed(a: Side, b: Side, rename: Rename) -> dict[str, str | None]:
    """Returns the path in `b` of each module of `a`, by `rename`; its own path otherwise.

    A `rename` of `icenet.from_torch`, from names of PyTorch to those of MLX, is recognized by its names.
    """
    if rename is None:
        return {path: path for path in a.modules}
    names_a, names_b = [*a.modules, *a.shapes], [*b.modules, *b.shapes, *part_weights(b).values()]
    is_pair = (a.backend, b.backend) == ("mlx", "torch")
    if callable(rename):
        forward = _applied(rename, a)
        backward = _applied(rename, b) if is_pair else {}
        known = [sum(new in side.modules for new in found.values()) for side, found in ((b, forward), (a, backward))]
        if known[1] > known[0]:
            return _reversed(a, backward)
        found = forward or {path: call_rename(rename, path) for path in a.modules}
        return {path: path if other is None else other for path, other in found.items()}
    ours, theirs = list(rename), [value for value in rename.values() if value is not None]
    fits = all_match(ours, names_a) and all_match(theirs, names_b)
    if is_pair and not fits:
        known = [sum(all_match([key], names) for key in ours) for names in (names_a, names_b)]
        if known[1] == len(ours) or known[1] > known[0]:
            given = apply_rename(rename, names_b)
            return _reversed(a, {path: given[path] for path in b.modules})
    for side, keys, names in (("a", ours, a.modules), ("b", theirs, b.modules)):
        for key in keys:
            if not all_match([key], names_a if side == "a" else names_b):
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UsageError(f"compare: rename: {side} has no module {key!r}{hint}")
    given = apply_rename(rename, names_a)
    return {path: given[path] if path else path for path in a.modules}


def renamed_arrays(a: Side, b: Side, rename: Rename) -> dict[str, str]:
    """Returns the name in `b` of each array of `a` that `rename` moves there, such as a gate to packed gates."""
    if rename is None:
        return {}
    found: dict[str, str | None] = {}
    for side, other, is_forward in ((a, b, True), (b, a, False)):
        names = list(side.shapes)
        if callable(rename):
            given = _applied(rename, side, names)
        elif all_match(rename, [*side.modules, *names]):
            given = apply_rename(rename, names)
        else:
            continue
        both = ((old, new) for old, new in given.items() if new in other.shapes and new != old)
        found |= {(old if is_forward else new): (new if is_forward else old) for old, new in both}
        if found:
            break
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def _applied(
    rename: Callable[[str], str | None], side: Side, names: Iterable[str] | None = None
) -> dict[str, str | None]:
    """Returns the new path of each module, or name; nothing if the function fails, as one of other names may."""
    try:
        return {path: call_rename(rename, path) for path in (side.modules if names is None else names)}
    except UsageError:
        return {}


def _reversed(a: Side, renamed: Mapping[str, str | None]) -> dict[str, str | None]:
    """Returns the path in `b` by that in `a`, given the reverse. The modules themselves correspond."""
    found: dict[str, str | None] = {path: path for path in a.modules}
    found |= {ours: theirs for theirs, ours in renamed.items() if ours in found}
    return {**found, "": ""}


def _signature(side: Side, path: str) -> tuple[Any, ...]:
    """Returns the kind of a module and the shapes of its parameters, in PyTorch's axes."""
    shapes = side.shapes
    prefix = f"{path}." if path else ""
    within = tuple(sorted(shape for name, shape in shapes.items() if name.startswith(prefix)))
    is_leaf = not any(inner.startswith(prefix) and inner != path for inner in side.modules)
    return (side.kinds.get(path) or plain_class(side.classes[path]) if is_leaf else "container"), within


def plain_class(name: str) -> str:
    """Returns a class name without what differs between the frameworks: `BatchNorm2d` is `batchnorm`."""
    return re.sub(r"\d+d$", "", name.rpartition(".")[2].lower()).replace("_", "")
