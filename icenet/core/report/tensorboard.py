"""The metrics of a run as TensorBoard event files (`pip install 'icenet[tensorboard]'`).

    board = TensorBoardLog(run / "tensorboard")
    board.begin(step, MetricsLog.read(run / "metrics.jsonl"))     # once, before the first `append`
    board.append({"step": 1, "loss": 5.5, "learning_rate": 1e-3, "backend": "mlx"})

`tensorboard --logdir runs` then shows all runs.

The files are written with the record writer of the tensorboard package, without TensorFlow. The smaller tensorboardX
is not suitable:

- Its import imports PyTorch if that is installed.
- Its writer is a thread whose errors are lost: on a full disk a run hangs.
- It names files by the clock of the machine, and TensorBoard reads them in the order of their names.
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
"""Name of the folder in a run's folder."""
_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\..*")


def check() -> None:
    """Checks that the package tensorboard can be imported.

    Raises:
        UsageError: The package is missing or cannot be imported.
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

    Each number of a record is a scalar: `loss` is `train/loss`, `validation_loss` is `validation/loss`. `begin`
    creates a new file, which marks later steps of older files as outdated (a session start event). So a run that was
    resumed at an earlier step shows each step once.
    """

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            UsageError: The package tensorboard is not installed.
        """
        check()
        self.folder = Path(folder)
        self._file: Any = None

    def begin(self, step: int, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """Creates a file for the records after `step`.

        Args:
            step: Number of completed steps.
            history: Earlier records, written if the folder has no events: those of the run that this one branched
                from, or of its steps before `training.tensorboard` was set.

        Raises:
            IceNetError: The file cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.close()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            times = [int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
            # TensorBoard reads the files in the order of their names, and the clock may be behind another machine's
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
        """Writes the numbers of one record. A record without `step` is ignored.

        Raises:
            IceNetError: The file cannot be written.
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
        """Closes the file. The next `append` creates another."""
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
            "free some space, or set training.tensorboard=false"
        )


def _tag(name: str) -> str:
    """Returns the tag of a metric: `validation/loss`, `train/learning_rate`."""
    kind, _, rest = name.partition("_")
    return f"validation/{rest}" if kind == "validation" and rest else f"train/{name}"
