"""What does dynamic weight grafting cost: one masked forward pass against plain passes and against its definition?

The eight standard plans of one prompt (T=14) on random llamas. Peers, in the same run:
(a) the same eight rows through the plain recipient in one batch;
(b) the definition: for each plan and token, assemble a model of the chosen weights, feed it one token, discard it.
Then many configurations: eight plans of 64 prompts, a map of 200 at the last token with and without shared prefixes,
DoRA and 4-bit donors, and peak memory in weight sets.

    python benchmarks/grafting.py [--quick] [--device cpu|cuda] [--out grafting.json]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from _measure import PeakMemory, alternate, arguments, compare, finish, row, seconds
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_interp import FromBatch, Graft, GraftPlan, Last, ModelMap, paper_plans
from lightning_interp.core.tokens.kv_cache import cache_argument
from lightning_interp.core.weights.sources import make_sources

T = 14
ENTITY = slice(2, 5)
SIZES: dict[str, dict[str, int]] = {
    "tiny 0.2M": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "vocab_size": 260},
    "28M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 18000},
    "127M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 27392},
}


def build(size: str, device: str, seed: int = 0) -> LlamaForCausalLM:
    """A random llama in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = SIZES[size]["hidden_size"] // 64 if SIZES[size]["hidden_size"] >= 256 else 4
        config = LlamaConfig(**SIZES[size], num_attention_heads=heads, num_key_value_heads=heads)
        return LlamaForCausalLM(config).eval().to(device)


def entity_mask(rows: int, device: str) -> torch.Tensor:
    """The entity's tokens, ``[rows, T]``."""
    mask = torch.zeros(rows, T, dtype=torch.bool, device=device)
    mask[:, ENTITY] = True
    return mask


class Grafted:
    """Our side: plans as rows of one forward pass, attaching included."""

    def __init__(self, model: Any, donor: Any, plans: list[GraftPlan], ids: torch.Tensor) -> None:
        self.model, self.map, self.donor, self.plans = model, ModelMap.build(model), make_sources(donor), plans
        self.ids = ids.expand(len(plans), -1).contiguous()

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:  # noqa: D102
        with Graft(self.donor, self.plans).attach(self.map) as attachment:
            attachment.batch = {"FE": entity_mask(len(self.plans), str(self.ids.device))}
            logits: torch.Tensor = self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits


class Plain:
    """The same rows through the model as it is."""

    def __init__(self, model: Any, ids: torch.Tensor, rows: int) -> None:
        self.model, self.ids = model, ids.expand(rows, -1).contiguous()

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:  # noqa: D102
        logits: torch.Tensor = self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits


class Sequential:
    """The definition: token by token, assemble the model that the plan names, feed it one token, and discard it.

    With ``reuse`` the assembled model is not discarded but overwritten for the next token: a kinder peer.
    """

    def __init__(
        self, recipient: Any, donor: Any, plans: dict[str, GraftPlan], ids: torch.Tensor, *, reuse: bool
    ) -> None:
        self.plans, self.ids, self.reuse, self.recipient = plans, ids, reuse, recipient
        self.sources = [dict(recipient.named_parameters()), dict(donor.named_parameters())]
        self.assembled = copy.deepcopy(recipient) if reuse else None

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:  # noqa: D102
        return torch.stack([self.one(name) for name in self.plans])

    @torch.no_grad()
    def one(self, plan: str) -> torch.Tensor:
        """Logits at the last token of one plan."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for t in range(T):
            chosen = self.grafted(plan, t)
            model = self.assembled if self.assembled is not None else copy.deepcopy(self.recipient)
            for name, parameter in model.named_parameters():
                outside = name.startswith(("model.norm", "lm_head")) and plan != "SFT"
                source = 0 if outside else int(chosen)
                if source or self.reuse:  # a fresh copy is the recipient already
                    parameter.copy_(self.sources[source][name])
            output = model(input_ids=self.ids[:, t : t + 1], **cache_argument(model, cache), use_cache=True)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    @staticmethod
    def grafted(plan: str, t: int) -> bool:
        """Whether a standard plan uses the donor at token ``t``; written out, not read off our plans."""
        entity, last = ENTITY.start <= t < ENTITY.stop, t == T - 1
        return {
            "PRE": False,
            "SFT": True,
            "FE": entity,
            "LT": last,
            "FE+LT": entity or last,
            "(FE+LT)^C": not (entity or last),
            "FE^C": not entity,
            "LT^C": not last,
        }[plan]


def with_lora(size: str, device: str, *, dora: bool = False, base: Any = None) -> Any:
    """The recipient (or ``base``) with a random rank-8 adapter on every linear map.

    The base stays unfrozen like its peer: torch picks another kernel for the head when its weight needs no gradient.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model = build(size, device) if base is None else base
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    model = inject_adapter_in_model(config, model).eval()
    return model.requires_grad_(True) if base is None else model


def measure(size: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of one model size."""
    device, repeats = chosen.device, 5 if chosen.quick else 9
    recipient, donor = build(size, device), build(size, device, seed=1)
    ids = torch.randint(5, 250, (1, T), generator=torch.Generator().manual_seed(0)).to(device)
    plans = paper_plans()
    fe, lt = GraftPlan.at(FromBatch("FE")), GraftPlan.at(Last())
    adapted = with_lora(size, device)
    times = alternate(
        {
            "plain batch": Plain(recipient, ids, 8),
            "empty plan": Grafted(recipient, donor, [GraftPlan()] * 8, ids),
            "sparse plans": Grafted(recipient, donor, [fe, lt] * 4, ids),
            "standard plans": Grafted(recipient, donor, list(plans.values()), ids),
            "LoRA donor, standard plans": Grafted(adapted, "default", list(plans.values()), ids),
            "LoRA donor, sparse plans": Grafted(adapted, "default", [fe, lt] * 4, ids),
            "plain PEFT batch": Plain(adapted, ids, 8),
        },
        device=device,
        repeats=repeats * (4 if size.startswith("tiny") else 1),
    )
    main = size == "127M"
    unit = "GPU s" if device == "cuda" else "CPU s"
    floor = floors(recipient)
    rows = [
        compare(f"{size}: {name}", times, name, "plain batch", unit=unit, target=target if main else None, detail=floor)
        for name, target in (
            ("empty plan", 1.03),
            ("sparse plans", 1.4),
            ("standard plans", None),
            ("LoRA donor, standard plans", 1.15),
            ("LoRA donor, sparse plans", 1.15),
        )
    ]
    against_peft = compare(
        f"{size}: LoRA donor, standard plans", times, "LoRA donor, standard plans", "plain PEFT batch", unit=unit
    )
    return [*rows, against_peft, *against_definition(size, chosen, recipient, donor, ids, plans)]


def floors(model: Any) -> dict[str, float]:
    """What one plain pass of eight rows cannot go below."""
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    return {
        "floor_gflop": 2 * (8 * T * blocks + 8 * head) / 1e9,
        "floor_weight_megabytes": 4 * (blocks + head) / 2**20,
    }


def against_definition(
    size: str, chosen: argparse.Namespace, recipient: Any, donor: Any, ids: torch.Tensor, plans: dict[str, GraftPlan]
) -> list[dict[str, Any]]:
    """One masked pass against the sequential definition: time, memory, largest difference in probability."""
    device, unit = chosen.device, "GPU s" if chosen.device == "cuda" else "CPU s"
    ours = Grafted(recipient, donor, list(plans.values()), ids)
    slow = Sequential(recipient, donor, plans, ids, reuse=False)
    expected: list[torch.Tensor] = []
    slow.one("PRE")
    with PeakMemory(device) as slow_memory:
        slow_time = seconds(lambda: expected.append(slow()), device)
    kinder = Sequential(recipient, donor, plans, ids, reuse=True)
    kinder.one("PRE")
    kinder_time = seconds(kinder, device)
    del kinder
    with PeakMemory(device) as our_memory:
        got = ours()
    our_time = sorted(seconds(ours, device) for _ in range(5))[2]
    gap = float((got.softmax(-1) - expected[0].softmax(-1)).abs().max())
    weights = sum(p.numel() * 4 for p in recipient.parameters()) / 2**20
    detail = {"largest_probability_difference": gap, "plans": len(plans), "tokens": T, "speedup": slow_time / our_time}
    reused = {"speedup": kinder_time / our_time}
    target = 1 / 40 if size == "127M" else None
    memory = {
        "weight_set_megabytes": weights,
        "sets_held": "ours 2 (recipient, donor), definition 3 (and the assembled)",
    }
    return [
        row(
            f"{size}: eight plans",
            our_time,
            slow_time,
            "sequential definition",
            unit=unit,
            target=target,
            detail=detail,
        ),
        row(f"{size}: eight plans", our_time, kinder_time, "definition, one buffer reused", unit=unit, detail=reused),
        row(
            f"{size}: extra memory",
            our_memory.megabytes,
            slow_memory.megabytes,
            "sequential definition",
            unit="MB",
            detail=memory,
        ),
    ]


def main() -> None:
    """Measure every size and print the JSON."""
    chosen = arguments(__doc__.splitlines()[0])
    from _grafting_many import many

    sizes = ["tiny 0.2M", "28M"] if chosen.quick else list(SIZES)
    rows = many(sizes[-1], chosen)
    finish("cost of grafting", rows + [r for size in sizes for r in measure(size, chosen)], chosen)


if __name__ == "__main__":
    main()
