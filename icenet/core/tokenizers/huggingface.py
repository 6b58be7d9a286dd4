"""Tokenizers of Hugging Face's library `tokenizers`, defined by one file, tokenizer.json."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import DataError
from icenet.core.tokenizers import llama, sentencepiece, wordpiece
from icenet.core.tokenizers.base import TOKENIZER_FILE, NoTokenError, utf8
from icenet.core.tokenizers.companions import (
    CONFIG,
    PROCESSOR_TEMPLATE,
    TEMPLATE,
    Settings,
    parse,
    read_added_tokens,
    read_files,
)
from icenet.core.tokenizers.coverage import Coverage
from icenet.core.tokenizers.library import library, one_line_errors, read_tokenizer

EOT_TOKENS = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<|end|>", "<end_of_text>"),
    *("<｜end▁of▁sentence｜>", "<|im_end|>", "[SEP]"),
)
"""Common names of the end-of-text token. The first one in the vocabulary is used."""
END_TOKENS = frozenset({*EOT_TOKENS, "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"} - {"[SEP]"})
"""Names of special tokens that end a text or a turn of a chat, where generation ends too."""
_MAX_BYTES = 1 << 28
_CLEANED = {
    **{" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'"},
    **{f" {ending}": ending for ending in ("n't", "'m", "'s", "'ve", "'re")},
}
_CLEANED_CHARACTERS = 8
"""Length of the longest text that becomes one of these, `n ' t` with spaces around, and one more."""


class HFTokenizer:
    """A tokenizer.json. Special tokens that are written in a text are encoded as those tokens, as the library does.

    The file's truncation, padding and BPE dropout are not used: a text is encoded completely, always the same. Tokens
    that its post-processing puts around a text, such as a beginning-of-text token, are added by `encode_prompt` only.

    Attributes:
        chat_templates: Chat templates by name.
        template_tokens: Special tokens by name, such as `bos_token`, which chat templates use.
        unstable_characters: Number of characters at the end of a text that the next token may change.
    """

    def __init__(
        self, content: bytes, where: str = TOKENIZER_FILE, companions: Mapping[str, bytes] | None = None
    ) -> None:
        """Reads the content of a tokenizer.json.

        Args:
            content: The bytes of the file.
            where: Name of the file in error messages.
            companions: Content of the files next to it by name (`icenet.core.tokenizers.companions.COMPANIONS`).

        Raises:
            DataError: It is not a tokenizer, it has no end-of-text token, or `tokenizers` is not installed.
        """
        content = content.removeprefix(codecs.BOM_UTF8)
        self._files = {TOKENIZER_FILE: content, **(companions or {})}
        self._where = where
        self._settings = settings = parse(self._files, where)
        self.chat_templates = dict(settings.templates)
        self.template_tokens = settings.named
        self._tokenizer, self._post_processor = read_tokenizer(content, where)
        with one_line_errors(f"data.tokenizer: {where}: cannot add the tokens of {CONFIG}"):
            changes = _apply(settings, self._tokenizer)
        identity = content + json.dumps(changes).encode() if changes else content
        self.name = f"hf:{hashlib.sha256(identity).hexdigest()[:32]}"
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        eos_token = settings.named.get("eos_token")
        eot_token = next((name for name in (*EOT_TOKENS, eos_token) if name in vocabulary), None)
        if eot_token is None:
            raise DataError(
                f"data.tokenizer: {where}: has no end-of-text token ({', '.join(EOT_TOKENS[:4])}, ...); "
                "add one to its added_tokens"
            )
        self.eot_id = vocabulary[eot_token]
        self.vocab_size = max(vocabulary.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        own_id = self._tokenizer.model.token_to_id
        only_added = {token.content for token in added.values() if own_id(token.content) is None}
        of_text = {**vocabulary}
        for name in only_added:
            of_text.pop(name, None)
        self.text_vocab_size = max(of_text.values(), default=0) + 1
        """The largest token id of ordinary text plus one. Added tokens may have larger ids, which models may lack."""
        self._bytes = _byte_tokens(vocabulary) if b'"ByteFallback"' in content else {}
        is_bpe = isinstance(self._tokenizer.model, library().models.BPE)  # for which transformers does not do it
        cleans = settings.values.get("clean_up_tokenization_spaces") is True and not is_bpe
        self.unstable_characters = _CLEANED_CHARACTERS if cleans else 0
        self._coverage = Coverage(self._tokenizer)
        special = {token.content: index for index, token in sorted(added.items()) if token.special}
        self.special_tokens: Mapping[str, int] = {**special, eot_token: self.eot_id}
        self._hidden = frozenset(self.special_tokens.values())
        ends = {index for name, index in special.items() if name in END_TOKENS} | {
            vocabulary.get(eos_token or "", -1)
        }
        other_ends = ends - {self.eot_id, -1}
        self.end_ids = (self.eot_id, *sorted(other_ends))
        # Some tokenizers put a space before the first word of a text and remove it when they decode. So a text that
        # continues another is encoded and decoded after one of these. A tokenizer without a token for them gets none.
        self._prefixes = {"": list[int]()}
        for prefix in ("a", "\n"):
            with contextlib.suppress(DataError):
                self._prefixes[prefix] = self.encode(prefix)
        if vocabulary.keys() <= self.special_tokens.keys():
            raise DataError(f"data.tokenizer: {where}: has no tokens besides special ones")
        self._letter = self._prefixes.get("a", [])[-1:] or [
            min(id for name, id in vocabulary.items() if name not in self.special_tokens)
        ]
        self._letter_text = self._text(self._letter)

    @classmethod
    def from_file(cls, path: Path) -> HFTokenizer:
        """Reads a file, and the files in its folder that belong to it.

        Raises:
            DataError: It cannot be read, or see `__init__`.
        """
        companions = read_files(path.parent)
        content = llama.with_rules(_read_bytes(path), parse(companions, str(path)), path.parent)
        return cls(content, str(path), companions)

    @classmethod
    def from_vocabulary(cls, path: Path) -> HFTokenizer:
        """Reads the vocab.txt of BERT, and the files in its folder that belong to it.

        Raises:
            DataError: It cannot be read or is not a vocabulary of BERT, or see `__init__`.
        """
        companions = read_files(path.parent)
        settings = parse(companions, str(path))
        content = wordpiece.tokenizer_json(_read_bytes(path), settings.values, settings.named, str(path))
        return cls(content, str(path), companions)

    @classmethod
    def from_sentencepiece(cls, path: Path) -> HFTokenizer:
        """Reads a file of SentencePiece, and the files in its folder that belong to it.

        Raises:
            DataError: It cannot be read or is not supported, or see `__init__`.
        """
        companions, added = read_files(path.parent), read_added_tokens(path.parent)
        settings = parse(companions, str(path))
        content, config = sentencepiece.tokenizer_files(_read_bytes(path), settings, added, str(path), path.name)
        return cls(content, str(path), {**companions, CONFIG: config})

    @property
    def files(self) -> Mapping[str, bytes]:
        """The tokenizer.json and the files next to it, by name, with the chat template as it is."""
        return self._files

    @property
    def chat_template(self) -> str | None:
        """The chat template, in the language of jinja2; None without one. It can be set."""
        return self.chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self._files = {name: data for name, data in self._files.items() if name not in (TEMPLATE, PROCESSOR_TEMPLATE)}
        self.chat_templates = {} if template is None else {**self.chat_templates, "default": template}
        if template is not None:
            self._files[TEMPLATE] = utf8(template)
        elif CONFIG in self._files:
            values = json.loads(self._files[CONFIG])
            values.pop("chat_template", None)
            self._files[CONFIG] = json.dumps(values, indent=2, ensure_ascii=False).encode()

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without special tokens around it.

        Raises:
            NoTokenError: The tokenizer has no token for a part of the text.
            DataError: The text has a lone surrogate.
        """
        text = _clean(text)
        with self._errors([text]):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the tokens of a text with those that the file puts around it, such as a beginning-of-text token.

        Raises:
            NoTokenError, DataError: See `encode`.
        """
        text = _clean(text)
        with self._errors([text]):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            if self._post_processor is not None:
                encoding = self._post_processor.process(encoding, None, True)
            ids: list[int] = encoding.ids
        return ids

    def contradictions(self) -> list[str]:
        """Returns what tokenizer_config.json says of the tokens around a text and tokenizer.json does not do."""
        found = []
        for key, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
            stated, token = (
                self._settings.values.get(key),
                self.special_tokens.get(self.template_tokens.get(name, "")),
            )
            if isinstance(stated, bool) and token is not None and stated != (token in self.encode_prompt("")):
                found.append(
                    f"{self._where}: {key}: {str(stated).lower()} in {CONFIG} has no effect; the post_processor "
                    f"{'adds no' if stated else 'adds the'} {name}, and it decides, as in transformers 5"
                )
        return found

    def encode_texts(self, texts: Sequence[str], limit: int) -> tuple[list[NDArray[Any]], int]:
        """Returns the tokens of each text with those that the file puts around it, int64 `[tokens]`.

        Texts are cut to `limit` tokens in all at their end, before the tokens are put around them.

        Returns:
            The tokens, and how many texts were cut.

        Raises:
            DataError: The tokens around a text alone exceed the limit.
            NoTokenError, DataError: See `encode`.
        """
        texts = [_clean(text) for text in texts]
        around = self._post_processor.num_special_tokens_to_add(False) if self._post_processor is not None else 0
        if around >= limit:
            raise DataError(
                f"data.tokenizer: {self._where}: puts {around} tokens around a text, and {limit} is the limit"
            )
        found, cut = [], 0
        with self._errors(texts):
            for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False):
                if len(encoding) > limit - around:
                    encoding.truncate(limit - around)
                    cut += 1
                if self._post_processor is not None:
                    encoding = self._post_processor.process(encoding, None, True)
                found.append(np.array(encoding.ids, np.int64))
        return found, cut

    def encode_batch(self, texts: Sequence[str], continues: Sequence[bool]) -> list[NDArray[Any]]:
        """Returns the tokens of several texts, int64 `[tokens]` each, in the library's threads.

        Raises:
            NoTokenError, DataError: See `encode`.
        """
        # a letter before white space and a line end before a word, because no token has both
        prefixes = [
            ("a" if text[:1].isspace() else "\n") if follows else ""
            for text, follows in zip(texts, continues, strict=True)
        ]
        prefixes = [prefix if prefix in self._prefixes else "" for prefix in prefixes]
        inputs = [prefix + text for prefix, text in zip(prefixes, texts, strict=True)]
        with self._errors(texts):
            encodings = self._tokenizer.encode_batch_fast(inputs, add_special_tokens=False)
        found = []
        for text, prefix, encoding in zip(texts, prefixes, encodings, strict=True):
            ids, before = encoding.ids, self._prefixes[prefix]
            if ids[: len(before)] != before:  # a token covers more than the prefix
                ids, before = self.encode(text), []
            found.append(np.array(ids[len(before) :], np.int64))
        return found

    def without_unknown(self, text: str) -> tuple[str, dict[str, int]]:
        """Returns a text without the characters that have no token, and the number of each of them."""
        unknown = {character for character in set(text) if not self._coverage.has_token(character)}
        counts = {character: text.count(character) for character in sorted(unknown)}
        return text.translate(dict.fromkeys(map(ord, unknown))), counts

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids, by default without special tokens.

        Invalid UTF-8 becomes U+FFFD, and so do ids outside the vocabulary: a model may have a larger one.
        """
        values = [int(token) for token in ids]
        unknown = next((index for index, token in enumerate(values) if not 0 <= token < self.vocab_size), None)
        if unknown is None:
            return self._text(values, skip_special_tokens)
        known, rest = values[:unknown], self.decode_continuation(values[unknown + 1 :], skip_special_tokens)
        return self._text(known, skip_special_tokens) + "\ufffd" + rest

    def decode_continuation(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids that follow other text: a space at its beginning is kept."""
        return self.decode([*self._letter, *ids], skip_special_tokens).removeprefix(self._letter_text)

    def _text(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        # the end-of-text token may be an ordinary token of the file
        hidden = self._hidden if skip_special_tokens else ()
        shown = [token for token in ids if token not in hidden]
        with one_line_errors(f"data.tokenizer: {self._where}: cannot decode a text"):
            text: str = self._tokenizer.decode(
                self._with_valid_bytes(shown) if self._bytes else shown, skip_special_tokens=skip_special_tokens
            )
        return _clean_up(text) if self.unstable_characters else text

    def _with_valid_bytes(self, ids: list[int]) -> list[int]:
        """Returns tokens with those of U+FFFD in place of bytes that are not valid UTF-8.

        The library replaces all adjacent bytes if one of them is invalid: complete characters before an unfinished
        one would be lost.
        """
        tokens = {value: token for token, value in self._bytes.items()}
        found: list[int] = []
        for is_byte, run in itertools.groupby(ids, self._bytes.__contains__):
            if is_byte:
                text = bytes(self._bytes[token] for token in run).decode(errors="replace")
                found += [tokens[value] for value in text.encode()]
            else:
                found += run
        return found

    @contextlib.contextmanager
    def _errors(self, texts: Sequence[str]) -> Iterator[None]:
        """Turns errors of the library into a DataError, and checks texts for which it drops characters silently."""
        if self._coverage.is_silent:
            self._check(texts)
        try:
            with one_line_errors(f"data.tokenizer: {self._where}: cannot encode a text"):
                yield
        except DataError:
            self._check(texts)
            raise

    def _check(self, texts: Sequence[str]) -> None:
        """Raises NoTokenError for the first part of the texts without a token."""
        for index, text in enumerate(texts):
            if (found := self._coverage.first_unknown(text)) is not None:
                part, position = found
                shown = part if len(part) <= 20 else f"{part[:20]}..."
                raise NoTokenError(
                    f"data.tokenizer: {self._where}: no token for {shown!r} (character {position + 1:,} of the "
                    "text); remove it, or add an unknown token (unk_token) to the tokenizer",
                    part,
                    position,
                    index,
                )


def _read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"data.tokenizer: {path}: larger than {_MAX_BYTES >> 20} MB: not a tokenizer")
        return path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DataError(f"data.tokenizer: {path}: cannot be read: {reason}") from None


def _byte_tokens(vocabulary: Mapping[str, int]) -> dict[int, int]:
    """Returns the byte of each token `<0x00>` to `<0xFF>`; empty if one of them is missing."""
    names = [f"<0x{value:02X}>" for value in range(256)]
    return {vocabulary[name]: value for value, name in enumerate(names)} if {*names} <= {*vocabulary} else {}


def _clean(text: str) -> str:
    """Replaces the surrogate escapes of invalid bytes by U+FFFD. Raises DataError for other lone surrogates."""
    return text if text.isascii() else utf8(text).decode("utf-8", errors="replace")


def _apply(settings: Settings, tokenizer: Any) -> list[Any]:
    """Adds tokens that only the files next to a tokenizer.json state, as `transformers` does.

    Returns:
        What has changed. It is empty if the tokenizer.json has all tokens already.
    """
    token_class, changes = library().AddedToken, list[Any]()
    present = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    reprs = {repr(token) for token in present.values()}
    stated = [token_class(**fields) for fields in settings.added.values()]
    added = [token for token in stated if repr(token) not in reprs]
    if added:
        tokenizer.add_tokens(added)
        changes += map(repr, added)
    present |= {token.content: token for token in added}
    special = list(dict.fromkeys((*settings.named.values(), *settings.extra)))
    missing = [text for text in special if text not in present]
    if missing:
        tokenizer.add_special_tokens([token_class(text, special=True, normalized=False) for text in missing])
        changes.append(missing)
    if settings.values.get("split_special_tokens") is True:
        tokenizer.encode_special_tokens = True
        changes.append("split_special_tokens")
    return changes


def _clean_up(text: str) -> str:
    """Returns a text of words without the spaces before punctuation (`clean_up_tokenization_spaces`)."""
    for old, new in _CLEANED.items():
        text = text.replace(old, new)
    return text
