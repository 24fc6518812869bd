"""What a rewriter is worth: what came back, whether it complied, and what is left to estimate from."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_interp.core.measure.statistics import Estimate, counted, proportion_interval
from lightning_interp.errors import RecipeError
from lightning_interp.figures import BLUE, GREY, INK, ORANGE, in_house_style, label, legend_below, panels
from lightning_interp.generation.labellers import Labeller, labels
from lightning_interp.rate import EffectStudy, RateResult, RewriteStore, RewriteTriples, TripleScores
from lightning_interp.rate.checks.diagnostics import ThirdRewrite
from lightning_interp.rate.rewriting.assembly import FLAGS
from lightning_interp.rate.rewriting.records import Request, RewriteRecord, RewriterId

_STATUSES = ("truncated", "empty", "refused", "error")


@dataclass(frozen=True)
class PassQuality:
    """Rewrites of one pass in one direction, one a unit and draw.

    Args:
        number: 1 for rewrites of originals, 2 for rewrites of those, 3 for one more.
        target: Value that was asked for.
        asked: Rewrites that were asked for.
        statuses: How many came back unusable, by status.
        flags: How many carry a flag, by flag.
        complied: Share of the usable ones with a label that have the value asked for; None if there are none.
        unknown: Usable ones whose value the labeller could not tell.
    """

    number: int
    target: int
    asked: int
    statuses: dict[str, int]
    flags: dict[str, int]
    complied: Estimate | None
    unknown: int

    @property
    def direction(self) -> str:
        """From which value to which."""
        return f"{1 - self.target}->{self.target}"

    def shares(self) -> dict[str, float]:
        """Shares of all that was asked for: ``complied``, ``not complied``, ``cannot tell``, ``unusable``."""
        unusable = sum(self.statuses.values())
        known = self.asked - unusable - self.unknown
        right = 0.0 if self.complied is None else self.complied.value * known
        counts = {"complied": right, "not complied": known - right, "cannot tell": self.unknown, "unusable": unusable}
        return {name: count / self.asked for name, count in counts.items()}

    def row(self) -> dict[str, Any]:
        """A row to be printed."""
        return {
            "pass": self.number,
            "direction": self.direction,
            "asked": self.asked,
            "complied": "" if self.complied is None else str(self.complied),
            "cannot tell": self.unknown,
            **self.statuses,
            **{name: self.flags[name] for name in FLAGS if name != "empty"},
        }


@dataclass(frozen=True)
class RewriterQuality:
    """All passes of a rewriter, and its units from first to last.

    Args:
        rewriter: Its name.
        passes: By pass and direction.
        units: Units with a label.
        complete: Of these, those whose first two rewrites can be used.
        compliant: Of those, the ids of which both rewrites have the value asked for, as far as the labeller can tell.
        both: Share of all units that are complete and compliant, with Wilson's interval.
        identical: Units of which a rewrite says the same as its source.
    """

    rewriter: str
    passes: Sequence[PassQuality]
    units: int
    complete: int
    compliant: frozenset[str]
    both: Estimate
    identical: int

    def rows(self) -> list[dict[str, Any]]:
        """Rows to be printed, one a pass and direction."""
        return [{"rewriter": self.rewriter, **one.row()} for one in self.passes]

    def metrics(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rewriter": self.rewriter,
            "units": self.units,
            "complete": self.complete,
            "both_complied": self.both.to_dict(),
            "identical": self.identical,
            "passes": [
                {
                    "pass": one.number, "direction": one.direction, "asked": one.asked, "unknown": one.unknown,
                    "statuses": one.statuses, "flags": one.flags, "shares": one.shares(),
                    "complied": None if one.complied is None else one.complied.to_dict(),
                }
                for one in self.passes
            ],
        }  # fmt: skip


def rewriter_quality(
    store: RewriteStore, attr: str, by: RewriterId, labeller: Labeller, *, passes: int = 2
) -> RewriterQuality:
    """Count what a rewriter gave back.

    Args:
        store: The store.
        attr: Name of the attribute.
        by: The rewriter.
        labeller: Says which value of the attribute a text has.
        passes: 2, or 3 for the third rewrite too.

    Returns:
        The counts.

    Example:
        >>> import tempfile
        >>> from lightning_interp.rate import CallableRewriter, Contains, RewriteRun, Unit
        >>> units = [Unit(id="a", text="oh!", w=1), Unit(id="b", text="no", w=0)]
        >>> store = RewriteStore.create(tempfile.mkdtemp(), units, attr="mark")
        >>> lazy = CallableRewriter(lambda text, prompt, w: text + "!" * w, name="never removes")
        >>> _ = RewriteRun(store, lazy, attr="mark").run()
        >>> found = rewriter_quality(store, "mark", store.rewriters("mark")[0], Contains("!"))
        >>> [(one.number, one.direction, one.complied.value) for one in found.passes], found.both.value
        ([(1, '1->0', 0.0), (1, '0->1', 1.0), (2, '1->0', 0.0), (2, '0->1', 1.0)], 0.0)
    """
    units = [unit for unit in store.units(attr) if unit.w is not None]
    draws = sorted({record.draw for record in store.records(attr) if record.by == by}) or [0]
    groups: dict[tuple[int, int], list[tuple[Request, RewriteRecord]]] = {}
    for unit in units:
        for draw in draws:
            for request, record in store.chain(unit, attr, by, draw=draw, passes=passes):
                if record is not None:
                    groups.setdefault((request.number, request.w_target), []).append((request, record))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left out is counted here
        triples = store.triples(attr, missing="drop", rewriter=by)
    compliant = _compliant(triples, labeller)
    return RewriterQuality(
        rewriter=by.rewriter,
        passes=[_pass(*key, groups[key], labeller) for key in sorted(groups)],
        units=len(units),
        complete=len(set(triples.ids)),
        compliant=compliant,
        both=proportion_interval([float(unit.id in compliant) for unit in units]),
        identical=sum(sum(arms.values()) for arms in triples.identical().values()),
    )


def _pass(
    number: int, target: int, answers: Sequence[tuple[Request, RewriteRecord]], labeller: Labeller
) -> PassQuality:
    usable = [(request.unit.prompt, record.result.text or "") for request, record in answers if record.usable]
    found = labels(labeller, [text for _, text in usable], [prompt for prompt, _ in usable])
    records = [record for _, record in answers]
    known = [float(label == target) for label in found if label is not None]
    statuses = Counter[str](record.result.status for record in records)
    flags = Counter(flag for record in records for flag in record.flags)
    return PassQuality(
        number=number,
        target=target,
        asked=len(records),
        statuses={name: statuses[name] for name in _STATUSES},
        flags={name: flags[name] for name in FLAGS},
        complied=proportion_interval(known) if known else None,
        unknown=found.count(None),
    )


def _compliant(triples: RewriteTriples, labeller: Labeller) -> frozenset[str]:
    """Units of which the labeller finds the value asked for in both rewrites of every draw."""
    wrong: set[str] = set()
    for stage in ("rewrite", "rewrite2"):
        told = labels(labeller, triples.texts(stage), triples.prompts)
        rows = zip(triples.ids, told, triples.targets(stage), strict=True)
        wrong |= {name for name, label, target in rows if label != target}
    return frozenset(triples.ids) - wrong


def selected(triples: RewriteTriples, scores: TripleScores, ids: frozenset[str]) -> RateResult | None:
    """The effects among some of the units.

    Leaving units out because of what the rewriter made of them selects on the outcome: the texts on which it complies
    may be others than those on which it fails.

    Args:
        triples: Complete units.
        scores: Their rewards.
        ids: Which units.

    Returns:
        The effects, with errors over clusters where the units have them; None if there is no such unit.
    """
    keep = [row for row, name in enumerate(triples.ids) if name in ids]
    if not keep:
        return None

    fewer = triples.select(keep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kept in the result
        return scores.select(keep).effects(fewer, se="paired" if fewer.cluster is None else "cluster")


def verdict(quality: RewriterQuality, study: EffectStudy | None, third: ThirdRewrite | None = None) -> list[str]:
    """What the counts say about a rewriter, in plain sentences; none goes further than the interval does.

    Args:
        quality: The counts.
        study: The effects; None if no unit is complete.
        third: The check of a third rewrite; that of the study if None.

    Returns:
        The sentences.
    """
    named, both = f"rewriter {quality.rewriter!r}", quality.both
    name = f"The {named}"
    notes = [
        f"{name} brought usable rewrites of {quality.complete} of {counted(quality.units, 'unit')}; on a share of "
        f"{both} of all units both rewrites have the value asked for."
    ]
    if both.high < 0.5:
        notes.append(f"{name} fails on most units: an effect from it says little about the attribute.")
    elif both.low >= 0.9:
        notes.append(f"{name} nearly always does what it is asked to.")
    else:
        notes.append(f"{name} does what it is asked to on part of the units: the effect over all of them is diluted.")
    if study is None:
        return [*notes, f"{name} left no complete unit, so there is no effect to report."]
    hint = None if study.attenuation is None else study.attenuation.factor["ate"]
    if hint is not None and 1.05 < hint < float("inf"):
        notes.append(
            f"If the failed rewrites of the {named} changed nothing and all others were perfect, the effect would be "
            f"{hint:.1f} times what is reported."
        )
    return notes + _unequal(f"the {named}", study) + _third(f"the {named}", third or study.third)


def _unequal(name: str, study: EffectStudy) -> list[str]:
    """Changes besides that depend on the direction: the double rewrite cannot tell them from the attribute."""
    found = []
    for measure in sorted({row.measure for row in study.changes}):
        by = {row.direction: row.change for row in study.changes if (row.measure, row.stage) == (measure, "rewrite2")}
        if len(by) == 2 and (by["1->0"].high < by["0->1"].low or by["0->1"].high < by["1->0"].low):
            shown = " and ".join(f"{by[way].value:+.2f} in direction {way}" for way in ("0->1", "1->0"))
            found.append(f"{measure} {shown}")
    if not found:
        return []
    what = f"What {name} changes besides in pass 2 depends on the direction ({'; '.join(found)})"
    return [f"{what}: the effect is that of the attribute together with this."]


def _third(name: str, third: ThirdRewrite | None) -> list[str]:
    if third is None:
        return []
    gap = third.difference
    if math.isnan(gap.low):
        return []
    if gap.low <= 0 <= gap.high:
        return [f"A third rewrite by {name} shows no other effect (difference {gap}, {counted(gap.n, 'unit')})."]
    return [f"A third rewrite by {name} gives another effect (difference {gap}): the assumptions do not hold."]


_COLOURS = {"complied": BLUE, "not complied": ORANGE, "cannot tell": "#d9c9a3", "unusable": GREY}


@in_house_style
def quality_figure(qualities: Sequence[RewriterQuality], *, title: str = "") -> Any:
    """What became of the rewrites, a bar for each pass and direction of each rewriter.

    Args:
        qualities: The counts.
        title: Above the panel.

    Returns:
        A matplotlib figure.

    Raises:
        RecipeError: If no rewrite was asked for.
    """
    bars = [(quality.rewriter, one) for quality in qualities for one in quality.passes]
    if not bars:
        raise RecipeError(f"quality_figure() got {len(qualities)} rewriters without a rewrite. Fill the store first.")
    figure, (axis,) = panels(1, size=(8.4, 1.5 + 0.34 * len(bars)), title=title)
    left = [0.0] * len(bars)
    for name, colour in _COLOURS.items():
        widths = [one.shares()[name] for _, one in bars]
        axis.barh(range(len(bars)), widths, left=left, color=colour, label=name, height=0.72)
        for place, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.07:
                axis.text(
                    start + width / 2,
                    place,
                    f"{width:.0%}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=INK if name == "cannot tell" else "white",
                )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    labels = [f"{name}, pass {one.number}, {one.direction} ({one.asked})" for name, one in bars]
    axis.set_yticks(range(len(bars)), labels)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.grid(False, axis="y")
    label(axis, "share of the rewrites that were asked for (their number in brackets)")
    legend_below(figure, 4)
    return figure
