"""Which modules hold quantised weights, told by their tensors: packed integers, or tensors that unpack themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["is_packed", "quantized_kind"]

_LATER = ("Linear4bit", "Linear8bitLt", "_NF4Linear", "_FP4Linear")  # which pack their weight when they are moved
_PACKED = ("weight", "qweight", "weight_packed")  # buffers that are one; others hold masks and positions


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for other numbers than it stores: of torchao, quanto and others, bytes, or float8."""
    local: Any = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if type(local) not in (torch.Tensor, nn.Parameter) and is_traceable_wrapper_subclass(local):
        return True
    plain: bool = local.is_floating_point() or local.is_complex()
    return not plain or bool(local.dtype.itemsize == 1)


def quantized_kind(module: nn.Module) -> str | None:
    """How a module's own weights are quantised, in a word; None if they are not."""
    name = type(module).__name__
    buffers = [b for key, b in module._buffers.items() if b is not None and key in _PACKED]
    packed: Any = next((t for t in (*module._parameters.values(), *buffers) if t is not None and is_packed(t)), None)
    if packed is not None and is_traceable_wrapper_subclass(packed):
        return f"{name} of {type(packed).__name__}"
    return name if packed is not None or name in _LATER else None
