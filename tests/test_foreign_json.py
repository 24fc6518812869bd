"""Everything that reads JSON of others, given what JSON can be at its worst: an error of ours, and no other."""

import json

import pytest
import torch

from lightning_interp.core.storage.files import atomic_write_bytes, atomic_write_text
from lightning_interp.core.storage.tensor_files import save_tensors
from lightning_interp.core.weights.tensors import TensorFolder
from lightning_interp.errors import InterpError
from lightning_interp.grafting import GraftPlan
from lightning_interp.models.scoring.reward_sources import read_text_settings
from lightning_interp.models.sources.adapters import adapter_base
from lightning_interp.models.sources.pretrained import LoadOptions, load_folder
from lightning_interp.rate import read_effects, read_own, read_rewrites
from lightning_interp.steering import ConceptProbe, CounterfactualPairs, SteeringVector
from lightning_interp.steering.concepts.moments import ClassMoments
from lightning_interp.testing import byte_tokenizer, tiny_model

DEEP, WIDE = b"[" * 100_000, b'{"a":' * 2000 + b"1" + b"}" * 2000
WORST = {
    "deep lists": DEEP + b"]" * 100_000,
    "deep objects": WIDE,
    "a cut one": DEEP,
    "a long number": b"9" * 5000,
    "a huge number": b"[1e999]",
    "a number": b"1",
    "nothing": b"",
    "no text": b"\xff\xfe",
    "half a character": b'{"a": "\\ud800"}',
    "a list": b"[1]",
    "null": b"null",
}


def _tensors(metadata_key, form):
    def read(data, folder):
        text = data.decode("utf-8", "replace")
        save_tensors(folder / "a.safetensors", {"direction": torch.ones(2)}, {"format": form, metadata_key: text})
        return folder / "a.safetensors"

    return read


def _file(name):
    return lambda data, folder: atomic_write_bytes(folder / name, data).parent


def _model(folder):
    atomic_write_text(folder / "tokenizer.json", "{}")
    return load_folder(folder, LoadOptions())


READERS = {
    "plan": (lambda data, folder: data.decode("utf-8", "replace"), GraftPlan.from_json),
    "pairs": (_file("pairs.json"), lambda folder: CounterfactualPairs.load(folder / "pairs.json")),
    "vector": (_tensors("about", "lightning_interp.steering_vector/1"), SteeringVector.load),
    "probe": (_tensors("probe", "lightning_interp.concept_probe/1"), ConceptProbe.load),
    "moments": (_tensors("facts", "lightning_interp.class_moments/1"), ClassMoments.load),
    "config": (_file("config.json"), _model),
    "adapter": (_file("adapter_config.json"), adapter_base),
    "index": (_file("model.safetensors.index.json"), lambda folder: TensorFolder(folder).check()),
    "reward text": (_file("reward_text.json"), read_text_settings),
    "rewrites": (_file("a.json"), lambda folder: read_rewrites(folder / "a.json")),
    "effects": (_file("a.json"), lambda folder: read_effects(folder / "a.json")),
    "own texts": (_file("a.jsonl"), lambda folder: read_own(folder / "a.jsonl").units),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("worst", WORST)
def test_whatever_json_can_be(reader, worst, tmp_path):
    put, read = READERS[reader]
    place = put(WORST[worst], tmp_path)
    with pytest.raises(InterpError):
        read(place)


def test_equal_keys_are_refused_in_files_of_ours_and_read_as_others_read_them(tmp_path):
    with pytest.raises(InterpError, match="the key 'head' is there twice"):
        GraftPlan.from_json('{"head": "donor", "head": "follow", "rules": []}')
    atomic_write_text(
        tmp_path / "adapter_config.json",
        json.dumps({"base_model_name_or_path": "x/a"})[:-1] + ', "base_model_name_or_path": "x/b"}',
    )
    assert adapter_base(tmp_path)[0] == "x/b"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**300),
        ("hidden_size", "x"),
        ("num_attention_heads", 0),
        ("num_attention_heads", []),
        ("vocab_size", None),
        ("intermediate_size", -1),
        ("model_type", {"a": 1}),
        ("rope_parameters", [1]),
        ("num_hidden_layers", "many"),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 10**30),
        ("num_hidden_layers", 1e30),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("vocab_size", -5),
        ("text_config", {"n_layer": 10**6}),
    ],
)
def test_a_model_whose_configuration_makes_no_sense(key, value, model_folder, tmp_path):
    for path in model_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    atomic_write_text(
        tmp_path / "config.json", json.dumps(json.loads((model_folder / "config.json").read_text()) | {key: value})
    )
    with pytest.raises(InterpError):
        load_folder(tmp_path, LoadOptions())
