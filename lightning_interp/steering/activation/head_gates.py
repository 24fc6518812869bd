"""Gates on the next-token distribution, asked at the head's input."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.hooks.intervention import Attachment
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import Positions
from lightning_interp.errors import PositionError, SiteError
from lightning_interp.steering.activation.where import Gate

__all__ = ["EntropyGate", "PairMassGate"]


@dataclass(frozen=True, eq=False)
class _HeadGate(Gate):
    """A gate on the next-token distribution, at the head's input."""

    geometry: Any = field(default=None, repr=False, kw_only=True)

    def check(self, site: Site, attachment: Attachment) -> None:
        """Only the head's input tells the distribution."""
        if site.kind != "unembed_in":
            raise SiteError(
                f"{type(self).__name__} needs the next-token distribution, which {site} does not tell. Use it at "
                "Site('unembed_in'), or gate with ProbeGate."
            )

    def bound(self, attachment: Attachment) -> Positions:
        """The gate with the model's head."""
        from lightning_interp.steering.softmax.geometry import SoftmaxGeometry

        return replace(self, geometry=SoftmaxGeometry.from_model(attachment.model_map, on_softcap="ignore"))

    def values(self, x: Tensor) -> Tensor:
        """See :meth:`Gate.values`."""
        if self.geometry is None:
            raise PositionError(
                f"{self} needs the model's head, which it gets when a steering intervention that uses it is attached. "
                "Attach that, or pass geometry=SoftmaxGeometry.from_model(model)."
            )
        rows = torch.split(x.reshape(-1, x.shape[-1]), self.geometry.max_rows)
        return torch.cat([self._of(part) for part in rows]).reshape(x.shape[:-1])

    def _of(self, lam: Tensor) -> Tensor:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Positions.to_dict`; the head is not part of it."""
        return {k: v for k, v in super().to_dict().items() if k != "geometry"}


@dataclass(frozen=True, eq=False)
class EntropyGate(_HeadGate):
    """Tokens whose next-token distribution has an entropy (in nats) above or below a threshold.

    Example:
        >>> EntropyGate(above=0.5).to_dict()
        {'kind': 'EntropyGate', 'above': 0.5, 'below': None}
    """

    def _of(self, lam: Tensor) -> Tensor:
        return self.geometry.entropy(lam)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"EntropyGate(above={self.above}, below={self.below})"


@dataclass(frozen=True, eq=False)
class PairMassGate(_HeadGate):
    """Tokens at which the pairs' words, base and target together, have a probability above or below a threshold.

    Steering a state at which the concept is irrelevant only changes what it should not (arXiv 2602.15293, appendix
    B.1).

    Args:
        pairs: Token ids ``(base, target)``, or counterfactual pairs.
        above, below: See :class:`Gate`; probabilities.

    Raises:
        PositionError: If there are no pairs, or a threshold is no probability.

    Example:
        >>> PairMassGate([(5, 7), (6, 7)], above=0.7).ids
        (5, 6, 7)
    """

    pairs: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        given = getattr(self.pairs, "pairs", self.pairs)
        try:
            pairs = tuple((int(base), int(target)) for base, target in given)
        except (TypeError, ValueError) as error:
            raise PositionError(
                f"PairMassGate(pairs={self.pairs!r:.60}) holds no pairs of token ids: {error}. Pass (base, target) ids."
            ) from error
        if not pairs or any(not 0 <= bound <= 1 for bound in (self.above, self.below) if bound is not None):
            raise PositionError(
                f"PairMassGate of {len(pairs)} pairs, above={self.above}, below={self.below}: expected at least one "
                "pair and probabilities from 0 to 1."
            )
        object.__setattr__(self, "pairs", pairs)

    @property
    def ids(self) -> tuple[int, ...]:
        """Every token of the pairs, each once."""
        return tuple(sorted({token for pair in self.pairs for token in pair}))

    def bound(self, attachment: Attachment) -> Positions:
        """See :meth:`Gate.bound`.

        Raises:
            PositionError: If a token is not in the model's vocabulary.
        """
        made: Any = super().bound(attachment)
        if not 0 <= self.ids[0] <= self.ids[-1] < made.geometry.vocabulary:
            raise PositionError(
                f"PairMassGate names the tokens {self.ids[0]} to {self.ids[-1]}, but {made.geometry.name} has "
                f"{made.geometry.vocabulary} rows. Use pairs of this model's tokenizer."
            )
        return made  # type: ignore[no-any-return]

    def _of(self, lam: Tensor) -> Tensor:
        return self.geometry.model_log_probs(lam)[..., list(self.ids)].exp().sum(-1)  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`Positions.to_dict`."""
        return {**super().to_dict(), "pairs": [list(pair) for pair in self.pairs]}

    def _key(self) -> tuple[Any, ...]:
        return (*super()._key(), self.pairs)

    def __repr__(self) -> str:
        return f"PairMassGate({len(self.pairs)} pairs, above={self.above}, below={self.below})"
