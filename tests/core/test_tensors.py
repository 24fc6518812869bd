"""Safetensors folders: what is in them without reading, tensor by tensor, and what is damaged is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from lightning_interp.core.weights.tensors import TensorFolder
from lightning_interp.errors import DataError

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.tensor(3, dtype=torch.int64),
    "c": torch.ones(5, dtype=torch.bfloat16),
    "d": torch.zeros(0, 2, dtype=torch.bool),
}


def shard(folder, **shards):
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    mapping = {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))


@pytest.fixture(params=["one file", "shards"])
def folder(request, tmp_path):
    if request.param == "one file":
        save_file(TENSORS, tmp_path / "model.safetensors")
    else:
        shard(tmp_path, two={k: TENSORS[k] for k in "ad"}, one={k: TENSORS[k] for k in "bc"})
    return TensorFolder(tmp_path)


def test_what_is_in_a_folder(folder):
    assert set(folder.files) == set(folder.headers) == set(TENSORS)
    assert folder.headers == {name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
    assert "b" in folder
    assert "e" not in folder
    for name, tensor in TENSORS.items():
        assert torch.equal(folder.tensor(name), tensor)
    with pytest.raises(DataError, match=r"has no tensor 'e' among its 4"):
        folder.tensor("e")


def test_a_walk_reads_each_tensor_once_as_the_files_have_them(folder):
    walked = dict(folder)
    assert list(walked) == list(folder.headers)
    assert [folder.files[name] for name in walked] == sorted(folder.files.values())
    assert walked.keys() == TENSORS.keys()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in walked.items())


def test_a_tensor_holds_no_more_than_itself(tmp_path):
    save_file({str(i): torch.randn(100) for i in range(20)}, tmp_path / "model.safetensors")
    folder = TensorFolder(tmp_path)
    assert {tensor.untyped_storage().nbytes() for _, tensor in folder} == {400}
    assert folder.tensor("7").untyped_storage().nbytes() == 400


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path):
    shard(tmp_path, one={"a": torch.zeros(1)})
    save_file({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(TensorFolder(tmp_path).files) == ["b"]


def test_tied_tensors_are_read_under_both_names(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    folder = TensorFolder(tmp_path)
    assert list(folder.files) == list(folder.headers) == [name for name, _ in folder] == ["0.weight"]
    assert folder.aliases == {"1.weight": "0.weight"}
    assert "1.weight" in folder
    assert torch.equal(folder.tensor("1.weight"), model[0].weight)


def test_files_of_another_stem(tmp_path):
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    assert set(TensorFolder(tmp_path, stem="adapter_model").files) == set(TENSORS)
    with pytest.raises(DataError, match=r"has no model.safetensors; it holds adapter_model.safetensors"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_cut_file_is_named(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(64, 64)}, path)
    TensorFolder(tmp_path).check()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"model.safetensors is damaged or cut short \(.*bytes on disk\)"):
        TensorFolder(tmp_path)


def test_shards_are_checked_one_by_one(tmp_path):
    shard(tmp_path, one={"a": torch.zeros(3)}, two={"b": torch.zeros(3)})
    TensorFolder(tmp_path).check()
    (tmp_path / "two.safetensors").write_bytes((tmp_path / "two.safetensors").read_bytes()[:-2])
    for read in (TensorFolder.check, list, lambda folder: folder.tensor("b")):
        with pytest.raises(DataError, match=r"two.safetensors is damaged"):
            read(TensorFolder(tmp_path))
    (tmp_path / "two.safetensors").unlink()
    for read in (TensorFolder.check, list, lambda folder: folder.tensor("b")):
        with pytest.raises(DataError, match=r"lacks the shard 'two.safetensors'"):
            read(TensorFolder(tmp_path))
    assert torch.equal(TensorFolder(tmp_path).tensor("a"), torch.zeros(3))


def test_a_shard_of_another_model(tmp_path):
    shard(tmp_path, one={"a": torch.zeros(3)}, two={"b": torch.zeros(3)})
    save_file({"c": torch.zeros(3)}, tmp_path / "two.safetensors")
    folder = TensorFolder(tmp_path)
    for read in (folder.check, lambda: list(folder)):
        with pytest.raises(DataError, match=r"two.safetensors lacks the tensor 'b', which the index puts there"):
            read()
    with pytest.raises(DataError, match=r"two.safetensors is damaged or cut short \(.*'?b'?"):
        folder.tensor("b")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match=r"index.json is no index of safetensors shards"):
        TensorFolder(tmp_path)


def test_an_index_that_leaves_its_folder_is_refused(tmp_path):
    mapping = {"a": "../secret.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    with pytest.raises(DataError, match=r"names the shard '../secret.safetensors', which lies outside"):
        TensorFolder(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no model.safetensors; it holds pytorch_model.bin.*Pickled"):
        TensorFolder(tmp_path)
    with pytest.raises(DataError, match=r"nowhere has no model.safetensors; it holds nothing"):
        TensorFolder(tmp_path / "nowhere")
