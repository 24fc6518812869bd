"""Where a test may kill this process, to see that a run goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections import Counter

__all__ = ["DIE_AT", "die_here"]

DIE_AT = "LIGHTNING_INTERP_DIE_AT"
"""Names the variable that says where: ``step:3`` is the fourth time (from 0) that this process passes ``step``."""

_passed: Counter[str] = Counter()


def die_here(stage: str) -> None:
    """Kill this process with SIGKILL if the environment says so; does nothing without that variable."""
    wanted = os.environ.get(DIE_AT)
    if wanted is not None:
        if wanted == f"{stage}:{_passed[stage]}":
            os.kill(os.getpid(), signal.SIGKILL)
        _passed[stage] += 1
