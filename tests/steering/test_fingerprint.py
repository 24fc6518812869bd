"""A fingerprint names the numbers of the unembedding, and nothing of how they are stored."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter

import pytest
import torch
from torch import nn

from lightning_interp.core.model import fingerprint
from lightning_interp.core.model.fingerprint import check_fingerprint, model_fingerprint
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.testing import tiny_model


@pytest.fixture
def hashes(monkeypatch):
    """How often the whole weight was hashed."""
    count = Counter()
    plain = fingerprint._hash

    def counted(*args):
        count["hashes"] += 1
        return plain(*args)

    monkeypatch.setattr(fingerprint, "_hash", counted)
    return count


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_equal_models_share_it_and_others_do_not(family):
    first = model_fingerprint(tiny_model(family))
    assert len(first) == 64
    assert model_fingerprint(tiny_model(family)) == first
    assert model_fingerprint(ModelMap.build(tiny_model(family))) == first
    assert model_fingerprint(tiny_model(family, seed=1)) != first


def test_it_is_the_hash_that_it_says_it_is():
    model = tiny_model("llama")
    facts = b'{"bias": false, "hidden_size": 32, "layers": 3, "model_type": "llama", "vocabulary": [261, 32]}'
    numbers = model.lm_head.weight.detach().numpy().tobytes()
    assert model_fingerprint(model) == hashlib.sha256(facts + b"4" + numbers).hexdigest()


def test_one_number_of_the_unembedding_matters_and_the_blocks_do_not():
    model = tiny_model("llama")
    first = model_fingerprint(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(1)
    assert model_fingerprint(model) == first
    with torch.no_grad():
        model.lm_head.weight[100, 7] += 1e-6
    assert model_fingerprint(model) != first


def test_depth_and_type_matter():
    shallow, deep = (tiny_model("llama", num_hidden_layers=n) for n in (2, 3))
    deep.load_state_dict(shallow.state_dict(), strict=False)
    assert torch.equal(shallow.lm_head.weight, deep.lm_head.weight)
    assert model_fingerprint(shallow) != model_fingerprint(deep)
    other = tiny_model("llama", num_hidden_layers=2)
    other.config.model_type = "alpaca"
    assert model_fingerprint(other) != model_fingerprint(shallow)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_storage_type_does_not_matter_where_the_numbers_are_kept(dtype):
    rounded = tiny_model("llama").to(torch.bfloat16).to(torch.float32)
    assert model_fingerprint(rounded.to(dtype)) == model_fingerprint(
        tiny_model("llama").to(torch.bfloat16).to(torch.float32)
    )
    assert model_fingerprint(rounded) != model_fingerprint(tiny_model("llama"))


def test_numbers_that_float32_does_not_hold_are_hashed_as_they_are():
    model = tiny_model("llama").double()
    first = model_fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-14
    assert model_fingerprint(model) != first
    assert model_fingerprint(tiny_model("llama").double()) == first


def test_a_bias_counts():
    model = tiny_model("llama")
    first = model_fingerprint(model)
    model.lm_head.bias = nn.Parameter(torch.zeros(261))
    with_bias = model_fingerprint(model)
    assert with_bias != first
    with torch.no_grad():
        model.lm_head.bias[5] = 1.0
    assert model_fingerprint(model) not in (first, with_bias)


def test_an_adapter_changes_nothing():
    from peft import LoraConfig, get_peft_model

    first = model_fingerprint(tiny_model("llama"))
    on_blocks = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    on_head = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    saved = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        saved.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    assert {model_fingerprint(m) for m in (on_blocks, on_head, saved)} == {first}


def test_a_model_without_a_head_is_named_by_its_embedding():
    whole = tiny_model("llama", tie_word_embeddings=True)
    assert model_fingerprint(whole.model) == model_fingerprint(whole)


def test_it_is_hashed_once(hashes):
    model = tiny_model("llama")
    for _ in range(3):
        model_fingerprint(model)
        model_fingerprint(ModelMap.build(model))
    assert hashes["hashes"] == 1
    again = tiny_model("llama")
    assert model_fingerprint(again) == model_fingerprint(model)
    assert hashes["hashes"] == 2


@pytest.mark.parametrize("how", ["in place", "behind autograd's back", "replaced", "optimiser"])
def test_a_changed_weight_is_hashed_again(hashes, how):
    model = tiny_model("llama")
    first = model_fingerprint(model)
    weight = model.lm_head.weight
    if how == "in place":
        with torch.no_grad():
            weight[200, 1] += 1
    elif how == "behind autograd's back":
        weight.data.add_(1)
    elif how == "replaced":
        model.lm_head.weight = nn.Parameter(weight.detach() + 1)
    else:
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.1).step()
    assert model_fingerprint(model) != first
    assert hashes["hashes"] == 2


def test_it_leaves_the_model_alone_and_does_not_keep_it_alive():
    import gc
    import weakref

    model = tiny_model("llama")
    before = {name: p._version for name, p in model.named_parameters()}
    model_fingerprint(model)
    assert {name: p._version for name, p in model.named_parameters()} == before
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_models_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny_model("llama")
        assert model_fingerprint(model) == model_fingerprint(tiny_model("llama"))


def test_the_lightning_module_with_two_models():
    from lightning_interp.errors import SiteError

    both = nn.ModuleDict({"policy": tiny_model("llama"), "reference": tiny_model("llama", seed=1)})
    with pytest.raises(SiteError, match="'policy'"):
        model_fingerprint(both)
    assert model_fingerprint(both, target="reference") == model_fingerprint(tiny_model("llama", seed=1))


def test_a_model_without_numbers():
    with torch.device("meta"):
        model = type(tiny_model("llama"))(tiny_model("llama").config)
    with pytest.raises(IncompatibleModelError, match=r"unembedding of LlamaForCausalLM is on the meta device"):
        model_fingerprint(model)


def test_a_model_without_a_vocabulary():
    model_map = ModelMap.build(tiny_model("llama"))
    model_map.shared.pop("unembed")
    model_map.shared.pop("embed")
    with pytest.raises(IncompatibleModelError, match=r"LlamaForCausalLM has neither .* \(found NoneType\)"):
        model_fingerprint(model_map)


def test_check():
    check_fingerprint("a" * 64, "a" * 64)
    check_fingerprint(None, "a" * 64)
    check_fingerprint("a" * 64, None)
    with pytest.raises(IncompatibleModelError, match=r"mine\.st was made .* b{12}, but tiny has a{12}\. Use it"):
        check_fingerprint("a" * 64, "b" * 64, what="mine.st", model="tiny")


def _sharded(rank, port, results):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = tiny_model("llama")
        mesh = init_device_mesh("cpu", (2,))
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
        results.put(model_fingerprint(model))
    finally:
        torch.distributed.destroy_process_group()


def test_a_sharded_head_has_the_fingerprint_of_the_whole():
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_sharded, args=(r, os.environ["MASTER_PORT"], results)) for r in range(2)]
    for process in ranks:
        process.start()
    found = {results.get(timeout=60) for _ in ranks}
    for process in ranks:
        process.join(timeout=60)
    assert found == {model_fingerprint(tiny_model("llama"))}
