"""Processes that make shards. Each is a fresh Python that imports the data part of IceNet and numpy, no framework.

They are started as commands and talk over pipes, a line of JSON a task: a fork would copy a process in which a
framework may be at work, and `multiprocessing` would run the user's script again in each.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core.data.text.shards import Maker, Task
from icenet.core.errors import DataError
from icenet.core.tokenizers import from_files
from icenet.core.tokenizers.base import FILE, Tokenizer

_START = (
    "import sys, json; first = json.loads(sys.stdin.readline()); sys.path[:] = first['path']; "
    "from icenet.core.data.text.workers import serve; serve(first)"
)
MOST = 64
"""Workers that are started by themselves; more must be asked for."""


def processors() -> int:
    """How many this process may use."""
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    maker: Maker, take: Callable[[], tuple[Any, Task] | None], give: Callable[[Any, Path], None], number: int
) -> None:
    """Makes the shards of all tasks in `number` processes.

    `take` gives a task and what it is called, or None where there are no more; `give` is told of its shard. Both are
    called by one thread at a time.

    Raises:
        DataError: of a task, or because a process ended; the other tasks in hand are given up.
        OSError: a shard could not be written.
    """
    if number == 1:
        while (work := take()) is not None:
            give(work[0], maker.make(work[1]))
        return
    lock, problems = threading.Lock(), list[BaseException]()

    def look_after(process: subprocess.Popen[str]) -> None:
        try:
            assert process.stdin is not None and process.stdout is not None
            _say(process, _introduction(maker))
            while True:
                with lock:
                    work = None if problems else take()
                if work is None:
                    return
                _say(process, work[1].to_json())
                shard = Path(_answer(process))
                with lock:
                    give(work[0], shard)
        except BaseException as error:
            problems.append(error)

    processes: list[subprocess.Popen[str]] = []
    threads: list[threading.Thread] = []
    try:
        for _ in range(number):
            processes.append(_start())
            threads.append(threading.Thread(target=look_after, args=(processes[-1],), daemon=True))
            threads[-1].start()
        while any(thread.is_alive() for thread in threads) and not problems:
            for thread in threads:
                thread.join(0.05)
    finally:
        for process in processes:
            process.kill()
        for thread in threads:
            thread.join()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
    if problems:
        raise problems[0]


def _start() -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
    except OSError as error:
        raise DataError(f"no process to make tokens can be started ({error.strerror}); try --workers 1") from None


def _introduction(maker: Maker) -> dict[str, Any]:
    files = {name: content.decode("utf-8") for name, content in maker.tokenizer.files.items()}
    return {
        "path": [entry or os.getcwd() for entry in sys.path],
        "folder": str(maker.folder),
        "tokenizer": files,
        "text_key": maker.text_key,
        "dtype": maker.dtype.str,
    }


def _say(process: subprocess.Popen[str], value: dict[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended: its answer is told
        process.stdin.write(json.dumps(value) + "\n")
        process.stdin.flush()


def _answer(process: subprocess.Popen[str]) -> str:
    """The file of a shard, or the error that the process tells."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.endswith("\n"):
        code = process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise DataError(
            f"a process that makes tokens ended ({how}); where memory is short, fewer may do: icenet prepare CONFIG "
            "--workers 1"
        )
    answer = json.loads(line)
    if "errno" in answer:
        raise OSError(answer["errno"], answer["error"])
    if "error" in answer:
        raise DataError(answer["error"])
    return str(answer["shard"])


def serve(first: dict[str, Any]) -> None:
    """What such a process does: a shard for each line of its standard input, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; who started this one ends it
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = from_files({name: text.encode("utf-8") for name, text in first["tokenizer"].items()})
        problem = None
    except DataError as error:
        problem = error
    folder, dtype = Path(first["folder"]), np.dtype(first["dtype"])
    maker = Maker(folder, tokenizer, first["text_key"], dtype) if tokenizer else None
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            if maker is None:
                raise problem or DataError(f"data.tokenizer: {FILE} cannot be read")
            answer = {"shard": str(maker.make(Task.from_json(json.loads(line))))}
        except DataError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": error.strerror or str(error), "errno": error.errno or errno.EIO}
        except MemoryError:
            answer = {"error": "out of memory; fewer processes may do: icenet prepare CONFIG --workers 1"}
        try:
            print(json.dumps(answer), flush=True)
        except BrokenPipeError:
            os._exit(1)
