"""Initial weights of a new run from a trained model: `training.init_from`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core.config import Config, ImageDataConfig
from icenet.core.config.section import shown
from icenet.core.data.images import preprocess
from icenet.core.engine import Engine
from icenet.core.errors import ConfigError, WeightsError
from icenet.core.families import folder, vision
from icenet.core.families.keys import Values
from icenet.core.models.inference import lacks_tokenizer
from icenet.core.tokenizers import tokenizer_files
from icenet.core.training.changed_keys import of_model, value
from icenet.core.training.checkpoint import FOLDER, find
from icenet.core.training.open_model import open_trained
from icenet.core.weights import hub
from icenet.core.weights.origin import Origin


def apply(config: Config, engine: Engine) -> list[str]:
    """Sets the weights of `training.init_from`, if the configuration has it. Returns notes for the user.

    Raises:
        ConfigError: The path has no weights, or those of another model.
        CheckpointError, WeightsError: The path cannot be read.
    """
    path = config.training.init_from
    if path is None:
        return []
    source, weights = open_trained(Path(path), "training.init_from")
    try:
        engine.initialize(weights)
    except WeightsError as error:
        raise ConfigError(
            f"training.init_from: the weights of {path} do not fit the model: {error}; --set model.path={path} "
            "takes the model from there, too"
        ) from None
    notes = [f"the initial weights are those of {path}"]
    changes = [
        f"{key} is {shown(new)}, and {shown(old)} there"
        for key in of_model(source, config)
        if (new := value(config, key)) != (old := value(source, key))
    ]
    if changes:
        notes.append(
            f"{', '.join(changes)}, so the initial weights compute something else than they were trained to compute"
        )
    ours, theirs = (getattr(settings.data, "tokenizer", None) for settings in (config, source))
    origin = Origin.of(weights)
    if lacks_tokenizer(source, weights):
        theirs = None
    if ours != theirs and None not in (ours, theirs) and tokenizer_files(str(ours)) != tokenizer_files(str(theirs)):
        notes.append(
            f"data.tokenizer is {ours}, and that of {path} is another: the ids of tokens have other meanings"
        )
        origin = origin and replace(origin, token_ids={})
    engine.model.origin = origin and replace(origin, tokenizer=Path(ours).name if ours else "")
    return notes


def image_notes(config: Config, facts: Mapping[str, Any]) -> list[str]:
    """Returns what differs between the images of a new run and those of the model that it begins with.

    Args:
        config: The configuration.
        facts: `ImageFacts` of the run, as a dict.
    """
    given = config.training.init_from
    if given is None or not isinstance(config.data, ImageDataConfig):
        return []
    path = hub.local_path(Path(given))
    theirs = _images_of(path, facts["channels"])
    notes = []
    classes = theirs.get("classes", facts["classes"])
    if classes != facts["classes"] and len(classes) == len(facts["classes"]):
        notes.append(
            f"the classes are {_first_names(facts['classes'])}, and {_first_names(classes)} in {given}: the outputs "
            "have other meanings"
        )
    changed = [
        f"data.{name} is {_rounded(facts[name])}, and {_rounded(theirs[name])} in {given}"
        for name in ("mean", "std")
        if name in theirs and not np.allclose(facts[name], theirs[name], rtol=0, atol=1e-3)
    ]
    if changed:
        notes.append(f"{'; '.join(changed)}: the pixels have other values than the model was trained with")
    return notes


def _images_of(path: Path, channels: int) -> dict[str, Any]:
    """Returns the classes, the mean and the standard deviation of a model of images, as far as they are known."""
    if not folder.is_folder(path):
        is_saved = path.is_dir() and (path / "config.yaml").is_file() and not (path / "manifest.json").is_file()
        return {} if is_saved and not (path / FOLDER).is_dir() else dict(find(path).state.get("facts", {}))
    values = folder.read_json(path / folder.CONFIG)
    names = vision.labels(Values(values))
    found: dict[str, Any] = {} if names[0].startswith("LABEL_") else {"classes": names}  # names that mean nothing
    with contextlib.suppress(ConfigError):  # training needs no processor
        pixels = preprocess.read(path, str(values.get("model_type")), channels)
        zeros, ones = [0.0] * channels, [1.0] * channels
        scale = 255 * (1 if pixels.scale is None else pixels.scale)  # the values of our images are from 0 to 1
        found["mean"] = [value / scale for value in (zeros if pixels.mean is None else pixels.mean)]
        found["std"] = [value / scale for value in (ones if pixels.mean is None else pixels.std)]
    return found


def _rounded(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"


def _first_names(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
