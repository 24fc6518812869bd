"""Activation patching across models, as a contrast to weight grafting.

A patch replaces the *message*: at some positions and sites, the recipient's activations are overwritten with the
donor's from its own pass over the same prompt, whatever the donor did to get them. A graft changes the *mechanism*: the
recipient's own stream goes through the donor's weights there. Shown side by side on the same prompts they tell which
of the two a claim needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_interp.core.hooks.capture import ActivationCapture
from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Layers, Site, resolve_layers
from lightning_interp.core.tokens.pass_arguments import model_inputs
from lightning_interp.core.tokens.positions import Positions
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.weights.sources import WeightSource
from lightning_interp.errors import RecipeError
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan, Policy

__all__ = ["PATCH_SITES", "ActivationPatch", "PatchPlan", "patch_plans", "patched_logits"]

PATCH_SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True)
class PatchPlan:
    """At these positions, these activations come from the donor's own pass.

    Args:
        positions: Which tokens.
        sites: Site kinds: some of ``resid_pre``, ``resid_post``, ``attn_out``, ``mlp_out``.
        layers: See :class:`~lightning_interp.grafting.plan.GraftRule`.
        source: Name of the donor.

    Example:
        >>> from lightning_interp import Last
        >>> PatchPlan(Last(), layers="Q3").sites
        ('resid_post',)
    """

    positions: Positions
    sites: tuple[str, ...] = ("resid_post",)
    layers: Layers = "all"
    source: str = "donor"

    head: Policy = "recipient"
    final_norm: Policy = "recipient"

    def __post_init__(self) -> None:
        sites = tuple(self.sites)
        for site in sites:
            if site not in PATCH_SITES:
                raise RecipeError(f"PatchPlan cannot patch {site!r}; expected some of {', '.join(PATCH_SITES)}.")
        if self.head != "recipient" or self.final_norm != "recipient":
            raise RecipeError(
                f"PatchPlan(head={self.head!r}, final_norm={self.final_norm!r}) patches activations and leaves all "
                "weights the recipient's. Use a GraftPlan to change them."
            )
        object.__setattr__(self, "sites", sites)
        if not isinstance(self.layers, str | int):
            object.__setattr__(self, "layers", tuple(self.layers))

    def at(self, n_layers: int) -> list[Site]:
        """The sites of a model with ``n_layers`` blocks."""
        return [Site(kind, layer) for layer in sorted(resolve_layers(self.layers, n_layers)) for kind in self.sites]


class ActivationPatch(Intervention):
    """Overwrite activations with given ones at the tokens that a mask names.

    Args:
        values: New activations ``[B, T, d]`` by site.
        masks: Which tokens take them, bool ``[B, T]`` by site.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> site, model, ids = Site("resid_post", 3), tiny_model("llama"), torch.arange(4)[None]
        >>> everywhere = torch.ones(1, 4, dtype=torch.bool)
        >>> with ActivationPatch({site: torch.zeros(1, 4, 32)}, {site: everywhere}).attach(model):
        ...     model(ids).logits.abs().max().item()
        0.0
    """

    def __init__(self, values: Mapping[Site, torch.Tensor], masks: Mapping[Site, torch.Tensor]) -> None:
        self.values, self.masks = dict(values), dict(masks)

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """Where some activation is overwritten."""
        return list(self.values)

    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """``x`` ``[B, T, d]`` with the masked tokens replaced."""
        return torch.where(self.masks[site].to(x.device)[..., None], self.values[site].to(x), x)


@torch.no_grad()
def patched_logits(
    model_map: ModelMap,
    donors: Mapping[str, WeightSource],
    source: str,
    plans: Mapping[str, PatchPlan],
    ids: torch.Tensor,
    step: StepContext,
) -> dict[str, torch.Tensor]:
    """Last logits ``[n, V]`` of the recipient under each plan; that of an adapter is the model with it off."""
    if source not in donors:
        raise RecipeError(f"A patch takes activations from {source!r}, but the donors are {', '.join(donors)}.")
    inputs = model_inputs(model_map.model, ids, step.valid) | {"use_cache": False}
    sites = {name: plan.at(len(model_map)) for name, plan in plans.items()}
    capture = ActivationCapture(list(dict.fromkeys(site for chosen in sites.values() for site in chosen)))
    with Graft(dict(donors), GraftPlan.whole(source)).attach(model_map), capture.attach(model_map):
        model_map.model(**inputs)
    found = {}
    for name, plan in plans.items():
        mask = plan.positions.mask(step)
        patch = ActivationPatch({s: capture.activations[s] for s in sites[name]}, dict.fromkeys(sites[name], mask))
        with Graft(dict(donors), GraftPlan()).attach(model_map), patch.attach(model_map):
            found[name] = model_map.model(**inputs).logits[:, -1].float()
    return found


def patch_plans(
    positions: Mapping[str, Positions] | None = None,
    *,
    sites: Sequence[str] = ("resid_post",),
    ranges: Sequence[Any] = ("all", "Q1", "Q2", "Q3", "Q4"),
) -> dict[str, PatchPlan]:
    """E10: activation patches at the places of the standard grafts.

    Patching ``resid_post`` in *all* layers at a position leaves nothing of the recipient there but what its head and
    final norm do.

    Args:
        positions: By name; default ``FE``, ``LT`` and ``FE+LT``.
        sites: Which activations.
        ranges: Layer ranges, one plan each.

    Returns:
        ``patch <position> <range>``.

    Example:
        >>> list(patch_plans(ranges=["all"]))
        ['patch FE all', 'patch LT all', 'patch FE+LT all']
    """
    from lightning_interp.grafting.experiments import FE, LT

    places = dict(positions) if positions is not None else {"FE": FE, "LT": LT, "FE+LT": FE | LT}
    return {
        f"patch {name} {layers}": PatchPlan(where, tuple(sites), layers)
        for layers in ranges
        for name, where in places.items()
    }
