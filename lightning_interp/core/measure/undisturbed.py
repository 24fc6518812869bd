"""Ask a model something in the middle of somebody's run, and leave everything as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode and without gradients; modes and random states are put back afterwards.

    The mode of every module below those given is put back one by one, so a part that was frozen in evaluation mode
    stays so. Random states are those of torch (the CPU, and CUDA devices in use), Python and NumPy.

    Args:
        *modules: What is put into evaluation mode.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        >>> _ = model[1].eval()
        >>> before = torch.get_rng_state()
        >>> with undisturbed(model):
        ...     inside = model.training, torch.is_grad_enabled(), torch.rand(1).shape
        >>> inside[:2], model.training, model[1].training, torch.equal(before, torch.get_rng_state())
        ((False, False), True, False, True)
    """
    modes = {part: part.training for module in modules for part in module.modules()}
    state = _random_state()
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        _restore(state)


def _random_state() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    return state


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
