"""Which parameter is fitted how: by which method, at which learning rate, with which decay.

A parameter belongs to the first of `training.parameter_groups` that names it, and what a group does not say is as for
the rest: `training.learning_rate`, and the weight decay for matrices (two axes and more). Muon is for hidden
matrices alone: embeddings, the output's matrix, convolutions, recurrent weights and vectors take AdamW beside it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from icenet.core.config.training import ParameterGroup, TrainingConfig
from icenet.core.errors import CheckpointError, ConfigError
from icenet.core.weights import layout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """How some parameters are fitted."""

    method: str
    """A value of `training.optimizer`."""
    lr_scale: float
    """Their learning rate in units of the schedule's."""
    weight_decay: float


def assign(
    training: TrainingConfig, shapes: Mapping[str, Shape], kinds: Mapping[str, str], outputs: int | None = None
) -> dict[str, Group]:
    """The group of each parameter, by path, in the order of `shapes`.

    Args:
        training: the section of the configuration.
        shapes: canonical shapes of the parameters that are fitted, by path.
        kinds: the kind of each layer, by module path (see `icenet.core.weights.layout`).
        outputs: how many values the model gives at a position, classes or words. A linear layer as wide that is in
            no numbered stack of layers counts as the output's, which Muon leaves out.

    Raises:
        ConfigError: a pattern of `training.parameter_groups` fits no parameter.
    """
    for index, group in enumerate(training.parameter_groups):
        for pattern in group.parameters:
            if not any(fnmatchcase(path, pattern) for path in shapes):
                near = difflib.get_close_matches(pattern, shapes, n=1, cutoff=0.0)
                raise ConfigError(
                    f"training.parameter_groups.{index}.parameters: {pattern!r} fits no parameter of the model that "
                    f"is fitted; the nearest is {near[0] if near else 'none, since there are none'}"
                )
    found = {}
    for path, shape in shapes.items():
        named = next((group for group in training.parameter_groups if _fits(group, path)), None)
        decay = weight_decay(training) if len(shape) >= 2 else 0.0
        rate = training.learning_rate
        if named is not None:
            decay = decay if named.weight_decay is None else named.weight_decay
            rate = rate if named.learning_rate is None else named.learning_rate
        method = training.optimizer
        if method == "muon" and not _is_hidden_matrix(path, shape, kinds, outputs):
            method = "adamw"
        found[path] = Group(method, rate / training.learning_rate, decay)
    return found


def gather(groups: Mapping[str, Group]) -> dict[Group, list[str]]:
    """The paths of each group, both in the order in which they are met."""
    found: dict[Group, list[str]] = {}
    for path, group in groups.items():
        found.setdefault(group, []).append(path)
    return found


def weight_decay(training: TrainingConfig) -> float:
    """`training.weight_decay`, or what goes with the method.

    That is 0.1 where it acts on the weights themselves (Loshchilov and Hutter, 2019), and 0 with Adam and SGD, which
    add it to the gradient, where 0.1 would rule it.
    """
    usual = 0.0 if training.optimizer in ("adam", "sgd") else 0.1
    return usual if training.weight_decay is None else training.weight_decay


def momentum(training: TrainingConfig) -> float:
    """`training.momentum`, or the method's own: 0.95 for Muon, else 0.9."""
    usual = 0.95 if training.optimizer == "muon" else 0.9
    return usual if training.momentum is None else training.momentum


def state_values(training: TrainingConfig, groups: Mapping[str, Group], shapes: Mapping[str, Shape]) -> int:
    """How many values the optimizer keeps, averaged weights included."""
    total = 0
    for path, group in groups.items():
        size = math.prod(shapes[path])
        if group.method == "adafactor":
            *rows, last = shapes[path]
            total += math.prod(rows) + size // rows[-1] if rows else last
        else:
            total += {"adamw": 2, "adam": 2, "sgd": int(momentum(training) > 0)}.get(group.method, 1) * size
        total += size if training.ema_decay else 0
    return total


def muon_factor(shape: Sequence[int]) -> float:
    """What Muon's learning rate is multiplied by, that its steps are as large as AdamW's (RMS 0.2 a value).

    Liu et al., "Muon is scalable for LLM training", 2025, equation 4; PyTorch's `match_rms_adamw`.
    """
    return 0.2 * float(max(shape)) ** 0.5


def check_slots(wanted: Mapping[str, Shape], found: Mapping[str, Shape], optimizer: str) -> None:
    """Compares a checkpoint's optimizer state, shapes by `PATH.SLOT`, with what the optimizer keeps.

    Raises:
        CheckpointError: it is another optimizer's, or another model's.
    """
    missing = next((name for name in wanted if name not in found), None)
    extra = next((name for name in found if name not in wanted), None)
    if missing is None and extra is None:
        for name, shape in wanted.items():
            if tuple(found[name]) != tuple(shape):
                raise CheckpointError(
                    f"the checkpoint's optimizer state {name!r} has shape {list(found[name])}, where {list(shape)} "
                    "is wanted; resume with the model and training.parameter_groups that the run's config.yaml has"
                )
        return
    what = f"has no {missing!r}, which {optimizer} keeps" if missing else f"has {extra!r}, which {optimizer} does not"
    slots = {name.rpartition(".")[2] for name in found}
    writers, settings = next(((names, how) for names, how, own in _KEPT if slots in own), ((), ""))
    if not writers or optimizer in writers:
        way_out = "resume with the model and the training section that the run's config.yaml has"
    else:
        way_out = f"it is that of {' or '.join(writers)}: resume with {settings}"
    raise CheckpointError(
        f"the checkpoint's optimizer state {what}; {way_out}, or start a new run to change the optimizer"
    )


_ADAM, _FACTORED = {"exp_avg", "exp_avg_sq"}, {"row_var", "col_var"}
_KEPT: list[tuple[tuple[str, ...], str, list[set[str]]]] = [
    (("adamw", "adam"), "--set training.optimizer=adamw", [_ADAM]),
    (("sgd",), "--set training.optimizer=sgd", [{"momentum_buffer"}]),
    (("sgd without momentum",), "--set training.optimizer=sgd --set training.momentum=0", [set()]),
    (("adafactor",), "--set training.optimizer=adafactor", [{*_FACTORED, "variance"}, _FACTORED, {"variance"}]),
    (("lion",), "--set training.optimizer=lion", [{"exp_avg"}]),
    (("muon",), "--set training.optimizer=muon", [{*_ADAM, "momentum_buffer"}, {"momentum_buffer"}]),
]
"""Who keeps which slots, and how to say so."""


def _fits(group: ParameterGroup, path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in group.parameters)


def _is_hidden_matrix(path: str, shape: Shape, kinds: Mapping[str, str], outputs: int | None) -> bool:
    if len(shape) != 2 or layout.parameter_kind(kinds, path) != "linear":
        return False
    return shape[0] != outputs or re.search(r"(^|\.)\d+\.", path) is not None
