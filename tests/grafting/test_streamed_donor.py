"""A donor that stays on disk gives what the loaded donor gives."""

from __future__ import annotations

import json
import os

import pytest
import torch
from draws import batch_masks, draw

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.grafting import CheckpointDonor, Graft, GraftEvaluator, GraftPlan, GraftPrompt
from lightning_interp.testing import EXTRA_FAMILIES, FAMILIES, byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def stored(pairs, tmp_path_factory):
    """``stored(family)``: the donor of a family as a folder."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("donors") / family
            pairs(family)[1].save_pretrained(made[family])
        return made[family]

    return get


@torch.no_grad()
def grafted(recipient, donor, plan, ids, masks=None):
    with Graft(donor, plan).attach(recipient) as attachment:
        attachment.batch = masks
        return recipient(ids).logits


@pytest.mark.parametrize("family", [f for f in FAMILIES + EXTRA_FAMILIES if f != "qwen2_moe"])
def test_it_is_the_loaded_donor(family, pairs, stored):
    recipient, donor = pairs(family)
    streamed = CheckpointDonor(stored(family))
    draws = [draw(family, ("disk", i)) for i in range(6)]
    ids, plans, masks = torch.tensor([d.ids for d in draws]), [d.plan for d in draws], batch_masks(draws)
    assert torch.equal(grafted(recipient, streamed, plans, ids, masks), grafted(recipient, donor, plans, ids, masks))
    with torch.no_grad():
        assert torch.equal(grafted(recipient, streamed, GraftPlan.whole(), ids), donor(ids).logits)


def test_it_is_read_in_shards(pairs, tmp_path):
    recipient, donor = pairs("llama")
    donor.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = torch.arange(10, 18)[None]
    with torch.no_grad():
        assert torch.equal(grafted(recipient, CheckpointDonor(tmp_path), GraftPlan.whole(), ids), donor(ids).logits)


def test_it_holds_no_weights(stored):
    donor = CheckpointDonor(stored("llama"))
    assert {parameter.device.type for parameter in donor.map.model.parameters()} == {"meta"}


def test_in_an_evaluator(pairs, stored):
    recipient, donor = pairs("gpt2")
    evaluator = GraftEvaluator([GraftPrompt("Ann met", "Bo", {"FE": "Ann"})], byte_tokenizer())
    assert (
        evaluator.evaluate(recipient, CheckpointDonor(stored("gpt2"))).rows == evaluator.evaluate(recipient, donor).rows
    )


def test_another_precision_on_disk(pairs, tmp_path):
    recipient, _ = pairs("llama")
    half = tiny_model("llama", seed=5, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    ids = torch.arange(10, 18)[None]
    expected = grafted(recipient, half, GraftPlan.whole(), ids)
    assert torch.equal(grafted(recipient, CheckpointDonor(tmp_path), GraftPlan.whole(), ids), expected)


def test_what_is_no_donor(tmp_path, stored):
    with pytest.raises(IncompatibleModelError, match=r"nowhere' holds no readable safetensors"):
        CheckpointDonor(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    os.makedirs(broken)
    (broken / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all")
    with pytest.raises(IncompatibleModelError, match=r"broken' holds no readable safetensors"):
        CheckpointDonor(broken)
    (broken / "model.safetensors").write_bytes((stored("llama") / "model.safetensors").read_bytes())
    with pytest.raises(IncompatibleModelError, match=r"broken' cannot be read as a causal language model"):
        CheckpointDonor(broken)


def test_experts_that_are_stored_one_by_one(stored):
    with pytest.raises(IncompatibleModelError, match=r"no tensor for 8 parameters of Qwen2Moe.*Load the model"):
        CheckpointDonor(stored("qwen2_moe"))


def test_a_tensor_is_missing(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleModelError, match=r"no tensor for 1 parameters.*layers\.2\.mlp\.up_proj"):
        CheckpointDonor(tmp_path)


def test_shapes_are_checked_before_anything_is_hooked(pairs, tmp_path, hook_count):
    recipient, _ = pairs("llama")
    tiny_model("llama", intermediate_size=48).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 48
    with pytest.raises(IncompatibleModelError, match=r"\(64, 32\) in the recipient and \(48, 32\) in the donor"):
        CheckpointDonor(tmp_path).check(ModelMap.build(recipient))
    assert hook_count(recipient) == 0
