"""Language models from anywhere, text for training them, and the LightningModule that does it."""

from __future__ import annotations

from lightning_interp.lazy_names import names_of_stub

__all__, __getattr__, __dir__ = names_of_stub(__name__, __file__)
