"""``python -m lightning_interp`` is the command ``lightning-interp``."""

from __future__ import annotations

import sys

from lightning_interp.cli import main

if __name__ == "__main__":
    sys.exit(main())
