"""Where grafted weights come from: a second model, or an adapter on the recipient itself."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_interp.core.checks import check_dense, check_weights
from lightning_interp.core.components import Part
from lightning_interp.core.intervention import split_output
from lightning_interp.core.model_map import ModelMap
from lightning_interp.errors import IncompatibleModelError

__all__ = [
    "AdapterDonor",
    "AnyDonor",
    "Donor",
    "ModelDonor",
    "adapted_layers",
    "check_same_shapes",
    "make_donors",
    "own_map",
]

_WEIGHTLESS = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "activation_function", "rope_parameters",
    "sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
)  # fmt: skip
"""Settings of what has no weights and so always runs as the recipient's: attention, rotary tables, activations."""

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


class ModelDonor(Donor):
    """A full model of the same architecture. Its modules are called, never registered anywhere.

    Args:
        model: The donor; a plain model, or anything that holds one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.map = ModelMap.build(model)

    def check(self, recipient: ModelMap) -> None:
        """Refuse other architectures, other shapes, and quantised or sharded models.

        Raises:
            IncompatibleModelError: If names, shapes or weightless settings differ (the first differences are named),
                or both are one object.
            QuantizedModelError: If either model is quantised.
            UnsupportedStrategyError: If either model is sharded.
        """
        if self.map.model is recipient.model:
            raise IncompatibleModelError(
                f"Donor and recipient are the same {type(self.map.model).__name__} object, so nothing would change. "
                "Load the donor as a model of its own, or name an adapter of the recipient."
            )
        fitting = recipient.memo.setdefault("fitting donors", weakref.WeakSet())
        if self in fitting:
            return
        for model in (recipient.model, self.map.model):
            check_weights(model, purpose="Grafting from a full-weight donor")
            check_dense(
                model,
                purpose="Grafting from a full-weight donor",
                remedy="Load both models dense, or graft a LoRA adapter (donor='adapter name'), which leaves the base "
                "alone.",
            )
        check_same_shapes(recipient, self.map)
        _check_settings(recipient.model.config, self.map.model.config)
        fitting.add(self)

    def alternative(self, part: Part) -> Callable[..., Any] | None:
        """The module of the same name, run where the donor lives and in its dtype; None if the two models share it."""
        module = self.map.model.get_submodule(part.path)
        own, home = next(part.module.parameters()), next(module.parameters())
        if module is part.module:
            return None

        def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if own.device == home.device and own.dtype == home.dtype:
                return module(x, *args, **kwargs)
            floats = x.is_floating_point() and not part.per_call  # else token ids, positions or a padding mask
            cast = floats and not torch.is_autocast_enabled(x.device.type)
            moved = x.to(home.device, home.dtype if cast else x.dtype)
            args = tuple(_to(value, home.device) for value in args)
            output = module(moved, *args, **{key: _to(value, home.device) for key, value in kwargs.items()})
            return split_output(output)[0].to(x.device, x.dtype if floats else own.dtype)

        return run


class AdapterDonor(Donor):
    """A LoRA adapter that sits on the recipient: recipient = adapter off, donor = adapter on.

    Args:
        name: Name of the adapter, as PEFT knows it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

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
            if getattr(layer, "merged", False):
                raise IncompatibleModelError(
                    f"Adapter {self.name!r} is merged into {path} of {kind}, so the recipient is gone. Unmerge first."
                )
            if type(getattr(layer, "lora_variant", {}).get(self.name)).__name__.startswith("ALora"):
                raise IncompatibleModelError(
                    f"Adapter {self.name!r} in {path} of {kind} is an activated LoRA, which chooses its own tokens. "
                    "Graft a plain LoRA, and name the tokens in the plan."
                )
            if getattr(layer, "disable_adapters", False):
                raise IncompatibleModelError(
                    f"Adapter {self.name!r} is disabled in {path} of {kind}. Enable adapters first."
                )
            if list(layer.active_adapters) != [self.name] and self.name in names:
                raise IncompatibleModelError(
                    f"{path} of {kind} has active adapters {list(layer.active_adapters)}, expected only {self.name!r}. "
                    "Make it the active one (set_adapter)."
                )

    def alternative(self, part: Part) -> Callable[..., Any] | None:
        """The adapted layer itself; None for parts without an adapter."""
        return part.module if own_map(part.module) is not None else None

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


AnyDonor = nn.Module | str | Donor
"""A finetuned model, the name of an adapter on the recipient, or a ready donor (made once, checked once)."""


def make_donors(donor: AnyDonor | Mapping[str, AnyDonor]) -> dict[str, Donor]:
    """Donors by source name; a single one is called ``donor``. A :class:`Donor` is taken as it is.

    Raises:
        IncompatibleModelError: If something is neither a model nor the name of an adapter, or two adapters are named.
    """
    named = donor if isinstance(donor, Mapping) else {"donor": donor}
    made: dict[str, Donor] = {}
    for name, source in named.items():
        if isinstance(source, Donor):
            made[name] = source
        elif isinstance(source, str):
            made[name] = AdapterDonor(source)
        elif isinstance(source, nn.Module):
            made[name] = ModelDonor(source)
        else:
            raise IncompatibleModelError(
                f"Donor {name!r} is a {type(source).__name__}; expected a model or the name of an adapter on the "
                "recipient."
            )
    adapters = [name for name, source in made.items() if isinstance(source, AdapterDonor)]
    if len(adapters) > 1:
        raise IncompatibleModelError(
            f"Donors {adapters} are all adapters of the recipient; one adapter at a time is supported."
        )
    return made


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


def check_same_shapes(recipient: ModelMap, donor: ModelMap) -> None:
    """Refuse a donor whose parameters have other names or shapes.

    Args:
        recipient: The model that is grafted into.
        donor: Where weights come from.

    Raises:
        IncompatibleModelError: Naming the first three tensors that differ.
    """
    kinds = [getattr(m.model.config, "model_type", type(m.model).__name__) for m in (recipient, donor)]
    if kinds[0] != kinds[1]:
        raise IncompatibleModelError(
            f"Recipient is a {kinds[0]!r} and donor a {kinds[1]!r} model. Grafting needs two finetunings of one "
            "architecture."
        )
    ours, theirs = _shapes(recipient.model), _shapes(donor.model)
    wrong = [f"{n} is missing in the donor" for n in ours if n not in theirs]
    wrong += [f"{n} is missing in the recipient" for n in theirs if n not in ours]
    wrong += [
        f"{n} is {ours[n]} in the recipient and {theirs[n]} in the donor"
        for n in ours
        if n in theirs and ours[n] != theirs[n]
    ]
    if wrong:
        raise IncompatibleModelError(
            f"Recipient and donor differ in {len(wrong)} tensors: {'; '.join(wrong[:3])}. Grafting needs the same "
            "names and "
            "shapes; an embedding that was resized for new tokens must be resized in both."
        )


def _check_settings(recipient: Any, donor: Any) -> None:
    for name in _WEIGHTLESS:
        ours, theirs = getattr(recipient, name, None), getattr(donor, name, None)
        if ours != theirs:
            raise IncompatibleModelError(
                f"Recipient has {name}={ours!r} and donor {name}={theirs!r}. No weights belong to it, so a graft would "
                "run both models' tokens with the recipient's; give them one value."
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    plain = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "lora_" not in name and "modules_to_save" not in name:
            plain[name.replace(".base_layer", "").replace(".original_module", "")] = tuple(parameter.shape)
    return plain


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _adapters(layer: Any) -> list[str]:
    names: list[str] = []
    for table in getattr(layer, "adapter_layer_names", ()):
        tensors = getattr(layer, table, None)
        names += list(tensors.keys()) if tensors is not None and hasattr(tensors, "keys") else []
    return list(dict.fromkeys(names))
