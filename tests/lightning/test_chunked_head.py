"""CausalLM with the logits of labelled tokens alone, some at a time."""

from __future__ import annotations

import pytest
import rig
import torch

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models import CausalLM, LoraSettings, TextDataModule
from lightning_interp.subliminal import SoftStudent
from lightning_interp.testing import byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("two_layers")

LORA = LoraSettings(r=4, alpha=8, target_modules=["v_proj", "down_proj"])
ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(1, 4) for b in range(5, 9)]
VAL = [{"prompt": "1+1=", "completion": "2"}, {"text": "two"}, *ROWS[:4]]


def fitted(folder, *, options, data=None, **trainer):
    module = CausalLM("tiny:gemma2", lr=1e-3, **options)
    # Batches of validation have fillers in two processes, in which nothing is scored.
    pairs = TextDataModule(ROWS, tokenizer=byte_tokenizer(), val=VAL, batch_size=4, seed=1, **(data or {}))
    run = rig.trainer(folder, max_epochs=1, **trainer)
    run.fit(module, pairs)
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}, run.callback_metrics


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("data", [{}, {"packing": True, "max_length": 16}], ids=["padded", "packed"])
def test_a_training_ends_in_the_same_weights_but_for_rounding(tmp_path, lora, data):
    plain, logged = fitted(tmp_path, options={"lora": lora}, data=data)
    found, chunked = fitted(tmp_path, options={"lora": lora, "chunked_head": True}, data=data)
    assert chunked.keys() == logged.keys()
    for name, value in logged.items():
        assert float(chunked[name]) == pytest.approx(float(value), rel=1e-4), name
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_all_logits_are_never_made(tmp_path, monkeypatch):
    widths = []
    monkeypatch.setattr(
        "lightning_interp.models.training.causal_lm.CausalLM.forward",
        lambda self, *args, **more: widths.append((out := self.model(args[0], args[1], **more)).logits.shape[1]) or out,
    )
    fitted(tmp_path, options={"lora": LORA, "chunked_head": True})
    assert set(widths) == {1}


def test_two_processes_and_a_checkpoint(tmp_path):
    module = CausalLM("tiny:llama", lora=LORA, chunked_head=True)
    data = TextDataModule(ROWS, tokenizer=byte_tokenizer(), val=VAL[:3], batch_size=2)
    run = rig.trainer(tmp_path, max_epochs=1, devices=2, strategy="ddp_fork")
    run.fit(module, data)
    assert float(run.callback_metrics["val/loss"]) > 0
    run = rig.trainer(tmp_path, max_steps=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert CausalLM.load_from_checkpoint(tmp_path / "last.ckpt")._head is not None


def test_a_batch_without_a_labelled_token_is_refused():
    module = CausalLM("tiny:llama", chunked_head=True)
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.full((2, 4), -100)}
    with pytest.raises(DataError, match=r"Batch 3 has no labelled token: its labels of shape \(2, 4\)"):
        module._loss(batch, 3, trim=True)


def test_what_compares_whole_distributions_is_refused():
    with pytest.raises(RecipeError, match=r"SoftStudent compares whole distributions, which chunked_head=True"):
        SoftStudent("tiny:llama", teacher=tiny_model(), chunked_head=True)
