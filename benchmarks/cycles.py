"""What do the parts of a generation cycle cost: writing, finetuning, DPO, and twenty cycles in memory?

Peers, in the same run: ``model.generate`` of transformers on the same prompts, a training loop by hand on the same
batches, DPO that asks its reference in each step, documents that are padded, and all logits of a head at once.
Floors are the products alone at the speed of one large product, and of writing also its weights read once a token.
Words are random, so nothing ends early, and both sides write as many tokens.

    python benchmarks/cycles.py [--quick] [--device cpu|cuda] [--out cycles.json]
"""

from __future__ import annotations

import gc
import logging
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _cycles_training import documents, head_loss, ids_of, preference, repeats, training, unit
from _measure import PeakMemory, alternate, arguments, compare, finish, product_rate, row, seconds
from grafting import SIZES, build
from transformers import GenerationConfig

from lightning_interp.cycles import FitSFT, Generate, GenerationCycle
from lightning_interp.generation import LocalSampler, TextRequest, write_shards
from lightning_interp.models import load_causal_lm
from lightning_interp.testing import byte_tokenizer

BATCH, CYCLES = 8, 20


def plain(model: Any, prompts: Sequence[list[int]], new: int, temperature: float, device: str) -> torch.Tensor:
    """Batches in the order given through ``model.generate``; the new tokens."""
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(max_new_tokens=new, pad_token_id=0, **(how if temperature else {"do_sample": False}))
    found = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in part], device=device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in part], device=device)
        with torch.no_grad():
            written = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        found.append(written[:, width:])
    return torch.cat(found)


def writing_floor(model: Any, prompts: Sequence[list[int]], new: int, device: str) -> dict[str, float]:
    """Per new token: GFLOP and weights' GB, and seconds at the speed of one large product and of one large read."""
    size = sum(weight.numel() for weight in model.parameters()) - model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    size += 0 if model.config.tie_word_embeddings is False else head
    flop = 2 * (sum(map(len, prompts)) * (size - head) + len(prompts) * new * size)
    gigabytes = size * next(model.parameters()).element_size() / 1e9 / BATCH
    matrix = torch.ones(4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    read = seconds(lambda: [torch.mv(matrix, vector) for _ in range(10)], device) / (10 * matrix.nbytes / 1e9)
    gflop = flop / 1e9 / (len(prompts) * new)
    spent = {"floor_seconds_products": gflop / product_rate(device), "floor_seconds_reading": gigabytes * read}
    return {"floor_gflop": gflop, "floor_gb": gigabytes, **spent}


def writing(model: Any, tokenizer: Any, size: str, chosen: Namespace) -> list[dict[str, Any]]:
    """Seconds a token of ``LocalSampler``, and of files of shards on top, against ``model.generate``."""
    found, count, new = [], (2 if chosen.quick else 4) * BATCH, 12 if chosen.quick else 32
    equal, spread = ((24, 24), (8, 64)) if chosen.quick else ((48, 48), (16, 128))
    ways = [
        ("equal", equal, "greedy"),
        ("equal", equal, "sampled"),
        ("1:8", spread, "greedy"),
        ("1:8", spread, "sampled"),
    ]
    for kind, lengths, how in ways[::3] if chosen.quick else ways:
        prompts = ids_of(count, lengths)
        times, hashing = written(model, tokenizer, prompts, new, 0.8 if how == "sampled" else 0.0, chosen)
        told = {"rows": count, "batch": BATCH, "prompt_tokens": lengths, "new_tokens": new}
        told |= {"same": "prompts as ids, tokens written; ours also spells the texts, the peer does not"}
        told |= writing_floor(model, prompts, new, chosen.device)
        name, more = f"{size}: writing, prompts {kind}, {how}", {"unit": unit(chosen, "a token")}
        target = None if chosen.quick or "tiny" in size else 1.0
        found.append(compare(name, times, "sampler", "generate", target=target, detail=told, **more))
        told = {"rows": count, "hashing_weights_a_token": hashing}
        found.append(compare(f"{name}, in shards", times, "shards", "generate", detail=told, **more))
    return found


def written(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], new: int, temperature: float, chosen: Namespace
) -> tuple[dict[str, list[float]], float]:
    """Seconds a token of all three, and of hashing the weights, which shards do once; both sides write as much."""
    sampler = LocalSampler(model, tokenizer, batch_size=BATCH)
    requests = [TextRequest(prompt=ids, max_new_tokens=new, temperature=temperature) for ids in prompts]
    texts: dict[str, Any] = {}

    def ours() -> None:
        texts["ours"] = sampler.generate(requests)

    def peer() -> None:
        texts["theirs"] = plain(model, prompts, new, temperature, chosen.device).tolist()

    def shards() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(sampler, requests, folder, tokenizer=tokenizer)

    size = "135M" if sum(weight.numel() for weight in model.parameters()) > 1e8 else ""
    runs = {"sampler": ours, "generate": peer, "shards": shards}
    spent, tokens = alternate(runs, device=chosen.device, repeats=repeats(size, chosen)), len(prompts) * new
    assert [one.tokens_out for one in texts["ours"]] == [new] * len(texts["theirs"]), "a text ended early"
    if temperature == 0 and len({len(ids) for ids in prompts}) == 1:
        assert [list(one.token_ids) for one in texts["ours"]] == texts["theirs"]
    hashing = seconds(sampler.identity, chosen.device) / tokens
    return {name: [one / tokens for one in several] for name, several in spent.items()}, hashing


def chain_memory(chosen: Namespace) -> list[dict[str, Any]]:
    """Peak memory of the last quarter of twenty tiny cycles, against that of the first quarter."""
    prompts = [f"What of number {i}?" for i in range(12 * (CYCLES - 1))]
    seed = [{"prompt": prompt, "completion": "It is a good number."} for prompt in ("Five?", "Six?") * 4]
    laps, alive, quarter = list[float](), list[float](), CYCLES // 4

    def lap(steps: float) -> None:
        laps.append(start + peak.lap())
        if len(laps) in (quarter + 1, CYCLES):
            alive.append(tensors_alive())

    @contextmanager
    def bar(title: str, total: float) -> Iterator[Any]:
        yield SimpleNamespace(advance=lap if title == "cycles" else lambda steps: None)

    with tempfile.TemporaryDirectory() as folder, PeakMemory(chosen.device) as peak:
        start = peak.base
        GenerationCycle(
            model="tiny:llama", cycles=CYCLES, run_dir=Path(folder) / "chain", first=[FitSFT(data=seed)],
            phases=[Generate(prompts=prompts, n=8, max_new_tokens=8), FitSFT()],
            trainer={"accelerator": "cpu" if chosen.device == "cpu" else "gpu", "devices": 1},
        ).run(bar=bar)  # fmt: skip
    told = {"of_each_cycle": laps, "before_the_chain": start}
    told["growth_a_cycle"] = (laps[-1] - laps[quarter + 2]) / (
        CYCLES - 3 - quarter
    )  # counting tensors takes some itself
    first, last = max(laps[:quarter]), max(laps[-quarter:])
    name, peer = f"tiny chain of {CYCLES} cycles: peak memory of its last quarter", "first quarter"
    found = row(name, last, first, peer, unit="MB of the process", target=1.02, detail=told)
    name, peer = f"tiny chain of {CYCLES} cycles: tensors alive at its end, garbage too", f"after cycle {quarter}"
    return [found, row(name, alive[1], alive[0], peer, unit="MB", target=1.1)]


def tensors_alive() -> float:
    """MB of all tensors that Python knows, those that it has not collected yet among them."""
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    return sum({one.data_ptr(): one.nbytes for one in tensors}.values()) / 2**20


def main() -> None:
    """Measure and print the JSON."""
    chosen = arguments(__doc__.splitlines()[0])
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = [*head_loss(chosen), *chain_memory(chosen)]
    for size in ("tiny 0.2M", "28M") if chosen.quick else ("tiny 0.2M", "28M", "SmolLM2-135M"):
        if size in SIZES:
            model, tokenizer = build(size, chosen.device), byte_tokenizer()
        else:
            loaded = load_causal_lm("smollm2-135m-instruct")
            model, tokenizer = loaded.model.to(chosen.device), loaded.tokenizer
        model.requires_grad_(False)
        model.generation_config.eos_token_id = tokenizer.eos_token = None  # both sides write to the limit
        rows += writing(model, tokenizer, size, chosen) + training(model, size, chosen)
        if "tiny" not in size:
            rows += preference(model, size, chosen) + documents(model, size, chosen)
    finish("cost of the parts of a generation cycle", rows, chosen)


if __name__ == "__main__":
    main()
