"""The proof of a port: it computes what the PyTorch module computes, to rounding.

Reference: the PyTorch module in float64. Noise: the largest difference from it of the module in fp32, and of the
module in float64 whose weights and inputs are moved by one ulp of fp32. The port passes if it is at most FACTOR times
as far away, as everywhere in IceNet (see `icenet.parity.yardstick`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.errors import IceNetError, PortError
from icenet.core.porting.build import Plan
from icenet.core.porting.record import Tensor
from icenet.parity.yardstick import FACTOR

Array = np.ndarray
SAMPLES = 2
ULP = 2.0**-23


@dataclass
class Check:
    """One comparison: the outputs or the gradients of a mode, on inputs of some sizes."""

    mode: str
    sizes: str
    what: str
    ratio: float
    """The largest difference from float64, as a multiple of the noise."""
    difference: float
    """The largest difference, relative to the largest value."""
    name: str
    """The output or the parameter with the largest ratio."""

    @property
    def passed(self) -> bool:
        return self.ratio <= FACTOR


@dataclass
class PortReport:
    """The comparisons of a port, and what could not be compared."""

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    culprit: str = ""
    """The first operation that differs, and the original's line."""
    fixed: dict[str, dict[int, int]] = field(default_factory=dict)
    """The sizes, by dimension, of each input that the original may have at another size and the port may not."""

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        checks = [{**vars(check), "passed": check.passed} for check in self.checks]
        return {
            "passed": self.passed,
            "factor": FACTOR,
            "culprit": self.culprit,
            "checks": checks,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        worst = max(self.checks, key=lambda check: check.ratio, default=None)
        head = "the port computes what the module computes" if self.passed else f"the port differs: {self.culprit}"
        lines = [f"{head} (largest ratio {worst.ratio:.2g} of {FACTOR})" if worst else "nothing was compared"]
        for check in self.checks:
            mark = "ok " if check.passed else "BAD"
            lines.append(
                f"  {mark} {check.mode:<10} {check.what:<9} {check.sizes:<28} ratio {check.ratio:.2g}, "
                f"difference {check.difference:.1e} ({check.name})"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def prove(
    plan: Plan,
    model: Any,
    module: Any,
    program: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    progress: Callable[[str], None] = lambda stage: None,
) -> PortReport:
    """Compares a port with its original: outputs and gradients, in both modes, on inputs of several sizes.

    Args:
        plan: The source of the port and the records of the graph.
        model: The `mlx.nn.Module`.
        module: The `torch.nn.Module`.
        program: The exported program, whose guards say which sizes are possible.
        args, kwargs: The example: numpy arrays and constants.
        progress: Called with the name of each stage.
    """
    run = backends.module("torch", "porting.run")
    report = PortReport()
    examples = [(args, kwargs), *other_sizes(plan, program, args, kwargs, run)]
    random_places = random_operations(plan)
    for mode in ("evaluation", "training"):
        if mode == "training" and plan.train is None:
            report.notes.append("the training mode cannot be exported and was not compared")
            continue
        if mode == "training" and random_places:
            report.notes.append(f"random operations were not compared in training mode: {random_places[0]}")
            continue
        for number, (given, named) in enumerate(examples):
            progress(f"comparing, {mode}")
            try:
                report.checks += _compare(
                    plan, model, module, given, named, mode == "training", number == 0, run, report.notes
                )
            except PortError as error:
                if number == 0:
                    raise
                report.notes.append(f"not compared on {_sizes(given, named)}: {error}")
        if mode == "evaluation" and report.passed:
            progress("comparing, other sizes")
            _try_fixed_sizes(plan, model, module, args, kwargs, run, report)
            if len({check.sizes for check in report.checks}) == 1:
                report.notes.append("compared on the sizes of the example only: the module or the port has no others")
    return report


@contextlib.contextmanager
def _one_error(who: str, args: Any, kwargs: Any, training: bool) -> Iterator[None]:
    """Turns what a call of the original or of the port raises into a PortError."""
    try:
        yield
    except IceNetError:
        raise
    except Exception as error:  # whatever the code of a user raises
        mode = "training" if training else "evaluation"
        raise PortError(f"{who} fails in {mode} mode on {_sizes(args, kwargs)}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Returns the first line of the message of an error, or its kind if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _try_fixed_sizes(
    plan: Plan, model: Any, module: Any, args: Any, kwargs: Any, run: Any, report: PortReport
) -> None:
    """Tries other sizes in the dimensions that the graph has fixed, and compares what both serve.

    Most are fixed by the weights, and the original has no other size either. A dimension at which the original
    returns something and the port fails, or returns another thing, is written to the report.
    """
    tensors = [plan.graph.tensors[ref.name] for ref in plan.graph.inputs]
    same: dict[int, list[tuple[int, int]]] = {}
    for number, tensor in enumerate(tensors):
        for dim, size in enumerate(tensor.shape):
            if isinstance(size, int) and size:
                same.setdefault(size, []).append((number, dim))
    single = run.Reference(module, False)
    for size, places in same.items():
        tries = [places, *([place] for place in places)] if len(places) > 1 else [places]
        for chosen in tries:
            given, named = _with_size((args, kwargs), set(chosen), size + (32 if size % 32 == 0 else 1))
            try:
                single.run(given, named, False)
            except Exception:  # the module does not have this size
                continue
            try:
                checks = _compare(plan, model, module, given, named, False, False, run, report.notes)
                served = all(check.passed for check in checks)
            except PortError:
                served = False
            if served:
                report.checks += checks
            else:
                for number, dim in chosen:
                    report.fixed.setdefault(plan.graph.inputs[number].name, {})[dim] = size
            if len(chosen) > 1:
                break
    for name, sizes in report.fixed.items():
        text = ", ".join(f"{size} in dimension {dim}" for dim, size in sorted(sizes.items()))
        report.notes.append(f"{name} has a fixed size, {text}; the port does not serve another one")


def _with_size(tree: Any, places: set[tuple[int, int]], size: int) -> Any:
    """Returns random inputs with another size at some dimensions, given as (number of the input, dimension)."""
    rng, numbers = np.random.default_rng(1), itertools.count()

    def of(item: Any) -> Any:
        if isinstance(item, np.ndarray):
            number = next(numbers)
            shape = tuple(size if (number, dim) in places else old for dim, old in enumerate(item.shape))
            return item if shape == item.shape else drawn_like(item, shape, rng)
        if isinstance(item, dict):
            return {key: of(value) for key, value in item.items()}
        if isinstance(item, (list, tuple)):
            return type(item)(of(value) for value in item)
        return item

    return of(tree)


def _compare(
    plan: Plan,
    model: Any,
    module: Any,
    args: Any,
    kwargs: Any,
    training: bool,
    with_gradients: bool,
    run: Any,
    notes: list[str],
) -> list[Check]:
    load = backends.module("mlx", "porting.load")
    rng = np.random.default_rng(0)
    exact, single = run.Reference(module, True), run.Reference(module, False)
    cotangents: list[Array] | None = None
    with run.without_dropout(), _one_error("the original", args, kwargs, training):
        wanted, _ = exact.run(args, kwargs, training)
        if with_gradients:
            cotangents = [
                rng.standard_normal(item.shape).astype(np.float32) for item in wanted if item.dtype.kind == "f"
            ]
        wanted_gradients: dict[str, Array] = {}
        if cotangents:
            try:
                wanted, wanted_gradients = exact.run(args, kwargs, training, cotangents)
            except (RuntimeError, NotImplementedError) as error:  # of an operation without a gradient
                mode = "training" if training else "evaluation"
                notes.append(f"no gradients were compared in {mode} mode, the original raises: {first_line(error)}")
                cotangents = None
        noise, noise_gradients = single.run(args, kwargs, training, cotangents)
        noises, gradient_noises = [noise], [noise_gradients]
        for sample in range(SAMPLES):
            moved = exact.perturbed(sample)
            given, named = run.perturbed((args, kwargs), sample)
            moved_outputs, moved_gradients = moved.run(given, named, training, cotangents)
            noises.append(moved_outputs)
            gradient_noises.append(moved_gradients)
    flat = arrays_of((args, kwargs))
    ours_gradients = {}
    with _one_error("the port", args, kwargs, training):
        with load.mode(model, training):
            ours = load.flat(load.call(model, flat, plan.arguments))
        if cotangents:
            with load.mode(model, training):  # with the buffers as they were before the first call
                ours_gradients = load.gradients(model, flat, cotangents, plan.arguments)
    if len(ours) != len(wanted):
        raise PortError(f"the port returns {len(ours)} arrays, the module {len(wanted)}")
    sizes, mode = _sizes(args, kwargs), "training" if training else "evaluation"
    rows = [
        (f"output {index}", *_ratio(a, b, [sample[index] for sample in noises]))
        for index, (a, b) in enumerate(zip(ours, wanted, strict=True))
    ]
    checks = [Check(mode, sizes, "outputs", *_worst(rows))]
    if cotangents:
        native = {name: path for path, name in plan.wanted().items()}
        rows = []
        scale = max((float(np.abs(value).max()) for value in wanted_gradients.values() if value.size), default=0.0)
        for name, gradient in ours_gradients.items():
            path = name if name.startswith("input ") else native.get(name)
            if path is None:
                continue
            expected = wanted_gradients.get(path)
            gradient = plan.to_torch(path, gradient)
            if expected is None:
                expected = np.zeros(gradient.shape)
            samples = [sample.get(path, np.zeros(expected.shape)) for sample in gradient_noises]
            rows.append((path, *_ratio(gradient, expected, samples, scale)))
        if rows:
            checks.append(Check(mode, sizes, "gradients", *_worst(rows)))
    return checks


def _worst(rows: Sequence[tuple[str, float, float]]) -> tuple[float, float, str]:
    if not rows:
        return 0.0, 0.0, "no output"
    name, ratio, difference = max(rows, key=lambda row: row[1])
    return ratio, difference, name


def _ratio(ours: Array, wanted: Array, samples: list[Array], scale: float = 0.0) -> tuple[float, float]:
    """Returns the distance from the reference as a multiple of the noise, and relative to the largest value."""
    if ours.shape != wanted.shape:
        return float("inf"), float("inf")
    if wanted.size == 0:
        return 0.0, 0.0
    if wanted.dtype.kind not in "fc":
        same = bool((ours == wanted).all())
        return (0.0, 0.0) if same else (float("inf"), float("inf"))
    finite = np.isfinite(wanted)
    if not (np.isfinite(ours) == finite).all():
        return float("inf"), float("inf")
    if not (np.where(finite, 0, ours) == np.where(finite, 0, wanted)).all() and not np.isnan(wanted).any():
        return float("inf"), float("inf")
    a, b = np.where(finite, ours, 0), np.where(finite, wanted, 0)
    largest = max(float(np.abs(b).max()), 1e-30)
    noise = max(float(np.abs(np.where(finite, sample, 0) - b).max()) for sample in samples)
    # The terms of a gradient that is zero cancel; what is left of them in fp32 may be exactly zero in one order.
    is_zero = largest <= 1e-12 * scale
    floor = max(4 * ULP * max(largest, 1e-4 * scale), ULP * scale if is_zero else 0)
    error = float(np.abs(a - b).max())
    return error / max(noise, floor), error / largest


def arrays_of(tree: Any) -> list[Array]:
    """Returns the arrays of arguments in order."""
    if isinstance(tree, np.ndarray):
        return [tree]
    if isinstance(tree, dict):
        return [item for inner in tree.values() for item in arrays_of(inner)]
    if isinstance(tree, (list, tuple)):
        return [item for inner in tree for item in arrays_of(inner)]
    return []


def _sizes(args: Any, kwargs: Any) -> str:
    return " ".join("x".join(map(str, item.shape)) for item in arrays_of((args, kwargs)))


def other_sizes(plan: Plan, program: Any, args: Any, kwargs: Any, run: Any) -> list[tuple[Any, Any]]:
    """Returns random inputs of other sizes, as far as the graph is open."""
    tensors = [plan.graph.tensors[ref.name] for ref in plan.graph.inputs]
    flat = arrays_of((args, kwargs))
    symbols: dict[str, int] = {}
    for tensor, array in zip(tensors, flat, strict=True):
        for size, number in zip(tensor.shape, array.shape, strict=True):
            if isinstance(size, str) and size.isidentifier():
                symbols.setdefault(size, number)
    if not symbols:
        return []
    found = []
    first = next(iter(symbols))
    ways: list[Callable[[str, int], int]] = [
        lambda name, size: size + 1 if name == first else size + (32 if size % 32 == 0 else 2),
        lambda name, size: size + (1 if size == symbols[first] else 32 if size % 32 == 0 else 2),  # equal ones alike
        lambda name, size: size + 1 if name == first else size,
        lambda name, size: size + 1 if size == symbols[first] else size,
    ]
    for way in ways:
        chosen = {name: way(name, size) for name, size in symbols.items()}
        new = _resized((args, kwargs), iter(tensors), chosen)
        if new is not None and run.accepts(program, *new):
            found.append(new)
            break
    return found


def _resized(tree: Any, tensors: Any, chosen: dict[str, int]) -> Any:
    rng = np.random.default_rng(1)

    def of(item: Any) -> Any:
        if isinstance(item, np.ndarray):
            tensor: Tensor = next(tensors)
            shape = tuple(
                eval(size, {"__builtins__": {}}, dict(chosen))
                if isinstance(size, str) and set(_names(size)) <= set(chosen)
                else number
                for size, number in zip(tensor.shape, item.shape, strict=True)
            )
            return drawn_like(item, shape, rng)
        if isinstance(item, dict):
            return {key: of(value) for key, value in item.items()}
        if isinstance(item, (list, tuple)):
            return type(item)(of(value) for value in item)
        return item

    return of(tree)


def _names(expression: str) -> list[str]:
    import re

    return re.findall(r"[A-Za-z_]\w*", expression)


def drawn_like(item: Array, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Returns random values of a shape, in the range of an example."""
    if item.dtype.kind == "f" or item.dtype.name == "bfloat16":
        values = item.astype(np.float64)
        deviation = float(values.std()) if values.size > 1 else 1.0
        return (rng.standard_normal(shape) * (deviation or 1.0) + float(values.mean() if values.size else 0)).astype(
            item.dtype
        )
    if item.dtype.kind == "b":
        return rng.permutation(np.resize(item.ravel(), int(np.prod(shape)))).reshape(shape)
    if item.size == 0:
        return np.zeros(shape, item.dtype)
    if item.size > 1 and (np.diff(item.reshape(-1)) == 1).all():
        return np.arange(int(np.prod(shape)), dtype=item.dtype).reshape(shape) + item.reshape(-1)[0]
    flat = item.reshape(-1)
    if item.size > 1 and item.ndim == 1 and (np.diff(flat) >= 0).all():  # offsets, for example
        return np.sort(np.resize(flat, shape))
    return rng.choice(flat, shape)  # values of the example: others may have no meaning, such as labels below zero


_KEYED = {"dropout", "native_dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_RANDOM = {
    *("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "bernoulli", "normal"),
    *("uniform", "exponential", "multinomial", "rrelu", "rrelu_with_noise"),
}


def random_operations(plan: Plan) -> list[str]:
    """Returns the places of random operations other than dropout, which is switched off on both sides."""
    found = []
    for graph in (plan.graph, plan.train):
        for node in graph.nodes if graph is not None else ():
            name = node.base.rstrip("_")
            if name in _RANDOM or (
                name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
                and graph is plan.train
                and node.args["dropout"]
                and node.args["num_layers"] > 1
            ):
                found.append(str(node.place or node.name))
    return found


def locate(plan: Plan, program: Any, module: Any, args: Any, kwargs: Any, report: PortReport) -> str:
    """Returns the first operation whose value differs, with the original's line.

    The operations of the evaluation mode are compared, on the example. If none differs, what the report found is
    returned: an output or gradient, and its mode and sizes.
    """
    bad = [check for check in report.checks if not check.passed]
    worst = max(bad, key=lambda check: check.ratio)
    found_by_report = (
        f"{'output' if worst.what == 'outputs' else 'gradient of'} {worst.name.removeprefix('output ')} in "
        f"{worst.mode} mode on {worst.sizes}, {worst.ratio:.2g} times the noise of rounding"
    )
    if not any(check.mode == "evaluation" and check.what == "outputs" for check in bad):
        return found_by_report
    from icenet.core.porting.build import plan as make_plan

    run, load = backends.module("torch", "porting.run"), backends.module("mlx", "porting.load")
    traced = make_plan(plan.graph, None, False, "trace", trace=True)
    values = run.intermediate(program, args, kwargs)
    weights = run.weights(module, program)
    flat = arrays_of((args, kwargs))
    found = load.trace(traced.source, traced.class_name, traced.native(weights), flat, traced.arguments)
    places = {node.name: node for node in plan.graph.nodes}
    for name, value in found.items():
        order = traced.orders.get(name)
        if order is not None:
            value = value.transpose(np.argsort(order))
        wanted = values.get(name)
        node = places.get(name)
        if wanted is None or node is None or node.mutates:
            continue
        if value.shape != wanted.shape:
            return f"aten.{node.op} at {node.place}: shape {list(value.shape)} instead of {list(wanted.shape)}"
        if wanted.size and wanted.dtype.kind in "fc":
            error = np.abs(value - wanted)[np.isfinite(wanted)]
            if error.size and float(error.max()) > 1e-3 * max(float(np.abs(wanted[np.isfinite(wanted)]).max()), 1e-6):
                return f"aten.{node.op} at {node.place}"
        elif wanted.size and not (value == wanted).all():
            return f"aten.{node.op} at {node.place}"
    return found_by_report
