"""A base model that is loaded once and carries one adapter, whose weights are put in from files, in place."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_interp.core.storage.tensor_files import read_tensors, save_tensors
from lightning_interp.errors import DataError
from lightning_interp.models.sources.loading import LoadedModel, load_causal_lm
from lightning_interp.models.training.adapter_state import check_state
from lightning_interp.models.training.lora import LoraSettings, adapter_parameters, inject_lora

__all__ = ["AdapterSlot"]


class AdapterSlot:
    """A base model and one adapter on it; other weights of the same shape take the place of those that are there.

    The base is loaded when it is first asked for.

    Args:
        source: A source for :func:`load_causal_lm`.
        lora: The adapter's settings.
        seed: Of the fresh adapter's weights.
        dtype: Type of the base's weights.

    Example:
        >>> slot = AdapterSlot("tiny:llama", lora=LoraSettings(r=2), seed=0)
        >>> slot.put(None).config.model_type, len(slot.tensors())
        ('llama', 56)
    """

    def __init__(self, source: str, *, lora: LoraSettings, seed: int, dtype: str = "float32") -> None:
        self.source, self.lora, self.seed, self.dtype = source, lora, seed, dtype
        self._fresh: dict[str, Tensor] = {}

    @cached_property
    def _loaded(self) -> LoadedModel:
        loaded = load_causal_lm(self.source, dtype=self.dtype)
        inject_lora(loaded.model, self.lora, seed=self.seed)
        self._fresh = {name: tensor.clone() for name, tensor in _weights(loaded.model).items()}
        return loaded

    @property
    def model(self) -> Any:
        """The adapted model, as it is now."""
        return self._loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._loaded.tokenizer

    def put(self, weights: str | os.PathLike[str] | dict[str, Tensor] | None) -> Any:
        """Put an adapter's weights in.

        Args:
            weights: A file that :meth:`save` wrote, tensors by name, or None for the fresh adapter, with which the
                model computes what its base does.

        Returns:
            The model, in evaluation mode.

        Raises:
            IncompatibleModelError: If names or shapes are not those of the adapter.
        """
        own, where = self.tensors(), "given weights"
        if isinstance(weights, str | os.PathLike):
            where, weights = str(weights), read_tensors(weights)[0]
        tensors = self._fresh if weights is None else weights
        check_state(tensors, own, own, owner=f"the adapter of {self.source!r} ({where})")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        return self.model.eval()

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's weights by name: those that the model computes with, no copies."""
        return _weights(self.model)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the adapter's weights.

        Args:
            path: A safetensors file, whose bytes follow from the weights alone.

        Returns:
            ``path``.

        Raises:
            DataError: If a weight is not finite: the training diverged.
        """
        tensors = self.tensors()
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise DataError(f"The adapter of {self.source!r} diverged: {name} holds numbers that are not finite.")
        return save_tensors(path, tensors)


def _weights(model: Any) -> dict[str, Tensor]:
    names = adapter_parameters(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name in names}
