"""Dual steering inside a model: what the head reads, generation, caches, beams, padding, gradients, refusals."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from lightning_interp import (
    ActivationCapture,
    AddDirection,
    All,
    Compose,
    Generated,
    GenerationSteps,
    Last,
    Site,
    Tokens,
)
from lightning_interp.core.model.fingerprint import model_fingerprint
from lightning_interp.core.model.own_hooks import suspended
from lightning_interp.core.tokens.kv_cache import cache_of
from lightning_interp.errors import (
    CompiledModelError,
    IncompatibleModelError,
    PositionError,
    RecipeError,
)
from lightning_interp.grafting import Graft, GraftPlan
from lightning_interp.steering import ConceptProbe, CounterfactualPairs, DualSteering, PairMassGate, dual_steering
from lightning_interp.steering.concepts.class_reader import ClassReader
from lightning_interp.steering.softmax.curve import SolverOptions
from lightning_interp.steering.softmax.dual import dual_steer
from lightning_interp.steering.softmax.dual_intervention import DualMeter
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.testing import InterventionContract, byte_tokenizer, tiny_model, tiny_pair

IDS = torch.arange(5, 13).view(1, 8)
PAIRS = CounterfactualPairs([(100 + i, 120 + i) for i in range(8)])


def direction(k=0, width=32):
    return torch.randn(width, generator=torch.Generator().manual_seed(k))


_two_blocks = functools.cache(functools.partial(tiny_model, num_hidden_layers=2))


class _TwoBlocks(InterventionContract):
    """The head is steered, so how many blocks there are before it does not matter."""

    def model(self, family, dtype=torch.float32):
        return copy.deepcopy(_two_blocks(family, dtype=dtype))


class _Contract(_TwoBlocks):
    """Every token, solved so far that padded and plain rows end at the same place."""

    families = ("qwen2_moe",)  # its experts see the whole batch

    def make(self, model):
        options = SolverOptions(rtol=1e-6)
        return DualSteering(direction(), positions=All(), support=None, t=0.3, alpha=0.5, options=options)


class TestDual(_Contract):
    def make_identity(self, model):
        return DualSteering(direction(), positions=All(), t=0.0, alpha=0.5)


class TestSoftcapped(_TwoBlocks):
    families = ("gemma2",)

    def make(self, model):
        return DualSteering(direction(), positions=All(), kl_budget=0.2, alpha=0.5, on_softcap="ignore")


class TestEuclidean(_Contract):
    families = ("gpt2",)

    def make(self, model):
        return DualSteering(direction(), positions=All(), method="euclidean", probe_delta=1.0)


def states(model, ids=IDS):
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[-1]


@torch.no_grad()
def test_logits_are_those_of_the_steered_state():
    model = tiny_model("llama")
    geometry, lam = SoftmaxGeometry.from_model(model), states(model)[0]
    expected = dual_steer(geometry, lam[-1:], direction(), t=0.3, alpha=0.5)
    with DualSteering(direction(), t=0.3, alpha=0.5).attach(model):
        found = model(IDS).logits[0]
    torch.testing.assert_close(found[-1], geometry.logits(expected.lam)[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[:-1], model(IDS).logits[0, :-1])  # the last token alone


def generate(model, batch=None, **options):
    batch = {"input_ids": IDS} if batch is None else batch
    return model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("family", ["gpt2"])
def test_no_step_generates_the_very_same_tokens(family):
    model = tiny_model(family)
    plain = generate(model)
    with dual_steering(model, direction(), t=0.0, alpha=0.1) as steering:
        assert torch.equal(generate(model), plain)
    assert steering.meter.compute()["tokens"] == 0


@torch.no_grad()
def test_the_cache_is_the_same_to_the_bit():
    model = tiny_model("llama")
    plain = cache_of(model(IDS, use_cache=True))
    with dual_steering(model, direction(), kl_budget=1.0, alpha=0.5, positions=All()):
        steered = cache_of(model(IDS, use_cache=True))
    for one, other in zip(plain.layers, steered.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_every_step_of_a_generation_spends_its_budget():
    model = tiny_model("llama")
    with dual_steering(model, direction(), kl_budget=0.3, alpha=0.5) as steering:
        out = generate(model)
        again = generate(model, use_cache=False)
    assert torch.equal(out, again)
    measured = steering.meter.compute()
    assert measured["tokens"] == 8
    assert measured["kl"] == pytest.approx(0.3, rel=0.01)
    assert measured["reached"] == measured["certified"] == 1.0
    assert measured["hvps_per_token"] > 0
    assert len(steering.meter.last.lam) == 1


def test_windows_gates_and_tokens_choose_where():
    model = tiny_model("llama")
    for positions, tokens in ((GenerationSteps(0, 2), 2), (Generated(), 3), (~Last() & Last(), None)):
        if tokens is None:
            with pytest.raises(PositionError, match="can never choose a token"):
                DualSteering(direction(), t=1.0, positions=positions)
            continue
        with dual_steering(model, direction(), kl_budget=0.1, alpha=0.5, positions=positions) as steering:
            generate(model)
        assert steering.meter.compute()["tokens"] == tokens
    closed = Last() & PairMassGate(PAIRS, above=0.999)
    with dual_steering(model, direction(), kl_budget=0.1, alpha=0.5, positions=closed) as steering:
        plain = generate(model)
    assert torch.equal(plain, generate(model))
    assert steering.meter.compute()["tokens"] == 0


@torch.no_grad()
def test_a_sweep_in_one_batch_is_one_at_a_time():
    model, budgets = tiny_model("llama"), torch.tensor([0.0, 0.1, 0.5, 2.0])
    with DualSteering(direction(), kl_budget=budgets, alpha=0.5).attach(model):
        together = model(IDS.repeat(4, 1)).logits[:, -1]
    for row, budget in enumerate(budgets.tolist()):
        with DualSteering(direction(), kl_budget=budget, alpha=0.5).attach(model):
            torch.testing.assert_close(model(IDS).logits[0, -1], together[row], atol=2e-3, rtol=1e-3)
    assert torch.equal(together[0], model(IDS.repeat(4, 1)).logits[0, -1])


def test_beams_and_padding():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    batch = tokenizer(["red fox", "a red fox ran"], return_tensors="pt", padding=True)
    budgets = torch.tensor([0.2, 0.6])
    with dual_steering(model, direction(), kl_budget=budgets, alpha=0.5):
        beams = generate(model, batch, num_beams=2)
    alone = []
    for text, budget in (("red fox", 0.2), ("a red fox ran", 0.6)):
        with dual_steering(model, direction(), kl_budget=budget, alpha=0.5):
            alone.append(generate(model, tokenizer([text], return_tensors="pt"), num_beams=2)[0, -4:])
    assert torch.equal(beams[:, -4:], torch.stack(alone))
    with (
        dual_steering(model, direction(), kl_budget=torch.ones(3), alpha=0.5),
        pytest.raises(RecipeError, match="kl_budget has 3 values, but there are 2 rows"),
    ):
        generate(model, batch)


def test_what_is_attached_already_sees_nothing_of_the_look_at_the_head():
    model, head = tiny_model("llama"), Site("unembed_in")
    capture, first = ActivationCapture([head, Site("resid_post", 1)], keep="all"), DualSteering(direction(), t=1.0)
    meter = DualMeter()
    first.meter = meter
    with capture.attach(model), first.attach(model), dual_steering(model, direction(), kl_budget=0.1) as second:
        ClassReader(PAIRS).attach(model).remove()
        assert (capture.activations, capture.history, meter.compute()["tokens"]) == ({}, {}, 0)
        generate(model)
    assert meter.compute()["tokens"] == second.meter.compute()["tokens"] == len(capture.history[head]) == 4


@torch.no_grad()
def test_parts_with_one_strength_a_row_come_in_any_order():
    model, rows = tiny_model("llama"), IDS.repeat(2, 1)
    add = AddDirection(torch.ones(32), site="resid_post.1", strength=[0.0, 1.0])
    dual = DualSteering(direction(), kl_budget=torch.tensor([0.1, 0.2]), alpha=0.5)
    found = []
    for parts in ((add, dual), (dual, add)):
        with Compose(*parts).attach(model):
            found.append(model(rows).logits)
    assert torch.equal(*found)


def test_a_head_that_has_other_weights_by_rows_is_refused():
    recipient, donor = tiny_pair("llama")
    with (
        Graft(donor, GraftPlan.whole()).attach(recipient),
        pytest.raises(IncompatibleModelError, match="unembedding of LlamaForCausalLM takes its weights row by row"),
    ):
        DualSteering(direction(), t=1.0).attach(recipient)
    with Graft(donor, GraftPlan.at(Last())).attach(recipient):
        DualSteering(direction(), t=1.0).attach(recipient).remove()


def test_an_exception_while_generating_leaves_nothing():
    model = tiny_model("llama")

    def boom(*_):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), dual_steering(model, direction(), kl_budget=0.1):
        generate(model, logits_processor=[boom])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_target_probability_is_met_at_the_models_own_logits():
    model = tiny_model("llama")
    beta = model.lm_head.weight[PAIRS.target_ids].mean(0) - model.lm_head.weight[PAIRS.base_ids].mean(0)
    steer = DualSteering(beta.detach(), target_prob=0.9, pairs=PAIRS, alpha=0.5)
    with torch.no_grad(), steer.attach(model):
        p = model(IDS).logits[0, -1].softmax(-1)
    assert float(PAIRS.target_prob(p)) == pytest.approx(0.9, abs=0.005)
    assert steer.describe()["pairs"] == 16


def test_gradients_flow_through_the_steered_state():
    model = tiny_model("llama").double()
    steer = DualSteering(direction().double(), t=0.2, alpha=0.5, support=None)

    def loss():
        with steer.attach(model):
            return model(IDS).logits[0, -1].log_softmax(-1)[7]

    loss().backward()
    weight = model.model.layers[1].mlp.down_proj.weight
    grad, step = weight.grad.clone(), 2e-3  # transformers norms in float32, which a shorter step would show
    unit = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * unit
            ends.append(float(loss()))
            weight -= sign * step * unit
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float((grad * unit).sum()), rel=3e-3)


def test_bfloat16_model():
    model = tiny_model("llama").bfloat16()
    with torch.no_grad(), dual_steering(model, direction(), kl_budget=0.5) as steering:
        assert model(IDS).logits.dtype == torch.bfloat16
    assert steering.meter.last.lam.dtype == torch.float32


@pytest.mark.parametrize("method", ["dual", "euclidean"])
@pytest.mark.parametrize("budget", [1e-4, 0.5])
def test_what_rounding_to_the_models_type_adds_is_metered(budget, method):
    model, seen = tiny_model("llama").bfloat16(), []
    geometry = SoftmaxGeometry.from_model(model)
    with dual_steering(model, direction(), kl_budget=budget, method=method, positions=All()) as steering:
        model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        with suspended(model):
            model(IDS)
        with torch.no_grad():
            model(IDS)
    before, after = (state.detach().double() for state in seen)
    exact = SoftmaxGeometry(geometry.weight.double()).kl(before, after).mean()
    measured = steering.meter.compute()
    assert measured["kl"] == pytest.approx(float(exact), rel=1e-3)
    assert measured["probe_change"] == pytest.approx(float(((after - before) @ direction().double()).mean()), rel=1e-3)


class TestRefused:
    def attach(self, *args, family="llama", **settings):
        model = tiny_model(family)
        with DualSteering(*args, **settings).attach(model):
            raise AssertionError("attached")

    def test_another_model_or_width(self):
        probe = ConceptProbe(direction(), fingerprint="ab" * 32)
        with pytest.raises(IncompatibleModelError, match="fingerprint abababababab"):
            self.attach(probe, kl_budget=0.1)
        own = ConceptProbe(direction(), fingerprint=model_fingerprint(tiny_model("llama")))
        DualSteering(own, kl_budget=0.1).attach(tiny_model("llama")).remove()
        DualSteering(probe, kl_budget=0.1, check_model=False).attach(tiny_model("llama")).remove()
        with pytest.raises(IncompatibleModelError, match="width 7, but unembed_in of LlamaForCausalLM has width 32"):
            self.attach(direction(width=7), kl_budget=0.1)

    def test_a_softcapped_head(self):
        with pytest.raises(IncompatibleModelError, match="caps its logits"):
            self.attach(direction(), kl_budget=0.1, family="gemma2")
        with pytest.raises(RecipeError, match="on_softcap='pullback'"):
            DualSteering(direction(), kl_budget=0.1, on_softcap="pullback")

    def test_a_compiled_model(self):
        model = tiny_model("llama")
        model.compile(backend="eager")
        with pytest.raises(CompiledModelError, match="compiled"):
            DualSteering(direction(), kl_budget=0.1).attach(model)

    @pytest.mark.parametrize(
        ("settings", "error", "text"),
        [
            ({"kl_budget": 0.1, "method": "reverse"}, RecipeError, "method='reverse'"),
            ({"kl_budget": 0.1, "t": 1.0}, RecipeError, r"\['t', 'kl_budget'\]"),
            ({}, RecipeError, "got none"),
            ({"target_prob": 0.5}, RecipeError, "needs pairs="),
            ({"kl_budget": 0.1, "positions": Tokens(())}, PositionError, "can never choose"),
        ],
    )
    def test_settings(self, settings, error, text):
        with pytest.raises(error, match=text):
            DualSteering(direction(), **settings)

    @pytest.mark.parametrize("wrong", [torch.zeros(32), torch.full((32,), torch.nan)])
    def test_directions_that_are_none(self, wrong):
        with pytest.raises(RecipeError, match=r"zero|nan"):
            DualSteering(wrong, kl_budget=0.1)

    def test_transform_alone(self):
        with pytest.raises(RecipeError, match="acts through attach"):
            DualSteering(direction(), kl_budget=0.1).transform(Site("unembed_in"), torch.zeros(1, 1, 32), None)
