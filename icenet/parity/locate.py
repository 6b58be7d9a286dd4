"""Compares three traces value by value and finds the layers at which a difference begins.

After a wrong layer every value is wrong, so the first value over the tolerance shows where a difference is visible,
not where it begins. To find that, each layer is replayed: MLX, PyTorch and the reference call it with the same
inputs, those of the reference, so that a difference in its inputs has no effect. The replay is forward and, with
random cotangents, backward. The marks of a layer:

    differs here    over the tolerance in its replay, and none of the layers within it is
    contains        over the tolerance in its replay, because a layer within it is
    propagated      over the tolerance in the run only: its inputs already differed

Replays also find faults that are smaller than the noise that the earlier layers produce, and faults of the backward
pass alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from icenet.core import rng
from icenet.parity.trace import Call, Trace, Value
from icenet.parity.yardstick import SAMPLES, Judgement, judge, noise_rms, perturb_by_ulp, rms, round_to

DIFFERS, CONTAINS, PROPAGATED = "differs here", "contains", "propagated"

KINDS = ("module", "loss", "gradient", "parameter", "moment")
"""The kinds of values that are compared."""

Replay = Callable[[str, Call, list[Value]], dict[str, Value]]
"""Calls the layer at a path with arguments and cotangents: `icenet.parity.engines.replay` of one engine."""


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
        """Whether the value is within the tolerance in the run and in the replay, and of equal dtype."""
        return self.judgement.passed and (self.own is None or self.own.passed) and not self.note.startswith("dtype")

    @property
    def ratio(self) -> float:
        """The larger of the ratios in the run and in the replay."""
        return max(self.judgement.ratio, self.own.ratio if self.own else 0.0)


def compare(
    mlx: Trace,
    torch: Trace,
    reference: Trace,
    dtype: str = "fp32",
    kinds: tuple[str, ...] = KINDS,
    perturbed_traces: Callable[[], list[Trace]] | None = None,
) -> list[Row]:
    """Compares every float value of the reference's trace, in its order.

    Args:
        mlx, torch: Traces in the dtype under test.
        reference: Trace in float64.
        dtype: Compute dtype under test: fp32, bf16 or fp16.
        kinds: Kinds of values to compare.
        perturbed_traces: Returns SAMPLES traces of PyTorch with perturbed weights, for floor 5 of the yardstick. It
            is called only if a value is over the tolerance.
    """
    rows = _compare(mlx, torch, reference, dtype, kinds, [])
    if perturbed_traces is None or all(row.judgement.passed for row in rows):
        return rows
    return _compare(mlx, torch, reference, dtype, kinds, perturbed_traces())


def _compare(
    mlx: Trace, torch: Trace, reference: Trace, dtype: str, kinds: tuple[str, ...], perturbed: list[Trace]
) -> list[Row]:
    rows = []
    layer_rms = gradient_rms(reference.of("gradient"))
    for name, exact in reference.values.items():
        kind, _, path = name.partition(":")
        if kind not in kinds or not exact.is_float:
            continue
        ours, theirs = mlx.values.get(name), torch.values.get(name)
        if ours is None or theirs is None:
            missing = Judgement.incomparable(f"missing in {'MLX' if ours is None else 'PyTorch'}")
            rows.append(Row(kind, path, exact.array.shape, missing, note=missing.note))
            continue
        judgement = judge(
            ours.array,
            theirs.array,
            exact.array,
            dtype,
            stored=theirs.dtype,
            layer_rms=layer_rms.get(_parent(path), 0.0) if kind == "gradient" else 0.0,
            min_noise=_loss_noise(torch, reference) if kind == "loss" else 0.0,
            sampled_noise=noise_rms(exact.array, [t.values[name].array for t in perturbed]) if perturbed else None,
        )
        unequal_dtypes = f"dtype {ours.dtype} in MLX, {theirs.dtype} in PyTorch"
        note = unequal_dtypes if ours.dtype != theirs.dtype else judgement.note
        rows.append(Row(kind, path, exact.array.shape, judgement, note=note))
    for name, value in mlx.values.items():
        kind, _, path = name.partition(":")
        if kind in kinds and name not in reference.values:
            extra = Judgement.incomparable("in MLX only")
            rows.append(Row(kind, path, value.array.shape, extra, note=extra.note))
    return rows


def locate(
    rows: list[Row],
    torch: Trace,
    reference: Trace,
    replays: tuple[Replay, ...],
    dtype: str = "fp32",
    on_layer: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Replays every layer and returns the rows with their marks.

    Args:
        rows: Rows that `compare` returned.
        torch, reference: Traces in the dtype under test and in float64.
        replays: Replays by MLX, PyTorch and the reference; optionally a fourth, by PyTorch with perturbed weights,
            for floor 5 of the yardstick.
        dtype: Compute dtype under test.
        on_layer: Called after each layer with the number of replayed layers and of all layers.
    """
    own: dict[str, tuple[Judgement, str]] = {}
    paths = [path for path in reference.calls if path in torch.calls]
    for index, path in enumerate(paths):
        own[path] = replay_layer(path, torch, reference, replays, dtype)
        if on_layer is not None:
            on_layer(index + 1, len(paths))
    differing = [path for path, (judgement, _) in own.items() if not judgement.passed]
    origins = {path for path in differing if not any(_is_within(other, path) for other in differing)}
    marked = []
    for row in rows:
        layer = row.path if row.kind == "module" else _parent(row.path)
        if row.kind == "module" and row.path in own:
            row = replace(row, own=own[row.path][0], own_part=own[row.path][1])
        mark = ""
        if (row.kind == "module" and layer in origins) or (not row.passed and _without_index(layer) in origins):
            mark = DIFFERS
        elif row.kind == "module" and layer in differing:
            mark = CONTAINS
        elif not row.judgement.passed and row.kind in ("module", "gradient", "loss"):
            mark = PROPAGATED
        marked.append(replace(row, mark=mark))
    return marked


def replay_layer(
    path: str, torch: Trace, reference: Trace, replays: tuple[Replay, ...], dtype: str = "fp32"
) -> tuple[Judgement, str]:
    """Replays one layer; returns the worst judgement and the name of its value (`output`, `input 0`, ...).

    All replays receive the same: the inputs of the reference, rounded to the dtypes that PyTorch had there, and
    cotangents drawn from a normal distribution.

    If an output is over the tolerance, gradients are not considered: their difference is a consequence.
    """
    dtypes = iter(value.dtype for value in torch.calls[path].values)

    def rounded(exact: Value) -> Value:
        stored = next(dtypes)
        return Value(round_to(exact.array, stored), stored) if exact.is_float else exact

    call = reference.calls[path].map(rounded)
    cotangents = []
    for name, output in torch.outputs(path).items():
        values = rng.normal(rng.key(0, "cotangent", name), output.array.shape)
        cotangents.append(Value(round_to(values, output.dtype), output.dtype))
    ours, theirs, exact = (replay(path, call, cotangents) for replay in replays[:3])
    perturbed: list[dict[str, Value]] = []
    layer_rms = gradient_rms({name.removeprefix("gradient "): v for name, v in exact.items() if "gradient " in name})
    worst, part = Judgement(0.0, 0.0, 0.0, 0.0), "output"
    for name, value in exact.items():
        if name not in ours or name not in theirs:
            return Judgement.incomparable(f"no {name} on one backend"), name
        parameter = name.removeprefix("gradient ")
        size = layer_rms.get(_parent(parameter), 0.0) if parameter != name else 0.0
        arrays = ours[name].array, theirs[name].array, value.array
        judgement = judge(*arrays, dtype, stored=theirs[name].dtype, layer_rms=size)
        if not judgement.passed and len(replays) > 3:
            if not perturbed:
                perturbed = [replays[3](path, *_perturb(call, cotangents, dtype, i)) for i in range(SAMPLES)]
            noise = noise_rms(value.array, [sample[name].array for sample in perturbed])
            judgement = judge(*arrays, dtype, stored=theirs[name].dtype, layer_rms=size, sampled_noise=noise)
        output_failed = part.startswith("output") and not worst.passed
        if judgement.ratio > worst.ratio and (name.startswith("output") or not output_failed):
            worst, part = judgement, name
    return worst, part


def gradient_rms(gradients: Mapping[str, Value]) -> dict[str, float]:
    """Returns the RMS of all gradients of each layer, by module path (for floor 3 of the yardstick)."""
    sums: dict[str, tuple[float, int]] = {}
    for path, value in gradients.items():
        squares, size = sums.get(_parent(path), (0.0, 0))
        sums[_parent(path)] = squares + rms(value.array) ** 2 * value.array.size, size + value.array.size
    return {path: math.sqrt(squares / size) if size else 0.0 for path, (squares, size) in sums.items()}


def _perturb(call: Call, cotangents: list[Value], dtype: str, index: int) -> tuple[Call, list[Value]]:
    """Perturbs the inputs and cotangents of a layer by an ulp; `index` selects the random draw."""
    numbers = count()

    def perturb(value: Value) -> Value:
        key = rng.key(index, "rounded anew", next(numbers))
        if not value.is_float:
            return value
        # in a half-precision run an fp32 value was rounded to fp32
        rounded_to = "fp32" if value.dtype == "fp32" else dtype
        return Value(perturb_by_ulp(value.array, rounded_to, key).astype(value.array.dtype), value.dtype)

    return call.map(perturb), [perturb(cotangent) for cotangent in cotangents]


def _loss_noise(torch: Trace, reference: Trace) -> float:
    """Returns floor 4 of the yardstick: the noise of the logits over the square root of the number of labels."""
    if "module:" not in torch.values or "input:labels" not in torch.values:
        return 0.0
    num_labels = int(np.count_nonzero(torch.values["input:labels"].array >= 0))
    noise = torch.logits.astype(np.float64) - reference.logits
    return rms(noise) / math.sqrt(max(num_labels, 1))


def _parent(path: str) -> str:
    """Returns the path of the module that holds a parameter."""
    return path.rpartition(".")[0]


def _is_within(path: str, parent: str) -> bool:
    return path != parent and (parent == "" or path.startswith(parent + "."))


def _without_index(path: str) -> str:
    """Returns a module's path without the number of its call or output."""
    return path.partition("#")[0].partition("[")[0]
