"""`icenet convert`: converts the weights of a model between the forms of MLX and PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from icenet.core import backends
from icenet.core.config import Config
from icenet.core.errors import UsageError
from icenet.core.families import folder, torchvision
from icenet.core.tokenizers import tokenizer_files
from icenet.core.training import checkpoint, export_model, saved_model
from icenet.core.training.open_model import open_averaged
from icenet.core.weights.convert import Conversion, convert, destination_file, refuse_existing
from icenet.core.weights.files import DEFAULT_NAME, Array


def convert_model(
    source: Path,
    destination: Path,
    to: str,
    source_form: str | None,
    config: str | None,
    overwrite: bool,
    averaged: bool = False,
    *,
    key: str | None = None,
    strip_prefix: Sequence[str] = (),
) -> str:
    """Converts weights with the layer kinds and shapes of their config. Returns a summary in text.

    Args:
        source: A file or folder of weights, a run (its newest intact checkpoint), or a folder of Hugging Face.
        destination: A file or a folder. In a folder the canonical form gets a config.yaml, for `icenet.load`.
        to: "canonical", "mlx" or "torch"; "hf", a folder of Hugging Face; or "torchvision", a state dict with its
            names. Such a state dict is recognized as a source, too.
        source_form: The form of the source; None detects it. With it or `config`, the names in a folder of Hugging
            Face are kept.
        config: A YAML file or the name of a preset; None uses the config.yaml next to the source, if there is one.
        overwrite: Whether to replace existing files.
        averaged: Whether to convert the moving average of a run's weights (`training.ema_decay`).
        key: Key of the state dict in a file of `torch.save` that holds more.
        strip_prefix: Prefixes to remove from the names of the weights.
    """
    if to == export_model.FORM:
        given = {"--from": source_form, "--config": config, "--key": key, "--strip-prefix": strip_prefix}
        if unused := [option for option, value in given.items() if value]:
            raise UsageError(f"{', '.join(unused)}: has no effect with --to {to}; the source's own config is used")
        return _text(export_model.export(source, destination, overwrite=overwrite, averaged=averaged))
    arrays: Mapping[str, Array] | None = None
    settings: Config | None
    imported: folder.Folder | None = None
    if (source / checkpoint.FOLDER).is_dir():
        source = checkpoint.find(source).path
    if averaged:
        _, arrays = open_averaged(source)
    keeps_names = config or source_form or key or strip_prefix or averaged
    if not keeps_names and folder.is_known(source):
        imported = folder.read(source)
        arrays, source_form = imported.weights, "canonical"
        stored, settings = source / folder.CONFIG, imported.config
    elif config is None:
        stored = (source if source.is_dir() else source.parent) / "config.yaml"
        settings = Config.from_yaml(stored, trust_code=False) if stored.is_file() else None
    else:
        stored = Path(config)
        settings = Config.from_yaml(config)
    kinds = shapes = names = shared = None
    if settings is not None:
        model = backends.meta_model(settings)
        kinds, shapes, names = model.layer_kinds(), model.weight_shapes(), model.mlx_names()
        shared = model.shared_arrays()
    in_folder = destination.is_dir() or not destination.suffix
    translations = torchvision.translations(settings, source, destination, to)
    notes = [f"the names are IceNet's, not those of {imported.family.model_type}"] if imported else []
    if to == torchvision.FORM:
        to, notes = translations["to"], [f"the names are those of {to}"]
    target = destination_file(destination, to)
    refuse_existing(source, target, overwrite)
    if in_folder or target.name.startswith(Path(DEFAULT_NAME).stem):
        saved_model.check_not_a_run(target.parent)
    if (enclosing := checkpoint.enclosing(target)) is not None:
        raise UsageError(f"{target}: is in the checkpoint {enclosing}; choose another place")
    companions: dict[str, bytes] = {}
    if settings is not None and to == "canonical" and in_folder:
        new = destination / "config.yaml"
        if not (new.exists() and stored.resolve() == new.resolve()):
            tokenizer = tokenizer_files(getattr(settings.data, "tokenizer", "bytes"))
            companions = checkpoint.config_files(settings, tokenizer)
        if not overwrite:
            saved_model.refuse_replacing(destination, list(companions), set())
    facts = {"kinds": kinds, "shapes": shapes, "names": names, "shared": shared}
    done = convert(
        source,
        destination,
        source_form=source_form,
        key=key,
        strip_prefix=strip_prefix,
        arrays=arrays,
        overwrite=overwrite,
        metadata=saved_model.code_metadata(checkpoint.code_of(source)),
        companions=companions,
        **translations,
        **facts,
    )
    return _text(done, notes)


def _text(done: Conversion, notes: Sequence[str] = ()) -> str:
    lines = [f"from  {done.source}", f"to    {done.destination}"]
    if done.left_out:
        lines.append(f"left out: {', '.join(done.left_out)}")
    lines += [f"note: {note}" for note in (done.note, *notes) if note]
    return "\n".join(lines)
