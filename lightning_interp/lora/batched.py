"""Adapters of several owners on one frozen base, whose rows of a batch each use their owner's alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_interp.core.hooks.checks import check_hookable, check_weights, quantized_modules
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.own_hooks import Hook
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.lora.adapter_branch import Branch, add_branches
from lightning_interp.models.sources.adapters import ADAPTER, remove_adapter
from lightning_interp.models.sources.pretrained import checkpoint_blocks
from lightning_interp.models.training.lora import LoraSettings, inject_lora

__all__ = ["AdapterBatch", "Share", "frozen_base"]


@dataclass(frozen=True, eq=False)
class Share:
    """The rows of one owner in the coming pass, which follow those of the owner before.

    Attributes:
        key: The owner.
        rows: Their number.
        length: Columns that these rows would have in a batch of their own.
        generator: What dropout is drawn from; it draws what one pass over these rows alone would.
    """

    key: str
    rows: int
    length: int
    generator: torch.Generator | None = None


_BLOCK = 1024


class AdapterBatch(nn.Module):
    """Fresh adapters beside a base, in float32, which act while :meth:`attached` on the rows that ``shares`` names.

    The base is neither changed nor held. Each adapter starts as :func:`inject_lora` starts it with the same seed.

    Args:
        model: The base.
        adapters: Settings and seed of every adapter, by its owner's key.

    Attributes:
        shares: Whose rows the coming passes have; with none the base runs alone.

    Raises:
        IncompatibleModelError: If an adapter does not fit the base.

    Example:
        >>> from lightning_interp.testing import tiny_model
        >>> base, ids = tiny_model("llama"), torch.arange(8).view(2, 4)
        >>> adapters = AdapterBatch(base, {"a": (LoraSettings(r=1), 0), "b": (LoraSettings(r=8), 1)})
        >>> adapters.shares = [Share("a", 1, 4), Share("b", 1, 4)]
        >>> with adapters.attached(base):
        ...     loss = base(ids).logits.sum()
        >>> loss.backward()
        >>> sum(bool(weight.grad.any()) for weight in adapters.weights("b"))
        28
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, tuple[LoraSettings, int]]) -> None:
        super().__init__()
        self._names = {key: str(index) for index, key in enumerate(adapters)}  # a module's name may have no dots
        self._by_key = {key: _Adapter(model, *given) for key, given in adapters.items()}
        self.adapters = nn.ModuleDict({self._names[key]: adapter for key, adapter in self._by_key.items()})
        self.shares: Sequence[Share] = ()

    def weights(self, key: str) -> list[Tensor]:
        """Everything of one adapter that is trained, ``down`` and ``up`` of each map in turn: views of :meth:`flat`."""
        return [weight for down, up, _ in self._by_key[key].maps.values() for weight in (down, up)]

    def flat(self, key: str) -> nn.Parameter:
        """The same as one parameter, for an optimiser."""
        return self._by_key[key].flat

    def zero_gradients(self) -> None:
        """Empty the gradients, in the tensors to which a backward pass adds."""
        for adapter in self._by_key.values():
            adapter.flat.grad = adapter.gradient.zero_()

    def gradient_norm(self, key: str) -> Tensor:
        """Norm of an adapter's gradient: over blocks first, as a float32 sum over millions of squares is 0.1% off."""
        blocks = self._by_key[key].gradient.view(-1, _BLOCK)
        norm: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(blocks, dim=1))
        return norm

    def drop(self, key: str) -> None:
        """Forget an adapter."""
        del self._by_key[key], self.adapters[self._names[key]]

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the adapters act in the base's passes, and take them off again."""
        check_hookable(model)
        paths = {path: None for adapter in self._by_key.values() for path in adapter.maps}
        handles = [
            model.get_submodule(path).register_forward_hook(
                Hook(lambda _, args, out, at=path: self._add(at, args, out))
            )
            for path in paths
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, path: str, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        batch = sum(share.rows for share in self.shares)
        if not batch:
            return None
        x: Tensor = args[0]
        tokens, odd = divmod(x.numel() // x.shape[-1], batch)
        if odd:
            raise IncompatibleModelError(
                f"{path} got {tuple(x.shape)} for a batch of {batch} rows, so no row of it can be told to belong to an "
                "adapter. Choose target_modules that see every token of every row."
            )
        branches, start = [], 0
        whole = tokens == max(share.length for share in self.shares)  # else the head, which sees fewer columns
        for share in self.shares:
            end = start + share.rows * tokens
            if path in (adapter := self._by_key[share.key]).maps:
                noise = adapter.noise(x, share, tokens, share.length if whole else tokens)
                branches.append(Branch(*adapter.maps[path], (start, end), noise, adapter.grads[path]))
            start = end
        return add_branches(out, x, branches)

    @contextmanager
    def injected(self, key: str, model: PreTrainedModel) -> Iterator[None]:
        """The base with one of the adapters as PEFT has it, called ``ADAPTER``; taken out again."""
        adapter = self._by_key[key]
        with _injected(model, adapter.settings, seed=0) as layers:
            with torch.no_grad():
                for path, (down, up, _) in adapter.maps.items():
                    layers[path].lora_A[ADAPTER].weight.copy_(down)
                    layers[path].lora_B[ADAPTER].weight.copy_(up.T)
            yield


class _Adapter(nn.Module):
    """The matrices of one adapter, ``down`` ``[rank, in]`` and ``up`` ``[rank, out]`` of each map that it changes.

    They lie one behind the other in one parameter, and their gradients in its own: an optimiser has one tensor to
    clip, step and zero, whatever the number of maps.
    """

    maps: dict[str, tuple[Tensor, Tensor, float]]
    grads: dict[str, tuple[Tensor, Tensor]]

    def __init__(self, model: PreTrainedModel, settings: LoraSettings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        known = (part.module for _, _, part in ModelMap.build(model).cells())
        row_wise = {id(module) for part in known for module in part.modules()}
        with _injected(model, settings, seed=seed) as layers:
            for path, layer in layers.items():
                _check_layer(path, layer, row_wise)
            _check_rank(settings.r, layers)
            pairs = [(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight) for layer in layers.values()]
        matrices = [matrix.detach() for a, b in pairs for matrix in (a, b.T)]
        self._shapes, self._paths = [matrix.shape for matrix in matrices], list(layers)
        self._scales = [float(layer.scaling[ADAPTER]) for layer in layers.values()]
        unused = torch.zeros(-sum(matrix.numel() for matrix in matrices) % _BLOCK, device=matrices[0].device)
        self.flat = nn.Parameter(torch.cat([*(matrix.flatten() for matrix in matrices), unused]))
        self._look()

    def _look(self) -> None:
        """Find the matrices where they lie now, and give them gradients there."""
        self.gradient = self.flat.grad = torch.zeros_like(self.flat)
        weights, grads = self._views(self.flat.detach()), self._views(self.gradient)
        for weight, grad in zip(weights, grads, strict=True):
            weight.requires_grad_().grad = grad
        self.maps = dict(zip(self._paths, zip(weights[::2], weights[1::2], self._scales, strict=True), strict=True))
        self.grads = dict(zip(self._paths, zip(grads[::2], grads[1::2], strict=True), strict=True))

    def _views(self, flat: Tensor) -> list[Tensor]:
        sizes = [shape.numel() for shape in self._shapes]
        parts = torch.split(flat[: sum(sizes)], sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._look()
        return self

    def noise(self, x: Tensor, share: Share, tokens: int, length: int) -> Tensor | None:
        """Dropout as the share's own batch would draw it, whose rows are shorter by what all are padded with."""
        if not (self.training and self.settings.dropout > 0 and share.rows):
            return None
        kept = 1 - self.settings.dropout
        drawn = torch.empty(share.rows, length, x.shape[-1], device=x.device, dtype=torch.float32)
        drawn.bernoulli_(kept, generator=share.generator).div_(kept)
        return nn.functional.pad(drawn, (0, 0, 0, tokens - length)).flatten(0, 1)


@contextmanager
def _injected(model: PreTrainedModel, settings: LoraSettings, *, seed: int) -> Iterator[dict[str, Any]]:
    """A model with a fresh adapter, which is taken out again; gives the layers that carry it by path."""
    check_weights(model, purpose="Training adapters together")
    asked = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    inject_lora(model, settings, seed=seed)
    layers: dict[str, Any] = {path: layer for path, layer in model.named_modules() if hasattr(layer, "lora_A")}
    try:
        yield layers
    finally:
        remove_adapter(model)
        for parameter in model.parameters():
            parameter.requires_grad_(asked[id(parameter)])


def _check_layer(path: str, layer: Any, row_wise: set[int]) -> None:
    if ADAPTER not in layer.lora_A or id(layer.get_base_layer()) not in row_wise or ".experts." in path:
        raise IncompatibleModelError(
            f"{path} is a {type(layer.get_base_layer()).__name__} that does not see one row of features a token, so "
            "adapters on it cannot be trained together. Choose other target_modules, or train one by one."
        )


def _check_rank(rank: int, layers: Mapping[str, Any]) -> None:
    sizes = {path: min(layer.in_features, layer.out_features) for path, layer in layers.items()}
    over = [path for path, size in sizes.items() if rank > size]
    if len(over) == len(sizes):
        path = max(sizes, key=lambda path: sizes[path])
        raise IncompatibleModelError(
            f"An adapter of rank {rank} is larger than each of its {len(sizes)} maps: the update of {path} has a rank "
            f"of {sizes[path]} at most, and none has a higher one. Lower r."
        )
    if over:
        warnings.warn(
            f"An adapter of rank {rank} is larger than {len(over)} of its {len(sizes)} maps, such as {over[0]}, whose "
            f"update has a rank of {sizes[over[0]]} at most.",
            stacklevel=6,
        )


@contextmanager
def frozen_base(model: Any, *, checkpointing: bool) -> Iterator[None]:
    """A model in training mode without anything that is trained, as adapters have it; put back afterwards."""
    _check_no_dropout(model)
    if quantized_modules(model):
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    asked, training, device = {p: p.requires_grad for p in model.parameters()}, model.training, model.device
    model.requires_grad_(False)
    if checkpointing:
        checkpoint_blocks(model)
    try:
        yield
    finally:
        if checkpointing:
            turn_off = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
            turn_off()
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
        model.train(training)
        if model.device != device:  # a Trainer leaves what it has trained on the CPU
            model.to(device)


def _check_no_dropout(model: nn.Module) -> None:
    for path, module in model.named_modules():
        values = {"p": module.p} if isinstance(module, nn.Dropout) else vars(module)
        for name, value in values.items():
            if (name == "p" or "drop" in name) and isinstance(value, float) and value > 0:
                raise IncompatibleModelError(
                    f"{path}.{name} of {type(model).__name__} is {value}: a base that drops out by itself would draw "
                    "for all adapters at once, and none would be what it is alone. Load it with that setting at 0."
                )
