"""One place of a decoder may have several names: the output of a block is the input of the next one."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.errors import SiteError

__all__ = ["check_distinct", "place_of"]

_BEFORE = {
    "attn_in": ("input_layernorm", "ln_1", "norm_1", "ln_attn", "attention_norm", "attention_layernorm"),
    "mlp_in": ("ln_2", "norm_2", "ln_mlp", "ffn_norm", "feedforward_layernorm", "pre_feedforward_layernorm",
               "pre_ff_layernorm", "pre_mlp_layernorm"),
}  # fmt: skip
"""Norms whose output a sub-layer reads as it is."""


def check_distinct(model_map: ModelMap, sites: Iterable[Site], *, what: str) -> None:
    """Refuse two names of one place: what acts there would act twice. ``what`` names the intervention."""
    seen: dict[tuple[str, bool], Site] = {}
    for site in sites:
        first = seen.setdefault(place_of(model_map, site), site)
        if first is not site:
            raise SiteError(
                f"{what} names one place of {type(model_map.model).__name__} twice, as {first} and as {site}; keep one."
            )


def place_of(model_map: ModelMap, site: Site) -> tuple[str, bool]:
    """Path of a module and whether its input is meant: the same for all names of one place."""
    point = model_map.module(site)
    here = (point.path, point.is_input)
    layer = None if site.layer is None else model_map.layer(site.layer)
    if site.kind == "resid_pre" and layer:
        return place_of(model_map, Site("resid_post", layer - 1))
    if site.kind == "resid_pre" and "embed" in model_map.shared and "pos_embed" not in model_map.shared:
        return place_of(model_map, Site("linear:embed"))
    if site.kind == "unembed_in" and model_map.final_norm is not None:
        return place_of(model_map, Site("final_norm"))
    if layer is None or site.kind not in ("attn_in", "mlp_in", "attn_out", "mlp_out"):
        return here
    part, end = site.kind.split("_")
    name = f"ln_{part}" if end == "in" else {"attn": "o", "mlp": "down"}[part]
    found = [p for p in model_map.components[layer].get(name, ()) if p.columns is None]
    if end == "in":
        found = [p for p in found if p.path.rpartition(".")[2] in _BEFORE[site.kind]]
    else:  # not behind a norm that follows the sub-layer
        found = [p for p in found if p.path.startswith(f"{point.path}.")]
    return (found[0].path, False) if len(found) == 1 else here
