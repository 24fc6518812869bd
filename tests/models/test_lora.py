from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_interp.errors import IncompatibleModelError, RecipeError
from lightning_interp.models import LoraSettings
from lightning_interp.models.sources.adapters import ADAPTER
from lightning_interp.models.training.lora import adapter_parameters, inject_lora, train_adapter
from lightning_interp.testing import FAMILIES, tiny_model

IDS = torch.arange(40).view(2, 20)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def adapter(model):
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in adapter_parameters(model)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(family, recwarn):
    model, plain = tiny_model(family), tiny_model(family)
    inject_lora(model, LoraSettings(r=3), seed=0)
    assert torch.equal(logits(model), logits(plain))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == adapter_parameters(model) != set()
    linear = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not plain.get_output_embeddings()
    ]
    assert len(trained) == 2 * len(linear)
    assert not [str(warning.message) for warning in recwarn if "fan_in_fan_out" in str(warning.message)]
    base = {name.replace(".base_layer", ""): tensor for name, tensor in model.named_parameters() if name not in trained}
    assert all(torch.equal(base[name], tensor) for name, tensor in plain.named_parameters())


def test_the_update_is_scaled_as_the_settings_say():
    for settings, scale in (({}, 8 / 2), ({"use_rslora": True}, 8 / math.sqrt(2))):
        model = tiny_model("llama")
        inject_lora(model, LoraSettings(r=2, alpha=8, target_modules=["q_proj"], **settings), seed=0)
        layer = model.model.layers[1].self_attn.q_proj
        nn.init.normal_(layer.lora_B[ADAPTER].weight, generator=torch.Generator().manual_seed(1))
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            expected = x @ (layer.base_layer.weight + scale * b @ a).T
            torch.testing.assert_close(layer(x), expected)


def test_the_start_depends_on_the_seed_alone_and_leaves_the_global_generator():
    states = []
    for seed, before in ((1, 10), (1, 20), (2, 10)):
        model = tiny_model("llama")
        torch.manual_seed(before)
        state = torch.get_rng_state()
        inject_lora(model, LoraSettings(r=2), seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        states.append(adapter(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    drawn = [name for name in states[0] if "lora_A" in name]
    assert drawn
    assert not any(torch.equal(states[0][name], states[2][name]) for name in drawn)


def test_adapters_of_a_half_precision_base_are_float32():
    model = tiny_model("llama", dtype=torch.bfloat16)
    inject_lora(model, LoraSettings(r=2), seed=0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name


def test_layers_and_modules_can_be_chosen():
    model = tiny_model("llama")
    inject_lora(model, LoraSettings(r=2, target_modules=["q_proj", "down_proj"], layers=[1, 3]), seed=0)
    names = adapter_parameters(model)
    assert {name.split(".")[2] for name in names} == {"1", "3"}
    assert len(names) == 2 * 2 * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_maps_of_chosen_layers_are_those_of_an_adapter_everywhere(family):
    everywhere, chosen = tiny_model(family), tiny_model(family)
    inject_lora(everywhere, LoraSettings(r=2), seed=0)
    inject_lora(chosen, LoraSettings(r=2, layers=[1, 3]), seed=0)
    names = adapter_parameters(everywhere)
    wanted = {name for name in names if re.search(r"\.(\d+)\.", name).group(1) in "13"}
    assert adapter_parameters(chosen) == wanted
    assert 0 < len(wanted) < len(names)


def test_dora_trains_magnitudes_too():
    model = tiny_model("llama")
    inject_lora(model, LoraSettings(r=2, use_dora=True, target_modules=["q_proj"]), seed=0)
    assert {name.split(".")[-3] for name in adapter_parameters(model)} >= {"lora_magnitude_vector"}
    assert sum("magnitude" in name for name in adapter_parameters(model)) == 4


@pytest.mark.parametrize("settings", [{"target_modules": ["q_prj"]}, {"target_modules": "q_prj"}])
def test_unknown_modules_are_refused_and_leave_the_model_as_it_was(settings):
    model = tiny_model("llama")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(
        IncompatibleModelError, match=r"target_modules=.*q_prj.*: its linear maps are called down_proj, gate"
    ):
        inject_lora(model, LoraSettings(**settings), seed=0)
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not hasattr(model, "peft_config")
    inject_lora(model, LoraSettings(), seed=0)


def test_layers_outside_the_model_are_refused():
    with pytest.raises(IncompatibleModelError, match=r"layer 4 of LlamaForCausalLM: it has the layers 0 to 3"):
        inject_lora(tiny_model("llama"), LoraSettings(layers=[0, 4]), seed=0)


def test_a_second_adapter_is_refused():
    model = tiny_model("llama")
    inject_lora(model, LoraSettings(), seed=0)
    with pytest.raises(IncompatibleModelError, match=r"carries the adapter 'default' already"):
        inject_lora(model, LoraSettings(), seed=0)


def test_adapters_of_another_name_are_refused():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_model("llama"), adapter_name="other")
    with pytest.raises(
        IncompatibleModelError, match=r"carries the adapters \['other'\], expected one called 'default'"
    ):
        train_adapter(model)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"r": 0}, "LoRA cannot use r=0: expected a rank of at least 1"),
        ({"alpha": 0}, "alpha=0: expected a number above 0"),
        ({"dropout": 1.0}, "dropout=1.0: expected 0 <= dropout < 1"),
        ({"target_modules": []}, r"target_modules=\[\]: expected at least one"),
        (
            {"target_modules": ".*q_proj", "layers": [1]},
            r"target_modules='\.\*q_proj': expected a list .* beside layers",
        ),
        ({"layers": ()}, r"layers=\(\): expected at least one"),
    ],
)
def test_wrong_settings_are_refused(setting, match):
    with pytest.raises(RecipeError, match=match):
        LoraSettings(**setting)


def test_settings_survive_plain_values():
    settings = LoraSettings(r=3, target_modules=("q_proj", "v_proj"), layers=range(2), use_dora=True)
    plain = settings.to_dict()
    assert plain["target_modules"] == ["q_proj", "v_proj"]
    assert plain["layers"] == [0, 1]
    assert LoraSettings(**plain).to_dict() == plain
