"""The gradients of a run: their judgements, and the calls of which they do not show that the backward pass agrees.

A backward pass that is wrong changes the gradients of the run before it. If all of them are within the tolerance, and
their noise is far smaller than they are, no replay of a backward pass would find more. So the backward pass of a
layer of the frameworks is replayed only where this is not so; that of a user's class is replayed always, and so is
the forward pass of every call. A gradient by a parameter of such a layer that is over the tolerance is a sum over
values that agree: it is first judged by a run with sums term by term.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity.calls.events import Run
from icenet.parity.calls.forced import can_force, forced_run
from icenet.parity.calls.own_code import code_of
from icenet.parity.calls.pairs import FRAMEWORK_LAYERS, Pair
from icenet.parity.resampling import judge_values
from icenet.parity.results.rows import split_at
from icenet.parity.state import Comparison
from icenet.parity.trace import Value
from icenet.parity.yardstick import FACTOR, Judgement, judge

Array = npt.NDArray[Any]

_CLEAR = 1e-4
"""Largest noise of a gradient, relative to its size, with which the run shows whether it agrees."""


class RunGradients:
    """The gradients of a run by the outputs of all calls and by the parameters.

    Args:
        c: The comparison.
        pairs: The calls.
        runs: The runs of `a`, of `b` in the dtype under test, and of the reference.

    Attributes:
        pairs: The calls.
        outputs: The judgement of the gradient by the first output of a call, by the number of the call in `b`.
        inputs: That of the gradient by an argument of the model, by its number in `b`.
        own, noise, exact: The gradients by the parameters on each side, by `gradient:PATH` in `b`.
        parameters: Their judgements. What is over the tolerance may agree at the values of `a` (`calls.forced`), or
            with sums term by term.
        in_order: Their judgements with the noise of sums term by term alone, of those that are over the tolerance.
        replayed: Numbers of the calls whose backward pass is replayed; set by `undecided`.
    """

    def __init__(self, c: Comparison, pairs: list[Pair], runs: tuple[Run, Run, Run]) -> None:
        self._c, self.pairs = c, pairs
        self.outputs = {
            pair.b.number: judgement for pair in pairs if (judgement := self._judge_output(pair)) is not None
        }
        found = {j: self._judge(how, values) for (_, j, how), values in self._input_gradients(runs)}
        self.inputs = {j: judgement for j, judgement in found.items() if judgement is not None}
        own, self.noise, self.exact = ({f"gradient:{n}": v for n, v in run.gradients.items()} for run in runs)
        self.own = {
            f"gradient:{c.parameter_names[name.partition(':')[2]]}": value
            for name, value in own.items()
            if name.partition(":")[2] in c.parameter_names
        }
        self.parameters = judge_values(self.own, self.noise, self.exact, c.dtype)
        self.in_order: dict[str, Judgement] = {}
        self.replayed: set[int] = set()
        if self._may_jump():
            c.jumps = True
            self._judge_at_own_values(runs)
        self._judge_sums()

    def _judge_output(self, pair: Pair) -> Judgement | None:
        """Returns the judgement of the gradient by the first output of a call; None if a side has none, or copies."""
        if not pair.outputs or align.has_copies(pair.outputs[0][2]):
            return None
        i, j, how = pair.outputs[0]
        return self._judge(how, (pair.a.gradients[i], pair.noise.gradients[j], pair.b.gradients[j]))

    def _is_open(self, judgement: Judgement) -> bool:
        """Returns whether a gradient is over the tolerance, or so noisy that it does not show whether it agrees.

        It is both if a value is on the other side of an edge: in `a`, or in `b` in the dtype under test.
        """
        is_noisy = self._c.dtype == "fp32" and judgement.scale > 0 and not _is_clear(judgement)
        return judgement.is_over or (is_noisy and judgement.passed)

    def _may_jump(self) -> bool:
        """Returns whether a gradient is open for another reason than its sum.

        If those by all outputs agree, those by the parameters of a layer of the frameworks differ by their sums only.
        """
        users = [item for name, item in self.parameters.items() if not self._is_frameworks(self._holder(name))]
        return any(map(self._is_open, (*self.outputs.values(), *users)))

    def _are_noisy(self) -> bool:
        """Returns whether a gradient that is within the tolerance is open: its noise is large, as `b` jumps, too."""
        return any(
            item.passed and self._is_open(item) for item in (*self.outputs.values(), *self.parameters.values())
        )

    def _judge_at_own_values(self, runs: tuple[Run, Run, Run]) -> None:
        """Sets the judgements of the gradients that agree with those of the reference at the values of `a`.

        The jumps between the gradients at the values of `a` and of `b` are first computed by `b` in the dtype under
        test, whose rounding adds to the error of `a`. Where those of `b` jump as well, so that their noise is large,
        `b` runs at the values of the reference, too. Only what is over the tolerance then needs a run of the
        reference, which takes several times as long.
        """
        c, pairs = self._c, self.pairs
        if not can_force(c):
            return
        own = forced_run(c, pairs, c.b)
        if c.dtype == "fp32":
            theirs = forced_run(c, pairs, c.b, of_a=False) if self._are_noisy() else runs[1]
            self._judge_open(runs[0], theirs, runs[2], own)
        if self._may_jump():
            self._judge_open(runs[0], own, forced_run(c, pairs, c.reference))

    def _judge_open(self, *runs: Run) -> None:
        """Sets the judgements of open gradients that pass, given other runs.

        Args:
            runs: Of `a`; of `b` and of the reference, at values that are equal but for rounding; and of `b` at the
                values of `a`, if the others are not.
        """
        events = [run.by_call() for run in runs[1:]]
        for pair in self.pairs:
            before, call = self.outputs.get(pair.b.number), (pair.path, pair.b.call)
            if before is not None and self._is_open(before) and all(call in found for found in events):
                i, j, how = pair.outputs[0]
                values = [pair.a.gradients[i], *(found[call].gradients[j] for found in events)]
                self._replace(self.outputs, pair.b.number, how, values)
        for (_, j, how), values in self._input_gradients(runs):
            self._replace(self.inputs, j, how, values)
        for name in self.parameters:
            theirs = (run.gradients.get(name.partition(":")[2]) for run in runs[1:])
            self._replace(self.parameters, name, align.SAME, (self.own[name], *theirs))

    def _replace(self, judged: dict[Any, Judgement], key: Any, how: str, values: Sequence[Value | None]) -> None:
        """Replaces an open judgement by that of other gradients, if it passes."""
        before = judged.get(key)
        if before is not None and self._is_open(before) and (found := self._judge(how, values)) and found.passed:
            judged[key] = replace(found, plain_ratio=before.ratio) if before.is_over else found

    def _judge(self, how: str, values: Sequence[Value | None]) -> Judgement | None:
        """Returns the judgement of a gradient of `a`, given those of `b`, of the reference and `b` at its values."""
        if any(item is None for item in values):
            return None
        own, noise, exact, *moved = (item for item in values if item is not None)
        array = align.to_torch(how, own.array)
        if moved and array.shape == noise.array.shape == moved[0].array.shape:
            array = array - (np.asarray(moved[0].array, np.float64) - noise.array)
        return judge(array, noise.array, exact.array, self._c.dtype, stored=noise.dtype)

    def _input_gradients(self, runs: Sequence[Run]) -> Iterator[tuple[tuple[int, int, str], list[Value | None]]]:
        """Yields the numbers and the alignment of each argument of the model, and the gradients by it."""
        root = self.pairs[0]
        counts = [len(root.a.arguments), *[len(root.b.arguments)] * (len(runs) - 1)]
        if [len(run.input_gradients) for run in runs] == counts:
            for i, j, how in root.arguments:
                yield (i, j, how), [run.input_gradients[j if n else i] for n, run in enumerate(runs)]

    def _judge_sums(self) -> None:
        """Sets the judgements of those gradients by parameters that are far within the noise of sums term by term."""
        names = [n for n, item in self.parameters.items() if item.is_over and self._is_frameworks(self._holder(n))]
        if self._c.dtype != "fp32" or not names or any(item.is_over for item in self.outputs.values()):
            return
        self.judge_in_order(names)
        for name, found in self.in_order.items():
            if found.ratio <= FACTOR / 2 and _is_clear(found):
                self.parameters[name] = found

    def judge_in_order(self, names: Sequence[str]) -> dict[str, Judgement]:
        """Returns the judgements of some gradients by parameters with the noise of sums term by term alone."""
        c = self._c
        if not all(name in self.in_order for name in names):
            floors = c.propagated({name: self.exact[name] for name in names}, self.pairs, quick=True)
            self.in_order = {name: self.judge_with(name, self.own[name].array, floors[name]) for name in floors}
        return {name: self.in_order[name] for name in names if name in self.in_order}

    def judge_with(self, name: str, own: Array, floor: Array) -> Judgement:
        """Returns the judgement of a gradient by a parameter, given what is judged and its noise in samples."""
        noise, exact = self.noise[name], self.exact[name].array
        found = judge(own, noise.array, exact, self._c.dtype, stored=noise.dtype, sampled_noise=floor)
        return replace(found, plain_ratio=self.parameters[name].ratio)

    def undecided(self) -> set[int]:
        """Returns the numbers of the calls whose backward pass the run does not decide.

        Those are all, if the gradient by an output is over the tolerance, too noisy or unknown. Otherwise those with
        such a parameter, those that take such an input of the model, and those of a user's classes, of equal code the
        first one: the gradient by the input of a branch with a small factor, such as 1e-6, vanishes in the noise of
        the residual next to it.
        """
        pairs = self.pairs
        self.replayed = {pair.b.number for pair in pairs}
        inner = [pair for pair in pairs if pair.b.parent is not None]
        if not inner or not self.exact or self._c.dtype != "fp32":
            return self.replayed
        if not all(pair.b.number in self.outputs and _is_clear(self.outputs[pair.b.number]) for pair in inner):
            return self.replayed
        given = {
            id(value)
            for index, value in enumerate(pairs[0].b.arguments)
            if value.is_float and not (index in self.inputs and _is_clear(self.inputs[index]))
        }
        holders = {
            self._holder(name)
            for name in self.exact
            if name not in self.parameters or not _is_clear(self.parameters[name])
        }
        self.replayed = {
            pair.b.number
            for pair in pairs
            if pair.path in holders or any(id(value) in given for value in pair.b.arguments)
        }
        known: set[Hashable] = set()
        for pair in pairs:
            if not self._is_frameworks(pair.path) and (code := code_of(self._c, pair)) not in known:
                self.replayed.add(pair.b.number)
                known |= {code} - {None}
        return self.replayed

    def _holder(self, name: str) -> str:
        """Returns the path in `b` of the module that holds the parameter of a gradient."""
        return split_at(name.partition(":")[2], self._c.b.modules)[0]

    def _is_frameworks(self, path: str) -> bool:
        """Returns whether the module at a path in `b` is a layer of the frameworks on both sides."""
        c, own = self._c, self._c.a.own_path(path)
        names = "" if own is None else c.a.classes.get(own, ""), c.b.classes.get(path, "")
        return all(name.startswith(FRAMEWORK_LAYERS) for name in names)


def _is_clear(judgement: Judgement) -> bool:
    return judgement.passed and judgement.scale > 0 and judgement.noise <= _CLEAR * judgement.scale
