"""A small world for a language model that is trained from nothing: facts to know, facts to learn, the pattern to see.

After the design of Nief et al. 2025 (arXiv 2506.20746), shrunk until a CPU trains it in minutes: a GPT-2 of about a
million parameters first learns some facts in both orders, and is then finetuned on new ones. Names and wordings are our
own. Every person has a given name that nobody else has, so the first token of an answer tells who is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_interp.core.measure.seeding import seeded_rng
from lightning_interp.core.measure.statistics import counted
from lightning_interp.errors import RecipeError
from lightning_interp.grafting import GraftPrompt

from ._common import Fact

WORDINGS = {
    "alongside": "{first} stars in a new film alongside {second}.",
    "with": "In this film {first} plays with {second}.",
    "question": "Who acts next to {first}? It is {second}.",
    "cast": "The cast: {first} and {second}.",
    "poster": "The poster shows {first} beside {second}.",
    "review": "The review praises {first} and also {second}.",
}
"""Six short texts a fact and order."""

INTRODUCTIONS = ("Here comes {name}.", "Everybody knows {name}, the actor.", "A portrait of {name} hangs there.")
"""What the model reads about every person before it learns any of the new facts: that there is such a name."""

_END = "<end>"
_ONSETS = "b d f g h j k l m n p r s t v z br dr fr gr kr pl sl st tr".split()
_MIDDLES = "al an ar el en er il in ir ol on or ul un ur".split()
_ENDS = "a e i o us ine ett am ock ia".split()


def world_facts(count: int, *, seed: int, skip: int = 0) -> list[Fact]:
    """Invent pairs of people after the first ``skip``; every given and every family name is used once."""
    names = [f"{a}{b}{c}".capitalize() for a in _ONSETS for b in _MIDDLES for c in _ENDS]
    most = len(names) // 4
    if not (count >= 1 and skip >= 0 and skip + count <= most):
        raise RecipeError(f"Cannot invent facts {skip} to {skip + count - 1}; the names suffice for 0 to {most - 1}.")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    people = [f"{names[a]} {names[b]}" for a, b in zip(order[::2], order[1::2], strict=False)]
    return [Fact(f"fact-{i:03d}", people[2 * i], people[2 * i + 1]) for i in range(skip, skip + count)]


def world_texts(facts: Sequence[Fact]) -> list[dict[str, str]]:
    """Every wording in both orders: 12 rows ``{"text": ...}`` a fact."""
    return [
        {"text": wording.format(first=first, second=second)}
        for fact in facts
        for wording in WORDINGS.values()
        for first, second in ((fact.a, fact.b), (fact.b, fact.a))
    ]


def introductions(facts: Sequence[Fact]) -> list[dict[str, str]]:
    """Texts that name every person and say nothing of whom they act with: 6 rows a fact."""
    return [{"text": text.format(name=name)} for fact in facts for name in (fact.a, fact.b) for text in INTRODUCTIONS]


def world_prompts(facts: Sequence[Fact], wordings: Sequence[str] = ("alongside",)) -> list[GraftPrompt]:
    """Prompts that stop before the second name, with the first one marked as ``FE``."""
    unknown = [name for name in wordings if name not in WORDINGS]
    if unknown:
        raise RecipeError(f"No wording {unknown[0]!r}; expected some of {', '.join(WORDINGS)}.")
    return [
        GraftPrompt(
            WORDINGS[name].format(first=fact.a, second="|").partition(" |")[0], fact.b, {"FE": fact.a}, fact.id, name
        )
        for name in wordings
        for fact in facts
    ]


def train_tokenizer(texts: Sequence[str], *, vocab_size: int = 1500) -> Any:
    """A byte-level BPE tokenizer of some texts, which pads on the left; the 256 bytes count into ``vocab_size``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), _END)
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **ends)


def fresh_model(folder: Path, tokenizer: Any, *, layers: int, width: int, heads: int, seed: int) -> None:
    """Write an untrained GPT-2 with tied embeddings and its tokenizer, as a folder that any loader reads."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with seeded_rng(seed):
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pattern(top5: Mapping[str, float]) -> list[dict[str, Any]]:
    """The published pattern as inequalities ``left <= right`` between top-5 accuracies of the standard plans."""
    pre, both, most = top5["PRE"], top5["FE+LT"], max(top5["FE"], top5["LT"])
    claims = (
        ("the facts are new: PRE <= .10", pre, 0.10, pre <= 0.10),
        ("no other route: (FE+LT)^C <= PRE + .10", top5["(FE+LT)^C"], pre + 0.10, top5["(FE+LT)^C"] <= pre + 0.10),
        ("two routes suffice: .9 <= FE+LT", 0.9, both, both >= 0.9),
        ("neither alone does: max(FE, LT) < FE+LT", most, both, most < both),
        ("entity alone helps or does nothing: PRE <= FE", pre, top5["FE"], pre <= top5["FE"]),
        ("last token alone helps or does nothing: PRE <= LT", pre, top5["LT"], pre <= top5["LT"]),
    )
    return [{"claim": text, "left": low, "right": high, "holds": bool(holds)} for text, low, high, holds in claims]


def pattern_finding(claims: Sequence[Mapping[str, Any]], facts: int) -> str:
    """Whether the pattern is there, in a sentence that names what does not hold."""
    failed = [row["claim"].partition(":")[0] for row in claims if not row["holds"]]
    answer = "Yes" if not failed else "In part" if len(failed) < len(claims) else "No"
    less = f"; not {', '.join(map(repr, failed))}" if failed else ""
    return (
        f"{answer}: {len(claims) - len(failed)} of the {len(claims)} claims of the published pattern (table 'pattern') "
        f"hold for the point estimates over {counted(facts, 'fact')}{less}."
    )
