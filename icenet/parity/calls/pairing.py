"""Which call and array of one side corresponds to which of the other side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core.messages import some
from icenet.parity import align
from icenet.parity.calls.directions import parts_of
from icenet.parity.calls.events import Event, Run
from icenet.parity.calls.matching import Match, opaque_layers
from icenet.parity.calls.pairs import FRAMEWORK_LAYERS, Pair
from icenet.parity.calls.repeated import calls_in_order, repeated_calls
from icenet.parity.calls.sides import Side
from icenet.parity.calls.structures import numbers_by_name
from icenet.parity.trace import Value

Array = npt.NDArray[Any]

_SAMPLES = 16
"""Number of rows that are searched for in the argument of the other side."""
_NEAR = 1e-2
"""Largest relative distance of equal rows, also in half precision."""


def pair_calls(a: Side, b: Side, runs: tuple[Run, Run, Run], matches: list[Match]) -> tuple[list[Pair], list[str]]:
    """Returns the calls that both sides make, in the order of `b`, and notes on those that only one makes.

    Args:
        a, b: The sides.
        runs: The runs of `a`, of `b` in the dtype under test, and of the reference.
        matches: The modules.
    """
    run_a, run_noise, run_b = runs
    to_a = {match.b: match.a for match in matches if match.a is not None and match.b is not None}
    ours, noise = calls_in_order(run_a, run_b, to_a), run_noise.by_call()
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
        if event.parent is None and "" in parts_of(b):  # the model is the layer, and may return no state in `a`
            pair.kind = "native_recurrent"
        pairs.append(pair)
        by_event[id(event)] = by_event[id(own)] = pair
    for theirs, path in to_a.items():
        counts = [sum(event.path == name for event in run.events) for run, name in ((run_a, path), (run_b, theirs))]
        if counts[0] != counts[1]:
            what = [f"{count} times" if count > 1 else "once" if count else "not" for count in counts]
            notes.append(f"{theirs or 'the model'} is called {what[0]} in a, {what[1]} in b")
    shapes = {} if a.backend == b.backend else known_shapes(pairs)
    same = a.backend == b.backend
    sequence_first = a.is_sequence_first or b.is_sequence_first
    opaque = set(opaque_layers(a, b, {theirs: ours for theirs, ours in to_a.items() if theirs is not None}))
    for pair in pairs:
        pair.is_opaque = pair.path in opaque
        _align(pair, shapes, same, sequence_first)
        if pair.kind in align.DIFFERENT_CALLS:
            pair.derived = {"a": _derived(pair.a), "b": _derived(pair.b)}
    pairs, padded = _without_other_padding(a, b, pairs, by_event)
    layers = {path for path, name in b.classes.items() if name.startswith(FRAMEWORK_LAYERS)}
    pairs, other_rows = _without_other_rows(pairs, by_event, shapes, layers)
    notes += padded + other_rows
    for pair in pairs:
        children_a = {id(child) for child in nearest(pair.a, by_event)}
        for child in nearest(pair.b, by_event):
            found = by_event[id(child)]
            if id(found.a) in children_a and is_separable(found):
                pair.children.append(found)
        pair.repeated = repeated_calls(pair, by_event)
        pair.children = [child for child in pair.children if not any(child is other for other in pair.repeated)]
        if not (pair.a.is_storable and pair.b.is_storable):
            pair.obstacle = "not replayed: its arguments hold objects that a call may change, such as a cache"
    notes += _other_keys(pairs)
    b.arrange(a, pairs)
    if any(pair.masked_arguments or pair.masked_outputs for pair in pairs):
        notes.append("masked values are other numbers in a than in b, such as -inf and -1e9: they count as equal")
    return pairs, notes


def _other_keys(pairs: list[Pair]) -> list[str]:
    """Returns a note on outputs of the model that have other keys or fields on each side."""
    ours, theirs = (getattr(pairs[0], side).output_names if pairs else [] for side in "ab")
    if len(ours) != len(theirs) or set(ours) == set(theirs):
        return []
    others = [f"{x} of a with {y} of b" for x, y in zip(ours, theirs, strict=True) if x != y]
    return [f"outputs with other keys are compared in their order: {some(others)}"]


def _without_other_padding(
    a: Side, b: Side, pairs: list[Pair], by_event: dict[int, Pair]
) -> tuple[list[Pair], list[str]]:
    """Leaves out convolutions that pad themselves on one side, and get what is padded on the other.

    An example is a causal convolution: one side pads the past, the other pads both ends and cuts off the last values.
    Such a call is computed within the call around it. Results of equal length have the same padding on both sides, or
    the call stays and differs. Returns the rest, and notes.
    """
    found: dict[str, Pair] = {}
    for pair in pairs:
        if "conv" not in (pair.kind or "") or not argument_mismatch(pair):
            continue
        if not (pair.a.outputs and pair.b.outputs):  # a call that raised an error
            continue
        kind = align.KINDS[pair.kind or ""]
        (x, y), outputs = (
            (ours.array, align.to_mlx(kind, theirs.array))
            for ours, theirs in ((pair.a.arguments[0], pair.b.arguments[0]), (pair.a.outputs[0], pair.b.outputs[0]))
        )
        paddings = [_padding(side, event.path, x.ndim - 2) for side, event in ((a, pair.a), (b, pair.b))]
        outer = pair.b.parent
        while outer is not None and id(outer) not in by_event:
            outer = outer.parent
        is_padded = x.shape[:1] + x.shape[-1:] == y.shape[:1] + y.shape[-1:] and paddings[0] != paddings[1]
        if outputs[0].shape == outputs[1].shape:
            is_padded &= _has_zeros_around(x, y) and _has_zeros_around(y, x)
        if is_padded and outer is not None and not argument_mismatch(by_event[id(outer)]):
            found.setdefault(pair.path, by_event[id(outer)])
    left_out = {id(event) for pair in pairs if pair.path in found for event in (pair.a, pair.b)}
    for event in left_out:
        by_event.pop(event, None)
    notes = [
        f"{path}: pads its input on one side only, and gets a padded one on the other; computed within "
        f"{outer.path or 'the model'}"
        for path, outer in found.items()
    ]
    return [pair for pair in pairs if pair.path not in found], notes


def _has_zeros_around(longer: Array, shorter: Array) -> bool:
    """Returns whether an array has zeros at both ends of each axis in which it is longer, as layers pad."""
    for axis in range(1, longer.ndim - 1):
        more = longer.shape[axis] - shorter.shape[axis]
        if more > 0:
            first, _, last = np.split(longer, [more // 2, longer.shape[axis] - (more - more // 2)], axis)
            if first.any() or last.any():
                return False
    return True


def _padding(side: Side, path: str, axes: int) -> tuple[Any, ...]:
    """Returns the padding of a convolution, for each axis."""
    found = getattr(getattr(side, "modules", {}).get(path), "padding", None)
    return found if isinstance(found, tuple) else (found,) * axes


def _without_other_rows(
    pairs: list[Pair], by_event: dict[int, Pair], known: Mapping[tuple[int, ...], str], layers: Collection[str]
) -> tuple[list[Pair], list[str]]:
    """Leaves out calls that get other rows on each side, and those within them; returns the rest, and notes.

    Args:
        pairs: The calls.
        by_event: The same by the ids of both events; those left out are removed.
        known: Alignments by shape (`known_shapes`).
        layers: Paths of the frameworks' own layers in `b`.

    Examples are an expert that gets the tokens that are routed to it on one side, and all tokens on the other, and an
    encoder that is called twice on one side, and once with both batches on the other. Such calls are computed within
    the call around them, if its own arrays correspond: if also in values, if one side gets rows of the other, if only
    the rows of one side are gathered from several axes, or if an earlier call already differs. Otherwise the shapes
    are a difference. The same holds for modules of the user whose arrays have another number of axes on each side, as
    experts that return the results of each token apart, which their caller adds.
    """
    left_out: set[int] = set()
    callers: dict[int, Pair] = {}
    found: dict[str, list[str]] = {}
    example = ""
    for index, pair in enumerate(pairs):
        outer = pair.b.parent
        while outer is not None and id(outer) not in by_event:
            outer = outer.parent
        if id(pair.b) in left_out or outer is None:
            continue
        arrays = [*zip(pair.a.arguments, pair.b.arguments, strict=False)]
        arrays += zip(pair.a.outputs, pair.b.outputs, strict=False)
        hows = [(x, y, _how_of_rows(pair, x, y, known)) for x, y in arrays if y.is_float]
        around, around_it = by_event[id(outer)], _callers(pair.b)
        if not (argument_mismatch(pair) or output_mismatch(pair)):
            continue
        are_rows = not any(
            how is None or x.array.shape == align.to_mlx(how, y.array, copy=False).shape for x, y, how in hows
        )
        if not are_rows and (pair.path in layers or all(_axes(x) == _axes(y) for x, y, _ in hows)):
            continue
        if argument_mismatch(around) or output_mismatch(around):
            continue
        if (
            not are_rows
            or all(x.array.ndim != y.array.ndim for x, y, _ in hows)
            or _agree(around)
            or _has_rows_of_other(pair, known)
            or not all(_agree(p) for p in pairs[:index] if id(p.b) not in around_it | left_out)
        ):
            events = {id(event) for side in (pair.a, pair.b) for event in side.walk()}
            left_out |= events
            callers |= {id(event): around for event in pair.b.walk()}
            names = found.setdefault(around.path or "the model", [])
            names += [pair.path] if pair.path not in names else []
            x, y = next((x, y) for x, y, _ in hows if are_rows or _axes(x) != _axes(y))
            example = example or f"{list(x.array.shape)} and {list(y.array.shape)}"
    notes = [
        f"{some(paths)}: called with other rows in a than in b, such as {example}; computed within {around}"
        for around, paths in found.items()
    ]
    _set_apart([pair for pair in pairs if id(pair.b) in left_out], callers, known)
    for event in left_out & by_event.keys():
        del by_event[event]
    return [pair for pair in pairs if id(pair.b) not in left_out], notes


def _axes(value: Value) -> int:
    """Returns the number of axes that are longer than 1."""
    return sum(size > 1 for size in value.array.shape)


def _how_of_rows(pair: Pair, ours: Value, theirs: Value, known: Mapping[tuple[int, ...], str]) -> str | None:
    """Returns the alignment of arrays that may have other rows on each side; None without one.

    With the channels moved, only the first axis may differ, otherwise all but the last one.
    """
    x, y = ours.array.shape, theirs.array.shape
    moved = align.to_mlx(align.MOVED, theirs.array, copy=False).shape
    fits = {
        align.SAME: len(x) * len(y) > 0 and x[-1:] == y[-1:],
        align.MOVED: len(x) == len(y) > 2 and x[1:] == moved[1:],
    }
    determined = align.KINDS.get(pair.kind or "") or (known.get(y) if all(fits.values()) else None)
    if determined is not None:
        return determined if fits[determined] else None
    return next((how for how, is_fitting in fits.items() if ours.is_float and is_fitting), None)


def _has_rows_of_other(pair: Pair, known: Mapping[tuple[int, ...], str]) -> bool:
    """Returns whether the first array of one side has only rows that the array of the other side has, too."""
    arrays = [
        *zip(pair.a.arguments, pair.b.arguments, strict=False),
        *zip(pair.a.outputs, pair.b.outputs, strict=False),
    ]
    first = next(((x, y) for x, y in arrays if x.is_float and y.is_float), None)
    if first is None:
        return False
    ours, theirs = first
    how = _how_of_rows(pair, ours, theirs, known)
    if how is None:
        return False
    both = ours.array, align.to_mlx(how, theirs.array)
    few, many = sorted(
        (a.reshape(len(a), -1) if how == align.MOVED else a.reshape(-1, a.shape[-1]) for a in both), key=len
    )
    sample = few[:: -(-len(few) // _SAMPLES)] if len(few) else few
    return len(few) > 0 and all(
        np.linalg.norm(many - row, axis=1).min() <= _NEAR * np.linalg.norm(row) for row in sample
    )


def _callers(event: Event) -> set[int]:
    """Returns the ids of the calls around a call."""
    found = set()
    while event.parent is not None:
        event = event.parent
        found.add(id(event))
    return found


def _set_apart(pairs: list[Pair], callers: Mapping[int, Pair], known: Mapping[tuple[int, ...], str]) -> None:
    """Adds calls that get other rows on each side to those around them, if both sides take the rows of `b`."""
    found: dict[int, Pair] = {}
    for pair in pairs:
        pair.arguments, pair.outputs, pair.own, pair.obstacle = [], [], set(), ""
        for ours, theirs, indices in (
            (pair.a.arguments, pair.b.arguments, pair.arguments),
            (pair.a.outputs, pair.b.outputs, pair.outputs),
        ):
            if len(ours) != len(theirs):
                continue
            hows = [_how_of_rows(pair, x, y, known) for x, y in zip(ours, theirs, strict=True)]
            if all(x.is_float and y.is_float for x, y in zip(ours, theirs, strict=True)):
                indices += [(i, i, how) for i, how in enumerate(hows) if how is not None] if None not in hows else []
        if pair.arguments and pair.outputs and pair.a.is_storable and pair.b.is_storable:
            found[id(pair.b)] = found[id(pair.a)] = pair
            callers[id(pair.b)].apart.append(pair)
    for pair in pairs:
        if id(pair.b) in found:
            own = {id(child) for child in nearest(pair.a, found)}
            inner = (found[id(child)] for child in nearest(pair.b, found))
            pair.children = [child for child in inner if id(child.a) in own and is_separable(child)]


def _agree(pair: Pair) -> bool:
    """Returns whether the outputs of a call are about equal in the runs of both sides."""
    arrays = [
        (align.to_torch(how, pair.a.outputs[i].array, copy=False), pair.b.outputs[j].array)
        for i, j, how in pair.outputs
    ]
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


def nearest(event: Event, by_event: Mapping[int, Pair]) -> Iterator[Event]:
    """Yields the calls within an event that have a counterpart, and are in no other such call."""
    for child in event.children:
        if id(child) in by_event:
            yield child
        else:
            yield from nearest(child, by_event)


def is_separable(pair: Pair) -> bool:
    """Returns whether the results of a call can be given instead of computed."""
    complete = len(pair.outputs) == len(pair.b.outputs) or pair.kind in align.DIFFERENT_CALLS
    return complete and bool(pair.outputs) and all(e.is_rebuildable for e in (pair.a, pair.b, pair.noise))


def known_shapes(pairs: list[Pair]) -> dict[tuple[int, ...], str]:
    """Returns the alignments that kinds of layers or values determine, by the shape of an output in `b`."""
    found: dict[tuple[int, ...], str] = {}
    for pair in pairs:
        for i, theirs in zip(output_numbers(pair), pair.b.outputs, strict=False):
            ours = pair.a.outputs[i]
            if theirs.array.ndim < 3:
                continue
            known = align.KINDS.get(pair.kind or "")
            fits = align.to_torch(align.MOVED, ours.array, copy=False).shape == theirs.array.shape
            if known is None and fits and ours.array.shape == theirs.array.shape:
                known = align.nearer(ours.array, theirs.array)
            if known is not None:
                found.setdefault(theirs.array.shape, known)
    return found


def _align(pair: Pair, shapes: Mapping[tuple[int, ...], str], same: bool, sequence_first: bool) -> None:
    """Sets which arrays of a pair correspond, and their axes."""
    ours, theirs = pair.a, pair.b
    name = theirs.path.rpartition(".")[2].lower()
    is_norm = pair.kind in ("layer_norm", "rms_norm") or (not theirs.children and "norm" in name)

    def how(a: Value, b: Value) -> str | None:
        found = align.alignment(pair.kind, a.array, b.array, shapes) if not same else None
        if same and a.array.shape == b.array.shape:
            found = align.SAME
        if is_norm and found != align.MOVED and (exchanged := align.exchanged(a.array, b.array)):
            return exchanged
        # the interface of the model itself must be the same
        if theirs.parent is None or align.KINDS.get(pair.kind or "") == align.MOVED:
            return found
        exchanged = align.sequence_first(a.array, b.array) if sequence_first and found != align.MOVED else None
        return exchanged or found or align.rows(a.array, b.array) or align.copies(a.array, b.array)

    _align_arguments(pair, how)
    count = 1 if pair.kind in align.DIFFERENT_CALLS else None
    for j, i in enumerate(output_numbers(pair)[:count]):
        if (found := how(ours.outputs[i], theirs.outputs[j])) is not None:
            pair.outputs.append((i, j, found))
    if pair.kind == "native_recurrent" and (len(ours.outputs), len(theirs.outputs)) == (2, 3):
        # the cells of all steps in MLX, of the last in PyTorch
        own, last = ours.outputs[1].array, theirs.outputs[2].array
        if found := align.SAME if own.shape == last.shape else align.rows(own, last):
            pair.outputs.append((1, 2, found))
    pair.masked_arguments = {
        j for i, j, found in pair.arguments if _masks_otherwise(ours.arguments[i], theirs.arguments[j], found)
    }
    if theirs.parent is not None:
        pair.masked_outputs = {
            j for i, j, found in pair.outputs if _masks_otherwise(ours.outputs[i], theirs.outputs[j], found)
        }


def _align_arguments(pair: Pair, how: Callable[[Value, Value], str | None]) -> None:
    """Sets which arguments correspond: those of equal names or places, or if one side has more, the next that fits.

    Args:
        pair: The pair.
        how: Returns the alignment of two arrays; None if there is none.
    """
    ours, theirs = pair.a, pair.b
    if len(ours.names) != len(theirs.names):
        start = 0
        for j, value in enumerate(theirs.arguments):
            for i in range(start, len(ours.arguments)):
                found = how(ours.arguments[i], value)
                if found is not None and ours.arguments[i].is_float == value.is_float:
                    pair.arguments.append((i, j, found))
                    start = i + 1
                    break
        return
    by_name = set(ours.names) == set(theirs.names) and len(set(ours.names)) == len(ours.names)
    for j, name in enumerate(theirs.names):
        i = ours.names.index(name) if by_name else j
        own, other = ours.arguments[i], theirs.arguments[j]
        found = how(own, other)
        # a mask may be booleans on one side and numbers on the other: then each side keeps its own
        if found is not None and own.is_float == other.is_float:
            pair.arguments.append((i, j, found))
        elif _are_masks(own, other):
            pair.own.add(j)
        elif found is None and own.is_float:
            pair.obstacle = pair.obstacle or unequal(pair.kind, own, other, "input of")


def output_numbers(pair: Pair) -> list[int]:
    """Returns the number in `a` of each output of `b`: of the same key or field, otherwise the same number."""
    numbers = numbers_by_name(pair.b.output_names, pair.a.output_names, len(pair.b.outputs))
    return [number for number in numbers if number < len(pair.a.outputs)]


def _masks_otherwise(ours: Value, theirs: Value, how: str) -> bool:
    return ours.is_float and align.masks_otherwise(align.to_torch(how, ours.array, copy=False), theirs.array)


def _are_masks(ours: Value, theirs: Value) -> bool:
    """Returns whether both are masks, of which at least one is of numbers: of any form."""
    if ours.is_float and theirs.is_float:
        return align.is_mask(ours.array) and align.is_mask(theirs.array)
    return ours.is_float != theirs.is_float


def unequal(kind: str | None, ours: Value, theirs: Value, what: str) -> str:
    """Returns a phrase on two arrays whose shapes do not correspond."""
    text = align.unequal_shapes(kind, ours.array, theirs.array)
    shapes = ours.array.shape, align.to_mlx(align.MOVED, theirs.array, copy=False).shape
    if align.KINDS.get(kind or "") == align.MOVED and shapes[0] != shapes[1] and len(shapes[0]) == len(shapes[1]):
        text += f", which is {list(shapes[1])} with the axes of a"
    return f"{what} {text}".replace("in MLX", "in a").replace("in PyTorch", "in b")


def argument_mismatch(pair: Pair) -> str:
    """Returns a phrase on the first argument whose shapes do not correspond; empty if there is none."""
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


def output_mismatch(pair: Pair) -> str:
    """Returns a phrase on the outputs, if their number or a shape does not correspond; else an empty text."""
    if not pair.a.is_complete or (pair.kind in align.DIFFERENT_CALLS and pair.outputs):
        return ""
    if len(pair.a.outputs) != len(pair.b.outputs):
        if pair.b.parent is not None and pair.outputs:
            return ""  # further outputs that the caller may not use
        names = pair.a.output_names, pair.b.output_names
        only = [set(names[number]) - set(names[1 - number]) if all(names) else set() for number in (0, 1)]
        missing = [f"{', '.join(sorted(keys))} in {side} only" for keys, side in zip(only, "ab", strict=True) if keys]
        return "; ".join([f"{len(pair.a.outputs)} outputs in a, {len(pair.b.outputs)} in b", *missing])
    matched = {j for _, j, _ in pair.outputs}
    for j, i in enumerate(output_numbers(pair)):
        if j not in matched:
            return unequal(pair.kind, pair.a.outputs[i], pair.b.outputs[j], "output of")
    return ""


def relative(path: str, parent: str) -> str:
    """Returns a path without that of a module around it."""
    return path[len(parent) + 1 :] if parent and path.startswith(f"{parent}.") else path
