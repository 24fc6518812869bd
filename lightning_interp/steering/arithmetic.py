"""Where the geometry's numbers are made: float32 or float64, never autocast, never TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["exact_arithmetic", "working_dtype"]


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
    """Turn autocast and TF32 off inside the block, and back to what they were after it.

    A direction ``(H + alpha I)^-1 beta`` that is worked out in bfloat16 throughout is wrong by most of its length.

    Args:
        device: Where the tensors are.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), exact_arithmetic(torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
