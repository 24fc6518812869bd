"""What a student took over, against a control student: paired effects, their interval, and what it cannot carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_interp.core.measure.clustered import Vector, mean_point
from lightning_interp.core.measure.statistics import Estimate, counted, nested_interval
from lightning_interp.errors import DataError
from lightning_interp.subliminal.evaluation.readout import TraitReadout

__all__ = ["TransmissionEffect", "specificity", "transmission_effect"]

_FEW = 6
_POWER = 0.8


@dataclass(frozen=True)
class TransmissionEffect:
    """Mean of paired effects: of a student of the trait minus its control, question by question.

    Args:
        estimate: The mean, with the interval of a bootstrap that draws datasets, then seeds, then questions again; of
            these only the levels from :attr:`cluster` on.
        by_clusters: The same mean with Student's interval over the means of clusters.
        n_datasets, n_training_seeds, n_questions: How many there are: of seeds and questions all different ones,
            counted over datasets together.
        cluster: The outermost level that was sampled more than once: ``datasets``, ``training seeds`` or ``questions``.
        n_clusters: How many of these.
        multiplier: Student's quantile of :attr:`by_clusters`: its half-width in standard errors.
        standard_error: Of the means of clusters.
        detectable: The smallest effect that such a design finds in four of five runs, by the same quantiles.
        measure: What was paired.
    """

    estimate: Estimate
    by_clusters: Estimate
    n_datasets: int
    n_training_seeds: int
    n_questions: int
    cluster: str
    n_clusters: int
    multiplier: float
    standard_error: float
    detectable: float
    measure: str = "margin"

    @property
    def limits(self) -> str:
        """What the interval does not speak of."""
        if self.cluster == "questions":
            said = "one dataset and one training seed: the interval is over questions alone, and another dataset or "
            return f"{said}seed may differ by any amount"
        if self.cluster == "training seeds":
            return "one dataset: the interval is over training seeds and questions, and another dataset may differ"
        few = f"; {self.n_clusters} are few, and a percentile interval over so few is too narrow"
        return f"the interval is over datasets, seeds and questions{few if self.n_clusters < _FEW else ''}"

    def text(self) -> str:
        """The effect with everything that its interval rests on."""
        return (
            f"paired {self.measure} {self.estimate} ({self.estimate.level:.0%}, {self.estimate.method}; "
            f"{counted(self.n_datasets, 'dataset')}, {counted(self.n_training_seeds, 'training seed')}, "
            f"{counted(self.n_questions, 'question')}; cluster level: {self.cluster}; by cluster means "
            f"{self.by_clusters}, multiplier {self.multiplier:.2f}); {self.limits}"
        )

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """Plain data; NaN becomes None."""
        numbers = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in vars(self).items()
            if not isinstance(value, Estimate)
        }
        ends = {"estimate": self.estimate.to_dict(), "by_clusters": self.by_clusters.to_dict()}
        return {**ends, **numbers, "limits": self.limits}


def transmission_effect(
    effects: Mapping[tuple[Any, Any], Tensor],
    *,
    measure: str = "margin",
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> TransmissionEffect:
    """Put paired effects of several datasets and training seeds together.

    Args:
        effects: By dataset and training seed, what ``student.margin - control.margin`` gave: one value a question, of
            students that differ in the completions that they were trained on and in nothing else.
        measure: What they are effects on.
        level: Confidence level.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Returns:
        The mean and its intervals.

    Raises:
        DataError: If there is no effect, or one is not a finite number.

    Example:
        >>> import torch
        >>> found = transmission_effect({(0, 0): torch.tensor([0.1, 0.3]), (0, 1): torch.tensor([0.2, 0.4])})
        >>> found.cluster, found.n_training_seeds, round(found.estimate.value, 3)
        ('training seeds', 2, 0.25)
    """
    for key, values in effects.items():
        if values.dim() != 1 or not len(values) or not bool(values.isfinite().all()):
            raise DataError(f"The effect of {key!r} is {values!r:.80}; expected finite numbers, one a question.")
    if not effects:
        raise DataError("transmission_effect() got no effect. Give it one tensor a dataset and training seed.")
    together = np.concatenate([one.double().numpy() for one in effects.values()])
    datasets, seeds = ([str(key[place]) for key, one in effects.items() for _ in range(len(one))] for place in (0, 1))
    runs = [f"{dataset}/{seed}" for dataset, seed in zip(datasets, seeds, strict=True)]
    names = {"datasets": datasets, "training seeds": runs, "questions": [str(i) for i in range(len(together))]}
    cluster = next((name for name, of in names.items() if len(set(of)) > 1), "questions")
    levels = {"datasets": (datasets, runs), "training seeds": (runs,), "questions": ()}[cluster]
    estimate = nested_interval(together.tolist(), *levels, level=level, seed=seed, resamples=resamples)
    return TransmissionEffect(
        estimate, **_by_clusters(together, names[cluster], level), n_datasets=len(set(datasets)),
        n_training_seeds=len(set(runs)), n_questions=max(map(len, effects.values())), cluster=cluster, measure=measure,
    )  # fmt: skip


def _by_clusters(values: Vector, cluster: list[str], level: float) -> dict[str, Any]:
    """Student's interval over the means of clusters, and the effect that it would find."""
    from scipy.special import stdtrit

    groups = np.unique(cluster, return_inverse=True)[1].ravel()
    means = np.bincount(groups, weights=values) / np.bincount(groups)
    point = mean_point(means)
    multiplier = float(stdtrit(point.df, 0.5 + level / 2)) if point.n > 1 else math.nan
    found = float(stdtrit(point.df, _POWER)) if point.n > 1 else math.nan
    reach = multiplier * point.se
    interval = Estimate(point.value, point.value - reach, point.value + reach, point.n, level, f"t({point.df:.4g})")
    return {
        "by_clusters": interval, "n_clusters": point.n, "multiplier": multiplier, "standard_error": point.se,
        "detectable": (multiplier + found) * point.se,
    }  # fmt: skip


def specificity(first: TraitReadout, second: TraitReadout) -> dict[str, Tensor]:
    """Double dissociation of two students: each trait's margin in its own student minus that in the other.

    Both differences are positive where each student took over its own trait, and not where both only became fonder of
    one of the two, or of the category.

    Args:
        first: Readout of the student of ``first.target``.
        second: Readout of the student of ``second.target``, of the same names and questions.

    Returns:
        By target the differences, ``[questions]``: what :func:`transmission_effect` takes.

    Raises:
        DataError: If the readouts compare other names or questions, or have one target.
    """
    same = set(first.names) == set(second.names) and len(first.logp) == len(second.logp)
    if not same or first.target == second.target:
        raise DataError(
            f"specificity() got readouts of {first.target!r} and {second.target!r} among {len(first.names)} and "
            f"{len(second.names)} names, of {len(first.logp)} and {len(second.logp)} questions. Expected two targets, "
            "and the same names and questions: Trait(others=...) of both together."
        )
    return {
        first.target: first.margin - second.of(first.target).margin,
        second.target: second.margin - first.of(second.target).margin,
    }
