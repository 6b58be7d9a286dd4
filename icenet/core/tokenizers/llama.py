"""A tokenizer.json of the class `LlamaTokenizer`, whose rules for spaces `transformers` 5 replaces by its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icenet.core.tokenizers.companions import Settings
from icenet.core.tokenizers.spaces import SPACE, decoder

_KEEP = ("mistral", "mixtral", "phi3", "olmo2", "qwen2")
"""Values of `model_type` for which `transformers` uses tokenizer.json as it is."""
_MAX_BYTES = 1 << 24


def with_rules(content: bytes, settings: Settings, folder: Path) -> bytes:
    """Returns the content of a tokenizer.json with the rules that `transformers` 5 uses in its place.

    A space is put before the first word, unless there is one, and not after special tokens. With `legacy: true` it is
    put after special tokens, too. Of the file only the vocabulary, the merges and the tokens around a text are used.
    A folder without a config.json, such as a checkpoint, has the rules already.

    Args:
        content: The content of the tokenizer.json.
        settings: What the files next to it state.
        folder: Its folder, whose config.json names the type of the model.
    """
    if settings.class_name != "LlamaTokenizer" or b'"ByteLevel"' in content:
        return content
    model_type = _object(folder / "config.json").get("model_type")
    if model_type is None or model_type in _KEEP:
        return content
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):  # reported where it is read
        return content
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return content
    rules = _rules(settings.values)
    changed = {**values, **rules, "model": {**model, "fuse_unk": True, "byte_fallback": True, "dropout": None}}
    return content if changed == values else json.dumps(changed, ensure_ascii=False).encode(errors="surrogatepass")


def _rules(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parts of tokenizer.json before and after the model, for a tokenizer_config.json."""
    adds_space = values.get("add_prefix_space") is not False
    scheme = "never" if not adds_space else "always" if values.get("legacy") else "first"
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
        "decoder": decoder(int(adds_space)),
    }


def _object(file: Path) -> dict[str, Any]:
    """Returns the content of a JSON file; empty if it is absent or damaged, which is reported where it matters."""
    try:
        values = json.loads(file.read_bytes()) if file.stat().st_size <= _MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
