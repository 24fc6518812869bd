"""How strong: one number, or one for each row of the batch, so that a single forward pass carries a sweep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_interp.errors import RecipeError

__all__ = ["check_strength", "per_row"]


def check_strength(strength: Any, *, what: str) -> float | Tensor:
    """A float, or a float tensor ``[rows]`` (itself if it requires grad), from a number, a tensor or a list."""
    try:
        tensor = torch.as_tensor(strength)
        tensor = tensor if tensor.is_floating_point() else tensor.to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{what}(strength={strength!r:.60}) is no number and no list of numbers: {error}.") from error
    if isinstance(strength, bool) or tensor.dim() > 1 or tensor.numel() == 0:
        raise RecipeError(
            f"{what}(strength={strength!r:.60}) has the shape {list(tensor.shape)}; expected one number, or one for "
            "each row of the batch [B]."
        )
    if not bool(torch.isfinite(tensor.detach()).all()):
        raise RecipeError(f"{what}(strength={strength!r:.60}) is not finite; expected finite numbers.")
    if tensor.dim() == 0 and not tensor.requires_grad:
        return float(strength)  # not through the tensor, which may be narrower
    if tensor.requires_grad:
        return tensor
    with torch.inference_mode(False):
        return tensor.detach().to(torch.float32, copy=True)


def per_row(strength: Tensor, rows: int, *, what: str) -> Tensor:
    """One strength ``[B, 1, 1]`` for each of a pass's ``rows``, from ``[S]`` or a scalar tensor."""
    if strength.dim() == 0:
        return strength.reshape(1, 1, 1)
    count = len(strength)
    if rows % count:
        raise RecipeError(
            f"{what} has {count} strengths, one a row, but the pass has {rows} rows. Pass one strength for each row "
            "(or for each prompt, with several beams or samples a prompt), or a single number."
        )
    return strength.repeat_interleave(rows // count).reshape(-1, 1, 1)
