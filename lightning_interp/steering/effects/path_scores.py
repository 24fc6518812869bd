"""Scores of steering paths, averaged over contexts: curves against the concept, and methods compared at equal effect.

Two methods may only be compared where they have moved the concept equally far. Curves bin the points of every path by
``P(W=1)``, as the figures of arXiv 2602.15293 do; :meth:`PathScores.compare` interpolates every path to the same
``P(W=1)``. Contexts are the unit of sampling everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.measure.reduced import KeyedRows
from lightning_interp.core.measure.statistics import Estimate, bootstrap_interval, mean_interval, ratio_interval
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.steering.effects.metrics import SCORES

__all__ = [
    "SATURATED",
    "Comparison",
    "Curve",
    "PathScores",
    "SteeringMetrics",
    "SteeringResult",
    "bin_path",
    "value_at_effect",
]

SATURATED = 0.9999
"""Points with ``P(W=1)`` at or above this are left out of curves: there every method collapses on one token."""


@dataclass(frozen=True)
class Curve:
    """One score of one method against ``P(W=1)``: of the unsteered states, then in each bin over the contexts there."""

    method: str
    score: str
    start: Estimate
    first: Estimate
    centres: tuple[float, ...]
    bins: tuple[Estimate, ...]

    def points(self) -> list[tuple[float, Estimate]]:
        """What is drawn: the unsteered point, then every bin that is not empty."""
        drawn = [(self.start.value, self.first), *zip(self.centres, self.bins, strict=True)]
        return [(x, estimate) for x, estimate in drawn if estimate.n > 0]


@dataclass(frozen=True)
class Comparison:
    """Two methods at the same ``P(W=1)`` over the contexts where both reach it: means, paired difference and ratio."""

    score: str
    at: float
    methods: tuple[str, str]
    first: Estimate
    second: Estimate
    difference: Estimate
    ratio: Estimate
    left_out: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        parts = {name: getattr(self, name).to_dict() for name in ("first", "second", "difference", "ratio")}
        return {"score": self.score, "at": self.at, "methods": list(self.methods), **parts, "left_out": self.left_out}


def bin_path(x: Tensor, y: Tensor, *, bins: int = 10, saturated: float = SATURATED) -> Tensor:
    """Average scores ``y`` of a path in equal bins of its ``P(W=1)``, ``x``, but for NaN and ``x >= saturated``."""
    if bins < 1:
        raise RecipeError(f"bin_path(bins={bins}): expected at least one bin.")
    x, y = x.double(), y.double()
    usable = (x < saturated) & ~y.isnan()
    place = (x * bins).long().clamp(0, bins - 1)
    rest = usable.clone()
    rest[:1] = False
    total = torch.zeros(bins, dtype=torch.float64).index_add(0, place[rest], y[rest])
    count = torch.zeros(bins, dtype=torch.float64).index_add(0, place[rest], torch.ones_like(y[rest]))
    first = torch.where(usable[:1], y[:1], torch.nan)
    return torch.cat([first, total / count])


def value_at_effect(x: Tensor, y: Tensor, at: float) -> float:
    """A score ``y`` at the first place of a path where ``P(W=1)``, ``x``, rises to ``at``, by linear interpolation."""
    x, y = x.double(), y.double()
    if len(x) == 0 or float(x[0]) >= at:
        return float(y[0]) if len(x) and float(x[0]) == at else math.nan
    rises = ((x[:-1] < at) & (x[1:] >= at)).nonzero()
    if len(rises) == 0:
        return math.nan
    i = int(rises[0, 0])
    share = (at - float(x[i])) / float(x[i + 1] - x[i])
    return float(y[i] + share * (y[i + 1] - y[i]))


class PathScores:
    """Scores of paths: one a method and context.

    Args:
        paths: Method to context to score name to ``[n]``; every path has ``target_prob``. Paths of different methods
            may have different lengths, and a method need not have every context.

    Raises:
        DataError: If there is no path, or one lacks ``target_prob`` or mixes lengths.

    Example:
        >>> path = {"target_prob": torch.tensor([0.1, 0.5, 0.9]), "off_target_kl": torch.tensor([0.0, 0.2, 0.6])}
        >>> worse = {**path, "off_target_kl": 2 * path["off_target_kl"]}
        >>> result = PathScores({"dual": {0: path, 1: path}, "euclidean": {0: worse, 1: worse}})
        >>> result.compare("euclidean", "dual", "off_target_kl", at=0.7).ratio.value
        2.0
    """

    def __init__(self, paths: Mapping[str, Mapping[int, Mapping[str, Tensor]]]) -> None:
        self.paths = {
            method: {int(c): {name: values.double() for name, values in path.items()} for c, path in contexts.items()}
            for method, contexts in paths.items()
        }
        if not any(self.paths.values()):
            raise DataError(f"PathScores got no path for any of the methods {list(self.paths)}.")
        for method, contexts in self.paths.items():
            for context, path in contexts.items():
                check_path(method, context, path)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in the order they were given."""
        return tuple(self.paths)

    @property
    def scores(self) -> tuple[str, ...]:
        """Scores that at least one path holds, in the order of ``SCORES``."""
        held = {name for contexts in self.paths.values() for path in contexts.values() for name in path}
        return (*(name for name in SCORES if name in held), *sorted(held - set(SCORES)))

    def curve(
        self, method: str, score: str, *, bins: int = 10, saturated: float = SATURATED, level: float = 0.95
    ) -> Curve:
        """One score of one method in bins of ``P(W=1)``, with intervals over contexts; see :func:`bin_path`.

        Raises:
            RecipeError: If the method or score is unknown.
        """
        paths = self._paths(method, score)
        table = torch.stack(
            [bin_path(path["target_prob"], path[score], bins=bins, saturated=saturated) for path in paths]
        )
        first, *rest = (mean_interval(_known(column), level=level) for column in table.T)
        start = mean_interval([float(path["target_prob"][0]) for path in paths], level=level)
        centres = tuple((i + 0.5) / bins for i in range(bins))
        return Curve(method, score, start, first, centres, tuple(rest))

    def at(self, method: str, score: str, target_prob: float, *, level: float = 0.95) -> Estimate:
        """Mean of a score where the paths reach a ``P(W=1)``, over the contexts that do.

        Raises:
            RecipeError: If the method or score is unknown, or ``target_prob`` is no probability.
        """
        return mean_interval([v for v in self._values_at(method, score, target_prob).values() if v == v], level=level)

    def compare(
        self, first: str, second: str, score: str, *, at: float, level: float = 0.95, seed: int = 0
    ) -> Comparison:
        """Two methods at equal effect, paired over the contexts where both reach it.

        Args:
            first: Name of a method.
            second: Name of another.
            score: What to compare.
            at: The ``P(W=1)`` that both paths are interpolated to.
            level: Confidence level of the intervals.
            seed: Of the bootstrap.

        Raises:
            RecipeError: If a method or score is unknown, or ``at`` is no probability.
        """
        ours, theirs = self._values_at(first, score, at), self._values_at(second, score, at)
        both = [c for c in ours if c in theirs and ours[c] == ours[c] and theirs[c] == theirs[c]]
        a, b = [ours[c] for c in both], [theirs[c] for c in both]
        gap = bootstrap_interval(lambda x, y: (x - y).mean(axis=-1), [a, b], level=level, seed=seed)
        mean_a, mean_b = (mean_interval(values, level=level, seed=seed) for values in (a, b))
        ratio = ratio_interval(a, b, level=level, seed=seed)
        left_out = len(ours.keys() | theirs.keys()) - len(both)
        return Comparison(score, at, (first, second), mean_a, mean_b, gap, ratio, left_out)

    def rows(self) -> list[dict[str, Any]]:
        """One plain row a point: method, context, point and its scores (None where one is not known)."""
        return [
            {"method": method, "context": context, "point": point}
            | {name: None if values[point].isnan() else float(values[point]) for name, values in path.items()}
            for method, contexts in self.paths.items()
            for context, path in sorted(contexts.items())
            for point in range(len(path["target_prob"]))
        ]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> PathScores:
        """Read what :meth:`rows` gave.

        Raises:
            DataError: If a row lacks a column.
        """
        found: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
        for row in rows:
            try:
                place = found.setdefault(str(row["method"]), {}).setdefault(int(row["context"]), {})
                point = int(row["point"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"A row is {str(row)[:80]}; expected method, context and point ({error}).") from error
            scores = {k: v for k, v in row.items() if k not in ("method", "context", "point")}
            place[point] = {k: math.nan if v in (None, "") else float(v) for k, v in scores.items()}
        return cls({m: {c: _columns(points) for c, points in contexts.items()} for m, contexts in found.items()})

    def table(
        self, scores: Sequence[str] = ("off_target_kl", "pair_mass", "rank_difference"), *, bins: int = 10
    ) -> list[dict[str, Any]]:
        """The curves as plain rows: method, score, ``P(W=1)``, value, low, high, n (contexts), level and interval."""
        return [
            {"method": method, "score": score, "target_prob": x, **_renamed(estimate)}
            for method in self.methods
            for score in scores
            for x, estimate in self.curve(method, score, bins=bins).points()
        ]

    def _paths(self, method: str, score: str) -> list[dict[str, Tensor]]:
        if method not in self.paths or score not in self.scores:
            raise RecipeError(
                f"There is no score {score!r} of method {method!r}. Methods: {', '.join(self.methods)}; scores: "
                f"{', '.join(self.scores)}."
            )
        return [path for path in self.paths[method].values() if score in path]

    def _values_at(self, method: str, score: str, at: float) -> dict[int, float]:
        if not 0 < at < 1:
            raise RecipeError(f"P(W=1) = {at} cannot be matched; expected a probability strictly between 0 and 1.")
        self._paths(method, score)
        held = {context: path for context, path in self.paths[method].items() if score in path}
        return {context: value_at_effect(path["target_prob"], path[score], at) for context, path in held.items()}


SteeringResult = PathScores
"""The name before: a result of steering is :class:`~lightning_interp.steering.softmax.request.SteerResult`."""


def _renamed(estimate: Estimate) -> dict[str, Any]:
    plain = estimate.to_dict()
    return {**{name: value for name, value in plain.items() if name != "method"}, "interval": plain["method"]}


def _known(column: Tensor) -> list[float]:
    values: list[float] = column[~column.isnan()].tolist()
    return values


def check_path(method: str, context: int, path: Mapping[str, Tensor]) -> None:
    """Refuse scores without ``target_prob`` ``[n]``, ``n >= 1``, or of another length."""
    where, shapes = f"The path of method {method!r} in context {context}", {k: list(v.shape) for k, v in path.items()}
    wanted = shapes.get("target_prob", [])
    if len(wanted) != 1 or not wanted[0]:
        held = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing"
        raise DataError(f"{where} has no target_prob [n], n >= 1, only {held}. Use the scores that score_path gives.")
    if wrong := [name for name, shape in shapes.items() if shape != wanted]:
        raise DataError(
            f"{where} has {wrong[0]} of shape {shapes[wrong[0]]} beside target_prob of {wanted}; expected [n] each."
        )


def _columns(points: Mapping[int, Mapping[str, float]]) -> dict[str, Tensor]:
    names = list(dict.fromkeys(name for scores in points.values() for name in scores))
    return {
        name: torch.tensor([points[i].get(name, math.nan) for i in sorted(points)], dtype=torch.float64)
        for name in names
    }


_PLACES = 3  # context, method, point


class SteeringMetrics(KeyedRows):
    """Collect scored paths of several methods; a context counts once for each method, whoever scored it.

    Give every process contexts of its own and call :meth:`update` for each; :meth:`compute` then gives the same result
    on every process, with the contexts of all.

    Args:
        methods: Names of the methods.

    Raises:
        RecipeError: If there is no method, or a name twice.

    Example:
        >>> metrics = SteeringMetrics(["dual"])
        >>> metrics.update(7, "dual", {"target_prob": torch.tensor([0.25, 0.75]), "entropy": torch.tensor([1.0, 2.0])})
        >>> metrics.compute().at("dual", "entropy", 0.5).value
        1.5
    """

    def __init__(self, methods: Sequence[str]) -> None:
        super().__init__(len(SCORES), keys=_PLACES)
        if not methods or len(set(methods)) != len(methods):
            raise RecipeError(f"SteeringMetrics(methods={list(methods)}): expected at least one name, each once.")
        self.methods = tuple(methods)

    def update(self, context: int, method: str, scores: Mapping[str, Tensor]) -> None:
        """Add the path of one context.

        Args:
            context: Which one; the same number on another process means the same context.
            method: One of the methods.
            scores: Name of ``SCORES`` to ``[n]``, as ``score_path`` gives them; missing names are not known.

        Raises:
            RecipeError: If the method is unknown.
            DataError: If a score is unknown or ``target_prob`` is missing, or their lengths differ.
        """
        if method not in self.methods:
            raise RecipeError(f"Unknown method {method!r}; this metric collects {', '.join(self.methods)}.")
        if strange := [name for name in scores if name not in SCORES]:
            raise DataError(
                f"The path of method {method!r} in context {context} has an unknown score {strange[0]!r}; expected "
                f"some of {', '.join(SCORES)}."
            )
        check_path(method, context, scores)
        n = len(scores["target_prob"])
        unknown = torch.full((n,), torch.nan, dtype=torch.float64)
        columns = [scores[name].detach().cpu().double() if name in scores else unknown for name in SCORES]
        place = torch.tensor([context, self.methods.index(method)]).expand(n, 2)
        self.add(torch.cat([place, torch.arange(n)[:, None]], dim=1), torch.stack(columns, dim=1))

    def compute(self) -> PathScores:
        """Return the paths of all contexts and processes.

        Raises:
            DataError: If nothing was added.
        """
        keys, rows = (found.cpu() for found in self.table())
        if not len(rows):
            raise DataError(f"SteeringMetrics({list(self.methods)}) has no path. Call update for every context first.")
        paths: dict[str, dict[int, dict[str, Tensor]]] = {method: {} for method in self.methods}
        for place in torch.unique_consecutive(keys[:, :2], dim=0):
            points = rows[(keys[:, :2] == place).all(1)]
            known = {name: column for name, column in zip(SCORES, points.T, strict=True) if not column.isnan().all()}
            context, method = place.tolist()
            paths[self.methods[method]][context] = {"target_prob": points[:, 0], **known}
        return PathScores({method: contexts for method, contexts in paths.items() if contexts})
