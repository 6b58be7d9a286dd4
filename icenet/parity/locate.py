"""Compares three traces value by value, and finds the layer at which a difference begins.

Every value after a wrong layer is wrong too, so the first ratio over the yardstick only says where a
difference became visible. To find where it began, each layer is run again on the reference's own inputs, the
same on all three: what it inherits is gone then, and what is left is its own. A layer that still differs, and
that holds no layer which does, is marked "differs here"; one that is only over the yardstick in the run
"inherits". Replays also see faults that the noise of the layers before them would hide, and, with a random
cotangent, faults of the backward pass alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np

from icenet.core import rng
from icenet.parity.trace import Call, Trace, Value
from icenet.parity.yardstick import (
    FACTOR,
    SAMPLES,
    Judgement,
    judge,
    noise_rms,
    perturb_by_ulp,
    rms,
    round_to,
)

DIFFERS, CONTAINS, INHERITS = "differs here", "contains", "inherits"

Replay = Callable[[str, Call, list[Value]], dict[str, Value]]
"""A backend's replay of the layer at a path: `probe.replay`, bound to an engine."""


@dataclass(frozen=True)
class Row:
    """One value of the traces.

    Attributes:
        kind, path: its name (see `icenet.parity.trace`).
        shape: of the array.
        judgement: in the run.
        own: the worst of the layer's own values on the reference's inputs; None where it was not replayed.
        own_part: which value that was: `output`, `input 0` or `gradient weight` (the backward pass).
        mark: "differs here", "contains", "inherits" or empty.
        note: what else is to be said, such as dtypes that differ.
    """

    kind: str
    path: str
    shape: tuple[int, ...]
    judgement: Judgement
    own: Judgement | None = None
    own_part: str = ""
    mark: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Within the yardstick, in the run and by itself, and of one dtype."""
        return self.judgement.passed and (self.own is None or self.own.passed) and not self.note.startswith("dtype")

    @property
    def ratio(self) -> float:
        """The larger of the ratios in the run and by itself."""
        return max(self.judgement.ratio, self.own.ratio if self.own else 0.0)


def compare(
    mlx: Trace,
    torch: Trace,
    reference: Trace,
    dtype: str = "fp32",
    kinds: tuple[str, ...] = ("module", "loss", "gradient", "parameter", "moment"),
    samples: Callable[[], list[Trace]] | None = None,
) -> list[Row]:
    """Judges every value of the reference's trace, in its order. `dtype` is that of the arithmetic.

    `samples` gives traces of PyTorch on inputs rounded anew; it is asked where a ratio is over the yardstick.
    """
    if samples is not None:
        first = compare(mlx, torch, reference, dtype, kinds)
        if all(row.judgement.passed for row in first):
            return first
    moved = samples() if samples is not None else []
    rows = []
    sizes = layer_sizes(reference.of("gradient"))
    for name, exact in reference.values.items():
        kind, _, path = name.partition(":")
        if kind not in kinds or not exact.is_float:
            continue
        ours, theirs = mlx.values.get(name), torch.values.get(name)
        if ours is None or theirs is None:
            absent = "MLX" if ours is None else "PyTorch"
            judgement = Judgement(math.inf, 0.0, math.inf, math.inf, note=f"not there in {absent}")
            rows.append(Row(kind, path, exact.array.shape, judgement, note=judgement.note))
            continue
        judgement = judge(
            ours.array,
            theirs.array,
            exact.array,
            dtype,
            stored=theirs.dtype,
            beside=sizes.get(path.rpartition(".")[0], 0.0) if kind == "gradient" else 0.0,
            floor=_loss_noise(torch, reference) if kind == "loss" else 0.0,
            spread=noise_rms(exact.array, [trace.values[name].array for trace in moved]) if moved else None,
        )
        note = judgement.note
        if ours.dtype != theirs.dtype:
            note = f"dtype {ours.dtype} in MLX, {theirs.dtype} in PyTorch"
        rows.append(Row(kind, path, exact.array.shape, judgement, note=note))
    for name in mlx.values:
        kind, _, path = name.partition(":")
        if kind in kinds and name not in reference.values:
            judgement = Judgement(math.inf, 0.0, math.inf, math.inf, note="in MLX alone")
            rows.append(Row(kind, path, mlx.values[name].array.shape, judgement, note=judgement.note))
    return rows


def locate(
    rows: list[Row],
    torch: Trace,
    reference: Trace,
    replays: tuple[Replay, ...],
    dtype: str = "fp32",
    on_layer: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Replays every layer and marks the rows.

    Args:
        rows: from `compare`.
        torch, reference: the traces in the dtype under test and in float64.
        replays: of MLX, PyTorch and the reference; a fourth, of PyTorch with its weights rounded anew, gives
            samples where a layer is over the yardstick.
        dtype: of the arithmetic.
        on_layer: told how many layers are done, of how many.
    """
    own: dict[str, tuple[Judgement, str]] = {}
    paths = [path for path in reference.calls if path in torch.calls]
    for index, path in enumerate(paths):
        own[path] = replay_layer(path, torch, reference, replays, dtype)
        if on_layer is not None:
            on_layer(index + 1, len(paths))
    differing = [path for path, (judgement, _) in own.items() if not judgement.passed]
    here = {path for path in differing if not any(_is_within(other, path) for other in differing)}
    marked = []
    for row in rows:
        layer = row.path if row.kind == "module" else row.path.rpartition(".")[0]
        if row.kind == "module" and row.path in own:
            row = replace(row, own=own[row.path][0], own_part=own[row.path][1])
        mark = ""
        if (row.kind == "module" and layer in here) or (not row.passed and _plain(layer) in here):
            mark = DIFFERS
        elif row.kind == "module" and layer in differing:
            mark = CONTAINS
        elif not row.judgement.passed and row.kind in ("module", "gradient", "loss"):
            mark = INHERITS
        marked.append(replace(row, mark=mark))
    return marked


def replay_layer(
    path: str, torch: Trace, reference: Trace, replays: tuple[Replay, ...], dtype: str = "fp32"
) -> tuple[Judgement, str]:
    """The worst judgement of one layer on the reference's inputs, and the value it was found in.

    An output over the yardstick is told before any gradient, which can only follow it.

    The inputs are the reference's, rounded to the dtypes that PyTorch met there; the cotangents are normal
    variates. All three get the same.
    """
    inputs = iter(torch.calls[path].values)

    def rounded(exact: Value) -> Value:
        like = next(inputs)
        return Value(round_to(exact.array, like.dtype), like.dtype) if exact.is_float else exact

    call = reference.calls[path].map(rounded)
    seeds = []
    for name, output in _outputs(torch, path):
        values = rng.normal(rng.key(0, "cotangent", name), output.array.shape)
        seeds.append(Value(round_to(values, output.dtype), output.dtype))
    ours, theirs, exact = (replay(path, call, seeds) for replay in replays[:3])
    moved: list[dict[str, Value]] = []
    sizes = layer_sizes({name.removeprefix("gradient "): v for name, v in exact.items() if "gradient " in name})
    worst, part = Judgement(0.0, 0.0, 0.0, 0.0), "output"
    for name, value in exact.items():
        if name not in ours or name not in theirs:
            return Judgement(math.inf, 0.0, math.inf, math.inf, note=f"no {name} on one backend"), name
        parameter = name.removeprefix("gradient ")
        judged = partial(
            judge,
            ours[name].array,
            theirs[name].array,
            value.array,
            dtype,
            stored=theirs[name].dtype,
            beside=sizes.get(parameter.rpartition(".")[0], 0.0) if parameter != name else 0.0,
        )
        judgement = judged()
        if not judgement.passed and len(replays) > 3:
            moved = moved or [replays[3](path, *anew(call, seeds, dtype, index)) for index in range(SAMPLES)]
            judgement = judged(spread=noise_rms(value.array, [sample[name].array for sample in moved]))
        backward = not name.startswith("output")
        if judgement.ratio > worst.ratio and not (backward and part.startswith("output") and not worst.passed):
            worst, part = judgement, name
    return worst, part


def anew(call: Call, seeds: list[Value], dtype: str, index: int) -> tuple[Call, list[Value]]:
    """A layer's inputs and cotangents, rounded anew."""
    counter = count()

    def move(value: Value) -> Value:
        key = rng.key(index, "rounded anew", next(counter))
        if not value.is_float:
            return value
        # a value of fp32 in a half-precision run was rounded to fp32
        finer = "fp32" if value.dtype == "fp32" else dtype
        return Value(perturb_by_ulp(value.array, finer, key).astype(value.array.dtype), value.dtype)

    return call.map(move), [move(seed) for seed in seeds]


def first_over(rows: list[Row]) -> Row | None:
    """The first row, in the order of the run, that is over the yardstick in the run itself."""
    return next((row for row in rows if not row.judgement.passed), None)


def layer_sizes(gradients: Mapping[str, Value]) -> dict[str, float]:
    """RMS of all gradients of each layer together, by module path: what floor 3 of the yardstick needs."""
    squares: dict[str, list[float]] = {}
    for path, value in gradients.items():
        total = squares.setdefault(path.rpartition(".")[0], [0.0, 0.0])
        total[0] += rms(value.array) ** 2 * value.array.size
        total[1] += value.array.size
    return {path: math.sqrt(total / count) if count else 0.0 for path, (total, count) in squares.items()}


def _loss_noise(torch: Trace, reference: Trace) -> float:
    """Floor 4 of the yardstick: the noise of the logits, averaged over the labels counted."""
    name = "module:"
    if name not in torch.values or "input:labels" not in torch.values:
        return 0.0
    counted = int(np.count_nonzero(torch.values["input:labels"].array >= 0))
    difference = torch.values[name].array.astype(np.float64) - reference.values[name].array
    return rms(difference) / math.sqrt(max(counted, 1))


def _outputs(trace: Trace, path: str) -> Iterator[tuple[str, Value]]:
    """The outputs of the first call of a layer."""
    index, name = 0, f"module:{path}"
    while name in trace.values:
        yield name, trace.values[name]
        index += 1
        name = f"module:{path}[{index}]"


def _is_within(path: str, parent: str) -> bool:
    return path != parent and (parent == "" or path.startswith(parent + "."))


def _plain(path: str) -> str:
    """A module's path without the number of its call or output."""
    return path.partition("#")[0].partition("[")[0]


__all__ = [
    "CONTAINS",
    "DIFFERS",
    "FACTOR",
    "INHERITS",
    "Replay",
    "Row",
    "compare",
    "first_over",
    "layer_sizes",
    "locate",
    "replay_layer",
]
