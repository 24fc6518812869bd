"""Everything about a model that must be as it was, in one comparable value."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from lightning_interp.core.hooks.generate_calls import MethodHook

__all__ = ["Snapshot", "snapshot", "without"]

Snapshot = dict[str, Any]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def snapshot(model: nn.Module) -> Snapshot:
    """Everything about a model and the process that an intervention must leave as it was, comparable with ``==``.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = snapshot(model)
        >>> handle = model.register_forward_hook(print)
        >>> snapshot(model) == before, handle.remove(), snapshot(model) == before
        (False, None, True)
    """
    modules = dict(model.named_modules())
    heard = {name: [k for k, v in m.__dict__.items() if isinstance(v, MethodHook)] for name, m in modules.items()}
    return {
        "hooks": {n: {kind: list(getattr(m, kind)) for kind in _HOOKS} | {"m": heard[n]} for n, m in modules.items()},
        "attributes": {n: (type(m), sorted(set(m.__dict__).difference(heard[n]))) for n, m in modules.items()},
        "training": {name: m.training for name, m in modules.items()},
        "weights": {name: _digest(tensor) for name, tensor in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def without(state: Snapshot, *names: str) -> Snapshot:
    """The rest of a snapshot."""
    return {name: value for name, value in state.items() if name not in names}


def _digest(tensor: Any) -> tuple[str, ...]:
    if not isinstance(tensor, torch.Tensor):
        return (repr(tensor),)
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), str(tuple(tensor.shape)), hashlib.sha256(data).hexdigest()
