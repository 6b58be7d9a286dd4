"""Known causes of differences. Each is tried on the reference in memory; that which removes the difference is named.

What is tried, in this order:

    calls           a dropout that only one side calls; modes that differ
    numbers         attributes of both modules with the same meaning: eps, momentum, rates, strides, align_corners
    order           axes, halves, a direction or a shift of the array that differs
    sums            an array that is added, left out or multiplied by a number
    functions       variants of the functions that the reference calls (`icenet_torch.tools.variants`): GELU, masks,
                    scales, rotary positions, padding, variance, pooling, TF32, eps and theta as numbers in the code
    weights         the order of gates and projections, a bias that is not used
    casts           in half precision, a cast to fp32 that is left out
    modules         another module that only one side calls, or more often: its calls are left out
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.parity import align
from icenet.parity.calls.culprit import first_name
from icenet.parity.calls.events import Event
from icenet.parity.calls.pairing import relative
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.sides import Side
from icenet.parity.trace import Value
from icenet.parity.yardstick import FACTOR, Judgement, judge, rms

if TYPE_CHECKING:
    from icenet.parity.comparison import Comparison

Array = npt.NDArray[Any]

_ACCEPTED = 4 * FACTOR
"""Largest ratio with which a cause explains a difference. The noise is one run of the reference, without samples."""
CORRECTION = 2.0**-24 / (1 - 0.999) / 2
"""Relative error of an update of Adam if its correction by 1 - 0.999 is rounded in fp32, as in MLX."""
_MOST = 400
"""Number of replays that are tried for one difference."""

_MEANING = {
    "variance_epsilon": "eps",
    "epsilon": "eps",
    "layer_norm_eps": "eps",
    "rms_norm_eps": "eps",
    "norm_eps": "eps",
    "dropout_rate": "p",
    "drop_prob": "p",
    "n_heads": "num_heads",
    "n_head": "num_heads",
    "rope_theta": "theta",
    "base": "theta",
    "negative_slope": "slope",
    "_negative_slope": "slope",
    "_alpha": "alpha",
    "layer_norm_epsilon": "eps",
    "softmax_scale": "scale",
    "scaling": "scale",
}
"""Names of attributes that mean the same."""
_SHOWN = {"p": "the rate p of the dropout", "training": "the mode"}


def suggest(comparison: Comparison, pair: Pair, judgements: Mapping[str, Judgement]) -> str:
    """Returns the cause that removes the difference of a call; empty if none does."""
    if cause := _mode(comparison, pair) or _dropout(comparison, pair):
        return cause
    try:
        trial = _Trial(comparison, pair, judgements)
    except (align.ReplayError, KeyError):  # a result that one side lacks
        return ""
    if trial.exact[trial.name].is_float and trial.name in trial.ours:
        searches = (
            *(_mask, _numbers, _order, _angles, _parts, _statistics, _functions, _rotary, _scale, _sums, _weights),
            *(_options, _direction, _casts),
        )
        forward = (*searches, _calls)
        backward = (_numbers, _sums, _functions, _weights, _casts, _scale, _calls)
        for search in forward if trial.is_forward else backward:
            if (
                search in (_statistics, _functions, _rotary, _angles, _weights, _casts)
                and not comparison.computes_reference
            ):
                continue
            try:
                if cause := search(trial):
                    return cause
            except align.ReplayError:  # of a variant
                continue
    return ""


class _Trial:
    """A difference, and what replays of the reference must compute to explain it.

    Args:
        comparison, pair, judgements: See `suggest`.
    """

    def __init__(self, comparison: Comparison, pair: Pair, judgements: Mapping[str, Judgement]) -> None:
        self.c, self.pair = comparison, pair
        failing = [name for name, judgement in judgements.items() if not judgement.passed]
        outputs = [name for name in failing if name.startswith("output")]
        statistics = [name for name in failing if name.startswith("statistic ")]
        first = first_name(pair, judgements)
        self.name = first if first in outputs or not outputs else outputs[0]
        self.is_forward = bool(outputs or statistics)
        if not outputs and statistics:
            self.name = statistics[0]
        self.given = comparison.replay_of(pair, gradients=not self.is_forward)
        self.ours = self._named(comparison.a.replay(self.given))
        self.theirs = self._named(comparison.b_replay(self.given))
        self.exact = self._named(comparison.reference.replay(self.given))
        passing = [n for n in judgements if judgements[n].passed and n in self.exact and n in self.ours]
        kinds = ("output", "statistic") if self.is_forward else ("input", "gradient")
        self.checked = [self.name, *(n for n in passing if n.startswith(kinds) and self.exact[n].is_float)]
        self.before = self.ratio(self.exact)
        self.left = _MOST

    def _named(self, results: Mapping[str, Value]) -> dict[str, Value]:
        return {name.replace("gradient ", "gradient:", 1): value for name, value in results.items()}

    def ratio(self, new: Mapping[str, Value]) -> float:
        """Returns the largest ratio of the error of `a` to the noise, if the reference computes `new`."""
        worst = 0.0
        for name in self.checked:
            if name not in new:
                return math.inf
            exact, found = self.exact[name].array, np.asarray(new[name].array, np.float64)
            if found.shape != exact.shape:
                return math.inf
            noise = np.asarray(self.theirs[name].array, np.float64) - exact
            noise = np.where(np.isfinite(noise), noise, 0.0)  # masked values are -inf
            ours, stored = self.ours[name], self.theirs[name].dtype
            if ours.array.shape != found.shape:
                return math.inf
            stored = self.c.dtype if stored == "fp64" else stored
            worst = max(worst, judge(ours.array, found + noise, found, self.c.dtype, stored=stored).ratio)
            if worst > _ACCEPTED:
                break
        return worst

    def explains(self, new: Mapping[str, Value]) -> bool:
        """Returns whether the difference is gone if the reference computes `new`."""
        found = self.ratio(new)
        return found <= _ACCEPTED and found < self.before / 4

    def explains_array(self, array: Array) -> bool:
        """Returns whether the difference is gone if the reference has this value."""
        if array.shape != self.exact[self.name].array.shape:
            return False
        return self.explains({**self.exact, self.name: Value(array, "fp64")})

    def replay(
        self, weights: Mapping[str, Array] | None = None, values: Sequence[Value] | None = None
    ) -> dict[str, Value]:
        """Returns what the reference computes, which may be changed meanwhile; empty if it fails."""
        self.left -= 1
        if self.left < 0:
            return {}
        try:
            given = replace(self.given, weights=weights, values=self.given.values if values is None else values)
            return self._named(self.c.reference.replay(given))
        except align.ReplayError:
            return {}

    @property
    def modules(self) -> tuple[Any, Any]:
        """The module of `a`, and that of the reference."""
        return self.c.a.modules[self.pair.a.path], self.c.reference.modules[self.pair.path]


# ---- calls and modes ------------------------------------------------------------------------------------------


def _mode(c: Comparison, pair: Pair) -> str:
    """Returns which norm or dropout is in another mode."""
    inner = {child.path for child in pair.children}
    for path, side in ((event.path, event) for event in pair.b.walk()):
        ours = c.a.own_path(path)
        if ours is None or (path in inner and path != pair.path) or side.path not in c.b.modules:
            continue
        flags = c.a.mode(ours), c.b.mode(path)
        if flags[0] != flags[1] and c.b.depends_on_mode_at(path):
            names = ["training" if flag else "evaluation" for flag in flags]
            return f"{path or 'the model'} is in {names[0]} mode in a, in {names[1]} mode in b"
    return ""


def _dropout(c: Comparison, pair: Pair) -> str:
    """Returns which dropout only one side calls, if that is in training mode."""
    if not c.a.train:
        return ""
    for one, other, sides in ((pair.b, pair.a, (c.b, c.a)), (pair.a, pair.b, (c.a, c.b))):
        is_b = one is pair.b
        called = {c.a.names.get(event.path, event.path) if is_b else event.path for event in other.walk()}
        for event in one.walk():
            path = event.path if is_b else c.a.names.get(event.path, event.path)
            rate = sides[0].dropout_rate(event.path)
            if rate and path not in called:
                which = ("a", "b") if is_b else ("b", "a")
                return f"{path} (dropout {rate:g}) is not called in {which[0]}, but in {which[1]}"
    return ""


def _calls(trial: _Trial) -> str:
    """Returns which module within a call only one side calls, or more often, if without it the difference is gone."""
    c, pair = trial.c, trial.pair
    if pair.kind in align.DIFFERENT_CALLS:
        return ""
    left_out = {id(event) for child in pair.children for event in (child.a, child.b)}

    def called(event: Event) -> Iterator[str]:
        for child in event.children:
            yield child.path
            if id(child) not in left_out:
                yield from called(child)

    ours = Counter(called(pair.a))
    theirs = Counter(called(pair.b))
    named = Counter({c.a.names.get(path, f"{path} (of a)"): count for path, count in ours.items()})
    for path, count in theirs.items():
        if count > named[path] and c.computes_reference and trial.explains(_without(trial, c.reference, path)):
            return _extra(relative(path, pair.path), named[path], count)
    for path, count in ours.items():
        name = c.a.names.get(path, f"{path} (of a)")
        if count <= theirs[name]:
            continue
        before, new = trial.ours, _without(trial, c.a, path)
        try:
            trial.ours = {**before, **new}
            if new and trial.explains(trial.exact):
                return _extra(relative(name, pair.path), count, theirs[name])
        finally:
            trial.ours = before
    return ""


def _without(trial: _Trial, side: Side, path: str) -> dict[str, Value]:
    """Returns what a side computes if the calls of a module that only it makes return their input."""

    def handle(path: str, original: Any, args: Any, kwargs: Any) -> Any:
        return next(iter((*args, *kwargs.values())))

    with side.tools.intercepting({path: side.modules[path]}, handle):
        try:
            return trial._named(side.replay(trial.given))
        except (align.ReplayError, StopIteration):
            return {}


def _extra(name: str, ours: int, theirs: int) -> str:
    """Returns which side calls a module more often."""
    if not ours or not theirs:
        return f"{name} is called in {'b' if theirs else 'a'}, but not in {'a' if theirs else 'b'}"
    times = ["once" if count == 1 else f"{count} times" for count in (ours, theirs)]
    return f"{name} is called {times[0]} in a, {times[1]} in b"


# ---- numbers --------------------------------------------------------------------------------------------------


def _numbers(trial: _Trial) -> str:
    """Returns which attribute of the module has another value, if that explains the difference."""
    ours, theirs = trial.modules
    own, other = attributes(ours), attributes(theirs)
    found: list[tuple[str, Any, str]] = []
    for name, (attribute, old) in other.items():
        if name not in own or own[name][1] == old:
            continue
        new = own[name][1]
        if isinstance(old, tuple) and not isinstance(new, tuple):
            new = (new,) * len(old)
        if type(new) is not type(old) and not (isinstance(new, (int, float)) and isinstance(old, (int, float))):
            continue
        text = f"{_SHOWN.get(name, name)} is {_text(own[name][1])} in a, {_text(old)} in b"
        if new == old:
            continue
        found.append((attribute, new, text))
        with _set(theirs, attribute, new):
            if trial.explains(trial.replay()):
                return text
    with contextlib.ExitStack() as stack:
        for attribute, new, _ in found:
            stack.enter_context(_set(theirs, attribute, new))
        if len(found) > 1 and trial.explains(trial.replay()):
            return "; ".join(text for _, _, text in found)
    return ""


def attributes(module: Any) -> dict[str, tuple[str, Any]]:
    """Returns the name and value of each number, flag and tuple of numbers that a module holds, by its meaning."""
    items = {**(dict(module) if isinstance(module, dict) else {}), **vars(module)}
    found = {}
    for name, value in items.items():
        is_number = isinstance(value, (bool, int, float))
        is_tuple = isinstance(value, tuple) and value and all(isinstance(v, int) for v in value)
        if (is_number or is_tuple) and name not in ("training", "_training", "call_super_init", "dump_patches"):
            found[_MEANING.get(name, name)] = name, value
    return found


_NUMBERS = ("eps", "momentum", "slope", "alpha", "beta", "p", "theta", "threshold")
"""Attributes whose difference is said although all values agree."""


def unequal_numbers(c: Comparison) -> list[str]:
    """Returns which numbers of the modules differ, in one line for each number and its values."""
    places: dict[str, list[str]] = {}
    for ours, theirs in c.a.names.items():
        own, other = (attributes(side.modules[path]) for side, path in ((c.a, ours), (c.b, theirs)))
        for found, module in ((own, c.a.modules[ours]), (other, c.b.modules[theirs])):
            if "_p_1" in found:  # what a dropout of MLX keeps
                found["p"] = "p", 1.0 - module._p_1
        for name in _NUMBERS:
            values = [found[name][1] for found in (own, other) if name in found]
            is_number = len(values) == 2 and not any(isinstance(value, (bool, tuple)) for value in values)
            if is_number and not math.isclose(*values, rel_tol=1e-6, abs_tol=1e-15):
                text = f"{_SHOWN.get(name, name)} is {_text(values[0])} in a, {_text(values[1])} in b"
                places.setdefault(text, []).append(theirs or "the model")
    return [
        f"{text}, in {', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''}, although all "
        "values agree: it has no effect beyond rounding on these inputs"
        for text, paths in places.items()
    ]


@contextlib.contextmanager
def _set(module: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(module)[name]
    vars(module)[name] = value
    try:
        yield
    finally:
        vars(module)[name] = before


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mask(trial: _Trial) -> str:
    """Returns whether `a` hands on a mask of 0 and 1 where `b` has 0 and a number that hides a score."""
    ours, exact = (np.asarray(values[trial.name].array, np.float64) for values in (trial.ours, trial.exact))
    if ours.shape != exact.shape or not align.is_mask(exact) or not np.isin(ours, (0.0, 1.0)).all():
        return ""
    for seen, text in ((1.0, "of 0 and 1"), (0.0, "of 1 and 0")):
        if np.array_equal(ours == seen, exact == 0):
            return f"the attention mask {text} is not made 0 and -inf in a: added to the scores it hides nothing"
    return ""


def shape_numbers(c: Comparison, path: str) -> str:
    """Returns which numbers of a layer that determine the shape of its output differ."""
    own = c.a.own_path(path)
    if own is None or path not in c.b.modules:
        return ""
    ours, theirs = attributes(c.a.modules[own]), attributes(c.b.modules[path])
    texts = []
    for name in ("kernel_size", "stride", "padding", "dilation", "output_padding", "scale_factor"):
        if name in ours and name in theirs:
            values = [found[name][1] for found in (ours, theirs)]
            size = max((len(v) for v in values if isinstance(v, tuple)), default=1)
            wide = [v if isinstance(v, tuple) else (v,) * size for v in values]
            if wide[0] != wide[1]:
                texts.append(f"{name} is {_text(values[0])} in a, {_text(values[1])} in b")
    return "; ".join(texts)


# ---- order ----------------------------------------------------------------------------------------------------


def _order(trial: _Trial) -> str:
    """Returns how the elements of the array are ordered otherwise, if that explains the difference."""
    ours, exact = (np.asarray(values[trial.name].array) for values in (trial.ours, trial.exact))
    if ours.ndim < 1 or ours.shape != exact.shape or ours.size < 2:
        return ""
    if found := align.permutation(ours, exact):
        return f"swapped axes: {found.replace('PyTorch', 'b')}"
    for axis in (*range(1, ours.ndim), 0):
        size = ours.shape[axis]
        if size > 1 and trial.explains_array(np.flip(exact, axis)):
            return f"the order along axis {axis} is reversed in a"
        for shift in (1, -1):
            if size > 2 and _is_shifted(trial, ours, exact, axis, shift):
                return f"shifted by one along axis {axis} in a"
        for parts in (2, 3, 4):
            if size % parts == 0 and size > parts:
                blocks = np.split(exact, parts, axis)
                for order in itertools.permutations(range(parts)):
                    reordered = np.concatenate([blocks[i] for i in order], axis)
                    if order != tuple(range(parts)) and trial.explains_array(reordered):
                        return f"the {parts} parts along axis {axis} are in another order in a: {list(order)}"
    for axis in range(1, ours.ndim - 1):
        turned = list(exact.shape)
        turned[axis], turned[axis + 1] = turned[axis + 1], turned[axis]
        if 1 not in turned[axis : axis + 2]:
            for array in (exact.reshape(turned).swapaxes(axis, axis + 1), exact.swapaxes(axis, axis + 1)):
                if trial.explains_array(array.reshape(exact.shape)):
                    return f"swapped axes: axes {axis} and {axis + 1} are reshaped in a, not transposed"
    if ours.ndim == 3:
        batch, length, width = ours.shape
        for heads in range(2, width):
            if width % heads == 0:
                split = exact.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)
                if trial.explains_array(split.reshape(exact.shape)):
                    return "swapped axes: heads and positions are not exchanged before the heads are merged in a"
                back = exact.reshape(batch, heads, length, width // heads).transpose(0, 2, 1, 3)
                if trial.explains_array(back.reshape(exact.shape)):
                    return "swapped axes: heads and positions are exchanged once more in a"
    if ours.ndim == 2:
        for value in trial.given.values:
            shape = value.array.shape
            if len(shape) < 3 or shape[0] != len(ours) or math.prod(shape) != ours.size:
                continue
            if trial.explains_array(align.to_mlx(align.MOVED, exact.reshape(shape)).reshape(exact.shape)):
                return "flattened channels last: write mx.moveaxis(x, -1, 1).flatten(1) in MLX"
    return ""


def _direction(trial: _Trial) -> str:
    """Returns whether a layer runs over its input in the other direction, if that explains the difference."""
    exact = np.asarray(trial.exact[trial.name].array)
    if not trial.pair.is_leaf or exact.ndim < 3 or not trial.is_forward:
        return ""
    for axis in (1, 0):
        values = [
            Value(np.ascontiguousarray(np.flip(v.array, axis)), v.dtype)
            if v.is_float and v.array.shape[:2] == exact.shape[:2]
            else v
            for v in trial.given.values
        ]
        new = trial.replay(values=values).get(trial.name)
        if new is not None and trial.explains_array(np.flip(np.asarray(new.array, np.float64), axis)):
            return f"the sequence is reversed in a: the layer runs over axis {axis} in the other direction"
    return ""


def _is_shifted(trial: _Trial, ours: Array, exact: Array, axis: int, shift: int) -> bool:
    inner = [slice(None)] * ours.ndim
    shifted = np.roll(exact, shift, axis)
    inner[axis] = slice(1, None) if shift > 0 else slice(0, -1)
    new = ours.astype(np.float64).copy()
    new[tuple(inner)] = shifted[tuple(inner)]
    return bool(np.ptp(exact[tuple(inner)], axis=axis).max() > 0) and trial.explains_array(new)


# ---- sums -----------------------------------------------------------------------------------------------------


def _sums(trial: _Trial) -> str:
    """Returns which array is added, left out or multiplied, if that explains the difference."""
    ours, exact = (np.asarray(values[trial.name].array, np.float64) for values in (trial.ours, trial.exact))
    if ours.shape != exact.shape or not np.isfinite(ours).all():
        return ""
    if not ours.any() and exact.any():
        return "it is zero in a" + (
            "" if trial.is_forward else ": stop_gradient, or a value that does not depend on it"
        )
    terms = _terms(trial, exact.shape)
    difference = ours - exact
    for label, array in terms:
        size = float(np.square(array).sum())
        factor = float((difference * array).sum()) / size if size else 0.0
        if not factor or exact.size <= 2 or not trial.explains_array(exact + factor * array):
            continue
        if abs(factor + 1) < 1e-4:
            return f"{label} is not {'added' if trial.is_forward else 'passed on, as by stop_gradient,'} in a"
        if abs(factor - 1) < 1e-4:
            return f"{label} is added once more in a"
        return f"{label} is multiplied by {1 + factor:.6g} in a"
    for (label, array), (other, taken) in itertools.permutations(terms, 2):
        if trial.explains_array(exact + array - taken):
            return f"a adds {label} where b adds {other}"
    for label, array in terms:
        if trial.explains_array(array):
            return f"it is {label} in a"
    return ""


def _scale(trial: _Trial) -> str:
    """Returns by which number the array is multiplied, if that explains the difference."""
    ours, exact = (np.asarray(values[trial.name].array, np.float64) for values in (trial.ours, trial.exact))
    size = float(np.square(exact).sum())
    factor = float((ours * exact).sum()) / size if size and ours.shape == exact.shape else 0.0
    if not factor or exact.size <= 2 or not trial.explains_array(factor * exact):
        return ""
    square = factor * factor
    known = f", the square root of {round(square)}," if square > 1.5 and abs(square - round(square)) < 1e-4 else ""
    return f"it is multiplied by {factor:.6g}{known} in a"


def _parts(trial: _Trial) -> str:
    """Returns what else of a larger array is taken, or which two arrays are exchanged, if that explains it."""
    if not trial.is_forward:
        return ""
    shape = trial.exact[trial.name].array.shape
    places = trial.pair.input_places()
    labels = ["the input" if c is None else f"the output of {relative(c.path, trial.pair.path)}" for c, _ in places]
    floats = [(label, value) for label, value in zip(labels, trial.given.values, strict=True) if value.is_float]
    for label, value in floats:
        array = np.asarray(value.array, np.float64)
        for axis in range(1 if array.ndim == len(shape) + 1 and shape else array.ndim, array.ndim):
            if array.shape[:axis] + array.shape[axis + 1 :] != shape:
                continue
            for index in range(min(array.shape[axis], 64)):
                if trial.explains_array(np.take(array, index, axis)):
                    return f"position {index} of axis {axis} of {label} is taken in a"
            for name in ("mean", "max", "sum", "min"):
                if trial.explains_array(getattr(array, name)(axis=axis)):
                    return f"the {name} over axis {axis} of {label} is taken in a"
    indices = [index for index, value in enumerate(trial.given.values) if value.is_float]
    for i, j in list(itertools.combinations(indices, 2))[:20]:
        if trial.given.values[i].array.shape == trial.given.values[j].array.shape and labels[i] != labels[j]:
            exchanged = list(trial.given.values)
            exchanged[i], exchanged[j] = exchanged[j], exchanged[i]
            if trial.explains(trial.replay(values=exchanged)):
                return f"{labels[i]} and {labels[j]} are exchanged in a"
    return ""


def _options(trial: _Trial) -> str:
    """Returns an option of a layer of MLX that PyTorch does not have."""
    own = attributes(trial.modules[0])
    if trial.pair.kind == "group_norm" and own.get("pytorch_compatible", ("", True))[1] is False:
        return "the groups are of other channels in a: pass pytorch_compatible=True to mlx.nn.GroupNorm"
    return ""


def _terms(trial: _Trial, shape: tuple[int, ...]) -> list[tuple[str, Array]]:
    """Returns the arrays of a shape that a call receives, with what to call them."""
    found: list[tuple[str, Array]] = []
    if trial.is_forward:
        for child in trial.pair.children:
            for name, array in trial.c.reference.own_arrays(child.path).items():
                if shape and array.ndim == 1 and array.shape[0] in (shape[-1], shape[1] if len(shape) > 2 else -1):
                    axes = [1] * len(shape)
                    axes[-1 if array.shape[0] == shape[-1] else 1] = array.shape[0]
                    label = f"{relative(child.path, trial.pair.path)}.{name}"
                    found.append((label, np.broadcast_to(array.reshape(axes), shape)))
        for (source, _), value in zip(trial.pair.input_places(), trial.given.values, strict=True):
            label = "the input" if source is None else f"the output of {relative(source.path, trial.pair.path)}"
            found.append((label, np.asarray(value.array, np.float64)))
    elif trial.given.cotangents is not None:
        for (source, _), value in zip(trial.pair.places(), trial.given.cotangents, strict=True):
            what = "the output" if source is None else f"the input of {relative(source.path, trial.pair.path)}"
            found.append((f"the gradient of {what}", np.asarray(value.array, np.float64)))
    kept: dict[str, Array] = {}
    for label, array in reversed(found):  # an array may be passed on unchanged: then the last call that returns it
        if array.shape == shape and len(kept) < 12:
            kept.setdefault(label, array)
    return list(kept.items())


def _statistics(trial: _Trial) -> str:
    """Returns what differs in the running statistics of a batch norm."""
    if not trial.name.startswith("statistic "):
        return ""
    momentum = getattr(trial.modules[1], "momentum", None)
    if trial.name != "statistic running_var":
        other = attributes(trial.modules[0]).get("momentum", ("", None))[1]
        is_reversed = momentum is not None and other is not None and abs(momentum + other - 1) < 1e-6
        return (
            "the momentum of the running statistics has the other meaning, 1 - momentum, in a" if is_reversed else ""
        )
    if momentum is None or not trial.given.values:
        return ""
    shape = trial.given.values[0].array.shape
    count = math.prod(shape) // shape[1]
    before = trial.c.reference.tools.buffers(trial.modules[1])["running_var"]
    kept = (1 - momentum) * np.asarray(before, np.float64)
    exact = trial.exact[trial.name].array
    for factor, text in ((count - 1) / count, "biased"), (count / (count - 1), "unbiased twice"):
        if count > 1 and trial.explains_array(kept + (exact - kept) * factor):
            return f"the running variance is {text} in a, unbiased in b"
    return ""


# ---- functions ------------------------------------------------------------------------------------------------


def _functions(trial: _Trial) -> str:
    """Returns the variant of the functions of the reference that explains the difference."""
    if trial.c.reference.backend != "torch":
        return ""
    variants = backends.module("torch", "tools.variants")
    with variants.spying() as calls:
        trial.replay()
    counts: dict[str, int] = {}
    for name, _, _ in calls:
        counts[name] = counts.get(name, 0) + 1
    own = [v for _, v in attributes(trial.modules[0]).values() if isinstance(v, float)]
    table = [*variants.TABLE, *variants.number_variants(calls, own)]
    if counts.get("mul"):
        table += variants.theta_variants(_bases(trial))
    accepted: list[tuple[float, int, str]] = []
    for index, variant in enumerate(table):
        total = sum(counts.get(name, 0) for name in variant.names)
        if not total:
            continue
        for only in (None, *(range(total) if 1 < total <= 6 else ())):
            with variants.applied(variant, only):
                new = trial.replay()
            if new and trial.explains(new):
                ratio = trial.ratio(new)
                accepted.append((ratio, index, variant.text))
                break
        if accepted and accepted[-1][0] <= 2:
            break
    if not accepted and trial.is_forward:
        for name in variants.ACTIVATIONS:
            if trial.explains_array(variants.activated(name, trial.exact[trial.name].array)):
                return f"{name} in addition in a"
    if not accepted:
        return ""
    text = min(accepted)[2]
    if "{0}" in text:
        used = [variants.activation_name(n, k, a) for n, a, k in calls if n in variants.ACTIVATION_NAMES]
        text = text.replace("{0}", next(iter(used), "another activation"))
    return text


# ---- rotary positions -----------------------------------------------------------------------------------------


def _bases(trial: _Trial) -> list[float]:
    """Returns the bases of angles that the module of `a` and those within it hold."""
    prefix = f"{trial.pair.a.path}." if trial.pair.a.path else ""
    held = [module for path, module in trial.c.a.modules.items() if f"{path}.".startswith(prefix)]
    found = (attributes(module).get("theta", ("", None))[1] for module in held)
    return [float(value) for value in found if isinstance(value, (int, float)) and value >= 10]


def _angles(trial: _Trial) -> str:
    """Returns the base of a table of angles, cosines or sines, if another one explains the difference."""
    if trial.c.reference.backend != "torch" or not trial.is_forward:
        return ""
    variants = backends.module("torch", "tools.variants")
    exact = np.asarray(trial.exact[trial.name].array, np.float64)
    if exact.ndim < 2 or exact.size > 1 << 20:
        return ""
    for theta in dict.fromkeys((*_bases(trial), *variants.THETA)):
        whole = variants.with_theta(exact, theta)
        if whole is None and exact.ndim > 2:  # cosines and sines next to each other
            parts = [variants.with_theta(part, theta) for part in np.moveaxis(exact, -2, 0)]
            if len(parts) <= 4 and any(part is not None for part in parts):
                olds = [part for part in parts if part is not None]
                if len(olds) < len(parts):  # negative sines
                    negated = [variants.with_theta(-part, theta) for part in np.moveaxis(exact, -2, 0)]
                    pairs = [
                        p if p is not None else (-n[0], n[1]) if n is not None else None
                        for p, n in zip(parts, negated, strict=True)
                    ]
                else:
                    pairs = parts
                if all(pair is not None for pair in pairs):
                    whole = np.stack([pair[0] for pair in pairs if pair is not None], axis=-2), olds[0][1]
        if whole is not None and whole[1] != theta and trial.explains_array(whole[0]):
            return f"theta is {theta:g} in a, {whole[1]:g} in b"
    return ""


def _rotary(trial: _Trial) -> str:
    """Returns whether the rotary positions turn halves of a head on one side, and pairs of neighbours on the other.

    Both are the same up to the order of the values of a head, which queries and keys have in common.
    """
    if not trial.is_forward:
        return ""
    places = trial.pair.input_places()
    floats = [
        index
        for index, ((source, _), value) in enumerate(zip(places, trial.given.values, strict=True))
        if source is not None and value.is_float and value.array.ndim >= 3
    ]
    chosen = [[index] for index in floats if trial.given.values[index].array.shape[-1] % 3 == 0]
    chosen += [list(pair) for pair in itertools.combinations(floats[:4], 2)]
    for indices in chosen:
        widths = [trial.given.values[index].array.shape[-1] for index in indices]
        parts = 3 if len(indices) == 1 else 1
        width = math.gcd(*widths) // parts
        for size in (size for size in range(4, width + 1, 2) if width % size == 0):
            for text, halves in (
                ("pairs (x[..., ::2]) in a, of halves in b", True),
                ("halves in a, of pairs (x[..., ::2]) in b", False),
            ):
                values = list(trial.given.values)
                for index in indices:
                    values[index] = _turned(values[index], size, parts, halves)
                if trial.explains(trial.replay(values=values)):
                    return f"rotary positions of {text}"
    return ""


def _turned(value: Value, size: int, parts: int, halves: bool) -> Value:
    """Returns queries and keys with the values of each head as halves in place of pairs, or the reverse."""
    array = np.asarray(value.array)
    order = np.arange(size).reshape(-1, 2).T if halves else np.arange(size).reshape(2, -1).T
    heads = array.reshape(*array.shape[:-1], -1, size)
    turned = heads[..., order.reshape(-1)]
    if parts == 3:  # the values are not turned
        keys = heads.shape[-2] * 2 // 3
        turned = np.concatenate([turned[..., :keys, :], heads[..., keys:, :]], axis=-2)
    return Value(np.ascontiguousarray(turned.reshape(array.shape)), value.dtype)


# ---- weights --------------------------------------------------------------------------------------------------

_GATES = {
    "LSTM": ("i", "f", "g", "o"),
    "LSTMCell": ("i", "f", "g", "o"),
    "GRU": ("r", "z", "n"),
    "GRUCell": ("r", "z", "n"),
}


def _weights(trial: _Trial) -> str:
    """Returns which parameters of a layer are in another order or not used, if that explains the difference."""
    if trial.c.reference.backend != "torch":
        return ""
    side, pair = trial.c.reference, trial.pair
    weights = side.own_arrays(pair.path)
    names = [name for name in weights if name in side.parameters_within(pair.path)]
    before, pair.parameters = pair.parameters, names
    try:
        kind = type(trial.modules[1]).__name__
        gates = _GATES.get(kind)
        if gates is not None:
            for order in itertools.permutations(range(len(gates))):
                new = {name: _reordered(weights[name], order) for name in names}
                if order != tuple(range(len(gates))) and trial.explains(trial.replay(new)):
                    listed = " ".join(gates[i] for i in order)
                    return f"gate order: the gates of the weights of a are those of b in the order {listed}"
        packed = [name for name in names if name.startswith("in_proj")]
        for order in itertools.permutations(range(3)) if packed else ():
            new = {name: _reordered(weights[name], order) for name in packed}
            if order != (0, 1, 2) and trial.explains(trial.replay(new)):
                listed = " ".join("qkv"[i] for i in order)
                return f"the projections q k v of a are those of b in the order {listed}"
        for name in names:
            for value in (0, 1):
                if trial.explains(trial.replay({name: np.full_like(weights[name], value)})):
                    return f"{name} is not used in a"
            square = weights[name]
            is_square = square.ndim == 2 and square.shape[0] == square.shape[1]
            if is_square and trial.explains(trial.replay({name: np.ascontiguousarray(square.T)})):
                return f"{name} is transposed in a"
    finally:
        pair.parameters = before
    return ""


def _reordered(array: Array, order: Sequence[int]) -> Array:
    blocks = np.split(array, len(order))
    return np.concatenate([blocks[index] for index in order])


# ---- casts ----------------------------------------------------------------------------------------------------


def _casts(trial: _Trial) -> str:
    """Returns whether a cast to fp32 is missing in half precision: then the reference without it is as far off."""
    c = trial.c
    if c.dtype == "fp32" or c.b.backend != "torch":
        return ""
    variants = backends.module("torch", "tools.variants")
    exact = np.asarray(trial.exact[trial.name].array, np.float64)
    ours = np.asarray(trial.ours[trial.name].array, np.float64)
    for variant in variants.casts(c.dtype):
        try:
            with variants.applied(variant):
                found = trial._named(c.b.replay(trial.given))
        except align.ReplayError:
            continue
        if trial.name not in found:
            continue
        uncast = np.asarray(found[trial.name].array, np.float64)
        if uncast.shape == exact.shape and judge(ours, uncast, exact, c.dtype).passed:
            return str(variant.text)
    return ""


# ---- optimizers -----------------------------------------------------------------------------------------------

Change = Callable[[Any, int], None]
"""Changes the options of an optimizer before a step, given its number from 0."""


def suggest_update(
    c: Comparison,
    names: Mapping[str, str],
    sequence: Sequence[Mapping[str, Array]],
    updated: Sequence[Mapping[str, Array]],
    optimizer: Any,
) -> str:
    """Returns the cause that removes the difference of the updates of an optimizer; empty if none does.

    Args:
        c: The comparison.
        names: Path in `a` of each parameter by its path in `b`.
        sequence: The gradients of successive steps, by path in `b`.
        updated: The weights of `a`, of `b` and of the reference after the steps, by path in `b`.
        optimizer: The optimizer of `b` that the user gave.
    """
    if c.reference.backend != "torch" or not c.computes_reference:
        return ""
    ours, theirs, exact = updated
    before = c.reference.weights()

    def ratio(new: Mapping[str, Array]) -> float:
        worst = 0.0
        for name in names:
            if name in ours and name in exact:
                noise = np.asarray(theirs[name], np.float64) - exact[name]
                least = CORRECTION * rms(new[name] - before[name])
                worst = max(worst, judge(ours[name], new[name] + noise, new[name], min_noise=least).ratio)
        return worst

    first = ratio(exact)
    for text, change in itertools.chain(_own_options(c, optimizer), _optimizer_changes()):
        try:
            found = c.reference.updated(optimizer, sequence, change)
        except (KeyError, TypeError, ValueError, AttributeError):  # an option that this optimizer lacks
            continue
        if ratio(found) <= min(_ACCEPTED, first / 4):
            return text
    return ""


_OPTIONS = {
    "learning_rate": ("lr", "the learning rate"),
    "weight_decay": ("weight_decay", "weight decay"),
    "betas": ("betas", "betas"),
    "eps": ("eps", "eps of the optimizer"),
    "momentum": ("momentum", "momentum of the optimizer"),
    "dampening": ("dampening", "dampening"),
    "nesterov": ("nesterov", "Nesterov momentum"),
    "alpha": ("alpha", "alpha"),
}
"""Options of optimizers of MLX, their names in PyTorch, and what to call them."""


def _own_options(c: Comparison, optimizer: Any) -> Iterator[tuple[str, Change]]:
    """Yields the options of the optimizer of `a` that are not those of `b`: each, and all together."""
    given = c.optimizers[0] if c.optimizers else None
    made = c.reference.tools.make_optimizer(c.reference.module, optimizer, c.reference.rate)
    groups = getattr(made, "param_groups", ())
    if given is None or not groups:
        return
    changes: list[tuple[str, str, Any]] = []
    for name, (option, what) in _OPTIONS.items():
        own: Any = getattr(given, name, None)
        own = own.item() if hasattr(own, "item") else tuple(own) if isinstance(own, (list, tuple)) else own
        values = [
            tuple(g[option]) if isinstance(g[option], (list, tuple)) else g[option] for g in groups if option in g
        ]
        if own is None or len(values) != len(groups) or len(set(values)) > 1:
            continue
        pairs = list(zip(*((v if isinstance(v, tuple) else (v,)) for v in (own, values[0])), strict=False))
        if any(not math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-15) for x, y in pairs):
            shown = [list(map(_short, v)) if isinstance(v, tuple) else _short(v) for v in (own, values[0])]
            changes.append((f"{what} is {shown[0]} in a, {shown[1]} in b", option, own))
    if not changes:
        return

    def setting(chosen: Sequence[tuple[str, str, Any]]) -> Change:
        def change(optimizer: Any, step: int) -> None:
            for group in optimizer.param_groups:
                group.update({option: value for _, option, value in chosen})

        return change

    for item in changes:
        yield item[0].replace("betas is", "betas are"), setting([item])
    if len(changes) > 1:
        yield "; ".join(text.replace("betas is", "betas are") for text, _, _ in changes), setting(changes)


def _short(value: Any) -> Any:
    """Returns a number of fp32 with the digits that it has."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _optimizer_changes() -> Iterator[tuple[str, Change]]:
    def setting(name: str, value: Any) -> Change:
        def change(optimizer: Any, step: int) -> None:
            for group in optimizer.param_groups:
                if name not in group:
                    raise KeyError(name)
                group[name] = value(group) if callable(value) else value

        return change

    def uncorrected(optimizer: Any, step: int) -> None:
        for group in optimizer.param_groups:
            if step == 0:
                group["icenet_lr"], group["icenet_eps"] = group["lr"], group["eps"]
            one, two = (1 - beta ** (step + 1) for beta in group["betas"])
            group["lr"], group["eps"] = (
                group["icenet_lr"] * one / math.sqrt(two),
                group["icenet_eps"] / math.sqrt(two),
            )
            if group.get("weight_decay") and group.get("decoupled_weight_decay"):
                if step == 0:
                    group["icenet_decay"] = group["weight_decay"]
                group["weight_decay"] = group["icenet_decay"] * group["icenet_lr"] / group["lr"]

    def decayed(chosen: Callable[[Any], bool], decays: bool) -> Change:
        def change(optimizer: Any, step: int) -> None:
            if step:
                return
            groups = [dict(group) for group in optimizer.param_groups]
            largest = max(group["weight_decay"] for group in groups)
            optimizer.param_groups.clear()
            for group in groups:
                for flag in (True, False):
                    parameters = [p for p in group["params"] if chosen(p) is flag]
                    if parameters:
                        decay = (largest if decays else 0.0) if flag else group["weight_decay"]
                        optimizer.param_groups.append({**group, "params": parameters, "weight_decay": decay})

        return change

    yield "no bias correction in a: pass bias_correction=True", uncorrected
    yield "weight decay on biases and norms in a, not in b", decayed(lambda p: p.ndim < 2, True)
    yield "no weight decay on biases and norms in a", decayed(lambda p: p.ndim < 2, False)
    yield "no weight decay in a", setting("weight_decay", 0.0)
    for decay in (0.01, 0.1, 0.05, 1e-3, 1e-4):
        yield f"weight decay is {decay:g} in a", setting("weight_decay", decay)
    yield "weight decay in the gradient in a, decoupled in b", setting("decoupled_weight_decay", False)
    yield "decoupled weight decay in a, in the gradient in b", setting("decoupled_weight_decay", True)
    for eps in (1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3):
        yield f"eps of the optimizer is {eps:g} in a", setting("eps", eps)
    for betas in ((0.9, 0.999), (0.9, 0.95), (0.9, 0.99), (0.9, 0.98), (0.95, 0.999), (0.5, 0.999)):
        yield f"betas are {list(betas)} in a", setting("betas", betas)
    for momentum in (0.0, 0.9, 0.95, 0.99):
        yield f"momentum of the optimizer is {momentum:g} in a", setting("momentum", momentum)
    yield "Nesterov momentum in a, not in b", setting("nesterov", True)
    yield "no Nesterov momentum in a", setting("nesterov", False)
    yield "dampening as large as the momentum in a", setting("dampening", lambda group: group["momentum"])
    yield "the learning rate is ten times as large in a", setting("lr", lambda group: _base(group) * 10)
    yield "the learning rate is a tenth in a", setting("lr", lambda group: _base(group) / 10)
    yield "AMSGrad in a, not in b", setting("amsgrad", True)
    yield "the other direction: gradients are added in a", setting("maximize", True)


def _base(group: dict[str, Any]) -> float:
    """Returns the learning rate of a group before it was changed."""
    return float(group.setdefault("icenet_lr", group["lr"]))
