"""The standard streams of a command: closed ones, full disks, encodings without Unicode, and control characters.

Imports the standard library only.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_CONTROL_IN_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""The same without tab and newline."""
_CRLF = re.compile("\r\n")
_ASCII = {"\ufffd": "?", "→": "->", "…": "...", "−": "-", "×": "x", "·": "*", "✓": "+", "✗": "x"} | dict(
    zip("▁▂▃▄▅▆▇█", "_.,-=+*#", strict=True)
)
"""Characters of IceNet's own texts, and their replacement in an encoding that lacks them."""
_REPLACE = "icenet_replace"


def printable(text: str, multiline: bool = False) -> str:
    r"""Returns a text in which control characters are escaped, so that it cannot control a terminal: `\x1b`.

    A byte of a file name that is not UTF-8 is written `\xff`.

    Args:
        text: Any text, such as the name of a file.
        multiline: Keep tabs and newlines.
    """
    return (_CONTROL_IN_TEXT if multiline else _CONTROL).sub(_escaped, _CRLF.sub("\n", text) if multiline else text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that Python could not decode (PEP 383)
        code -= 0xDC00
    return match[0].encode("unicode_escape").decode() if code > 0xFF else _NAMES.get(code, f"\\x{code:02x}")


_NAMES = {9: "\\t", 10: "\\n", 13: "\\r"}


def write(text: str, end: str = "\n") -> None:
    """Writes a text to standard output and flushes it. On a terminal, control characters are escaped.

    Raises:
        OSError: It cannot be written.
    """
    stream = sys.stdout
    stream.write((printable(text, multiline=True) if stream.isatty() else text) + end)
    stream.flush()


def write_error(text: str) -> None:
    """Writes a line to standard error, with control characters escaped. Does nothing if it cannot be written."""
    Diagnostics().write(printable(text) + "\n")


class Diagnostics(io.TextIOBase):
    """Standard error, without errors: a message that cannot be written does not end the program.

    The stream is looked up at each use, because it may be redirected.
    """

    def __init__(self, stream: Any = None) -> None:
        """
        Args:
            stream: The stream to write to; default: `sys.stderr` at each use.
        """
        self._given = stream

    @property
    def stream(self) -> Any:
        """The stream, or None if there is none."""
        stream = sys.stderr if self._given is None else self._given
        return getattr(stream, "rich_proxied_file", stream)  # what rich replaces while it draws a bar

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # full, closed, or None
            self.stream.write(text)
        self.flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return bool(self.stream.isatty())
        return False

    def fileno(self) -> int:
        return int(self.stream.fileno())

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return getattr(self.stream, "errors", None)

    @property
    def buffer(self) -> Any:
        return self.stream.buffer


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Prepares the standard streams of this process for a command.

    - Each one that is closed is opened, so that no file of the command gets its number, into which a library may
      write. Reading standard input and writing standard output then fail as they do if these are closed.
    - Standard output replaces characters that its encoding lacks.
    - Standard error ignores messages that cannot be written.
    """
    _open_closed()
    with contextlib.suppress(AttributeError, ValueError, OSError):
        if sys.stdout.errors in ("strict", "surrogateescape"):
            sys.stdout.reconfigure(errors=_REPLACE)  # type: ignore[union-attr]
    given = sys.stderr
    sys.stderr = Diagnostics(given)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = given


def finish() -> OSError | None:
    """Flushes standard output and standard error. Returns the error of standard output, if there is one.

    A stream that cannot be written is redirected to the null device, so that Python's flush at exit does not fail.
    """
    failure = None
    for stream in (sys.stdout, Diagnostics().stream):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError) as error:
            _discard(stream)
            if stream is sys.stdout and isinstance(error, OSError):
                failure = error
    return failure


def _discard(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _open_closed() -> None:
    # opened in the wrong direction, the null device fails with the error of a closed file
    for number, name, flags in ((0, "stdin", os.O_WRONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, flags)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            else:
                os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            stream = open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Returns the replacement of one character that an encoding lacks; a byte of a file name stays that byte."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    known = _ASCII.get(character)
    return known or character.encode("ascii", "backslashreplace").decode(), error.start + 1


codecs.register_error(_REPLACE, _replace)
