"""The proof of a port: it computes what the PyTorch module computes, to rounding.

Outputs, gradients and the buffers after the call are judged by the criterion of all comparisons in IceNet
(`icenet.parity.yardstick`): the reference is the module in float64, the noise is the module in fp32, and a value over
the tolerance is judged again in nearby problems, in which a wrong computation is wrong each time. So are integers.
The results of operations that jump are equal on equal inputs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.errors import IceNetError, PortError
from icenet.core.porting.build import Plan
from icenet.parity.nearby import Perturbation
from icenet.parity.ports import places as proof_places
from icenet.parity.ports.inputs import Arguments, arrays_of, other_sizes, sizes_text, with_arrays, with_sizes
from icenet.parity.ports.limits import MOST, Guard, find_limits
from icenet.parity.ports.remainders import with_remainders
from icenet.parity.ports.report import Check, PortReport, limit_text, settle
from icenet.parity.resampling import FEW, Samples, judge_values
from icenet.parity.trace import Value, short_dtype

Array = np.ndarray


class _OriginalFails(PortError):
    """The original raises an error on some inputs."""


def prove(
    plan: Plan,
    model: Any,
    module: Any,
    program: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    progress: Callable[[str], None] = lambda stage: None,
    accelerated: Any = None,
) -> PortReport:
    """Compares a port with its original, in both modes, on inputs of several sizes.

    On the example, outputs, gradients and buffers are compared; on the others, outputs. The port as IceNet runs it,
    with its own operations in some layers, is compared on the example, too.

    Args:
        plan: The source of the port and the records of the graph.
        model: The `mlx.nn.Module`.
        module: The `torch.nn.Module`.
        program: The exported program, whose guards say which sizes are possible.
        args, kwargs: The example: numpy arrays and constants.
        progress: Called with the name of each stage.
        accelerated: The port with IceNet's operations; None if it has no layer with them.
    """
    run = backends.module("torch", "porting.run")
    report = PortReport()
    example = args, kwargs
    exact, single = run.Reference(module, True), run.Reference(module, False)

    def accepts(given: Arguments) -> bool:
        if any(array.shape[:1] == (1,) for array in arrays_of(given)):  # an export has no batch of 1
            return _runs(single, given)
        accepted: bool = run.accepts(program, *given)
        return accepted

    others = other_sizes(plan, example, accepts)
    ones: list[Guard] = []
    random_places = proof_places.random_operations(plan)
    for training in (False, True):
        mode = _mode(training)
        if training and plan.train is None:
            report.notes.append("the training mode cannot be exported and was not compared")
            continue
        if training and random_places:
            report.notes.append(f"random operations were not compared in training mode: {random_places[0]}")
            continue
        for given in (example, *others[:1]) if training else (example, *others):
            progress(f"comparing, {mode}")
            try:
                pair = _Pair(plan, model, exact, single, given, training)
                if of_one := _places_of_one(example, given):
                    agreed = _agreed(pair)
                    report.checks += agreed
                    if not agreed:
                        ones.append(Guard("size >= 2", {"size": of_one}))  # an export takes no size for 1
                    continue
                report.checks += pair.checks(given is example, report.notes)
                report.is_empty |= pair.is_empty
                if given is example and accelerated is not None:
                    report.checks += pair.checks_of(accelerated, "icenet")
                    settle(report)
            except _OriginalFails as error:
                if given is example and not training:
                    raise
                report.notes.append(f"not compared: {error}")
        if not training and report.passed:
            progress("comparing, other sizes")
            guards = [*ones, *(Guard(*guard) for guard in run.guards(program))]
            _try_limits(plan, model, exact, single, example, report, guards)
            _try_fixed_sizes(plan, model, exact, single, example, report)
            if len({check.sizes for check in report.checks}) == 1:
                report.notes.append("compared on the sizes of the example only: the module or the port has no others")
            if place := proof_places.jump_that_differs(plan, program, module, example):
                report.checks.append(Check(mode, sizes_text(example), "jumps", np.inf, np.inf, place, "not equal"))
    return report


def _places_of_one(example: Arguments, given: Arguments) -> tuple[tuple[int, int], ...]:
    """Returns the places, as (number of the input, dimension), at which some inputs have a size of 1."""
    shapes = [(old.shape, new.shape) for old, new in zip(arrays_of(example), arrays_of(given), strict=True)]
    return tuple(
        (number, dim)
        for number, (old, new) in enumerate(shapes)
        for dim in range(len(new))
        if new[dim] == 1 < old[dim]
    )


def _agreed(pair: _Pair) -> list[Check]:
    """Returns the comparison at another size; none if the port fails or differs.

    Gradients are compared if they may depend on a size alone, as in `(x - x * scale).detach() + x * scale`.
    """
    try:
        checks = pair.checks(any(node.base == "detach" for node in pair.plan.graph.nodes), [])
    except PortError:
        return []
    return checks if all(check.passed for check in checks) else []


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _runs(single: Any, given: Arguments) -> bool:
    """Returns whether the original takes some arguments."""
    try:
        single.run(*given, False)
    except Exception:  # whatever the code of a user raises
        return False
    return True


@contextlib.contextmanager
def _one_error(kind: type[PortError], given: Arguments, training: bool) -> Iterator[None]:
    """Turns what a call of the original or of the port raises into a PortError."""
    try:
        yield
    except IceNetError:
        raise
    except Exception as error:  # whatever the code of a user raises
        who, where = "the port", ""
        if kind is _OriginalFails:
            who, where = "the original", backends.module("torch", "porting.failures").where(error)
        text = f"{who} fails in {_mode(training)} mode on {sizes_text(given)}: {where}{first_line(error)}"
        raise kind(text) from error


def first_line(error: Exception) -> str:
    """Returns the first line of the message of an error, or its kind if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


_LARGEST = 2**20
"""Elements of inputs that are tried only because a module may take some sizes alone."""


def _try_fixed_sizes(plan: Plan, model: Any, exact: Any, single: Any, example: Arguments, report: PortReport) -> None:
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
    for size, places in same.items():
        tries = [places, *([place] for place in places)] if len(places) > 1 else [places]
        for chosen in tries:
            near = with_sizes(example, dict.fromkeys(chosen, size + (32 if size % 32 == 0 else 1)))
            far = with_sizes(example, dict.fromkeys(chosen, 4 * size))  # of which an integer can be the square root
            tries_of = (near, far) if sum(array.size for array in arrays_of(far)) <= _LARGEST else (near,)
            given = next((item for item in tries_of if _runs(single, item)), None)
            if given is None:  # the module does not have this size
                continue
            if agreed := _agreed(_Pair(plan, model, exact, single, given, False)):
                report.checks += agreed
                continue  # all at once; each alone may differ, as a source may read the width from the height
            for number, dim in chosen:
                report.fixed.setdefault(plan.graph.inputs[number].name, {})[dim] = size
            if len(chosen) > 1:
                break
    for name, sizes in report.fixed.items():
        text = ", ".join(f"{size} in dimension {dim}" for dim, size in sorted(sizes.items()))
        report.notes.append(f"{name} has a fixed size, {text}; the port does not serve another one")


def _try_limits(
    plan: Plan,
    model: Any,
    exact: Any,
    single: Any,
    example: Arguments,
    report: PortReport,
    guards: list[Guard],
) -> None:
    """Tries sizes that violate the guards of the graph; those at which the port differs are in the report."""

    def serves(given: Arguments) -> bool:
        return bool(_agreed(_Pair(plan, model, exact, single, given, False)))

    names = [ref.name for ref in plan.graph.inputs]
    found = find_limits(example, guards, functools.partial(_runs, single), serves)
    if found.untried:
        report.notes.append(
            f"{found.untried} conditions of the export on sizes were not tried, since {MOST} inputs were; "
            "compare other sizes with the module before use"
        )
    found = with_remainders(found, [array.shape for array in arrays_of(example)])
    for (number, dim), (low, high) in sorted(found.ranges.items()):
        if low is not None and low == high:
            report.fixed.setdefault(names[number], {})[dim] = low
        else:
            report.limits.setdefault(names[number], {})[dim] = [low, high]
    report.guards = found.guards
    texts = [
        f"{name} has {', '.join(f'{limit_text(*limit)} in dimension {dim}' for dim, limit in sorted(sizes.items()))}"
        for name, sizes in report.limits.items()
    ]
    texts += [guard.texts(lambda place: f"{names[place[0]]}.shape[{place[1]}]")[0] for guard in found.guards]
    report.notes += [f"{text}; beyond, the port computes something else than the module" for text in texts]


class _Pair:
    """The original and its port in one mode, on some inputs.

    Args:
        plan, model: The port.
        exact, single: The original in float64 and in fp32 (`icenet_torch.porting.run.Reference`).
        given: The inputs.
        training: The mode.
    """

    def __init__(self, plan: Plan, model: Any, exact: Any, single: Any, given: Arguments, training: bool) -> None:
        self.plan, self.model, self.exact, self.single = plan, model, exact, single
        self.inputs, self.training = [_single(array) for array in arrays_of(given)], training
        self.is_empty = False
        self.given: Arguments = with_arrays(given, self.inputs)
        self.native = {name: path for path, name in plan.wanted().items()}
        self.cotangents: list[Array] | None = None

    def checks(self, with_gradients: bool, notes: list[str]) -> list[Check]:
        """Returns the comparison of the outputs, and with gradients of the gradients and the buffers."""
        self.with_gradients = with_gradients
        with _one_error(_OriginalFails, self.given, self.training):
            self.reference = self._reference(with_gradients, notes)
            self.noise = self._original(self.single, self.inputs, self.cotangents)
        if with_gradients and not self.training:
            outputs = [value.array for name, value in self.reference.items() if name.startswith("output")]
            self.is_empty = bool(outputs) and not any(np.isfinite(array).any() for array in outputs)
            if self.is_empty:
                notes.append(
                    "the outputs of the example have no finite value, so none was compared; give another one"
                )
        return self.checks_of(self.model, "mlx")

    def checks_of(self, model: Any, layers: str) -> list[Check]:
        """Returns the comparison of a model that computes with the layers of MLX or of IceNet."""
        self.model = model
        reference, noise, with_gradients = self.reference, self.noise, self.with_gradients
        with _one_error(PortError, self.given, self.training):
            ours = self._port(self.inputs, self.cotangents)
        counts = [sum(name.startswith("output") for name in values) for values in (ours, reference)]
        if counts[0] != counts[1]:
            raise PortError(f"the port returns {counts[0]} arrays, the module {counts[1]}")
        names = [name for name in reference if name in ours and (with_gradients or not name.startswith("buffer:"))]
        notes_of = {name: _incomparable(ours[name], noise[name]) for name in names}
        ratios = {name: float("inf") if notes_of[name] else 0.0 for name in names}
        unequal = [
            name
            for name in names
            if not notes_of[name] and not np.array_equal(ours[name].array, reference[name].array, equal_nan=True)
        ]
        gradients = [name for name in unequal if name.startswith("gradient:")]
        for group in ([name for name in unequal if name not in gradients], gradients):  # the first needs no backward
            a, b, r = (
                {name: _from(values[name], reference[name]) for name in group} for values in (ours, noise, reference)
            )
            with _one_error(_OriginalFails, self.given, self.training):
                judged = judge_values(a, b, r, self._dtype(noise), self._samples(group))
            for name, judgement in judged.items():
                ratios[name], notes_of[name] = judgement.ratio, judgement.note if not judgement.passed else ""
        found = []
        for what, prefix in (("outputs", "output"), ("gradients", "gradient:"), ("buffers", "buffer:")):
            of = [name for name in names if name.startswith(prefix)]
            if what == "buffers" and not self.training and not any(ratios[name] for name in of):
                continue  # as they were before the call
            if of or what == "outputs":
                check = self._check(what, of, ratios, notes_of, ours, reference)
                found.append(replace(check, layers=layers))
        return found

    def _check(
        self,
        what: str,
        names: list[str],
        ratios: dict[str, float],
        notes_of: dict[str, str],
        ours: dict[str, Value],
        reference: dict[str, Value],
    ) -> Check:
        """Returns the check of the values with these names: that of the one with the largest ratio."""
        mode, sizes = _mode(self.training), sizes_text(self.given)
        if not names:
            return Check(mode, sizes, what, 0.0, 0.0, "no output")
        worst = max(names, key=lambda name: ratios[name])
        path = worst.replace("[", " ").rstrip("]") if what == "outputs" else worst.partition(":")[2]
        return Check(
            mode, sizes, what, ratios[worst], _difference(ours[worst], reference[worst]), path, notes_of[worst]
        )

    def _reference(self, with_gradients: bool, notes: list[str]) -> dict[str, Value]:
        """Returns the values in float64; sets the cotangents if the original has gradients."""
        if not with_gradients:
            return self._original(self.exact, self.inputs, None)
        rng = np.random.default_rng(0)
        drawn: list[Array] = []

        def draw(shape: tuple[int, ...]) -> Array:
            drawn.append(rng.standard_normal(shape).astype(np.float32))
            return drawn[-1]

        try:
            reference = self._original(self.exact, self.inputs, draw)
        except Exception as error:  # of an operation without a gradient, of the user's backward, or of the forward
            reference = self._original(self.exact, self.inputs, None)
            mode = _mode(self.training)
            where = backends.module("torch", "porting.failures").where(error)
            notes.append(
                f"no gradients were compared in {mode} mode, the original raises: {where}{first_line(error)}"
            )
            return reference
        self.cotangents = drawn or None
        return reference

    def _original(
        self,
        side: Any,
        inputs: list[Array],
        cotangents: list[Array] | Callable[[tuple[int, ...]], Array] | None,
        **options: Any,
    ) -> dict[str, Value]:
        run = backends.module("torch", "porting.run")
        with run.without_dropout():
            found: dict[str, Value] = side.run(*with_arrays(self.given, inputs), self.training, cotangents, **options)
        return found

    def _port(
        self, inputs: list[Array], cotangents: list[Array] | None, weights: dict[str, Array] | None = None
    ) -> dict[str, Value]:
        """Returns the values of the port under the names, and with the axes, of the original."""
        load, arrays = backends.module("mlx", "porting.load"), backends.module("mlx", "porting.weights")
        with load.mode(self.model, self.training):
            if weights:
                arrays.assign(self.model, self.plan.native(weights, partial=True))
            values: dict[str, Value] = load.run(self.model, inputs, self.plan.arguments, cotangents)
        found = {}
        for name, value in values.items():
            kind, _, path = name.partition(":")
            if not path or path.startswith("input "):
                found[name] = value
            elif path in self.native:
                own = self.native[path]
                kind = "buffer" if kind == "array" else kind
                found[f"{kind}:{own}"] = Value(self.plan.to_torch(own, value.array), value.dtype)
        return found

    def _dtype(self, noise: dict[str, Value]) -> str:
        """Returns the dtype in which the original computes: the shortest of its values."""
        found = {value.dtype for value in noise.values()}
        return next((dtype for dtype in ("bf16", "fp16") if dtype in found), "fp32")

    def _samples(self, names: list[str]) -> Samples[Any]:
        """Returns the nearby problems (see `icenet.parity.resampling`).

        The outputs of modules are not moved by ulps: that takes several times as long as the module, and few values
        of a port need more noise than that of sums in order.
        """
        own: dict[str, Value] = self.single.weights()
        sums = backends.module("torch", "tools.sums").summing_in_order

        @functools.lru_cache(maxsize=1)
        def nearby(sample: int) -> tuple[list[Array], list[Array] | None, dict[str, Array]]:
            perturb = Perturbation("fp32", sample, rounds=False)

            def moved(array: Array) -> Array:
                value = perturb(Value(array, short_dtype(array.dtype)))
                return np.asarray(value.array).astype(array.dtype)

            cotangents = None
            if self.cotangents is not None and any(name.startswith("gradient:") for name in names):
                cotangents = [moved(array) for array in self.cotangents]
            weights = {path: np.asarray(perturb(value).array) for path, value in own.items()}
            return [moved(array) for array in self.inputs], cotangents, weights

        def original(side: Any, sample: int, **options: Any) -> dict[str, Value]:
            inputs, cotangents, weights = nearby(sample)
            found = self._original(side, inputs, cotangents, weights=weights, **options)
            return {name: _real(found[name]) for name in names}

        def port(sample: int) -> dict[str, Value]:
            found = self._port(*nearby(sample))
            return {name: _real(found[name]) for name in names}

        return Samples(
            reference=lambda sample: original(self.exact, sample),
            torch=lambda sample: original(self.single, sample),
            mlx=port,
            in_order=lambda sample: original(self.single, sample, within=lambda module: sums(sample)),
            count=FEW,
            may_jump=True,
        )


def _single(array: Array) -> Array:
    """Returns an array in the dtype that the port is given: fp32 in the place of float64."""
    return array.astype({"float64": np.float32, "complex128": np.complex64}.get(str(array.dtype), array.dtype))


def _real(value: Value) -> Value:
    """Returns a value as floating-point numbers: complex ones as pairs, integers as float64."""
    array = value.array
    if array.dtype.kind == "c":
        array = np.stack([array.real, array.imag])
    return Value(array, value.dtype) if value.is_float else Value(array.astype(np.float64), "fp32")


def _from(value: Value, reference: Value) -> Value:
    """Returns a value to be judged; of integers the distance from the reference, which is exact."""
    if value.is_float or reference.array.dtype.kind == "c":
        return _real(value)
    return Value(value.array.astype(np.float64) - reference.array.astype(np.float64), "fp32")


def _incomparable(ours: Value, theirs: Value) -> str:
    """Returns why two values cannot be compared: the shape or the dtype; else an empty string."""
    if ours.array.shape != theirs.array.shape:
        return f"shape {list(ours.array.shape)} instead of {list(theirs.array.shape)}"
    return f"{ours.dtype} instead of {theirs.dtype}" if ours.dtype != theirs.dtype else ""


def _difference(ours: Value, reference: Value) -> float:
    """Returns the largest difference relative to the largest value."""
    a, b = ours.array, reference.array
    if a.shape != b.shape:
        return float("inf")
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.any():
        return 0.0
    a, b = (np.where(finite, x, 0).astype(np.complex128 if x.dtype.kind == "c" else np.float64) for x in (a, b))
    return float(np.abs(a - b).max()) / max(float(np.abs(b).max()), 1e-30)


def locate(plan: Plan, program: Any, module: Any, given: Arguments, report: PortReport) -> str:
    """Returns what differs: the first operation, with the original's line, or the value that the report found.

    The operations of the evaluation mode are compared, on the example.
    """
    bad = [check for check in report.checks if not check.passed]
    worst = max(bad, key=lambda check: check.ratio)
    if worst.what == "jumps":
        return worst.name
    kind = {"outputs": "output", "gradients": "gradient of", "buffers": "buffer"}[worst.what]
    how = worst.note or f"{worst.ratio:.2g} times the noise of rounding"
    found = f"{kind} {worst.name.removeprefix('output ')} in {worst.mode} mode on {worst.sizes}, {how}"
    if all(check.layers == "icenet" for check in bad):
        return f"{found}, with IceNet's layers; with those of MLX the port computes what the module computes"
    if not any(check.mode == "evaluation" and check.what == "outputs" for check in bad):
        return found
    return proof_places.first_difference(plan, program, module, given) or found
