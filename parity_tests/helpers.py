"""Helpers of several test files: tiny configurations, models, texts, commands and fresh processes, states of runs.

Fixtures are in `conftest.py`.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from icenet.core.config import Config, ModelConfig
from icenet.core.report.metrics import MetricsLog
from icenet.core.runs import checkpoint
from icenet.core.training.trainer import Result, Trainer

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""

BACKENDS = ("mlx", "torch")
PACKAGES = {"mlx": "icenet", "torch": "icenet_torch"}
both_backends = pytest.mark.parametrize("backend", BACKENDS)
"""Runs a test once per backend, passed as `backend`."""

# ---- configurations ---------------------------------------------------------------------------------------

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


TINY_MODELS: dict[str, dict[str, Any]] = {
    "transformer": TINY["model"],
    "lstm": {"type": "lstm", "hidden_size": 24, "num_layers": 2, "vocab_size": 257, "dropout": 0.1},
    "gru": {"type": "gru", "hidden_size": 24, "num_layers": 2, "vocab_size": 257, "dropout": 0.1},
    "rnn": {"type": "rnn", "hidden_size": 24, "num_layers": 2, "vocab_size": 257, "dropout": 0.1},
    "cnn": {
        "type": "cnn",
        "base_channels": 4,
        "num_layers": 2,
        "hidden_size": 12,
        "vocab_size": 10,
        "image_channels": 1,
        "dropout": 0.1,
    },
}
"""One small model per family. The text models read bytes, the CNN reads scikit-learn's digits."""

LLAMA: dict[str, Any] = {
    "positions": "rotary",
    "norm": "rms_norm",
    "feed_forward": "gated",
    "activation": "silu",
    "num_kv_heads": 2,
}
"""The options of a transformer like Llama; sizes are those of the test."""

MODEL_CLASSES = {
    "transformer": "TransformerModel",
    "lstm": "LSTMModel",
    "gru": "GRUModel",
    "rnn": "RNNModel",
    "cnn": "CNNModel",
    "vit": "ViTModel",
}


def write_text(path: Path, words: int = 6000) -> Path:
    """Writes a small text with something to learn, the same every time."""
    vocabulary = ["alpha", "beta", "gamma(x)", "if", "then", "else", "return", "größe", "\n", "0.5"]
    chosen = np.random.default_rng(5).integers(len(vocabulary), size=words)
    path.write_text(" ".join(vocabulary[index] for index in chosen), encoding="utf-8")
    return path


def source_code(size: int) -> str:
    """Returns `size` characters of the standard library's source, with awkward text between the files.

    The awkward text: other alphabets, wide and no-break spaces, CR LF, blank lines, long numbers, apostrophes.
    """
    awkward = "größe = '日本語。\n全角\u3000空白' # \U0001f600\r\n\r\n\t\n  \n x\u00a0y don't 12345678\n"
    text = ""
    for path in sorted(Path(textwrap.__file__).parent.glob("*.py")):
        if 2000 < path.stat().st_size < 60_000:
            text += path.read_text(encoding="utf-8") + awkward
        if len(text) >= size:
            break
    return text[:size]


def tiny(folder: Path, *overrides: str, family: str = "transformer") -> Config:
    """Returns the tiny configuration of a family. Text families read a text in `folder`, the CNN reads the digits."""
    values = {**TINY, "model": TINY_MODELS[family]}
    if family == "cnn":
        return Config.from_dict({**values, "data": {"kind": "images", "source": "digits"}}, list(overrides))
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    return Config.from_dict(values, [f"data.source={text}", *overrides])


def version(text: str) -> tuple[int, int]:
    """Returns the first two numbers of a version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


# ---- models and arrays ------------------------------------------------------------------------------------


def build_model(backend: str, config: ModelConfig, seed: int | None = 3) -> Any:
    """Returns a model in evaluation mode. Backend "exact" is PyTorch in float64, the reference of a comparison."""
    models = importlib.import_module(f"{PACKAGES.get(backend, 'icenet_torch')}.models")
    model = getattr(models, MODEL_CLASSES[config.type])(config, seed=seed)
    if backend == "exact":
        model.double().compute_dtype = importlib.import_module("torch").float64
    model.eval()
    return model


def native(backend: str, array: Any, *, images: bool = False) -> Any:
    """Returns a numpy array as an array of a backend; `images` turns NHWC into NCHW for PyTorch."""
    array = np.asarray(array)
    if backend == "mlx":
        return importlib.import_module("mlx.core").array(array)
    if images:
        array = array.transpose(0, 3, 1, 2)
    return importlib.import_module("torch").from_numpy(np.ascontiguousarray(array))


def plain(array: Any) -> np.ndarray:
    """Returns an array of either backend as a numpy array."""
    return array.detach().cpu().numpy() if hasattr(array, "detach") else np.array(array)


def token_ids(*shape: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Returns random token ids, int32."""
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


def check_close(actual: np.ndarray, exact: np.ndarray, noisy: np.ndarray) -> None:
    """Checks that an error is at most 8 times that of `noisy`, or 8 ulps of the largest value."""
    noise = max(float(np.abs(noisy - exact).max()), 2.0**-23 * float(np.abs(exact).max()))
    assert float(np.abs(actual - exact).max()) <= 8 * noise


# ---- processes and commands -------------------------------------------------------------------------------


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Returns the environment of a command that keeps its files in `folder`."""
    return {**os.environ, "ICENET_CACHE": str(folder / "cache"), "COLUMNS": "120", "NO_COLOR": "1", **more}


def start_icenet(arguments: Sequence[str | Path], folder: Path, **more: str) -> subprocess.Popen[str]:
    """Starts `icenet ARGUMENTS` as a new process in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "icenet", *map(str, arguments)],
        cwd=folder,
        env=environment(folder, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # Processes that a script starts in the background ignore Ctrl-C, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


def icenet(
    *arguments: str | Path, folder: Path, code: int | None = 0, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs `icenet ARGUMENTS` as a new process to its end. It must exit with `code`, unless that is None."""
    process = start_icenet(arguments, folder, **more)
    out, err = process.communicate(timeout=300)
    assert code is None or process.returncode == code, f"exit code {process.returncode}: {err}{out}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_python(
    program: str, *arguments: str | Path, blocked: Sequence[str] = (), **more: str
) -> subprocess.Popen[str]:
    """Starts a Python program as a new process in the checkout.

    Args:
        program: Source text; common indentation is removed.
        arguments: Its `sys.argv[1:]`.
        blocked: Top-level packages that seem not to be installed.
        more: Environment variables to set.
    """
    prelude = _BLOCK.format(blocked=set(blocked)) if blocked else ""
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(program), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


_BLOCK = """
import importlib.machinery, sys
class _Finder:
    find_distributions = importlib.machinery.PathFinder.find_distributions
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = _Finder
"""


def python(program: str, *arguments: str | Path, blocked: Sequence[str] = (), **more: str) -> str:
    """Runs a Python program as a new process (see `start_python`) and returns its output. It must exit with 0."""
    process = start_python(program, *arguments, blocked=blocked, **more)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    return out.strip()


def error_line(stderr: str) -> str:
    """Returns the error of a command: stderr must be the one line "icenet: MESSAGE" and nothing else."""
    assert stderr.startswith("icenet: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    return stderr[len("icenet: ") : -1]


def failed_command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Runs a command in this process, which must fail with one line; returns its exit code and the line."""
    from icenet.cli.main import main

    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert out == "" and code != 0
    return code, error_line(err)


def is_one_line(message: object, *names: str) -> bool:
    """Returns whether an error is one line that contains each of `names`: the key, the file, the value at fault.

    Tests use it instead of whole sentences, so that a better wording breaks no test.
    """
    text = str(message).strip()
    return bool(text) and "\n" not in text and all(name in text for name in names)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Returns a folder that `make` fills in one of the processes of a test run, for slow fixtures of a module.

    pytest-xdist may give the tests of a module to several processes.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(f"{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


# ---- runs -------------------------------------------------------------------------------------------------


def train(config: Config, run: Path, backend: str, until: int | None = None) -> Result:
    """Starts a run and trains it up to step `until` (default: its end)."""
    return Trainer.start(config, run, backend=backend, quiet=True).fit(until)


def resume(path: Path, backend: str | None = None, until: int | None = None, **more: Any) -> Result:
    """Resumes a run or checkpoint, on another backend if one is named, up to step `until` (default: its end)."""
    return Trainer.resume(path, backend=backend, quiet=True, **more).fit(until)


SPEED = 4 * 32 / 0.05
"""Tokens per second of `write_run`: steps of 4 rows of 32 tokens take 0.05 s."""


def write_run(folder: Path, steps: int = 100, *, changes: tuple[int, ...] = (), **extra: Any) -> Path:
    """Writes the configuration and the metrics of a run without training it.

    Args:
        folder: Of the run.
        steps: Number of steps.
        changes: Steps after which the backend changes.
        extra: More values of each record.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(Config.from_dict(TINY, ["training.max_steps=200"]).to_yaml())
    names = ["mlx", "torch"]
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(1, steps + 1):
            backend = names[sum(step > change for change in changes) % 2]
            record = {"step": step, "loss": 2 + 3 * math.exp(-step / 20), "learning_rate": 1e-3, "grad_norm": 1.0}
            log.append({**record, "tokens_per_second": SPEED, "backend": backend, **extra})
            if step % 20 == 0:
                log.append({"step": step, "validation_loss": 3 - step / 100, "backend": backend})
    return folder


def state(run: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Returns weights and optimizer state of a checkpoint of a run (default: the newest)."""
    path = checkpoint.newest(run) if step is None else run / "checkpoints" / f"step-{step:08d}"
    assert path is not None
    found = checkpoint.load(path)
    return {**found.weights, **found.optimizer}


def same_bits(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> bool:
    """Returns whether two states are equal bit for bit, and not empty."""
    return (
        bool(ours)
        and ours.keys() == theirs.keys()
        and all(
            ours[name].dtype == theirs[name].dtype and ours[name].tobytes() == theirs[name].tobytes() for name in ours
        )
    )


def metrics(run: Path, evaluated_every: int = 1) -> list[dict[str, Any]]:
    """Returns the metrics of a run, without the throughput, which differs between any two runs.

    A run also evaluates where it pauses; `evaluated_every` leaves such evaluations out.
    """
    return [
        {key: value for key, value in record.items() if key not in ("tokens_per_second", "data_wait")}
        for record in MetricsLog.read(run / "metrics.jsonl")
        if "loss" in record or record["step"] % evaluated_every == 0
    ]


def losses(run: Path) -> list[float]:
    """Returns the training loss of every step of a run; every step must be there once, in order."""
    records = [record for record in metrics(run) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def tree(folder: Path) -> dict[str, str]:
    """Returns every file below a folder with its SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
