"""Ask a model something in the middle of somebody's run, and leave everything as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["evaluating", "undisturbed"]


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module below those given; each is put back by itself, as it was."""
    modes = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def undisturbed(*modules: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Run a block in evaluation mode and without gradients; modes and random states are put back afterwards.

    The mode of every module below those given is put back one by one, so a part that was frozen in evaluation mode
    stays so; ``requires_grad`` of every parameter likewise. Random states are those of torch (the CPU, and CUDA devices
    in use), Python and NumPy.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    asked = [parameter.requires_grad for parameter in parameters]
    grads = [parameter.grad for parameter in parameters] if gradients else []
    state = _random_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(evaluating(*modules))
            if gradients:
                for parameter in parameters:
                    parameter.grad = None
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(gradients))
            yield
    finally:
        for parameter, trained in zip(parameters, asked, strict=True):
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
        for parameter, grad in zip(parameters, grads, strict=bool(grads)):
            parameter.grad = grad
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
