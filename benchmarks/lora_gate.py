"""What does a gate on an adapter cost, and what does one pass save over feeding token after token?

Peers, in the same run: the adapted model as PEFT runs it, one pass for each gate, and a prompt fed token by token with
a KV cache and PEFT's adapters switched on and off in between. The last two save more on a CPU, where a pass of one row
pays for every weight that it reads, than they do on a busy GPU.

    python benchmarks/lora_gate.py [--quick] [--device cpu|cuda] [--out lora_gate.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _measure import alternate, arguments, compare, finish
from grafting import SIZES, with_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DynamicCache

from lightning_interp.core.tokens.kv_cache import cache_argument
from lightning_interp.lora import AdapterGate, GateSpec

ROWS, LENGTH = 4, 64
ENTITY = range(10, 13)
"""An entity of three tokens, as a model's name in its system text."""
GATES = {
    "all": GateSpec(),
    "none": GateSpec(tokens=[]),
    "entity only": GateSpec(tokens=ENTITY),
    "all but entity": GateSpec(tokens=ENTITY, invert=True),
    "half of the tokens": GateSpec(tokens=range(0, LENGTH, 2)),
    "attention in early layers": GateSpec(tokens=ENTITY, modules="attn", layers="early"),
    "another gate in each row": [
        GateSpec(tokens=range(4 * i, 4 * i + 8), invert=bool(i % 2), modules=("attn", None)[i // 4])
        for i in range(ROWS)
    ],
}
SIXTEEN = [
    GateSpec(tokens=range(4 * i, 4 * i + 4), invert=invert, modules=modules)
    for i in range(4)
    for invert in (False, True)
    for modules in ("attn", "ffn")
]


def forward(model: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One pass over the prompts."""

    @torch.no_grad()
    def run() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits

    return run


def one_after_the_other(model: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A pass for each of the sixteen gates, attaching included."""

    def run() -> torch.Tensor:
        found = []
        for spec in SIXTEEN:
            with AdapterGate("default", spec).attach(model):
                found.append(forward(model, ids)())
        return torch.cat(found)

    return run


def in_one_batch(model: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The sixteen gates as rows of one pass, attaching included."""

    def run() -> torch.Tensor:
        with AdapterGate("default", SIXTEEN).attach(model):
            return forward(model, ids.expand(len(SIXTEEN), -1).contiguous())()

    return run


def token_by_token(model: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The adapter on at the entity alone, a token a pass, by PEFT's own switch."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    @torch.no_grad()
    def run() -> torch.Tensor:
        cache, on = cache_argument(model, DynamicCache()), True
        for t in range(ids.shape[1]):
            if (t in ENTITY) is not on:
                on = not on
                for layer in layers:
                    layer.enable_adapters(on)
            logits: torch.Tensor = model(input_ids=ids[:, t : t + 1], use_cache=True, **cache).logits
        for layer in layers:
            layer.enable_adapters(True)
        return logits

    return run


def pair(size: str, device: str) -> tuple[Any, Any]:
    """Two models with one set of weights in memory, so that neither finds warmer caches."""
    plain, ours = with_lora(size, device), with_lora(size, device)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        mine.data = theirs.data
    return plain, ours


def same(ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor]) -> None:
    """Both sides of a comparison give the same logits."""
    torch.testing.assert_close(ours(), theirs(), atol=1e-3, rtol=1e-3)


def measure(size: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of one model size; attaching is counted where several gates take turns alone, as it is done once."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 250, (ROWS, LENGTH), generator=generator).to(chosen.device)
    plain, model = pair(size, chosen.device)
    tiny, rows = size.startswith("tiny"), []
    how = {"device": chosen.device, "repeats": (20 if tiny else 10) // (3 if chosen.quick else 1)}
    unit = {"unit": "GPU s" if chosen.device == "cuda" else "CPU s"}
    for name, specs in GATES.items():
        with AdapterGate("default", specs).attach(model):
            times = alternate({"gated": forward(model, ids), "adapted": forward(plain, ids)}, **how)
            target = None if tiny or name == "none" else 1.1
            rows.append(compare(f"{size}: gate {name}", times, "gated", "adapted", target=target, **unit))
    how["repeats"] = 2 if chosen.quick else 5
    batch = {"one batch": in_one_batch(model, ids[:1]), "16 passes": one_after_the_other(model, ids[:1])}
    same(*batch.values())
    rows.append(compare(f"{size}: 16 gates", alternate(batch, **how), *batch, **unit))
    with AdapterGate("default", GATES["entity only"]).attach(model):
        slow = {"one pass": forward(model, ids[:1]), "token by token": token_by_token(plain, ids[:1])}
        same(*slow.values())
        times = alternate({**slow, "adapted": forward(plain, ids[:1])}, **how)
        floor = {"floor_ratio_of_an_ungated_pass": min(times["adapted"]) / min(times["token by token"])}
        rows.append(compare(f"{size}: prefill of {LENGTH}", times, *slow, target=1 / 20, detail=floor, **unit))
    return rows


def main() -> None:
    """Measure every size and print the JSON."""
    chosen = arguments(__doc__.splitlines()[0])
    sizes = ["tiny 0.2M", "28M"] if chosen.quick else list(SIZES)
    finish("cost of gates on adapters", [row for size in sizes for row in measure(size, chosen)], chosen)


if __name__ == "__main__":
    main()
