"""Steering vectors distilled from carrier data: what a single added vector can take over from a teacher's numbers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import All, Positions
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import DataError, RecipeError

__all__ = ["DistilledVectors", "distilled_vectors"]


class DistilledVectors(NamedTuple):
    """What was trained: ``layers``, ``vectors`` ``[layers, d]``, and ``losses`` ``[steps, layers]`` in nats a token."""

    layers: tuple[int, ...]
    vectors: Tensor
    losses: Tensor


def distilled_vectors(
    model: nn.Module | ModelMap,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    layers: Sequence[int],
    lr: float = 0.01,
    positions: Positions | None = None,
) -> DistilledVectors:
    """Train a vector at each of some layers, with the model frozen, so that adding it makes the completions likelier.

    The vectors know nothing of each other: each has rows of its own in every batch, which it alone is added to. They
    begin at zero and are trained by Adam in units of the layer's median state (its norm over ``sqrt(d)``), a step a
    batch. The model is left as it was.

    Args:
        model: The model.
        batches: ``input_ids``, ``attention_mask`` and ``labels`` (-100 where nothing is scored), such as the loader
            of a ``NumberSequenceDataModule`` gives; chain it for more epochs.
        layers: Blocks whose output is added to.
        lr: Learning rate, in units of the state's median entry.
        positions: At which tokens; every real one by default.

    Returns:
        Vectors and losses.

    Raises:
        RecipeError: If there are no layers, or the learning rate is not above 0.
        DataError: If there are no batches, or one scores nothing.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> found = distilled_vectors(tiny_model("llama"), [batch] * 5, layers=[1, 2])
        >>> found.vectors.shape, bool((found.losses[-1] < found.losses[0]).all())
        (torch.Size([2, 32]), True)
    """
    if not layers or not (lr > 0 and math.isfinite(lr)):
        raise RecipeError(f"distilled_vectors(layers={list(layers)}, lr={lr}): expected layers, and a rate above 0.")
    model_map = model if isinstance(model, ModelMap) else ModelMap.build(model)
    weights = list(model_map.model.parameters())
    added, losses = _Added(layers, All() if positions is None else positions), list[Tensor]()
    optimizer: torch.optim.Optimizer | None = None
    with undisturbed(model_map.model, gradients=True), added.attach(model_map):
        for weight in weights:
            weight.requires_grad_(False)
        for batch in batches:
            found = _losses(model_map.model, batch, len(layers), weights[0].device)
            losses.append(found.detach().cpu())
            optimizer = optimizer or torch.optim.Adam(added.steps, lr=lr)
            for vector, gradient in zip(added.steps, torch.autograd.grad(found.sum(), added.steps), strict=True):
                vector.grad = gradient
            optimizer.step()
    if not losses:
        raise DataError("distilled_vectors got no batches, so there is nothing to learn from. Give at least one.")
    return DistilledVectors(tuple(layers), torch.stack([x.detach().cpu() for x in added.vectors]), torch.stack(losses))


class _Added(Intervention):
    """Adds a vector of its own to each part of a batch, at the part's layer."""

    def __init__(self, layers: Sequence[int], positions: Positions) -> None:
        self._sites, self.positions = [Site("resid_post", layer) for layer in layers], positions
        self._steps: dict[Site, Tensor] = {}
        self._units: dict[Site, float] = {}

    @property
    def steps(self) -> list[Tensor]:
        """What is trained: vectors in units of their layer."""
        return [self._steps[site] for site in self._sites]

    @property
    def vectors(self) -> list[Tensor]:
        """Float32 ``[d]`` each."""
        return [self._units[site] * self._steps[site] for site in self._sites]

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        return self._sites

    def transform(self, site: Site, x: Tensor, step: StepContext) -> Tensor:
        mask = step.choose(self.positions, x)
        if site not in self._units:
            self._units[site] = float(x.detach()[mask].float().norm(dim=-1).median()) / math.sqrt(x.shape[-1])
            self._steps[site] = torch.zeros(x.shape[-1], device=x.device, requires_grad=True)
        own = torch.zeros(len(self._sites), device=x.device)
        own[self._sites.index(site)] = self._units[site]
        rows = own.repeat_interleave(len(x) // len(own))[:, None] * mask
        return x + (rows[..., None] * self._steps[site]).to(x.dtype)


def _losses(model: nn.Module, batch: Mapping[str, Tensor], parts: int, device: torch.device) -> Tensor:
    """Mean loss of each part ``[parts]``, which all read the same rows."""
    ids, mask, labels = (batch[key].to(device) for key in ("input_ids", "attention_mask", "labels"))
    wanted = labels[:, 1:]
    scored = wanted != -100
    if not bool(scored.any()):
        raise DataError(f"A batch of {len(ids)} rows scores no token. Give rows with completions.")
    first = int(scored.any(0).int().argmax())  # the head is dear, and no column before it is needed
    kept = torch.arange(first, labels.shape[1], device=device)
    more = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=ids.repeat(parts, 1), attention_mask=mask.repeat(parts, 1), use_cache=False, **more).logits
    first = labels.shape[1] - logits.shape[1]
    chosen = logits[:, :-1].unflatten(0, (parts, -1))[:, scored[:, first:]].float()
    flat = F.cross_entropy(chosen.flatten(0, 1), wanted[scored].repeat(parts), reduction="none")
    return flat.view(parts, -1).mean(1)
