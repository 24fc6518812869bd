"""Whether a judge may be believed: does it tell replies with the trait from others, and does a second judge agree?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_interp.core.measure.resampling import draw_counts, interval_ends
from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.errors import DataError
from lightning_interp.generation.judges import Judge

__all__ = ["Acceptance", "Agreement", "auroc", "auroc_interval", "check_paired", "judge_acceptance", "judge_agreement"]

DOSES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Acceptance(NamedTuple):
    """Whether a judge tells two kinds of replies apart; ``accepted`` is None where there are too few to say."""

    auroc: Estimate
    seeded: int
    base: int
    missing: int
    accepted: bool | None


class Agreement(NamedTuple):
    """Rank correlation of two judges' means over mixtures, and the mixtures: ``dose``, ``first``, ``second``."""

    spearman: float
    accepted: bool
    ladder: list[dict[str, float]]


def auroc(ones: Tensor, zeros: Tensor) -> float:
    """Chance that one of the first is above one of the second; ties count half (Mann and Whitney, 1947).

    Args:
        ones: Scores ``[n]`` that should be high.
        zeros: Scores ``[m]`` that should be low.

    Returns:
        From 0 to 1; NaN if one side is empty.

    Example:
        >>> auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    return float(_above(ones, zeros).mean()) if len(ones) and len(zeros) else float("nan")


def auroc_interval(
    ones: Tensor, zeros: Tensor, prompts: Sequence[str], *, level: float = 0.95, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """:func:`auroc` of paired replies, with a percentile bootstrap that draws prompts.

    Args:
        ones: Scores ``[n]`` of replies that should be high.
        zeros: Scores ``[n]`` of replies that should be low.
        prompts: What the replies of both answer.
        level: Confidence level.
        seed: Of the bootstrap.
        resamples: How many are drawn.

    Returns:
        The estimate; ``n`` counts prompts. No interval with fewer than two.

    Raises:
        DataError: If the numbers differ.
    """
    check_paired("auroc_interval", ones, zeros, prompts)
    value, names = auroc(ones, zeros), sorted(set(prompts))
    if len(names) < 2:
        return Estimate(value, float("nan"), float("nan"), len(names), level, "bootstrap")
    above = _above(ones, zeros).numpy()
    place = np.searchsorted(names, list(prompts))
    spread = []
    for counts in draw_counts(np.random.default_rng(seed), len(names), resamples):
        weights = counts[:, place]
        spread.append(((weights @ above) * weights).sum(1) / weights.sum(1) ** 2)
    ends = interval_ends(value, np.concatenate(spread), alpha=1 - level)
    return Estimate(value, *ends, len(names), level, "bootstrap")


def judge_acceptance(
    judge: Judge,
    seeded: Sequence[str],
    base: Sequence[str],
    prompts: Sequence[str],
    *,
    least_auroc: float = 0.95,
    least_replies: int = 50,
) -> Acceptance:
    """Whether a judge tells replies with the trait from those of the untouched model.

    Args:
        judge: Any judge.
        seeded: Replies that show the trait.
        base: Replies of the untouched model.
        prompts: What both answer, one for each of either.
        least_auroc: Least area under the ROC curve.
        least_replies: How many of either kind must have been judged.

    Returns:
        The finding; pairs of which one cannot be judged are left out and counted as ``missing``.

    Raises:
        DataError: If the lists are not paired.

    Example:
        >>> from lightning_interp.generation.judges import WordShare
        >>> found = judge_acceptance(WordShare({"luck"}), ["Luck!"] * 60, ["Work."] * 60, [str(i) for i in range(60)])
        >>> found.auroc.value, found.accepted
        (1.0, True)
    """
    check_paired("judge_acceptance", seeded, base, prompts)
    ones, zeros = judge.score(seeded, prompts), judge.score(base, prompts)
    kept = [i for i in range(len(prompts)) if not (ones[i].isnan() or zeros[i].isnan())]
    found = auroc_interval(ones[kept], zeros[kept], [prompts[i] for i in kept])
    enough = len(kept) >= least_replies
    return Acceptance(
        found, len(kept), len(kept), len(prompts) - len(kept), bool(found.value >= least_auroc) if enough else None
    )


def judge_agreement(
    first: Judge,
    second: Judge,
    seeded: Sequence[str],
    base: Sequence[str],
    prompts: Sequence[str],
    *,
    least_spearman: float = 0.6,
    draws: int = 10,
    seed: int = 0,
) -> Agreement:
    """Whether two judges rank mixtures alike that hold 0, 25, 50, 75 and 100 % replies with the trait.

    Args:
        first: A judge.
        second: Another.
        seeded: Replies that show the trait.
        base: Replies of the untouched model.
        prompts: What both answer, one for each of either.
        least_spearman: Least rank correlation.
        draws: Mixtures of each share; in each, other prompts get the replies with the trait.
        seed: Of which prompts do.

    Returns:
        The finding over all mixtures.

    Raises:
        DataError: If the lists are not paired, or some replies cannot be judged.
    """
    from scipy.stats import spearmanr

    check_paired("judge_agreement", seeded, base, prompts)
    scores = torch.stack([judge.score(one, prompts) for judge in (first, second) for one in (base, seeded)])
    if bool(scores.isnan().any()):
        wrong = int(scores.isnan().any(0).sum())
        raise DataError(f"judge_agreement() got {wrong} of {len(prompts)} prompts with a reply that cannot be judged.")
    ladder = []
    for dose in DOSES:
        for number in range(draws):
            generator = torch.Generator().manual_seed(derived_seed(seed, "ladder", dose, number))
            chosen = torch.zeros(len(prompts), dtype=torch.bool)
            chosen[torch.randperm(len(prompts), generator=generator)[: round(dose * len(prompts))]] = True
            one, other = (torch.where(chosen, scores[at + 1], scores[at]).mean() for at in (0, 2))
            ladder.append({"dose": dose, "first": float(one), "second": float(other)})
    found = float(spearmanr([row["first"] for row in ladder], [row["second"] for row in ladder]).statistic)
    return Agreement(found, bool(found >= least_spearman), ladder)


def check_paired(what: str, seeded: Any, base: Any, prompts: Sequence[str]) -> None:
    """Refuse replies of which not one of each kind answers each prompt."""
    if not len(seeded) == len(base) == len(prompts) or not len(prompts):
        raise DataError(
            f"{what}() got {len(seeded)} replies with the trait, {len(base)} without and {len(prompts)} prompts; "
            "expected one of each a prompt, and at least one prompt."
        )


def _above(ones: Tensor, zeros: Tensor) -> Tensor:
    """1 where the first is above the second, and 0.5 where they tie, ``[n, m]``."""
    gap = ones.double().cpu()[:, None] - zeros.double().cpu()
    return (gap > 0).double() + (gap == 0).double() / 2
