"""Graft plans: which weights at which tokens, as data.

A plan is an ordered list of rules. For each position the *last* rule whose positions match decides alone: its
components in its layers come from its source, everything else from the recipient (Nief et al. 2025, arXiv 2506.20746,
position grafts).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lightning_interp.core.model.components import BLOCK_COMPONENTS, GLOBAL_COMPONENTS
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Layers, resolve_layers
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.core.tokens.positions import All, Positions
from lightning_interp.core.weights.cells import Cell, cells_of
from lightning_interp.errors import InterpError, RecipeError, SiteError
from lightning_interp.grafting.dropout import GraftDropout

__all__ = ["GROUPS", "GraftPlan", "GraftRule", "Policy"]

Policy = Literal["recipient", "donor", "follow"]

GROUPS: dict[str, tuple[str, ...]] = {
    "ATTN": ("q", "k", "v", "qkv"),
    "O": ("o",),
    "FFN": ("gate", "up", "gate_up", "down", "moe"),
    "FFN_UP": ("gate", "up", "gate_up"),
    "FFN_DOWN": ("down",),
    "NORMS": ("ln_attn", "ln_mlp"),
    "BLOCK": BLOCK_COMPONENTS,
    "PAPER_ALL": ("embed", *BLOCK_COMPONENTS),
    "ALL": ("embed", "pos_embed", *BLOCK_COMPONENTS, "final_norm", "unembed"),
}
"""Named groups of components. ``PAPER_ALL`` is the most that "all weights" can mean in the authors' code."""

_POLICIES = ("recipient", "donor", "follow")
_BY_POLICY = ("final_norm", "unembed")


@dataclass(frozen=True)
class GraftRule:
    """At these positions, these components of these layers come from this source.

    Args:
        positions: Which tokens.
        components: Canonical names and groups (see ``GROUPS``).
        layers: ``all``, ``none``, an index, a range ``4-7``, a share ``0.5-1.0``, ``Q1`` to ``Q4``, ``lower_half``,
            ``upper_half``, ``second_half``, or a list of these. A group grafts what lies outside of the blocks
            (``embed``) only with all layers; naming it always does.
        source: Name of the donor.
        others: Graft everything *except* the named components in the named layers.
        dose: How far towards the source, 0 (recipient) to 1 (source): linear maps and norms are linear in their
            parameters, so a dose is the same as interpolated weights. A name means a tensor that is given to ``Graft``
            as ``doses={name: tensor}``, so that gradients reach it.
        dropout: Leave out a random share of the layers at each position.
        adds: Add this rule's cells to what earlier rules take at the same position, instead of replacing them: one
            token may then take its attention from one donor and its feed-forward maps from another.
    """

    positions: Positions
    components: tuple[str, ...] = ("PAPER_ALL",)
    layers: Layers = "all"
    source: str = "donor"
    others: bool = False
    dose: float | str = 1.0
    dropout: GraftDropout | None = None
    adds: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.dose, str) and not 0 <= self.dose <= 1:  # NaN too
            raise RecipeError(f"GraftRule(dose={self.dose}) is outside of [0, 1]: 0 is the recipient, 1 the source.")
        names = _names(self.components)
        known = (*GROUPS, *BLOCK_COMPONENTS, *GLOBAL_COMPONENTS)
        for name in names:
            if name not in known:
                raise SiteError(f"Unknown component {name!r}. Expected a name or group of: {', '.join(known)}.")
        object.__setattr__(self, "components", names)
        if not isinstance(self.layers, str | int):
            object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def is_empty(self) -> bool:
        """True for a rule that says "use the recipient here"."""
        return self.layers == "none" and not self.others

    def cells(self, model_map: ModelMap) -> set[Cell]:
        """The (component, layer) pairs that this rule takes from its source.

        Args:
            model_map: The recipient.

        Returns:
            Pairs; the layer is None for ``embed``, ``pos_embed``, ``final_norm`` and ``unembed``.

        Raises:
            SiteError: If this model has none of a named component.
        """
        layers = resolve_layers(self.layers, len(model_map))
        chosen: set[Cell] = set()
        for name in self.components if layers else ():
            shared = name not in GROUPS or len(layers) == len(model_map)
            chosen |= cells_of(model_map, name, GROUPS.get(name, (name,)), layers, shared=shared)
        if not self.others:
            return chosen
        return {(name, layer) for name, layer, _ in model_map.cells()} - chosen

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is as by default is left out of the last keys."""
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        data: dict[str, Any] = {
            "positions": self.positions.to_dict(),
            "components": list(self.components),
            "layers": layers,
            "source": self.source,
            "others": self.others,
        }
        if self.dose != 1:
            data["dose"] = self.dose
        if self.dropout is not None:
            data["dropout"] = asdict(self.dropout)
        if self.adds:
            data["adds"] = True
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraftRule:
        """Read what :meth:`to_dict` wrote.

        Raises:
            RecipeError: If a key is unknown or missing.
        """
        known = {"positions", "components", "layers", "source", "others", "dose", "dropout", "adds"}
        if set(data) - known or "positions" not in data:
            wrong = ", ".join(sorted(set(data) - known)) or "no 'positions'"
            raise RecipeError(f"Cannot read a graft rule: {wrong}. Expected keys: {', '.join(sorted(known))}.")
        rest = {key: value for key, value in data.items() if key != "positions"}
        if rest.get("dropout") is not None:
            rest["dropout"] = GraftDropout.from_dict(rest["dropout"])
        return cls(Positions.from_dict(data["positions"]), **rest)


@dataclass(frozen=True)
class GraftPlan:
    """An ordered list of rules and what happens to the head and the final norm.

    Args:
        rules: Later rules win, position by position.
        head: Which unembedding makes the logits: the recipient's, the donor's at every position, or whatever the rules
            say at that position (``follow``).
        final_norm: The same switch for the norm before it.

    Example:
        >>> from lightning_interp import FromBatch
        >>> plan = GraftPlan.at(FromBatch("FE"), components="BLOCK")
        >>> GraftPlan.from_json(plan.complement().to_json()) == plan.complement()
        True
    """

    rules: tuple[GraftRule, ...] = ()
    head: Policy = "recipient"
    final_norm: Policy = "recipient"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        for switch in ("head", "final_norm"):
            if getattr(self, switch) not in _POLICIES:
                raise RecipeError(
                    f"GraftPlan({switch}={getattr(self, switch)!r}) is unknown; expected {', '.join(_POLICIES)}."
                )
        for rule in self.rules:
            self._check_policy(rule)

    def _check_policy(self, rule: GraftRule) -> None:
        for component, switch in (("unembed", "head"), ("final_norm", "final_norm")):
            named = component in rule.components or "ALL" in rule.components
            if named and not rule.others and getattr(self, switch) != "follow":
                raise RecipeError(
                    f"A rule names {component!r} (components={list(rule.components)}), but {switch}="
                    f"{getattr(self, switch)!r} decides over it. Pass GraftPlan(..., {switch}='follow')."
                )

    @classmethod
    def at(
        cls,
        positions: Positions,
        components: str | Sequence[str] = "PAPER_ALL",
        layers: Layers = "all",
        *,
        source: str = "donor",
        head: Policy = "recipient",
        final_norm: Policy = "recipient",
        others: bool = False,
        dose: float | str = 1.0,
        dropout: GraftDropout | None = None,
    ) -> GraftPlan:
        """A plan with one rule (see :class:`GraftRule` and :class:`GraftPlan` for the arguments)."""
        rule = GraftRule(positions, _names(components), layers, source, others, dose, dropout)
        return cls((rule,), head, final_norm)

    @classmethod
    def whole(cls, source: str = "donor") -> GraftPlan:
        """The donor itself: every parameter at every position."""
        return cls.at(All(), "ALL", source=source, head="follow", final_norm="follow")

    def __or__(self, other: GraftPlan) -> GraftPlan:
        """This plan's rules, then the other's (which win); the other's switches."""
        return replace(other, rules=self.rules + other.rules)

    def complement(self) -> GraftPlan:
        """The same components at all *other* positions.

        Raises:
            RecipeError: If the rules differ in components, layers or source, so that "the same" is not one thing.
        """
        grafts = [rule for rule in self.rules if not rule.is_empty]
        kinds = {replace(rule, positions=All()) for rule in grafts}
        if len(kinds) != 1:
            raise RecipeError(
                f"complement() needs rules that graft the same cells, but this plan has {len(kinds)} kinds. Write the "
                "complement as rules of your own."
            )
        covered: Positions | None = None
        for rule in self.rules:
            if rule.is_empty:
                covered = covered & ~rule.positions if covered is not None else None
            else:
                covered = rule.positions if covered is None else covered | rule.positions
        return replace(self, rules=(replace(grafts[0], positions=~covered),) if covered is not None else self.rules)

    def cell_complement(self) -> GraftPlan:
        """The same positions, everything but the named components in the named layers.

        Raises:
            RecipeError: If a rule has a dose, dropout, or adds to others, so that it is no set of cells.
        """
        for rule in self.rules:
            if rule.dose != 1 or rule.dropout is not None or rule.adds:
                raise RecipeError(
                    f"cell_complement() and dual() turn sets of cells round, but a rule has dose={rule.dose!r}, "
                    f"dropout={rule.dropout!r}, adds={rule.adds}. Write the result as rules of your own."
                )
        only = self.sources[0] if len(self.sources) == 1 else None
        turned = [
            replace(rule, others=not rule.others, source=(rule.is_empty and only) or rule.source) for rule in self.rules
        ]
        return replace(self, rules=tuple(turned))

    def dual(self) -> GraftPlan:
        """The plan with the roles swapped: grafting B into A equals grafting A into B by the dual.

        Raises:
            RecipeError: If the plan has several donors, so that there is no one model to swap with.
        """
        if len(self.sources) > 1:
            raise RecipeError(f"dual() swaps two models, but this plan has the donors {', '.join(self.sources)}.")
        swap: dict[Policy, Policy] = {"recipient": "donor", "donor": "recipient", "follow": "follow"}
        rest = GraftRule(All(), ("PAPER_ALL",), "none", (*self.sources, "donor")[0], others=True)
        rules = (rest, *self.cell_complement().rules)
        return GraftPlan(rules, swap[self.head], swap[self.final_norm])

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the donors, in order of appearance (a rule with ``layers="none"`` takes nothing from any)."""
        return tuple(dict.fromkeys(rule.source for rule in self.rules if not rule.is_empty))

    def to_json(self) -> str:
        """Canonical JSON."""
        data = {"rules": [r.to_dict() for r in self.rules], "head": self.head, "final_norm": self.final_norm}
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> GraftPlan:
        """Read what :meth:`to_json` wrote.

        Raises:
            RecipeError: If the text is no plan.
        """
        try:
            data = parse_json(text)
            rules = tuple(GraftRule.from_dict(rule) for rule in data.pop("rules"))
            return cls(rules, **data)
        except InterpError:
            raise
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise RecipeError(f"Cannot read a graft plan from {text[:80]!r}: {error}.") from error

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON, for caches."""
        import hashlib

        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _names(components: str | Sequence[str]) -> tuple[str, ...]:
    return (components,) if isinstance(components, str) else tuple(components)
