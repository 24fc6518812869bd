"""Scores of steering paths, collected over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_interp.core.measure.reduced import KeyedRows
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.steering.effects.metrics import SCORES
from lightning_interp.steering.effects.path_scores import PathScores, check_path

__all__ = ["SteeringMetrics"]

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
