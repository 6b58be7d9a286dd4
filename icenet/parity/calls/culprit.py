"""Where in a replay a difference begins: the first result over the tolerance, in the order of the computation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy.typing as npt

from icenet.parity.calls.pairing import relative
from icenet.parity.calls.pairs import Pair
from icenet.parity.results.rows import index_of
from icenet.parity.yardstick import Judgement

Array = npt.NDArray[Any]


class Origin(NamedTuple):
    """Where a difference begins in a replay.

    Attributes:
        order: Position in the order of the computation.
        where: Where in the module, such as "between mlp and norm2"; empty for a layer without others within.
        label: What to call the result that differs.
        name: Its name in the replay.
        judgement: Its judgement.
    """

    order: float
    where: str
    label: str
    name: str
    judgement: Judgement


def first_output(pair: Pair, judgements: Mapping[str, Judgement]) -> Origin | None:
    """Returns where in a replay a difference begins, in the order of the computation."""
    places, at = pair.places(), _inputs_of(pair)
    found = []
    last = max((event.number for event in pair.b.walk()), default=pair.b.number)
    for name, judgement in judgements.items():
        if judgement.passed:
            continue
        if name.startswith("statistic "):
            found.append(Origin(last + 0.6, "", name, name, judgement))
        elif name.startswith("output"):
            child, number = places[index_of(name)]
            if child is None:
                where = f"after {relative(pair.children[-1].path, pair.path)}" if pair.children else ""
                label = f"{pair.b.output_label(number)}{at}"
                found.append(Origin(last + 0.5, where, label, name, judgement))
            else:
                label = f"input of {relative(child.path, pair.path)}{at}"
                found.append(Origin(child.b.number - 0.5, between(pair, child), label, name, judgement))
    return min(found, key=lambda origin: origin.order, default=None)


def _inputs_of(pair: Pair) -> str:
    """Returns which inputs a replay has that differs; empty for those of the run."""
    if pair.larger is None:
        return ""
    kept = zip(pair.larger, pair.inputs("b"), strict=True)
    return " at larger inputs" if all(new is own or new.is_float for new, own in kept) else " at other ids"


def first_name(pair: Pair, judgements: Mapping[str, Judgement]) -> str:
    """Returns the name of the result of a replay in which a difference begins."""
    origin = first_output(pair, judgements) or first_gradient(pair, judgements)
    return origin.name if origin is not None else "output"


def between(pair: Pair, child: Pair) -> str:
    """Returns `between mlp and norm2`, given a call within a module."""
    index = pair.children.index(child)
    name = relative(child.path, pair.path)
    if index == 0:
        return f"before {name}"
    before = pair.children[index - 1]
    if before.path == child.path:
        return f"between {name} (call {before.b.call + 1}) and {name} (call {child.b.call + 1})"
    return f"between {relative(before.path, pair.path)} and {name}"


def first_gradient(pair: Pair, judgements: Mapping[str, Judgement]) -> Origin | None:
    """Returns where in a replay a difference begins, in the order of the backward pass."""
    found = []
    for name, judgement in judgements.items():
        if judgement.passed or name.startswith(("output", "statistic")):
            continue
        order, where = -1.0, ""
        if name.startswith("input ") and name[6:].isdigit():
            child = _input_place(pair, int(name[6:]))
            if child is not None:
                order = float(pair.children.index(child))
                rest = pair.children[pair.children.index(child) + 1 :]
                own = relative(child.path, pair.path)
                where = f"between {own} and {relative(rest[0].path, pair.path)}" if rest else f"after {own}"
            elif pair.children:
                where = f"before {relative(pair.children[0].path, pair.path)}"
        found.append(Origin(order, where, gradient_label(pair, name), name, judgement))
    return max(found, key=lambda origin: (origin.order, origin.judgement.ratio), default=None)


def _input_place(pair: Pair, number: int) -> Pair | None:
    floats = [place for place, item in zip(pair.input_places(), pair.inputs("b"), strict=True) if item.is_float]
    return floats[number][0] if number < len(floats) else None


def gradient_label(pair: Pair, name: str) -> str:
    """Returns what to call a gradient of a replay."""
    if name.startswith("gradient:"):
        return f"gradient of {name.partition(':')[2]}"
    if name.startswith("input ") and name[6:].isdigit():
        child = _input_place(pair, int(name[6:]))
        if child is not None:
            return f"gradient of the output of {relative(child.path, pair.path)}"
        return "gradient of the input" + (f" {name[6:]}" if name[6:] != "0" else "")
    return f"gradient of the {name}"
