"""Dynamic weight grafting as one ordinary forward pass.

The definition (Nief et al. 2025, arXiv 2506.20746): token by token, assemble the model whose module m has the weights
that the plan names for this position, feed the one token with the cache built so far, throw the assembled model away.
Every grafted module treats tokens independently, so one pass in which each module picks its weights row by row gives
the same logits: keys and values come from the weights chosen at their own position, and attention reads whatever they
are.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from lightning_interp.core.hooks.intervention import Attachment, Hook, Intervention
from lightning_interp.core.model.components import Part, mixing_modules
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.weights.adapted_layers import adapted_layers, own_map, takes_empty
from lightning_interp.core.weights.masked_linear import Execution, MaskedMap, RowMask, attach_masked
from lightning_interp.core.weights.sources import AdapterSource, AnySource, CheckpointSource, ModelSource, make_sources
from lightning_interp.errors import PositionError, RecipeError, SiteError, UnsupportedStrategyError
from lightning_interp.grafting.compiled_plan import EVERYWHERE, NOWHERE, Schedule, Signature, without_padding
from lightning_interp.grafting.dose import Doses, check_doses, dosed, dosed_delta
from lightning_interp.grafting.plan import GraftPlan

__all__ = [
    "DECODE",
    "AdapterDonor",
    "CheckpointDonor",
    "Decode",
    "DecodePolicy",
    "Graft",
    "ModelDonor",
    "decode_name",
]

AdapterDonor = AdapterSource
ModelDonor = ModelSource
CheckpointDonor = CheckpointSource

DecodePolicy = Literal["recipient", "donor", "like_last", "outside"]
Decode = DecodePolicy | Callable[[StepContext], DecodePolicy | torch.Tensor]

DECODE = ("recipient", "donor", "like_last", "outside")
"""Named policies for generated tokens."""


class Graft(Intervention):
    """Run the recipient with another model's weights at chosen tokens.

    Args:
        donor: A finetuned model of the same architecture, the name of a LoRA adapter on the recipient, or several of
            these by name (rules say which with ``source``).
        plan: One plan for every row of the batch, or one plan for each row.
        execution: How mixed masks are computed (see :func:`~lightning_interp.core.weights.masked_linear.masked_rows`).
        decode: Weights of generated tokens: the ``recipient``'s; the ``donor``'s; ``like_last`` treats each like the
            last prompt token; ``outside`` like prompt positions that no located selector names; or a function of the
            ``StepContext`` that returns one of these names, or a mask ``[B, T]`` of
            the tokens that are the donor's. Cached keys and values stay. The beams of a beam search have their
            prompt's plan, so reordering them changes nothing.
        doses: Tensors that rules name with ``dose="name"``: a scalar, or one value a layer ``[L]``. Gradients reach
            them.

    Raises:
        RecipeError: If a rule names an unknown source or dose, or ``decode`` is unknown.

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
        donor: AnySource | Mapping[str, AnySource],
        plan: GraftPlan | Sequence[GraftPlan],
        *,
        execution: Execution = "auto",
        decode: Decode = "recipient",
        doses: Doses | None = None,
    ) -> None:
        if not callable(decode) and decode not in DECODE:
            raise RecipeError(f"Graft(decode={decode!r}) is unknown; expected {', '.join(DECODE)} or a function.")
        if execution not in ("auto", "overwrite", "partition", "dense"):
            raise RecipeError(
                f"Graft(execution={execution!r}) is unknown; expected auto, overwrite, partition or dense."
            )
        self.donors = make_sources(donor)
        self.plans = (plan,) if isinstance(plan, GraftPlan) else tuple(plan)
        self.per_row = not isinstance(plan, GraftPlan)
        if not self.plans:
            raise RecipeError("Graft(plan=[]) has no plan; pass one plan, or one for each row of the batch.")
        self.execution: Execution = execution
        self.decode: Decode = decode
        self.doses: Doses = dict(doses or {})
        self.given: torch.Tensor | None = None
        """Codes ``[B, T]`` of the coming pass, from :meth:`schedule`; for callers that know them already."""
        self.reads_weights = any(isinstance(source, ModelSource) for source in self.donors.values())
        for name in dict.fromkeys(source for each in self.plans for source in each.sources):
            if name not in self.donors:
                raise RecipeError(f"A rule takes weights from {name!r}, but the donors are {', '.join(self.donors)}.")
        self._schedule: tuple[ModelMap, Schedule] | None = None

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """None: a graft acts on weights, not on activations at a site."""
        return ()

    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """The identity; see :meth:`install`."""
        return x

    def schedule(self, model_map: ModelMap) -> Schedule:
        """The plans, each once, worked out for a model."""
        if self._schedule is None or self._schedule[0] is not model_map:
            everywhere = callable(self.decode) or self.decode == "donor"
            plans = tuple(dict.fromkeys(self.plans))
            self._schedule = (model_map, Schedule(plans, list(self.donors), model_map, everywhere=everywhere))
        return self._schedule[1]

    def check(self, model_map: ModelMap) -> None:
        """Refuse what cannot be grafted, before anything is hooked.

        Raises:
            IncompatibleModelError: If donor and recipient do not fit.
            SiteError: If a plan names a component that the model lacks, or one that no hook reaches, or a block mixes
                tokens in a module that would have to treat each on its own.
            RecipeError: If a dose does not fit the model.
        """
        for donor in self.donors.values():
            donor.check(model_map)
        _check_rows_apart(model_map)
        rules = list(dict.fromkeys(rule for plan in dict.fromkeys(self.plans) for rule in plan.rules))
        for rule in rules:
            check_doses(rule, rule.cells(model_map), self.doses, len(model_map))
        groups = {name for rule in rules for name in (*rule.components, *(("ALL",) if rule.others else ()))}
        _check_reached(model_map, groups)
        if any(isinstance(donor, AdapterSource) for donor in self.donors.values()):
            inside = {id(part.module) for _, _, part in model_map.cells()}
            lost = [path for path, layer, _ in adapted_layers(model_map) if id(layer) not in inside]
            if lost:
                raise SiteError(f"Adapter layers {', '.join(lost[:4])} lie outside of every known component.")

    def install(self, attachment: Attachment) -> None:
        """Hook every module that some plan can graft (and every adapted layer, which must be off elsewhere)."""
        state = _State(self, attachment)
        by_module: dict[nn.Module, list[tuple[Part, Signature]]] = {}
        layer_of: dict[nn.Module, int | None] = {}
        for name, layer, part in attachment.model_map.cells():
            signature = state.signature(name, layer)
            by_module.setdefault(part.module, []).append((part, signature))
            layer_of[part.module] = layer
        for module, parts in by_module.items():
            masked = state.masked_map(module, parts, layer_of[module])
            if masked is not None:
                attach_masked(attachment, masked)
        attachment.add(attachment.model_map.model.register_forward_pre_hook(Hook(state.check_call), with_kwargs=True))


def decode_name(decode: Decode) -> str:
    """What results say of a decode policy: its name, or the function's."""
    return decode if isinstance(decode, str) else getattr(decode, "__name__", type(decode).__name__)


def _check_rows_apart(model_map: ModelMap) -> None:
    if "mixing" not in model_map.memo:
        model_map.memo["mixing"] = [(i, *f) for i, block in enumerate(model_map.blocks) for f in mixing_modules(block)]
    for i, name, why in model_map.memo["mixing"]:
        raise SiteError(
            f"Block {i} of {type(model_map.model).__name__} has {name!r}, {why}: weights cannot be chosen token by "
            "token in one pass. Graft a decoder whose only mixing of tokens is attention."
        )


def _check_reached(model_map: ModelMap, groups: set[str]) -> None:
    """A group that promises everything may leave no parameter behind."""
    named = next((name for name in ("ALL", "BLOCK", "PAPER_ALL") if name in groups), None)
    lost = model_map.unmapped(inside=named != "ALL") if named else []
    if lost:
        raise SiteError(
            f"{type(model_map.model).__name__} has parameters outside of every known component: "
            f"{', '.join(lost[:4])}. Name components instead of {named!r}."
        )


@dataclass(eq=False)
class _State:
    """What one attachment keeps between its hooks: tables at attach, codes in each pass."""

    graft: Graft
    attachment: Attachment
    last_codes: torch.Tensor | None = None

    def __post_init__(self) -> None:
        graft, model_map = self.graft, self.attachment.model_map
        self.schedule = graft.schedule(model_map)
        self.tables: dict[tuple[Signature, torch.device], torch.Tensor] = {}
        place = {plan: i for i, plan in enumerate(self.schedule.plans)}
        self.row_plan = [place[plan] for plan in graft.plans]
        self.adapters = [donor for donor in graft.donors.values() if isinstance(donor, AdapterSource)]
        self.adapted = [layer for _, layer, _ in adapted_layers(model_map)] if self.adapters else []
        modules = (module for layer in self.adapted for module in layer.modules())
        self.dropouts = [module for module in modules if isinstance(module, nn.Dropout) and module.p > 0]

    def signature(self, component: str, layer: int | None) -> Signature:
        """Source of one cell for every code."""
        return self.schedule.signature(component, layer)

    def masked_map(self, module: nn.Module, parts: list[tuple[Part, Signature]], layer: int | None) -> MaskedMap | None:
        """The masked map of one module, or None where no plan can change it."""
        own, part = own_map(module), parts[0][0]
        adapted = bool(self.adapters) and own is not None
        plain: Callable[..., Any] = own if adapted and own is not None else module.forward
        alternatives: dict[int, Callable[..., Any]] = {}
        deltas: dict[int, Callable[..., Any]] = {}
        for k, source in enumerate(self.schedule.sources, start=1):
            donor = self.graft.donors[source.donor]
            change = donor.alternative(part)
            if change is None:
                continue
            alternatives[k] = dosed(plain, change, source.dose, self.graft.doses, layer)
            if (delta := donor.delta(part)) is not None:
                deltas[k] = dosed_delta(delta, source.dose, self.graft.doses, layer)
        groups = [(p.columns, tuple(k if k in alternatives else 0 for k in signature)) for p, signature in parts]
        if not adapted and not any(any(signature) for _, signature in groups):
            return None
        if len({signature for _, signature in groups}) == 1:
            groups = [(None, groups[0][1])]
        native = 0
        if adapted:
            native = self._native(module)
            alternatives = {0: plain, **{k: function for k, function in alternatives.items() if k != native}}

        def masks() -> list[tuple[torch.Tensor | None, RowMask]]:
            step = self.attachment.step
            return [(columns, self._row_mask(step, signature)) for columns, signature in groups]

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

    def _native(self, module: nn.Module) -> int:
        """The source that an adapted layer computes when it is called; -1 if it may be none of them."""
        if len(self.adapters) > 1 or list(getattr(module, "active_adapters", ())) != [self.adapters[0].name]:
            return -1
        return 1 + next(i for i, d in enumerate(self.graft.donors.values()) if isinstance(d, AdapterSource))

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
            step.cache[key] = RowMask(self._table(signature, step.device)[self._codes(step)])
        found: RowMask = step.cache[key]
        return found

    def _table(self, signature: Signature, device: torch.device) -> torch.Tensor:
        if (signature, device) not in self.tables:
            plain = torch.frombuffer(array("q", signature), dtype=torch.int64)  # ten times faster than torch.tensor
            self.tables[signature, device] = plain.to(device)
        return self.tables[signature, device]

    def _codes(self, step: StepContext) -> torch.Tensor:
        """Which rules own each token, ``[B, T]``, as an index into the signatures."""
        key = (id(self), "codes")
        if key not in step.cache:
            given = self.graft.given
            step.cache[key] = self._make_codes(step) if given is None else given.to(step.device)
        codes: torch.Tensor = step.cache[key]
        return codes

    def _make_codes(self, step: StepContext) -> torch.Tensor:
        rows = self._rows(step)
        if not step.is_prefill:
            return without_padding(self._decoding(step, rows), step.valid)
        codes = self.schedule.codes(step, rows)
        last = step.positions.argmax(dim=1, keepdim=True)
        self.last_codes = codes.gather(1, last)[:, 0]
        return codes

    def _decoding(self, step: StepContext, rows: list[int]) -> torch.Tensor:
        """Codes of generated tokens, as the decode policy says."""
        chosen = self.graft.decode
        policy = chosen(step) if callable(chosen) else chosen
        start = self.schedule.start(rows, step.device)
        if isinstance(policy, torch.Tensor):
            if policy.dtype != torch.bool or tuple(policy.shape) != (step.batch_size, step.length):
                raise PositionError(
                    f"The decode function gave a {policy.dtype} tensor of shape {tuple(policy.shape)}; expected bool "
                    f"[{step.batch_size}, {step.length}], or one of {', '.join(DECODE)}."
                )
            return torch.where(policy.to(step.device), start + EVERYWHERE, start + NOWHERE)
        if policy == "outside":
            return self.schedule.codes(replace(step, rolling=False, cache={}), rows)
        if policy == "like_last" and self.last_codes is not None:
            return self.last_codes[:, None].expand(-1, step.length)
        if policy not in DECODE:
            raise PositionError(f"The decode function gave {policy!r}; expected a mask or one of {', '.join(DECODE)}.")
        return (start + (EVERYWHERE if policy == "donor" else NOWHERE)).expand(-1, step.length)

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
