"""Read class means off a model while it runs: which contexts belong to which class, and what their states are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from lightning_interp.core.hooks.intervention import Attachment, Intervention
from lightning_interp.core.model.fingerprint import model_fingerprint
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import All, Positions
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.steering.activation.selectors import bind_positions, check_positions
from lightning_interp.steering.concepts.moments import ClassMoments
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.softmax.geometry import Softcap, SoftmaxGeometry

__all__ = ["ClassReader", "PredictedSide", "Reading"]

_HEAD = Site("unembed_in")
_SPREAD = 2**32  # ids of rows are this far apart, so that every token of a row has a number of its own


class Reading(TypedDict, total=False):
    """Keyword arguments of :class:`ClassReader`, for what hands them on."""

    site: Site
    positions: Positions | None
    ids: str | None
    dual: bool | None
    scatter: bool
    on_softcap: Softcap


@dataclass(frozen=True)
class PredictedSide:
    """A context's class is the side that the model is about to take there: all its top tokens are of it (paper B.1).

    Args:
        pairs: Of the concept.
        top_k: Most probable tokens that must all be base, or all target.
        min_mass: Their total probability must exceed this.

    Raises:
        RecipeError: If a value makes no sense.

    Example:
        >>> PredictedSide(CounterfactualPairs([(0, 1)])).top_k
        3
    """

    pairs: CounterfactualPairs
    top_k: int = 3
    min_mass: float = 0.7

    def __post_init__(self) -> None:
        if self.top_k < 1 or not 0 <= self.min_mass < 1:
            raise RecipeError(
                f"PredictedSide(top_k={self.top_k}, min_mass={self.min_mass}): expected top_k >= 1, 0 <= min_mass < 1."
            )

    def labels(self, geometry: SoftmaxGeometry, lam: Tensor) -> Tensor:
        """0 for base, 1 for target, -1 for neither, of states at the head's input ``[n, d] -> [n]``."""
        told = (geometry.model_log_probs(part) for part in torch.split(lam, geometry.max_rows))
        return torch.cat([self.pairs.classify(log_p, top_k=self.top_k, min_mass=self.min_mass) for log_p in told])


class ClassReader(Intervention):
    """Stream the states of two classes into :class:`~lightning_interp.steering.concepts.moments.ClassMoments`.

    Args:
        classes: Key of a batch entry with the class of each row ``[B]`` or token ``[B, T]`` (0 base, 1 target, -1
            neither); or a concept's pairs or a :class:`PredictedSide`: the model's own prediction tells it.
        site: Where states are read.
        positions: Which tokens; every real one by default.
        ids: Key of a batch entry that names each row by an integer ``[B]``: a token that comes again counts once.
        dual: Also sum dual coordinates, of this model's geometry; by default wherever the site is the head's input.
        scatter: Also sum outer products (``d^2`` numbers a class), for an LDA probe.
        on_softcap: What to do with a head that caps its logits, see ``SoftmaxGeometry``.

    Attributes:
        moments: What was read; None before the first token.

    Raises:
        RecipeError: If the site holds no state, or no dual coordinate where one is asked for.
        PositionError: If the positions choose nothing.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> reader, model = ClassReader("concept"), tiny_model("llama")
        >>> with reader.attach(model) as attachment:
        ...     attachment.batch = {"concept": torch.tensor([0, 1])}
        ...     _ = model(torch.arange(6).view(2, 3))
        >>> reader.moments.counts
        (3, 3)
    """

    def __init__(
        self,
        classes: str | PredictedSide | CounterfactualPairs,
        *,
        site: Site = _HEAD,
        positions: Positions | None = None,
        ids: str | None = None,
        dual: bool | None = None,
        scatter: bool = False,
        on_softcap: Softcap = "error",
    ) -> None:
        if site.kind == "logits" or (dual and site != _HEAD):
            raise RecipeError(
                f"ClassReader(site={site}, dual={dual}): logits are no state, and only the head's input has a dual "
                "coordinate. Use Site('unembed_in'), or dual=False at another site."
            )
        self.classes = PredictedSide(classes) if isinstance(classes, CounterfactualPairs) else classes
        self.site, self.ids, self.scatter, self.on_softcap = site, ids, scatter, on_softcap
        self.positions = check_positions(All() if positions is None else positions, what="ClassReader")
        self.dual = site == _HEAD if dual is None else dual
        self.moments: ClassMoments | None = None
        self.reads_weights = self.dual or not isinstance(self.classes, str)  # of the head
        self._asked = site if isinstance(self.classes, str) else _HEAD  # where it is known what to count
        self._geometry: SoftmaxGeometry | None = None
        self._fingerprint: str | None = None
        self._chosen = self.positions

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_geometry": None}

    def reset(self) -> None:
        """Forget what was read."""
        self.moments = None

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """The site, and the head's input where the model's prediction tells the class."""
        return list(dict.fromkeys((self.site, self._asked)))

    def install(self, attachment: Attachment) -> None:
        """Take the model's geometry and fingerprint, and hook."""
        self._fingerprint = model_fingerprint(attachment.model_map)
        if self.reads_weights:
            capped: Softcap = self.on_softcap if self.dual else "ignore"
            self._geometry = SoftmaxGeometry.from_model(attachment.model_map, on_softcap=capped)
        self._chosen = bind_positions(self.positions, attachment, (self._asked,))
        attachment.on_remove(self._forget_model)
        super().install(attachment)

    def transform(self, site: Site, x: Tensor, step: StepContext) -> Tensor:
        """Count the states of ``x`` ``[B, n, d]`` and hand it on untouched."""
        if (self, site) in step.cache:  # gradient checkpointing runs a block again
            return x
        step.cache[self, site] = x.detach()
        if site == self._asked:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                self._count(step, x.detach())
        return x

    def _count(self, step: StepContext, x: Tensor) -> None:
        mask = step.choose(self._chosen, x)
        states = step.fit(step.cache[self, self.site], x.shape[1]).flatten(2)[mask]
        labels = self._labels(step, x, mask)
        kept = labels >= 0
        phi = self._geometry.dual(states[kept]) if self.dual and self._geometry is not None else None
        names = None if self.ids is None else self._names(step, mask)[kept]
        if self.moments is None:
            origin: dict[str, Any] = {"fingerprint": self._fingerprint, "site": self.site}
            self.moments = ClassMoments(states.shape[-1], dual=self.dual, scatter=self.scatter, **origin)
        self.moments.update(states[kept], labels[kept], phi, names)

    def _labels(self, step: StepContext, x: Tensor, mask: Tensor) -> Tensor:
        if isinstance(self.classes, PredictedSide) and self._geometry is not None:
            return self.classes.labels(self._geometry, x[mask])
        given = self._entry(step, str(self.classes))
        rows = given.shape[:1] == (step.batch_size,)
        if not rows or given.dim() > 2 or (given.dim() == 2 and given.shape[1] != step.length):
            raise DataError(
                f"The classes {self.classes!r} have the shape {list(given.shape)}, but the pass has {step.batch_size} "
                f"rows of {step.length} tokens. Give one class a row or a token."
            )
        wide = given[:, None].expand(mask.shape) if given.dim() == 1 else step.fit(given, mask.shape[1])
        return wide.to(mask.device).long()[mask]

    def _names(self, step: StepContext, mask: Tensor) -> Tensor:
        given = self._entry(step, self.ids or "")
        if given.shape != (step.batch_size,) or given.is_floating_point():
            raise DataError(
                f"The ids {self.ids!r} are {given.dtype} {list(given.shape)}; expected {step.batch_size} integers."
            )
        places = step.fit(step.positions, mask.shape[1])
        return (given.to(places).long()[:, None] * _SPREAD + places)[mask]

    def _entry(self, step: StepContext, key: str) -> Tensor:
        batch = {} if step.batch is None else step.batch
        if key not in batch:
            held = ", ".join(map(str, batch)) or "nothing"
            raise DataError(
                f"The batch has no entry {key!r}; it holds: {held}. Give mappings with an integer a row there."
            )
        return torch.as_tensor(batch[key])

    def _forget_model(self) -> None:
        self._geometry, self._chosen = None, self.positions
