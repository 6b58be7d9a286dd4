"""What several tests share: a tiny configuration, a text, the command in a process of its own, states to compare."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core.config import Config
from icenet.core.report.metrics import MetricsLog
from icenet.core.training import checkpoint

BACKENDS = ("mlx", "torch")

TINY: dict[str, Any] = {
    "device": "cpu",
    "seed": 3,
    "model": {
        "type": "transformer",
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 257,
        "max_seq_length": 32,
        "dropout": 0.1,
    },
    "data": {"source": "text.txt"},
    "training": {
        "max_steps": 20,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "min_learning_rate": 1e-4,
        "warmup_steps": 3,
        "eval_every": 10,
        "eval_batches": 2,
        "checkpoint_every": 5,
        "keep_checkpoints": None,
    },
}


def write_text(path: Path, words: int = 6000) -> Path:
    """A small text with something to learn, the same every time."""
    vocabulary = ["alpha", "beta", "gamma(x)", "if", "then", "else", "return", "größe", "\n", "0.5"]
    chosen = np.random.default_rng(5).integers(len(vocabulary), size=words)
    path.write_text(" ".join(vocabulary[index] for index in chosen), encoding="utf-8")
    return path


def tiny(folder: Path, *overrides: str) -> Config:
    """The tiny configuration, on a text in `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    return Config.from_dict(TINY, [f"data.source={text}", *overrides])


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a command that keeps its files in `folder`."""
    return {**os.environ, "ICENET_CACHE": str(folder / "cache"), "COLUMNS": "120", "NO_COLOR": "1", **more}


def start_icenet(arguments: Sequence[str | Path], folder: Path, **more: str) -> subprocess.Popen[str]:
    """`icenet ARGUMENTS` begun in a process of its own, in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "icenet", *map(str, arguments)],
        cwd=folder,
        env=environment(folder, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # where the tests run in the background of a script, Ctrl-C is ignored, and processes inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


def icenet(
    *arguments: str | Path, folder: Path, code: int | None = 0, **more: str
) -> subprocess.CompletedProcess[str]:
    """`icenet ARGUMENTS` run to its end in a process of its own; `code` is the exit code that it must have."""
    process = start_icenet(arguments, folder, **more)
    out, err = process.communicate(timeout=300)
    assert code is None or process.returncode == code, f"exit code {process.returncode}: {err}{out}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def state(run: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Weights and optimizer state of a checkpoint of a run, the newest if no step is named."""
    path = checkpoint.newest(run) if step is None else run / "checkpoints" / f"step-{step:08d}"
    assert path is not None
    found = checkpoint.load(path)
    return {**found.weights, **found.optimizer}


def same_bits(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> bool:
    """Whether two states are equal bit for bit, and not empty."""
    return (
        bool(ours)
        and ours.keys() == theirs.keys()
        and all(
            ours[name].dtype == theirs[name].dtype and ours[name].tobytes() == theirs[name].tobytes() for name in ours
        )
    )


def metrics(run: Path, evaluated_every: int = 1) -> list[dict[str, Any]]:
    """The metrics of a run, without what no two runs share.

    A run also evaluates where it pauses; `evaluated_every` leaves such evaluations out.
    """
    return [
        {key: value for key, value in record.items() if key != "tokens_per_second"}
        for record in MetricsLog.read(run / "metrics.jsonl")
        if "loss" in record or record["step"] % evaluated_every == 0
    ]


def losses(run: Path) -> list[float]:
    """The training loss of every step of a run; every step is there once, in order."""
    records = [record for record in metrics(run) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def is_one_line(message: object, *names: str) -> bool:
    """Whether an error is one line that contains each of `names`: the key, the file, the value at fault.

    Tests use it instead of whole sentences, so that a better wording breaks no test.
    """
    text = str(message).strip()
    return bool(text) and "\n" not in text and all(name in text for name in names)
