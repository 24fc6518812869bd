from __future__ import annotations

import json
import warnings

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_interp.errors import DataError, QuantizedModelError, RecipeError
from lightning_interp.models import convert_gguf, load_causal_lm
from lightning_interp.models.sources.gguf_files import precision_label
from lightning_interp.testing import FAMILIES, byte_tokenizer, tiny_model


def same_weights(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_come_by_family(family):
    loaded = load_causal_lm(f"tiny:{family}")
    assert (loaded.label, loaded.dequantised_from) == (f"tiny:{family}", None)
    assert same_weights(loaded.model, tiny_model(family))
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.tokenizer("hi").input_ids == byte_tokenizer()("hi").input_ids


def test_an_unknown_tiny_family_lists_the_families():
    with pytest.raises(RecipeError, match=r"family 'lama'; choose one of llama, gpt2"):
        load_causal_lm("tiny:lama")


def test_a_folder_gives_model_tokenizer_and_its_name(tiny_folder):
    state = torch.get_rng_state()
    loaded = load_causal_lm(tiny_folder)
    assert torch.equal(state, torch.get_rng_state())
    assert loaded.label == "tiny-model"
    assert loaded.dequantised_from is None
    assert same_weights(loaded.model, tiny_model("llama", seed=3))
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.tokenizer.chat_template == byte_tokenizer().chat_template


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("torch.float32", torch.float32)],
)
def test_dtype_is_what_was_asked(tiny_folder, dtype, expected):
    model = load_causal_lm(tiny_folder, dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize(("quantization", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.usefixtures("portable_4bit")
def test_quantisation_replaces_the_linear_maps(tiny_folder, quantization, kind, tiny):
    source = "tiny:llama" if tiny else tiny_folder
    model = load_causal_lm(source, quantization=quantization).model
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["model.layers.0.self_attn.q_proj"] == kinds["model.layers.3.mlp.down_proj"] == kind
    assert kinds["lm_head"] == "Linear"
    reference = tiny_model("llama", seed=0 if tiny else 3)
    if quantization == "8bit":
        agree_in_direction(model, reference)


def agree_in_direction(model, reference, at_least=0.99):
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        given, wanted = model(ids).logits, reference(ids).logits
    assert torch.nn.functional.cosine_similarity(given, wanted, dim=-1).mean() > at_least


@pytest.mark.usefixtures("portable_4bit")
def test_four_bits_stand_for_the_weights(tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    reference = tiny_model("llama", hidden_size=64, intermediate_size=128)
    reference.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_causal_lm(tmp_path, quantization="4bit").model
    for name, parameter in reference.named_parameters():
        stored = model.get_parameter(name)
        if hasattr(stored, "quant_state"):
            values = dequantize_4bit(stored.data, stored.quant_state).float()
            # The RMS error of NF4 in blocks of 64 for normal weights is .09 to .10 of the norm.
            assert (values - parameter).norm() < 0.12 * parameter.norm(), name
            parameter.data = values
    agree_in_direction(model, reference, 0.9999)


def test_four_bits_in_narrow_maps_are_warned_of(tiny_folder):
    with pytest.warns(UserWarning, match=r"'model.layers.0.self_attn.q_proj' has rows of 32 values.*block of 64"):
        load_causal_lm(tiny_folder, quantization="4bit")


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"quantization": "3bit"}, "no quantization '3bit'; choose '4bit', '8bit'"),
        ({"dtype": "float12"}, "no type 'float12' of weights"),
        ({"dtype": torch.int8}, "dtype torch.int8: expected torch.float32"),
        ({"revision": "main"}, "revision='main' means nothing for 'tiny:llama'"),
    ],
)
def test_wrong_arguments_are_refused(argument, match):
    with pytest.raises(RecipeError, match=match):
        load_causal_lm("tiny:llama", **argument)


def test_a_revision_of_a_folder_is_refused(tiny_folder):
    with pytest.raises(RecipeError, match=r"revision='v2' means nothing for '.*tiny-model'"):
        load_causal_lm(str(tiny_folder), revision="v2")


@pytest.mark.parametrize("source", ["smollm2-135m-instrukt", "nobody/no-model"])
def test_an_unknown_name_says_what_was_tried(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    match = f"no model '{source}': it is no alias .*smollm2-135m-instruct, gemma-3-270m, tiny:<family>.*Hugging Face id"
    with pytest.raises(RecipeError, match=match) as caught:
        load_causal_lm(source)
    assert ("Did you mean 'smollm2-135m-instruct'?" in str(caught.value)) == source.startswith("smollm2")


@pytest.mark.parametrize("source", ["./no/such/folder", "a/b/c", "", "two words"])
def test_what_can_be_no_name_is_refused_without_asking_the_hub(source):
    with pytest.raises(RecipeError, match=r"no model at '.*': it is no folder, no .gguf file and no Hugging Face id"):
        load_causal_lm(source)


def test_a_plain_file_is_no_source(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(RecipeError, match=r"no model at '.*model.bin'"):
        load_causal_lm(tmp_path / "model.bin")


# Damage to a folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def to_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder, name, keep):
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


NORM = "model.norm.weight"
DAMAGES = {
    "cut weights": (lambda f: cut(f, "model.safetensors", 20_000), r"model.safetensors is damaged or cut short"),
    "pickle": (to_pickle, r"has no model.safetensors; it holds .*pytorch_model.bin.*not read"),
    "lacking tensor": (lambda f: edit_weights(f, lambda w: w.pop(NORM)), rf"lack '{NORM}' \(1 tensors of Llama"),
    "other shape": (lambda f: edit_config(f, intermediate_size=48), r"tiny-model' cannot be loaded"),
    "unknown type": (lambda f: edit_config(f, model_type="zzz"), r"tiny-model' cannot be loaded: .*`zzz`"),
    "no causal model": (lambda f: edit_config(f, model_type="t5"), r"tiny-model' cannot be loaded: .*T5Config"),
    "cut config": (lambda f: cut(f, "config.json", 30), r"config.json is not valid JSON"),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        r"no model folder: it has no config.json, only .*model.safetens",
    ),
    "no tokenizer": (without_tokenizer, r"has no tokenizer files; it holds .*config.json"),
    "cut tokenizer": (lambda f: cut(f, "tokenizer.json", 300), r"tokenizer in '.*tiny-model' cannot be (loaded|read)"),
    "cut settings": (
        lambda f: cut(f, "tokenizer_config.json", 30),
        r"tokenizer in '.*tiny-model' cannot be (loaded|read)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(tiny_folder, damage, monkeypatch):
    # One family, as the message of a wrong one would import all that transformers has, to name them.
    monkeypatch.setattr(AutoModelForCausalLM, "_model_mapping", {LlamaConfig: LlamaForCausalLM})
    change, match = DAMAGES[damage]
    change(tiny_folder)
    with pytest.raises(DataError, match=match):
        load_causal_lm(tiny_folder)


# .gguf files


def test_a_gguf_file_holds_the_same_model(gguf_file):
    loaded = load_causal_lm(gguf_file)
    assert (loaded.label, loaded.dequantised_from) == ("whole.gguf", None)
    assert same_weights(loaded.model, tiny_model("llama", vocab_size=262))
    assert loaded.tokenizer("th t").input_ids == [261, *loaded.tokenizer(" t").input_ids]
    assert not loaded.model.training


def test_a_quantised_gguf_file_is_dequantised_and_says_so(quantised_gguf, capfd):
    loaded = load_causal_lm(quantised_gguf)
    assert (loaded.label, loaded.dequantised_from) == ("quantised.gguf (dequantised 4-bit)", "4-bit")
    exact = tiny_model("llama", vocab_size=262).state_dict()
    for name, tensor in loaded.model.state_dict().items():
        error = (tensor - exact[name]).abs().max() / (exact[name].max() - exact[name].min())
        assert error == 0 if "layers" not in name or "norm" in name else 1e-3 < error < 1 / 15
    assert capfd.readouterr().err == ""


def test_a_dequantised_model_is_an_ordinary_one(quantised_gguf, tmp_path):
    loaded = load_causal_lm(quantised_gguf)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_causal_lm(tmp_path / "saved")
    assert same_weights(again.model, loaded.model)
    assert again.tokenizer.chat_template == byte_tokenizer().chat_template


def test_converting_once_gives_the_same_model(quantised_gguf, tmp_path):
    folder = convert_gguf(quantised_gguf, tmp_path / "converted")
    direct, converted = load_causal_lm(quantised_gguf), load_causal_lm(folder)
    ids = torch.arange(60).view(3, 20)
    with torch.no_grad():
        assert torch.equal(direct.model(ids).logits, converted.model(ids).logits)
    text = "the theory of 12 thistles\n<|im_end|>"
    assert direct.tokenizer(text).input_ids == converted.tokenizer(text).input_ids
    assert load_causal_lm(folder, quantization="4bit").model.is_quantized


@pytest.mark.parametrize("keep", [0, 3, 40, 3000, 20_000, -1])
def test_a_cut_gguf_file_is_named(quantised_gguf, keep, tmp_path):
    cut(quantised_gguf.parent, quantised_gguf.name, keep)
    with pytest.raises(DataError, match=r"quantised.gguf is damaged, cut short or no .gguf file"):
        load_causal_lm(quantised_gguf)
    with pytest.raises(DataError, match=r"quantised.gguf is damaged, cut short"):
        convert_gguf(quantised_gguf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["quantised.gguf"]


def test_a_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.gguf does not exist"):
        load_causal_lm(tmp_path / "gone.gguf")


def test_a_gguf_file_without_weights_is_no_model(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DataError, match=r"empty.gguf holds no tensors"):
        precision_label(tmp_path / "empty.gguf")


def test_a_gguf_architecture_that_transformers_does_not_know_is_named(tmp_path, gguf_file):
    gguf_file.write_bytes(gguf_file.read_bytes().replace(b"llama", b"lxxma"))
    with pytest.raises(DataError, match=r"cannot be loaded: .*lxxma"):
        load_causal_lm(gguf_file)


def test_a_gguf_tokenizer_that_transformers_does_not_know_is_named(gguf_file):
    gguf_file.write_bytes(gguf_file.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.mxdel"))
    with pytest.raises(DataError, match=r"tokenizer inside .*whole.gguf cannot be converted"):
        load_causal_lm(gguf_file)


def test_quantising_a_gguf_file_again_is_refused(gguf_file):
    with pytest.raises(
        QuantizedModelError, match=r"whole.gguf cannot be loaded with quantization='8bit'.*convert_gguf"
    ):
        load_causal_lm(gguf_file, quantization="8bit")


# Hugging Face ids, from a local copy of the hub's cache


@pytest.fixture
def hub(tmp_path, tiny_folder, monkeypatch):
    """The id ``someone/tiny`` with the revisions main and v2, as a download leaves it on disk."""
    home = tmp_path / "hub" / "models--someone--tiny"
    (home / "refs").mkdir(parents=True)
    for revision, commit, seed in (("main", "a" * 40, 3), ("v2", "b" * 40, 4)):
        (home / "refs" / revision).write_text(commit)
        tiny_model("llama", seed=seed).save_pretrained(home / "snapshots" / commit)
        byte_tokenizer().save_pretrained(home / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return home / "snapshots" / ("a" * 40)


def test_a_hub_id_is_loaded_at_its_revision(hub):
    for revision, label, seed in ((None, "someone/tiny", 3), ("v2", "someone/tiny@v2", 4)):
        loaded = load_causal_lm("someone/tiny", revision=revision)
        assert (loaded.label, loaded.dequantised_from) == (label, None)
        assert same_weights(loaded.model, tiny_model("llama", seed=seed))
        assert loaded.tokenizer.chat_template == byte_tokenizer().chat_template
    with pytest.raises(RecipeError, match=r"no model 'someone/tiny': .*Hugging Face id"):
        load_causal_lm("someone/tiny", revision="v3")


def test_pickled_weights_of_a_hub_id_are_refused(hub):
    to_pickle(hub)
    with pytest.raises(RecipeError, match=r"no model 'someone/tiny': .*safetensors"):
        load_causal_lm("someone/tiny")


def test_cut_weights_of_a_hub_id_are_named(hub):
    cut(hub, "model.safetensors", 20_000)
    with pytest.raises(DataError, match=r"model in 'someone/tiny' cannot be loaded"):
        load_causal_lm("someone/tiny")
