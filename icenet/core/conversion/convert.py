"""Converts the weights of any model that IceNet opens: the same for `icenet convert` and `icenet.convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from icenet.core import backends
from icenet.core.config import Config, ImageModelConfig, custom
from icenet.core.conversion import export
from icenet.core.errors import UsageError
from icenet.core.families import folder, sentence_transformers, torchvision
from icenet.core.models import port_weights
from icenet.core.models.ported import NET
from icenet.core.runs import checkpoint, saved_model
from icenet.core.runs.open_model import image_facts, open_averaged
from icenet.core.tokenizers import tokenizer_files
from icenet.core.weights import hub
from icenet.core.weights.convert import FORMS, Conversion, convert, destination_file, refuse_existing
from icenet.core.weights.files import DEFAULT_NAME
from icenet.core.weights.packed import packed_of
from icenet.core.weights.quantization import describe

_OF_A_MODEL = ("model", "kinds", "shapes", "names", "shared", "aliases", "arrays", "companions")
"""Arguments of `convert` that determine a model in Python."""


def convert_model(
    source: Path,
    destination: Path,
    to: str,
    *,
    source_form: str | None = None,
    config: str | Path | Config | None = None,
    key: str | None = None,
    strip_prefix: str | Sequence[str] = (),
    averaged: bool = False,
    overwrite: bool = False,
    quantize: int | None = None,
    group_size: int | None = None,
    **options: Any,
) -> Conversion:
    """Converts weights with the layer kinds and shapes of their config.

    Args:
        source: A file or folder of weights, a run (its newest intact checkpoint), a folder of Hugging Face, a GGUF
            file, or the id of a repository.
        destination: A file or a folder. In a folder the canonical form gets a config.yaml, for `icenet.load`.
        to: "canonical", "mlx" or "torch"; "hf", a folder of Hugging Face, or another form of `export.FORMS`; or
            "torchvision", a state dict with its names. Such a state dict is recognized as a source, too.
        source_form: The form of the source; None detects it. With it or `config`, the names in a folder of Hugging
            Face are kept.
        config: A configuration, a YAML file or the name of a preset; None uses the config.yaml next to the source,
            if there is one.
        key: Key of the state dict in a file of `torch.save` that holds more.
        strip_prefix: Prefixes to remove from the names of the weights.
        averaged: Whether to convert the moving average of a run's weights (`training.ema_decay`).
        overwrite: Whether to replace existing files.
        quantize, group_size: How layers are quantized; see `export.export`.
        options: Arguments of `icenet.core.weights.convert.convert`. With `model`, or its kinds of layers and shapes,
            no config is looked for, and the source is a file or folder of weights.

    Returns:
        What was read and written.

    Raises:
        UsageError: The form or an option is wrong, or a file would be replaced.
        ConfigError: The new form cannot express the model.
        WeightsError: The weights are damaged, or are not those of the config.
        FileError: A file cannot be written.
    """
    forms = (*FORMS, *export.FORMS, torchvision.FORM)
    if to not in forms:
        raise UsageError(f"unknown form {to!r}; give one of {', '.join(forms)}")
    source = hub.local_path(source)
    if to in export.FORMS:
        given = {"--from": source_form, "--config": config, "--key": key, "--strip-prefix": strip_prefix}
        if unused := [option for option, value in given.items() if value]:
            raise UsageError(f"{', '.join(unused)}: has no effect with --to {to}; the source's own config is used")
        options |= {"overwrite": overwrite, "averaged": averaged, "quantize": quantize, "group_size": group_size}
        return export.export(source, destination, to, **options)
    if quantize is not None or group_size is not None:
        raise UsageError(f"--quantize: is for --to {export.MLX_LM}, and has no effect with --to {to}")
    common = {"source_form": source_form, "key": key, "strip_prefix": strip_prefix, "overwrite": overwrite, **options}
    if any(options.get(name) is not None for name in _OF_A_MODEL):
        own = getattr(options.get("model"), "config", None)
        settings = Config(model=own) if isinstance(own, ImageModelConfig) else None
        return convert(source, destination, **torchvision.translations(settings, source, destination, to), **common)
    return _convert_by_config(source, destination, to, config, averaged, common)


def _convert_by_config(
    source: Path,
    destination: Path,
    to: str,
    config: str | Path | Config | None,
    averaged: bool,
    common: dict[str, Any],
) -> Conversion:
    """Converts weights whose config is given, next to them, or in their folder of Hugging Face.

    Args:
        source, destination, to, config, averaged: See `convert_model`.
        common: The other arguments of `convert`.
    """
    in_folder = destination.is_dir() or not destination.suffix
    if in_folder:
        saved_model.check_apart(source, destination)
    if (source / checkpoint.FOLDER).is_dir():
        source = checkpoint.find(source).path
    if averaged:
        common["arrays"] = open_averaged(source)[1]
    keeps_names = bool(config or averaged or any(common[name] for name in ("source_form", "key", "strip_prefix")))
    imported, settings, stored = _find_config(source, config, keeps_names)
    if imported is not None:
        common |= {"arrays": imported.weights, "source_form": "canonical"}
    if settings is not None:
        model = backends.meta_model(settings)
        common |= {"kinds": model.layer_kinds(), "shapes": model.weight_shapes(), "names": model.mlx_names()}
        common["shared"] = model.shared_arrays()
        if custom.has_port(settings.model):
            of_port = port_weights.mlx_facts(settings.model, NET, common["kinds"])
            common |= {"kinds": of_port.kinds, "names": of_port.names, "aliases": of_port.aliases}
    translations = torchvision.translations(settings, source, destination, to)
    notes = [f"the names are IceNet's, not those of {imported.family.model_type}"] if imported else []
    if imported is not None and (packed := packed_of(imported.weights)) is not None:
        notes.append(f"the weights are dequantized: {describe(packed.layers)} in the source")
    if to == torchvision.FORM:
        to, notes = translations["to"], [f"the names are those of {to}"]
    _check_target(source, destination_file(destination, to), in_folder, common["overwrite"])
    if settings is not None and to == "canonical" and in_folder:
        companions = _companions(settings, stored, destination)
        if config is None and settings.model.input_kind in ("images", "anything"):
            images = saved_model.image_file(image_facts(source), settings.model)
            companions = {**images, **companions}  # config.yaml is the last
            notes += [problem] if (problem := export.images_problem(source)) else []
        if not common["overwrite"]:
            saved_model.refuse_replacing(destination, list(companions), set())
        common["companions"] = companions
    metadata = {**saved_model.code_metadata(checkpoint.code_of(source)), **(common.pop("metadata", None) or {})}
    if imported is not None:
        metadata |= imported.weights.metadata
    done = convert(source, destination, metadata=metadata, **translations, **common)
    if imported is not None:
        done = replace(done, source=replace(done.source, form=export.source_form(imported)))
    return replace(done, note="; ".join(note for note in (done.note, *notes) if note))


def _find_config(
    source: Path, config: str | Path | Config | None, keeps_names: bool
) -> tuple[folder.Folder | None, Config | None, Path | None]:
    """Returns the imported folder, unless its names are kept, the configuration, and the file that has it."""
    if not keeps_names and folder.is_known(source):
        imported = folder.read(source)
        return imported, imported.config, None
    if isinstance(config, Config):
        return None, config, None
    if config is not None:
        return None, Config.from_yaml(config), Path(config)
    stored = (source if source.is_dir() else source.parent) / "config.yaml"
    return None, Config.from_yaml(stored, trust_code=False) if stored.is_file() else None, stored


def _check_target(source: Path, target: Path, in_folder: bool, overwrite: bool) -> None:
    """Raises UsageError if the file to write is there already, or belongs to a run or a checkpoint."""
    refuse_existing(source, target, overwrite)
    if in_folder or target.name.startswith(Path(DEFAULT_NAME).stem):
        saved_model.check_not_a_run(target.parent)
    if (enclosing := checkpoint.enclosing(target)) is not None:
        raise UsageError(f"{target}: is in the checkpoint {enclosing}; choose another place")


def _companions(settings: Config, stored: Path | None, destination: Path) -> dict[str, bytes]:
    """Returns the files of the config, of the tokenizer and of `embedding.dense`, unless they are there already."""
    new = destination / "config.yaml"
    if stored is not None and new.exists() and stored.resolve() == new.resolve():
        return {}
    files = tokenizer_files(getattr(settings.data, "tokenizer", "bytes"))
    return checkpoint.config_files(settings, {**files, **sentence_transformers.dense_files(settings.embedding)})
