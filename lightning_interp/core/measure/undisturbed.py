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
    """Evaluation mode for every module below those given; each is put back by itself, as it was.

    Args:
        *modules: What is put into evaluation mode.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5).eval())
        >>> with evaluating(model):
        ...     inside = model.training
        >>> inside, model.training, model[1].training
        (False, True, False)
    """
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

    Args:
        *modules: What is put into evaluation mode.
        gradients: Allow gradients in the block, also inside of ``torch.inference_mode``. The parameters then have no
            ``grad`` in the block, and get the one they had back.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        >>> _ = model[1].eval()
        >>> before = torch.get_rng_state()
        >>> with undisturbed(model):
        ...     inside = model.training, torch.is_grad_enabled(), torch.rand(1).shape
        >>> inside[:2], model.training, model[1].training, torch.equal(before, torch.get_rng_state())
        ((False, False), True, False, True)
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
