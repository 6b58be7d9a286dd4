"""The cache of token files: each source is encoded once.

    NAME-STATE.tokens   the tokens of a source (`token_file`, `conversation_file`)
    NAME.partial/       unfinished work (`prepare`, `conversations`)
    NAME.lock           held by the process that encodes the source; others wait

NAME is a hash of the source, the tokenizer and the settings. STATE is a hash of the source's files (names, sizes,
times), so a changed source gets a new token file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from icenet.core import files
from icenet.core.data.text.prepare import Progress, make_token_file
from icenet.core.data.text.sources import Source
from icenet.core.data.text.token_file import VERSION, TokenFile, open_file
from icenet.core.errors import DataError, FileError
from icenet.core.tokenizers.base import Tokenizer
from icenet.core.tokenizers.library import limit_threads

F = TypeVar("F")
"""A file in the cache."""
_NAME = "[0-9a-f]" * 12
_MAX_AGE_SECONDS = {f".{_NAME}-*.tokens.*.tmp": 3600, f"{_NAME}.partial": 7 * 86400, f"{_NAME}.shards": 7 * 86400}
"""Age at which unfinished files count as abandoned. Version 0.1 kept them in `NAME.shards`.

The patterns match no other files, because ICENET_CACHE may be a folder of the user.
"""


def load_tokens(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path | None = None,
    *,
    text_key: str = "text",
    errors: str = "stop",
    workers: int | None = None,
    progress: Progress | None = None,
) -> TokenFile:
    """Returns the tokens of a source. Encodes it first if its tokens are not in the cache.

    Args:
        source: The documents.
        tokenizer: Encodes their text.
        folder: The cache (default: `files.cache_folder()`).
        text_key: Key of the text in JSON lines.
        errors: The value of `data.errors`: stop, skip or replace.
        workers: Number of threads that encode (default: one per processor). The tokens do not depend on it.
        progress: Called with the bytes done and the bytes in total.

    Raises:
        DataError: The source has no text, or a file cannot be read.
        FileError: The cache cannot be written.
    """
    key = f"{text_key}\n" if any(document.lines or document.json for document in source.documents) else ""
    key += "replace\n" if errors == "replace" else ""  # tokens that `stop` finds are those of `skip`

    def make(path: Path, partial: Path) -> None:
        with limit_threads(workers):
            make_token_file(path, source, tokenizer, text_key, partial, progress, errors)

    return cached(
        source,
        f"{VERSION}\n{tokenizer.name}\n{source.identity}\n{key}",
        folder,
        lambda path: _allowed(open_file(path, tokenizer), errors),
        make,
    )


def cached(
    source: Source,
    identity: str,
    folder: Path | None,
    opened: Callable[[Path], F | None],
    make: Callable[[Path, Path], None],
) -> F:
    """Returns the file of a source in the cache. Makes it first if it is not there, in one process at a time.

    Args:
        source: The documents.
        identity: Everything that determines the file, except the content of the documents.
        folder: The cache (default: `files.cache_folder()`).
        opened: Opens the file at a path; returns None if it has to be made.
        make: Writes the file to its first argument, a path. The second is a folder for unfinished work.

    Raises:
        FileError: The cache cannot be written.
    """
    folder = folder if folder is not None else files.cache_folder()
    name = hashlib.sha256(os.fsencode(identity)).hexdigest()[:12]
    state = hashlib.sha256(b"".join(document.state for document in source.documents)).hexdigest()[:16]
    path = folder / f"{name}-{state}.tokens"
    partial = folder / f"{name}.partial"
    try:
        if (file := opened(path)) is not None:
            return file
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(folder / f"{name}.lock"):
            if (file := opened(path)) is not None:  # another process has written it meanwhile
                return file
            make(path, partial)
            _clean(path)
            if (file := opened(path)) is not None:
                return file
    except (OSError, FileError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        raise _unusable(folder, cause, partial.is_dir()) from None
    raise DataError(f"the token file {path} differs from what was written to it; check the disk")


def _allowed(file: TokenFile | None, errors: str) -> TokenFile | None:
    """Returns a file, or None if it left out what is an error now."""
    return file if file is not None and file.left_out.is_allowed(errors) else None


def _clean(path: Path) -> None:
    """Removes abandoned files, and the token files of earlier states of the same source."""
    for pattern, age in _MAX_AGE_SECONDS.items():
        for old in path.parent.glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > age:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
    for old in path.parent.glob(f"{path.name.split('-')[0]}-*.tokens"):
        if old != path:
            with contextlib.suppress(OSError):  # Windows refuses while another process uses it
                old.unlink()


def _unusable(folder: Path, error: BaseException | None, resumable: bool) -> FileError:
    full = getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    reason = "no space left" if full else (getattr(error, "strerror", None) or str(error)).lower()
    kept = "; the work done so far is kept for the next attempt" if full and resumable else ""
    return FileError(
        f"cannot keep tokens in {folder}: {reason}; "
        f"set ICENET_CACHE to a writable folder with enough free space{kept}"
    )
