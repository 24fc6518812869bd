"""Figures of steering results, in the shape of those of arXiv 2602.15293 (figures 4, 8 to 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_interp.figures import COLOURS, band, in_house_style, label, legend_below, panels
from lightning_interp.steering.effects.path_scores import SATURATED, Curve, PathScores

__all__ = ["path_figure", "steering_figure"]

LABELS = {
    "target_prob": "P(W=1)",
    "pair_mass": "mass of the pairs",
    "off_target_kl": "off-target KL (nats)",
    "rank_difference": "rank difference",
    "rank_difference_full": "rank difference (full vocabulary)",
    "total_kl": "KL(P0 || P) (nats)",
    "entropy": "entropy (nats)",
    "probe_value": "probe value",
    "alignment": "cosine of dual step and probe",
    "hvps": "Hessian-vector products",
}
"""Names of scores on axes."""

_SIGNED = ("probe_value", "alignment")
_PANELS = ("off_target_kl", "pair_mass", "rank_difference")
_MARKERS = "osD^vP"


@in_house_style
def steering_figure(
    result: PathScores,
    *,
    scores: Sequence[str] = _PANELS,
    methods: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    bins: int = 10,
    title: str = "",
) -> Any:
    """A figure of side effects against ``P(W=1)``: one panel a score, one line a method, bands over contexts.

    The open marker is the unsteered state; the other points are means in equal bins of ``P(W=1)``.

    Args:
        result: Scored paths.
        scores: One panel each; the paper's three by default.
        methods: One line each; all by default.
        names: What to call methods in the legend.
        bins: Bins of ``P(W=1)``.
        title: Above the panels.
    """
    shown = list(methods) if methods is not None else list(result.methods)
    title = f"{title}\n{_counted(result, shown)}; bands: 95 % intervals over contexts"
    figure, axes = panels(len(scores), size=(3.7 * len(scores) + 0.3, 4.0), title=title)
    for axis, score in zip(axes, scores, strict=True):
        for m, method in enumerate(shown):
            _line(axis, result.curve(method, score, bins=bins), m, (names or {}).get(method, method))
        axis.set_xlim(-0.02, 1.02)
        if score not in _SIGNED:
            top = 1.05 if score == "pair_mass" else axis.get_ylim()[1]
            axis.set_ylim(-0.02 * top, top)  # a line at 0 stays whole
        label(axis, LABELS["target_prob"], LABELS.get(score, score))
    legend_below(figure, min(4, len(shown)))
    return figure


@in_house_style
def path_figure(
    result: PathScores,
    *,
    score: str = "off_target_kl",
    against: str = "target_prob",
    methods: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    title: str = "",
) -> Any:
    """A figure of every path: one score against another, one panel a method, one line a context.

    Points of saturated ``P(W=1)`` are left out; a dot marks each start.

    Args:
        result: Scored paths.
        score: Upwards.
        against: Sideways.
        methods: One panel each; all by default.
        names: What to call methods.
        title: Above the panels.

    Raises:
        RecipeError: If a method or score is unknown.
    """
    shown = list(methods) if methods is not None else list(result.methods)
    title = f"{title}\n{_counted(result, shown)}, one line each"
    figure, axes = panels(len(shown), size=(3.7 * len(shown) + 0.3, 3.6), title=title, sharex=True, sharey=True)
    for m, (axis, method) in enumerate(zip(axes, shown, strict=True)):
        for wanted in (score, against):
            result.curve(method, wanted)  # says which scores exist
        colour = COLOURS[m % len(COLOURS)]
        for path in result.paths[method].values():
            keep = path["target_prob"] < SATURATED
            x, y = path[against][keep].tolist(), path[score][keep].tolist()
            axis.plot(x, y, color=colour, alpha=0.45, lw=0.9)
            axis.plot(x[:1], y[:1], "o", ms=3, color=colour)
        up = LABELS.get(score, score) if m == 0 else ""
        label(axis, LABELS.get(against, against), up, title=(names or {}).get(method, method))
    return figure


def _line(axis: Any, curve: Curve, index: int, name: str) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], _MARKERS[index % len(_MARKERS)]
    points = curve.points()
    band(axis, [p for p, _ in points], [e for _, e in points], colour, name, marker=marker)
    if points and curve.first.n > 0:
        axis.plot([points[0][0]], [points[0][1].value], marker=marker, ms=6, mfc="white", color=colour)


def _counted(result: PathScores, methods: Sequence[str]) -> str:
    counts = sorted({len(result.paths[method]) for method in methods if method in result.paths})
    if not counts:
        return "no contexts"
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{many} {'context' if counts == [1] else 'contexts'}"
