"""Instruments for low-rank adapters: where one acts, what it does there, and many of them trained at once.

``gate`` lets an adapter act at chosen tokens, modules and layers alone, ``svd`` takes it apart by singular directions,
``trace`` shows what it does at each token, ``batched`` trains several of any rank in one pass over a frozen base, and
``sweep`` trains a grid of them. ``callback`` puts an adapter into anybody's LightningModule, or watches gates.
"""

from __future__ import annotations

from lightning_interp.lazy_names import names_of_stub

__all__, __getattr__, __dir__ = names_of_stub(__name__, __file__)
