"""Read activations without changing them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import Positions
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import PositionError, RecipeError

__all__ = ["ActivationCapture"]


class ActivationCapture(Intervention):
    """Keep what passes through some sites.

    Args:
        sites: Where to read.
        positions: Which tokens; None for all columns, padding included.
        keep: ``last`` forward pass only, or ``all`` of them (one entry a pass, so a generation gives one a token).
        device: Where copies go; None leaves them where they are.

    Attributes:
        activations: Site to ``[B, T, d]`` of the last pass, or ``[n, d]`` (row by row) with ``positions``.
        history: With ``keep="all"``, site to one such tensor a pass.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> capture, model = ActivationCapture([Site("resid_post", 1)]), tiny_model("gpt2")
        >>> with capture.attach(model):
        ...     _ = model(torch.arange(6).view(2, 3))
        >>> capture.activations[Site("resid_post", 1)].shape
        torch.Size([2, 3, 32])
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        positions: Positions | None = None,
        keep: str = "last",
        device: torch.device | str | None = None,
    ) -> None:
        if keep not in ("last", "all"):
            raise RecipeError(f"ActivationCapture(keep={keep!r}) is unknown; expected 'last' or 'all'.")
        if not sites:
            raise RecipeError("ActivationCapture(sites=[]) reads nothing; expected at least one Site.")
        self._sites = tuple(sites)
        self.positions = positions
        self.keep = keep
        self.device = device
        self.activations: dict[Site, torch.Tensor] = {}
        self.history: dict[Site, list[torch.Tensor]] = {}

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """The sites that were asked for."""
        return self._sites

    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """Copy ``x`` ``[B, T, d]`` and hand it on untouched."""
        if (self, site) in step.cache:  # gradient checkpointing runs a block again
            return x
        step.cache[self, site] = True
        if self.keep == "all" and step.rewound and step.generation is not None:
            raise PositionError(
                "ActivationCapture(keep='all') holds candidates for new tokens that were rejected again, so that its "
                "history is not the text's. Generate without an assistant or prompt lookup, or capture one pass."
            )
        kept = x.detach()
        if self.positions is not None:
            kept = kept[step.choose(self.positions, kept)]
        # A copy made outside of inference mode can be used in autograd later.
        with torch.inference_mode(False):
            copy = kept.clone() if self.device is None else kept.to(self.device, copy=True)
        self.activations[site] = copy
        if self.keep == "all":
            self.history.setdefault(site, []).append(copy)
        return x

    def clear(self) -> None:
        """Forget everything that was read."""
        self.activations.clear()
        self.history.clear()
