"""Watch, while a model trains, which weights at which tokens carry what it learns."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_interp.core.callbacks.intervention_callback import tokenizer_of
from lightning_interp.core.callbacks.monitor import Monitor
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.weights.fitting import adapted_layers
from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.grafting.evaluate import GraftEvaluator, GraftPrompt
from lightning_interp.grafting.metrics import METRICS, GraftScores
from lightning_interp.grafting.plan import GraftPlan

__all__ = ["GraftCallback"]

_LOGGED = ("top1", "top5", "target_prob", "target_logprob", "target_rank", "kl_to_donor")


class GraftCallback(Monitor):
    """Every few epochs, graft the model being trained into its reference and log ``graft/<plan>/<metric>``.

    With a LoRA adapter the reference is the same model with the adapter off and costs nothing. In full finetuning it is
    a copy of the weights from before training (a second set of weights). Each process scores its share of the prompts.
    The trained model is called, never changed; see :class:`~lightning_interp.core.callbacks.monitor.Monitor`.

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

    hooks = reads_weights = True

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
        super().__init__(every=f"{every_n_epochs} epochs", at_start=at_start, name=name)
        self.prompts = list(prompts)
        self.tokenizer = tokenizer
        self.plans = dict(plans) if plans is not None else None
        self.reference = reference
        self.target = target
        self.top_k = top_k
        self.token_budget = token_budget
        self.missing = missing
        self._evaluator: GraftEvaluator | None = None
        self._snapshot: nn.Module | None = None

    def prepare(self, trainer: Any, module: Any, stage: str) -> None:
        """In full finetuning, copy the weights from before training.

        Raises:
            IncompatibleModelError: If there is nothing to compare with.
        """
        model_map = ModelMap.build(module, target=self.target)
        model = model_map.model
        self._evaluator = self._make_evaluator(trainer, module)
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
        tokenizer = tokenizer_of(self, pl_module, getattr(trainer, "datamodule", None))
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

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let the copy go: after an exception Lightning calls nothing else."""
        self._snapshot = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the copy go."""
        self._snapshot = None

    def look(self, trainer: Any, module: Any) -> dict[str, float]:
        """Scores of every plan, as ``<plan>/<metric>``: means over the prompts, of the rank the median."""
        scores = self._score(trainer, module)
        found: dict[str, float] = {}
        for p, plan in enumerate(self._ready.plans):
            for metric in _LOGGED:
                column = scores[:, p, METRICS.index(metric)]
                found[f"{plan}/{metric}"] = float(column.median() if metric == "target_rank" else column.mean())
        return found

    def _score(self, trainer: Any, pl_module: Any) -> torch.Tensor:
        """Scores of all prompts on every process, ``[n, plans, 8]``."""
        evaluator = self._ready
        trained_map = ModelMap.build(pl_module, target=self.target)
        trained, adapter = trained_map.model, _adapter(trained_map)
        recipient: nn.Module = self.reference or self._snapshot or trained
        donor: nn.Module | str = adapter if recipient is trained and adapter is not None else trained
        if recipient is not trained:
            recipient.to(next(trained.parameters()).device)
        metric = GraftScores(list(evaluator.plans)).to(pl_module.device)
        shares = evaluator.scores(
            ModelMap.build(recipient), donor, rank=trainer.global_rank, world_size=trainer.world_size
        )
        for index, scores, _ in shares:
            metric.update(index, scores)
        found: torch.Tensor = metric.compute()
        return found.cpu()

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
