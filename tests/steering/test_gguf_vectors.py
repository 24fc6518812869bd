"""Control-vector files: the layout as the plain reader and writer of the gguf package see it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from lightning_interp import ModelMap, Site
from lightning_interp.errors import DataError, SiteError
from lightning_interp.steering import (
    AddDirection,
    SteeringVector,
    extract_vector,
    load_control_vector,
    save_control_vector,
)
from lightning_interp.testing import byte_tokenizer, tiny_model


def write(path, tensors, *, architecture="controlvector", hint="qwen2"):
    """A file as repeng writes it."""
    writer = GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", hint)
    writer.add_uint32(f"{architecture}.layer_count", len(tensors))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(reader, key):
    return bytes(reader.get_field(key).parts[-1]).decode()


def test_what_is_written_is_the_layout_that_llama_cpp_reads(tmp_path):
    vector = SteeringVector(
        {"resid_post.3": [1.0, -2.0, 0.5], "resid_post.1": [4.0, 0.0, 1.0]}, concept="mood", model_type="llama"
    )
    reader = GGUFReader(vector.save(tmp_path / "mood.gguf"))
    assert text(reader, "general.architecture") == "controlvector"
    assert text(reader, "controlvector.model_hint") == "llama"
    assert int(reader.get_field("controlvector.layer_count").parts[-1][0]) == 2
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == ["direction.1", "direction.3"]
    for layer, values in ((1, [4.0, 0.0, 1.0]), (3, [1.0, -2.0, 0.5])):
        tensor = found[f"direction.{layer}"]
        assert tensor.tensor_type == GGMLQuantizationType.F32
        assert [int(n) for n in tensor.shape] == [3]
        assert tensor.data.tolist() == values
    assert [file.name for file in tmp_path.iterdir()] == ["mood.gguf"]
    assert text(GGUFReader(save_control_vector(vector, tmp_path / "n.gguf", model_hint="smollm")),
                "controlvector.model_hint") == "smollm"  # fmt: skip


def test_a_file_of_another_program_is_read(tmp_path):
    directions = {f"direction.{n}": np.arange(1, 5, dtype=np.float32) * n for n in (2, 1)}
    more = {"direction.3": np.zeros(4, dtype=np.float32), "direction.4": np.full(4, 0.5, dtype=np.float16)}
    vector = SteeringVector.load(write(tmp_path / "theirs.gguf", {**directions, **more}))
    assert set(vector.sites) == {Site("resid_post", n) for n in (1, 2, 4)}  # 3 steers nothing
    assert vector.only("resid_post.2").tolist() == [2.0, 4.0, 6.0, 8.0]
    assert vector.only("resid_post.4").dtype == torch.float32
    assert (vector.concept, vector.model_type, vector.fingerprint) == ("theirs", "qwen2", None)


def test_our_own_come_back_whole(tmp_path):
    model = tiny_model("llama")
    vector = extract_vector(
        model, byte_tokenizer(), ["good day"], ["bad day"], site=["resid_post.1", "resid_post.2"], concept="mood"
    )
    again = load_control_vector(vector.save(tmp_path / "v.gguf"))
    assert again.describe() == vector.describe()
    assert all(torch.equal(again.only(site), vector.only(site)) for site in vector.sites)


def test_layer_n_is_added_to_the_output_of_block_n_counted_from_0(tmp_path):
    model, ids = tiny_model("llama"), torch.arange(5, 11)[None]
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / "v.gguf", {"direction.2": v.numpy()}, hint="llama")
    with AddDirection.load(path, strength=1.5).attach(model):
        found = model(ids).logits
    handle = ModelMap.build(model).blocks[2].register_forward_hook(lambda _, __, out: out + 1.5 * v)
    torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)
    handle.remove()


@pytest.mark.parametrize("site", ["resid_post.0", "resid_post.-1", "mlp_out.2", "unembed_in"])
def test_sites_that_the_layout_has_no_place_for(tmp_path, site):
    with pytest.raises(SiteError, match=rf"no place for {site} of SteeringVector\('mood'"):
        SteeringVector({site: [1.0]}, concept="mood").save(tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_control_vectors(tmp_path):
    v = np.ones(4, dtype=np.float32)
    path = tmp_path / "v.gguf"
    with pytest.raises(DataError, match=r"v.gguf does not exist"):
        load_control_vector(path)
    path.write_bytes(b"GGUF and then nothing")
    with pytest.raises(DataError, match=r"v.gguf is damaged.*21 bytes"):
        load_control_vector(path)
    with pytest.raises(DataError, match="of architecture 'llama'"):
        load_control_vector(write(path, {"direction.1": v}, architecture="llama"))
    with pytest.raises(DataError, match=r"its tensors are: output.weight"):
        load_control_vector(write(path, {"output.weight": v}))
    with pytest.raises(DataError, match=r"its tensors are: direction.1"):
        load_control_vector(write(path, {"direction.1": 0 * v}))
    with pytest.raises(DataError, match=r"direction.1 is F32 \[4, 2\]"):
        load_control_vector(write(path, {"direction.1": np.ones((2, 4), dtype=np.float32)}))
    with pytest.raises(DataError, match=r"direction.1 is I32 \[4\]"):
        load_control_vector(write(path, {"direction.1": np.ones(4, dtype=np.int32)}))
    with pytest.raises(DataError, match=r"v.gguf' is damaged: .* holds nan"):
        load_control_vector(write(path, {"direction.1": np.array([1, np.nan], dtype=np.float32)}))


def test_a_damaged_record_of_ours(tmp_path):
    path = SteeringVector({"resid_post.1": [1.0, 2.0]}, concept="mood").save(tmp_path / "v.gguf")
    path.write_bytes(path.read_bytes().replace(b'"concept"', b'"kolcept"'))
    with pytest.raises(DataError, match=r"v.gguf' is damaged.*kolcept"):
        load_control_vector(path)
