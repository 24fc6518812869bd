"""What do the parts of a generation cycle cost: writing, finetuning, DPO, and twenty cycles in memory?

Peers, in the same run: ``model.generate`` of transformers on the same prompts, a training loop by hand on the same
batches, DPO that asks its reference in each step, documents that are padded, and all logits of a head at once.
Floors are the products alone at the speed of one large product, and of writing also its weights read once a token.
Words are random, so nothing ends early, and both sides write as many tokens.

    python benchmarks/cycles.py [--quick] [--device cpu|cuda] [--out cycles.json]
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _cycles_training import documents, head_loss, ids_of, preference, training, unit
from _measure import PeakMemory, alternate, arguments, compare, finish, product_rate, row, seconds
from grafting import SIZES, build
from transformers import GenerationConfig

from lightning_interp.cycles import FitSFT, Generate, GenerationCycle
from lightning_interp.generation import LocalSampler, TextRequest, write_shards
from lightning_interp.models import load_causal_lm
from lightning_interp.testing import byte_tokenizer

BATCH, NEW = 8, 32
CYCLES = 20


def plain(model: Any, prompts: Sequence[list[int]], temperature: float, device: str) -> torch.Tensor:
    """Batches in the order given through ``model.generate``; the new tokens."""
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(max_new_tokens=NEW, pad_token_id=0, **(how if temperature else {"do_sample": False}))
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


def writing_floor(model: Any, prompts: Sequence[list[int]], device: str) -> dict[str, float]:
    """Per new token: GFLOP and weights' GB, and seconds at the speed of one large product and of one large read."""
    size = sum(weight.numel() for weight in model.parameters()) - model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    size += 0 if model.config.tie_word_embeddings is False else head
    flop = 2 * (sum(map(len, prompts)) * (size - head) + len(prompts) * NEW * size)
    gigabytes = size * next(model.parameters()).element_size() / 1e9 / BATCH
    matrix = torch.ones(4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    read = seconds(lambda: [torch.mv(matrix, vector) for _ in range(10)], device) / (10 * matrix.nbytes / 1e9)
    gflop = flop / 1e9 / (len(prompts) * NEW)
    spent = {"floor_seconds_products": gflop / product_rate(device), "floor_seconds_reading": gigabytes * read}
    return {"floor_gflop": gflop, "floor_gb": gigabytes, **spent}


def writing(model: Any, tokenizer: Any, size: str, chosen: Namespace) -> list[dict[str, Any]]:
    """Seconds a token of ``LocalSampler``, and of files of shards on top, against ``model.generate``."""
    found, count = [], (2 if chosen.quick else 8) * BATCH
    unit_, target = unit(chosen, "a token"), None if "tiny" in size else 1.0
    for kind, lengths in {"equal": (48, 48), "1:8": (16, 128)}.items():
        prompts = ids_of(count, lengths)
        told = {"rows": count, "batch": BATCH, "prompt_tokens": lengths, "new_tokens": NEW}
        told |= {"same": "prompts as ids, tokens written; ours also spells the texts, the peer does not"}
        told |= writing_floor(model, prompts, chosen.device)
        for how, temperature in {"greedy": 0.0, "sampled": 0.8}.items():
            times, hashing = written(model, tokenizer, prompts, temperature, chosen)
            name = f"{size}: writing, prompts {kind}, {how}"
            found.append(compare(name, times, "sampler", "generate", unit=unit_, target=target, detail=told))
            told_shards = {"rows": count, "hashing_weights_a_token": hashing}
            found.append(compare(f"{name}, in shards", times, "shards", "generate", unit=unit_, detail=told_shards))
    return found


def written(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], temperature: float, chosen: Namespace
) -> tuple[dict[str, list[float]], float]:
    """Seconds a token of all three, and of hashing the weights, which shards do once; both sides write as much."""
    sampler = LocalSampler(model, tokenizer, batch_size=BATCH)
    requests = [TextRequest(prompt=ids, max_new_tokens=NEW, temperature=temperature) for ids in prompts]

    def shards() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(sampler, requests, folder, tokenizer=tokenizer)

    runs: dict[str, Callable[[], object]] = {
        "sampler": lambda: sampler.generate(requests),
        "generate": lambda: plain(model, prompts, temperature, chosen.device),
        "shards": shards,
    }
    ours, theirs = sampler.generate(requests), plain(model, prompts, temperature, chosen.device)
    assert [one.tokens_out for one in ours] == [NEW] * len(theirs), "a text ended early"
    if temperature == 0 and len({len(ids) for ids in prompts}) == 1:
        assert [list(one.token_ids) for one in ours] == theirs.tolist()
    repeats = 3 if chosen.quick else 7
    spent, tokens = alternate(runs, device=chosen.device, repeats=repeats), len(prompts) * NEW
    hashing = seconds(sampler.identity, chosen.device) / tokens
    return {name: [one / tokens for one in several] for name, several in spent.items()}, hashing


def chain_memory(chosen: Namespace) -> dict[str, Any]:
    """Peak memory of the last quarter of twenty tiny cycles, against that of the first quarter."""
    prompts = [f"What of number {i}?" for i in range(24 * (CYCLES - 1))]
    seed = [{"prompt": prompt, "completion": "It is a good number."} for prompt in ("Five?", "Six?") * 8]
    laps = list[float]()

    @contextmanager
    def bar(title: str, total: float) -> Iterator[Any]:
        yield SimpleNamespace(advance=lambda steps: laps.append(peak.lap()) if title == "cycles" else None)

    with tempfile.TemporaryDirectory() as folder, PeakMemory(chosen.device) as peak:
        GenerationCycle(
            model="tiny:llama", cycles=CYCLES, run_dir=Path(folder) / "chain", first=[FitSFT(data=seed)],
            phases=[Generate(prompts=prompts, n=16, max_new_tokens=16), FitSFT()],
            trainer={"accelerator": "cpu" if chosen.device == "cpu" else "gpu", "devices": 1},
        ).run(bar=bar)  # fmt: skip
    quarter = CYCLES // 4
    told = {"peak_of_each_cycle": laps, "counted": "above what was there before the chain"}
    name = f"peak memory of cycles {CYCLES - quarter} to {CYCLES - 1} of a tiny chain"
    peer = f"cycles 0 to {quarter - 1}"
    return row(name, max(laps[-quarter:]), max(laps[:quarter]), peer, unit="MB", target=1.05, detail=told)


def main() -> None:
    """Measure and print the JSON."""
    chosen = arguments(__doc__.splitlines()[0])
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = [*head_loss(chosen), chain_memory(chosen)]
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
