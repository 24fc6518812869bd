"""A quiet Trainer, shared by the tests that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def trainer(folder: Path, *callbacks: L.Callback, kind: type = L.Trainer, **options: Any) -> Any:
    """A Trainer on one CPU that writes nothing but below the folder."""
    return kind(**{**QUIET, "default_root_dir": folder, "callbacks": list(callbacks), **options})
