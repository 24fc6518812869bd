"""A logistic probe as a judge: trained on replies with a trait and without, and told how well it knows them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.measure.logistic import fit_logistic
from lightning_interp.core.measure.seeding import hashed_number
from lightning_interp.core.measure.statistics import Estimate, counted
from lightning_interp.core.model.fingerprint import tensor_hash
from lightning_interp.errors import DataError
from lightning_interp.generation.judging.acceptance import auroc_interval, check_paired
from lightning_interp.generation.judging.verdicts import JudgeResult, TraitJudge, judge_settings

__all__ = ["ProbeJudge"]

Vectors = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, eq=False)
class ProbeJudge(TraitJudge):
    """Probability, times 100, that a reply is one with the trait, by logistic regression on vectors of texts.

    Made by :meth:`fit`.

    Args:
        vectors: Gives texts ``[n, d]``, such as
            :class:`~lightning_interp.generation.judging.text_vectors.TextVectors` of the untouched model.
        weight: Of the vectors, float64 ``[d]``.
        bias: Of the regression.
        auroc: How well probes trained on other prompts told these replies apart.
        name: What to call it.
        version: See :class:`~lightning_interp.generation.judging.verdicts.TraitJudge`.

    Example:
        >>> lengths = lambda texts: torch.tensor([[float(len(text))] for text in texts])
        >>> asked, long, short = [f"q{i}" for i in range(9)], ["a long one"] * 9, ["short"] * 9
        >>> judge = ProbeJudge.fit(lengths, long, short, asked)
        >>> judge.auroc.value, [round(x) for x in judge.score(["a long one", "short"]).tolist()]
        (1.0, [89, 11])
    """

    vectors: Vectors
    weight: Tensor
    bias: float
    auroc: Estimate
    name: str = "probe"
    version: str = "1"

    @classmethod
    def fit(
        cls,
        vectors: Vectors,
        seeded: Sequence[str],
        base: Sequence[str],
        prompts: Sequence[str],
        *,
        l2: float = 1.0,
        folds: int = 5,
        least_auroc: float = 0.9,
        name: str = "probe",
    ) -> ProbeJudge:
        """Train a probe, and refuse one that cannot tell the two kinds apart on prompts that it has not seen.

        Args:
            vectors: See the class.
            seeded: Replies that show the trait.
            base: Replies of the untouched model.
            prompts: What both answer, one for each of either; not the questions of an evaluation.
            l2: Penalty, of weights of columns with mean 0 and variance 1.
            folds: Parts that whole prompts are dealt to, each judged by a probe trained on the others.
            least_auroc: Least area under the ROC curve of these judgements.
            name: What to call it.

        Returns:
            The probe trained on everything; its ``auroc`` is that of the held-out judgements, with a bootstrap interval
            over prompts that does not train again.

        Raises:
            DataError: If the lists are not paired, there are fewer prompts than folds, or the AUROC is too low.
        """
        check_paired("ProbeJudge.fit", seeded, base, prompts)
        place = {prompt: i for i, prompt in enumerate(sorted(set(prompts), key=lambda one: (hashed_number(one), one)))}
        if not 2 <= folds <= len(place):
            raise DataError(
                f"ProbeJudge.fit(folds={folds}) got {counted(len(place), 'prompt')}; expected 2 to as many."
            )
        x, y = vectors([*seeded, *base]).double().cpu(), torch.tensor([1.0] * len(seeded) + [0.0] * len(base))
        fold = torch.tensor([place[prompt] % folds for prompt in [*prompts, *prompts]])
        held = torch.zeros(len(y), dtype=torch.float64)
        for number in range(folds):
            weight, bias = _fitted(x[fold != number], y[fold != number], l2)
            held[fold == number] = x[fold == number] @ weight + bias
        auroc = auroc_interval(held[: len(seeded)], held[len(seeded) :], prompts)
        if not auroc.value >= least_auroc:
            raise DataError(
                f"ProbeJudge.fit({name!r}) tells replies with the trait from others with an AUROC of {auroc} on "
                f"prompts that it has not seen; expected at least {least_auroc}. Give more replies, or other vectors."
            )
        return cls(vectors, *_fitted(x, y, l2), auroc, name)

    def judged(self, texts: list[str], prompts: list[str]) -> list[JudgeResult]:
        """Read the texts; prompts are not read."""
        logits = self.vectors(texts).double().cpu() @ self.weight + self.bias
        rows = zip((100 * logits.sigmoid()).tolist(), logits.tolist(), strict=True)
        return [JudgeResult(score, detail={"logit": logit}) for score, logit in rows]

    def _own(self) -> Any:
        return [tensor_hash(self.weight, torch.tensor(self.bias)), judge_settings(self.vectors)]


def _fitted(x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, float]:
    """Regression on standardised columns, as weights of the columns as they are; a constant column gets none."""
    mean, spread = x.mean(0), x.std(0, correction=0)
    scale = torch.where(spread > 0, spread, torch.inf)
    weight, bias = fit_logistic((x - mean) / scale, y, l2=l2)
    weight = weight / scale
    return weight, bias - float(mean @ weight)
