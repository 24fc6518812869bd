"""What steering does to a next-token distribution: how far the concept moves, and what else moves with it.

Definitions of arXiv 2602.15293, section 5 and appendix B. ``P0`` is the distribution before steering, ``P`` after;
``P^Z`` is what is left of a distribution when the concept is forgotten (``CounterfactualPairs.regroup``). All
divergences and entropies are in nats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.softmax.arithmetic import entropy
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry

__all__ = [
    "SCORES",
    "covering_tokens",
    "dual_alignment",
    "entropy",
    "kl_divergence",
    "off_target_kl",
    "rank_difference",
    "ranks",
    "score_distributions",
    "score_path",
]

SCORES = (
    "target_prob",
    "pair_mass",
    "off_target_kl",
    "rank_difference",
    "rank_difference_full",
    "total_kl",
    "entropy",
    "probe_value",
    "alignment",
    "hvps",
)
"""What :func:`score_path` measures at every point; ``rank_difference`` is on the reduced vocabulary."""


def kl_divergence(log_p: Tensor, log_q: Tensor, *, offset: float = 0.0) -> Tensor:
    """``KL(P || Q)`` in nats from log-probabilities, ``[..., V] -> [...]``.

    ``offset`` is added to both probabilities inside the logarithms, as the authors' code does with 1e-6; 0 is exact,
    and infinite where ``Q`` excludes what ``P`` allows.
    """
    if offset < 0:
        raise RecipeError(f"kl_divergence(offset={offset}): expected an offset >= 0.")
    p = log_p.exp()
    if offset > 0:
        return (p * ((p + offset).log() - (log_q.exp() + offset).log())).sum(-1)
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)  # what P excludes contributes nothing


def off_target_kl(log_p0: Tensor, log_p: Tensor, pairs: CounterfactualPairs, *, offset: float = 0.0) -> Tensor:
    """``KL(P^Z_0 || P^Z)`` from log-probabilities: how far all but the concept has moved, ``[..., V] -> [...]``."""
    return kl_divergence(pairs.log_regroup(log_p0), pairs.log_regroup(log_p), offset=offset)


def ranks(log_p: Tensor) -> Tensor:
    """Rank of every token, 1 for the most probable, ``[..., V] -> [..., V]``; equals share their best rank."""
    ordered = log_p.sort(-1).values.contiguous()
    not_larger = torch.searchsorted(ordered, log_p.contiguous(), right=True)
    return 1 + log_p.shape[-1] - not_larger


def rank_difference(log_z0: Tensor, log_z: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """Whether other tokens come up: ``sum_z P^Z_0(z) |1/rank(z) - 1/rank_0(z)|`` of ``log P^Z``, ``[..., Z] -> [...]``.

    ``keep``, bool ``[Z]``, says which tokens count: ranks are then among these, and ``P^Z_0`` is renormalised on them.
    """
    if keep is not None:
        if keep.shape != log_z.shape[-1:]:
            raise IncompatibleModelError(
                f"keep has the shape {list(keep.shape)} for {log_z.shape[-1]} tokens; expected a bool for each."
            )
        log_z0, log_z = log_z0[..., keep].log_softmax(-1), log_z[..., keep]
    moved = (1 / ranks(log_z).to(log_z) - 1 / ranks(log_z0).to(log_z)).abs()
    return (log_z0.exp() * moved).sum(-1)


def covering_tokens(log_z: Tensor, *, mass: float = 0.99) -> Tensor:
    """The paper's reduced vocabulary, bool ``[Z]``: what any point of ``[points, Z]`` needs to cover a mass.

    Each point's most probable tokens are taken until their sum reaches ``mass``.
    """
    if not 0 < mass <= 1:
        raise RecipeError(f"covering_tokens(mass={mass}): expected a probability above 0 and up to 1.")
    values, order = log_z.reshape(-1, log_z.shape[-1]).sort(-1, descending=True)
    before = values.double().exp().cumsum(-1) - values.double().exp()
    needed = before < mass - 1e-9  # a sum that is right but for rounding is enough
    marked = torch.zeros_like(needed).scatter(-1, order, needed)
    return marked.any(0)


def dual_alignment(phi: Tensor, beta: Tensor) -> Tensor:
    """Cosine of each step of a path of dual coordinates ``[n, d]`` and a direction, ``[n - 1]`` (figure 5)."""
    step = phi.diff(dim=0)
    cosine: Tensor = (step @ beta.to(step)) / (step.norm(dim=-1) * beta.to(step).norm())
    return cosine


def score_distributions(
    log_p0: Tensor, log_p: Tensor, pairs: CounterfactualPairs, *, offset: float = 0.0, keep: Tensor | None = None
) -> dict[str, Tensor]:
    """Everything that two distributions and the pairs tell.

    Args:
        log_p0: Log-probabilities before steering, ``[V]`` or ``[..., V]``.
        log_p: Log-probabilities after steering, ``[..., V]``.
        pairs: Of the concept.
        offset: See :func:`kl_divergence`.
        keep: Reduced vocabulary of ``rank_difference``, see there; None makes it the full one.

    Returns:
        ``target_prob``, ``pair_mass``, ``off_target_kl``, ``rank_difference``, ``rank_difference_full``, ``total_kl``
        and ``entropy``, each ``[...]``.

    Example:
        >>> pairs, log_p0 = CounterfactualPairs([(0, 1)]), torch.tensor([0.6, 0.2, 0.2]).log()
        >>> scores = score_distributions(log_p0, pairs.log_resplit(log_p0, 0.9), pairs)
        >>> {name: round(scores[name].item(), 4) + 0.0 for name in ("target_prob", "pair_mass", "rank_difference")}
        {'target_prob': 0.9, 'pair_mass': 0.8, 'rank_difference': 0.0}
    """
    log_z0, log_z = pairs.log_regroup(log_p0), pairs.log_regroup(log_p)
    full = rank_difference(log_z0, log_z)
    return {
        "target_prob": torch.sigmoid(pairs.target_logit(log_p)),
        "pair_mass": pairs.log_pair_mass(log_p).exp(),
        "off_target_kl": kl_divergence(log_z0, log_z, offset=offset),
        "rank_difference": full if keep is None else rank_difference(log_z0, log_z, keep=keep),
        "rank_difference_full": full,
        "total_kl": kl_divergence(log_p0, log_p),
        "entropy": entropy(log_p),
    }


@torch.no_grad()
def score_path(
    geometry: SoftmaxGeometry,
    path: Tensor,
    pairs: CounterfactualPairs,
    *,
    probe: Any = None,
    hvps: Tensor | None = None,
    offset: float = 0.0,
    mass: float = 0.99,
    points: int = 20,
) -> dict[str, Tensor]:
    """Score every point of a path of states against its first point, by the model's own distributions.

    Args:
        geometry: Of the model.
        path: States ``[n, d]``, the unsteered one first.
        pairs: Of the concept.
        probe: A direction ``[d]`` or a probe, for ``probe_value`` and ``alignment``; NaN without one.
        hvps: Hessian-vector products up to each point ``[n]``; NaN if not given.
        offset: See :func:`kl_divergence`.
        mass: See :func:`covering_tokens`.
        points: How many equally spaced points of the path define the reduced vocabulary.

    Returns:
        Name of ``SCORES`` to ``[n]``, on the CPU in float64. ``alignment`` is that of the step that leads to a point.

    Raises:
        IncompatibleModelError: If the path is no ``[n, d]`` of this model.

    Example:
        >>> geometry, beta = SoftmaxGeometry(torch.eye(3)), torch.tensor([-1.0, 1.0, 0.0])
        >>> path = torch.linspace(0, 4, 3)[:, None] * beta
        >>> scores = score_path(geometry, path, CounterfactualPairs([(0, 1)]), probe=beta)
        >>> [round(v, 2) for v in scores["target_prob"].tolist()], scores["off_target_kl"][0].item()
        ([0.5, 0.98, 1.0], 0.0)
    """
    if path.dim() != 2 or not len(path):
        raise IncompatibleModelError(f"score_path() got a path of shape {list(path.shape)}; expected [n, d], n >= 1.")
    geometry.check_state(path)
    log_p0 = geometry.model_log_probs(path[0])
    chosen = torch.linspace(0, len(path) - 1, min(points, len(path)), device=path.device).round().long()
    keep = torch.zeros_like(pairs.log_regroup(log_p0), dtype=torch.bool)
    for part in torch.split(path[chosen], geometry.max_rows):
        keep |= covering_tokens(pairs.log_regroup(geometry.model_log_probs(part)), mass=mass)
    scored = [
        score_distributions(log_p0, geometry.model_log_probs(part), pairs, offset=offset, keep=keep)
        for part in torch.split(path, geometry.max_rows)
    ]
    found = {name: torch.cat([part[name] for part in scored]) for name in scored[0]}
    found |= _probe_scores(geometry, path, getattr(probe, "direction", probe))
    found["hvps"] = torch.full_like(found["entropy"], torch.nan) if hvps is None else hvps
    return {name: found[name].detach().to("cpu", torch.float64) for name in SCORES}


def _probe_scores(geometry: SoftmaxGeometry, path: Tensor, beta: Tensor | None) -> dict[str, Tensor]:
    nothing = torch.full((len(path),), torch.nan, dtype=torch.float64, device=path.device)
    if beta is None:
        return {"probe_value": nothing, "alignment": nothing}
    geometry.check_state(beta)
    wide = path.to(torch.float64)
    found = {"probe_value": wide @ beta.to(wide), "alignment": nothing.clone()}
    if geometry.softcap is None or geometry.on_softcap == "ignore":
        found["alignment"][1:] = dual_alignment(geometry.dual(path).to(wide), beta)
    return found
