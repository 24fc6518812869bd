"""Watch, while a model trains, which weights at which tokens carry what it learns."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_interp.core.hooks.checks import check_hookable, check_strategy
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.grafting.adapter_donor import adapted_layers
from lightning_interp.grafting.evaluate import GraftEvaluator, GraftPrompt
from lightning_interp.grafting.metrics import METRICS, GraftScores
from lightning_interp.grafting.plan import GraftPlan

__all__ = ["GraftCallback"]

_LOGGED = ("top1", "top5", "target_prob", "target_logprob", "target_rank", "kl_to_donor")


class GraftCallback(L.Callback):
    """Every few epochs, graft the model being trained into its reference and log ``graft/<plan>/<metric>``.

    With a LoRA adapter the reference is the same model with the adapter off and costs nothing. In full finetuning it is
    a copy of the weights from before training (a second set of weights). Each process scores its share of the prompts.
    The trained model is called, never changed: its modes and the random state are left as found.

    Args:
        prompts: What to ask.
        tokenizer: Default: the module's or data module's ``tokenizer``.
        plans: Default :func:`~lightning_interp.grafting.plan.paper_plans`.
        reference: The recipient, if it is neither the adapter's base nor the weights before training.
        every_n_epochs: How often.
        at_start: Also score before the first step.
        target: Dotted path of the Hugging Face model below the LightningModule, where there are several.
        top_k: For the accuracy beside top-1.
        token_budget: Most tokens of one forward pass.
        missing: ``raise`` or ``drop``; see :class:`~lightning_interp.grafting.evaluate.GraftEvaluator`.
        name: Prefix of what is logged; tells several callbacks apart.

    Attributes:
        history: One entry a scoring: ``{"epoch": ..., "step": ..., "<plan>/<metric>": ...}``. Saved in checkpoints.

    Example:
        >>> callback = GraftCallback([GraftPrompt("Ann met", "Bo", {"FE": "Ann"})], every_n_epochs=2)
        >>> callback.history
        []
    """

    def __init__(
        self,
        prompts: Sequence[GraftPrompt],
        *,
        tokenizer: Any = None,
        plans: Mapping[str, GraftPlan] | None = None,
        reference: nn.Module | None = None,
        every_n_epochs: int = 1,
        at_start: bool = True,
        target: str | None = None,
        top_k: int = 5,
        token_budget: int = 4096,
        missing: str = "raise",
        name: str = "graft",
    ) -> None:
        if every_n_epochs < 1:
            raise RecipeError(f"GraftCallback(every_n_epochs={every_n_epochs}) never runs; expected at least 1.")
        self.prompts = list(prompts)
        self.tokenizer = tokenizer
        self.plans = dict(plans) if plans is not None else None
        self.reference = reference
        self.every_n_epochs = every_n_epochs
        self.at_start = at_start
        self.target = target
        self.top_k = top_k
        self.token_budget = token_budget
        self.missing = missing
        self.name = name
        self.history: list[dict[str, float]] = []
        self._evaluator: GraftEvaluator | None = None
        self._snapshot: nn.Module | None = None

    @property
    def state_key(self) -> str:
        """Distinguishes callbacks by their ``name``."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"history": [dict(entry) for entry in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured before."""
        self.history = [dict(entry) for entry in state_dict["history"]]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work; in full finetuning, copy the weights from before training.

        Raises:
            IncompatibleModelError: If there is nothing to compare with.
        """
        if stage not in ("fit", "validate"):
            return
        check_strategy(trainer.strategy, reads_weights=True, purpose=type(self).__name__)
        check_hookable(pl_module)
        model_map = ModelMap.build(pl_module, target=self.target)
        model = model_map.model
        self._evaluator = self._make_evaluator(trainer, pl_module)
        if self.reference is not None or _adapter(model_map) is not None or self._snapshot is not None:
            return
        if stage != "fit":
            kind, where = type(model).__name__, getattr(stage, "value", stage)
            raise IncompatibleModelError(
                f"GraftCallback has no reference to compare {kind} with in {where!r}: it has no adapter and no weights "
                "from before training. Pass GraftCallback(reference=pretrained_model)."
            )
        self._snapshot = copy.deepcopy(model).requires_grad_(False).eval()

    def _make_evaluator(self, trainer: Any, pl_module: Any) -> GraftEvaluator:
        tokenizer = self.tokenizer or getattr(pl_module, "tokenizer", None)
        tokenizer = tokenizer or getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None:
            raise RecipeError(f"GraftCallback({self.name!r}) found no tokenizer. Pass GraftCallback(tokenizer=...).")
        return GraftEvaluator(
            self.prompts,
            tokenizer,
            plans=self.plans,
            top_k=self.top_k,
            token_budget=self.token_budget,
            missing=self.missing,
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Score before the first step (not again when a run is resumed)."""
        if self.at_start and trainer.global_step == 0:
            logged = self._run(trainer, pl_module, epoch=0)
            # Lightning forgets what is logged here before the first epoch, so the loggers would never see it.
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=0)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Score every ``every_n_epochs`` epochs."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._run(trainer, pl_module, epoch=trainer.current_epoch + 1)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Score in ``Trainer.validate``; validation inside ``fit`` follows the training epochs."""
        if getattr(trainer.state.fn, "value", trainer.state.fn) == "validate":
            self._run(trainer, pl_module, epoch=trainer.current_epoch)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let the copy go: after an exception Lightning calls nothing else."""
        self._snapshot = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the copy go."""
        self._snapshot = None

    def _run(self, trainer: Any, pl_module: Any, *, epoch: int) -> dict[str, float]:
        scores = self._score(trainer, pl_module)
        entry: dict[str, float] = {"epoch": float(epoch), "step": float(trainer.global_step)}
        for p, plan in enumerate(self._ready.plans):
            for metric in _LOGGED:
                column = scores[:, p, METRICS.index(metric)]
                value = column.median() if metric == "target_rank" else column.mean()
                entry[f"{plan}/{metric}"] = float(value)
        self.history.append(entry)
        logged = {f"{self.name}/{key}": value for key, value in entry.items() if "/" in key}
        # Every process holds the same reduced numbers, so nothing is left to synchronise.
        pl_module.log_dict(
            logged, on_step=False, on_epoch=True, sync_dist=False, batch_size=len(scores), rank_zero_only=False
        )
        return logged

    def _score(self, trainer: Any, pl_module: Any) -> torch.Tensor:
        """Scores of all prompts on every process, ``[n, plans, 8]``."""
        trained_map = ModelMap.build(pl_module, target=self.target)
        trained = trained_map.model
        adapter, evaluator = _adapter(trained_map), self._ready
        recipient: nn.Module = self.reference or self._snapshot or trained
        donor: nn.Module | str = adapter if recipient is trained and adapter is not None else trained
        if recipient is not trained:
            recipient.to(next(trained.parameters()).device)
        metric = GraftScores(list(evaluator.plans)).to(pl_module.device)
        training = {module: module.training for module in trained.modules()}
        trained.eval()
        try:
            with trainer.strategy.precision_plugin.forward_context():
                shares = evaluator.scores(
                    ModelMap.build(recipient), donor, rank=trainer.global_rank, world_size=trainer.world_size
                )
                for index, scores, _ in shares:
                    metric.update(index.to(pl_module.device), scores.to(pl_module.device))
        finally:
            for module, mode in training.items():
                module.training = mode
        if not metric.rows:
            metric.update(torch.zeros(0), torch.zeros(0, len(evaluator.plans), len(METRICS)))
        return metric.compute().cpu()

    @property
    def _ready(self) -> GraftEvaluator:
        if self._evaluator is None:
            raise RecipeError(f"GraftCallback({self.name!r}) was used outside of a Trainer.")
        return self._evaluator

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_evaluator": None, "_snapshot": None}


def _adapter(model_map: ModelMap) -> str | None:
    """Name of the active adapter, or None."""
    names = dict.fromkeys(name for _, layer, _ in adapted_layers(model_map) for name in layer.active_adapters)
    if len(names) > 1:
        raise IncompatibleModelError(
            f"{type(model_map.model).__name__} trains several adapters at once ({', '.join(names)}); GraftCallback "
            "compares one. Pass GraftCallback(reference=...)."
        )
    return next(iter(names), None)
