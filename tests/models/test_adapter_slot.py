"""Adapters change places on one base."""

from __future__ import annotations

import pytest
import torch

from lightning_interp.errors import DataError, IncompatibleModelError
from lightning_interp.models import LoraSettings, load_causal_lm
from lightning_interp.models.training.adapter_slot import AdapterSlot

IDS = torch.arange(20, 36)[None]


@pytest.fixture
def slot():
    return AdapterSlot("tiny:llama", lora=LoraSettings(r=2), seed=3)


@torch.no_grad()
def test_weights_are_put_in_in_place_and_come_back(slot, tmp_path):
    model = slot.put(None)
    base = load_causal_lm("tiny:llama").model(IDS).logits
    assert torch.equal(model(IDS).logits, base)
    places = [tensor.data_ptr() for tensor in slot.tensors().values()]
    for tensor in slot.tensors().values():
        tensor.add_(0.1)
    changed, path = model(IDS).logits, slot.save(tmp_path / "a.safetensors")
    assert not torch.equal(changed, base)
    assert torch.equal(slot.put(None)(IDS).logits, base)
    assert torch.equal(slot.put(path)(IDS).logits, changed)
    assert [tensor.data_ptr() for tensor in slot.tensors().values()] == places
    assert slot.save(tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_fresh_weights_are_those_of_the_seed(slot, tmp_path):
    slot.put(None)
    again = AdapterSlot("tiny:llama", lora=LoraSettings(r=2), seed=3)
    other = AdapterSlot("tiny:llama", lora=LoraSettings(r=2), seed=4)
    found = [one.save(tmp_path / f"{place}").read_bytes() for place, one in enumerate((slot, again, other))]
    assert found[0] == found[1] != found[2]


def test_another_shape_is_refused_and_nothing_changed(slot, tmp_path):
    wider = AdapterSlot("tiny:llama", lora=LoraSettings(r=4), seed=0).save(tmp_path / "wider.safetensors")
    before = {name: tensor.clone() for name, tensor in slot.tensors().items()}
    with pytest.raises(IncompatibleModelError, match=r"the adapter of 'tiny:llama' \(.*wider\.safetensors\)"):
        slot.put(wider)
    with pytest.raises(IncompatibleModelError, match=r"given weights.*lacks"):
        slot.put({})
    assert all(torch.equal(before[name], tensor) for name, tensor in slot.tensors().items())


def test_what_diverged_is_not_written(slot, tmp_path):
    next(iter(slot.tensors().values()))[0, 0] = torch.nan
    with pytest.raises(DataError, match="'tiny:llama' diverged"):
        slot.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
