"""Tiny random models for tests; smoke runs load them too, so they are made in ``models/sources``."""

from __future__ import annotations

from lightning_interp.models.sources.tiny import (
    EXTRA_FAMILIES,
    FAMILIES,
    byte_tokenizer,
    tiny_config,
    tiny_model,
    tiny_pair,
)

__all__ = ["EXTRA_FAMILIES", "FAMILIES", "byte_tokenizer", "tiny_config", "tiny_model", "tiny_pair"]
