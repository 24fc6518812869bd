"""Model files made locally: a tiny folder in Hugging Face format and a tiny ``.gguf`` file."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from lightning_interp.testing import byte_tokenizer, tiny_model

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _interleaved(name, array):
    """llama.cpp keeps the two halves of each rotary head interleaved."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-1])
    if heads is None:
        return array
    rows, width = array.shape
    return array.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(path, kind=None):
    """A tiny llama as a ``.gguf`` file, the linear maps of its blocks quantised to ``kind``; gives the model."""
    tokenizer = byte_tokenizer()
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])] + ["th"]
    model = tiny_model("llama", vocab_size=len(tokens))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(4)
    writer.add_context_length(1024)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 5 + [1] * 257)
    writer.add_token_merges(["t h", "t h"])  # of one alone, transformers before 5.23 makes three
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name in _GGUF_TOP:
            writer.add_tensor(_GGUF_TOP[name], array)
            continue
        layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        target = f"blk.{layer}.{_GGUF_NAMES[part]}.weight"
        array = np.ascontiguousarray(_interleaved(part, array))
        if kind is not None and array.ndim == 2:
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="session")
def _tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model("llama", seed=3).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_folder(_tiny_folder, tmp_path) -> Path:
    """A tiny llama (seed 3) with the byte tokenizer, for this test alone."""
    return Path(shutil.copytree(_tiny_folder, tmp_path / "tiny-model"))


@pytest.fixture(scope="session")
def _gguf_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "whole.gguf")
    write_gguf(folder / "quantised.gguf", gguf.GGMLQuantizationType.Q4_1)
    return folder


@pytest.fixture
def gguf_file(_gguf_files, tmp_path) -> Path:
    """A tiny llama in float32 in a ``.gguf`` file."""
    return Path(shutil.copy(_gguf_files / "whole.gguf", tmp_path / "whole.gguf"))


@pytest.fixture
def quantised_gguf(_gguf_files, tmp_path) -> Path:
    """The same tiny llama with its linear maps in Q4_1."""
    return Path(shutil.copy(_gguf_files / "quantised.gguf", tmp_path / "quantised.gguf"))
