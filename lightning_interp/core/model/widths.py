"""How wide the activation at a site is, as far as the model's structure tells."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_interp.core.model.components import own_map
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.errors import IncompatibleModelError

__all__ = ["check_width", "site_width"]


def site_width(model_map: ModelMap, site: Site) -> int | None:
    """Width of the activation at a site; None where only a forward pass tells."""
    point = model_map.module(site)
    if point.is_input and site.kind == "unembed_in":
        return _sizes(point.module)[0]
    if site.kind == "logits" or site.component is not None:
        return _sizes(point.module)[1]
    config: Any = model_map.model.config
    width = getattr(config.get_text_config(), "hidden_size", None)
    return None if width is None else int(width)


def check_width(model_map: ModelMap, site: Site, width: int, *, what: str) -> None:
    """Refuse something of another width than the site's."""
    found = site_width(model_map, site)
    if found not in (None, width):
        raise IncompatibleModelError(
            f"{what} has width {width}, but {site} of {type(model_map.model).__name__} has width {found}. Use a "
            "direction of this model and site."
        )


def _sizes(module: nn.Module) -> tuple[int | None, int | None]:
    """Inputs and outputs of a linear map or table, adapters looked through."""
    base: Any = own_map(module) or module
    if isinstance(base, nn.Embedding):
        return None, base.embedding_dim
    if hasattr(base, "nf"):  # transformers' Conv1D
        return int(base.weight.shape[0]), int(base.nf)
    if (weight := getattr(base, "weight", None)) is not None and weight.dim() == 1:  # a norm
        return len(weight), len(weight)
    return getattr(base, "in_features", None), getattr(base, "out_features", None)
