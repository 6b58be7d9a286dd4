"""The tokenizer of a file of SentencePiece, as folders have it without a tokenizer.json: the same tokens and texts.

Source: `sentencepiece_model.proto`, `normalizer.cc`, `bpe_model.cc` and `unigram_model.cc` of SentencePiece.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icenet.core.errors import DataError
from icenet.core.tokenizers.companions import Settings
from icenet.core.tokenizers.merges import derived_merges
from icenet.core.tokenizers.protobuf import read_fields
from icenet.core.tokenizers.spaces import SPACE, decoder, replace

XLM_ROBERTA = "sentencepiece.bpe.model"
NAMES = ("tokenizer.model", XLM_ROBERTA, "spiece.model")
"""Names of the file in folders."""
_MAX_BYTES, _MAX_PIECES, _MAX_FIELDS, _MAX_SYMBOLS = 1 << 24, 1 << 19, 4, 1 << 16
"""Maximum length of a file, of which published ones have 5 MB, and maximum numbers of its pieces, of the fields of a
piece, and of the characters of user-defined pieces."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_CLASSES = ("", "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
"""Values of `tokenizer_class` whose ids are those of the file."""
_TURNS = ("<start_of_turn>", "<end_of_turn>")
"""User-defined pieces that are special tokens."""
_REMEDY = (
    "save a tokenizer.json where the model was made: "
    "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Model:
    """The content of a file.

    Attributes:
        pieces: Each piece, its score and its type.
        trainer, normalizer: The fields of `TrainerSpec` and `NormalizerSpec` by number.
    """

    pieces: Sequence[tuple[str, float, int]]
    trainer: Mapping[int, Any]
    normalizer: Mapping[int, Any]


def read(content: bytes, where: str) -> Model:
    """Returns the content of a file.

    Args:
        content: Its bytes.
        where: Its path, for error messages.

    Raises:
        DataError: It is not a file of SentencePiece, or one that is not supported.
    """
    pieces: list[tuple[str, float, int]] = []
    parts: dict[int, dict[int, Any]] = {2: {}, 3: {}, 5: {}}
    try:
        if len(content) > _MAX_BYTES:
            raise ValueError("too large")
        for number, value in read_fields(content, _MAX_PIECES):
            if number == 1:
                fields: dict[int, Any] = dict(read_fields(_bytes(value), _MAX_FIELDS))
                (score,) = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))
                pieces.append((fields[1].decode(), score, fields.get(3, _NORMAL)))
            elif number in parts:
                parts[number] = dict(read_fields(_bytes(value), _MAX_PIECES))
        unknown = sum(kind == _UNKNOWN for _, _, kind in pieces)
        if unknown != 1 or len({piece for piece, _, _ in pieces}) != len(pieces):
            raise ValueError("not one unknown piece, or equal pieces")
        if not all(piece and -1e30 < score < 1e30 for piece, score, _ in pieces):
            raise ValueError("an empty piece, or an invalid score")
        _bytes(parts[3].get(2, b""))
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise DataError(
            f"data.tokenizer: {where}: not a file of SentencePiece, or damaged; copy it again, or {_REMEDY}"
        ) from None
    trainer, normalizer = parts[2], parts[3]
    if trainer.get(3, _UNIGRAM) not in (_UNIGRAM, _BPE):
        problem = "models of words and of characters"
    elif trainer.get(24) or not normalizer.get(5, 1):
        problem = "treat_whitespace_as_suffix, and escape_whitespaces: false"
    elif parts[5].get(2):
        problem = "rules for decoded texts (denormalizer_spec)"
    else:
        return Model(pieces, trainer, normalizer)
    raise DataError(f"data.tokenizer: {where}: {problem} are not supported; {_REMEDY}")


def tokenizer_files(
    content: bytes, settings: Settings, added: Mapping[str, int], where: str, name: str
) -> tuple[bytes, bytes]:
    """Returns the content of the tokenizer.json and the tokenizer_config.json that have the same tokens.

    Args:
        content: The content of the file.
        settings: What the files next to it state.
        added: Ids of further tokens (`added_tokens.json`).
        where: Its path, for error messages.
        name: Its name, which tells a file of XLM-RoBERTa where there is no `tokenizer_class`.

    Raises:
        DataError: The file is invalid, or its class or an option is not supported.
    """
    model = read(content, where)
    pieces, named = list(model.pieces), dict[str, str]()
    is_xlm_roberta = settings.class_name == "XLMRobertaTokenizer" or (not settings.class_name and name == XLM_ROBERTA)
    if is_xlm_roberta:  # the ids are those of fairseq, which trained it
        first = [("<s>", 0.0, _CONTROL), ("<pad>", 0.0, _CONTROL), ("</s>", 0.0, _CONTROL), ("<unk>", 0.0, _UNKNOWN)]
        pieces = [*first, *pieces[3:], ("<mask>", 0.0, _CONTROL)]
        named = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
        named |= {"bos_token": "<s>", "eos_token": "</s>"}
    elif settings.class_name in _CLASSES:
        for key, number, default in (("bos_token", 41, 1), ("eos_token", 42, 2), ("pad_token", 43, -1)):
            index = model.trainer.get(number, default)
            if 0 <= index < len(pieces) and pieces[index][2] == _CONTROL:  # that of -1 is above 2**63
                named[key] = pieces[index][0]
    else:
        raise DataError(
            f"data.tokenizer: {where}: the ids of the class {settings.class_name[:60]!r} are not known; {_REMEDY}"
        )
    for index, fields in settings.added.items():  # placeholders have the names of the folder
        if 0 <= index < len(pieces) and pieces[index][0] != fields["content"]:
            pieces[index] = (fields["content"], pieces[index][1], _CONTROL)
    unknown = next(index for index, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN)
    named = {"unk_token": pieces[unknown][0], **named, **settings.named}
    ids = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise DataError(f"data.tokenizer: {where}: two tokens have the same name; {_REMEDY}")
    tokens = _added_tokens(pieces, ids, settings, added, where)
    symbols = [piece for piece, _, kind in pieces if kind == _USER_DEFINED and piece not in tokens]
    if sum(map(len, symbols)) > _MAX_SYMBOLS:
        raise DataError(f"data.tokenizer: {where}: its user-defined pieces are too long; {_REMEDY}")
    if not model.normalizer.get(3, 1) and not model.normalizer.get(4, 1):  # found in the normalized text as they are
        found = {"normalized": True, **dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)}
        tokens |= {piece: {"id": ids[piece], "content": piece, **found} for piece in symbols}
        symbols = []
    begin, end = (named[key] if named.get(key) in tokens else None for key in ("bos_token", "eos_token"))
    if not is_xlm_roberta:
        begin = None if settings.values.get("add_bos_token") is False else begin
        end = end if settings.values.get("add_eos_token") is True else None
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(tokens.values(), key=lambda token: token["id"]),
        **_rules(model, symbols, settings.values.get("legacy") is not False),
        "post_processor": _around(begin, end, tokens, is_xlm_roberta),
        "model": _bpe(model, pieces, ids, unknown, bool(symbols), where)
        if model.trainer.get(3, _UNIGRAM) == _BPE
        else _unigram(model, pieces, unknown),
    }
    config = {**settings.values, **named, "tokenizer_class": "PreTrainedTokenizerFast"}
    if not is_xlm_roberta:
        config |= {"add_bos_token": begin is not None, "add_eos_token": end is not None}
    return json.dumps(values, ensure_ascii=False).encode(), json.dumps(config, indent=2).encode()


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number in place of a part")
    return value


def _added_tokens(
    pieces: Sequence[tuple[str, float, int]],
    ids: Mapping[str, int],
    settings: Settings,
    added: Mapping[str, int],
    where: str,
) -> dict[str, dict[str, Any]]:
    """Returns the tokens that are found before a text is encoded, by name."""
    flags = dict.fromkeys(_FLAGS, False)
    found: dict[str, dict[str, Any]] = {}
    for index, (piece, _, kind) in enumerate(pieces):
        if kind in (_CONTROL, _UNKNOWN) or piece in _TURNS:
            # as in `transformers`, the space before a mask belongs to it
            found[piece] = {"id": index, "content": piece, **flags, "special": True, "lstrip": piece == "<mask>"}
    for text, index in added.items():
        found[text] = {"id": index, "content": text, **flags, "special": text in settings.named.values()}
    for index, fields in settings.added.items():
        # user-defined pieces with spaces are found in the text with "▁" for them
        if not (SPACE in fields["content"] and ids.get(fields["content"]) == index):
            found[fields["content"]] = {"id": index, **flags, **fields, "normalized": False}
    more = sorted(token["id"] for text, token in found.items() if text not in ids)
    if more != list(range(len(pieces), len(pieces) + len(more))) or any(
        ids.get(text, token["id"]) != token["id"] for text, token in found.items()
    ):
        raise DataError(
            f"data.tokenizer: {where}: the ids of added tokens do not follow those of its {len(pieces):,} pieces; "
            f"{_REMEDY}"
        )
    return found


def _rules(model: Model, symbols: Sequence[str], is_legacy: bool) -> dict[str, Any]:
    """Returns the parts of tokenizer.json before and after the model.

    Args:
        model: The content of the file.
        symbols: Pieces that are never divided or joined.
        is_legacy: Whether a space is put before the text after each special token, too.
    """
    charsmap, adds_space, removes_spaces = (
        model.normalizer.get(key, default) for key, default in ((2, b""), (3, 1), (4, 1))
    )
    before: list[dict[str, Any]] = []
    if charsmap:
        before.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if removes_spaces:
        before += [replace({"Regex": r"\A +|[ ▁]+\z"}, ""), replace({"Regex": " {2,}"}, " ")]
    if adds_space and is_legacy:
        before.append({"type": "Prepend", "prepend": SPACE})
    before.append(replace({"String": " "}, SPACE))
    splits: list[dict[str, Any]] = []
    if adds_space and not is_legacy:
        splits.append({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False})
    if symbols:
        pattern = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
        splits.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    # SentencePiece removes all spaces at the beginning if it would not read them
    strips = 0 if not adds_space else 1 << 16 if removes_spaces else 1
    return {
        "normalizer": {"type": "Sequence", "normalizers": before},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
        "decoder": decoder(strips, has_bytes=bool(model.trainer.get(35))),
    }


def _around(
    begin: str | None, end: str | None, tokens: Mapping[str, Mapping[str, Any]], is_xlm_roberta: bool
) -> dict[str, Any] | None:
    """Returns the post-processor, which puts a token before and after a text."""
    ids = {text: tokens[text]["id"] for text in (begin, end) if text is not None}
    if not ids:
        return None
    first, last = (
        [{"SpecialToken": {"id": text, "type_id": 0}}] if text is not None else [] for text in (begin, end)
    )
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*first, text, *last],
        "pair": [*first, text, *last, *(last if is_xlm_roberta else first), second, *last],
        "special_tokens": {text: {"id": text, "ids": [index], "tokens": [text]} for text, index in ids.items()},
    }


def _bpe(
    model: Model,
    pieces: Sequence[tuple[str, float, int]],
    ids: Mapping[str, int],
    unknown: int,
    has_symbols: bool,
    where: str,
) -> dict[str, Any]:
    try:
        scores, skipped = [score for _, score, _ in pieces], [kind != _NORMAL for _, _, kind in pieces]
        merges = derived_merges(ids, scores, skipped)
    except DataError as error:
        raise DataError(f"data.tokenizer: {where}: {error}") from None
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[unknown][0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(model.trainer.get(35)),
        "ignore_merges": has_symbols,
        "vocab": ids,
        "merges": merges,
    }


def _unigram(model: Model, pieces: Sequence[tuple[str, float, int]], unknown: int) -> dict[str, Any]:
    # a piece that stands for a byte is no part of a text, and its characters must be more probable together
    lowest = min((score for _, score, kind in pieces if kind == _NORMAL), default=0.0)
    absent = 8 * (min(lowest, 0.0) - 16)
    scores = [absent if kind in (_BYTE, _UNUSED) else score for _, score, kind in pieces]
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "byte_fallback": bool(model.trainer.get(35)),
        "vocab": [[piece, score] for (piece, _, _), score in zip(pieces, scores, strict=True)],
    }
