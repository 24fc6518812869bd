"""What tests need, here and in projects that build on this package: tiny models, a tokenizer, marks, contracts."""

from __future__ import annotations

from lightning_interp.lazy_names import names_of_stub

__all__, __getattr__, __dir__ = names_of_stub(__name__, __file__)
