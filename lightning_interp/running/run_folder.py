"""What a recipe's study sees of its run."""

from __future__ import annotations

import logging
import pickle  # for its error alone
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_interp.core.storage.content import drop_damaged_checkpoints
from lightning_interp.errors import ManifestError

if TYPE_CHECKING:
    from lightning_interp.core.storage.manifest import RunManifest
    from lightning_interp.running.terminal import ProgressBar

__all__ = ["RunFolder"]

log = logging.getLogger(__name__)


class RunFolder:
    """What a recipe's study sees of its run: the folder, phases that are run once, and progress bars.

    Args:
        manifest: The open manifest of the run.

    Attributes:
        path: The run folder.
        manifest: The same manifest, of which a study may open child runs.
    """

    def __init__(self, manifest: RunManifest) -> None:
        self.manifest = manifest
        self.path = manifest.path

    @property
    def phase_name(self) -> str | None:
        """The phase that runs now."""
        return self.manifest.current

    def folder(self, name: str) -> Path:
        """Return the folder of a phase."""
        return self.manifest.folder(name)

    def phase(self, name: str, fn: Callable[[Path], Any], *, inputs: Any = None, every_rank: bool = False) -> Any:
        """Run a phase once and remember its result; see ``RunManifest.phase``.

        Checkpoints (``*.ckpt``) that a kill or a full disk left damaged are deleted before it goes on.

        Args:
            name: The phase's name, unique in the run.
            fn: Gets the phase's folder and returns a result of plain values.
            inputs: What the result depends on besides the configuration; None means all phases before this one.
            every_rank: Whether a Trainer runs inside, so that every rank must take part.

        Returns:
            The result.

        Raises:
            ManifestError: As ``RunManifest.phase``, or if a checkpoint holds more than numbers.
        """

        def begin(folder: Path) -> Any:
            for path, fault in drop_damaged_checkpoints(folder).items():  # on each rank: all go on from the same
                log.warning("phase %s: %s cannot be read (%s); deleted, what it held is done again", name, path, fault)
            if self.writes and not any(path.is_file() for path in folder.rglob("*")):  # anew: so are its curves
                shutil.rmtree(self.path / "tensorboard" / name, ignore_errors=True)
            try:
                return fn(folder)
            except pickle.UnpicklingError as error:
                raise ManifestError(
                    f"Phase {name!r}: a checkpoint in {str(folder)!r} holds more than numbers, so reading it could "
                    f"run code, or is none. Delete it to begin the phase anew. ({str(error).splitlines()[0]:.200})"
                ) from error

        return self.manifest.phase(name, begin, inputs=inputs, every_rank=every_rank)

    def progress(self, description: str, total: float | None = None) -> AbstractContextManager[ProgressBar]:
        """Show a progress bar on a terminal, nothing elsewhere; call ``advance()`` on what the context gives."""
        from lightning_interp.running.terminal import progress_bar

        return progress_bar(description, total, show=self.writes)

    @property
    def writes(self) -> bool:
        """Whether this process is the rank that writes and prints."""
        from lightning_interp.core.storage.distributed import is_rank_zero

        return is_rank_zero()
