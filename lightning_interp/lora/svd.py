"""An adapter taken apart by singular directions: which of them carry what it does, and how large its update is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_interp.core.model.components import own_map
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.weights.low_rank import LowRank, low_rank_pairs, only_adapter
from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.models.sources.adapters import save_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "SingularDirections",
    "UpdateNorms",
    "ablated",
    "directions_of",
    "export_ablated",
    "kept_directions",
    "singular_directions",
    "update_norms",
]

_KEEP = re.compile(r"full|top([1-9]\d*)|rest([1-9]\d*)?")


@dataclass(frozen=True, eq=False)
class SingularDirections:
    """``B A = outputs @ diag(values) @ inputs`` of one module, in float64; the update is ``scale`` times that.

    Args:
        outputs: Directions that are written ``[d_out, k]``, orthonormal; the largest entry of each is positive.
        values: Singular values ``[k]``, falling.
        inputs: Directions that are read ``[k, d_in]``, orthonormal.
        scale: ``alpha / r``, or ``alpha / sqrt(r)``.
    """

    outputs: torch.Tensor
    values: torch.Tensor
    inputs: torch.Tensor
    scale: float

    def factors(self, kept: slice, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``A`` ``[rank, d_in]`` and ``B`` ``[d_out, rank]`` of some directions alone, filled up with zeros."""
        down = self.inputs.new_zeros(rank, self.inputs.shape[1])
        up = self.outputs.new_zeros(len(self.outputs), rank)
        chosen = self.inputs[kept]
        down[: len(chosen)] = chosen
        up[:, : len(chosen)] = self.outputs[:, kept] * self.values[kept]
        return down, up


@dataclass(frozen=True)
class UpdateNorms:
    """Frobenius norms of what an adapter adds to the weights.

    Args:
        total: Root of the sum of squares.
        modules: ``||scale B A||_F`` of each module, by its path below the Hugging Face model.
    """

    total: float
    modules: Mapping[str, float]


def singular_directions(
    model: nn.Module | ModelMap, *, adapter: str | None = None, target: str | None = None
) -> dict[str, SingularDirections]:
    """Take the update of every module apart, by QR of ``B`` and an SVD of ``R A``; no full matrix is built.

    Args:
        model: A model with an adapter; a PEFT wrapper or a LightningModule that holds one will do.
        adapter: Its name; None for the only one.
        target: Dotted path of the Hugging Face model, where there are several.

    Returns:
        Directions by the module's path below the Hugging Face model.

    Raises:
        IncompatibleModelError: If the adapter is missing, merged or disabled, or more than low-rank pairs: DoRA, a
            bias of its own, saved modules.

    Example:
        >>> from lightning_interp.models import CausalLM, LoraSettings
        >>> model = CausalLM("tiny:llama", lora=LoraSettings(r=2, target_modules=["q_proj"])).model
        >>> found = singular_directions(model)["model.layers.0.self_attn.q_proj"]
        >>> found.values.tolist(), tuple(found.inputs.shape)
        ([0.0, 0.0], (2, 32))
    """
    pairs = low_rank_pairs(_map(model, target), adapter, purpose="singular_directions")
    return {pair.path: directions_of(pair) for pair in pairs}


@torch.no_grad()
def directions_of(pair: LowRank) -> SingularDirections:
    """The singular directions of one module; see :func:`singular_directions`."""
    basis, rest = torch.linalg.qr(_wide(pair.up))
    left, values, inputs = torch.linalg.svd(rest @ _wide(pair.down), full_matrices=False)
    outputs = basis @ left
    largest = outputs.gather(0, outputs.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)[0]
    return SingularDirections(outputs * sign, values, inputs * sign[:, None], pair.scale)


def kept_directions(keep: str) -> slice:
    """Which directions an ablation keeps: ``full``, ``top1``, ``topK``, ``rest`` (all but the first), ``restK``.

    Raises:
        RecipeError: If it is none of these.

    Example:
        >>> kept_directions("rest2")
        slice(2, None, None)
    """
    found = _KEEP.fullmatch(keep)
    if found is None:
        raise RecipeError(
            f"No ablation {keep!r}; expected 'full', 'top1', 'topK' (the first K directions), 'rest' (all but the "
            "first) or 'restK' (all but the first K)."
        )
    if keep == "full":
        return slice(None)
    return slice(int(found[1])) if found[1] else slice(int(found[2] or 1), None)


@contextmanager
def ablated(
    model: nn.Module | ModelMap, keep: str, *, adapter: str | None = None, target: str | None = None
) -> Iterator[None]:
    """Let an adapter act with some of its singular directions alone, in every module, inside of a ``with`` block.

    ``A`` and ``B`` are written over in place (``full`` leaves them alone); rank and scale stay. On the way out they are
    put back to the bit. The updates of ``top1`` and ``rest`` add up to that of ``full``. Directions that an adapter of
    lower rank lacks are zero, so ``rest4`` of rank 2 is the base.

    Args:
        model: A model with an adapter; a PEFT wrapper or a LightningModule that holds one will do.
        keep: See :func:`kept_directions`.
        adapter: Its name; None for the only one.
        target: Dotted path of the Hugging Face model, where there are several.

    Raises:
        RecipeError: If ``keep`` is unknown.
        IncompatibleModelError: If the adapter is missing, merged or disabled, or more than low-rank pairs: a part of
            DoRA, or of a bias, belongs to no direction.

    Example:
        >>> from lightning_interp.models import CausalLM, LoraSettings
        >>> model = CausalLM("tiny:llama", lora=LoraSettings(r=2)).model
        >>> with ablated(model, "top1"):
        ...     _ = model(torch.arange(4)[None])
    """
    kept = kept_directions(keep)
    pairs = low_rank_pairs(_map(model, target), adapter, purpose=f"The ablation {keep!r}")
    if keep == "full":
        yield
        return
    new = [factor for pair in pairs for factor in directions_of(pair).factors(kept, pair.rank)]
    tensors = [tensor for pair in pairs for tensor in (pair.down, pair.up)]
    old = [tensor.detach().clone() for tensor in tensors]
    try:
        _write(tensors, new)
        yield
    finally:
        _write(tensors, old)


def export_ablated(
    model: nn.Module | ModelMap,
    folder: str | os.PathLike[str],
    keep: str,
    *,
    base: str,
    adapter: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an ablated adapter as an ordinary PEFT folder of the same rank and settings.

    Args:
        model: See :func:`ablated`.
        folder: The folder to make; it appears whole or not at all.
        keep: See :func:`kept_directions`.
        base: The base model that the folder names: a hub id, an alias or an absolute path.
        adapter: Name of the adapter; None for the only one.
        tokenizer: Written beside it.
        overwrite: Whether a folder that holds files may be replaced.

    Returns:
        ``folder``.

    Raises:
        ManifestError: If the folder holds files and ``overwrite`` is False.
        IncompatibleModelError: See :func:`ablated`.
    """
    model_map = _map(model, None)
    with ablated(model_map, keep, adapter=adapter):
        name = only_adapter(model_map, adapter)
        return save_adapter(model_map.model, folder, base=base, name=name, tokenizer=tokenizer, overwrite=overwrite)


@torch.no_grad()
def update_norms(model: nn.Module | ModelMap, *, adapter: str | None = None, target: str | None = None) -> UpdateNorms:
    """``||scale B A||_F`` of every module and of all, as ``tr((B^T B)(A A^T))``: no full matrix is built.

    Sums are in float64 on the adapter's device, which is waited for once. Of DoRA it is the norm of ``m W'/||W'|| - W``
    with ``W' = W + scale B A``, worked out from the base's weight. A ``lora_bias`` is no weight, and not counted.

    Args:
        model: A model with an adapter; a PEFT wrapper or a LightningModule that holds one will do.
        adapter: Its name; None for the only one.
        target: Dotted path of the Hugging Face model, where there are several.

    Returns:
        The norms.

    Raises:
        IncompatibleModelError: If the adapter is missing, merged or disabled, or changes weights in another way.

    Example:
        >>> from lightning_interp.models import CausalLM, LoraSettings
        >>> update_norms(CausalLM("tiny:llama", lora=LoraSettings(r=2)).model).total
        0.0
    """
    model_map = _map(model, target)
    name = only_adapter(model_map, adapter)
    pairs = low_rank_pairs(model_map, name, purpose="update_norms", extras={"lora_bias", "DoRA"})
    squares = [_dora_square(pair, name) if "DoRA" in pair.extras else _square(pair) for pair in pairs]
    together = torch.stack([square.to(squares[0].device) for square in squares]).clamp_min(0)
    total, *modules = torch.cat([together.sum()[None], together]).sqrt().tolist()
    return UpdateNorms(total, {pair.path: norm for pair, norm in zip(pairs, modules, strict=True)})


def _square(pair: LowRank) -> torch.Tensor:
    down, up = _wide(pair.down), _wide(pair.up)
    return pair.scale**2 * ((up.T @ up) * (down @ down.T)).sum()


def _dora_square(pair: LowRank, name: str) -> torch.Tensor:
    """Row by row ``m^2 - 2 (m / n) (|w|^2 + p) + |w|^2``, ``p = <w, u>``, ``n = |w + u|``, update ``u``."""
    from peft.utils.integrations import dequantize_module_weight

    if pair.is_table:
        raise IncompatibleModelError(
            f"update_norms does not know how DoRA changes the embedding {pair.path}. Leave embeddings out of the "
            "target modules, or use plain LoRA there."
        )
    base: Any = own_map(pair.module)
    weight = _wide(dequantize_module_weight(base))
    if pair.module.fan_in_fan_out:
        weight = weight.T
    down, up = _wide(pair.down), pair.scale * _wide(pair.up)
    own = weight.square().sum(dim=1)
    across = (up * (weight @ down.T)).sum(dim=1)
    norm = (own + 2 * across + (up * (up @ (down @ down.T))).sum(dim=1)).sqrt()
    magnitude = _wide(pair.module.lora_magnitude_vector[name].weight)
    return (magnitude.square() - 2 * magnitude / norm * (own + across) + own).sum()


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.device.type == "mps" else tensor.double()  # which has no float64


def _write(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def _map(model: nn.Module | ModelMap, target: str | None) -> ModelMap:
    return model if isinstance(model, ModelMap) else ModelMap.build(model, target=target)
