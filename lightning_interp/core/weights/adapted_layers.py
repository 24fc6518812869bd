"""Layers that carry PEFT adapters, known by how they are built."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_interp.core.model.model_map import ModelMap

__all__ = ["adapted_layers", "adapters_of", "own_map", "takes_empty"]

_TAKES_EMPTY = ("Linear", "Conv1D", "Embedding", "LayerNorm", "RMSNorm")


def own_map(module: nn.Module) -> nn.Module | None:
    """What an adapted layer does without its adapter; None for a plain module."""
    children = module._modules
    return children.get("base_layer") or children.get("original_module")


def adapted_layers(model_map: ModelMap) -> list[tuple[str, Any, list[str]]]:
    """Every layer of the model that carries adapters: its path, the layer, the names of its adapters."""
    if "adapted" not in model_map.memo:
        model_map.memo["adapted"] = [
            (path, module, adapters_of(module))
            for path, module in model_map.model.named_modules()
            if own_map(module) is not None and hasattr(module, "active_adapters")
        ]
    found: list[tuple[str, Any, list[str]]] = model_map.memo["adapted"]
    return found


def takes_empty(module: nn.Module) -> bool:
    """Whether a module is known to run on no rows at all."""
    plain = own_map(module) or module
    return type(plain).__name__.endswith(_TAKES_EMPTY)


def adapters_of(layer: Any) -> list[str]:
    """Names of the adapters that one layer carries."""
    names: list[str] = []
    for table in getattr(layer, "adapter_layer_names", ()):
        tensors = getattr(layer, table, None)
        names += list(tensors.keys()) if tensors is not None and hasattr(tensors, "keys") else []
    return list(dict.fromkeys(names))
