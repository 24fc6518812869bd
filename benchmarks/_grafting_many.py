"""Many configurations, other donors, and memory: the second half of ``grafting.py``."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from _measure import PeakMemory, alternate, compare, row
from grafting import Grafted, Plain, T, build, with_lora

from lightning_interp import GraftEvaluator, GraftPlan, GraftPrompt, ModelMap, paper_plans
from lightning_interp.core.model.head import whole_head
from lightning_interp.core.weights.sources import make_sources
from lightning_interp.grafting import CheckpointDonor, component_grid
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.prefixes import PrefixTree
from lightning_interp.grafting.runner import Rows, last_logits
from lightning_interp.testing import byte_tokenizer

PROMPTS, CONFIGURATIONS = 64, 200


def many(size: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row that is about more than eight plans of one prompt."""
    rows = memory_rows(size, chosen)
    rows += map_rows(size, chosen)
    rows += prompt_rows(size, chosen)
    return rows + donor_rows(size, chosen)


class Map:
    """A map at the last token: its rows and nothing else, attaching included."""

    def __init__(self, model: Any, donor: Any, plans: list[GraftPlan], ids: torch.Tensor, *, share: bool) -> None:
        self.map, self.donors, self.plans, self.ids, self.share = (
            ModelMap.build(model),
            make_sources(donor),
            plans,
            ids,
            share,
        )
        self.tokens = 0

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        from lightning_interp.core.tokens.step import StepContext

        graft = Graft(self.donors, self.plans)
        compiled = graft.compiled(self.map)
        codes = compiled.all_codes(StepContext(1, T, input_ids=self.ids)).reshape(-1, T)
        ids = self.ids.expand(len(codes), -1)
        rows = Rows(ids, torch.ones_like(ids, dtype=torch.bool), codes)
        inner, full = compiled.classes
        tree = PrefixTree(rows.ids, rows.valid, inner[codes], full[codes], share=self.share)
        self.tokens = tree.tokens
        with graft.attach(self.map), whole_head(self.map):
            return last_logits(self.map, graft, rows, tree, token_budget=4096)[tree.row_of]


def map_plans(layers: int) -> list[GraftPlan]:
    """200 different configurations at the last token: components in windows of 1, 2, ... layers."""
    names = ["q", "k", "v", "o", "gate", "up", "down", "ln_attn", "ln_mlp"]
    found: list[GraftPlan] = []
    for width in range(1, layers + 1):
        found += component_grid(
            layers, components=names if width == 1 else [*names, "ATTN", "FFN"], width=width
        ).plans.values()
    return list(dict.fromkeys(found))[:CONFIGURATIONS]


def map_rows(size: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """The map with shared prefixes against the same rows without."""
    recipient, donor = build(size, chosen.device), build(size, chosen.device, seed=1)
    ids = torch.randint(5, 250, (1, T), generator=torch.Generator().manual_seed(0))
    plans = map_plans(len(recipient.model.layers))
    shared, alone = (Map(recipient, donor, plans, ids, share=share) for share in (True, False))
    gap = float((shared().softmax(-1) - alone().softmax(-1)).abs().max())
    times = alternate({"shared prefixes": shared, "every row": alone}, device=chosen.device, repeats=3)
    detail = {
        "configurations": len(plans),
        "tokens_fed": shared.tokens,
        "tokens_of_every_row": alone.tokens,
        "floor_ratio_by_tokens": shared.tokens / alone.tokens,
        "largest_probability_difference": gap,
    }
    target = 1 / 8 if size == "127M" else None
    name = f"{size}: last-token map"
    return [compare(name, times, "shared prefixes", "every row", unit=_unit(chosen), target=target, detail=detail)]


class Evaluated:
    """The whole evaluator: prompts, plans, metrics and table."""

    def __init__(self, model: Any, donor: Any, prompts: int, *, share: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        letters = [chr(97 + i) for i in range(26)]
        texts = ["".join(letters[i] for i in torch.randint(0, 26, (T,), generator=generator)) for _ in range(prompts)]
        asked = [GraftPrompt(text, "x", {"FE": text[2:5]}) for text in texts]
        self.evaluator = GraftEvaluator(asked, byte_tokenizer(), plans=paper_plans(), share_prefixes=share)
        self.map, self.donors = ModelMap.build(model), make_sources(donor)

    def __call__(self) -> Any:
        self.evaluator.tokens = {"fed": 0, "without sharing": 0}
        return self.evaluator.evaluate(self.map, self.donors)


def prompt_rows(size: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Eight plans of 64 prompts against a plain pass over the same 512 rows."""
    recipient, donor = build(size, chosen.device), build(size, chosen.device, seed=1)
    count = PROMPTS // 4 if chosen.quick else PROMPTS
    ids = torch.randint(5, 250, (count, T), generator=torch.Generator().manual_seed(0)).to(chosen.device)
    plain = [Plain(recipient, part, len(part)) for part in ids.repeat(8, 1).split(256)]
    ours = Evaluated(recipient, donor, count)
    times = alternate(
        {
            "evaluator": ours,
            "without sharing": Evaluated(recipient, donor, count, share=False),
            "plain batches": lambda: [p() for p in plain],
        },
        device=chosen.device,
        repeats=1 if chosen.quick else 3,
    )
    detail = {"prompts": count, "plans": 8, "tokens": dict(ours.evaluator.tokens)}
    name = f"{size}: eight plans of {count} prompts"
    return [
        compare(name, times, "evaluator", "plain batches", unit=_unit(chosen), detail=detail),
        compare(name, times, "evaluator", "without sharing", unit=_unit(chosen), detail=detail),
    ]


def donor_rows(size: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """DoRA and 4-bit donors: the eight standard plans against plain passes of the same rows."""
    ids = torch.randint(5, 250, (1, T), generator=torch.Generator().manual_seed(0)).to(chosen.device)
    plans = list(paper_plans().values())
    models = {"DoRA": with_lora(size, chosen.device, dora=True)}
    if (four := in_four_bits(size, chosen.device)) is not None:
        models["LoRA on 4 bits"] = with_lora(size, chosen.device, base=four)
    rows = []
    for kind, model in models.items():
        times = alternate(
            {f"{kind} donor": Grafted(model, "default", plans, ids), "plain PEFT batch": Plain(model, ids, 8)},
            device=chosen.device,
            repeats=5,
        )
        name = f"{size}: {kind} donor, standard plans"
        rows.append(compare(name, times, f"{kind} donor", "plain PEFT batch", unit=_unit(chosen)))
    if four is None:
        rows.append(row(f"{size}: LoRA on 4 bits, standard plans", 0.0, None, "skipped: bitsandbytes is not installed"))
    return rows


def in_four_bits(size: str, device: str) -> Any:
    """The recipient with NF4 weights, or None without bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        build(size, "cpu").save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, dtype=torch.float32, device_map=device
        ).eval()


def memory_rows(size: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of loading and scoring, in weight sets; each in a process of its own."""
    rows = []
    kinds = {"full-weight donor": 2} if chosen.quick else {"full-weight donor": 2, "LoRA donor": 1, "donor on disk": 1}
    for kind, sets in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            _apart(_store, size, folder if kind == "donor on disk" else None)
            peak, weights = _apart(peak_memory, kind, size, chosen.device, folder)
        detail = {"weight_set_megabytes": weights, "weight_sets": peak / weights}
        name, peer = f"{size}: peak memory, {kind}", f"{sets} weight set{'s' * (sets > 1)}"
        target = 1.3 if size == "127M" else None  # activations, logits and the adapter come on top
        rows.append(row(name, peak, sets * weights, peer, unit="MB", target=target, detail=detail))
    return rows


def peak_memory(kind: str, size: str, device: str, folder: str) -> tuple[float, float]:
    """Megabytes above the imports while a donor is loaded and one prompt is scored, and those of one weight set."""
    torch.set_num_threads(1)
    tokenizer, prompt = byte_tokenizer(), GraftPrompt("Ann Lee stars", "x", {"FE": "Ann Lee"})
    evaluator = GraftEvaluator([prompt], tokenizer)
    for warm in (build("tiny 0.2M", device), build("tiny 0.2M", device, seed=1)):
        evaluator.evaluate(warm, build("tiny 0.2M", device, seed=2))
    with PeakMemory(device) as memory:
        recipient = with_lora(size, device) if kind == "LoRA donor" else build(size, device)
        donor: Any = "default"
        if kind == "full-weight donor":
            donor = build(size, device, seed=1)
        elif kind == "donor on disk":
            donor = CheckpointDonor(folder, device=device)
        evaluator.evaluate(recipient, donor)
    weights = sum(p.numel() * 4 for n, p in recipient.named_parameters() if "lora_" not in n) / 2**20
    return memory.megabytes, weights


def _store(size: str, folder: str | None) -> None:
    if folder is not None:
        build(size, "cpu", seed=1).save_pretrained(folder)


def _apart(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a fresh process."""
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply(function, args)
    finally:
        pool.close()
        pool.join()


def _unit(chosen: argparse.Namespace) -> str:
    return "GPU s" if chosen.device == "cuda" else "CPU s"
