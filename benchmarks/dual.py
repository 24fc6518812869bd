"""What does a point of the dual curve cost: solved for directly, walked to, and at every token of a generation?

Peers, in the same run: Algorithm 1 of arXiv 2602.15293 with steps so short that it ends at the same KL (to three
accuracies), the same with the authors' step, and plain decoding.

    python benchmarks/dual.py [--quick] [--device cpu|cuda] [--out dual.json]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _measure import alternate, arguments, compare, finish, row

from lightning_interp.steering import DualSteering, SoftmaxGeometry, algorithm1, dual_steer
from lightning_interp.testing.marks import missing_bundled

V, D, CONTEXTS, PIECE = 4096, 128, 8, 50
# Relative. A walk's KL comes nearer to the direct solver's as its step gets shorter, down to what its own 20 products
# a step allow, so that its cost depends on what "the same KL" means: the target holds at each of the three.
KL_TOLERANCES = (2e-2, 1e-2, 5e-3)
SHORTEST = 2e-3  # step of a walk; where it is not short enough, the row says so
NEW_TOKENS = 16


def synthetic(dtype: torch.dtype = torch.float32) -> tuple[SoftmaxGeometry, torch.Tensor, torch.Tensor]:
    """An anisotropic head, and states whose three likeliest tokens hold more than 0.98."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=rng, dtype=torch.float64) * torch.logspace(0, -1.5, D, dtype=torch.float64)
    geometry = SoftmaxGeometry(weight)
    states = 3.0 * torch.randn(4096, D, generator=rng, dtype=torch.float64)
    top = geometry.probs(states).topk(3).values.sum(-1)
    states = states[top > 0.98][:CONTEXTS]
    assert len(states) == CONTEXTS
    beta = weight[:64].mean(0) - weight[64:128].mean(0)
    return SoftmaxGeometry(weight.to(dtype)), states.to(dtype), (beta / beta.norm()).to(dtype)


def walked(
    geometry: SoftmaxGeometry, lam: torch.Tensor, beta: torch.Tensor, *, move: float, alpha: float, eta: float
) -> tuple[torch.Tensor, int]:
    """Where Algorithm 1 crosses the probe value (interpolated in its last step), and the products up to there."""
    here, used = lam, 0
    for _ in range(1000):  # in pieces, as it does not know where to stop
        path = algorithm1(geometry, here, beta, alpha=alpha, eta=eta, steps=PIECE, top_k=None)
        points = path.points[:, 0]
        values = points @ beta - lam @ beta
        over = (values >= move).nonzero()
        if len(over):
            k = max(1, int(over[0]))
            share = (move - values[k - 1]) / (values[k] - values[k - 1])
            return points[k - 1] + share * (points[k] - points[k - 1]), used + int(path.hvps[0] * k / PIECE)
        here, used = points[-1], used + int(path.hvps[0])
    return here, used


def halved(
    geometry: SoftmaxGeometry, lam: torch.Tensor, beta: torch.Tensor, kl: float, *, move: float, alpha: float
) -> dict[float, dict[str, float]]:
    """The longest of the halved steps whose walk ends within each tolerance of the KL, and what the walk took."""
    met: dict[float, dict[str, float]] = {}
    eta = min(2.0, move / 4)
    while len(met) < len(KL_TOLERANCES) and eta > SHORTEST:
        begin = time.process_time()
        end, used = walked(geometry, lam, beta, move=move, alpha=alpha, eta=eta)
        spent, gap = time.process_time() - begin, abs(float(geometry.kl(lam, end)) - kl) / kl
        for tolerance in KL_TOLERANCES:
            if gap <= tolerance and tolerance not in met:
                met[tolerance] = {"products": used, "seconds": spent, "eta": eta, "kl_gap": gap}
        eta /= 2
    return met


def endpoint_rows(alpha: float, move: float, contexts: int) -> list[dict[str, Any]]:
    """One setting: products and CPU seconds per end point, direct against walked."""
    geometry, states, beta = synthetic()
    direct, walks, authors, kls = [], [], [], []
    for lam in states[:contexts]:
        begin = time.process_time()
        found = dual_steer(geometry, lam, beta, probe_delta=move, alpha=alpha)
        direct.append((int(found.hvps), time.process_time() - begin))
        kls.append(float(found.kl))
        walks.append(halved(geometry, lam, beta, kls[-1], move=move, alpha=alpha))
        end, used = walked(geometry, lam, beta, move=move, alpha=alpha, eta=2.0)
        authors.append((used, float(geometry.kl(lam, end)) / kls[-1]))
    name = f"move {move:g}, alpha {alpha:g}"
    rows = [r for limit in KL_TOLERANCES for r in compared(name, limit, direct, [walk.get(limit) for walk in walks])]
    products = statistics.mean(h for h, _ in direct)
    detail = {"kl": kls, "kl_over_direct": [k for _, k in authors]}
    walk = statistics.mean(h for h, _ in authors)
    title = f"{name}: products per end point"
    return [*rows, row(title, products, walk, "Algorithm 1, step 2", unit="HVP", detail=detail)]


def compared(
    name: str, tolerance: float, direct: list[tuple[int, float]], walks: list[dict[str, float] | None]
) -> list[dict[str, Any]]:
    """Direct solves against the walks that came within a tolerance of their KL; the other contexts are counted."""
    both = [(ours, walk) for ours, walk in zip(direct, walks, strict=True) if walk is not None]
    peer = f"Algorithm 1, KL within {tolerance:g}"
    if not both:
        return [row(f"{name}: end point", 0.0, None, peer, detail={"skipped": "no step was short enough"})]
    detail: dict[str, Any] = {"contexts": len(both), "no_step_short_enough": len(walks) - len(both)}
    detail |= {key: [walk[key] for _, walk in both] for key in ("eta", "kl_gap")}
    detail |= {"floor_bytes_per_hvp": 2 * V * D * 4, "floor_flops_per_hvp": 4 * V * D}
    rows = []
    for index, (key, unit) in enumerate((("products", "HVP"), ("seconds", "CPU s"))):
        ours, peers = statistics.mean(o[index] for o, _ in both), statistics.mean(walk[key] for _, walk in both)
        target = 1 / 50 if unit == "HVP" else None
        rows.append(row(f"{name}: {key} per end point", ours, peers, peer, unit=unit, target=target, detail=detail))
    return rows


def precision_row() -> dict[str, Any]:
    """End points in float32 against float64."""
    ends = []
    for dtype in (torch.float64, torch.float32):
        geometry, states, beta = synthetic(dtype)
        ends.append(dual_steer(geometry, states, beta, probe_delta=5.0, alpha=5e-3).lam.double())
    error = float(((ends[0] - ends[1]).norm(dim=-1) / ends[0].norm(dim=-1)).max())
    return row("float32 end points: largest relative distance", error, 1e-3, "limit", unit="relative", target=1.0)


def decoder(quick: bool, device: str) -> tuple[Any, str]:
    """The bundled model, or a random one with a head of its shape."""
    if not quick and missing_bundled() is None:
        from lightning_interp import load_causal_lm

        return load_causal_lm("smollm2-135m-instruct").model.eval().to(device), "SmolLM2-135M, dequantised 4-bit"
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device), "random llama, 4 layers, its head shape"


def token_rows(quick: bool, device: str) -> list[dict[str, Any]]:
    """CPU (or GPU) seconds of a generated token under a KL budget, against plain decoding."""
    model, label = decoder(quick, device)
    new = NEW_TOKENS // 2 if quick else NEW_TOKENS
    weight = model.get_output_embeddings().weight
    ids = torch.arange(1000, 1016, device=device)[None]
    beta = (weight[2000:2064].mean(0) - weight[3000:3064].mean(0)).detach()
    variants = {f"support {s or 'whole'}": DualSteering(beta, kl_budget=0.5, support=s) for s in (4096, None)}

    def generate() -> None:
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    def steered(steer: DualSteering) -> Callable[[], None]:
        def run() -> None:
            with steer.attach(model):
                generate()

        return run

    functions = {"plain": generate, **{name: steered(steer) for name, steer in variants.items()}}
    times = alternate(functions, device=device, repeats=1 if quick else 3)
    rows, (vocabulary, width) = [], weight.shape
    for name, steer in variants.items():
        measured = steer.meter.compute()
        floor = {"floor_bytes_per_hvp": 2 * vocabulary * width * 4, "floor_flops_per_hvp": 4 * vocabulary * width}
        if steer.support:
            floor = {key: value * steer.support // vocabulary for key, value in floor.items()}
        detail = {"model": label, "new_tokens": new, **{k: measured[k] for k in measured}, **floor}
        unit = "GPU s" if device == "cuda" else "CPU s"
        rows.append(compare(f"generation, KL budget 0.5, {name}", times, name, "plain", unit=unit, detail=detail))
    return rows


def main() -> None:
    """Measure and print the JSON."""
    chosen = arguments(__doc__.splitlines()[0])
    settings = [(5e-3, 20.0)] if chosen.quick else [(a, m) for a in (5e-4, 5e-3) for m in (2.0, 20.0)]
    rows = [r for alpha, move in settings for r in endpoint_rows(alpha, move, 1 if chosen.quick else CONTEXTS)]
    rows += [precision_row(), *token_rows(chosen.quick, chosen.device)]
    finish("cost of dual steering", rows, chosen)


if __name__ == "__main__":
    main()
