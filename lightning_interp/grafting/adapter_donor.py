"""Adapters as donors: the recipient is the model with its adapters off, a donor one of them switched on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_interp.core.model.components import Part
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import IncompatibleModelError

__all__ = ["AdapterDonor", "Donor", "adapted_layers", "own_map", "takes_empty"]

_TAKES_EMPTY = ("Linear", "Conv1D", "Embedding", "LayerNorm", "RMSNorm")


class Donor(ABC):
    """A source of weights for every part of the recipient."""

    @abstractmethod
    def check(self, recipient: ModelMap) -> None:
        """Refuse a recipient that does not fit."""

    @abstractmethod
    def alternative(self, part: Part) -> Callable[..., Any] | None:
        """The donor's map for one part; None where it is the recipient's own."""

    def delta(self, part: Part) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What the donor adds to the recipient's map of one part, where that is cheaper than the whole map."""
        return None


class AdapterDonor(Donor):
    """A LoRA adapter that sits on the recipient: recipient = adapters off, donor = this adapter on.

    Args:
        name: Name of the adapter, as PEFT knows it.
        beside: Other adapters of the recipient that are donors of the same graft.
    """

    def __init__(self, name: str, beside: Sequence[str] = ()) -> None:
        self.name = name
        self.beside = tuple(other for other in beside if other != name)

    def check(self, recipient: ModelMap) -> None:
        """Refuse adapters that are missing, merged, switched off, or mixed with others.

        Raises:
            IncompatibleModelError: With the remedy.
        """
        kind, layers = type(recipient.model).__name__, adapted_layers(recipient)
        known = sorted({name for _, _, names in layers for name in names})
        if self.name not in known:
            has = f"its adapters are {', '.join(map(repr, known))}" if known else "it has none"
            raise IncompatibleModelError(
                f"{kind} has no adapter {self.name!r}; {has}. Inject it first, or pass the finetuned model as donor."
            )
        for path, layer, names in layers:
            self._check_layer(f"{path} of {kind}", layer, names)

    def _check_layer(self, where: str, layer: Any, names: list[str]) -> None:
        if getattr(layer, "merged", False):
            raise IncompatibleModelError(
                f"Adapter {self.name!r} is merged into {where}, so the recipient is gone. Unmerge first."
            )
        if type(getattr(layer, "lora_variant", {}).get(self.name)).__name__.startswith("ALora"):
            raise IncompatibleModelError(
                f"Adapter {self.name!r} in {where} is an activated LoRA, which chooses its own tokens. "
                "Graft a plain LoRA, and name the tokens in the plan."
            )
        if getattr(layer, "disable_adapters", False):
            raise IncompatibleModelError(f"Adapter {self.name!r} is disabled in {where}. Enable adapters first.")
        active = list(layer.active_adapters)
        donors = {self.name, *self.beside}
        fits = set(active) <= donors if self.beside else active == [self.name]
        if self.name in names and not fits:
            expected = " and ".join(map(repr, (self.name, *self.beside)))
            raise IncompatibleModelError(
                f"{where} has active adapters {active}, expected only {expected}. Make it the active one (set_adapter)."
            )

    def alternative(self, part: Part) -> Callable[..., Any] | None:
        """The layer with this adapter alone; None for parts that it does not touch."""
        layer: Any = part.module
        if own_map(layer) is None or self.name not in _adapters(layer):
            return None
        copies = getattr(layer, "modules_to_save", None)
        if copies is not None:
            saved: Callable[..., Any] = copies[self.name]
            return saved
        tokens = getattr(layer, "token_adapter", None)
        if tokens is not None:
            return lambda x: tokens.forward_adapters(x, [self.name])
        return lambda *args, **kwargs: self._alone(layer, *args, **kwargs)

    def _alone(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an adapted layer as if this were its one active adapter, past its hooks."""
        active = layer._active_adapter
        layer._active_adapter = [self.name]
        try:
            return layer.forward(*args, **kwargs)
        finally:
            layer._active_adapter = active

    def delta(self, part: Part) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """``s B(A(x))`` of a plain LoRA linear map; None for variants such as DoRA, embeddings and saved modules."""
        layer: Any = part.module
        pair = [getattr(layer, table, {}) for table in ("lora_A", "lora_B")]
        if any(self.name not in table for table in pair) or self.name in getattr(layer, "lora_variant", {}):
            return None
        down, up, scale = pair[0][self.name], pair[1][self.name], layer.scaling[self.name]
        if not (type(down) is type(up) is nn.Linear):
            return None

        def low_rank(x: torch.Tensor) -> torch.Tensor:
            low: torch.Tensor = down(x.to(down.weight.dtype))
            # Without a bias, scaling the r columns is the same and cheaper than scaling all of them.
            delta: torch.Tensor = up(low * scale) if up.bias is None else up(low) * scale
            return delta

        return low_rank


def own_map(module: nn.Module) -> nn.Module | None:
    """What an adapted layer does without its adapter; None for a plain module."""
    children = module._modules
    return children.get("base_layer") or children.get("original_module")


def adapted_layers(model_map: ModelMap) -> list[tuple[str, Any, list[str]]]:
    """Every layer of the model that carries adapters: its path, the layer, the names of its adapters."""
    if "adapted" not in model_map.memo:
        model_map.memo["adapted"] = [
            (path, module, _adapters(module))
            for path, module in model_map.model.named_modules()
            if own_map(module) is not None and hasattr(module, "active_adapters")
        ]
    found: list[tuple[str, Any, list[str]]] = model_map.memo["adapted"]
    return found


def takes_empty(module: nn.Module) -> bool:
    """Whether a module is known to run on no rows at all."""
    plain = own_map(module) or module
    return type(plain).__name__.endswith(_TAKES_EMPTY)


def _adapters(layer: Any) -> list[str]:
    names: list[str] = []
    for table in getattr(layer, "adapter_layer_names", ()):
        tensors = getattr(layer, table, None)
        names += list(tensors.keys()) if tensors is not None and hasattr(tensors, "keys") else []
    return list(dict.fromkeys(names))
