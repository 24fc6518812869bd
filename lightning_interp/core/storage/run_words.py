"""Words of a manifest: names of runs and phases, times, and how a session ended."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from lightning_interp.errors import ManifestError

__all__ = ["check_name", "message_of", "now", "status_of"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str, what: str) -> str:
    """Return ``name`` (parts with ``/`` between them) if it can name a run or a phase and stays inside its folder."""
    if not all(_NAME.fullmatch(part) for part in name.split("/")):
        raise ManifestError(
            f"{name!r} cannot name a {what}: it could lead out of the run folder. Use letters, digits, '.', '-' "
            "and '_', beginning with a letter or digit."
        )
    return name


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def status_of(error: BaseException) -> str:
    """Return how a session ended that an error left."""
    return "failed" if isinstance(error, Exception) else "interrupted"


def message_of(error: BaseException) -> str:
    """Return what the manifest says of an error."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        return "KeyboardInterrupt"  # Lightning turns Ctrl-C inside a Trainer into an exit
    if isinstance(error, SystemExit) and error.code == 143:
        return "SIGTERM"
    return f"{type(error).__name__}: {error}".rstrip(": ")
