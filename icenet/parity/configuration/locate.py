"""Compares three traces value by value and finds the layers at which a difference begins.

After a wrong layer every value is wrong, so the first value over the tolerance shows where a difference is visible,
not where it begins. To find that, each layer is replayed: MLX, PyTorch and the reference call it with the same
inputs, those of the reference, so that a difference in its inputs has no effect. The replay is forward and, with
random cotangents, backward. The marks of a layer:

    differs here    over the tolerance in its replay, and none of the layers within it is
    contains        over the tolerance in its replay, because a layer within it is
    propagated      over the tolerance in the run only: its inputs already differed

Replays also find faults that are smaller than the noise that the earlier layers produce, and faults of the backward
pass alone. Where a layer has no derivative, both frameworks may be right with different gradients. So if only
gradients are over the tolerance and those of the reference have a jump at the inputs, the layer is replayed again at
a nearby point where it has a derivative, and what does not depend on the choice is compared at the inputs
(`icenet.parity.ties`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from icenet.parity.align import permutation
from icenet.parity.aligned_traces import AlignedReplay, align_trace, flattened_input, without_counterpart
from icenet.parity.fp16 import Replay
from icenet.parity.layer import SampledReplay, judge_integers, replay_layer
from icenet.parity.resampling import Samples, Values, judge_values
from icenet.parity.ties import tie_remark
from icenet.parity.trace import Trace
from icenet.parity.yardstick import Judgement

Array = npt.NDArray[Any]

DIFFERS, CONTAINS, PROPAGATED = "differs here", "contains", "propagated"

KINDS = ("module", "loss", "gradient", "statistic", "parameter", "moment")
"""The kinds of values that are compared."""


@dataclass(frozen=True)
class Row:
    """The comparison of one value.

    Attributes:
        kind, path: Name of the value (see `icenet.parity.trace`).
        shape: Shape of the array.
        judgement: Judgement of the value in the run.
        own: The worst judgement in the replay of the layer; None if it was not replayed.
        own_part: The value of that judgement: `output`, `input 0` or `gradient weight` (the backward pass).
        mark: "differs here", "contains", "propagated" or empty.
        note: A remark, such as unequal dtypes.
        remedy: How the value, or the layer's input, is reordered in MLX, if it is, and what to write instead.
        ties: A remark on a layer whose gradients agree except at ties of its inputs, else empty.
    """

    kind: str
    path: str
    shape: tuple[int, ...]
    judgement: Judgement
    own: Judgement | None = None
    own_part: str = ""
    mark: str = ""
    note: str = ""
    remedy: str = ""
    ties: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is within the tolerance in the run and in the replay, and of equal dtype."""
        return self.judgement.passed and (self.own is None or self.own.passed) and not self.note.startswith("dtype")

    @property
    def ratio(self) -> float:
        """The larger of the ratios in the run and in the replay."""
        return max(self.judgement.ratio, self.own.ratio if self.own else 0.0)

    @property
    def plain_ratio(self) -> float:
        """The larger ratio without the floor of sums term by term, if the row passes because of it; else 0."""
        return max(self.judgement.plain_ratio, self.own.plain_ratio if self.own else 0.0) if self.passed else 0.0


def compare(
    mlx: Trace,
    torch: Trace,
    reference: Trace,
    dtype: str = "fp32",
    kinds: tuple[str, ...] = KINDS,
    samples: Samples[Callable[[int], Trace]] | None = None,
) -> list[Row]:
    """Compares every float value of the reference's trace, in its order.

    Args:
        mlx, torch: Traces in the dtype under test.
        reference: Trace in float64.
        dtype: Compute dtype under test: fp32, bf16 or fp16.
        kinds: Kinds of values to compare.
        samples: Return the trace of sample 0 to SAMPLES - 1 (see `judge_values`).
    """
    mlx, remarks = align_trace(mlx, reference)
    # inputs and logits are needed for the noise of the loss
    wanted = {name: value for name, value in reference.values.items() if name.partition(":")[0] in (*kinds, "input")}
    if "loss" in kinds and "module:" in reference.values:
        wanted["module:"] = reference.values["module:"]

    def aligned(run: Callable[[int], Trace]) -> Callable[[int], Values]:
        return lambda index: align_trace(run(index), reference)[0].values

    aligned_samples = samples.map(aligned) if samples else None
    judgements = judge_values(mlx.values, torch.values, wanted, dtype, aligned_samples)
    rows = []
    left_out = without_counterpart(mlx, reference)
    for name, exact in reference.values.items():
        kind, _, path = name.partition(":")
        if kind not in kinds or not (exact.is_float or kind == "module") or name in left_out:
            continue
        ours, theirs = mlx.values.get(name), torch.values.get(name)
        if ours is None or theirs is None:
            missing = Judgement.incomparable(f"missing in {'MLX' if ours is None else 'PyTorch'}")
            rows.append(Row(kind, path, exact.array.shape, missing, note=missing.note))
            continue
        if not exact.is_float and not ours.is_float:
            judgement = judge_integers(ours, theirs, exact)
            rows.append(Row(kind, path, exact.array.shape, judgement, note=judgement.note))
            continue
        dtypes = f"dtype {ours.dtype} in MLX, {theirs.dtype} in PyTorch" if ours.dtype != theirs.dtype else ""
        if dtypes and not exact.is_float:
            rows.append(Row(kind, path, exact.array.shape, Judgement.incomparable(dtypes), note=dtypes))
            continue
        note = "; ".join(filter(None, (dtypes, remarks.get(name) or judgements[name].note)))
        remedy = "" if judgements[name].passed or remarks.get(name) else permutation(ours.array, exact.array)
        rows.append(Row(kind, path, exact.array.shape, judgements[name], note=note, remedy=remedy))
    for name, value in mlx.values.items():
        kind, _, path = name.partition(":")
        if kind in kinds and name not in reference.values and name not in left_out:
            extra = Judgement.incomparable("in MLX only")
            rows.append(Row(kind, path, value.array.shape, extra, note=extra.note))
    return rows


def locate(
    rows_of: Callable[[bool], list[Row]],
    mlx: Trace,
    torch: Trace,
    reference: Trace,
    replays: tuple[Replay, Replay, Replay],
    dtype: str = "fp32",
    samples: Samples[SampledReplay] | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Replays every layer and returns the rows with their marks.

    Args:
        rows_of: Returns the rows by `compare`. Its argument is whether a layer differs in its replay: then few
            samples of the noise decide which values are over the tolerance (see `Samples.few`).
        mlx, torch: Traces in the dtype under test.
        reference: Trace in float64.
        replays: Replays by MLX, PyTorch and the reference.
        dtype: Compute dtype under test.
        samples: Replays in a sample. `in_order` is used for layers that are not IceNet's own.
        on_layer: Called after each layer with the number of replayed layers and of all layers.
    """
    own: dict[str, tuple[Judgement, str]] = {}
    remarks: dict[str, str] = {}
    remedies: dict[str, str] = {}
    ties: dict[str, str] = {}
    aligned = AlignedReplay(replays[0], mlx, reference)
    paths = [path for path in reference.calls if path in torch.calls]
    for index, path in enumerate(paths):
        remarks[path] = aligned.obstacle(path)
        if not remarks[path]:
            remedies[path] = flattened_input(path, mlx, reference)
            # layers come after those within them, and one that contains a difference needs no samples of its noise
            contains = any(not judgement.passed and _is_within(other, path) for other, (judgement, _) in own.items())
            chosen = None if contains else samples
            if chosen and not mlx.has_foreign(path):
                chosen = replace(chosen, in_order=None)
            is_leaf = not any(_is_within(other, path) for other in paths)
            judgement, part, has_ties = replay_layer(
                path, torch, reference, (aligned, *replays[1:]), dtype, chosen, is_leaf
            )
            own[path] = judgement, part
            ties[path] = tie_remark(mlx.classes.get(path, ""), is_leaf) if has_ties else ""
        if on_layer is not None:
            on_layer(index + 1, len(paths))
    differing = [path for path, (judgement, _) in own.items() if not judgement.passed]
    origins = {path for path in differing if not any(_is_within(other, path) for other in differing)}
    marked = []
    for row in rows_of(bool(differing)):
        layer = row.path if row.kind == "module" else _parent(row.path)
        if row.kind == "module" and row.path in own:
            row = replace(row, own=own[row.path][0], own_part=own[row.path][1], ties=ties[row.path])
        if row.kind == "module" and row.path in remarks:
            own_note = own[row.path][0].note if row.path in own else ""
            notes = dict.fromkeys(filter(None, (row.note, remarks[row.path], own_note)))
            row = replace(row, note="; ".join(notes), remedy=remedies.get(row.path) or row.remedy)
        mark = ""
        if (row.kind == "module" and layer in origins) or (not row.passed and _without_index(layer) in origins):
            mark = DIFFERS
        elif row.kind == "module" and layer in differing:
            mark = CONTAINS
        elif not row.judgement.passed and row.kind in ("module", "gradient", "loss"):
            mark = PROPAGATED
        marked.append(replace(row, mark=mark))
    return marked


def _parent(path: str) -> str:
    """Returns the path of the module that holds a parameter."""
    return path.rpartition(".")[0]


def _is_within(path: str, parent: str) -> bool:
    return path != parent and (parent == "" or path.startswith(parent + "."))


def _without_index(path: str) -> str:
    """Returns a module's path without the number of its call or output."""
    return path.partition("#")[0].partition("[")[0]
