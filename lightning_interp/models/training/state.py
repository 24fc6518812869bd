"""Which tensors a checkpoint holds, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_interp.errors import IncompatibleModelError
from lightning_interp.models.training.lora import adapter_parameters

__all__ = ["check_state", "saved_names"]


def saved_names(names: Iterable[str], model: nn.Module, *, prefix: str) -> set[str]:
    """Names that belong in the checkpoint of a module that trains an adapter.

    Those are the adapter, other trained parameters of the model, and everything outside the model (what callbacks
    added to the module, for example).
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = trained | adapter_parameters(model)
    return {name for name in names if not name.startswith(prefix) or name.removeprefix(prefix) in kept}


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
