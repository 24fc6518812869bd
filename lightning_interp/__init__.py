"""Ask what finetuning did to a language model: parts that plug into any PyTorch Lightning project.

The names below are imported when they are first used, so that ``import lightning_interp`` costs nothing; the rest
of the package is found under ``core`` (where, which tokens, hooks), ``models``, and one sub-package a method.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_interp.core.callback import InterventionCallback
    from lightning_interp.core.capture import ActivationCapture
    from lightning_interp.core.capture_callback import CaptureCallback
    from lightning_interp.core.intervention import Attachment, Compose, Intervention
    from lightning_interp.core.manifest import RunManifest
    from lightning_interp.core.model_map import ModelMap
    from lightning_interp.core.positions import (
        All,
        ChatTemplate,
        FromBatch,
        Generated,
        GenerationSteps,
        Last,
        Positions,
        Prompt,
        Span,
        StepContext,
        Substring,
        Tokens,
    )
    from lightning_interp.core.sites import Site
    from lightning_interp.grafting import (
        Graft,
        GraftCallback,
        GraftEvaluator,
        GraftPlan,
        GraftPrompt,
        GraftRule,
        locate_entity,
        paper_plans,
    )
    from lightning_interp.models import CausalLM, LoraSettings, RewardModel, TextDataModule, load_causal_lm
    from lightning_interp.rate import RewardAttributeEffect
    from lightning_interp.recipe import Recipe, RecipeResult
    from lightning_interp.steering import (
        AddDirection,
        CounterfactualPairs,
        DualSteering,
        DualSteeringCallback,
        SteeringCallback,
        SteeringVector,
    )

__version__ = "0.1.0"

_MODULES = {
    "core.callback": ("InterventionCallback",),
    "core.capture": ("ActivationCapture",),
    "core.capture_callback": ("CaptureCallback",),
    "core.intervention": ("Attachment", "Compose", "Intervention"),
    "core.manifest": ("RunManifest",),
    "core.model_map": ("ModelMap",),
    "core.positions": (
        "All",
        "ChatTemplate",
        "FromBatch",
        "Generated",
        "GenerationSteps",
        "Last",
        "Positions",
        "Prompt",
        "Span",
        "StepContext",
        "Substring",
        "Tokens",
    ),
    "core.sites": ("Site",),
    "grafting": (
        "Graft",
        "GraftCallback",
        "GraftEvaluator",
        "GraftPlan",
        "GraftPrompt",
        "GraftRule",
        "locate_entity",
        "paper_plans",
    ),
    "models": ("CausalLM", "LoraSettings", "RewardModel", "TextDataModule", "load_causal_lm"),
    "rate": ("RewardAttributeEffect",),
    "recipe": ("Recipe", "RecipeResult"),
    "steering": (
        "AddDirection",
        "CounterfactualPairs",
        "DualSteering",
        "DualSteeringCallback",
        "SteeringCallback",
        "SteeringVector",
    ),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "ActivationCapture",
    "AddDirection",
    "All",
    "Attachment",
    "CaptureCallback",
    "CausalLM",
    "ChatTemplate",
    "Compose",
    "CounterfactualPairs",
    "DualSteering",
    "DualSteeringCallback",
    "FromBatch",
    "Generated",
    "GenerationSteps",
    "Graft",
    "GraftCallback",
    "GraftEvaluator",
    "GraftPlan",
    "GraftPrompt",
    "GraftRule",
    "Intervention",
    "InterventionCallback",
    "Last",
    "LoraSettings",
    "ModelMap",
    "Positions",
    "Prompt",
    "Recipe",
    "RecipeResult",
    "RewardAttributeEffect",
    "RewardModel",
    "RunManifest",
    "Site",
    "Span",
    "SteeringCallback",
    "SteeringVector",
    "StepContext",
    "Substring",
    "TextDataModule",
    "Tokens",
    "__version__",
    "load_causal_lm",
    "locate_entity",
    "paper_plans",
]


def __getattr__(name: str) -> Any:
    """Import the module that a public name lives in, when the name is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names for completion: what is loaded and what is imported on use."""
    return sorted({*globals(), *__all__})
