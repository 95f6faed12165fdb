"""`python -m puna` is the command `puna`."""

from __future__ import annotations

import sys

from puna.cli import main

if __name__ == "__main__":
    sys.exit(main())
