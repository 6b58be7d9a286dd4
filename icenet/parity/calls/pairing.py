"""Which module, call and array of one side corresponds to which of the other side."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from icenet.core.errors import UsageError
from icenet.core.weights.rename import Rename, all_match, apply_rename, call_rename
from icenet.parity import align
from icenet.parity.calls.events import Event, Run
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.sides import Side
from icenet.parity.trace import Value

# ---- modules ------------------------------------------------------------------------------------------------


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
    names = _renamed(a, b, rename)
    found: dict[str, tuple[str, str]] = {}  # path in b: path in a, note
    for ours, theirs in names.items():
        if theirs in b.modules and theirs not in found:
            found[theirs] = ours, "" if ours == theirs else "renamed"
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
    for path in opaque_layers(a, b, {theirs: ours for theirs, (ours, _) in found.items()}):
        for theirs in [name for name in found if name.startswith(f"{path}.")]:
            del found[theirs]
    matches = [
        Match(found[path][0], path, found[path][1]) if path in found else Match(None, path) for path in b.modules
    ]
    taken = {ours for ours, _ in found.values()}
    return [*matches, *(Match(path, None) for path in a.modules if path not in taken)]


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
    names_a, names_b = [*a.modules, *a.shapes], [*b.modules, *b.shapes]
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


def _applied(rename: Callable[[str], str | None], side: Side) -> dict[str, str | None]:
    """Returns the new path of each module; nothing if the function fails, as one of other names may."""
    try:
        return {path: call_rename(rename, path) for path in side.modules}
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


# ---- calls --------------------------------------------------------------------------------------------------


def pair_calls(a: Side, b: Side, runs: tuple[Run, Run, Run], matches: list[Match]) -> tuple[list[Pair], list[str]]:
    """Returns the calls that both sides make, in the order of `b`, and notes on those that only one makes.

    Args:
        a, b: The sides.
        runs: The runs of `a`, of `b` in the dtype under test, and of the reference.
        matches: The modules.
    """
    run_a, run_noise, run_b = runs
    to_a = {match.b: match.a for match in matches if match.a is not None and match.b is not None}
    ours, noise = run_a.by_call(), run_noise.by_call()
    pairs: list[Pair] = []
    by_event: dict[int, Pair] = {}
    notes: list[str] = []
    for event in run_b.events:
        path = to_a.get(event.path)
        own, other = ours.get((path, event.call)) if path is not None else None, noise.get((event.path, event.call))
        if own is None or other is None:
            continue
        kind = b.kinds.get(event.path)
        pair = Pair(own, event, other, kind if kind == a.kinds.get(own.path) else None)
        pairs.append(pair)
        by_event[id(event)] = by_event[id(own)] = pair
    for theirs, path in to_a.items():
        counts = [sum(event.path == name for event in run.events) for run, name in ((run_a, path), (run_b, theirs))]
        if counts[0] != counts[1]:
            what = [f"{count} times" if count > 1 else "once" if count else "not" for count in counts]
            notes.append(f"{theirs or 'the model'} is called {what[0]} in a, {what[1]} in b")
    shapes = {} if a.backend == b.backend else known_shapes(pairs)
    same = a.backend == b.backend
    opaque = set(opaque_layers(a, b, {theirs: ours for theirs, ours in to_a.items() if theirs is not None}))
    for pair in pairs:
        pair.is_opaque = pair.path in opaque
        _align(pair, shapes, same)
        if pair.kind in align.DIFFERENT_CALLS:
            pair.derived = {"a": _derived(pair.a), "b": _derived(pair.b)}
    pairs, other_rows = _without_other_rows(pairs, by_event)
    notes += other_rows
    for pair in pairs:
        children_a = {id(child) for child in _nearest(pair.a, by_event)}
        for child in _nearest(pair.b, by_event):
            found = by_event[id(child)]
            if id(found.a) in children_a and is_separable(found):
                pair.children.append(found)
        if not (pair.a.is_storable and pair.b.is_storable):
            pair.obstacle = "not replayed: its arguments hold objects that a call may change, such as a cache"
    b.arrange(a, pairs)
    if any(pair.masked_arguments or pair.masked_outputs for pair in pairs):
        notes.append("masked values are other numbers in a than in b, such as -inf and -1e9: they count as equal")
    return pairs, notes


def _without_other_rows(pairs: list[Pair], by_event: dict[int, Pair]) -> tuple[list[Pair], list[str]]:
    """Leaves out calls that get other rows on each side, and those within them; returns the rest, and notes.

    An example is an expert that gets the tokens that are routed to it on one side, and all tokens on the other. Such
    calls are computed within the call around them, if its own arrays correspond: if also in values, or if only the
    rows of one side are gathered from several axes. Otherwise the shapes are a difference.
    """
    left_out: set[int] = set()
    callers: dict[int, Pair] = {}
    found: dict[str, list[str]] = {}
    example = ""
    for pair in pairs:
        outer = pair.b.parent
        while outer is not None and id(outer) not in by_event:
            outer = outer.parent
        if id(pair.b) in left_out or outer is None or align.KINDS.get(pair.kind or "") == align.MOVED:
            continue
        arrays = [*zip(pair.a.arguments, pair.b.arguments, strict=False)]
        arrays += zip(pair.a.outputs, pair.b.outputs, strict=False)
        shapes = [(x.array.shape, y.array.shape) for x, y in arrays if y.is_float]
        others = [(x, y) for x, y in shapes if x[:-1] != y[:-1] and x[-1:] == y[-1:] and len(x) * len(y) > 0]
        around = by_event[id(outer)]
        if not (_argument_mismatch(pair) or _output_mismatch(pair)) or len(others) < len(shapes):
            continue
        if _argument_mismatch(around) or _output_mismatch(around):
            continue
        if all(len(x) != len(y) for x, y in others) or _agree(around):
            events = {id(event) for side in (pair.a, pair.b) for event in side.walk()}
            left_out |= events
            callers |= {id(event): around for event in pair.b.walk()}
            names = found.setdefault(around.path or "the model", [])
            names += [pair.path] if pair.path not in names else []
            example = example or f"{list(others[0][0])} and {list(others[0][1])}"
    notes = [
        f"{', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''}: called with other rows in "
        f"a than in b, such as {example}; computed within {around}"
        for around, paths in found.items()
    ]
    _set_apart([pair for pair in pairs if id(pair.b) in left_out], callers)
    for event in left_out & by_event.keys():
        del by_event[event]
    return [pair for pair in pairs if id(pair.b) not in left_out], notes


def _set_apart(pairs: list[Pair], callers: Mapping[int, Pair]) -> None:
    """Adds calls that get other rows on each side to those around them, if both sides take the rows of `b`."""
    found: dict[int, Pair] = {}
    for pair in pairs:
        pair.arguments, pair.outputs, pair.own, pair.obstacle = [], [], set(), ""
        for ours, theirs, indices in (
            (pair.a.arguments, pair.b.arguments, pair.arguments),
            (pair.a.outputs, pair.b.outputs, pair.outputs),
        ):
            fits = len(ours) == len(theirs) and all(
                x.is_float and y.is_float and x.array.shape[-1:] == y.array.shape[-1:]
                for x, y in zip(ours, theirs, strict=True)
            )
            indices += [(index, index, align.SAME) for index in range(len(theirs))] if fits else []
        if pair.arguments and pair.outputs and pair.a.is_storable and pair.b.is_storable:
            found[id(pair.b)] = found[id(pair.a)] = pair
            callers[id(pair.b)].apart.append(pair)
    for pair in pairs:
        if id(pair.b) in found:
            own = {id(child) for child in _nearest(pair.a, found)}
            inner = (found[id(child)] for child in _nearest(pair.b, found))
            pair.children = [child for child in inner if id(child.a) in own and is_separable(child)]


def _agree(pair: Pair) -> bool:
    """Returns whether the outputs of a call are about equal in the runs of both sides."""
    arrays = [(align.to_torch(how, pair.a.outputs[i].array), pair.b.outputs[j].array) for i, j, how in pair.outputs]
    return all(align.is_near(ours, theirs) for ours, theirs in arrays if theirs.dtype.kind == "f")


def _derived(event: Event) -> dict[int, tuple[int, Any]]:
    """Returns the outputs of a recurrent layer that are parts of the first one, such as the last hidden state."""
    found: dict[int, tuple[int, Any]] = {}
    first = event.outputs[0].array if event.outputs else np.zeros(0)
    for index, item in enumerate(event.outputs[1:], start=1):
        for part in ((slice(None), -1), (-1,)):
            fits = first.ndim == 3 and item.is_float and item.array.size == first[part].size
            if fits and np.array_equal(item.array.reshape(first[part].shape), first[part]):
                found[index] = 0, part
                break
    return found


def _nearest(event: Event, by_event: Mapping[int, Pair]) -> Iterator[Event]:
    """Yields the calls within an event that have a counterpart, and are in no other such call."""
    for child in event.children:
        if id(child) in by_event:
            yield child
        else:
            yield from _nearest(child, by_event)


def is_separable(pair: Pair) -> bool:
    """Returns whether the results of a call can be given instead of computed."""
    complete = len(pair.outputs) == len(pair.b.outputs) or pair.kind in align.DIFFERENT_CALLS
    return complete and bool(pair.outputs) and all(e.is_rebuildable for e in (pair.a, pair.b, pair.noise))


def known_shapes(pairs: list[Pair]) -> dict[tuple[int, ...], str]:
    """Returns the alignments that kinds of layers or values determine, by the shape of an output in `b`."""
    found: dict[tuple[int, ...], str] = {}
    for pair in pairs:
        for ours, theirs in zip(pair.a.outputs, pair.b.outputs, strict=False):
            if theirs.array.ndim < 3:
                continue
            known = align.KINDS.get(pair.kind or "")
            fits = align.to_torch(align.MOVED, ours.array).shape == theirs.array.shape
            if known is None and fits and ours.array.shape == theirs.array.shape:
                known = align.nearer(ours.array, theirs.array)
            if known is not None:
                found.setdefault(theirs.array.shape, known)
    return found


def _align(pair: Pair, shapes: Mapping[tuple[int, ...], str], same: bool) -> None:
    """Sets which arrays of a pair correspond, and their axes."""
    ours, theirs = pair.a, pair.b

    def how(a: Value, b: Value) -> str | None:
        found = align.alignment(pair.kind, a.array, b.array, shapes) if not same else None
        if same and a.array.shape == b.array.shape:
            return align.SAME
        if found is None and theirs.parent is not None and align.KINDS.get(pair.kind or "") != align.MOVED:
            return align.rows(a.array, b.array)  # the interface of the model itself must be the same
        return found

    if len(ours.names) == len(theirs.names):
        by_name = set(ours.names) == set(theirs.names) and len(set(ours.names)) == len(ours.names)
        indices = [(ours.names.index(name) if by_name else j, j) for j, name in enumerate(theirs.names)]
        for i, j in indices:
            found = how(ours.arguments[i], theirs.arguments[j])
            # a mask may be booleans on one side and numbers on the other: then each side keeps its own
            if found is not None and ours.arguments[i].is_float == theirs.arguments[j].is_float:
                pair.arguments.append((i, j, found))
            elif _are_masks(ours.arguments[i], theirs.arguments[j]):
                pair.own.add(j)
            elif found is None and ours.arguments[i].is_float:
                pair.obstacle = pair.obstacle or unequal(
                    pair.kind, ours.arguments[i], theirs.arguments[j], "input of"
                )
    else:
        start = 0
        for j, theirs_value in enumerate(theirs.arguments):
            for i in range(start, len(ours.arguments)):
                found = how(ours.arguments[i], theirs_value)
                if found is not None and ours.arguments[i].is_float == theirs_value.is_float:
                    pair.arguments.append((i, j, found))
                    start = i + 1
                    break
    count = 1 if pair.kind in align.DIFFERENT_CALLS else None
    for index, (a, b) in enumerate(zip(ours.outputs[:count], theirs.outputs[:count], strict=False)):
        found = how(a, b)
        if found is not None:
            pair.outputs.append((index, index, found))
    pair.masked_arguments = {
        j for i, j, found in pair.arguments if _masks_otherwise(ours.arguments[i], theirs.arguments[j], found)
    }
    if theirs.parent is not None:
        pair.masked_outputs = {
            j for i, j, found in pair.outputs if _masks_otherwise(ours.outputs[i], theirs.outputs[j], found)
        }


def _masks_otherwise(ours: Value, theirs: Value, how: str) -> bool:
    return ours.is_float and align.masks_otherwise(align.to_torch(how, ours.array), theirs.array)


def _are_masks(ours: Value, theirs: Value) -> bool:
    """Returns whether both are masks, of which at least one is of numbers: of any form."""
    if ours.is_float and theirs.is_float:
        return align.is_mask(ours.array) and align.is_mask(theirs.array)
    return ours.is_float != theirs.is_float


def unequal(kind: str | None, ours: Value, theirs: Value, what: str) -> str:
    """Returns a phrase on two arrays whose shapes do not correspond."""
    text = align.unequal_shapes(kind, ours.array, theirs.array)
    shapes = ours.array.shape, align.to_mlx(align.MOVED, theirs.array).shape
    if align.KINDS.get(kind or "") == align.MOVED and shapes[0] != shapes[1] and len(shapes[0]) == len(shapes[1]):
        text += f", which is {list(shapes[1])} with the axes of a"
    return f"{what} {text}".replace("in MLX", "in a").replace("in PyTorch", "in b")


@dataclass(frozen=True)
class Mismatch:
    """The first array whose shape differs.

    Attributes:
        path: Path in `b` of the module that computed it.
        where: Where in that module, between which of its calls.
        note: The shapes.
        child: Path in `b` of the module that gets it; empty for an output.
        order: Position in the order of the computation.
    """

    path: str
    where: str
    note: str
    child: str = ""
    order: float = 0.0


def first_mismatch(pairs: list[Pair]) -> Mismatch | None:
    """Returns the first array in the order of the computation that differs in shape between the sides."""
    by_event = {id(pair.b): pair for pair in pairs}

    def visit(event: Event, parent: Event | None, before: str) -> Mismatch | None:
        pair = by_event.get(id(event))
        if pair is not None:
            note = _argument_mismatch(pair)
            if note:
                name = relative(event.path, parent.path) if parent is not None else ""
                where = f"{f'between {before} and' if before else 'before'} {name}" if parent is not None else ""
                path = parent.path if parent is not None else ""
                return Mismatch(path, where, note, event.path, event.number - 0.5)
        last = ""
        for child in event.children:
            found = visit(child, event if pair is not None else parent, last if pair is not None else before)
            if found is not None:
                return found
            last = relative(child.path, event.path) if id(child) in by_event else last
        if pair is not None and (note := _output_mismatch(pair)):
            order = max(inner.number for inner in event.walk()) + 0.5
            return Mismatch(event.path, f"after {last}" if last else "", note, order=order)
        return None

    root = next(iter(pairs), None)
    return None if root is None else visit(root.b, None, "")


def _argument_mismatch(pair: Pair) -> str:
    matched = {j for _, j, _ in pair.arguments}
    if len(pair.a.arguments) != len(pair.b.arguments):
        return ""
    for j, theirs in enumerate(pair.b.arguments):
        if j in matched or j in pair.own or not theirs.is_float:
            continue
        ours = pair.a.arguments[j]
        if ours.is_float:
            return unequal(pair.kind, ours, theirs, "input of")
    return ""


def _output_mismatch(pair: Pair) -> str:
    if not pair.a.is_complete or (pair.kind in align.DIFFERENT_CALLS and pair.outputs):
        return ""
    if len(pair.a.outputs) != len(pair.b.outputs):
        if pair.b.parent is not None and pair.outputs:
            return ""  # further outputs that the caller may not use
        return f"{len(pair.a.outputs)} outputs in a, {len(pair.b.outputs)} in b"
    matched = {j for _, j, _ in pair.outputs}
    for j, theirs in enumerate(pair.b.outputs):
        if j not in matched:
            return unequal(pair.kind, pair.a.outputs[j], theirs, "output of")
    return ""


def relative(path: str, parent: str) -> str:
    """Returns a path without that of a module around it."""
    return path[len(parent) + 1 :] if parent and path.startswith(f"{parent}.") else path
