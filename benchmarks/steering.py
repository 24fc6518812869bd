"""What does steering cost: a forward pass and a generation with a vector attached, against hooks written by hand?

Peers, in the same run: the shortest hand-written PyTorch hook that adds the same vector, no hook at all, and (where
they are installed) steering-vectors and nnsight. Then a sweep of eight strengths in one pass against eight passes, and
extraction on 64 pairs of texts against a loop over transformers' own hidden states.

    python benchmarks/steering.py [--quick] [--device cpu|cuda] [--out steering.json]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from _measure import alternate, arguments, compare, finish, row
from grafting import build
from torch import nn

from lightning_interp import ModelMap, Site, load_causal_lm
from lightning_interp.steering import AddDirection, SteeringVector, extract_vector
from lightning_interp.testing import byte_tokenizer
from lightning_interp.testing.marks import missing_bundled

STRENGTH, ROWS, T = 4.0, 4, 32
SWEEP = [-8.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0]
TARGET = 1.05
PEERS = {"steering-vectors": "steering_vectors", "nnsight": "nnsight"}
ADJECTIVES = ("kind", "calm", "bright", "gentle", "warm", "cheerful", "patient", "honest")
OPPOSITES = ("cruel", "angry", "gloomy", "rough", "cold", "grumpy", "hasty", "sly")
WHO = ("teacher", "neighbour", "driver", "doctor", "baker", "student", "sailor", "clerk")


class Subject:
    """One model with everything that is measured on it; each variant has a copy of its own, with the same weights."""

    def __init__(self, name: str, model: Any, tokenizer: Any, chosen: argparse.Namespace) -> None:
        self.name, self.model, self.tokenizer, self.chosen = name, model.to(chosen.device), tokenizer, chosen
        self.blocks = ModelMap.build(model).blocks
        self.width = model.config.hidden_size
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.vocab_size
        self.ids = torch.randint(5, vocabulary, (ROWS, T), generator=generator).to(chosen.device)
        self.mask = torch.ones_like(self.ids)
        self.direction = torch.randn(self.width, generator=generator).to(chosen.device)
        self.new = 8 if chosen.quick else 24  # tokens of a generation
        self.unit = "GPU s" if chosen.device == "cuda" else "CPU s"

    def twin(self) -> Any:
        """A copy of the modules that shares the weights, so that no variant finds warmer caches."""
        memo = {id(p): p for p in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, memo)

    def variants(self, layers: list[int]) -> dict[str, Any]:
        """Models by variant, each with its hooks on for the whole run."""
        models = {name: self.twin() for name in ("no hook", "hook by hand", "AddDirection")}
        for layer in layers:
            by_hand(ModelMap.build(models["hook by hand"]).blocks[layer], self.direction)
        sites = [Site("resid_post", layer) for layer in layers]
        self.attached = AddDirection(self.direction, site=sites, strength=STRENGTH).attach(models["AddDirection"])
        return models

    def floor(self, layers: list[int], tokens: int) -> dict[str, float]:
        """What any implementation must do: read and write each activation once, multiply and add once a number."""
        numbers, weights = tokens * self.width * len(layers), sum(p.numel() for p in self.model.parameters())
        return {
            "floor_megabytes": 2 * numbers * 4 / 2**20,
            "floor_megaflop": 2 * numbers / 1e6,
            "pass_megaflop": 2 * weights * tokens / 1e6,
        }


def by_hand(block: nn.Module, direction: torch.Tensor) -> None:
    """The shortest hook that steers."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return output + STRENGTH * direction
        return (output[0] + STRENGTH * direction, *output[1:])

    block.register_forward_hook(hook)


def forward(subject: Subject, model: Any, *, masked: bool) -> Callable[[], torch.Tensor]:
    """A forward pass, with logits of the last token."""
    inputs = {"input_ids": subject.ids, **({"attention_mask": subject.mask} if masked else {})}

    @torch.no_grad()
    def run() -> torch.Tensor:
        logits: torch.Tensor = model(**inputs, use_cache=False, logits_to_keep=1).logits
        return logits

    return run


def generate(subject: Subject, model: Any) -> Callable[[], torch.Tensor]:
    """Greedy generation of a batch with a cache."""
    how = {"max_new_tokens": subject.new, "min_new_tokens": subject.new, "do_sample": False, "pad_token_id": 0}

    def run() -> torch.Tensor:
        written: torch.Tensor = model.generate(subject.ids, attention_mask=subject.mask, **how)
        return written

    return run


def costs(subject: Subject, repeats: int) -> list[dict[str, Any]]:
    """Forward passes and generation, with one layer steered and with every one."""
    rows, target = [], TARGET if subject.name.startswith("SmolLM2") else None
    middle, every = [len(subject.blocks) // 2], list(range(len(subject.blocks)))
    decoded = ROWS * (T + subject.new - 1)
    cases: list[tuple[str, list[int], Callable[[Any], Callable[[], torch.Tensor]], int, int]] = [
        ("forward", middle, lambda m: forward(subject, m, masked=False), ROWS * T, repeats),
        ("forward with a mask", middle, lambda m: forward(subject, m, masked=True), ROWS * T, repeats),
        ("forward, every layer", every, lambda m: forward(subject, m, masked=True), ROWS * T, repeats),
        (f"generate {subject.new}", middle, lambda m: generate(subject, m), decoded, max(3, repeats // 2)),
        (f"generate {subject.new}, every layer", every, lambda m: generate(subject, m), decoded, max(3, repeats // 2)),
    ]  # fmt: skip
    for name, layers, make, tokens, count in cases:
        models = subject.variants(layers)
        functions = {variant: make(model) for variant, model in models.items()}
        check_same(functions["AddDirection"](), functions["hook by hand"](), functions["no hook"]())
        times = alternate(functions, device=subject.chosen.device, repeats=count)
        detail = subject.floor(layers, tokens)
        for peer, limit in (("hook by hand", target), ("no hook", None)):
            title = f"{subject.name}: {name}"
            rows.append(compare(title, times, "AddDirection", peer, unit=subject.unit, target=limit, detail=detail))
        subject.attached.remove()
    return rows


def check_same(ours: torch.Tensor, theirs: torch.Tensor, plain: torch.Tensor) -> None:
    """Faster would be no merit if it were something else."""
    if ours.is_floating_point():
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(ours, plain, atol=1e-2), "the vector changes nothing"
    else:
        assert torch.equal(ours, theirs), "other tokens than with the hook by hand"


def sweep(subject: Subject, repeats: int) -> list[dict[str, Any]]:
    """Eight strengths of one prompt: eight rows of one pass, or eight passes."""
    ids, site = subject.ids[:1], Site("resid_post", len(subject.blocks) // 2)
    model = subject.twin()

    @torch.no_grad()
    def together() -> torch.Tensor:
        with AddDirection(subject.direction, site=site, strength=SWEEP).attach(model):
            found: torch.Tensor = model(input_ids=ids.expand(8, -1), use_cache=False, logits_to_keep=1).logits[:, -1]
        return found

    @torch.no_grad()
    def apart() -> torch.Tensor:
        found = []
        for strength in SWEEP:
            with AddDirection(subject.direction, site=site, strength=strength).attach(model):
                found.append(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1])
        return torch.stack(found)

    torch.testing.assert_close(together(), apart(), atol=1e-3, rtol=1e-3)
    times = alternate({"one pass": together, "eight passes": apart}, device=subject.chosen.device, repeats=repeats)
    detail = {"strengths": SWEEP, "tokens": T}
    return [
        compare(f"{subject.name}: eight strengths", times, "one pass", "eight passes", unit=subject.unit, detail=detail)
    ]


def pairs() -> tuple[list[str], list[str]]:
    """64 pairs of texts."""
    both = [(f"The {who} was {good}.", f"The {who} was {bad}.") for who in WHO
            for good, bad in zip(ADJECTIVES, OPPOSITES, strict=True)]  # fmt: skip
    return [good for good, _ in both], [bad for _, bad in both]


def extraction(subject: Subject, repeats: int) -> list[dict[str, Any]]:
    """Mean differences at every layer from 64 pairs, attaching, tokenising and fingerprint included."""
    positive, negative = pairs()
    model, site = subject.model, Site("resid_post", len(subject.blocks) // 2)

    def ours() -> torch.Tensor:
        return extract_vector(model, subject.tokenizer, positive, negative, token_budget=512).only(site)

    def loop() -> torch.Tensor:
        return looped(subject, positive, negative)

    torch.testing.assert_close(ours().to(subject.chosen.device), loop(), atol=1e-2, rtol=1e-2)
    functions: dict[str, Callable[[], object]] = {"extract_vector": ours, "loop over hidden states": loop}
    if find_spec("steering_vectors") is not None:
        functions["steering-vectors"] = lambda: trained(subject, list(zip(positive, negative, strict=True)))
    times = alternate(functions, device=subject.chosen.device, repeats=repeats)
    title = f"{subject.name}: extraction, 64 pairs"
    return [
        compare(title, times, "extract_vector", peer, unit=subject.unit)
        for peer in functions
        if peer != "extract_vector"
    ]


@torch.no_grad()
def looped(subject: Subject, positive: list[str], negative: list[str]) -> torch.Tensor:
    """What people write: batches of 32 texts, ``output_hidden_states``, the last token of each."""
    means = []
    for texts in (positive, negative):
        kept = []
        for start in range(0, len(texts), 32):
            rows = subject.tokenizer(texts[start : start + 32])["input_ids"]
            width = max(map(len, rows))
            ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=subject.chosen.device)
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=subject.chosen.device)
            output = subject.model(
                input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1
            )
            last = mask.sum(1) - 1
            kept.append(torch.stack([h[torch.arange(len(rows)), last] for h in output.hidden_states[1:]], dim=1))
        means.append(torch.cat(kept).mean(0))
    return (means[0] - means[1])[len(subject.blocks) // 2]


def trained(subject: Subject, both: list[tuple[str, str]]) -> Any:
    """The same by steering-vectors."""
    from steering_vectors import train_steering_vector

    subject.tokenizer.pad_token = subject.tokenizer.pad_token or subject.tokenizer.eos_token
    return train_steering_vector(subject.model, subject.tokenizer, both, batch_size=32, read_token_index=-1)


@contextmanager
def with_steering_vectors(subject: Subject, model: Any) -> Iterator[None]:
    """Steered by steering-vectors."""
    from steering_vectors import SteeringVector as Theirs

    vector = Theirs({len(subject.blocks) // 2: subject.direction}, "decoder_block")
    with vector.apply(model, multiplier=STRENGTH):
        yield


def libraries(subject: Subject, repeats: int) -> list[dict[str, Any]]:
    """Forward passes against other libraries; those that are not installed are named as such."""
    rows = []
    functions = {"AddDirection": entered(subject, subject.twin(), ours_attached)}
    if find_spec(PEERS["steering-vectors"]) is not None:
        functions["steering-vectors"] = entered(subject, subject.twin(), with_steering_vectors)
    if find_spec(PEERS["nnsight"]) is not None:
        functions["nnsight"] = traced(subject)
    if len(functions) > 1:
        reference = functions["AddDirection"]()
        for name, function in functions.items():
            torch.testing.assert_close(function(), reference, atol=1e-3, rtol=1e-3, msg=name)
    times = alternate(functions, device=subject.chosen.device, repeats=repeats) if len(functions) > 1 else {}
    for peer, module in PEERS.items():
        title = f"{subject.name}: attach and forward"
        if peer in functions:
            rows.append(compare(title, times, "AddDirection", peer, unit=subject.unit))
        else:
            skipped = {"skipped": f"{module} is not installed; pip install --no-deps {peer}"}
            rows.append(row(title, float("nan"), None, peer, unit=subject.unit, detail=skipped))
            rows[-1]["ours"] = None
    return rows


@contextmanager
def ours_attached(subject: Subject, model: Any) -> Iterator[None]:
    """Steered by this package."""
    vector = SteeringVector({Site("resid_post", len(subject.blocks) // 2): subject.direction})
    with AddDirection(vector, strength=STRENGTH).attach(model):
        yield


def entered(subject: Subject, model: Any, around: Callable[[Subject, Any], Any]) -> Callable[[], torch.Tensor]:
    """Attach, run, take off."""
    inner = forward(subject, model, masked=True)

    def run() -> torch.Tensor:
        with around(subject, model):
            return inner()

    return run


def traced(subject: Subject) -> Callable[[], torch.Tensor]:
    """The same by nnsight."""
    from nnsight import NNsight

    wrapped = NNsight(subject.twin())
    layer = len(subject.blocks) // 2

    @torch.no_grad()
    def run() -> torch.Tensor:
        with wrapped.trace(input_ids=subject.ids, attention_mask=subject.mask, use_cache=False, logits_to_keep=1):
            block = wrapped.model.layers[layer]
            block.output = block.output + STRENGTH * subject.direction
            logits = wrapped.output.logits.save()
        found: torch.Tensor = logits
        return found

    return run


def subjects(chosen: argparse.Namespace) -> Iterator[tuple[Subject, int]]:
    """A tiny model, on which a hook weighs most, and the bundled one, on which the target holds."""
    for size, repeats in (("tiny 0.2M", 7), ("28M", 3)) if chosen.quick else (("tiny 0.2M", 80),):
        yield Subject(size, build(size, chosen.device), byte_tokenizer(), chosen), repeats
    if not chosen.quick and missing_bundled() is None:
        loaded = load_causal_lm("smollm2-135m-instruct")
        yield Subject("SmolLM2-135M", loaded.model, loaded.tokenizer, chosen), 15


def main() -> None:
    """Measure every subject and print the JSON."""
    chosen = arguments(__doc__.splitlines()[0])
    rows: list[dict[str, Any]] = []
    for subject, repeats in subjects(chosen):
        rows += costs(subject, repeats)
        rows += sweep(subject, max(3, repeats // 3))
        if subject.name != "28M":  # byte tokens make its texts long, and it tells nothing that the others do not
            rows += extraction(subject, max(3, repeats // 5))
        rows += libraries(subject, max(3, repeats // 3))
    finish("cost of steering", rows, chosen)


if __name__ == "__main__":
    main()
