"""The memory of this process as the kernel counts it, for where a framework does not count its own."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

SOURCE = "growth of the process's resident memory"


class Resident:
    """By how much the resident memory grew at most."""

    def begin(self) -> None:
        """From now on."""
        gc.collect()
        with contextlib.suppress(OSError):  # Linux: the highest so far becomes what it is now
            Path("/proc/self/clear_refs").write_text("5")
        self._held = _now()

    def growth(self) -> int:
        """Bytes."""
        return max(_most() - self._held, 0)


def _now() -> int:
    if sys.platform == "linux":
        return _status("VmRSS")
    found = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(found.stdout) * 1024


def _most() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
