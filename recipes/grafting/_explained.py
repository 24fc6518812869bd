"""What was found with grafts, and what the names of plans and columns mean: for readers of a report alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_interp.core.measure.statistics import counted
from lightning_interp.grafting import GraftResult

_MEANINGS: Mapping[str, str] = {
    "PRE": "the model before finetuning, as it is: no graft",
    "SFT": "the finetuned model, as it is: all of its weights at all tokens",
    "FE": "finetuned weights at the tokens of the first entity of the prompt (such as the first person), and the plain "
    "model's everywhere else",
    "LT": "finetuned weights at the last token of the prompt, where the answer is read",
    "R": "at the words of the relation, between the entity and the last token",
    "M": "at the words of a title",
    "+": "at both, or all, of these tokens",
    "^C": "the complement: everywhere but there",
    "head": "whose unembedding turns the last state into words: the recipient's (plain model), the donor's "
    "(finetuned), or 'follow', that of whoever's weights are at work at the last token",
    "[": "only in these layers: Q1 to Q4 are quarters from below, halves likewise",
    "p=": "grafted layers left out at random with this probability, drawn with a seed (#)",
    "static": "finetuned weights of one component at all tokens, instead of at chosen ones",
    "patch": "activations of the finetuned model put in, instead of its weights",
    "dose": "a mixture of both models' weights at FE and LT: 0 is the plain model's, 1 the finetuned one's",
    "ATTN, O, FFN": "attention's queries, keys and values; its output map; the feed-forward maps (UP and DOWN: the one "
    "into its hidden layer, with the gate, and the one out of it)",
    "PAPER_ALL": "all components of the blocks, and the input embedding",
}
_COLUMNS: Mapping[str, str] = {
    "recipient, donor": "the model that weights are put into, and the one that they come from",
    "top-5": "share of facts whose answer begins with one of the five likeliest next tokens",
    "probability": "mean probability of the answer's first token",
    "median rank": "place of that token among all, 1 is the likeliest",
    "recovery": "share of what finetuning did to the answer's log probability that a plan brings back: 0 is like PRE, "
    "1 is like SFT",
    "[a, b]": "95 % interval over facts",
}


def terms(plans: Iterable[str], **more: str) -> dict[str, str]:
    """What the codes in some names of plans, and the columns of their tables, mean.

    Args:
        plans: The names.
        **more: Further terms of a recipe.

    Returns:
        Meanings by term.

    Example:
        >>> list(terms(["PRE", "FE+LT"]))[:4]
        ['PRE', 'FE', 'LT', '+']
    """
    names = list(plans)
    words = {part.strip("()") for name in names for part in name.replace("^C", "").replace("+", " ").split()}
    codes = {"+", "^C", "head", "[", "p=", "static", "patch", "dose"}
    parts = {"ATTN", "O", "FFN", "FFN-UP", "FFN-DOWN"}
    told = {
        term: meaning
        for term, meaning in _MEANINGS.items()
        if term in words
        or (term in codes and any(term in name for name in names))
        or (term.startswith("ATTN") and words & parts)
    }
    if "[" in told:
        told["[Q1] and the like"] = told.pop("[")
    return {**told, **more, **_COLUMNS}


def findings(found: GraftResult, *, form: str | None = None) -> list[str]:
    """What the eight standard plans say, each number with its interval.

    Args:
        found: Scores of (at least) ``PRE``, ``SFT``, ``FE``, ``LT``, ``FE+LT`` and ``(FE+LT)^C``.
        form: Only prompts of this form.

    Returns:
        The sentences; with none of the plans but ``PRE`` and ``SFT``, the first alone.
    """

    def share(plan: str) -> str:
        return str(found.estimate(plan, "top5", form=form))

    units = len(found.values("PRE", "top5", form))
    said = [
        f"The finetuned model has the answer among its {found.top_k} likeliest tokens for a share of {share('SFT')} of "
        f"the {counted(units, 'fact')}, the plain model for {share('PRE')}.",
    ]
    if {"FE", "LT", "FE+LT", "(FE+LT)^C"} <= set(found.plans):
        said += [
            f"With finetuned weights at the first entity and at the last token alone (FE+LT) the share is "
            f"{share('FE+LT')}; at the entity alone (FE) {share('FE')}, at the last token alone (LT) {share('LT')}.",
            f"With finetuned weights everywhere but at these tokens it is {share('(FE+LT)^C')}.",
            f"FE+LT brings back {found.recovery('FE+LT', form=form)} of what finetuning did to the answer's log "
            f"probability (1 is all), everything but FE+LT {found.recovery('(FE+LT)^C', form=form)}.",
        ]
    return said


def best_of(found: GraftResult, plans: Iterable[str], what: str) -> str:
    """The plan of some with the highest probability of the answer, with its interval.

    Args:
        found: The scores.
        plans: Which.
        what: What they are, in the plural.

    Returns:
        A sentence.
    """
    names = list(plans)
    best = max(names, key=lambda plan: found.estimate(plan, "target_prob").value)
    return (
        f"Of {len(names)} {what}, {best!r} gives the answer the highest mean probability: "
        f"{found.estimate(best, 'target_prob')} over {counted(len(found.values(best, 'target_prob')), 'fact')} (PRE, "
        f"no graft: {found.estimate('PRE', 'target_prob')}; SFT, the finetuned model: "
        f"{found.estimate('SFT', 'target_prob')}). The best of many is partly so by chance."
    )


def dropped_note(found: GraftResult) -> list[str]:
    """A caveat, where prompts were left out."""
    count = len(found.dropped)
    were = "was" if count == 1 else "were"
    return [f"{counted(count, 'prompt')} {were} left out; the table 'dropped' says why."] if count else []


PLANS_CAPTION = (
    "Left: share of facts whose answer is among the likeliest tokens; right: probability of the answer. A bar a plan, "
    "with its 95 % interval over facts. See whether FE+LT is as long as SFT, and its complement as short as PRE."
)
TRAINING_CAPTION = (
    "Each line is a plan, scored while the model was finetuned (dashed: a complement, ^C): see when finetuned weights "
    "begin to bring the answer, and whether FE+LT goes with SFT. No intervals: the first table has them for the end."
)
DOSE_CAPTION = "The line is the mean over facts, the band its 95 % interval: see whether the answer comes gradually."
GRID_CAPTION = (
    "A cell is a plan: a window of layers (upwards) and what is grafted there (columns); brighter is better. Left: the "
    "probability of the answer, right its median rank; the ends of the scale are in the titles."
)
