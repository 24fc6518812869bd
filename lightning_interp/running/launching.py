"""Where the cells of a sweep run, and how its start ended."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lightning_interp.core.storage.manifest_file import message_of
from lightning_interp.errors import InterpError
from lightning_interp.running.sweep_grid import Cell

if TYPE_CHECKING:
    from lightning_interp.core.storage.manifest import RunManifest

__all__ = ["LAUNCHERS", "Launcher", "LocalLauncher", "SweepEnd", "run_cell"]

log = logging.getLogger(__name__)


class Launcher(Protocol):
    """Where and in which order the cells of a sweep run."""

    @property
    def alone(self) -> bool:
        """Whether cells run in other processes.

        The sweep's own run is closed meanwhile, since a child run can be opened alone only then, and ``run_one`` can
        be pickled.
        """

    def run(self, cells: Iterable[Cell], run_one: Callable[[Cell], str]) -> dict[str, str]:
        """Run the cells.

        Args:
            cells: They end when the sweep's time is up, so the next one is taken only when it can begin.
            run_one: Runs a cell, and returns why it failed; empty if it did not.

        Returns:
            What ``run_one`` returned, by the cell's key.
        """


@dataclass(frozen=True)
class LocalLauncher:
    """One cell after the other, in this process."""

    alone: bool = False

    def run(self, cells: Iterable[Cell], run_one: Callable[[Cell], str]) -> dict[str, str]:
        """Run the cells; see :class:`Launcher`."""
        return {cell.key: run_one(cell) for cell in cells}


LAUNCHERS: Mapping[str, Callable[[], Launcher]] = {"local": LocalLauncher}
"""By the name that the command line takes."""


@dataclass(frozen=True)
class SweepEnd:
    """How a start of a sweep ended: how many of its cells are finished, failed, and left for another start.

    ``summary`` holds a row for each cell, on the rank that writes.
    """

    finished: int
    failed: int
    left: int
    summary: list[dict[str, Any]]

    @property
    def message(self) -> str:
        """What is missing; empty if nothing is."""
        total = self.finished + self.failed + self.left
        parts = [f"{count} of {total} cells {what}" for count, what in ((self.failed, "failed"), (self.left, "left"))]
        return ", ".join(part for part, count in zip(parts, (self.failed, self.left), strict=True) if count)


def run_cell(cell: Cell, parent: RunManifest | None = None) -> str:
    """Run a cell, or go on with it; a failure is written down in its run, logged, and returned as a text.

    Args:
        cell: The cell.
        parent: The sweep's open run; None runs the cell alone.
    """
    began = time.monotonic()
    try:
        cell.recipe.run(parent)
        failure = ""
        log.info("cell %s: finished in %.1f s", cell.label, time.monotonic() - began)
    except Exception as error:  # whatever it was, the other cells are run
        failure = message_of(error)
        known = isinstance(error, InterpError)
        log.warning("cell %s: failed: %s", cell.label, failure, exc_info=None if known else error)
    gc.collect()  # models of this cell, before the next one loads its own
    return failure
