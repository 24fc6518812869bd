"""Dynamic weight grafting as one ordinary forward pass.

The definition (Nief et al. 2025, arXiv 2506.20746): token by token, assemble the model whose module m has the weights
that
the plan names for this position, feed the one token with the cache built so far, throw the assembled model away. Every
grafted module treats tokens independently, so one pass in which each module picks its weights row by row gives the same
logits: keys and values come from the weights chosen at their own position, and attention reads whatever they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from lightning_interp.core.components import Part
from lightning_interp.core.intervention import Attachment, Hook, Intervention
from lightning_interp.core.masked_linear import Execution, MaskedMap, RowMask, attach_masked
from lightning_interp.core.model_map import ModelMap
from lightning_interp.core.positions import Positions
from lightning_interp.core.sites import Site
from lightning_interp.core.step import StepContext
from lightning_interp.errors import PositionError, RecipeError, SiteError, UnsupportedStrategyError
from lightning_interp.grafting.donors import (
    AdapterDonor,
    AnyDonor,
    ModelDonor,
    adapted_layers,
    make_donors,
    own_map,
    takes_empty,
)
from lightning_interp.grafting.plan import GraftPlan

__all__ = ["Decode", "Graft"]

Decode = Literal["recipient", "donor", "like_last", "outside"]
Signature = tuple[int, ...]

_NOWHERE, _EVERYWHERE = 0, 1
"""Codes, at the start of each plan's block, of positions that no rule owns and of generated tokens that are all
donor's."""


class Graft(Intervention):
    """Run the recipient with another model's weights at chosen tokens.

    Args:
        donor: A finetuned model of the same architecture, the name of a LoRA adapter on the recipient, or several of
            these by name (rules say which with ``source``).
        plan: One plan for every row of the batch, or one plan for each row.
        execution: How mixed masks are computed (see :func:`~lightning_interp.core.masked_linear.masked_rows`).
        decode: Weights of generated tokens: the ``recipient``'s; the ``donor``'s; ``like_last`` treats each like the
            last
            prompt token; ``outside`` like prompt positions that no located selector names. Cached keys and values stay.

    Raises:
        RecipeError: If a rule names an unknown source or ``decode`` is unknown.

    Example:
        >>> from lightning_interp import GraftPlan, Span
        >>> from lightning_interp.testing import tiny_pair
        >>> recipient, donor = tiny_pair("llama")
        >>> ids = torch.arange(6)[None]
        >>> with Graft(donor, GraftPlan.whole()).attach(recipient):
        ...     grafted = recipient(ids).logits
        >>> torch.equal(grafted, donor(ids).logits)
        True
    """

    def __init__(
        self,
        donor: AnyDonor | Mapping[str, AnyDonor],
        plan: GraftPlan | Sequence[GraftPlan],
        *,
        execution: Execution = "auto",
        decode: Decode = "recipient",
    ) -> None:
        if decode not in ("recipient", "donor", "like_last", "outside"):
            raise RecipeError(f"Graft(decode={decode!r}) is unknown; expected recipient, donor, like_last or outside.")
        if execution not in ("auto", "overwrite", "partition", "dense"):
            raise RecipeError(
                f"Graft(execution={execution!r}) is unknown; expected auto, overwrite, partition or dense."
            )
        self.donors = make_donors(donor)
        self.plans = (plan,) if isinstance(plan, GraftPlan) else tuple(plan)
        self.per_row = not isinstance(plan, GraftPlan)
        if not self.plans:
            raise RecipeError("Graft(plan=[]) has no plan; pass one plan, or one for each row of the batch.")
        self.execution: Execution = execution
        self.decode: Decode = decode
        self.reads_weights = any(isinstance(source, ModelDonor) for source in self.donors.values())
        for name in dict.fromkeys(source for each in self.plans for source in each.sources):
            if name not in self.donors:
                raise RecipeError(f"A rule takes weights from {name!r}, but the donors are {', '.join(self.donors)}.")

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """None: a graft acts on weights, not on activations at a site."""
        return ()

    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """The identity; see :meth:`install`."""
        return x

    def check(self, model_map: ModelMap) -> None:
        """Refuse what cannot be grafted, before anything is hooked.

        Raises:
            IncompatibleModelError: If donor and recipient do not fit.
            SiteError: If a plan names a component that the model lacks, or one that no hook reaches.
        """
        for donor in self.donors.values():
            donor.check(model_map)
        rules = list(dict.fromkeys(rule for plan in dict.fromkeys(self.plans) for rule in plan.rules))
        for rule in rules:
            rule.cells(model_map)
        everything = any("ALL" in rule.components or rule.others for rule in rules)
        if everything and (lost := model_map.unmapped()):
            raise SiteError(
                f"{type(model_map.model).__name__} has parameters outside of every known component: "
                f"{', '.join(lost[:4])}. "
                "Name components instead of 'ALL'."
            )
        if any(isinstance(donor, AdapterDonor) for donor in self.donors.values()):
            inside = {id(part.module) for _, _, part in model_map.cells()}
            lost = [path for path, layer, _ in adapted_layers(model_map) if id(layer) not in inside]
            if lost:
                raise SiteError(f"Adapter layers {', '.join(lost[:4])} lie outside of every known component.")

    def install(self, attachment: Attachment) -> None:
        """Hook every module that some plan can graft (and every adapted layer, which must be off elsewhere)."""
        state = _State(self, attachment)
        by_module: dict[nn.Module, list[tuple[Part, Signature]]] = {}
        for name, layer, part in attachment.model_map.cells():
            signature = state.signature(name, layer)
            by_module.setdefault(part.module, []).append((part, signature))
        for module, parts in by_module.items():
            masked = state.masked_map(module, parts)
            if masked is not None:
                attach_masked(attachment, masked)
        attachment.add(attachment.model_map.model.register_forward_pre_hook(Hook(state.check_call), with_kwargs=True))


@dataclass(eq=False)
class _State:
    """What one attachment keeps between its hooks: tables at attach, codes in each pass."""

    graft: Graft
    attachment: Attachment
    last_codes: torch.Tensor | None = None

    def __post_init__(self) -> None:
        graft, model_map = self.graft, self.attachment.model_map
        self.plans = tuple(dict.fromkeys(graft.plans))
        place = {plan: i for i, plan in enumerate(self.plans)}
        self.row_plan = [place[plan] for plan in graft.plans]
        sizes = [2 + len(plan.rules) for plan in self.plans]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.index = {name: i + 1 for i, name in enumerate(graft.donors)}
        self.first = [self.index[plan.sources[0]] if plan.sources else 1 for plan in self.plans]
        self.rule_sources = [
            [(self.index.get(r.source, 0), r.cells(model_map)) for r in plan.rules] for plan in self.plans
        ]
        adapter = any(isinstance(donor, AdapterDonor) for donor in graft.donors.values())
        self.adapted = [layer for _, layer, _ in adapted_layers(model_map)] if adapter else []
        modules = (module for layer in self.adapted for module in layer.modules())
        self.dropouts = [module for module in modules if isinstance(module, nn.Dropout) and module.p > 0]

    def signature(self, component: str, layer: int | None) -> Signature:
        """Source of one cell for every code: nowhere, everywhere, then each rule, plan after plan."""
        values: list[int] = []
        for plan, first, sources in zip(self.plans, self.first, self.rule_sources, strict=True):
            switch = {"unembed": plan.head, "final_norm": plan.final_norm}.get(component, "follow")
            if switch == "follow":
                values += [
                    0,
                    first if self.graft.decode == "donor" else 0,
                    *(k if (component, layer) in cells else 0 for k, cells in sources),
                ]
            else:
                values += [first if switch == "donor" else 0] * (2 + len(plan.rules))
        return tuple(values)

    def masked_map(self, module: nn.Module, parts: list[tuple[Part, Signature]]) -> MaskedMap | None:
        """The masked map of one module, or None where no plan can change it."""
        own, part = own_map(module), parts[0][0]
        named = {self.index[name]: donor for name, donor in self.graft.donors.items()}
        adapter = next((k for k, donor in named.items() if isinstance(donor, AdapterDonor)), None)
        adapted = adapter is not None and own is not None
        maps = {k: donor.alternative(part) for k, donor in named.items()}
        same = {k for k, function in maps.items() if function is None}
        groups = [(p.columns, tuple(0 if k in same else k for k in signature)) for p, signature in parts]
        if not adapted and not any(any(signature) for _, signature in groups):
            return None
        if len({signature for _, signature in groups}) == 1:
            groups = [(None, groups[0][1])]
        alternatives = {k: function for k, function in maps.items() if function is not None}
        native = 0
        if adapted and adapter is not None and own is not None:
            native = adapter
            alternatives = {0: own, **{k: function for k, function in alternatives.items() if k != adapter}}

        def masks() -> list[tuple[torch.Tensor | None, RowMask]]:
            step = self.attachment.step
            return [(columns, self._row_mask(step, signature)) for columns, signature in groups]

        deltas = {k: delta for k, donor in named.items() if (delta := donor.delta(part)) is not None}
        return MaskedMap(
            module,
            native,
            alternatives,
            masks,
            self.graft.execution,
            part.per_call,
            takes_empty=takes_empty(module),
            deltas=deltas,
        )

    def check_call(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse calls whose head rows cannot be told, and adapter dropout that is on."""
        if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            raise PositionError(
                "Graft cannot follow logits_to_keep as a tensor of indices. Pass a number of last columns."
            )
        for hook in self.adapted[0]._forward_pre_hooks.values() if self.adapted else ():
            if "adapter_names" in (names := getattr(hook, "keywords", {})):  # how PEFT hands them to its layers
                raise UnsupportedStrategyError(
                    f"The rows have adapters of their own (adapter_names={names['adapter_names']}), which Graft would "
                    "overrule. Give each row its own plan instead."
                )
        if any(module.training for module in self.dropouts):
            raise UnsupportedStrategyError(
                "Dropout is on, so a graft would change the random stream. Call model.eval() first."
            )

    def _row_mask(self, step: StepContext, signature: Signature) -> RowMask:
        key = (id(self), signature)
        if key not in step.cache:
            table = torch.tensor(signature, device=step.device)
            step.cache[key] = RowMask(table[self._codes(step)])
        found: RowMask = step.cache[key]
        return found

    def _codes(self, step: StepContext) -> torch.Tensor:
        """Which rule owns each token, ``[B, T]``, as an index into the signatures."""
        key = (id(self), "codes")
        if key not in step.cache:
            step.cache[key] = self._make_codes(step)
        codes: torch.Tensor = step.cache[key]
        return codes

    def _make_codes(self, step: StepContext) -> torch.Tensor:
        rows = self._rows(step)
        start = torch.tensor([self.offsets[p] for p in rows], device=step.device)[:, None]
        if step.is_prefill or self.graft.decode == "outside":
            codes = start + self._owners(replace(step, rolling=step.is_prefill, cache={}), rows)
        elif self.graft.decode == "like_last" and self.last_codes is not None:
            codes = self.last_codes[:, None].expand(-1, step.length)
        else:
            policy = _EVERYWHERE if self.graft.decode == "donor" else _NOWHERE
            codes = (start + policy).expand(-1, step.length)
        if step.is_prefill:
            last = step.positions.argmax(dim=1, keepdim=True)
            self.last_codes = codes.gather(1, last)[:, 0]
        # Padding reaches no real token; giving it a source of its row keeps uniform masks uniform.
        first = step.valid.long().argmax(dim=1, keepdim=True)
        return torch.where(step.valid, codes, codes.gather(1, first))

    def _owners(self, step: StepContext, rows: list[int]) -> torch.Tensor:
        """The last matching rule of each token's plan (0 for none, else 2 + its place)."""
        owners = torch.zeros(step.batch_size, step.length, dtype=torch.long, device=step.device)
        asked: dict[Positions, list[int]] = {}
        for p in set(rows):
            for positions in dict.fromkeys(rule.positions for rule in self.plans[p].rules):
                asked.setdefault(positions, []).extend(row for row, q in enumerate(rows) if q == p)
        masks = {positions: _mask_of(positions, step, sorted(mine)) for positions, mine in asked.items()}
        for p in set(rows):
            mine = torch.tensor([r == p for r in rows], device=step.device)[:, None]
            for i, rule in enumerate(self.plans[p].rules):
                owners = torch.where(mine & masks[rule.positions], i + 2, owners)
        return owners

    def _rows(self, step: StepContext) -> list[int]:
        if not self.graft.per_row:
            return [0] * step.batch_size
        if step.batch_size % len(self.row_plan):
            raise PositionError(
                f"Graft has plans for {len(self.row_plan)} rows, but the batch has {step.batch_size}. Pass one plan a "
                "row."
            )
        beams = step.batch_size // len(self.row_plan)
        return [p for p in self.row_plan for _ in range(beams)]


def _mask_of(positions: Positions, step: StepContext, rows: list[int]) -> torch.Tensor:
    """A selector asks only the rows whose plan names it: elsewhere its text or span need not exist."""
    if len(rows) == step.batch_size:
        return positions.mask(step)
    mask = torch.zeros(step.batch_size, step.length, dtype=torch.bool, device=step.device)
    mask[rows] = positions.mask(step.rows(rows))
    return mask
