"""An addition at one site, and what tests of it share."""

from __future__ import annotations

import torch

from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.tokens.positions import All

IDS = torch.tensor([[5, 9, 14, 22, 31], [7, 50, 3, 12, 60]])
VECTOR = torch.linspace(-1, 1, 32)


class Add(Intervention):
    """x + v at some tokens of one site; v may be trained."""

    def __init__(self, site, vector=VECTOR, positions=All()):  # noqa: B008
        self.site, self.vector, self.positions = site, vector, positions

    def sites(self, model_map):
        return (self.site,)

    def transform(self, site, x, step):
        return torch.where(self.positions.mask(step)[..., None], x + self.vector.to(x), x)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
