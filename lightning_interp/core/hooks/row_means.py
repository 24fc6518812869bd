"""Read a model over rows of tokens: at each site, the mean activation over the chosen tokens of each row."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.batches import packed, padded
from lightning_interp.core.tokens.positions import Last, Positions
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import PositionError

__all__ = ["row_means"]


def row_means(
    model: nn.Module | ModelMap,
    rows: Sequence[Sequence[int]],
    sites: Sequence[Site],
    *,
    texts: Sequence[str],
    tokenizer: Any = None,
    positions: Positions | None = None,
    token_budget: int = 4096,
) -> Iterator[tuple[list[int], dict[Site, Tensor]]]:
    """Read rows and give, for each batch, the mean activation over the chosen tokens of each.

    The model is used as it is (with whatever is attached to it), in evaluation mode, which is put back, and without
    gradients. Rows of like length share a batch.

    Args:
        model: The model.
        rows: Token ids, at least one a row.
        sites: Where to read.
        texts: The rows in words, for errors.
        tokenizer: For selectors that read text.
        positions: Which tokens; by default the last one.
        token_budget: Most tokens of a batch, padding counted.

    Yields:
        Numbers of the rows of a batch, and for each site float32 ``[rows, d]`` on the CPU.

    Raises:
        PositionError: If the selector chooses no token of a row.
    """
    model_map = model if isinstance(model, ModelMap) else ModelMap.build(model)
    reader = _Reader(sites, Last() if positions is None else positions)
    settings = _cheap(model_map, sites)
    device = next(model_map.model.parameters()).device
    with reader.attach(model_map, tokenizer=tokenizer), undisturbed(model_map.model):
        for numbers in packed([len(row) for row in rows], token_budget):
            ids, mask = padded([rows[i] for i in numbers])
            with torch.inference_mode():
                model_map.model(input_ids=ids.to(device), attention_mask=mask.to(device), **settings)
            yield numbers, reader.take(numbers, texts)


class _Reader(Intervention):
    """Mean over the chosen tokens of each row, and how many were chosen."""

    def __init__(self, sites: Sequence[Site], positions: Positions) -> None:
        self._sites, self.positions = tuple(sites), positions
        self._found: dict[Site, tuple[Tensor, Tensor]] = {}

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        return self._sites

    def transform(self, site: Site, x: Tensor, step: StepContext) -> Tensor:
        mask = step.choose(self.positions, x)
        count = mask.sum(dim=1)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~mask[..., None], 0.0)
        self._found[site] = (wide.sum(dim=1) / count.clamp_min(1)[:, None]).float().cpu(), count.cpu()
        return x

    def take(self, numbers: Sequence[int], texts: Sequence[str]) -> dict[Site, Tensor]:
        for _, count in self._found.values():
            if not bool(count.all()):
                number = numbers[int((count == 0).nonzero()[0])]
                raise PositionError(
                    f"{self.positions} chooses no token of text {number}: {texts[number]!r}. Choose other tokens, or "
                    "leave the text out."
                )
        found = {site: mean for site, (mean, _) in self._found.items()}
        self._found = {}
        return found


def _cheap(model_map: ModelMap, sites: Sequence[Site]) -> Mapping[str, Any]:
    """Arguments that spare what is not read: the cache, and the logits of all tokens but one."""
    known = inspect.signature(model_map.model.forward).parameters
    settings: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if "logits_to_keep" in known and not any(site.kind in ("unembed_in", "logits") for site in sites):
        settings["logits_to_keep"] = 1
    return settings
