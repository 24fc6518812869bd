"""Linear probes of a concept: mean differences of dual or primal coordinates, logistic regression, LDA.

A probe gives ``P(W=1 | lam) = sigmoid(scale * (beta . lam + b))`` (arXiv 2602.15293, equation 3.1). It is linear in the
state, so ``beta`` is a covector: it lives in the space of the dual coordinate, and dual steering adds it there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_interp.core.measure.logistic import calibrate, fit_logistic
from lightning_interp.core.model.fingerprint import model_fingerprint
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.model.widths import check_width
from lightning_interp.core.storage.files import canonical_json, jsonable
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.core.storage.tensor_files import save_tensors
from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.steering.concepts.moments import ClassMoments
from lightning_interp.steering.softmax.arithmetic import working_dtype
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.steering.vectors.reading import check_made_for, read_made

__all__ = ["ConceptProbe", "ProbeKind"]

ProbeKind = Literal["dual_md", "primal_md", "logistic", "lda", "given"]
Offset = Literal["calibrated", "midpoint"]

_FORMAT = "lightning_interp.concept_probe/1"
_REMEDY = "Expected a file that ConceptProbe.save wrote."
_HEAD = Site("unembed_in")


@dataclass(frozen=True, eq=False)
class ConceptProbe:
    """A direction that tells two values of a concept apart, and where it comes from.

    Args:
        direction: ``beta`` ``[d]``, not normalised.
        bias: ``b``: the probe is undecided where ``beta . lam = -b``.
        kind: How it was made; ``given`` for one that somebody wrote down.
        scale: Slope of the log odds in the probe value; only probabilities depend on it.
        alpha: Regularisation to steer with, if it was chosen together with the probe.
        fingerprint: Of the model, see ``model_fingerprint``.
        site: Where its states are read.
        n_base, n_target: States of each class that it rests on.
        meta: Anything else that is plain data.

    Raises:
        RecipeError: If the direction is no vector, zero or not finite, or another value makes no sense.

    Example:
        >>> probe = ConceptProbe(torch.tensor([3.0, 4.0]), bias=-5.0)
        >>> probe.value(torch.tensor([[1.0, 0.5], [0.0, 0.0]])).tolist(), probe.value_at(0.5)
        ([5.0, 0.0], 5.0)
    """

    direction: Tensor
    bias: float = 0.0
    kind: ProbeKind = "given"
    scale: float = 1.0
    alpha: float | None = None
    fingerprint: str | None = None
    site: Site = _HEAD
    n_base: int = 0
    n_target: int = 0
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        direction = self.direction.detach().to(working_dtype(self.direction))
        if direction.dim() != 1 or not len(direction):
            raise RecipeError(f"A probe's direction has the shape {list(direction.shape)}; expected [d].")
        if not bool(direction.isfinite().all()) or not bool(direction.any()):
            what = "zero" if bool(direction.isfinite().all()) else "not finite (NaN or infinity)"
            raise RecipeError(
                f"The direction [{len(direction)}] of a {self.kind} probe is {what}, so it points nowhere. Check the "
                "states it was made from: their class means may be the same."
            )
        if self.kind not in get_args(ProbeKind):
            raise RecipeError(f"Unknown kind of probe {self.kind!r}; expected one of {', '.join(get_args(ProbeKind))}.")
        if not math.isfinite(self.bias) or not math.isfinite(self.scale) or self.scale == 0:
            raise RecipeError(
                f"A probe has bias={self.bias}, scale={self.scale}; expected finite numbers, scale not 0."
            )
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise RecipeError(f"A probe has alpha={self.alpha}; expected a number >= 0, or None.")
        object.__setattr__(self, "direction", direction)

    @property
    def width(self) -> int:
        """``d``."""
        return len(self.direction)

    @property
    def norm(self) -> float:
        """Length of the direction."""
        return float(self.direction.norm())

    def value(self, lam: Tensor) -> Tensor:
        """Probe value ``beta . lam``, ``[..., d] -> [...]``, in float32 (float64 if the states are).

        Raises:
            IncompatibleModelError: If the states have another width.
        """
        if lam.shape[-1:] != (self.width,):
            raise IncompatibleModelError(
                f"A probe of width {self.width} was given states of shape {list(lam.shape)}; expected [..., "
                f"{self.width}]. Read them at {self.site} of the model that the probe was made for."
            )
        with torch.autocast(lam.device.type, enabled=False):
            return (wide := lam.to(working_dtype(lam))) @ self.direction.to(wide)

    def probability(self, lam: Tensor) -> Tensor:
        """``P(W=1 | lam)``, ``[..., d] -> [...]``."""
        return torch.sigmoid(self.scale * (self.value(lam) + self.bias))

    def value_at(self, probability: float) -> float:
        """Probe value at which the probe says ``probability``.

        Raises:
            RecipeError: If it is not strictly between 0 and 1.
        """
        if not 0 < probability < 1:
            raise RecipeError(f"value_at({probability}): expected a probability strictly between 0 and 1.")
        return math.log(probability / (1 - probability)) / self.scale - self.bias

    def unit(self) -> ConceptProbe:
        """The same probe with a direction of length 1: values, bias and scale change, probabilities do not."""
        size = self.norm
        return replace(self, direction=self.direction / size, bias=self.bias / size, scale=self.scale * size)

    def cosine(self, other: ConceptProbe | Tensor) -> float:
        """Cosine between two directions."""
        vector = other.direction if isinstance(other, ConceptProbe) else other
        return float(torch.cosine_similarity(self.direction.double().cpu(), vector.detach().double().cpu(), dim=0))

    def check(self, model: nn.Module | ModelMap) -> None:
        """Refuse a model (plain, PEFT, Lightning, or a map of one) that this probe was not made for.

        Args:
            model: The model.

        Raises:
            IncompatibleModelError: If the width or the fingerprint differs.
            SiteError: If the model lacks the probe's site.
        """
        model_map = model if isinstance(model, ModelMap) else ModelMap.build(model)
        check_width(model_map, self.site, self.width, what=f"This {self.kind} probe")
        check_made_for(model_map, self.fingerprint, what=f"This {self.kind} probe")

    @classmethod
    def fit(
        cls,
        base: Tensor,
        target: Tensor,
        kind: ProbeKind = "dual_md",
        *,
        geometry: SoftmaxGeometry | None = None,
        model: nn.Module | ModelMap | None = None,
        offset: Offset = "calibrated",
        l2: float = 1.0,
        ridge: float = 1e-6,
        alpha: float | None = None,
        site: Site = _HEAD,
        meta: dict[str, Any] | None = None,
    ) -> ConceptProbe:
        """Make a probe from states of both classes.

        Args:
            base: States with ``W = 0``, ``[n, d]``; need not be paired with the others.
            target: States with ``W = 1``, ``[m, d]``.
            kind: ``dual_md`` (difference of mean dual coordinates, the paper's main one), ``primal_md`` (difference of
                mean states), ``logistic`` (L2) or ``lda``.
            geometry: Gives dual coordinates; by default that of ``model``.
            model: Whose states these are: its fingerprint goes into the probe.
            offset: Of mean differences: ``calibrated`` fits scale and bias to the training values, ``midpoint`` puts
                the bias half-way between the class means and leaves the scale at 1.
            l2: Penalty of ``logistic``.
            ridge: Added to the covariance's diagonal by ``lda``.
            alpha: Kept in the probe.
            site: Where the states were read.
            meta: Kept in the probe.

        Returns:
            The probe; its direction is float64.

        Raises:
            RecipeError: If a value makes no sense, ``dual_md`` has no geometry, or both classes have the same mean.
            IncompatibleModelError: If widths differ.
            DataError: If a class has no states, or one is not finite.
        """
        _check_choice(kind, offset)
        if geometry is None and kind == "dual_md" and model is not None:
            geometry = SoftmaxGeometry.from_model(model)
        moments = _moments(base, target, kind, geometry, None if model is None else model_fingerprint(model), site)
        if kind == "logistic":
            weight, bias = fit_logistic(torch.cat([base, target]), _labels(base, target), l2=l2)
            return cls(weight, bias, kind, meta={**(meta or {}), "l2": l2}, **_origin(moments, alpha))
        probe = cls.from_moments(moments, kind, ridge=ridge, alpha=alpha, meta=meta)
        if offset == "midpoint" or kind == "lda":
            return probe
        values = torch.cat([probe.value(base.double()), probe.value(target.double())])
        scale, middle = calibrate(values, _labels(base, target))
        return replace(probe, scale=scale, bias=middle, meta={**probe.meta, "offset": "calibrated"})

    @classmethod
    def from_moments(
        cls,
        moments: ClassMoments,
        kind: ProbeKind = "dual_md",
        *,
        ridge: float = 1e-6,
        alpha: float | None = None,
        meta: dict[str, Any] | None = None,
    ) -> ConceptProbe:
        """Make a probe from streamed class means; the bias is half-way between them, the scale 1.

        Args:
            moments: Of both classes.
            kind: ``dual_md``, ``primal_md``, or ``lda``, which needs moments with ``scatter``.
            ridge: Added to the covariance's diagonal by ``lda``.
            alpha: Kept in the probe.
            meta: Kept in the probe.

        Returns:
            The probe.

        Raises:
            RecipeError: If the moments do not hold what the kind needs, or both classes have the same mean.
            DataError: If a class has no states.
        """
        _check_choice(kind, "midpoint")
        if kind == "logistic":
            raise RecipeError(f"A {kind} probe cannot be made from class means. Use ConceptProbe.fit with the states.")
        base, target = moments.mean("base"), moments.mean("target")
        direction, extra = target - base, dict[str, Any](offset="midpoint")
        if kind == "dual_md":
            direction = moments.dual_mean("target") - moments.dual_mean("base")
        elif kind == "lda":
            spread = moments.covariance()
            direction = torch.linalg.solve(spread + ridge * torch.eye(len(spread), dtype=spread.dtype), direction)
            extra |= {"ridge": ridge}
        bias = -float(direction @ (base + target)) / 2
        return cls(direction, bias, kind, meta={**(meta or {}), **extra}, **_origin(moments, alpha))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the direction, as plain data."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("direction", "site")}
        facts: dict[str, Any] = jsonable({**plain, "site": str(self.site)})
        return facts

    def save(self, path: str | Path) -> Path:
        """Write the probe to a safetensors file.

        Args:
            path: The file; missing folders are made.

        Returns:
            ``path``.

        Raises:
            ManifestError: If the file cannot be written.
            DataError: If ``meta`` holds something that is no plain data.
        """
        metadata = {"format": _FORMAT, "probe": canonical_json(self.to_dict())}
        return save_tensors(path, {"direction": self.direction}, metadata)

    @classmethod
    def load(cls, path: str | Path, *, model: nn.Module | ModelMap | None = None) -> ConceptProbe:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            model: Refuse the probe if it was made for another model; see :meth:`check`.

        Returns:
            The probe, on the CPU.

        Raises:
            DataError: If the file is missing, damaged, or holds something else.
            IncompatibleModelError: If ``model`` is another model.
        """

        def made(tensors: dict[str, Tensor], metadata: dict[str, str]) -> ConceptProbe:
            facts = parse_json(metadata["probe"])
            return cls(tensors["direction"], **{**facts, "site": Site.parse(facts["site"])})

        probe = read_made(path, _FORMAT, made, what="concept probe", remedy=_REMEDY)
        if model is not None:
            probe.check(model)
        return probe


def _check_choice(kind: str, offset: str) -> None:
    made = [name for name in get_args(ProbeKind) if name != "given"]
    if kind not in made:
        raise RecipeError(f"Cannot fit a probe of kind {kind!r}; expected one of {', '.join(made)}.")
    if offset not in get_args(Offset):
        raise RecipeError(f"offset={offset!r} is unknown; expected one of {', '.join(get_args(Offset))}.")


def _moments(
    base: Tensor, target: Tensor, kind: str, geometry: SoftmaxGeometry | None, fingerprint: str | None, site: Site
) -> ClassMoments:
    if kind == "dual_md" and geometry is None:
        raise RecipeError(
            f"A dual_md probe of {len(base)} + {len(target)} states needs geometry= or model=; or use kind='primal_md'."
        )
    if base.dim() != 2 or target.dim() != 2:
        raise IncompatibleModelError(
            f"ConceptProbe.fit got states of shape {list(base.shape)} and {list(target.shape)}; expected [n, d] each."
        )
    dual = kind == "dual_md"
    moments = ClassMoments(base.shape[1], dual=dual, scatter=kind == "lda", fingerprint=fingerprint, site=site)
    for label, states in enumerate((base, target)):
        phi = geometry.dual(states) if dual and geometry is not None and len(states) else states if dual else None
        moments.update(states, torch.full((len(states),), label), phi)
    return moments


def _labels(base: Tensor, target: Tensor) -> Tensor:
    return torch.cat([base.new_zeros(len(base)), target.new_ones(len(target))])


def _origin(moments: ClassMoments, alpha: float | None) -> dict[str, Any]:
    counts = dict(zip(("n_base", "n_target"), moments.counts, strict=True))
    return {"fingerprint": moments.fingerprint, "site": moments.site or _HEAD, "alpha": alpha, **counts}
