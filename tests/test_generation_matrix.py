"""Every way to generate x every selector x steering, dual steering, grafts: one masked pass over the text, or refused.

What a selector means is said again here, token by token, and put on one plain pass over the finished text: for steering
by a hook of this file's own, for dual steering and grafts by masks that are spelt out. A way that cannot be told apart
must be refused with the remedy; none may differ without a word.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch.distributed import HashStore, destroy_process_group, init_process_group
from transformers import GenerationConfig
from transformers.cache_utils import QuantizedLayer
from transformers.generation.streamers import BaseStreamer

from lightning_interp import AddDirection, DualSteering, Graft, GraftPlan
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.kv_cache import cache_argument, cache_of
from lightning_interp.core.tokens.positions import (
    All,
    ChatTemplate,
    FromBatch,
    Generated,
    GenerationSteps,
    Last,
    Prompt,
    Span,
    Substring,
    Tokens,
)
from lightning_interp.errors import IncompatibleModelError, PositionError
from lightning_interp.grafting.intervention import DECODE
from lightning_interp.grafting.plan import GraftRule
from lightning_interp.testing import byte_tokenizer, tiny_pair

TOKENIZER, NEW, SITE = byte_tokenizer(), 5, Site("resid_post", 1)
DIRECTION = 3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
TEXTS = ("aba ab abab", "ab a ba")  # repeats, so that prompt lookup proposes something


@functools.cache
def model_and_donor():
    return tiny_pair("llama")


def batch_of(texts, side="left"):
    found = TOKENIZER(list(texts), return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


# What a selector means in a row: of the finished text's real tokens (ids), of which the first p are the prompt's.


def marked(p):
    return {i for i in range(p) if i % 3 == 1}


SELECTORS = {
    "All": (All(), lambda ids, p: set(range(len(ids)))),
    "Last": (Last(), lambda ids, p: set(range(p - 1, len(ids)))),
    "Last(2)": (Last(2), lambda ids, p: set(range(p - 2, len(ids)))),
    "Span": (Span(1, 3), lambda ids, p: {1, 2}),
    "Span from the end": (Span(-3, -1), lambda ids, p: {p - 3, p - 2}),
    "Span beyond": (Span(3, 99, strict=False), lambda ids, p: set(range(3, len(ids)))),
    "Tokens": (Tokens(TOKENIZER.encode("a", add_special_tokens=False)), lambda ids, p: spelt(ids, "a", len(ids))),
    "Substring": (Substring("b", "last"), lambda ids, p: {max(spelt(ids, "b", p))}),
    "not Substring": (~Substring("b", "all"), lambda ids, p: set(range(len(ids))) - spelt(ids, "b", p)),
    "ChatTemplate": (ChatTemplate(), lambda ids, p: set(range(p))),  # a text without turns is all template
    "FromBatch": (FromBatch("marked"), lambda ids, p: marked(p)),
    "Prompt": (Prompt(), lambda ids, p: set(range(p))),
    "Generated": (Generated(), lambda ids, p: set(range(p, len(ids)))),
    "Generated window": (Generated(1, 3), lambda ids, p: {p + 1, p + 2}),
    "GenerationSteps": (GenerationSteps(0, 2), lambda ids, p: {p - 1, p}),
    "not Prompt or first": (~Prompt() | Span(0), lambda ids, p: {0, *range(p, len(ids))}),
}


def spelt(ids, letter, stop):
    (wanted,) = TOKENIZER.encode(letter, add_special_tokens=False)
    return {i for i in range(stop) if ids[i] == wanted}


# The ways. Each writes with a model that something is attached to and returns what `generate` did.


def settings(**more):
    return {
        "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_logits": True, "output_scores": more.get("num_beams", 1) > 1, **more,
    }  # fmt: skip


def plainly(model, batch, attachment, **more):
    return model.generate(**batch, **settings(**more))


def by_config(model, batch, attachment):
    return model.generate(**batch, generation_config=GenerationConfig(**settings(use_cache=False)))


def sampled(model, batch, attachment, **more):
    torch.manual_seed(0)
    return plainly(model, batch, attachment, do_sample=True, **more)


def embeddings(model, batch):
    return model.get_input_embeddings()(batch["input_ids"]).detach()


def embedded(model, batch, attachment, embeds):
    return model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **settings())


def positional(model, batch, attachment):
    return model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **settings())


def prefixed(model, batch, attachment, *, columns=6, whole=True, told=False, copied=False):
    """The first columns in a pass of their own, whose cache generate goes on with."""
    if told:
        attachment.prompt_lengths = batch["attention_mask"].sum(1)
    cut = {name: tensor[:, :columns] for name, tensor in batch.items()}
    where = (cut["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = cache_of(model(**cut, position_ids=where, use_cache=True))
    cache = copy.deepcopy(cache) if copied else cache
    ids = batch["input_ids"] if whole else batch["input_ids"][:, columns:]
    given = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    return model.generate(**given, **cache_argument(model, cache), **settings())


def looped(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """A decoding loop of somebody's own, given as custom_generate: greedy, the prompt in two passes."""
    mask, cache, logits = kwargs["attention_mask"], None, []
    mask = torch.ones_like(input_ids) if mask is None else mask
    done = 0
    for stop in (4, input_ids.shape[1]):
        where = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, done:]
        out = model(
            input_ids[:, done:stop], attention_mask=mask[:, :stop], position_ids=where, use_cache=True,
            **({} if cache is None else cache_argument(model, cache)),
        )  # fmt: skip
        cache, done = cache_of(out), stop
    for _ in range(NEW):
        logits.append(out.logits[:, -1])
        scores = logits_processor(input_ids, logits[-1].clone())
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        where = (mask.cumsum(1) - 1)[:, -1:]
        out = model(input_ids[:, -1:], attention_mask=mask, position_ids=where, **cache_argument(model, cache))
        cache = cache_of(out)
    return Written(input_ids, logits)


def contrastive(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Contrastive search as custom_generate: candidates of each row in one pass, of which the cache keeps one."""
    mask, logits, k = kwargs["attention_mask"], [], 2
    mask = torch.ones_like(input_ids) if mask is None else mask
    out = model(input_ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
    cache, last = cache_of(out), out.logits[:, -1]
    for _ in range(NEW):
        logits.append(last)
        tried = logits_processor(input_ids, last.clone()).topk(k).indices.flatten()[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        cache.batch_repeat_interleave(k)
        many = mask.repeat_interleave(k, 0)
        where = (many.cumsum(1) - 1)[:, -1:]
        out = model(tried, attention_mask=many, position_ids=where, **cache_argument(model, cache))
        flattest = out.logits[:, -1].softmax(-1).amax(-1).reshape(-1, k).argmin(1)
        kept = flattest + torch.arange(len(mask)) * k
        cache.batch_select_indices(kept)
        input_ids, last = torch.cat([input_ids, tried[kept]], 1), out.logits[kept, -1]
    return Written(input_ids, logits)


def padded(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """A custom_generate that reads another text: as given, but with more padding before it."""
    mask = kwargs["attention_mask"]
    mask = torch.ones_like(input_ids) if mask is None else mask
    ids, mask = (torch.cat([x.new_zeros(len(x), 2), x], 1) for x in (input_ids, mask))
    return looped(model, ids, logits_processor, stopping_criteria, generation_config, attention_mask=mask)


class Written:
    def __init__(self, sequences, logits):
        self.sequences, self.logits = sequences, logits


def by_hand(model, batch, attachment, *, pieces=(None,), told=False):
    """A loop of one's own around the forward pass, the prompt in pieces."""
    if told:
        attachment.prompt_lengths = batch["attention_mask"].sum(1)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache, done, logits = None, 0, []
    with torch.no_grad():
        for stop in (*pieces, *range(ids.shape[1] + 1, ids.shape[1] + NEW)):
            stop = ids.shape[1] if stop is None else stop
            where = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, done:]
            given = {"attention_mask": mask[:, :stop], "position_ids": where, "use_cache": True}
            out = model(ids[:, done:stop], **given, **({} if cache is None else cache_argument(model, cache)))
            cache, done = cache_of(out), stop
            if stop >= batch["input_ids"].shape[1]:
                logits.append(out.logits[:, -1])
                scores = logits[-1].clone()
                scores[:, model.config.eos_token_id] = -torch.inf
                ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return Written(ids, logits)


class Streamer(BaseStreamer):
    def put(self, value): ...

    def end(self): ...


def streamed(model, batch, attachment):
    """In a thread of its own, as transformers shows it for streamers."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(plainly, model, batch, attachment, streamer=Streamer()).result()


def inferred(model, batch, attachment):
    with torch.inference_mode():
        return plainly(model, batch, attachment)


def synced(model, batch, attachment):
    """As one of several processes, which go on until the last one ends."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        return plainly(model, batch, attachment, synced_gpus=True)
    finally:
        destroy_process_group()


class Unrounded(QuantizedLayer):
    """What a quantised cache does with keys and values, but for the rounding."""

    def __init__(self, *_, **__):
        super().__init__(residual_length=3)

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


def quantised(model, batch, attachment, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.cache_utils.QuantoQuantizedLayer", Unrounded)
        return plainly(model, batch, attachment, cache_implementation="quantized", **more)


def prefix_cache(model, batch):
    cut = {name: tensor[:, :6] for name, tensor in batch.items()}
    with torch.no_grad():
        return cache_of(model(**cut, position_ids=(cut["attention_mask"].cumsum(1) - 1).clamp(min=0), use_cache=True))


def after_prefix(model, batch, attachment, cache):
    return model.generate(**batch, **cache_argument(model, cache), **settings())


@functools.cache
def assistant():
    return copy.deepcopy(model_and_donor()[1])


@dataclass
class Way:
    """How to write, what must be refused (everything else must be right), and the policies that grafts work with."""

    write: Callable
    rows: int = 2
    before: Callable | None = None
    refused: Collection[str] = ()
    side: str = "left"
    graft: Collection[str] = DECODE

    def expanded(self, batch, written):
        return {name: x.repeat_interleave(len(written.sequences) // len(x), 0) for name, x in batch.items()}


def sample(ways, selectors, *more, shift=0, every=1):
    """Every cell, of which one selector for ``every`` so many ways runs by default, and the others as slow tests."""
    cells, names = [], list(selectors)
    for w, way in enumerate(ways):
        for s, name in enumerate(names):
            for m, rest in enumerate(itertools.product(*more)):
                thin = (
                    w % every == 0
                    and (5 * w + w // every + 3 * shift) % len(names) == s
                    and m == w % max(1, math.prod(map(len, more)))
                )
                cells.append(pytest.param(way, name, *rest, marks=() if thin else pytest.mark.slow))
    return cells


def using(**more):
    return functools.partial(plainly, **more)


PHASED = {
    "Last", "Last(2)", "Span from the end", "Prompt", "Generated", "Generated window", "GenerationSteps",
    "not Prompt or first",
}  # fmt: skip
TEXT = {"Substring", "not Substring", "ChatTemplate"}
EARLY = {"All", "Span", "Span beyond", "Tokens", "FromBatch", "Prompt", "not Prompt or first"} | (TEXT - {"Substring"})
AT_THE_END = {"Last", "Last(2)", "Span", "Span from the end", "GenerationSteps", "Substring", "FromBatch"}

# The third entry is what must be refused; everything else must be right.
WAYS = {
    "greedy": Way(using()),
    "ids by place": Way(positional),
    "no cache": Way(using(use_cache=False)),
    "no cache by config": Way(by_config),
    "sampling": Way(sampled),
    "several samples": Way(functools.partial(sampled, num_return_sequences=2)),
    "samples without cache": Way(functools.partial(sampled, num_return_sequences=2, use_cache=False)),
    "beams": Way(using(num_beams=3)),
    "beams without cache": Way(using(num_beams=2, use_cache=False)),
    "several beams": Way(using(num_beams=3, num_return_sequences=2)),
    "chunks": Way(using(prefill_chunk_size=3)),
    "chunks of one": Way(using(prefill_chunk_size=1)),
    "chunked beams": Way(using(prefill_chunk_size=4, num_beams=2)),
    "prompt lookup": Way(using(prompt_lookup_num_tokens=4), rows=1),
    "assistant": Way(lambda m, b, a: plainly(m, b, a, assistant_model=assistant()), rows=1),
    "itself as assistant": Way(lambda m, b, a: plainly(m, b, a, assistant_model=m), rows=1),
    "early exit as assistant": Way(using(assistant_early_exit=2), rows=1),
    "a loop as custom_generate": Way(using(custom_generate=looped)),
    "embeddings": Way(
        embedded,
        before=embeddings,
        refused=TEXT | {"Tokens"},
        graft=set(DECODE) - {"donor"},  # whose embeddings too
    ),
    "a prefix": Way(prefixed, refused=AT_THE_END),
    "a copied prefix": Way(functools.partial(prefixed, copied=True), refused=AT_THE_END),
    "the rest after a prefix": Way(functools.partial(prefixed, whole=False), refused=AT_THE_END),
    "a prefix, told": Way(functools.partial(prefixed, told=True), refused=TEXT | {"FromBatch"}),
    "a prefix from before": Way(after_prefix, before=prefix_cache, refused=EARLY),
    "a loop": Way(by_hand),
    "a loop in pieces": Way(
        functools.partial(by_hand, pieces=(4, None)), refused=PHASED | TEXT | {"FromBatch", "Span"}, graft=()
    ),
    "a loop in pieces, told": Way(
        functools.partial(by_hand, pieces=(4, None), told=True), refused=TEXT | {"FromBatch"}
    ),
    "static cache": Way(using(cache_implementation="static"), refused=set(SELECTORS)),
    "guidance": Way(using(guidance_scale=1.5), refused=PHASED | TEXT | {"FromBatch", "Span"}, graft=()),
    "right padding": Way(using(), side="right", refused=PHASED | TEXT | {"Span"}, graft=()),
    "a streamer": Way(streamed, rows=1),
    "inference mode": Way(inferred),
    "hybrid cache": Way(using(cache_implementation="hybrid")),  # dynamic, as of old configurations
    "quantised cache": Way(quantised),
    "quantised cache in chunks": Way(functools.partial(quantised, prefill_chunk_size=3)),
    "contrastive search": Way(using(custom_generate=contrastive)),
    "another text": Way(using(custom_generate=padded), refused=PHASED | TEXT | {"FromBatch", "Span"}, graft=()),
    "several processes": Way(synced),
}


def final_mask(name, sequences, batch, rolling=True):
    """The selector's tokens in the finished text ``[B, L]``, as its meaning says; and of these, the prompt's."""
    meaning, width = SELECTORS[name][1], batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones(len(sequences), sequences.shape[1] - width).long()], 1).bool()
    chosen = torch.zeros_like(mask)
    for row in range(len(mask)):
        columns = mask[row].nonzero().flatten()
        p = int(batch["attention_mask"][row].sum())
        picked = [i for i in meaning(sequences[row, columns].tolist(), p) if i < len(columns)]
        chosen[row, columns[picked]] = True
    return mask, chosen


def once(model, sequences, mask, width):
    """Logits of one pass over everything but the last token, which no pass has read."""
    where = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
    where[:, width:] = where[:, width - 1 :][:, :1] + torch.arange(1, mask.shape[1] - width + 1)  # as generate counts
    with torch.no_grad():
        return model(sequences[:, :-1], attention_mask=mask[:, :-1].long(), position_ids=where[:, :-1]).logits


def steered_once(model, sequences, mask, width, chosen):
    hook = model.model.layers[1].register_forward_hook(lambda _, __, x: x + chosen[:, :-1, None] * DIRECTION)
    try:
        return once(model, sequences, mask, width)
    finally:
        hook.remove()


def with_masks(intervention, model, sequences, mask, width, **masks):
    with intervention.attach(model) as attachment:
        attachment.batch = {name: given[:, :-1] for name, given in masks.items()}
        return once(model, sequences, mask, width)


def dual(positions):
    return DualSteering(DIRECTION, kl_budget=0.3, positions=positions)


def agree(written, batch, expected, width):
    """The logits that each new token was chosen by, or the score of each beam."""
    new = written.sequences[:, width:]
    if getattr(written, "sequences_scores", None) is not None:
        told = expected[:, width - 1 :].log_softmax(-1).gather(2, new[..., None])[..., 0].mean(1)
        torch.testing.assert_close(written.sequences_scores, told, atol=2e-4, rtol=1e-4)
    else:
        found = torch.stack(tuple(written.logits), 1)
        torch.testing.assert_close(found, expected[:, width - 1 :], atol=1e-3, rtol=1e-4)


def outcome(way, intervention, batch, refused):
    """What the way wrote, or None where it was refused as it should be."""
    model = copy.deepcopy(model_and_donor()[0])
    prepared = way.before(model, batch) if way.before else None
    with intervention.attach(model, tokenizer=TOKENIZER) as attachment:
        rows = batch["attention_mask"]
        marks = (rows.cumsum(1) - 1) % 3 == 1
        attachment.batch = {"marked": marks & rows.bool()}
        given = () if prepared is None else (prepared,)
        if refused:
            with pytest.raises((PositionError, IncompatibleModelError), match=REMEDY):
                way.write(model, batch, attachment, *given)
            return None
        written = way.write(model, batch, attachment, *given)
    prompt = way.expanded(batch, written)["input_ids"]  # of embeddings or the rest of a text no ids come back
    written.sequences = torch.cat([prompt, written.sequences[:, -NEW:]], 1)
    return written


REMEDY = r"(?i)\b(pass|set|attach|call|generate|use|put|mark)\b"


def case(way, selector):
    batch = batch_of(TEXTS[: WAYS[way].rows], WAYS[way].side)
    return WAYS[way], SELECTORS[selector][0], batch


@pytest.mark.parametrize(("way", "selector"), sample(WAYS, SELECTORS))
def test_steering(way, selector):
    how, positions, batch = case(way, selector)
    steer = AddDirection(DIRECTION, site=SITE, positions=positions)
    written = outcome(how, steer, batch, selector in how.refused)
    if written is not None:
        expanded, width = how.expanded(batch, written), batch["input_ids"].shape[1]
        mask, chosen = final_mask(selector, written.sequences, expanded)
        agree(written, expanded, steered_once(model_and_donor()[0], written.sequences, mask, width, chosen), width)


@pytest.mark.parametrize(("way", "selector"), sample(WAYS, SELECTORS, shift=1, every=4))
def test_dual_steering(way, selector):
    how, positions, batch = case(way, selector)
    written = outcome(how, dual(positions), batch, selector in how.refused)
    if written is not None:
        expanded, width = how.expanded(batch, written), batch["input_ids"].shape[1]
        mask, chosen = final_mask(selector, written.sequences, expanded)
        expected = with_masks(dual(FromBatch("m")), model_and_donor()[0], written.sequences, mask, width, m=chosen)
        agree(written, expanded, expected, width)


@pytest.mark.parametrize(("way", "selector", "decode"), sample(WAYS, SELECTORS, DECODE, shift=2, every=2))
def test_grafts(way, selector, decode):
    how, positions, batch = case(way, selector)
    recipient, donor = model_and_donor()
    written = outcome(
        how,
        Graft(donor, GraftPlan.at(positions, "BLOCK"), decode=decode),
        batch,
        selector in how.refused or decode not in how.graft,
    )
    if written is None:
        return
    expanded, width = how.expanded(batch, written), batch["input_ids"].shape[1]
    mask, chosen = final_mask(selector, written.sequences, expanded)
    new = torch.arange(mask.shape[1]) >= width
    last = chosen[torch.arange(len(mask)), width - 1]
    later = {
        "recipient": torch.zeros_like(chosen),
        "donor": torch.zeros_like(chosen),
        "like_last": last[:, None].expand_as(chosen),
        "outside": torch.zeros_like(chosen) if selector.startswith("Last") else chosen,
    }[decode]
    located = torch.where(new, later, chosen)
    rules = (GraftRule(FromBatch("m"), "BLOCK"), GraftRule(FromBatch("new"), "PAPER_ALL", "none", others=True))
    plan = GraftPlan(rules if decode == "donor" else rules[:1])
    expected = with_masks(
        Graft(donor, plan), recipient, written.sequences, mask, width, m=located, new=new.expand_as(mask)
    )
    agree(written, expanded, expected, width)


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ({"dola_layers": "low"}, "requires `trust_remote_code=True`"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "requires `trust_remote_code=True`"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "requires `trust_remote_code=True`"),
        ({"num_beams": 4, "force_words_ids": [[[5]]]}, "requires `trust_remote_code=True`"),
        ({"cache_implementation": "quantized", "cache_config": {"backend": "hqq"}}, "hqq"),
        ({"use_cache": False, "prefill_chunk_size": 3}, "without a cache"),
    ],
)
def test_ways_that_transformers_itself_refuses(way, says):
    model, _ = model_and_donor()
    steer = AddDirection(DIRECTION, site=SITE, positions=Generated())
    with steer.attach(model), pytest.raises((ValueError, ImportError), match=says):
        model.generate(**batch_of(TEXTS[:1]), **settings(**way))


@pytest.mark.parametrize(
    "family",
    ["gemma2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma3", "gpt2", "bloom", "opt", "qwen2_moe"))],
)
def test_ways_agree_in_other_families(family):
    """Sliding windows, absolute positions and experts: greedy decoding by every way gives one text."""
    recipient, donor = tiny_pair(family)
    batch = batch_of(TEXTS[:1])
    ways = [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}]
    where = Last() | Span(1, 3)
    for intervention in (
        AddDirection(DIRECTION, site=SITE, positions=where),
        Graft(donor, GraftPlan.at(where, "BLOCK"), decode="like_last"),
    ):
        with intervention.attach(recipient):
            texts = [recipient.generate(**batch, **settings(**way)).sequences.tolist() for way in ways]
        assert texts == texts[:1] * len(ways)
        assert texts[0] != recipient.generate(**batch, **settings()).sequences.tolist()
