"""Make a probe while somebody's own module predicts or validates."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from lightning_interp.core.callbacks.intervention_callback import InterventionCallback, Stage
from lightning_interp.core.measure.streamed import reduced_sum
from lightning_interp.core.storage.distributed import is_rank_zero
from lightning_interp.errors import InterpError, RecipeError
from lightning_interp.steering.concepts.class_reader import ClassReader, PredictedSide, Reading
from lightning_interp.steering.concepts.moments import ClassMoments
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.concepts.probes import ConceptProbe, ProbeKind

__all__ = ["ProbeCallback"]

_MOMENTS = "moments.safetensors"


class ProbeCallback(InterventionCallback):
    """Stream class means out of a run, and leave probes: in memory, and as safetensors files.

    Memory does not grow with the text. Processes share what they counted at the end of the stage. A stage that runs
    again (the next epoch's validation) starts anew and replaces its result. Training is not read: its weights move.

    Args:
        classes: Which contexts belong to which class: a batch key, or the pairs of a concept; see ``ClassReader``.
        folder: Gets ``<stage>/moments.safetensors`` and one ``<stage>/<kind>.safetensors`` for every kind of probe that
            the moments allow. None writes none (and a run in forked processes then leaves nothing).
        when: Any of ``validate``, ``test``, ``predict``.
        target, tokenizer, name: See ``InterventionCallback``.
        **reading: ``site``, ``positions``, ``ids``, ``dual``, ``scatter``, ``on_softcap``; see ``ClassReader``.

    Attributes:
        moments: By stage, what its last run counted, over all processes.

    Raises:
        RecipeError: If ``when`` holds ``train`` or no stage, or the site holds no state.

    Example:
        >>> callback = ProbeCallback(CounterfactualPairs([(3, 7), (4, 8)]), when=["predict"])
        >>> callback.when, callback.moments
        (('predict',), {})
    """

    def __init__(
        self,
        classes: str | PredictedSide | CounterfactualPairs,
        folder: str | Path | None = None,
        *,
        when: Sequence[Stage] = ("validate", "test", "predict"),
        target: str | None = None,
        tokenizer: Any = None,
        name: str | None = None,
        **reading: Unpack[Reading],
    ) -> None:
        self.reader = ClassReader(classes, **reading)
        super().__init__(self.reader, when=when, target=target, tokenizer=tokenizer, name=name)
        if "train" in self.when:
            raise RecipeError(
                f"ProbeCallback(when={self.when!r}): weights move while training, so its states are of no one model. "
                "Read in some of validate, test, predict."
            )
        self.folder = None if folder is None else str(folder)
        self.moments: dict[str, ClassMoments] = {}

    def probe(
        self, kind: ProbeKind = "dual_md", *, stage: Stage | None = None, alpha: float | None = None
    ) -> ConceptProbe:
        """The probe of what was read.

        Args:
            kind: ``dual_md``, ``primal_md``, or ``lda`` (with ``scatter``).
            stage: Which stage's moments; needed if several stages ran.
            alpha: Regularisation to keep in the probe.

        Returns:
            The probe; its bias is half-way between the class means.

        Raises:
            RecipeError: If nothing was read, or several stages were; or the moments do not hold what the kind needs.
            DataError: If a class has no context (with the counts).
        """
        held = self._held()
        chosen = list(held) if stage is None else [name for name in held if name == stage]
        if len(chosen) != 1:
            known = ", ".join(held) or "none, so run one first (of forked processes only the folder's files stay)"
            raise RecipeError(f"ProbeCallback has no moments of stage {stage!r}. Stages that were read: {known}.")
        return ConceptProbe.from_moments(held[chosen[0]], kind, alpha=alpha)

    def _enter(self, stage: str, trainer: Any, pl_module: Any) -> None:
        self.reader.reset()
        super()._enter(stage, trainer, pl_module)

    def _epoch_end(self, stage: str, trainer: Any, pl_module: Any) -> None:
        if self._stage != stage or trainer.sanity_checking:
            return
        total = reduced_sum(self.reader.moments)
        self.moments.pop(stage, None)
        if total is None:
            warnings.warn(f"ProbeCallback read no token during {stage}, so there is no probe.", stacklevel=2)
            return
        self.moments[stage] = total
        if is_rank_zero():
            self._write(stage, total)
        trainer.strategy.barrier()

    def _write(self, stage: str, total: ClassMoments) -> None:
        asked: dict[ProbeKind, bool] = {"primal_md": True, "dual_md": total.dual, "lda": total.scatter}
        folder = None if self.folder is None else Path(self.folder) / stage
        if folder is not None:
            total.save(folder / _MOMENTS)
        failed: dict[str, InterpError] = {}
        for kind in (kind for kind, wanted in asked.items() if wanted):
            try:
                probe = ConceptProbe.from_moments(total, kind)
            except InterpError as error:
                failed[kind] = error
                if folder is not None:  # what an earlier run left there would pass for this one's
                    (folder / f"{kind}.safetensors").unlink(missing_ok=True)
            else:
                if folder is not None:
                    probe.save(folder / f"{kind}.safetensors")
        if failed:  # no reason to end somebody's run
            made_none, reason = " or ".join(failed), next(iter(failed.values()))
            warnings.warn(f"ProbeCallback made no {made_none} probe of {stage}: {reason}", stacklevel=2)

    def _held(self) -> dict[str, ClassMoments]:
        """Moments by stage; of forked processes, which leave no attribute here, from the folder."""
        if self.moments or self.folder is None:
            return self.moments
        files = {stage: Path(self.folder) / stage / _MOMENTS for stage in self.when}
        return {stage: ClassMoments.load(file) for stage, file in files.items() if file.exists()}
