"""Causes of a difference of an optimizer's updates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity.causes.trial import ACCEPTED
from icenet.parity.measures import rms
from icenet.parity.state import Comparison
from icenet.parity.yardstick import judge

Array = npt.NDArray[Any]

CORRECTION = 2.0**-24 / (1 - 0.999) / 2
"""Relative error of an update of Adam if its correction by 1 - 0.999 is rounded in fp32, as in MLX."""
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
        if ratio(found) <= min(ACCEPTED, first / 4):
            return text
    return ""


def ams_grad_differs(c: Comparison, optimizers: tuple[Any, Any]) -> bool:
    """Returns whether `b` alone has AMSGrad, which the optimizers of MLX lack.

    With the usual betas, the first updates are the same but for rounding.
    """
    if not c.computes_reference:
        return False
    given, made = (
        s.tools.make_optimizer(s.module, o, s.rate) for s, o in zip((c.a, c.reference), optimizers, strict=True)
    )
    if not type(given).__module__.startswith("mlx.optimizers"):
        return False
    return any(group.get("amsgrad") for group in getattr(made, "param_groups", ()))


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
    given = c.a.tools.make_optimizer(c.a.module, c.optimizers[0], c.a.rate) if c.optimizers else None
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
        if not all(isinstance(number, (int, float)) for pair in pairs for number in pair):  # None of Adafactor
            continue
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


def _setting(name: str, value: Any) -> Change:
    """Returns the change of an option of all groups, to a value or what a function of the group returns."""

    def change(optimizer: Any, step: int) -> None:
        for group in optimizer.param_groups:
            if name not in group:
                raise KeyError(name)
            group[name] = value(group) if callable(value) else value

    return change


def _uncorrected(optimizer: Any, step: int) -> None:
    """Takes Adam's correction of the bias out of the learning rate and of eps."""
    for group in optimizer.param_groups:
        if step == 0:
            group["icenet_lr"], group["icenet_eps"] = group["lr"], group["eps"]
        one, two = (1 - beta ** (step + 1) for beta in group["betas"])
        group["lr"] = group["icenet_lr"] * one / math.sqrt(two)
        group["eps"] = group["icenet_eps"] / math.sqrt(two)
        if group.get("weight_decay") and group.get("decoupled_weight_decay"):
            if step == 0:
                group["icenet_decay"] = group["weight_decay"]
            group["weight_decay"] = group["icenet_decay"] * group["icenet_lr"] / group["lr"]


def _decayed(decays: bool) -> Change:
    """Returns the change that gives biases and parameters of norms the largest weight decay, or none."""

    def change(optimizer: Any, step: int) -> None:
        if step:
            return
        groups = [dict(group) for group in optimizer.param_groups]
        largest = max(group["weight_decay"] for group in groups)
        optimizer.param_groups.clear()
        for group in groups:
            vectors = [p for p in group["params"] if p.ndim < 2]
            others = [p for p in group["params"] if p.ndim >= 2]
            for parameters, decay in ((vectors, largest if decays else 0.0), (others, group["weight_decay"])):
                if parameters:
                    optimizer.param_groups.append({**group, "params": parameters, "weight_decay": decay})

    return change


def _optimizer_changes() -> Iterator[tuple[str, Change]]:
    yield "no bias correction in a: pass bias_correction=True", _uncorrected
    yield "weight decay on biases and norms in a, not in b", _decayed(True)
    yield "no weight decay on biases and norms in a", _decayed(False)
    yield "no weight decay in a", _setting("weight_decay", 0.0)
    for decay in (0.01, 0.1, 0.05, 1e-3, 1e-4):
        yield f"weight decay is {decay:g} in a", _setting("weight_decay", decay)
    yield "weight decay in the gradient in a, decoupled in b", _setting("decoupled_weight_decay", False)
    yield "decoupled weight decay in a, in the gradient in b", _setting("decoupled_weight_decay", True)
    for eps in (1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3):
        yield f"eps of the optimizer is {eps:g} in a", _setting("eps", eps)
    for betas in ((0.9, 0.999), (0.9, 0.95), (0.9, 0.99), (0.9, 0.98), (0.95, 0.999), (0.5, 0.999)):
        yield f"betas are {list(betas)} in a", _setting("betas", betas)
    for momentum in (0.0, 0.9, 0.95, 0.99):
        yield f"momentum of the optimizer is {momentum:g} in a", _setting("momentum", momentum)
    yield "Nesterov momentum in a, not in b", _setting("nesterov", True)
    yield "no Nesterov momentum in a", _setting("nesterov", False)
    yield "dampening as large as the momentum in a", _setting("dampening", lambda group: group["momentum"])
    yield "the learning rate is ten times as large in a", _setting("lr", lambda group: _base(group) * 10)
    yield "the learning rate is a tenth in a", _setting("lr", lambda group: _base(group) / 10)
    yield "AMSGrad in a, not in b", _setting("amsgrad", True)
    yield "the other direction: gradients are added in a", _setting("maximize", True)


def _base(group: dict[str, Any]) -> float:
    """Returns the learning rate of a group before it was changed."""
    return float(group.setdefault("icenet_lr", group["lr"]))
