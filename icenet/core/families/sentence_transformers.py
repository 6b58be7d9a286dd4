"""The files that sentence-transformers adds to a folder of Hugging Face: pooling, normalization, limits and prompts.

Source: the classes `Transformer`, `Pooling`, `Dense`, `Dropout` and `Normalize` of `sentence_transformers` (versions
2 to 6).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from icenet.core.config import EmbeddingConfig
from icenet.core.embedding import dense
from icenet.core.errors import ConfigError
from icenet.core.families import json_files
from icenet.core.families.keys import shown
from icenet.core.weights.files import DEFAULT_NAME

MODULES = "modules.json"
_SETTINGS = "config_sentence_transformers.json"
_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_length",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
"""Keys of a pooling module, in the order in which they are concatenated, and our names."""
_MODES = {"mean_sqrt_len_tokens": "mean_sqrt_length", "weightedmean": "weighted_mean", "lasttoken": "last"}
"""Names of `pooling_mode` that are not ours."""
_SIZES = ("word_embedding_dimension", "embedding_dimension")
_TRANSFORMER = ("max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name")
"""Keys of a transformer module that are read, or have the same value for all texts."""
_TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_log = logging.getLogger("icenet")


def read(folder: Path, longest: int) -> dict[str, Any]:
    """Returns the fields of `EmbeddingConfig` that a folder states.

    Without files of sentence-transformers, that is the number of tokens that the tokenizer is made for. If the folder
    has steps that are not supported, a notice names them, and `pooling` is empty.

    Args:
        folder: The folder of a model.
        longest: Number of tokens that the model can read.

    Raises:
        ConfigError: A file has another form or another value than those of the library.
    """
    fields: dict[str, Any] = {}
    tokenizer = json_files.read_optional(folder / "tokenizer_config.json")
    limit = tokenizer.get("model_max_length")
    if (folder / MODULES).is_file():
        fields |= _read_modules(folder)
        settings = json_files.read_optional(folder / _SETTINGS)
        fields |= {"prompts": settings.get("prompts") or {}, "prompt_name": settings.get("default_prompt_name")}
        found = next((folder / name for name in _TRANSFORMER_FILES if (folder / name).is_file()), None)
        values = json_files.read_optional(found) if found else {}
        if unused := [key for key, value in values.items() if key not in _TRANSFORMER and value not in (None, {})]:
            _log.warning(f"{found}: {', '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect")
        fields["lower_case"] = values.get("do_lower_case") or False
        limit = values.get("max_seq_length") or limit
    if isinstance(limit, (int, float)) and not isinstance(limit, bool) and 0 < limit < longest:
        fields["max_seq_length"] = limit
    return fields


def files_for(embedding: EmbeddingConfig, width: int, source: Path | None) -> dict[str, bytes]:
    """Returns the files of a folder of sentence-transformers by name.

    There are none for settings that are the defaults, and none with steps that are not supported.

    Args:
        embedding: The settings.
        width: Width of the hidden states.
        source: A folder whose files are kept.
    """
    if not embedding.pooling:
        return {}
    if source is not None:
        modules = json_files.read(source / MODULES) if (source / MODULES).is_file() else []
        paths = [module.get("path") for module in modules if isinstance(module, dict)]
        paths = [path for path in paths if path and _inside(source, path, source / MODULES)]
        inner = [f"{path}/{name}" for path in paths for name in (dense.CONFIG, DEFAULT_NAME)]
        names = [MODULES, _SETTINGS, *_TRANSFORMER_FILES, *inner]
        return {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
    if embedding == EmbeddingConfig():
        return {}
    kinds = ["Transformer", "Pooling", *(["Dense"] * len(embedding.dense)), *(["Normalize"] * embedding.normalize)]
    places = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(zip(places, kinds, strict=True))
    ]
    flags: dict[str, Any] = {key: name in embedding.pooling for key, name in _POOLING.items()}
    if embedding.pooling != [name for name in _POOLING.values() if name in embedding.pooling]:  # another order
        theirs = {name: text for text, name in _MODES.items()}
        flags = {"pooling_mode": [theirs.get(name, name) for name in embedding.pooling]}
    limits = {"max_seq_length": embedding.max_seq_length, "do_lower_case": embedding.lower_case}
    settings = {"prompts": embedding.prompts, "default_prompt_name": embedding.prompt_name}
    if embedding.prompt is not None:
        settings = {"prompts": {**embedding.prompts, "default": embedding.prompt}, "default_prompt_name": "default"}
    pooling = {_SIZES[0]: width, **flags, "include_prompt": embedding.include_prompt}
    files = {MODULES: modules, _SETTINGS: settings, _TRANSFORMER_FILES[0]: limits, "1_Pooling/config.json": pooling}
    written = {name: (json.dumps(values, indent=2) + "\n").encode() for name, values in files.items()}
    return {**written, **dense_files(embedding, places[2 : 2 + len(embedding.dense)])}


def dense_names(embedding: EmbeddingConfig) -> list[str]:
    """Returns the names that the folders of the layers after the pooling have next to a config.yaml."""
    return [f"{index}_Dense" for index in range(2, 2 + len(embedding.dense))]


def dense_files(embedding: EmbeddingConfig, names: Sequence[str] | None = None) -> dict[str, bytes]:
    """Returns the content of the files of the layers after the pooling.

    Args:
        embedding: The settings.
        names: The names of their folders; None: `dense_names`.

    Raises:
        ConfigError, WeightsError: One cannot be read.
    """
    found: dict[str, bytes] = {}
    names = dense_names(embedding) if names is None else names
    for name, path in zip(names, map(Path, embedding.dense), strict=True):
        dense.read(path)
        found |= {f"{name}/{file}": (path / file).read_bytes() for file in (dense.CONFIG, DEFAULT_NAME)}
    return found


def _read_modules(folder: Path) -> dict[str, Any]:
    """Returns pooling and normalization as modules.json states them."""
    file = folder / MODULES
    modules = json_files.read(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ConfigError(f"{file}: not a list of modules; copy or save it again")
    fields: dict[str, Any] = {"pooling": [], "dense": []}
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    for index, (module, kind) in enumerate(zip(modules, kinds, strict=True)):
        before = kinds[:index]
        problem = f"the step {kind}"
        if kind == "Transformer" and index == 0 and module.get("path") in (None, "", "."):
            continue
        if kind == "Pooling" and before == ["Transformer"]:
            path = _inside(folder, module.get("path"), file)
            fields |= _read_pooling(path / dense.CONFIG, _settings_of(path))
            continue
        if kind == "Dropout":  # for training only
            continue
        if kind == "Dense" and fields["pooling"] and not fields.get("normalize"):
            path = _inside(folder, module.get("path"), file)
            values = _settings_of(path)
            missing = dense.unsupported(values)
            if missing is None:
                dense.Dense(path, dense.shape_of(path / dense.CONFIG, values))
                fields["dense"].append(str(path.absolute()))
                continue
            problem = f"{missing} of the step {kind}"
        if kind == "Normalize" and fields["pooling"]:
            fields["normalize"] = True
            continue
        place = f" (path {shown(module['path'])})" if module.get("path") else ""
        _log.warning(
            f"{file}: {problem}{place} is not supported here, only Transformer, Pooling, Dense and Normalize in this "
            "order; icenet.embed needs embedding.pooling, which then has the steps that it names"
        )
        return {"pooling": []}
    if not fields["pooling"]:
        _log.warning(f"{file}: has no Pooling; icenet.embed needs embedding.pooling")
    return fields


def _read_pooling(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a pooling module."""
    unknown = [key for key in values if key not in (*_POOLING, *_SIZES, "include_prompt", "pooling_mode")]
    if unknown:
        raise ConfigError(f"{file}: {', '.join(map(shown, unknown))}: unknown, and may change embeddings")
    flags = {key: values.get(key, False) for key in _POOLING}
    wrong = next((key for key, value in flags.items() if not isinstance(value, bool)), None)
    include = values.get("include_prompt", True)
    if wrong is not None or not isinstance(include, bool):
        raise ConfigError(f"{file}: {wrong or 'include_prompt'}: neither true nor false")
    given = values.get("pooling_mode") or []
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{file}: pooling_mode: {shown(given)} is not a name or a list of names")
    pooling = [_MODES.get(name, name) for name in names] or [_POOLING[key] for key, value in flags.items() if value]
    pooling = pooling or ["mean"]
    if odd := next((name for name in pooling if name not in _POOLING.values()), None):
        raise ConfigError(f"{file}: pooling_mode: {shown(odd)} is not supported")
    return {"pooling": pooling, "include_prompt": include}


def _inside(folder: Path, path: Any, file: Path) -> Path:
    """Returns a folder in another one."""
    if (
        not isinstance(path, str)
        or not path
        or PurePosixPath(path).name != path  # one level, in which links are checked
        or path == ".."
        or len(path) > 200
        or not path.isprintable()
    ):
        raise ConfigError(f"{file}: path {shown(path)}: not the name of a folder in it")
    return folder / path


def _settings_of(module: Path) -> dict[str, Any]:
    """Returns the config.json of a module, without which embeddings would be others than those of the model."""
    file = module / dense.CONFIG
    if not file.is_file():
        raise ConfigError(f"{file}: no such file, and {MODULES} lists this module; copy or download the whole folder")
    return json_files.read_object(file)
