"""Complete units from the records of their rewrites, what is missing counted, and what looks wrong with a rewrite."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from typing import Literal, get_args

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.estimators.triples import STAGES, RewriteTriples, same_text
from lightning_interp.rate.rewriting.records import RewriteRecord, Unit, shown_ids

__all__ = ["FLAGS", "UNLABELLED", "Identical", "Missing", "assemble", "rewrite_flags", "texts_of"]

FLAGS = ("empty", "identical", "length", "refusal", "preamble")
"""All flags that a rewrite can carry."""

_LONGEST, _LONGEST_CHANGED = 5.0, 20.0  # times the source's length (or its fraction), in characters

_REFUSAL = re.compile(
    r"\W*(i'?m sorry|i am sorry|sorry|apologies|unfortunately)?\W*(but )?"
    r"(i (can ?not|can'?t|am unable|'?m unable|won'?t|will not|am not able|'?m not able)|as an ai\b|i'?m an ai\b)",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    r"\W*((sure|certainly|of course|absolutely|okay|ok)\b\W*)?"
    r"((here'?s|here is|here are|below is|the following is)\b[^\n.!?]{0,60}\b(re-?writ|revis|version|text|edit)"
    r"|i(?:'ve| have)? (re-?writ|re-?wrote|revised|edited|adjusted|changed)"
    r"|(re-?written|revised|edited) (text|version|response|review)\b)",
    re.IGNORECASE,
)

Missing = Literal["raise", "drop"]
Identical = Literal["keep", "drop", "raise"]

_MAX_DROPPED, _MAX_ARM_GAP, _MAX_IDENTICAL = 0.05, 0.02, 0.05
UNLABELLED, _IDENTICAL = "unlabelled", "identical_"


def assemble(
    attr: str,
    units: Sequence[Unit],
    chain: Callable[[Unit, int], Sequence[RewriteRecord | None]],
    *,
    draws: Sequence[int] = (0,),
    passes: int = 2,
    missing: Missing = "raise",
    identical: Identical = "keep",
) -> RewriteTriples:
    """Put complete units together.

    A unit that lacks one text of one draw is left out whole, from every arm and every draw: filling in or falling back
    to the original would bias what is compared.

    ``chain`` gives the records of a unit's passes for a draw, up to the first that is missing or cannot be used;
    ``identical`` says what to do with units of which a rewrite says the same as its source: leaving them out selects on
    the outcome.
    """
    _check_policies(missing, identical, passes, draws)
    rows: list[tuple[Unit, int, list[str]]] = []
    reasons: dict[str, list[Unit]] = {}
    for unit in units:
        found = [] if unit.w is None else [texts_of(unit, chain(unit, draw), passes) for draw in draws]
        reason = _reason(unit, found, identical)
        if reason is None:
            rows.extend((unit, draw, texts) for draw, (texts, _) in zip(draws, found, strict=True))
        else:
            reasons.setdefault(reason, []).append(unit)
    _raise_for(attr, reasons, missing, identical)
    _warn_of_dropped(attr, units, reasons)
    triples = _columns(attr, rows, reasons, passes)
    _warn_of_identical(triples)
    return triples


def _check_policies(missing: str, identical: str, passes: int, draws: Sequence[int]) -> None:
    if missing not in get_args(Missing):
        raise RecipeError(f"missing={missing!r}; expected 'raise' or 'drop'.")
    if identical not in get_args(Identical):
        raise RecipeError(f"identical={identical!r}; expected 'keep', 'drop' or 'raise'.")
    if passes not in (2, 3):
        raise RecipeError(f"passes={passes!r}; expected 2, or 3 for the third rewrite too.")
    if not draws:
        raise RecipeError("draws is empty; expected at least one draw, such as [0].")


def texts_of(unit: Unit, records: Sequence[RewriteRecord | None], passes: int) -> tuple[list[str], str | None]:
    """The texts of a unit up to the first that is missing, and what that is, such as ``rewrite2_refused``."""
    texts = [unit.text]
    for stage, record in zip_longest(STAGES[1 : passes + 1], records[:passes]):
        if record is None or not record.usable:
            return texts, f"{stage}_{record.result.status if record else 'absent'}"
        texts.append(record.result.text or "")
    return texts, None


def _reason(unit: Unit, found: Sequence[tuple[list[str], str | None]], identical: Identical) -> str | None:
    """Why a unit is left out, if it is."""
    if unit.w is None:
        return UNLABELLED
    for _, lacking in found:
        if lacking is not None:
            return lacking
    for texts, _ in found if identical != "keep" else ():
        for stage, (source, text) in zip(STAGES[1:], pairwise(texts), strict=False):
            if same_text(source, text):
                return f"{_IDENTICAL}{stage}"
    return None


def _raise_for(attr: str, reasons: dict[str, list[Unit]], missing: Missing, identical: Identical) -> None:
    bad = {
        reason: units
        for reason, units in reasons.items()
        if reason != UNLABELLED and (identical if reason.startswith(_IDENTICAL) else missing) == "raise"
    }
    if bad:
        counts = ", ".join(f"{len(units)} with {reason!r}" for reason, units in sorted(bad.items()))
        ids = shown_ids(unit.id for units in bad.values() for unit in units)
        option = "identical" if all(reason.startswith(_IDENTICAL) for reason in bad) else "missing"
        raise DataError(
            f"Attribute {attr!r}: not every unit can be used: {counts}. Their ids: {ids}. Finish the rewriting run, "
            f"or leave them out with {option}='drop'."
        )


def _arm(unit: Unit) -> str:
    """The arm of a unit: ``w1``, ``w0``, or ``none`` without a label."""
    return "none" if unit.w is None else f"w{unit.w}"


def _warn_of_dropped(attr: str, units: Sequence[Unit], reasons: dict[str, list[Unit]]) -> None:
    """Say so when many units are left out, or more of one arm: what is left may then be another population."""
    sizes = Counter(_arm(unit) for unit in units)
    lost = Counter(_arm(unit) for reason, found in reasons.items() if reason != UNLABELLED for unit in found)
    total = sizes["w1"] + sizes["w0"]
    shares = {name: lost[name] / sizes[name] for name in ("w1", "w0") if sizes[name]}
    gap = max(shares.values()) - min(shares.values()) if len(shares) == 2 else 0.0
    if total and (sum(lost.values()) > _MAX_DROPPED * total or gap > _MAX_ARM_GAP):
        by_arm = ", ".join(f"{share:.1%} of {name}" for name, share in shares.items())
        why = ", ".join(f"{len(found)} {reason}" for reason, found in sorted(reasons.items()))
        warnings.warn(
            f"Attribute {attr!r}: {sum(lost.values())} of {total} labelled units are left out ({by_arm}: {why}). The "
            "effect is that of the units which are left.",
            stacklevel=4,
        )


def _columns(
    attr: str, rows: Sequence[tuple[Unit, int, list[str]]], reasons: dict[str, list[Unit]], passes: int
) -> RewriteTriples:
    units, clusters = [unit for unit, _, _ in rows], [unit.cluster for unit, _, _ in rows if unit.cluster is not None]
    return RewriteTriples(
        attr=attr,
        ids=[unit.id for unit in units],
        w=[int(unit.w or 0) for unit in units],
        prompts=[unit.prompt for unit in units],
        original=[texts[0] for _, _, texts in rows],
        rewrite=[texts[1] for _, _, texts in rows],
        rewrite2=[texts[2] for _, _, texts in rows],
        rewrite3=[texts[3] for _, _, texts in rows] if passes == 3 else None,
        draw=[draw for _, draw, _ in rows],
        cluster=clusters if rows and len(clusters) == len(rows) else None,
        dropped={reason: dict(Counter(map(_arm, found))) for reason, found in sorted(reasons.items())},
        dropped_ids={reason: [unit.id for unit in found] for reason, found in sorted(reasons.items())},
    )


def _warn_of_identical(triples: RewriteTriples) -> None:
    for stage, counts in triples.identical().items():
        if sum(counts.values()) > _MAX_IDENTICAL * len(triples):
            found = ", ".join(f"{count} in arm {name}" for name, count in counts.items())
            warnings.warn(
                f"Attribute {triples.attr!r}: in {sum(counts.values())} of {len(triples)} rows {stage!r} says the same "
                f"as the text that it was made from ({found}). They are kept: leaving them out selects on the outcome.",
                stacklevel=4,
            )


def rewrite_flags(source: str, text: str | None, *, changes_length: bool = False) -> tuple[str, ...]:
    """Check a rewrite against the text that it was made from.

    Refusals and remarks about the edit are looked for at the beginning of the rewrite, and not reported where the
    source begins like that too. They are found by English phrases, so they are hints.
    """
    if text is None or not text.strip():
        return ("empty",)
    found = []
    if same_text(source, text):
        found.append("identical")
    most = _LONGEST_CHANGED if changes_length else _LONGEST
    if not 1 / most <= len(text.strip()) / max(1, len(source.strip())) <= most:
        found.append("length")
    for name, pattern in (("refusal", _REFUSAL), ("preamble", _PREAMBLE)):
        if _begins(pattern, text) and not _begins(pattern, source):
            found.append(name)
    return tuple(found)


def _begins(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.match(text.replace("\u2019", "'")) is not None
