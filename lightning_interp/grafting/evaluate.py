"""Score many graft plans on many prompts: all plans of a prompt are rows of one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from lightning_interp.core.masked_linear import Execution
from lightning_interp.core.model_map import ModelMap
from lightning_interp.core.positions import FromBatch, Positions
from lightning_interp.errors import PositionError, RecipeError
from lightning_interp.grafting.donors import AnyDonor, ModelDonor, make_donors
from lightning_interp.grafting.experiments import paper_plans
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.locate import encode_prompt, first_target_token, locate_entity
from lightning_interp.grafting.metrics import METRICS, score_logits
from lightning_interp.grafting.plan import GraftPlan
from lightning_interp.grafting.result import GraftResult

__all__ = ["GraftEvaluator", "GraftPrompt", "GraftResult"]


@dataclass(frozen=True)
class GraftPrompt:
    """One question to a grafted model.

    Args:
        text: The prompt.
        target: What should follow it; its first token is scored.
        spans: Named pieces of the prompt that plans may select with ``FromBatch(name)``, such as ``{"FE": "Ann Lee"}``.
        unit: Unit of sampling for intervals (the fact); prompts of one unit are averaged first.
        form: Which prompt form this is; results are also given by form.
    """

    text: str
    target: str
    spans: Mapping[str, str] = field(default_factory=dict)
    unit: str = ""
    form: str = ""


@dataclass(frozen=True)
class _Encoded:
    index: int
    ids: list[int]
    target: int
    masks: dict[str, list[int]]


class GraftEvaluator:
    """Compare graft plans on a set of prompts.

    Args:
        prompts: What to ask.
        tokenizer: The tokenizer of both models (fast, for character offsets).
        plans: Name to plan; default :func:`~lightning_interp.grafting.plan.paper_plans`. ``PRE`` (the recipient) and
            ``SFT`` (the donor) are added if they are missing: KL, recovery and the logit difference refer to them.
        top_k: For the accuracy beside top-1.
        token_budget: Most tokens (rows x columns) of one forward pass.
        missing: ``raise`` when a prompt lacks a span that a plan names, or the span does not occur in it; or ``drop``
            the prompt and count it.
        execution: See :func:`~lightning_interp.core.masked_linear.masked_rows`.

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
        plans: Mapping[str, GraftPlan] | None = None,
        top_k: int = 5,
        token_budget: int = 4096,
        missing: str = "raise",
        execution: Execution = "auto",
    ) -> None:
        if missing not in ("raise", "drop"):
            raise RecipeError(f"GraftEvaluator(missing={missing!r}) is unknown; expected 'raise' or 'drop'.")
        if top_k < 1 or token_budget < 1:
            raise RecipeError(f"GraftEvaluator(top_k={top_k}, token_budget={token_budget}): both must be at least 1.")
        chosen = dict(paper_plans() if plans is None else plans)
        self.plans = {"PRE": GraftPlan(), "SFT": GraftPlan.whole(), **chosen}
        self.prompts = list(prompts)
        self.tokenizer = tokenizer
        self.top_k = top_k
        self.token_budget = token_budget
        self.execution: Execution = execution
        self.dropped: list[tuple[int, str]] = []
        self._encoded = list(self._encode(missing))
        if not self._encoded:
            reasons = "; ".join(reason for _, reason in self.dropped[:2]) or "no prompts were given"
            raise RecipeError(
                f"Nothing to evaluate: {len(self.prompts)} prompts, {len(self.dropped)} dropped ({reasons})."
            )

    def __len__(self) -> int:
        return len(self._encoded)

    def _encode(self, missing: str) -> Iterator[_Encoded]:
        asked = dict.fromkeys(
            name for plan in self.plans.values() for rule in plan.rules for name in _spans_of(rule.positions)
        )
        for index, prompt in enumerate(self.prompts):
            try:
                if lacking := [name for name in asked if name not in prompt.spans]:
                    raise PositionError(
                        f"The prompt {prompt.text!r} has no span {lacking[0]!r}, which a plan selects; it has: "
                        f"{', '.join(prompt.spans) or 'none'}. Pass GraftPrompt(spans={{{lacking[0]!r}: ...}})."
                    )
                masks = {name: locate_entity(self.tokenizer, prompt.text, part) for name, part in prompt.spans.items()}
            except PositionError as error:
                if missing == "raise":
                    raise
                self.dropped.append((index, str(error)))
                continue
            ids, _ = encode_prompt(self.tokenizer, prompt.text)
            if not ids:
                raise PositionError(f"Prompt {index} ({prompt.text!r}) has no tokens; expected some text.")
            yield _Encoded(index, ids, first_target_token(self.tokenizer, prompt.text, prompt.target), masks)

    def evaluate(
        self,
        model: nn.Module | ModelMap,
        donor: AnyDonor | Mapping[str, AnyDonor],
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
        result = GraftResult(list(self.plans), self.top_k, dropped=[(i, r) for i, r in self.dropped])
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
        donor: AnyDonor | Mapping[str, AnyDonor],
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
        donors = make_donors(donor)
        mine = sorted(self._encoded[rank::world_size], key=lambda prompt: len(prompt.ids))
        models = [each.map.model for each in donors.values() if isinstance(each, ModelDonor)]
        with _evaluating(model_map.model, *models):
            for chunk in self._chunks(mine):
                logits = self._forward(model_map, donors, chunk)
                target = torch.tensor([prompt.target for prompt in chunk], device=logits.device)
                names = list(self.plans)
                pre, sft = logits[:, names.index("PRE")], logits[:, names.index("SFT")]
                columns = [score_logits(logits[:, p], target, pre, sft, top_k=self.top_k) for p in range(len(names))]
                top = {prompt.index: logits[i].argmax(dim=-1).tolist() for i, prompt in enumerate(chunk)}
                yield torch.tensor([prompt.index for prompt in chunk]), torch.stack(columns, dim=1).cpu(), top

    def _chunks(self, prompts: list[_Encoded]) -> Iterator[list[_Encoded]]:
        chunk: list[_Encoded] = []
        for prompt in prompts:
            if chunk and (len(chunk) + 1) * len(self.plans) * len(prompt.ids) > self.token_budget:
                yield chunk
                chunk = []
            chunk.append(prompt)
        if chunk:
            yield chunk

    def _forward(self, model_map: ModelMap, donor: Any, chunk: list[_Encoded]) -> torch.Tensor:
        """Logits at the last prompt token, ``[prompts, plans, V]``."""
        batch = self._batch(chunk, model_map)
        plans = [plan for _ in chunk for plan in self.plans.values()]
        graft = Graft(donor, plans, execution=self.execution)
        with _whole_head(model_map), graft.attach(model_map, tokenizer=self.tokenizer) as attachment, torch.no_grad():
            attachment.batch = batch["masks"]
            output = model_map.model(**batch["inputs"])
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits.view(len(chunk), len(self.plans), -1)

    def _batch(self, chunk: list[_Encoded], model_map: ModelMap) -> dict[str, dict[str, Any]]:
        """Left-padded rows, each prompt once a plan."""
        width, device = max(len(prompt.ids) for prompt in chunk), next(model_map.model.parameters()).device
        ids = torch.zeros(len(chunk), width, dtype=torch.long)
        valid = torch.zeros(len(chunk), width, dtype=torch.long)
        names = dict.fromkeys(name for prompt in chunk for name in prompt.masks)
        masks = {name: torch.zeros(len(chunk), width, dtype=torch.bool) for name in names}
        for row, prompt in enumerate(chunk):
            start = width - len(prompt.ids)
            ids[row, start:] = torch.tensor(prompt.ids)
            valid[row, start:] = 1
            for name, tokens in prompt.masks.items():
                masks[name][row, torch.tensor(tokens) + start] = True
        accepted = inspect.signature(model_map.model.forward).parameters
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": valid}
        if "position_ids" in accepted:
            inputs["position_ids"] = (valid.cumsum(dim=1) - 1).clamp(min=0)
        repeat = len(self.plans)
        inputs = {name: value.repeat_interleave(repeat, dim=0).to(device) for name, value in inputs.items()}
        inputs["use_cache"] = False
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        return {"inputs": inputs, "masks": {n: m.repeat_interleave(repeat, dim=0).to(device) for n, m in masks.items()}}

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


def _spans_of(positions: Any) -> Iterator[str]:
    """Keys of every ``FromBatch`` inside a selector."""
    if isinstance(positions, FromBatch):
        yield positions.key
    for part in fields(positions) if is_dataclass(positions) else ():
        value = getattr(positions, part.name)
        yield from _spans_of(value) if isinstance(value, Positions) else ()


@contextmanager
def _whole_head(model_map: ModelMap) -> Iterator[None]:
    """Hand the head its last column as one block: torch multiplies a strided slice by a frozen head row by row."""
    if model_map.head is None:
        yield
        return
    handle = model_map.head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


class _evaluating:  # noqa: N801  a context manager
    """Evaluation mode for every submodule, each put back as it was."""

    def __init__(self, *models: nn.Module) -> None:
        self.modes = {module: module.training for model in models for module in model.modules()}
        self.models = models

    def __enter__(self) -> None:
        for model in self.models:
            model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self.modes.items():
            module.training = training
