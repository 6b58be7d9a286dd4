"""A run's metrics for TensorBoard (`pip install 'icenet[tensorboard]'`), beside the lines of JSON.

    board = TensorBoardLog(run / "tensorboard")
    board.begin(step, MetricsLog.read(run / "metrics.jsonl"))     # once, before the first `append`
    board.append({"step": 1, "loss": 5.5, "learning_rate": 1e-3, "backend": "mlx"})

Then `tensorboard --logdir runs` shows every run. The event files are written with TensorBoard's own parts, which need
no TensorFlow.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core.errors import IceNetError, UsageError

FOLDER = "tensorboard"
"""Below a run's."""
_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\..*")


def check() -> None:
    """Refuses a run that is to be shown in TensorBoard where it is missing.

    Raises:
        UsageError: it is not installed, or does not start.
    """
    try:
        import tensorboard.compat.proto.event_pb2
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError as error:
        missing = f" ({error})" if "tensorboard" not in str(error) else ""
        raise UsageError(
            f"training.tensorboard needs the package tensorboard{missing}: pip install 'icenet[tensorboard]', "
            "or set training.tensorboard=false"
        ) from None


class TensorBoardLog:
    """Event files in a folder, with the interface of `icenet.core.report.metrics.MetricsLog`.

    Numbers of a record become scalars: `loss` is `train/loss`, `validation_loss` is `validation/loss`. Each beginning
    writes a file of its own, which says from which step on the files before it count no more; so a run that was
    resumed at an earlier step shows each step once.
    """

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            UsageError: tensorboard is not installed.
        """
        check()
        self.folder = Path(folder)
        self._file: Any = None

    def begin(self, step: int, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """Opens a file for the records after `step`.

        `history` are records up to there, written where the folder holds no events yet: of a run that branched off
        from another, or went on with TensorBoard from its middle.

        Raises:
            IceNetError: the file cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.close()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            times = [int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
            # TensorBoard reads the files in the order of their names, which clocks of two machines could reverse
            second = max(int(time.time()), max(times, default=-1) + 1)
            name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"
            self._file = open(self.folder / name, "xb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._unwritable(error) from None
        now = time.time()
        self._write(Event(wall_time=now, step=step + 1 if times else 0, file_version="brain.Event:2"))
        if times:
            self._write(Event(wall_time=now, step=step + 1, session_log=SessionLog(status=SessionLog.START)))
            return
        for record in history:
            if record.get("step", math.inf) <= step:
                self.append(record)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes the numbers of one record; without a step there is nothing to show.

        Raises:
            IceNetError: the file cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._file is None:
            self.begin(int(record.get("step", 1)) - 1)
        values = [
            Summary.Value(tag=_tag(name), simple_value=float(value))
            for name, value in record.items()
            if name != "step" and isinstance(value, (bool, int, float, np.number, np.bool_))
        ]
        if values and "step" in record:
            self._write(Event(wall_time=time.time(), step=int(record["step"]), summary=Summary(value=values)))

    def close(self) -> None:
        """Closes the file; the next `append` begins another."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        try:
            RecordWriter(self._file).write(event.SerializeToString())
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> IceNetError:
        reason = (error.strerror or str(error)).lower()
        return IceNetError(
            f"cannot write TensorBoard's events in {self.folder}: {reason}; "
            "make room, or set training.tensorboard=false"
        )


def _tag(name: str) -> str:
    """Where a metric is shown: `validation/loss`, `train/learning_rate`."""
    kind, _, rest = name.partition("_")
    return f"validation/{rest}" if kind == "validation" and rest else f"train/{name}"
