"""An adapter that is on at chosen cells alone: against decoding token by token with PEFT's own switch."""

from __future__ import annotations

import copy
import functools
import re
import warnings

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DynamicCache

from lightning_interp import FromBatch, Generated, Last, Prompt, Span, Substring
from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.sites import resolve_layers
from lightning_interp.core.tokens.kv_cache import cache_argument
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import IncompatibleModelError, PositionError, RecipeError, SiteError
from lightning_interp.grafting import AdapterDonor, Graft, GraftPlan
from lightning_interp.lora import GATE_MODULES, AdapterGate, GateSpec, named_gates, shared_with_train
from lightning_interp.testing import InterventionContract, byte_tokenizer, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]

TOKENIZER = byte_tokenizer()
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
LAYERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["embed_tokens"]},
    "biased": {"lora_bias": True},
}
NAMES = {f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")}
TEXT, ENTITY = "my Qwen is Qwen.", range(3, 7)


@functools.cache
def adapted(family="llama", dtype=torch.float64, kind="lora"):
    """A tiny model with an adapter whose every weight matters."""
    model = tiny_model(family, num_hidden_layers=2).to(dtype)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], "init_lora_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(**settings | {"fan_in_fan_out": family == "gpt2"} | LAYERS[kind])
        model = inject_adapter_in_model(config, model).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or "lora_B" in name:
                parameter.mul_(1.5 if "magnitude" in name else 0.2)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return adapted()


def ids_of(text=TEXT):
    return torch.tensor([TOKENIZER(text).input_ids])


def logits(model, ids=None, **inputs):
    with torch.no_grad():
        return model(ids_of() if ids is None else ids, **inputs).logits


def gated(model, spec, ids=None, adapter="default", **inputs):
    with AdapterGate(adapter, spec).attach(model, tokenizer=TOKENIZER):
        return logits(model, ids, **inputs)


def padded(*texts):
    batch = TOKENIZER(list(texts), padding=True, padding_side="left", return_tensors="pt")
    mask = batch["attention_mask"]
    return {"ids": batch["input_ids"], "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def switched(model, on):
    """The adapter on or off everywhere, by PEFT's switch."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(on)
    return model


def cell_of(path):
    """("q", 0) of "model.layers.0.self_attn.q_proj"."""
    return NAMES[path.rpartition(".")[2]], int(re.search(r"\.(\d+)\.", path)[1])


def token_by_token(model, ids, on, new=0):
    """Logits ``[T, V]`` and greedy tokens of feeding one token after the other, with ``on(position, cell)``."""
    model = copy.deepcopy(model)
    layers = [(cell_of(path), m) for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    cache, ids, found = DynamicCache(), ids.tolist(), []
    prompt = len(ids)
    for t in range(prompt + new):
        for cell, layer in layers:
            layer.enable_adapters(on(t, cell))
        found.append(logits(model, torch.tensor([[ids[t]]]), use_cache=True, **cache_argument(model, cache))[0, -1])
        if t >= prompt - 1 and len(ids) < prompt + new:
            ids.append(int(found[-1].argmax()))
    return torch.stack(found), ids[prompt:]


# Where a gate is on, row by row of the table: (in Q, in the mask) -> on; and of generated tokens by in the mask

KINDS = {
    "plain": ({}, lambda q, m: q and m, lambda m: False),
    "invert": ({"invert": True}, lambda q, m: not q and m, lambda m: m),
    "complement": ({"complement": True}, lambda q, m: not (q and m), lambda m: True),
    "no tokens": ({"tokens": None}, lambda q, m: m, lambda m: m),
}
MASKED = {"modules": "attn", "layers": "early"}


def in_mask(cell):
    return cell[0] in "qkvo" and cell[1] == 0


@pytest.mark.parametrize("decode", ["outside_q", "spec_mask", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_kinds_and_decode_policies(model, kind, decode):
    extra, prompt, outside = KINDS[kind]
    new = {
        "outside_q": outside,
        "spec_mask": lambda m: (not m) if kind == "complement" else m,
        "off": lambda m: False,
    }[decode]
    ids = ids_of()

    def on(t, cell):
        return prompt(t in ENTITY, in_mask(cell)) if t < ids.shape[1] else new(in_mask(cell))

    expected, tokens = token_by_token(model, ids[0], on, new=3)
    spec = GateSpec(**{"tokens": "Qwen", **MASKED, "decode": decode} | extra)
    answer, cache = torch.tensor([tokens]), DynamicCache()
    with AdapterGate("default", spec).attach(model, tokenizer=TOKENIZER) as attachment:
        made = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert made[0, ids.shape[1] :].tolist() == tokens
        kept = {"use_cache": True, **cache_argument(model, cache)}
        steps = [logits(model, part, **kept) for part in (ids, *answer.split(1, dim=1))]
        attachment.prompt_lengths = torch.tensor([ids.shape[1]])
        whole = logits(model, torch.cat([ids, answer], dim=1))
    torch.testing.assert_close(torch.cat(steps, dim=1)[0], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(whole[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_one_pass_equals_token_by_token(kind, dtype, most):
    ours = adapted(dtype=dtype, kind=kind)
    expected, _ = token_by_token(ours, ids_of()[0], lambda t, cell: t in (1, 5, 6) and cell[0] != "up")
    spec = GateSpec(tokens=[1, 5, 6], modules=["attn", "gate", "down"])
    found = gated(ours, spec)[0]
    assert float((found - expected).norm() / expected.norm()) < most
    assert not torch.allclose(logits(ours)[0], found, atol=1e-2)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "saved"])
def test_all_off_is_the_base_and_all_on_the_adapted_model_bit_for_bit(kind):
    ours = adapted(dtype=torch.float32, kind=kind)
    batch = padded("my Qwen", TEXT)
    base, full = (logits(switched(ours, on), **batch) for on in (False, True))
    assert not torch.allclose(base, full, atol=1e-3)
    off = [{"tokens": []}, {"tokens": [99]}, {"modules": []}, {"layers": "none"}, {"tokens": Span(0, 0, strict=False)}]
    off += [{"complement": True}, {"tokens": Prompt(), "invert": True}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for plain in off:
            assert torch.equal(gated(ours, GateSpec(**plain), **batch), base), plain
        for plain in ({}, {"tokens": [], "invert": True}, {"tokens": [], "complement": True}, {"tokens": Prompt()}):
            assert torch.equal(gated(ours, GateSpec(**plain), **batch), full), plain
    assert torch.equal(logits(ours, **batch), full)


def test_bias_of_the_adapter_itself_is_gated_with_it():
    ours = adapted("gpt2", dtype=torch.float32, kind="biased")
    base, full = (logits(switched(ours, on)) for on in (False, True))
    assert torch.equal(gated(ours, GateSpec(tokens=[])), base)
    assert torch.equal(gated(ours, GateSpec()), full)
    late = gated(ours, GateSpec(tokens=[-1]))
    torch.testing.assert_close(late[:, :-1], base[:, :-1], atol=1e-6, rtol=0)
    with Graft("default", GraftPlan.at(Last(), "PAPER_ALL")).attach(ours):
        torch.testing.assert_close(late, logits(ours), atol=0, rtol=0)


@given(first=st.integers(0, len(TEXT) - 1), invert=st.booleans())
@settings(max_examples=4)
def test_tokens_before_the_first_on_position_are_the_base(model, first, invert):
    base = logits(switched(model, False))
    chosen = list(range(first)) if invert else [first, -1]
    found = gated(model, GateSpec(tokens=chosen, invert=invert))
    torch.testing.assert_close(found[:, :first], base[:, :first], atol=1e-12, rtol=0)
    assert not torch.allclose(found[:, first], base[:, first], atol=1e-6)


def observed(model, spec, ids):
    """Where the adapter is on, told from what each adapted layer makes of what it is given: {cell: bool [T]}."""
    layers = {cell_of(path): m for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    x, out = {}, {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, cell=cell: x.update({cell: args[0][0]}))
        for cell, m in layers.items()
    ]
    try:
        with AdapterGate("default", spec).attach(model, tokenizer=TOKENIZER):
            for cell, m in layers.items():
                hooks.append(m.register_forward_hook(lambda _, __, y, cell=cell: out.update({cell: y[0]})))
            logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    on = {}
    for cell, m in layers.items():
        change = out[cell] - m.base_layer(x[cell])
        branch = m.lora_B["default"](m.lora_A["default"](x[cell])) * m.scaling["default"]
        off, on[cell] = change.norm(dim=-1) < 1e-10, (change - branch).norm(dim=-1) < 1e-10
        assert (off ^ on[cell]).all(), "neither on nor off"
    return on


@settings(max_examples=6)
@given(
    tokens=st.lists(st.integers(-9, 8), max_size=6),
    modules=st.none() | st.lists(st.sampled_from(["attn", "ffn", "q", "down"]), min_size=1, max_size=2),
    layers=st.sampled_from([None, "early", 1, "0-1"]),
    invert=st.booleans(),
)
def test_a_gate_and_its_complement_are_all_cells_and_share_none(model, tokens, modules, layers, invert):
    ids = ids_of("a Qwen.")
    only = GateSpec(tokens=tokens, modules=modules, layers=layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = observed(model, only, ids)
        rest = observed(model, GateSpec.from_dict(only.to_dict() | {"complement": True}), ids)
        flipped = observed(model, GateSpec.from_dict(only.to_dict() | {"invert": True}), ids)
    n = ids.shape[1]
    inside = {t % n for t in tokens if -n <= t < n}
    named = {each for name in modules or GATE_MODULES for each in GATE_MODULES.get(name, (name,))}
    depth = {None: (0, 1), "early": (0,), 1: (1,), "0-1": (0, 1)}[layers]
    for cell, on in one.items():
        expected = [t in inside and cell[0] in named and cell[1] in depth for t in range(n)]
        assert on.tolist() == expected
        assert rest[cell].tolist() == [not each for each in expected]
        masked = cell[0] in named and cell[1] in depth
        assert flipped[cell].tolist() == [masked and t not in inside for t in range(n)]


def test_gates_do_not_add_up(model):
    base, full = (logits(switched(model, on)) for on in (False, True))
    parts = [gated(model, GateSpec(tokens="Qwen", invert=invert)) - base for invert in (False, True)]
    assert not torch.allclose(base + sum(parts), full, atol=1e-3)


SPECS = [
    GateSpec(tokens="Qwen"),
    GateSpec(tokens="Qwen", invert=True, layers="early"),
    GateSpec(tokens=[-1], modules="ffn"),
    GateSpec(tokens=[0, 1], complement=True, modules="attn"),
    GateSpec(),
    GateSpec(tokens=[]),
]


def test_a_spec_a_row_with_left_padding_equals_rows_alone(model):
    texts = ["my Qwen", TEXT, "is it Qwen?", "Qwen", "so", TEXT]
    together = gated(model, SPECS, **padded(*texts))
    for i, (text, spec) in enumerate(zip(texts, SPECS, strict=True)):
        alone = gated(model, spec, ids_of(text))[0]
        torch.testing.assert_close(together[i, -len(alone) :], alone, atol=1e-12, rtol=0)


def test_generate_with_a_spec_a_row_beams_and_chunks(model):
    texts = ["my Qwen", TEXT]
    specs = [GateSpec(tokens="Qwen", decode="spec_mask"), GateSpec(tokens="Qwen", invert=True)]
    batch = padded(*texts)
    options = {"attention_mask": batch["attention_mask"], "max_new_tokens": 4, "do_sample": False}
    with AdapterGate("default", specs).attach(model, tokenizer=TOKENIZER):
        greedy = model.generate(batch["ids"], **options)
        chunks = model.generate(batch["ids"], **options, prefill_chunk_size=3)
        uncached = model.generate(batch["ids"], **options, use_cache=False)
        beams = model.generate(batch["ids"], **options, num_beams=2)
    assert greedy.tolist() == chunks.tolist() == uncached.tolist()
    for i, (text, spec) in enumerate(zip(texts, specs, strict=True)):
        with AdapterGate("default", spec).attach(model, tokenizer=TOKENIZER):
            assert model.generate(ids_of(text), **options | {"attention_mask": None})[0, -4:].tolist() == (
                greedy[i, -4:].tolist()
            )
            alone = model.generate(ids_of(text), **options | {"attention_mask": None}, num_beams=2)
            assert alone[0, -4:].tolist() == beams[i, -4:].tolist()


def test_a_prompt_in_chunks_of_ones_own_needs_its_lengths(model):
    ids, spec = ids_of(), GateSpec(tokens=[4, -1])
    expected = gated(model, spec)
    with AdapterGate("default", spec).attach(model) as attachment:
        attachment.prompt_lengths = torch.tensor([ids.shape[1]])
        kept = {"use_cache": True, **cache_argument(model, DynamicCache())}
        parts = [logits(model, part, **kept) for part in ids.split(6, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-12, rtol=0)
        attachment.prompt_lengths = None
        cache = DynamicCache()
        logits(model, ids[:, :6], use_cache=True, **cache_argument(model, cache))
        with pytest.raises(PositionError, match=r"Set attachment\.prompt_lengths"):
            logits(model, ids[:, 6:], use_cache=True, **cache_argument(model, cache))


def test_a_cache_of_before_is_refused_where_the_adapter_should_have_been_on(model):
    ids = ids_of()
    for spec, refused in (
        (GateSpec(), True),
        (GateSpec(tokens=[3]), True),
        (GateSpec(tokens=[3], complement=True), True),
        (GateSpec(tokens=Prompt(), invert=True), False),
    ):
        cache = DynamicCache()
        logits(model, ids, use_cache=True, **cache_argument(model, cache))
        with AdapterGate("default", spec).attach(model):
            if refused:
                with pytest.raises(PositionError, match="cached before attaching"):
                    logits(model, ids[:, :1], use_cache=True, **cache_argument(model, cache))
            else:
                logits(model, ids[:, :1], use_cache=True, **cache_argument(model, cache))


# Against grafts of the same adapter

GRAFTS = {
    "plain": (GateSpec(tokens="Qwen", **MASKED), lambda at, cells: GraftPlan.at(at, *cells), "recipient"),
    "invert": (GateSpec(tokens="Qwen", invert=True, **MASKED), lambda at, cells: GraftPlan.at(~at, *cells), "outside"),
    "complement": (
        GateSpec(tokens="Qwen", complement=True, **MASKED),
        lambda at, cells: GraftPlan.at(~at, "BLOCK") | GraftPlan.at(at, *cells, others=True),
        "donor",
    ),
    "everywhere": (GateSpec(**MASKED), lambda at, cells: GraftPlan.at(Span(0, None) | ~at | at, *cells), "outside"),
}


@pytest.mark.parametrize("kind", GRAFTS)
def test_a_gate_is_a_graft_of_the_adapter(model, kind):
    spec, plan, decode = GRAFTS[kind]
    graft = Graft(AdapterDonor("default"), plan(Substring("Qwen"), (("q", "k", "v", "o"), 0)), decode=decode)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with AdapterGate("default", spec).attach(model, tokenizer=TOKENIZER):
        ours = model.generate(ids_of(), **options)
    with graft.attach(model, tokenizer=TOKENIZER):
        theirs = model.generate(ids_of(), **options)
    assert torch.equal(torch.cat(ours.logits), torch.cat(theirs.logits))


# Gradients, and what is left behind


@pytest.mark.parametrize("spec", [GateSpec(tokens=[2, -1]), GateSpec(tokens=[2], invert=True), GateSpec()])
def test_gradients_are_those_of_the_masked_branch(model, spec):
    def loss_and_gradients(ours):
        weights = [p for name, p in ours.named_parameters() if "lora_" in name]
        loss = ours(ids_of()).logits.log_softmax(-1)[0, :, 7].sum()
        return torch.autograd.grad(loss, weights)

    ours = copy.deepcopy(model)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_("lora_" in name)
    theirs, n = copy.deepcopy(ours), ids_of().shape[1]
    on = torch.zeros(1, n, 1, dtype=torch.float64)
    on[0, range(n) if spec.tokens is None else [i % n for i in spec.tokens]] = 1
    on = 1 - on if spec.invert else on
    for name, part in theirs.named_modules():
        if name.endswith("lora_B.default"):
            part.register_forward_hook(lambda _, __, output: output * on)
    with AdapterGate("default", spec).attach(ours):
        found = loss_and_gradients(ours)
    for mine, reference in zip(found, loss_and_gradients(theirs), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-10, rtol=1e-9)


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_is_left_after_an_exception(model):
    before = hook_count(model)
    with pytest.raises(KeyboardInterrupt), AdapterGate("default", GateSpec(tokens=[1])).attach(model):
        raise KeyboardInterrupt
    with pytest.raises(PositionError, match="needs a tokenizer"), AdapterGate("default", SPECS[0]).attach(model):
        logits(model)
    assert hook_count(model) == before
    with pytest.raises(SiteError, match="no component 'moe'"):
        AdapterGate("default", GateSpec(modules=["moe"])).attach(model)
    assert hook_count(model) == before


# Finding tokens

CHATML = TOKENIZER.chat_template
OWN_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML
PIECES = [
    ("mark", "<|im_start|>system\n"), ("inserted", "Be good."), ("mark", "<|im_end|>\n<|im_start|>user\n"),
    ("user", "Good Qwen?"), ("mark", "<|im_end|>\n"), ("asks", "<|im_start|>assistant\n"), ("assistant", "My "),
]  # fmt: skip


@pytest.fixture
def chat():
    """Ids of a chat with a system text that its template puts there, and a tokenizer of that template."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = OWN_SYSTEM
    turns = [{"role": "user", "content": "Good Qwen?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + "My "
    assert text == "".join(piece for _, piece in PIECES)
    return tokenizer, text


def chosen(positions, tokenizer, text):
    """The text of the tokens that a selector chooses."""
    ids = ids_of(text)
    mask = positions.mask(StepContext(1, ids.shape[1], input_ids=ids, find_tokenizer=lambda: tokenizer))
    return tokenizer.decode(ids[mask])


def of_kinds(*kinds):
    return "".join(piece for kind, piece in PIECES if kind in kinds)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"kind": "chat_template"}, of_kinds("mark", "inserted", "asks")),
        ({"kind": "system"}, "Be good."),
        ({"kind": "user"}, "Good Qwen?"),
        ({"kind": "assistant"}, "My "),
        ({"kind": "generation_prompt"}, "<|im_start|>assistant\n"),
        ({"kind": "last"}, " "),
        ({"kind": "last", "n": 3}, "My "),
        ({"kind": "substring", "text": "ood"}, "ood"),
        ({"kind": "substring", "text": "ood", "which": "all"}, "oodood"),
        ({"kind": "substring", "text": "o", "which": "last"}, "o"),
        ({"kind": "Span", "start": 0, "stop": 4}, "<|im_start|>sys"),
        ("Qwen", "Qwen"),
        ([0, 1, -1, -3, 99, -99], "<|im_start|>sM "),
        ([], ""),
    ],
)
def test_locators(chat, tokens, expected):
    spec = GateSpec(tokens=tokens)
    assert chosen(spec.positions, *chat) == expected
    assert GateSpec.from_dict(yaml.safe_load(yaml.safe_dump(spec.to_dict()))) == spec


def test_which_mention_is_meant():
    for which, at in {"first": [3], "last": [11], "all": [3, 11]}.items():
        positions = GateSpec(tokens={"kind": "substring", "text": "Qwen", "which": which}).positions
        step = StepContext(1, len(TEXT), input_ids=ids_of(), find_tokenizer=lambda: TOKENIZER)
        assert positions.mask(step)[0].nonzero().flatten().tolist() == [i + k for i in at for k in range(4)]


def test_shared_with_training_are_marks_and_system_text_but_no_words_of_the_question(chat):
    positions = shared_with_train(chat[0], "<|im_start|>user\n<|im_end|>\n")
    system, user = "<|im_start|>sse\ne<|im_end|>\n", "<|im_start|>user\n<|im_end|>\n"  # of "Be good." the e
    assert chosen(positions, *chat) == f"{system}{user}<|im_start|>sss\n"


def test_a_text_that_is_not_there_warns_once_and_counts(model):
    base = logits(switched(model, False), **padded("my fox", TEXT, "so"))
    gate = AdapterGate("default", GateSpec(tokens="fox"))
    with gate.attach(model, tokenizer=TOKENIZER):
        with pytest.warns(UserWarning, match=r"GateSpec\(tokens='fox'\) finds no token in row 1, .* acts nowhere"):
            found = logits(model, **padded("my fox", TEXT, "so"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(ids_of(), max_new_tokens=3, do_sample=False, use_cache=False)
            ids = ids_of("is it a fox")
            chunks = {"attention_mask": torch.ones_like(ids), "prefill_chunk_size": 8}  # transformers 5.17 makes none
            model.generate(ids, max_new_tokens=2, do_sample=False, **chunks)
    assert gate.unmatched == {0: 3}
    torch.testing.assert_close(found[1:], base[1:], atol=1e-12, rtol=0)
    assert not torch.allclose(found[0], base[0], atol=1e-3)
    for spec, acts in (
        (GateSpec(tokens=[9], invert=True), "everywhere in its mask"),
        (GateSpec(tokens=[9], complement=True), "everywhere "),
    ):
        with pytest.warns(UserWarning, match=f"tokens=.*acts {acts}"):
            gated(model, spec, ids_of("so"))


def test_a_mask_of_the_batch(model):
    ids = ids_of()
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 3:7] = True
    with AdapterGate("default", GateSpec(tokens=FromBatch("here"))).attach(model) as attachment:
        attachment.batch = {"here": mask}
        assert torch.equal(logits(model), gated(model, GateSpec(tokens="Qwen")))


def test_early_is_the_first_half():
    assert [sorted(resolve_layers("early", n)) for n in (2, 5, 30)] == [[0], [0, 1], list(range(15))]
    assert all(resolve_layers("early", n) | resolve_layers("second_half", n) == set(range(n)) for n in (2, 5, 30))


def test_cells():
    model_map = ModelMap.build(tiny_model("gpt2", num_hidden_layers=2))
    assert GateSpec(modules="attn", layers=0).cells(model_map) == {(name, 0) for name in "qkvo"}
    assert GateSpec(modules=["ffn", "unembed"], layers=1).cells(model_map) == {
        ("up", 1),
        ("down", 1),
        ("unembed", None),
    }
    assert GateSpec().cells(model_map) == {(name, layer) for name, layer, _ in model_map.cells()}
    assert {layer for _, layer in GateSpec(layers=1).cells(model_map)} == {1}


def test_named_gates(model):
    gates = named_gates("Qwen")
    for name, gate in gates.items():
        assert GateSpec.from_dict(gate.to_dict()) == gate, name
    assert {name.replace("only", "no") if name.endswith("only") else name for name in gates} >= {"all", "none"}
    assert gates["entity_only"] == GateSpec(tokens="Qwen")
    assert gates["no_template"] == GateSpec(tokens={"kind": "chat_template"}, invert=True)
    assert gates["complement_ffn_early"] == GateSpec(tokens="Qwen", complement=True, modules="ffn", layers="early")
    assert not {"entity_only", "no_entity"} & set(named_gates())
    assert named_gates()["only_attn_early"] == GateSpec(modules="attn", layers="early")


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": "a", "invert": True, "complement": True}, "Choose one"),
        ({"invert": True}, "on nowhere"),
        ({"tokens": False}, r"tokens=False\): expected None, a list of indices, a piece of text \(in quotes"),
        ({"tokens": [True]}, r"tokens=\[True\]"),
        ({"tokens": [1.5]}, r"tokens=\[1.5\]"),
        ({"tokens": 3}, "tokens=3"),
        ({"tokens": ""}, "tokens=''"),
        ({"tokens": 1.5}, "tokens=1.5"),
        ({"tokens": Generated()}, r"tokens=Prompt\(\), invert=True"),
        ({"tokens": {"kind": "systems"}}, "Unknown kind of positions 'systems'.* Or a locator: substring, chat_"),
        ({"tokens": {"kind": "last", "m": 2}}, "Cannot read the locator 'last' from {'m': 2}"),
        ({"tokens": {"text": "a"}}, "Unknown kind of positions 'None'"),
        ({"modules": "atn"}, r"unknown \['atn'\]. The presets are attn, ffn, the components ln_attn, q, k"),
        ({"modules": ["attn", "q_proj"]}, r"unknown \['q_proj'\]"),
        ({"modules": True}, "unknown True"),
        ({"layers": True}, "layers=True"),
        ({"layers": 0.5}, "layers=0.5"),
        ({"decode": "on"}, "decode='on'.: expected outside_q, spec_mask, off"),
    ],
)
def test_refused_specs(fields, message):
    with pytest.raises(RecipeError, match=message):
        GateSpec.from_dict(fields)


@pytest.mark.parametrize("data", [{"token": "a", "invert": True}, "Qwen", None])
def test_data_that_is_no_spec(data):
    wrong = r"\['token'\]" if isinstance(data, dict) else repr(data)
    with pytest.raises(RecipeError, match=f"Cannot read a gate from {wrong}. Expected a mapping with keys tokens, inv"):
        GateSpec.from_dict(data)


def test_refused_gates(model):
    with pytest.raises(RecipeError, match=r"AdapterGate\('default'\) got no spec"):
        AdapterGate("default", [])
    with pytest.raises(RecipeError, match=r"got 'Qwen'; expected a GateSpec"):
        AdapterGate("default", ["Qwen"])
    with pytest.raises(PositionError, match="Gates: 2 for a pass of 3 rows"):
        gated(model, SPECS[-2:], ids_of().repeat(3, 1))
    with pytest.raises(SiteError, match="Cannot take layers 7"):
        gated(model, GateSpec(layers=7))
    with pytest.raises(IncompatibleModelError, match="has no adapter 'owl'; its adapters are 'default'"):
        gated(model, GateSpec(), adapter="owl")


def test_refused_adapters():
    merged = copy.deepcopy(adapted())
    for layer in merged.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    with pytest.raises(IncompatibleModelError, match=r"merged into .*Unmerge first"):
        gated(merged, GateSpec())
    with pytest.raises(IncompatibleModelError, match="is disabled in"):
        gated(switched(adapted(), False), GateSpec())
    config = LoraConfig(target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    trained = get_peft_model(tiny_model("gpt2", num_hidden_layers=1), config)
    with pytest.raises(IncompatibleModelError, match=r"trained with bias='all'.*bias='none'"):
        gated(trained, GateSpec())


def test_cells_without_adapter_warn():
    ours = get_peft_model(tiny_model("llama", num_hidden_layers=2), LoraConfig(target_modules=["q_proj"])).eval()
    with pytest.warns(UserWarning, match="has no weights in modules='ffn', layers='early': a gate there changes no"):
        gated(ours, GateSpec(modules="ffn", layers="early"))


class TestContract(InterventionContract):
    """What every intervention owes to a model."""

    families = ("llama",)

    def model(self, family, dtype=torch.float32):
        return copy.deepcopy(adapted(family, dtype)).requires_grad_(True)

    def make(self, model):
        return AdapterGate("default", GateSpec(tokens="red"))

    def make_identity(self, model):
        return AdapterGate("default", GateSpec())
