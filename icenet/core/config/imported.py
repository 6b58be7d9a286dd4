"""A model that the configuration takes from a path: `model.path`.

The path is a folder of Hugging Face, a run, a checkpoint or a saved model. Its section `model`, its tokenizer and its
settings of generation take the place of those of the configuration, and `training.init_from` becomes the path. For a
model of images, `data` gets how images are read. The resulting configuration has no `model.path` and stands alone.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from icenet.core.config.custom import is_custom
from icenet.core.config.data import PIXEL_KEYS
from icenet.core.errors import ConfigError

MAX_LENGTH = 1024
"""Tokens in a training sequence of an imported model with more positions, unless data.seq_length is given."""
SCHEMA = {
    "description": "A model whose architecture, weights, tokenizer and settings of generation the run begins with.",
    "type": "string",
}
"""Schema of `model.path`, which is no field of a section."""
_log = logging.getLogger("icenet")


class ModelAtPath(NamedTuple):
    """What a configuration takes from a model, as trees of values."""

    path: Path
    """The path on this machine, also of the id of a repository."""
    input_kind: str
    """What the model reads: tokens or images."""
    model: dict[str, Any]
    tokenizer: str
    """The value of `data.tokenizer`."""
    generation: dict[str, Any]
    embedding: dict[str, Any]
    image_keys: Callable[[], dict[str, Any]]
    """Returns the keys of `data` that read images as the model does. ConfigError: its processor is not supported."""


def expand(
    values: Mapping[str, Any], path: str | None, folder: Path, changed: Mapping[tuple[str, ...], str] = {}
) -> dict[str, Any]:
    """Returns a tree of values in which the model at a path has replaced `model.path`.

    `model.path` of a custom model is an option of its own.

    Args:
        values: The tree of a configuration. If it has `model.path` itself, the other keys next to it stay.
        path: A path from `--set`. The whole section `model` of the tree is replaced then, and its tokenizer.
        folder: Where a path in the tree is looked up, before the working directory.
        changed: All overrides, by key.

    Raises:
        ConfigError: The path has no model.
    """
    written = dict(values["model"]) if isinstance(values.get("model"), Mapping) else {}
    inside = None if is_custom(written.get("type")) else written.pop("path", None)
    replaces = path is not None
    if not replaces and inside is None:
        return dict(values)
    found = _read(Path(path).expanduser() if path is not None else _find(str(inside), folder))
    tree = {**values, "model": found.model if replaces else {**found.model, **written}}
    data = dict(values.get("data") or {})
    if data.get("kind", "text") in ("text", "chat"):
        if replaces or "tokenizer" not in data:
            data["tokenizer"] = found.tokenizer
        length = found.model.get("max_seq_length")
        is_given = bool(data.get("seq_length")) or ("data", "seq_length") in changed
        if length is not None and length > MAX_LENGTH and not is_given:
            data["seq_length"] = MAX_LENGTH
            _log.warning(
                f"data.seq_length: {MAX_LENGTH} tokens, not the {length:,} of the model; set it for another length"
            )
        tree["data"] = data
    training: dict[str, Any] = {"init_from": str(found.path.absolute())}
    if found.input_kind == "images":
        if changed.get(("data", "kind"), data.get("kind")) == "images":
            overridden = {key[1] for key in changed if key[:1] == ("data",) and len(key) > 1}
            tree["data"] = {**_image_keys(found, {*data, *overridden}), **data}
        count = changed.get(("model", "vocab_size"), None if replaces else written.get("vocab_size"))
        if count is not None and str(count).strip() != str(found.model["vocab_size"]):
            training["new_head"] = True  # the number of classes next to the path requests it
    tree["generation"] = {**found.generation, **(values.get("generation") or {})}
    tree["embedding"] = {**found.embedding, **(values.get("embedding") or {})}
    tree["training"] = {**training, **(values.get("training") or {})}
    return tree


def _image_keys(found: ModelAtPath, written: Collection[str]) -> dict[str, Any]:
    """Returns the keys of `data` that read images as a model does, without those that the user wrote."""
    try:
        keys = found.image_keys()
    except ConfigError as error:
        _log.warning(f"data.preprocessor: that of {found.path} is not used: {error}")
        return {}
    own = [key for key in PIXEL_KEYS if key in written]
    if "preprocessor" in written or ("preprocessor" in keys and own):
        if "preprocessor" not in written:
            _log.warning(f"data.preprocessor: that of {found.path} is not used, because data.{own[0]} is set")
        keys = {key: value for key, value in keys.items() if key == "channels"}
    if "normalize" in written:
        keys = {key: value for key, value in keys.items() if key not in ("mean", "std")}
    if keys.get("normalize") is False and {"mean", "std"} & set(written):
        del keys["normalize"]
    return {key: value for key, value in keys.items() if key not in written}


def path_of(values: Mapping[str, Any], overrides: Sequence[tuple[tuple[str, ...], str]]) -> str | None:
    """Returns the last `model.path` of overrides, given as keys and values; None without one."""
    changed: dict[tuple[str, ...], str] = dict(overrides)
    section = values.get("model")
    family = changed.get(("model", "type")) or (section.get("type") if isinstance(section, Mapping) else None)
    return None if is_custom(family) else changed.get(("model", "path"))


def _find(path: str, folder: Path) -> Path:
    inside = folder / Path(path).expanduser()
    return inside if inside.exists() else Path(path).expanduser()


def _read(path: Path) -> ModelAtPath:
    """Returns the model at a path.

    The function that opens it reads the configuration of that model, so it is in a folder above this one.
    """
    found: ModelAtPath = importlib.import_module("icenet.core.runs.open_model").model_at_path(path)
    return found
