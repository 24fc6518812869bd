"""Canonical components, against modules named by hand and against what each column of a fused map must do."""

from __future__ import annotations

import pytest
import torch
from decoder_types import IDS, build, capture
from torch import nn

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import Site
from lightning_interp.errors import SiteError
from lightning_interp.testing import FAMILIES, tiny_model

# Written by hand from the model cards: component -> module path of layer 2 (None: fused with others).
BY_HAND = {
    "llama": {
        "ln_attn": "model.layers.2.input_layernorm", "q": "model.layers.2.self_attn.q_proj",
        "k": "model.layers.2.self_attn.k_proj", "v": "model.layers.2.self_attn.v_proj",
        "o": "model.layers.2.self_attn.o_proj", "ln_mlp": "model.layers.2.post_attention_layernorm",
        "gate": "model.layers.2.mlp.gate_proj", "up": "model.layers.2.mlp.up_proj",
        "down": "model.layers.2.mlp.down_proj",
    },
    "gpt2": {
        "ln_attn": "transformer.h.2.ln_1", "q": None, "k": None, "v": None, "o": "transformer.h.2.attn.c_proj",
        "ln_mlp": "transformer.h.2.ln_2", "up": "transformer.h.2.mlp.c_fc", "down": "transformer.h.2.mlp.c_proj",
    },
    "gpt_neox": {
        "ln_attn": "gpt_neox.layers.2.input_layernorm", "q": None, "k": None, "v": None,
        "o": "gpt_neox.layers.2.attention.dense", "ln_mlp": "gpt_neox.layers.2.post_attention_layernorm",
        "up": "gpt_neox.layers.2.mlp.dense_h_to_4h", "down": "gpt_neox.layers.2.mlp.dense_4h_to_h",
    },
    "gemma2": {
        "ln_attn": "model.layers.2.post_attention_layernorm", "q": "model.layers.2.self_attn.q_proj",
        "k": "model.layers.2.self_attn.k_proj", "v": "model.layers.2.self_attn.v_proj",
        "o": "model.layers.2.self_attn.o_proj", "ln_mlp": "model.layers.2.post_feedforward_layernorm",
        "gate": "model.layers.2.mlp.gate_proj", "up": "model.layers.2.mlp.up_proj",
        "down": "model.layers.2.mlp.down_proj",
    },
    "bloom": {
        "ln_attn": "transformer.h.2.input_layernorm", "q": None, "k": None, "v": None,
        "o": "transformer.h.2.self_attention.dense", "ln_mlp": "transformer.h.2.post_attention_layernorm",
        "up": "transformer.h.2.mlp.dense_h_to_4h", "down": "transformer.h.2.mlp.dense_4h_to_h",
    },
    "opt": {
        "ln_attn": "model.decoder.layers.2.self_attn_layer_norm", "q": "model.decoder.layers.2.self_attn.q_proj",
        "k": "model.decoder.layers.2.self_attn.k_proj", "v": "model.decoder.layers.2.self_attn.v_proj",
        "o": "model.decoder.layers.2.self_attn.out_proj", "ln_mlp": "model.decoder.layers.2.final_layer_norm",
        "up": "model.decoder.layers.2.fc1", "down": "model.decoder.layers.2.fc2",
    },
    "qwen2_moe": {
        "ln_attn": "model.layers.2.input_layernorm", "q": "model.layers.2.self_attn.q_proj",
        "k": "model.layers.2.self_attn.k_proj", "v": "model.layers.2.self_attn.v_proj",
        "o": "model.layers.2.self_attn.o_proj", "ln_mlp": "model.layers.2.post_attention_layernorm",
        "moe": "model.layers.2.mlp",
    },
}  # fmt: skip
SHARED = {
    "llama": {"embed": "model.embed_tokens", "final_norm": "model.norm", "unembed": "lm_head"},
    "gpt2": {
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "unembed": "lm_head",
    },
    "gpt_neox": {"embed": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "unembed": "lm_head"},
    "gemma2": {"embed": "model.embed_tokens", "final_norm": "model.norm", "unembed": "lm_head"},
    "bloom": {
        "embed": "transformer.word_embeddings_layernorm",
        "final_norm": "transformer.ln_f",
        "unembed": "lm_head",
    },
    "opt": {
        "embed": "model.decoder.embed_tokens",
        "pos_embed": "model.decoder.embed_positions",
        "final_norm": "model.decoder.final_layer_norm",
        "unembed": "lm_head",
    },
    "qwen2_moe": {"embed": "model.embed_tokens", "final_norm": "model.norm", "unembed": "lm_head"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_components_against_modules_named_by_hand(family):
    model = tiny_model(family)
    model_map = ModelMap.build(model)
    named = {(name, 2): path for name, path in BY_HAND[family].items()}
    named |= {(name, None): path for name, path in SHARED[family].items()}
    assert set(model_map.components[2]) | set(model_map.shared) == {name for name, _ in named}

    seen_by_hand = {}
    for (name, layer), path in named.items():
        if path is None:
            with pytest.raises(SiteError, match=f"{type(model).__name__} fuses '{name}' into .*linear:{name}.2"):
                model_map.module(Site(f"linear:{name}", layer))
            continue
        module = model.get_submodule(path)
        assert model_map.module(Site(f"linear:{name}", layer)).module is module
        module.register_forward_hook(lambda _, __, out, key=(name, layer): seen_by_hand.update({key: out}))
    sites = [Site(f"linear:{name}", layer) for (name, layer), path in named.items() if path is not None]
    seen, _ = capture(model, sites)
    for site in sites:
        expected = seen_by_hand[site.component, site.layer]
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert seen[site].shape[-2:] == (7, expected.shape[-1])  # [B, T, d] also where a family flattens tokens
        assert torch.equal(seen[site].reshape(expected.shape), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_exactly_one_component(family):
    model = tiny_model(family)
    model_map = ModelMap.build(model)
    claims = {}
    for name, layer, part in model_map.cells():
        for parameter in part.module.parameters():
            claims.setdefault(parameter, []).append((name, layer, part.columns))
    tied = model.get_input_embeddings().weight
    for parameter, owners in claims.items():
        if len(owners) > 1 and parameter is not tied:
            together = torch.cat([columns for _, _, columns in owners])  # fused: every feature has one owner
            width = parameter.shape[-1] if family == "gpt2" else parameter.shape[0]
            assert together.sort().values.tolist() == list(range(width))
    assert model_map.unmapped() == []


FUSED = {
    "gpt2": "transformer.h.1.attn.c_attn",
    "gpt_neox": "gpt_neox.layers.1.attention.query_key_value",
    "bloom": "transformer.h.1.self_attention.query_key_value",
    "persimmon": "model.layers.1.self_attn.query_key_value",
    "phi3": "model.layers.1.self_attn.qkv_proj",
}


def silence(model, path, columns):
    """Make some output features of a fused projection zero."""
    module = model.get_submodule(path)
    outputs_last = type(module).__name__ == "Conv1D"
    with torch.no_grad():
        module.weight[(slice(None), columns) if outputs_last else columns] = 0
        if getattr(module, "bias", None) is not None:
            module.bias[columns] = 0


@pytest.mark.parametrize("name", FUSED)
def test_fused_columns_are_queries_keys_and_values(name):
    """Zero queries or keys make attention uniform (no positions in the scores), zero values make it silent."""
    mixed, fused = {}, {}
    for silenced in ("q", "k", "v"):
        model = build(name) if name in ("persimmon", "phi3") else tiny_model(name)
        model_map = ModelMap.build(model)
        parts = {c: next(p for p in model_map.parts(c, 1) if p.columns is not None) for c in "qkv"}
        assert {part.path for part in parts.values()} == {FUSED[name]}
        together = torch.cat([parts[c].columns for c in "qkv"])
        assert together.sort().values.tolist() == list(range(len(together)))
        silence(model, FUSED[name], parts[silenced].columns)
        for norm in (m for n, m in model.named_modules() if n.endswith(("q_layernorm", "k_layernorm"))):
            nn.init.zeros_(norm.bias)  # persimmon's norms would give zeros back a direction
        model.get_submodule(FUSED[name]).register_forward_hook(lambda _, __, out, s=silenced: fused.update({s: out}))
        model.get_submodule(model_map.parts("o", 1)[0].path).register_forward_pre_hook(
            lambda _, args, s=silenced: mixed.update({s: args[0]})
        )
        with torch.no_grad():
            model(IDS)
        heads, groups = 4, 2 if name == "phi3" else 4
        value = fused[silenced][..., parts["v"].columns].view(2, 7, groups, -1)
        value = value.repeat_interleave(heads // groups, dim=2).flatten(2)
        uniform = value.cumsum(1) / torch.arange(1, 8)[:, None]
        if silenced == "v":
            assert float(mixed["v"].abs().max()) == 0
        elif name != "bloom":  # its scores carry a bias for distance
            torch.testing.assert_close(mixed[silenced], uniform, atol=1e-5, rtol=1e-5)
            assert float(uniform.abs().mean()) > 0.01


@pytest.mark.parametrize("name", ["phi3", "glm", "glm4"])
def test_fused_columns_are_gate_and_up(name):
    model = build(name)
    parts = {c: ModelMap.build(model).parts(c, 1)[0] for c in ("gate", "up")}
    seen = {}
    model.get_submodule("model.layers.1.mlp.gate_up_proj").register_forward_hook(
        lambda _, __, out: seen.update(fused=out)
    )
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
        lambda _, args: seen.update(down=args[0])
    )
    with torch.no_grad():
        model(IDS)
    gate, up = (seen["fused"][..., parts[c].columns] for c in ("gate", "up"))
    torch.testing.assert_close(seen["down"], nn.functional.silu(gate) * up)
    assert not torch.allclose(seen["down"], nn.functional.silu(up) * gate)


def test_queries_carry_their_norm():
    for family in ("gemma3", "qwen3"):
        paths = [part.path for part in ModelMap.build(tiny_model(family)).parts("q", 0)]
        assert paths == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_norm"]
