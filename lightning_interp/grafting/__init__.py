"""Dynamic weight grafting: which weights, used at which token, retrieve a finetuned fact.

``plan`` says what is grafted (``experiments`` and ``grids`` make many of them), ``compiled_plan`` works plans out for a
model, ``intervention`` does it in one forward pass (weights come from ``core/weights/sources``), ``prompts`` finds
entities in a text, ``evaluate`` scores many plans at once (``prefixes`` and ``runner`` share what they have in common),
``patching`` is the contrast with activations, and ``callback`` watches while a model trains.
"""

from __future__ import annotations

from lightning_interp.lazy_names import names_of_stub

__all__, __getattr__, __dir__ = names_of_stub(__name__, __file__)
