"""Random choices that depend on a root seed and a key alone, never on what ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["derived_seed", "generators_of", "hashed_number", "seeded_rng"]


def derived_seed(root: int, *key: object) -> int:
    """A seed for one purpose.

    Args:
        root: The user's seed.
        *key: What it is for, such as a purpose and an index.

    Returns:
        A number below 2**63 that depends on the root and the key alone.

    Example:
        >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 1) != derived_seed(0, "order", 2)
        True
    """
    return hashed_number("/".join(str(part) for part in (root, *key)))


def hashed_number(text: str) -> int:
    """A number below 2**63 that stands for a text, the same in every process (SHA-256).

    Example:
        >>> hashed_number("review-7") == hashed_number("review-7") != hashed_number("review-8")
        True
    """
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
    """Run a block whose code draws from torch's global generators with a seed of its own; put them back afterwards.

    Args:
        seed: The seed.
        device: A CUDA device whose generator is seeded too, beside the one of the CPU.

    Example:
        >>> with seeded_rng(7):
        ...     first = torch.rand(3)
        >>> with seeded_rng(7):
        ...     torch.equal(first, torch.rand(3))
        True
    """
    generators = generators_of(device)
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
