"""Initial weights of a new run from a trained model: `training.init_from`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core.config import Config, ImageDataConfig, ImageModelConfig
from icenet.core.config.section import shown
from icenet.core.data.datasets import Dataset
from icenet.core.data.images.facts import ImageFacts, describe_statistics
from icenet.core.data.user import UserDataset
from icenet.core.engine import Engine
from icenet.core.errors import ConfigError, WeightsError
from icenet.core.models.inference import lacks_tokenizer
from icenet.core.runs.open_model import image_facts, open_trained
from icenet.core.tokenizers import tokenizer_files
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.training.notices.changed_keys import of_model, value
from icenet.core.weights.origin import Origin
from icenet.core.weights.packed import packed_of
from icenet.core.weights.quantization import describe

HEAD = ("output", "distillation_output")
"""Beginnings of the paths of a classifier's output layers."""


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
    notes = [f"the initial weights are those of {path}"]
    if (packed := packed_of(weights)) is not None:
        notes.append(
            f"{describe(packed.layers)} there; training is not quantized and begins with dequantized weights"
        )
    used: Mapping[str, np.ndarray[Any, Any]] = weights
    if config.training.new_head:
        used = {**{name: weights[name] for name in weights if not _is_of_head(name)}, **_new_head(config, engine)}
        counts = f"{config.model.vocab_size:,} classes, and {source.model.vocab_size:,} there"
        notes.append(f"the output layer has new initial values (training.new_head): {counts}")
    try:
        engine.initialize(used)
    except WeightsError as error:
        raise ConfigError(
            f"training.init_from: the weights of {path} do not fit the model: {error}; "
            f"{_remedy(config, source, path)}"
        ) from None
    changes = [
        f"{key} is {shown(new)}, and {shown(old)} there"
        for key in of_model(source, config)
        if not (config.training.new_head and key == "model.vocab_size")
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


def _is_of_head(name: str) -> bool:
    return name.partition(".")[0] in HEAD


def _new_head(config: Config, engine: Engine) -> dict[str, np.ndarray[Any, Any]]:
    """Returns the initial values of the output layer: those of a new model, the same on both backends."""
    paths = {name for name in engine.model.weight_shapes() if _is_of_head(name)}
    return dict(engine.model.initial_weights(config.seed, paths=paths))


def _remedy(config: Config, source: Config, path: str) -> str:
    """Returns what the user can do about weights that do not fit the model."""
    if not isinstance(config.model, ImageModelConfig) or not isinstance(source.model, type(config.model)):
        return f"--set model.path={path} takes the model from there, too"
    keys = [key for key in of_model(source, config) if value(config, key) != value(source, key)]
    differ = ", ".join(f"{key} is {shown(value(config, key))}, and {shown(value(source, key))} there" for key in keys)
    if "model.vocab_size" in keys and not config.training.new_head:
        return f"{differ}; training.new_head=true gives the output layer new initial values"
    return f"{differ}; --set model.path={path} takes the model from there, too"


def image_notes(config: Config, facts: Mapping[str, Any]) -> list[str]:
    """Returns what differs between the images of a new run and those of the model that it begins with.

    Args:
        config: The configuration.
        facts: `Dataset.facts` of the run: `ImageFacts` as a dict, unless the data are given in Python.
    """
    given = config.training.init_from
    if given is None or not isinstance(config.data, ImageDataConfig):
        return []
    try:
        ours = ImageFacts(**facts)
    except (ConfigError, TypeError):  # those of the user's data
        return []
    theirs = image_facts(Path(given))
    if theirs is None:
        return []
    notes = []
    has_names = theirs.classes[:1] != ["LABEL_0"]  # names that mean nothing
    if has_names and not config.training.new_head and theirs.classes != ours.classes:
        notes.append(
            f"the classes are {_first_names(ours.classes)}, and {_first_names(theirs.classes)} in {given}: the "
            "outputs have other meanings"
        )
    try:
        statistics = theirs.statistics()
    except ConfigError:  # training needs no processor
        statistics = None
    changed = [
        f"data.{name} is {describe_statistics(own)}, and {describe_statistics(other)} in {given}"
        for name, own, other in zip(("mean", "std"), ours.statistics() or (), statistics or (), strict=False)
        if len(own) != len(other) or not np.allclose(own, other, rtol=0, atol=1e-3)
    ]
    if changed:
        notes.append(f"{'; '.join(changed)}: the pixels have other values than the model was trained with")
    return notes


def facts_for(config: Config, dataset: Dataset) -> list[str]:
    """Gives data of the user without facts those of the model that a run begins with. Returns notes for the user."""
    given = config.training.init_from
    is_about_images = isinstance(config.model, ImageModelConfig) and not config.training.new_head
    if given is None or not isinstance(dataset, UserDataset) or dataset.facts or not is_about_images:
        return []
    facts = image_facts(Path(given))
    if facts is None or len(facts.classes) != config.model.vocab_size:
        return []
    dataset.facts = facts.model_dump(exclude_none=True)
    return [f"the names of the classes, and how icenet predict reads images, are those of {given}"]


def files_for(config: Config, dataset: Dataset) -> None:
    """Gives data of the user without files those of the tokenizer of the model that a run begins with."""
    given = config.training.init_from
    if given is None or not isinstance(dataset, UserDataset) or dataset.files or config.model.input_kind == "images":
        return
    source, weights = open_trained(Path(given), "training.init_from", warn=False)
    if not lacks_tokenizer(source, weights):
        dataset.files = tokenizer_files(getattr(source.data, "tokenizer", ByteTokenizer.name))


def _first_names(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
