"""A source's tokens in one memory-mapped file, made once.

The file is a header of 4096 bytes (JSON, padded with spaces) and then the tokens, little-endian. It is
written beside its place and renamed into it, so that it is there whole or not at all: two processes that
build the same one, and a kill at any moment, leave nothing broken. Its name is a hash of everything the
tokens depend on, so a changed source makes a new file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng
from icenet.core.data.sources import Document, Source, text_chunks
from icenet.core.data.tokenizer import Tokenizer
from icenet.core.errors import DataError

VERSION = 1
"""Of the format and of everything that decides the tokens (order of documents, what counts as text)."""
HEADER_BYTES = 4096
_ABANDONED_SECONDS = 3600


@dataclass(frozen=True)
class TokenFile:
    """The tokens of a source: `tokens` is a read-only memory map, uint16 (uint32 above 65,536 tokens)."""

    path: Path
    tokens: NDArray[np.unsignedinteger]
    num_documents: int
    fingerprint: str
    """SHA-256, hex, of the tokenizer's name and a newline, and then the tokens as little-endian bytes."""

    def intact(self, tokenizer: Tokenizer) -> bool:
        """Whether the tokens still have their fingerprint: reads all of them."""
        digest = _digest(tokenizer)
        for start in range(0, len(self.tokens), 1 << 20):
            digest.update(self.tokens[start : start + (1 << 20)].tobytes())
        return digest.hexdigest() == self.fingerprint


def default_folder() -> Path:
    """$ICENET_CACHE, or ~/.cache/icenet."""
    chosen = os.environ.get("ICENET_CACHE")
    return Path(chosen).expanduser() if chosen else Path(os.path.expanduser("~"), ".cache", "icenet")


def load_tokens(source: Source, tokenizer: Tokenizer, folder: Path | None = None) -> TokenFile:
    """The tokens of a source, from the cache folder where they are there and whole, else made now.

    Raises:
        DataError: no text in the source, a file that cannot be read, or no place to write to.
    """
    folder = folder if folder is not None else default_folder()
    which = os.fsencode(f"{VERSION}\n{tokenizer.name}\n{source.identity}\n")
    state = hashlib.sha256(which)
    for document in source.documents:
        state.update(os.fsencode(f"{document.name}\0{document.size}\0{document.mtime_ns}\n"))
    path = folder / f"{hashlib.sha256(which).hexdigest()[:12]}-{state.hexdigest()[:16]}.tokens"
    for _ in range(3):  # a process that sees the source in another state may have cleaned this one away
        found = _open(path, tokenizer)
        if found is not None:
            return found
        _build(source, tokenizer, path)
    raise DataError(f"the token cache {path} is not what was written there; is the disk sound?")


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _digest(tokenizer: Tokenizer) -> hashlib._Hash:
    return hashlib.sha256(f"{tokenizer.name}\n".encode())


def _open(path: Path, tokenizer: Tokenizer) -> TokenFile | None:
    """The tokens in a cache file; None where it is not there, or is not what its header says."""
    dtype = _dtype(tokenizer)
    right = {"format": "icenet-tokens", "version": VERSION, "tokenizer": tokenizer.name, "dtype": dtype.str}
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
            size = os.fstat(file.fileno()).st_size
            if {name: header.get(name) for name in right} != right:
                return None
            count = header["tokens"]
            if size != HEADER_BYTES + count * dtype.itemsize:
                return None
            tokens = np.memmap(file, dtype, "r", offset=HEADER_BYTES, shape=(count,))
            return TokenFile(path, tokens, header["documents"], header["sha256"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, or JSON of another kind
        return None
    except OSError as error:
        raise _unusable(path, error) from None


def _build(source: Source, tokenizer: Tokenizer, path: Path) -> None:
    """Writes the cache file of a source: complete, or not at all."""
    folder = path.parent
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{path.stem}.{secrets.token_hex(4)}.tmp"
        with open(temporary, "xb") as file:
            file.write(b" " * HEADER_BYTES)
            header = _write_tokens(file, source, tokenizer)
            file.seek(0)
            file.write(json.dumps(header).encode().ljust(HEADER_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except PermissionError:  # Windows, where another process has mapped the same file
            if _open(path, tokenizer) is None:
                raise
        _clean(path)
    except OSError as error:
        raise _unusable(path, error) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _write_tokens(file: BinaryIO, source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes the tokens of all documents, in an order drawn once and for all, and gives the header.

    The order is drawn so that the validation part, the tail, is a fair sample of the documents. Files that
    turn out not to be text are taken back.
    """
    dtype = _dtype(tokenizer)
    digest = _digest(tokenizer)
    count = documents = 0
    for index in rng.permutation(rng.key(0, "documents"), len(source.documents)):
        document = source.documents[index]
        before, count_before = digest.copy(), count
        try:
            for tokens in _document_tokens(document, tokenizer, separator=documents > 0):
                data = tokens.astype(dtype).tobytes()
                digest.update(data)
                file.write(data)
                count += len(tokens)
        except UnicodeDecodeError as error:
            if source.sole:
                raise DataError(
                    f"data.source: {document.path} is not UTF-8 text ({error.reason}); "
                    "unpack it or convert it to UTF-8 first"
                ) from None
            digest, count = before, count_before
            file.seek(HEADER_BYTES + count * dtype.itemsize)
            file.truncate()
        documents += count > count_before
    if count == 0:
        number = len(source.documents)
        files = f"{number} file{'s' if number != 1 else ''}"
        raise DataError(f"data.source: there is no text in {source.description} ({files} looked at)")
    return {
        "format": "icenet-tokens",
        "version": VERSION,
        "tokenizer": tokenizer.name,
        "dtype": dtype.str,
        "tokens": count,
        "documents": documents,
        "sha256": digest.hexdigest(),
    }


def _document_tokens(
    document: Document, tokenizer: Tokenizer, *, separator: bool
) -> Iterator[NDArray[np.integer]]:
    """The tokens of a document in pieces, after an end of text where another document is before it."""
    for tokens in tokenizer.encode_stream(text_chunks(document)):
        if len(tokens):
            if separator:
                yield np.array([tokenizer.eot_id])
                separator = False
            yield tokens


def _clean(path: Path) -> None:
    """Removes what killed builds left, and this source's tokens from before it changed."""
    for old in path.parent.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
                old.unlink()
    for old in path.parent.glob(f"{path.name.split('-')[0]}-*.tokens"):
        if old != path:
            with contextlib.suppress(OSError):  # Windows refuses while another process uses it
                old.unlink()


def _unusable(path: Path, error: OSError) -> DataError:
    full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    reason = "no space left" if full else (error.strerror or str(error)).lower()
    return DataError(
        f"cannot keep tokens in {path.parent}: {reason}; "
        "set ICENET_CACHE to a folder with room that you may write to"
    )
