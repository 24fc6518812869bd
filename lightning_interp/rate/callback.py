"""Watch, while a reward model trains, how much its reward depends on an attribute of the text."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_interp.core.hooks.checks import check_strategy
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models.scoring.reward_text import Scores
from lightning_interp.rate.estimators.effects import Settings
from lightning_interp.rate.estimators.result import RateResult
from lightning_interp.rate.estimators.triples import Missing, RewriteTriples
from lightning_interp.rate.rewriting.store import RewriteStore
from lightning_interp.rate.scoring.scores import TripleScores, checked_rewards

__all__ = ["RewardAttributeEffect"]

ScoreFunction = Callable[[Any, Sequence[str], Sequence[str]], Any]


class RewardAttributeEffect(L.Callback):
    """Every few validation epochs, score a finished store of rewrites and log the effect of its attribute.

    Logs ``rate/<attribute>/<name>`` with ``ate``, ``att``, ``atu``, ``ate_se`` (the double rewrite of Reber et al.,
    arXiv 2410.11348), ``naive`` and ``single`` (the ATE of the single rewrite), in units of the reward. No rewriter is
    called. Each process scores its share of the texts; a text that occurs several times is scored once. The trained
    model is called in evaluation mode and without gradients, never changed: modes, random states and gradients are
    left as found.

    Args:
        store: A folder of rewrites, an open store, or complete units.
        attribute: Which attribute of the store; the only one if None.
        score: Called with the LightningModule, prompts and texts, and gives one reward a text. None takes the
            module's own ``score(prompts, texts)``, which :class:`~lightning_interp.models.RewardModel` has.
        every_n_validations: How often; the first validation counts.
        batch_size: Texts of one call of ``score``; those of like length come together.
        missing: What to do, before training, with units that lack a text: ``"raise"`` or ``"drop"``.
        nonfinite: What to do with units of which a reward is NaN or infinite: ``"drop"`` them from all estimates,
            with a warning and counted, or ``"raise"``, which ends the training.
        se: Kind of standard error; see :func:`~lightning_interp.rate.estimators.effects.rate_effects`.
        name: Between ``rate/`` and the estimate in what is logged, and in the state key; the attribute if None.

    Attributes:
        history: One entry a scoring: ``epoch``, ``step``, what is logged, ``att_se``, ``atu_se``, ``naive_se``,
            ``single_se``, ``reward_std`` of the original rewards, ``n``, ``dropped``, and ``truncated``, the share of
            texts that were cut (if the module says so, as a RewardModel does). Saved in checkpoints.
        result: Everything about the last scoring; None before the first.

    Raises:
        RecipeError: If an argument has a wrong value.

    Example:
        >>> triples = RewriteTriples(attr="loud", ids=["a", "b"], w=[1, 0], prompts=["", ""], original=["oh!", "ah"],
        ...     rewrite=["oh", "ah!"], rewrite2=["oh!", "ah"], draw=[0, 0])
        >>> callback = RewardAttributeEffect(triples, every_n_validations=2)
        >>> callback.history
        []
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | RewriteStore | RewriteTriples,
        attribute: str | None = None,
        *,
        score: ScoreFunction | None = None,
        every_n_validations: int = 1,
        batch_size: int = 32,
        missing: Missing = "raise",
        nonfinite: str = "drop",
        se: str = "paired",
        name: str | None = None,
    ) -> None:
        for key, value in (("every_n_validations", every_n_validations), ("batch_size", batch_size)):
            if value < 1:
                raise RecipeError(f"RewardAttributeEffect({key}={value!r}): expected at least 1.")
        if nonfinite not in ("drop", "raise"):
            raise RecipeError(f"RewardAttributeEffect(nonfinite={nonfinite!r}): expected 'drop' or 'raise'.")
        Settings(se=se)  # an unknown error is refused before training
        self.store, self.attribute, self.score = store, attribute, score
        self.every_n_validations, self.batch_size = every_n_validations, batch_size
        self.missing, self.nonfinite, self.se = missing, nonfinite, se
        self.name = name
        self.history: list[dict[str, float]] = []
        self.result: RateResult | None = None
        self._validations = 0
        self._triples = store if isinstance(store, RewriteTriples) else None

    @property
    def state_key(self) -> str:
        """Distinguishes callbacks by their name, or their attribute."""
        own = self.store.attr if isinstance(self.store, RewriteTriples) else None
        return self._generate_state_key(name=self.name or self.attribute or own)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"history": [dict(entry) for entry in self.history], "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured before."""
        self.history = [dict(entry) for entry in state_dict["history"]]
        self._validations = int(state_dict["validations"])

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Read the store, and refuse what cannot work, before anything runs.

        Raises:
            DataError: If the store has no such attribute, or units are incomplete.
            RecipeError: If there is nothing to score with.
        """
        if stage not in ("fit", "validate"):
            return
        check_strategy(trainer.strategy, reads_weights=False, purpose=type(self).__name__)
        if self._triples is None:
            self._triples = self._read()
        if self.se == "cluster" and self._triples.cluster is None:
            raise RecipeError(
                f"RewardAttributeEffect({self._label!r}, se='cluster') needs the cluster of every unit, and the store "
                "knows of none. Add units with a cluster, or use se='paired'."
            )
        if self.score is None and not callable(getattr(pl_module, "score", None)):
            raise RecipeError(
                f"RewardAttributeEffect({self._label!r}) has nothing to score with: {type(pl_module).__name__} has no "
                "score(prompts, texts). Pass score=a function of the module, prompts and texts."
            )

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Score, if it is time; never in the sanity check."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations == 0:
            self._run(trainer, pl_module)

    @property
    def _label(self) -> str:
        own = self._triples.attr if self._triples is not None else None
        return str(self.name or self.attribute or own)

    def _read(self) -> RewriteTriples:
        store: Any = self.store
        if isinstance(store, str | os.PathLike):
            store = RewriteStore.open(store)
        attributes: list[str] = store.attributes()
        if self.attribute is None and len(attributes) != 1:
            raise DataError(
                f"{store.folder} has the attributes {', '.join(attributes) or 'none'}. Name one: "
                "RewardAttributeEffect(store, attribute=...)."
            )
        found: RewriteTriples = store.triples(self.attribute or attributes[0], missing=self.missing)
        return found

    def _run(self, trainer: Any, pl_module: Any) -> None:
        scores = self._scores(trainer, pl_module)
        triples = self._ready
        missing = "drop" if self.nonfinite == "drop" else "raise"
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            self.result = result = scores.effects(triples, se=self.se, missing=missing)
        if trainer.is_global_zero:
            for note in notes:
                warnings.warn(f"RewardAttributeEffect({self._label!r}): {note.message}", note.category, stacklevel=2)
        logged = {
            "ate": result.rate.ate.value,
            "att": result.rate.att.value,
            "atu": result.rate.atu.value,
            "ate_se": result.rate.ate.se,
            "naive": float("nan") if result.naive is None else result.naive.value,
            "single": float("nan") if result.single is None else result.single.ate.value,
        }
        self.history.append(
            {
                "epoch": float(trainer.current_epoch),
                "step": float(trainer.global_step),
                **logged,
                "att_se": result.rate.att.se,
                "atu_se": result.rate.atu.se,
                "naive_se": float("nan") if result.naive is None else result.naive.se,
                "single_se": float("nan") if result.single is None else result.single.ate.se,
                "reward_std": float("nan") if result.reward_std is None else result.reward_std,
                "n": float(result.counts.n),
                "dropped": float(len(set(triples.ids)) - result.counts.n),
                "truncated": sum(scores.truncation().values()) / len(scores.truncated),
            }
        )
        # Every process holds the same reduced numbers, so nothing is left to synchronise.
        pl_module.log_dict(
            {f"rate/{self._label}/{key}": value for key, value in logged.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=False,
            batch_size=len(triples),
            rank_zero_only=False,
        )

    def _scores(self, trainer: Any, pl_module: Any) -> TripleScores:
        """Rewards of all texts on every process."""
        triples = self._ready
        stages = triples.stages[:3]
        texts = list(zip(list(triples.prompts) * 3, [text for s in stages for text in triples.texts(s)], strict=True))
        unique = sorted(set(texts), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
        rank, world = (0, 1) if _sharded(trainer) else (trainer.global_rank, trainer.world_size)
        own = self._score_share(trainer, pl_module, unique[rank::world])
        gathered = own[None] if world == 1 else _gather(trainer, pl_module, own, -(-len(unique) // world))
        column = {pair: gathered[place % world, :, place // world] for place, pair in enumerate(unique)}
        reward, cut = torch.stack([column[pair] for pair in texts], dim=1)
        return TripleScores(
            self._label,
            dict(zip(stages, reward.chunk(3), strict=True)),
            dict(zip(stages, cut.bool().chunk(3), strict=True)),
        )

    def _score_share(self, trainer: Any, pl_module: Any, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Rewards and whether the text was cut, ``[2, share]``."""
        found = [torch.zeros(2, 0, dtype=torch.float64)]
        precision = trainer.strategy.precision_plugin
        with undisturbed(pl_module), precision.forward_context():
            for start in range(0, len(pairs), self.batch_size):
                batch = pairs[start : start + self.batch_size]
                given, cut = self._asked(pl_module, [prompt for prompt, _ in batch], [text for _, text in batch])
                reward = checked_rewards(given, len(batch), f"score= of {self._label!r}").double()
                found.append(torch.stack([reward, torch.zeros_like(reward) if cut is None else cut.double()]))
        return torch.cat(found, dim=1)

    def _asked(self, pl_module: Any, prompts: list[str], texts: list[str]) -> tuple[Any, Tensor | None]:
        if self.score is not None:
            return self.score(pl_module, prompts, texts), None
        if callable(getattr(pl_module, "scores", None)):
            scores: Scores = pl_module.scores(prompts, texts)
            return scores.reward, scores.truncated
        return pl_module.score(prompts, texts), None

    @property
    def _ready(self) -> RewriteTriples:
        if self._triples is None:
            raise RecipeError(f"RewardAttributeEffect({self._label!r}) was used outside of a Trainer.")
        return self._triples


def _sharded(trainer: Any) -> bool:
    """Whether processes must call the model equally often: then each scores every text."""
    return "ModelParallelStrategy" in {cls.__name__ for cls in type(trainer.strategy).__mro__}


def _gather(trainer: Any, pl_module: Any, own: Tensor, size: int) -> Tensor:
    """The columns of all processes, ``[world, 2, size]``; shorter shares are filled up."""
    kind = torch.float32 if pl_module.device.type == "mps" else torch.float64
    padded = torch.full((2, size), float("nan"), dtype=kind)
    padded[:, : own.shape[1]] = own
    gathered: Tensor = trainer.strategy.all_gather(padded.to(pl_module.device))
    return gathered.reshape(-1, 2, size).cpu().double()
