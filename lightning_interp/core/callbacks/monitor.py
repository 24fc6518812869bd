"""The base of callbacks that look at a model while somebody trains it: when, undisturbed, logged, kept."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import lightning as L
import torch

from lightning_interp.core.hooks.checks import check_hookable, check_strategy, is_sharded
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.model.own_hooks import suspended
from lightning_interp.errors import RecipeError

__all__ = ["Monitor", "log_reduced", "own_rows"]

Precision = Literal["run", "float32"]
_EVERY = re.compile(r"(?:(\d+) )?(step|epoch|validation)s?")


class Monitor(L.Callback, ABC):
    """Look at a model every so often while it trains, and log what was seen as ``<name>/<measure>``.

    A subclass says in :meth:`look` what is looked at. Each look runs in evaluation mode, under the precision of the
    run; the modes of all modules, ``requires_grad``, gradients and random states are left as found, so a run has the
    same weights with and without it. Interventions that are attached meanwhile are set aside: the bare model is looked
    at, and they count nothing. ``Trainer.validate`` looks too; sanity checks never do.

    Args:
        every: ``"epoch"``, ``"validation"`` (the first one counts), a number of optimiser steps, or several of
            them, such as ``"2 epochs"`` or ``"3 validations"``.
        at_start: Also look before the first step (not again when a run is resumed).
        at_end: Also look after the last step, unless it was looked at already. Only loggers see it, and the history.
        name: Prefix of what is logged, and in the state key: tells several of one class apart.
        precision: ``"run"``, the precision of the Trainer, or ``"float32"``, without autocast.

    Attributes:
        history: One entry a look: finished ``epoch``s, ``step``, and what :meth:`look` gave. Saved in checkpoints.

    Raises:
        RecipeError: If ``every``, ``name`` or ``precision`` has a wrong value.

    Example:
        >>> class WeightNorm(Monitor):
        ...     def look(self, trainer, module):
        ...         return {"norm": float(sum(p.norm() for p in module.parameters()))}
        >>> WeightNorm(every="2 epochs", name="weights").history
        []
    """

    hooks: ClassVar[bool] = False
    """Whether looks put hooks on the model, which a compiled one would ignore."""
    reads_weights: ClassVar[bool] = False
    """Whether looks use values of weights, which some strategies keep in shards."""
    gradients: ClassVar[bool] = False
    """Whether looks compute gradients."""

    def __init__(
        self,
        *,
        every: int | str = "epoch",
        at_start: bool = False,
        at_end: bool = False,
        name: str | None = None,
        precision: Precision = "run",
    ) -> None:
        if precision not in ("run", "float32"):
            raise RecipeError(f"{type(self).__name__}(precision={precision!r}): expected 'run' or 'float32'.")
        self.every_n, self.unit = _parsed(every, type(self).__name__)
        self.at_start, self.at_end = at_start, at_end
        self.name, self.precision = name, precision
        self.history: list[dict[str, float]] = []
        self._validations = 0
        self._seen: list[int] | None = None  # epoch and step of the last moment at which a look was considered
        self._resumed: list[int] | None = None  # the same, of the checkpoint that this run goes on from

    @abstractmethod
    def look(self, trainer: Any, module: Any) -> Mapping[str, float]:
        """What there is to see, the same on every process; every process calls this.

        Split the work with :func:`own_rows`, and reduce it with a torchmetrics metric.

        Args:
            trainer: The Trainer.
            module: The LightningModule.
        """

    def prepare(self, trainer: Any, module: Any, stage: str) -> None:
        """Before a ``fit`` or ``validate``: get ready, and refuse what cannot work."""

    def logged(self, found: Mapping[str, float]) -> Mapping[str, float]:
        """Which of the values are logged; the history holds all."""
        return found

    @property
    def prefix(self) -> str:
        """What stands before ``/<measure>`` in logged names."""
        return self.name or type(self).__name__

    @property
    def state_key(self) -> str:
        """Distinguishes callbacks of one class by their ``name``."""
        return self._generate_state_key(name=self.name) if self.name else super().state_key

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, and when it was last considered."""
        return {
            "history": [dict(entry) for entry in self.history],
            "validations": self._validations,
            "seen": None if self._seen is None else list(self._seen),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was seen before."""
        self.history = [dict(entry) for entry in state_dict["history"]]
        self._validations = int(state_dict.get("validations", 0))
        seen = state_dict.get("seen")
        self._seen = self._resumed = None if seen is None else [int(number) for number in seen]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies, compiled modules and names that cannot work, before anything runs; then get ready.

        Raises:
            UnsupportedStrategyError: If the strategy keeps weights where a look cannot reach them.
            CompiledModelError: If hooks would be ignored.
            RecipeError: If another callback logs under the same name, or the precision cannot be had.
        """
        if stage not in ("fit", "validate"):
            return
        check_strategy(trainer.strategy, reads_weights=self.reads_weights, purpose=type(self).__name__)
        if self.hooks:
            check_hookable(pl_module)
        self.prepare(trainer, pl_module, stage)
        self._check_name(getattr(trainer, "callbacks", ()))
        run = str(getattr(getattr(trainer.strategy, "precision_plugin", None), "precision", ""))
        if self.precision == "float32" and run in ("bf16-true", "16-true", "transformer-engine"):
            raise RecipeError(
                f"{type(self).__name__}({self.prefix!r}, precision='float32') cannot look at weights that the Trainer "
                f"keeps in {run}. Use precision='run', or Trainer(precision='bf16-mixed')."
            )

    def _check_name(self, callbacks: Any) -> None:
        for other in callbacks:
            if isinstance(other, Monitor) and other is not self and other.prefix == self.prefix:
                raise RecipeError(
                    f"{type(self).__name__} and {type(other).__name__} both log as '{self.prefix}/...'. Give one of "
                    "them another name=."
                )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look before the first step; of a resumed run, look where the one before was stopped in between."""
        epoch, step = trainer.current_epoch, trainer.global_step
        if step == 0 and self._resumed is None:
            self._seen = [epoch, step]
            if self.at_start:
                self._run(trainer, pl_module, epoch, "start")
        elif self.unit == "step":
            self._step(trainer, pl_module, "start")
        elif self.unit == "epoch" and self._seen is not None and epoch // self.every_n > self._seen[0] // self.every_n:
            self._considered(trainer, epoch)
            self._run(trainer, pl_module, epoch, "start")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look every so many steps."""
        if self.unit == "step":
            self._step(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look every so many epochs."""
        done = trainer.current_epoch + 1
        if self.unit == "epoch" and self._considered(trainer, done) and done % self.every_n == 0:
            self._run(trainer, pl_module, done)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look every so many validations, and in ``Trainer.validate``."""
        alone = getattr(trainer.state.fn, "value", trainer.state.fn) == "validate"
        if trainer.sanity_checking or (self.unit != "validation" and not alone):
            return
        if self.unit == "validation":
            if not alone and not self._considered(trainer, trainer.current_epoch):
                return
            self._validations += 1
            if (self._validations - 1) % self.every_n:
                return
        self._run(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Look after the last step."""
        if self.at_end and not (self.history and self.history[-1]["step"] == trainer.global_step):
            self._run(trainer, pl_module, trainer.current_epoch, "end")

    def _step(self, trainer: Any, pl_module: Any, how: str = "step") -> None:
        before = self._seen[1] if self._seen is not None else trainer.global_step
        if not self._considered(trainer, trainer.current_epoch):
            return
        if trainer.global_step // self.every_n > before // self.every_n:
            self._run(trainer, pl_module, trainer.current_epoch, how)

    def _considered(self, trainer: Any, epoch: int) -> bool:
        """Note this moment; False if the checkpoint that this run goes on from had it already."""
        self._seen, before, self._resumed = [epoch, trainer.global_step], self._resumed, None
        return self._seen != before

    def _run(self, trainer: Any, pl_module: Any, epoch: int, how: str = "epoch") -> None:
        aside = suspended(pl_module)
        with aside, undisturbed(pl_module, gradients=self.gradients), self._precision(trainer, pl_module):
            found = {key: float(value) for key, value in self.look(trainer, pl_module).items()}
        self.history.append({"epoch": float(epoch), "step": float(trainer.global_step), **found})
        logged = {f"{self.prefix}/{key}": value for key, value in self.logged(found).items()}
        if how != "epoch":
            # Lightning would hold the start back until the epoch ends, thin out steps, and take nothing at the end.
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=trainer.global_step)
        if how != "end":
            log_reduced(pl_module, logged, on_step=how == "step", logger=how == "epoch")

    @contextmanager
    def _precision(self, trainer: Any, pl_module: Any) -> Iterator[None]:
        if self.precision == "run":
            with trainer.strategy.precision_plugin.forward_context():
                yield
        else:
            with torch.autocast(pl_module.device.type, enabled=False):
                yield


def log_reduced(module: Any, values: Mapping[str, float], *, on_step: bool = False, logger: bool = True) -> None:
    """Log numbers that every process holds alike already, so nothing is left to synchronise."""
    how = {"on_step": on_step, "on_epoch": not on_step, "logger": logger, "sync_dist": False, "rank_zero_only": False}
    module.log_dict(dict(values), batch_size=1, **how)


def own_rows(trainer: Any, n: int) -> range:
    """Which of ``n`` rows this process looks at: all of them where sharded weights need every process in every pass."""
    if is_sharded(trainer.strategy):
        return range(n)
    return range(trainer.global_rank, n, trainer.world_size)


def _parsed(every: int | str, kind: str) -> tuple[int, str]:
    """``"2 epochs"`` -> 2 and ``"epoch"``."""
    found = _EVERY.fullmatch(f"{every} steps" if isinstance(every, int) else every)
    count = int(found[1] or 1) if found else 0
    if found is None or count < 1:
        raise RecipeError(
            f"{kind}(every={every!r}): expected 'epoch', 'validation', a number of steps from 1 on, or such as "
            "'2 epochs'."
        )
    return count, found[2]
