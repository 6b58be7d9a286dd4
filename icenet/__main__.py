"""`python -m icenet` is the `icenet` command."""

import sys

from icenet.cli.main import main

sys.exit(main())
