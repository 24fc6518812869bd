"""The masked alternative map: some rows of a module come from another weight source.

One primitive carries weight grafting, position-gated adapters and adapter selection. Every module it is used on treats
rows (tokens) independently, so choosing the source row by row inside one ordinary forward pass equals running each
token through weights assembled for it (Nief et al. 2025, arXiv 2506.20746, section 3; the row-wise identity is ours).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lightning_interp.core.hooks.intervention import first_input, join_output, split_output
from lightning_interp.core.measure.seeding import generators_of
from lightning_interp.core.model.own_hooks import Hook
from lightning_interp.core.weights.row_masks import RowLayout, RowMask
from lightning_interp.errors import IncompatibleModelError

__all__ = ["Execution", "MaskedHooks", "MaskedMap", "RowMap", "TokenMap", "masked_rows"]

Execution = Literal["auto", "overwrite", "partition", "dense"]
RowMap = Callable[..., Any]

PARTITION_FROM = 0.3
"""Share of rows away from source 0 above which ``auto`` computes every source on its own rows only."""


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A map that is told which tokens its rows are (flat indices, None for all), as one that draws for each must be."""

    function: Callable[[torch.Tensor, RowMask, torch.Tensor | None], Any]


@dataclass(eq=False)
class MaskedMap:
    """One module and its alternatives; ``adapted`` is the module where PEFT's own switch makes it source 0."""

    module: nn.Module
    native: int
    alternatives: Mapping[int, RowMap | TokenMap]
    mask: Callable[[], Sequence[tuple[torch.Tensor | None, RowMask]]]
    execution: Execution = "auto"
    per_call: bool = False
    takes_empty: bool = True
    deltas: Mapping[int, RowMap | TokenMap] = field(default_factory=dict)
    bypass: Callable[[], bool] | None = None
    adapted: Any = None


def masked_rows(
    x: torch.Tensor,
    maps: Mapping[int, RowMap | TokenMap],
    mask: RowMask,
    *,
    execution: Execution = "auto",
    deltas: Mapping[int, RowMap | TokenMap] | None = None,
) -> torch.Tensor:
    """Apply to each row of ``x`` (``[B, T, ...]``, ``[B*T, ...]`` or ``[B, H, T, d]``) the map that the mask names.

    ``overwrite`` computes source 0 on all rows and writes the others over it (rows of source 0 stay bit-identical to a
    run without donors; cost ``1 + share``). ``partition`` computes each source on its own rows (cost 1). ``dense``
    computes every source on all rows and selects (static shapes). ``auto`` is ``overwrite`` up to a share of 0.3, then
    ``partition``. A mask with one source runs that source alone on ``x`` as it is. If all other sources have a
    ``delta``, source 0 runs on all rows and the differences are added to theirs.
    """
    if mask.uniform is not None:
        return _run(maps[mask.uniform], x, mask)
    layout = RowLayout.of(x, mask)
    if deltas and _all_deltas(mask, deltas) and execution == "auto":
        return layout.restore(_add_deltas(layout.flatten(_fresh(_run(maps[0], x, mask), x)), x, deltas, mask, layout))
    how = _choose(execution, mask)
    if how == "dense":
        outputs = {k: layout.flatten(_run(maps[k], x, mask)) for k in mask.used}
        return layout.restore(_select(outputs, mask))
    rows = {k: layout.gather(x, mask.rows(k)) for k in mask.used if how == "partition" or k != 0}
    outputs = {k: layout.scatter(_run(maps[k], r, mask, mask.rows(k))) for k, r in rows.items()}
    base = layout.flatten(_fresh(_run(maps[0], x, mask), x)) if how == "overwrite" else None
    return layout.restore(_assemble(base, outputs, mask))


class MaskedHooks:
    """The two hooks of one module: hand it only the rows it computes, then put the others in their places."""

    def __init__(self, masked: MaskedMap) -> None:
        if self.on(masked.module) is not None:
            raise IncompatibleModelError(
                f"{type(masked.module).__name__} already follows another masked map. Remove that attachment, or name "
                "several sources in one plan."
            )
        self.masked = masked
        self._pending: list[tuple[torch.Tensor, Sequence[tuple[torch.Tensor | None, RowMask]], str]] = []
        self._random: list[tuple[torch.Generator, torch.Tensor]] = []
        self._off = False  # whether the adapted layer runs as its base
        self.hook = Hook(self._before)
        before = masked.module.register_forward_pre_hook(self.hook, with_kwargs=True)
        try:
            after = masked.module.register_forward_hook(
                Hook(self._after), with_kwargs=True, prepend=True, always_call=True
            )
        except BaseException:
            before.remove()
            raise
        self.key, self._handles = before.id, (before, after)

    @staticmethod
    def on(module: nn.Module) -> MaskedHooks | None:
        """The hooks that a module has; None for a module without."""
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook.function, "__self__", None) if isinstance(hook, Hook) else None
            if isinstance(owner, MaskedHooks):
                return owner
        return None

    def remove(self) -> None:
        """Take the hooks off."""
        self._switch(off=False)
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._pending.clear()
        self._random.clear()
        self._switch(off=False)
        masks = [(columns, mask) for columns, mask in self.masked.mask()]
        native = self._native()
        if {mask.uniform for _, mask in masks} == {native}:
            return None
        x, put = first_input(args, kwargs)
        if len(masks) == 1 and self._is_base(mask := _fit(masks[0][1], x)):
            self._switch(off=True)
            self._pending.append((x, [(None, mask)], "base"))
            return None
        if self._bypassed():
            self._random = [(generator, generator.get_state()) for generator in generators_of(x.device)]
        shadowed = next(reversed(module._forward_pre_hooks)) != self.key  # a later pre-hook must see whole inputs
        if self.masked.per_call or len(masks) > 1 or shadowed:
            self._pending.append((x, masks, "all"))
            return None
        columns, mask = masks[0]
        mask = _fit(mask, x)
        how = _choose(self.masked.execution, mask)
        if mask.uniform is None and (how == "dense" or (how == "overwrite" and native == 0)):
            self._pending.append((x, [(columns, mask)], "all"))
            return None
        self._pending.append((x, [(columns, mask)], "rows"))
        return put(self._native_rows(x, mask, native))

    def _switch(self, *, off: bool) -> None:
        """Let the adapted layer run as its base, or as it is; a pass that fails leaves it as it is."""
        if self._off is not off:
            vars(self.masked.adapted)["_disable_adapters"] = self._off = off  # a module's setattr is slow

    def _native(self) -> int:
        return -1 if self._bypassed() else self.masked.native

    def _bypassed(self) -> bool:
        return self.masked.bypass is not None and self.masked.bypass()

    def _is_base(self, mask: RowMask) -> bool:
        """Whether all rows need the base, and some of them a difference besides."""
        by_delta = mask.uniform is None and self.masked.execution == "auto" and _all_deltas(mask, self.masked.deltas)
        return self.masked.adapted is not None and (mask.uniform == 0 or by_delta)

    def _native_rows(self, x: torch.Tensor, mask: RowMask, native: int) -> torch.Tensor:
        rows = mask.rows(native)
        if len(rows) == 0 and not self.masked.takes_empty:
            rows = rows.new_zeros(1)
        return RowLayout.of(x, mask).gather(x, rows)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._switch(off=False)
        if not self._pending or output is None:
            return None
        while self._random:
            generator, state = self._random.pop()
            generator.set_state(state)
        x, masks, have = self._pending.pop()
        if have == "base":
            x, mask = first_input(args, kwargs)[0], masks[0][1]
            return masked_rows(x, {0: lambda _: output}, mask, deltas=self.masked.deltas)
        own, rest = _fresh(output, x), split_output(output)[1]
        if self.masked.per_call:
            return join_output(self._whole(own, masks[0][1], args, kwargs), rest)
        if have == "all":  # a later pre-hook may have changed the input
            return join_output(self._over(first_input(args, kwargs)[0], own, masks), rest)
        maps: dict[int, RowMap | TokenMap] = dict(self.masked.alternatives)
        maps[self._native()] = lambda _: own
        new = masked_rows(x, maps, masks[0][1], execution=self.masked.execution)
        return join_output(new, rest)

    def _over(
        self, x: torch.Tensor, own: torch.Tensor, masks: Sequence[tuple[torch.Tensor | None, RowMask]]
    ) -> torch.Tensor:
        """The module has run on all rows; write the other sources over it, feature group by feature group."""
        native = self._native()
        if native < 0 and own.requires_grad:  # every row is written over
            own = own.detach()
        for columns, wide in masks:
            mask = _fit(wide, x)
            layout = RowLayout.of(x, mask)
            flat = layout.flatten(own)
            for k in mask.used:
                if k == native:
                    continue
                rows, change = mask.rows(k), self.masked.alternatives[k]
                if mask.uniform is not None or self.masked.execution == "dense":
                    new = layout.flatten(_run(change, x, mask))[rows]
                else:
                    new = layout.scatter(_run(change, layout.gather(x, rows), mask, rows))
                flat = _write(flat, rows, new, columns)
            own = layout.restore(flat)
        return own

    def _whole(self, own: torch.Tensor, mask: RowMask, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """For modules with arguments of their own shape: run every source on the same call and select."""
        source = mask.source[..., None]
        for k in mask.used:
            if k != self.masked.native:
                change: Any = self.masked.alternatives[k]
                own = torch.where(source == k, _tensor(change(*args, **kwargs)), own)
        return own


def _all_deltas(mask: RowMask, deltas: Mapping[int, RowMap | TokenMap]) -> bool:
    return bool(deltas) and all(k == 0 or k in deltas for k in mask.used)


def _add_deltas(
    flat: torch.Tensor, x: torch.Tensor, deltas: Mapping[int, RowMap | TokenMap], mask: RowMask, layout: RowLayout
) -> torch.Tensor:
    for k in mask.used:
        if k != 0:
            rows = mask.rows(k)
            difference = layout.scatter(_run(deltas[k], layout.gather(x, rows), mask, rows)).to(flat.dtype)
            flat = _put(flat, rows, difference, add=True)
    return flat


def _put(flat: torch.Tensor, rows: torch.Tensor, new: torch.Tensor, *, add: bool = False) -> torch.Tensor:
    """Write (or add) rows; in place where autograd does not look, because the output is fresh and ours alone."""
    if torch.is_grad_enabled() or flat.is_inference() != torch.is_inference_mode_enabled():
        return flat.index_add(0, rows, new) if add else flat.index_copy(0, rows, new)
    return flat.index_add_(0, rows, new) if add else flat.index_copy_(0, rows, new)


def _choose(execution: Execution, mask: RowMask) -> str:
    if execution != "auto":
        return execution
    return "overwrite" if mask.share <= PARTITION_FROM else "partition"


def _fit(mask: RowMask, x: torch.Tensor) -> RowMask:
    """A head may be fed the last columns only."""
    batch, length = mask.shape
    if x.dim() == 3 and x.shape[0] == batch and x.shape[1] < length:
        return mask.tail(int(x.shape[1]))
    return mask


def _run(function: RowMap | TokenMap, x: torch.Tensor, mask: RowMask, rows: torch.Tensor | None = None) -> torch.Tensor:
    return _tensor(function.function(x, mask, rows) if isinstance(function, TokenMap) else function(x))


def _tensor(output: Any) -> torch.Tensor:
    return split_output(output)[0]


def _fresh(output: Any, x: torch.Tensor) -> torch.Tensor:
    """A module's output, copied if it is (a view of) its input: rows may be written over it."""
    own = _tensor(output)
    return own.clone() if own.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else own


def _select(outputs: Mapping[int, torch.Tensor], mask: RowMask) -> torch.Tensor:
    source = mask.source.flatten()
    chosen = outputs[mask.used[0]]
    for k in mask.used[1:]:
        chosen = torch.where((source == k).view(-1, *[1] * (chosen.dim() - 1)), outputs[k], chosen)
    return chosen


def _assemble(base: torch.Tensor | None, outputs: Mapping[int, torch.Tensor], mask: RowMask) -> torch.Tensor:
    if base is None:
        some = next(iter(outputs.values()))
        base = some.new_empty(mask.shape[0] * mask.shape[1], *some.shape[1:])
    for k, rows in outputs.items():
        base = _put(base, mask.rows(k), rows.to(base.dtype))
    return base


def _write(flat: torch.Tensor, rows: torch.Tensor, new: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    new = new.to(flat.dtype)
    if columns is None:
        return _put(flat, rows, new)
    columns = columns.to(flat.device)
    return _put(flat, rows, flat.index_select(0, rows).index_copy(1, columns, new.index_select(1, columns)))
