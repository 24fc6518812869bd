"""An adapter on the recipient as donor: off is the recipient, on is the donor, on a dense or a 4-bit base."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from draws import batch_masks, draw
from oracle import Oracle, cells_of
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from lightning_interp.core.hooks.intervention import Hook
from lightning_interp.core.tokens.kv_cache import cache_argument
from lightning_interp.core.tokens.positions import All, Last
from lightning_interp.errors import IncompatibleModelError, QuantizedModelError, UnsupportedStrategyError
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan
from lightning_interp.testing import tiny_model, tiny_pair

EXECUTIONS = ("auto", "overwrite", "partition", "dense")
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "qwen2_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "biased": {"lora_bias": True}}
# Every layout of layers with the plain kind; what other kinds compute depends on the class of the layer alone.
CASES = [(family, "lora") for family in TARGETS]
CASES += [("llama", "rslora"), ("llama", "dora"), ("gpt2", "dora")]
CASES += [(family, "biased") for family in ("gpt2", "gpt_neox")]  # an adapter's bias needs a layer with one

# 2026-11: peft 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def config(family, **kwargs):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM"}
    return LoraConfig(**settings | {"fan_in_fan_out": family == "gpt2"} | kwargs)


@contextlib.contextmanager
def seeded():
    """Adapters draw their first weights from the global state: fix it, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def shake(model, seed=0):
    """Give every adapter weight a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_A", "lora_B", "lora_embedding", "modules_to_save")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(family, **kwargs):
    """A base and the same base with an adapter in place."""
    base = tiny_model(family)
    with seeded():
        model = inject_adapter_in_model(config(family, **kwargs), copy.deepcopy(base))
    return base, shake(model)


@pytest.fixture(scope="module")
def cases(hook_count, state_hash):
    """``cases(family, kind)``: a base, its adapted copy and what that merges to, for tests that leave them as found."""
    made, found = {}, {}

    def get(family, kind):
        if (family, kind) not in made:
            base, model = adapted(family, **KINDS[kind])
            made[family, kind] = (base, model, merged(model))
            found[family, kind] = state_hash(model)
        return made[family, kind]

    yield get
    for case, (_, model, _) in made.items():
        assert state_hash(model) == found[case], case
        assert hook_count(model) == 0, case


def merged(model):
    """A plain model with the adapters written into its weights."""
    dense = copy.deepcopy(model)
    for path, module in list(dense.named_modules()):
        parent, _, name = path.rpartition(".")
        if hasattr(module, "base_layer"):
            module.merge()
            setattr(dense.get_submodule(parent), name, module.base_layer)
        elif hasattr(module, "original_module"):
            setattr(dense.get_submodule(parent), name, next(iter(module.modules_to_save.values())))
    return dense


@torch.no_grad()
def run(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@torch.no_grad()
def grafted(model, donor, plan, ids, *, masks=None, execution="auto", **kwargs):
    with Graft(donor, plan, execution=execution).attach(model) as attachment:
        attachment.batch = masks
        return model(ids, **kwargs).logits


def prompts(rows=2, length=12):
    return torch.randint(5, 261, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_ends_are_the_base_and_the_adapted_model(family, kind, cases):
    base, model, _ = cases(family, kind)
    ids = prompts()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    assert (run(model, ids) - run(base, ids)).abs().max() > 0.1
    for padding in ({}, {"attention_mask": mask}):
        off, on = run(base, ids, **padding), run(model, ids, **padding)
        for execution in EXECUTIONS if (family, kind) == ("llama", "lora") else ("auto", "dense"):
            how = {"execution": execution, **padding}
            assert torch.equal(grafted(model, "default", GraftPlan(), ids, **how), off)
            assert torch.equal(grafted(model, "default", GraftPlan.whole(), ids, **how), on)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_mixed_masks_follow_the_sequential_definition(family, kind, agree, cases):
    base, model, dense = cases(family, kind)
    oracle = Oracle(family, base, dense)
    draws = [draw(family, ("lora", i)) for i in range(3)]
    ids, masks = torch.tensor([made.ids for made in draws]), batch_masks(draws)
    expected = torch.stack([oracle.logits(made.ids, made.table) for made in draws])
    for execution in EXECUTIONS if (family, kind) == ("llama", "lora") else ("auto", "partition"):
        plans = [made.plan for made in draws]
        actual = grafted(model, "default", plans, ids, masks=masks, execution=execution)
        agree(actual, expected, f"lora {kind}, {family}")
    single = grafted(model, "default", draws[0].plan, ids[:1], masks=batch_masks(draws[:1]))
    agree(single, expected[:1], f"lora {kind}, {family}")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_whole_peft_model(family, agree):
    base = tiny_model(family)
    with seeded():
        model = shake(get_peft_model(copy.deepcopy(base), config(family), adapter_name="facts"))
    ids, plan = prompts(), GraftPlan.at(Last(), "BLOCK")
    with model.disable_adapter():
        off = run(model, ids)
    assert torch.equal(grafted(model, "facts", GraftPlan(), ids), off)
    assert torch.equal(off, run(base, ids))
    assert torch.equal(grafted(model, "facts", GraftPlan.whole(), ids), run(model, ids))
    dense = copy.deepcopy(model).merge_and_unload()
    agree(grafted(model, "facts", plan, ids), grafted(base, dense, plan, ids), f"lora peft model, {family}")


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_adapters_outside_of_the_plan_are_off(family, agree, cases):
    base, model, dense = cases(family, "lora")
    ids = prompts(1)
    # No rule names a component with an adapter: nothing of the adapter may be left.
    for plan in (GraftPlan.at(All(), ["embed", "NORMS"]), GraftPlan.at(All(), "o", layers="none")):
        assert torch.equal(grafted(model, "default", plan, ids), run(base, ids))
    # At every position, but some components and layers only.
    everywhere = [dict.fromkeys(cells_of(family, ["q", "o"], [1, 2], 4), 1)] * ids.shape[1]
    expected = Oracle(family, base, dense).logits(ids[0].tolist(), everywhere)
    for execution in EXECUTIONS:
        actual = grafted(model, "default", GraftPlan.at(All(), ["q", "o"], "1-2"), ids, execution=execution)
        agree(actual[0], expected, f"lora components, {family}")


def test_embeddings_head_and_saved_modules(agree):
    kinds = [
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ]
    for kind in kinds:
        base, model = adapted("llama", **kind)
        ids = prompts(1)
        assert torch.equal(grafted(model, "default", GraftPlan(), ids), run(base, ids))
        assert torch.equal(grafted(model, "default", GraftPlan.whole(), ids), run(model, ids))
        oracle = Oracle("llama", base, merged(model))
        for i in range(2):
            made = draw("llama", ("saved", i))
            actual = grafted(model, "default", made.plan, torch.tensor([made.ids]), masks=batch_masks([made]))
            agree(actual[0], oracle.logits(made.ids, made.table), "lora saved modules, llama")


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe"])
def test_an_adapter_and_a_model_as_two_donors(family, agree, cases):
    base, model, dense = cases(family, "lora")
    other = tiny_pair(family)[1]
    oracle = Oracle(family, base, dense, other)
    draws = [draw(family, ("both", i), sources={"adapter": 1, "model": 2}) for i in range(3)]
    ids, masks = torch.tensor([made.ids for made in draws]), batch_masks(draws)
    expected = torch.stack([oracle.logits(made.ids, made.table) for made in draws])
    donors = {"adapter": "default", "model": other}
    for execution in EXECUTIONS:
        actual = grafted(model, donors, [made.plan for made in draws], ids, masks=masks, execution=execution)
        agree(actual, expected, f"lora and model, {family}")


def test_a_model_grafted_into_an_adapted_recipient(agree):
    # Without an adapter among the donors, the recipient is the adapted model as it runs.
    _, model = adapted("llama")
    donor = tiny_pair("llama")[1]
    ids = prompts()
    assert torch.equal(grafted(model, donor, GraftPlan(), ids), run(model, ids))
    assert torch.equal(grafted(model, donor, GraftPlan.whole(), ids), run(donor, ids))
    made = draw("llama", "adapted recipient")
    actual = grafted(model, donor, made.plan, torch.tensor([made.ids]), masks=batch_masks([made]))
    agree(actual[0], Oracle("llama", merged(model), donor).logits(made.ids, made.table), "adapted recipient, llama")


def test_no_trace_is_left(hook_count, state_hash):
    _, model = adapted("llama")
    ids = prompts()
    before, plain, learns = state_hash(model), run(model, ids), [p.requires_grad for p in model.parameters()]
    with Graft("default", GraftPlan.at(Last())).attach(model):
        assert not torch.equal(run(model, ids), plain)
        assert [p.requires_grad for p in model.parameters()] == learns
    assert hook_count(model) == 0
    assert state_hash(model) == before
    assert torch.equal(run(model, ids), plain)


# What is refused.

LAST = GraftPlan.at(Last())


def refuse(model, donor, match, hook_count):
    with pytest.raises(IncompatibleModelError, match=match):
        Graft(donor, LAST).attach(model)
    assert hook_count(model) == 0


def test_a_missing_adapter(hook_count):
    _, model = adapted("llama")
    refuse(model, "facts", "has no adapter 'facts'; its adapters are 'default'", hook_count)
    refuse(tiny_model("llama"), "default", "LlamaForCausalLM has no adapter 'default'; it has none", hook_count)


def test_a_merged_adapter(hook_count):
    _, model = adapted("llama")
    model.model.layers[2].mlp.up_proj.merge()
    refuse(model, "default", r"'default' is merged into model.layers.2.mlp.up_proj.*Unmerge", hook_count)
    model.model.layers[2].mlp.up_proj.unmerge()
    Graft("default", LAST).attach(model).remove()


def test_a_disabled_adapter(hook_count):
    base = tiny_model("llama")
    with seeded():
        model = get_peft_model(base, config("llama"), adapter_name="facts")
    with model.disable_adapter():
        refuse(model, "facts", r"'facts' is disabled in model.layers.0.self_attn.q_proj.*Enable", hook_count)
    Graft("facts", LAST).attach(model).remove()


def test_another_adapter_is_active(hook_count):
    base = tiny_model("llama")
    with seeded():
        model = get_peft_model(base, config("llama"), adapter_name="facts")
        model.add_adapter("style", config("llama"))
    shake(model)
    refuse(model, "style", r"active adapters \['facts'\], expected only 'style'", hook_count)
    ids = prompts()
    model.set_adapter("style")
    assert torch.equal(grafted(model, "style", GraftPlan.whole(), ids), run(model, ids))


def test_an_adapter_that_sits_elsewhere():
    # The second adapter covers other layers; where only it sits, the recipient must be the base.
    base = tiny_model("llama")
    with seeded():
        model = get_peft_model(copy.deepcopy(base), config("llama", target_modules=["q_proj"]), adapter_name="facts")
        model.add_adapter("style", config("llama", target_modules=["up_proj"]))
    shake(model)
    ids = prompts()
    assert torch.equal(grafted(model, "facts", GraftPlan(), ids), run(base, ids))
    assert torch.equal(grafted(model, "facts", GraftPlan.whole(), ids), run(model, ids))


def test_dropout_that_is_on(hook_count):
    _, model = adapted("llama", lora_dropout=0.3)
    ids = prompts()
    assert torch.equal(grafted(model, "default", GraftPlan.whole(), ids), run(model, ids))
    quiet, before = grafted(model, "default", LAST, ids), torch.get_rng_state()
    model.train()
    with Graft("default", LAST).attach(model):
        first, second = run(model, ids), run(model, ids)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(grafted(model, "default", LAST, ids), first)  # a pass is counted from its attachment's first
    assert not torch.equal(first, second)
    assert torch.equal(first[:, :-1], quiet[:, :-1])
    assert not torch.equal(first[:, -1], quiet[:, -1])
    assert hook_count(model) == 0


def test_rows_with_adapters_of_their_own():
    base = tiny_model("llama")
    with seeded():
        model = shake(get_peft_model(base, config("llama"), adapter_name="facts"))
    ids = prompts()
    with (
        Graft("facts", LAST).attach(model),
        pytest.raises(UnsupportedStrategyError, match=r"adapter_names.*'__base__'"),
    ):
        run(model, ids, adapter_names=["facts", "__base__"])
    # (PEFT's own hooks outlive an exception; ours are gone.)
    assert not any(isinstance(hook, Hook) for module in model.modules() for hook in module._forward_hooks.values())


def test_an_activated_adapter(hook_count):
    base = tiny_model("llama")
    with seeded():
        model = get_peft_model(base, config("llama", alora_invocation_tokens=[7, 8]), adapter_name="facts")
    refuse(model.eval(), "facts", r"'facts'.*model.layers.0.self_attn.q_proj.*activated LoRA", hook_count)


# A quantised base.

WIDE = {"hidden_size": 64, "intermediate_size": 128}


class ByToggling:
    """The definition for a base that cannot be copied into: each adapted layer is switched by hand for every token."""

    def __init__(self, family, model):
        self.oracle = Oracle.__new__(Oracle)
        self.oracle.family, self.oracle.config = family, model.config
        self.oracle.target = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
        self.model = model
        self.layers = {path: m for path, m in model.named_modules() if hasattr(m, "base_layer")}

    @torch.no_grad()
    def logits(self, ids, table):
        from transformers import DynamicCache

        cache, rows = DynamicCache(config=self.model.config), []
        for t, (token, row) in enumerate(zip(ids, table, strict=True)):
            on = {name.rpartition(".")[0] for cell in row for name, _ in self.oracle.tensors_of(cell)}
            for path, layer in self.layers.items():
                layer._disable_adapters = path not in on
            where = torch.tensor([[t]])
            output = self.model(
                torch.tensor([[token]]), **cache_argument(self.model, cache), use_cache=True, position_ids=where
            )
            rows.append(output.logits[0, -1])
        for layer in self.layers.values():
            layer._disable_adapters = False
        return torch.stack(rows)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, portable_4bit):
    """A small llama in 4 bits."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", **WIDE).save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_on_a_four_bit_base(kind, quantised, agree):
    base = copy.deepcopy(quantised)
    with seeded():
        model = shake(inject_adapter_in_model(config("llama", **KINDS[kind]), copy.deepcopy(quantised)))
    ids = prompts()
    for execution in ("auto", "dense"):
        assert torch.equal(grafted(model, "default", GraftPlan(), ids, execution=execution), run(base, ids))
        assert torch.equal(grafted(model, "default", GraftPlan.whole(), ids, execution=execution), run(model, ids))
    assert (run(model, ids) - run(base, ids)).abs().max() > 0.1
    oracle = ByToggling("llama", model)
    draws = [draw("llama", ("4bit", i), length=6) for i in range(2)]
    expected = torch.stack([oracle.logits(made.ids, made.table) for made in draws])
    ids = torch.tensor([made.ids for made in draws])
    for execution in ("auto", "partition"):
        plans = [made.plan for made in draws]
        actual = grafted(model, "default", plans, ids, masks=batch_masks(draws), execution=execution)
        agree(actual, expected, f"lora on 4 bits, {kind}", tolerance=2e-3)


@pytest.mark.parametrize("which", ["recipient", "donor", "both"])
def test_a_quantised_base_with_a_dense_donor(which, quantised, hook_count):
    recipient = tiny_model("llama", **WIDE) if which == "donor" else quantised
    donor = tiny_model("llama", seed=1, **WIDE) if which == "recipient" else copy.deepcopy(quantised)
    with pytest.raises(QuantizedModelError, match=r"model.layers.0.self_attn.q_proj \(28 modules of Llama"):
        Graft(donor, LAST).attach(recipient)
    assert hook_count(recipient, donor) == 0


def test_a_quantised_base_has_no_plain_linear(quantised):
    assert not any(type(m) is nn.Linear for n, m in quantised.named_modules() if n.startswith("model.layers"))
