"""Layers that carry adapters, and whether the weights of two models fit each other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from lightning_interp.core.model.components import own_map
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import IncompatibleModelError

__all__ = [
    "adapted_layers",
    "adapters_of",
    "check_base_biases",
    "check_registered",
    "check_same_shapes",
    "check_settings",
    "takes_empty",
]

_WEIGHTLESS = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "activation_function", "rope_parameters",
    "sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
)  # fmt: skip
"""Settings of what has no weights and so always runs as the recipient's: attention, rotary tables, activations."""
_REGISTERS = frozenset(vars(nn.Module()))
_TAKES_EMPTY = ("Linear", "Conv1D", "Embedding", "LayerNorm", "RMSNorm")


def check_same_shapes(recipient: ModelMap, donor: ModelMap, packed_in: Sequence[Collection[str]]) -> None:
    """Refuse a donor whose parameters have other names or shapes, naming the first three that differ.

    ``packed_in`` names the quantised modules of both, whose weights lie in another shape than the one they stand for.
    """
    kinds = [getattr(m.model.config, "model_type", type(m.model).__name__) for m in (recipient, donor)]
    if kinds[0] != kinds[1]:
        raise IncompatibleModelError(
            f"Recipient is a {kinds[0]!r} and donor a {kinds[1]!r} model. Grafting needs two finetunings of one "
            "architecture."
        )
    ours, theirs = (_shapes(each.model, packed) for each, packed in ((recipient, packed_in[0]), (donor, packed_in[1])))
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


def check_registered(recipient: ModelMap) -> None:
    """Refuse blocks with weights that are no parameters of theirs, as of norms in a plain list: no graft sees them."""
    for number, block in enumerate(recipient.blocks):
        for module in block.modules():
            for name, value in vars(module).items():
                if name in _REGISTERS or type(value) not in (dict, list, tuple):
                    continue
                held = [each for each in (value.values() if type(value) is dict else value) if _has_weights(each)]
                if held and not {id(each) for each in (*block.modules(), *block.parameters())}.issuperset(
                    map(id, held)
                ):
                    raise IncompatibleModelError(
                        f"Block {number} of {type(recipient.model).__name__} keeps weights in a plain "
                        f"{type(value).__name__} ({type(module).__name__}.{name}), so they are no parameters of it "
                        "and stay the recipient's in every graft. Keep them in a ModuleList or ParameterList."
                    )


def _has_weights(value: Any) -> bool:
    found = isinstance(value, nn.Module) and next(value.parameters(), None) is not None
    return found or isinstance(value, nn.Parameter)


def check_settings(recipient: Any, donor: Any) -> None:
    """Refuse configurations that differ in what has no weights."""
    for name in _WEIGHTLESS:
        ours, theirs = getattr(recipient, name, None), getattr(donor, name, None)
        if ours != theirs:
            raise IncompatibleModelError(
                f"Recipient has {name}={ours!r} and donor {name}={theirs!r}. No weights belong to it, so a graft would "
                "run both models' tokens with the recipient's; give them one value."
            )


def _shapes(model: nn.Module, packed: Collection[str]) -> dict[str, tuple[int, ...]]:
    plain = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "lora_" in name or "modules_to_save" in name:
            continue
        shape, (path, _, leaf) = tuple(parameter.shape), name.rpartition(".")
        if path in packed and leaf == "weight":
            module: Any = model.get_submodule(path)
            shape = (module.out_features, module.in_features) if hasattr(module, "out_features") else shape
        plain[name.replace(".base_layer", "").replace(".original_module", "")] = shape
    return plain


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


def check_base_biases(model_map: ModelMap, adapter: str, *, why: str) -> None:
    """Refuse an adapter that came with trained biases of the base; ``why`` is what they spoil."""
    for outer in model_map.outer:
        bias = getattr((getattr(outer, "peft_config", None) or {}).get(adapter), "bias", "none")
        if bias != "none":
            raise IncompatibleModelError(
                f"Adapter {adapter!r} of {type(outer).__name__} was trained with bias={bias!r}, which changed biases "
                f"of the base {why}. Train with bias='none' (lora_bias is fine)."
            )


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
