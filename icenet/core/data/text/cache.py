"""Where the tokens of sources are kept, so that they are made once.

    NAME.tokens     the tokens of a source (`icenet.core.data.text.token_file`)
    NAME.shards/    while they are being made: what is done (`icenet.core.data.text.shards`)

A file is written beside its place and renamed into it, so that it is there whole or not at all: two processes that
want the same one, and a kill at any moment, leave nothing broken, and what is done is not done again. Its name is a
hash of everything the tokens depend on, so a changed source makes a new file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from icenet.core.data.text.build import Build, Progress
from icenet.core.data.text.shards import SUFFIX
from icenet.core.data.text.sources import Source
from icenet.core.data.text.token_file import HEADER_BYTES, VERSION, TokenFile, open_file
from icenet.core.errors import DataError
from icenet.core.tokenizers.base import Tokenizer

__all__ = ["HEADER_BYTES", "Progress", "TokenFile", "default_folder", "load_tokens"]

_ABANDONED_SECONDS = 3600
_ABANDONED_SHARDS_SECONDS = 7 * 86400


def default_folder() -> Path:
    """$ICENET_CACHE, or ~/.cache/icenet."""
    chosen = os.environ.get("ICENET_CACHE")
    return Path(chosen).expanduser() if chosen else Path(os.path.expanduser("~"), ".cache", "icenet")


def load_tokens(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path | None = None,
    *,
    text_key: str = "text",
    workers: int | None = None,
    progress: Progress | None = None,
) -> TokenFile:
    """The tokens of a source, from the cache folder where they are there and whole, else made now.

    Args:
        source: its files.
        tokenizer: how their text becomes tokens.
        folder: the cache; `default_folder()` when absent.
        text_key: of files of JSON lines, the key of the text.
        workers: processes that share the work; when absent one where it is little, else one a processor.
        progress: told how far it is.

    Raises:
        DataError: no text in the source, a file that cannot be read, or no place to write to.
    """
    folder = folder if folder is not None else default_folder()
    key = f"{text_key}\n" if any(document.lines for document in source.documents) else ""
    which = os.fsencode(f"{VERSION}\n{tokenizer.name}\n{source.identity}\n{key}")
    state = hashlib.sha256(which)
    for document in source.documents:
        state.update(os.fsencode(f"{document.name}\0{document.size}\0{document.mtime_ns}\n"))
    name = hashlib.sha256(which).hexdigest()[:12]
    path = folder / f"{name}-{state.hexdigest()[:16]}.tokens"
    shards = folder / f"{name}.shards"
    try:
        for _ in range(3):  # a process that sees the source in another state may have cleaned this one away
            found = open_file(path, tokenizer)
            if found is not None:
                return found
            with _alone(shards):
                if open_file(path, tokenizer) is None:  # by now another process may have made it
                    Build(source, tokenizer, text_key, shards, path, progress).run(workers)
                    _clean(path)
    except OSError as error:
        raise _unusable(path, error, shards) from None
    raise DataError(f"the token cache {path} is not what was written there; is the disk sound?")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While it is open, this process alone makes the shards in a folder; others wait.

    The folder goes when it holds no shard.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # who had it has removed the folder meanwhile
            handle = _locked(folder / "lock")
            break
    try:
        yield
    finally:
        if folder.is_dir() and not any(folder.glob(f"*{SUFFIX}")):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked(path: Path) -> int:
    """Waits for a lock and gives its handle. It goes with the process, however that ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(ImportError, OSError):  # Windows; a disk that knows no locks: each does all the work
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.stat(path).st_ino != os.fstat(handle).st_ino:
            raise FileNotFoundError(path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _clean(path: Path) -> None:
    """Removes what killed builds left, and this source's tokens from before it changed."""
    for pattern, age in (("*.tmp", _ABANDONED_SECONDS), ("*.shards", _ABANDONED_SHARDS_SECONDS)):
        for old in path.parent.glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > age:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
    for old in path.parent.glob(f"{path.name.split('-')[0]}-*.tokens"):
        if old != path:
            with contextlib.suppress(OSError):  # Windows refuses while another process uses it
                old.unlink()


def _unusable(path: Path, error: OSError, shards: Path) -> DataError:
    full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    reason = "no space left" if full else (error.strerror or str(error)).lower()
    kept = "; what is done is kept for the next attempt" if full and shards.is_dir() else ""
    return DataError(
        f"cannot keep tokens in {path.parent}: {reason}; "
        f"set ICENET_CACHE to a folder with room that you may write to{kept}"
    )
