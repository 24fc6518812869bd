"""Rewards of texts: any scorer behind one call, and the three rewards of every unit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.labellers import vader_labeller
from lightning_interp.models.scoring.reward_text import Scores
from lightning_interp.models.scoring.text_scorer import Scorer, TextScorer
from lightning_interp.rate.estimators.columns import combine_draws
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
        function: Called with prompts and texts, and gives one number each; with ``each=True`` called with one text.
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
            DataError: If numbers of prompts, texts and rewards differ, or a reward is no number.
        """
        if len(prompts) != len(texts):
            raise DataError(f"There are {len(prompts)} prompts for {len(texts)} texts; expected one prompt a text.")
        place: dict[tuple[str, str], int] = {}
        pairs = zip(prompts, texts, strict=True)
        where = [place.setdefault((repr(prompt), text), len(place)) for prompt, text in pairs]
        first = np.unique(where, return_index=True)[1].tolist()
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


def as_scorer(scorer: Any, *, name: str | None = None, **settings: Any) -> Scorer:
    """Make a scorer of whatever can score texts.

    Args:
        scorer: A scorer; a ``RewardModel``; a folder or Hugging Face id of one; or a function of prompts and texts.
        name: What to call it, if it has no name of its own.
        **settings: Of :meth:`TextScorer.load`, for a folder or id alone: ``device``, ``dtype`` (float32 by default),
            ``trust_remote_code`` (False by default), ``chat``, ``add_eos``, ``pair``, ``label`` and so on.

    Returns:
        The scorer.

    Raises:
        DataError: If it is none of these.
        RecipeError: If there are settings for something that is loaded already.
        IncompatibleModelError: If a source is a language model without a score head.

    Example:
        >>> as_scorer(lambda prompts, texts: [len(text) for text in texts], name="length").name
        'length'
    """
    if isinstance(scorer, str | os.PathLike):
        return TextScorer.load(scorer, name=name, **settings)
    if settings:
        raise RecipeError(
            f"as_scorer() got {', '.join(settings)} for a {type(scorer).__name__}: these are for a folder or id that "
            "is loaded here. Set them where it is made."
        )
    if isinstance(scorer, Scorer):
        return scorer
    if isinstance(own := getattr(scorer, "scorer", None), Scorer):
        return own
    if callable(scorer) and not isinstance(scorer, torch.nn.Module):
        return CallableScorer(scorer, name=name or str(getattr(scorer, "__name__", type(scorer).__name__)))
    raise DataError(
        f"A {type(scorer).__name__} cannot score texts. Give a Scorer, a RewardModel, the source of a reward model, or "
        "a function of prompts and texts (CallableScorer says how)."
    )


def checked_rewards(found: Any, count: int, who: str) -> Tensor:
    """One reward a text, ``[n]`` on the CPU, of what a scorer gave: a tensor, array or list of ``[n]`` or ``[n, 1]``.

    Float32 if a float32 (or shorter) tensor was given, else float64. NaN and infinity are let through.
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
    def stacked(cls, scorer: str, stages: Sequence[str], reward: Tensor, truncated: Tensor) -> TripleScores:
        """The rewards of all stages one after the other, ``[stages * n]``, divided up."""
        parts = [zip(stages, values.chunk(len(stages)), strict=True) for values in (reward, truncated)]
        return cls(scorer, dict(parts[0]), dict(parts[1]))

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
        few = ({stage: values[chosen] for stage, values in part.items()} for part in (self.reward, self.truncated))
        return TripleScores(self.scorer, *few)

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
            >>> TripleScores.from_dict({"scorer": "mine", "reward": {"original": [1.0, 2.0]}}).truncation()
            {'original': 0.0}
        """
        try:
            reward = {name: torch.tensor(row, dtype=torch.float64) for name, row in found["reward"].items()}
            cut = found.get("truncated") or {name: [False] * len(row) for name, row in reward.items()}
            return cls(found["scorer"], reward, {name: torch.tensor(row) for name, row in cut.items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            expected = "Expected scorer, and reward by stage."
            raise DataError(f"{found!r:.80} holds no rewards ({error!r}). {expected}") from error

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
        for stage, reward in self.reward.items():
            if len(reward) != len(triples):
                raise DataError(
                    f"Scorer {self.scorer!r} has {len(reward)} rewards of stage {stage!r}, but there are "
                    f"{len(triples)} rows of {triples.attr!r}. Score these triples."
                )
        stages = triples.stages[:3]
        columns = [self.reward[stage].double().numpy() for stage in stages]
        given = combine_draws(triples.ids, triples.w, *columns, cluster=triples.cluster).arguments()
        if len(given["ids"]) == len(triples):
            order = {name: row for row, name in enumerate(triples.ids)}
            rows = [order[name] for name in given["ids"]]
            given["texts"] = [[triples.texts(stage)[row] for row in rows] for stage in stages]
        if drop_truncated:
            if options.get("missing", "raise") == "raise":
                UnitTable.read(**given).usable()  # nothing else may be missing
            cut = torch.stack([self.truncated[stage] for stage in stages]).any(0).tolist()
            gone = {name for name, flag in zip(triples.ids, cut, strict=True) if flag}
            whys = zip(given["ids"], given["incomplete"], strict=True)
            given["incomplete"] = [why or ("truncated" if name in gone else None) for name, why in whys]
            options["missing"] = "drop"
        return rate_effects(**given, **options)


def score_triples(scorer: Any, triples: RewriteTriples, **settings: Any) -> TripleScores:
    """Score all texts of complete units here and now; for many texts or devices see ``RewardScorer``.

    Args:
        scorer: Anything that :func:`as_scorer` takes.
        triples: The units.
        **settings: Of :func:`as_scorer`, for a folder or id.

    Returns:
        Rewards by stage.

    Example:
        >>> row = {"id": "a", "w": 1, "original": "oh!", "rewrite": "oh", "rewrite2": "oh!"}
        >>> marks = lambda prompts, texts: [text.count("!") for text in texts]
        >>> score_triples(marks, RewriteTriples.from_rows([row])).reward["original"].tolist()
        [1.0]
    """
    known = as_scorer(scorer, **settings)
    texts = [text for stage in triples.stages for text in triples.texts(stage)]
    found = known.scores(list(triples.prompts) * len(triples.stages), texts)
    return TripleScores.stacked(known.name, triples.stages, *found)
