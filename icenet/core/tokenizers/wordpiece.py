"""The tokenizer of BERT from its vocabulary, vocab.txt, as older folders have it without a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from icenet.core.errors import DataError

VOCABULARY = "vocab.txt"
_NAMES = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def tokenizer_json(vocabulary: bytes, settings: Mapping[str, Any], named: Mapping[str, str], where: str) -> bytes:
    """Returns the content of the tokenizer.json that has the same tokens.

    Args:
        vocabulary: The content of vocab.txt: one token per line, whose id is the number of the line.
        settings: The content of tokenizer_config.json: `do_lower_case`, `strip_accents`, `tokenize_chinese_chars`.
        named: Special tokens by name, such as `cls_token`, where they are not those of BERT.
        where: The path, for error messages.

    Raises:
        DataError: It is not UTF-8, or has no token for unknown words, or for the begin or the end of a text.
    """
    try:
        lines = vocabulary.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"data.tokenizer: {where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    tokens = {line.removesuffix("\r"): index for index, line in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    special = {name: named.get(name, text) for name, text in _NAMES.items()}
    missing = [special[name] for name in ("unk_token", "cls_token", "sep_token") if special[name] not in tokens]
    if missing:
        raise DataError(
            f"data.tokenizer: {where}: has no {', '.join(missing)}, so it is not the vocabulary of BERT; save a "
            "tokenizer.json: transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    around = [(special[name], tokens[special[name]]) for name in ("cls_token", "sep_token")]
    first, last = ({"SpecialToken": {"id": text, "type_id": 0}} for text, _ in around)
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokens[text], "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for text in sorted({*special.values()} & {*tokens}, key=tokens.__getitem__)
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
            "strip_accents": settings.get("strip_accents"),
            "lowercase": settings.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, sequence, last],
            "pair": [first, sequence, last, {"Sequence": {"id": "B", "type_id": 1}}, last],
            "special_tokens": {text: {"id": text, "ids": [index], "tokens": [text]} for text, index in around},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": special["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": tokens,
        },
    }
    return json.dumps(values, ensure_ascii=False).encode()
