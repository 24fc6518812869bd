"""Which source each row of each module takes its weights from, set in every pass.

This carries weight grafting, position-gated adapters, the choice of an adapter, and batches whose rows belong to
different adapters: all differ only in who says which source a row uses.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_interp.core.hooks.intervention import Attachment, Intervention
from lightning_interp.core.model.components import Part, mixing_modules, own_map
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.own_hooks import Hook
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.repeats import rows_each
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.weights.counted_dropout import CountedDropout
from lightning_interp.core.weights.fitting import adapted_layers
from lightning_interp.core.weights.holders import Claim, Masks, RowSource, held_adapters, hold
from lightning_interp.core.weights.masked_linear import Execution, RowMap
from lightning_interp.core.weights.row_masks import RowMask
from lightning_interp.core.weights.sources import AdapterSource, AnySource, ModelSource, WeightSource, make_sources
from lightning_interp.errors import IncompatibleModelError, PositionError, SiteError, UnsupportedStrategyError

__all__ = ["RowWeights", "Signature", "check_sources", "expand_rows", "without_padding"]

Signature = tuple[int, ...]
"""Source of one component in one layer for every code: 0 the recipient, ``k`` the k-th source."""


class RowWeights(Intervention):
    """Run each row (token) of a batch with the weights of its own source: ``codes`` ``[B]``, ``[B, T]`` or a function.

    Code 0 is the recipient, without its adapters if one is a source; ``k`` is the k-th source. Gradients reach each
    source through its own rows only. The dropout of an adapter is drawn by counting (see :attr:`dropout`): it moves no
    generator, and is the same for a batch in parts. With several holders of a module each keeps the rows that it
    claims.

    Args:
        sources: Models, adapters of the recipient, :class:`WeightSource` or (with a dose) :class:`RowSource`, by name.
        codes: Of the coming passes, or a function of the ``StepContext`` that gives them; may be set anew before each.
        signature: Source of every code, for a component and its layer; the default takes source ``k`` at code ``k``.
        execution: How mixed masks are computed.
        adds: Rows that another holder with ``adds`` claims too get the sum of both differences (low-rank only).
        dropout: What the dropout of adapters in training is drawn from.
        name: What messages call this.

    Example:
        >>> from peft import LoraConfig, inject_adapter_in_model
        >>> from lightning_interp.testing import tiny_model
        >>> model, ids = tiny_model("llama"), torch.arange(8).view(2, 4)
        >>> for name, rank in {"first": 2, "second": 4}.items():
        ...     config = LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
        ...     _ = inject_adapter_in_model(config, model, adapter_name=name)
        >>> rows = RowWeights({"a": "first", "b": "second"})
        >>> with rows.attach(model), torch.no_grad():
        ...     rows.codes = torch.tensor([1, 2])
        ...     both = model(ids).logits
        ...     rows.codes = torch.tensor([2])
        ...     second = model(ids[1:]).logits
        >>> torch.allclose(both[1:], second, atol=1e-5), torch.allclose(both[0], second[0], atol=1e-2)
        (True, False)
    """

    def __init__(
        self,
        sources: AnySource | Mapping[str, AnySource] | Sequence[RowSource],
        codes: torch.Tensor | Callable[[StepContext], torch.Tensor] | None = None,
        *,
        signature: Callable[[str, int | None], Signature] | None = None,
        execution: Execution = "auto",
        adds: bool = False,
        dropout: CountedDropout | None = None,
        name: str = "",
    ) -> None:
        if isinstance(sources, Sequence) and not isinstance(sources, str):
            self.sources = tuple(sources)
        else:
            self.sources = tuple(RowSource(source, label=label) for label, source in make_sources(sources).items())
        self.codes = codes
        everything = tuple(range(len(self.sources) + 1))
        self.signature = signature or (lambda *_: everything)
        self.execution: Execution = execution
        self.adds = adds
        self.dropout = dropout or CountedDropout()
        self.name = name or f"RowWeights({', '.join(repr(source.label) for source in self.sources)})"
        self.reads_weights = any(isinstance(each.source, ModelSource) for each in self.sources)
        self.adapters = frozenset(e.source.name for e in self.sources if isinstance(e.source, AdapterSource))

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """None: weights are changed, not activations at a site."""
        return ()

    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """The identity; see :meth:`install`."""
        return x

    def check(self, model_map: ModelMap) -> None:
        """Refuse sources that do not fit; see :func:`check_sources`."""
        check_sources(model_map, [each.source for each in self.sources])

    def install(self, attachment: Attachment) -> None:
        """Hook every module that some code can change (and every adapted layer, which must be off elsewhere)."""
        by_module: dict[nn.Module, list[tuple[str, int | None, Part]]] = {}
        for name, layer, part in attachment.model_map.cells():
            by_module.setdefault(part.module, []).append((name, layer, part))
        rows = _Rows(self, attachment)
        for cells in by_module.values():
            claim = rows.claim(cells)
            if claim is not None:
                hold(attachment, claim)
        model_map, adapted = attachment.model_map, adapted_layers(attachment.model_map) if self.adapters else []
        check = partial(_check_call, self.name, adapted[0][1] if adapted else None)
        attachment.add(model_map.model.register_forward_pre_hook(Hook(check), with_kwargs=True))
        if adapted:
            attachment.on_installed(lambda: _check_active(type(model_map.model).__name__, adapted))


def expand_rows(codes: torch.Tensor, step: StepContext, what: str = "Codes") -> torch.Tensor:
    """One code a row ``[B']`` for every token of a pass ``[B, T]``; rows may be the beams of fewer prompts."""
    if len(codes) == 0 or step.batch_size % len(codes):
        raise PositionError(
            f"{what} are given for {len(codes)} rows, but the batch has {step.batch_size}. Give one a row."
        )
    return codes.repeat_interleave(rows_each(step, len(codes), what))[:, None].expand(-1, step.length)


def without_padding(codes: torch.Tensor, step: StepContext) -> torch.Tensor:
    """Give padding the code of its row's first real token: it reaches none, and uniform masks stay uniform."""
    first = step.valid.long().argmax(dim=1, keepdim=True)
    return torch.where(step.padding, codes.gather(1, first), codes)


def check_sources(model_map: ModelMap, sources: Sequence[WeightSource]) -> None:
    """Refuse sources that cannot be chosen row by row in a recipient, before anything is hooked."""
    for source in sources:
        source.check(model_map)
    if "mixing" not in model_map.memo:
        model_map.memo["mixing"] = [(i, *f) for i, block in enumerate(model_map.blocks) for f in mixing_modules(block)]
    for i, name, why in model_map.memo["mixing"]:
        raise SiteError(
            f"Block {i} of {type(model_map.model).__name__} has {name!r}, {why}: weights cannot be chosen token by "
            "token in one pass. Graft a decoder whose only mixing of tokens is attention."
        )
    if any(isinstance(source, AdapterSource) for source in sources):
        inside = {id(part.module) for _, _, part in model_map.cells()}
        lost = [path for path, layer, _ in adapted_layers(model_map) if id(layer) not in inside]
        if lost:
            raise SiteError(f"Adapter layers {', '.join(lost[:4])} lie outside of every known component.")


class _Rows:
    """What one attachment keeps: tables on the device, codes in each pass."""

    def __init__(self, rows: RowWeights, attachment: Attachment) -> None:
        self.rows, self.attachment = rows, attachment
        self.tables: dict[tuple[Signature, torch.device], torch.Tensor] = {}

    def claim(self, cells: Sequence[tuple[str, int | None, Part]]) -> Claim | None:
        """What is done with one module, or None where no code can change it."""
        rows, (_, layer, part) = self.rows, cells[-1]
        part = cells[0][2]
        changes: dict[int, RowMap] = {}
        deltas: dict[int, RowMap] = {}
        for k, each in enumerate(rows.sources, start=1):
            if (change := each.source.alternative(part)) is not None:
                changes[k] = change
                if (delta := each.source.delta(part)) is not None:
                    deltas[k] = delta
        groups = [
            (p.columns, tuple(k if k in changes else 0 for k in rows.signature(name, at))) for name, at, p in cells
        ]
        adapted = bool(rows.adapters) and own_map(part.module) is not None
        if not adapted and not any(any(signature) for _, signature in groups):
            return None
        if len({signature for _, signature in groups}) == 1:
            groups = [(None, groups[0][1])]
        return Claim(
            rows.name,
            part,
            layer,
            {k: rows.sources[k - 1] for k in changes},
            changes,
            deltas,
            rows.adapters if adapted else frozenset(),
            partial(self.masks, groups),
            rows.execution,
            rows.adds,
            rows.dropout,
            lambda: self.attachment.step,
        )

    def masks(self, groups: Sequence[tuple[torch.Tensor | None, Signature]]) -> Masks:
        """The masks of this pass."""
        step = self.attachment.step
        return [(columns, self._mask(step, signature)) for columns, signature in groups]

    def _mask(self, step: StepContext, signature: Signature) -> RowMask:
        key = (id(self), signature)
        if key not in step.cache:
            step.cache[key] = RowMask(self._table(signature, step.device)[self._codes(step)])
        found: RowMask = step.cache[key]
        return found

    def _table(self, signature: Signature, device: torch.device) -> torch.Tensor:
        if (signature, device) not in self.tables:
            plain = torch.frombuffer(array("q", signature), dtype=torch.int64)  # ten times faster than torch.tensor
            self.tables[signature, device] = plain.to(device)
        return self.tables[signature, device]

    def _codes(self, step: StepContext) -> torch.Tensor:
        key = (id(self), "codes")
        if key not in step.cache:
            given = self.rows.codes
            step.cache[key] = given(step) if callable(given) else self._given(given, step)
        codes: torch.Tensor = step.cache[key]
        return codes

    def _given(self, codes: torch.Tensor | None, step: StepContext) -> torch.Tensor:
        name, most = self.rows.name, len(self.rows.sources)
        if codes is None:
            raise PositionError(
                f"{name} has no codes for this pass. Set its codes, [B] or [B, T], before the model runs."
            )
        if codes.dim() == 1:
            codes = expand_rows(codes, step, f"The codes of {name}")
        if tuple(codes.shape) != (step.batch_size, step.length):
            raise PositionError(
                f"The codes of {name} are {tuple(codes.shape)}, but the pass has {step.batch_size} rows of "
                f"{step.length} tokens. Give [B, T], or one code a row [B]."
            )
        low, high = (int(value) for value in torch.aminmax(codes)) if codes.numel() else (0, 0)
        if low < 0 or high > most:
            raise PositionError(f"The codes of {name} go from {low} to {high}; expected 0 (recipient) to {most}.")
        return codes.to(step.device, torch.int64)


def _check_call(name: str, adapted: Any, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse calls whose head rows cannot be told, or whose rows have adapters of their own."""
    if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
        raise PositionError(
            f"{name} cannot follow logits_to_keep as a tensor of indices. Pass a number of last columns."
        )
    for hook in adapted._forward_pre_hooks.values() if adapted is not None else ():
        if "adapter_names" in (names := getattr(hook, "keywords", {})):  # how PEFT hands them to its layers
            raise UnsupportedStrategyError(
                f"The rows have adapters of their own (adapter_names={names['adapter_names']}), which {name} would "
                "overrule. Give each row its own plan or code instead."
            )


def _check_active(kind: str, adapted: Sequence[tuple[str, Any, list[str]]]) -> None:
    """Refuse an active adapter that would be off without anybody having said so."""
    for path, layer, names in adapted:
        held, active = held_adapters(layer), list(layer.active_adapters)
        fits = set(active) <= held if len(held) > 1 else active == list(held)
        if held.intersection(names) and not fits:
            expected = " and ".join(map(repr, sorted(held)))
            raise IncompatibleModelError(
                f"{path} of {kind} has active adapters {active}, expected only {expected}. Make it the active one "
                "(set_adapter)."
            )
