"""Let grafted models go on writing: full answers under an explicit policy for generated tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_interp.core.measure.statistics import Estimate, proportion_interval
from lightning_interp.core.measure.undisturbed import evaluating
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.weights.sources import AnySource, ModelSource, make_sources
from lightning_interp.errors import RecipeError
from lightning_interp.generation.requests import TextRequest
from lightning_interp.generation.sampler import LocalSampler
from lightning_interp.grafting.intervention import Decode, DecodePolicy, Graft, decode_name
from lightning_interp.grafting.plan import GraftPlan
from lightning_interp.grafting.prompts import PromptBatch

if TYPE_CHECKING:
    from lightning_interp.grafting.evaluate import GraftEvaluator

__all__ = ["complete", "exact_match"]

_ENDS: dict[str, DecodePolicy] = {"PRE": "recipient", "SFT": "donor"}


@torch.no_grad()
def complete(
    evaluator: GraftEvaluator,
    model: nn.Module | ModelMap,
    donor: AnySource | Mapping[str, AnySource],
    *,
    max_new_tokens: int = 12,
    decode: Decode = "recipient",
    num_beams: int = 1,
    advance: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """Continue every prompt under every plan, greedily or by beams; ``exact`` where the whole target comes first.

    ``PRE`` and ``SFT`` are the two models themselves, whose tokens are their own under every ``decode`` policy.
    """
    if max_new_tokens < 1 or num_beams < 1:
        raise RecipeError(f"complete(max_new_tokens={max_new_tokens}, num_beams={num_beams}): both must be at least 1.")
    model_map = model if isinstance(model, ModelMap) else ModelMap.build(model)
    donors = make_sources(donor)
    plans = {name: plan for name, plan in evaluator.plans.items() if isinstance(plan, GraftPlan)}
    models = [each.map.model for each in donors.values() if isinstance(each, ModelSource)]
    rows: list[dict[str, Any]] = []
    device = next(model_map.model.parameters()).device
    with evaluating(model_map.model, *models):
        for prompt in evaluator.encoded:
            request = TextRequest(prompt=prompt.ids, max_new_tokens=max_new_tokens, temperature=0.0)
            graft = Graft(donors, list(plans.values()), decode=_anchored(decode, list(plans)))
            with graft.attach(model_map, tokenizer=evaluator.tokenizer) as attachment:  # all plans in one batch
                masks = PromptBatch.of([prompt]).masks
                attachment.batch = {n: m.repeat(len(plans) * num_beams, 1).to(device) for n, m in masks.items()}
                written = LocalSampler(model_map.model, evaluator.tokenizer, beams=num_beams).write(
                    [request] * len(plans)
                )
            asked = evaluator.prompts[prompt.index]
            for name, one in zip(plans, written, strict=True):
                text = one.text or ""
                rows.append(
                    {
                        "prompt": prompt.index,
                        "unit": asked.unit or str(prompt.index),
                        "form": asked.form,
                        "plan": name,
                        "decode": _ENDS.get(name) or decode_name(decode),
                        "num_beams": num_beams,
                        "target": asked.target,
                        "completion": text,
                        "exact": float(text.strip().startswith(asked.target.strip())),
                    }
                )
            if advance is not None:
                advance(1)
    return rows


def _anchored(decode: Decode, plans: Sequence[str]) -> Decode:
    """A policy for rows of these plans, under which the two models go on as they are."""

    def policy(step: StepContext) -> DecodePolicy | torch.Tensor:
        chosen = decode(step) if callable(decode) else decode
        if isinstance(chosen, str) and chosen not in _ENDS.values():
            return chosen  # as at the prompt, where all tokens of either are one model's already
        if isinstance(chosen, str):
            chosen = torch.full((step.batch_size, step.length), chosen == "donor", device=step.device)
        rows = chosen.clone().view(len(plans), -1, *chosen.shape[1:])
        for name, model in _ENDS.items():
            rows[plans.index(name)] = model == "donor"
        return rows.view_as(chosen)

    return policy


def exact_match(rows: Sequence[Mapping[str, Any]], *, level: float = 0.95) -> dict[str, Estimate]:
    """Share of facts whose whole answer was written, with Wilson's interval over units."""
    units: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        units.setdefault(row["plan"], {}).setdefault(row["unit"], []).append(row["exact"])
    return {
        plan: proportion_interval([sum(values) / len(values) for values in found.values()], level=level)
        for plan, found in units.items()
    }
