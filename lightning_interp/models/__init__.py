"""Language models from anywhere, text for training them, and the LightningModule that does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_interp.models.bag_of_words import BagOfWords
    from lightning_interp.models.causal_lm import CausalLM
    from lightning_interp.models.data import TextDataModule
    from lightning_interp.models.gguf_files import convert_gguf
    from lightning_interp.models.lora import LoraSettings
    from lightning_interp.models.preferences import PreferenceDataModule
    from lightning_interp.models.reward import RewardModel
    from lightning_interp.models.reward_sources import LoadedReward, load_reward_model
    from lightning_interp.models.reward_text import RewardEncoder, Scores
    from lightning_interp.models.sources import LoadedModel, load_causal_lm
    from lightning_interp.models.text_scorer import Scorer, TextScorer
    from lightning_interp.models.tokenizers import check_same_tokenizer
    from lightning_interp.models.words import word_tokenizer

__all__ = [
    "BagOfWords",
    "CausalLM",
    "LoadedModel",
    "LoadedReward",
    "LoraSettings",
    "PreferenceDataModule",
    "RewardEncoder",
    "RewardModel",
    "Scorer",
    "Scores",
    "TextDataModule",
    "TextScorer",
    "check_same_tokenizer",
    "convert_gguf",
    "load_causal_lm",
    "load_reward_model",
    "word_tokenizer",
]

_HOMES = {
    "BagOfWords": "bag_of_words",
    "CausalLM": "causal_lm",
    "LoadedModel": "sources",
    "LoadedReward": "reward_sources",
    "LoraSettings": "lora",
    "PreferenceDataModule": "preferences",
    "RewardEncoder": "reward_text",
    "RewardModel": "reward",
    "Scorer": "text_scorer",
    "Scores": "reward_text",
    "TextDataModule": "data",
    "TextScorer": "text_scorer",
    "check_same_tokenizer": "tokenizers",
    "convert_gguf": "gguf_files",
    "load_causal_lm": "sources",
    "load_reward_model": "reward_sources",
    "word_tokenizer": "words",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: loading a model needs no Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
