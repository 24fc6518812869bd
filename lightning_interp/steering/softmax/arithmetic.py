"""Where the geometry's numbers are made: float32 or float64, never autocast, never TF32, small differences in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = [
    "ROUNDED",
    "centred",
    "divergence",
    "entropy",
    "exact_arithmetic",
    "moved_probs",
    "rounding",
    "working_dtype",
]

_EXACT = ("none", "ieee")
_TERMS = range(15, 2, -1)  # of the exponential series below 0.5, to the last digit of float64


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any of the tensors is, else float32; None is passed over."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Turn autocast, TF32 and bfloat16 products off inside the block, and back to what they were after it.

    ``(H + alpha I)^-1 beta`` that is worked out in bfloat16 throughout is wrong by most of its length.
    """
    cast = torch.is_autocast_enabled(device.type)
    # Read and set by backend: the global setting cannot be asked where somebody has set one backend's own.
    rounded = [
        (backend.matmul, backend.matmul.fp32_precision)
        for backend in (torch.backends.cuda, torch.backends.mkldnn)
        if backend.matmul.fp32_precision not in _EXACT
    ]
    with torch.autocast(device.type, enabled=False) if cast else nullcontext():
        for products, _ in rounded:
            products.fp32_precision = "ieee"
        try:
            yield
        finally:
            for products, before in rounded:
                products.fp32_precision = before


def divergence(first: Tensor, change: Tensor) -> Tensor:
    """``KL(P || Q)`` in nats ``[...]`` from P's log-probabilities and the logits' change to Q's, both ``[..., V]``.

    It is ``log E_P[exp(c)]`` with ``c`` the change less its mean under P, exact also where little moves: a difference
    of log-probabilities leaves nothing of a KL below their rounding, 1e-8 in float32.
    """
    p, c = first.exp(), _about_mean(first, change)
    series = torch.ones_like(c)
    for k in _TERMS:  # exp(c) - 1 - c = c^2 / 2 (1 + c / 3 (1 + c / 4 (...)))
        series = 1 + c / k * series
    far = (first + c).exp() - p * (1 + c)
    excess = torch.where(c.abs() < 0.5, p * (0.5 * c.square() * series), far).sum(-1)
    kl: Tensor = torch.where(excess < 1, excess.log1p(), (first + c).logsumexp(-1)).clamp_min(0)
    return kl


def _about_mean(first: Tensor, change: Tensor) -> Tensor:
    """A change less its mean; from the likeliest token's, as a mean beside 1 would round what that one keeps."""
    change = change - change.gather(-1, first.argmax(-1, keepdim=True))
    return change - (first.exp() * change).sum(-1, keepdim=True)


def moved_probs(first: Tensor, change: Tensor, kl: Tensor) -> Tensor:
    """How far probabilities move ``[..., V]``, from what :func:`divergence` takes and gives, exact if little."""
    p, ratio = first.exp(), _about_mean(first, change) - kl[..., None]
    return torch.where(ratio.abs() < 0.5, p * ratio.expm1(), (first + ratio).exp() - p)


def centred(p: Tensor, u: Tensor) -> Tensor:
    """``p (u - sum(p u))``: the covariance's action in the space of logits; centring first loses fewer digits."""
    return p * (u - (p * u).sum(-1, keepdim=True))


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of log-probabilities ``[..., V]``, ``[...]``."""
    p = log_probs.exp()
    return -torch.where(p == 0, 0.0, p * log_probs).sum(-1)  # NaN stays NaN


ROUNDED = 0.1
"""Share of a target that the rounding of the state may excuse at most."""


def rounding(lam: Tensor, slope: Tensor) -> Tensor:
    """How far a number with the gradient ``slope`` at ``lam`` may be off because the state is rounded, ``[...]``."""
    size: Tensor = 2 * torch.finfo(lam.dtype).eps * lam.norm(dim=-1) * slope.norm(dim=-1)
    return size
