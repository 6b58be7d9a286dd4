"""Parameter groups: method, learning rate and weight decay of each parameter.

A parameter belongs to the first of `training.parameter_groups` with a matching pattern. The defaults of a group are
`training.learning_rate`, and the weight decay for matrices (two and more axes). Muon updates hidden matrices only,
each of those of stacked layers by itself. Embeddings, the output matrix, convolutions, recurrent weights and vectors
are updated by AdamW.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from icenet.core.config.training import TrainingConfig
from icenet.core.errors import ConfigError
from icenet.core.weights import layout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """The settings of a parameter. Parameters with equal settings form an optimizer group."""

    method: str
    """A value of `training.optimizer`."""
    lr_scale: float
    """Factor of the learning rate of the schedule."""
    weight_decay: float


def assign(
    training: TrainingConfig, shapes: Mapping[str, Shape], kinds: Mapping[str, str], outputs: int | None = None
) -> dict[str, Group]:
    """Returns the group of each parameter, by path, in the order of `shapes`.

    Args:
        training: The section of the configuration.
        shapes: Canonical shapes of the trainable parameters, by path.
        kinds: The kind of each layer, by module path (see `icenet.core.weights.layout`).
        outputs: Number of output features of the model (classes or vocabulary). A linear layer of this width outside
            of numbered stacks of layers is taken to be the output layer, which Muon does not update.

    Raises:
        ConfigError: A pattern of `training.parameter_groups` matches no trainable parameter.
    """
    for index, group in enumerate(training.parameter_groups):
        for pattern in group.parameters:
            if not matching([pattern], shapes):
                near = difflib.get_close_matches(pattern, shapes, n=1, cutoff=0.0)
                raise ConfigError(
                    f"training.parameter_groups.{index}.parameters: {pattern!r} matches no trainable parameter; "
                    + (f"did you mean {near[0]}?" if near else "the model has none")
                )
    found = {}
    for path, shape in shapes.items():
        owner = index_of(training, path)
        own = None if owner is None else training.parameter_groups[owner]
        decay = weight_decay(training) if _num_axes(path, shape, kinds) >= 2 else 0.0
        rate = training.learning_rate
        if own is not None:
            decay = decay if own.weight_decay is None else own.weight_decay
            rate = rate if own.learning_rate is None else own.learning_rate
        method = training.optimizer
        if method == "muon" and not _is_hidden_matrix(path, shape, kinds, outputs):
            method = "adamw"
        found[path] = Group(method, rate / training.learning_rate, decay)
    return found


def index_of(training: TrainingConfig, path: str) -> int | None:
    """Returns the index of the group in `training.parameter_groups` that a parameter belongs to, or None."""
    groups = training.parameter_groups
    return next((index for index, group in enumerate(groups) if matching(group.parameters, [path])), None)


def matching(patterns: Sequence[str], paths: Iterable[str]) -> list[str]:
    """Returns the paths that match one of the patterns."""
    return [path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)]


def gather(groups: Mapping[str, Group]) -> dict[Group, list[str]]:
    """Returns the paths of each group, groups and paths in order of first occurrence."""
    found: dict[Group, list[str]] = {}
    for path, group in groups.items():
        found.setdefault(group, []).append(path)
    return found


def weight_decay(training: TrainingConfig) -> float:
    """Returns `training.weight_decay`, or the default of the optimizer.

    The default is 0.1 for decoupled weight decay (Loshchilov and Hutter, 2019), and 0 for Adam and SGD, which add it
    to the gradient, where 0.1 would dominate.
    """
    default = 0.0 if training.optimizer in ("adam", "sgd") else 0.1
    return default if training.weight_decay is None else training.weight_decay


def momentum(training: TrainingConfig) -> float:
    """Returns `training.momentum`, or the default of the optimizer: 0.95 for Muon, otherwise 0.9."""
    default = 0.95 if training.optimizer == "muon" else 0.9
    return default if training.momentum is None else training.momentum


def state_values(training: TrainingConfig, groups: Mapping[str, Group], shapes: Mapping[str, Shape]) -> int:
    """Returns the number of values in the optimizer state, averaged weights included."""
    total = 0
    for path, group in groups.items():
        size = math.prod(shapes[path])
        if group.method == "adafactor":
            *rows, last = shapes[path] or (1,)
            total += math.prod(rows) + size // rows[-1] if rows else last
        else:
            total += {"adamw": 2, "adam": 2, "sgd": int(momentum(training) > 0)}.get(group.method, 1) * size
        total += size if training.ema_decay else 0
    return total


def muon_factor(shape: Sequence[int]) -> float:
    """Returns the factor of Muon's learning rate that makes its updates as large as AdamW's (RMS 0.2 per value).

    Liu et al., "Muon is scalable for LLM training", 2025, equation 4; `match_rms_adamw` in PyTorch.
    """
    return 0.2 * float(max(shape[-2:])) ** 0.5


def _is_hidden_matrix(path: str, shape: Shape, kinds: Mapping[str, str], outputs: int | None) -> bool:
    if _num_axes(path, shape, kinds) != 2 or layout.parameter_kind(kinds, path) not in ("linear", "stacked_linear"):
        return False
    return shape[0] != outputs or re.search(r"(^|\.)\d+\.", path) is not None


def _num_axes(path: str, shape: Shape, kinds: Mapping[str, str]) -> int:
    """Returns the number of axes of a parameter; of stacked layers, the number of one of them."""
    return len(shape) - (kinds.get(layout.split(path)[0]) == "stacked_linear")
