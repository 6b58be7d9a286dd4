"""A saved model: a folder with canonical weights, the config and the tokenizer, without the state of training.

FOLDER/
    model.safetensors    canonical weights; their metadata `icenet_files` has the SHA-256 of the other files, and
                         `icenet_code` that of the Python files of a custom model
    tokenizer.json       the tokenizer, unless it is `bytes`
    images.json          of a model of images: the names of its classes, and how images are read
    config.yaml          the config of the model
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core.config import ModelConfig, user_code, written, yaml_file
from icenet.core.data.images.facts import FILE, ImageFacts
from icenet.core.errors import UsageError, WeightsError
from icenet.core.families import sentence_transformers
from icenet.core.models.build import check_config
from icenet.core.runs import run_folder
from icenet.core.tokenizers.base import TOKENIZER_FILE
from icenet.core.weights import files as weight_files
from icenet.core.weights.convert import PICKLED
from icenet.core.weights.origin import Origin
from icenet.core.weights.quantization import Quantization, metadata_of

RECORD = "icenet_files"
"""Key of the metadata that marks the weights of a saved model."""
CODE = "icenet_code"
"""Key of the metadata for the code of a custom model, as `user_code.hashes` returns it."""
_FILE_SUFFIXES = (weight_files.SUFFIX, *PICKLED, ".ckpt", ".npz", ".onnx", ".gguf", ".yaml", ".yml", ".json")


def save_model(model: Any, folder: Path, overwrite: bool = False) -> None:
    """Writes the weights, the config and the tokenizer of a model: see `icenet.save`.

    Args:
        model: A `BaseModel` of either backend.
        folder, overwrite: See `save`.

    Raises:
        UsageError: As `save`, and if the model has other arrays than its config says.
        FileError: A file cannot be written.
    """
    check_config(model)
    config: dict[str, Any] = {"model": model.config.model_dump(mode="python")}
    companions = dict(getattr(model.tokenizer, "files", {}))
    if TOKENIZER_FILE in companions:  # the other files are read with it
        config["data"] = {"tokenizer": TOKENIZER_FILE}
    if model.embedding_options is not None and (embedding := written.tree(model.embedding_options)):
        names = sentence_transformers.dense_names(model.embedding_options)
        companions |= sentence_transformers.dense_files(model.embedding_options)
        config["embedding"] = {**embedding, **({"dense": names} if names else {})}
    if model.generation is not None:  # without the seed, which is that of this model
        settings = {key: value for key, value in written.tree(model.generation).items() if key != "seed"}
        config |= {"generation": settings} if settings else {}
    companions |= image_file(model.image_facts, model.config)
    companions["config.yaml"] = yaml_file.dump(config).encode()
    code = user_code.hashes(model.code)
    save(folder, model.weights(), companions, overwrite, code, model.origin, model.quantized_layers())


def save(
    folder: Path,
    weights: Mapping[str, np.ndarray[Any, Any]],
    companions: Mapping[str, bytes],
    overwrite: bool = False,
    code: Mapping[str, str] = {},
    origin: Origin | None = None,
    quantized: Mapping[str, Quantization] = {},
) -> None:
    """Writes a saved model. An earlier one in the folder is replaced, other files only with `overwrite`.

    After a crash the folder contains the old model, the new one, or one without config.yaml, which cannot be loaded.

    Args:
        folder: The folder, created if absent.
        weights: Canonical weights.
        companions: Content of the other files by name; config.yaml is the last.
        overwrite: Whether to replace files of the same names that are not those of an earlier saved model.
        code: SHA-256 of each Python file of a custom model (see `user_code.hashes`).
        origin: Where the weights were imported from, which an export writes again.
        quantized: The settings of each quantized layer by path.

    Raises:
        UsageError: It is a file, a run or a checkpoint, or a file would be replaced.
        FileError: A file cannot be written.
    """
    if str(folder).strip() in ("", "."):
        raise UsageError("a saved model needs a folder of its own; name it")
    if folder.suffix in _FILE_SUFFIXES and not folder.is_dir():
        raise UsageError(
            f"{folder}: a saved model is a folder with weights and config; name it without {folder.suffix}. For a "
            "single file of weights: icenet.convert(FOLDER, FILE, 'canonical'), 'mlx' or 'torch'"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"{folder}: is not a folder; choose another name")
    check_not_a_run(folder)
    earlier = files_of(folder)
    if not overwrite:
        refuse_replacing(folder, [weight_files.DEFAULT_NAME, *companions], earlier)
    described = {RECORD: json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in companions.items()})}
    described |= {**code_metadata(code), **(origin.metadata() if origin else {}), **metadata_of(quantized)}
    weight_files.write(folder, weights, described, companions=companions)
    for name in earlier - companions.keys() - {weight_files.DEFAULT_NAME, weight_files.DEFAULT_INDEX}:
        (folder / name).unlink(missing_ok=True)  # the tokenizer of the earlier model


def image_file(facts: ImageFacts | None, config: ModelConfig) -> dict[str, bytes]:
    """Returns the file of a saved model that has its `ImageFacts`, by name; none if the model has other classes."""
    if facts is None:
        return {}
    if len(facts.classes) == getattr(config, "vocab_size", None):
        return {FILE: facts.to_json()}
    logging.getLogger("icenet").warning(
        f"{FILE} is not written: it has the names of {len(facts.classes):,} classes, and the model has "
        f"{getattr(config, 'vocab_size', None)}; set model.image_facts"
    )
    return {}


def code_metadata(code: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata of weights that record the code of their model; empty without code."""
    return {CODE: json.dumps(code, sort_keys=True)} if code else {}


def code_of(metadata: Mapping[str, str]) -> Any:
    """Returns what `code_metadata` recorded; None if nothing is."""
    try:
        return json.loads(metadata[CODE])
    except (KeyError, ValueError, RecursionError):
        return None


def check_not_a_run(folder: Path) -> None:
    """Checks that a folder is neither a run nor a checkpoint, nor in a checkpoint.

    Raises:
        UsageError: It is. A model in it would be mixed up with its weights, or damage it.
    """
    found = run_folder.description(folder)
    if found is not None:
        raise UsageError(f"{folder}: is {found}, which must not contain another model; choose another folder")


def check_apart(source: Path, folder: Path) -> None:
    """Checks that a folder to write is neither within a folder that is read, nor around it.

    Raises:
        UsageError: It is, so its files would be mixed up with those of the source.
    """
    read, written = source.resolve(), folder.resolve()
    if source.is_dir() and (read in written.parents or written in read.parents):
        place = "in" if read in written.parents else "around"
        raise UsageError(f"{folder}: is {place} the folder that is read, {source}; choose a folder next to it")


def refuse_replacing(folder: Path, names: list[str], earlier: set[str]) -> None:
    """Checks that files may be written to a folder.

    Args:
        folder: The folder.
        names: The names of the files.
        earlier: The names of files that may be replaced.

    Raises:
        UsageError: One of the other files exists.
    """
    names = [*names, *([weight_files.DEFAULT_INDEX] if weight_files.DEFAULT_NAME in names else [])]
    for name in names:
        if os.path.lexists(folder / name) and name not in earlier:
            raise UsageError(
                f"{folder / name}: exists; choose another folder, or replace it with --overwrite "
                "(in Python overwrite=True)"
            )


def files_of(folder: Path) -> set[str]:
    """Returns the names of the files that an earlier `save` wrote to a folder and that are unchanged.

    The set is empty if the weights are not those of a saved model, or if one of its other files is missing.
    """
    try:
        listed = json.loads(weight_files.read(folder).metadata[RECORD])
        found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in listed}
        unchanged = {name for name in listed if found[name] == listed[name]}
    except (WeightsError, OSError, KeyError, ValueError, TypeError):
        return set()
    return {weight_files.DEFAULT_NAME, weight_files.DEFAULT_INDEX, *unchanged}
