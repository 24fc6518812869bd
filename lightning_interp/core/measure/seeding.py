"""Random choices that depend on a root seed and a key alone, never on what ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["derived_seed", "generators_of", "hashed_number", "seeded_rng"]


def derived_seed(root: int, *key: object) -> int:
    """A seed below 2**63 for one purpose, from the user's seed and the key (say a purpose and an index) alone."""
    return hashed_number("/".join(str(part) for part in (root, *key)))


def hashed_number(text: str) -> int:
    """A number below 2**63 that stands for a text, the same in every process (SHA-256)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generators_of(device: torch.device | None = None) -> list[torch.Generator]:
    """Torch's global generators that code on a device draws from: the CPU's, and the device's own."""
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return generators


@contextmanager
def seeded_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run a block with torch's global generators (the CPU's, and a CUDA device's) seeded; put them back afterwards."""
    generators = generators_of(device)
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
