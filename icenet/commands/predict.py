"""`icenet predict`: classifies image files with a trained model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icenet.core import backends
from icenet.core.config import Config, ImageModelConfig
from icenet.core.data.images import facts as images
from icenet.core.data.images import preprocess
from icenet.core.data.images.facts import ImageFacts
from icenet.core.data.images.files import frames_note
from icenet.core.data.images.folders import scan
from icenet.core.errors import CheckpointError, ConfigError, DataError, NonFiniteError, UsageError
from icenet.core.families import folder, vision
from icenet.core.families.keys import Values
from icenet.core.report.console import new_console
from icenet.core.runs import checkpoint
from icenet.core.runs.open_model import open_averaged, open_trained, warn_of_changed_code
from icenet.core.weights import hub
from icenet.core.weights.files import DEFAULT_NAME

BATCH_SIZE = 64

_log = logging.getLogger("icenet")


@dataclass(frozen=True)
class Predictions:
    """Probabilities of the classes of images.

    Attributes:
        images: The image files.
        classes: Names of the classes.
        probabilities: float64 `[len(images), len(classes)]`.
        top_k: Number of classes per image that are reported, the most likely first.
    """

    images: list[Path]
    classes: list[str]
    probabilities: NDArray[np.float64]
    top_k: int = 3

    def ranked(self, row: int) -> list[tuple[str, float]]:
        """Returns the `top_k` most likely classes of an image and their probabilities."""
        order = np.argsort(-self.probabilities[row], kind="stable")[: self.top_k]
        return [(self.classes[index], float(self.probabilities[row, index])) for index in order]

    def as_dict(self) -> list[dict[str, Any]]:
        return [
            {
                "image": str(image),
                "class": self.ranked(row)[0][0],
                "probabilities": [{"class": name, "probability": p} for name, p in self.ranked(row)],
            }
            for row, image in enumerate(self.images)
        ]

    def render(self) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table()
        table.add_column("image", overflow="fold")
        for place in range(min(self.top_k, len(self.classes))):
            table.add_column("class" if place == 0 else f"rank {place + 1}", style="bold" if place == 0 else "dim")
            table.add_column("", justify="right", style="bold" if place == 0 else "dim")
        for row, image in enumerate(self.images):
            cells = [cell for name, p in self.ranked(row) for cell in (name, f"{p:.1%}")]
            table.add_row(Text(str(image)), *map(Text, cells))  # Text: rich must not read names as markup
        new_console().print(table)


class Classifier(NamedTuple):
    """A model of images, and how its images are read."""

    config: Config
    weights: Mapping[str, NDArray[Any]]
    classes: list[str]
    read: Callable[[Path], tuple[NDArray[np.float32], bool]]
    """Returns the input of the model for a file, `[H, W, C]`, and whether the file has more frames."""


def predict(
    model: Path,
    names: Sequence[Path],
    backend: str | None = None,
    device: str | None = None,
    top_k: int = 3,
    averaged: bool = False,
    dtype: str | None = None,
) -> Predictions:
    """Classifies images with a trained model. They are read, resized and normalized as in training.

    Args:
        model: A run, a checkpoint, a saved model, or a folder of Hugging Face with its `preprocessor_config.json`.
        names: Image files, and folders of image files.
        backend: "mlx", "torch" or "auto"; None is the backend of the run.
        device: The device; None is that of the run.
        top_k: Number of classes per image that are reported.
        averaged: Whether to use the moving average of the weights (`training.ema_decay`).
        dtype: fp32, bf16 or fp16 of the arithmetic; None is `training.mixed_precision` of the run.

    Raises:
        UsageError: The model does not classify images, or images of this size.
        CheckpointError: The checkpoint is damaged, has no averaged weights, or does not contain how its images were
            read.
        ConfigError: The folder does not say how its images are read, or in a way that is not supported.
        DataError: A file is not an image or is damaged, or a folder contains no images.
        NonFiniteError: The logits of an image are NaN or infinite.
    """
    model = hub.local_path(model)
    is_run = (model / checkpoint.FOLDER).is_dir() or (model / "manifest.json").is_file()
    is_imported = folder.is_folder(model) and not is_run
    found = _open_folder(model, averaged) if is_imported else _open_run(model, averaged)
    files = [file for name in names for file in _files(name)]
    precision = dtype or found.config.training.mixed_precision
    changes = "model.compile_model=false", f"training.mixed_precision={precision}"
    engine = backends.engine(found.config.with_overrides(*changes), backend, device)
    engine.set_weights(dict(found.weights))
    logits, with_more_frames = [], []
    for first in range(0, len(files), BATCH_SIZE):
        part = files[first : first + BATCH_SIZE]
        inputs = []
        for file in part:
            try:
                image, has_more = found.read(file)
            except ConfigError as error:
                raise ConfigError(f"{model}: {error}") from None
            inputs.append(image)
            if has_more:
                with_more_frames.append(file)
            if problem := _size_problem(found.config, *image.shape[:2]):
                raise UsageError(f"{file}: {problem}; {folder.PREPROCESSOR} gives it this size")
        together = [np.stack(inputs)] if len({image.shape for image in inputs}) == 1 else [i[None] for i in inputs]
        logits.append(np.concatenate([engine.forward({"inputs": batch}) for batch in together]))
        wrong = np.flatnonzero(~np.isfinite(logits[-1]).all(axis=-1))
        if wrong.size:
            reason = engine.model.explain_non_finite()
            raise NonFiniteError(f"{files[first + int(wrong[0])]}: the logits are not finite: {reason}")
    for note in frames_note(with_more_frames):
        _log.warning(note)
    return Predictions(files, found.classes, softmax(np.concatenate(logits)), top_k)


def _open_run(run: Path, averaged: bool) -> Classifier:
    has_steps = (run / checkpoint.FOLDER).is_dir() or (run / checkpoint.MANIFEST).is_file()
    if not has_steps and (run / "config.yaml").is_file() and (run / DEFAULT_NAME).is_file():
        return _open_saved(run, averaged)
    found = checkpoint.find(run)
    if found.config.model.input_kind not in ("images", "anything"):
        raise UsageError(f"{run}: its {found.config.model.type} reads {found.config.model.input_kind}, not images")
    if found.config.data.kind in ("text", "chat"):
        raise UsageError(f"{run}: was trained with data.kind {found.config.data.kind}, not with images")
    stored, num_classes = found.path / "state.json", found.config.model.vocab_size
    try:
        facts = ImageFacts(**found.state.get("facts", {}))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{stored}: does not contain how its images were read ({error})") from None
    if len(facts.classes) != num_classes:
        raise CheckpointError(f"{stored}: has {len(facts.classes)} classes, but the model has {num_classes}")
    if not averaged:  # open_averaged does
        warn_of_changed_code(found)
    weights = open_averaged(found.path)[1] if averaged else found.weights
    return Classifier(found.config, weights, facts.classes, facts.read)


def _open_saved(path: Path, averaged: bool) -> Classifier:
    config, weights = open_trained(path, "predict")
    if config.model.input_kind not in ("images", "anything"):
        raise UsageError(f"{path}: its {config.model.type} reads {config.model.input_kind}, not images")
    if averaged:
        raise UsageError(f"{path}: --averaged has no effect: only runs have averaged weights")
    facts = images.of_saved(path)
    if facts is None:
        raise UsageError(
            f"{path}: has no {images.FILE}, which says how its images are read; give the run, the checkpoint or the "
            "Hugging Face folder that it was made from, or save it from there again"
        )
    if len(facts.classes) != config.model.vocab_size:
        raise ConfigError(
            f"{path / images.FILE}: has {len(facts.classes)} classes, but the model has {config.model.vocab_size}"
        )
    return Classifier(config, weights, facts.classes, facts.read)


def _open_folder(path: Path, averaged: bool) -> Classifier:
    imported = folder.read(path)
    config = imported.config.model
    if not isinstance(config, ImageModelConfig):
        raise UsageError(f"{path}: its {imported.family.model_type} reads {config.input_kind}, not images")
    if averaged:
        raise UsageError(f"{path}: --averaged has no effect: only runs have averaged weights")
    classes = vision.labels(Values(imported.values))
    processor = preprocess.read(path, imported.family.model_type, config.image_channels)
    return Classifier(
        imported.config, imported.weights, classes, lambda file: processor.read(file, config.image_channels)
    )


def _size_problem(config: Config, height: int, width: int) -> str:
    return config.model.size_problem(height, width) if isinstance(config.model, ImageModelConfig) else ""


def _files(name: Path) -> list[Path]:
    if not name.is_dir():
        return [name]
    found = scan(name)
    if not found.folder.has_images:
        raise DataError(f"{name}: contains no image files" + (f" ({found.notes[0]})" if found.notes else ""))
    for note in found.notes:
        _log.warning(note)
    return found.folder.all_images()


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the softmax of logits `[..., K]` over the last axis."""
    shifted = np.asarray(logits, np.float64)
    powers = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return result
