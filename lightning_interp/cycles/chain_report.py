"""What chains of generation cycles have shown: tables, figures and sentences, each number with what it rests on.

Chains of one arm differ in their seeds. Where an arm has several, an interval is Student's over chains; where it has
one, it is over the questions of that chain, and says nothing of another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lightning_interp.core.measure.series import gain
from lightning_interp.core.measure.statistics import Estimate, columns, counted, direction, listed, t_interval, text_of
from lightning_interp.cycles.trajectory import (
    THRESHOLD,
    Chain,
    ChainTrajectory,
    Checkpoint,
    Verdict,
    chain_trajectory,
    coherent_above,
    paired_difference,
)
from lightning_interp.figures import BLUE, COLOURS, INK, ORANGE, band, dash, in_house_style, label, legend_below, panels

__all__ = ["Arm", "ChainReport", "coherence_figure", "cycles_figure"]

_NUMBERS = (
    *("slope", "slope0", "prefix_slope", "late_max_0", "late_max_1", "late_min_0", "late_min_1", "late_mean_0"),
    *("late_mean_1", "retention", "coherence_cost_0", "coherence_cost_1", "coherence_on_score"),
)
_CONTROLS = {
    "no seed": "a chain without a seed",
    "shuffled generator": "data written by the base",
    "swapped pairs": "chosen and rejected swapped",
    "reinit twin": "a reinit twin of a continual chain",
}


@dataclass(frozen=True, eq=False)
class Arm:
    """All chains of a condition.

    Args:
        name: The condition.
        chains: They.
        found: What became of each.
        level: Of intervals over chains.
    """

    name: str
    chains: Sequence[Chain]
    found: Sequence[ChainTrajectory]
    level: float = 0.95

    @property
    def cycles(self) -> int:
        """Cycles that all chains have."""
        return min(len(chain.checkpoints) for chain in self.chains)

    @property
    def unit(self) -> str:
        """What intervals are over."""
        return "chains" if len(self.chains) > 1 else "questions"

    @property
    def rests_on(self) -> str:
        """How many chains, questions and responses."""
        first = self.chains[0].checkpoints[0]
        responses = min(each.responses for chain in self.chains for each in chain.checkpoints)
        return (
            f"{counted(len(self.chains), 'chain')}, {counted(len(first.scores), 'question')}, "
            f"{counted(responses, 'response')} a cycle"
        )

    def over(self, read: Callable[[ChainTrajectory], Estimate | None]) -> Estimate | None:
        """A number of every chain, with an interval over chains if there are several; None if a chain lacks it."""
        each = [read(one) for one in self.found]
        known = [one for one in each if one is not None]
        if len(known) < len(each):
            return None
        return known[0] if len(known) == 1 else t_interval([one.value for one in known], level=self.level)

    def number(self, name: str) -> Estimate | None:
        """One of :func:`~lightning_interp.cycles.chain_numbers`."""
        return self.over(lambda one: one.numbers.get(name))

    def by_cycle(self, kind: str) -> list[Estimate]:
        """``scores``, ``coherence``, ``from_start`` or ``retention`` by cycle; empty if a chain lacks it."""
        if any(not getattr(one, kind) for one in self.found):
            return []
        found = [self.over(lambda one, k=k: getattr(one, kind)[k]) for k in range(self.cycles)]  # type: ignore[misc]
        return [each for each in found if each is not None]

    def verdict(self, anchor: int) -> Verdict | None:
        """The class of the mean over chains; of the chain, if there is one."""
        alone = [one.verdicts[anchor] for one in self.found]
        known = [one for one in alone if one is not None]
        if len(known) < len(alone) or len(known) == 1:
            return known[0] if len(alone) == 1 and known else None
        late = [[getattr(one, x).value for one in known] for x in ("highest", "mean")]
        highest, mean = (t_interval(values, level=self.level) for values in late)
        above = self.number("coherence_above_base")
        return Verdict(
            anchor, highest, mean, known[0].threshold, coherent_above(above), known[0].questions,
            min(one.responses for one in known), len(known),
        )  # fmt: skip

    def row(self) -> dict[str, Any]:
        """Everything as a row of a table, intervals in brackets."""
        chain, scores = self.chains[0], self.by_cycle("scores")
        carried = gain([chain.scores for chain in self.chains], level=self.level) if self.cycles > 1 else None
        row: dict[str, Any] = {
            "arm": self.name, "control": chain.control or None, "chains": len(self.chains), "cycles": self.cycles,
            "interval over": self.unit, "n": scores[0].n, "first": str(scores[0]), "last": str(scores[-1]),
        }  # fmt: skip
        for anchor in (1, 0):
            verdict = self.verdict(anchor)
            each = Counter(one.name for found in self.found if (one := found.verdicts[anchor]) is not None)
            row |= {
                f"class_{anchor}": verdict and verdict.name, f"settled_{anchor}": verdict and verdict.settled,
                f"chains_by_class_{anchor}": ", ".join(f"{n} {name}" for name, n in sorted(each.items())) or None,
                f"amplified_coherently_{anchor}": verdict and verdict.amplified_coherently,
            }  # fmt: skip
        row |= {name: text_of(self.number(name)) for name in _NUMBERS}
        noise = [one.noise_ratio for one in self.found]
        return row | {
            "gain": text_of(None if carried is None else carried.gain), "fixed_point": carried and carried.fixed_point,
            "steps": carried and carried.steps,
            "noise_ratio": None if math.isnan(mean := float(np.mean(noise))) else mean,
            "noise_floor": text_of(self.over(lambda one: one.floor)),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class ChainReport:
    """Tables, figures and sentences of chains.

    Args:
        chains: All of them, controls too.
        trait: What is scored, in words.
        threshold: Points of late change that make a class.
        level: Confidence level.
        seed: Of bootstraps.
        resamples: Of bootstraps.
        possible: Controls that could have been run, of which those that were not are named; all if None.

    Example:
        >>> def evaluated(score):
        ...     return Checkpoint.of({"scores": [[score, score + 4], [score - 6, score + 2]]})
        >>> cycles = [evaluated(score) for score in (40, 42, 47, 55, 66)]
        >>> report = ChainReport([Chain("DPO continual", cycles, base=evaluated(10))], trait="luck")
        >>> report.tables()["arms"][0]["class_1"], len(report.tables()["chains"])
        ('amplified', 6)
    """

    chains: Sequence[Chain]
    trait: str = "the trait"
    threshold: float = THRESHOLD
    level: float = 0.95
    seed: int = 0
    resamples: int = 2000
    possible: Collection[str] | None = None

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """By name, in the order in which they first come."""
        how: dict[str, Any] = {"level": self.level, "seed": self.seed, "resamples": self.resamples}
        found = [chain_trajectory(chain, threshold=self.threshold, **how) for chain in self.chains]
        named: dict[str, list[int]] = {}
        for i, chain in enumerate(self.chains):
            named.setdefault(chain.arm, []).append(i)
        return {
            name: Arm(name, [self.chains[i] for i in places], [found[i] for i in places], self.level)
            for name, places in named.items()
        }

    @property
    def _checkpoints(self) -> list[Checkpoint]:
        return [each for chain in self.chains for each in chain.checkpoints]

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """``arms``, a row each, and ``chains``, a row a cycle and one for the base."""
        arms = list(self.arms.values())
        pairs = [pair for arm in arms for pair in zip(arm.chains, arm.found, strict=True)]
        return {"arms": [arm.row() for arm in arms], "chains": [row for pair in pairs for row in _rows(*pair)]}

    def metrics(self) -> dict[str, Any]:
        """Scores and numbers by arm, as plain values."""
        classes = ("class_0", "class_1", "settled_0", "settled_1")
        return {
            arm.name: {"rests_on": arm.rests_on, "scores": [x.to_dict() for x in arm.by_cycle("scores")]}
            | {name: x.to_dict() for name in _NUMBERS if (x := arm.number(name)) is not None}
            | {name: value for name, value in arm.row().items() if name in classes}
            for arm in self.arms.values()
        }

    def figures(self, title: str = "") -> dict[str, Any]:
        """``cycles`` and, where coherence or distinct-2 was measured, ``coherence``."""
        arms = list(self.arms.values())
        found = {"cycles": cycles_figure(arms, threshold=self.threshold, title=title)}
        return found | ({"coherence": coherence_figure(arms, title=title)} if self._coherent else {})

    def captions(self) -> dict[str, str]:
        """What to see in each of the figures, by name."""
        found = {
            "cycles": f"Score of {self.trait} and coherence after each cycle, a panel an arm, with {self.level:.0%} "
            "intervals (over chains, which are thin lines, or over the questions of a single chain); dashed the base. "
            f"Dotted from cycle 4 on: {self.threshold:g} points above cycle 1, from where a chain is called amplified. "
            "It is a convention, not a test."
        }
        if self._coherent:
            found["coherence"] = (
                "Left, coherence against score, a line a chain from its large dot at cycle 0: see whether a higher "
                "score is paid for with coherence. Right, the share of different pairs of tokens by cycle: where it "
                "falls, replies repeat themselves, which a judge that counts words reads as the trait."
            )
        return found

    @property
    def _coherent(self) -> bool:
        return any(each.coherence is not None or each.distinct_2 is not None for each in self._checkpoints)

    def findings(self) -> list[str]:
        """What was found: direction, size, interval, and what it rests on, first of arms, then of controls."""
        controls = [arm for arm in self.arms.values() if arm.chains[0].control]
        arms = [arm for arm in self.arms.values() if not arm.chains[0].control]
        said = [_arm_sentence(arm, self.trait) for arm in arms]
        for control in controls:
            said += _control_sentences(control, arms, self)
        for arm in self.arms.values():
            if (floor := arm.over(lambda one: one.floor)) is not None:
                said.append(
                    f"{arm.name}: a second evaluation of the model of cycle 0, with other random numbers, differs by "
                    f"{floor} points ({arm.rests_on}): so far does a score move when nothing does."
                )
        return said

    def caveats(self) -> list[str]:
        """What these numbers may not be used for."""
        few = [arm.name for arm in self.arms.values() if len(arm.chains) == 1]
        short = [arm.name for arm in self.arms.values() if arm.verdict(1) is None]
        missing = sum(each.scores.size - each.responses for each in self._checkpoints)
        done = {chain.control for chain in self.chains}
        possible = _CONTROLS if self.possible is None else self.possible
        absent = [text for name, text in _CONTROLS.items() if name in possible and name not in done]
        if all(chain.again is None for chain in self.chains):
            absent.append("a second evaluation of the same model")
        said = [
            f"The threshold of {self.threshold:g} points is a convention and no test, and the highest of several noisy "
            "late scores lies above the highest true one. Read a class beside its interval, and from both anchors.",
        ]
        if few:
            said.append(
                f"One chain of {listed(few)}: intervals are over questions, and another seed may go elsewhere. The "
                "unit of a claim about amplification is the chain."
            )
        if short:
            said.append(f"No class of {listed(short)}: it needs five cycles, each with a score.")
        if missing:
            whole = sum(each.scores.size for each in self._checkpoints)
            said.append(
                f"{missing:,} of {counted(whole, 'response')} have no score and are left out; the table of chains says "
                "what scores would be if all of these were 0 or 100."
            )
        if absent:
            said.append(f"Controls that were not run: {listed(absent)}.")
        return said


def _rows(chain: Chain, found: ChainTrajectory) -> list[dict[str, Any]]:
    """Rows of a chain's checkpoints, and one of its base."""
    about = {"arm": chain.arm, "chain": chain.name, "control": chain.control or None}
    rows = []
    for k, each in enumerate(chain.checkpoints):
        coherence = found.coherence[k] if found.coherence else None
        row = about | {"cycle": k} | columns("score", found.scores[k]) | _counts(each)
        row |= columns("change", found.from_start[k]) | columns("coherence", coherence)
        row |= {"retention": found.retention[k].value if found.retention else None}
        rows.append(row | {"distinct_2": each.distinct_2, "perplexity": each.perplexity})
    if (base := chain.base) is not None:
        more = {"distinct_2": base.distinct_2, "perplexity": base.perplexity}
        rows.append(about | {"cycle": "base", "score": base.score} | _counts(base) | more)
    return rows


def _counts(each: Checkpoint) -> dict[str, Any]:
    """What a score rests on, and what it would be if missing ones were nothing or everything."""
    missing, scored = each.scores.size - each.responses, each.score * each.responses if each.responses else 0.0
    return {
        "questions": len(each.scores), "responses": each.responses, "missing": missing,
        "score_if_missing_0": scored / each.scores.size,
        "score_if_missing_100": (scored + 100 * missing) / each.scores.size,
        "statuses": dict(each.statuses) or None,
    }  # fmt: skip


def _arm_sentence(arm: Arm, trait: str) -> str:
    scores, change, verdict = arm.by_cycle("scores"), arm.by_cycle("from_start")[-1], arm.verdict(1)
    said = (
        f"{arm.name}: the score of {trait} goes from {scores[0]} at cycle 0 to {scores[-1]} at cycle {arm.cycles - 1}, "
        f"a change of {change} points ({direction(change)}; interval over {arm.unit}; {arm.rests_on})."
    )
    if (steep := arm.number("slope")) is not None and not math.isnan(steep.value):
        said += f" Slope from cycle 1 on: {steep} points a cycle."
    if verdict is None:
        return f"{said} No class: that needs five cycles, each with a score."
    other = arm.verdict(0)
    against = "" if other is None or other.name == verdict.name else f"; against cycle 0 it would be {other.name}"
    sure = "which the intervals settle" if verdict.settled else "which the intervals leave open"
    said += f" By the threshold of {verdict.threshold:g} points {verdict.name} against cycle 1, {sure}{against}."
    if (cost := arm.number("coherence_cost_1")) is not None:
        said += f" Coherence at the highest late score, minus that of cycle 1: {cost}."
    return said


def _control_sentences(control: Arm, arms: Sequence[Arm], report: ChainReport) -> list[str]:
    """What a control has shown, and how it differs from what it controls."""
    kind, change = control.chains[0].control, control.by_cycle("from_start")[-1]
    said = [
        f"Control {control.name} ({_CONTROLS[kind]}): the score changes by {change} points from cycle 0 to "
        f"{control.cycles - 1} ({direction(change)}; interval over {control.unit}; {control.rests_on})."
    ]
    for arm in arms:
        if control.chains[0].of in ("", arm.name) and (pair := _paired(arm, control, report)) is not None:
            difference, cycle = pair
            several = difference.method.startswith("t(")
            unit = f"{difference.n} pairs of chains" if several else f"{counted(difference.n, 'question')} of one pair"
            said.append(
                f"{arm.name} minus {control.name} at cycle {cycle}, paired: {difference} points (interval over {unit})."
            )
    return said


def _paired(arm: Arm, control: Arm, report: ChainReport) -> tuple[Estimate, int] | None:
    """Last scores of chains minus those of the control's chains of their names; None without a pair."""
    last = min(arm.cycles, control.cycles) - 1
    named: Mapping[str, Chain] = {chain.name: chain for chain in control.chains}
    shared = [(chain, named[chain.name]) for chain in arm.chains if chain.name in named]
    pairs = [(one.checkpoints[last], other.checkpoints[last]) for one, other in shared]
    if not pairs:
        return None
    if len(pairs) > 1:
        return t_interval([one.score - other.score for one, other in pairs], level=report.level), last
    return paired_difference(*pairs[0], level=report.level, seed=report.seed, resamples=report.resamples), last


@in_house_style
def cycles_figure(arms: Sequence[Arm], *, threshold: float = THRESHOLD, title: str = "") -> Any:
    """Score and coherence against cycle, a panel an arm."""
    columns = min(len(arms), 3)
    size = (max(4.6, 3.3 * columns), 2.5 * math.ceil(len(arms) / columns) + 1.1)
    figure, axes = panels(len(arms), size=size, title=title, columns=columns, sharey=True)
    for arm, axis in zip(arms, axes, strict=True):
        cycles, scores, base = range(arm.cycles), arm.by_cycle("scores"), arm.chains[0].base
        for chain in arm.chains if len(arm.chains) > 1 else ():
            axis.plot(chain.scores, color=BLUE, alpha=0.3, linewidth=0.6)
        band(axis, cycles, scores, BLUE, "score")
        if coherence := arm.by_cycle("coherence"):
            band(axis, cycles, coherence, ORANGE, "coherence", marker="s")
        if base is not None:
            dash(axis, base.score, "score of the base", BLUE)
            if base.coherence is not None and coherence:
                dash(axis, float(np.nanmean(base.coherence)), "coherence of the base", ORANGE)
        if arm.cycles > 4:
            name = f"{threshold:g} above cycle 1 (a convention)"
            axis.hlines(scores[1].value + threshold, 4, arm.cycles - 1, colors=INK, linestyles=":", label=name)
        axis.set_ylim(min(-3, axis.get_ylim()[0]), max(103, axis.get_ylim()[1]))
        label(axis, "cycle", "score", title=arm.name, whole=True)
    legend_below(figure, 4)
    return figure


@in_house_style
def coherence_figure(arms: Sequence[Arm], *, title: str = "") -> Any:
    """Coherence against score, and distinct-2 against cycle, a colour an arm."""
    figure, (left, right) = panels(2, size=(9.0, 3.9), title=title)
    for arm, colour in zip(arms, COLOURS * len(arms), strict=False):
        for chain, found in zip(arm.chains, arm.found, strict=True):
            if found.coherence:
                x, y = ([each.value for each in row] for row in (found.scores, found.coherence))
                left.plot(x, y, color=colour, marker="o", markersize=3, linewidth=0.9, label=arm.name)
                left.plot(x[:1], y[:1], color=colour, marker="o", markersize=7)
            distinct = [math.nan if each.distinct_2 is None else each.distinct_2 for each in chain.checkpoints]
            right.plot(distinct, color=colour, marker="o", markersize=3, linewidth=0.9, label=arm.name)
    bases = [chain.base for arm in arms for chain in arm.chains if chain.base is not None]
    if bases and bases[0].distinct_2 is not None:
        dash(right, bases[0].distinct_2, "base")
    label(left, "score", "coherence")
    label(right, "cycle", "distinct-2", whole=True)
    right.set_ylim(-0.03, 1.03)
    legend_below(figure, 4)
    return figure
