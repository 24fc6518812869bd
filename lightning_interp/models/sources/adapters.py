"""PEFT adapter folders, read and written through PEFT's functional surface (no wrapping class)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_interp.core.measure.seeding import seeded_rng
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.core.storage.tensor_files import save_tensors
from lightning_interp.core.weights.tensors import TensorFolder
from lightning_interp.errors import DataError, IncompatibleModelError
from lightning_interp.models.sources.folders import atomic_folder, short

__all__ = [
    "ADAPTER",
    "adapted",
    "adapter_base",
    "attach_adapter_folder",
    "has_adapter",
    "is_adapter_folder",
    "remove_adapter",
    "save_adapter",
    "without_adapters",
]

ADAPTER = "default"
"""The name under which adapters are injected."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_REMEDY = "Load it with the base model that it was trained on."


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / _CONFIG).is_file()


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT layers were injected into a model."""
    return bool(getattr(model, "peft_config", None))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let PEFT layers compute what their base does, until the block is left; what is trained stays so."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """The base model that an adapter folder names (a hub id, an alias or an absolute path), and its hub revision."""
    path = folder / _CONFIG
    try:
        config = parse_json(path.read_bytes(), twice=True)
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is no adapter configuration ({error}). Copy or export it again.") from error
    if not base or not isinstance(base, str):
        why = f"{path} names no base model (base_model_name_or_path is {base!r})."
        raise DataError(f"{why} Write the base's hub id or folder there.")
    nearby = folder / base
    return str(nearby.resolve()) if base.startswith(".") and nearby.exists() else base, revision


def attach_adapter_folder(model: nn.Module, folder: Path, *, name: str = ADAPTER) -> None:
    """Inject the adapter of a PEFT folder into its base model, in place; its parameters are frozen."""
    from peft import PeftConfig
    from peft.functional import inject_adapter_in_model, set_peft_model_state_dict

    # Without the prefix of PEFT's wrapping class: names as the model itself has them.
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in TensorFolder(folder, stem="adapter_model")}
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if code := getattr(config, "megatron_config", None) and getattr(config, "megatron_core", None):
            raise ValueError(f"its configuration names code to import, megatron_core={code!r}.")
        config.inference_mode = True
        with seeded_rng(0):  # fresh weights are drawn first, and overwritten
            inject_adapter_in_model(config, model, adapter_name=name)
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise IncompatibleModelError(
            f"The adapter in {folder} does not fit {type(model).__name__}: {short(error)} {_REMEDY}"
        ) from error
    missing = [key for key in result.missing_keys if f".{name}" in key]
    if missing or result.unexpected_keys:
        key, what = (missing[0], "lacks") if missing else (result.unexpected_keys[0], "holds the unknown")
        raise IncompatibleModelError(
            f"The adapter in {folder} {what} tensor {key!r} for {type(model).__name__} "
            f"({len(missing)} missing, {len(result.unexpected_keys)} unknown). {_REMEDY}"
        )


def remove_adapter(model: nn.Module) -> None:
    """Take injected adapters out again, merged into nothing: the base's own layers stand where they stood."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    carrier: Any = model
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    for path, layer in layers:
        model.set_submodule(path, layer.get_base_layer())
    if has_adapter(model):
        del carrier.peft_config


@contextmanager
def adapted(model: nn.Module, folder: Path) -> Iterator[None]:
    """A base model with the adapter of a PEFT folder while the block lasts."""
    attach_adapter_folder(model, folder)
    try:
        yield
    finally:
        remove_adapter(model)


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: str,
    name: str = ADAPTER,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an injected adapter as a folder that ``PeftModel.from_pretrained`` reads."""
    from peft.functional import get_peft_model_state_dict

    adapter: Any = model
    config = copy.deepcopy(adapter.peft_config[name])
    config.base_model_name_or_path = base
    config.inference_mode = True
    for field, value in vars(config).items():
        if isinstance(value, set):  # sets would be written in an order that changes from run to run
            setattr(config, field, sorted(value))
    # Only the adapter: PEFT's own choice about embedding layers asks the hub.
    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights = {f"{_PREFIX}{path}": tensor for path, tensor in found.items()}
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        config.save_pretrained(str(temporary))
        save_tensors(temporary / _WEIGHTS, weights, {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return Path(folder)
