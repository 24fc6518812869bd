"""Strengths of steering by their effect: a sweep in one pass a prompt, the choice, and its curve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_interp import ActivationCapture, Last, Site
from lightning_interp.core.measure.statistics import mean_interval
from lightning_interp.errors import RecipeError
from lightning_interp.figures import BLUE, GREY, ORANGE, band, in_house_style, label, panels, whiskers
from lightning_interp.steering import AddDirection, CounterfactualPairs, DualSteering
from lightning_interp.steering.effects.metrics import kl_divergence


def strength_effects(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    pairs: CounterfactualPairs,
    direction: Tensor,
    strengths: Sequence[float],
    *,
    method: Literal["dual", "add"] = "dual",
    layer: int = -1,
    advance: Callable[[int], object] = lambda n: None,
) -> list[dict[str, Any]]:
    """What each strength does to the next token of each prompt; all strengths of a prompt share one forward pass.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: One text each.
        pairs: The concept.
        direction: ``[d]``.
        strengths: KL budgets in nats (``dual``); or multiples of a tenth of the stream's length at the prompt's last
            token (``add``).
        method: Which steering.
        layer: Block after which ``add`` acts.
        advance: Called with the number of prompts just done.

    Returns:
        One row a prompt and strength: ``prompt``, ``strength``, ``target_prob``, ``pair_mass`` and ``kl`` to strength
        0.
    """
    rows, site = [], Site("resid_post", layer)
    for prompt in prompts:
        ids = tokenizer([prompt], return_tensors="pt").input_ids.to(model.device)
        amounts = torch.tensor(list(strengths), dtype=torch.float32)
        if method == "dual":
            steering: Any = DualSteering(direction, kl_budget=amounts)
        else:
            unit = direction / direction.norm()
            steering = AddDirection(unit, site=site, strength=amounts * _length(model, ids, site), positions=Last())
        with torch.no_grad():
            plain = model(ids).logits[0, -1].float().log_softmax(-1)
            with steering.attach(model):
                found = model(ids.repeat(len(amounts), 1)).logits[:, -1].float().log_softmax(-1)
        p = found.exp()
        columns = (pairs.target_prob(p), pairs.pair_mass(p), kl_divergence(plain.expand_as(found), found))
        rows += [
            {"prompt": prompt, "strength": s, "target_prob": float(w), "pair_mass": float(m), "kl": float(k)}
            for s, w, m, k in zip(strengths, *columns, strict=True)
        ]
        advance(1)
    return rows


def _length(model: Any, ids: Tensor, site: Site) -> float:
    capture = ActivationCapture([site], positions=Last())
    with torch.no_grad(), capture.attach(model):
        model(ids)
    return float(capture.activations[site].float().norm(dim=-1).mean()) / 10


def summarised(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over prompts by strength, with intervals.

    Args:
        rows: Of :func:`strength_effects`.

    Returns:
        One row a strength: ``strength``, and estimates of ``target_prob``, ``pair_mass`` and ``kl``.
    """
    strengths = sorted({float(row["strength"]) for row in rows})
    return [
        {"strength": s}
        | {
            name: mean_interval([float(row[name]) for row in rows if row["strength"] == s])
            for name in ("target_prob", "pair_mass", "kl")
        }
        for s in strengths
    ]


def chosen_strength(rows: Sequence[Mapping[str, Any]], wanted: float) -> float:
    """The strength at which the mean ``P(W=1)`` first rises to a value, by linear interpolation.

    Args:
        rows: Of :func:`strength_effects`.
        wanted: The value.

    Returns:
        The strength; the candidate with the nearest mean where none reaches it (see :func:`shortfall`).

    Raises:
        RecipeError: If there is no row.

    Example:
        >>> rows = [{"strength": s, "target_prob": p, "pair_mass": 1, "kl": s} for s, p in ((0.0, 0.2), (2.0, 0.6))]
        >>> round(chosen_strength(rows, 0.5), 6)
        1.5
    """
    if not rows:
        raise RecipeError("chosen_strength() got no rows; expected those of strength_effects().")
    curve = [(row["strength"], row["target_prob"].value) for row in summarised(rows)]
    for (s0, p0), (s1, p1) in pairwise(curve):
        if p0 < wanted <= p1:
            return float(s0 + (s1 - s0) * (wanted - p0) / (p1 - p0))
    return float(min(curve, key=lambda point: abs(point[1] - wanted))[0])


def shortfall(rows: Sequence[Mapping[str, Any]], strength: float, wanted: float) -> str:
    """What to say if the mean ``P(W=1)`` at a strength, interpolated between the candidates', is not the wanted one.

    Args:
        rows: Of :func:`strength_effects`.
        strength: Of :func:`chosen_strength`.
        wanted: The value that was aimed at.

    Returns:
        A sentence; empty where the value is reached.

    Example:
        >>> rows = [{"strength": s, "target_prob": p, "pair_mass": 1, "kl": s} for s, p in ((0.0, 0.2), (2.0, 0.6))]
        >>> shortfall(rows, 1.5, 0.5), shortfall(rows, 2.0, 0.9)[:23]
        ('', 'No strength from 0 to 2')
    """
    curve = [(row["strength"], row["target_prob"].value) for row in summarised(rows)]
    found = float(np.interp(strength, [s for s, _ in curve], [p for _, p in curve]))
    if abs(found - wanted) <= 1e-6:
        return ""
    return (
        f"No strength from {curve[0][0]:g} to {curve[-1][0]:g} brings the mean P(W=1) to {wanted:g}; the nearest "
        f"candidate, {strength:g}, gives {found:.3g}. Try larger strengths, or another concept, method or layer."
    )


@in_house_style
def calibration_figure(
    curve: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], wanted: float, *, across: str, title: str = ""
) -> Any:
    """Effect and damage against strength, with the choice on held-out prompts.

    Args:
        curve: Of :func:`summarised`, on validation prompts.
        chosen: The row of the chosen strength on test prompts.
        wanted: The value that was aimed at.
        across: Name of the strength.
        title: Above the panels.

    Returns:
        A matplotlib figure.
    """
    figure, axes = panels(3, size=(9.5, 3.6), title=f"{title}\n95 % intervals over prompts")
    names = {"target_prob": "P(W=1)", "kl": "KL to unsteered (nats)", "pair_mass": "mass of the pairs"}
    for axis, (name, up) in zip(axes, names.items(), strict=True):
        band(axis, [row["strength"] for row in curve], [row[name] for row in curve], BLUE, "validation")
        test = chosen[name]
        look = {"fmt": "D", "color": ORANGE, "capsize": 3, "label": "test"}
        axis.errorbar([chosen["strength"]], [test.value], yerr=whiskers([test]), **look)
        label(axis, across, up)
    axes[0].axhline(wanted, color=GREY, lw=0.8, ls="--")
    axes[0].legend()
    return figure
