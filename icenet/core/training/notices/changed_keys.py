"""Keys that change when a run continues, and what that means for it, for notes at the start of training."""

from __future__ import annotations

from typing import Any

from icenet.core.config import ChatDataConfig, Config, DataConfig
from icenet.core.config.section import shown
from icenet.core.data.datasets import Dataset, sequence_length
from icenet.core.data.images.dataset import ImageDataset

_SAME_FUNCTION = {"type", "dropout", "router_aux_loss_coef", "compile_model"}
"""Keys of `model` that do not change what the trained weights compute. Another type has other weights."""
_ORDER = ["seed", "training.batch_size", "data.seq_length", "data.packing"]
"""Keys on which the training data of a step depend."""


def notes(before: Config, after: Config, step: int, dataset: Dataset, *, same_data: bool) -> list[str]:
    """Returns what the user should know about the keys that changed.

    Args:
        before: The configuration of the checkpoint.
        after: That of the continuation.
        step: Number of completed steps.
        dataset: The data of the continuation.
        same_data: Whether the run was trained on this data before.
    """
    found = []
    if after.training.init_from != before.training.init_from:
        found.append(
            f"training.init_from has no effect from step {step + 1} on: a new run begins with weights of a model"
        )
    if after.training.new_head != before.training.new_head:
        found.append(f"training.new_head has no effect from step {step + 1} on: it is about initial values")
    unit = "images" if dataset.unit == "img" else "text"
    meanings = [(of_model(before, after), "the weights compute something else than they were trained to compute")]
    if same_data:
        meanings += [
            (_ORDER, f"the training data has another order: some {unit} will be read again, and some left out"),
            (_of_overlap(before, after, dataset), f"the validation data contains {unit} that the run was trained on"),
        ]
    for keys, meaning in meanings:
        changes = [
            f"{key} is {shown(new)} from step {step + 1}, and was {shown(old)} before"
            for key in keys
            if (new := value(after, key)) != (old := value(before, key))
        ]
        if changes:
            found.append(f"{', '.join(changes)}, so {meaning}")
    return found


def of_model(before: Config, after: Config) -> list[str]:
    """Returns the keys of `model` that decide what the weights compute."""
    keys = {**before.model.model_dump(), **after.model.model_dump()}
    return [f"model.{key}" for key in keys if key not in _SAME_FUNCTION]


def _of_overlap(before: Config, after: Config, dataset: Dataset) -> list[str]:
    """Returns the keys whose change moves training data into the validation part."""
    if next(iter(dataset.validation_batches(1, 1)), None) is None:
        return []
    is_images = isinstance(dataset, ImageDataset)
    if isinstance(dataset, ImageDataset) and dataset.source.held_out:  # a validation part of its own
        return []
    fractions = [getattr(config.data, "validation_fraction", 0) for config in (before, after)]
    is_larger = fractions[1] > fractions[0]
    return [*(["seed"] if is_images else []), *(["data.validation_fraction"] if is_larger else [])]


def value(config: Config, key: str) -> Any:
    """Returns the value of a key, such as `model.dropout`; None if the section has none."""
    if key == "data.seq_length" and isinstance(config.data, (DataConfig, ChatDataConfig)):
        return sequence_length(config)
    section, _, name = key.rpartition(".")
    return (getattr(config, section) if section else config).model_dump().get(name)
