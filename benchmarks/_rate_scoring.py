"""Scoring throughput: our scorer, and bulk scoring onto disk, against batched forward passes written by hand.

The peers tokenise the same texts in batches of 8 and call the same sequence classifier of transformers: in the order
of the texts, and sorted by length (the kinder one, which the target is about). A sorted loop that is handed token ids
says what tokenising costs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import alternate, compare
from transformers import LlamaConfig, LlamaForSequenceClassification

from lightning_interp.models import TextScorer
from lightning_interp.rate import RewardScorer, RewriteTriples
from lightning_interp.testing import byte_tokenizer

BATCH = 8
SIZES: dict[str, dict[str, int]] = {
    "5M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "vocab_size": 261},
    "28M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 261},
}


def build(size: str, device: str) -> Any:
    """A random reward model in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = SIZES[size]["hidden_size"] // 64
        config = LlamaConfig(
            **SIZES[size], num_attention_heads=heads, num_key_value_heads=heads, num_labels=1, pad_token_id=0
        )
        return LlamaForSequenceClassification(config).eval().to(device)


def some_texts(count: int) -> list[str]:
    """Different texts of 5 to 200 letters, most of them short."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=generator) * 0.7 + 3.7).exp().clamp(5, 200).int().tolist()
    letters = [torch.randint(97, 123, (length,), generator=generator).tolist() for length in lengths]
    return ["".join(map(chr, word)) for word in letters]


class ByHand:
    """The peer: tokenise, pad, call, keep the logit."""

    def __init__(self, model: Any, texts: Sequence[str], *, by_length: bool, encoded: bool = False) -> None:
        self.model, self.tokenizer = model, byte_tokenizer()
        self.tokenizer.padding_side = "right"
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i])) if by_length else list(range(len(texts)))
        self.order, self.texts = order, [texts[i] for i in order]
        parts = [self.texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        self.batches = [self.encode(part) for part in parts] if encoded else parts

    def encode(self, texts: Any) -> Any:
        """Ids and mask of a batch."""
        return self.tokenizer(texts, return_tensors="pt", padding=True).to(self.model.device)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        found = []
        for part in self.batches:
            batch = self.encode(part) if isinstance(part, list) else part
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            found.append(logits[:, 0].float().cpu())
        scores = torch.empty(len(self.texts))
        scores[self.order] = torch.cat(found)
        return scores


def bulk(scorer: TextScorer, texts: Sequence[str]) -> Callable[[], torch.Tensor]:
    """Our bulk scoring: a Trainer, part files that are forced to disk, a merge, and reading the file."""
    third = len(texts) // 3
    names = [f"u{i}" for i in range(third)]
    parts = [list(texts[i * third : (i + 1) * third]) for i in range(3)]
    triples = RewriteTriples(
        attr="a",
        ids=names,
        w=[i % 2 for i in range(third)],
        prompts=[""] * third,
        original=parts[0],
        rewrite=parts[1],
        rewrite2=parts[2],
        draw=[0] * third,
    )
    accelerator = "gpu" if next(scorer.model.parameters()).device.type == "cuda" else "cpu"

    def run() -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            job = RewardScorer(scorer, triples, Path(folder) / "rewards.jsonl")
            scores = job.run(accelerator=accelerator, devices=1, enable_progress_bar=False)
            scorer.model.to(accelerator.replace("gpu", "cuda"))  # the Trainer hands it back on the CPU
        return torch.cat([scores.reward[stage] for stage in triples.stages]).float()

    return run


def rows(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the benchmark.

    Args:
        chosen: The command line of ``_measure.arguments``.

    Returns:
        Rows of ``_measure.row``.
    """
    found = []
    for size in ("5M",) if chosen.quick else ("5M", "28M"):
        found += of_size(size, chosen)
    return found


def of_size(size: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model size."""
    model, texts = build(size, chosen.device), some_texts(48 if chosen.quick else 192)
    scorer = TextScorer(model, byte_tokenizer(), chat=False, add_eos=False)
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "scorer": lambda: scorer.score([""] * len(texts), texts),
        "bulk scoring onto disk": bulk(scorer, texts),
        "plain batches by length": ByHand(model, texts, by_length=True),
    }
    if not chosen.quick:
        functions["plain batches"] = ByHand(model, texts, by_length=False)
        functions["batches by length, tokenised before"] = ByHand(model, texts, by_length=True, encoded=True)
    expected = functions["plain batches by length"]()
    gaps = {name: float((function() - expected).abs().max()) for name, function in functions.items()}
    times = alternate(functions, device=chosen.device, repeats=5 if size == "5M" else 3)
    target = 1 / 0.95
    result = [
        one(size, chosen, times, len(texts), gaps, "scorer", "plain batches by length", target),
        one(size, chosen, times, len(texts), gaps, "bulk scoring onto disk", "plain batches by length", target),
    ]
    others = list(functions)[3:]
    return result + [one(size, chosen, times, len(texts), gaps, "scorer", peer, None) for peer in others]


def one(
    size: str,
    chosen: argparse.Namespace,
    times: dict[str, list[float]],
    count: int,
    gaps: dict[str, float],
    ours: str,
    peer: str,
    target: float | None,
) -> dict[str, Any]:
    """One row, with texts a second of both sides and the largest difference between their scores."""
    unit = "GPU s" if chosen.device == "cuda" else "CPU s"
    found = compare(f"{size}: {ours}", times, ours, peer, unit=unit, target=target)
    found["detail"] |= {
        "texts": count,
        "texts_per_second": [count / found["ours"], count / found["peer"]],
        "largest_difference": gaps[ours],
    }
    return found
