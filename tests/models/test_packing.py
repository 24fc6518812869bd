"""Several texts in one row are what they are one by one."""

from __future__ import annotations

from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_interp.core.hooks.capture import ActivationCapture
from lightning_interp.core.model.sites import Site
from lightning_interp.errors import DataError, IncompatibleModelError, PositionError
from lightning_interp.models import CausalLM, LoraSettings, TextDataModule, load_causal_lm
from lightning_interp.models.data.packing import check_packing, rows_together
from lightning_interp.testing import byte_tokenizer, tiny_model

LENGTHS = [3, 17, 9, 30, 12, 2, 5, 21]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def rows(lengths=LENGTHS, prompt=0):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 261, (length,), generator=generator).tolist() for length in lengths]
    return [{"prompt_ids": one[:prompt], "completion_ids": one[prompt:]} for one in ids]


def module(source=None, **options):
    settings = {"batch_size": 8, "max_length": 40, "packing": True, **options}
    data = TextDataModule(source or rows(), tokenizer=byte_tokenizer(), **settings)
    data.setup("fit")
    return data


def batch_of(data):
    (batch,) = data.train_dataloader()
    return batch


def texts(batch):
    """The texts of a packed batch, with their labels, without padding."""
    found = []
    for ids, positions, labels in zip(batch["input_ids"], batch["position_ids"], batch["labels"], strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        for start, stop in pairwise(starts):
            if stop - start > 1:
                assert positions[start:stop].tolist() == list(range(stop - start))
                found.append((ids[start:stop].tolist(), labels[start:stop].tolist()))
    return sorted(found)


# Which texts go together


def test_texts_fill_rows_and_none_is_cut_or_lost():
    lengths = torch.randint(1, 101, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    together = rows_together(lengths, 100, seed=4, window=200)
    assert sorted(index for row in together for index in row) == list(range(500))
    used = [sum(lengths[index] for index in row) for row in together]
    assert max(used) <= 100
    assert sum(used) / (100 * len(used)) > 0.94
    assert rows_together(lengths, 100, seed=4, window=200) == together
    assert rows_together(lengths, 100, seed=5, window=200) != together


def test_a_text_goes_into_the_fullest_row_that_holds_it():
    assert [sorted(row) for row in rows_together([6, 5, 4, 3, 2], 10)] == [[0, 2], [1, 3, 4]]
    assert rows_together([10, 10], 10, seed=1) in ([[0], [1]], [[1], [0]])


@pytest.mark.parametrize("prompt", [0, 2])
def test_a_batch_holds_each_text_from_position_0_and_its_labels_alone(prompt):
    source = rows([length for length in LENGTHS if length > 2], prompt)
    data = module(source)
    batch = batch_of(data)
    expected = []
    for row in source:
        ids = row["prompt_ids"] + row["completion_ids"]
        expected.append((ids, [-100] * max(prompt, 1) + ids[max(prompt, 1) :]))
    assert texts(batch) == sorted(expected)
    assert batch.keys() == {"input_ids", "position_ids", "labels"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    counts = data.counts["train"]
    assert counts["packed"] == len(batch["input_ids"]) < len(source)
    assert counts["unfilled"] == 40 * counts["packed"] - sum(map(len, (ids for ids, _ in expected)))
    assert counts["scored"] == int((batch["labels"] != -100).sum())


def test_rows_of_text_are_packed_as_rows_of_ids_are():
    data = module([{"text": "abc"}, {"prompt": "ab", "completion": "c"}])
    ids = byte_tokenizer()("abc<eos>").input_ids
    assert texts(batch_of(data)) == sorted([(ids, [-100, *ids[1:]]), (ids, [-100, -100, *ids[2:]])])


def test_a_long_row_is_cut_before_it_is_packed_or_refused():
    with pytest.warns(UserWarning, match="1 of 2 rows were cut to max_length=40"):
        assert module(rows([50, 6])).counts["train"]["truncated"] == 1
    with pytest.raises(DataError, match="more than max_length=40"):
        module(rows([50]), too_long="error")


def test_packed_rows_resume_are_shuffled_and_come_with_a_length_window():
    def epoch(number, start=0, **options):
        loader = module(batch_size=1, **options).train_dataloader()
        loader.sampler.set_epoch(number)
        loader.load_state_dict({"batches": start})
        return [batch["input_ids"].tolist() for batch in loader]

    first = epoch(0)
    assert epoch(0) == first != epoch(1)
    assert sorted(map(str, epoch(1))) == sorted(map(str, first))
    assert epoch(1, start=1) == epoch(1)[1:]
    assert sorted(map(str, epoch(0, length_window=2))) == sorted(map(str, first))


# The loss


FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma2", "qwen2_moe", "gemma3", "qwen3", "phi3"]
WAYS = [(family, way) for family in FAMILIES for way in ("sdpa", "eager") if (family, way) != ("gemma2", "sdpa")]


@pytest.mark.parametrize(("family", "attention"), WAYS)  # gemma2's soft caps need eager attention
def test_loss_and_gradients_are_those_of_padded_rows(family, attention):
    trim = attention == "sdpa"
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    lm, found = CausalLM(model), []
    for data in (module(packing=False), module()):
        lm.zero_grad()
        total, tokens = lm._loss(batch_of(data), 0, trim=trim)
        (total / tokens).backward()
        gradients = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
        found.append((total / tokens, int(tokens), gradients))
    (loss, tokens, gradients), (packed, packed_tokens, packed_gradients) = found
    assert tokens == packed_tokens == sum(LENGTHS) - len(LENGTHS)
    torch.testing.assert_close(packed, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_texts_that_read_each_other_would_be_seen():
    """The tolerance of the test above is far below what a mask that is missing does."""
    lm, batch = CausalLM(tiny_model()), batch_of(module())
    right = lm._loss(batch, 0, trim=True)[0].item()
    wrong = lm._loss(batch | {"attention_mask": torch.ones_like(batch["input_ids"])}, 0, trim=True)[0].item()
    assert abs(right - wrong) / right > 1e-4


@pytest.mark.parametrize("how", [{"batch_size": 1}, {"batch_size": 2, "packing": False, "length_window": 2}])
def test_a_run_resumes_in_the_middle_of_an_epoch_and_validates(tmp_path, how):
    def fit(folder, epochs, ckpt=None):
        lm = CausalLM("tiny:llama", lora=LoraSettings(r=2), optimisation={"lr": 1e-2})
        keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
        trainer = L.Trainer(max_steps=epochs, callbacks=[keep], default_root_dir=folder, **QUIET)
        trainer.fit(lm, module(val=rows(), **how), ckpt_path=ckpt)
        return lm, trainer

    whole, trainer = fit(tmp_path / "whole", 4)
    fit(tmp_path / "cut", 2)
    resumed, _ = fit(tmp_path / "rest", 4, sorted((tmp_path / "cut").glob("*step=2*"))[0])
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    (plain,) = trainer.validate(whole, module(packing=False, val=rows()), verbose=False)
    (packed,) = trainer.validate(whole, module(val=rows()), verbose=False)
    assert packed["val/loss"] == pytest.approx(plain["val/loss"], rel=1e-5)


# Who cannot


def config(kind, **options):
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "intermediate_size": 64}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **options))


def test_a_model_that_cannot_be_told_where_texts_begin_is_refused():
    lm = CausalLM(tiny_model("bloom"))
    with pytest.raises(IncompatibleModelError, match=r"model_type='bloom'\) .* its forward takes no position_ids"):
        lm._loss(batch_of(module()), 0, trim=True)


def test_a_model_whose_mask_ignores_positions_is_refused():
    with pytest.raises(IncompatibleModelError, match=r"model_type='opt'\) .* its attention ignores where texts begin"):
        check_packing(tiny_model("opt"))


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "carry a state or a convolution over tokens"),
        ("llama4_text", {"num_local_experts": 2, "head_dim": 8}, "attends in chunks that are counted from the row's"),
    ],
)
def test_blocks_that_pass_something_on_are_refused(kind, options, why):
    with pytest.raises(IncompatibleModelError, match=rf"model_type='{kind}'\) .* {why}"):
        check_packing(config(kind, **options))


def test_other_kinds_of_attention_are_refused():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(IncompatibleModelError, match=r"its attention is 'flash_attention_2', and .* sdpa and eager"):
        check_packing(model)


@pytest.mark.parametrize("window", [2, 4096])
def test_sliding_windows_are_asked_and_pass(window):
    check_packing(config("mistral", sliding_window=window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_sign_of_texts_that_read_each_other(dtype):
    check_packing(tiny_model("qwen2_moe").to(dtype))
    with pytest.raises(IncompatibleModelError, match="ignores where texts begin"):
        check_packing(tiny_model("opt").to(dtype))


def test_an_8_bit_base_packs():
    check_packing(load_causal_lm("tiny:llama", quantization="8bit").model)


def test_positions_of_one_text_ask_nothing_of_a_model():
    lm, ids = CausalLM(tiny_model("opt")), torch.arange(5, 11)[None]
    batch = {"input_ids": ids, "labels": ids}
    plain = lm._loss(batch, 0, trim=True)[0]
    torch.testing.assert_close(lm._loss(batch | {"position_ids": torch.arange(6)[None]}, 0, trim=True)[0], plain)


def test_asking_a_model_leaves_it_as_it_was():
    model = tiny_model("llama", attention_dropout=0.5).train()
    calls = []
    lm, batch = CausalLM(model), batch_of(module())
    model.register_forward_hook(lambda *_: calls.append(model.training))
    for _ in range(2):
        lm._loss(batch, 0, trim=True)
    assert calls == [False] * 4 + [True] * 2
    torch.manual_seed(1)
    state = torch.get_rng_state()
    check_packing(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_instruments_refuse_packed_rows():
    lm, batch = CausalLM(tiny_model()), batch_of(module())
    capture = ActivationCapture([Site("resid_post", 1)])
    with capture.attach(lm.model), pytest.raises(PositionError, match="several texts in one row"):
        lm._loss(batch, 0, trim=True)
