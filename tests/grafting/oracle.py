"""The sequential definition of weight grafting: slow, token after token, with real weight copies and no hooks.

Nothing here uses the package. Which parameters make up a component is written down by hand from the module trees of
the families, so that a wrong entry in the package's own table shows as a difference.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

Cell = tuple[str, int | None]

# Component -> the modules that it is made of, below one block; "path|q" is the query part of a fused projection.
_LLAMA = {
    "ln_attn": ("input_layernorm",),
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "o": ("self_attn.o_proj",),
    "ln_mlp": ("post_attention_layernorm",),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj",),
    "down": ("mlp.down_proj",),
}
_GEMMA2 = {
    **_LLAMA,
    "ln_attn": ("input_layernorm", "post_attention_layernorm"),
    "ln_mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_NORMED = {"q": ("self_attn.q_proj", "self_attn.q_norm"), "k": ("self_attn.k_proj", "self_attn.k_norm")}


def _neox(attention: str) -> dict[str, tuple[str, ...]]:
    fused = f"{attention}.query_key_value"
    return {
        "ln_attn": ("input_layernorm",),
        **{piece: (f"{fused}|{piece}",) for piece in "qkv"},
        "o": (f"{attention}.dense",),
        "ln_mlp": ("post_attention_layernorm",),
        "up": ("mlp.dense_h_to_4h",),
        "down": ("mlp.dense_4h_to_h",),
    }


_BLOCKS = {
    "llama": _LLAMA,
    "gpt2": {
        "ln_attn": ("ln_1",),
        **{piece: (f"attn.c_attn|{piece}",) for piece in "qkv"},
        "o": ("attn.c_proj",),
        "ln_mlp": ("ln_2",),
        "up": ("mlp.c_fc",),
        "down": ("mlp.c_proj",),
    },
    "gpt_neox": _neox("attention"),
    "gemma2": _GEMMA2,
    "bloom": _neox("self_attention"),
    "opt": {
        "ln_attn": ("self_attn_layer_norm",),
        "q": ("self_attn.q_proj",),
        "k": ("self_attn.k_proj",),
        "v": ("self_attn.v_proj",),
        "o": ("self_attn.out_proj",),
        "ln_mlp": ("final_layer_norm",),
        "up": ("fc1",),
        "down": ("fc2",),
    },
    "qwen2_moe": {**{k: v for k, v in _LLAMA.items() if k not in ("gate", "up", "down")}, "moe": ("mlp",)},
    "gemma3": {**_GEMMA2, **_NORMED},
    "qwen3": {**_LLAMA, **_NORMED},
    "phi3": {
        **_LLAMA,
        **{piece: (f"self_attn.qkv_proj|{piece}",) for piece in "qkv"},
        "gate": ("mlp.gate_up_proj|gate",),
        "up": ("mlp.gate_up_proj|up",),
    },
}
_LLAMA_SHARED = {"embed": ("model.embed_tokens",), "final_norm": ("model.norm",), "unembed": ("lm_head",)}
_SHARED = {
    "gpt2": {
        "embed": ("transformer.wte",),
        "pos_embed": ("transformer.wpe",),
        "final_norm": ("transformer.ln_f",),
        "unembed": ("lm_head",),
    },
    "gpt_neox": {
        "embed": ("gpt_neox.embed_in",),
        "final_norm": ("gpt_neox.final_layer_norm",),
        "unembed": ("lm_head",),
    },
    "bloom": {
        "embed": ("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
        "final_norm": ("transformer.ln_f",),
        "unembed": ("lm_head",),
    },
    "opt": {
        "embed": ("model.decoder.embed_tokens",),
        "pos_embed": ("model.decoder.embed_positions",),
        "final_norm": ("model.decoder.final_layer_norm",),
        "unembed": ("lm_head",),
    },
}
_STACKS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "bloom": "transformer.h",
    "opt": "model.decoder.layers",
}
TIED = ("gpt2", "gemma2", "bloom", "opt", "gemma3")
FUSED = ("gpt2", "gpt_neox", "bloom", "phi3")

_FFN = {"gate", "up", "down", "moe"}
_ATTN = {"q", "k", "v"}


def layer_components(family: str) -> list[str]:
    """Names of the components in each block of a family."""
    return list(_BLOCKS[family])


def shared_components(family: str) -> list[str]:
    """Names of the components of which the family has one."""
    return list(_SHARED.get(family, _LLAMA_SHARED))


def all_cells(family: str, n_layers: int) -> set[Cell]:
    """Everything that can be grafted."""
    blocks = {(name, layer) for name in _BLOCKS[family] for layer in range(n_layers)}
    return blocks | {(name, None) for name in shared_components(family)}


def cells_of(family: str, names: Iterable[str], layers: Iterable[int], n_layers: int) -> set[Cell]:
    """Cells of names and groups; a group holds what lies outside of the blocks only with all layers."""
    inside, outside = set(_BLOCKS[family]), set(shared_components(family))
    groups = {
        "ATTN": inside & _ATTN,
        "O": {"o"},
        "FFN": inside & _FFN,
        "FFN_UP": inside & {"gate", "up"},
        "FFN_DOWN": inside & {"down"},
        "NORMS": inside & {"ln_attn", "ln_mlp"},
        "BLOCK": inside,
        "PAPER_ALL": inside | {"embed"},
        "ALL": inside | outside,
    }
    layers, chosen = set(layers), set()
    if not layers:
        return chosen
    for name in names:
        members = groups.get(name, {name})
        chosen |= {(m, layer) for m in members & inside for layer in layers}
        if name not in groups or len(layers) == n_layers:
            chosen |= {(m, None) for m in members & outside}
    return chosen


@dataclass(frozen=True)
class Rule:
    """One rule in the definition's own terms: token indices, cells, and which donor (1, 2, ...)."""

    positions: frozenset[int]
    cells: frozenset[Cell]
    source: int = 1


def assignment(
    length: int, rules: Sequence[Rule], *, head: str = "recipient", final_norm: str = "recipient", donor: int = 1
) -> list[dict[Cell, int]]:
    """For each token, the donor of each cell that does not come from the recipient: the last matching rule decides.

    ``head`` and ``final_norm`` overrule the rules unless they are ``follow``; ``donor`` is the one they mean.
    """
    table: list[dict[Cell, int]] = []
    for t in range(length):
        row: dict[Cell, int] = {}
        for rule in rules:
            if t in rule.positions:
                row = dict.fromkeys(rule.cells, rule.source)
        for cell, switch in ((("unembed", None), head), (("final_norm", None), final_norm)):
            if switch != "follow":
                row.pop(cell, None)
            if switch == "donor":
                row[cell] = donor
        table.append(row)
    return table


class Oracle:
    """Assembles a third model for every token and feeds it that token.

    Args:
        family: Which hand-written table to use.
        recipient: Source 0; plain, without adapters.
        donors: Sources 1, 2, ...
        untie: Give the third model an unembedding of its own. Off only to show what a shared tensor does.
        one_by_one: Feed every token alone. Else neighbours with the very same weights are fed together, which a plain
            model does alike, several times faster.
    """

    def __init__(
        self, family: str, recipient: nn.Module, *donors: nn.Module, untie: bool = True, one_by_one: bool = False
    ) -> None:
        self.family, self.config, self.one_by_one = family, recipient.config, one_by_one
        self.third = copy.deepcopy(recipient).eval()
        if untie:
            head = self.third.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone())
        self.target = _tensors(self.third)
        self.sources = [_tensors(model) for model in (recipient, *donors)]
        self._row: Mapping[Cell, int] = {}

    def tensors_of(self, cell: Cell) -> list[tuple[str, torch.Tensor | None]]:
        """Parameter names of a cell, and which output features of each belong to it (None for all)."""
        name, layer = cell
        if layer is None:
            paths, prefix = _SHARED.get(self.family, _LLAMA_SHARED)[name], ""
        else:
            paths = _BLOCKS[self.family][name]
            prefix = f"{_STACKS.get(self.family, 'model.layers')}.{layer}."
        found = []
        for path in paths:
            module, _, piece = path.partition("|")
            index = self._features(piece) if piece else None
            found += [(n, index) for n in self.target if n.startswith(f"{prefix}{module}.")]
        return found

    def _features(self, piece: str) -> torch.Tensor:
        heads = self.config.num_attention_heads
        size = self.config.hidden_size // heads
        if piece in ("gate", "up"):  # the gate's features, then as many of the up projection
            wide = self.config.intermediate_size
            return torch.arange(wide) + (wide if piece == "up" else 0)
        if self.family == "phi3":  # all queries, then the keys and the values of fewer heads
            few = self.config.num_key_value_heads * size
            starts = {"q": 0, "k": heads * size, "v": heads * size + few}
            return torch.arange(heads * size if piece == "q" else few) + starts[piece]
        place = "qkv".index(piece)
        if self.family == "gpt2":  # all queries, all keys, all values
            return torch.arange(place * heads * size, (place + 1) * heads * size)
        starts = [(head * 3 + place) * size for head in range(heads)]  # query, key, value of each head in turn
        return torch.cat([torch.arange(start, start + size) for start in starts])

    @torch.no_grad()
    def assemble(self, row: Mapping[Cell, int]) -> nn.Module:
        """The model whose cells come from the donors that ``row`` names."""
        before, self._row = self._row, dict(row)
        for cell in sorted({*before, *row}, key=str):
            if before.get(cell, 0) == row.get(cell, 0):
                continue
            for name, index in self.tensors_of(cell):
                target, new = self.target[name], self.sources[row.get(cell, 0)][name]
                if index is None:
                    target.copy_(new)
                else:
                    axis = target.dim() - 1 if self.family == "gpt2" else 0  # Conv1D keeps [in, out]
                    target.index_copy_(axis, index, new.index_select(axis, index))
        return self.third

    @torch.no_grad()
    def logits(self, ids: Sequence[int], table: Sequence[Mapping[Cell, int]]) -> torch.Tensor:
        """Logits ``[T, vocabulary]`` of one prompt without padding."""
        cache, rows = DynamicCache(config=self.config), []
        alike = itertools.groupby(range(len(ids)), key=lambda t: (t if self.one_by_one else 0, table[t]))
        for tokens in (list(group) for _, group in alike):
            model = self.assemble(table[tokens[0]])
            cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
            where = {} if self.family == "bloom" else {"position_ids": torch.tensor([tokens])}
            output = model(torch.tensor([[ids[t] for t in tokens]]), **{cache_name: cache}, use_cache=True, **where)
            rows.append(output.logits[0])
        return torch.cat(rows)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.data for name, p in model.named_parameters(remove_duplicate=False)}
