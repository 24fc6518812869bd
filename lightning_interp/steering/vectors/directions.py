"""Directions from contrasting texts: mean difference, principal component of paired differences, logistic regression.

Whatever the method, a direction's length is such that at strength 1 it carries the mean of the negative texts as far
along itself as the mean of the positive ones lies, so strengths mean the same for all methods and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_interp.core.hooks.row_means import row_means
from lightning_interp.core.measure.logistic import fit_logistic
from lightning_interp.core.measure.streamed import StreamedSums
from lightning_interp.core.model.fingerprint import model_fingerprint
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import Last, Positions
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.steering.activation.selectors import Sites, as_sites, check_positions
from lightning_interp.steering.vectors.steering_vectors import SteeringVector

__all__ = ["METHODS", "Method", "TextFeatures", "direction_between", "encode_texts", "extract_vector", "text_features"]

Method = Literal["mean_difference", "pca", "pca_centred", "logistic"]
METHODS: tuple[str, ...] = get_args(Method)
_NOTHING = 1e-9  # of the activations' norm: a smaller difference of the means is rounding


def extract_vector(
    model: nn.Module | ModelMap,
    tokenizer: Any,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    method: Method = "mean_difference",
    site: Sites | None = None,
    positions: Positions | None = None,
    concept: str = "",
    l2: float = 1.0,
    token_budget: int = 4096,
    advance: Callable[[int], object] | None = None,
) -> SteeringVector:
    """Read both sides once and make a direction at each site.

    The mean difference keeps sums alone (``O(d)`` memory a site); the other methods keep one row a text and site.

    Args:
        model: The model; it is left as it was found.
        tokenizer: Its tokenizer.
        positive: Texts that show the concept.
        negative: Texts that do not; for the ``pca`` methods ``negative[i]`` belongs to ``positive[i]``.
        method: ``mean_difference``; ``pca``, the first principal component of the paired differences about 0;
            ``pca_centred``, about their mean, as repeng makes it; or ``logistic``, a regression's weights.
        site: Where; by default the output of every block.
        positions: Which tokens of a text are read (their mean); by default the last one.
        concept: What the direction stands for, for the record.
        l2: Penalty of ``logistic``.
        token_budget: Most tokens of a forward pass.
        advance: Called with the number of texts that were just read.

    Returns:
        The vector, with all that is known about it.

    Raises:
        RecipeError: If the method is unknown.
        DataError: If a side has no texts, a text has no tokens, pairs do not match, or both sides look alike.
        SiteError: If the model lacks a site.
        PositionError: If the selector chooses no token of a text.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> extract_vector(tiny_model("llama"), byte_tokenizer(), ["so good"], ["so bad"], concept="mood")
        SteeringVector('mood', resid_post 0, 1, 2, 3)
    """
    model_map = model if isinstance(model, ModelMap) else ModelMap.build(model)
    _check(method, positive, negative)
    where = check_positions(Last() if positions is None else positions, what="extract_vector")
    every = [Site("resid_post", layer) for layer in range(len(model_map))]
    sites = as_sites(every if site is None else site, what="extract_vector")
    found = {s: _Side(keep=method != "mean_difference") for s in sites}
    texts = [*positive, *negative]
    for numbers, rows in text_features(model_map, tokenizer, texts, sites, positions=where, token_budget=token_budget):
        for s, values in rows.items():
            found[s].update(numbers, values, len(positive))
        if advance is not None:
            advance(len(numbers))
    return SteeringVector(
        {s: side.direction(method, l2, f"{concept or 'the concept'!r} at {s}") for s, side in found.items()},
        concept=concept,
        method=method,
        model=str(getattr(model_map.model, "name_or_path", "")),
        model_type=str(model_map.config_value("model_type", "")),
        fingerprint=model_fingerprint(model_map),
        n=len(texts),
        positions=where.to_dict(),
        scale={s: side.size for s, side in found.items()},
    )


def direction_between(positive: Tensor, negative: Tensor, method: Method, *, l2: float = 1.0) -> Tensor:
    """A direction from rows of both classes.

    Args:
        positive: ``[n, d]``.
        negative: ``[m, d]``; for the ``pca`` methods ``[n, d]``, paired row by row.
        method: See :func:`extract_vector`.
        l2: Penalty of ``logistic``.

    Returns:
        float64 ``[d]``, pointing from the negative to the positive mean, and as long as these lie apart along it.

    Raises:
        RecipeError: If the method is unknown.
        DataError: If the rows tell no direction.

    Example:
        >>> direction_between(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), "mean_difference").tolist()
        [2.0, 0.0]
    """
    plus, minus = positive.double(), negative.double()
    gap = plus.mean(0) - minus.mean(0)
    if method == "mean_difference":
        return gap
    if method == "logistic":
        labels = torch.cat([torch.ones(len(plus)), torch.zeros(len(minus))])
        axis = fit_logistic(torch.cat([plus, minus]), labels, l2=l2)[0]
    elif method in METHODS:
        differences = plus - minus
        middle = differences.mean(0) if method == "pca_centred" else torch.zeros_like(gap)
        _, sizes, axes = torch.linalg.svd(differences - middle, full_matrices=False)
        if not bool(sizes[0] > _NOTHING * differences.norm()):  # any axis is a singular vector of nothing
            raise DataError(
                f"Method {method!r} finds no axis: the {len(differences)} differences of the pairs are all equal. Use "
                "mean_difference, or pairs that differ in other things too."
            )
        axis = axes[0]
    else:
        raise RecipeError(f"There is no method {method!r}; expected one of {', '.join(METHODS)}.")
    unit = axis / axis.norm()
    found: Tensor = unit * (unit @ gap)
    return found


@dataclass(eq=False)
class _Side:
    """What is kept of both classes at one site: sums, and the rows where a method needs them."""

    keep: bool
    sums: list[StreamedSums] = field(default_factory=lambda: [StreamedSums(0, torch.zeros(0))] * 2)
    norms: float = 0.0
    rows: dict[int, Tensor] = field(default_factory=dict)
    positive: int = 0

    def update(self, numbers: Sequence[int], values: Tensor, positive: int) -> None:
        """Count rows; those with a number below ``positive`` show the concept."""
        if not bool(torch.isfinite(values).all()):
            number = numbers[int((~torch.isfinite(values)).any(1).nonzero()[0])]
            raise DataError(f"Text {number} gives activations that are not finite. Load the model in a wider dtype.")
        self.positive = positive
        self.norms += float(values.double().norm(dim=1).sum())
        shows = torch.tensor([number < positive for number in numbers])
        for side in (0, 1):
            self.sums[side] = self.sums[side] + StreamedSums.of(values[shows == bool(side)].double())
        if self.keep:
            self.rows.update(zip(numbers, values.clone(), strict=True))

    @property
    def size(self) -> float:
        """Mean norm of the rows."""
        return self.norms / (self.sums[0].count + self.sums[1].count)

    def direction(self, method: Method, l2: float, what: str) -> Tensor:
        """The direction, in float32."""
        if self.keep:
            rows = torch.stack([self.rows[number] for number in sorted(self.rows)])
            found = direction_between(rows[: self.positive], rows[self.positive :], method, l2=l2)
        else:
            found = self.sums[1].mean - self.sums[0].mean
        if not float(found.norm()) > _NOTHING * self.size:  # NaN too
            raise DataError(
                f"Both sides look alike for {what}: their means lie {float(found.norm()):.2g} apart, where activations "
                f"have a length of {self.size:.3g}. Use texts that differ where they are read."
            )
        return found.float()


def _check(method: str, positive: Sequence[str], negative: Sequence[str]) -> None:
    if method not in METHODS:
        raise RecipeError(f"There is no method {method!r} to extract a vector; expected one of {', '.join(METHODS)}.")
    for name, texts in (("positive", positive), ("negative", negative)):
        if isinstance(texts, str) or not texts:
            raise DataError(f"extract_vector got {name}={texts!r:.60}; expected a list of at least one text.")
    if method.startswith("pca") and len(positive) != len(negative):
        raise DataError(
            f"Method {method!r} needs pairs, but there are {len(positive)} positive and {len(negative)} negative "
            "texts. Pair them one by one, or use mean_difference or logistic."
        )


TextFeatures = tuple[list[int], dict[Site, Tensor]]


def text_features(
    model: nn.Module | ModelMap,
    tokenizer: Any,
    texts: Sequence[str],
    sites: Sequence[Site],
    *,
    positions: Positions | None = None,
    token_budget: int = 4096,
) -> Iterator[TextFeatures]:
    """Read texts and give, for each batch, the mean activation over the chosen tokens of each text.

    The model is used as it is (with whatever is attached to it), in evaluation mode, which is put back, and without
    gradients. Texts of like length share a batch.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: What to read.
        sites: Where to read.
        positions: Which tokens; by default the last one.
        token_budget: Most tokens of a batch, padding counted.

    Yields:
        Numbers of the texts of a batch, and for each site float32 ``[texts, d]`` on the CPU.

    Raises:
        DataError: If a text has no tokens.
        PositionError: If the selector chooses no token of a text.

    Example:
        >>> from lightning_interp.testing import byte_tokenizer, tiny_model
        >>> batches = text_features(tiny_model("llama"), byte_tokenizer(), ["ab", "abc"], [Site("resid_post", 1)])
        >>> [(numbers, {str(s): tuple(x.shape) for s, x in found.items()}) for numbers, found in batches]
        [([1, 0], {'resid_post.1': (2, 32)})]
    """
    rows = encode_texts(tokenizer, texts)
    yield from row_means(
        model, rows, sites, texts=texts, tokenizer=tokenizer, positions=positions, token_budget=token_budget
    )


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, as the tokenizer gives them by itself."""
    rows: list[list[int]] = tokenizer(list(texts))["input_ids"] if texts else []
    for number, row in enumerate(rows):
        if not row:
            raise DataError(f"Text {number} ({texts[number]!r}) has no tokens. Remove it or fill it in.")
    return rows
