"""Score heads, how texts are written and batched, and where reward models come from: all without a Trainer."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import DataError, IncompatibleModelError, QuantizedModelError, RecipeError
from lightning_interp.models import LoraSettings, RewardModel, load_reward_model
from lightning_interp.models.scoring.reward_text import RewardEncoder, length_limit, score_rows
from lightning_interp.models.scoring.score_head import DecoderWithScore, align_left, label_index, scoring_model
from lightning_interp.testing import EXTRA_FAMILIES, FAMILIES, byte_tokenizer, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from core.decoder_types import MODELS, build

TEXTS = ["", "a", "fine words", "a rather long text about nothing at all", "ü!", "fine words", "zz"]
PROMPTS = ["say", "say more", "", "say", "what?", "say more", "say"]


def rows(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]


def padded(rows, side, extra=0, pad=2):
    longest = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, mask).logits


def folder(path, kind="llama", **settings):
    """A reward model as others would save it, and the model."""
    config = tiny_model(kind).config
    config.num_labels = settings.pop("num_labels", 1)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return model


# The score head


@pytest.mark.parametrize("family", [*FAMILIES, *EXTRA_FAMILIES])
def test_scores_do_not_depend_on_padding_or_on_the_batch(family):
    model, texts = scoring_model(tiny_model(family), seed=0), rows(3, 11, 1, 20, 7)
    alone = torch.cat([logits(model, row[None]) for row in texts])
    assert float(alone.std()) > 0.01
    for side, part in itertools.product(("left", "right"), ([0, 1], [0, 1, 2, 3, 4])):
        found = logits(model, *padded([texts[i] for i in part], side, extra=4))
        torch.testing.assert_close(found, alone[part], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_decoder_type_takes_a_head_and_comes_back_from_a_folder(name, tmp_path):
    model, texts = RewardModel(build(name), tokenizer=byte_tokenizer()), rows(3, 11, 1, 20)
    alone = torch.cat([logits(model.eval().model, row[None]) for row in texts])
    for side in ("left", "right"):
        found = logits(model.model, *padded(texts, side))
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    ModelMap.build(model)
    loaded = load_reward_model(model.export(tmp_path / "out"))
    assert not loaded.fresh
    torch.testing.assert_close(logits(loaded.model, texts[1][None]), alone[1:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_the_linear_map_of_the_last_hidden_state(family):
    causal = tiny_model(family)
    row = rows(9)[0][None]
    with torch.no_grad():
        last = causal.base_model(row).last_hidden_state[0, -1]
    model = scoring_model(causal, seed=0)
    assert float(logits(model, row)) == pytest.approx(float(last @ model.score.weight[0].detach()), abs=1e-5)
    assert model.base_model is causal.base_model  # used, not copied


def test_a_text_that_ends_with_the_token_that_also_pads_is_read_at_its_end():
    model = scoring_model(tiny_model("llama"), seed=0)
    text = torch.tensor([9, 8, 7, 2])
    alone = logits(model, text[None])
    torch.testing.assert_close(logits(model, *padded([text, rows(9)[0]], "right", pad=2))[:1], alone)
    theirs = AutoModelForSequenceClassification.from_config(model.config)
    theirs.model, theirs.score, theirs.config.pad_token_id = model.model, model.score, 2
    assert not torch.allclose(logits(theirs.eval(), *padded([text, rows(9)[0]], "right", pad=2))[:1], alone, atol=1e-3)


def test_the_seed_makes_a_fresh_head_and_the_random_state_stays():
    state = torch.get_rng_state()
    first, second, other = (scoring_model(tiny_model("gpt2"), seed=seed).score.weight for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    assert 0.5 < float(first.detach().std()) * 33**0.5 < 1.5


def test_the_head_stays_float32_under_bf16_weights():
    model = scoring_model(tiny_model("llama", dtype=torch.bfloat16), seed=0)
    row = rows(9)[0][None]
    assert logits(model, row).dtype == torch.float32
    full = scoring_model(tiny_model("llama"), seed=0)
    assert float(logits(model, row)) == pytest.approx(float(logits(full, row)), abs=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(full, row).dtype == torch.float32


def test_a_head_of_another_type_stays_with_its_owner(tmp_path):
    theirs = folder(tmp_path).to(torch.bfloat16)
    ours = scoring_model(theirs, seed=0)
    assert (theirs.score.weight.dtype, ours.score.weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(theirs.score.weight.float(), ours.score.weight)


def test_models_travel():
    model = scoring_model(tiny_model("gpt2"), seed=0)
    row = rows(5)[0][None]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(logits(twin, row), logits(model, row))
    assert scoring_model(model, seed=9) is model


def test_interventions_find_the_decoder():
    from lightning_interp import ActivationCapture, Site

    model = RewardModel("tiny:llama").eval()
    reader = ActivationCapture([Site("resid_post", 3)])
    with reader.attach(model), torch.no_grad():
        model(rows(6)[0][None])
    assert reader.activations[Site("resid_post", 3)].shape[-2:] == (6, 32)


def test_rows_without_a_token_are_refused():
    model = scoring_model(tiny_model("llama"), seed=0)
    with pytest.raises(DataError, match=r"Row 1 of a batch of shape \(2, 3\) has no token"):
        model(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]))


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1, max_size=5))
def test_alignment_keeps_the_order_of_real_tokens(mask):
    real = torch.tensor(mask)
    ids = torch.arange(real.numel()).view(real.shape) + 1
    moved, new = align_left(ids, real.long())
    for row in range(len(ids)):
        count = int(real[row].sum())
        assert new[row].tolist() == [1] * count + [0] * (6 - count)
        assert moved[row, :count].tolist() == ids[row][real[row]].tolist()


def test_encoders_of_two_parts_and_strangers_are_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=30, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4))
    with pytest.raises(IncompatibleModelError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        RewardModel(t5)
    with pytest.raises(IncompatibleModelError, match="Linear is no transformers PreTrainedModel"):
        scoring_model(nn.Linear(2, 2), seed=0)


# Other classifiers


def bert(labels=2):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=261,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        id2label={0: "NEGATIVE", 1: "POSITIVE", 2: "NEUTRAL"} if labels == 3 else None,
        num_labels=labels,
    )
    return BertForSequenceClassification(config).eval()


def test_an_encoder_classifier_is_read_as_it_pools():
    model = bert(3)
    module = RewardModel(model, tokenizer=byte_tokenizer(), label="POSITIVE", chat=False)
    assert module.model is model
    assert (module.label, module.fresh, module.encoder.add_eos) == (1, False, False)
    texts = ["fine words", "a", "fine words", "bb"]
    found = module.score([""] * 4, texts)
    assert model.training
    model.eval()
    for text, score in zip(texts, found, strict=True):
        ids = torch.tensor([byte_tokenizer()(text).input_ids])
        assert float(score) == pytest.approx(float(logits(model, ids)[0, 1]), abs=1e-6)
    assert found[0] == found[2]


def test_an_encoder_is_trained_in_full_only():
    with pytest.raises(IncompatibleModelError, match="adapters into decoders only, and BertForSequenceClassification"):
        RewardModel(bert(1), lora=LoraSettings(r=2))
    module = RewardModel(bert(1), lr=1e-3)
    module.log = lambda *_, **__: None
    batch = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": torch.ones(2, 2), "margin": torch.zeros(1)}
    module._trainer = type("T", (), {"global_step": 0, "global_rank": 0})()
    module.training_step(batch, 0).backward()
    assert all(p.grad is not None for p in module.model.parameters())


class OwnCode(BertForSequenceClassification):
    """A model that brings its own code and gives its reward as ``score``, of several outputs."""

    def forward(self, input_ids, attention_mask=None):
        output = super().forward(input_ids, attention_mask=attention_mask)
        output["score"] = output.logits.sum(1)
        return output


def test_code_that_comes_with_a_model_is_believed(monkeypatch):
    model = bert(3)
    monkeypatch.setattr(OwnCode, "__module__", "transformers_modules.somebody.model")
    model.__class__ = OwnCode
    module = RewardModel(model, tokenizer=byte_tokenizer(), chat=False)
    ids, found = torch.tensor([byte_tokenizer()("ab").input_ids]), module.score([""], ["ab"])
    assert float(found) == pytest.approx(float(logits(model.eval(), ids).sum()), abs=1e-6)


def test_the_reward_is_chosen_among_several_outputs(tmp_path):
    theirs = folder(tmp_path, num_labels=3)
    for label, index in ((2, 2), ("LABEL_1", 1)):
        module = RewardModel(str(tmp_path), label=label, chat=False, add_eos=False)
        ids = torch.tensor([byte_tokenizer()("ab").input_ids])
        assert float(module.score([""], ["ab"])) == pytest.approx(float(logits(theirs, ids)[0, index]), abs=1e-5)
    with pytest.raises(IncompatibleModelError, match=r"3 outputs: 0 \(LABEL_0\), 1 .*Choose the reward with label="):
        RewardModel(str(tmp_path))
    for label in ("GOOD", 3, -1):
        with pytest.raises(IncompatibleModelError, match=rf"has no output label={label!r}; it has 0 \(LABEL_0\)"):
            label_index(theirs, label)


# How texts are written


def encoder(**options):
    return RewardEncoder(tokenizer=byte_tokenizer(), **options)


def with_begin_token():
    """A tokenizer that puts a begin token before every text, with a template that writes one itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


def test_a_chat_is_written_by_the_template_without_a_doubled_begin_token():
    tokenizer = with_begin_token()
    assert tokenizer("a").input_ids[:1] == [1]
    (text,) = RewardEncoder(tokenizer=tokenizer, chat=True).encode_texts(["2+2="], ["4"])
    assert tokenizer.decode(text.ids) == "<bos><|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert text.ids.count(1) == 1
    (plain,) = RewardEncoder(tokenizer=tokenizer).encode_texts(["2+2="], ["4"])
    assert tokenizer.decode(plain.ids) == "<bos>2+2=4<eos>"


def test_conversations_and_system_texts():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    tokenizer = byte_tokenizer()
    (text,) = encoder(chat=True, system_prompt="be kind").encode_texts([turns], ["d"])
    written = tokenizer.decode(text.ids)
    assert written.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\na<|im_end|>")
    assert written.endswith("user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n")
    own = [{"role": "system", "content": "be terse"}, *turns]
    (text,) = encoder(chat=True, system_prompt="be kind").encode_texts([own], ["d"])
    assert "be kind" not in tokenizer.decode(text.ids)
    assert own[0]["content"] == "be terse"


def test_truncation_is_told_for_each_text_and_keeps_the_end_token():
    tokenizer = byte_tokenizer()
    found = encoder(max_length=8).encode_texts(["ab", "ab", "ab"], ["cdef", "cdefg", "cdefghijk"])
    assert [text.truncated for text in found] == [False, False, True]
    assert [tokenizer.decode(text.ids) for text in found] == ["abcdef<eos>", "abcdefg<eos>", "abcdefg<eos>"]
    tokenizer.truncation_side = "left"
    (text,) = RewardEncoder(tokenizer=tokenizer, max_length=4, add_eos=False).encode_texts(["ab"], ["cdefg"])
    assert (tokenizer.decode(text.ids), text.truncated) == ("defg", True)
    chats = encoder(chat=True, max_length=40).encode_texts(["ab", "ab"], ["c", "c" * 40])
    assert [(len(text.ids) <= 40, text.truncated) for text in chats] == [(True, False), (True, True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_cut_never_leaves_more_than_the_greatest_length(side, chat):
    tokenizer = byte_tokenizer()
    tokenizer.truncation_side = side
    for length in (1, 2, 17):
        found = RewardEncoder(tokenizer=tokenizer, chat=chat, max_length=length).encode_texts(["ab"], ["x" * 30])
        assert (len(found[0].ids), found[0].truncated) == (max(length, 2 - chat), True)


def test_a_text_that_spells_the_end_token_gets_no_second_one():
    (text,) = encoder().encode_texts(["a"], ["b<eos>"])
    assert byte_tokenizer().decode(text.ids) == "ab<eos>"


@pytest.mark.parametrize(
    ("prompts", "texts", "options", "match"),
    [
        (["a"], ["b", "c"], {}, "There are 1 prompts for 2 texts"),
        (["a", "a"], ["b", None], {}, "text 1 is None, a NoneType"),
        ([[{"role": "user", "content": "a"}]], ["b"], {}, "The prompt of text 0 is a list of turns"),
    ],
)
def test_what_cannot_be_written(prompts, texts, options, match):
    with pytest.raises(DataError, match=match):
        encoder(**options).encode_texts(prompts, texts)


def test_wrong_settings_of_the_writer():
    with pytest.raises(RecipeError, match="max_length=0"):
        encoder(max_length=0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="chat=True needs a chat template"):
        RewardEncoder(tokenizer=tokenizer, chat=True)


def test_the_limit_is_the_smaller_of_model_and_tokenizer():
    tokenizer = byte_tokenizer()
    assert length_limit(tiny_model("llama", max_position_embeddings=64), tokenizer) == 64
    tokenizer.model_max_length = 10**30
    assert length_limit(tiny_model("llama"), tokenizer) == 1024
    assert length_limit(tiny_model("bloom"), tokenizer) is None
    assert RewardModel(tiny_model("llama", max_position_embeddings=64), tokenizer=tokenizer).encoder.max_length == 64


# Scoring


def sequential(module, prompts, texts):
    """The slow way: one text at a time, no padding, no batch."""
    encoded = module.encoder.encode_texts(prompts, texts)
    was, scores = module.training, []
    module.eval()
    with torch.no_grad():
        scores = [float(module(torch.tensor([text.ids]))) for text in encoded]
    module.train(was)
    return torch.tensor(scores)


@pytest.mark.parametrize(
    ("family", "budget"),
    [*(("llama", budget) for budget in (1, 40, 150, 8192)), ("gpt2", 150), ("bloom", 150), ("gemma2", 150)],
)
def test_scores_equal_those_of_one_text_at_a_time(family, budget):
    module = RewardModel(tiny_model(family), tokenizer=byte_tokenizer(), token_budget=budget)
    found = module.score(PROMPTS, TEXTS)
    torch.testing.assert_close(found, sequential(module, PROMPTS, TEXTS), rtol=1e-4, atol=1e-5)
    assert found[2] != found[5] or PROMPTS[2] == PROMPTS[5]
    order = [4, 2, 0, 6, 1, 3, 5]
    again = module.score([PROMPTS[i] for i in order], [TEXTS[i] for i in order])
    torch.testing.assert_close(again, found[order], rtol=1e-4, atol=1e-5)


def test_equal_texts_get_equal_scores_to_the_bit():
    module = RewardModel("tiny:llama", token_budget=60)
    texts = [f"text number {i}" for i in range(20)] + ["the same"] * 9 + ["x" * 33, "the same"]
    found = module.score(["p"] * len(texts), texts)
    assert len(set(found[[i for i, text in enumerate(texts) if text == "the same"]].tolist())) == 1


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 40), st.booleans())
def test_batches_hold_every_row_once_within_the_budget(lengths, budget, one_length):
    texts, seen = [[i + 1] * length for i, length in enumerate(lengths)], []

    def forward(ids, mask):
        seen.extend(row[0] for row in ids.tolist())
        assert len(ids) == 1 or ids.numel() <= budget
        assert not one_length or bool(mask.all())
        return (ids * mask).sum(1).float()

    found = score_rows(forward, texts, pad_id=7, device=torch.device("cpu"), token_budget=budget, one_length=one_length)
    assert found.tolist() == [sum(text) for text in texts]
    assert sorted(seen) == list(range(1, len(texts) + 1))


def test_float64_scores_stay_so_and_other_shapes_are_refused():
    arguments = {"pad_id": 0, "device": torch.device("cpu"), "token_budget": 9}
    assert score_rows(lambda ids, _: ids.double().mean(1), [[1, 2], [3]], **arguments).dtype == torch.float64
    with pytest.raises(DataError, match=r"scores of shape \(2, 1\) for 2 texts"):
        score_rows(lambda ids, _: torch.zeros(len(ids), 1), [[1], [2]], **arguments)
    with pytest.raises(DataError, match=r"Text 1 has no token \(1 of 2 texts\)"):
        score_rows(lambda ids, _: torch.zeros(len(ids)), [[1], []], **arguments)
    assert score_rows(lambda ids, _: torch.zeros(len(ids)), [], **arguments).shape == (0,)


def test_scoring_leaves_everything_as_it_was():
    module = RewardModel(tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), tokenizer=byte_tokenizer())
    module.model.transformer.h[1].eval()
    modes = {name: part.training for name, part in module.named_modules()}
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in module.state_dict().items()}
    first, second = module.score(["a"], ["b"]), module.score(["a"], ["b"])
    assert torch.equal(first, second)  # no dropout
    assert not first.requires_grad
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[k], v) for k, v in module.state_dict().items())


def test_modes_come_back_after_an_error():
    module = RewardModel("tiny:llama")
    handle = module.model.score.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.score(["a"], ["b"])
    handle.remove()
    assert all(part.training for part in module.modules())
    assert torch.is_grad_enabled()


def test_truncation_is_told_with_the_scores():
    module = RewardModel("tiny:llama", chat=False, max_length=6)
    scores = module.scores(["a", "a"], ["bcd", "bcdefgh"])
    assert scores.truncated.tolist() == [False, True]
    assert float(scores.reward[1]) == pytest.approx(float(module.score(["a"], ["bcde"])), abs=1e-6)


def test_bf16_weights_score_nearly_alike():
    full, half = (RewardModel("tiny:llama", lora={"r": 2}, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.model.model.embed_tokens.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half.score(PROMPTS, TEXTS), full.score(PROMPTS, TEXTS), rtol=0, atol=0.15)


def test_without_a_tokenizer_texts_cannot_be_read():
    module = RewardModel(tiny_model("llama"))
    with pytest.raises(RecipeError, match=r"RewardModel on 'LlamaForCausalLM' has no tokenizer"):
        module.score(["a"], ["b"])
    with pytest.raises(RecipeError, match="cannot read texts"):
        _ = module.encoder


# Where models come from


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_folder_of_transformers_class_is_read(tmp_path, kind):
    theirs = folder(tmp_path, kind)
    loaded = load_reward_model(tmp_path)
    assert (loaded.fresh, loaded.label, type(loaded.model)) == (False, tmp_path.name, DecoderWithScore)
    assert not loaded.model.training
    torch.testing.assert_close(logits(loaded.model, rows(9)[0][None]), logits(theirs, rows(9)[0][None]))
    module = RewardModel(str(tmp_path))
    assert module.training
    assert not module.fresh


def test_a_language_model_gets_a_fresh_head(tmp_path):
    tiny_model("llama", seed=3).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path, seed=5)
    assert loaded.fresh
    expected = scoring_model(tiny_model("llama", seed=3), seed=5)
    assert torch.equal(logits(loaded.model, rows(5)[0][None]), logits(expected, rows(5)[0][None]))


def test_how_texts_are_written_travels_with_a_folder(tmp_path):
    module = RewardModel("tiny:llama", chat=False, add_eos=False, max_length=77)
    settings = json.loads((module.export(tmp_path / "out") / "reward_text.json").read_text())
    expected = {"chat": False, "system_prompt": None, "add_eos": False, "max_length": 77, "label": 0}
    assert settings == expected
    loaded = RewardModel(str(tmp_path / "out"))
    assert loaded.encoder.settings() == {k: v for k, v in expected.items() if k != "label"}
    torch.testing.assert_close(loaded.score(PROMPTS[1:], TEXTS[1:]), module.score(PROMPTS[1:], TEXTS[1:]))
    assert RewardModel(str(tmp_path / "out"), max_length=50).encoder.max_length == 50
    (tmp_path / "out" / "reward_text.json").write_text('{"chat": true}')
    with pytest.raises(DataError, match=r"reward_text.json does not say how texts are written \(KeyError"):
        RewardModel(str(tmp_path / "out"))


def test_defaults_of_a_stranger(tmp_path):
    folder(tmp_path)
    module = RewardModel(str(tmp_path))
    assert module.encoder.settings() == {"chat": True, "system_prompt": None, "add_eos": False, "max_length": 1024}
    fresh = RewardModel("tiny:llama")
    assert fresh.encoder.add_eos


@pytest.mark.parametrize(
    ("break_it", "error", "match"),
    [
        (lambda path: (path / "model.safetensors").unlink(), DataError, "has no model.safetensors"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 40), DataError, "is damaged or cut short"),
        (lambda path: _drop_weight(path, "score.weight"), DataError, r"lack 'score.weight' \(1 tensors"),
    ],
)
def test_damaged_folders(tmp_path, break_it, error, match):
    folder(tmp_path)
    break_it(tmp_path)
    with pytest.raises(error, match=match):
        load_reward_model(tmp_path)


def _drop_weight(path, name):
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    del weights[name]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_a_family_without_a_class_needs_its_head(tmp_path):
    RewardModel(build("granite"), tokenizer=byte_tokenizer()).export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["DecoderWithScore"]
    _drop_weight(tmp_path / "out", "score.weight")
    with pytest.raises(DataError, match=r"weights in '.*out' lack 'score.weight'"):
        load_reward_model(tmp_path / "out")


def test_unknown_sources_and_revisions(tmp_path):
    folder(tmp_path)
    with pytest.raises(RecipeError, match="no model at 'no such thing'"):
        load_reward_model("no such thing")
    with pytest.raises(RecipeError, match="revision='main' means nothing for"):
        load_reward_model(tmp_path, revision="main")
    with pytest.raises(RecipeError, match="token_budget=0"):
        RewardModel("tiny:llama", token_budget=0)


def test_a_quantised_base_needs_an_adapter():
    with pytest.raises(QuantizedModelError, match="RewardModel cannot train all weights of 'tiny:llama'"):
        RewardModel("tiny:llama", quantization="8bit")
    module = RewardModel("tiny:llama", quantization="8bit", lora={"r": 2})
    assert module.score(["a"], ["b"]).isfinite().all()
    trained = {name for name, p in module.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"model.score.weight"}


def test_bert_tokenizers_write_their_own_special_tokens(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    module = RewardModel(bert(1), tokenizer=tokenizer, max_length=4)
    found = module.encoder.encode_texts(["", ""], ["a b", "a b a b"])
    assert [text.ids for text in found] == [[2, 5, 6, 3], [2, 5, 6, 3]]
    assert [text.truncated for text in found] == [False, True]
