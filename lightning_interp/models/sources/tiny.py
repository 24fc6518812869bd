"""Tiny random language models of many families and a byte tokenizer, made locally and without a network.

Every parameter is drawn so that it matters (norm weights spread around their neutral value, biases are not zero), so
a test cannot pass because one happened to be neutral. The one exception is arithmetic: a key bias without rotary
embeddings shifts all scores of a query alike, and softmax removes it (``opt``; a third of it in ``gpt2``, ``bloom``).
"""

from __future__ import annotations

import difflib
import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from lightning_interp.core.measure.seeding import seeded_rng
from lightning_interp.errors import RecipeError

__all__ = ["EXTRA_FAMILIES", "FAMILIES", "byte_tokenizer", "tiny_config", "tiny_model", "tiny_pair"]

FAMILIES: tuple[str, ...] = ("llama", "gpt2", "gpt_neox", "gemma2", "bloom", "opt", "qwen2_moe")
"""The families that every structural test runs on; between them they show each layout that is supported."""

EXTRA_FAMILIES: tuple[str, ...] = ("gemma3", "qwen3", "phi3")
"""Families with a norm on queries and keys, or with fused gate and up maps, for tests of components alone."""

_LAYERS = 4
_PAD, _BOS, _EOS = "<pad>", "<bos>", "<eos>"
_SPECIALS = (_PAD, _BOS, _EOS, "<|im_start|>", "<|im_end|>")
_VOCAB_SIZE = len(_SPECIALS) + 256

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_ROTARY = {"intermediate_size": 64, "max_position_embeddings": 1024}
_GROUPED = {**_ROTARY, "num_key_value_heads": 2}
# A head size that is not width / heads, soft caps and a window short enough to act on tests' prompts.
_GEMMA = {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}

# What differs from the defaults of transformers' configuration.
_SPECS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "gpt2": {"n_positions": 1024, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {**_ROTARY, "use_parallel_residual": True},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "bloom": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 1024, "dropout": 0.0},
    "qwen2_moe": {
        **_GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "gemma3": {**_GEMMA, "sliding_window_pattern": 2},
    "qwen3": {**_GROUPED, "head_dim": 16},
    "phi3": {**_GROUPED, "original_max_position_embeddings": 1024},
}


def tiny_config(family: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """Configuration of a tiny model: 4 layers, width 32, 4 heads, no dropout, the byte vocabulary.

    Args:
        family: One of ``FAMILIES`` or ``EXTRA_FAMILIES``.
        **overrides: Fields of its transformers configuration; ``hidden_size`` and the like work for every family.

    Returns:
        The configuration, with the byte tokenizer's pad, bos and eos ids.

    Raises:
        RecipeError: The family is unknown, or an override is no field of its configuration.

    Example:
        >>> config = tiny_config("gpt2", num_hidden_layers=2)
        >>> config.n_layer, config.hidden_size, config.vocab_size
        (2, 32, 261)
    """
    if family not in _SPECS:
        known = ", ".join(FAMILIES + EXTRA_FAMILIES)
        raise RecipeError(f"There is no tiny model of family {family!r}; choose one of {known}.")
    model_type = {"gemma3": "gemma3_text"}.get(family, family)
    defaults = AutoConfig.for_model(model_type)
    _check_overrides(family, defaults, overrides)
    settings = {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4,
        "pad_token_id": _SPECIALS.index(_PAD),
        "bos_token_id": _SPECIALS.index(_BOS),
        "eos_token_id": _SPECIALS.index(_EOS),
        **_SPECS[family],
    }
    # One name a field (n_layer, not num_hidden_layers, in gpt2), so that an override in either name wins.
    names = defaults.attribute_map
    merged = {names.get(name, name): value for name, value in (*settings.items(), *overrides.items())}
    return AutoConfig.for_model(model_type, **merged)


def _check_overrides(family: str, defaults: PreTrainedConfig, overrides: dict[str, Any]) -> None:
    # transformers keeps unknown keywords silently, so a misspelt override would test something else.
    known = {*defaults.to_dict(), *defaults.attribute_map, "attn_implementation"}
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its fields are {', '.join(sorted(known))}."
            raise RecipeError(f"The configuration of family {family!r} has no field {name!r}; {hint}")


def tiny_model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A tiny random causal language model in evaluation mode, in which every parameter matters.

    The weights depend only on the seed, the family, each parameter's name and its shape.

    Args:
        family: One of ``FAMILIES`` or ``EXTRA_FAMILIES``.
        seed: Root seed of the weights.
        dtype: Type of the weights; they are drawn in float32 and rounded.
        **overrides: Passed to :func:`tiny_config`, for example ``attn_implementation="eager"``.

    Returns:
        The model, with logits of shape ``[batch, time, 261]``.

    Raises:
        RecipeError: The family is unknown, or an override is no field of its configuration.

    Example:
        >>> ids = byte_tokenizer()("hello", return_tensors="pt").input_ids
        >>> tiny_model("llama", seed=1)(ids).logits.shape
        torch.Size([1, 5, 261])
    """
    return _cast(_made(family, seed, overrides), dtype)


def tiny_pair(
    family: str = "llama", *, seed: int = 0, scale: float = 0.5, dtype: torch.dtype = torch.float32, **overrides: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A recipient, and a donor that is the recipient with every parameter moved, as if it had been finetuned.

    Each moves by seeded noise whose standard deviation is ``scale`` times its own; tied weights stay tied.

    Args:
        family: One of ``FAMILIES`` or ``EXTRA_FAMILIES``.
        seed: Root seed of the weights and of the noise.
        scale: Size of the move, relative to each parameter's spread.
        dtype: Type of the weights of both models.
        **overrides: Passed to :func:`tiny_config`.

    Returns:
        ``(recipient, donor)``, both in evaluation mode and without shared storage.

    Raises:
        RecipeError: The family is unknown, or an override is no field of its configuration.

    Example:
        >>> recipient, donor = tiny_pair("gpt2", scale=0.1)
        >>> bool((recipient.transformer.ln_f.bias == donor.transformer.ln_f.bias).any())
        False
    """
    return _cast(_made(family, seed, overrides), dtype), _cast(_made(family, seed, overrides, scale), dtype)


def _made(family: str, seed: int, overrides: dict[str, Any], scale: float | None = None) -> PreTrainedModel:
    """The model of a seed in float32, or with a ``scale`` the donor of a pair."""
    config = tiny_config(family, **overrides)
    with seeded_rng(seed), torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                noise = _noise(parameter, f"{seed}/tiny_model/{family}/{module_name}.{leaf}")
                parameter.copy_(_draw(module, parameter, noise))
        if scale is not None:
            for name, parameter in model.named_parameters():
                noise = _noise(parameter, f"{seed}/tiny_pair/{family}/{name}")
                parameter.add_(noise, alpha=scale * float(parameter.std()))
    return model.eval()


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model.config.dtype = dtype
    return model.to(dtype)


def _noise(parameter: Tensor, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
    return torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")


def _draw(module: nn.Module, parameter: Tensor, noise: Tensor) -> Tensor:
    if parameter.dim() < 2:
        # A fresh bias is 0 and a fresh norm weight is neutral (1, or 0 where the family adds the 1 itself).
        return parameter + 0.2 * noise
    if isinstance(module, nn.Embedding):
        return 0.5 * noise
    fan_in: int = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[-1]
    return noise * (1.5 / math.sqrt(fan_in))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    r"""A tokenizer with one token a byte, five special tokens and a chat template without implicit system text.

    ``decode(encode(text))`` gives the text back, and padding is on the left, as generation needs it. Encoding adds no
    special tokens; those written out in the text (the chat template does so) become one token each.

    Returns:
        The tokenizer; 261 tokens: ``<pad> <bos> <eos> <|im_start|> <|im_end|>``, then the 256 bytes.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> len(tokenizer), len(tokenizer("né").input_ids)
        (261, 3)
        >>> chat = [{"role": "user", "content": "hi"}]
        >>> tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*_SPECIALS, *alphabet))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        additional_special_tokens=list(_SPECIALS[3:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
