"""Where grafted weights come from: a second model, or an adapter on the recipient itself."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from lightning_interp.core.hooks.checks import check_dense, check_weights, quantized_modules
from lightning_interp.core.hooks.intervention import split_output
from lightning_interp.core.model.components import Part
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import IncompatibleModelError, QuantizedModelError, RecipeError
from lightning_interp.grafting.adapter_donor import AdapterDonor, Donor

__all__ = ["AdapterDonor", "AnyDonor", "Donor", "ModelDonor", "check_same_shapes", "make_donors", "moved"]

_WEIGHTLESS = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "activation_function", "rope_parameters",
    "sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
)  # fmt: skip
"""Settings of what has no weights and so always runs as the recipient's: attention, rotary tables, activations."""

Quantized = Literal["refuse", "both", "mixed"]


class ModelDonor(Donor):
    """A full model of the same architecture. Its modules are called, never registered anywhere.

    The donor may be on another device: rows are moved there and back.

    Args:
        model: The donor; a plain model, or anything that holds one.
        quantized: What to do where weights are quantised, because three different experiments are possible:
            ``refuse`` (default); ``both`` when recipient and donor are quantised alike, so that the pair compared is
            the quantised one; ``mixed`` when one is quantised and the other dense, so that the quantisation error is
            part of what a graft does (a warning says so).

    Example:
        >>> from lightning_interp.testing import tiny_pair
        >>> recipient, donor = tiny_pair("gpt2")
        >>> ModelDonor(donor).check(ModelMap.build(recipient))
    """

    def __init__(self, model: nn.Module, *, quantized: Quantized = "refuse") -> None:
        if quantized not in ("refuse", "both", "mixed"):
            raise RecipeError(f"ModelDonor(quantized={quantized!r}) is unknown; expected 'refuse', 'both' or 'mixed'.")
        self.map = ModelMap.build(model)
        self.quantized = quantized

    def check(self, recipient: ModelMap) -> None:
        """Refuse other architectures, other shapes, and quantised or sharded models.

        Raises:
            IncompatibleModelError: If names, shapes or weightless settings differ (the first differences are named),
                or both are one object.
            QuantizedModelError: If either model is quantised and the caller has not said what that shall mean.
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
        self._check_quantized(recipient)
        check_same_shapes(recipient, self.map)
        _check_settings(recipient.model.config, self.map.model.config)
        fitting.add(self)

    def _check_quantized(self, recipient: ModelMap) -> None:
        kinds = [_quantized_kinds(each.model) for each in (recipient, self.map)]
        if self.quantized == "refuse":
            for model in (recipient.model, self.map.model):
                check_dense(
                    model,
                    purpose="Grafting from a full-weight donor",
                    remedy="Load both models dense, or graft a LoRA adapter (donor='adapter name'), which leaves the "
                    "base alone; or say what is compared: ModelDonor(model, quantized='both' or 'mixed').",
                )
        if self.quantized == "both" and kinds[0] != kinds[1]:
            raise QuantizedModelError(
                f"ModelDonor(quantized='both') needs two models that are quantised alike, but the recipient has "
                f"{_listed(kinds[0])} and the donor {_listed(kinds[1])}. Load the other one with the same settings, or "
                "say quantized='mixed'."
            )
        if self.quantized == "mixed" and kinds[0] != kinds[1]:
            warnings.warn(
                f"The recipient has {_listed(kinds[0])} and the donor {_listed(kinds[1])}: what a graft changes is "
                "then finetuning and quantisation error together.",
                stacklevel=4,
            )

    def alternative(self, part: Part) -> Callable[..., Any] | None:
        """The module of the same name, run where the donor lives and in its dtype; None if the two models share it."""
        module = self.map.model.get_submodule(part.path)
        if module is part.module:
            return None
        return moved(module, next(module.parameters()), part)


def moved(run: Callable[..., Any], home: torch.Tensor, part: Part) -> Callable[..., Any]:
    """Run a module of another model on the recipient's rows: there, in its dtype, and back."""
    own = next(part.module.parameters())

    def there_and_back(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if own.device == home.device and own.dtype == home.dtype:
            return run(x, *args, **kwargs)
        floats = x.is_floating_point() and not part.per_call  # else token ids, positions or a padding mask
        cast = floats and home.is_floating_point() and not torch.is_autocast_enabled(x.device.type)
        there = x.to(home.device, home.dtype if cast else x.dtype)
        args = tuple(_to(value, home.device) for value in args)
        output = run(there, *args, **{key: _to(value, home.device) for key, value in kwargs.items()})
        return split_output(output)[0].to(x.device, x.dtype if floats else own.dtype)

    return there_and_back


AnyDonor = nn.Module | str | Donor
"""A finetuned model, the name of an adapter on the recipient, or a ready donor (made once, checked once)."""


def make_donors(donor: AnyDonor | Mapping[str, AnyDonor]) -> dict[str, Donor]:
    """Donors by source name; a single one is called ``donor``. A :class:`Donor` is taken as it is.

    Raises:
        IncompatibleModelError: If something is neither a model nor the name of an adapter.
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
    adapters = [source.name for source in made.values() if isinstance(source, AdapterDonor)]
    for name, source in made.items():
        if isinstance(source, AdapterDonor):
            made[name] = AdapterDonor(source.name, beside=adapters)
    return made


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
            "names and shapes; an embedding that was resized for new tokens must be resized in both."
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
    packed = set(quantized_modules(model))  # their weights lie in another shape than the one they stand for
    plain = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "lora_" in name or "modules_to_save" in name:
            continue
        shape, (path, _, leaf) = tuple(parameter.shape), name.rpartition(".")
        if path in packed and leaf == "weight":
            module: Any = model.get_submodule(path)
            shape = (module.out_features, module.in_features)
        plain[name.replace(".base_layer", "").replace(".original_module", "")] = shape
    return plain


def _quantized_kinds(model: nn.Module) -> list[str]:
    return sorted({type(model.get_submodule(name)).__name__ for name in quantized_modules(model)})


def _listed(kinds: list[str]) -> str:
    return ", ".join(kinds) or "no quantised weights"


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
