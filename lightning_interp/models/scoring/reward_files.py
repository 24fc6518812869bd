"""Folders of reward models that others can load: transformers, PEFT, and this package with its way of writing texts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lightning_interp.core.storage.files import atomic_write_json
from lightning_interp.core.storage.tensor_files import read_tensors, save_tensors
from lightning_interp.errors import DataError
from lightning_interp.models.scoring.score_head import DecoderWithScore
from lightning_interp.models.sources.adapters import save_adapter
from lightning_interp.models.sources.folders import atomic_folder
from lightning_interp.models.sources.pretrained import quiet_bars

__all__ = ["TEXT_SETTINGS", "read_text_settings", "write_adapter_folder", "write_model_folder"]

TEXT_SETTINGS = ("chat", "system_prompt", "add_eos", "max_length", "label")
"""What a folder says beside the weights: how texts are written, and which output is the reward."""

_FILE = "reward_text.json"


def read_text_settings(folder: Path) -> dict[str, Any]:
    """How the texts of an exported reward model are written.

    Returns:
        Values of ``TEXT_SETTINGS``; empty if the folder does not say.

    Raises:
        DataError: If the file is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in TEXT_SETTINGS}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not say how texts are written ({error!r}). Export the model again, or delete the file and "
            "pass chat=, add_eos= and max_length= yourself."
        ) from error


def write_model_folder(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    text: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
) -> None:
    """Write a whole reward model.

    Where transformers has a class for sequence classification in this family, the folder is one of that class.

    Raises:
        ManifestError: If the folder holds files and ``overwrite`` is False, or cannot be written.
    """
    with atomic_folder(folder, overwrite=overwrite) as temporary, quiet_bars():
        model.save_pretrained(temporary)
        _name_class(temporary / "config.json", model, tokenizer)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _write_text_settings(temporary, text)


def write_adapter_folder(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    base: str,
    text: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
) -> None:
    """Write an adapter with its score head as PEFT does for sequence classification.

    Raises:
        ManifestError: If the folder holds files and ``overwrite`` is False, or cannot be written.
    """
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        save_adapter(model, temporary, base=base, tokenizer=tokenizer)
        weights, about = read_tensors(temporary / "adapter_model.safetensors")
        weights["base_model.model.score.weight"] = model.score.weight
        save_tensors(temporary / "adapter_model.safetensors", weights, about)
        config = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
        atomic_write_json(temporary / "adapter_config.json", {**config, "modules_to_save": ["score"]})
        _write_text_settings(temporary, text)


def _write_text_settings(folder: Path, text: Mapping[str, Any]) -> None:
    atomic_write_json(folder / _FILE, {name: text[name] for name in TEXT_SETTINGS})


def _name_class(path: Path, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    theirs = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model.config.model_type)
    if isinstance(model, DecoderWithScore) and theirs is not None:
        config["architectures"] = [theirs]
    if config.get("pad_token_id") is None and tokenizer is not None and tokenizer.pad_token_id is not None:
        config["pad_token_id"] = tokenizer.pad_token_id  # their classes take no batch without one
    atomic_write_json(path, config)
