"""The entry point of the `icenet` command and of `python -m icenet`.

Importing the command line takes most of the time until a command starts. Ctrl-C meanwhile ends it with one line, too.
"""

from __future__ import annotations

import atexit
import gc
import sys


def main() -> int:
    """Runs a command and returns its exit code; see `icenet.cli.main`."""
    # at its end Python reads all objects in search of cycles: 0.04 s of 1.1 s until the first token of GPT-2 on MLX
    atexit.register(gc.freeze)
    try:
        from icenet.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("icenet: stopped by Ctrl-C\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
