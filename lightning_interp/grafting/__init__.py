"""Dynamic weight grafting: which weights, used at which token, retrieve a finetuned fact.

``plan`` says what is grafted (``experiments`` and ``grids`` make many of them), ``schedule`` works plans out for a
model, ``intervention`` does it in one forward pass, ``donors``, ``adapters`` and ``streamed`` are where weights come
from, ``locate`` finds entities in a text, ``evaluate`` scores many plans at once (``prefixes`` and ``runner`` share
what they have in common), ``patching`` is the contrast with activations, and ``callback`` watches while a model trains.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_interp.grafting.adapters import AdapterDonor
    from lightning_interp.grafting.callback import GraftCallback
    from lightning_interp.grafting.donors import ModelDonor
    from lightning_interp.grafting.dropout import GraftDropout
    from lightning_interp.grafting.evaluate import GraftEvaluator
    from lightning_interp.grafting.experiments import (
        EXPERIMENTS,
        carrier_plans,
        component_plans,
        dropout_plans,
        head_plans,
        hybrid_plans,
        layer_plans,
        paper_plans,
        reverse_plans,
        static_plans,
    )
    from lightning_interp.grafting.grids import GraftGrid, component_grid, layer_grid
    from lightning_interp.grafting.intervention import Graft
    from lightning_interp.grafting.locate import locate_entity
    from lightning_interp.grafting.patching import ActivationPatch, PatchPlan, patch_plans
    from lightning_interp.grafting.plan import GROUPS, GraftPlan, GraftRule
    from lightning_interp.grafting.prompts import GraftPrompt
    from lightning_interp.grafting.result import GraftResult
    from lightning_interp.grafting.streamed import CheckpointDonor

_HOME = {
    "ActivationPatch": "patching",
    "AdapterDonor": "adapters",
    "CheckpointDonor": "streamed",
    "EXPERIMENTS": "experiments",
    "GROUPS": "plan",
    "Graft": "intervention",
    "GraftCallback": "callback",
    "GraftDropout": "dropout",
    "GraftEvaluator": "evaluate",
    "GraftGrid": "grids",
    "GraftPlan": "plan",
    "GraftPrompt": "prompts",
    "GraftResult": "result",
    "GraftRule": "plan",
    "ModelDonor": "donors",
    "PatchPlan": "patching",
    "carrier_plans": "experiments",
    "component_grid": "grids",
    "component_plans": "experiments",
    "dropout_plans": "experiments",
    "head_plans": "experiments",
    "hybrid_plans": "experiments",
    "layer_grid": "grids",
    "layer_plans": "experiments",
    "locate_entity": "locate",
    "paper_plans": "experiments",
    "patch_plans": "patching",
    "reverse_plans": "experiments",
    "static_plans": "experiments",
}

__all__ = [
    "EXPERIMENTS",
    "GROUPS",
    "ActivationPatch",
    "AdapterDonor",
    "CheckpointDonor",
    "Graft",
    "GraftCallback",
    "GraftDropout",
    "GraftEvaluator",
    "GraftGrid",
    "GraftPlan",
    "GraftPrompt",
    "GraftResult",
    "GraftRule",
    "ModelDonor",
    "PatchPlan",
    "carrier_plans",
    "component_grid",
    "component_plans",
    "dropout_plans",
    "head_plans",
    "hybrid_plans",
    "layer_grid",
    "layer_plans",
    "locate_entity",
    "paper_plans",
    "patch_plans",
    "reverse_plans",
    "static_plans",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
