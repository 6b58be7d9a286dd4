"""The tokenizer of a GGUF file as the files of a Hugging Face tokenizer.

llama.cpp stores the vocabulary, the merges or scores, and the name of the rule that splits a text into words. The
rule itself is in llama.cpp, so those of the supported models are here.

Sources: `llama-vocab.cpp` of llama.cpp, and the `tokenizer.json` files of the models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from icenet.core.errors import DataError
from icenet.core.tokenizers.base import TOKENIZER_FILE
from icenet.core.tokenizers.merges import derived_merges
from icenet.core.tokenizers.spaces import SPACE, decoder, replace

VERSION = 1
"""Changes with the files that are made of the same metadata."""
CONTROL, USER_DEFINED, UNKNOWN = 3, 4, 2
"""Types of tokens."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _TAIL
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _TAIL
)

_GPT2_KINDS = ("default", "gpt-2", "mpt", "olmo", "jais", "trillion", "phi-2", "roberta-bpe")
_DIGIT_KINDS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_SPLITS: Mapping[str, str] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4", "superbpe"), _GPT4O),
}
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
"""Kinds whose words that are a token are not merged from their parts."""
_BEGINS = ("llama3", "llama-v3", "llama-bpe", "tekken")
"""Kinds that put the token of the beginning before a text if the file does not say it."""


def tokenizer_files(metadata: Mapping[str, Any], architecture: str) -> dict[str, bytes]:
    """Returns tokenizer.json, tokenizer_config.json and chat_template.jinja by name, for the metadata of a file.

    Args:
        metadata: The metadata.
        architecture: The name of the architecture: Gemma's spaces differ.

    Raises:
        DataError: The kind of the tokenizer is not supported, or the metadata contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _texts(metadata, "tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise DataError("tokenizer.ggml.token_type and tokens have different lengths")
    if kind == "gpt2":
        settings, begins = _byte_level(metadata, tokens)
    elif kind == "llama":
        settings, begins = _sentence_piece(metadata, tokens, types, architecture.startswith("gemma"))
    else:
        raise DataError(f"tokenizers of kind {str(kind)[:40]!r} are not supported; only gpt2 and llama")
    vocabulary = settings["model"]["vocab"]
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and vocabulary.get(token) == index and token
    ]
    special = {name: _token(metadata, tokens, name) for name in ("bos", "eos", "unknown", "padding")}
    begins = bool(metadata.get("tokenizer.ggml.add_bos_token", begins)) and special["bos"] is not None
    ends = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and special["eos"] is not None
    around = [*(["bos"] if begins else []), "text", *(["eos"] if ends else [])]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **settings,
        "post_processor": _template(around, special, vocabulary) if len(around) > 1 else None,
    }
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{names[name]: token for name, token in special.items() if token is not None},
        "add_bos_token": begins,
        "add_eos_token": ends,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        TOKENIZER_FILE: json.dumps(content, ensure_ascii=False).encode(errors="replace"),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(errors="replace"),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template.encode(errors="replace")
    return files


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Returns the ids of the tokens that end a text or a turn."""
    names = ("eos", "eot", "eom")
    found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    return list(dict.fromkeys(token for token in found if isinstance(token, int)))


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    found = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found) or not found:
        raise DataError(f"tokenizer.ggml.{name} is not a list of texts")
    return found


def _token(metadata: Mapping[str, Any], tokens: Sequence[str], name: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """Returns the parts of tokenizer.json for a BPE of bytes, and whether a text begins with a token."""
    kind = metadata.get("tokenizer.ggml.pre", "default")
    word_rule = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if kind in _GPT2_KINDS:
        rules = [word_rule]
    elif kind in _DIGIT_KINDS:
        rules = [{"type": "Digits", "individual_digits": True}, word_rule]
    elif kind in _SPLITS:
        split = {"type": "Split", "pattern": {"Regex": _SPLITS[kind]}, "behavior": "Isolated", "invert": False}
        rules = [split, {**word_rule, "use_regex": False}]
    else:
        known = ", ".join((*_GPT2_KINDS, *_DIGIT_KINDS, *_SPLITS))
        raise DataError(
            f"the rule {str(kind)[:40]!r} that splits a text (tokenizer.ggml.pre) is unknown; only {known}"
        )
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": kind in _WHOLE_WORDS,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": _texts(metadata, "merges"),
    }
    settings = {
        "normalizer": {"type": "NFC"} if _SPLITS.get(kind) is _QWEN2 else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rules} if len(rules) > 1 else rules[0],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    return settings, kind in _BEGINS


def _sentence_piece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], is_gemma: bool
) -> tuple[dict[str, Any], bool]:
    """Returns the parts of tokenizer.json for a BPE of characters with spaces as "▁" and bytes for the others."""
    if is_gemma:  # its tokens of several spaces are written as spaces
        tokens = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        tokens, vocabulary = list(tokens), {}
        for index, token in enumerate(tokens):  # the first of equal ones
            vocabulary.setdefault(token, index)
    if isinstance(metadata.get("tokenizer.ggml.merges"), list):
        merges: list[Any] = _texts(metadata, "merges")
    else:
        scores = metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) != len(tokens):
            raise DataError("tokenizer.ggml.scores and tokens have different lengths")
        # Gemma's scores are not the order of its merges, but the ids are
        ranks = [-index for index in range(len(tokens))] if is_gemma else scores
        skipped = [kind in (CONTROL, UNKNOWN) for kind in types]
        merges = derived_merges(vocabulary, ranks, skipped)
    adds_space = not is_gemma and bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = replace({"String": " "}, SPACE)
    before = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": _token(metadata, tokens, "unknown") or ("<unk>" if "<unk>" in vocabulary else None),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }
    settings = {
        "normalizer": before if adds_space else spaces,
        "pre_tokenizer": None,
        "decoder": decoder(int(adds_space)),
        "model": model,
    }
    return settings, True


def _template(
    around: Sequence[str], special: Mapping[str, str | None], vocabulary: Mapping[str, int]
) -> dict[str, Any]:
    """Returns the post-processor that puts tokens around a text."""
    used = {str(special[name]) for name in around if name != "text"}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if name == "text"
        else {"SpecialToken": {"id": special[name], "type_id": 0}}
        for name in around
    ]
    pair = [*single, *(json.loads(json.dumps(single).replace('"A"', '"B"').replace('"type_id": 0', '"type_id": 1')))]
    tokens = {
        token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]} for token in used if token in vocabulary
    }
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


# --- export -------------------------------------------------------------------------------------------------


def metadata_of(files: Mapping[str, bytes], vocab_size: int, ends: Sequence[int]) -> dict[str, Any]:
    """Returns the metadata of a GGUF file for the files of a tokenizer; the inverse of `tokenizer_files`.

    Args:
        files: tokenizer.json, and tokenizer_config.json and chat_template.jinja, if any.
        vocab_size: Number of tokens of the model, which may have more than the tokenizer.
        ends: Ids of the tokens that end a text.

    Raises:
        DataError: llama.cpp has no such tokenizer.
    """
    content, config = (json.loads(files.get(name, b"{}")) for name in (TOKENIZER_FILE, "tokenizer_config.json"))
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise DataError(f"llama.cpp's files have no tokenizers of type {str(model.get('type'))[:40]!r}, only BPE")
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    vocabulary = {**model["vocab"], **{text: token["id"] for text, token in added.items()}}
    if max(vocabulary.values()) >= vocab_size:
        raise DataError(f"the tokenizer has more tokens than the model, which has {vocab_size}")
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for text, index in vocabulary.items():
        tokens[index] = text
        is_byte = model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
        types[index] = _BYTE if is_byte else _NORMAL
        if text in added:
            types[index] = CONTROL if added[text]["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    found: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if model.get("byte_fallback"):
        adds_space = '"Prepend"' in json.dumps(content.get("normalizer")) or "always" in json.dumps(content)
        # the score of a token is the rank of its first merge; those of others do not matter
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        found |= {"model": "llama", "scores": [-float(ranks.get(token, len(merges))) for token in tokens]}
        found["add_space_prefix"] = adds_space
    else:
        found |= {"model": "gpt2", "pre": _kind_of(content), "merges": merges}
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for key, name in names.items():
        text = config.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if text in vocabulary:
            found[f"{name}_token_id"] = vocabulary[text]
    if ends:
        found["eos_token_id"] = ends[0]
        found |= {"eot_token_id": ends[1]} if len(ends) > 1 else {}
    found["add_bos_token"] = bool(config.get("add_bos_token", False)) and "bos_token_id" in found
    metadata = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
    template = (
        files["chat_template.jinja"].decode() if "chat_template.jinja" in files else config.get("chat_template")
    )
    return {**metadata, "tokenizer.chat_template": template} if isinstance(template, str) else metadata


_NORMAL, _UNUSED, _BYTE = 1, 5, 6


def _kind_of(content: Mapping[str, Any]) -> str:
    """Returns the name of the rule that splits a text. Raises DataError if llama.cpp has none."""

    def rules(given: Any) -> list[Any]:
        listed = given.get("pretokenizers", [given]) if isinstance(given, dict) else []
        without = ("trim_offsets", "add_prefix_space")
        return [{key: value for key, value in rule.items() if key not in without} for rule in listed]

    wanted = rules(content.get("pre_tokenizer"))
    for kind in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"):
        settings, _ = _byte_level({"tokenizer.ggml.pre": kind, "tokenizer.ggml.merges": ["a b"]}, ["a"])
        if rules(settings["pre_tokenizer"]) == wanted:
            return kind
    raise DataError("llama.cpp has no name for the rule by which the tokenizer splits a text (pre_tokenizer)")
