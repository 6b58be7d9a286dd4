"""What a model trains, holds and shares, and the comparison of a user's model with its twin for the other backend.

The two classes of a custom model must agree in this; otherwise they compute different functions, or train different
arrays, on equal weights. Models of our own families are mirrors of each other and are not compared.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from icenet.core import backends
from icenet.core.config import Config, custom, user_code
from icenet.core.errors import BackendError, CheckpointError, UsageError
from icenet.core.messages import first_line, some
from icenet.core.models.build import class_of
from icenet.core.weights import layout

_log = logging.getLogger("icenet")

NAMES = {"mlx": "MLX", "torch": "PyTorch"}
MAX_SHOWN = 3
"""Number of differences that a message shows."""


@dataclass(frozen=True)
class ArrayFacts:
    """An array of a model.

    Attributes:
        shape: Canonical shape.
        trained: Whether it is a trainable parameter, not a buffer or frozen.
        kind: Kind of its layer (see `icenet.core.weights.layout`).
        tied_to: The path that owns the array, if this is another place of it.
    """

    shape: tuple[int, ...]
    trained: bool
    kind: str
    tied_to: str | None = None


@dataclass(frozen=True)
class Description:
    """The arrays and the dropout layers of a model, by canonical path.

    Attributes:
        backend: mlx or torch.
        arrays: Parameters and persistent buffers.
        dropouts: Class and probability of each dropout layer with a probability above zero.
    """

    backend: str
    arrays: dict[str, ArrayFacts]
    dropouts: dict[str, tuple[str, float]]

    def as_dict(self) -> dict[str, Any]:
        """Returns the description in JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        """Returns what `as_dict` returned. Raises TypeError, KeyError or ValueError if it is something else."""
        facts = {p: ArrayFacts(**{**fact, "shape": tuple(fact["shape"])}) for p, fact in values["arrays"].items()}
        dropouts = {path: (str(kind), float(p)) for path, (kind, p) in values["dropouts"].items()}
        return cls(str(values["backend"]), facts, dropouts)


def describe(model: Any) -> Description:
    """Returns the description of a `BaseModel` of either backend."""
    shared, trained = model.shared_arrays(), model.trainable_paths()
    kinds = model.layer_kinds()
    if custom.has_port(model.config):  # it computes some layers by functions, whose arrays have the original's axes
        kinds = dict.fromkeys(kinds, "plain")
    arrays = {
        path: ArrayFacts(
            tuple(shape), shared.get(path, path) in trained, layout.parameter_kind(kinds, path), shared.get(path)
        )
        for path, shape in model.weight_shapes().items()
    }
    dropouts = {path: (type(layer).__name__, float(layer.p)) for path, layer in model.dropout_layers().items()}
    return Description(model.backend, arrays, dropouts)


def differences(first: Description, second: Description) -> list[str]:
    """Returns a line for each difference between the descriptions of a model on the two backends."""
    mlx, torch = (second, first) if (first.backend, second.backend) == ("torch", "mlx") else (first, second)
    layers = _foreign_layers(mlx, torch) | _foreign_layers(torch, mlx)
    found = [f"{path}: {text}" for path, text in layers.items()]
    found += _names(mlx, torch, tuple(layers)) + _names(torch, mlx, tuple(layers))
    for path, ours in mlx.arrays.items():
        if (theirs := torch.arrays.get(path)) is not None:
            found += _array(path, ours, theirs)
    for path in sorted({*mlx.dropouts, *torch.dropouts}):
        found += _dropout(path, mlx.dropouts.get(path), torch.dropouts.get(path))
    return found


_FOREIGN_LAYERS = {
    r"(Wx|Wh|bhn|(weight|bias)_(ih|hh)_l\d+(_reverse)?)": "nn.LSTM, nn.GRU and nn.RNN have other parameters in MLX "
    "and in PyTorch; use those of icenet.nn and icenet_torch.nn",
    r"in_proj_(weight|bias)": "nn.MultiheadAttention has other parameters in MLX; use four nn.Linear, and "
    "scaled_dot_product_attention of icenet.nn and icenet_torch.nn",
}
"""What to use in place of layers whose parameters differ between the frameworks, by the names of their parameters."""


def _foreign_layers(one: Description, other: Description) -> dict[str, str]:
    """Returns a text on each layer of a framework whose parameters only one of the descriptions has, by path."""
    found: dict[str, str] = {}
    for path in one.arrays:
        module, _, name = path.rpartition(".")
        if path in other.arrays or not module:
            continue
        for names, text in _FOREIGN_LAYERS.items():
            if re.fullmatch(names, name):
                found[module] = text
    return found


def _names(one: Description, other: Description, layers: tuple[str, ...]) -> list[str]:
    """Returns the arrays that only one of the descriptions has, without those of the layers."""
    within = tuple(f"{layer}." for layer in layers)
    extra = [path for path in one.arrays if path not in other.arrays and not path.startswith(within)]
    missing = [path for path in other.arrays if path not in one.arrays and not path.startswith(within)]
    lines = []
    for path in extra:
        near = difflib.get_close_matches(path, missing, n=1)
        name = path.rpartition(".")[2]
        hint = ""
        if near:
            hint = f"; the nearest name in {NAMES[other.backend]} is {near[0]}"
        elif one.backend == "torch" and any(part.startswith("_") for part in path.split(".")):
            hint = "; MLX takes nothing below an attribute that begins with _ for a parameter: rename it in both"
        elif one.backend == "mlx" and one.arrays[path].kind == "plain":
            hint = f"; a constant that is not saved is named _{name} in MLX"
        elif one.backend == "torch" and not one.arrays[path].trained and one.arrays[path].kind == "plain":
            hint = f"; a constant that is not saved is register_buffer('{name}', ..., persistent=False) in PyTorch"
        lines.append(f"{path}: in {NAMES[one.backend]} only{hint}")
    return lines


def _array(path: str, mlx: ArrayFacts, torch: ArrayFacts) -> list[str]:
    if mlx.shape != torch.shape:
        return [f"{path}: {list(mlx.shape)} in MLX, {list(torch.shape)} in PyTorch"]
    if mlx.kind != torch.kind:
        return [f"{path}: a parameter of kind {mlx.kind} in MLX, {torch.kind} in PyTorch"]
    if mlx.tied_to != torch.tied_to and (mlx.trained or torch.trained):
        return [f"{path}: {_tie(mlx)} in MLX, {_tie(torch)} in PyTorch"]
    if mlx.trained and not torch.trained:
        module, _, name = path.rpartition(".")
        where = f" in the module {module}" if module else ""
        remedy = f"self.freeze(keys=['{name}'], recurse=False){where} after the assignment"
        return [f"{path}: a fixed buffer in PyTorch, trained in MLX: call {remedy}"]
    if torch.trained and not mlx.trained:
        return [f"{path}: trained in PyTorch, frozen in MLX or of integers: freeze it in both, or make it a float"]
    return []


def _tie(array: ArrayFacts) -> str:
    return f"tied to {array.tied_to}" if array.tied_to else "an array of its own"


def _dropout(path: str, mlx: tuple[str, float] | None, torch: tuple[str, float] | None) -> list[str]:
    if mlx is None or torch is None:
        backend, layer = ("PyTorch", torch) if mlx is None else ("MLX", mlx)
        assert layer is not None
        return [f"{path}: {layer[0]} with p={layer[1]:g} in {backend} only"]
    if mlx[0] != torch[0] or abs(mlx[1] - torch[1]) > 1e-6:  # MLX stores 1 - p
        return [f"{path}: {mlx[0]} with p={mlx[1]:g} in MLX, {torch[0]} with p={torch[1]:g} in PyTorch"]
    return []


def summarize(lines: list[str]) -> str:
    """Returns the first differences in one line, and the number of the others."""
    return some(lines, MAX_SHOWN, "; ")


def compare_with_twin(config: Config, model: Any) -> str | None:
    """Compares a user's model with its twin for the other backend, if there is one.

    This imports the other framework and runs the user's file for it. The twin gets no values, so it needs no memory.

    Args:
        config: The configuration of the model.
        model: The model.

    Returns:
        One line that names the differences; None if there are none, or no twin. If the twin cannot be compared, the
        reason is logged: at level INFO if the framework is missing, as a warning if the twin is broken.
    """
    family = config.model.type
    if not custom.is_custom(family) or (file := _twin_file(config, model.backend)) is None:
        return None
    other = {"mlx": "torch", "torch": "mlx"}[model.backend]
    unchecked = f"{family} was not compared with its {NAMES[other]} twin in {file}: "
    if not backends.installed(other):
        _log.info(f"{unchecked}{NAMES[other]} is not installed")
        return None
    try:
        backends.resolve(other)
        class_of(config.model, other)
    except BackendError as error:  # the framework does not start, or the file has no such class
        _log.info(f"{unchecked}{error}")
        return None
    except UsageError as error:
        _log.warning(f"{unchecked}{error}")
        return None
    try:
        twin = backends.module(other, "engine.build").meta_model(config)
        found = differences(describe(model), describe(twin))
    except Exception as error:  # the user's code can raise anything, also because the twin has no values
        reason = first_line(error, "")
        _log.warning(f"{unchecked}{type(error).__name__}: {reason}")
        return None
    return f"{family} differs from its {NAMES[other]} twin: {summarize(found)}" if found else None


def _twin_file(config: Config, backend: str) -> Path | None:
    """Returns the file that may hold the model for the other backend than `backend`, or None."""
    if not custom.has_port(config.model):
        return custom.twin_file(config.model.type, backend)
    return custom.split(config.model.type if backend == "mlx" else custom.port_reference(config.model))[0]


def check_same_model(state: Mapping[str, Any], model: Any, source: str) -> None:
    """Checks a user's model against the description in a checkpoint that the other backend wrote.

    Args:
        state: The content of the checkpoint's state.json.
        model: The model that continues.
        source: Path of the checkpoint.

    Raises:
        CheckpointError: The models differ, or the description is damaged.
    """
    family, writer = model.config.type, state.get("backend")
    if not custom.is_custom(family) or writer == model.backend:
        return
    if "model" not in state:  # version 0.1 wrote none
        _log.info(f"{source}: does not describe its model, so {family} was not compared with it")
        return
    try:
        found = differences(describe(model), Description.from_dict(state["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: damaged: the description of its model in state.json is wrong") from error
    if found:
        raise CheckpointError(
            f"{source}: {family} for {NAMES[model.backend]} differs from the model that wrote it: "
            f"{summarize(found)}; make the two classes agree, or continue with --backend {writer}"
        )


def changed_code(stored: Any, family: str, source: str, action: str = "trained") -> str | None:
    """Returns a note if a user's model or loss is not the code that weights were trained with; None if it is.

    Args:
        stored: What `user_code.hashes` returned, from the file of a user. Version 0.1 stored no code.
        family: The `type` of the model, or `training.loss`.
        source: Path of the weights.
        action: What was done with the code.
    """
    if not custom.is_custom(family) or not isinstance(stored, dict):
        return None
    folder = custom.split(family)[0].parent
    names = [os.path.relpath(folder / name) for name in user_code.changed(folder, stored)]
    return f"{source}: was {action} with another version of {', '.join(names)}" if names else None


def stored_sharing(state: Mapping[str, Any]) -> dict[str, str]:
    """Returns the owner's path of each alias of a shared array, from the state.json of a checkpoint."""
    arrays = state.get("model", {}).get("arrays", {})
    return {path: facts["tied_to"] for path, facts in arrays.items() if facts.get("tied_to")}
