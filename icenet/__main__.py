"""The entry point of the `icenet` command and of `python -m icenet`.

Importing the command line takes most of the time until a command starts. Ctrl-C meanwhile ends it with one line, too.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Runs a command and returns its exit code; see `icenet.cli.main`."""
    try:
        from icenet.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("icenet: stopped by Ctrl-C\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
