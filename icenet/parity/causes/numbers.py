"""Causes in the numbers of modules: attributes with the same meaning and another value."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import numpy as np

from icenet.core.messages import some
from icenet.parity.calls.module_copy import is_of_user
from icenet.parity.causes.trial import Trial
from icenet.parity.state import Comparison

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


def find_numbers(trial: Trial) -> str:
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
        with changed(theirs, attribute, new):
            if trial.explains(trial.replay()):
                return text
    if text := _number_within(trial):
        return text
    with contextlib.ExitStack() as stack:
        for attribute, new, _ in found:
            stack.enter_context(changed(theirs, attribute, new))
        if len(found) > 1 and trial.explains(trial.replay()):
            return "; ".join(text for _, _, text in found)
    return ""


def _number_within(trial: Trial) -> str:
    """Returns which attribute of the modules within a layer of both frameworks has another value in all of them."""
    if not trial.pair.is_opaque:
        return ""
    sides = [
        {
            path[len(own) + 1 :]: module
            for path, module in side.modules.items()
            if path.startswith(f"{own}." if own else "")
        }
        for side, own in ((trial.c.a, trial.pair.a.path), (trial.c.reference, trial.pair.path))
    ]
    changes: dict[str, list[tuple[Any, str, Any]]] = {}
    for path in sides[0].keys() & sides[1].keys():
        own, other = attributes(sides[0][path]), attributes(sides[1][path])
        for name, (attribute, old) in other.items():
            new = own[name][1] if name in own else old
            if type(new) is type(old) and new != old:
                text = f"{_SHOWN.get(name, name)} is {_text(new)} in a, {_text(old)} in b"
                changes.setdefault(text, []).append((sides[1][path], attribute, new))
    for text, places in changes.items():
        with contextlib.ExitStack() as stack:
            for place in places:
                stack.enter_context(changed(*place))
            if trial.explains(trial.replay()):
                return text
    return ""


def attributes(module: Any) -> dict[str, tuple[str, Any]]:
    """Returns the name and value of each number, flag and tuple of numbers that a module holds, by its meaning."""
    items = {**(dict(module) if isinstance(module, dict) else {}), **vars(module)}
    found = {}
    for name, value in items.items():
        if name == "eps" and value is None:  # of PyTorch's RMSNorm: that of the dtype
            value = float(np.finfo(np.float32).eps)
        is_number = isinstance(value, (bool, int, float))
        is_tuple = isinstance(value, tuple) and value and all(isinstance(v, int) for v in value)
        if (is_number or is_tuple) and name not in ("training", "_training", "call_super_init", "dump_patches"):
            found[_MEANING.get(name, name)] = name, value
    return found


def code_numbers(module: Any, kind: type = float) -> list[float]:
    """Returns the numbers in the code of a user's module: of its methods, functions that they call, and tuples."""
    kinds = (cls for cls in type(module).__mro__ if is_of_user(cls))
    held = list(vars(module).values())
    functions = [item for cls in kinds for name, item in vars(cls).items() if name != "__init__"] + held
    functions = [item for item in functions if isinstance(item, FunctionType)]
    found = [float(n) for item in held if isinstance(item, tuple) for n in item if isinstance(n, (int, float))]
    for function in functions:  # which grows
        codes = [function.__code__]
        for code in codes:
            codes += [item for item in code.co_consts if isinstance(item, CodeType)]
            found += [float(item) for item in code.co_consts if isinstance(item, (int, float)) and type(item) is kind]
        called = [function.__globals__.get(name) for code in codes for name in code.co_names]
        called += [cell.cell_contents for cell in function.__closure__ or ()]
        for item in called:
            is_new = isinstance(item, FunctionType) and is_of_user(item) and item not in functions
            if is_new and len(functions) < _MOST_FUNCTIONS:
                functions.append(item)
    return list(dict.fromkeys(found))


_MOST_FUNCTIONS = 50
"""Number of functions whose code is searched for numbers."""

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
    effect = (
        "although all values agree: it has no effect beyond rounding on these inputs"
        if c.trains
        else "although all values agree in evaluation mode: the training mode, which it may change, was not compared"
    )
    return [f"{text}, in {some(paths)}, {effect}" for text, paths in places.items()]


@contextlib.contextmanager
def changed(module: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(module)[name]
    vars(module)[name] = value
    try:
        yield
    finally:
        vars(module)[name] = before


def _text(value: Any) -> str:
    value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    return f"{value:g}" if isinstance(value, float) else str(value)


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


def find_options(trial: Trial) -> str:
    """Returns an option that only one framework has for a layer."""
    own = attributes(trial.modules[0])
    if getattr(trial.modules[1], "batch_first", True) is False and "batch_first" not in own:
        with changed(trial.modules[1], "batch_first", True):
            if trial.explains(trial.replay()):
                return "the layer takes [L, B, D] in b (batch_first=False), [B, L, D] in a: exchange the axes 0 and 1"
    if trial.pair.kind == "group_norm" and own.get("pytorch_compatible", ("", True))[1] is False:
        return "the groups are of other channels in a: pass pytorch_compatible=True to mlx.nn.GroupNorm"
    return ""
