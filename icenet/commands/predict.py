"""What `icenet predict` does: classifies image files with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core import backends
from icenet.core.data.images.augment import normalize
from icenet.core.data.images.dataset import ImageFacts
from icenet.core.data.images.files import image_files, read_image
from icenet.core.errors import CheckpointError, ConfigError, DataError, UsageError
from icenet.core.training import checkpoint

BATCH = 64  # images that are classified together


@dataclass(frozen=True)
class Predictions:
    """The probabilities of some images' classes.

    Attributes:
        images: the files.
        classes: the names of the classes.
        probabilities: float64 `[len(images), len(classes)]`.
        top_k: how many of an image's classes are told, the likeliest first.
    """

    images: list[Path]
    classes: list[str]
    probabilities: NDArray[np.float64]
    top_k: int = 3

    def ranked(self, row: int) -> list[tuple[str, float]]:
        """The likeliest classes of an image and their probabilities."""
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
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        table.add_column("image", overflow="fold")
        for place in range(min(self.top_k, len(self.classes))):
            table.add_column("class" if place == 0 else f"{place + 1}", style="bold" if place == 0 else "dim")
            table.add_column("", justify="right", style="bold" if place == 0 else "dim")
        for row, image in enumerate(self.images):
            cells = [cell for name, p in self.ranked(row) for cell in (name, f"{p:.1%}")]
            table.add_row(Text(str(image)), *map(Text, cells))  # a file's or folder's name is no markup
        Console().print(table)


def predict(
    run: Path, names: Sequence[Path], backend: str | None = None, device: str | None = None, top_k: int = 3
) -> Predictions:
    """Classifies image files, and all image files in folders, with a run or checkpoint.

    An image is resized, turned to grey or colour and normalized as in training; what that takes is stored with
    the checkpoint.

    Raises:
        UsageError: the run classifies no images, or there are none.
        DataError: a file is no image, or damaged.
    """
    found = checkpoint.find(run)
    if found.config.model.input_kind not in ("images", "anything"):
        raise UsageError(f"{run}: a {found.config.model.type} that reads {found.config.model.input_kind}, not images")
    stored, num_classes = found.path / "state.json", found.config.model.vocab_size
    try:
        facts = ImageFacts(**found.state.get("facts", {}))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{stored}: does not say how its images were read ({error})") from None
    if len(facts.classes) != num_classes:
        raise CheckpointError(f"{stored}: names {len(facts.classes)} classes, and the model has {num_classes}")
    files = [file for name in names for file in _files(name)]
    engine = backends.engine(found.config.with_overrides("model.compile_model=false"), backend, device)
    engine.set_weights(dict(found.weights))
    parts = []
    for first in range(0, len(files), BATCH):
        pixels = np.stack([read_image(f, facts.image_size, facts.channels) for f in files[first : first + BATCH]])
        parts.append(engine.forward({"inputs": normalize(pixels, facts.mean, facts.std)}))
    return Predictions(files, facts.classes, softmax(np.concatenate(parts)), top_k)


def _files(name: Path) -> list[Path]:
    if not name.is_dir():
        return [name]
    files = image_files(name)
    if not files:
        raise DataError(f"{name}: a folder without image files")
    return files


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities of logits `[..., K]`."""
    shifted = np.asarray(logits, np.float64)
    powers = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return result
