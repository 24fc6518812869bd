"""Rewards of texts: any scorer behind one call, and the three rewards of every unit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.errors import DataError
from lightning_interp.generation.labellers import vader_labeller
from lightning_interp.models.scoring.reward_text import Scores
from lightning_interp.models.scoring.text_scorer import Scorer, TextScorer
from lightning_interp.rate.estimators.draws import combine_draws
from lightning_interp.rate.estimators.effects import rate_effects
from lightning_interp.rate.estimators.result import RateResult
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.estimators.unit_table import UnitTable

__all__ = ["CallableScorer", "TripleScores", "as_scorer", "checked_rewards", "score_triples", "vader_scorer"]


class CallableScorer(Scorer):
    """Any function as a scorer: a lexicon, a classifier, a service.

    Equal texts of equal prompts are asked for once. Random states are put back, gradients are off; a function that
    does not give the same text the same reward is not found out.

    Args:
        function: Called with prompts and texts, and gives one number each; with ``each=True`` it is called with one
            text and gives its number.
        name: What to call it; stored rewards are known by it, so change it when the function changes.
        each: Whether it takes one text at a time, without the prompt.

    Example:
        >>> scorer = CallableScorer(lambda text: text.count("!"), name="marks", each=True)
        >>> scorer.score(["", ""], ["oh!", "oh"]).tolist()
        [1.0, 0.0]
    """

    def __init__(self, function: Callable[..., Any], *, name: str, each: bool = False) -> None:
        self.function, self.name, self.each = function, name, each

    def scores(self, prompts: Sequence[Any], texts: Sequence[str]) -> Scores:
        """Rewards of texts; none is cut.

        Args:
            prompts: What each text answers.
            texts: The texts.

        Returns:
            Float64 rewards and flags, each of shape ``[n]``.

        Raises:
            DataError: If there are not as many prompts as texts, or the function gives something else than one
                number a text.
        """
        if len(prompts) != len(texts):
            raise DataError(f"There are {len(prompts)} prompts for {len(texts)} texts; expected one prompt a text.")
        place: dict[tuple[str, str], int] = {}
        where, first = [], []
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            key = (repr(prompt), text)
            if key not in place:
                place[key] = len(place)
                first.append(index)
            where.append(place[key])
        asked = [prompts[index] for index in first], [texts[index] for index in first]
        with undisturbed():
            found = [self.function(text) for text in asked[1]] if self.each else self.function(*asked)
        reward = checked_rewards(found, len(place), f"Scorer {self.name!r}")
        return Scores(reward[where], torch.zeros(len(texts), dtype=torch.bool))


def vader_scorer() -> CallableScorer:
    """The compound sentiment of VADER (Hutto and Gilbert, 2014) from -1 to 1, which takes "well" for praise.

    Returns:
        The scorer.

    Raises:
        RecipeError: If the package ``vaderSentiment`` is not installed.
    """
    return CallableScorer(vader_labeller().score, name="vader", each=True)


def as_scorer(scorer: Any, *, name: str | None = None) -> Scorer:
    """Make a scorer of whatever can score texts.

    Args:
        scorer: A scorer; a :class:`~lightning_interp.models.RewardModel`; a folder or Hugging Face id of a reward
            model; or a function of prompts and texts.
        name: What to call it, if it has no name of its own.

    Returns:
        The scorer.

    Raises:
        DataError: If it is none of these.
        IncompatibleModelError: If a source is a language model without a score head.

    Example:
        >>> as_scorer(lambda prompts, texts: [len(text) for text in texts], name="length").name
        'length'
    """
    if isinstance(scorer, Scorer):
        return scorer
    own = getattr(scorer, "scorer", None)
    if isinstance(own, Scorer):
        return own
    if isinstance(scorer, str | os.PathLike):
        return TextScorer.load(scorer, name=name)
    if callable(scorer) and not isinstance(scorer, torch.nn.Module):
        return CallableScorer(scorer, name=name or str(getattr(scorer, "__name__", type(scorer).__name__)))
    raise DataError(
        f"A {type(scorer).__name__} cannot score texts. Give a Scorer, a RewardModel, the source of a reward model, or "
        "a function of prompts and texts (CallableScorer says how)."
    )


def checked_rewards(found: Any, count: int, who: str) -> Tensor:
    """Make one reward a text of what a scorer gave.

    Args:
        found: A tensor, array or list of numbers of shape ``[n]`` or ``[n, 1]``. NaN and infinity are let through: the
            estimator says what becomes of them.
        count: How many texts there were.
        who: The scorer, for the message.

    Returns:
        Float tensor of shape ``[n]`` on the CPU: float32 if a float32 (or shorter) tensor was given, else float64.

    Raises:
        DataError: If it is something else.

    Example:
        >>> checked_rewards([1, 2.5], 2, "mine")
        tensor([1.0000, 2.5000], dtype=torch.float64)
    """
    try:
        tensor = found.detach() if isinstance(found, Tensor) else torch.as_tensor(found, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{who} gave {found!r:.80}; expected one number a text. ({error})") from error
    if tensor.dtype.is_complex or tensor.dtype == torch.bool or tensor.shape not in ((count,), (count, 1)):
        raise DataError(
            f"{who} gave {tensor.dtype} of shape {tuple(tensor.shape)} for {count} texts; expected one number a text."
        )
    kind = torch.float64 if tensor.dtype == torch.float64 or not tensor.is_floating_point() else torch.float32
    return tensor.reshape(count).to("cpu", kind)


@dataclass(frozen=True)
class TripleScores:
    """Rewards of all texts of complete units.

    Args:
        scorer: Name of the scorer.
        reward: For each stage the rewards, ``[n]``.
        truncated: For each stage which texts were cut, ``[n]``.
    """

    scorer: str
    reward: Mapping[str, Tensor]
    truncated: Mapping[str, Tensor]

    @classmethod
    def of(cls, triples: RewriteTriples, scorer: str = "columns") -> TripleScores:
        """The rewards that a table carries; no text was cut.

        Args:
            triples: Units :meth:`~lightning_interp.rate.RewriteTriples.with_scores`.
            scorer: What to call who gave them.

        Returns:
            The rewards.

        Raises:
            DataError: If the units are not scored.
        """
        if triples.reward is None:
            raise DataError(f"The units of {triples.attr!r} have no rewards. Add them by triples.with_scores(...).")
        return cls.from_dict({"scorer": scorer, "reward": triples.reward})

    def select(self, rows: Sequence[int]) -> TripleScores:
        """The rewards of some rows, as :meth:`RewriteTriples.select` takes them.

        Args:
            rows: Their numbers.
        """
        chosen = list(rows)
        return replace(
            self,
            reward={stage: values[chosen] for stage, values in self.reward.items()},
            truncated={stage: flags[chosen] for stage, flags in self.truncated.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which :meth:`from_dict` reads: ``scorer``, and ``reward`` and ``truncated`` by stage."""
        return {
            "scorer": self.scorer,
            "reward": {stage: values.double().tolist() for stage, values in self.reward.items()},
            "truncated": {stage: flags.tolist() for stage, flags in self.truncated.items()},
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> TripleScores:
        """Rewards from plain data.

        Args:
            found: What :meth:`to_dict` gave; without ``truncated`` no text was cut.

        Returns:
            The rewards, in float64.

        Raises:
            DataError: If something else is given.

        Example:
            >>> scores = TripleScores.from_dict({"scorer": "mine", "reward": {"original": [1.0, 2.0]}})
            >>> scores.truncation()
            {'original': 0.0}
        """
        try:
            reward = {name: torch.tensor(row, dtype=torch.float64) for name, row in found["reward"].items()}
            cut = found.get("truncated") or {name: [False] * len(row) for name, row in reward.items()}
            return cls(found["scorer"], reward, {name: torch.tensor(row) for name, row in cut.items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{found!r:.80} holds no rewards ({error!r}). Expected scorer, and reward by stage."
            ) from error

    def truncation(self) -> dict[str, float]:
        """Share of cut texts by stage: an effect on cut texts is one on their beginnings."""
        return {stage: float(flags.double().mean()) for stage, flags in self.truncated.items()}

    def effects(self, triples: RewriteTriples, *, drop_truncated: bool = False, **options: Any) -> RateResult:
        """Estimate the effects; several draws of a unit are averaged inside it.

        Args:
            triples: What was scored.
            drop_truncated: Leave out units of which any text was cut, and count them.
            **options: Of :func:`~lightning_interp.rate.estimators.effects.rate_effects`.

        Returns:
            The result.

        Raises:
            DataError: If the rewards cannot be used, or are those of other units.
        """
        wrong = next((stage for stage, reward in self.reward.items() if len(reward) != len(triples)), None)
        if wrong is not None:
            raise DataError(
                f"Scorer {self.scorer!r} has {len(self.reward[wrong])} rewards of stage {wrong!r}, but there are "
                f"{len(triples)} rows of {triples.attr!r}. Score these triples."
            )
        columns = [self.reward[stage].double().numpy() for stage in triples.stages[:3]]
        units = combine_draws(triples.ids, triples.w, *columns, cluster=triples.cluster)
        given = units.arguments()
        if len(given["ids"]) == len(triples):
            order = {name: row for row, name in enumerate(triples.ids)}
            rows = [order[name] for name in given["ids"]]
            given["texts"] = [[triples.texts(stage)[row] for row in rows] for stage in triples.stages[:3]]
        if drop_truncated:
            options = self._without_cut(triples, given, options)
        return rate_effects(**given, **options)

    def _without_cut(self, triples: RewriteTriples, given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        if options.get("missing", "raise") == "raise":
            UnitTable.read(**given).usable()  # nothing else may be missing
        cut = torch.stack([self.truncated[stage] for stage in triples.stages[:3]]).any(0).tolist()
        gone = {name for name, flag in zip(triples.ids, cut, strict=True) if flag}
        given["incomplete"] = [
            reason or ("truncated" if name in gone else None)
            for name, reason in zip(given["ids"], given["incomplete"], strict=True)
        ]
        return {**options, "missing": "drop"}


def score_triples(scorer: Any, triples: RewriteTriples) -> TripleScores:
    """Score all texts of complete units here and now; for many texts or devices see ``RewardScorer``.

    Args:
        scorer: Anything that :func:`as_scorer` takes.
        triples: The units.

    Returns:
        Rewards by stage.

    Example:
        >>> triples = RewriteTriples(attr="loud", ids=["a", "b"], w=[1, 0], prompts=["", ""], original=["oh!", "ah"],
        ...     rewrite=["oh", "ah!"], rewrite2=["oh!", "ah"], draw=[0, 0])
        >>> scores = score_triples(lambda prompts, texts: [text.count("!") for text in texts], triples)
        >>> scores.effects(triples).rate.ate.value
        1.0
    """
    known = as_scorer(scorer)
    texts = [text for stage in triples.stages for text in triples.texts(stage)]
    reward, truncated = known.scores(list(triples.prompts) * len(triples.stages), texts)
    return TripleScores(
        known.name,
        dict(zip(triples.stages, reward.chunk(len(triples.stages)), strict=True)),
        dict(zip(triples.stages, truncated.chunk(len(triples.stages)), strict=True)),
    )
