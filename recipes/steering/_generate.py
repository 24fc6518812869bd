"""Steered generations and what they are worth: the concept in them, their fluency, their repetition."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import SuppressTokensLogitsProcessor

from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.figures import COLOURS, GREY, bars, in_house_style, label, panels
from lightning_interp.generation import Completion, LocalSampler, TextRequest
from lightning_interp.generation.sampler import end_tokens, request_ids
from lightning_interp.generation.text_quality import distinct_n, repeated_share
from lightning_interp.steering import CounterfactualPairs, DualSteering, perplexity

PROMPTS = (
    "The weather this week", "My favourite meal is", "In the old house", "The train to the city",
    "A teacher once told me", "On the way home", "The new phone", "When the music started,", "The report says that",
    "After the game,", "The garden behind the school", "Many people think that",
)  # fmt: skip

MEASURES = ("pair_share", "perplexity", "distinct_2", "repeated_4")
"""Target tokens among tokens of pairs, perplexity of the unsteered model, different 2-grams, repeated 4-grams."""


def measured_generation(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    pairs: CounterfactualPairs,
    steering: DualSteering | None,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Callable[[int], object] = lambda n: None,
) -> list[dict[str, Any]]:
    """Write after each prompt, and measure what was written with the model that is not steered.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: One text each.
        pairs: The concept.
        steering: What acts while writing; None for nothing.
        new_tokens: Tokens of each text.
        temperature: 0 writes greedily.
        seed: Root seed of sampling; each prompt has random numbers of its own.
        advance: Called with the number of prompts just done.

    Returns:
        One row a prompt: ``prompt``, ``text`` and the ``MEASURES`` (``pair_share`` is 0.5 where no token is of a pair).
    """
    ends = SuppressTokensLogitsProcessor(sorted(end_tokens(model, tokenizer)), device=model.device)
    sampler = LocalSampler(model, tokenizer, name="no end", logits_processors=[ends])
    rows = []
    for number, prompt in enumerate(prompts):
        request = TextRequest(
            prompt=prompt, max_new_tokens=new_tokens, temperature=temperature, seed=seed, key=("generate", number)
        )
        with nullcontext() if steering is None else steering.attach(model, tokenizer=tokenizer):
            (written,) = sampler.generate([request])
        rows.append({"prompt": prompt, "text": written.text, **_measured(model, tokenizer, request, written, pairs)})
        advance(1)
    return rows


def _measured(
    model: Any, tokenizer: Any, request: TextRequest, written: Completion, pairs: CounterfactualPairs
) -> dict[str, Any]:
    before, new = request_ids(tokenizer, request), torch.tensor(written.token_ids)
    ids = torch.tensor([[*before, *written.token_ids]], device=model.device)
    mask = torch.arange(ids.shape[1], device=model.device)[None] >= len(before)
    with torch.no_grad():
        logits = model(ids).logits
    base, target = (int(torch.isin(new, side).sum()) for side in (pairs.base_ids, pairs.target_ids))
    return {
        "pair_share": target / (base + target) if base + target else 0.5,
        "perplexity": float(perplexity(logits, ids, mask)[0]),
        "distinct_2": distinct_n([new.tolist()], 2),
        "repeated_4": repeated_share(new.tolist(), 4),
    }


@in_house_style
def generation_figure(estimates: Mapping[str, Mapping[str, Estimate]], *, title: str = "") -> Any:
    """One panel a measure, one bar a method, with intervals over prompts.

    Args:
        estimates: By method and measure.
        title: Above the panels.

    Returns:
        A matplotlib figure.
    """
    known = [name for found in estimates.values() for name, estimate in found.items() if not math.isnan(estimate.value)]
    names = list(dict.fromkeys(known))  # a short text has no four-token pieces to repeat
    size = (2.7 * len(names) + 0.3, 3.4)
    figure, axes = panels(len(names), size=size, title=f"{title}\nmeans and 95 % intervals over prompts")
    for axis, name in zip(axes, names, strict=True):
        bars(axis, list(estimates), [found[name] for found in estimates.values()], [GREY, *COLOURS][: len(estimates)])
        label(axis, title=name.replace("_", " "))
        axis.tick_params(axis="x", labelrotation=20)
    return figure
