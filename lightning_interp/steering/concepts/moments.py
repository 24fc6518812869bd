"""Class means of hidden states, streamed: all that mean-difference and LDA probes need of the states.

Memory does not grow with the number of states, so a run over a whole corpus can feed a probe (the authors of arXiv
2602.15293 store every state, about 26 GB a language).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_interp.core.measure.streamed import StreamedSums, reduced_sum
from lightning_interp.core.model.sites import Site
from lightning_interp.core.storage.files import canonical_json
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.core.storage.tensor_files import save_tensors
from lightning_interp.errors import DataError, IncompatibleModelError, RecipeError
from lightning_interp.steering.vectors.reading import read_made

__all__ = ["CLASSES", "ClassMoments", "StreamedSums"]

CLASSES = ("base", "target")
"""The two values of a concept, in the order of the labels 0 and 1."""

_FORMAT = "lightning_interp.class_moments/1"
_REMEDY = "Expected a file that ClassMoments.save wrote."


class ClassMoments:
    """Count and sums of the states of two classes, in O(d) memory a class (O(d^2) with ``scatter``).

    Sums are float64 on the CPU. Where ids are given, a state that comes again (another pass, a sampler's padding, the
    same text on two processes) counts once; ids cost a few dozen bytes each, and the rows of the last batch are held.

    Args:
        width: ``d``.
        dual: Also sum dual coordinates, for :meth:`dual_mean`.
        scatter: Also sum outer products of the states, for :meth:`covariance`.
        fingerprint, site: Of the model that the states come from, and where they were read.

    Raises:
        RecipeError: If the width is no width.

    Example:
        >>> moments = ClassMoments(2, dual=False)
        >>> moments.update(torch.tensor([[0.0, 1.0], [2.0, 3.0], [5.0, 5.0]]), torch.tensor([0, 0, 1]))
        >>> moments.counts, moments.mean("base").tolist()
        ((2, 1), [1.0, 2.0])
    """

    def __init__(
        self,
        width: int,
        *,
        dual: bool = True,
        scatter: bool = False,
        fingerprint: str | None = None,
        site: Site | None = None,
    ) -> None:
        if width < 1:
            raise RecipeError(f"ClassMoments(width={width}): expected the width of the states, at least 1.")
        self.width, self.dual, self.scatter = width, dual, scatter
        self.fingerprint, self.site = fingerprint, site
        empty = torch.zeros(0, 2 * width if dual else width, dtype=torch.float64)
        self._sums = [self._summed(empty) for _ in CLASSES]
        self._seen: dict[int, int] = {}  # class by id
        self._held: dict[int, Tensor] = {}  # rows of the last batch by id: seen, and not yet in the sums
        self._named: bool | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """States of the base and of the target class."""
        return self._total(0).count, self._total(1).count

    def update(self, lam: Tensor, labels: Tensor, phi: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Count states.

        Args:
            lam: States ``[n, d]``, of any floating dtype, on any device.
            labels: 0 for base, 1 for target, -1 to leave a state out, ``[n]``.
            phi: Their dual coordinates ``[n, d]``; needed with ``dual``.
            ids: An integer that names each state ``[n]``; give it always or never.

        Raises:
            IncompatibleModelError: If a shape does not fit.
            RecipeError: If labels are others, dual coordinates are missing, or ids come only sometimes.
            DataError: If a state is not finite, or an id has another class than before.
        """
        self._check_shapes(lam, labels, phi, ids)
        if len(lam) == 0:
            return
        with torch.inference_mode(False), torch.no_grad():
            labels = labels.detach().cpu().long()
            keep = (labels >= 0).clone()
            given = [lam] if phi is None or not self.dual else [lam, phi]
            rows = torch.cat([x.detach().to("cpu", torch.float64, copy=True)[keep] for x in given], dim=1)
            labels = labels[keep]
            _check_rows(rows, labels)
            if ids is None:
                for label in range(len(CLASSES)):
                    self._sums[label] = self._sums[label] + self._summed(rows[labels == label])
            else:
                self._count_named(rows, labels.tolist(), ids.detach().cpu()[keep].tolist())
        self._named = ids is not None

    def mean(self, which: str) -> Tensor:
        """Mean state of a class (``base`` or ``target``), float64 ``[d]``.

        Raises:
            DataError: If the class has no states.
        """
        return self._class(which).mean[: self.width]

    def dual_mean(self, which: str) -> Tensor:
        """Mean dual coordinate of a class, float64 ``[d]``.

        Raises:
            DataError: If the class has no states.
            RecipeError: If dual coordinates were not summed.
        """
        if not self.dual:
            raise RecipeError(
                f"These moments of width {self.width} hold no dual coordinates. Stream them with "
                "ClassMoments(dual=True), at the input of the head."
            )
        return self._class(which).mean[self.width :]

    def covariance(self) -> Tensor:
        """Covariance within classes, pooled over both, float64 ``[d, d]``.

        Raises:
            DataError: If a class has no states, or there are fewer than three in all.
            RecipeError: If outer products were not summed.
        """
        base, target = self._class("base"), self._class("target")
        if base.scatter is None or target.scatter is None:
            raise RecipeError(
                f"These moments of width {self.width} hold no covariance. Stream them with ClassMoments(scatter=True)."
            )
        if base.count + target.count < 3:
            raise DataError(f"A pooled covariance needs at least three states, got {base.count} and {target.count}.")
        return (base.scatter + target.scatter) / (base.count + target.count - 2)

    def __add__(self, other: ClassMoments) -> ClassMoments:
        """Moments of both; states with the same id count once."""
        self._check_same(other)
        shared = sorted(self._seen.keys() & other._seen.keys())
        for name in shared:
            _check_class(name, other._seen[name], self._seen[name])
        settled = [name for name in shared if name not in self._held and name not in other._held]
        if settled:
            raise DataError(
                f"{len(settled)} states (the first has id {settled[0]}) were counted by two processes, and only the "
                "last batch of each can be taken back. Give each its own rows, as predict and unshuffled samplers do."
            )
        made = ClassMoments(
            self.width, dual=self.dual, scatter=self.scatter, fingerprint=self.fingerprint, site=self.site
        )
        made._sums = [ours + theirs for ours, theirs in zip(self._sums, other._sums, strict=True)]
        made._seen = {**other._seen, **self._seen}
        mine = {name: row for name, row in self._held.items() if name not in other._seen or name in other._held}
        made._held = {**{name: row for name, row in other._held.items() if name not in self._seen}, **mine}
        made._named = other._named if self._named is None else self._named
        return made

    def reduced(self, group: Any = None) -> ClassMoments:
        """Moments of all processes, the same on each; every process must call this.

        Args:
            group: The process group; None for all processes.

        Returns:
            The merged moments; these themselves without a process group.

        Raises:
            DataError: See :meth:`__add__`.
        """
        return reduced_sum(self, group) or self

    def save(self, path: str | Path) -> Path:
        """Write counts and sums to a safetensors file; ids are not kept.

        Args:
            path: The file; missing folders are made.

        Returns:
            ``path``.

        Raises:
            ManifestError: If the file cannot be written.
        """
        totals = {name: self._total(label) for label, name in enumerate(CLASSES)}
        tensors = {"counts": torch.tensor(self.counts)} | {f"{name}.total": each.total for name, each in totals.items()}
        tensors |= {f"{name}.scatter": each.scatter for name, each in totals.items() if each.scatter is not None}
        site = None if self.site is None else str(self.site)
        facts = canonical_json({"width": self.width, "fingerprint": self.fingerprint, "site": site})
        return save_tensors(path, tensors, {"format": _FORMAT, "facts": facts})

    @classmethod
    def load(cls, path: str | Path) -> ClassMoments:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.

        Returns:
            The moments.

        Raises:
            DataError: If the file is missing, damaged, or holds something else.
        """

        def made(tensors: dict[str, Tensor], metadata: dict[str, str]) -> ClassMoments:
            facts = parse_json(metadata["facts"])
            width, site = int(facts["width"]), None if facts["site"] is None else Site.parse(facts["site"])
            dual, scatter = len(tensors["base.total"]) > width, "base.scatter" in tensors
            moments = cls(width, dual=dual, scatter=scatter, fingerprint=facts["fingerprint"], site=site)
            moments._sums = [
                StreamedSums(count, tensors[f"{name}.total"], tensors.get(f"{name}.scatter"))
                for name, count in zip(CLASSES, tensors["counts"].tolist(), strict=True)
            ]
            return moments

        return read_made(path, _FORMAT, made, what="class moments", remedy=_REMEDY)

    def _count_named(self, rows: Tensor, labels: list[int], names: list[int]) -> None:
        known = dict(self._seen)
        for name, label in zip(names, labels, strict=True):
            _check_class(name, label, known.setdefault(name, label))
        new = {name: row for row, name in reversed(list(enumerate(names))) if name not in self._seen}
        if new:  # the rows held so far can be given up
            self._sums, self._held = [self._total(label) for label in range(len(CLASSES))], {}
        self._held.update({name: rows[row].clone() for name, row in new.items()})
        self._seen = known

    def _total(self, label: int) -> StreamedSums:
        held = [row for name, row in self._held.items() if self._seen[name] == label]
        return self._sums[label] + self._summed(torch.stack(held)) if held else self._sums[label]

    def _class(self, which: str) -> StreamedSums:
        if which not in CLASSES:
            raise RecipeError(f"There is no class {which!r}; expected one of {', '.join(CLASSES)}.")
        total = self._total(CLASSES.index(which))
        if total.count == 0:
            base, target = self.counts
            raise DataError(
                f"There is no {which} state, so that class has no mean: {base} base and {target} target states were "
                "counted. Read more text, or loosen the rule that selects contexts."
            )
        return total

    def _summed(self, rows: Tensor) -> StreamedSums:
        return StreamedSums.of(rows, square=self.width if self.scatter else 0)

    def _check_shapes(self, lam: Tensor, labels: Tensor, phi: Tensor | None, ids: Tensor | None) -> None:
        expected = (lam.shape[0], self.width)
        for name, given, shape in (
            ("States", lam, expected),
            ("Dual coordinates", phi, expected),
            ("Labels", labels, expected[:1]),
            ("Ids", ids, expected[:1]),
        ):
            if given is not None and tuple(given.shape) != shape:
                raise IncompatibleModelError(
                    f"{name} of shape {list(given.shape)} do not fit moments of width {self.width}; expected "
                    f"{list(shape)}. Read states at the site that the moments are for, and give one label and id a row."
                )
        if self.dual and phi is None:
            raise RecipeError(
                f"ClassMoments(dual=True) got {len(lam)} states without dual coordinates. Pass phi=geometry.dual(lam), "
                "or make the moments with dual=False."
            )
        if len(lam) and self._named is (ids is None):
            raise RecipeError(
                f"Ids came with some of the states only ({len(self._seen)} so far). Give them always or never."
            )

    def _check_same(self, other: ClassMoments) -> None:
        for what in ("width", "dual", "scatter", "fingerprint", "site"):
            ours, theirs = getattr(self, what), getattr(other, what)
            if ours != theirs:
                raise IncompatibleModelError(
                    f"Moments with {what}={ours} and {what}={theirs} cannot be added. Merge one site of one model."
                )
        if {self._named, other._named} == {True, False}:
            raise IncompatibleModelError(
                f"Moments with ids ({len(self._seen or other._seen)} of them) and without cannot be added: what both "
                "counted is not known. Give ids to both, or to neither."
            )


def _check_rows(rows: Tensor, labels: Tensor) -> None:
    if len(labels) and int(labels.max()) >= len(CLASSES):
        raise RecipeError(f"A label is {int(labels.max())}; expected 0 (base), 1 (target) or -1 (neither).")
    wrong = (~rows.isfinite()).any(1).nonzero()
    if len(wrong):
        raise DataError(
            f"State {int(wrong[0, 0])} of the {len(rows)} chosen ones holds NaN or infinity, which would spoil the "
            "sums. Leave such states out (label -1), or find out where they come from."
        )


def _check_class(name: int, label: int, before: int) -> None:
    if label != before:
        raise DataError(
            f"State {name} is {CLASSES[label]} now and was {CLASSES[before]} before. An id is one state of one class."
        )
