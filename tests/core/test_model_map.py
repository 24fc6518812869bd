"""The map of a decoder, against modules named by hand, Hugging Face's own outputs, and arithmetic that must hold."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from decoder_types import MODELS, build, capture
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_interp.core.model.model_map import ModelMap, find_decoder
from lightning_interp.core.model.places import check_distinct
from lightning_interp.core.model.sites import GLOBAL_KINDS, Site
from lightning_interp.core.model.widths import check_width, site_width
from lightning_interp.errors import IncompatibleModelError, SiteError
from lightning_interp.testing import EXTRA_FAMILIES, FAMILIES, tiny_model

# Parameters that belong to no row-wise component: latent attention, attention sinks, state-space branches, extra norms.
UNMAPPED = {
    "deepseek_v3": "self_attn",
    "falcon_h1": "mamba",
    "gpt_oss": "sinks",
    "hyperclovax": "post_norm",
    "minicpm3": "self_attn",
    "minimax": "self_attn",
}
SCALED_LOGITS = {"cohere", "cohere2", "gemma2"}  # after the head: softcap or scale
KINDS = {"resid_pre", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out", "final_norm", "unembed_in", "logits"}


def sites_of(model_map):
    offered = model_map.describe()["sites"]
    layers = range(len(model_map))
    return [
        Site(k) if k in GLOBAL_KINDS else Site(k, i)
        for k in offered
        for i in (layers if k not in GLOBAL_KINDS else [0])
    ]


@pytest.mark.parametrize("name", MODELS)
def test_every_decoder_type(name):
    model = build(name)
    model_map = ModelMap.build(model)
    described = model_map.describe()
    assert len(model_map) == model.config.num_hidden_layers == 2
    assert set(described["sites"]) == KINDS - MODELS[name][1]
    assert all(UNMAPPED.get(name, "nothing") in lost for lost in described["unmapped"])
    assert bool(described["unmapped"]) == (name in UNMAPPED)

    seen, output = capture(model, sites_of(model_map))
    hidden = output.hidden_states
    for i in range(2):
        before, after = seen[Site("resid_pre", i)], seen[Site("resid_post", i)]
        assert torch.equal(before, hidden[i])
        if not {"attn_out", "mlp_out"} & MODELS[name][1]:
            write = seen[Site("attn_out", i)] + seen[Site("mlp_out", i)]
            torch.testing.assert_close(after - before, write, atol=3e-5, rtol=1e-4)
            assert float(write.abs().mean()) > 0.01
    assert torch.equal(seen[Site("resid_post", 0)], seen[Site("resid_pre", 1)])
    assert torch.equal(seen[Site("final_norm")], hidden[-1])
    assert torch.equal(seen[Site("logits")], output.logits) is (name not in SCALED_LOGITS)
    for kind in MODELS[name][1]:
        with pytest.raises(SiteError, match=kind.removesuffix("_in").removesuffix("_out")):
            model_map.module(Site(kind, 1))


@pytest.mark.parametrize("family", [*FAMILIES, *EXTRA_FAMILIES])
def test_residual_stream_of_the_tiny_families(family):
    model = tiny_model(family)
    model_map = ModelMap.build(model)
    seen, output = capture(model, sites_of(model_map))
    for i in range(4):
        assert torch.equal(seen[Site("resid_pre", i)], output.hidden_states[i])
        if i:
            assert torch.equal(seen[Site("resid_pre", i)], seen[Site("resid_post", i - 1)])
        if Site("attn_out", i) in seen and Site("mlp_out", i) in seen:
            write = seen[Site("attn_out", i)] + seen[Site("mlp_out", i)]
            moved = seen[Site("resid_post", i)] - seen[Site("resid_pre", i)]
            torch.testing.assert_close(moved, write, atol=1e-4, rtol=1e-4)
    assert torch.equal(seen[Site("final_norm")], output.hidden_states[-1])
    assert torch.equal(model.get_output_embeddings()(seen[Site("final_norm")]), seen[Site("logits")])


# Where the decoder is


class Module(L.LightningModule):
    def __init__(self, **models):
        super().__init__()
        for name, model in models.items():
            setattr(self, name, model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_finds_the_decoder_below_anything(family):
    model = tiny_model(family)
    wrapped = get_peft_model(tiny_model(family), LoraConfig(r=2, target_modules="all-linear"))
    found = {
        "plain": (ModelMap.build(model), "", model),
        "module": (ModelMap.build(Module(policy=model)), "policy", model),
        "deep": (ModelMap.build(nn.Sequential(nn.Linear(2, 2), Module(net=model))), "1.net", model),
        "peft": (ModelMap.build(wrapped), "base_model.model", wrapped.base_model.model),
        "both": (ModelMap.build(Module(m=wrapped)), "m.base_model.model", wrapped.base_model.model),
        "target": (ModelMap.build(Module(m=wrapped), target="m"), "m.base_model.model", wrapped.base_model.model),
    }
    for how, (model_map, path, expected) in found.items():
        assert model_map.path == path, how
        assert model_map.model is expected, how
        assert [type(block).__name__ for block in model_map.blocks] == [model_map.describe()["block"]] * 4, how
    assert sorted(found["peft"][0].linears(0)) == sorted(found["plain"][0].linears(0))


def test_two_models_need_a_target():
    policy, reference = tiny_model("llama"), tiny_model("gpt2")
    holder = Module(policy=policy, ref=reference)
    with pytest.raises(SiteError, match=r"holds 2 .* models: 'policy' \(LlamaForCausalLM\), 'ref' \(GPT2LMHeadModel\)"):
        ModelMap.build(holder)
    assert ModelMap.build(holder, target="ref").model is reference
    assert ModelMap.build(Module(policy=policy, same=policy)).model is policy


def test_a_model_without_a_head():
    config = tiny_model("llama").config
    base = AutoModel.from_config(config)
    model_map = ModelMap.build(base)
    assert model_map.backbone is model_map.model is base
    assert model_map.head is None
    assert model_map.final_norm is base.norm
    with pytest.raises(SiteError, match=r"LlamaModel has no 'logits'\. It has: resid_pre, .*final_norm"):
        model_map.module(Site("logits"))
    scorer = ModelMap.build(AutoModelForSequenceClassification.from_config(config))
    assert scorer.head is None
    assert scorer.unmapped() == ["score.weight"]


def test_overrides():
    model = tiny_model("opt")
    with pytest.raises(
        SiteError, match=r"OPTDecoderLayer \(model\.decoder\.layers\.1\) has no 'mlp' module; .*fc1.*mlp="
    ):
        ModelMap.build(model).module(Site("mlp_out", 1))
    by_hand = ModelMap.build(model, blocks="model.decoder.layers", attn="self_attn", mlp="fc2", head="lm_head")
    assert by_hand.module(Site("mlp_out", 1)).module is model.model.decoder.layers[1].fc2
    assert by_hand.head is model.lm_head


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: ModelMap.build(nn.Linear(2, 2)), "Linear holds no Hugging Face model.*configure_model"),
        (lambda: find_decoder(nn.Linear(2, 2), "a.b"), r"Linear has no submodule 'a\.b'"),
        (lambda: find_decoder(nn.Sequential(nn.Linear(2, 2)), "0"), "Linear holds no Hugging Face model"),
        (lambda: ModelMap.build(tiny_model(), blocks="model.blocks"), r"has no block stack 'model\.blocks'"),
        (lambda: ModelMap.build(tiny_model(), blocks="model.norm"), r"'model\.norm' of Llama.* is a LlamaRMSNorm"),
        (
            lambda: ModelMap.build(tiny_model(), attn="atn"),
            r"LlamaDecoderLayer has no child 'atn' for attn=.*self_attn",
        ),
        (
            lambda: ModelMap.build(tiny_model(), mlp="ff"),
            r"LlamaDecoderLayer has no child 'ff' for mlp=.*input_layernorm",
        ),
        (lambda: ModelMap.build(tiny_model(), head="head"), r"LlamaForCausalLM has no head 'head'"),
        (
            lambda: ModelMap.build(AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", n_layer=1))),
            "OpenAIGPTLMHeadModel has 0 block stacks",
        ),
    ],
)
def test_refused_models(build_it, message):
    with pytest.raises(SiteError, match=message):
        build_it()


def test_two_stacks_are_named():
    config = AutoConfig.for_model("t5", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=16)
    from transformers import T5ForConditionalGeneration

    with pytest.raises(SiteError, match=r"has 2 block stacks \('encoder\.block', 'decoder\.block'\).*blocks="):
        ModelMap.build(T5ForConditionalGeneration(config))


@pytest.mark.parametrize(
    ("family", "site", "message"),
    [
        ("llama", Site("resid_post", 4), r"LlamaForCausalLM has layers 0 to 3, but got layer 4"),
        ("llama", Site("resid_post", -5), r"has layers 0 to 3, but got layer -5"),
        ("llama", Site("linear:q", 9), r"has layers 0 to 3, but got layer 9"),
        ("llama", Site("linear:qkv", 1), r"LlamaForCausalLM, layer 1 has no component 'qkv'. It has: ln_attn, q, k, v"),
        ("llama", Site("linear:attn", 1), r"No family has a component 'attn'\..*layer 1 has: ln_attn"),
        (
            "llama",
            Site("linear:pos_embed"),
            r"LlamaForCausalLM has no component 'pos_embed'. It has: embed, final_norm",
        ),
        ("llama", Site("linear:q"), r"Component 'q' is in every block.*layer"),
        ("llama", Site("linear:embed", 0), r"layer 0 has no component 'embed'"),
        (
            "gpt2",
            Site("linear:k", 3),
            r"GPT2LMHeadModel fuses 'k' into transformer\.h\.3\.attn\.c_attn, so linear:k\.3",
        ),
        ("bloom", Site("mlp_out", 2), r"BloomMLP \(transformer\.h\.2\.mlp\) adds the residual.*'linear:down', 2"),
        ("bloom", Site("attn_out", 2), r"BloomAttention .* so attn_out\.2 would mean.*'linear:o', 2"),
        ("opt", Site("mlp_in", 0), r"OPTDecoderLayer .* has no 'mlp' module; its children are self_attn"),
    ],
)
def test_refused_sites(family, site, message):
    with pytest.raises(SiteError, match=message):
        ModelMap.build(tiny_model(family)).module(site)


def test_scaled_writes_say_what_scales_them():
    with pytest.raises(
        SiteError, match=r"GraniteDecoderLayer .* has residual_multiplier=0\.5, so mlp_out\.1 may not be"
    ):
        ModelMap.build(build("granite")).module(Site("mlp_out", 1))
    with pytest.raises(SiteError, match=r"has a child 'post_norm1' of unknown role, so attn_out\.0"):
        ModelMap.build(build("hyperclovax")).module(Site("attn_out", 0))


def test_gated_writes_say_what_gates_them():
    model = build("llama")
    model.model.layers[1].register_buffer("layer_scalar", torch.ones(1))
    with pytest.raises(
        SiteError, match=r"LlamaDecoderLayer \(model\.layers\.1\) has a tensor 'layer_scalar' of its own"
    ):
        ModelMap.build(model).module(Site("attn_out", 1))
    assert ModelMap.build(model).module(Site("attn_out", 0)).path == "model.layers.0.self_attn"


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("component", ["q", "k"])
def test_queries_and_keys_are_the_maps_and_not_their_norms(name, component):
    model = build(name)
    model_map, site = ModelMap.build(model), Site(f"linear:{component}", 1)
    module = model_map.module(site).module
    assert isinstance(module, nn.Linear)
    assert model_map.linears(1)[component] is module
    assert site_width(model_map, site) == module.out_features
    with pytest.raises(IncompatibleModelError, match=f"width 3, but {site} of"):
        check_width(model_map, site, 3, what="It")


def test_norms_are_the_last_ones_and_have_a_width():
    model_map = ModelMap.build(tiny_model("gemma2"))
    assert model_map.module(Site("linear:ln_attn", 2)).path == "model.layers.2.post_attention_layernorm"
    assert site_width(model_map, Site("linear:ln_attn", 2)) == 32


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("resid_post.1", "resid_pre.2")),
        ("gpt2", ("resid_post.-2", "resid_pre.3", "resid_post.2")),
        ("llama", ("attn_out.1", "linear:o.1")),
        ("llama", ("mlp_out.0", "linear:down.0")),
        ("llama", ("attn_in.0", "linear:ln_attn.0")),
        ("gpt2", ("mlp_in.3", "linear:ln_mlp.3")),
        ("llama", ("final_norm", "linear:final_norm", "unembed_in")),
        ("gpt2", ("logits", "linear:unembed")),
        ("gemma2", ("resid_pre.1", "resid_post.0")),
        ("llama", ("resid_pre.0", "linear:embed")),
    ],
)
def test_one_place_of_several_names(family, names):
    model_map = ModelMap.build(tiny_model(family))
    first, *others = map(Site.parse, names)
    for other in others:
        with pytest.raises(SiteError, match=f"It names one place of .* twice, as {first} and as {other}; keep one"):
            check_distinct(model_map, [first, other], what="It")


def test_places_that_only_look_alike():
    for family, names in {
        "llama": ("resid_pre.0", "attn_in.1", "attn_out.1", "resid_post.0", "mlp_in.1", "mlp_out.1"),
        "gemma2": ("attn_out.1", "linear:o.1", "mlp_out.1", "linear:down.1", "resid_pre.1", "logits", "unembed_in"),
        "gpt2": ("resid_pre.0", "linear:embed", "linear:pos_embed"),
        "gpt_neox": ("attn_in.1", "mlp_in.1", "resid_pre.1", "resid_post.1"),
    }.items():
        check_distinct(ModelMap.build(tiny_model(family)), map(Site.parse, names), what="It")


def test_negative_layers_count_from_the_end():
    model = tiny_model("llama")
    model_map = ModelMap.build(model)
    assert model_map.layer(-1) == 3
    assert model_map.module(Site("resid_post", -1)).module is model.model.layers[3]
    assert model_map.linears(-2)["q"] is model.model.layers[2].self_attn.q_proj


def test_building_changes_nothing():
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    ModelMap.build(model).describe()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
