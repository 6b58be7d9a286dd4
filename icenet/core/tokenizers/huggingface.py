"""Tokenizers of Hugging Face's library `tokenizers`, from the one file tokenizer.json."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import DataError
from icenet.core.tokenizers.base import FILE, utf8

ENDS = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<|end|>", "<end_of_text>"),
    *("<｜end▁of▁sentence｜>", "<|im_end|>", "[SEP]"),
)
"""What tokenizers call the token that ends a text; the first that is there is taken."""
_MAX_BYTES = 1 << 28


class HFTokenizer:
    """A tokenizer.json. Special tokens written in a text are read as those tokens, as the library does.

    What the file says of cutting and filling up (truncation, padding), of tokens around each text (post-processing)
    and of dropout in BPE is not used: a text becomes all of its tokens, the same ones each time, and no others.
    """

    bytes_per_second = 2e6

    def __init__(self, content: bytes, where: str = FILE) -> None:
        """Reads the bytes of a tokenizer.json; `where` is what errors call it.

        Raises:
            DataError: it is none, it has no token that ends a text, or `tokenizers` is not installed.
        """
        self.files: Mapping[str, bytes] = {FILE: content}
        self.name = f"hf:{hashlib.sha256(content).hexdigest()[:32]}"
        self._where = where
        self._tokenizer = _read(content, where)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        end = next((name for name in ENDS if name in vocabulary), None)
        if end is None:
            raise DataError(
                f"data.tokenizer: {where}: has no token that ends a text ({', '.join(ENDS[:4])}, ...); "
                "add one to its added_tokens"
            )
        self.eot_id = vocabulary[end]
        self.vocab_size = max(vocabulary.values()) + 1
        before = self._ids("a")
        self._before = before[-1:]  # stands for the text before a continuation
        self._before_text = self._text(self._before)

    @classmethod
    def from_file(cls, path: Path) -> HFTokenizer:
        """Reads a file.

        Raises:
            DataError: it cannot be read, or see `__init__`.
        """
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise DataError(f"data.tokenizer: {path}: larger than {_MAX_BYTES >> 20} MB, which no tokenizer is")
            content = path.read_bytes()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DataError(f"data.tokenizer: {path}: cannot be read: {reason}") from None
        return cls(content, str(path))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any around it.

        Raises:
            DataError: what is no text (a lone surrogate), or what the tokenizer has no token for.
        """
        return self._ids(utf8(text).decode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out.

        Bytes that are no UTF-8 become U+FFFD, and so do ids that the tokenizer does not have: a model may have a
        larger vocabulary.
        """
        values = [int(token) for token in ids]
        wrong = next((at for at, token in enumerate(values) if not 0 <= token < self.vocab_size), None)
        if wrong is None:
            return self._text(values)
        return self._text(values[:wrong]) + "\ufffd" + self.continuation(values[wrong + 1 :])

    def continuation(self, ids: Iterable[int]) -> str:
        """As `decode`, where a text is before: some decoders drop the space that a text begins with."""
        text = self.decode([*self._before, *ids])
        return text.removeprefix(self._before_text)

    def begins(self, data: bytes, at: int) -> int | None:
        """The first place from `at` on where a token of `data`, UTF-8, begins; None where there is none."""
        try:
            before, after = data[:at].decode("utf-8"), data[at:].decode("utf-8")
        except UnicodeDecodeError:
            return None
        encoding = self._encode(before + after)
        reached = 0
        for token in range(len(encoding)):
            start, stop = self._span(encoding, token)
            if start >= max(reached, len(before)):
                return len((before + after)[:start].encode("utf-8"))
            reached = max(reached, stop)
        return None

    def encode_part(self, data: bytes, first: int, last: int) -> NDArray[np.integer]:
        """The tokens of `data[first:last]`, int64; those that the text around it makes them.

        Where a token would lie across an end, the part is cut there and its tokens are those that it has alone.
        """
        part = data[first:last].decode("utf-8")
        before, after = data[:first].decode("utf-8"), data[last:].decode("utf-8")
        if not before and not after:
            return np.array(self._ids(part), np.int64)
        encoding = self._encode(before + part + after)
        start = self._boundary(encoding, len(before)) if before else 0
        if start is None:
            return self.encode_part(data[first:], 0, last - first)
        stop = self._boundary(encoding, len(before) + len(part)) if after else len(encoding)
        if stop is None:
            return self.encode_part(data[:last], first, last)
        return np.array(encoding.ids[start:stop], np.int64)

    def _boundary(self, encoding: Any, at: int) -> int | None:
        """The first token that begins at character `at` or later; None where the one before reaches beyond."""
        index = bisect.bisect_left(range(len(encoding)), at, key=lambda token: self._span(encoding, token)[0])
        return index if index == 0 or self._span(encoding, index - 1)[1] <= at else None

    @staticmethod
    def _span(encoding: Any, token: int) -> tuple[int, int]:
        span: tuple[int, int] | None = encoding.token_to_chars(token)
        return span or (0, 0)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._encode(text).ids
        return ids

    def _encode(self, text: str) -> Any:
        with _one_line(f"data.tokenizer: {self._where}: cannot read a text"):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def _text(self, ids: list[int]) -> str:
        # the end of a text may be an ordinary token of the file
        with _one_line(f"data.tokenizer: {self._where}: cannot write a text"):
            text: str = self._tokenizer.decode([token for token in ids if token != self.eot_id])
        return text


def library() -> ModuleType:
    """The module `tokenizers`.

    Raises:
        DataError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        missing = f" ({error})" if not isinstance(error, ModuleNotFoundError) else ""
        raise DataError(
            f"data.tokenizer: a tokenizer.json needs the package tokenizers{missing}: pip install 'icenet[text]'"
        ) from None
    return tokenizers


def _read(content: bytes, where: str) -> Any:
    """The library's tokenizer, with nothing in it that would drop tokens, add some, or draw them."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError too
        raise DataError(f"data.tokenizer: {where}: not JSON: {_first_line(error)}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise DataError(f"data.tokenizer: {where}: no tokenizer.json of Hugging Face's: it has no model")
    tokenizers = library()
    with _one_line(f"data.tokenizer: {where}: no tokenizer that this version of tokenizers reads"), _silent():
        made = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        made.no_truncation()
        made.no_padding()
        made.post_processor = None
        if getattr(made.model, "dropout", None):
            made.model.dropout = None
        made.decode(made.encode("a b\n", add_special_tokens=False).ids)
    return made


@contextlib.contextmanager
def _one_line(problem: str) -> Iterator[None]:
    """What goes wrong in the library, its panics included, as a DataError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        raise DataError(f"{problem}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Rust writes where it panicked to the standard error, which is for one line of ours."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        sys.stderr.flush()
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
