"""Writes a model as a folder of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from icenet.core.config import Config
from icenet.core.errors import CheckpointError, UsageError
from icenet.core.families import folder
from icenet.core.families.weights import ExportedWeights, OriginalWeights
from icenet.core.training import checkpoint, saved_model
from icenet.core.training.open_model import open_averaged, open_target
from icenet.core.weights import files as weight_files
from icenet.core.weights import hub
from icenet.core.weights.convert import PICKLED, Conversion, summary
from icenet.core.weights.files import Array, Progress
from icenet.core.weights.layout import RenamedWeights

FORM, MLX_LM = "hf", "mlx-lm"
FORMS = (FORM, MLX_LM)
"""A folder of Hugging Face, and one of mlx-lm: the same with names that its models accept."""
_WITHOUT_PREFIX = ("gpt2",)
"""Families whose tensors mlx-lm accepts under the names of the model without its head only."""


_STACKED = ".switch_mlp."
"""A part of the names that mlx-lm, and no class of `transformers`, has for the experts of a layer together."""


def export(
    source: Path,
    destination: Path,
    form: str = FORM,
    *,
    overwrite: bool = False,
    averaged: bool = False,
    max_shard_bytes: int | None = weight_files.MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Conversion:
    """Writes a folder that `from_pretrained` of `transformers`, or `mlx_lm.load`, loads.

    The dtype of the weights is kept. A folder of Hugging Face that is exported again has the same tensors, bit for
    bit.

    Args:
        source: A run, a checkpoint, a saved model, a folder of Hugging Face, a GGUF file or the id of a repository.
        destination: The folder.
        form: One of `FORMS`.
        overwrite: Whether to replace files of the same names.
        averaged: Whether to export the moving average of a run's weights.
        max_shard_bytes: Size above which the weights are split.
        progress: Called with (bytes done, bytes in total) after each array.

    Raises:
        UsageError: The destination is not a folder of its own, or a file would be replaced.
        ConfigError: No family has the options of the model.
        CheckpointError: The source has no weights.
        FileError: A file cannot be written.
    """
    source = hub.local_path(source)
    _check_destination(source, destination, form)
    imported = folder.read(source) if folder.is_importable(source) and not averaged else None
    config: Config
    weights: Mapping[str, Array] | None
    if imported is not None:
        config, weights = imported.config, imported.weights
    else:
        config, weights = open_averaged(source) if averaged else open_target(source)
    if weights is None:
        raise CheckpointError(f"{source}: contains no weights; give a run, a checkpoint or a saved model's folder")
    family, files, remarks = folder.files_for(config, weights, imported)
    if not overwrite:
        saved_model.refuse_replacing(destination, [weight_files.DEFAULT_NAME, *files], set())
    exported: Mapping[str, Array] = ExportedWeights(family, config, weights)
    if imported is not None and not (form == FORM and any(_STACKED in name for name in imported.weights.stored)):
        exported = OriginalWeights(imported.weights)
    metadata = {"format": "mlx"} if form == MLX_LM else None
    if form == MLX_LM and family.model_type in _WITHOUT_PREFIX:
        exported = RenamedWeights(exported, {name: name.removeprefix(family.prefix) for name in exported})
    written = weight_files.write(
        destination, exported, metadata, max_shard_bytes=max_shard_bytes, progress=progress, companions=files
    )
    left_out = imported.weights.left_out if imported is not None else []
    return Conversion(
        summary(source, FORM if imported is not None else "canonical", weights),
        summary(destination, form, exported),
        written,
        left_out,
        "; ".join([f"the family is {family.model_type}", *remarks]),
    )


def _check_destination(source: Path, destination: Path, form: str) -> None:
    if destination.suffix in (weight_files.SUFFIX, *PICKLED) and not destination.is_dir():
        raise UsageError(f"{destination}: the {form} form is a folder; name it without {destination.suffix}")
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"{destination}: is not a folder; choose another name")
    if source.resolve() == destination.resolve():
        raise UsageError(f"{destination}: source and destination are the same folder; name another destination")
    saved_model.check_not_a_run(destination)
    if (enclosing := checkpoint.enclosing(weight_files.target(destination))) is not None:
        raise UsageError(f"{destination}: is in the checkpoint {enclosing}; choose another place")
