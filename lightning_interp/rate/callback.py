"""Watch, while a reward model trains, how much its reward depends on an attribute of the text."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.callbacks.monitor import Monitor, own_rows
from lightning_interp.core.measure.reduced import KeyedRows
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models.scoring.reward_text import Scores
from lightning_interp.rate.estimators.effects import Settings
from lightning_interp.rate.estimators.result import RateResult
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.assembly import Missing
from lightning_interp.rate.rewriting.store import RewriteStore
from lightning_interp.rate.scoring.scores import TripleScores, checked_rewards

__all__ = ["RewardAttributeEffect"]

_EFFECTS = ("ate", "att", "atu", "naive", "single")
_LOGGED = ("ate", "att", "atu", "ate_se", "naive", "single")

ScoreFunction = Callable[[Any, Sequence[str], Sequence[str]], Any]


class RewardAttributeEffect(Monitor):
    """Every few validation epochs, score a finished store of rewrites and log the effect of its attribute.

    Logs ``rate/<attribute>/<name>`` with ``ate``, ``att``, ``atu``, ``ate_se`` (the double rewrite of Reber et al.,
    arXiv 2410.11348), ``naive`` and ``single`` (the ATE of the single rewrite), in units of the reward. Each process
    scores its share of the texts, each text once; see :class:`~lightning_interp.core.callbacks.monitor.Monitor`.

    Args:
        store: A folder of rewrites, an open store, or complete units.
        attribute: Which attribute of the store; the only one if None.
        score: Gives one reward a text of the LightningModule, prompts and texts; None takes the module's own
            ``score(prompts, texts)``, which :class:`~lightning_interp.models.RewardModel` has.
        every_n_validations, batch_size: How often, from the first validation on; texts of one call of ``score``.
        missing: What to do, before training, with units that lack a text: ``"raise"`` or ``"drop"``.
        nonfinite: ``"drop"`` units of which a reward is not finite, with a warning (the effects are NaN where none is
            left), or ``"raise"``, which ends the run.
        se: Kind of standard error; see :func:`~lightning_interp.rate.estimators.effects.rate_effects`.
        name: Between ``rate/`` and the estimate in what is logged, and in the state key; the attribute if None.

    Attributes:
        history: One entry a scoring, saved in checkpoints: ``epoch``, ``step``, what is logged, the other ``_se``,
            ``reward_std`` of the original rewards, ``n``, ``dropped``, and ``truncated``, the share of cut texts.
        result: Everything about the last scoring; None before the first, and where no unit had finite rewards.

    Raises:
        RecipeError: If an argument has a wrong value.

    Example:
        >>> row = {"id": "a", "w": 1, "original": "oh!", "rewrite": "oh", "rewrite2": "oh!"}
        >>> RewardAttributeEffect(RewriteTriples.from_rows([row]), every_n_validations=2).history
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
        super().__init__(every=f"{every_n_validations} validations", name=name)
        self.store, self.attribute, self.score = store, attribute, score
        self.batch_size = batch_size
        self.missing, self.nonfinite, self.se = missing, nonfinite, se
        self.result: RateResult | None = None
        self._triples = store if isinstance(store, RewriteTriples) else None

    @property
    def state_key(self) -> str:
        """Distinguishes callbacks by their name, or their attribute."""
        own = self.store.attr if isinstance(self.store, RewriteTriples) else None
        return self._generate_state_key(name=self.name or self.attribute or own)

    @property
    def prefix(self) -> str:
        """``rate/`` and the name, or the attribute."""
        return f"rate/{self._label}"

    def prepare(self, trainer: Any, module: Any, stage: str) -> None:
        """Read the store, and refuse what cannot work, before anything runs.

        Raises:
            DataError: If the store has no such attribute, or units are incomplete.
            RecipeError: If there is nothing to score with.
        """
        if self._triples is None:
            self._triples = self._read()
        if self.se == "cluster" and self._triples.cluster is None:
            raise RecipeError(
                f"RewardAttributeEffect({self._label!r}, se='cluster') needs the cluster of every unit, and the store "
                "knows of none. Add units with a cluster, or use se='paired'."
            )
        if self.score is None and not callable(getattr(module, "score", None)):
            raise RecipeError(
                f"RewardAttributeEffect({self._label!r}) has nothing to score with: {type(module).__name__} has no "
                "score(prompts, texts). Pass score=a function of the module, prompts and texts."
            )

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

    def look(self, trainer: Any, module: Any) -> dict[str, float]:
        """Effects, their errors, and how many units they rest on."""
        scores, triples = self._scores(trainer, module), self._ready
        finite = torch.stack([scores.reward[stage] for stage in triples.stages[:3]]).isfinite().all(0).tolist()
        bad = {name for name, fine in zip(triples.ids, finite, strict=True) if not fine}
        if self.nonfinite == "drop" and bad.issuperset(triples.ids):
            self.result = None
            return self._nothing(trainer, triples, scores)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.result = result = scores.effects(triples, se=self.se, missing=self.nonfinite)
        for note in result.warnings if trainer.is_global_zero else ():
            warnings.warn(f"RewardAttributeEffect({self._label!r}): {note}", stacklevel=2)
        return {
            **dict.fromkeys(("naive", "single", "naive_se", "single_se", "reward_std"), math.nan),
            **result.numbers(),
            "dropped": float(len(set(triples.ids)) - result.counts.n),
            "truncated": sum(scores.truncation().values()) / len(scores.truncated),
        }

    def _nothing(self, trainer: Any, triples: RewriteTriples, scores: TripleScores) -> dict[str, float]:
        """What is told where no unit has finite rewards: the training goes on."""
        if trainer.is_global_zero:
            warnings.warn(
                f"RewardAttributeEffect({self._label!r}): no unit has finite rewards (each has some that are NaN or "
                "infinite), so its effects are NaN this time. Look at the loss and the learning rate.",
                stacklevel=2,
            )
        names = (*_EFFECTS, *(f"{name}_se" for name in _EFFECTS), "reward_std")
        truncated = sum(scores.truncation().values()) / len(scores.truncated)
        counts = {"n": 0.0, "dropped": float(len(set(triples.ids))), "truncated": truncated}
        return {**dict.fromkeys(names, math.nan), **counts}

    def logged(self, found: Mapping[str, float]) -> Mapping[str, float]:
        """The estimates, and the error of the first."""
        return {key: found[key] for key in _LOGGED}

    def _scores(self, trainer: Any, pl_module: Any) -> TripleScores:
        """Rewards of all texts on every process."""
        triples, stages = self._ready, self._ready.stages[:3]
        texts = [pair for s in stages for pair in zip(triples.prompts, triples.texts(s), strict=True)]
        unique = sorted(set(texts), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
        found, own = _Rewards(2).to(pl_module.device), own_rows(trainer, len(unique))
        for start in range(0, len(own), self.batch_size):
            rows = own[start : start + self.batch_size]
            prompts, asked = zip(*(unique[row] for row in rows), strict=True)
            found.update(torch.tensor(rows), self._asked(pl_module, list(prompts), list(asked)))
        places = {pair: place for place, pair in enumerate(unique)}
        reward, cut = found.compute().cpu().double()[[places[pair] for pair in texts]].T
        return TripleScores.stacked(self._label, stages, reward, cut.bool())

    def _asked(self, pl_module: Any, prompts: list[str], texts: list[str]) -> Tensor:
        """``[n, 2]``: rewards, and whether texts were cut."""
        if self.score is not None:
            given = self.score(pl_module, prompts, texts)
        else:
            given = getattr(pl_module, "scores", pl_module.score)(prompts, texts)
        given, cut = given if isinstance(given, Scores) else (given, torch.zeros(len(texts)))
        reward = checked_rewards(given, len(texts), f"score= of {self._label!r}").double()
        return torch.stack([reward, cut.to(reward)], dim=1)

    @property
    def _ready(self) -> RewriteTriples:
        if self._triples is None:
            raise RecipeError(f"RewardAttributeEffect({self._label!r}) was used outside of a Trainer.")
        return self._triples


class _Rewards(KeyedRows):
    """Rewards of texts and whether these were cut, from all processes."""

    def update(self, texts: Tensor, rewards: Tensor) -> None:
        """Add ``[n, 2]`` of the texts at these places."""
        self.add(texts, rewards)

    def compute(self) -> Tensor:
        """``[texts, 2]``."""
        return self.table()[1]
