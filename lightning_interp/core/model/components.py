"""Canonical names of the row-wise modules inside a decoder, whatever a family calls them.

A *component* is everything in one layer that acts on each token on its own and is grafted together: ``q`` is the query
projection with its norm, or the query rows of a fused projection. Attention mixing has no parameters and is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = [
    "BLOCK_COMPONENTS",
    "GLOBAL_COMPONENTS",
    "Components",
    "Part",
    "a_parameter",
    "attention_of",
    "block_components",
    "has_post_norms",
    "maps_of",
    "mixing_modules",
    "mlp_of",
    "own_map",
    "residual_doubt",
]

BLOCK_COMPONENTS = ("ln_attn", "q", "k", "v", "qkv", "o", "ln_mlp", "gate", "up", "gate_up", "down", "moe")
"""Components inside a block. ``qkv`` and ``gate_up`` appear only where a fused map cannot be told apart."""

GLOBAL_COMPONENTS = ("embed", "pos_embed", "final_norm", "unembed")
"""Components of which a model has one."""

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "ffn", "feed_forward", "block_sparse_moe")

_ATTN_PARTS = {
    "q_proj": "q", "wq": "q", "q_norm": "q", "q_layernorm": "q",
    "k_proj": "k", "wk": "k", "k_norm": "k", "k_layernorm": "k",
    "v_proj": "v", "wv": "v",
    "o_proj": "o", "out_proj": "o", "c_proj": "o", "dense": "o", "wo": "o",
    "c_attn": "qkv", "query_key_value": "qkv", "qkv_proj": "qkv", "Wqkv": "qkv",
}  # fmt: skip
_MLP_PARTS = {
    "gate_proj": "gate", "w1": "gate",
    "up_proj": "up", "c_fc": "up", "fc1": "up", "fc_in": "up", "dense_h_to_4h": "up", "w3": "up",
    "down_proj": "down", "c_proj": "down", "fc2": "down", "fc_out": "down", "dense_4h_to_h": "down", "w2": "down",
    "gate_up_proj": "gate_up",
}  # fmt: skip
_ATTN_NORMS = {
    "input_layernorm", "ln_1", "norm_1", "ln_attn", "self_attn_layer_norm", "attention_norm", "attention_layernorm",
    "post_self_attn_layernorm",
}  # fmt: skip
_MLP_NORMS = {
    "ln_2", "norm_2", "ln_mlp", "final_layer_norm", "ffn_norm", "feedforward_layernorm", "pre_feedforward_layernorm",
    "pre_ff_layernorm", "pre_mlp_layernorm", "post_feedforward_layernorm", "post_mlp_layernorm",
}  # fmt: skip
_MIXERS = (
    "Mamba", "SSM", "Ssm", "RWKV", "Rwkv", "DeltaNet", "ShortConv", "RgLru", "RGLRU", "Recurrent", "Retention", "xLSTM",
    "MLSTM", "SLSTM", "Hyena", "LightningAttention", "LinearAttention",
)  # fmt: skip
_SCALES = ("residual", "scale", "factor", "multiplier")
_BLENDS = ("alpha", "beta")


@dataclass(frozen=True, eq=False)
class Part:
    """A component's module, or ``columns`` ``[n]`` of its output; ``per_call`` if it is not fed one row a token."""

    path: str
    module: nn.Module
    columns: torch.Tensor | None = None
    per_call: bool = False


Components = dict[str, tuple[Part, ...]]


def maps_of(parts: Sequence[Part]) -> Sequence[Part]:
    """The parts of a component that are maps or tables, without norms beside them; all parts if none is one."""
    return [part for part in parts if _is_map(part.module)] or parts


def _is_map(module: nn.Module) -> bool:
    base: Any = own_map(module) or module
    weight = getattr(base, "weight", None)
    return hasattr(base, "in_features") or (isinstance(weight, torch.Tensor) and weight.dim() > 1)


def attention_of(block: nn.Module) -> str | None:
    """Name of the attention child of a block, or None."""
    return next((name for name in ATTENTION_NAMES if hasattr(block, name)), None)


def mlp_of(block: nn.Module) -> str | None:
    """Name of the feed-forward child of a block, or None where its maps hang in the block itself."""
    return next((name for name in MLP_NAMES if isinstance(getattr(block, name, None), nn.Module)), None)


def block_components(block: nn.Module, path: str, config: Any, attn: str | None, mlp: str | None) -> Components:
    """Sort the parameters of one block into canonical components; modules with unknown names are left out."""
    found: dict[str, list[Part]] = {}
    children = dict(block.named_children())
    sandwich = has_post_norms(block)
    for name, child in children.items():
        where = f"{path}.{name}"
        if name == attn:
            _collect(found, child, where, _ATTN_PARTS, config)
        elif name in _MLP_PARTS:  # a feed-forward map that hangs in the block itself
            found.setdefault(_MLP_PARTS[name], []).append(Part(where, child))
        elif name == mlp:
            if any(part == "experts" for part, _ in child.named_children()):  # a mixture
                found.setdefault("moe", []).append(Part(where, child))
            else:
                _collect(found, child, where, _MLP_PARTS, config)
        elif (norm := _norm_role(name, sandwich)) is not None:
            found.setdefault(norm, []).append(Part(where, child))
    return {name: tuple(found[name]) for name in BLOCK_COMPONENTS if name in found}


def has_post_norms(block: nn.Module) -> bool:
    """Whether norms follow the sub-layers, so that ``post_attention_layernorm`` is one of these."""
    return hasattr(block, "post_feedforward_layernorm") or hasattr(block, "pre_mlp_layernorm")


def mixing_modules(block: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a block's modules that mix tokens by their own weights, so that no row stands alone, and why."""
    for name, module in block.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Conv1d):
            yield name, "a convolution over tokens"
        elif any(word in kind for word in _MIXERS):
            yield name, f"a {kind}, which carries a state from token to token"
        elif getattr(module, "expert_capacity", None) is not None or getattr(module, "capacity_factor", None):
            yield name, f"a {kind} with a capacity, so that where a token goes depends on the others"


def residual_doubt(block: nn.Module, table: Components, sublayers: Sequence[str | None]) -> str | None:
    """Why a block may not simply add what its sub-layers return (a scaled, gated or extra write), or None."""
    for name, _ in (*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)):
        return f"has a tensor {name!r} of its own"
    known = {id(part.module) for parts in table.values() for part in parts}
    for name, child in block.named_children():
        if name not in sublayers and id(child) not in known and next(child.parameters(), None) is not None:
            return f"has a child {name!r} of unknown role"
    for name, value in vars(block).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        scales = value != 1 and any(word in name for word in _SCALES)
        if number and (scales or any(word in name for word in _BLENDS)):
            return f"has {name}={value}"
    return None


def a_parameter(module: nn.Module) -> nn.Parameter:
    """One of a module's parameters, its own if it has any: for type and device."""
    own = next((each for each in module._parameters.values() if each is not None), None)
    return next(module.parameters()) if own is None else own


def own_map(module: nn.Module) -> nn.Module | None:
    """What an adapted layer does without its adapter; None for a plain module."""
    children = module._modules
    return children.get("base_layer") or children.get("original_module")


def _norm_role(name: str, sandwich: bool) -> str | None:
    if name in _ATTN_NORMS or (name == "post_attention_layernorm" and sandwich):
        return "ln_attn"
    return "ln_mlp" if name in _MLP_NORMS or name == "post_attention_layernorm" else None


def _collect(found: dict[str, list[Part]], root: nn.Module, path: str, names: Mapping[str, str], config: Any) -> None:
    for name, child in root.named_children():
        where = f"{path}.{name}"
        component = names.get(name)
        if component is None:
            _collect(found, child, where, names, config)
        elif component in ("qkv", "gate_up"):
            for piece, columns in _fused_columns(name, component, config):
                found.setdefault(piece, []).append(Part(where, child, columns))
        else:
            found.setdefault(component, []).append(Part(where, child))


def _fused_columns(name: str, component: str, config: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Output features of q, k and v (or gate and up) in a fused map; the whole map where the layout is not known."""
    kind = str(getattr(config, "model_type", ""))
    if component == "gate_up" and kind in ("phi3", "glm4", "glm"):
        half = torch.arange(2 * int(config.intermediate_size)).chunk(2)
        yield from zip(("gate", "up"), half, strict=True)
        return
    if component == "gate_up":
        yield component, None
        return
    heads, width = int(config.num_attention_heads), int(config.hidden_size)
    size = int(getattr(config, "head_dim", None) or width // heads)
    if kind in ("gpt_neox", "bloom", "persimmon"):  # [heads, 3, size], interleaved
        grid = torch.arange(3 * heads * size).view(heads, 3, size)
        yield from ((piece, grid[:, i].reshape(-1)) for i, piece in enumerate("qkv"))
    elif kind == "gpt2" or (kind == "phi3" and name == "qkv_proj"):
        rest = heads if kind == "gpt2" else int(config.num_key_value_heads)
        sizes = (heads * size, rest * size, rest * size)
        ends = [sizes[0], sizes[0] + sizes[1]]
        yield from zip("qkv", torch.tensor_split(torch.arange(sum(sizes)), ends), strict=True)
    else:
        yield component, None
