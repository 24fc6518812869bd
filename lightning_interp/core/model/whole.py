"""Whether the weights of a model are whole on this process."""

from __future__ import annotations

from torch import nn

from lightning_interp.errors import UnsupportedStrategyError

__all__ = ["check_weights"]


def check_weights(module: nn.Module, *, purpose: str) -> None:
    """Refuse models whose weight values are not whole on this process."""
    for name, parameter in module.named_parameters():
        if (
            type(parameter).__name__ == "DTensor"
            or "DTensor" in type(parameter.data).__name__
            or hasattr(parameter, "ds_id")
        ):
            raise UnsupportedStrategyError(
                f"{purpose} needs whole weights, but {name} of {type(module).__name__} is sharded. Use a single "
                "device or DDP."
            )
