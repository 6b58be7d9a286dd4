"""The package `tokenizers` of Hugging Face: its import, its threads, its errors, and what it reads."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from icenet.core.errors import DataError
from icenet.core.files import LFS_POINTER, LFS_REMEDY
from icenet.core.messages import first_line


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


def read_tokenizer(content: bytes, where: str) -> tuple[Any, Any]:
    """Returns the tokenizer of the library, without what drops, adds or samples tokens, and its post-processor."""
    tokenizers = library()
    with one_line_errors(f"data.tokenizer: {where}: this version of tokenizers cannot read it"), _silent():
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except BaseException:  # parsing it before takes as long again
            _check_json(content, where)
            raise
        tokenizer.no_truncation()
        tokenizer.no_padding()
        post_processor = tokenizer.post_processor
        tokenizer.post_processor = None
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        _try(tokenizer)
    return tokenizer, post_processor


def _check_json(content: bytes, where: str) -> None:
    """Raises DataError unless a file is JSON with a model."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 is a ValueError too
        if content.startswith(LFS_POINTER):
            raise DataError(f"data.tokenizer: {where}: is a Git LFS pointer, not the file; {LFS_REMEDY}") from None
        raise DataError(f"data.tokenizer: {where}: not JSON: {first_line(error)}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise DataError(f"data.tokenizer: {where}: not a Hugging Face tokenizer.json: it has no model")


def _try(tokenizer: Any) -> None:
    """Encodes and decodes a text, because the library finds some faults of a file only then."""
    try:
        ids = tokenizer.encode("a b\n", add_special_tokens=False).ids
    except Exception as error:
        if "unk" not in str(error).lower():  # letters without a token, which is no fault of the file
            raise
        ids = [min(tokenizer.get_vocab().values())]
    tokenizer.decode(ids)


@contextlib.contextmanager
def one_line_errors(problem: str) -> Iterator[None]:
    """Turns errors of the library, panics included, into a DataError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, DataError):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        raise DataError(f"{problem}: {first_line(error)}") from None


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
