"""Replays on ids that those of the run do not have: they reach rows of tables that the run does not.

The embeddings, and the code of each module that gets ids, are replayed once more with rows of the table that no call
has selected. The ends of the table come first, because bounds and rows of padding are there.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity.calls.events import Event
from icenet.parity.calls.pairs import FRAMEWORK_LAYERS, Pair
from icenet.parity.calls.replays import judge_replay, replay
from icenet.parity.results.rows import index_of
from icenet.parity.state import Comparison
from icenet.parity.trace import Value
from icenet.parity.yardstick import Judgement

Array = npt.NDArray[np.integer]

_ENDS = 4
"""Number of rows at each end of a table that come first."""
_REMARK = "at ids that the inputs do not have"


def reads(c: Comparison, root: Event) -> Iterator[tuple[Event, Array, int]]:
    """Yields each call of an embedding of `b`, its ids, and the number of rows of its table."""
    for event in root.walk():
        shape = c.b.shapes.get(f"{event.path}.weight" if event.path else "weight")
        if c.b.kinds.get(event.path) != "embedding" or shape is None or not event.arguments:
            continue
        ids = event.arguments[0].array
        if ids.dtype.kind in "iu" and ids.size:
            yield event, ids, shape[0]


def offset(array: Array, ids: Array) -> int | None:
    """Returns by how much all ids of a table are larger than an array; None if that is not a constant."""
    if array.dtype.kind not in "iu" or array.shape != ids.shape:
        return None
    distance = ids.astype(np.int64) - array.astype(np.int64)
    return int(distance.flat[0]) if (distance == distance.flat[0]).all() else None


def _are_known(ids: Array) -> bool:
    """Returns whether an array with the values of ids is an array of ids: a mask may have few by chance."""
    return len(np.unique(ids)) > 1 and int(ids.max()) > 1


def replay_ids(c: Comparison, pairs: list[Pair]) -> dict[int, dict[str, Judgement]]:
    """Returns the judgements that are over the tolerance at other ids, by the number of the event in `b`.

    A pair that differs keeps the inputs, on which a cause is then searched for.
    """
    found: dict[int, dict[str, Judgement]] = {}
    if not c.computes_reference:
        return found
    seen: dict[str, set[int]] = {}
    calls = list(reads(c, pairs[0].b))
    for event, ids, _ in calls:
        seen.setdefault(event.path, set()).update(np.unique(ids).tolist())
    c.tables = [(ids, rows) for _, ids, rows in calls]
    done: set[tuple[int, int]] = set()
    for event, ids, rows in calls:
        unseen = _unseen(c, event.path, seen[event.path], rows)
        if not len(unseen):
            continue
        for pair in pairs:
            places = [(n, by) for n, item in _arguments(pair) if (by := offset(item.array, ids)) is not None]
            key = (pair.b.number, rows)
            are_ids = pair.b is event or _are_known(ids)
            if not are_ids or pair.obstacle or not places or key in done or _is_plain(c, pair):
                continue
            done.add(key)
            if over := _judge_at(c, pair, places, np.resize(unseen, ids.shape)):
                found.setdefault(pair.b.number, over)
    return found


def _arguments(pair: Pair) -> list[tuple[int, Value]]:
    return list(enumerate(pair.inputs("b")[: len(pair.arguments)]))


def _unseen(c: Comparison, path: str, seen: set[int], rows: int) -> Array:
    """Returns the rows of a table that no call has selected: those at its ends first, then others in random order."""
    generator = np.random.default_rng([c.seed, zlib.crc32(path.encode())])
    last = np.arange(rows - 1, max(rows - 1 - _ENDS, -1), -1)
    order = np.concatenate([np.stack([last, rows - 1 - last], 1).reshape(-1), generator.permutation(rows)])
    order = np.asarray(list(dict.fromkeys(order.tolist())))
    unseen: Array = order[~np.isin(order, list(seen))]
    return unseen


def _is_plain(c: Comparison, pair: Pair) -> bool:
    """Returns whether a call is of the frameworks' embedding on both sides, of which all rows are alike.

    The row of PyTorch's `padding_idx` has no gradient. That of MLX has one, which is no difference for inputs without
    padding: a note says so.
    """
    names = c.a.classes.get(pair.a.path, ""), c.b.classes.get(pair.path, "")
    if not all(name.startswith(FRAMEWORK_LAYERS) for name in names) or c.b.kinds.get(pair.path) != "embedding":
        return False
    module = c.b.modules[pair.path]
    padding = getattr(module, "padding_idx", None)
    if padding is not None and c.a.backend == "mlx" and c.b.backend == "torch":
        c.add_notes(
            [f"{pair.path}: b does not train row {padding} (padding_idx), a does; the inputs do not select it"]
        )
    return getattr(module, "max_norm", None) is None


def _judge_at(c: Comparison, pair: Pair, places: list[tuple[int, int]], ids: Array) -> dict[str, Judgement]:
    """Returns the judgements over the tolerance with other ids in place of some arguments of a call."""
    values = list(pair.inputs("b"))
    for number, by in places:
        values[number] = replace(values[number], array=(ids - by).astype(values[number].array.dtype))
    pair.larger = values
    try:
        if pair.is_leaf:
            judged = replay(c, pair, gradients=c.wants("gradients"))
        else:
            given = c.replay_of(pair, False)
            judged = judge_replay(c, given, c.reference.replay(given))[0]
    except align.ReplayError:  # `b` does not take them
        judged = {}
    results = pair.results("b")
    whole = {name for name in judged if name.startswith("output") and not results[index_of(name)].is_float}
    over = {name: item for name, item in judged.items() if not item.passed and (item.is_over or name in whole)}
    if not over:
        pair.larger = None
    return {name: replace(item, note=item.note or _REMARK) for name, item in over.items()}
