"""Adapters of every kind with weights that matter, and what they add in float64, worked out from their own tensors."""

from __future__ import annotations

import copy
import math

import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers.pytorch_utils import Conv1D

from lightning_interp.testing import tiny_model

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
}
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "c_attn": 2}, "alpha_pattern": {"down_proj": 5}},
    "rslora patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2, "c_attn": 1}},
    "tables": {"more": ["embed_tokens", "wte"]},
    "wide": {"r": 40},  # more than the modules' width of 32
    "dora": {"use_dora": True},
    "biased": {"lora_bias": True},
}


def shake(model, seed=0):
    """Give every adapter weight a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(family="llama", kind="lora", *, name="default", dtype=torch.float32, **settings):
    """A tiny model with an adapter."""
    settings = {"r": 4, "lora_alpha": 6, **KINDS[kind], **settings}
    targets = [*settings.pop("target_modules", TARGETS[family]), *settings.pop("more", [])]
    for patterns in ("rank_pattern", "alpha_pattern"):  # PEFT warns of those that match nothing
        if patterns in settings:
            settings[patterns] = {key: value for key, value in settings[patterns].items() if key in targets}
    settings |= {"fan_in_fan_out": family == "gpt2", "target_modules": targets, "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng(devices=[]):
        model = inject_adapter_in_model(LoraConfig(**settings), tiny_model(family), adapter_name=name)
    return shake(model).to(dtype)


def scale_of(config, path, rank):
    """``alpha / r`` or ``alpha / sqrt(r)``, with the configuration's patterns."""
    found = [alpha for pattern, alpha in config.alpha_pattern.items() if path.endswith(pattern)]
    alpha = found[0] if found else config.lora_alpha
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def updates(model, name="default"):
    """``scale B A`` ``[d_out, d_in]`` of every adapted module, as full matrices in float64."""
    found, parameters = {}, dict(model.named_parameters())
    for path, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        for pair in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            key = [f"{path}.{table}.{name}" for table in pair]
            tensors = [parameters.get(f"{k}.weight", parameters.get(k)) for k in key]
            if all(t is not None for t in tensors):
                down, up = (t.detach().double() for t in tensors)
                found[path] = scale_of(model.peft_config[name], path, len(down)) * up @ down
    return found


def merged(family, changes):
    """The plain model in float64 with full matrices added to its weights."""
    model = copy.deepcopy(tiny_model(family)).double()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # an adapter does not follow ties
    for path, update in changes.items():
        module = model.get_submodule(path)
        turned = isinstance(module, (Conv1D, torch.nn.Embedding))
        with torch.no_grad():
            module.weight.add_(update.T if turned else update)
    return model.eval()


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what makes a GPU's host wait, and notes the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.waits, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.waits += "_local_scalar_dense" in str(function)
        for each in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.numel())
        return found
