"""Models which score texts: loaded from wherever they are, and folders that others can load too."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import cached_file

from lightning_interp.core.storage.files import atomic_write_json
from lightning_interp.core.storage.json_reading import parse_json
from lightning_interp.core.storage.tensor_files import read_tensors, save_tensors
from lightning_interp.core.weights.tensors import TensorFolder
from lightning_interp.errors import DataError, IncompatibleModelError, RecipeError
from lightning_interp.models.scoring.input_contract import NOTHING_LEFT, Left, trainer_marks
from lightning_interp.models.scoring.score_head import DecoderWithScore, score_map, scoring_model
from lightning_interp.models.sources.adapters import ADAPTER, adapter_base, attach_adapter_folder, is_adapter_folder
from lightning_interp.models.sources.bundled import ALIASES
from lightning_interp.models.sources.folders import check_weight_files
from lightning_interp.models.sources.loading import load_with
from lightning_interp.models.sources.pretrained import (
    LoadOptions,
    Quantization,
    load_model,
    load_tokenizer_files,
    named_dtype,
)

__all__ = ["LoadedReward", "complete_folder", "in_memory", "load_reward_model", "read_text_settings"]

_CLASSIFIER = "ForSequenceClassification"
_AUTO = f"AutoModel{_CLASSIFIER}"
_SCORE = "score.weight"
_OTHER_HEAD = re.compile(r"For(Token|Audio|Image|Video|QuestionAnswering|MultipleChoice|NextSentencePrediction)")
_FILE, _TEXT = "reward_text.json", ("chat", "system_prompt", "add_eos", "max_length", "label")


class LoadedReward(NamedTuple):
    """A model that scores texts, with what belongs to it.

    Attributes:
        model: The model, in evaluation mode; its output has ``logits`` of shape ``[batch, labels]``.
        tokenizer: Its tokenizer.
        label: What to call it in tables and reports; says so when weights were dequantised.
        fresh: Whether the map to a score is random: the source is a language model, to be trained into a reward model.
        left: What lies beside it about how its texts are written, and which output is the reward.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    fresh: bool
    left: Left = NOTHING_LEFT

    @property
    def text(self) -> Mapping[str, Any]:
        """How its texts are written and which output is the reward, if its folder says so."""
        return self.left.text


def load_reward_model(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = torch.float32,
    quantization: Quantization | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> LoadedReward:
    """Load a reward model, any other sequence classifier, or a language model with a fresh score head.

    Args:
        source: What ``load_causal_lm`` takes, or a folder or id of a sequence classifier, or a PEFT adapter of one.
        dtype: Type of the weights.
        quantization: Quantise the linear maps with bitsandbytes: ``"4bit"`` (NF4) or ``"8bit"``.
        revision: Branch, tag or commit of a Hugging Face id.
        trust_remote_code: Run Python code that comes with the model.
        cache_dir: Folder of converted models; the default one if None.
        seed: Root seed of a fresh score head.

    Returns:
        ``LoadedReward(model, tokenizer, label, fresh, left)``.

    Raises:
        RecipeError: If the source is unknown or an argument has a wrong value.
        DataError: If a model file is missing, damaged, cut short or pickled.
        IncompatibleModelError: If an adapter does not fit its base, or the model cannot score a text: it scores tokens
            or steps, or brings its own code and ``trust_remote_code`` is not set.

    Example:
        >>> loaded = load_reward_model("tiny:llama")
        >>> loaded.label, loaded.fresh, loaded.model.score
        ('tiny:llama', True, Linear(in_features=32, out_features=1, bias=False))
    """
    options = LoadOptions(
        dtype=named_dtype(dtype),
        quantization=quantization,
        revision=revision,
        trust_remote_code=trust_remote_code,
        cache_dir=cache_dir,
    )
    return _load(os.fspath(source), options, seed)


def _load(name: str, options: LoadOptions, seed: int) -> LoadedReward:
    path = Path(name).expanduser()
    if name.strip() and path.is_dir() and is_adapter_folder(path):
        return _adapter(path, options, seed)
    config = _config(name, path, options)
    kind, auto = _architecture(name, config, options)
    if not kind.endswith(_CLASSIFIER) and kind != DecoderWithScore.__name__ and auto is None:
        loaded = load_with(name, options)
        return LoadedReward(scoring_model(loaded.model, seed=seed), loaded.tokenizer, loaded.label, True)
    where: str | Path = name
    label = name if options.revision is None else f"{name}@{options.revision}"
    if path.is_dir():
        options.without_revision(path)
        check_weight_files(path)
        where, label = path, path.resolve().name
    tokenizer = load_tokenizer_files(where, options)
    if kind == DecoderWithScore.__name__:
        model = _own_class(where, options)
    else:
        auto = auto or AutoModelForSequenceClassification
        model = scoring_model(load_model(where, options, auto=auto), seed=seed)
    return LoadedReward(model, tokenizer, label, False, _left(where, options, config))


def _config(name: str, path: Path, options: LoadOptions) -> dict[str, Any]:
    """The configuration of a folder or hub id as it was written; empty where there is none."""
    if name in ALIASES or not name.strip() or name.endswith(".gguf") or ":" in name:
        return {}
    try:
        where = str(path) if path.is_dir() else name
        return dict(PreTrainedConfig.get_config_dict(where, revision=options.revision or "main")[0])
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}  # loading it as a language model says what is wrong


def _architecture(name: str, config: Mapping[str, Any], options: LoadOptions) -> tuple[str, Any]:
    """The class that a configuration names, empty if it names none, and what loads it, if it brings its own code.

    What gives no one number a text, or runs code that was not agreed to, is refused.
    """
    listed, own = config.get("architectures"), config.get("auto_map")
    kind = str(listed[0]) if isinstance(listed, list) and listed else ""
    own = own if isinstance(own, Mapping) else {}
    if "ProcessReward" in kind or _OTHER_HEAD.search(kind):
        raise IncompatibleModelError(
            f"{name!r} is a {kind}, which scores tokens or steps (a process reward model) or something else than a "
            "whole text. Name a sequence classifier, or make one number of it in a function of prompts and texts."
        )
    scores = kind.endswith(_CLASSIFIER) or "Reward" in kind
    if not (own.keys() & {_AUTO, "AutoModel"} and (scores or _AUTO in own)):
        return kind, None
    if options.trust_remote_code:
        return kind, AutoModelForSequenceClassification if _AUTO in own else AutoModel
    if not hasattr(transformers, kind):
        raise IncompatibleModelError(
            f"{name!r} is a {kind}, whose Python code comes with its weights "
            f"({own.get(_AUTO) or own.get('AutoModel')}). Read that code, and pass trust_remote_code=True if it may "
            "run here; a recipe takes a function of your own that loads it."
        )
    return kind, None


def _left(where: str | Path, options: LoadOptions, config: Mapping[str, Any]) -> Left:
    """What lies beside a model about its texts."""
    text, beside = {}, partial(_beside, where, options)
    if (path := beside(_FILE)) is not None:
        text = read_text_settings(path.parent)
    return Left(text, trainer_marks(beside, config))


def _beside(where: str | Path, options: LoadOptions, file: str) -> Path | None:
    """A file of a folder (of the run's, for a checkpoint in it) or hub id; None if it is not there."""
    folder = Path(where).expanduser()
    if folder.is_dir():
        near = [folder, folder.parent] if re.fullmatch(r"checkpoint-\d+", folder.name) else [folder]
        return next((place / file for place in near if (place / file).is_file()), None)
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        found = cached_file(str(where), file, revision=options.revision or "main", **quiet)
    except OSError:
        return None
    return None if found is None else Path(found)


def in_memory(model: Any) -> Left:
    """What lies in the folder that a model in memory came from, if it did."""
    source = str(getattr(model.config, "_name_or_path", "") or "")
    if not source or not Path(source).is_dir():
        return NOTHING_LEFT
    return _left(source, LoadOptions(), model.config.to_dict())


def _own_class(where: str | Path, options: LoadOptions) -> PreTrainedModel:
    """What a family without a class of its own was saved as: the body, and the score head beside it."""
    body = load_model(where, options, auto=AutoModel)
    tensors = TensorFolder(Path(where))
    if _SCORE not in tensors:
        raise DataError(
            f"The weights in {str(where)!r} lack {_SCORE!r}, the map from the decoder's last state to the score. Give "
            "the local folder that RewardModel.export wrote, whole."
        )
    score = score_map(tensors.tensor(_SCORE), body.device)
    return DecoderWithScore(body.config, body, score, prefix=body.base_model_prefix).eval()


def _adapter(folder: Path, options: LoadOptions, seed: int) -> LoadedReward:
    options.without_revision(folder)
    base, revision = adapter_base(folder)
    if (path := Path(base).expanduser()).is_dir() and is_adapter_folder(path):
        raise RecipeError(
            f"The adapter in {folder} names {base!r} as its base, which is an adapter itself. Merge that one into its "
            "base and name the merged folder."
        )
    task = parse_json((folder / "adapter_config.json").read_bytes(), twice=True).get("task_type")
    if task in ("TOKEN_CLS", "QUESTION_ANS"):
        raise IncompatibleModelError(
            f"The adapter in {folder} is of a model that scores tokens ({task}), such as a process reward model, and "
            "no whole texts. Name one of a sequence classifier, or make one number of it in a function of prompts and "
            "texts."
        )
    loaded = _load(base, replace(options, revision=revision), seed)
    if loaded.fresh:
        _widen(loaded.model, folder)
    attach_adapter_folder(loaded.model, folder)
    fresh = not _unwrap_score(loaded.model) and loaded.fresh
    own = (folder / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer_files(folder, options) if own else loaded.tokenizer
    left, label = _left(folder, options, {}), f"{folder.resolve().name} on {loaded.label}"
    if left == NOTHING_LEFT:
        left = loaded.left
    return LoadedReward(loaded.model.eval(), tokenizer, label, fresh, left)


def _widen(model: Any, folder: Path) -> None:
    """Give a fresh head as many outputs as the head that an adapter brings."""
    tensors = TensorFolder(folder, stem="adapter_model")
    name = next((name for name in tensors.files if name.endswith("score.weight")), None)
    if name is not None and tensors.headers[name].shape[0] != len(model.score.weight):
        model.score = score_map(tensors.tensor(name), model.score.weight.device)
        model.config.num_labels = len(model.score.weight)


def _unwrap_score(model: Any) -> bool:
    """Put the score head that an adapter brought in place of PEFT's wrapper around two; whether there was one."""
    wrapped = getattr(getattr(model, "score", None), "modules_to_save", None)
    if wrapped is None:
        return False
    model.score = wrapped[ADAPTER].float()
    model.peft_config[ADAPTER].modules_to_save = None
    return True


def read_text_settings(folder: Path) -> dict[str, Any]:
    """How the texts of an exported reward model are written."""
    path = folder / _FILE
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
        return {
            **{name: found[name] for name in _TEXT},
            "pair": bool(found.get("pair")),
            "ends_before": found.get("ends_before"),
            "eos_in_text": found.get("eos_in_text"),
        }
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
        config = parse_json((folder / "adapter_config.json").read_bytes(), twice=True)
        atomic_write_json(folder / "adapter_config.json", {**config, "modules_to_save": ["score"]})
    else:
        _name_class(folder / "config.json", model, tokenizer)
    more = {name: text[name] for name in ("pair", "ends_before", "eos_in_text") if text[name]}
    atomic_write_json(folder / _FILE, {**{name: text[name] for name in _TEXT}, **more})


def _name_class(path: Path, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    config = parse_json(path.read_bytes(), twice=True)
    theirs = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model.config.model_type)
    if isinstance(model, DecoderWithScore) and theirs is not None:
        config["architectures"] = [theirs]
    if config.get("pad_token_id") is None and tokenizer is not None and tokenizer.pad_token_id is not None:
        config["pad_token_id"] = tokenizer.pad_token_id  # their classes take no batch without one
    atomic_write_json(path, config)
