"""The metrics of a run in a file: one line of JSON for each step and each evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from icenet.core.errors import IceNetError
from icenet.core.files import write_bytes
from icenet.core.report.tensorboard import TensorBoardLog

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """A file with one JSON object per line. Each line is flushed when it is written.

    JSON has no NaN and no infinity. They are written as the strings "NaN", "Infinity" and "-Infinity", the convention
    of Protocol Buffers, and `read` returns them as numbers. A line that a kill left incomplete is ignored by `read`
    and removed before the next `append`.
    """

    def __init__(self, path: str | Path, mirror: TensorBoardLog | None = None) -> None:
        """
        Args:
            path: Path of the file.
            mirror: Another log that receives each record and is closed together with this one.
        """
        self.path = Path(path)
        self._mirror = mirror
        self._file: IO[str] | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record. Numpy scalars become numbers.

        Raises:
            IceNetError: The file cannot be written.
        """
        line = json.dumps(plain(record), allow_nan=False) + "\n"
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _remove_incomplete_line(self.path)
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None
        if self._mirror is not None:
            self._mirror.append(record)

    def truncate_after(self, step: int) -> int:
        """Moves the records after `step`, which a resumed run writes again, to NAME-replaced.jsonl.

        Lines that are no records are moved, too, except an incomplete last line. The file is replaced atomically,
        after the lines are in the other file. Does nothing if it does not exist.

        Returns:
            The number of training steps after `step` that were recorded.

        Raises:
            IceNetError: A file cannot be written.
        """
        self.close()
        if not self.path.exists():
            return 0
        kept: list[bytes] = []
        moved: list[bytes] = []
        steps = set()
        *lines, incomplete = self._lines(self.path)
        if self.parse(incomplete):  # only the newline is missing
            lines.append(incomplete)
        for line in lines:
            records = self.parse(line)
            number = records[0].get("step", step) if records else None
            is_kept = isinstance(number, (int, float)) and number <= step
            (kept if is_kept else moved).append(line + b"\n")
            if records and not is_kept and "loss" in records[0]:
                steps.add(number)
        if moved:
            replaced = self.path.with_name(f"{self.path.stem}-replaced{self.path.suffix}")
            try:
                with open(replaced, "ab") as file:
                    file.writelines(moved)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise self._unwritable(error) from None
        if moved or incomplete:
            write_bytes(self.path, b"".join(kept))
        return len(steps)

    @staticmethod
    def _lines(path: Path) -> list[bytes]:
        """Returns the lines of a file; the last one is empty unless its newline is missing."""
        try:
            return path.read_bytes().split(b"\n")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise IceNetError(f"cannot read the metrics {path}: {reason}") from None

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """Returns the records of a file in order. Lines that are not JSON objects are ignored.

        Raises:
            IceNetError: The file cannot be read.
        """
        return [record for line in MetricsLog._lines(Path(path)) for record in MetricsLog.parse(line)]

    @staticmethod
    def count_damaged(path: str | Path) -> int:
        """Returns how many lines `read` ignores, without an incomplete last one and empty ones."""
        *lines, _ = MetricsLog._lines(Path(path))
        return sum(bool(line.strip()) and not MetricsLog.parse(line) for line in lines)

    @staticmethod
    def parse(line: bytes) -> list[dict[str, Any]]:
        """Returns a list with the record of a line; an empty one if the line is not a JSON object."""
        try:
            record = json.loads(line)
        except ValueError:
            return []
        return [_numbers(record)] if isinstance(record, dict) else []

    @classmethod
    def copy(cls, origin: Path, target: Path, step: int) -> None:
        """Appends the records of another file up to a step. Does nothing if the file does not exist."""
        if origin.is_file():
            with cls(target) as log:
                for record in cls.read(origin):
                    if record.get("step", 0) <= step:
                        log.append(record)

    def close(self) -> None:
        """Closes the file. The next `append` opens it again."""
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
        return IceNetError(f"cannot write the metrics {self.path}: {reason}; free some space or choose another --run")


def plain(value: Any) -> Any:
    """Converts a value to what JSON can represent."""
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
    """Converts the strings for NaN and infinity back to numbers."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _remove_incomplete_line(path: Path) -> None:
    """Removes a last line without a newline, which the next record would continue."""
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
