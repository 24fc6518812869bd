"""Adapters on a server: a name is of one set of weights, and a real server answers as the model does here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from served import completion, serving

from lightning_interp.errors import DataError, ManifestError, RecipeError
from lightning_interp.generation import (
    EndpointGenerator,
    LocalSampler,
    Pace,
    TextRequest,
    read_shards,
    serve_adapter,
    unload_adapter,
    write_shards,
)
from lightning_interp.testing import byte_tokenizer, tiny_model

pytestmark = pytest.mark.skipif(find_spec("openai") is None, reason="the extra [endpoint] is not installed")

LACKING = [name for name in ("fastapi", "uvicorn", "pydantic") if find_spec(name) is None]
PACE = Pace(max_retries=0, max_concurrency=1, sleep=lambda seconds: None)


def adapter(folder, seed=0):
    """A PEFT folder."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    return folder


def vllm(served):
    """Answers as vLLM does: plain text, and an error for a name that is taken or unknown."""

    def answer(body):
        if "lora_path" in body:
            assert body["lora_name"] not in served.models
            served.models.append(body["lora_name"])
            return f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        if "lora_name" in body:
            served.models.remove(body["lora_name"])
            return "Success"
        return completion(body["model"])

    return answer


class TestProtocol:
    def test_each_cycle_has_a_name_of_its_own(self, tmp_path):
        folders = [adapter(tmp_path / str(seed), seed) for seed in range(2)]
        with serving() as served:
            served.answer = vllm(served)
            writers = [serve_adapter(served.url, "cycle", folder, pace=PACE) for folder in folders]
            again = serve_adapter(served.url, "cycle", folders[0], pace=PACE)
            assert again.identity() == writers[0].identity() != writers[1].identity()
            loaded = [body for body in served.bodies if "lora_path" in body]
            assert [(one["lora_name"], one["lora_path"]) for one in loaded] == [
                (writer.model, str(folder)) for writer, folder in zip(writers, folders, strict=True)
            ]
            assert served.models == [writer.model for writer in writers]
            assert [writer.generate([TextRequest.chat("a")])[0].text for writer in writers] == served.models
            unload_adapter(writers[0])
            assert served.models == [writers[1].model]
        for writer in writers:
            name, _, sha = writer.identity()["name"].partition("@")
            assert (name, len(sha), writer.model) == ("cycle", 64, f"cycle-{sha[:12]}")

    def test_other_weights_in_the_same_folder_are_not_taken_for_the_old_ones(self, tmp_path):
        with serving() as served:
            served.answer = vllm(served)
            before = serve_adapter(served.url, "cycle", adapter(tmp_path, 0), pace=PACE)
            after = serve_adapter(served.url, "cycle", adapter(tmp_path, 1), pace=PACE)
            assert len(served.models) == 2
            write_shards(before, [TextRequest.chat("a")], tmp_path / "shards")
            with pytest.raises(ManifestError, match="holds texts of another run: its 'identity'"):
                write_shards(after, [TextRequest.chat("a")], tmp_path / "shards")

    def test_what_goes_wrong(self, tmp_path):
        folder = adapter(tmp_path / "a")
        with serving(script=[404]) as served:
            with pytest.raises(
                RecipeError, match=rf"{served.url}' did not answer 'load_lora_adapter' .*404: .*offers this"
            ):
                serve_adapter(served.url, "cycle", folder)
            url = served.url
        with pytest.raises(RecipeError, match=r"did not answer 'models' .*APIConnectionError"):
            serve_adapter(url, "cycle", folder)
        with pytest.raises(DataError, match=r"none' holds no weights that a server can load"):
            serve_adapter(url, "cycle", tmp_path / "none")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def transformers_serve(tmp_path):
    """The address of ``transformers serve`` on this machine, stopped afterwards."""
    port, log = free_port(), tmp_path / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as out:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=out, stderr=out, env=environment)
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        else:
            raise TimeoutError(log.read_text())
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.skipif(LACKING != [], reason=f"transformers serve needs {', '.join(LACKING)}")
@pytest.mark.timeout(300)
def test_a_real_server_answers_as_the_models_do_here(tmp_path, transformers_serve):
    """Two cycles, each a folder of whole weights: the most likely tokens, and resumable shards of them."""
    asked = [TextRequest.chat(text, max_new_tokens=8, temperature=0.0) for text in ("a", "Zoë!", "A fine film.")]
    tokenizer, names = byte_tokenizer(), []
    for seed in range(2):
        model, folder = tiny_model("llama", seed=seed), tmp_path / f"cycle-{seed}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        writer = serve_adapter(transformers_serve, f"cycle-{seed}", folder)
        assert isinstance(writer, EndpointGenerator)
        names.append(writer.identity()["name"])
        write_shards(writer, asked, tmp_path / f"shards-{seed}", shard_size=2)
        assert write_shards(writer, asked, tmp_path / f"shards-{seed}", shard_size=2).calls == 0
        here = LocalSampler(model, tokenizer).generate(asked)
        there = [row.completion for row in read_shards(tmp_path / f"shards-{seed}")]
        assert [one.text for one in there] == [one.text for one in here]
        assert [one.tokens_in for one in there] == [one.tokens_in for one in here]
    assert len(set(names)) == 2
    with pytest.raises(RecipeError, match=r"did not answer 'load_lora_adapter' .*404"):
        serve_adapter(transformers_serve, "cycle", adapter(tmp_path / "adapter"))
