"""`python -m icenet` is the `icenet` command."""

import sys

from icenet.cli import main

sys.exit(main())
