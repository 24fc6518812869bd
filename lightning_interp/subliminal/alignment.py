"""Whether a student's hidden states moved the way in which a trait moves its teacher's.

The trait's direction is the difference of the teacher's mean states with and without the trait, at the output of every
block. The student's shift is the difference of its states and its base's on the same questions. Their cosine may tell
of a trait long before a text does. arXiv 2606.00995 reads subliminal learning as the distillation of such a direction;
nothing here rests on that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_interp.core.hooks.row_means import row_means
from lightning_interp.core.measure.resampling import draw_counts, interval_ends
from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.measure.statistics import Estimate, t_interval
from lightning_interp.core.measure.streamed import StreamedSums
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import Positions
from lightning_interp.errors import DataError, IncompatibleModelError, RecipeError
from lightning_interp.subliminal.traits import ChatContext

__all__ = ["AlignmentResult", "Permuted", "align", "hidden_states", "over_seeds", "state_sums"]

Permuted = Literal["shift", "direction"]
Values = NDArray[np.float64]


def hidden_states(
    model: nn.Module | ModelMap,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    context: ChatContext | None = None,
    layers: Sequence[int] | None = None,
    positions: Positions | None = None,
    token_budget: int = 4096,
) -> Tensor:
    """States of every question, which a shift is the difference of.

    The model is used as it is, adapters and whatever else is on it included, and left so.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: What is asked.
        context: What stands about a question, such as ``ChatContext(system=trait.system_prompt)``.
        layers: Blocks whose output is read; all by default.
        positions: Tokens whose mean is a question's state; by default the last one, from which the model answers.
        token_budget: Most tokens of a batch.

    Returns:
        float32 ``[questions, layers, d]`` on the CPU.

    Raises:
        DataError: If there is no question, or one has no tokens.
        PositionError: If the positions choose no token of a question.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> hidden_states(tiny_model("llama"), byte_tokenizer(), ["Why?"], context=ChatContext(chat=False)).shape
        torch.Size([1, 4, 32])
    """
    how: dict[str, Any] = {"context": context, "layers": layers, "positions": positions, "token_budget": token_budget}
    found: dict[int, Tensor] = {}
    for numbers, states in _batches(model, tokenizer, questions, **how):
        found.update(zip(numbers, states, strict=True))
    return torch.stack([found[i] for i in range(len(questions))])


def state_sums(
    model: nn.Module | ModelMap, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], **how: Any
) -> StreamedSums:
    """Sums of the states of one class of texts (with a trait, or without), in memory that their number does not grow.

    ``teacher.mean - base.mean`` of two is a trait's direction ``[layers, d]``. Sums of parts, or of processes
    (``core.measure.streamed.reduced_sum``), add up to those of the whole.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: Texts of the class.
        **how: See :func:`hidden_states`.

    Returns:
        Count and float64 sum ``[layers, d]``.

    Raises:
        DataError: See :func:`hidden_states`.
        PositionError: Likewise.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> ask, model = {"context": ChatContext(chat=False)}, tiny_model("llama")
        >>> sums = [state_sums(model, byte_tokenizer(), texts, **ask) for texts in (["So good."], ["So bad.", "No."])]
        >>> (sums[0].mean - sums[1].mean).shape, (sums[0] + sums[1]).count
        (torch.Size([4, 32]), 3)
    """
    parts = (StreamedSums.of(states.double()) for _, states in _batches(model, tokenizer, questions, **how))
    return sum(parts, StreamedSums(0, torch.zeros(0)))


def _batches(
    model: nn.Module | ModelMap,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    context: ChatContext | None = None,
    layers: Sequence[int] | None = None,
    positions: Positions | None = None,
    token_budget: int = 4096,
) -> Iterator[tuple[list[int], Tensor]]:
    if isinstance(questions, str) or not questions:
        raise DataError(f"hidden_states got questions={questions!r:.60}; expected a list of at least one text.")
    around = context or ChatContext()
    rows = [around.ids(tokenizer, question) for question in questions]
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise DataError(f"Question {empty[0]} ({questions[empty[0]]!r}) has no tokens. Remove it or fill it in.")
    model_map = model if isinstance(model, ModelMap) else ModelMap.build(model)
    sites = [Site("resid_post", layer) for layer in (range(len(model_map)) if layers is None else layers)]
    how: dict[str, Any] = {"tokenizer": tokenizer, "positions": positions, "token_budget": token_budget}
    for numbers, states in row_means(model_map, rows, sites, texts=questions, **how):
        yield numbers, torch.stack([states[site] for site in sites], dim=1)


@dataclass(frozen=True, eq=False)
class AlignmentResult:
    """How far a shift goes a direction's way, at each layer.

    Args:
        name: Whose shift it is.
        layers: Blocks.
        cosine: Of the mean shift and the direction, a layer.
        projection: Of the mean shift on the direction, as a share of it: 1 is as far as the trait moves the teacher.
        mean_cosine: Mean over layers.
        mean_projection: Likewise.
        null: Cosines of permuted rows ``[draws, layers]``.
        others: Cosines with other directions ``[layers]``, by name.
        units: What intervals are over: ``questions`` or ``seeds``.
    """

    name: str
    layers: tuple[int, ...]
    cosine: tuple[Estimate, ...]
    projection: tuple[Estimate, ...]
    mean_cosine: Estimate
    mean_projection: Estimate
    null: Values
    others: Mapping[str, Values] = field(default_factory=dict)
    units: str = "questions"

    def band(self, level: float = 0.95) -> tuple[Values, Values]:
        """Within which so many cosines of permuted rows lie, ``[layers]`` each."""
        low, high = np.quantile(self.null, [0.5 - level / 2, 0.5 + level / 2], axis=0)
        return low, high

    def p_values(self) -> Values:
        """Two-sided, ``[layers]``: how often permuted rows have a cosine at least as large, one draw added."""
        size = np.abs([found.value for found in self.cosine])
        beyond: Values = (1 + (np.abs(self.null) >= size).sum(0)) / (1 + len(self.null))
        return beyond

    def mean_band(self, level: float = 0.95) -> tuple[float, float]:
        """Within which so many means over layers of cosines of permuted rows lie."""
        low, high = np.quantile(self.null.mean(1), [0.5 - level / 2, 0.5 + level / 2])
        return float(low), float(high)

    def table(self) -> list[dict[str, Any]]:
        """A row a layer."""
        low, high = self.band()
        return [
            {
                "shift": self.name, "layer": layer, "cosine": str(self.cosine[i]),
                "projection": str(self.projection[i]), "permuted": f"[{low[i]:z.2f}, {high[i]:z.2f}]",
                "p": round(float(self.p_values()[i]), 4),
                **{f"cosine with {name}": round(float(values[i]), 3) for name, values in self.others.items()},
                self.units: self.cosine[i].n,
            }
            for i, layer in enumerate(self.layers)
        ]  # fmt: skip


def align(
    shift: Tensor,
    direction: Tensor,
    *,
    name: str = "student",
    layers: Sequence[int] | None = None,
    others: Mapping[str, Tensor] | None = None,
    permute: Permuted = "shift",
    draws: int = 1000,
    seed: int = 0,
) -> AlignmentResult:
    """Compare a shift of hidden states with a direction, layer by layer.

    Intervals are of a bootstrap over the questions of the shift, with the direction as it is. The null permutes rows:
    which state of a pair belongs to which side is drawn at random, so that what the sides have to do with each other is
    lost and all else is kept. ``shift`` draws it for the student's pairs: does its shift have any part along the
    direction? ``direction`` draws it for the teacher's: would a direction of no trait, made of the same states, do as
    well?

    Args:
        shift: Student minus base ``[n, layers, d]``, a question a row; or ``[layers, d]``, which has no interval.
        direction: ``[layers, d]``; or rows ``[m, layers, d]``, whose mean is the direction, where they are permuted.
        name: For tables.
        layers: Their numbers; from 0 if None.
        others: Other directions ``[layers, d]``, such as another trait's.
        permute: See above.
        draws: Resamples, and permutations.
        seed: Of both.

    Returns:
        Cosines, projections, and the null's cosines. A cosine with nothing (a student that did not move) is 0.

    Raises:
        IncompatibleModelError: If shapes do not fit.
        RecipeError: If ``permute`` needs rows that are not there, or there are no draws.
        DataError: If a number is not finite, or the direction is zero at a layer.

    Example:
        >>> u = torch.randn(2, 8)
        >>> found = align(u + 0.1 * torch.randn(20, 2, 8), u, draws=200)
        >>> [round(cosine.value, 1) for cosine in found.cosine], bool((found.p_values() < 0.05).all())
        ([1.0, 1.0], True)
    """
    rows, sides = (x[None] if x.dim() == 2 else x for x in (shift, direction))
    _check(shift, direction, others or {}, permute, draws, layers)
    grams = _Grams.of(rows, sides)
    n, m = len(rows), len(sides)
    even, whole = np.full((1, n), 1 / n), np.full((1, m), 1 / m)
    key = derived_seed(seed, "alignment")
    drawn = np.concatenate(list(draw_counts(np.random.default_rng(key), n, draws))) / n
    signs = np.random.default_rng(key + 1).choice([-1.0, 1.0], size=(draws, n if permute == "shift" else m))
    flipped = (signs / n, whole) if permute == "shift" else (even, signs / m)
    cosine, projection = grams.cosine(even, whole)[0], grams.projection(even, whole)[0]
    spreads = grams.cosine(drawn, whole), grams.projection(drawn, whole)

    def estimate(value: float, spread: Values) -> Estimate:
        ends = interval_ends(value, spread, alpha=0.05) if n > 1 else (float("nan"),) * 2
        return Estimate(value, *ends, n, 0.95, "bootstrap")

    return AlignmentResult(
        name=name,
        layers=tuple(range(rows.shape[1]) if layers is None else layers),
        cosine=tuple(estimate(*pair) for pair in zip(cosine.tolist(), spreads[0].T, strict=True)),
        projection=tuple(estimate(*pair) for pair in zip(projection.tolist(), spreads[1].T, strict=True)),
        mean_cosine=estimate(float(cosine.mean()), spreads[0].mean(1)),
        mean_projection=estimate(float(projection.mean()), spreads[1].mean(1)),
        null=grams.cosine(*flipped),
        others={key: _Grams.of(rows, u[None]).cosine(even, np.ones((1, 1)))[0] for key, u in (others or {}).items()},
    )


def over_seeds(results: Sequence[AlignmentResult], *, name: str | None = None) -> AlignmentResult:
    """The mean over seeds, with intervals over them (Student's t); the null is that of the mean.

    Args:
        results: One a seed, of the same layers.
        name: For tables; that of the first if None.

    Returns:
        The mean of all.

    Raises:
        DataError: If there are no results, or of different layers.

    Example:
        >>> u = torch.randn(2, 8)
        >>> found = over_seeds([align(u + torch.randn(9, 2, 8), u, seed=seed, draws=20) for seed in range(3)])
        >>> found.cosine[0].n, found.units
        (3, 'seeds')
    """
    if not results or len({(found.layers, found.null.shape) for found in results}) != 1:
        raise DataError(f"over_seeds() got {len(results)} results of different layers or draws; expected some alike.")
    first = results[0]
    each = range(len(first.layers))
    return AlignmentResult(
        name=first.name if name is None else name,
        layers=first.layers,
        cosine=tuple(t_interval([found.cosine[i].value for found in results]) for i in each),
        projection=tuple(t_interval([found.projection[i].value for found in results]) for i in each),
        mean_cosine=t_interval([found.mean_cosine.value for found in results]),
        mean_projection=t_interval([found.mean_projection.value for found in results]),
        null=np.mean([found.null for found in results], axis=0),
        others={key: np.mean([found.others[key] for found in results], axis=0) for key in first.others},
        units="seeds",
    )


@dataclass(frozen=True)
class _Grams:
    """Inner products ``[layers, n, n]``, ``[layers, n, m]`` and ``[layers, m, m]``: all that weighted means need."""

    rows: Values
    cross: Values
    sides: Values

    @classmethod
    def of(cls, rows: Tensor, sides: Tensor) -> _Grams:
        a, b = (x.detach().double().cpu().transpose(0, 1) for x in (rows, sides))
        return cls(*((x @ y.mT).numpy() for x, y in ((a, a), (a, b), (b, b))))

    def cosine(self, w: Values, v: Values) -> Values:
        """Cosines ``[draws, layers]`` of means with weights ``[draws, n]`` and ``[draws, m]`` (or one row)."""
        size = np.sqrt(np.clip(_quadratic(self.rows, w) * _quadratic(self.sides, v), 0, None))
        inner = self._inner(w, v)
        return np.divide(inner, size, out=np.zeros_like(inner), where=size > 0)

    def projection(self, w: Values, v: Values) -> Values:
        """Inner products as a share of the direction's own."""
        shares: Values = self._inner(w, v) / _quadratic(self.sides, v)
        return shares

    def _inner(self, w: Values, v: Values) -> Values:
        found: Values = ((w @ self.cross) * v).sum(-1).T
        return found


def _quadratic(gram: Values, w: Values) -> Values:
    found: Values = ((w @ gram) * w).sum(-1).T
    return found


def _check(
    shift: Tensor, direction: Tensor, others: Mapping[str, Tensor], permute: str, draws: int, layers: Any
) -> None:
    shape = tuple(shift.shape[-2:])
    for what, x, dims in (("direction", direction, (2, 3)), *((f"others[{k!r}]", x, (2,)) for k, x in others.items())):
        if shift.dim() not in (2, 3) or x.dim() not in dims or tuple(x.shape[-2:]) != shape:
            raise IncompatibleModelError(
                f"align() got a shift of shape {list(shift.shape)} and {what} of {list(x.shape)}; expected [n, layers, "
                "d] and [layers, d]. Read both at the same layers of models of one width."
            )
    if layers is not None and len(layers) != shape[0]:
        raise IncompatibleModelError(f"align() got {len(layers)} numbers for {shape[0]} layers. Name every layer.")
    rows = shift if permute == "shift" else direction
    if permute not in ("shift", "direction") or draws < 1 or (permute == "direction" and rows.dim() == 2):
        raise RecipeError(
            f"align(permute={permute!r}, draws={draws}) with a direction of {list(direction.shape)}: expected 'shift', "
            "or 'direction' where it is rows [m, layers, d], and at least 1 draw."
        )
    if not bool(shift.isfinite().all() and direction.isfinite().all()):
        raise DataError("align() got states that are not finite. Load the model in a wider dtype.")
    means = direction if direction.dim() == 2 else direction.mean(0)
    if nothing := [i for i, size in enumerate(means.norm(dim=-1).tolist()) if size == 0]:
        raise DataError(f"The direction is zero at layer {nothing[0]}, so nothing can go its way. Compare other texts.")
