"""Measures the memory and the disk that a comparison takes on Linux: `python parity_tests/parity/memory.py --help`.

The modules are MLPs with residual connections. A block has 25 MB of outputs in fp32.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import icenet.blas

import mlx.nn as M
import numpy as np
import torch
import torch.nn as T

import icenet
from icenet.parity import compare
from icenet.parity.calls.events import MEMORY_LIMIT, Store

WIDTH, ROWS = 256, 2048


def block(nn: Any, base: type) -> Any:
    """Returns a residual block of a framework."""

    class Block(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act, self.drop = nn.LayerNorm(WIDTH), nn.GELU(), nn.Dropout(0.0)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: Any) -> Any:
            return x + self.drop(self.down(self.act(self.up(self.norm(x)))))

        if base is M.Module:
            __call__ = forward

    return Block()


def usage(folder: str) -> tuple[float, float, float]:
    """Returns the MB of memory that no file backs, of mapped files, and of temporary files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    disk: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith(folder):
                info = os.stat(f"/proc/self/fd/{name}")
                disk[info.st_ino] = 512 * info.st_blocks
        except OSError:  # it is closed
            continue
    own, mapped = (int(status[name].split()[0]) / 1000 for name in ("RssAnon", "RssFile"))
    return own, mapped, sum(disk.values()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=9, help="blocks of the modules")
    parser.add_argument("--limit", type=int, default=MEMORY_LIMIT // 10**6, help="MB of arrays that stay in memory")
    options = parser.parse_args()
    Store.__init__.__defaults__ = (options.limit * 10**6,)  # type: ignore[misc]
    torch.manual_seed(0)
    theirs = T.Sequential(*(block(T, T.Module) for _ in range(options.blocks)))
    ours = icenet.from_torch(theirs, M.Sequential(*(block(M, M.Module) for _ in range(options.blocks))))
    x = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    found, is_done = [], threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder

        def watch() -> None:
            while not is_done.is_set():
                found.append(usage(folder))
                time.sleep(0.02)

        start, before = time.process_time(), usage(folder)
        thread = threading.Thread(target=watch)
        thread.start()
        try:
            report = compare(ours, theirs, x)
        finally:
            is_done.set()
            thread.join()
        peaks = [max(values) for values in zip(*found, strict=True)]
        names = ("memory", "mapped files", "temporary files")
        print("passed" if report.passed else report, f"{time.process_time() - start:.0f} s of processor time")
        for name, first, peak in zip(names, before, peaks, strict=True):
            print(f"{name}: {first:.0f} MB before, {peak:.0f} MB at most")


if __name__ == "__main__":
    main()
