"""An attached model's `generate` tells its prompt, and is the plain method again afterwards; what cannot be told."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import CompileConfig

from lightning_interp import ActivationCapture, AddDirection, Graft, GraftPlan
from lightning_interp.core.hooks.intervention import Intervention
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.generation import read_generation
from lightning_interp.core.tokens.kv_cache import cache_argument, cache_of
from lightning_interp.core.tokens.positions import (
    All,
    FromBatch,
    Generated,
    GenerationSteps,
    Last,
    Prompt,
    Span,
    Substring,
    Tokens,
)
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import CompiledModelError, PositionError
from lightning_interp.steering import LinearDecay, ProbeGate
from lightning_interp.testing import byte_tokenizer, tiny_model, tiny_pair

SITE = Site("resid_post", 1)
IDS = torch.tensor([[11, 12, 11, 12, 13, 11, 12]])
HOW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
VECTOR = 2 * torch.randn(32, generator=torch.Generator().manual_seed(1))


class Watch(Intervention):
    def __init__(self, positions=None):
        self.positions, self.steps, self.masks = positions or All(), [], []

    def sites(self, model_map):
        return (SITE,)

    def transform(self, site, x, step):
        self.steps.append(step)
        self.masks.append(step.choose(self.positions, x))
        return x


def names(model):
    return METHODS & set(vars(model))


METHODS = {"generate", "init_continuous_batching", "get_compiled_call"}


def test_the_method_comes_back_in_any_order():
    model = tiny_model("llama")
    signature = inspect.signature(model.generate)
    first, second, third = (Watch().attach(model) for _ in range(3))
    assert inspect.signature(model.generate) == signature
    for attachment in (second, third, first):
        assert names(model) == METHODS
        attachment.remove()
        attachment.remove()
    assert not names(model)


def test_somebodys_own_generate_comes_back():
    model = tiny_model("llama")
    calls, plain = [], model.generate
    model.generate = own = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    with Watch(Generated()).attach(model):
        model.generate(IDS, **HOW, use_cache=False)
    assert calls == [1]
    assert vars(model)["generate"] is own


def test_what_is_put_around_it_stays():
    model = tiny_model("llama")
    attachment = Watch().attach(model)
    ours = model.generate
    model.generate = around = lambda *args, **kwargs: ours(*args, **kwargs)
    attachment.remove()
    assert vars(model)["generate"] is around
    assert model.generate(IDS, **HOW).shape == (1, 12)


def test_a_copy_generates_by_itself():
    model = tiny_model("llama")
    with AddDirection(VECTOR, site=SITE).attach(model):
        steered = model.generate(IDS, **HOW)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301
    plain = model.generate(IDS, **HOW)
    assert not torch.equal(steered, plain)
    for twin in twins:
        assert twin.generate.__self__ is twin
        assert torch.equal(twin.generate(IDS, **HOW), plain)


def test_nothing_is_remembered_of_a_call_that_failed():
    model, watch = tiny_model("llama"), Watch(Prompt())
    with watch.attach(model):
        with pytest.raises(RuntimeError, match="out of luck"):
            model.generate(IDS, **HOW, logits_processor=[lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck"))])
        with torch.no_grad():
            model(IDS.repeat(1, 2))
    assert [int(mask.sum()) for mask in watch.masks] == [7, 14]


def grow(model, ids, **more):
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, model(ids, **more).logits[:, -1:].argmax(-1)], 1)


@pytest.mark.parametrize("positions", [Generated(), Last(), Prompt(), Span(-2, -1), GenerationSteps()])
@pytest.mark.parametrize("how", ["class", "backbone", "loop"])
def test_a_text_that_grows_without_a_cache_is_refused_where_nobody_tells(how, positions):
    model = tiny_model("llama")
    steer = AddDirection(VECTOR, site=SITE, positions=positions)
    with steer.attach(model.model if how == "backbone" else model) as attachment:
        run = {
            "class": lambda: type(model).generate(model, IDS, **HOW, use_cache=False),
            "backbone": lambda: model.generate(IDS, **HOW, use_cache=False),
            "loop": lambda: grow(model, IDS, use_cache=False),
        }[how]
        with pytest.raises(PositionError, match=r"came again with one more token \(8 columns.*Set attachment"):
            run()
        attachment.prompt_lengths = torch.tensor([7])
        run()
        attachment.prompt_lengths = None
        with torch.no_grad():
            model(IDS)
            model(torch.cat([IDS + 1, IDS[:, :1]], 1))  # another text, longer by one


# Several texts in turns


def written(model, ids):
    """Logits of a loop of one's own, one pass at a time."""
    given = {}
    for _ in range(3):
        with torch.no_grad():
            out = model(ids, use_cache=True, **given)
        given, ids = cache_argument(model, cache_of(out)), out.logits[:, -1:].argmax(-1)
        yield out.logits[:, -1]


def grafted(decode):
    return lambda donor: Graft(donor, GraftPlan.at(Tokens((12,)), "BLOCK"), decode=decode)


HELD = ProbeGate(VECTOR, above=0.0, site="resid_post.0", hold=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda _: AddDirection(VECTOR, site=SITE, positions=Generated(1, 3)),
        lambda _: AddDirection(VECTOR, site=SITE, positions=GenerationSteps(0, 2) | Span(-1, 0)),
        lambda _: AddDirection(VECTOR, site=SITE, schedule=LinearDecay(3)),
        lambda _: AddDirection(VECTOR, site=SITE, positions=HELD),
        grafted("like_last"),
    ],
    ids=["window", "steps", "schedule", "held gate", "like_last"],
)
@pytest.mark.parametrize("told", [False, True])
def test_texts_in_turns_do_not_mix(make, told):
    model, donor = tiny_pair("llama")
    texts = [IDS, torch.tensor([[12, 14, 15]])]
    with make(donor).attach(model) as attachment:
        alone = [list(written(model, ids)) for ids in texts]
        loops = [written(model, ids) for ids in texts]
        for each in zip(*alone, strict=True):
            for ids, loop, logits in zip(texts, loops, each, strict=True):
                attachment.prompt_lengths = torch.tensor([ids.shape[1]]) if told else None
                torch.testing.assert_close(next(loop), logits)


def test_texts_that_grow_in_turns_are_noticed():
    model = tiny_model("llama")
    texts = [IDS, IDS + 1]
    with AddDirection(VECTOR, site=SITE, positions=Last()).attach(model), torch.no_grad():
        grown = [torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1) for ids in texts]
        for ids in grown:
            with pytest.raises(PositionError, match="came again with one more token"):
                model(ids)


@pytest.mark.parametrize(
    "make", [lambda _: AddDirection(VECTOR, site=SITE, positions=Generated()), grafted("like_last")]
)
def test_a_generate_inside_of_another_has_its_own_prompt(make):
    model, donor = tiny_pair("llama")
    other, inside = torch.tensor([[12, 14, 15]]), []

    def ask(ids, scores):
        inside.append(model.generate(other, **how).tolist())
        return scores

    how = {**HOW, "max_new_tokens": 3, "min_new_tokens": 3}
    with make(donor).attach(model):
        alone = [model.generate(ids, **how).tolist() for ids in (IDS, other)]
        assert model.generate(IDS, **how, logits_processor=[ask]).tolist() == alone[0]
    assert inside == [alone[1]] * 3


def longer(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """A custom_generate that puts a token before the prompt."""
    with torch.no_grad():
        out = model(torch.cat([input_ids[:, :1], input_ids], 1))
    return out.logits


@pytest.mark.parametrize("positions", [Generated(), Last(), FromBatch("m"), Substring("a", missing="ignore"), Span(1)])
def test_a_generate_that_reads_another_text_is_refused(positions):
    model = tiny_model("llama")
    steer = AddDirection(VECTOR, site=SITE, positions=positions)
    with steer.attach(model, tokenizer=byte_tokenizer()) as attachment:
        attachment.batch = {"m": torch.ones_like(IDS).bool()}
        with pytest.raises(PositionError, match="a pass reads another text than it was given"):
            model.generate(IDS, **HOW, custom_generate=longer)


def test_decoding_that_generate_compiles_is_refused(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "0")  # which transformers sets
    model = tiny_model("llama")
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # as on a GPU, where a static cache is all it takes
    with Watch().attach(model), pytest.raises(CompiledModelError, match="LlamaForCausalLM has something attached, whi"):
        model.generate(IDS, **HOW, cache_implementation="static", compile_config=config)


def test_continuous_batching_is_refused():
    model = tiny_model("llama")
    with Watch().attach(model):
        with pytest.raises(PositionError, match="LlamaForCausalLM has something attached, but continuous batching"):
            model.generate_batch([[1, 2, 3]])
        with pytest.raises(PositionError, match="continuous batching packs the tokens"):
            model.generate(IDS, cache_implementation="paged", max_new_tokens=2)


def test_texts_in_one_row_are_refused():
    model = tiny_model("llama")
    with Watch().attach(model), pytest.raises(PositionError, match="LlamaModel was given several texts in one row"):
        model(IDS, cu_seq_lens_q=torch.tensor([0, 3, 7]), cu_seq_lens_k=torch.tensor([0, 3, 7]))


# What is read off a call


def call(*args, **kwargs):
    config = kwargs.pop("config", SimpleNamespace())
    return read_generation(tiny_model("llama").generate, config, args, kwargs)


class Held(SimpleNamespace):
    def get_seq_length(self):
        return self.held


@pytest.mark.parametrize(
    ("args", "kwargs", "columns", "past", "knows_ids"),
    [
        ((IDS,), {}, 7, 0, True),
        ((), {"input_ids": IDS}, 7, 0, True),
        ((), {"inputs_embeds": torch.zeros(1, 7, 4)}, 7, 0, False),
        ((), {}, 1, 0, False),
        ((IDS,), {"past_key_values": Held(held=3)}, 7, 3, True),
        ((IDS,), {"cache": Held(held=3), "attention_mask": torch.ones(1, 7)}, 7, 3, True),
        ((IDS,), {"cache": Held(held=3), "attention_mask": torch.ones(1, 10)}, 10, 3, False),
    ],
)
def test_a_call_is_read(args, kwargs, columns, past, knows_ids):
    told = call(*args, **kwargs)
    assert (told.columns, told.past, told.ids is not None, told.doubt) == (columns, past, knows_ids, "")


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((IDS,), {"guidance_scale": 2.0}, "guidance_scale=2.0 runs a second text"),
        ((IDS,), {"config": SimpleNamespace(guidance_scale=3.0)}, "guidance_scale=3.0"),
        ((IDS,), {"generation_config": SimpleNamespace(token_healing=True)}, "token_healing=True writes the end"),
        ((IDS,), {"cache": Held(held=9)}, "it was given 7 columns, but the cache holds 9"),
        ((["a text"],), {}, "no prompt of token ids"),
    ],
)
def test_a_call_that_does_not_tell_is_in_doubt(args, kwargs, why):
    assert why in call(*args, **kwargs).doubt
    told = call(*args, **kwargs)
    with pytest.raises(
        PositionError, match=r"Where the prompt ends in this call of generate is not known: .*Generate w"
    ):
        _ = StepContext(1, 7, generation=told).phase


# Virtual tokens of prompt learning are no tokens of the text


LEARNERS = {
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def learner(name):
    torch.manual_seed(0)
    recipient, donor = tiny_pair("llama")
    return get_peft_model(recipient, LEARNERS[name]).eval(), donor


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # PEFT's own call
@pytest.mark.parametrize("name", LEARNERS)
def test_positions_do_not_count_virtual_tokens(name):
    model, _ = learner(name)
    ids, mask = torch.cat([IDS, IDS]), torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    expected = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
    for given in ({"attention_mask": mask}, {}):
        watch = Watch(Span(1, 3) | Last())
        with watch.attach(model), torch.no_grad():
            model(input_ids=ids, **given)
        found = watch.steps[0].positions[:, -7:]
        assert torch.equal(found, expected if given else torch.arange(7).expand(2, -1))
        assert watch.masks[0][0].nonzero().flatten().tolist() == [i + watch.steps[0].length - 7 for i in (1, 2, 6)]


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # PEFT's own call
@pytest.mark.parametrize("name", LEARNERS)
def test_a_graft_acts_behind_virtual_tokens(name):
    model, donor = learner(name)
    logits = {}
    for where, plan in {
        "no": GraftPlan(),
        "first": GraftPlan.at(Span(0, 1), "BLOCK"),
        "all": GraftPlan.at(All(), "BLOCK"),
    }.items():
        with Graft(donor, plan).attach(model), torch.no_grad():
            logits[where] = model(input_ids=IDS).logits[:, -7:]
    with torch.no_grad():
        assert torch.equal(logits["no"], model(input_ids=IDS).logits[:, -7:])
    assert all((logits["no"] - logits[w]).abs().max() > 1e-3 for w in ("first", "all"))
    assert torch.equal(logits["no"][:, 0], logits["all"][:, 0]) is False


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("cache", [True, False])
def test_generation_behind_virtual_tokens(name, cache):
    """PEFT leaves its tokens out, or puts them in twice, under some versions of transformers: seen, not assumed."""
    model, _ = learner(name)
    watch = Watch(GenerationSteps(0, 2) | Span(0, 1))
    ours, peft = (PositionError, "put its 3 virtual tokens into the text again"), (RuntimeError, "cannot be multiplied")
    with watch.attach(model):
        try:
            model.generate(input_ids=IDS, **HOW, use_cache=cache)
        except (PositionError, RuntimeError) as error:
            if not any(isinstance(error, kind) and text in str(error) for kind, text in (ours, peft)):
                raise
    for step, mask in zip(watch.steps, watch.masks, strict=True):
        start = step.past - step.virtual  # of the text, which begins in this pass where it is negative
        assert mask[0].nonzero().flatten().tolist() == [i - start for i in (0, 6, 7) if 0 <= i - start < step.length]
    assert watch.steps


def test_without_its_adapter_there_are_no_virtual_tokens():
    model, _ = learner("prefix")
    watch = Watch(Span(0, 1))
    with watch.attach(model), torch.no_grad(), model.disable_adapter():
        model(input_ids=IDS)
    assert watch.masks[0].tolist() == [[True] + [False] * 6]


def test_a_lora_wrappers_generate_tells_too():
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    watch = Watch(Generated())
    with watch.attach(model):
        model.generate(input_ids=IDS, **HOW, use_cache=False)
    assert [mask.sum().item() for mask in watch.masks] == [0, 1, 2, 3, 4]


# Prefixes, and what else rests on passes


def prefix(model, columns=4):
    with torch.no_grad():
        return cache_of(model(IDS[:, :columns], use_cache=True))


@pytest.mark.parametrize("positions", [All(), Prompt(), Span(2), Span(3, 5), ~Last()])
def test_a_selector_in_a_prefix_that_is_cached_is_refused(positions):
    model = tiny_model("llama")
    for make in (
        lambda: AddDirection(VECTOR, site=SITE, positions=positions),
        lambda: ActivationCapture([SITE], positions=positions),
    ):
        cache = prefix(model)
        with make().attach(model), pytest.raises(PositionError, match=r"cached before attaching.*Attach before"):
            model.generate(IDS, **HOW, **cache_argument(model, cache))
        cache = prefix(model)
        with make().attach(model), pytest.raises(PositionError, match="cached already: 4 columns were cached before"):
            model(IDS[:, 4:], **cache_argument(model, cache))


def test_a_capture_behind_a_prefix_has_its_own_columns():
    model, capture = tiny_model("llama"), ActivationCapture([SITE], positions=Span(5, 7))
    whole = ActivationCapture([SITE])
    with whole.attach(model), torch.no_grad():
        model(IDS)
    cache = prefix(model)
    with capture.attach(model), torch.no_grad():
        model(IDS[:, 4:], **cache_argument(model, cache))
    torch.testing.assert_close(capture.activations[SITE], whole.activations[SITE][0, 5:7])


@pytest.mark.parametrize("how", ["generate", "pass"])
def test_a_mask_of_new_tokens_behind_a_prefix_is_refused(how):
    recipient, donor = tiny_pair("llama")
    cache = prefix(recipient)
    with Graft(donor, GraftPlan.at(FromBatch("m"))).attach(recipient) as attachment:
        attachment.batch = {"m": torch.tensor([[True, False, True]])}
        given = cache_argument(recipient, cache)
        run = {
            "generate": lambda: recipient.generate(IDS, **HOW, **given),
            "pass": lambda: recipient(IDS[:, 4:], **given),
        }
        with pytest.raises(PositionError, match="Mask 'm' covers 3 columns, but the prompt has 7"):
            run[how]()


def test_what_a_cache_knows_goes_with_its_copies_and_not_into_files():
    model = tiny_model("llama")
    with AddDirection(VECTOR, site=SITE).attach(model):
        cache = prefix(model)
        first = model.generate(IDS, **HOW, **cache_argument(model, copy.deepcopy(cache)))
        second = model.generate(IDS, **HOW, **cache_argument(model, copy.deepcopy(cache)))
        assert torch.equal(first, second)
        assert torch.equal(first, model.generate(IDS, **HOW))
        loaded = pickle.load(io.BytesIO(pickle.dumps(cache)))  # noqa: S301
        with pytest.raises(PositionError, match="4 columns were cached before attaching"):
            model.generate(IDS, **HOW, **cache_argument(model, loaded))


def test_history_of_rejected_candidates_is_refused():
    model, capture = tiny_model("llama"), ActivationCapture([SITE], keep="all")
    with capture.attach(model):
        model.generate(IDS, **HOW)
        with pytest.raises(PositionError, match="holds candidates for new tokens that were rejected"):
            model.generate(IDS, **HOW, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("more", [{"use_cache": False}, {"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 3}])
def test_schedules_follow_new_tokens_in_every_way(more):
    model = tiny_model("llama")
    how = {"attention_mask": torch.ones_like(IDS), **HOW}
    with AddDirection(VECTOR, site=SITE, schedule=LinearDecay(3)).attach(model):
        assert torch.equal(model.generate(IDS, **how, **more), model.generate(IDS, **how))


@pytest.mark.parametrize("more", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}])
def test_a_held_gate_decides_once_in_every_way(more):
    model = tiny_model("llama")
    for above in (-100.0, 100.0):
        gate = ProbeGate(VECTOR, above=above, site="resid_post.0", hold=True)
        with AddDirection(VECTOR, site=SITE, positions=gate).attach(model):
            assert torch.equal(model.generate(IDS, **HOW, **more), model.generate(IDS, **HOW))


def test_a_held_gate_in_chunks_is_refused():
    model, gate = tiny_model("llama"), ProbeGate(VECTOR, above=0.0, site="resid_post.0", hold=True)
    steer = AddDirection(VECTOR, site=SITE, positions=gate)
    with steer.attach(model), pytest.raises(PositionError, match="a chunk of 2"):
        model.generate(IDS, **HOW, prefill_chunk_size=2)


def test_like_last_without_the_prompt_is_refused():
    recipient, donor = tiny_pair("llama")
    cache = prefix(recipient, 7)
    with (
        Graft(donor, GraftPlan.at(Last()), decode="like_last").attach(recipient),
        pytest.raises(PositionError, match="has not seen the prompt's last token of these 1 rows"),
    ):
        recipient(IDS[:, :1], **cache_argument(recipient, cache))
