"""Every decoder type of transformers that can be built small, for the tests of core."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_interp.core.hooks.capture import ActivationCapture

IDS = torch.tensor([[5, 9, 14, 22, 31, 8, 40], [7, 7, 50, 3, 12, 60, 11]])

_KV = {"num_key_value_heads": 2}
_MOE = {**_KV, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_OLD = {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}

# Every decoder type that can be built small: what its configuration needs, and sites that it must refuse.
MODELS = {
    "biogpt": ({}, {"mlp_in", "mlp_out"}),
    "bloom": ({}, {"attn_out", "mlp_out"}),
    "codegen": (_OLD, set()),
    "cohere": (_KV, set()),
    "cohere2": (_KV, set()),
    "deepseek_v3": (
        {**_LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, **_MOE}
        | {"num_key_value_heads": 4},
        set(),
    ),
    "ernie4_5": (_KV, set()),
    "exaone4": (_KV, set()),
    "falcon": ({}, set()),
    "falcon_h1": ({**_KV, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}, {"attn_out", "mlp_out"}),
    "gemma": ({**_KV, "head_dim": 8}, set()),
    "gemma2": ({**_KV, "head_dim": 8}, set()),
    "gemma3_text": ({**_KV, "head_dim": 8}, set()),
    "glm": ({**_KV, "head_dim": 8}, set()),
    "glm4": ({**_KV, "head_dim": 8}, set()),
    "gpt2": ({}, set()),
    "gpt_bigcode": ({}, set()),
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]]}, set()),
    "gpt_neox": ({}, set()),
    "gpt_oss": ({**_KV, "head_dim": 8, "num_local_experts": 4}, set()),
    "gptj": (_OLD, set()),
    "granite": ({**_KV, "residual_multiplier": 0.5}, {"attn_out", "mlp_out"}),
    "helium": ({**_KV, "head_dim": 8}, set()),
    "hyperclovax": ({**_KV, "head_dim": 8}, {"attn_out", "mlp_out"}),
    "llama": (_KV, set()),
    "minicpm3": (_LATENT, {"attn_out", "mlp_out"}),
    "minimax": ({**_MOE, "head_dim": 8, "num_local_experts": 4}, {"attn_out", "mlp_out"}),
    "mistral": (_KV, set()),
    "mixtral": ({**_KV, "num_local_experts": 4}, set()),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, {"mlp_out"}),
    "nemotron": (_KV, set()),
    "olmo": (_KV, set()),
    "olmo2": (_KV, set()),
    "olmo3": (_KV, set()),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, {"mlp_in", "mlp_out"}),
    "persimmon": ({}, set()),
    "phi": ({}, set()),
    "phi3": (_KV, set()),
    "qwen2": (_KV, set()),
    "qwen2_moe": ({**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 16}, set()),
    "qwen3": ({**_KV, "head_dim": 8}, set()),
    "qwen3_moe": ({**_MOE, "num_experts": 4, "head_dim": 8}, set()),
    "smollm3": (_KV, set()),
    "stablelm": (_KV, set()),
    "starcoder2": (_KV, set()),
    "xglm": ({"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 48}, {"mlp_in", "mlp_out"}),
}


def build(name):
    """A model of two layers of any type, every parameter moved from its neutral start."""
    common = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(name, **{**common, **MODELS[name][0]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def capture(model, sites):
    reader = ActivationCapture(sites)
    with reader.attach(model), torch.no_grad():
        output = model(IDS, output_hidden_states=True, use_cache=False)
    return reader.activations, output
