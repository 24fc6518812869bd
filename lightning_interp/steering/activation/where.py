"""Gates: selectors that look at what the model holds before they choose a token.

They are ``Positions`` like any other (``Generated() & ProbeGate(...)``). A gate reads the activation of the site at
which it is asked, or of an earlier one, and chooses the tokens whose value lies above or below a threshold.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.hooks.intervention import Attachment, hook_site
from lightning_interp.core.model.sites import Site
from lightning_interp.core.model.widths import check_width
from lightning_interp.core.tokens.positions import Positions
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import IncompatibleModelError, PositionError, SiteError
from lightning_interp.steering.vectors.reading import ReadDirection, check_made_for, read_direction

__all__ = ["EntropyGate", "Gate", "PairMassGate", "ProbeGate", "spread_columns"]


def spread_columns(step: StepContext, mask: Tensor) -> Tensor:
    """Undo ``step.fit``: ``[B, n]`` of the columns that a site sees as ``[B, T]``, False elsewhere and on padding."""
    columns, kept = mask.shape[1], step.kept if isinstance(step.kept, Tensor) else None
    if columns == step.length and kept is None:
        return mask & step.valid
    whole = torch.zeros_like(step.valid)
    whole[:, kept if kept is not None and len(kept) == columns else slice(-columns, None)] = mask
    return whole & step.valid


@dataclass(frozen=True, eq=False)
class Gate(Positions):
    """A threshold on a value that is read off the running activation; subclass it to write your own.

    Gates that need the model (its head) get it when something that uses them is attached.

    Args:
        above: Choose tokens whose value is greater.
        below: Choose tokens whose value is smaller; with both, those in between.

    Raises:
        PositionError: If there is no threshold, or nothing can lie between the two.
    """

    above: float | None = field(default=None, kw_only=True)
    below: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.above, self.below) if bound is not None]
        if not bounds or any(isinstance(b, bool) or b != b for b in bounds):
            raise PositionError(f"{self} has no threshold. Pass above=... , below=... , or both, as numbers.")
        if len(bounds) == 2 and not bounds[0] < bounds[1]:
            raise PositionError(f"{self} chooses nothing: no value is above {bounds[0]} and below {bounds[1]}.")

    @abstractmethod
    def values(self, x: Tensor) -> Tensor:
        """What is compared with the thresholds.

        Args:
            x: Activation ``[B, n, d]``.

        Returns:
            float ``[B, n]``.
        """

    def check(self, site: Site, attachment: Attachment) -> None:
        """Refuse a site at which the value means nothing. The default accepts every one.

        Args:
            site: Where the gate will be asked.
            attachment: Knows the model.

        Raises:
            SiteError: With the sites at which it means something.
        """

    def bound(self, attachment: Attachment) -> Positions:
        """The gate with what it needs from the model. The default needs nothing."""
        return self

    def mask(self, step: StepContext) -> Tensor:
        """See :meth:`Positions.mask`; asked through ``step.choose``."""
        if step.assumed is not None:
            return step.valid & step.assumed
        if step.activation is None:
            raise PositionError(
                f"{self} reads an activation, but was asked outside of a site. Use step.choose(positions, x)."
            )
        return spread_columns(step, self._within(step.activation))

    def _within(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            values = self.values(x.detach())
        chosen = torch.ones_like(values, dtype=torch.bool) if self.above is None else values > self.above
        return chosen if self.below is None else chosen & (values < self.below)

    def _key(self) -> tuple[Any, ...]:
        return type(self).__name__, self.above, self.below

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gate) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True, eq=False)
class ProbeGate(Gate):
    """Tokens whose probe value ``direction . x + offset`` lies above or below a threshold.

    With ``site`` the value is read at an earlier place than the one that is steered, and with ``hold`` it is decided at
    the prompt's last token for the whole row, as in conditional activation steering (Lee et al., arXiv 2409.05907).

    Args:
        probe: A direction ``[d]``; a ``ConceptProbe``, its bias plays no part; a vector of one site, or of several with
            ``site``; or a file.
        offset: Added to the value.
        site: Where to read; by default the site that is steered.
        hold: Decide once a row, at the prompt's last token; needs ``site``.
        sha256: Of the direction, checked when given; :meth:`to_dict` writes it.
        above, below: See :class:`Gate`.

    Raises:
        PositionError: If the direction is not the one that ``sha256`` names, or ``hold`` has no ``site``.
        RecipeError: If the direction is zero, not finite or no vector.
        DataError: If a file holds no direction.

    Example:
        >>> step, x = StepContext(1, 3), torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]]])
        >>> step.choose(ProbeGate(torch.tensor([1.0, 0.0]), above=0.5), x).tolist()
        [[True, False, True]]
    """

    probe: Any
    offset: float = 0.0
    site: str | None = None
    hold: bool = False
    sha256: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hold and self.site is None:
            raise PositionError(f"{self} holds a decision but names no site. Pass site=..., where it is made.")
        found = read_direction(self.probe, self.site)
        if self.sha256 not in (None, found.sha256):
            raise PositionError(
                f"ProbeGate's direction has the hash {found.sha256[:12]}, but {str(self.sha256)[:12]} was recorded: "
                "the file or the numbers have changed. Use the recorded direction, or leave sha256 out."
            )
        named = isinstance(self.probe, str | os.PathLike)
        object.__setattr__(self, "probe", os.fspath(self.probe) if named else found.direction)
        object.__setattr__(self, "offset", float(self.offset))
        object.__setattr__(self, "site", None if self.site is None else str(Site.parse(str(self.site))))
        object.__setattr__(self, "sha256", found.sha256)
        object.__setattr__(self, "_found", found)

    @property
    def found(self) -> ReadDirection:
        """The direction and what is known about it."""
        return self.__dict__["_found"]  # type: ignore[no-any-return]

    def values(self, x: Tensor) -> Tensor:
        """See :meth:`Gate.values`."""
        wide, direction = x.to(torch.promote_types(x.dtype, torch.float32)), self.found.direction
        if wide.shape[-1] != len(direction):
            raise IncompatibleModelError(
                f"ProbeGate's direction has width {len(direction)}, but the activation has {wide.shape[-1]}. Use a "
                "probe of this site."
            )
        return wide @ direction.to(wide) + self.offset

    def check(self, site: Site, attachment: Attachment) -> None:
        """Refuse a site of another width.

        Raises:
            SiteError: If the gate's own site does not exist.
            IncompatibleModelError: With both widths.
        """
        where, found, what = Site.parse(self.site) if self.site else site, self.found, "ProbeGate's direction"
        check_width(attachment.model_map, where, len(found.direction), what=what)
        check_made_for(attachment.model_map, found.fingerprint, what=what)

    def bound(self, attachment: Attachment) -> Positions:
        """Read the gate's own site in every pass, where it has one."""
        if self.site is not None:
            hook_site(attachment, Site.parse(self.site), self._read)
        return self

    def _read(self, x: Tensor, step: StepContext) -> Tensor:
        step.cache[self] = spread_columns(step, self._within(x))
        return x

    def mask(self, step: StepContext) -> Tensor:
        """See :meth:`Gate.mask`."""
        if step.assumed is not None:
            return super().mask(step)
        if self.hold and not step.is_prefill:
            return self._held(step)
        if self.site is not None and self not in step.cache:
            raise PositionError(
                f"ProbeGate(site={self.site!r}) was asked before that site ran in this pass. Read a site that lies "
                "before the steered one, and attach what uses the gate."
            )
        now: Tensor = step.cache[self] if self.site is not None else super().mask(step)
        if self.hold:
            if step.generation is not None and step.past + step.length < step.generation.columns + step.virtual:
                raise PositionError(
                    f"ProbeGate(hold=True) decides at the prompt's last token, which a chunk of {step.length} columns "
                    "does not hold. Generate without prefill_chunk_size."
                )
            last = step.valid & (step.positions == step.prompt_lengths[:, None] - 1)
            step.cache[self, "held"] = row = (now & last).any(dim=1, keepdim=True)
            now = row & step.valid
        return now

    def _held(self, step: StepContext) -> Tensor:
        row = None if step.prompt is None else step.prompt.cache.get((self, "held"))
        if row is None or step.batch_size % len(row):
            raise PositionError(
                f"ProbeGate(hold=True) decides at the prompt, but the prompt of this decoding step ({step.batch_size} "
                "rows) was not seen. Attach before generating."
            )
        return row.repeat_interleave(step.batch_size // len(row), dim=0) & step.valid  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the direction by its file where it came from one, else by value; and its hash."""
        probe = self.probe if isinstance(self.probe, str) else self.probe.tolist()
        rest = {name: getattr(self, name) for name in ("offset", "site", "hold", "sha256", "above", "below")}
        return {"kind": "ProbeGate", "probe": probe, **rest}

    def _key(self) -> tuple[Any, ...]:
        return (*super()._key(), self.sha256, self.offset, self.site, self.hold)

    def __repr__(self) -> str:
        shown = {"above": self.above, "below": self.below, "site": self.site, "hold": self.hold or None}
        return f"ProbeGate({', '.join(f'{k}={v!r}' for k, v in shown.items() if v is not None)})"


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

    Elsewhere steering only changes what it should not (arXiv 2602.15293, appendix B.1).

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
