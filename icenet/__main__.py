"""The entry point of the `icenet` command and of `python -m icenet`.

Importing the command line takes most of the time until a command starts. Ctrl-C meanwhile ends it with one line, too.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Runs a command and returns its exit code; see `icenet.cli.main`."""
    # at its end Python reads all objects in search of cycles: 0.04 s of 1.1 s until the first token of GPT-2 on MLX
    atexit.register(gc.freeze)
    # nothing is to be cleaned up before the command starts, and an import can turn KeyboardInterrupt into another
    if is_default := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from icenet.cli.main import main as run

    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


def _stop(number: int, frame: FrameType | None) -> None:
    sys.stderr.write("icenet: stopped by Ctrl-C\n")
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
