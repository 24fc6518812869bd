"""Readouts and answers that come in batches and on several processes, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_interp.core.measure.reduced import KeyedRows
from lightning_interp.subliminal.evaluation.readout import TraitReadout
from lightning_interp.subliminal.evaluation.scoring import OTHER, bucket_of, contains, mentions
from lightning_interp.subliminal.traits import Trait

__all__ = ["TraitAnswers", "TraitLogits"]


class TraitLogits(KeyedRows):
    """What a model is about to answer; each question counts once, however often and on whichever process it came.

    Args:
        trait: What is compared.

    Example:
        >>> metric, trait = TraitLogits(Trait(others=("cat",))), Trait(others=("cat",))
        >>> logp = torch.tensor([[-1.0, -3.0]])
        >>> metric.update([7], TraitReadout(("owl", "cat"), logp, torch.ones(1, 2).long(), 9, "owl"))
        >>> metric.compute()["margin"]
        2.0
    """

    def __init__(self, trait: Trait) -> None:
        self.names = (trait.target, *trait.others)
        super().__init__(2 * len(self.names) + 1)

    def update(self, numbers: Sequence[int], readout: TraitReadout) -> None:
        """Add some questions, by their numbers."""
        size = torch.full((len(numbers), 1), float(readout.vocabulary), dtype=torch.float64)
        self.add(torch.tensor(numbers), torch.cat([readout.logp, readout.rank.double(), size], 1))

    def compute(self) -> dict[str, float]:
        """Means over all questions; see :meth:`~lightning_interp.subliminal.evaluation.readout.TraitReadout.means`."""
        found = self.table()[1].cpu()
        logp, rank, size = found.tensor_split([len(self.names), 2 * len(self.names)], dim=1)
        return TraitReadout(self.names, logp, rank.long(), int(size.max()), self.names[0]).means()


class TraitAnswers(KeyedRows):
    """How often sampled answers name the target, and what guards against degenerate ones; each answer counts once.

    Args:
        trait: Whose target is counted.

    Example:
        >>> metric = TraitAnswers(Trait(target="owl"))
        >>> metric.update([0, 1], [["Owls!", "17"], ["a cat"]])
        >>> {name: round(value, 3) for name, value in metric.compute().items()}
        {'rate': 0.25, 'substring': 0.25, 'frac_nonalpha': 0.333, 'frac_other': 0.333}
    """

    def __init__(self, trait: Trait) -> None:
        super().__init__(4, keys=2)
        self.names, self.target = (trait.target, *trait.others), trait.target

    def update(self, numbers: Sequence[int], answers: Sequence[Sequence[str]]) -> None:
        """Add the answers of some questions, by their numbers."""
        keys = [(number, i) for number, some in zip(numbers, answers, strict=True) for i in range(len(some))]
        rows = [self._scored(text) for some in answers for text in some]
        self.add(torch.tensor(keys).reshape(-1, 2), torch.tensor(rows, dtype=torch.float64).reshape(-1, 4))

    def _scored(self, text: str) -> list[float]:
        other = bucket_of(text, self.names) == OTHER
        letterless = not any(map(str.isalpha, text))
        return [float(x) for x in (mentions(text, self.target), contains(text, self.target), letterless, other)]

    def compute(self) -> dict[str, float]:
        """Means over questions of ``rate`` and ``substring``; shares of all answers ``frac_nonalpha``, ``frac_other``.

        See :class:`~lightning_interp.subliminal.evaluation.scoring.AnswerScores`.
        """
        keys, found = self.table()
        questions, place = torch.unique(keys[:, 0], return_inverse=True)
        count = place.bincount(minlength=len(questions)).to(found.dtype)
        sums = torch.zeros(len(questions), 4, dtype=found.dtype, device=found.device).index_add_(0, place, found)
        rates: Tensor = (sums[:, :2] / count[:, None]).mean(0)
        shares = found[:, 2:].mean(0)
        names = ("rate", "substring", "frac_nonalpha", "frac_other")
        return dict(zip(names, torch.cat([rates, shares]).tolist(), strict=True))
