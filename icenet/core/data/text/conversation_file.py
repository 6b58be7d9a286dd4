"""The file that holds the tokens of a source of conversations.

It is a safetensors file with three arrays. `tokens` has the tokens of all conversations, one after the other: uint16
`[n]`, or uint32 for a vocabulary of more than 65,536. `trained`, bool `[n]`, says whether a token is predicted.
`starts`, int64 `[conversations + 1]`, has the offset of the first token of each conversation, and n.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from icenet.core import files
from icenet.core.data.text.left_out import LeftOut
from icenet.core.data.text.token_file import token_dtype
from icenet.core.errors import WeightsError
from icenet.core.tokenizers.base import Tokenizer
from icenet.core.weights import safetensors
from icenet.core.weights.safetensors_writer import write_file

VERSION = "icenet-conversations 1"
"""Version of the format and of everything that determines the tokens."""
_DTYPES = {"tokens": ("U16", "U32"), "trained": ("BOOL",), "starts": ("I64",)}


class Row(NamedTuple):
    """The tokens of one conversation.

    Attributes:
        tokens: int32 `[n]`.
        trained: Whether a token is predicted, bool `[n]`; never the first one.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class ConversationFile:
    """The tokens of conversations, in memory maps.

    Attributes:
        path: The file.
        tokens, trained, starts: See the module.
        fingerprint: SHA-256, hex, of the tokenizer's name, and of the tokens (int32) and `trained` of each row.
        num_trained: Number of tokens that are predicted.
        left_out: What the conversations have that is not in the rows.
    """

    path: Path
    tokens: NDArray[np.unsignedinteger]
    trained: NDArray[np.bool_]
    starts: NDArray[np.int64]
    fingerprint: str
    num_trained: int
    left_out: LeftOut

    def row(self, index: int) -> Row:
        """Returns a conversation."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return Row(self.tokens[part].astype(np.int32), np.asarray(self.trained[part]))


def compute_fingerprint(rows: Iterable[Row], tokenizer: Tokenizer) -> str:
    """Returns what `ConversationFile.fingerprint` is for rows."""
    digest = hashlib.sha256(tokenizer.name.encode())
    for row in rows:
        digest.update(row.tokens.tobytes() + row.trained.tobytes())
    return digest.hexdigest()


def open_file(path: Path) -> ConversationFile | None:
    """Opens a file; returns None if it does not exist, is damaged or has another version."""
    try:
        metadata, entries, data = safetensors.open_file(path)
        if metadata.get("version") != VERSION or any(
            entries[name].dtype not in dtypes for name, dtypes in _DTYPES.items()
        ):
            return None
        arrays: dict[str, Any] = {name: safetensors.view(entries[name], data) for name in _DTYPES}
        tokens, trained, starts = arrays["tokens"], arrays["trained"], arrays["starts"]
        if tokens.ndim != 1 or tokens.shape != trained.shape or starts.ndim != 1 or starts[-1] != len(tokens):
            return None
        left_out = LeftOut(json.loads(metadata["left_out"]))
        return ConversationFile(
            path, tokens, trained, starts, metadata["fingerprint"], int(metadata["num_trained"]), left_out
        )
    except (WeightsError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


class PartialConversations:
    """Collects conversations on the disk, and writes their file. Use it as a context manager.

    Args:
        folder: Holds unfinished work; removed at the end.
        tokenizer: The tokenizer of the conversations.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder, self._dtype = folder, token_dtype(tokenizer)
        self._starts = array("q", [0])
        self._content = hashlib.sha256(tokenizer.name.encode())
        self._num_trained = 0
        self._files = [open(folder / name, "wb") for name in ("tokens", "trained")]  # noqa: SIM115 - see __exit__

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files:
            file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def append(self, row: Row) -> None:
        """Appends a conversation. Raises OSError if it cannot be written."""
        self._content.update(row.tokens.tobytes() + row.trained.tobytes())
        for file, values in zip(self._files, (row.tokens.astype(self._dtype), row.trained), strict=True):
            file.write(values.tobytes())
        self._starts.append(self._starts[-1] + len(row.tokens))
        self._num_trained += int(row.trained.sum())

    def write(self, path: Path, left_out: LeftOut) -> None:
        """Writes the file of at least one conversation, complete or not at all.

        Raises:
            OSError, FileError: It cannot be written.
        """
        for file in self._files:
            file.flush()
        arrays: dict[str, Any] = {
            "tokens": np.memmap(self._folder / "tokens", self._dtype, "r"),
            "trained": np.memmap(self._folder / "trained", np.bool_, "r"),
            "starts": np.array(self._starts, np.int64),
        }
        metadata = {
            "version": VERSION,
            "fingerprint": self._content.hexdigest(),
            "num_trained": str(self._num_trained),
            "left_out": json.dumps(left_out.as_dict()),
        }
        specs = {name: safetensors.spec_of(arrays, name) for name in arrays}
        with files.staged(path) as stage, stage.open(path) as target:
            write_file(target, arrays, specs, metadata, lambda size: None)
