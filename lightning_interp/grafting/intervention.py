"""Dynamic weight grafting as one ordinary forward pass.

The definition (Nief et al. 2025, arXiv 2506.20746): token by token, assemble the model whose module m has the weights
that the plan names for this position, feed the one token with the cache built so far, throw the assembled model away.
Every grafted module treats tokens independently, so one pass in which each module picks its weights row by row gives
the same logits: keys and values come from the weights chosen at their own position, and attention reads whatever they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch

from lightning_interp.core.hooks.intervention import Attachment, Intervention
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.repeats import rows_each
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.weights.counted_dropout import CountedDropout
from lightning_interp.core.weights.holders import RowSource
from lightning_interp.core.weights.masked_linear import Execution
from lightning_interp.core.weights.row_weights import RowWeights, check_sources, expand_rows, without_padding
from lightning_interp.core.weights.sources import AdapterSource, AnySource, CheckpointSource, ModelSource, make_sources
from lightning_interp.errors import PositionError, RecipeError, SiteError
from lightning_interp.grafting.compiled_plan import (
    EVERYWHERE,
    NOWHERE,
    CompiledPlans,
    Doses,
    check_doses,
    dose_of,
)
from lightning_interp.grafting.plan import GraftPlan

__all__ = ["DECODE", "AdapterDonor", "CheckpointDonor", "Decode", "DecodePolicy", "Graft", "ModelDonor", "decode_name"]

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
            ``StepContext`` that returns one of these names, or a mask ``[B, T]`` of the donor's tokens. Cached keys and
            values stay. The beams of a beam search have their prompt's plan.
        doses: Tensors that rules name with ``dose="name"``: a scalar, or one value a layer ``[L]``. Gradients reach
            them.

    Raises:
        RecipeError: If a rule names an unknown source or dose, or ``decode`` is unknown.

    Example:
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
        self.dropout = CountedDropout()
        """What the dropout of adapters is drawn from while they are in training."""
        self.given: torch.Tensor | None = None
        """Codes ``[B, T]`` of the coming pass, from :meth:`compiled`; for callers that know them already."""
        self.reads_weights = any(isinstance(source, ModelSource) for source in self.donors.values())
        for name in dict.fromkeys(source for each in self.plans for source in each.sources):
            if name not in self.donors:
                raise RecipeError(f"A rule takes weights from {name!r}, but the donors are {', '.join(self.donors)}.")
        self._compiled: tuple[ModelMap, CompiledPlans] | None = None

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """None: a graft acts on weights, not on activations at a site."""
        return ()

    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """The identity; see :meth:`install`."""
        return x

    def compiled(self, model_map: ModelMap) -> CompiledPlans:
        """The plans, each once, worked out for a model."""
        if self._compiled is None or self._compiled[0] is not model_map:
            everywhere = callable(self.decode) or self.decode == "donor"
            plans = tuple(dict.fromkeys(self.plans))
            self._compiled = (model_map, CompiledPlans(plans, list(self.donors), model_map, everywhere=everywhere))
        return self._compiled[1]

    def check(self, model_map: ModelMap) -> None:
        """Refuse what cannot be grafted, before anything is hooked.

        Raises:
            IncompatibleModelError: If donor and recipient do not fit.
            SiteError: If a plan names a component that the model lacks, or one that no hook reaches, or a block mixes
                tokens in a module that would have to treat each on its own.
            RecipeError: If a dose does not fit the model.
        """
        check_sources(model_map, list(self.donors.values()))
        rules = list(dict.fromkeys(rule for plan in dict.fromkeys(self.plans) for rule in plan.rules))
        for rule in rules:
            check_doses(rule, rule.cells(model_map), self.doses, len(model_map))
        _check_reached(model_map, {n for rule in rules for n in (*rule.components, *(("ALL",) if rule.others else ()))})

    def install(self, attachment: Attachment) -> None:
        """Hook every module that some plan can graft (and every adapted layer, which must be off elsewhere)."""
        compiled = self.compiled(attachment.model_map)
        sources = [
            RowSource(self.donors[each.donor], dose_of(each.dose, self.doses), each.donor) for each in compiled.sources
        ]
        RowWeights(
            sources,
            _Codes(self, compiled),
            signature=compiled.signature,
            execution=self.execution,
            dropout=self.dropout,
            name=f"Graft({', '.join(map(repr, self.donors))})",
        ).install(attachment)


def decode_name(decode: Decode) -> str:
    """What results say of a decode policy: its name, or the function's."""
    return decode if isinstance(decode, str) else getattr(decode, "__name__", type(decode).__name__)


def _check_reached(model_map: ModelMap, groups: set[str]) -> None:
    """A group that promises everything may leave no parameter behind."""
    named = next((name for name in ("ALL", "BLOCK", "PAPER_ALL") if name in groups), None)
    lost = model_map.unmapped(inside=named != "ALL") if named else []
    if lost:
        raise SiteError(
            f"{type(model_map.model).__name__} has parameters outside of every known component: "
            f"{', '.join(lost[:4])}. Name components instead of {named!r}."
        )


class _Codes:
    """Which rules own each token of a pass, ``[B, T]``, as an index into the signatures."""

    def __init__(self, graft: Graft, compiled: CompiledPlans) -> None:
        self.graft, self.compiled = graft, compiled
        place = {plan: i for i, plan in enumerate(compiled.plans)}
        self.row_plan = [place[plan] for plan in graft.plans]

    def __call__(self, step: StepContext) -> torch.Tensor:
        if self.graft.given is not None:
            return self.graft.given.to(step.device)
        rows, phase = self._rows(step), step.phase
        if phase == "new":
            return without_padding(self._decoding(step, rows), step)
        codes = self.compiled.codes(step, rows)
        self._remember(step, codes)
        if phase == "prompt":
            return codes
        new = step.valid & (step.positions >= step.prompt_lengths[:, None])
        return without_padding(torch.where(new, self._decoding(step, rows), codes), step)

    def _remember(self, step: StepContext, codes: torch.Tensor) -> None:
        """Codes of the prompt's last tokens ``[B]``, where this pass holds them."""
        told = step.generation
        if told is not None and step.past + step.length < told.columns + step.virtual:
            return
        last = step.valid & (step.positions == step.prompt_lengths[:, None] - 1)
        found = codes.gather(1, last.long().argmax(dim=1, keepdim=True))[:, 0]
        known = step.carried.get(self) if step.known_prompt_lengths is not None else None
        step.carried[self] = found if known is None else torch.where(last.any(dim=1), found, known)

    def _decoding(self, step: StepContext, rows: list[int]) -> torch.Tensor:
        """Codes of generated tokens, as the decode policy says."""
        chosen = self.graft.decode
        policy = chosen(step) if callable(chosen) else chosen
        start = torch.tensor([self.compiled.offsets[p] for p in rows], device=step.device)[:, None]
        if isinstance(policy, torch.Tensor):
            if policy.dtype != torch.bool or tuple(policy.shape) != (step.batch_size, step.length):
                raise PositionError(
                    f"The decode function gave a {policy.dtype} tensor of shape {tuple(policy.shape)}; expected bool "
                    f"[{step.batch_size}, {step.length}], or one of {', '.join(DECODE)}."
                )
            return torch.where(policy.to(step.device), start + EVERYWHERE, start + NOWHERE)
        if policy == "outside":
            return self.compiled.codes(replace(step, rolling=False, cache={}), rows)
        if policy == "like_last":
            last = step.carried.get(self)
            if last is None:
                raise PositionError(
                    f"Graft(decode='like_last') has not seen the prompt's last token of these {step.batch_size} rows, "
                    f"{step.past} columns of which are cached. Attach before the prompt is read."
                )
            return expand_rows(last, step, "The codes of the prompt's last tokens")
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
        beams = rows_each(step, len(self.row_plan), "Plans of Graft")
        return [p for p in self.row_plan for _ in range(beams)]
