"""The proof of a port: it computes what the PyTorch module computes, to rounding.

Outputs, gradients and the buffers after the call are judged by the criterion of all comparisons in IceNet
(`icenet.parity.yardstick`): the reference is the module in float64, the noise is the module in fp32, and a value over
the tolerance is judged again in nearby problems, in which a wrong computation is wrong each time. So are integers.
The results of operations that jump are equal on equal inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.errors import PortError
from icenet.core.porting.build import Plan
from icenet.parity.ports import places as proof_places
from icenet.parity.ports.inputs import Arguments, arrays_of, other_sizes, sizes_text, with_sizes
from icenet.parity.ports.least_sizes import least_sizes
from icenet.parity.ports.limits import MOST, Guard, Place, find_limits
from icenet.parity.ports.pair import OriginalFails, Pair, mode_name
from icenet.parity.ports.remainders import with_remainders
from icenet.parity.ports.report import Check, PortReport, limit_text, settle

_LARGEST = 2**20
"""Elements of inputs that are tried only because a module may take some sizes alone."""


class Proof:
    """The comparison of a port with its original, in both modes, on inputs of several sizes.

    On the example, outputs, gradients and buffers are compared; on the others, outputs. The port as IceNet runs it,
    with its own operations in some layers, is compared on the example, too.

    Args:
        plan: The source of the port and the graphs of the module.
        model: The `mlx.nn.Module`.
        module: The `torch.nn.Module`.
        program: The exported program, whose guards say which sizes are possible.
        example: The arguments of the example.
        accelerated: The port with IceNet's operations; None if it has no layer with them.
        progress: Called with the name of each stage.
    """

    def __init__(
        self,
        plan: Plan,
        model: Any,
        module: Any,
        program: Any,
        example: Arguments,
        accelerated: Any = None,
        progress: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self.plan, self.model, self.accelerated = plan, model, accelerated
        self.module, self.program, self.example, self.progress = module, program, example, progress
        self.run = backends.module("torch", "porting.run")
        self.exact, self.single = self.run.Reference(module, True), self.run.Reference(module, False)
        self.report = PortReport()
        self.differs_at_one: list[Guard] = []
        """The conditions that sizes are not 1, for those at which the port differs from the original."""

    def compare(self) -> PortReport:
        """Returns the report of all comparisons."""
        others = other_sizes(self.plan, self.example, self._accepts)
        self._compare_mode(False, [self.example, *others])
        if self.report.passed:
            self._compare_unexported_sizes()
        random_places = proof_places.random_operations(self.plan)
        if self.plan.train is None:
            self.report.notes.append("the training mode cannot be exported and was not compared")
        elif random_places:
            self.report.notes.append(f"random operations were not compared in training mode: {random_places[0]}")
        else:
            self._compare_mode(True, [self.example, *others[:1]])
        return self.report

    def _accepts(self, given: Arguments) -> bool:
        is_one = any(array.shape[:1] == (1,) for array in arrays_of(given))
        if is_one or self.plan.graph.loops:  # an export has no batch of 1, and the steps of the example
            return self._runs(given)
        accepted: bool = self.run.accepts(self.program, *given)
        return accepted

    def _runs(self, given: Arguments) -> bool:
        """Returns whether the original takes some arguments."""
        try:
            self.single.run(*given, False)
        except Exception:  # whatever the code of a user raises
            return False
        return True

    def _pair(self, given: Arguments, training: bool = False) -> Pair:
        return Pair(self.plan, self.model, self.exact, self.single, given, training)

    def _compare_mode(self, training: bool, inputs: list[Arguments]) -> None:
        """Compares one mode on some inputs, the first of which are the example."""
        for given in inputs:
            self.progress(f"comparing, {mode_name(training)}")
            try:
                self._compare_on(given, training)
            except OriginalFails as error:
                if given is self.example and not training:
                    raise
                self.report.notes.append(f"not compared: {error}")

    def _compare_on(self, given: Arguments, training: bool) -> None:
        pair = self._pair(given, training)
        if places := _places_of_one(self.example, given):
            agreed = _agreed(pair)
            self.report.checks += agreed
            if not agreed:
                self.differs_at_one.append(Guard("size >= 2", {"size": places}))  # an export takes no size for 1
            return
        is_example = given is self.example
        # a later turn of a loop may have another gradient alone, as with `if t % 16 == 0: h = h.detach()`
        with_gradients = is_example or (bool(self.plan.graph.loops) and not training)
        notes = self.report.notes if is_example else []
        self.report.checks += pair.checks(with_gradients, notes, self.accelerated if is_example else None)
        self.report.is_empty |= pair.is_empty
        settle(self.report)

    def _compare_unexported_sizes(self) -> None:
        """Tries sizes for which the graph was not exported, and the operations that jump."""
        self.progress("comparing, other sizes")
        guards = [
            *self.differs_at_one,
            *_of_few_steps(self.plan, self.example, self._serves),
            *(Guard(*guard) for guard in self.run.guards(self.program)),
        ]
        self._try_limits(guards)
        self._try_fixed_sizes()
        if len({check.sizes for check in self.report.checks}) == 1:
            self.report.notes.append(
                "compared on the sizes of the example only: the module or the port has no others"
            )
        if place := proof_places.jump_that_differs(self.plan, self.program, self.module, self.example):
            self.report.checks.append(
                Check(mode_name(False), sizes_text(self.example), "jumps", np.inf, np.inf, place, "not equal")
            )

    def _try_fixed_sizes(self) -> None:
        """Tries other sizes in the dimensions that the graph has fixed, and compares what both serve.

        Most are fixed by the weights, and the original has no other size either. A dimension at which the original
        returns something and the port fails, or returns another thing, is written to the report.
        """
        for size, places in _fixed_places(self.plan).items():
            for chosen in self._combinations(size, places):
                tried = self._tries_of_size(size, chosen)
                if not tried:  # the module does not have this size
                    continue
                agreed = [_agreed(self._pair(given)) for given in tried]
                if all(agreed):
                    self.report.checks += [check for checks in agreed for check in checks]
                    continue  # all at once; each alone may differ, as a source may read the width from the height
                for number, dim in set(chosen) & set(places):
                    self.report.fixed.setdefault(self.plan.graph.inputs[number].name, {})[dim] = size
                if len(chosen) > 1:
                    break
        for name, sizes in self.report.fixed.items():
            text = ", ".join(f"{size} in dimension {dim}" for dim, size in sorted(sizes.items()))
            self.report.notes.append(f"{name} has a fixed size, {text}; the port does not serve another one")

    def _combinations(self, size: int, places: list[Place]) -> list[list[Place]]:
        """Returns the places of one fixed size that are changed together: all of them, then each alone."""
        found = [places, *([place] for place in places)] if len(places) > 1 else [places]
        shapes = [array.shape for array in arrays_of(self.example)]
        equal = [(number, dim) for number, shape in enumerate(shapes) for dim, n in enumerate(shape) if n == size]
        if len(equal) > len(places):  # others of this size are open, and the module may need equal ones
            found.append(equal)
        return found

    def _tries_of_size(self, size: int, places: list[Place]) -> list[Arguments]:
        """Returns inputs with a larger and with a smaller size at some places, of those that the original takes."""

        def resized(other: int) -> Arguments:
            return with_sizes(self.example, dict.fromkeys(places, other))

        near = resized(size + (32 if size % 32 == 0 else 1))
        far = resized(4 * size)  # of which an integer can be the square root
        larger = (near, far) if sum(array.size for array in arrays_of(far)) <= _LARGEST else (near,)
        found = [next((given for given in larger if self._runs(given)), None)]
        if size > 2:  # a loop may run over the first elements of a list of layers
            smaller = resized(max(size // 2, 2))
            found.append(smaller if self._runs(smaller) else None)
        return [given for given in found if given is not None]

    def _serves(self, given: Arguments) -> bool:
        """Returns whether the module takes some inputs and the port computes the same."""
        return bool(_agreed(self._pair(given)))

    def _try_limits(self, guards: list[Guard]) -> None:
        """Tries sizes that violate the guards of the graph; those at which the port differs are in the report."""
        report, names = self.report, [ref.name for ref in self.plan.graph.inputs]
        found = find_limits(self.example, guards, self._runs, self._serves)
        if found.untried:
            report.notes.append(
                f"{found.untried} conditions of the export on sizes were not tried, since {MOST} inputs were; "
                "compare other sizes with the module before use"
            )
        found = with_remainders(found, [array.shape for array in arrays_of(self.example)])
        for (number, dim), (low, high) in sorted(found.ranges.items()):
            if low is not None and low == high:
                report.fixed.setdefault(names[number], {})[dim] = low
            else:
                report.limits.setdefault(names[number], {})[dim] = [low, high]
        report.guards = found.guards
        texts = []
        for name, sizes in report.limits.items():
            limits = ", ".join(f"{limit_text(*limit)} in dimension {dim}" for dim, limit in sorted(sizes.items()))
            texts.append(f"{name} has {limits}")
        texts += [guard.texts(lambda place: f"{names[place[0]]}.shape[{place[1]}]")[0] for guard in found.guards]
        report.notes += [f"{text}; beyond, the port computes something else than the module" for text in texts]
        for (number, dim), least in sorted(least_sizes(self.plan, self.example, self._runs).items()):
            name = names[number]
            low, high = report.limits.get(name, {}).get(dim, [None, None])
            if dim not in report.fixed.get(name, {}) and (low or 1) < least:
                report.limits.setdefault(name, {})[dim] = [least, high]  # no note, as the module has this limit


def _fixed_places(plan: Plan) -> dict[int, list[Place]]:
    """Returns the places at which the graph has a fixed size, by the size."""
    found: dict[int, list[Place]] = {}
    for number, ref in enumerate(plan.graph.inputs):
        for dim, size in enumerate(plan.graph.tensors[ref.name].shape):
            if isinstance(size, int) and size:
                found.setdefault(size, []).append((number, dim))
    return found


def _places_of_one(example: Arguments, given: Arguments) -> tuple[Place, ...]:
    """Returns the places at which some inputs have a size of 1 and the example has another one."""
    shapes = [(old.shape, new.shape) for old, new in zip(arrays_of(example), arrays_of(given), strict=True)]
    return tuple(
        (number, dim)
        for number, (old, new) in enumerate(shapes)
        for dim in range(len(new))
        if new[dim] == 1 < old[dim]
    )


def _of_few_steps(plan: Plan, example: Arguments, serves: Callable[[Arguments], bool]) -> list[Guard]:
    """Returns conditions on the sizes of loops: not 1, which an export does not try, and the least that is served.

    The first turns of a loop may be written before it, as in `x[:, max(t - 3, 0)]`. Fewer steps have less turns.
    """
    shapes = [plan.graph.tensors[ref.name].shape for ref in plan.graph.inputs]
    given = [array.shape for array in arrays_of(example)]
    found = []
    for symbol in dict.fromkeys(symbol for loop in plan.graph.loops for symbol in loop.symbols()):
        places = [(number, dim) for number, shape in enumerate(shapes) for dim, n in enumerate(shape) if n == symbol]
        if not places:
            continue
        low, high = 1, int(given[places[0][0]][places[0][1]])
        middle = 2
        while high - low > 1:
            if serves(with_sizes(example, dict.fromkeys(places, middle))):
                high = middle
            else:
                low = middle
            middle = (low + high) // 2
        found += [Guard(f"size >= {size}", {"size": tuple(places)}) for size in dict.fromkeys((max(high, 2), 2))]
    return found


def _agreed(pair: Pair) -> list[Check]:
    """Returns the comparison at another size; none if the port fails or differs.

    Gradients are compared if they may depend on a size alone, as in `(x - x * scale).detach() + x * scale`.
    """
    try:
        checks = pair.checks(any(node.base == "detach" for node in pair.plan.graph.nodes), [])
    except PortError:
        return []
    return checks if all(check.passed for check in checks) else []


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
