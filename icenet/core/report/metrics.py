"""A run's metrics on the disk: a line of JSON for each step and each evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from icenet.core.errors import IceNetError
from icenet.core.files import write_text

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """A file of metrics, one JSON object a line, each line flushed as it is written.

    JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity" (the
    convention of Protocol Buffers' JSON), and `read` gives them back as numbers. A line that a kill or a
    power cut left unfinished is passed over in reading and removed before anything is appended.

    `beside` is another log (`tensorboard.TensorBoardLog`) that is told each record too, and closed with
    this one.
    """

    def __init__(self, path: str | Path, mirror: Any = None) -> None:
        self.path = Path(path)
        self._mirror = mirror
        self._file: IO[str] | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record; numpy scalars become plain numbers.

        Raises:
            IceNetError: the file cannot be written.
        """
        line = json.dumps(plain(record), allow_nan=False) + "\n"
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _mend_tail(self.path)
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None
        if self._mirror is not None:
            self._mirror.append(record)

    def truncate_after(self, step: int) -> None:
        """Drops the records of steps after `step`, and unfinished lines: what a resumed run writes again.

        The file is replaced in one move. Nothing happens where it is not there.

        Raises:
            IceNetError: the file cannot be written.
        """
        self.close()
        if self.path.exists():
            kept = [record for record in self.read(self.path) if record.get("step", step) <= step]
            write_text(self.path, "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in kept))

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """The records of a file, in order; lines that are no JSON object are passed over.

        Raises:
            IceNetError: the file cannot be read.
        """
        try:
            lines = Path(path).read_bytes().split(b"\n")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise IceNetError(f"cannot read the metrics {path}: {reason}") from None
        return [record for line in lines for record in MetricsLog.parse(line)]

    @staticmethod
    def parse(line: bytes) -> list[dict[str, Any]]:
        """The record of a line; none where it is no JSON object."""
        try:
            record = json.loads(line)
        except ValueError:
            return []
        return [_numbers(record)] if isinstance(record, dict) else []

    @classmethod
    def copy(cls, origin: Path, target: Path, step: int) -> None:
        """Appends the records of another file up to a step, where there is one."""
        if origin.is_file():
            with cls(target) as log:
                for record in cls.read(origin):
                    if record.get("step", 0) <= step:
                        log.append(record)

    def close(self) -> None:
        """Closes the file; the next `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._mirror is not None:
            self._mirror.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> IceNetError:
        reason = (error.strerror or str(error)).lower()
        return IceNetError(f"cannot write the metrics {self.path}: {reason}; make room or choose another run folder")


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _numbers(value: Any) -> Any:
    """The reverse of `plain` for what is not finite."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _mend_tail(path: Path) -> None:
    """Cuts an unfinished last line off, so that the next one does not continue it."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end < size:
            file.truncate(end)
