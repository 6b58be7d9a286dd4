"""Opens a run, a checkpoint, a saved model, a folder of Hugging Face, a GGUF file or a configuration by its path."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from icenet.core.config import Config, CustomDataConfig, DataConfig, ImageModelConfig, written
from icenet.core.config.custom import is_custom
from icenet.core.config.imported import ModelAtPath
from icenet.core.data.images import facts as images
from icenet.core.data.images.facts import ImageFacts
from icenet.core.errors import CheckpointError, ConfigError, IceNetError
from icenet.core.families import FAMILIES, folder, json_files
from icenet.core.models import twins
from icenet.core.models.inference import lacks_tokenizer
from icenet.core.runs import saved_model
from icenet.core.runs.checkpoint import FOLDER, Checkpoint, find
from icenet.core.runs.run_folder import has_no_checkpoint
from icenet.core.tokenizers import chat, companions, find_file
from icenet.core.tokenizers.base import TOKENIZER_FILE
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.weights import files as weight_files
from icenet.core.weights import formats, hub
from icenet.core.weights.gguf import SUFFIX as GGUF_SUFFIX
from icenet.core.weights.gguf import is_gguf
from icenet.core.weights.origin import Origin
from icenet.core.weights.quantized import read_saved

WITH_WEIGHTS = "give a run, a checkpoint, a saved model, or a folder or repository (OWNER/NAME) of Hugging Face"
"""What has a configuration and weights, for error messages."""


def open_target(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, Mapping[str, np.ndarray] | None]:
    """Returns the configuration and the weights at a path.

    Args:
        path: A run, a checkpoint, a folder written by `icenet.save`, a folder of Hugging Face, a GGUF file, the id
            of a repository, a YAML file or the name of a preset. The last two have no weights.
        overrides: `key=value` changes of the configuration.

    Raises:
        CheckpointError: The path is a file of weights, or has no intact checkpoint.
        ConfigError: The configuration cannot be read.
        WeightsError: The weights of a folder of Hugging Face are not those of its config.json.
    """
    path = hub.local_path(path)
    if path.is_file() and is_gguf(path):
        imported = folder.read(path, overrides)
        return imported.config, imported.weights
    file = formats.identify(path) if path.is_file() else formats.UNKNOWN
    if file.kind in (formats.SAFETENSORS, formats.PICKLE) or path.suffix in (weight_files.SUFFIX, ".pt", ".pth"):
        raise CheckpointError(
            f"{path}: weights without a config; icenet convert {path} FOLDER --to canonical --config CONFIG "
            "creates a folder with both"
        )
    if path.suffix.lower() == GGUF_SUFFIX and path.is_file():
        raise CheckpointError(f"{path}: is {file.name or 'no GGUF file'}; copy or download the GGUF file again")
    if file.name and file.kind != formats.TEXT:
        raise CheckpointError(f"{path}: is {file.name}; {file.remedy}")
    if not path.is_dir():
        return Config.from_yaml(path, overrides), None
    is_run = (path / FOLDER).is_dir() or has_no_checkpoint(path)
    if not is_run and not (path / "manifest.json").is_file() and folder.is_folder(path):
        imported = folder.read(path, overrides)
        if imported.config.model.input_kind == "tokens" and find_file(path) is None:
            logging.getLogger("icenet").warning(
                f"{path}: has no {TOKENIZER_FILE}, which text needs; transformers.AutoTokenizer"
                ".from_pretrained(FOLDER).save_pretrained(FOLDER) writes it from other files of a tokenizer"
            )
        return imported.config, imported.weights
    if is_run or (path / "manifest.json").is_file() or not (path / "config.yaml").is_file():
        found = find(path)
        if is_run and (path / weight_files.DEFAULT_NAME).exists():
            logging.getLogger("icenet").warning(
                f"{path}: is a run; {weight_files.DEFAULT_NAME} in it is not used, but {found.path.name}"
            )
        warn_of_changed_code(found)
        return found.config.with_overrides(*overrides), found.weights
    config, weights = Config.from_yaml(path / "config.yaml", overrides, trust_code=False), weight_files.read(path)
    _warn(twins.changed_code(saved_model.code_of(weights.metadata), config.model.type, str(path), "saved"))
    return config, read_saved(weights)


def with_tokenizer(config: Config, weights: Any) -> Config:
    """Returns the configuration to use a model with, and not to train it.

    Data of a user's class have no tokenizer. The checkpoint of their run has that of the model that the run began
    with.

    Args:
        config: The configuration of the weights.
        weights: The weights.
    """
    place = getattr(weights, "path", None)
    if not isinstance(config.data, CustomDataConfig) or place is None:
        return config
    file = (place if place.is_dir() else place.parent) / TOKENIZER_FILE
    return config.model_copy(update={"data": DataConfig(tokenizer=str(file))}) if file.is_file() else config


def open_trained(path: Path, key: str, warn: bool = True) -> tuple[Config, Mapping[str, np.ndarray]]:
    """Returns the configuration and the weights at a path that a key of a configuration names.

    Args:
        path: See `open_target`; not a configuration.
        key: The key, for error messages.
        warn: Whether warnings are logged. False if the path is opened again later.

    Raises:
        ConfigError: There is nothing, or no weights.
        CheckpointError, WeightsError: It cannot be read.
    """
    remedy = "give a folder of a model, a run or a checkpoint"
    try:
        with contextlib.nullcontext() if warn else _without_warnings():
            config, weights = open_target(path)
    except ConfigError:
        if path.exists() or hub.is_repository_id(path):
            raise
        raise ConfigError(f"{key}: {path}: no such file or folder; {remedy}") from None
    if weights is None:
        raise ConfigError(f"{key}: {path} has no weights; {remedy}")
    return with_tokenizer(config, weights), weights


def model_at_path(path: Path) -> ModelAtPath:
    """Returns what a configuration takes from the model that its `model.path` names.

    `icenet.core.config.imported` calls this function by its name.

    Args:
        path: See `open_target`; not a configuration.

    Raises:
        ConfigError: There is no model, or it is one of Python code.
        CheckpointError, WeightsError: It cannot be read.
    """
    path = hub.local_path(path)
    config, weights = open_trained(path, "model.path", warn=False)  # training.init_from opens it again
    if is_custom(config.model.type):  # naming its weights is not trusting its code
        raise ConfigError(
            f"model.path: {path} is a model of Python code, {config.model.type}; name that in model.type, and the "
            "path in training.init_from"
        )
    tokenizer = getattr(config.data, "tokenizer", ByteTokenizer.name)
    if lacks_tokenizer(config, weights):
        tokenizer = str(path.absolute() / TOKENIZER_FILE)  # which reading the data then reports as missing

    def image_keys() -> dict[str, Any]:
        facts = image_facts(path)
        return {} if facts is None else facts.data_keys()

    return ModelAtPath(
        path=path,
        input_kind=config.model.input_kind,
        model=config.model.model_dump(mode="python"),
        tokenizer=tokenizer,
        generation=written.tree(config.generation),
        embedding=written.tree(config.embedding),
        image_keys=image_keys,
    )


def check_chat_template(path: Path, messages: object, template_options: Mapping[str, Any] | None) -> None:
    """Renders messages by the chat template of a model before its weights are read, which takes longer.

    There is no check if the path has no chat template, or cannot be opened: what loads the model reports it.

    Args:
        path: See `open_target`.
        messages, template_options: See `icenet.core.tokenizers.chat.render`.

    Raises:
        UsageError: The template refuses the messages.
        DataError: It is faulty, takes too long or needs too much memory.
    """
    try:
        config, _ = open_trained(path, "chat", warn=False)
        name = getattr(config.data, "tokenizer", ByteTokenizer.name)
        file = Path(name).expanduser()
        place = file if file.is_dir() else file.parent
        settings = companions.parse(companions.read_files(place), name) if name != ByteTokenizer.name else None
    except IceNetError:
        return
    if settings is not None and (template := settings.templates.get("default")) is not None:
        tokenizer: Any = SimpleNamespace(chat_template=template, template_tokens=settings.named)
        chat.render(tokenizer, messages, template_options=template_options)


def image_facts(path: Path) -> ImageFacts | None:
    """Returns how the images of a model are read, and its classes; None if the path does not say so.

    Args:
        path: See `open_target`.

    Raises:
        CheckpointError, ConfigError: It cannot be read.
    """
    path = hub.local_path(path)
    if (path / FOLDER).is_dir() or (path / "manifest.json").is_file():
        stored = find(path).state.get("facts")
        try:
            return ImageFacts(**stored) if stored else None
        except (ConfigError, TypeError):  # those of a user's data, which need not be about images
            return None
    if folder.is_folder(path):
        values = json_files.read_object(path / folder.CONFIG)
        family = FAMILIES.get(str(values.get("model_type")))
        reads_images = family is not None and issubclass(family.section, ImageModelConfig)
        return images.of_folder(path, values) if reads_images else None
    return images.of_saved(path)


def warn_of_changed_code(found: Checkpoint) -> None:
    """Logs a warning if a user's model is not the code that a checkpoint was trained with."""
    _warn(twins.changed_code(found.state.get("code"), found.config.model.type, str(found.path)))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    logger = logging.getLogger("icenet")
    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


def _warn(note: str | None) -> None:
    if note is not None:
        logging.getLogger("icenet").warning(note)


def open_averaged(path: Path) -> tuple[Config, Mapping[str, np.ndarray]]:
    """Returns the configuration and the averaged weights of a run or checkpoint.

    Raises:
        CheckpointError: It has no averaged weights.
    """
    found = find(path)
    warn_of_changed_code(found)
    averages = {name[: -len(".ema")]: array for name, array in found.optimizer.items() if name.endswith(".ema")}
    if not averages:
        raise CheckpointError(f"{found.path}: has no averaged weights; train with training.ema_decay")
    shared = twins.stored_sharing(found.state)  # the averages have the first name of a shared array only
    averages |= {alias: averages[owner] for alias, owner in shared.items() if owner in averages}
    origin = Origin.of(found.weights)
    metadata = origin.metadata() if origin else {}
    return found.config, weight_files.Arrays({**found.weights, **averages}, metadata, found.path)
