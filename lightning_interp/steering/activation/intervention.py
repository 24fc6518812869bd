"""Steering at any site: the intervention that every member of the family is, and adding a direction.

A member says what it does to an activation at a dose. How large the dose is for each row, which tokens it reaches, and
how it changes while a model generates are the same for all members and live here, once.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self, TypedDict, Unpack, get_args

import torch
from torch import Tensor

from lightning_interp.core.hooks.intervention import Attachment, Intervention, hook_site
from lightning_interp.core.measure.reduced import Sums
from lightning_interp.core.model.fingerprint import tensor_hash
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.places import check_distinct
from lightning_interp.core.model.sites import Site
from lightning_interp.core.model.widths import check_width
from lightning_interp.core.storage.files import jsonable
from lightning_interp.core.tokens.positions import All, Positions
from lightning_interp.core.tokens.repeats import rows_each
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.steering.activation.selectors import (
    CheckModel,
    Sites,
    bind_positions,
    check_positions,
    check_vector_model,
    describe_positions,
    place,
    same_at_every_site,
)
from lightning_interp.steering.activation.strength_schedule import (
    AnySchedule,
    check_strength,
    factors,
    make_schedule,
    per_row,
    schedule_to_dict,
)
from lightning_interp.steering.vectors.reading import as_direction
from lightning_interp.steering.vectors.steering_vectors import SteeringVector

__all__ = ["MEASURES", "AddDirection", "Dose", "Steering", "SteeringMeter"]


class Dose(TypedDict, total=False):
    """Keyword arguments that every member takes, see :class:`Steering`."""

    strength: float | Sequence[float] | Tensor
    positions: Positions | None
    schedule: AnySchedule
    check_model: CheckModel


Amount = float | Tensor
Observer = Callable[[Site, Tensor, Tensor, StepContext], None]


class Steering(Intervention):
    """A change of activations with a dose; subclass it and write :meth:`steer` (or :meth:`change`).

    At dose 0 an activation keeps its very bits. Nothing is changed in place; gradients flow to the member's tensors,
    and to a tensor of strengths, if they require them.

    Args:
        tensors: What the member needs at each site; the last dimension of each tensor is the site's width.
        strength: A number, or one for each row ``[B]``; with ``k`` rows a prompt (beams, samples), ``[B / k]``.
        positions: Which tokens.
        schedule: Factor of the strength over the steps of a generation, see :class:`StrengthSchedule`.
        vector: Where the tensors come from, to check and to record it.
        check_model: What to do with a vector of another model: ``error``, ``warn`` or ``off``.

    Attributes:
        observe: Called with ``(site, x, new, step)`` after each change; None costs nothing.

    Raises:
        RecipeError: If a tensor, the strength, the schedule or ``check_model`` cannot be used.
        PositionError: If ``positions`` can never choose a token.
    """

    def __init__(
        self,
        tensors: Mapping[Site, tuple[Tensor, ...]],
        *,
        strength: float | Sequence[float] | Tensor = 1.0,
        positions: Positions | None = None,
        schedule: AnySchedule = None,
        vector: SteeringVector | None = None,
        check_model: CheckModel = "error",
    ) -> None:
        name = type(self).__name__
        self.tensors = dict(tensors)
        self.strength = check_strength(strength, what=name)
        self.positions = check_positions(All() if positions is None else positions, what=name)
        self.schedule = make_schedule(schedule)
        self.vector = vector
        if check_model not in get_args(CheckModel):
            raise RecipeError(f"{name}(check_model={check_model!r}) is unknown; expected 'error', 'warn' or 'off'.")
        self.check_model: CheckModel = check_model
        self.observe: Observer | None = None
        self._same_everywhere = same_at_every_site(self.positions)
        self._moved: dict[tuple[Site, torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def steer(self, site: Site, x: Tensor, amount: Amount) -> Tensor:
        """The activation at a dose. The default moves it that far towards (or beyond) :meth:`change`.

        Args:
            site: Which site.
            x: Activation ``[B, n, d]``.
            amount: The dose: a number that is not 0, or float32 that broadcasts to ``[B, n, 1]``.

        Returns:
            A new tensor of the same shape and dtype.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            new = (wide + amount * self.change(site, wide)).to(x.dtype)
        return _kept_at_zero(x, new, amount)

    @abstractmethod
    def change(self, site: Site, x: Tensor) -> Tensor:
        """What is added at dose 1.

        Args:
            site: Which site.
            x: Activation ``[B, n, d]``, float32 or wider.

        Returns:
            ``[B, n, d]`` or ``[d]``.
        """

    def settings(self) -> dict[str, Any]:
        """The member's own settings for records, as plain values."""
        return {}

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """The sites that have tensors."""
        return tuple(self.tensors)

    def transform(self, site: Site, x: Tensor, step: StepContext) -> Tensor:
        """See :meth:`Intervention.transform`."""
        return self._act(self.positions, site, x, step)

    def check(self, model_map: ModelMap) -> None:
        """Refuse a model that these tensors are not for.

        Raises:
            SiteError: If a site is missing, or two names mean the same one.
            IncompatibleModelError: If widths differ, or the vector is of another model.
        """
        super().check(model_map)
        name = type(self).__name__
        check_distinct(model_map, self.tensors, what=name)
        for site, tensors in self.tensors.items():
            check_width(model_map, site, tensors[0].shape[-1], what=f"{name}'s direction")
        if self.vector is not None:
            check_vector_model(self.vector, model_map, self.check_model, what=name)

    def install(self, attachment: Attachment) -> None:
        """Hook every site, with selectors that know this model."""
        sites = self.sites(attachment.model_map)
        positions = bind_positions(self.positions, attachment, sites)
        for site in sites:
            hook_site(attachment, site, partial(self._act, positions, site))

    def describe(self) -> dict[str, Any]:
        """What is done, where, and how much: plain values to keep beside every result.

        Example:
            >>> AddDirection(torch.ones(4), site="resid_post.1", strength=2.0).describe()["strength"]
            2.0
        """
        return jsonable(  # type: ignore[no-any-return]
            {
                "kind": type(self).__name__,
                "sites": [str(site) for site in self.tensors],
                "strength": self.strength if isinstance(self.strength, float) else self.strength.detach().tolist(),
                "positions": describe_positions(self.positions),
                "schedule": schedule_to_dict(self.schedule),
                "trained": any(t.requires_grad for tensors in self.tensors.values() for t in tensors),
                "sha256": {str(site): tensor_hash(*tensors) for site, tensors in self.tensors.items()},
                "vector": None if self.vector is None else self.vector.describe(),
                **self.settings(),
            }
        )

    def _act(self, positions: Positions, site: Site, x: Tensor, step: StepContext) -> Tensor:
        tensors = self.tensors[site]
        if x.dim() != 3 or x.shape[-1] != tensors[0].shape[-1]:
            raise IncompatibleModelError(
                f"{type(self).__name__}'s direction has width {tensors[0].shape[-1]}, but the activation at {site} is "
                f"{list(x.shape)}; expected [B, T, {tensors[0].shape[-1]}]. Use a direction of this site."
            )
        amount = self._amount(positions, x, step)
        new = x if isinstance(amount, float) and amount == 0 else self.steer(site, x, amount)
        if self.observe is not None:
            self.observe(site, x, new, step)
        return new

    def _amount(self, positions: Positions, x: Tensor, step: StepContext) -> Amount:
        """The dose of each token: a number where it is the same for all, else ``[B or 1, n or 1, 1]``."""
        key = (self, x.shape[1])
        if (known := step.cache.get(key)) is not None:
            return known if isinstance(known, float) else known.to(x.device)
        amount: Amount = self.strength
        if isinstance(amount, Tensor):
            given, what = amount, type(self).__name__
            amount = per_row(given.to(x.device), x.shape[0], what=what)
            rows_each(step, given.numel(), f"Strengths of {what}")
        if self.schedule is not None:
            factor = step.fit(factors(self.schedule, step.generation_steps), x.shape[1])
            amount = amount * factor[..., None].to(x.device)
        if not (type(positions) is All and step.all_real):
            amount = amount * step.choose(positions, x)[..., None].to(x.device, torch.float32)
        if self._same_everywhere and not (isinstance(amount, Tensor) and amount.requires_grad):
            step.cache[key] = amount
        return amount

    def at(self, site: Site, x: Tensor) -> tuple[Tensor, ...]:
        """The member's tensors of a site, where ``x`` is and in the dtype that it is worked on in."""
        key = (site, x.device, torch.promote_types(x.dtype, torch.float32))
        if any(t.requires_grad for t in self.tensors[site]):
            return tuple(t.to(*key[1:]) for t in self.tensors[site])
        if key not in self._moved:
            with torch.inference_mode(False):  # what is kept may be used in autograd later
                self._moved[key] = tuple(t.to(*key[1:]) for t in self.tensors[site])
        return self._moved[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moved": {}, "observe": None}


class AddDirection(Steering):
    """Add a direction to the activation: ``x + strength * direction``.

    Args:
        direction: ``[d]`` for every site of ``site``, a mapping from sites to such, a ``SteeringVector``, or a file of
            one. A tensor that requires grad stays the same object and is trained.
        site: One site or several, as objects or as text (``"resid_post.12"``). Left out, a vector's own sites.
        keep_norm: Scale the sum back to the length that ``x`` had, so that only its direction changes.
        **dose: ``strength``, ``positions``, ``schedule``, ``check_model``; see :class:`Steering`.

    Raises:
        RecipeError: If the direction is zero or not finite, or another value cannot be used.
        SiteError: If no site is named, or a vector lacks it.
        PositionError: If ``positions`` can never choose a token.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> model, ids = tiny_model("llama"), torch.arange(6).repeat(2, 1)
        >>> with AddDirection(torch.ones(32), site="resid_post.1", strength=[0.0, 2.0]).attach(model):
        ...     steered = model(ids).logits
        >>> (steered == model(ids).logits).all(-1).all(-1).tolist()
        [True, False]
    """

    def __init__(
        self, direction: Any, *, site: Sites | None = None, keep_norm: bool = False, **dose: Unpack[Dose]
    ) -> None:
        found, vector = place(direction, site, as_direction, what=type(self).__name__)
        super().__init__({s: (v,) for s, v in found.items()}, vector=vector, **dose)
        self.keep_norm = keep_norm

    @classmethod
    def load(cls, path: str | os.PathLike[str], **settings: Any) -> Self:
        """Read a vector from a file and steer with it.

        Args:
            path: A ``.safetensors`` file of this package, or a control-vector ``.gguf`` file.
            **settings: Everything else that the class takes.

        Returns:
            The intervention.

        Raises:
            DataError: If the file is missing, damaged, or holds something else.
        """
        return cls(SteeringVector.load(path), **settings)

    def change(self, site: Site, x: Tensor) -> Tensor:
        """See :meth:`Steering.change`."""
        return self.at(site, x)[0]

    def steer(self, site: Site, x: Tensor, amount: Amount) -> Tensor:
        """See :meth:`Steering.steer`."""
        (direction,) = self.at(site, x)
        if self.keep_norm:
            return self._turned(x, direction, amount)
        # Adding 0 keeps every bit, and a narrower x is widened, moved and rounded once.
        if isinstance(amount, float):
            return torch.add(x, direction, alpha=amount).to(x.dtype)
        return torch.addcmul(x, amount.to(direction.dtype), direction).to(x.dtype)

    def _turned(self, x: Tensor, direction: Tensor, amount: Amount) -> Tensor:
        wide = x.to(direction.dtype)
        moved = wide + amount * direction
        size = moved.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(moved.dtype).tiny)
        return _kept_at_zero(x, (moved * (wide.norm(dim=-1, keepdim=True) / size)).to(x.dtype), amount)

    def settings(self) -> dict[str, Any]:
        """See :meth:`Steering.settings`."""
        norms = {str(site): float(tensors[0].detach().norm()) for site, tensors in self.tensors.items()}
        return {"keep_norm": self.keep_norm, "norms": norms}


def _kept_at_zero(x: Tensor, new: Tensor, amount: Amount) -> Tensor:
    """``new`` where there is a dose, the very bits of ``x`` elsewhere."""
    return new if isinstance(amount, float) else torch.where(amount != 0, new, x)


MEASURES = ("share", "shift")


class SteeringMeter(Sums):
    """Share of real tokens whose activation changed, and how far the changed ones moved relative to their length.

    Put ``update`` into ``steering.observe``. With several sites or parts the share is the mean over them.

    Example:
        >>> meter, x = SteeringMeter(), torch.ones(1, 2, 4)
        >>> meter.update(Site("resid_post", 0), x, x * torch.tensor([[[1.0], [3.0]]]), StepContext(1, 2))
        >>> meter.compute()
        {'share': 0.5, 'shift': 2.0}
    """

    def __init__(self) -> None:
        super().__init__("tokens", "changed", "moved")

    def update(self, site: Site, x: Tensor, new: Tensor, step: StepContext, part: int = 0) -> None:
        """Count one site of one part in one pass; a replay by gradient checkpointing does not count again."""
        if (id(self), site, part) in step.cache:
            return
        step.cache[id(self), site, part] = True
        valid = step.fit(step.valid, x.shape[1]).to(x.device)
        moved = (new != x).any(dim=-1) & valid
        before = x.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        relative = ((new.float() - x.float()).norm(dim=-1) / before).masked_fill(~moved, 0.0)
        self.add(torch.stack([valid.sum(), moved.sum(), relative.double().sum()]))

    def compute(self) -> dict[str, float]:
        """The measures so far, over all processes, 0 where nothing was steered; every process must call it."""
        tokens, changed, moved = self.totals()
        return {"share": changed / tokens if tokens else 0.0, "shift": moved / changed if changed else 0.0}
