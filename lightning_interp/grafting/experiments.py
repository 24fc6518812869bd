"""The published experiments as named plans.

Nief et al. 2025 (arXiv 2506.20746). ``FE`` are the tokens of the first entity, ``LT`` is the last prompt token, ``R``
the relation's tokens, ``M`` a title's; the spans of a prompt carry these names. Every function returns plans by name,
ready for :class:`~lightning_interp.grafting.evaluate.GraftEvaluator`.

========  ============================  ==========================================================================
E0-E2     :func:`paper_plans`           which positions suffice, which are necessary
E3        :func:`carrier_plans`         do the relation's or the title's tokens carry the fact
E4        :func:`head_plans`            is it only the output matrix
E5        :func:`component_plans`       what recall at the last token is made of
E6        :func:`hybrid_plans`          attention from one donor, feed-forward maps from another
E7        :func:`layer_plans`           where in depth
E8        :func:`dropout_plans`         how redundant the grafted layers are
E9        :func:`paper_plans`           the same plans on other training data or prompts
E10       :func:`static_plans`, patches the same weights at all positions; activations instead of weights
========  ============================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from lightning_interp.core.model.sites import Layers
from lightning_interp.core.tokens.positions import All, FromBatch, Last, Positions
from lightning_interp.errors import RecipeError
from lightning_interp.grafting.dropout import GraftDropout
from lightning_interp.grafting.plan import GraftPlan, GraftRule, Policy

__all__ = [
    "COMPONENT_SETS",
    "EXPERIMENTS",
    "carrier_plans",
    "component_plans",
    "dropout_plans",
    "head_plans",
    "hybrid_plans",
    "layer_plans",
    "paper_plans",
    "reverse_plans",
    "static_plans",
]

FE, LT, RELATION, TITLE = FromBatch("FE"), Last(), FromBatch("R"), FromBatch("M")

COMPONENT_SETS: dict[str, tuple[str, ...]] = {
    "ATTN+O+FFN": ("ATTN", "O", "FFN"),
    "ATTN+FFN": ("ATTN", "FFN"),
    "ATTN+O": ("ATTN", "O"),
    "O+FFN": ("O", "FFN"),
    "FFN": ("FFN",),
    "O": ("O",),
    "O+FFN-DOWN": ("O", "FFN_DOWN"),
    "O+FFN-UP": ("O", "FFN_UP"),
}
"""The published component sets of the last token. FFN-UP holds the gate where there is one (our reading)."""


def paper_plans(
    entity: Positions = FE,
    last: Positions = LT,
    *,
    components: str | Sequence[str] = "PAPER_ALL",
    layers: Layers = "all",
    head: Policy = "recipient",
    final_norm: Policy = "recipient",
) -> dict[str, GraftPlan]:
    """The eight standard plans: experiments E0 to E2 (sufficiency and necessity of the two routes).

    Args:
        entity: Tokens of the first entity.
        last: The last prompt token.
        components: What is grafted there.
        layers: In which layers.
        head: Head switch of the six grafts (``PRE`` and ``SFT`` are the plain models).
        final_norm: Final-norm switch of the six grafts.

    Returns:
        ``PRE``, ``SFT``, ``FE``, ``LT``, ``FE+LT``, ``(FE+LT)^C``, ``FE^C``, ``LT^C``.

    Example:
        >>> list(paper_plans())
        ['PRE', 'SFT', 'FE', 'LT', 'FE+LT', '(FE+LT)^C', 'FE^C', 'LT^C']
    """

    def at(positions: Positions) -> GraftPlan:
        return GraftPlan.at(positions, components, layers, head=head, final_norm=final_norm)

    first, end, both = at(entity), at(last), at(entity | last)
    return {
        "PRE": GraftPlan(),
        "SFT": GraftPlan.whole(),
        "FE": first,
        "LT": end,
        "FE+LT": both,
        "(FE+LT)^C": both.complement(),
        "FE^C": first.complement(),
        "LT^C": end.complement(),
    }


def carrier_plans(
    relation: Positions | None = RELATION,
    title: Positions | None = TITLE,
    *,
    entity: Positions = FE,
    last: Positions = LT,
    components: str | Sequence[str] = "PAPER_ALL",
) -> dict[str, GraftPlan]:
    """E3: other tokens that may carry the fact; for prompts that have them.

    Args:
        relation: Tokens of the relation; None leaves its plans out.
        title: Tokens of a title; None leaves its plans out.
        entity: Tokens of the first entity.
        last: The last prompt token.
        components: What is grafted there.

    Returns:
        ``R``, ``FE+R``, ``R+LT``, ``FE+R+LT``; ``M``, ``FE+M``, ``M+LT``, ``FE+M+LT``, ``(FE+M)^C``, ``(FE+M+LT)^C``.

    Example:
        >>> list(carrier_plans(title=None))
        ['R', 'FE+R', 'R+LT', 'FE+R+LT']
    """
    plans = {}
    for name, tokens in (("R", relation), ("M", title)):
        if tokens is None:
            continue
        plans[name] = GraftPlan.at(tokens, components)
        plans[f"FE+{name}"] = GraftPlan.at(entity | tokens, components)
        plans[f"{name}+LT"] = GraftPlan.at(tokens | last, components)
        plans[f"FE+{name}+LT"] = GraftPlan.at(entity | tokens | last, components)
    if title is not None:
        plans |= {f"({name})^C": plans[name].complement() for name in ("FE+M", "FE+M+LT")}
    return plans


def head_plans(plans: Mapping[str, GraftPlan] | None = None) -> dict[str, GraftPlan]:
    """E4: every plan with the recipient's head, with the donor's, and with the donor's where the last token is grafted.

    Args:
        plans: Default: the six grafts of :func:`paper_plans`.

    Returns:
        ``<plan>, head <recipient | donor | follow>``.

    Example:
        >>> list(head_plans({"LT": GraftPlan.at(Last())}))
        ['LT, head recipient', 'LT, head donor', 'LT, head follow']
    """
    if plans is None:
        plans = {name: plan for name, plan in paper_plans().items() if name not in ("PRE", "SFT")}
    found = {}
    for name, plan in plans.items():
        follow = tuple(replace(rule, components=(*rule.components, "unembed")) for rule in plan.rules)
        found[f"{name}, head recipient"] = replace(plan, head="recipient")
        found[f"{name}, head donor"] = replace(plan, head="donor")
        found[f"{name}, head follow"] = replace(plan, rules=follow, head="follow")
    return found


def component_plans(
    last: Positions = LT,
    *,
    layers: Layers = "upper_half",
    sets: Mapping[str, Sequence[str]] = COMPONENT_SETS,
    source: str = "donor",
) -> dict[str, GraftPlan]:
    """E5: sets of components at the last token.

    In the paper the recipient has learned the facts in one order only and the donor in both.

    Args:
        last: Where.
        layers: In which layers.
        sets: Component names by plan name.
        source: Name of the donor.

    Returns:
        One plan a set.

    Example:
        >>> list(component_plans())[:2]
        ['ATTN+O+FFN', 'ATTN+FFN']
    """
    return {name: GraftPlan.at(last, tuple(names), layers, source=source) for name, names in sets.items()}


def hybrid_plans(
    entity: Positions = FE,
    last: Positions = LT,
    *,
    task: str = "task",
    relation: str = "relation",
    construction: Literal["intended", "literal"] = "intended",
) -> dict[str, GraftPlan]:
    """E6: at the last token the task model's attention with the relation model's output projection and feed-forward.

    ``intended`` takes ``O`` and ``FFN`` (the gate too) of the relation model in the upper half. ``literal`` is what the
    released code does: the task model's ``ATTN+O+FFN`` in quarters 3 and 4, in which ``o``, ``up`` and ``down`` of
    layers ``L//2`` and later are the relation model's. So the gate stays the task model's, and where ``L`` is no
    multiple of 4 the first of these layers is the task model's alone.

    Args:
        entity: Tokens of the first entity, which take nothing or parts of the task model in all layers.
        last: The last prompt token.
        task: Name of the donor that knows the task.
        relation: Name of the donor that knows the facts.
        construction: See above.

    Returns:
        ``LT only``, ``FE task ATTN``, ``FE task FFN``, ``FE task O+FFN``, ``FE task FULL``.

    Raises:
        RecipeError: If the construction is unknown.

    Example:
        >>> [rule.source for rule in hybrid_plans()["FE task ATTN"].rules]
        ['task', 'task', 'relation']
    """
    if construction == "intended":
        recall = (
            GraftRule(last, ("ATTN",), "upper_half", task),
            GraftRule(last, ("O", "FFN"), "upper_half", relation, adds=True),
        )
    elif construction == "literal":
        recall = (
            GraftRule(last, ("ATTN", "O", "FFN"), "upper_half", task),
            GraftRule(last, ("o", "up", "down"), "second_half", relation, adds=True),
        )
    else:
        raise RecipeError(f"hybrid_plans(construction={construction!r}) is unknown; expected 'intended' or 'literal'.")
    parts = {"ATTN": ("ATTN",), "FFN": ("FFN",), "O+FFN": ("O", "FFN"), "FULL": ("PAPER_ALL",)}
    plans = {"LT only": GraftPlan(recall)}
    for name, components in parts.items():
        plans[f"FE task {name}"] = GraftPlan((GraftRule(entity, components, source=task), *recall))
    return plans


def layer_plans(
    entity: Positions = FE,
    last: Positions = LT,
    *,
    ranges: Sequence[str] = ("Q1", "Q2", "Q3", "Q4", "lower_half", "upper_half"),
    components: str | Sequence[str] = "BLOCK",
) -> dict[str, GraftPlan]:
    """E7: ranges of layers, at the entity and at the last token apart, alone and beside the whole of the other.

    Args:
        entity: Tokens of the first entity.
        last: The last prompt token.
        ranges: Names of layer ranges.
        components: What is grafted in these layers.

    Returns:
        For each range ``FE[Q1]``, ``LT[Q1]``, ``FE[Q1]+LT``, ``FE+LT[Q1]``.

    Example:
        >>> list(layer_plans(ranges=["Q1"]))
        ['FE[Q1]', 'LT[Q1]', 'FE[Q1]+LT', 'FE+LT[Q1]']
    """
    plans = {}
    for name in ranges:
        first, end = GraftPlan.at(entity, components, name), GraftPlan.at(last, components, name)
        plans[f"FE[{name}]"], plans[f"LT[{name}]"] = first, end
        plans[f"FE[{name}]+LT"] = first | GraftPlan.at(last, components)
        plans[f"FE+LT[{name}]"] = GraftPlan.at(entity, components) | end
    return plans


def dropout_plans(
    positions: Positions = FE | LT,
    *,
    shares: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    seeds: Sequence[int] = (0,),
    mode: Literal["count", "random"] = "count",
    unit: Literal["layer", "module"] = "layer",
    components: str | Sequence[str] = "BLOCK",
) -> dict[str, GraftPlan]:
    """E8: graft ever fewer layers, chosen at random for each position.

    Args:
        positions: Where.
        shares: Shares of the units that are dropped.
        seeds: One plan a share and seed; average over seeds.
        mode: See :class:`~lightning_interp.grafting.dropout.GraftDropout`.
        unit: See there.
        components: What is grafted.

    Returns:
        ``p=<share>`` (``p=<share> #<seed>`` for several seeds).

    Example:
        >>> list(dropout_plans(shares=[0, 0.5], seeds=[0, 1]))
        ['p=0 #0', 'p=0 #1', 'p=0.5 #0', 'p=0.5 #1']
    """
    return {
        f"p={share:g}" + (f" #{seed}" if len(seeds) > 1 else ""): GraftPlan.at(
            positions, components, dropout=GraftDropout(share, mode, unit, seed)
        )
        for share in shares
        for seed in seeds
    }


def static_plans(
    components: Sequence[str] = ("PAPER_ALL", "BLOCK", "ATTN", "O", "FFN"), *, layers: Layers = "all"
) -> dict[str, GraftPlan]:
    """Static weight patching: some weights of the donor at *all* positions, as if they had been copied over.

    Args:
        components: One plan each.
        layers: In which layers.

    Returns:
        ``static <component>``.

    Example:
        >>> list(static_plans(["FFN"]))
        ['static FFN']
    """
    return {f"static {name}": GraftPlan.at(All(), name, layers) for name in components}


def reverse_plans(plans: Mapping[str, GraftPlan]) -> dict[str, GraftPlan]:
    """The other direction: graft the recipient's weights into the donor, on the same evaluator.

    Grafting A into B at some cells is grafting B into A at all others, so each plan becomes its dual. ``PRE`` and
    ``SFT`` keep their meaning.

    Args:
        plans: Plans of one donor.

    Returns:
        The duals under the same names.

    Example:
        >>> reverse_plans(paper_plans())["PRE"] == GraftPlan()
        True
    """
    return {name: plan if name in ("PRE", "SFT") else plan.dual() for name, plan in plans.items()}


EXPERIMENTS: dict[str, Callable[..., dict[str, GraftPlan]]] = {
    "E1": paper_plans,
    "E2": paper_plans,
    "E3": carrier_plans,
    "E4": head_plans,
    "E5": component_plans,
    "E6": hybrid_plans,
    "E7": layer_plans,
    "E8": dropout_plans,
    "E9": paper_plans,
}
"""The function that makes each experiment's plans."""
