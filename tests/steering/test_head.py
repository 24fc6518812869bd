"""The head that is read is the one that makes the model's logits, whatever carries it."""

from __future__ import annotations

import peft
import pytest
import torch
from core.decoder_types import MODELS, build

from lightning_interp import ModelMap
from lightning_interp.core.model.head import read_head
from lightning_interp.errors import IncompatibleModelError, SiteError
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.testing import FAMILIES, tiny_model

IDS = torch.arange(5, 12)[None]


def observed(model):
    """The head's input and the model's logits at some tokens that the reading did not use."""
    model_map, seen = ModelMap.build(model), []
    handle = model_map.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model_map.model(IDS).logits
    handle.remove()
    return seen[0][0], logits[0]


def agrees(model, **options):
    geometry = SoftmaxGeometry.from_model(model, **options)
    lam, logits = observed(model)
    torch.testing.assert_close(geometry.model_log_probs(lam), logits.float().log_softmax(-1), atol=3e-5, rtol=1e-4)
    return geometry


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_families(family):
    model = tiny_model(family)
    geometry = agrees(model, on_softcap="ignore")
    assert geometry.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()  # not a copy


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("xglm",)])
def test_every_decoder_type(name):
    """Biases (phi, gptj, codegen), scaled logits (cohere, granite), softcaps: told by the numbers."""
    agrees(build(name), on_softcap="ignore")


@pytest.mark.parametrize(
    ("name", "setting", "value"), [("cohere", "logit_scale", 1 / 8), ("granite", "logits_scaling", 8.0)]
)
def test_scaled_logits_are_found(name, setting, value):
    model = build(name)
    setattr(model.config, setting, value)
    if name == "cohere":
        model.logit_scale = value
    assert agrees(model).scale == 0.125


def test_a_softcap_is_found_and_refused():
    model = tiny_model("gemma2")
    assert read_head(model).softcap == model.config.final_logit_softcapping
    with pytest.raises(IncompatibleModelError, match=f"caps its logits at {model.config.final_logit_softcapping:g}"):
        SoftmaxGeometry.from_model(model)


def test_an_adapter_on_the_head_counts():
    model = tiny_model("llama")
    plain = read_head(model).weight.clone()
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.5), model
    )
    model.train()
    found = read_head(model).weight
    layer = model.lm_head
    torch.testing.assert_close(found, plain + layer.get_delta_weight("default"), atol=1e-5, rtol=1e-4)
    assert layer.training
    assert layer.lora_dropout["default"].training


def test_reading_leaves_everything_as_it_was():
    model = tiny_model("llama").train()
    model.model.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    read_head(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_pre_hooks


def test_read_in_inference_mode_it_can_be_differentiated_later():
    model = tiny_model("gpt2")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
    with torch.inference_mode():
        geometry = SoftmaxGeometry.from_model(model)
    lam = torch.zeros(32, requires_grad=True)
    geometry.log_norm(lam).backward()
    assert lam.grad.isfinite().all()


def test_a_hook_that_changes_the_logits_is_seen():
    model = tiny_model("llama")
    handle = model.lm_head.register_forward_hook(lambda _, __, out: out + torch.arange(out.shape[-1]))
    with pytest.raises(IncompatibleModelError, match="LlamaForCausalLM are not a scaled or softcapped linear map"):
        read_head(model)
    handle.remove()


def test_bfloat16():
    model = tiny_model("llama").bfloat16()
    geometry = SoftmaxGeometry.from_model(model)
    assert (geometry.scale, geometry.softcap) == (1.0, None)


def test_a_model_without_a_head():
    with pytest.raises(SiteError, match="LlamaModel has no unembedding"):
        read_head(tiny_model("llama").model)


def test_padding_rows_can_be_cut():
    model = tiny_model("llama")
    assert SoftmaxGeometry.from_model(model, vocab_size=200).vocabulary == 200
    with pytest.raises(IncompatibleModelError, match=r"vocab_size=999: LlamaForCausalLM has 261 rows"):
        SoftmaxGeometry.from_model(model, vocab_size=999)
