"""What a judge of a trait says of a text: a score from 0 to 100, or why there is none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_interp.core.model.fingerprint import weights_digest
from lightning_interp.core.storage.files import digest
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.judges import Judge

__all__ = ["JudgeResult", "JudgeStatus", "Rescaled", "TraitJudge", "count_statuses"]

JudgeStatus = Literal["ok", "refusal", "code", "empty", "error"]
_HIGHEST = 100.0


@dataclass(frozen=True)
class JudgeResult:
    """A judge's word on one text.

    Args:
        score: From 0 to 100; None where there is none, which never counts as 0.
        status: ``"ok"``, or why there is no score: the reply refuses or is code, is empty, or judging it went wrong.
        detail: What the score was made of, as plain values.

    Raises:
        DataError: If a status other than ok has a score, ok has none, or the score is out of range.

    Example:
        >>> JudgeResult(None, "empty").score is None
        True
    """

    score: float | None
    status: JudgeStatus = "ok"
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known, told = self.status in get_args(JudgeStatus), self.score is not None
        if not known or told != (self.status == "ok") or (self.score is not None and not 0 <= self.score <= _HIGHEST):
            raise DataError(
                f"JudgeResult(score={self.score!r}, status={self.status!r}): expected a score from 0 to 100 with the "
                f"status 'ok', and None with one of {', '.join(get_args(JudgeStatus)[1:])}."
            )


class TraitJudge(ABC):
    """Judges how much of a trait texts show, from 0 to 100.

    A subclass says in :meth:`judged` what it makes of texts that are not blank.

    Attributes:
        name: What to call it.
        version: Raised when it would judge the same text otherwise; with the name it is part of what runs are known by.
    """

    name: str
    version: str = "1"

    @abstractmethod
    def judged(self, texts: list[str], prompts: list[str]) -> Sequence[JudgeResult]:
        """One result a text, none of which is blank.

        Args:
            texts: The texts.
            prompts: What each of them answers; ``""`` where it answers nothing.
        """

    def results(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> list[JudgeResult]:
        """Judge texts.

        Args:
            texts: The texts.
            prompts: What each of them answers; nothing if None.

        Returns:
            One result a text; ``"empty"`` for a blank one.

        Raises:
            DataError: If there are more or fewer prompts than texts, or results.
        """
        asked = [""] * len(texts) if prompts is None else list(prompts)
        if len(asked) != len(texts):
            raise DataError(f"There are {len(asked)} prompts for {len(texts)} texts; expected one prompt a text.")
        kept = [i for i, text in enumerate(texts) if text.strip()]
        found = [JudgeResult(None, "empty") for _ in texts]
        told = self.judged([texts[i] for i in kept], [asked[i] for i in kept]) if kept else []
        if len(told) != len(kept):
            raise DataError(
                f"The judge {self.name!r} gave {len(told)} results for {len(kept)} texts; expected as many."
            )
        for i, result in zip(kept, told, strict=True):
            found[i] = result
        return found

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Tensor:
        """The scores alone; see :meth:`~lightning_interp.generation.judges.Judge.score`."""
        found = [result.score for result in self.results(texts, prompts)]
        return torch.tensor([torch.nan if one is None else one for one in found], dtype=torch.float64)

    def identity(self) -> dict[str, Any]:
        """What makes it the judge that it is, as plain values: name, version, and a digest of its settings."""
        return {
            "kind": type(self).__name__,
            "name": self.name,
            "version": self.version,
            "settings": digest(self._own()),
        }

    def _own(self) -> Any:
        return None


@dataclass(frozen=True)
class Rescaled(TraitJudge):
    """Any judge's numbers on the scale from 0 to 100: ``low`` becomes 0, ``high`` 100, and what is beyond is cut.

    For the probability of a :class:`~lightning_interp.generation.judges.ClassifierJudge` ``low`` and ``high`` are 0 and
    1; for cosines and likelihoods :meth:`between` finds them.

    Args:
        judge: The judge.
        low, high: Its numbers that become 0 and 100; ``low`` may be the greater one.
        name: What to call it.
        version: See :class:`TraitJudge`.

    Raises:
        RecipeError: If both are the same, or not finite.

    Example:
        >>> from lightning_interp.generation.judges import WordShare
        >>> Rescaled(WordShare({"luck"}), 0.0, 0.5, name="luck").score(["luck comes my way", "luck"]).tolist()
        [50.0, 100.0]
    """

    judge: Judge
    low: float
    high: float
    name: str
    version: str = "1"

    def __post_init__(self) -> None:
        if self.low == self.high or not all(map(_finite, (self.low, self.high))):
            raise RecipeError(
                f"Rescaled({self.name!r}, low={self.low}, high={self.high}): expected two different finite numbers."
            )

    @classmethod
    def between(
        cls,
        judge: Judge,
        base: Sequence[str],
        seeded: Sequence[str],
        prompts: Sequence[str] | None = None,
        *,
        name: str,
        version: str = "1",
    ) -> Rescaled:
        """The scale on which the untouched model's replies begin and those with the trait end.

        Args:
            judge: The judge.
            base: Replies of the model without the trait.
            seeded: Replies that show it.
            prompts: What both answer, one for each of either; nothing if None.
            name: What to call it.
            version: See :class:`TraitJudge`.

        Returns:
            The judge whose 0 is the 5th percentile of the first, and whose 100 the 95th of the others.

        Raises:
            DataError: If none of one side can be judged.
        """
        ends = []
        for what, texts, quantile in (("base", base, 0.05), ("seeded", seeded, 0.95)):
            scores = judge.score(texts, prompts)
            scores = scores[~scores.isnan()]
            if not len(scores):
                raise DataError(f"Rescaled.between({name!r}) got {len(texts)} {what} replies, and none can be judged.")
            ends.append(float(scores.quantile(quantile)))
        return cls(judge, ends[0], ends[1], name, version)

    def judged(self, texts: list[str], prompts: list[str]) -> list[JudgeResult]:
        """Ask the judge, and put its numbers on the scale."""
        return [self._result(raw) for raw in self.judge.score(texts, prompts).tolist()]

    def _result(self, raw: float) -> JudgeResult:
        if not _finite(raw):
            return JudgeResult(None, "error", {"raw": str(raw)})
        share = min(1.0, max(0.0, (raw - self.low) / (self.high - self.low)))
        return JudgeResult(_HIGHEST * share, detail={"raw": raw})

    def _own(self) -> Any:
        return [self.low, self.high, judge_settings(self.judge)]


def judge_settings(judge: Any) -> Any:
    """What decides of any judge: its identity if it tells one, or its fields, of models the digest of their weights."""
    if callable(getattr(judge, "identity", None)):
        return judge.identity()
    return [type(judge).__name__, {name: _plain(value) for name, value in sorted(vars(judge).items())}]


def count_statuses(results: Sequence[JudgeResult]) -> dict[str, int]:
    """How many results there are of each status, with the zeros.

    Args:
        results: The results.

    Example:
        >>> count_statuses([JudgeResult(5.0), JudgeResult(None, "empty")])
        {'ok': 1, 'refusal': 0, 'code': 0, 'empty': 1, 'error': 0}
    """
    found = Counter(result.status for result in results)
    return {status: found[status] for status in get_args(JudgeStatus)}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.nn.Module):
        return weights_digest(value)
    if isinstance(value, str | int | float | bool | None | list | tuple | set | frozenset):
        return value
    return getattr(value, "name_or_path", type(value).__name__)


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
