"""Cells of a sweep: child runs whose folder is named by the values that they differ in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.files import canonical_json, digest
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.core.storage.run_lock import CHILDREN
from lightning_interp.errors import ManifestError

__all__ = ["GRID", "NOT_RUN", "cell_key", "cell_status", "value_text"]

NOT_RUN = "not run"
GRID = "--grid"  # the key of a sweep's configuration that holds the values: no setting of a recipe can be called so
_LONGEST_VALUE, _LONGEST_KEY = 12, 60


def value_text(value: Any) -> str:
    """A value of a grid as one reads it: a text as it is, all else as JSON, whole floats without a point.

    Example:
        >>> value_text("owl"), value_text(8.0), value_text(1e-4), value_text(True), value_text([1, 2])
        ('owl', '8', '0.0001', 'true', '[1,2]')
    """
    return value if isinstance(value, str) else canonical_json(value)


def cell_key(values: Mapping[str, Any]) -> str:
    """Name a cell by its values: some of them to be read, then a hash of all. Their order does not matter.

    Args:
        values: Plain values by the setting's name; of a dotted name the last part is shown.

    Returns:
        A name that a child run can have, the same wherever and whenever it is made.

    Example:
        >>> cell_key({"lora.r": 8, "lr": 0.001}), cell_key({"lr": 1e-3, "lora.r": 8.0})
        ('r_8-lr_0.001-e5031eb039', 'r_8-lr_0.001-e5031eb039')
    """
    names = sorted(values)
    shown = [f"{name.rpartition('.')[2]}_{value_text(values[name])[:_LONGEST_VALUE]}" for name in names]
    text = re.sub(r"[^a-z0-9._-]+", "_", "-".join(shown).lower())[:_LONGEST_KEY].strip("._-")
    sha = digest(dict(values))[:10]
    return f"{text}-{sha}" if text else sha


def cell_status(run_dir: Path, key: str) -> tuple[str, str]:
    """Return how the last start of a child run ended, and why if it did not finish: ``("failed", "...")``.

    A cell that has not begun is ``not run``; one that a kill has stopped says ``running``.
    """
    folder = run_dir / CHILDREN / key
    try:
        state = read_manifest(folder)
    except ManifestError as error:
        return (NOT_RUN, "") if not (folder / "manifest.json").exists() else ("damaged", str(error))
    last: dict[str, Any] = (state["sessions"] or [{}])[-1]
    return str(last.get("status", NOT_RUN)), str(last.get("message") or "")
