"""The tiny models and the byte tokenizer that the other tests stand on."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_interp.errors import RecipeError
from lightning_interp.models.sources.tiny import (
    EXTRA_FAMILIES,
    FAMILIES,
    byte_tokenizer,
    tiny_config,
    tiny_model,
    tiny_pair,
)

ALL = FAMILIES + EXTRA_FAMILIES
TIED = {"gpt2", "gemma2", "bloom", "opt", "gemma3"}
PROMPTS = ["The quick brown fox jumps over", "It was a rather dull and long da"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def logits(model, text, tokenizer):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", padding=True)).logits.float()


made = cache(tiny_model)  # for tests that leave it as it was


@pytest.mark.parametrize("family", ALL)
def test_shape_mode_and_ids(family, tokenizer):
    model = made(family)
    assert not model.training
    assert model.config.num_hidden_layers == 4
    assert model.config.hidden_size == 32
    assert model.config.vocab_size == len(tokenizer) == 261
    ids = (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)
    assert ids == (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert model.generation_config.eos_token_id == 2
    assert logits(model, PROMPTS, tokenizer).shape == (2, 32, 261)
    assert sum(p.numel() for p in model.parameters()) < 100_000


@pytest.mark.parametrize("family", ALL)
def test_tied_where_the_family_ties(family):
    model = made(family)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family in TIED)


@pytest.mark.parametrize("family", ALL)
def test_no_dropout_in_training_mode(family, tokenizer):
    model = made(family)
    expected = logits(model, PROMPTS, tokenizer)
    trained = logits(model.train(), PROMPTS, tokenizer)
    model.eval()
    assert torch.equal(trained, expected)


@pytest.mark.parametrize("family", ALL)
def test_inputs_give_clearly_different_logits(family, tokenizer):
    first, second = logits(made(family), PROMPTS, tokenizer)
    assert first.std() > 0.5
    assert (first - second).abs().mean() > 0.3


@pytest.mark.parametrize("family", ALL)
def test_every_parameter_influences_the_logits(family, tokenizer):
    model = tiny_model(family)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    weights = torch.randn(2, 32, 261, generator=torch.Generator().manual_seed(0))
    (model(**batch).logits * weights).sum().backward()
    inert = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-2}
    # Without rotary embeddings a key bias adds one number to all scores of a query: softmax removes it.
    key_biases = {f"model.decoder.layers.{i}.self_attn.k_proj.bias" for i in range(4)}
    assert inert == (key_biases if family == "opt" else set())


@pytest.mark.parametrize("family", ALL)
def test_no_parameter_is_neutral(family):
    for name, parameter in made(family).named_parameters():
        assert parameter.std() > 0.05, name
        assert not (parameter == 0).any(), name


def test_norm_weights_lie_around_their_neutral_value():
    assert tiny_model("llama").model.norm.weight.mean().item() == pytest.approx(1, abs=0.15)
    assert tiny_model("gemma2").model.norm.weight.mean().item() == pytest.approx(0, abs=0.15)  # the family adds the 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_same_seed_same_weights_and_the_global_generator_is_left_alone(family):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny_model(family, seed=3)
    tiny_pair(family)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = tiny_model(family, seed=3), tiny_model(family, seed=4)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not (a == c).any(), name


def test_families_and_layers_draw_different_numbers():
    model = tiny_model("llama")
    a, b = (model.model.layers[i].mlp.up_proj.weight for i in (0, 1))
    assert not torch.equal(a, b)
    assert not torch.equal(a, tiny_model("gemma2").model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("family", ALL)
def test_pair_moves_every_parameter_and_keeps_ties(family, tokenizer):
    recipient, donor = tiny_pair(family)
    assert recipient.config.to_dict() == donor.config.to_dict()
    for (name, a), (_, b) in zip(recipient.named_parameters(), donor.named_parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr(), name
        assert (a != b).all(), name
    tied = donor.get_output_embeddings().weight is donor.get_input_embeddings().weight
    assert tied == (family in TIED)
    difference = logits(recipient, PROMPTS, tokenizer) - logits(donor, PROMPTS, tokenizer)
    assert difference.abs().mean() > 0.3


def test_pair_scale_is_relative_to_each_parameter():
    recipient, donor = tiny_pair("llama", scale=0.1)
    weight = recipient.model.layers[0].mlp.up_proj.weight
    moved = donor.model.layers[0].mlp.up_proj.weight - weight
    assert (moved.std() / weight.std()).item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2_moe"])
def test_bfloat16(family, tokenizer):
    model = tiny_model(family, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    exact = logits(tiny_model(family), PROMPTS, tokenizer)
    assert (logits(model, PROMPTS, tokenizer) - exact).abs().mean() < 0.5 * exact.std()


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer"])
def test_overrides_win_in_either_name(family, name):
    if family == "llama" and name == "n_layer":
        with pytest.raises(RecipeError, match=r"family 'llama' has no field 'n_layer'"):
            tiny_config(family, n_layer=2)
    else:
        assert tiny_config(family, **{name: 2}).num_hidden_layers == 2


def test_overrides_reach_the_model():
    assert tiny_model("gpt2", resid_pdrop=0.3).transformer.h[0].mlp.dropout.p == 0.3
    assert tiny_model("llama", attn_implementation="eager").config._attn_implementation == "eager"
    assert tiny_config("gpt2", max_position_embeddings=64).n_positions == 64


def test_misspelt_override_names_the_nearest_field():
    with pytest.raises(RecipeError, match=r"no field 'hidden_sizes'; did you mean 'hidden_size'\?"):
        tiny_model("llama", hidden_sizes=8)
    with pytest.raises(RecipeError, match=r"no field 'zzz'; its fields are .*hidden_size"):
        tiny_config("opt", zzz=1)


@pytest.mark.parametrize("make", [tiny_config, tiny_model, tiny_pair])
def test_unknown_family_lists_the_families(make):
    with pytest.raises(RecipeError, match=r"family 'mamba'; choose one of llama, .*qwen3"):
        make("mamba")


def test_layouts_that_the_families_stand_for():
    llama, gpt2, opt = tiny_model("llama"), tiny_model("gpt2"), tiny_model("opt")
    assert llama.config.num_key_value_heads == 2
    assert type(gpt2.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert not hasattr(opt.model.decoder.layers[0], "mlp")
    assert tiny_config("gpt_neox").use_parallel_residual
    assert set(tiny_config("gemma2").layer_types) == {"sliding_attention", "full_attention"}
    assert set(tiny_config("gemma3").layer_types) == {"sliding_attention", "full_attention"}
    assert tiny_config("gemma2").head_dim * 4 != 32
    assert tiny_model("qwen2_moe").model.layers[0].mlp.shared_expert is not None
    assert tiny_model("qwen3").model.layers[0].self_attn.q_norm is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_and_cached_generation(family, tokenizer):
    model = made(family)
    batch = tokenizer(["short", PROMPTS[0]], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch, **settings)
    assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))
    alone = model.generate(**tokenizer("short", return_tensors="pt"), **settings)
    assert cached[0, -4:].tolist() == alone[0, -4:].tolist()


def test_model_and_tokenizer_survive_saving(tmp_path, tokenizer):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode("né <|im_end|>") == tokenizer.encode("né <|im_end|>")
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.padding_side == "left"
    assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (0, 2, 261)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, PROMPTS, loaded), logits(model, PROMPTS, tokenizer))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_decode_undoes_encode(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    bytes_and_specials = re.sub(r"<(pad|bos|eos|\|im_start\||\|im_end\|)>", "1", text)
    assert len(ids) == len(bytes_and_specials.encode())


@pytest.mark.parametrize("text", ["plain", "né 🙂", " two  spaces, it 's ", "line\nbreak\ttab"])
def test_offsets_name_characters(text, tokenizer):
    encoded = tokenizer(text, return_offsets_mapping=True)
    expected = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
    assert encoded["offset_mapping"] == expected


def test_specials_are_one_token_each(tokenizer):
    text = "<|im_start|>user\nhi<|im_end|><pad><bos><eos>"
    ids = tokenizer.encode(text)
    assert [ids[0], *ids[-4:]] == [3, 4, 0, 1, 2]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]


def test_chat_template_has_no_implicit_system_text(tokenizer):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    empty = tokenizer.apply_chat_template([{"role": "system", "content": ""}], tokenize=False)
    assert empty == "<|im_start|>system\n<|im_end|>\n"
    ids = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["a", "abc"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert batch["input_ids"][0][:2] == [0, 0]
