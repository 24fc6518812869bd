"""Folders of reward models that others can load: transformers, PEFT, and this package with its way of writing texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lightning_interp.core.storage.files import atomic_write_json
from lightning_interp.core.storage.tensor_files import read_tensors, save_tensors
from lightning_interp.errors import DataError
from lightning_interp.models.scoring.score_head import DecoderWithScore

__all__ = ["TEXT_SETTINGS", "complete_folder", "read_text_settings"]

TEXT_SETTINGS = ("chat", "system_prompt", "add_eos", "max_length", "label")
"""What a folder says beside the weights: how texts are written, and which output is the reward."""

_FILE = "reward_text.json"


def read_text_settings(folder: Path) -> dict[str, Any]:
    """How the texts of an exported reward model are written."""
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


def complete_folder(
    folder: Path, model: Any, *, text: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, adapter: bool
) -> None:
    """Make a folder of an exported model, or of its adapter, one of a reward model.

    Where transformers has a class for sequence classification in this family, the folder is one of that class. The
    score head lies with the adapter, as PEFT has it for sequence classification.
    """
    if adapter:
        weights, about = read_tensors(folder / "adapter_model.safetensors")
        weights["base_model.model.score.weight"] = model.score.weight
        save_tensors(folder / "adapter_model.safetensors", weights, about)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        atomic_write_json(folder / "adapter_config.json", {**config, "modules_to_save": ["score"]})
    else:
        _name_class(folder / "config.json", model, tokenizer)
    atomic_write_json(folder / _FILE, {name: text[name] for name in TEXT_SETTINGS})


def _name_class(path: Path, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    theirs = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model.config.model_type)
    if isinstance(model, DecoderWithScore) and theirs is not None:
        config["architectures"] = [theirs]
    if config.get("pad_token_id") is None and tokenizer is not None and tokenizer.pad_token_id is not None:
        config["pad_token_id"] = tokenizer.pad_token_id  # their classes take no batch without one
    atomic_write_json(path, config)
