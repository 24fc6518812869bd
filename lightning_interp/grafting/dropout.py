"""Graft dropout: leave out a random share of the grafted layers at each position, to probe redundancy.

After Nief et al. 2025 (arXiv 2506.20746, redundancy probe). The draws depend on the seed and the position alone, so the
same plan gives the same graft in every run and in every batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.weights.cells import Cell
from lightning_interp.errors import RecipeError

__all__ = ["DRAWS", "GraftDropout"]

DRAWS = 64
"""Different draws of one plan; the token at position t gets draw ``t % DRAWS``."""


@dataclass(frozen=True)
class GraftDropout:
    """How much of a rule is left out, drawn anew for each position.

    Args:
        share: Share of the units that is dropped, in [0, 1].
        mode: ``count`` drops exactly ``int(share * n)`` of n units, ``random`` tosses a coin for each.
        unit: ``layer`` drops all components of a layer together, ``module`` each (component, layer) on its own.
        seed: Another seed, another draw. Average over several: one draw says little.

    Example:
        >>> half = GraftDropout(0.5, seed=1)
        >>> kept = half.keep({("q", 0), ("q", 1), ("o", 1), ("embed", None)}, draw=3)
        >>> ("embed", None) in kept, len({layer for _, layer in kept} - {None})
        (True, 1)
    """

    share: float
    mode: Literal["count", "random"] = "count"
    unit: Literal["layer", "module"] = "layer"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise RecipeError(f"GraftDropout(share={self.share}) is outside of [0, 1].")
        if self.mode not in ("count", "random") or self.unit not in ("layer", "module"):
            raise RecipeError(
                f"GraftDropout(mode={self.mode!r}, unit={self.unit!r}) is unknown; expected mode 'count' or 'random' "
                "and unit 'layer' or 'module'."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraftDropout:
        """Read plain data.

        Raises:
            RecipeError: If a key is unknown or missing.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise RecipeError(
                f"Cannot read graft dropout from {dict(data)}: {error}. Expected keys: share, mode, unit, seed."
            ) from error

    def keep(self, cells: Iterable[Cell], draw: int) -> set[Cell]:
        """What is left of some cells. Cells without a layer (embeddings, head) are never dropped.

        Args:
            cells: Components and layers that the rule grafts.
            draw: Which draw, 0 to ``DRAWS - 1``.

        Returns:
            A subset of ``cells``.
        """
        cells = set(cells)
        by_layer = self.unit == "layer"
        units = sorted({(layer, "" if by_layer else name) for name, layer in cells if layer is not None})
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "graft dropout", draw))
        if self.mode == "count":
            order = torch.randperm(len(units), generator=generator).tolist()
            gone = {units[i] for i in order[: int(self.share * len(units) + 1e-9)]}
        else:
            coins = torch.rand(len(units), generator=generator).tolist()
            gone = {unit for unit, coin in zip(units, coins, strict=True) if coin < self.share}
        return {(n, layer) for n, layer in cells if (layer, "" if by_layer else n) not in gone}
