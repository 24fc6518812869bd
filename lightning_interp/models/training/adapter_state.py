"""Checkpoints that hold what is trained beside a frozen base, and what is asked of them when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_interp.errors import IncompatibleModelError
from lightning_interp.models.training.lora import adapter_parameters

__all__ = ["check_state", "drop_base", "is_sharded_tensor", "saved_names"]


def saved_names(state: Mapping[str, Any], model: nn.Module, prefix: str) -> set[str]:
    """Names in a state of the adapter of ``model``, of what else of it is trained, and of all that lies beside it.

    Args:
        state: The state of the module that holds it.
        model: The adapted model.
        prefix: What stands before its names in the state.
    """
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept |= adapter_parameters(model)
    return {name for name in state if not name.startswith(prefix) or name.removeprefix(prefix) in kept}


def drop_base(checkpoint: dict[str, Any], model: nn.Module, prefix: str) -> None:
    """Keep the frozen base out of a checkpoint, but for two kinds that are read back whole or not at all.

    These are sharded checkpoints, and those that Lightning's weight averaging has put its copy into.
    """
    state = checkpoint["state_dict"]
    if "averaging_state" not in checkpoint and not any(map(is_sharded_tensor, state.values())):
        saved = saved_names(state, model, prefix)
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in saved}


def check_state(given: Mapping[str, Any], own: Mapping[str, Any], needed: Iterable[str], *, owner: str) -> None:
    """Refuse a state that lacks a needed tensor, or holds an unknown one or one of another shape."""
    lacking = sorted(set(needed) - set(given))
    unknown = sorted(set(given) - set(own))
    other = [name for name in given if name in own and given[name].shape != own[name].shape]
    if lacking:
        problem = f"lacks {lacking[0]!r} ({len(lacking)} missing"
    elif unknown:
        problem = f"holds the unknown {unknown[0]!r} ({len(unknown)} unknown"
    elif other:
        shapes = f"{tuple(given[other[0]].shape)}, expected {tuple(own[other[0]].shape)}"
        problem = f"holds {other[0]!r} with shape {shapes} ({len(other)} of another shape"
    else:
        return
    raise IncompatibleModelError(
        f"The checkpoint does not fit {owner}: it {problem}). "
        "Build the module with the model and the lora settings of the checkpoint."
    )


def is_sharded_tensor(tensor: Any) -> bool:
    """Whether each process holds a part of a tensor."""
    return hasattr(tensor, "full_tensor")
