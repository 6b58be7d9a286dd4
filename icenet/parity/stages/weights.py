"""The stage `weights`: parameters and buffers, after conversion to the same axes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core.errors import WeightsError
from icenet.core.messages import option
from icenet.core.models import modules
from icenet.parity import align
from icenet.parity.measures import half_ulp, rms, round_to, sum_of_products
from icenet.parity.results import status as states
from icenet.parity.results.result import Histogram, Row, Stage
from icenet.parity.results.rows import histogram, split_at
from icenet.parity.stages import StageFailed
from icenet.parity.state import Comparison

Array = npt.NDArray[Any]

_ROUNDED = 1e-6
"""Largest relative difference of a buffer that both sides compute, such as a table of angles."""


def copy_weights(c: Comparison, stage: Stage) -> None:
    """Gives a copy of `a` the weights of `b`, if the user wants it or its own have nothing in common with them.

    Raises:
        StageFailed: A layer whose weights are converted has others in `a`. The stage is failed.
    """
    copies = c.options["copy_weights"]
    if copies is None and _were_never_copied(c):
        copies, c.report.copied_weights = True, True
    if copies and c.different and (c.a.backend, c.b.backend) == ("mlx", "torch"):
        back = {theirs: ours for ours, theirs in c.a.names.items()}
        c.a.unshare()
        for path in c.different:
            theirs = c.b.modules[path]
            if not c.computes_reference:  # a trace has the arrays alone
                held = c.b.weights()
                start = f"{path}." if path else ""
                theirs = {name[len(start) :]: held[name] for name in held if name.startswith(start)}
            try:
                modules.from_torch(theirs, c.a.modules[back[path]])
            except WeightsError as error:
                note = str(error).partition("; ")[2]
                stage.rows.append(Row(path, "", status=states.DIFFERS, ratio=math.inf, note=note))
                c.fail(stage, path, note=note)
        if stage.status == states.FAILED:
            raise StageFailed
    if copies:
        values = c.b.weights()
        c.a.assign({ours: values[theirs] for ours, theirs in c.parameter_names.items()})
        c.report.notes.append(
            "the weights were not equal: those of b were used in a copy of a; icenet.from_torch copies them, "
            "copy_weights=False (icenet parity --keep-weights) compares with those that a has"
            if c.report.copied_weights
            else "the weights of b are copied into a"
        )


def _were_never_copied(c: Comparison) -> bool:
    """Returns whether most weights with random initial values are unrelated on both sides."""
    ours, theirs = c.a.weights(), c.b.weights()
    pairs = [(ours[own], theirs[other]) for own, other in c.parameter_names.items()]
    pairs += [(own, other) for _, _, own, other, _ in _converted_weights(c)]
    c.weights_are_equal = all(np.array_equal(x, y) for x, y in pairs)
    if c.weights_are_equal:  # the usual case, without the cost of the others
        return False
    pairs = [(x, y) for x, y in pairs if x.size > 1 and _varies(y)]
    related = [_are_related(x, y) for x, y in pairs if _varies(x)]
    if not related:  # all arrays of `a` hold one number each, as those that are made by mx.zeros
        return bool(pairs)
    return 2 * sum(related) < len(related)


def compare_weights(c: Comparison, stage: Stage) -> None:
    """Compares all parameters and buffers; those that a side computes by a formula may be off by rounding."""
    theirs = c.b.weights()
    ours = {own: theirs[name] for own, name in c.parameter_names.items()} if c.weights_are_equal else c.a.weights()
    pairs: list[_Converted] = [
        (*split_at(other, c.b.modules), ours[name], theirs[other], None) for name, other in c.parameter_names.items()
    ]
    cause = ""
    for path, part, own, reference, rounding in [*pairs, *_converted_weights(c)]:
        other = f"{path}.{part}" if path else part
        status, note, ratio, error = states.PASSED, "", 0.0, 0.0
        bins: Histogram | None = None
        if own is not reference and not np.array_equal(own, reference, equal_nan=True):
            x, y = np.asarray(own, np.float64), np.asarray(reference, np.float64)
            error = rms(x - y)
            distance = error / (rms(y) or 1.0)
            is_buffer = other not in c.b.trainable_names
            is_rounded = rounding is not None and x.shape == y.shape and bool((np.abs(x - y) <= rounding).all())
            if is_rounded or (is_buffer and distance <= _ROUNDED):
                status, note = states.LESS_EXACT, "equal but for rounding"
            else:
                if moved := align.permutation(x, y):
                    how = "is " + moved.replace("PyTorch's", "that of b")
                else:
                    known = _halves(x, y) or _how(c, x, y)
                    how = f"differs {known or f'by {states.number(distance)} of its size'}"
                    moved = known
                status, note, ratio = states.DIFFERS, f"{part} {how}", math.inf
                cause = cause or (f"{part} of a {how}" if moved else "")
                bins = histogram(x, y)
        shape, scale = reference.shape, rms(reference)
        stage.rows.append(Row(path, part, shape, status, ratio, error, 0.0, scale, note=note, histogram=bins))
    bad = [row for row in stage.rows if not row.passed]
    if bad:
        note = bad[0].note
        c.report.cause = cause
        if c.options["copy_weights"] is False and _were_never_copied(c):
            count = f"{len(bad)} of {len(stage.rows)} arrays differ"
            note = f"{count}: copy them first, with icenet.from_torch, or pass {option('copy_weights=True')}"
            c.report.cause = f"the weights were never copied: {note}"
        c.fail(stage, bad[0].path, note=note)


_Converted = tuple[str, str, Array, Array, "Array | None"]


def _converted_weights(c: Comparison) -> list[_Converted]:
    """Returns the arrays of layers whose parameters differ between the frameworks.

    Each with its path and name, of `a`, of `b`, and how far they may be apart, or None. The arrays of `a` are
    converted to PyTorch's. Biases that are added are compared as their sum, of which `a` has rounded the result and
    in half precision `b` both parts.
    """
    found: list[_Converted] = []
    module = getattr(c.b, "module", None)
    if (c.a.backend, c.b.backend) != ("mlx", "torch") or module is None:
        return []
    back = {theirs: ours for ours, theirs in c.a.names.items()}
    for path in sorted(c.different):
        if any(path.startswith(f"{other}.") for other in c.different):
            continue
        layers = c.a.modules[back[path]], c.b.modules[path]
        pairing = modules.pair(*layers)
        if pairing.problems:
            c.add_notes([f"{path}: its weights are not compared: {pairing.problems[0]}"])
            continue
        own, reference = pairing.to_torch(modules.get_weights(layers[0])), modules.get_weights(layers[1])
        for name, array in reference.items():
            summed = name.replace("bias_hh", "bias_ih")
            if name not in own or (summed != name and summed in own):
                continue
            ours, theirs = own[name], array
            rounding: Array | None = None
            if (other := name.replace("bias_ih", "bias_hh")) != name and other in own:
                parts = [np.asarray(v, np.float64) for v in (ours, own[other], theirs, reference[other])]
                ours, theirs = parts[0] + parts[1], parts[2] + parts[3]
                rounding = np.sum([half_ulp(v, c.dtype) for v in (*parts[2:], ours, theirs)], axis=0)
            found.append((path, name, ours, theirs, rounding))
    return found


def _varies(array: Array) -> bool:
    """Returns whether an array has several values; those that layers begin with are often all 0 or all 1."""
    flat = array.reshape(-1)
    return bool((flat != flat[0]).any())


def _are_related(x: Array, y: Array) -> bool:
    """Returns whether two arrays of weights are equal, near to each other, or the same values in another order."""
    if np.array_equal(x, y, equal_nan=True):
        return True
    flat = [np.asarray(v, np.float64).reshape(-1) for v in (x, y)]
    if not all(np.isfinite(v).all() for v in flat):
        return True
    if np.array_equal(np.sort(flat[0]), np.sort(flat[1])) or (flat[0] == flat[1]).mean() > 0.1:
        return True
    centred = [v - v.mean() for v in flat]
    sizes = [rms(v) for v in centred]
    correlation = abs(sum_of_products(*centred)) / (x.size * sizes[0] * sizes[1] or 1.0)
    # independent values have a correlation of about 1 / sqrt(size)
    return correlation > max(0.5, min(0.99, 4 / math.sqrt(x.size)))


def _how(c: Comparison, x: Array, y: Array) -> str:
    """Returns how an array of `a` is made from that of `b`; empty if it is not known."""
    if x.shape != y.shape:
        return ""
    for axis in range(y.ndim):
        if y.shape[axis] > 1 and np.array_equal(x, np.flip(y, axis)):
            return f"only in the order along axis {axis}, which is reversed"
    for dtype in ("bf16", "fp16"):
        if np.array_equal(x, round_to(y, dtype)):
            return f"only by rounding: it has the precision of {dtype} in a"
    if y.size > 2 and (size := sum_of_products(y.reshape(-1), y.reshape(-1))):
        factor = sum_of_products(x.reshape(-1), y.reshape(-1)) / size
        if factor and bool((np.abs(x - factor * y) <= 2 * half_ulp(x, c.dtype)).all()):
            return f"by a factor: it is multiplied by {factor:.7g} in a"
    if y.size > 2:
        for name, other in c.b.weights().items():
            if other.shape == x.shape and np.array_equal(x, other):
                return f"and is that of {name} in b"
    return ""


def _halves(x: Array, y: Array) -> str:
    """Returns how the rows of one array are those of the other in another order; empty if they are not."""
    for parts in (2, 3, 4):
        if x.ndim and x.shape == y.shape and x.shape[0] % parts == 0 and x.shape[0] > parts:
            blocks = [np.array_equal(p, q) for p, q in zip(np.split(x, parts), np.split(y, parts), strict=True)]
            ours = sorted(p.tobytes() for p in np.split(x, parts))
            if not all(blocks) and ours == sorted(q.tobytes() for q in np.split(y, parts)):
                return f"only in the order of its {parts} blocks of rows, as of gates or of projections q k v"
    return ""
