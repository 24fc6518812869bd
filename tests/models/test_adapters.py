from __future__ import annotations

import json
import os
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_interp.errors import DataError, IncompatibleModelError, ManifestError, RecipeError
from lightning_interp.models import load_causal_lm
from lightning_interp.models.sources.adapters import adapted, has_adapter, remove_adapter, save_adapter
from lightning_interp.testing import byte_tokenizer, tiny_model

# 2026-11: PEFT 0.21's wrapping class (the independent writer and reader here) with transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.arange(48).view(2, 24)


def wrapped(family="llama", seed=3, **settings):
    """A model under PEFT's own wrapping class, its adapter moved away from zero."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(tiny_model(family, seed=seed), peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An adapter folder written by PEFT itself, and the model that it was saved from."""
    model, folder = wrapped(), tmp_path_factory.mktemp("written")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def adapter(written, tmp_path, tiny_folder):
    """A copy of it that names its base, for this test alone."""
    folder = shutil.copytree(written[0], tmp_path / "adapter")
    edit(folder, base_model_name_or_path=str(tiny_folder))
    return folder, written[1]


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_folder_gives_base_and_adapter(adapter):
    folder, reference = adapter
    state = torch.get_rng_state()
    loaded = load_causal_lm(folder)
    assert torch.equal(state, torch.get_rng_state())
    assert loaded.label == "adapter on tiny-model"
    assert has_adapter(loaded.model)
    assert torch.equal(logits(loaded.model), logits(reference))
    assert not torch.allclose(logits(loaded.model), logits(tiny_model("llama", seed=3)), atol=0.1)
    assert not any(module.training for module in loaded.model.modules())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_base_may_lie_beside_its_adapter(adapter):
    folder, reference = adapter
    edit(folder, base_model_name_or_path="../tiny-model")
    assert torch.equal(logits(load_causal_lm(folder).model), logits(reference))


def test_the_adapters_own_tokenizer_wins(adapter):
    folder, _ = adapter
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "another"
    tokenizer.save_pretrained(folder)
    assert load_causal_lm(folder).tokenizer.chat_template == "another"


def test_an_adapter_goes_on_a_quantised_base(adapter):
    folder, reference = adapter
    model = load_causal_lm(folder, quantization="8bit").model
    assert torch.nn.functional.cosine_similarity(logits(model), logits(reference), dim=-1).mean() > 0.99


@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {"use_dora": True}), ("gpt2", {"use_rslora": True}), ("gpt_neox", {})]
)
def test_a_saved_adapter_is_read_by_peft(tmp_path, family, settings):
    reference = wrapped(family, fan_in_fan_out=family == "gpt2", **settings)
    injected = reference.base_model.model  # what injection without the wrapping class leaves
    save_adapter(injected, tmp_path / "out", base=f"tiny:{family}", tokenizer=byte_tokenizer())
    again = peft.PeftModel.from_pretrained(tiny_model(family, seed=3), tmp_path / "out")
    assert torch.equal(logits(again.eval()), logits(reference))
    assert all(
        name.startswith("base_model.model.") for name in load_file(tmp_path / "out" / "adapter_model.safetensors")
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"tiny:{family}"
    assert config["target_modules"] == sorted(config["target_modules"])


def test_a_saved_adapter_is_read_by_us_and_leaves_the_model_alone(tmp_path):
    injected = wrapped(seed=0).base_model.model
    before = logits(injected)
    save_adapter(injected, tmp_path / "out", base="tiny:llama")
    assert injected.peft_config["default"].base_model_name_or_path != "tiny:llama"
    assert torch.equal(logits(load_causal_lm(tmp_path / "out").model), before)
    with pytest.raises(ManifestError, match="out exists already"):
        save_adapter(injected, tmp_path / "out", base="tiny:llama")
    save_adapter(injected, tmp_path / "out", base="tiny:llama", overwrite=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_is_itself_again_after_an_adapter_was_lent_to_it(tmp_path, family):
    model, folder = tiny_model(family), tmp_path / "adapter"
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    save_adapter(wrapped(family, seed=0).base_model.model, folder, base=f"tiny:{family}")
    with adapted(model, folder):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert not has_adapter(model)
    with pytest.raises(ZeroDivisionError), adapted(model, folder):
        raise ZeroDivisionError
    assert not has_adapter(model)
    remove_adapter(model)  # without one it changes nothing
    assert [name for name, _ in model.named_parameters()] == names


def test_two_saves_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_adapter(wrapped().base_model.model, tmp_path / name, base="tiny:llama")
    for file in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def to_pickle(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
DAMAGES = {
    "cut": (cut, DataError, r"adapter_model.safetensors is damaged or cut short"),
    "pickle": (to_pickle, DataError, r"has no adapter_model.safetensors; it holds .*adapter_model.bin.*not read"),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), DataError, r"adapter_config.json is no adapter"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), DataError, r"adapter_config.json is no adapter"),
    "no base": (lambda f: edit(f, base_model_name_or_path=None), DataError, r"names no base model .* is None"),
    "lost base": (lambda f: edit(f, base_model_name_or_path="./gone"), RecipeError, r"no model at './gone'"),
    "chain": (lambda f: edit(f, base_model_name_or_path=str(f)), RecipeError, r"which is an adapter itself"),
    "revision": (lambda f: edit(f, revision="v2"), RecipeError, r"revision='v2' means nothing"),
    "lacking": (
        lambda f: edit_weights(f, lambda w: w.pop(FIRST)),
        IncompatibleModelError,
        r"lacks tensor 'model.layers.0",
    ),
    "unknown": (
        lambda f: edit_weights(f, lambda w: w.update({FIRST.replace("layers.0", "layers.9"): w[FIRST].clone()})),
        IncompatibleModelError,
        r"unknown tensor 'model.layers.9.mlp.down_proj.lora_A.*\(0 missing, 1 unknown\)",
    ),
    "other rank": (lambda f: edit(f, r=5), IncompatibleModelError, r"does not fit LlamaForCausalLM: .*size mismatch"),
    "other modules": (lambda f: edit(f, target_modules=["c_attn"]), IncompatibleModelError, r"does not fit .*c_attn"),
    "other base": (
        lambda f: edit(f, base_model_name_or_path="tiny:gpt2"),
        IncompatibleModelError,
        r"does not fit GPT2",
    ),
    "other method": (lambda f: edit(f, peft_type="PROMPT_TUNING"), IncompatibleModelError, r"does not fit Llama"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_by_name(adapter, damage):
    folder, _ = adapter
    change, error, match = DAMAGES[damage]
    change(folder)
    with pytest.raises(error, match=match):
        load_causal_lm(folder)
