"""A decoder that scores a text: one linear map at its last token, whatever the padding."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.tokens.batches import aligned_left
from lightning_interp.errors import DataError, IncompatibleModelError

__all__ = [
    "DecoderWithScore",
    "align_left",
    "label_index",
    "needs_score_head",
    "own_code",
    "score_map",
    "scoring_model",
]

_CLASSIFIER = "ForSequenceClassification"


class DecoderWithScore(PreTrainedModel):
    """A decoder and a linear map ``score`` that reads its last real token.

    The classes of transformers look for the last token that is not the padding token, so a text that ends with that
    token is read too early. Here the attention mask alone says what is padding. Names of weights are those of theirs.
    """

    supports_gradient_checkpointing = True
    # The body has checked its own attention; what it uses is in the configuration that both share.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, body: PreTrainedModel, score: nn.Linear, *, prefix: str) -> None:
        super().__init__(config)
        self.base_model_prefix = prefix or "model"
        setattr(self, self.base_model_prefix, body)
        # A map of another type stays as it is with its owner.
        self.score = score if score.weight.dtype == torch.float32 else copy.deepcopy(score).float()
        self.post_init()

    def _check_and_adjust_experts_implementation(self, experts_implementation: str | None) -> str | None:
        return experts_implementation  # the body's own choice, as for attention

    def init_weights(self) -> None:
        """Leave the weights alone: body and map come with theirs."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """Score a batch of texts."""
        input_ids, attention_mask = align_left(input_ids, attention_mask)
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        picked = hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
        with torch.autocast(picked.device.type, enabled=False):  # rewards differ by little
            logits = self.score(picked.float())
        return SequenceClassifierOutput(logits=logits)


def align_left(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Move the padding of every row to its end, where a causal model cannot see it."""
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    input_ids, real = aligned_left(input_ids, attention_mask)
    if not bool(real[:, 0].all()):
        row = int((~real[:, 0]).int().argmax())
        raise DataError(
            f"Row {row} of a batch of shape {tuple(input_ids.shape)} has no token: its attention mask is all zeros, so "
            "there is nothing to score. Give every text at least one token."
        )
    return input_ids, real.long()


def _has_score_head(model: nn.Module) -> bool:
    """Whether a model reads scores off a decoder by a linear map called ``score``."""
    return isinstance(getattr(model, "score", None), nn.Linear) and getattr(model, "base_model", model) is not model


def needs_score_head(model: nn.Module) -> bool:
    """Whether :func:`scoring_model` would put a fresh score head on a model."""
    classifier = _CLASSIFIER in type(model).__name__ or own_code(model)
    return not (isinstance(model, DecoderWithScore) or _has_score_head(model) or classifier)


def scoring_model(model: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    """Make a model that scores texts from any Hugging Face model; its modules are used, not copied.

    - A decoder with a linear map ``score`` keeps it.
    - A classifier that pools in another way (an encoder, or one that brings its own code) stays as it is.
    - Any other decoder loses its language modelling head and gets a fresh map, whose standard deviation is
      ``1 / sqrt(d + 1)`` (Stiennon et al. 2020, "Learning to summarize from human feedback").
    """
    if not isinstance(model, PreTrainedModel):
        raise IncompatibleModelError(
            f"{type(model).__name__} is no transformers PreTrainedModel, so it cannot score texts. Give the model "
            "itself; of a PEFT wrapper, what model.merge_and_unload() returns."
        )
    if isinstance(model, DecoderWithScore):
        return model
    prefix = model.base_model_prefix
    if _has_score_head(model) and not own_code(model):
        scored = DecoderWithScore(model.config, model.base_model, model.score, prefix=prefix)
    elif not needs_score_head(model):
        return model
    elif getattr(model.config, "is_encoder_decoder", False):
        raise IncompatibleModelError(
            f"{type(model).__name__} has an encoder and a decoder, so a text has no one last token to read. Use a "
            "decoder, or a classifier that transformers has for this family."
        )
    else:
        model.config.num_labels = 1
        body = model.base_model
        scored = DecoderWithScore(model.config, body, _fresh_score(body, seed), prefix=prefix)
    for name in ("peft_config", "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in model.__dict__:  # marks of what was done to the modules
            setattr(scored, name, model.__dict__[name])
    return scored.train(model.training)


def own_code(model: nn.Module) -> bool:
    """Whether a model runs Python code that came with its weights."""
    return type(model).__module__.partition(".")[0] == "transformers_modules"


def label_index(model: PreTrainedModel, label: Any) -> int | list[float]:
    """Which of a model's outputs is the reward; or the weight of each, if weights are given."""
    config = model.config
    names = {str(name): int(index) for index, name in (config.id2label or {}).items()}
    listed = ", ".join(f"{index} ({name})" for name, index in names.items())
    if label is None and (config.num_labels == 1 or own_code(model)):
        return 0
    if label is None:
        raise IncompatibleModelError(
            f"{type(model).__name__} has {config.num_labels} outputs: {listed}. Choose the reward with label=, by "
            "index or by name, or give weights of the outputs."
        )
    if isinstance(label, Mapping):
        places = [label_index(model, name) for name in label]
        given = dict(zip(map(str, places), label.values(), strict=True))
        return label_index(model, [given.get(str(place), 0.0) for place in range(config.num_labels)])
    if isinstance(label, Sequence) and not isinstance(label, str):
        weights = [float(one) if isinstance(one, int | float) else math.nan for one in label]
        if len(weights) != config.num_labels or not all(map(math.isfinite, weights)) or not any(weights):
            raise IncompatibleModelError(
                f"{type(model).__name__} has {config.num_labels} outputs: {listed}; the weights label={label!r:.80} "
                "are no finite number for each of them, or all 0."
            )
        return weights
    index = names.get(label, int(label) if label.isdecimal() else None) if isinstance(label, str) else label
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < config.num_labels:
        raise IncompatibleModelError(f"{type(model).__name__} has no output label={label!r}; it has {listed}.")
    return index


def score_map(weight: Tensor, device: torch.device) -> nn.Linear:
    """The linear map with these weights, in float32; the global random state is not touched."""
    labels, width = weight.shape
    score = nn.Linear(width, labels, bias=False, dtype=torch.float32, device="meta").to_empty(device=device)
    score.load_state_dict({"weight": weight.float()})
    return score


def _fresh_score(body: PreTrainedModel, seed: int) -> nn.Linear:
    device = next(p for p in body.parameters() if p.is_floating_point()).device
    config: Any = body.config.get_text_config()  # states have in some families the size of the embeddings
    width = int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)
    generator = torch.Generator().manual_seed(derived_seed(seed, "score-head"))
    return score_map(torch.randn(1, width, generator=generator) / math.sqrt(width + 1), device)
