"""How many tokens were steered, and how far: sums over a stage, the same on every process."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_interp.core.measure.reduced import Sums
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.step import StepContext

__all__ = ["MEASURES", "SteeringMeter"]

MEASURES = ("share", "shift")


class SteeringMeter(Sums):
    """Share of real tokens whose activation changed, and how far the changed ones moved relative to their length.

    Put ``update`` into ``steering.observe``. Each site counts by itself, so with several sites the share is the mean
    over them.

    Example:
        >>> meter, x = SteeringMeter(), torch.ones(1, 2, 4)
        >>> meter.update(Site("resid_post", 0), x, x * torch.tensor([[[1.0], [3.0]]]), StepContext(1, 2))
        >>> meter.compute()
        {'share': 0.5, 'shift': 2.0}
    """

    def __init__(self) -> None:
        super().__init__("tokens", "changed", "moved")

    def update(self, site: Site, x: Tensor, new: Tensor, step: StepContext) -> None:
        """Count the tokens of one site in one pass; a replay by gradient checkpointing does not count again."""
        if (id(self), site) in step.cache:
            return
        step.cache[id(self), site] = True
        valid = step.fit(step.valid, x.shape[1]).to(x.device)
        moved = (new != x).any(dim=-1) & valid
        before = x.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        relative = ((new.float() - x.float()).norm(dim=-1) / before).masked_fill(~moved, 0.0)
        self.add(torch.stack([valid.sum(), moved.sum(), relative.double().sum()]))

    def compute(self) -> dict[str, float]:
        """The measures so far, over all processes, 0 where nothing was steered; every process must call it."""
        tokens, changed, moved = self.totals()
        return {"share": changed / tokens if tokens else 0.0, "shift": moved / changed if changed else 0.0}
