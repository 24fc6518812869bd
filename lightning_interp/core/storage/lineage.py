"""What a phase of a run depends on, as one digest: each finished phase and child run is chained to those before it.

Manifests of format 1 hashed all earlier results for each phase. Their phases are still recognised: while a run has
such phases, the text that was hashed then is kept beside the chain, each result turned into text only once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_interp.core.storage.content import sha_of
from lightning_interp.core.storage.files import canonical_json, digest

__all__ = ["Lineage", "Token", "is_old_entry"]


def is_old_entry(entry: Mapping[str, Any]) -> bool:
    """Whether a phase's entry was written in format 1, with its result inside."""
    return "result_file" not in entry


@dataclass(frozen=True)
class Token:
    """The digest of what a phase depends on, and the one that format 1 wrote (empty without phases of that format)."""

    now: str
    old: str = ""

    def fits(self, entry: Mapping[str, Any]) -> bool:
        """Whether a stored phase was run with these very inputs."""
        return bool(entry["inputs"] == (self.old if is_old_entry(entry) else self.now))


class Lineage:
    """The phases that were called so far, in order; ``digest`` grows by a small hash a phase, whatever the results."""

    def __init__(self, base: str = "", *, old: bool = False) -> None:
        self.digest = base
        self._old: list[str] | None = [] if old else None

    def token(self, name: str, inputs: Any) -> Token:
        """Return the token of a phase that is called now."""
        if inputs is not None:
            given = digest([name, ["given", inputs]])  # as in format 1
            return Token(given, given)
        now = digest([name, ["after", self.digest]])
        if self._old is None:
            return Token(now)
        text = f"[{canonical_json(name)},[{','.join(self._old)}]]"
        return Token(now, hashlib.sha256(text.encode()).hexdigest())

    def add_phase(self, name: str, token: Token, *, result_digest: str, files: Mapping[str, Any], result: Any) -> None:
        """Add a finished phase."""
        hashes = {file: sha_of(stamp) for file, stamp in files.items()}
        self.digest = digest([self.digest, "phase", name, token.now, result_digest, hashes])
        if self._old is not None:
            self._old.append(canonical_json([name, token.old, result, hashes]))

    def add_child(self, name: str, child: str) -> None:
        """Add a child run."""
        self.digest = digest([self.digest, "child", name, child])
        if self._old is not None:
            self._old.append(canonical_json(["child", name, child]))
