"""Writes a model as a folder of Hugging Face or mlx-lm, or as a GGUF file."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icenet.core.config import Config, TransformerConfig
from icenet.core.errors import CheckpointError, ConfigError, DataError, MissingCheckpointError, UsageError
from icenet.core.families import Family, folder, gguf_export, json_files, mlx_lm
from icenet.core.families.tensors import Row
from icenet.core.families.weights import ExportedWeights, OriginalWeights
from icenet.core.files import output_file, staged
from icenet.core.models.inference import quantized
from icenet.core.runs import checkpoint, saved_model
from icenet.core.runs.open_model import WITH_WEIGHTS, image_facts, open_averaged, open_target, with_tokenizer
from icenet.core.tokenizers import gguf as gguf_tokenizer
from icenet.core.tokenizers import tokenizer_files
from icenet.core.tokenizers.base import TOKENIZER_FILE
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.weights import files as weight_files
from icenet.core.weights import hub
from icenet.core.weights.arrays import RenamedWeights
from icenet.core.weights.convert import PICKLED, Conversion, Summary, summary
from icenet.core.weights.files import Array, Progress
from icenet.core.weights.gguf import SUFFIX as GGUF_SUFFIX
from icenet.core.weights.packed import PackedWeights, packed_of
from icenet.core.weights.quantization import describe, settings_of
from icenet.core.weights.quantized import KEYS as QUANTIZATION_KEYS

FORM, MLX_LM = "hf", "mlx-lm"
FORMS = (FORM, MLX_LM, *gguf_export.KINDS)
"""A folder of Hugging Face; one of mlx-lm, the same with names that its models accept; and files of llama.cpp."""
_WITHOUT_PREFIX = ("gpt2",)
"""Families whose tensors mlx-lm accepts under the names of the model without its head only."""
_OF_MLX_LM = re.compile(r".*\.switch_mlp\..*|model\.(wte|h|embed_in)\..*")
"""Names of mlx-lm that no class of `transformers` has: of the experts of a layer together, GPT-2 and GPT-NeoX."""


def export(
    source: Path,
    destination: Path,
    form: str = FORM,
    *,
    overwrite: bool = False,
    averaged: bool = False,
    max_shard_bytes: int | None = weight_files.MAX_SHARD_BYTES,
    progress: Progress | None = None,
    quantize: int | None = None,
    group_size: int | None = None,
) -> Conversion:
    """Writes a folder that `from_pretrained` of `transformers`, or `mlx_lm.load`, loads, or a file for llama.cpp.

    A folder keeps the dtype of the weights. A folder of Hugging Face that is exported again has the same
    tensors, bit for bit. Quantized layers stay quantized in a folder of mlx-lm, and are dequantized in others.

    Args:
        source: A run, a checkpoint, a saved model, a folder of Hugging Face, a GGUF file or the id of a repository.
        destination: The folder or file.
        form: One of `FORMS`.
        overwrite: Whether to replace files of the same names.
        averaged: Whether to export the moving average of a run's weights.
        max_shard_bytes: Size above which the weights are split.
        progress: Called with (bytes done, bytes in total) after each array.
        quantize: Number of bits to which linear layers and embeddings are quantized, for a folder of mlx-lm.
        group_size: Number of values that share a scale and a bias, with `quantize`: 32, 64 or 128; by default 64.

    Raises:
        UsageError: The destination is not a folder of its own, a file would be replaced, or the settings of the
            quantization fit no layer.
        ConfigError: No family has the options of the model.
        CheckpointError: The source has no weights, or (MissingCheckpointError) does not exist.
        FileError: A file cannot be written.
    """
    if form != MLX_LM and (quantize is not None or group_size is not None):
        raise UsageError(f"--quantize: is for --to {MLX_LM}, and has no effect with --to {form}")
    source = hub.local_path(source)
    if not source.exists():
        raise MissingCheckpointError(f"{source}: no such file or folder; {WITH_WEIGHTS}")
    _check_destination(source, destination, form)
    imported, config, weights = _open(source, averaged)
    _check_model(config, form)
    stored: Any = packed_of(weights) or weights
    weights = quantized(config, weights, quantize, group_size)
    is_of_images = config.model.input_kind == "images"
    images = _image_files(source, config) if imported is None and is_of_images else None
    family, files, remarks = folder.files_for(config, weights, imported, images)
    if is_of_images and (problem := images_problem(source)):
        remarks.append(problem)
    notes: list[str] = []
    if form != MLX_LM and (packed := packed_of(weights)) is not None:
        notes.append(f"the weights are dequantized: {describe(packed.layers)} in the source")
    if form in gguf_export.KINDS:
        destination = output_file(destination, overwrite=overwrite, inputs=[source] if source.is_file() else [])
        return _export_gguf(source, source_form(imported), destination, form, config, family, weights, files, notes)
    if not overwrite:
        saved_model.refuse_replacing(destination, [weight_files.DEFAULT_NAME, *files], set())
    exported, quantization, remarks_on_names = _tensors(form, imported, family, config, weights)
    if quantization is not None:
        values = json.loads(files[folder.CONFIG])
        files[folder.CONFIG] = json_files.to_bytes(values | dict.fromkeys(QUANTIZATION_KEYS, quantization))
    if form == MLX_LM and isinstance(config.model, TransformerConfig):
        notes += mlx_lm.differences(family, config.model)
    metadata = {"format": "mlx"} if form == MLX_LM else None
    written = weight_files.write(
        destination, exported, metadata, max_shard_bytes, progress, companions=files, durable=False
    )
    left_out = imported.weights.left_out if imported is not None else []
    return Conversion(
        summary(source, source_form(imported), stored),
        summary(destination, form, exported),
        written,
        left_out,
        "; ".join([f"the family is {family.model_type}", *remarks, *notes, *remarks_on_names]),
    )


def _open(source: Path, averaged: bool) -> tuple[folder.Folder | None, Config, Mapping[str, Array]]:
    """Returns the imported folder or file, if the source is one, and the configuration and the weights of a model."""
    imported = folder.read(source) if folder.is_importable(source) and not averaged else None
    config: Config
    weights: Mapping[str, Array] | None
    if imported is not None:
        config, weights = imported.config, imported.weights
    else:
        config, weights = open_averaged(source) if averaged else open_target(source)
    if weights is None:
        raise CheckpointError(f"{source}: contains no weights; {WITH_WEIGHTS}")
    return imported, with_tokenizer(config, weights), weights


def _check_model(config: Config, form: str) -> None:
    """Raises UsageError if models of this kind cannot have a form."""
    if form != FORM and config.model.input_kind == "images":
        raise UsageError(
            f"--to {form}: is for models of text, and a {config.model.type} classifies images; use --to {FORM}"
        )
    if form == MLX_LM and not getattr(config.model, "causal", True):
        raise UsageError(f"--to {form}: mlx-lm has no encoders (model.causal is false); use --to {FORM}")


def _tensors(
    form: str, imported: folder.Folder | None, family: Family, config: Config, weights: Mapping[str, Array]
) -> tuple[Mapping[str, Array], dict[str, Any] | None, list[str]]:
    """Returns the tensors of a folder by name, the settings of quantized layers if there are any, and remarks."""
    if form == MLX_LM and (packed := packed_of(weights)) is not None:
        return *_packed(family, config, packed), [f"quantized: {describe(packed.layers)}"]
    is_kept = imported is not None and not any(_OF_MLX_LM.fullmatch(name) for name in imported.weights.stored)
    exported: Mapping[str, Array]
    if imported is not None and (is_kept or form == MLX_LM):
        exported = OriginalWeights(imported.weights)
    else:
        exported = ExportedWeights(family, config, weights)
    if family.model_type not in _WITHOUT_PREFIX:
        return exported, None, []
    if _loses_prefix(form, config, imported if is_kept else None):
        return RenamedWeights(exported, {name: name.removeprefix(family.prefix) for name in exported}), None, []
    remarks = []
    if _is_tied(config) and next(iter(exported)).startswith(family.prefix):
        remarks.append(f"mlx-lm does not read names that begin with {family.prefix}; use --to {MLX_LM} for it")
    return exported, None, remarks


def _packed(family: Family, config: Config, weights: PackedWeights) -> tuple[ExportedWeights, dict[str, Any]]:
    """Returns packed weights under the names that the classes of mlx-lm have, and the settings for config.json.

    mlx-lm changes the names and axes of floating weights when it loads a folder, but not those of packed ones.
    """
    alternative = next((rows for rows in family.alternatives if _is_of_mlx_lm(rows)), ())
    exported = ExportedWeights(family, config, weights, alternative)
    return exported, settings_of(exported.quantized_layers(weights.layers))


def _is_of_mlx_lm(rows: Sequence[Row]) -> bool:
    names = [row.name_of("0", "weight") for row in rows]
    return any(_OF_MLX_LM.fullmatch(name) for name in names)


def _loses_prefix(form: str, config: Config, kept: folder.Folder | None) -> bool:
    """Returns whether names are written without a prefix, as in published GPT-2. `transformers` reads both.

    Args:
        form: The form of the folder.
        config: The configuration of the model.
        kept: The imported folder or file, if it is exported with its tensors.
    """
    if form == MLX_LM:
        return True
    # with a head the library adds the prefix to no name
    return _is_tied(config) and (kept is None or kept.path.is_file())


def _is_tied(config: Config) -> bool:
    return bool(getattr(config.model, "tie_embeddings", False))


def source_form(imported: folder.Folder | None) -> str:
    """Returns the form of what was read, for a summary."""
    return "canonical" if imported is None else "gguf" if imported.path.is_file() else FORM


def _export_gguf(
    source: Path,
    form_of_source: str,
    destination: Path,
    form: str,
    config: Config,
    family: Family,
    weights: Mapping[str, Array],
    files: Mapping[str, bytes],
    notes: Sequence[str],
) -> Conversion:
    """Writes a GGUF file, with the tokenizer and the chat template."""
    remarks = [f"the family is {family.model_type}", *notes]
    tokenizer: dict[str, Any] = {}
    vocab_size = getattr(config.model, "vocab_size", 0)
    if TOKENIZER_FILE not in files:  # a folder with other files of a tokenizer
        files = {**files, **tokenizer_files(getattr(config.data, "tokenizer", ByteTokenizer.name))}
    if TOKENIZER_FILE not in files:
        remarks.append("the model has no tokenizer that llama.cpp's files can have")
    else:
        try:
            tokenizer = gguf_tokenizer.metadata_of(files, vocab_size, config.generation.eos_token_id or [])
        except DataError as error:
            remarks.append(f"the tokenizer is left out: {error}")
    with staged(destination, durable=False) as stage, stage.open(destination) as file:
        kind = gguf_export.KINDS[form]
        written = gguf_export.write(Path(file.name), family, config, weights, tokenizer, kind)
    kinds = Counter(kind for kind, _ in written.values())
    values = sum(math.prod(shape) for _, shape in written.values())
    size = destination.stat().st_size
    return Conversion(
        summary(source, form_of_source, weights),
        Summary(destination, form, len(written), values, size, dict(kinds)),
        [destination],
        [],
        "; ".join(remarks),
    )


def _image_files(source: Path, config: Config) -> folder.ImageFiles | None:
    """Returns how a model reads its images, and the names of its classes, as far as they are known."""
    facts = image_facts(source)
    return facts.files() if facts is not None and len(facts.classes) == config.model.vocab_size else None


def images_problem(source: Path) -> str:
    """Returns why `icenet predict` will refuse a model of images at a path; empty if it will not."""
    where = ""
    try:
        facts = image_facts(source)
        where = f"{folder.PREPROCESSOR}: "  # messages of the processor do not name its file
        if facts is not None:
            _ = facts.processor
    except ConfigError as error:
        return f"icenet predict does not read images for it: {where}{error}"
    return ""


def _check_destination(source: Path, destination: Path, form: str) -> None:
    if form in gguf_export.KINDS:
        if destination.suffix != GGUF_SUFFIX or destination.is_dir():
            raise UsageError(f"{destination}: the {form} form is a file whose name ends in {GGUF_SUFFIX}")
        if (enclosing := checkpoint.enclosing(destination)) is not None:
            raise UsageError(f"{destination}: is in the checkpoint {enclosing}; choose another place")
        return
    if destination.suffix in (weight_files.SUFFIX, *PICKLED) and not destination.is_dir():
        raise UsageError(f"{destination}: the {form} form is a folder; name it without {destination.suffix}")
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"{destination}: is not a folder; choose another name")
    if source.resolve() == destination.resolve():
        raise UsageError(f"{destination}: source and destination are the same folder; name another destination")
    saved_model.check_not_a_run(destination)
    saved_model.check_apart(source, destination)
    if (enclosing := checkpoint.enclosing(weight_files.target(destination))) is not None:
        raise UsageError(f"{destination}: is in the checkpoint {enclosing}; choose another place")
