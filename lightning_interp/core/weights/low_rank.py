"""What a LoRA adapter adds to each module that it sits on: a product of two thin matrices."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.weights.fitting import adapted_layers, check_base_biases
from lightning_interp.core.weights.sources import AdapterSource, linear_pair
from lightning_interp.errors import IncompatibleModelError

__all__ = ["LowRank", "low_rank_pairs", "only_adapter"]

_EXTRAS = {
    "lora_bias": "adds a bias of its own (lora_bias)",
    "DoRA": "rescales the rows of the base (DoRA)",
}


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update ``scale * up @ down`` of one module, rows of its input to rows of its output.

    Args:
        path: The adapted module below the Hugging Face model.
        layer: Index of its block; None outside of the block stack.
        name: Its path below the block (the whole path outside of blocks).
        module: The adapted layer.
        down: ``A`` ``[r, d_in]``, the adapter's own tensor; an embedding's ``d_in`` is the vocabulary.
        up: ``B`` ``[d_out, r]``.
        bias: ``b`` ``[d_out]`` of ``lora_bias``, which adds ``scale * b``; None without.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` of rsLoRA.
        extras: What the adapter does in this module besides, ``lora_bias`` and ``DoRA``.
        is_table: Whether the module is an embedding, whose input is token ids.
    """

    path: str
    layer: int | None
    name: str
    module: Any
    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    extras: frozenset[str]
    is_table: bool

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return len(self.down)


def only_adapter(model_map: ModelMap, name: str | None) -> str:
    """The adapter of this name, or the one that there is.

    Raises:
        IncompatibleModelError: If it is missing, merged or disabled, or there are several and none is named.
    """
    known = sorted({each for _, _, names in adapted_layers(model_map) for each in names})
    kind = type(model_map.model).__name__
    if name is None and len(known) != 1:
        what = f"carries the adapters {', '.join(map(repr, known))}" if known else "carries no adapter"
        raise IncompatibleModelError(
            f"{kind} {what}, expected one. " + ("Name it with adapter=." if known else "Inject one first.")
        )
    chosen = known[0] if name is None else name
    AdapterSource(chosen).check(model_map)
    return chosen


def low_rank_pairs(
    model_map: ModelMap, adapter: str | None, *, purpose: str, extras: Collection[str] = ()
) -> list[LowRank]:
    """The low-rank pairs of an adapter, module by module in the model's order.

    Args:
        model_map: The model that carries it.
        adapter: Its name; None for the only one.
        purpose: What needs them, for messages.
        extras: Which of ``lora_bias`` and ``DoRA`` the caller gets right.

    Raises:
        IncompatibleModelError: If the adapter is missing, merged or disabled, or does anything else to some module.
    """
    name = only_adapter(model_map, adapter)
    check_base_biases(model_map, name, why="that are no part of any low-rank pair")
    places = {m: (i, below) for i, block in enumerate(model_map.blocks) for below, m in block.named_modules()}
    pairs = []
    for path, module, names in adapted_layers(model_map):
        if name not in names:
            continue
        layer, below = places.get(module, (None, path))
        pair = _pair(module, name, path, layer, below)
        why = f"has a {type(module).__name__} there" if pair is None else _more(pair.extras.difference(extras))
        if why or pair is None:
            raise IncompatibleModelError(
                f"{purpose} is about updates of low rank, but adapter {name!r} {why}: {path} of "
                f"{type(model_map.model).__name__}. Use an adapter of plain LoRA or rsLoRA pairs on linear maps and "
                "embeddings."
            )
        pairs.append(pair)
    return pairs


def _more(extras: Collection[str]) -> str:
    return " and ".join(_EXTRAS.get(each, f"is a {each}") for each in sorted(extras))


def _pair(module: Any, name: str, path: str, layer: int | None, below: str) -> LowRank | None:
    """The pair of one layer; None where it is another kind of change."""
    is_table = name in getattr(module, "lora_embedding_A", {})
    bias: torch.Tensor | None = None
    if is_table:
        down, up = module.lora_embedding_A[name], module.lora_embedding_B[name]
    else:
        pair = linear_pair(module, name)
        if pair is None:
            return None
        down, up, bias = pair[0].weight, pair[1].weight, pair[1].bias
    extras = set() if bias is None else {"lora_bias"}
    if (variant := module.lora_variant.get(name)) is not None:
        kind = type(variant).__name__
        extras.add("DoRA" if kind.startswith("Dora") else kind)
    return LowRank(path, layer, below, module, down, up, bias, float(module.scaling[name]), frozenset(extras), is_table)
