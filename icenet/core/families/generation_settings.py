"""The settings of generation in a folder of Hugging Face: generation_config.json, and the ids that end a text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icenet.core.config import GenerationConfig
from icenet.core.families import json_files
from icenet.core.tokenizers import companions, find_file

FILE = "generation_config.json"
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""Settings of sampling and the library's defaults."""
_ALWAYS = ("repetition_penalty", "max_new_tokens")
"""Settings that have an effect without sampling too."""
_HAS_NO_EFFECT = frozenset(
    {
        *("_from_model_config", "transformers_version", "do_sample", "bos_token_id", "eos_token_id"),
        *("pad_token_id", "decoder_start_token_id", "use_cache", "cache_implementation", "output_attentions"),
        *("output_hidden_states", "output_scores", "output_logits", "max_length", "return_dict_in_generate"),
    }
)
_log = logging.getLogger("icenet")


def write(settings: GenerationConfig) -> dict[str, Any]:
    """Returns the values of generation_config.json for settings, without token ids."""
    sampling = {name: getattr(settings, name) for name in (*_SAMPLING, "min_p")}
    written: dict[str, Any] = {}
    if settings.temperature == 0:
        written["do_sample"] = False
    elif any(sampling[name] != getattr(GenerationConfig(), name) for name in sampling):  # the user has chosen
        written |= {"do_sample": True, **sampling}
    for name, neutral in (("repetition_penalty", 1.0), ("max_new_tokens", None)):
        if (value := getattr(settings, name)) != neutral:
            written[name] = value
    return written


def read(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `GenerationConfig` that a folder states.

    Args:
        path: The folder, of which generation_config.json and the files of the tokenizer are read.
        values: The content of config.json.
    """
    file = path / FILE
    given = json_files.read_optional(file)
    found: dict[str, Any] = {}
    ends: list[Any] = []
    named, rows = companions.eos_token_id(path), values.get("vocab_size")
    if named is not None and isinstance(rows, int) and named >= rows:  # added to the tokenizer, but not to the model
        named = None
    for ids in (given.get("eos_token_id"), values.get("eos_token_id"), named):
        ends += as_list(ids)
    outside = [end for end in ends if isinstance(rows, int) and isinstance(end, int) and not 0 <= end < rows]
    if outside:
        ids = ", ".join(map(str, dict.fromkeys(outside)))
        _log.warning(f"{path}: eos_token_id {ids} is outside the vocabulary of {rows} tokens, and has no effect")
        ends = [end for end in ends if end not in outside]
    if ends:
        found["eos_token_id"] = [end for index, end in enumerate(ends) if end not in ends[:index]]
    if given.get("do_sample"):
        for name, default in _SAMPLING.items():
            found[name] = default if given.get(name) is None else given[name]
        if given.get("min_p") is not None:
            found["min_p"] = given["min_p"]
    else:  # the default of the library
        found["temperature"] = 0.0
    if find_file(path) is not None:
        found["add_special_tokens"] = True
    for name in _ALWAYS:
        if given.get(name) is not None:
            found[name] = given[name]
    known = {*_HAS_NO_EFFECT, *_SAMPLING, *_ALWAYS, "min_p"}
    if unused := [name for name, value in given.items() if name not in known and value not in (None, False, 1, 1.0)]:
        _log.warning(f"{file}: {', '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect")
    return found


def as_list(ids: Any) -> list[Any]:
    """Returns token ids as a list: of one id, of several, or of none."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
