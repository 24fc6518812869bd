"""Watch, while an adapter trains, at which tokens, modules and layers it does what it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.core.callbacks.intervention_callback import tokenizer_of
from lightning_interp.core.callbacks.monitor import Monitor, own_rows
from lightning_interp.core.measure.reduced import KeyedRows
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.weights.low_rank import only_adapter
from lightning_interp.errors import RecipeError
from lightning_interp.lora.gate import AdapterGate
from lightning_interp.lora.gate_spec import GateSpec, named_gates
from lightning_interp.lora.margins import logit_margins

__all__ = ["GateCallback", "GateScores"]

Measure = Callable[[nn.Module, Any, Sequence[Any]], Tensor]


class GateScores(KeyedRows):
    """One number a prompt under each of several gates; a prompt counts once, whoever measured it.

    Args:
        gates: Their names.
    """

    def __init__(self, gates: Sequence[str]) -> None:
        super().__init__(len(gates))
        self.gates = tuple(gates)

    def update(self, numbers: Sequence[int], values: Tensor) -> None:
        """Add values ``[n, gates]`` of the prompts of these numbers."""
        self.add(torch.tensor(list(numbers)), values)

    def compute(self) -> dict[str, float]:
        """The mean over prompts under each gate."""
        return dict(zip(self.gates, self.table()[1].mean(0).tolist(), strict=True))


class GateCallback(Monitor):
    """Every so often run the model with its adapter under each of several gates, and log ``<name>/<gate>``.

    What is measured is a mean over prompts, by default the margin of a target's logit; each process measures its share
    of them. The weights that a run ends with are those that it would have ended with without this; see
    :class:`~lightning_interp.core.callbacks.monitor.Monitor`.

    Args:
        prompts: What is asked: ``MarginPrompt`` for the default, or whatever ``measure`` takes.
        gates: By name: a :class:`~lightning_interp.lora.gate_spec.GateSpec`, or the same as a dict;
            :func:`~lightning_interp.lora.gate_spec.named_gates` if None.
        measure: ``measure(model, tokenizer, prompts)`` gives one number a prompt ``[len(prompts)]`` while a gate is on.
        adapter: Its name; None for the only one.
        tokenizer: Default: the module's or data module's ``tokenizer``.
        target: Dotted path of the Hugging Face model below the LightningModule, where there are several.
        every, at_start, at_end, name: See ``Monitor``.

    Attributes:
        history: One entry a look: ``{"epoch": ..., "step": ..., "<gate>": ...}``. Saved in checkpoints.
        gates: The specs by name.

    Raises:
        RecipeError: If there is no prompt or no gate.

    Example:
        >>> from lightning_interp.lora import MarginPrompt
        >>> callback = GateCallback([MarginPrompt("I like the", " owl", (" cat",))], named_gates("like"), every=10)
        >>> callback.history, callback.prefix
        ([], 'gate')
    """

    hooks = reads_weights = True

    def __init__(
        self,
        prompts: Sequence[Any],
        gates: Mapping[str, GateSpec | Mapping[str, Any]] | None = None,
        *,
        measure: Measure = logit_margins,
        adapter: str | None = None,
        tokenizer: Any = None,
        target: str | None = None,
        every: int | str = "epoch",
        at_start: bool = False,
        at_end: bool = True,
        name: str = "gate",
    ) -> None:
        super().__init__(every=every, at_start=at_start, at_end=at_end, name=name)
        named = named_gates() if gates is None else gates
        self.gates = {key: g if isinstance(g, GateSpec) else GateSpec.from_dict(g) for key, g in named.items()}
        self.prompts = list(prompts)
        if not self.prompts or not self.gates:
            raise RecipeError(
                f"GateCallback({name!r}) got {len(self.prompts)} prompts and {len(self.gates)} gates; expected at "
                "least one of each."
            )
        self.measure, self.adapter = measure, adapter
        self.tokenizer, self.target = tokenizer, target
        self._reader: Any = None
        self._made: dict[str, AdapterGate] = {}

    def prepare(self, trainer: Any, module: Any, stage: str) -> None:
        """Find the tokenizer and the adapter, and refuse gates that do not fit, before anything runs.

        Raises:
            RecipeError: If there is no tokenizer.
            IncompatibleModelError: If there is no adapter yet (list what puts it in before this), or several.
            SiteError: If a gate names what the model lacks.
        """
        self._reader = tokenizer_of(self, module, getattr(trainer, "datamodule", None))
        if self._reader is None:
            raise RecipeError(f"GateCallback({self.prefix!r}) found no tokenizer. Pass GateCallback(tokenizer=...).")
        model_map = ModelMap.build(module, target=self.target)
        adapter = only_adapter(model_map, self.adapter)
        self._made = {name: AdapterGate(adapter, spec) for name, spec in self.gates.items()}
        for gate in self._made.values():
            gate.check(model_map)

    def look(self, trainer: Any, module: Any) -> dict[str, float]:
        """The mean under each gate."""
        numbers = own_rows(trainer, len(self.prompts))
        mine = [self.prompts[number] for number in numbers]
        scores = GateScores(list(self.gates)).to(module.device)
        if mine:
            model = ModelMap.build(module, target=self.target).model
            scores.update(numbers, torch.stack([self._under(gate, model, mine) for gate in self._made.values()], 1))
        return scores.compute()

    def _under(self, gate: AdapterGate, model: nn.Module, prompts: Sequence[Any]) -> Tensor:
        with gate.attach(model, tokenizer=self._reader):
            found = self.measure(model, self._reader, prompts)
        if not isinstance(found, Tensor) or tuple(found.shape) != (len(prompts),):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RecipeError(
                f"GateCallback({self.prefix!r}): measure gave {shape}; expected a tensor [{len(prompts)}], one number "
                "a prompt."
            )
        return found.double().cpu()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_made": {}}
