"""An adapter that acts at chosen tokens, modules and layers alone, in one ordinary forward pass.

At each cell (token t, module m) the layer computes ``W x + g(t, m) s B(A x)`` with ``g`` 0 or 1: 1 everywhere is the
adapted model and 0 everywhere its base, bit for bit both. Keys and values are made under the gate of their own token,
and later tokens read them whatever their own gate is: "on at Q alone" lets the adapter write at Q and the base model
read. Every adapted layer treats tokens on its own, so one pass with a choice per row equals feeding token after token
with the adapter switched on and off.

Two gates that exclude each other are not the two halves of an effect: what is enough and what is needed are two
questions, so look at a gate beside its inverse (:func:`~lightning_interp.lora.gate_spec.named_gates` pairs them).

After full finetuning there is no adapter to gate. The same question is then a graft of the finetuned model's weights:
``Graft(finetuned, GraftPlan.at(positions, components, layers), decode="recipient")`` of
:mod:`lightning_interp.grafting` does what a plain gate does, ``GraftPlan.at(~positions, ...)`` with
``decode="outside"`` what ``invert`` does; given ``AdapterDonor(name)`` the two agree exactly.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lightning_interp.core.hooks.intervention import Attachment, Intervention
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import All, Positions
from lightning_interp.core.tokens.repeats import rows_each
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.core.weights.fitting import adapted_layers, check_base_biases
from lightning_interp.core.weights.masked_linear import Execution
from lightning_interp.core.weights.row_weights import RowWeights, check_sources, without_padding
from lightning_interp.core.weights.sources import AdapterSource
from lightning_interp.errors import RecipeError
from lightning_interp.lora.gate_spec import GateSpec

__all__ = ["AdapterGate"]


class AdapterGate(Intervention):
    """Run a model with its adapter on at chosen tokens, modules and layers alone, and as its base elsewhere.

    One pass does it, with padding, with a KV cache and in ``generate``; a batch may have a spec of its own for each
    row, which all beams or samples of a prompt follow. LoRA, rsLoRA, ``lora_bias``, DoRA and saved modules are exact.
    Gradients reach the adapter through the tokens at which it is on.

    Args:
        adapter: Name of the adapter, as PEFT knows it; the active one.
        spec: One spec for every row of the batch, or a list of one a row.
        execution: How mixed masks are computed (see :func:`~lightning_interp.core.weights.masked_linear.masked_rows`).

    Attributes:
        unmatched: Rows so far in which a spec found no token, by the spec's position in the list; the first of each
            warns.

    Raises:
        RecipeError: If there is no spec, or something else in its place.

    Example:
        >>> from peft import LoraConfig, inject_adapter_in_model
        >>> from lightning_interp.testing import tiny_model
        >>> model, ids = tiny_model("llama"), torch.arange(6)[None]
        >>> base = model(ids).logits
        >>> config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        >>> model = inject_adapter_in_model(config, model)
        >>> with AdapterGate("default", GateSpec(tokens=[-1])).attach(model):
        ...     gated = model(ids).logits
        >>> torch.allclose(gated[:, :-1], base[:, :-1], atol=1e-6), torch.allclose(gated[:, -1], base[:, -1], atol=1e-3)
        (True, False)
    """

    def __init__(self, adapter: str, spec: GateSpec | Sequence[GateSpec], *, execution: Execution = "auto") -> None:
        specs = (spec,) if isinstance(spec, GateSpec) else tuple(spec)
        wrong = next((each for each in specs if not isinstance(each, GateSpec)), None)
        if not specs or wrong is not None:
            raise RecipeError(
                f"AdapterGate({adapter!r}) got {'no spec' if not specs else repr(wrong)}; expected a GateSpec, or a "
                "list of one a row."
            )
        self.adapter, self.specs, self.execution = adapter, specs, execution
        self.unmatched: Counter[int] = Counter()

    def sites(self, model_map: ModelMap) -> Sequence[Site]:
        """None: weights are chosen, not activations at a site."""
        return ()

    def transform(self, site: Site, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        """The identity; see :meth:`install`."""
        return x

    def check(self, model_map: ModelMap) -> None:
        """Refuse what cannot be gated, before anything is hooked.

        Raises:
            IncompatibleModelError: If the adapter is missing, merged, disabled, or came with trained biases of the
                base, which no gate can switch off.
            SiteError: If a spec names what the model lacks.
        """
        check_sources(model_map, [AdapterSource(self.adapter)])
        check_base_biases(model_map, self.adapter, why="that are on whatever a gate says")
        adapted = {id(layer) for _, layer, names in adapted_layers(model_map) if self.adapter in names}
        touched = {(name, at) for name, at, part in model_map.cells() if id(part.module) in adapted}
        for spec in dict.fromkeys(self.specs):
            cells = spec.cells(model_map)
            if cells and not cells & touched:
                warnings.warn(
                    f"Adapter {self.adapter!r} has no weights in modules={spec.modules!r}, layers={spec.layers!r}: "
                    "a gate there changes nothing.",
                    stacklevel=3,
                )

    def install(self, attachment: Attachment) -> None:
        """Hook every adapted layer."""
        masks = list(dict.fromkeys(spec.cells(attachment.model_map) for spec in self.specs))
        codes = _Codes(self, [2 + 2 * masks.index(spec.cells(attachment.model_map)) for spec in self.specs])

        def signature(component: str, layer: int | None) -> tuple[int, ...]:
            inside = [(component, layer) in mask for mask in masks]
            return (0, 1, *(int(source) for within in inside for source in (within, not within)))

        RowWeights(
            {self.adapter: AdapterSource(self.adapter)},
            codes,
            signature=signature,
            execution=self.execution,
            name=f"AdapterGate({self.adapter!r})",
        ).install(attachment)


_OFF, _ON = 0, 1
"""Codes of tokens with the adapter nowhere and everywhere; an even code from 2 on is a mask, the next one its rest."""


class _Codes:
    """The code of each token of a pass, ``[B, T]``."""

    def __init__(self, gate: AdapterGate, masks: Sequence[int]) -> None:
        self.gate = gate
        table = [_codes_of(spec, mask) for spec, mask in zip(gate.specs, masks, strict=True)]
        self.table = torch.tensor(table)  # [specs, 3]: within Q, elsewhere, generated

    def __call__(self, step: StepContext) -> torch.Tensor:
        specs = self.gate.specs
        each = rows_each(step, len(specs), "Gates") if len(specs) > 1 else step.batch_size
        row_spec = torch.arange(len(specs)).repeat_interleave(each)
        within, elsewhere, generated = self.table[row_spec].to(step.device)[:, :, None].unbind(dim=1)
        phase = step.phase
        if step.unseen or step.before is not None:
            for positions, rows in self._asked(row_spec.tolist(), _on).items():
                step.rows(rows).check_cached(positions)
        if phase == "new":
            return without_padding(generated.expand(-1, step.length), step)
        chosen = self._chosen(step, row_spec.tolist())
        codes = torch.where(chosen, within, elsewhere)
        if phase == "mixed":
            codes = torch.where(step.positions >= step.prompt_lengths[:, None], generated, codes)
        return without_padding(codes, step)

    def _chosen(self, step: StepContext, row_spec: Sequence[int]) -> torch.Tensor:
        """Q of every row; ``Last`` stays in the prompt."""
        step = replace(step, rolling=False, cache={})
        chosen = torch.zeros(step.batch_size, step.length, dtype=torch.bool, device=step.device)
        for positions, rows in self._asked(row_spec, lambda spec: spec.positions).items():
            chosen[rows] = positions.mask(step if len(rows) == step.batch_size else step.rows(rows))
        if step.phase == "mixed":
            chosen &= step.positions < step.prompt_lengths[:, None]
        self._count(step, row_spec, chosen)
        return chosen

    def _asked(self, row_spec: Sequence[int], what: Callable[[GateSpec], Positions]) -> dict[Positions, list[int]]:
        """The rows of each selector: it asks no others, where its text need not exist."""
        rows: dict[Positions, list[int]] = {}
        for row, spec in enumerate(row_spec):
            rows.setdefault(what(self.gate.specs[spec]), []).append(row)
        return rows

    def _count(self, step: StepContext, row_spec: Sequence[int], chosen: torch.Tensor) -> None:
        """Count rows without a token of Q, once their prompts have been read."""
        found, before, told = chosen.any(dim=1), step.carried.get(self), step.generation
        step.carried[self] = found = found if before is None else found | before
        if told is not None:
            if step.past + step.length < told.columns + step.virtual or self in told.notes:
                return
            told.notes[self] = True
        for row in (~found).nonzero().flatten().tolist():
            number = row_spec[row]
            spec = self.gate.specs[number]
            if spec.tokens in (None, ()):
                continue
            self.gate.unmatched[number] += 1
            if self.gate.unmatched[number] == 1:
                acts = "everywhere in its mask" if spec.invert else "everywhere" if spec.complement else "nowhere"
                warnings.warn(
                    f"GateSpec(tokens={spec.tokens!r}) finds no token in row {row}, so the adapter acts {acts} there. "
                    "Further rows are counted in AdapterGate.unmatched.",
                    stacklevel=2,
                )


def _codes_of(spec: GateSpec, mask: int) -> tuple[int, int, int]:
    """Codes within Q, elsewhere in the prompt, and of generated tokens."""
    cells = mask + 1 if spec.complement else mask
    within = _OFF if spec.invert else cells
    elsewhere = cells if spec.invert or spec.tokens is None else _ON if spec.complement else _OFF
    return within, elsewhere, {"outside_q": elsewhere, "spec_mask": cells, "off": _OFF}[spec.decode]


def _on(spec: GateSpec) -> Positions:
    """Tokens of the prompt at which the adapter is on in some cell."""
    if spec.complement or spec.tokens is None:
        return All()
    return ~spec.positions if spec.invert else spec.positions
