"""Runs the `icenet` command as `python -m icenet`."""

import sys

from icenet.cli.main import main

sys.exit(main())
