"""Where a trait went over the cycles of a chain: slopes, late change, gain, retention, and what each of them rests on.

Scores are 0 to 100, ``s_k`` after cycle ``k``: the mean over all responses that have one. Intervals are of a bootstrap
that draws questions, then the responses of each; all checkpoints of a chain share the draws, so that differences are
paired. After Roe et al. 2026, arXiv 2605.01130.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_interp.core.measure.clustered import mean_point
from lightning_interp.core.measure.resampling import shared_replicates
from lightning_interp.core.measure.series import (
    FIRST_LATE,
    fixed_rows_error,
    late_change,
    line,
    noise_ratio,
    number_table,
    prefix_slope,
    retention,
    slope,
)
from lightning_interp.core.measure.statistics import Estimate, counted, resampled
from lightning_interp.errors import DataError

__all__ = [
    "THRESHOLD",
    "Chain",
    "ChainTrajectory",
    "Checkpoint",
    "Verdict",
    "chain_numbers",
    "chain_trajectory",
    "paired_difference",
]

Values = NDArray[np.float64]
Control = Literal["", "no seed", "shuffled generator", "swapped pairs", "reinit twin"]

THRESHOLD = 15.0
"""Points of late change from which a chain is called amplified; reported of the paper's own analysis."""
_COHERENT = 10.0  # points of coherence that an amplified chain may lie below the base and still be coherent


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What an evaluation found of one model.

    Args:
        scores: Of the trait, 0 to 100, ``[questions, samples]``; NaN where a response has none.
        coherence: Likewise; None if no response has one.
        statuses: How many responses ended how.
        distinct_2: Share of different pairs of tokens over all responses.
        perplexity: Of the responses under the base model.
    """

    scores: Values
    coherence: Values | None = None
    statuses: Mapping[str, int] = field(default_factory=dict)
    distinct_2: float | None = None
    perplexity: float | None = None

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Checkpoint:
        """Read an evaluation's summary.

        Args:
            summary: ``scores`` and perhaps ``coherence``, lists ``[questions][samples]`` with None where there is
                none; ``statuses``, such a list of words or their counts; ``distinct_2``; ``perplexity``. Other keys
                are left alone.

        Returns:
            The checkpoint.

        Raises:
            DataError: If a list is empty, ragged, of another shape than the scores, or holds no number.

        Example:
            >>> found = Checkpoint.of({"scores": [[80, None], [60, 70]], "statuses": [["ok", "refusal"], ["ok", "ok"]]})
            >>> found.score, found.responses, dict(found.statuses)
            (70.0, 3, {'ok': 3, 'refusal': 1})
        """
        scores = number_table("scores of an evaluation", summary.get("scores"))
        given = summary.get("coherence")
        coherence = None if given is None else number_table("coherence of an evaluation", given)
        coherence = None if coherence is None or np.isnan(coherence).all() else coherence
        if coherence is not None and coherence.shape != scores.shape:
            raise DataError(
                f"An evaluation has coherence of shape {list(coherence.shape)} beside scores of {list(scores.shape)}; "
                "expected one of each a response, None where there is none."
            )
        statuses = summary.get("statuses") or {}
        if not isinstance(statuses, Mapping):
            statuses = Counter(status for row in statuses for status in row)
        return cls(scores, coherence, dict(statuses), summary.get("distinct_2"), summary.get("perplexity"))

    @property
    def score(self) -> float:
        """Mean over all responses that have a score; NaN if none has."""
        return _mean(self.scores)

    @property
    def responses(self) -> int:
        """How many have a score."""
        return int(np.isfinite(self.scores).sum())

    @property
    def error(self) -> float:
        """Standard error of the score with the questions held fixed; NaN if one of them has less than two scores."""
        return fixed_rows_error(self.scores)


def _mean(table: Values) -> float:
    return mean_point(table[np.isfinite(table)]).value


@dataclass(frozen=True, eq=False)
class Chain:
    """Checkpoints of one chain, from cycle 0 on, evaluated on the same questions with the same number of samples.

    Args:
        arm: The condition, such as ``"DPO continual"``; chains of one arm differ in their seeds alone.
        checkpoints: After cycle 0, 1 and so on.
        base: The untouched model.
        again: The model of cycle 0 under other evaluation seeds: how far a score moves when nothing does.
        name: Which chain of its arm; a control's chain is compared with the chain of this name.
        control: What the chain is a control for, if it is one.
        of: The arm that it controls; all if empty.

    Raises:
        DataError: If there is no checkpoint, or one has other questions or samples.
    """

    arm: str
    checkpoints: Sequence[Checkpoint]
    base: Checkpoint | None = None
    again: Checkpoint | None = None
    name: str = "0"
    control: Control = ""
    of: str = ""

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise DataError(f"Chain {self.arm!r} {self.name!r} has no checkpoint; expected one a cycle, from 0 on.")
        models = (*self.checkpoints, self.base, self.again)
        shapes = [list(each.scores.shape) for each in models if each is not None]
        if wrong := [shape for shape in shapes if shape != shapes[0]]:
            raise DataError(
                f"Chain {self.arm!r} {self.name!r} has evaluations of shape {shapes[0]} and {wrong[0]} (questions, "
                "samples); expected the same questions and samples for every checkpoint, base and repetition."
            )

    @property
    def scores(self) -> Values:
        """``s_k``, float64 ``[K]``."""
        return np.array([each.score for each in self.checkpoints])


@dataclass(frozen=True)
class Verdict:
    """The class of late change against an anchor, and what it rests on.

    Args:
        anchor: The cycle that late ones are compared with.
        highest, mean: Of the difference over late cycles, in points. The highest of several noisy scores lies above
            the highest true one.
        threshold: In points.
        coherent: Whether coherence at the highest late score is at most 10 points below the base's; None if not known.
        questions, responses, chains: How many a cycle's score rests on.
    """

    anchor: int
    highest: Estimate
    mean: Estimate
    threshold: float
    coherent: bool | None
    questions: int
    responses: int
    chains: int = 1

    @property
    def name(self) -> str:
        """The class: ``amplified``, ``decayed``, both (``unstable``) or neither (``constant``)."""
        up, down = self.highest.value >= self.threshold, self.mean.value <= -self.threshold
        return ("unstable" if down else "amplified") if up else ("decayed" if down else "constant")

    @property
    def amplified_coherently(self) -> bool | None:
        """Amplified, and coherent there; None if that is not known."""
        up = self.highest.value >= self.threshold
        return self.coherent if up else False

    @property
    def settled(self) -> bool:
        """Whether both intervals that the class rests on leave the threshold out, so that no other class fits them."""
        ends = ((self.highest, self.threshold), (self.mean, -self.threshold))
        return all(end < each.low or each.high < end for each, end in ends)

    def text(self) -> str:
        """The class with everything that it rests on."""
        return (
            f"{self.name} against cycle {self.anchor} (late maximum {self.highest}, late mean {self.mean}, threshold "
            f"{self.threshold:g}: the intervals {'exclude' if self.settled else 'do not exclude'} it; "
            f"{counted(self.questions, 'question')}, {counted(self.responses, 'response')} a cycle, "
            f"{counted(self.chains, 'chain')})"
        )


def chain_numbers(
    scores: Values, coherence: Values | None = None, base: Values | None = None, base_coherence: Values | None = None
) -> dict[str, Values]:
    """Every number of a chain by its name, for many chains, or resamples of one, at once.

    Args:
        scores: ``[..., K]``.
        coherence: Likewise.
        base: Score of the untouched model ``[...]``.
        base_coherence: Its coherence, likewise.

    Returns:
        Float64 ``[...]`` by name: ``slope`` (from cycle 1), ``slope0``, ``prefix_slope``; from five cycles on
        ``late_max_A``, ``late_min_A`` and ``late_mean_A`` for anchors 0 and 1; with a base ``retention`` of the last
        cycle; with coherence its slope on the score (``coherence_on_score``), ``coherence_cost_A`` (at the highest
        late score, minus at the anchor), and ``coherence_above_base`` there.

    Example:
        >>> import numpy as np
        >>> {name: float(x) for name, x in chain_numbers(np.array([40.0, 50.0, 52.0]), base=np.array(20.0)).items()}
        {'slope': 2.0, 'slope0': 6.0, 'prefix_slope': 8.0, 'retention': 1.6}
    """
    found = {"slope": slope(scores), "slope0": slope(scores, first=0), "prefix_slope": prefix_slope(scores)}
    for anchor in (0, 1):
        if (late := late_change(scores, anchor=anchor)) is not None:
            found |= {f"late_{name}_{anchor}": x for name, x in zip(("max", "min", "mean"), late, strict=True)}
    if base is not None:
        found["retention"] = retention(scores, base)[..., -1]
    if coherence is not None:
        found["coherence_on_score"] = line(scores, coherence)[0]
        if scores.shape[-1] > FIRST_LATE:
            at = FIRST_LATE + scores[..., FIRST_LATE:].argmax(axis=-1)[..., None]
            there = np.take_along_axis(coherence, at, axis=-1)[..., 0]
            found |= {f"coherence_cost_{anchor}": there - coherence[..., anchor] for anchor in (0, 1)}
            if base_coherence is not None:
                found["coherence_above_base"] = there - base_coherence
    return found


@dataclass(frozen=True)
class ChainTrajectory:
    """One chain in numbers; intervals are over questions and responses of this one chain, and over nothing else.

    Args:
        scores, coherence: By cycle; coherence is empty if not asked.
        from_start: ``s_k - s_0`` by cycle, paired by question.
        retention: By cycle; empty without a base.
        numbers: Those of :func:`chain_numbers`. Retention is NaN where the interval of the seed's effect has 0 in it.
        noise_ratio: See :func:`noise_ratio`.
        floor: Score of the model of cycle 0 under other evaluation seeds, minus the first; None if not known.
        verdicts: By anchor, 0 and 1; None under five cycles, or if a cycle has no score.
    """

    scores: tuple[Estimate, ...]
    coherence: tuple[Estimate, ...]
    from_start: tuple[Estimate, ...]
    retention: tuple[Estimate, ...]
    numbers: Mapping[str, Estimate]
    noise_ratio: float
    floor: Estimate | None
    verdicts: Mapping[int, Verdict | None]


def chain_trajectory(
    chain: Chain, *, threshold: float = THRESHOLD, level: float = 0.95, seed: int = 0, resamples: int = 2000
) -> ChainTrajectory:
    """Describe a chain, with intervals of a bootstrap over questions that all its checkpoints share.

    Args:
        chain: The evaluations.
        threshold: Points of late change that make a class.
        level: Confidence level.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Returns:
        The numbers; no class under five cycles, and no interval over one question.

    Example:
        >>> cycles = [Checkpoint.of({"scores": [[40 + 2 * k, 60], [50, 70 - k]]}) for k in range(5)]
        >>> found = chain_trajectory(Chain("SFT reinit", cycles))
        >>> found.numbers["slope"].value, found.verdicts[1].name, found.verdicts[1].settled
        (0.25, 'constant', True)
    """
    tables = _tables(chain)
    rows = [table for group in tables.values() for table in group]
    ends = np.cumsum([len(group) for group in tables.values()])[:-1]
    means, drawn = (
        {name: x if name in ("scores", "coherence") else x[..., 0] for name, x in zip(tables, parts, strict=True)}
        for parts in (
            np.split(np.array([_mean(table) for table in rows]), ends),
            np.split(shared_replicates(rows, resamples=resamples, seed=seed), ends, axis=1),
        )
    )

    def estimates(value: Values, spread: Values) -> tuple[Estimate, ...]:
        return resampled(value, spread, n=len(rows[0]), level=level, method="bootstrap over questions")

    def both(statistic: Callable[[Mapping[str, Values]], Values]) -> tuple[Estimate, ...]:
        return estimates(statistic(means), statistic(drawn))

    raw, spread = (chain_numbers(**{name: x for name, x in each.items() if name != "again"}) for each in (means, drawn))
    numbers = {name: estimates(raw[name], spread[name])[0] for name in raw}
    kept: tuple[Estimate, ...] = ()
    if "base" in means:
        effect = both(lambda x: x["scores"][..., 0] - x["base"])[0]
        unknown = math.nan if effect.low <= 0 <= effect.high else 1.0  # a share of what may be nothing
        kept = both(lambda x: unknown * retention(x["scores"], x["base"]))
        numbers["retention"] = kept[-1]
    return ChainTrajectory(
        scores=both(lambda x: x["scores"]),
        coherence=both(lambda x: x["coherence"]) if "coherence" in means else (),
        from_start=both(lambda x: x["scores"] - x["scores"][..., :1]),
        retention=kept,
        numbers=numbers,
        noise_ratio=noise_ratio(means["scores"], [each.error for each in chain.checkpoints]),
        floor=both(lambda x: x["again"] - x["scores"][..., 0])[0] if "again" in means else None,
        verdicts={anchor: _verdict(chain, numbers, anchor, threshold) for anchor in (0, 1)},
    )


def _tables(chain: Chain) -> dict[str, list[Values]]:
    """All tables of a chain, by what they are; those of the base and of the repetition alone."""
    found = {"scores": [each.scores for each in chain.checkpoints]}
    coherence = [each.coherence for each in chain.checkpoints if each.coherence is not None]
    if len(coherence) == len(chain.checkpoints):
        found["coherence"] = coherence
    if chain.base is not None:
        found["base"] = [chain.base.scores]
        if chain.base.coherence is not None:
            found["base_coherence"] = [chain.base.coherence]
    return found | ({} if chain.again is None else {"again": [chain.again.scores]})


def paired_difference(
    one: Checkpoint, other: Checkpoint, *, level: float = 0.95, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """Score of one model minus that of another, with an interval of the same draws of questions for both.

    Args:
        one: An evaluation.
        other: Another one, of the same questions with as many samples.
        level: Confidence level.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Returns:
        The difference; no interval over one question.

    Raises:
        DataError: If the evaluations differ in shape.

    Example:
        >>> tables = [[[10, 20], [70, 80]], [[15, 25], [75, 85]]]
        >>> paired_difference(*(Checkpoint.of({"scores": table}) for table in tables)).text()
        '-5.00 [-5.00, -5.00]'
    """
    found = chain_trajectory(Chain("", [other, one]), level=level, seed=seed, resamples=resamples)
    return found.from_start[1]


def coherent_above(above: Estimate | None) -> bool | None:
    """Whether coherence is at most 10 points below the base's, of how far it lies above; None if that is not known."""
    return None if above is None or math.isnan(above.value) else above.value >= -_COHERENT


def _verdict(chain: Chain, numbers: Mapping[str, Estimate], anchor: int, threshold: float) -> Verdict | None:
    highest = numbers.get(f"late_max_{anchor}")
    if highest is None or math.isnan(highest.value):
        return None
    responses = min(each.responses for each in chain.checkpoints)
    return Verdict(
        anchor, highest, numbers[f"late_mean_{anchor}"], threshold,
        coherent=coherent_above(numbers.get("coherence_above_base")),
        questions=len(chain.checkpoints[0].scores), responses=responses,
    )  # fmt: skip
