"""Reward models on disk as transformers, PEFT and TRL leave them, and their scores by transformers alone."""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from lightning_interp.testing import byte_tokenizer, tiny_model

DECODERS, ENCODERS = ("llama", "gpt2", "opt"), ("bert", "roberta", "distilbert", "deberta-v2", "electra", "modernbert")
WORDS = "say more what fine words a rather long text about nothing at all ok film good bad".split()
PROMPTS = ["say more", "say", "what", "say more", "a film"]
TEXTS = ["fine words", "a", "a rather long text about nothing at all", "ok", "good"]
OUTPUTS = {
    "one": (1, None, lambda logits: logits[:, 0]),
    "index": (3, 2, lambda logits: logits[:, 2]),
    "name": (3, "kind", lambda logits: logits[:, 1]),
    "weights": (3, [0.5, -1.0, 2.0], lambda logits: logits @ torch.tensor([0.5, -1.0, 2.0])),
    "named weights": (3, {"kind": 1.0, "long": -0.25}, lambda logits: logits[:, 1] - 0.25 * logits[:, 2]),
}


def word_pairs(kind):
    """A tokenizer of words that writes one text and two as the family's own does."""
    first, last = ("<s>", "</s>") if kind == "roberta" else ("[CLS]", "[SEP]")
    specials = ["[PAD]", "[UNK]", first, last]
    core = Tokenizer(WordLevel({word: place for place, word in enumerate([*specials, *WORDS])}, unk_token="[UNK]"))  # noqa: S106
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    between = f"{last} {last}" if kind == "roberta" else f"{last}"
    second = "0" if kind == "roberta" else "1"
    core.post_processor = TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {between} $B:{second} {last}:{second}",
        special_tokens=[(first, 2), (last, 3)],
    )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if second == "1" else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        cls_token=first,
        sep_token=last,
        model_max_length=64,
        model_input_names=names,
        **({"bos_token": first, "eos_token": last} if kind == "roberta" else {}),
    )


def config_of(kind, labels):
    more = {"num_labels": labels, "id2label": {0: "good", 1: "kind", 2: "long"}} if labels > 1 else {"num_labels": 1}
    if kind in DECODERS:
        config = tiny_model(kind).config
        for name, value in more.items():
            setattr(config, name, value)
        return config
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    small = {"vocab_size": 4 + len(WORDS), "max_position_embeddings": 66, "pad_token_id": 0}
    own = {
        "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16},
        "deberta-v2": {**size, "type_vocab_size": 2, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "electra": {**size, "embedding_size": 16},
    }
    more |= own.get(kind, size)
    if kind == "modernbert":
        more |= {
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "classifier_pooling": "cls",
        }
    return AutoConfig.for_model(kind, **small, **more)


@cache
def _model_of(kind, labels):
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config_of(kind, labels)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def model_of(kind, labels=1):
    """A classifier in which every weight matters."""
    return copy.deepcopy(_model_of(kind, labels))


def tokenizer_of(kind, *, chat=True):
    tokenizer = byte_tokenizer() if kind in DECODERS else word_pairs(kind)
    if not chat:
        tokenizer.chat_template = None
    return tokenizer


@cache
def _saved(kind, labels, chat):
    kept = tempfile.TemporaryDirectory()  # goes with the process
    _model_of(kind, labels).save_pretrained(kept.name)
    tokenizer_of(kind, chat=chat).save_pretrained(kept.name)
    return kept


def saved(folder, kind, *, labels=1, chat=False):
    """A folder of transformers, the test's own; gives the path."""
    return shutil.copytree(_saved(kind, labels, chat).name, folder)


@cache
def _with_adapter(kind, labels):
    from peft import LoraConfig, get_peft_model

    kept = tempfile.TemporaryDirectory()
    base = Path(kept.name) / "base"
    (tiny_model(kind) if kind in DECODERS else _model_of(kind, labels)).save_pretrained(base)
    tokenizer_of(kind, chat=False).save_pretrained(base)
    torch.manual_seed(5)
    config = config_of(kind, labels)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    targets = {"gpt2": ["c_attn"], "distilbert": ["q_lin", "v_lin"], "modernbert": ["Wqkv"]}.get(kind)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=targets or "all-linear", base_model_name_or_path=str(base)
    )
    wrapped = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(Path(kept.name) / "adapter")
    return kept, wrapped.eval()


def with_adapter(folder, kind, *, labels=1):
    """A folder of PEFT, the test's own; gives its path, that of the model below it, and the model with the adapter."""
    kept, wrapped = _with_adapter(kind, labels)
    shutil.copytree(f"{kept.name}/adapter", folder)
    return folder, Path(kept.name) / "base", copy.deepcopy(wrapped)


CARD = """---
base_model: org/base
library_name: transformers
model_name: {name}
tags:
- generated_from_trainer
- reward-trainer
- trl
licence: license
---

# Model Card for {name}

It has been trained using [TRL](https://github.com/huggingface/trl).

### Framework versions

- TRL: {version}
- Transformers: 5.0.0
"""


def leave_card(folder, version="1.2.0"):
    """The model card of TRL's reward trainer."""
    (folder / "README.md").write_text(CARD.format(name=folder.name, version=version))


def leave_arguments(folder, monkeypatch, **settings):
    """The arguments that TRL's reward trainer leaves, pickled by torch under the name of its class."""
    module = ModuleType("trl.trainer.reward_config")
    kind = type("RewardConfig", (), {"__module__": module.__name__})
    module.RewardConfig = kind
    for name in ("trl", "trl.trainer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    arguments = kind()
    arguments.__dict__.update({"max_length": 1024, **settings})
    torch.save(arguments, folder / "training_args.bin")


_loaded = {}  # of theirs(), by what is in the files


def theirs(folder, rows, model=None, dtype=torch.float32, *, together=False):
    """Logits by transformers alone, row by row or in one padded batch; a row is a text, or a prompt and a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    if model is None:
        content = [(Path(folder) / name).read_bytes() for name in ("config.json", "model.safetensors")]
        if (key := (*content, dtype)) not in _loaded:
            _loaded[key] = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        model = _loaded[key]
    batches = [list(zip(*rows, strict=True))] if together else [[[part] for part in row] for row in rows]
    with torch.no_grad():
        given = [tokenizer(*map(list, batch), return_tensors="pt", padding=together) for batch in batches]
        return torch.cat([model.eval()(**one).logits.float() for one in given])
