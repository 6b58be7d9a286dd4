"""Causes in the functions that a module calls, its running statistics and its casts."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.parity import align
from icenet.parity.calls.pairing import relative
from icenet.parity.causes.numbers import attributes, code_numbers
from icenet.parity.causes.rotary import bases, turns_positions
from icenet.parity.causes.trial import Trial
from icenet.parity.trace import Value
from icenet.parity.yardstick import judge

_MOST_ACTIVATED = 8
"""Number of outputs to which activations are applied."""
_MOST_SITES = 8
"""Number of places in the code up to which a variant is also tried at each of them alone."""


def find_functions(trial: Trial) -> str:
    """Returns the variant of the functions of the reference that explains the difference."""
    if trial.c.reference.backend != "torch":
        return ""
    variants = backends.module("torch", "tools.variants")
    with variants.spying() as calls:
        trial.replay()
    sites: dict[str, list[Any]] = {}
    for call in calls:
        found = sites.setdefault(call.name, [])
        found += [call.site] if call.site not in found else []
    own = [v for _, v in attributes(trial.modules[0]).values() if isinstance(v, float)]
    ours = trial.ours[trial.name].array
    # a value that reaches a bound is equal to it
    edges = [float(edge) for edge in (ours.min(), ours.max()) if (ours == edge).sum() > 1]
    edges = edges if trial.pair.larger is not None else []
    written = code_numbers(trial.modules[0])
    whole = code_numbers(trial.modules[0], int)
    table = [*variants.TABLE, *variants.number_variants(calls, [*own, *written], whole), *variants.UNBOUNDED]
    if edges:
        table += variants.number_variants([call for call in calls if call.name in variants.BOUNDED], edges)
    table += variants.sum_variants(calls)
    table += variants.clip_variants(calls, written)
    own += edges
    caps = variants.cap_variants(calls, own)
    table = [*caps, *table] if "tanh" in sites else [*table, *caps]
    if "mul" in sites:
        table += variants.theta_variants(bases(trial))
    table += variants.LATE
    accepted: list[tuple[float, int, str]] = []
    for index, variant in enumerate(table):
        if sites.keys().isdisjoint(variant.names):
            continue
        if (explained := _explained(trial, variant, calls)) is not None:
            ratio, text = explained
            accepted.append((ratio, index, text))
            if ratio <= 2:
                break
    if not accepted and trial.is_forward:
        for name in variants.ACTIVATIONS:
            if trial.explains_array(variants.activated(name, trial.exact[trial.name].array)):
                return f"{name} in addition in a"
        for cap in dict.fromkeys((*(n for n in own if n > 1), *variants.CAPS)):
            if trial.explains_array(variants.capped(trial.exact[trial.name].array, cap)):
                return f"a soft cap, {cap:g} * tanh(x / {cap:g}), in addition in a"
        if edges and trial.explains_array(np.clip(trial.exact[trial.name].array, ours.min(), ours.max())):
            return f"clipped at {' and '.join(f'{edge:g}' for edge in edges)} in a"
    return min(accepted)[2] if accepted else ""


def _explained(trial: Trial, variant: Any, calls: Sequence[Any]) -> tuple[float, str] | None:
    """Returns the ratio and the text of a variant that explains the difference, None if it does not.

    It is tried at all calls that it fits, and then at some of their places in the code alone.
    """
    variants = backends.module("torch", "tools.variants")
    only: frozenset[Any] | None = None
    left: list[frozenset[Any]] = []
    while True:
        with variants.applied(variant, only) as mode:
            new = trial.replay()
        if only is None:
            left = _places(mode.sites)
        if mode.sites and new and trial.explains(new, functools.partial(_of_b, trial, variant, only)):
            ratio = trial.ratio(new)
            if ratio > 2:  # the noise may be larger there
                ratio = min(ratio, trial.ratio(new, _of_b(trial, variant, only)))
            return ratio, _text(variant, only, calls, _turns_if_rotary(trial, variant))
        if not left:
            return None
        only = left.pop(0)


def _turns_if_rotary(trial: Trial, variant: Any) -> bool:
    return not variant.text.startswith("rotary positions of") or turns_positions(trial)


def find_activated(trial: Trial) -> str:
    """Returns which activation `a` applies to the output of a call within, in addition."""
    if not trial.is_forward or not trial.c.computes_reference or trial.c.reference.backend != "torch":
        return ""
    variants = backends.module("torch", "tools.variants")
    places = list(enumerate(zip(trial.pair.input_places(), trial.given.values, strict=True)))
    for index, ((source, _), value) in places[: -_MOST_ACTIVATED - 1 : -1]:
        if source is None or not value.is_float:
            continue
        for name in variants.USUAL_ACTIVATIONS:
            values = list(trial.given.values)
            values[index] = replace(value, array=variants.activated(name, value.array))
            if trial.explains(trial.replay(values=values)):
                return f"{name} is applied to the output of {relative(source.path, trial.pair.path)} in a"
    return ""


def _places(sites: Sequence[Any]) -> list[frozenset[Any]]:
    """Returns the places in the code at which a variant is tried alone: each, and neighbours (keys and values)."""
    if not 1 < len(sites) <= _MOST_SITES:
        return []
    pairs = itertools.pairwise(sites) if len(sites) > 2 else ()
    return [*(frozenset({site}) for site in sites), *map(frozenset, pairs)]


def _of_b(trial: Trial, variant: Any, only: Any) -> dict[str, Value]:
    """Returns what `b` computes with a variant in the dtype under test; empty if it fails."""
    try:
        with backends.module("torch", "tools.variants").applied(variant, only):
            return trial.named(trial.c.b_replay(trial.given))
    except align.ReplayError:
        return {}


def _text(variant: Any, only: Any, calls: Sequence[Any], turns: bool) -> str:
    """Returns the text of a variant, with the name of the activation that it replaces.

    Args:
        variant: The variant.
        only: The places where it is applied; None for all.
        calls: The calls of the module.
        turns: Whether pairs and halves may be those of rotary positions, and not of a gate, for example.
    """
    activation_name = backends.module("torch", "tools.variants").activation_name
    replaced = (c for c in calls if c.name in variant.names and (only is None or c.site in only))
    used = list(dict.fromkeys(activation_name(c.name, c.kwargs, c.args) for c in replaced))
    others = [name for name in used if not variant.text.startswith(f"{name} in a")]
    same = f"{used[0]} with other numbers" if used else "another activation"
    text = str(variant.text)
    if not turns:
        text = text.replace("rotary positions of pairs", "pairs").replace("rotary positions of halves", "halves")
        text = text.replace(", of ", ", ")
    return text.replace("{0}", " and ".join(others) or same)


def find_stopped(trial: Trial) -> str:
    """Returns whether the gradient of an output of a call, or of what it passes on, stops in `a` but not in `b`."""
    seeds = trial.given.cotangents
    if seeds is None or trial.c.reference.backend != "torch":
        return ""
    for index, ((source, _), seed) in enumerate(zip(trial.pair.places(), seeds, strict=True)):
        if not seed.is_float or len(seeds) < 2:
            continue
        zeros = [*seeds[:index], replace(seed, array=np.zeros_like(seed.array)), *seeds[index + 1 :]]
        if trial.explains(trial.replay(cotangents=zeros)):
            what = "the output" if source is None else f"the input of {relative(source.path, trial.pair.path)}"
            return f"the gradient of {what} is not passed on in a, as by stop_gradient"
    variants = backends.module("torch", "tools.variants")
    with variants.spying() as calls:
        trial.replay()
    sites = list(dict.fromkeys(call.site for call in calls if call.name in variants.ATTACHED.names))
    for only in (None, *_places(sites)) if sites else ():
        with variants.applied(variants.ATTACHED, only):
            new = trial.replay()
        if new and trial.explains(new):
            return str(variants.ATTACHED.text)
    return ""


def find_mask(trial: Trial) -> str:
    """Returns whether `a` hands on a mask of 0 and 1 where `b` has 0 and a number that hides a score."""
    ours, exact = (np.asarray(values[trial.name].array, np.float64) for values in (trial.ours, trial.exact))
    if ours.shape != exact.shape or not align.is_mask(exact) or not np.isin(ours, (0.0, 1.0)).all():
        return ""
    for seen, text in ((1.0, "of 0 and 1"), (0.0, "of 1 and 0")):
        if np.array_equal(ours == seen, exact == 0):
            return f"the attention mask {text} is not made 0 and -inf in a: added to the scores it hides nothing"
    return ""


def find_statistics(trial: Trial) -> str:
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


def find_casts(trial: Trial) -> str:
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
                found = trial.named(c.b.replay(trial.given))
        except align.ReplayError:
            continue
        if trial.name not in found:
            continue
        uncast = np.asarray(found[trial.name].array, np.float64)
        if uncast.shape == exact.shape and judge(ours, uncast, exact, c.dtype).passed:
            return str(variant.text)
    return ""
