"""The files next to a tokenizer.json: names of special tokens, further tokens, settings, and the chat template.

They mean what they mean to `transformers` 5, for which they are written.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icenet.core.errors import DataError
from icenet.core.messages import first_line
from icenet.core.tokenizers.base import TOKENIZER_FILE

CONFIG, SPECIAL, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"
ADDED = "added_tokens.json"
COMPANIONS = (CONFIG, SPECIAL, TEMPLATE, PROCESSOR_TEMPLATE)
"""The files that belong to a tokenizer.json in the same folder."""
MORE_TEMPLATES = "additional_chat_templates"
"""A folder with chat templates for other purposes, such as tools, which are not used."""
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MAX_BYTES = 1 << 24


@dataclass(frozen=True)
class Settings:
    """What the files state.

    Attributes:
        named: Special tokens by name, such as `bos_token`.
        extra: Special tokens without a name.
        added: Fields of `tokenizers.AddedToken` of further tokens by id, in ascending order.
        templates: Chat templates by name; the usual one is "default".
        class_name: `tokenizer_class`.
        values: The content of tokenizer_config.json.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    added: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    class_name: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def read_files(folder: Path) -> dict[str, bytes]:
    """Returns the content of the files in a folder by name.

    Raises:
        DataError: One cannot be read, or is too large.
    """
    found = {}
    for name in COMPANIONS:
        path = folder / name
        try:
            if not path.is_file():
                continue
            if path.stat().st_size > _MAX_BYTES:
                raise DataError(f"data.tokenizer: {path}: larger than {_MAX_BYTES >> 20} MB: not a file of settings")
            found[name] = path.read_bytes()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DataError(f"data.tokenizer: {path}: cannot be read: {reason}") from None
    return found


def read_added_tokens(folder: Path) -> dict[str, int]:
    """Returns the ids of further tokens by name: added_tokens.json, which older folders have.

    Raises:
        DataError: It is not a dict of ids.
    """
    path = folder / ADDED
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_BYTES:
        raise DataError(f"data.tokenizer: {path}: larger than {_MAX_BYTES >> 20} MB: not a file of settings")
    found = _json({ADDED: path.read_bytes()}, ADDED, str(path))
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in found.values()):
        raise DataError(f"data.tokenizer: {path}: not a dict of ids")
    return found


def parse(files: Mapping[str, bytes], where: str) -> Settings:
    """Returns what the files state.

    Args:
        files: Content of the files by name; others than `COMPANIONS` are not read.
        where: The path of the tokenizer.json, for error messages.

    Raises:
        DataError: A file is not what its name says.
    """
    config = _json(files, CONFIG, where)
    values = dict(config)
    if "added_tokens_decoder" not in config:  # older folders
        values |= _json(files, SPECIAL, where)
    named = {
        key: text
        for key, value in values.items()
        if key in NAMES or (key.endswith("_token") and isinstance(value, str))
        if (text := _text(value))
    }
    extra = values.get("additional_special_tokens") or values.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        named |= {str(key): text for key, value in extra.items() if (text := _text(value))}
        extra = []
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(extra, list) or not isinstance(added, dict):
        raise DataError(f"data.tokenizer: {where}: the special tokens in {CONFIG} are not lists and dicts of tokens")
    try:
        tokens = {int(key): _fields(added[key]) for key in sorted(added, key=int)}
    except (ValueError, TypeError, KeyError):
        raise DataError(
            f"data.tokenizer: {where}: added_tokens_decoder in {CONFIG} is not a dict of tokens"
        ) from None
    class_name = config.get("tokenizer_class")
    return Settings(
        named,
        tuple(text for value in extra if (text := _text(value))),
        tokens,
        _templates(files, config, where),
        class_name.removesuffix("Fast") if isinstance(class_name, str) else "",
        config,
    )


def eos_token_id(folder: Path) -> int | None:
    """Returns the id of the `eos_token` of the tokenizer in a folder; None if there is none or a file is damaged.

    The tokenizer itself is not made, which takes longer and needs a library.
    """
    path = folder / TOKENIZER_FILE
    try:
        settings = parse(read_files(folder), str(path))
        name = settings.named.get("eos_token")
        if name is None or not path.is_file():
            return None
        text = path.read_text("utf-8")
        start = text.index("[", text.index('"added_tokens"'))
        tokens = {token["content"]: token["id"] for token in json.JSONDecoder().raw_decode(text, start)[0]}
    except (DataError, OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    found = tokens.get(name, next((id for id, token in settings.added.items() if token.get("content") == name), None))
    return found if isinstance(found, int) else None


def _templates(files: Mapping[str, bytes], config: Mapping[str, Any], where: str) -> dict[str, str]:
    """Returns the chat templates by name. A file of its own comes before the entry in tokenizer_config.json."""
    if TEMPLATE in files:
        try:
            return {"default": files[TEMPLATE].removeprefix(codecs.BOM_UTF8).decode("utf-8").replace("\r\n", "\n")}
        except UnicodeDecodeError:
            raise DataError(f"data.tokenizer: {where}: {TEMPLATE} next to it is not UTF-8 text") from None
    found: Any = config.get("chat_template")
    if found is None:
        found = _json(files, PROCESSOR_TEMPLATE, where).get("chat_template")
    if isinstance(found, list):
        pairs = [(item.get("name"), item.get("template")) for item in found if isinstance(item, dict)]
        found = dict(pairs) if len(pairs) == len(found) else found
    found = {"default": found} if isinstance(found, str) else {} if found is None else found
    if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise DataError(f"data.tokenizer: {where}: chat_template in {CONFIG} is neither a text nor a list of texts")
    return found


def _json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        values = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        reason = first_line(error, "it is nested too deeply")
        raise DataError(f"data.tokenizer: {where}: {name} next to it is not JSON: {reason}") from None
    if not isinstance(values, dict):
        raise DataError(f"data.tokenizer: {where}: {name} next to it is not a JSON object")
    return values


def _fields(token: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `tokenizers.AddedToken` for a token of `added_tokens_decoder`."""
    flags = {key: bool(token[key]) for key in _FLAGS if key in token}
    return {"content": str(token["content"]), **flags}


def _text(token: object) -> str | None:
    """Returns the text of a token, which is a text or a dict."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
