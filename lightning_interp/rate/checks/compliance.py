"""Labelled units, and whether rewrites have the value that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.generation.labellers import Labeller, compliance, labels
from lightning_interp.rate.estimators.columns import check_lengths
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.records import Unit

__all__ = ["Compliance", "compliance_rates", "label_units"]


def label_units(
    texts: Sequence[str],
    labeller: Labeller,
    *,
    prompts: Sequence[str] | str = "",
    ids: Sequence[str] | None = None,
    clusters: Sequence[str] | None = None,
) -> list[Unit]:
    """Make units of texts.

    Args:
        texts: The originals.
        labeller: Says which value of the attribute they have.
        prompts: What each of them answers, or one prompt for all.
        ids: Their names; the numbers of the texts if None.
        clusters: What units that are not independent share.

    Returns:
        One unit a text.

    Raises:
        DataError: If lengths differ, or a label is not 0, 1 or None.

    Example:
        >>> from lightning_interp.generation.labellers import StartsWithVowel
        >>> [unit.w for unit in label_units(["An idea", "The idea"], StartsWithVowel())]
        [1, 0]
    """
    asked = [prompts] * len(texts) if isinstance(prompts, str) else list(prompts)
    names = [str(index) for index in range(len(texts))] if ids is None else list(ids)
    groups = [None] * len(texts) if clusters is None else list(clusters)
    check_lengths("texts", len(texts), [("prompts", asked), ("ids", names), ("clusters", groups)], one="value a text")
    rows = zip(names, texts, labels(labeller, list(texts), asked), asked, groups, strict=True)
    return [Unit(id=name, text=text, w=w, prompt=prompt, cluster=group) for name, text, w, prompt, group in rows]


@dataclass(frozen=True, kw_only=True)
class Compliance:
    """How often rewrites of one pass have the value asked for, of draws the mean; ``unknown`` are not counted."""

    stage: str
    target: int
    share: Estimate
    unknown: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"stage": self.stage, "target": self.target, "unknown": self.unknown, **self.share.to_dict()}


def compliance_rates(triples: RewriteTriples, labeller: Labeller) -> list[Compliance]:
    """Compliance of each pass in each direction.

    Nothing is corrected by it. If the first pass fails with probability ``a`` and the second with ``b``, and both are
    perfect otherwise, the double-rewrite effect is ``(1-a)(1-b)`` times the true one.

    Args:
        triples: Complete units.
        labeller: Says which value of the attribute a text has.

    Returns:
        One row a pass and direction that occurs and can be told.

    Raises:
        DataError: If the labeller gives something else than 0, 1 or None for each text.

    Example:
        >>> from lightning_interp.generation.labellers import Contains
        >>> row = {"id": "a", "w": 1, "original": "oh!", "rewrite": "oh!", "rewrite2": "oh!"}
        >>> found = compliance_rates(RewriteTriples.from_rows([row]), Contains("!"))
        >>> [(row.stage, row.target, row.share.value) for row in found]
        [('rewrite', 0, 0.0), ('rewrite2', 1, 1.0)]
    """
    rows = []
    for stage in triples.stages[1:]:
        found = labels(labeller, triples.texts(stage), triples.prompts)
        asked = list(zip(triples.ids, found, triples.targets(stage), strict=True))
        for target in (0, 1):
            part = [(name, label) for name, label, wanted in asked if wanted == target]
            if any(label is not None for _, label in part):
                units, given = zip(*part, strict=True)
                share, unknown = compliance(given, [target] * len(part), units=units)
                rows.append(Compliance(stage=stage, target=target, share=share, unknown=unknown))
    return rows
