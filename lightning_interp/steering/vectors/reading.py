"""Directions from wherever a user has them: a tensor, a list of numbers, a probe, a vector, or a file of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_interp.core.model.fingerprint import check_fingerprint, model_fingerprint, tensor_hash
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.storage.tensor_files import read_tensors
from lightning_interp.errors import DataError, InterpError, RecipeError

__all__ = ["ReadDirection", "as_direction", "check_made_for", "read_direction", "read_made"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ReadDirection:
    """One direction, float32 or float64 ``[d]``, and the fingerprint of its model if that is known."""

    direction: Tensor
    fingerprint: str | None = None

    @property
    def sha256(self) -> str:
        """Hash of the direction's numbers."""
        return tensor_hash(self.direction)


def as_direction(value: Any, what: str = "The direction") -> Tensor:
    """Check a direction ``[d]``: itself if it requires grad, so that it can be trained, else a float32 or 64 copy."""
    tensor = value if isinstance(value, Tensor) else numbers_of(value, what)
    if tensor.dim() != 1 or tensor.numel() == 0 or tensor.is_complex():
        raise RecipeError(f"{what} has the shape {list(tensor.shape)} ({tensor.dtype}); expected real numbers [d].")
    check_finite(tensor, what)
    if not bool(tensor.detach().any()):
        raise RecipeError(f"{what} is zero in all its {tensor.numel()} numbers, so it would change nothing.")
    return frozen(tensor)


def frozen(tensor: Tensor) -> Tensor:
    """A copy that later changes of the original do not reach; the tensor itself if it is being trained."""
    if tensor.requires_grad:
        return tensor
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    with torch.inference_mode(False):
        return tensor.detach().to(dtype, copy=True)


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and infinities, with the place of the first."""
    wrong = (~torch.isfinite(tensor.detach())).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        raise RecipeError(
            f"{what} holds {float(tensor[tuple(place)])} at index {place} ({len(wrong)} such numbers of "
            f"{tensor.numel()}); expected finite numbers. Extract or load it again."
        )


def check_made_for(model_map: ModelMap, fingerprint: str | None, *, what: str) -> None:
    """Refuse a model that ``what`` was not made for; one whose fingerprint is not known passes."""
    if fingerprint is not None:
        name = type(model_map.model).__name__
        check_fingerprint(model_fingerprint(model_map), fingerprint, what=what, model=name)


def read_made(
    path: str | os.PathLike[str],
    form: str,
    make: Callable[[dict[str, Tensor], dict[str, str]], T],
    *,
    what: str,
    remedy: str,
) -> T:
    """What ``make`` reads out of the tensors and metadata of a safetensors file of this package, of one format."""
    try:
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != form:
            raise DataError(f"its format is {metadata.get('format')!r}, expected {form!r}")
        return make(tensors, metadata)
    except (KeyError, TypeError, ValueError, InterpError) as error:
        raise DataError(f"{path} holds no {what} ({error}). {remedy}") from error


def read_direction(probe: Any, site: Site | str | None = None) -> ReadDirection:
    """One direction from a tensor, a list, a probe, a vector, or a file; ``site`` chooses from a vector of several."""
    from lightning_interp.steering.concepts.probes import ConceptProbe
    from lightning_interp.steering.vectors.steering_vectors import SteeringVector

    if isinstance(probe, str | os.PathLike):
        named = str(probe).lower().endswith(".safetensors") and read_tensors(probe)[1].get("format", "")
        probe = ConceptProbe.load(Path(probe)) if named and "concept_probe" in named else SteeringVector.load(probe)
    if isinstance(probe, SteeringVector):
        return ReadDirection(as_direction(probe.only(site)).detach(), probe.fingerprint)
    if isinstance(probe, Tensor | Sequence):
        return ReadDirection(as_direction(probe).detach())
    if not isinstance(probe, ConceptProbe):
        raise RecipeError(
            f"{probe!r:.80} is no direction. Expected a tensor [d], a ConceptProbe, a SteeringVector, or a file of one."
        )
    return ReadDirection(as_direction(probe.direction), probe.fingerprint)


def numbers_of(value: Any, what: str) -> Tensor:
    """Float32 numbers of nested lists."""
    try:
        return torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{what} is {value!r:.60}, no vector and no tensor: {error}.") from error
