"""Where the geometry's numbers are made: float32 or float64, never autocast, never TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

__all__ = ["exact_arithmetic", "working_dtype"]

_EXACT = ("none", "ieee")


def working_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Return float64 if any of the tensors is, else float32.

    Args:
        *tensors: States, directions, targets; None is passed over.

    Example:
        >>> working_dtype(torch.zeros(1, dtype=torch.bfloat16)), working_dtype(torch.zeros(1, dtype=torch.float64))
        (torch.float32, torch.float64)
    """
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Turn autocast, TF32 and bfloat16 products off inside the block, and back to what they were after it.

    A direction ``(H + alpha I)^-1 beta`` that is worked out in bfloat16 throughout is wrong by most of its length.

    Args:
        device: Where the tensors are.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), exact_arithmetic(torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
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
