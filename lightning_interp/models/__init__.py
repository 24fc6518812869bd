"""Language models from anywhere, text for training them, and the LightningModule that does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_interp.models.causal_lm import CausalLM
    from lightning_interp.models.data import TextDataModule
    from lightning_interp.models.gguf_files import convert_gguf
    from lightning_interp.models.lora import LoraSettings
    from lightning_interp.models.sources import LoadedModel, load_causal_lm
    from lightning_interp.models.tokenizers import check_same_tokenizer

__all__ = [
    "CausalLM",
    "LoadedModel",
    "LoraSettings",
    "TextDataModule",
    "check_same_tokenizer",
    "convert_gguf",
    "load_causal_lm",
]

_HOMES = {
    "CausalLM": "causal_lm",
    "LoadedModel": "sources",
    "LoraSettings": "lora",
    "TextDataModule": "data",
    "check_same_tokenizer": "tokenizers",
    "convert_gguf": "gguf_files",
    "load_causal_lm": "sources",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: loading a model needs no Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
