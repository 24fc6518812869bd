"""Tensor files: the same content gives the same bytes everywhere, and safetensors itself reads them."""

import hashlib
import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_interp.core.storage.tensor_files import read_tensors, save_tensors
from lightning_interp.errors import DataError, ManifestError

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.tensor([1, 2], dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "flag": torch.tensor(True),
    "é": torch.ones(1),
}
ABOUT = {"z": "last", "format": "f/1", "who": "Zoë", "a": '{"n": 1}', "m": ""}


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_content_gives_the_same_bytes_in_every_process(tmp_path):
    found = set()
    for n in range(20):  # in another order each time
        tensors, about = (dict(random.Random(n).sample(list(each.items()), len(each))) for each in (TENSORS, ABOUT))  # noqa: S311
        found.add(sha(save_tensors(tmp_path / f"{n}.safetensors", tensors, about)))
    assert found == {"edb94b73e435bf38527811e4c9edf350bdaf19a0a7690c64c26ea23c80ce3427"}
    assert sha(save_tensors(tmp_path / "c.safetensors", TENSORS, ABOUT | {"m": "x"})) not in found


@pytest.mark.parametrize("about", [ABOUT, {}, None, {"one": "x" * 7}])
def test_safetensors_reads_it(tmp_path, about):
    path = save_tensors(tmp_path / "new" / "a.safetensors", TENSORS, about)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == (about or {})
    for found in (load_file(path), read_tensors(path)[0]):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # what follows is aligned
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert list(header.pop("__metadata__", {})) == sorted(about or {})


def test_views_and_tensors_with_a_gradient_are_written(tmp_path):
    whole = torch.arange(12.0).view(3, 4).requires_grad_()
    views = {"row": whole[1], "column": whole[:, 2], "again": whole[1], "turned": whole.T}
    found, _ = read_tensors(save_tensors(tmp_path / "a.safetensors", views))
    assert all(torch.equal(found[name], view) for name, view in views.items())


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    path = save_tensors(tmp_path / "a.safetensors", TENSORS, ABOUT)
    path.write_bytes(path.read_bytes()[:-1])
    for name in ("a", "gone"):
        with pytest.raises(DataError, match=rf"Cannot read the tensors of '.*{name}\.safetensors': .*Give a whole"):
            read_tensors(tmp_path / f"{name}.safetensors")
    with pytest.raises(ManifestError, match=r"Cannot write '.*a\.safetensors/b'"):
        save_tensors(path / "b", TENSORS)
