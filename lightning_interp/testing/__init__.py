"""What tests need, here and in projects that build on this package: tiny models, a tokenizer, marks, contracts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_interp.testing.contract import InterventionContract
    from lightning_interp.testing.contract_lightning import CallbackContract
    from lightning_interp.testing.marks import needs
    from lightning_interp.testing.tiny import (
        EXTRA_FAMILIES,
        FAMILIES,
        byte_tokenizer,
        tiny_config,
        tiny_model,
        tiny_pair,
    )

_MODULES = {
    "contract": ("InterventionContract",),
    "contract_lightning": ("CallbackContract",),
    "marks": ("needs",),
    "tiny": ("EXTRA_FAMILIES", "FAMILIES", "byte_tokenizer", "tiny_config", "tiny_model", "tiny_pair"),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "EXTRA_FAMILIES",
    "FAMILIES",
    "CallbackContract",
    "InterventionContract",
    "byte_tokenizer",
    "needs",
    "tiny_config",
    "tiny_model",
    "tiny_pair",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: marks need no torch, tiny models need transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
