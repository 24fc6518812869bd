"""Progress bars: Rich on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

__all__ = ["ProgressBar", "progress_bar"]

_shown: list[Any] = []  # Rich's progress that is on the terminal now, if any


@dataclass(frozen=True)
class ProgressBar:
    """What :func:`progress_bar` yields; without Rich's progress and its task it shows nothing."""

    progress: Any = None
    task: Any = None

    def advance(self, steps: float = 1) -> None:
        """Count finished steps."""
        if self.progress is not None:
            self.progress.advance(self.task, steps)

    def describe(self, description: str) -> None:
        """Say what is being done now."""
        if self.progress is not None:
            self.progress.update(self.task, description=description)


@contextmanager
def progress_bar(
    description: str, total: float | None = None, file: IO[str] | None = None, *, show: bool = True
) -> Iterator[ProgressBar]:
    """Show a bar with what is being done and how long is left; nothing where there is no terminal.

    Inside another of these it is a second line, for as long as it lasts. Inside another live display (a Trainer's own
    bar) it is not shown either: a terminal has room for one.
    """
    out = file or sys.stderr
    if not (show and out.isatty()):
        yield ProgressBar()
        return
    if _shown:
        task = _shown[-1].add_task(description, total=total)
        try:
            yield ProgressBar(_shown[-1], task)
        finally:
            _shown[-1].remove_task(task)
        return
    from rich import progress as rich
    from rich.console import Console
    from rich.errors import LiveError

    text = rich.TextColumn("{task.description}", markup=False)
    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    bar = rich.Progress(
        text, rich.BarColumn(), rich.MofNCompleteColumn(), *times, console=Console(file=out), transient=True
    )
    try:
        bar.start()
    except LiveError:
        yield ProgressBar()
        return
    _shown.append(bar)
    try:
        yield ProgressBar(bar, bar.add_task(description, total=total))
    finally:
        _shown.remove(bar)
        bar.stop()
