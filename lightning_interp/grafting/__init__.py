"""Dynamic weight grafting: which weights, used at which token, retrieve a finetuned fact.

``plan`` says what is grafted, ``intervention`` does it in one forward pass, ``locate`` finds entities in a text,
``evaluate`` scores many plans at once, and ``callback`` does so while a model trains.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_interp.grafting.callback import GraftCallback
    from lightning_interp.grafting.evaluate import GraftEvaluator, GraftPrompt, GraftResult
    from lightning_interp.grafting.experiments import paper_plans
    from lightning_interp.grafting.intervention import Graft
    from lightning_interp.grafting.locate import locate_entity
    from lightning_interp.grafting.plan import GROUPS, GraftPlan, GraftRule

__all__ = [
    "GROUPS",
    "Graft",
    "GraftCallback",
    "GraftEvaluator",
    "GraftPlan",
    "GraftPrompt",
    "GraftResult",
    "GraftRule",
    "locate_entity",
    "paper_plans",
]

_HOME = {
    "GROUPS": "plan",
    "Graft": "intervention",
    "GraftCallback": "callback",
    "GraftEvaluator": "evaluate",
    "GraftPlan": "plan",
    "GraftPrompt": "evaluate",
    "GraftResult": "evaluate",
    "GraftRule": "plan",
    "locate_entity": "locate",
    "paper_plans": "experiments",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
