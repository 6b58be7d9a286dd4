"""Peak resident memory of this process, as the kernel counts it, for frameworks without a counter of their own.

psutil does not replace this module: it has no peak on Linux and macOS, and cannot reset the one of Linux.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

SOURCE = "growth of the process's resident memory"


class ResidentMemory:
    """Measures the growth of the resident memory, with the interface of a backend's `tools.bench.Gauge`."""

    def begin(self) -> None:
        """Starts a measurement."""
        gc.collect()
        with contextlib.suppress(OSError):  # Linux: resets the peak to the current value
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _current()

    def growth(self) -> int:
        """Returns the peak since `begin` minus the value at `begin`, in bytes."""
        return max(_peak() - self._before, 0)


def _current() -> int:
    if sys.platform == "linux":
        return _status("VmRSS")
    found = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(found.stdout) * 1024


def _peak() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, otherwise kilobytes


def _status(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
