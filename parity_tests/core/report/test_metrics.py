"""The file of metrics: complete lines, strict JSON, kills."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icenet.core.errors import IceNetError
from icenet.core.report.metrics import MetricsLog

REPOSITORY = Path(__file__).resolve().parents[3]


def test_records_come_back_and_every_line_is_strict_json(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "loss": np.float32(2.5), "learning_rate": 1e-3, "backend": "mlx", "list": [np.int64(3)]},
        {"step": 2, "loss": math.inf, "grad_norm": -math.inf},
        {"step": 3, "loss": math.nan, "text": "ä\n"},
    ]
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        for record in records:
            log.append(record)
            assert len(MetricsLog.read(path)) == record["step"]  # flushed at once

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse)
    back = MetricsLog.read(path)
    assert back[0] == {"step": 1, "loss": 2.5, "learning_rate": 1e-3, "backend": "mlx", "list": [3]}
    assert back[1] == records[1]
    assert math.isnan(back[2]["loss"]) and back[2]["text"] == "ä\n"


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0\0\0\0", b'{"step": 3, "loss": 1.0}', b'{"t": "\xc3'])
def test_torn_last_line(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert [record["step"] for record in MetricsLog.read(path)][:2] == [1, 2]
    with MetricsLog(path) as log:
        log.append({"step": 3, "loss": 2.0})
    assert MetricsLog.read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 2.0}]
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    log.truncate_after(1)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_torn_line_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for head in (b'{"step": 1}\n', b""):
        path.write_bytes(head + b'{"x": "' + b"y" * 200_000)
        with MetricsLog(path) as log:
            log.append({"step": 2})
        assert path.read_bytes() == head + b'{"step": 2}\n'


def test_truncate_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert MetricsLog(path).truncate_after(3) == 0
    assert not path.exists()
    log = MetricsLog(path)
    for step in range(1, 7):
        log.append({"step": step, "loss": math.nan})
        if step % 2 == 0:
            log.append({"step": step, "validation_loss": 1.0})
    log.append({"note": "without a step"})
    assert log.truncate_after(4) == 2
    assert log.truncate_after(4) == 0
    log.append({"step": 5, "again": True})
    log.close()
    back = MetricsLog.read(path)
    assert [record.get("step") for record in back] == [1, 2, 2, 3, 4, 4, None, 5]
    assert math.isnan(back[0]["loss"]) and back[-1] == {"step": 5, "again": True}
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "metrics-replaced.jsonl"}
    assert [record["step"] for record in MetricsLog.read(tmp_path / "metrics-replaced.jsonl")] == [5, 6, 6]


def test_truncating_damaged_metrics_loses_nothing(tmp_path: Path) -> None:
    """A line that is no record is set aside; only the incomplete last line of a kill is dropped."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nbroken\n{"step": "two"}\n{"step": 3}\n{"step": 4, "lo')
    MetricsLog(path).truncate_after(2)
    assert path.read_bytes() == b'{"step": 1}\n'
    assert (tmp_path / "metrics-replaced.jsonl").read_bytes() == b'broken\n{"step": "two"}\n{"step": 3}\n'
    path.write_bytes(b'{"step": 1}')  # complete, except for the newline
    MetricsLog(path).truncate_after(2)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_kill_loses_at_most_the_line_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from icenet.core.report.metrics import MetricsLog; log = MetricsLog(sys.argv[1])\n"
        "for step in range(10**9):\n    log.append({'step': step, 'loss': step / 7})\n"
        "    print(step, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    seen = [int(process.stdout.readline()) for _ in range(200)]
    process.kill()
    process.wait()
    steps = [record["step"] for record in MetricsLog.read(path)]
    assert steps == list(range(len(steps))) and len(steps) > seen[-1]


def test_metrics_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IceNetError, match=r"cannot write the metrics .*metrics\.jsonl"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl").append({"step": 1})
    with pytest.raises(IceNetError, match=r"cannot read the metrics .*absent\.jsonl: no such file"):
        MetricsLog.read(tmp_path / "absent.jsonl")
    if os.path.exists("/dev/full"):
        (tmp_path / "full.jsonl").symlink_to("/dev/full")
        with pytest.raises(IceNetError, match="no space left"):
            MetricsLog(tmp_path / "full.jsonl").append({"step": 1})
