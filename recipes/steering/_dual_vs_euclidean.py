"""Hidden states of a concept, and scored paths from them in both geometries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_interp import ActivationCapture, Site
from lightning_interp.errors import RecipeError
from lightning_interp.steering import (
    CounterfactualPairs,
    PathScores,
    SoftmaxGeometry,
    SolverOptions,
    dual_steer,
    euclidean_steer,
    score_distributions,
    score_path,
)


def sides_of_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    pairs: CounterfactualPairs,
    geometry: SoftmaxGeometry,
    *,
    top: int,
    mass: float,
    length: int = 128,
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[Tensor, Tensor, int]:
    """States at which the model predicts the concept's base side, and those at which it predicts the target side.

    A state is chosen if its ``top`` likeliest tokens are all of one side and hold more than ``mass`` together (the
    rule of arXiv 2602.15293, appendix B.1, with ``top=3`` and ``mass=0.7``).

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: Where to look; every token of every text is a context.
        pairs: The concept.
        geometry: Of the model's head.
        top: See above.
        mass: See above.
        length: Tokens of a text that are read.
        advance: Called with the number of texts just read.

    Returns:
        Base states ``[n0, d]``, target states ``[n1, d]``, and how many contexts were looked at.
    """
    capture, head = ActivationCapture([Site("unembed_in")]), Site("unembed_in")
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    seen = 0
    with capture.attach(model), torch.no_grad():
        for text in texts:
            ids = tokenizer([text], return_tensors="pt", truncation=True, max_length=length).input_ids.to(model.device)
            model(input_ids=ids, use_cache=False)
            states = capture.activations[head][0].float().cpu()
            labels = pairs.classify(geometry.log_probs(states), top_k=top, min_mass=mass)
            for label, side in enumerate(sides):
                side.append(states[labels == label])
            seen += len(states)
            advance(1)
    return torch.cat(sides[0]), torch.cat(sides[1]), seen


def steered_paths(
    geometry: SoftmaxGeometry,
    pairs: CounterfactualPairs,
    starts: Tensor,
    probes: Mapping[str, Any],
    grid: Sequence[float],
    *,
    alpha: float | Literal["auto"],
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[PathScores, dict[str, float]]:
    """Score dual and Euclidean paths from some states to a grid of ``P(W=1)``, and the oracle that re-splits pairs.

    Each point is solved for directly; a point that cannot be reached is left out of its path.

    Args:
        geometry: Of the head.
        pairs: The concept.
        starts: Base states ``[n, d]``.
        probes: By name.
        grid: Values of ``P(W=1)``, ascending.
        alpha: Regularisation of dual steering.
        advance: Called with the number of grid points just solved.

    Returns:
        Scored paths of ``dual <probe>``, ``euclidean <probe>`` and ``oracle``, one a context; and by method the share
        of points that were reached.

    Raises:
        RecipeError: If there is no start.
    """
    if not len(starts):
        raise RecipeError("steered_paths() got no state to start from; expected at least one.")
    options, found, shares = SolverOptions(target_rtol=5e-3), {}, {}
    for name, probe in probes.items():
        for method in ("dual", "euclidean"):
            points = []
            for wanted in grid:
                target: dict[str, Any] = {"target_prob": wanted, "pairs": pairs}
                points.append(
                    dual_steer(geometry, starts, probe, alpha=alpha, options=options, **target)
                    if method == "dual"
                    else euclidean_steer(geometry, starts, probe, **target)
                )
                advance(1)
            key = f"{method} {name}"
            shares[key] = float(torch.stack([point.reached for point in points]).float().mean())
            found[key] = {
                row: _scored(geometry, pairs, starts[row], [p for p in points if bool(p.reached[row])], row, probe)
                for row in range(len(starts))
            }
    found["oracle"] = {row: _oracle(geometry, pairs, starts[row], grid) for row in range(len(starts))}
    return PathScores(found), shares


def _scored(
    geometry: SoftmaxGeometry, pairs: CounterfactualPairs, start: Tensor, points: Sequence[Any], row: int, probe: Any
) -> dict[str, Tensor]:
    states = torch.stack([start, *(point.lam[row].to(start) for point in points)])
    hvps = torch.tensor([0.0, *(float(point.hvps[row]) for point in points)])
    return score_path(geometry, states, pairs, probe=probe, hvps=hvps)


def _oracle(
    geometry: SoftmaxGeometry, pairs: CounterfactualPairs, start: Tensor, grid: Sequence[float]
) -> dict[str, Tensor]:
    """The bound of every method that only sees the output: pairs re-split, everything else untouched."""
    log_p0 = geometry.log_probs(start)
    made = pairs.log_resplit(log_p0.expand(len(grid), -1), torch.tensor(grid))
    scores = score_distributions(log_p0, torch.cat([log_p0[None], made]), pairs)
    kept = {
        name: scores[name].double().clamp_min(0) for name in ("target_prob", "pair_mass", "off_target_kl", "total_kl")
    }
    return kept | {"rank_difference": torch.zeros(len(made) + 1, dtype=torch.float64)}
