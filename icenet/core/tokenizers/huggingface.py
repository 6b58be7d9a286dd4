"""Tokenizers of Hugging Face's library `tokenizers`, defined by one file, tokenizer.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import DataError
from icenet.core.tokenizers.base import TOKENIZER_FILE, utf8

EOT_TOKENS = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<|end|>", "<end_of_text>"),
    *("<｜end▁of▁sentence｜>", "<|im_end|>", "[SEP]"),
)
"""Common names of the end-of-text token. The first one in the vocabulary is used."""
END_TOKENS = frozenset({*EOT_TOKENS, "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"} - {"[SEP]"})
"""Names of special tokens that end a text or a turn of a chat, where generation ends too."""
_MAX_BYTES = 1 << 28


class HFTokenizer:
    """A tokenizer.json. Special tokens that are written in a text are encoded as those tokens, as the library does.

    The file's truncation, padding, post-processing (tokens around each text) and BPE dropout are not used: a text is
    encoded completely, always the same, without added tokens.
    """

    def __init__(self, content: bytes, where: str = TOKENIZER_FILE) -> None:
        """Reads the content of a tokenizer.json.

        Args:
            content: The bytes of the file.
            where: Name of the file in error messages.

        Raises:
            DataError: It is not a tokenizer, it has no end-of-text token, or `tokenizers` is not installed.
        """
        self.files: Mapping[str, bytes] = {TOKENIZER_FILE: content}
        self.name = f"hf:{hashlib.sha256(content).hexdigest()[:32]}"
        self._where = where
        self._tokenizer = _read(content, where)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        eot_token = next((name for name in EOT_TOKENS if name in vocabulary), None)
        if eot_token is None:
            raise DataError(
                f"data.tokenizer: {where}: has no end-of-text token ({', '.join(EOT_TOKENS[:4])}, ...); "
                "add one to its added_tokens"
            )
        self.eot_id = vocabulary[eot_token]
        self.vocab_size = max(vocabulary.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: index for index, token in sorted(added.items()) if token.special}
        self.special_tokens: Mapping[str, int] = {**special, eot_token: self.eot_id}
        other_ends = {index for name, index in special.items() if name in END_TOKENS} - {self.eot_id}
        self.end_ids = (self.eot_id, *sorted(other_ends))
        # Some tokenizers put a space before the first word of a text and remove it when they decode. So a text that
        # continues another is encoded and decoded after one of these.
        self._prefixes = {prefix: self.encode(prefix) for prefix in ("a", "\n")}
        self._letter = self._prefixes["a"][-1:]
        self._letter_text = self._text(self._letter)

    @classmethod
    def from_file(cls, path: Path) -> HFTokenizer:
        """Reads a file.

        Raises:
            DataError: It cannot be read, or see `__init__`.
        """
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise DataError(f"data.tokenizer: {path}: larger than {_MAX_BYTES >> 20} MB: not a tokenizer")
            content = path.read_bytes()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DataError(f"data.tokenizer: {path}: cannot be read: {reason}") from None
        return cls(content, str(path))

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without special tokens around it.

        Raises:
            DataError: The text has a lone surrogate, or the tokenizer has no token for a part of it.
        """
        with self._errors("encode"):
            ids: list[int] = self._tokenizer.encode(_clean(text), add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], continues: Sequence[bool]) -> list[NDArray[Any]]:
        """Returns the tokens of several texts, int64 `[tokens]` each, in the library's threads.

        Raises:
            DataError: See `encode`.
        """
        # a letter before white space and a line end before a word, because no token has both
        prefixes = [
            ("a" if text[:1].isspace() else "\n") if follows else ""
            for text, follows in zip(texts, continues, strict=True)
        ]
        inputs = [prefix + text for prefix, text in zip(prefixes, texts, strict=True)]
        with self._errors("encode"):
            encodings = self._tokenizer.encode_batch_fast(inputs, add_special_tokens=False)
        found = []
        for text, prefix, encoding in zip(texts, prefixes, encodings, strict=True):
            ids, before = encoding.ids, self._prefixes.get(prefix, [])
            if ids[: len(before)] != before:  # a token covers more than the prefix
                ids, before = self.encode(text), []
            found.append(np.array(ids[len(before) :], np.int64))
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, without special tokens.

        Invalid UTF-8 becomes U+FFFD, and so do ids outside the vocabulary: a model may have a larger one.
        """
        values = [int(token) for token in ids]
        unknown = next((index for index, token in enumerate(values) if not 0 <= token < self.vocab_size), None)
        if unknown is None:
            return self._text(values)
        return self._text(values[:unknown]) + "\ufffd" + self.decode_continuation(values[unknown + 1 :])

    def decode_continuation(self, ids: Iterable[int]) -> str:
        """Returns the text of ids that follow other text: a space at its beginning is kept."""
        return self.decode([*self._letter, *ids]).removeprefix(self._letter_text)

    def _text(self, ids: list[int]) -> str:
        with self._errors("decode"):
            # the end-of-text token may be an ordinary token of the file
            text: str = self._tokenizer.decode([token for token in ids if token != self.eot_id])
        return text

    def _errors(self, verb: str) -> contextlib.AbstractContextManager[None]:
        return _one_line(f"data.tokenizer: {self._where}: cannot {verb} a text")


def library() -> ModuleType:
    """Returns the module `tokenizers`.

    Raises:
        DataError: It is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        missing = f" ({error})" if not isinstance(error, ModuleNotFoundError) else ""
        raise DataError(
            f"data.tokenizer: a tokenizer.json needs the package tokenizers{missing}: pip install 'icenet[text]'"
        ) from None
    return tokenizers


@contextlib.contextmanager
def limit_threads(count: int | None) -> Iterator[None]:
    """Sets the number of threads of `encode_batch`; None leaves the library's default, one per processor.

    The library reads the number when it first uses threads, and keeps it until the process ends.
    """
    if count is None:
        yield
        return
    values = {"TOKENIZERS_PARALLELISM": "true" if count > 1 else "false", "RAYON_NUM_THREADS": str(count)}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _clean(text: str) -> str:
    """Replaces the surrogate escapes of invalid bytes by U+FFFD. Raises DataError for other lone surrogates."""
    return text if text.isascii() else utf8(text).decode("utf-8", errors="replace")


def _read(content: bytes, where: str) -> Any:
    """Returns the library's tokenizer, without anything that drops, adds or samples tokens."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 is a ValueError too
        raise DataError(f"data.tokenizer: {where}: not JSON: {_first_line(error)}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise DataError(f"data.tokenizer: {where}: not a Hugging Face tokenizer.json: it has no model")
    tokenizers = library()
    with _one_line(f"data.tokenizer: {where}: this version of tokenizers cannot read it"), _silent():
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.post_processor = None
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        tokenizer.decode(tokenizer.encode("a b\n", add_special_tokens=False).ids)
    return tokenizer


@contextlib.contextmanager
def _one_line(problem: str) -> Iterator[None]:
    """Turns errors of the library, panics included, into a DataError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, DataError):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        raise DataError(f"{problem}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discards what Rust writes to the standard error when it panics; the DataError reports it."""
    try:
        saved = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    try:
        sys.stderr.flush()
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
