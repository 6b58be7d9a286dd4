"""The gradients of a run: their judgements, and the calls of which they do not show that the backward pass agrees.

A backward pass that is wrong changes the gradients of the run before it. If all of them are within the tolerance, and
their noise is far smaller than they are, no replay of a backward pass would find more. So the backward pass of a
layer of the frameworks is replayed only where this is not so; that of a user's class is replayed always, and so is
the forward pass of every call.
"""

from __future__ import annotations

from dataclasses import replace

from icenet.parity import align
from icenet.parity.calls.events import Run
from icenet.parity.calls.forced import forced_runs
from icenet.parity.calls.pairs import FRAMEWORK_LAYERS, Pair
from icenet.parity.resampling import judge_values
from icenet.parity.results.rows import split_at
from icenet.parity.state import Comparison
from icenet.parity.yardstick import Judgement, judge

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
        own, noise, exact: The gradients by the parameters on each side, by `gradient:PATH` in `b`.
        parameters: Their judgements. What is over the tolerance may agree at the values of `a` (`forced_runs`).
        replayed: Numbers of the calls whose backward pass is replayed; set by `undecided`.
    """

    def __init__(self, c: Comparison, pairs: list[Pair], runs: tuple[Run, Run, Run]) -> None:
        self._c, self.pairs = c, pairs
        self.outputs = {
            pair.b.number: judgement for pair in pairs if (judgement := _judge_output(c, pair)) is not None
        }
        own, self.noise, self.exact = ({f"gradient:{n}": v for n, v in run.gradients.items()} for run in runs)
        self.own = {
            f"gradient:{c.parameter_names[name.partition(':')[2]]}": value
            for name, value in own.items()
            if name.partition(":")[2] in c.parameter_names
        }
        self.parameters = judge_values(self.own, self.noise, self.exact, c.dtype)
        self.replayed: set[int] = set()
        if any(map(self._is_open, (*self.outputs.values(), *self.parameters.values()))):
            self._judge_at_own_values()

    def _is_open(self, judgement: Judgement) -> bool:
        """Returns whether a gradient is over the tolerance, or so noisy that it does not show whether it agrees.

        It is both if a value is on the other side of an edge: in `a`, or in `b` in the dtype under test.
        """
        is_noisy = self._c.dtype == "fp32" and judgement.scale > 0 and not _is_clear(judgement)
        return judgement.is_over or (is_noisy and judgement.passed)

    def _judge_at_own_values(self) -> None:
        """Sets the judgements of the gradients that agree with those of the reference at the values of `a`."""
        c, runs = self._c, forced_runs(self._c, self.pairs)
        if runs is None:
            return
        noise, exact = (run.by_call() for run in runs)
        for pair in self.pairs:
            before, call = self.outputs.get(pair.b.number), (pair.path, pair.b.call)
            if before is not None and self._is_open(before) and call in noise and call in exact:
                found = _judge_output(c, replace(pair, noise=noise[call], b=exact[call]))
                if found is not None and found.passed:
                    self.outputs[pair.b.number] = _in_place_of(before, found)
        for name, before in self.parameters.items():
            theirs, reference = (run.gradients.get(name.partition(":")[2]) for run in runs)
            if self._is_open(before) and theirs is not None and reference is not None:
                own = self.own[name].array
                found = judge(own, theirs.array, reference.array, c.dtype, stored=theirs.dtype)
                if found.passed:
                    self.parameters[name] = _in_place_of(before, found)

    def undecided(self) -> set[int]:
        """Returns the numbers of the calls whose backward pass the run does not decide.

        Those are all, if the gradient by an output is over the tolerance, too noisy or unknown. Otherwise those with
        such a parameter, those that take an input of the model, whose gradient is not in the run, and all of a user's
        classes: the gradient by the input of a branch with a small factor, such as 1e-6, vanishes in the noise of the
        residual next to it.
        """
        pairs = self.pairs
        self.replayed = {pair.b.number for pair in pairs}
        inner = [pair for pair in pairs if pair.b.parent is not None]
        if not inner or not self.exact or self._c.dtype != "fp32":
            return self.replayed
        if not all(pair.b.number in self.outputs and _is_clear(self.outputs[pair.b.number]) for pair in inner):
            return self.replayed
        given = {id(value) for value in pairs[0].b.arguments}
        holders = {
            split_at(name.partition(":")[2], self._c.b.modules)[0]
            for name in self.exact
            if name not in self.parameters or not _is_clear(self.parameters[name])
        }
        self.replayed = {
            pair.b.number
            for pair in pairs
            if pair.path in holders or self._is_users(pair) or any(id(value) in given for value in pair.b.arguments)
        }
        return self.replayed

    def _is_users(self, pair: Pair) -> bool:
        """Returns whether a call is of a user's class on one side."""
        names = self._c.a.classes.get(pair.a.path, ""), self._c.b.classes.get(pair.b.path, "")
        return not (names[0].startswith(FRAMEWORK_LAYERS) and names[1].startswith(FRAMEWORK_LAYERS))


def _judge_output(c: Comparison, pair: Pair) -> Judgement | None:
    """Returns the judgement of the gradient by the first output of a call; None if a side has none."""
    if not pair.outputs:
        return None
    i, j, how = pair.outputs[0]
    own, noise, exact = pair.a.gradients[i], pair.noise.gradients[j], pair.b.gradients[j]
    if own is None or noise is None or exact is None:
        return None
    return judge(align.to_torch(how, own.array), noise.array, exact.array, c.dtype, stored=noise.dtype)


def _in_place_of(before: Judgement, found: Judgement) -> Judgement:
    """Returns a judgement that passes, with the ratio that was over the tolerance before."""
    return replace(found, plain_ratio=before.ratio) if before.is_over else found


def _is_clear(judgement: Judgement) -> bool:
    return judgement.passed and judgement.scale > 0 and judgement.noise <= _CLEAR * judgement.scale
