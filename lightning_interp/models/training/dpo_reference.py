"""Log-probabilities of DPO's reference: computed once, before the first step, and kept in a file that runs share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.core.measure.undisturbed import undisturbed
from lightning_interp.core.model.fingerprint import tensor_hash, weights_digest
from lightning_interp.core.storage.distributed import rank_and_world_size
from lightning_interp.core.storage.files import digest
from lightning_interp.core.storage.tensor_files import read_tensors, save_tensors
from lightning_interp.errors import DataError, IncompatibleModelError
from lightning_interp.models.data.dpo_pairs import DPODataModule, EncodedPair

__all__ = ["ReferenceIdentity", "complete_reference", "read_reference", "reference_identity", "write_reference"]

Logps = dict[str, tuple[float, float]]

_FORMAT = "dpo-reference-1"
_SAVE_EVERY = 32  # batches


class ReferenceIdentity(NamedTuple):
    """Which model gave log-probabilities: a digest of its weights, and the type that it computed in."""

    weights: str
    precision: str


def reference_identity(model: nn.Module) -> ReferenceIdentity:
    """Tell a reference by every number that is trained, a digest of the rest, and autocast's type (or ``plain``)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = next(model.parameters()).device.type
    precision = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "plain"
    return ReferenceIdentity(digest([weights_digest(model), tensor_hash(*trained)]), precision)


def write_reference(path: Path, logps: Mapping[str, tuple[float, float]], identity: ReferenceIdentity) -> None:
    """Write log-probabilities of (chosen, rejected) by pairs' digests; the bytes follow from the content."""
    keys = sorted(logps)
    rows = torch.tensor([list(bytes.fromhex(key)) for key in keys], dtype=torch.uint8).view(-1, 32)
    values = torch.tensor([logps[key] for key in keys], dtype=torch.float32).view(-1, 2)
    save_tensors(path, {"rows": rows, "logps": values}, {"format": _FORMAT, **identity._asdict()})


def read_reference(path: Path, identity: ReferenceIdentity | None) -> Logps:
    """Read them, by their pairs' digests.

    Raises:
        DataError: If the file is none of these.
        IncompatibleModelError: If they are of another model than ``identity`` says, or in another precision.
    """
    tensors, about = read_tensors(path)
    if about.get("format") != _FORMAT or tensors.keys() != {"rows", "logps"}:
        raise DataError(
            f"{path} holds {', '.join(sorted(tensors)) or 'nothing'} and the format {about.get('format')!r}, expected "
            f"log-probabilities of a DPO reference ({_FORMAT}). Give the file of a DPODataModule."
        )
    found = ReferenceIdentity(about.get("weights", ""), about.get("precision", ""))
    if identity is not None and found != identity:
        what = "weights" if found.weights != identity.weights else "precision"
        shown = [getattr(one, what)[:16] for one in (found, identity)]
        raise IncompatibleModelError(
            f"{path} holds log-probabilities of another reference: its {what} is {shown[0]}, that of the model which "
            f"this training started from {shown[1]}. The reference is the policy at the first step, in a continual "
            "cycle with the adapter that it starts from. Delete the file, or give this training one of its own."
        )
    pairs: Sequence[tuple[float, float]] = tensors["logps"].tolist()
    return {bytes(row).hex(): (a, b) for row, (a, b) in zip(tensors["rows"].tolist(), pairs, strict=True)}


def complete_reference(
    model: nn.Module,
    data: DPODataModule,
    logps_of: Callable[[dict[str, Tensor]], Tensor],
    *,
    identity: ReferenceIdentity | None,
    moved: bool,
    context: AbstractContextManager[Any],
    splits: Sequence[str] = ("train", "val"),
) -> ReferenceIdentity | None:
    """Make ``data`` know the reference of all its pairs: read what its file has, compute the rest, and write all.

    The passes are those of the first epoch's batches, so in that epoch policy and reference see the same padding. In
    other batches rows are padded otherwise, which moves a log-probability by rounding: by less than 1e-4 nats in tests.
    Every process takes its own batches; the first one writes, after every 32 and at the end, so that a killed
    computation goes on.

    Args:
        model: The policy as training starts from it; it is left as it is.
        data: Whose pairs.
        logps_of: Log-probabilities ``[2 pairs]`` of a batch, on the model's device.
        identity: Of the reference, as far as it is known where ``moved``.
        moved: Whether the policy may have been trained since its first step: then nothing is computed.
        context: Precision to compute in.
        splits: Of which pairs.

    Returns:
        Which model the log-probabilities are of; None if that is not known.

    Raises:
        IncompatibleModelError: If the file is of another reference.
        DataError: If the policy has moved, and a pair's log-probabilities are not known.
    """
    with undisturbed(model), context:
        made = identity if moved else reference_identity(model)
        if made is not None and data.reference_of not in (None, made):
            data.logps.clear()  # of another training with these data
        if data.reference is not None and data.reference.exists():
            data.logps.update(read_reference(data.reference, made))
        _share(data.logps, data.logps)
        data.reference_of = made
        if not (missing := data.missing(splits)):
            return made
        if moved or made is None:
            raise DataError(
                f"The reference's log-probabilities of {len(missing)} pairs are not known (the first is "
                f"{missing[0][:16]}). They are computed before the first step of a training alone, since the policy "
                f"moves on. Give the pairs and the reference file that the training began with (here it is "
                f"{str(data.reference)!r}), or call reference_logps before it."
            )
        for split in splits:
            _fill(data, split, logps_of, made)
    return made


def _fill(
    data: DPODataModule, split: str, logps_of: Callable[[dict[str, Tensor]], Tensor], identity: ReferenceIdentity
) -> None:
    """Compute what is missing of a split, batch by batch in the order of its first epoch."""
    if not data.pairs(split):
        return
    loader = data._loader(split)
    loader.collate_fn = partial(_with_pairs, collate=loader.collate_fn)
    fresh: Logps = {}
    for number, (pairs, batch) in enumerate(loader, 1):
        if any(pair.digest not in data.logps for pair in pairs):
            chosen, rejected = logps_of(batch).float().cpu().chunk(2)
            values = zip(chosen.tolist(), rejected.tolist(), strict=True)
            fresh |= {pair.digest: value for pair, value in zip(pairs, values, strict=True)}
        if number % _SAVE_EVERY == 0 or number == len(loader):
            _share(fresh, data.logps)
            fresh = {}
            if data.reference is not None and rank_and_world_size()[0] == 0:
                write_reference(data.reference, data.logps, identity)


def _with_pairs(
    pairs: list[EncodedPair], *, collate: Callable[[list[EncodedPair]], dict[str, Tensor]]
) -> tuple[list[EncodedPair], dict[str, Tensor]]:
    return pairs, collate(pairs)


def _share(fresh: Logps, known: Logps) -> None:
    """Add what every process has found to what is known; what was known before stays."""
    everyone: Iterable[Logps] = [fresh]
    world = rank_and_world_size()[1]
    if world > 1 and "torch.distributed" in sys.modules and torch.distributed.is_initialized():
        gathered: list[Any] = [None] * world
        torch.distributed.all_gather_object(gathered, dict(fresh))
        everyone = gathered
    for one in everyone:
        for key, value in list(one.items()):
            known.setdefault(key, value)
