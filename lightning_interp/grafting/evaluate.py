"""Score many graft plans on many prompts: rows of few forward passes, with shared prefixes computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_interp.core.measure.undisturbed import evaluating
from lightning_interp.core.model.head import whole_head
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.tokens.batches import packed
from lightning_interp.core.weights.masked_linear import Execution
from lightning_interp.core.weights.sources import AnySource, ModelSource, WeightSource, make_sources
from lightning_interp.errors import PositionError, RecipeError
from lightning_interp.grafting.experiments import paper_plans
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.metrics import METRICS, score_logits
from lightning_interp.grafting.patching import PatchPlan, patched_logits
from lightning_interp.grafting.plan import GraftPlan
from lightning_interp.grafting.prefixes import PrefixTree
from lightning_interp.grafting.prompts import EncodedPrompt, GraftPrompt, PromptBatch, encode, spans_of
from lightning_interp.grafting.result import GraftResult
from lightning_interp.grafting.runner import Rows, check_whole, last_logits

__all__ = ["AnyPlan", "GraftEvaluator", "GraftPrompt", "GraftResult"]

AnyPlan = GraftPlan | PatchPlan


class GraftEvaluator:
    """Compare graft plans on a set of prompts.

    Args:
        prompts: What to ask.
        tokenizer: The tokenizer of both models (fast, for character offsets).
        plans: Name to plan; default :func:`~lightning_interp.grafting.experiments.paper_plans`. ``PRE`` (the
            recipient) and ``SFT`` (the donor) are added if they are missing: KL, recovery and the logit difference
            refer to them. A :class:`~lightning_interp.grafting.patching.PatchPlan` patches activations instead.
        top_k: For the accuracy beside top-1.
        token_budget: Most tokens (rows x columns, cached ones counted) of one forward pass.
        missing: ``raise`` when a prompt lacks a span that a plan names, or the span does not occur in it; or ``drop``
            the prompt and count it.
        execution: See :func:`~lightning_interp.core.weights.masked_linear.masked_rows`.
        share_prefixes: Compute tokens that several plans treat alike once; exact, up to floating-point order.

    Attributes:
        dropped: Number and reason of every prompt that was dropped.
        tokens: Tokens fed to the model so far, and what they would have been without sharing.

    Raises:
        PositionError: If a span is not found (unless ``missing="drop"``), or a prompt or target is empty.
        RecipeError: If no prompt is left, or an argument is unknown.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_pair
        >>> recipient, donor = tiny_pair("gpt2")
        >>> prompts = [GraftPrompt("Ann Lee met", "Bo", {"FE": "Ann Lee"}, unit="1")]
        >>> result = GraftEvaluator(prompts, byte_tokenizer()).evaluate(recipient, donor)
        >>> sorted(result.plans)[:2], len(result.rows)
        (['(FE+LT)^C', 'FE'], 8)
    """

    def __init__(
        self,
        prompts: Sequence[GraftPrompt],
        tokenizer: Any,
        *,
        plans: Mapping[str, AnyPlan] | None = None,
        top_k: int = 5,
        token_budget: int = 4096,
        missing: str = "raise",
        execution: Execution = "auto",
        share_prefixes: bool = True,
    ) -> None:
        if missing not in ("raise", "drop"):
            raise RecipeError(f"GraftEvaluator(missing={missing!r}) is unknown; expected 'raise' or 'drop'.")
        if top_k < 1 or token_budget < 1:
            raise RecipeError(f"GraftEvaluator(top_k={top_k}, token_budget={token_budget}): both must be at least 1.")
        chosen = dict(paper_plans() if plans is None else plans)
        sources = [source for plan in chosen.values() if isinstance(plan, GraftPlan) for source in plan.sources]
        self.plans: dict[str, AnyPlan] = {"PRE": GraftPlan(), "SFT": GraftPlan.whole((*sources, "donor")[0]), **chosen}
        _check_ends(self.plans)
        self.prompts = list(prompts)
        self.tokenizer = tokenizer
        self.top_k = top_k
        self.token_budget = token_budget
        self.execution: Execution = execution
        self.share_prefixes = share_prefixes
        self.tokens = {"fed": 0, "without sharing": 0}
        self.dropped: list[tuple[int, str]] = []
        self.encoded = list(self._encode(missing))
        if not self.encoded:
            reasons = "; ".join(reason for _, reason in self.dropped[:2]) or "no prompts were given"
            raise RecipeError(
                f"Nothing to evaluate: {len(self.prompts)} prompts, {len(self.dropped)} dropped ({reasons})."
            )

    def __len__(self) -> int:
        return len(self.encoded)

    def _encode(self, missing: str) -> Iterator[EncodedPrompt]:
        asked = list(dict.fromkeys(name for plan in self.plans.values() for name in _spans(plan)))
        for index, prompt in enumerate(self.prompts):
            try:
                encoded = encode(prompt, index, self.tokenizer, asked)
            except PositionError as error:
                if missing == "raise":
                    raise
                self.dropped.append((index, str(error)))
                continue
            if not encoded.ids:
                raise PositionError(f"Prompt {index} ({prompt.text!r}) has no tokens; expected some text.")
            yield encoded

    def located(self) -> list[dict[str, Any]]:
        """Which tokens every span is, one row a prompt and span."""
        return [
            {
                "prompt": prompt.index,
                "span": name,
                "text": self.prompts[prompt.index].spans[name],
                "columns": columns,
                "tokens": [self.tokenizer.decode([prompt.ids[column]]) for column in columns],
            }
            for prompt in self.encoded
            for name, columns in prompt.spans.items()
        ]

    def evaluate(
        self,
        model: nn.Module | ModelMap,
        donor: AnySource | Mapping[str, AnySource],
        *,
        advance: Callable[[int], object] | None = None,
    ) -> GraftResult:
        """Run every plan on every prompt.

        Args:
            model: The recipient.
            donor: See :class:`~lightning_interp.grafting.intervention.Graft`.
            advance: Called with the number of prompts that were just finished (for a progress bar).

        Returns:
            One row for each prompt and plan.
        """
        result = GraftResult(list(self.plans), self.top_k, dropped=list(self.dropped), located=self.located())
        for index, scores, top in self.scores(model, donor):
            for i, each in zip(index.tolist(), scores, strict=True):
                self._add(result, self.prompts[i], i, each, top[i])
            if advance is not None:
                advance(len(index))
        result.rows.sort(key=lambda row: row["prompt"])
        return result

    def scores(
        self,
        model: nn.Module | ModelMap,
        donor: AnySource | Mapping[str, AnySource],
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[int, list[int]]]]:
        """Scores chunk by chunk, for one process's share of the prompts.

        Args:
            model: The recipient.
            donor: The donor.
            rank: Of this process.
            world_size: Number of processes.

        Yields:
            Prompt indices ``[n]``, scores ``[n, plans, 8]`` (columns as in ``METRICS``), favourite token of each plan.
        """
        model_map = model if isinstance(model, ModelMap) else ModelMap.build(model)
        donors = make_sources(donor)
        mine = self.encoded[rank::world_size]
        models = [each.map.model for each in donors.values() if isinstance(each, ModelSource)]
        names = list(self.plans)
        grafts = [plan for plan in self.plans.values() if isinstance(plan, GraftPlan)]
        graft = Graft(donors, grafts, execution=self.execution)
        check_whole(model_map, donors, torch.tensor(self.encoded[0].ids))
        with evaluating(model_map.model, *models), whole_head(model_map):
            for numbers in packed([len(prompt.ids) * len(names) for prompt in mine], self.token_budget):
                chunk = [mine[number] for number in numbers]
                batch = PromptBatch.of(chunk)
                found = self._grafted(model_map, graft, batch) | self._patched(model_map, donors, batch)
                logits = [found[name] for name in names]
                pre, sft = logits[names.index("PRE")], logits[names.index("SFT")]
                target = batch.target.to(pre.device)
                stacked = torch.stack(logits)
                scores = score_logits(stacked, target, pre, sft, top_k=self.top_k).transpose(0, 1)
                top = stacked.argmax(dim=-1).T.tolist()
                index = [prompt.index for prompt in chunk]
                yield torch.tensor(index), scores.cpu(), dict(zip(index, top, strict=True))

    def _grafted(self, model_map: ModelMap, graft: Graft, batch: PromptBatch) -> dict[str, torch.Tensor]:
        """Logits at the last prompt token of every graft, ``[n, V]`` each."""
        compiled = graft.compiled(model_map)
        codes = compiled.all_codes(batch.step(self.tokenizer))
        count = len(compiled.plans)
        rows = Rows(batch.ids.repeat(count, 1), batch.valid.repeat(count, 1), codes.reshape(-1, codes.shape[-1]))
        inner, full = compiled.classes
        tree = PrefixTree(rows.ids, rows.valid, inner[rows.codes], full[rows.codes], share=self.share_prefixes)
        with graft.attach(model_map, tokenizer=self.tokenizer):
            logits = last_logits(model_map, graft, rows, tree, token_budget=self.token_budget)
        of_row = tree.row_of.to(logits.device).view(count, -1)
        self._count(tree.tokens, len(graft.plans) * batch.ids.numel())
        return {
            name: logits[of_row[compiled.plans.index(plan)]]
            for name, plan in self.plans.items()
            if isinstance(plan, GraftPlan)
        }

    def _patched(
        self, model_map: ModelMap, donors: dict[str, WeightSource], batch: PromptBatch
    ) -> dict[str, torch.Tensor]:
        """The same for activation patches: the donor runs once, then the recipient once a plan."""
        found: dict[str, torch.Tensor] = {}
        plans = {name: plan for name, plan in self.plans.items() if isinstance(plan, PatchPlan)}
        step = batch.step(self.tokenizer)
        for source in dict.fromkeys(plan.source for plan in plans.values()):
            mine = {name: plan for name, plan in plans.items() if plan.source == source}
            found |= patched_logits(model_map, donors, source, mine, batch.ids, step)
            self._count((1 + len(mine)) * batch.ids.numel(), (1 + len(mine)) * batch.ids.numel())
        return found

    def _count(self, fed: int, unshared: int) -> None:
        self.tokens["fed"] += fed
        self.tokens["without sharing"] += unshared

    def _add(self, result: GraftResult, prompt: GraftPrompt, index: int, scores: torch.Tensor, top: list[int]) -> None:
        for p, (name, plan) in enumerate(self.plans.items()):
            values = dict(zip(METRICS, scores[p].tolist(), strict=True))
            result.rows.append(
                {
                    "prompt": index,
                    "unit": prompt.unit or str(index),
                    "form": prompt.form,
                    "plan": name,
                    "head": plan.head,
                    "final_norm": plan.final_norm,
                    "text": prompt.text,
                    "target": prompt.target,
                    "predicted": self.tokenizer.decode([top[p]]),
                    **values,
                }
            )


def _check_ends(plans: Mapping[str, AnyPlan]) -> None:
    """Refuse other plans under the names of the two models, which all plans are compared with."""
    sources = getattr(plans["SFT"], "sources", ())  # a patch has none
    ends = {"PRE": (GraftPlan(),), "SFT": tuple(GraftPlan.whole(name) for name in sources)}
    for name, known in ends.items():
        if plans[name] not in known:
            model = {"PRE": "recipient", "SFT": "donor"}[name]
            raise RecipeError(
                f"plans={{{name!r}: ...}} is another plan than the {model} itself, which {name!r} stands for. Give "
                "your plan another name."
            )


def _spans(plan: AnyPlan) -> Iterator[str]:
    selectors = [plan.positions] if isinstance(plan, PatchPlan) else [rule.positions for rule in plan.rules]
    for positions in selectors:
        yield from spans_of(positions)
