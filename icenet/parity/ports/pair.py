"""The comparison of a port with its original in one mode, on some inputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.errors import IceNetError, PortError
from icenet.core.messages import first_line
from icenet.core.porting.build import Plan
from icenet.parity.nearby import Perturbation
from icenet.parity.ports.inputs import Arguments, arrays_of, sizes_text, with_arrays
from icenet.parity.ports.report import Check
from icenet.parity.resampling import FEW, Samples, judge_values
from icenet.parity.trace import Value, short_dtype

Array = np.ndarray


class OriginalFails(PortError):
    """The original raises an error on some inputs."""


def mode_name(training: bool) -> str:
    return "training" if training else "evaluation"


@contextlib.contextmanager
def _one_error(kind: type[PortError], given: Arguments, training: bool) -> Iterator[None]:
    """Turns what a call of the original or of the port raises into a PortError."""
    try:
        yield
    except IceNetError:
        raise
    except Exception as error:  # whatever the code of a user raises
        who, where, hint = "the port", "", ""
        if kind is OriginalFails:
            failures = backends.module("torch", "porting.failures")
            who, where, hint = "the original", failures.where(error), failures.hint(error)
        text = f"{who} fails in {mode_name(training)} mode on {sizes_text(given)}: {where}{first_line(error)}{hint}"
        raise kind(text) from error


@dataclass
class _Side:
    """A port and its values.

    Attributes:
        model: The `mlx.nn.Module`.
        layers: Whose layers it has: "mlx" or "icenet".
        values: Its values.
        ratios: The ratio of each value that is compared.
        notes: Why a value cannot be compared, or is judged as it is; empty for others.
    """

    model: Any
    layers: str
    values: dict[str, Value]
    ratios: dict[str, float]
    notes: dict[str, str]


MOST_KEPT = 2**24
"""Elements up to which nearby problems are solved once for all ports: FEW results of 16 bytes are kept of each."""


FAR = 2**12
"""By how many ulps the problems are moved at most in which a gradient over the tolerance is repeated.

It is too much for a value that is within rounding of the edge of a ReLU to stay there: such a value is on the other
side in MLX in most problems that are 4 ulps away, too. A wrong gradient is wrong in these problems as well.
"""


class Pair:
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

    def checks(self, with_gradients: bool, notes: list[str], accelerated: Any = None) -> list[Check]:
        """Returns the comparison of the outputs, and with gradients of the gradients and the buffers.

        Args:
            with_gradients: Whether to compare gradients and buffers.
            notes: Gets what could not be compared.
            accelerated: The port with IceNet's operations, which is compared, too.
        """
        with _one_error(OriginalFails, self.given, self.training):
            self.reference = self._reference(with_gradients, notes)
            self.noise = self._original(self.single, self.inputs, self.cotangents)
        if with_gradients and not self.training:
            outputs = [value.array for name, value in self.reference.items() if name.startswith("output")]
            self.is_empty = bool(outputs) and not any(np.isfinite(array).any() for array in outputs)
            if self.is_empty:
                notes.append(
                    "the outputs of the example have no finite value, so none was compared; give another one"
                )
        sides = [self._side(self.model, "mlx", with_gradients)]
        if accelerated is not None:
            sides.append(self._side(accelerated, "icenet", with_gradients))
        for is_gradient in (False, True):  # the others need no backward
            self._judge(sides, is_gradient)
        return [check for side in sides for check in self._checks_of(side, with_gradients)]

    def _side(self, model: Any, layers: str, with_gradients: bool) -> _Side:
        """Returns the values of a port that are compared, none of them judged."""
        with _one_error(PortError, self.given, self.training):
            ours = self._port(model, self.inputs, self.cotangents)
        counts = [sum(name.startswith("output") for name in values) for values in (ours, self.reference)]
        if counts[0] != counts[1]:
            raise PortError(f"the port returns {counts[0]} arrays, the module {counts[1]}")
        names = [
            name for name in self.reference if name in ours and (with_gradients or not name.startswith("buffer:"))
        ]
        notes = {name: _incomparable(ours[name], self.noise[name]) for name in names}
        return _Side(model, layers, ours, {name: float("inf") if notes[name] else 0.0 for name in names}, notes)

    def _judge(self, sides: list[_Side], is_gradient: bool) -> None:
        """Judges the gradients, or the other values, of all sides. Nearby problems are solved once for all."""
        reference, noise = self.reference, self.noise
        given: list[list[dict[str, Value]]] = []
        for side in sides:
            names = [
                name
                for name, note in side.notes.items()
                if name.startswith("gradient:") == is_gradient
                and not note
                and not np.array_equal(side.values[name].array, reference[name].array, equal_nan=True)
            ]
            given.append(
                [
                    {name: _from(values[name], reference[name]) for name in names}
                    for values in (side.values, noise, reference)
                ]
            )
        dtype = self._dtype(noise)
        plain = [judge_values(ours, theirs, exact, dtype) for ours, theirs, exact in given]
        over = {name: None for judged in plain for name, judgement in judged.items() if judgement.is_over}
        nearby = self._nearby(list(over)) if over else None
        for side, (ours, theirs, exact), judged in zip(sides, given, plain, strict=True):
            if nearby is not None and any(judgement.is_over for judgement in judged.values()):
                with _one_error(OriginalFails, self.given, self.training):
                    judged = judge_values(ours, theirs, exact, dtype, nearby(side.model))
            for name, judgement in judged.items():
                side.ratios[name] = judgement.ratio
                side.notes[name] = judgement.note if not judgement.passed else ""

    def _checks_of(self, side: _Side, with_gradients: bool) -> list[Check]:
        """Returns the checks of the outputs, and with gradients of the gradients and the buffers of a side."""
        found = []
        for what, prefix in (("outputs", "output"), ("gradients", "gradient:"), ("buffers", "buffer:")):
            of = [name for name in side.ratios if name.startswith(prefix)]
            if what == "buffers" and not self.training and not any(side.ratios[name] for name in of):
                continue  # as they were before the call
            if of or what == "outputs":
                found.append(self._check(what, of, side))
        return found

    def _check(self, what: str, names: list[str], side: _Side) -> Check:
        """Returns the check of the values with these names: that of the one with the largest ratio."""
        mode, sizes = mode_name(self.training), sizes_text(self.given)
        if not names:
            return Check(mode, sizes, what, 0.0, 0.0, "no output", layers=side.layers)
        worst = max(names, key=lambda name: side.ratios[name])
        path = worst.replace("[", " ").rstrip("]") if what == "outputs" else worst.partition(":")[2]
        difference = _difference(side.values[worst], self.reference[worst])
        return Check(mode, sizes, what, side.ratios[worst], difference, path, side.notes[worst], layers=side.layers)

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
            mode = mode_name(self.training)
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
        self,
        model: Any,
        inputs: list[Array],
        cotangents: list[Array] | None,
        weights: dict[str, Array] | None = None,
    ) -> dict[str, Value]:
        """Returns the values of a port under the names, and with the axes, of the original."""
        load, arrays = backends.module("mlx", "porting.load"), backends.module("mlx", "porting.weights")
        with load.mode(model, self.training):
            if weights:
                arrays.assign(model, self.plan.native(weights, partial=True))
            values: dict[str, Value] = load.run(model, inputs, self.plan.arguments, cotangents)
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

    def _nearby(self, names: list[str]) -> Callable[[Any], Samples[Any]]:
        """Returns a function that returns the nearby problems of a port (see `icenet.parity.resampling`).

        The outputs of modules are not moved by ulps: that takes several times as long as the module, and few values
        of a port need more noise than that of sums in order.

        Args:
            names: The values of which any may be judged again. Their results are kept for the other ports.
        """
        own: dict[str, Value] = self.single.weights()
        sums = backends.module("torch", "tools.sums").summing_in_order
        has_gradients = any(name.startswith("gradient:") for name in names)
        size = sum(self.reference[name].array.size for name in names)
        far = FAR if has_gradients else 4
        kept = functools.lru_cache(maxsize=FEW) if size <= MOST_KEPT else lambda run: run

        @functools.lru_cache(maxsize=1)
        def nearby(sample: int, ulps: int) -> tuple[list[Array], list[Array] | None, dict[str, Array]]:
            perturb = Perturbation("fp32", sample, rounds=False, ulps=ulps)

            def moved(array: Array) -> Array:
                value = perturb(Value(array, short_dtype(array.dtype)))
                return np.asarray(value.array).astype(array.dtype)

            cotangents = None
            if self.cotangents is not None and has_gradients:
                cotangents = [moved(array) for array in self.cotangents]
            weights = {path: np.asarray(perturb(value).array) for path, value in own.items()}
            return [moved(array) for array in self.inputs], cotangents, weights

        def original(side: Any, sample: int, ulps: int = 4, **options: Any) -> dict[str, Value]:
            inputs, cotangents, weights = nearby(sample, ulps)
            found = self._original(side, inputs, cotangents, weights=weights, **options)
            return {name: _real(found[name]) for name in names}

        def port(model: Any, sample: int) -> dict[str, Value]:
            found = self._port(model, *nearby(sample, far))
            return {name: _real(found[name]) for name in names}

        samples: Samples[Any] = Samples(
            reference=kept(lambda sample: original(self.exact, sample)),
            torch=kept(lambda sample: original(self.single, sample)),
            in_order=kept(lambda sample: original(self.single, sample, within=lambda module: sums(sample))),
            repeated=kept(lambda sample: original(self.exact, sample, far)) if has_gradients else None,
            jumping=kept(lambda sample: original(self.single, sample, far, within=lambda module: sums(sample)))
            if has_gradients
            else None,
            count=FEW,
            may_jump=True,
            in_order_first=True,
        )
        return lambda model: replace(samples, mlx=functools.partial(port, model))


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
