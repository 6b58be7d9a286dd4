"""The file that holds the tokens of a source.

Layout: a header of 4096 bytes (JSON, padded with spaces), the tokens (little-endian uint16, or uint32 if the
vocabulary is larger than 65,536), from the next multiple of eight the offset of each document's first token
(uint64), and what the source leaves out (JSON, see `left_out`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from icenet.core.data.text.left_out import LeftOut
from icenet.core.tokenizers.base import Tokenizer

VERSION = 4
"""Version of the format and of everything that determines the tokens: the order of documents, where chunks end."""
HEADER_BYTES = 4096
PIECE_TOKENS = 1 << 20
"""Tokens that are held in memory at a time."""


@dataclass(frozen=True)
class TokenFile:
    """The tokens of a source.

    Attributes:
        path: The file.
        tokens: All tokens, a read-only memory map, uint16 or uint32 `[num_tokens]`.
        num_documents: Number of documents that are not empty.
        fingerprint: SHA-256, hex, of the tokenizer's name, a newline, and the tokens as little-endian bytes.
        starts: Offset of the first token of each document, a read-only memory map, uint64 `[documents]`. One
            end-of-text token is between a document and the next.
        left_out: What the files of the source have that is not in the tokens.
        has_lines: Whether the source contains JSON lines.
    """

    path: Path
    tokens: NDArray[np.unsignedinteger]
    num_documents: int
    fingerprint: str
    starts: NDArray[np.unsignedinteger]
    left_out: LeftOut
    has_lines: bool


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Returns the dtype that a tokenizer's tokens are stored in."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def open_file(path: Path, tokenizer: Tokenizer) -> TokenFile | None:
    """Opens a token file; returns None if it does not exist or does not match its header.

    Raises:
        OSError: It cannot be read.
    """
    dtype = token_dtype(tokenizer)
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
            expected = _header(tokenizer)
            if {name: header.get(name) for name in expected} != expected:
                return None
            count, documents = header["tokens"], header["starts"]
            starts_offset = _starts_offset(count, dtype)
            end = starts_offset + 8 * documents
            if count < 1 or documents < 1 or os.fstat(file.fileno()).st_size != end + header["left_out"]:
                return None
            file.seek(end)
            left_out = LeftOut(json.loads(file.read()))
            tokens = np.memmap(file, dtype, "r", offset=HEADER_BYTES, shape=(count,))
            starts = np.memmap(file, "<u8", "r", offset=starts_offset, shape=(documents,))
            return TokenFile(
                path, tokens, header["documents"], header["sha256"], starts, left_out, header["json_lines"]
            )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, or other JSON
        return None


def compute_fingerprint(pieces: Iterable[NDArray[np.integer]], tokenizer: Tokenizer) -> str:
    """Returns what `TokenFile.fingerprint` is for tokens, given in pieces."""
    digest = hashlib.sha256(f"{tokenizer.name}\n".encode())
    for piece in pieces:
        digest.update(piece.astype(token_dtype(tokenizer), copy=False).tobytes())
    return digest.hexdigest()


def write_file(
    file: BinaryIO,
    pieces: Iterable[NDArray[np.integer]],
    tokenizer: Tokenizer,
    left_out: LeftOut,
    has_lines: bool = False,
) -> None:
    """Writes a token file.

    Args:
        file: An empty file, open for writing.
        pieces: The tokens, in pieces of any length above 0.
        tokenizer: Its `eot_id` separates documents.
        left_out, has_lines: See `TokenFile`.

    Raises:
        OSError: It cannot be written.
    """
    dtype, eot_id = token_dtype(tokenizer), tokenizer.eot_id
    digest = hashlib.sha256(f"{tokenizer.name}\n".encode())
    count = documents = num_starts = 0
    file.write(b" " * HEADER_BYTES)
    for piece in pieces:
        data = piece.astype(dtype, copy=False).tobytes()
        digest.update(data)
        file.write(data)
        count += len(piece)
    file.write(bytes(_starts_offset(count, dtype) - file.tell()))
    file.flush()
    # The starts follow the tokens, so they are found in a second pass.
    with open(file.name, "rb") as again:
        again.seek(HEADER_BYTES)
        after_eot = True
        for first in range(0, count, PIECE_TOKENS):
            ends = np.fromfile(again, dtype, min(PIECE_TOKENS, count - first)) == eot_id
            begins = np.concatenate(([after_eot], ends[:-1]))
            after_eot = bool(ends[-1])
            starts = np.flatnonzero(begins) + first
            file.write(starts.astype("<u8").tobytes())
            num_starts += len(starts)
            documents += int((begins & ~ends).sum())
    remarks = json.dumps(left_out.as_dict()).encode()
    file.write(remarks)
    counts = {
        "tokens": count,
        "documents": documents,
        "starts": num_starts,
        "sha256": digest.hexdigest(),
        "left_out": len(remarks),
        "json_lines": has_lines,
    }
    file.seek(0)
    file.write(json.dumps(_header(tokenizer) | counts).encode().ljust(HEADER_BYTES))


def _header(tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = token_dtype(tokenizer).str
    return {"format": "icenet-tokens", "version": VERSION, "tokenizer": tokenizer.name, "dtype": dtype}


def _starts_offset(count: int, dtype: np.dtype[Any]) -> int:
    """Returns the offset in the file of the documents' starts."""
    return -(-(HEADER_BYTES + count * dtype.itemsize) // 8) * 8
