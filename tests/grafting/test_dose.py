"""Doses: a graft at a dose is a graft of interpolated weights, and gradients reach the dose."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import Oracle, Rule, assignment, cells_of, layer_components
from peft import LoraConfig, inject_adapter_in_model

from lightning_interp.core.tokens.positions import All, Last, Span
from lightning_interp.errors import RecipeError
from lightning_interp.grafting import Graft, GraftPlan, GraftRule
from lightning_interp.testing import tiny_model

IDS = torch.randint(5, 261, (2, 9), generator=torch.Generator().manual_seed(1))
LINEAR = ("llama", "gpt2", "gemma2", "opt", "phi3")  # plain, split and fused maps, norms around one, biases


def between(recipient, donor, dose):
    """The recipient with every weight moved towards the donor's."""
    mixed = copy.deepcopy(recipient)
    with torch.no_grad():
        for mine, other in zip(mixed.parameters(), donor.parameters(), strict=True):
            mine.lerp_(other, dose)
    return mixed


@torch.no_grad()
def grafted(recipient, donor, plan, ids=IDS, **options):
    with Graft(donor, plan, **options).attach(recipient):
        return recipient(ids).logits


@pytest.mark.parametrize(
    ("family", "execution"),
    [(f, e) for f in LINEAR for e in ("auto", "overwrite", "partition", "dense") if f == "gpt2" or e == "auto"],
)
def test_a_dose_is_interpolated_weights(family, execution, pairs, agree):
    recipient, donor = pairs(family)
    oracle = Oracle(family, recipient, between(recipient, donor, 0.3), donor)
    every = frozenset(cells_of(family, ["PAPER_ALL"], range(4), 4))
    part = frozenset(cells_of(family, ["ATTN", "FFN"], (2, 3), 4))
    plan = GraftPlan(
        (GraftRule(Span(1, 4), dose=0.3), GraftRule(Last(), ("ATTN", "FFN"), "upper_half"), GraftRule(Span(0)))
    )
    table = assignment(
        9, [Rule(frozenset({1, 2, 3}), every), Rule(frozenset({8}), part, 2), Rule(frozenset({0}), every, 2)]
    )
    expected = oracle.logits(IDS[0].tolist(), table)
    agree(grafted(recipient, donor, plan, execution=execution)[0], expected, f"19 dose, {family}")


@pytest.mark.parametrize("family", LINEAR)
def test_every_component_at_a_dose(family, pairs, agree):
    recipient, donor = pairs(family)
    oracle = Oracle(family, recipient, between(recipient, donor, 0.6))
    for component in layer_components(family):
        plan = GraftPlan.at(Span(2, 6), component, dose=0.6)
        cells = frozenset(cells_of(family, [component], range(4), 4))
        expected = oracle.logits(IDS[0].tolist(), assignment(9, [Rule(frozenset(range(2, 6)), cells)]))
        agree(grafted(recipient, donor, plan)[0], expected, f"19 dose of one component, {family}")


@pytest.mark.parametrize("family", [*LINEAR, "qwen2_moe"])
def test_the_ends_are_exact(family, pairs):
    recipient, donor = pairs(family)
    for dose, model in ((0, recipient), (1, donor)):
        plan = GraftPlan.at(All(), "ALL", head="follow", final_norm="follow", dose=float(dose))
        with torch.no_grad():
            assert torch.equal(grafted(recipient, donor, plan), model(IDS).logits)
    assert torch.equal(
        grafted(recipient, donor, GraftPlan.at(Last(), dose=1.0)), grafted(recipient, donor, GraftPlan.at(Last()))
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tensor_is_a_number_that_gradients_reach(family, pairs):
    recipient, donor = (copy.deepcopy(model).double() for model in pairs(family))
    plan = GraftPlan.at(Span(2, 5) | Last(), "BLOCK", dose="a")
    for value in (0.0, 0.35, 1.0):
        dose = torch.tensor(value, dtype=torch.double, requires_grad=True)
        with Graft(donor, plan, doses={"a": dose}).attach(recipient):
            logits = recipient(IDS).logits
        number = grafted(recipient, donor, GraftPlan.at(Span(2, 5) | Last(), "BLOCK", dose=value))
        assert (logits - number).abs().max() < 1e-4
        (slope,) = torch.autograd.grad(logits[:, -1].square().sum(), dose)
        small = 1e-3

        def height(at):
            end = {"a": torch.tensor(at, dtype=torch.double)}
            return float(grafted(recipient, donor, plan, doses=end)[:, -1].square().sum())

        measured = (height(value + small) - height(value - small)) / (2 * small)
        assert float(slope) == pytest.approx(measured, rel=2e-2)


def test_the_gradient_is_that_of_an_interpolated_model(pairs):
    recipient, donor = pairs("llama")
    dose = torch.tensor(0.4, requires_grad=True)
    everywhere = GraftPlan.at(All(), "ALL", head="follow", final_norm="follow", dose="a")
    with Graft(donor, everywhere, doses={"a": dose}).attach(recipient):
        ours = recipient(IDS).logits
    other = dict(donor.named_parameters())
    mixed = {name: p.detach() + dose * (other[name] - p).detach() for name, p in recipient.named_parameters()}
    theirs = torch.func.functional_call(recipient, mixed, (IDS,)).logits
    assert (ours - theirs).abs().max() < 1e-4
    slopes = [torch.autograd.grad(logits[..., 7].sum(), dose)[0] for logits in (ours, theirs)]
    assert float(slopes[0]) == pytest.approx(float(slopes[1]), rel=1e-3)


def test_one_dose_a_layer(pairs, agree):
    recipient, donor = pairs("llama")
    doses = torch.tensor([0.0, 0.3, 0.7, 1.0], requires_grad=True)
    plan = GraftPlan.at(Last(), "BLOCK", dose="depth")
    with Graft(donor, plan, doses={"depth": doses}).attach(recipient):
        logits = recipient(IDS).logits
    mixed = copy.deepcopy(recipient)
    with torch.no_grad():
        for layer, dose in enumerate(doses.tolist()):
            for mine, other in zip(
                mixed.model.layers[layer].parameters(), donor.model.layers[layer].parameters(), strict=True
            ):
                mine.lerp_(other, dose)
    agree(logits.detach(), grafted(recipient, mixed, GraftPlan.at(Last(), "BLOCK")), "a dose a layer")
    (slope,) = torch.autograd.grad(logits[:, -1].square().sum(), doses)
    assert (slope != 0).all()


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_an_adapter_at_a_dose(settings, agree):
    model = tiny_model("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings)
        model = inject_adapter_in_model(config, copy.deepcopy(model)).eval()
    merged = copy.deepcopy(model)
    plain = tiny_model("llama")
    for path, module in merged.named_modules():
        if hasattr(module, "base_layer"):
            module.merge()
            plain.get_submodule(path).weight.data = module.base_layer.weight.detach().clone()
    for plan in (GraftPlan.at(Last(), dose=0.25), GraftPlan.at(All(), dose=0.25)):
        agree(grafted(model, "default", plan), grafted(tiny_model("llama"), plain, plan), "adapter at a dose")


@pytest.mark.parametrize(
    ("dose", "doses", "components", "message"),
    [
        ("a", {}, "BLOCK", r"dose='a', but the doses are none.*doses=\{'a': tensor\}"),
        ("a", {"b": torch.tensor(1.0)}, "BLOCK", r"dose='a', but the doses are b"),
        ("a", {"a": torch.ones(3)}, "BLOCK", r"'a' has shape \(3,\); expected a scalar or \[4\]"),
        ("a", {"a": torch.ones(4)}, "PAPER_ALL", r"one value a layer, but the rule grafts embed"),
    ],
)
def test_doses_that_do_not_fit(dose, doses, components, message, pairs, hook_count):
    recipient, donor = pairs("llama")
    with pytest.raises(RecipeError, match=message):
        Graft(donor, GraftPlan.at(Last(), components, dose=dose), doses=doses).attach(recipient)
    assert hook_count(recipient, donor) == 0


def test_a_router_has_no_dose(pairs):
    recipient, donor = pairs("qwen2_moe")
    with pytest.raises(RecipeError, match=r"dose=0.5 on 'moe'"):
        Graft(donor, GraftPlan.at(Last(), dose=0.5)).attach(recipient)
    Graft(donor, GraftPlan.at(Last(), "ATTN", dose=0.5)).attach(recipient).remove()


@pytest.mark.parametrize("dose", [-0.1, 1.5, float("nan")])
def test_a_dose_outside(dose):
    with pytest.raises(RecipeError, match=rf"dose={dose}\) is outside of \[0, 1\]"):
        GraftPlan.at(Last(), dose=dose)


def test_what_has_no_complement_of_cells():
    with pytest.raises(RecipeError, match=r"dose=0.5"):
        GraftPlan.at(Last(), dose=0.5).dual()
    plan = GraftPlan.at(Last(), dose=0.5)
    assert plan.complement().rules[0].dose == 0.5
    assert GraftPlan.from_json(plan.to_json()) == plan
    assert "dose" not in GraftPlan.at(Last()).to_json()
