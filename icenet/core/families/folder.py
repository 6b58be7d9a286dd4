"""Reads and writes folders of Hugging Face: config.json, generation_config.json, safetensors and tokenizer files.

A GGUF file is read as the folder that it was made from.

Nothing of a folder is executed: code that `auto_map` names is not used, and pickled weights are refused.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from icenet.core import files as file_system
from icenet.core import listing
from icenet.core.config import Config, TransformerConfig
from icenet.core.errors import ConfigError, DataError, FileError, WeightsError
from icenet.core.families import (
    FAMILIES,
    Family,
    family_of,
    generation_settings,
    gguf,
    json_files,
    sentence_transformers,
    vision,
)
from icenet.core.families.generation_settings import FILE as GENERATION
from icenet.core.families.generation_settings import as_list
from icenet.core.families.json_files import to_bytes
from icenet.core.families.weights import ImportedWeights, is_tied
from icenet.core.tokenizers import companions, find_file, get_tokenizer, tokenizer_files
from icenet.core.tokenizers import gguf as gguf_tokenizer
from icenet.core.tokenizers.base import TOKENIZER_FILE, end_ids, special_tokens
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.weights import files as weight_files
from icenet.core.weights.files import Array, StoredWeights
from icenet.core.weights.gguf import is_gguf
from icenet.core.weights.origin import Origin
from icenet.core.weights.quantized import dequantized
from icenet.core.weights.safetensors import dtype_name, spec_of

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
"""How images are read; see `icenet.core.data.images.preprocess`."""
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    *(TOKENIZER_FILE, *companions.COMPANIONS, "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("vocab.txt", "sentencepiece.bpe.model", "spiece.model"),
)
"""Files of a tokenizer, which an export copies."""
_READ = (".json", ".jinja", ".safetensors", ".txt", ".model")
"""Endings of the files of a folder that are read or copied."""
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_log = logging.getLogger("icenet")


@dataclass(frozen=True)
class Folder:
    """A folder of Hugging Face, or a GGUF file.

    Attributes:
        path: The folder or file.
        files: The folder of its tokenizer's files.
        family: Its family.
        values: The content of its config.json, without its quantization.
        config: The configuration that belongs to it.
        weights: Its weights under our names.
    """

    path: Path
    files: Path
    family: Family
    values: dict[str, Any]
    config: Config
    weights: ImportedWeights


class ImageFiles(NamedTuple):
    """How the images of a model are read.

    Attributes:
        labels: Names of the classes.
        preprocessor: Content of `preprocessor_config.json`; None if it is not known.
    """

    labels: Sequence[str]
    preprocessor: Mapping[str, Any] | None


def is_folder(path: Path) -> bool:
    """Returns whether a path is a folder of Hugging Face: with config.json and without a config.yaml."""
    return path.is_dir() and (path / CONFIG).is_file() and not (path / "config.yaml").exists()


def is_importable(path: Path) -> bool:
    """Returns whether `read` reads a path: a folder of Hugging Face or a GGUF file."""
    return is_folder(path) or is_gguf(path)


def is_known(path: Path) -> bool:
    """Returns whether a path is a GGUF file, or a folder of Hugging Face of one of `FAMILIES`."""
    try:
        return is_gguf(path) or (is_folder(path) and _family(json_files.read_object(path / CONFIG)) is not None)
    except ConfigError:
        return False


def read(path: Path, overrides: Sequence[str] = ()) -> Folder:
    """Reads a folder or a GGUF file. The data of the weights are read when an array is looked up.

    Args:
        path: The folder or file.
        overrides: `key=value` changes of the configuration.

    Raises:
        ConfigError: Its config.json, or the metadata of the file, is not of a supported model.
        WeightsError: Its weights are missing, damaged or not those of its config.json.
    """
    source = _open_gguf(path) if is_gguf(path) else _open_folder(path)
    values, where, found, files = source.values, source.where, source.weights, source.files
    model_type = values.get("model_type")
    family = _family(values)
    if family is None and {"class", "layout", "inputs", "weights"} <= set(values):
        raise ConfigError(
            f"{where}: is that of a port; name both in a config: model: {{type: FILE.py:NAME, port: {path}}}, where "
            "FILE.py:NAME is the PyTorch module"
        )
    if family is None:
        described = f"model_type {model_type!r} is not supported" if model_type else "has no model_type"
        raise ConfigError(f"{where}: {described}; the supported families are {', '.join(FAMILIES)}")
    if values.get("auto_map"):
        _log.warning(f"{where}: the code that auto_map names is not used; the model is IceNet's {model_type}")
    try:
        fields = family.read(values, family.has_head({family.canonical(name) for name in found}))
        config = Config.from_dict({"model": fields})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if fields.get("tie_embeddings") and _has_own_head(family, found):
        _log.warning(f"{path}: {family.head} differs from the embedding, so they are not tied; config.json ties them")
        fields["tie_embeddings"] = False
    reads_text = config.model.input_kind == "tokens"
    tree: dict[str, Any] = {"model": fields}
    if reads_text:
        tree["generation"] = generation_settings.read(files, values)
    if isinstance(config.model, TransformerConfig):
        tree["embedding"] = sentence_transformers.read(files, config.model.max_seq_length)
    if reads_text and (tokenizer := find_file(files)) is not None:
        tree["data"] = {"tokenizer": str(tokenizer.absolute())}
    try:
        config = Config.from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"{files / GENERATION}, {where} or a file of sentence-transformers: {error}") from None
    config = config.with_overrides(*overrides)
    weights = ImportedWeights(family, config, found)
    if reads_text:
        weights.metadata |= Origin(family.model_type, _token_ids(files, values)).metadata()
    if weights.unused:
        _log.warning(f"{path}: {_summary(weights.unused)}: not used, because the model has no part for them")
    return Folder(path, files, family, values, config, weights)


def _summary(names: Sequence[str]) -> str:
    """Returns names of tensors as a text; of many only how many have the same beginning."""
    if len(names) <= 8:
        return ", ".join(names)
    counts = Counter(name.removeprefix("model.").partition(".")[0] for name in names)
    return ", ".join(f"{count} tensors of {beginning}" for beginning, count in counts.items())


@dataclass(frozen=True)
class _Source:
    """What a model is imported from.

    Attributes:
        where: What error messages name as the place of `values`.
        values: The content of a config.json, without quantization.
        weights: The tensors by the names of Hugging Face.
        files: The folder of the tokenizer's files and generation_config.json.
    """

    where: Path
    values: dict[str, Any]
    weights: StoredWeights
    files: Path


def _family(values: Mapping[str, Any]) -> Family | None:
    """Returns the family of a config.json; None if it is not supported."""
    model_type = values.get("model_type")
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def _open_folder(path: Path) -> _Source:
    if (link := listing.link_out_of(path, _READ)) is not None:
        raise ConfigError(
            f"{link}: is a link to {link.resolve()}, out of the folder; replace it by a copy if you trust it"
        )
    values = json_files.read_object(path / CONFIG)
    if _family(values) is None:  # reported first, and without a look at its weights
        return _Source(path / CONFIG, values, weight_files.Weights(path, []), path)
    try:
        values, weights = dequantized(values, _weights(path))
    except ConfigError as error:
        raise ConfigError(f"{path / CONFIG}: {error}") from None
    return _Source(path / CONFIG, values, weights, path)


def _open_gguf(path: Path) -> _Source:
    model = gguf.read(path)
    return _Source(path, model.values, model.weights, _gguf_files(model))


def _gguf_files(model: gguf.Model) -> Path:
    """Returns a folder in the cache with the tokenizer and the generation settings of a GGUF file.

    Making them takes a second for a large vocabulary. The name is a checksum of what they are made of.
    """
    used = {key: value for key, value in model.metadata.items() if key.startswith("tokenizer.")}
    architecture = str(model.metadata.get("general.architecture"))
    content = repr((gguf_tokenizer.VERSION, architecture, sorted(used.items()))).encode(errors="replace")
    folder = file_system.cache_folder() / "gguf" / hashlib.sha256(content).hexdigest()[:32]
    if (folder / GENERATION).is_file():
        return folder
    files: dict[str, bytes] = {}
    if "tokenizer.ggml.model" in model.metadata:
        try:
            files = gguf_tokenizer.tokenizer_files(model.metadata, architecture)
        except DataError as error:
            _log.warning(f"{model.path}: its tokenizer is not used: {error}")
    special = {key: model.values.get(key) for key in ("bos_token_id", "pad_token_id")}
    ends = gguf_tokenizer.end_tokens(model.metadata)
    files[GENERATION] = to_bytes({**special, "eos_token_id": ends[0] if len(ends) == 1 else ends or None})
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_system.staged_folder(folder) as partial:
            for name, data in files.items():
                file_system.write_bytes(partial / name, data)
    except (OSError, FileError) as error:
        raise FileError(
            f"{folder}: the tokenizer of {model.path.name} cannot be written ({error}); set ICENET_CACHE to a folder "
            "that can be written"
        ) from None
    return folder


def files_for(
    config: Config, weights: Mapping[str, Array], source: Folder | None = None, images: ImageFiles | None = None
) -> tuple[Family, dict[str, bytes], list[str]]:
    """Returns the family of a model, the files next to its weights by name (config.json is the last), and remarks.

    Args:
        config: The configuration of the model.
        weights: Its weights, for their dtype.
        source: The folder that it was imported from without change. Its files are kept.
        images: How the images of a model without `source` are read, if it is known.

    Raises:
        ConfigError: No family has the options of the model.
    """
    origin = Origin.of(weights)
    known = source.family if source else FAMILIES.get(origin.family if origin else "")
    if source is None and known is not None:
        known = known.text_family or known
    family = family_of(config.model, known)
    reads_text = config.model.input_kind == "tokens"
    files, remarks, special = _tokenizer(config, source, origin) if reads_text else _image_files(source, images)
    dtypes = Counter(dtype_name(spec_of(weights, name).dtype) for name in weights)
    dtype = {"torch_dtype": _DTYPES.get(dtypes.most_common(1)[0][0], "float32")}
    if source is None:
        written = {**special.get(CONFIG, {}), **dtype, **family.write(config.model)}
        written |= vision.label_keys(images.labels) if images is not None else {}
    else:  # as it was written, with the spellings that mlx-lm reads in addition to those of `transformers` 5
        written = {**family.write(config.model), **(dtype if "dtype" not in source.values else {}), **source.values}
        if family.text_family is not None:
            written["text_config"] = {**family.write(config.model)["text_config"], **source.values["text_config"]}
        has_logits = getattr(config.model, "output", "linear") != "none"
        if has_logits and (ties := getattr(config.model, "tie_embeddings", None)) is not None:
            written["tie_word_embeddings"] = ties
        if written.pop("auto_map", None):
            remarks.append("auto_map is left out, because the code that it names is")
    if isinstance(config.model, TransformerConfig):
        folder = source.files if source is not None else None
        if not config.embedding.pooling:
            remarks.append("the files of sentence-transformers are left out, because they have other steps")
        files |= sentence_transformers.files_for(config.embedding, config.model.hidden_size, folder)
    if reads_text and getattr(config.model, "causal", True) and GENERATION not in files:
        files[GENERATION] = to_bytes({**special[GENERATION], **generation_settings.write(config.generation)})
    files[CONFIG] = to_bytes(dict(sorted(written.items())))
    return family, files, remarks


def _token_ids(files: Path, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the ids of special tokens by key, for each file of settings that can state them, by name.

    Args:
        files: The folder of generation_config.json. Without that file, its ids are those of config.json.
        values: The content of config.json.
    """
    file = files / GENERATION
    found = {CONFIG: values, GENERATION: json_files.read_object(file) if file.is_file() else values}
    return {name: {key: content.get(key) for key in _TOKEN_IDS} for name, content in found.items()}


def _tokenizer(
    config: Config, source: Folder | None, origin: Origin | None
) -> tuple[dict[str, bytes], list[str], dict[str, dict[str, Any]]]:
    """Returns the tokenizer's files by name, remarks, and what `_token_ids` returns."""
    if source is not None:
        names = [name for name in (*TOKENIZER_FILES, GENERATION) if (source.files / name).is_file()]
        more = companions.MORE_TEMPLATES
        remarks = [f"{more} is left out"] if (source.files / more).is_dir() else []
        ids = _token_ids(source.files, source.values)
        files = {name: (source.files / name).read_bytes() for name in names}
        content = files.get(TOKENIZER_FILE, b"{}").strip()
        if content[:1] + content[-1:] != b"{}":  # to parse all of it takes a tenth of a second
            remarks.append(f"{TOKENIZER_FILE} is damaged, and copied as it is: no program can read text with it")
        return files, remarks, ids
    ends = list(config.generation.eos_token_id or [])
    name = getattr(config.data, "tokenizer", ByteTokenizer.name)
    files, remarks = tokenizer_files(name), []
    named: dict[str, int | None] = {}
    if files:
        tokenizer = get_tokenizer(name)
        ends = ends or list(end_ids(tokenizer))
        texts = {token: text for text, token in special_tokens(tokenizer).items()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": texts.get(ends[0])}
        if companions.CONFIG not in files:
            files[companions.CONFIG] = to_bytes({key: value for key, value in settings.items() if value is not None})
        texts_of = companions.parse(files, name).named
        named = {f"{key}_id": special_tokens(tokenizer).get(text) for key, text in texts_of.items()}
    else:
        remarks.append("the tokenizer of bytes has no counterpart in Hugging Face, so the folder has none")
    eos = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    ids = {file: {**{key: named.get(key) for key in _TOKEN_IDS}, **eos} for file in (CONFIG, GENERATION)}
    for file, recorded in (origin.token_ids if origin else {}).items():
        if file in ids:
            ids[file] |= recorded if set(as_list(recorded.get("eos_token_id"))) <= set(ends) else {**recorded, **eos}
    return files, remarks, ids


def _image_files(
    source: Folder | None, images: ImageFiles | None
) -> tuple[dict[str, bytes], list[str], dict[str, Any]]:
    """Returns what `_tokenizer` returns, for a model of images."""
    if images is not None and images.preprocessor is not None:
        return {PREPROCESSOR: to_bytes(images.preprocessor)}, [], {}
    if source is None:
        names = "" if images is not None else ", and no names of classes"
        return {}, [f"the folder has no {PREPROCESSOR}, which says how images are read{names}"], {}
    file = source.files / PREPROCESSOR
    return {PREPROCESSOR: file.read_bytes()} if file.is_file() else {}, [], {}


def _weights(path: Path) -> weight_files.Weights:
    has_safetensors = any((path / name).exists() for name in (weight_files.DEFAULT_NAME, weight_files.DEFAULT_INDEX))
    if not has_safetensors and (pickled := next((name for name in PICKLED if (path / name).exists()), None)):
        raise WeightsError(
            f"{path}: its weights are pickled, which can run code when they are read; convert them with "
            f"icenet convert {path / pickled} {path / weight_files.DEFAULT_NAME} --to torch"
        )
    return weight_files.read(path)


def _has_own_head(family: Family, weights: StoredWeights) -> bool:
    """Returns whether the files of a tied model have an output projection that is not a copy of the embedding."""
    if family.head not in weights:
        return False
    name = f"{family.rows[0].theirs}.weight"
    embedding = next((text for text in (name, name.removeprefix(family.prefix)) if text in weights), None)
    return embedding is not None and not is_tied(weights[embedding], weights[family.head])
