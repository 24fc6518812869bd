"""What does an attached intervention cost that changes nothing, and what does reading activations cost?

Peers, in the same run: the plain forward pass, and the shortest hand-written PyTorch hooks that do the same.

    python benchmarks/hooks.py [--quick] [--device cpu|cuda] [--out hooks.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _measure import alternate, arguments, compare, finish
from grafting import SIZES, T, build

from lightning_interp import ActivationCapture, Intervention, ModelMap, Site, StepContext

ROWS = 8


class NoOp(Intervention):
    """Looks at every residual stream and changes nothing."""

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """Every block."""
        return [Site("resid_post", layer) for layer in range(len(model_map))]

    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """The identity."""
        return x


def run(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """A forward pass."""

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return forward


def inside(attach: Callable[[], Any], forward: Callable[[], None]) -> Callable[[], None]:
    """A forward pass while something is attached; attaching is not counted as it is done once a run."""
    handle: list[Any] = []

    def attached() -> None:
        if not handle:
            handle.append(attach())
        forward()

    return attached


def by_hand(model: Any, kept: dict[int, torch.Tensor] | None) -> None:
    """The shortest hooks that look at (or copy) every block's output."""
    for i, block in enumerate(model.model.layers):

        def hook(_: Any, __: Any, output: Any, i: int = i) -> None:
            x = output if isinstance(output, torch.Tensor) else output[0]
            if kept is not None:
                kept[i] = x.detach().clone()

        block.register_forward_hook(hook)


def measure(size: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of one model size; each variant has a model of its own, with the same weights."""
    ids = torch.randint(5, 250, (ROWS, T), generator=torch.Generator().manual_seed(0)).to(chosen.device)
    names = ("plain", "no-op attachment", "capture", "no-op by hand", "capture by hand")
    first = build(size, chosen.device)
    models = {name: build(size, chosen.device) for name in names}
    for model in models.values():  # one set of weights in memory, so that no variant finds warmer caches
        for mine, shared in zip(model.parameters(), first.parameters(), strict=True):
            mine.data = shared.data
    sites = NoOp().sites(ModelMap.build(first))
    by_hand(models["no-op by hand"], None)
    by_hand(models["capture by hand"], {})
    functions = {name: run(model, ids) for name, model in models.items()}
    noop, capture = models["no-op attachment"], models["capture"]
    functions["no-op attachment"] = inside(lambda: NoOp().attach(noop), functions["no-op attachment"])
    functions["capture"] = inside(lambda: ActivationCapture(sites).attach(capture), functions["capture"])
    repeats = (60 if size.startswith("tiny") else 15) // (2 if chosen.quick else 1)
    times = alternate(functions, device=chosen.device, repeats=repeats)
    unit = "GPU s" if chosen.device == "cuda" else "CPU s"
    limit = 1.03 if size == "127M" else None
    copied = {"floor_copied_megabytes": 4 * ROWS * T * len(sites) * SIZES[size]["hidden_size"] / 2**20}
    return [
        compare(f"{size}: no-op attachment", times, "no-op attachment", "plain", unit=unit, target=limit),
        compare(f"{size}: no-op attachment", times, "no-op attachment", "no-op by hand", unit=unit),
        compare(f"{size}: capture", times, "capture", "plain", unit=unit, detail=copied),
        compare(f"{size}: capture", times, "capture", "capture by hand", unit=unit, detail=copied),
    ]


def main() -> None:
    """Measure every size and print the JSON."""
    chosen = arguments(__doc__.splitlines()[0])
    sizes = ["tiny 0.2M", "28M"] if chosen.quick else list(SIZES)
    finish("cost of hooks", [r for size in sizes for r in measure(size, chosen)], chosen)


if __name__ == "__main__":
    main()
