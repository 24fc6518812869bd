"""The contract on interventions of three kinds: a reader, an addition, weights of another model."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_interp.core.hooks.capture import ActivationCapture
from lightning_interp.core.hooks.intervention import Compose, Intervention
from lightning_interp.core.model.sites import Site
from lightning_interp.core.tokens.positions import All, Last, Span, Substring
from lightning_interp.errors import IncompatibleModelError
from lightning_interp.grafting.intervention import Graft
from lightning_interp.grafting.plan import GraftPlan
from lightning_interp.testing import FAMILIES
from lightning_interp.testing.contract import InterventionContract


class AddVector(Intervention):
    """x + strength * v at chosen tokens of one site."""

    def __init__(self, site, vector, strength=1.0, positions=All()):  # noqa: B008
        self.site, self.vector, self.strength, self.positions = site, vector, strength, positions

    def sites(self, model_map):
        return (self.site,)

    def transform(self, site, x, step):
        if self.strength == 0:
            return x
        chosen = self.positions.mask(step)[..., None]
        return torch.where(chosen, x + self.strength * self.vector.to(x), x)


def vector(seed=0, width=32):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def donor_of(model):
    donor = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in donor.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise, alpha=0.3 * float(parameter.std()))
    return donor


class TestActivationCapture(InterventionContract):
    families = ("gemma2",)
    changes_output = False

    def make(self, model):
        sites = [Site("resid_pre", 0), Site("resid_post", 2), Site("attn_in", 1), Site("logits")]
        return ActivationCapture(sites, positions=Substring("red", missing="ignore"), keep="all")

    def make_identity(self, model):
        return self.make(model)


class TestAddVector(InterventionContract):
    families = ("opt",)

    def make(self, model):
        return AddVector(Site("resid_post", 1), vector(), 2.0, Span(2, 4) | Substring("fox"))

    def make_identity(self, model):
        return AddVector(Site("resid_post", 1), vector(), 0.0)


class TestAddVectorAtTheLastToken(InterventionContract):
    families = ("gpt2",)
    cache_consistent = False

    def make(self, model):
        return AddVector(Site("resid_pre", -1), vector(1), 2.0, Last())


class TestCompose(InterventionContract):
    families = ("gpt_neox", "llama")

    def make(self, model):
        first = AddVector(Site("resid_post", 0), vector(), 1.0)
        return Compose(first, AddVector(Site("attn_in", 2), vector(1), -1.0), ActivationCapture([Site("logits")]))

    def make_identity(self, model):
        return Compose(AddVector(Site("resid_post", 0), vector(), 0.0), ActivationCapture([Site("final_norm")]))


class TestGraft(InterventionContract):
    families = ("llama", "bloom", "qwen2_moe")

    def make(self, model):
        return Graft(donor_of(model), GraftPlan.at(Span(1, 4), components=("q", "v", "BLOCK"), layers="1-2"))

    def make_identity(self, model):
        return Graft(donor_of(model), GraftPlan())


def test_every_family_is_tried_by_a_class_and_by_one_that_names_none():
    classes = InterventionContract.__subclasses__()
    assert set().union(*(kind.families for kind in classes if "families" in vars(kind))) == set(FAMILIES)
    assert InterventionContract.families == FAMILIES


# The contract must see what is wrong. Each of these breaks one promise, and the test named beside it must fail.


class Leaky(AddVector):
    def install(self, attachment):
        super().install(attachment)
        attachment.model_map.head.register_forward_hook(lambda *_: None)


class Freezing(AddVector):
    def install(self, attachment):
        super().install(attachment)
        attachment.model_map.head.weight.requires_grad_(False)


class Swapping(AddVector):
    def install(self, attachment):
        super().install(attachment)
        attachment.model_map.head.weight.data *= 1.5


class Evaluating(AddVector):
    def install(self, attachment):
        super().install(attachment)
        attachment.model_map.model.train()


class Noisy(AddVector):
    def transform(self, site, x, step):
        return x + 0.1 * torch.randn_like(x)


class ColumnWise(AddVector):
    def transform(self, site, x, step):
        shift = torch.zeros_like(x)
        shift[:, :1] = 1.0
        return x + shift


class Counting(AddVector):
    calls = 0

    def transform(self, site, x, step):
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


class Nothing(AddVector):
    def transform(self, site, x, step):
        return x


class BoundHook(AddVector):
    def install(self, attachment):
        point = attachment.model_map.module(self.site)
        attachment.add(point.module.register_forward_hook(self.hook))

    def hook(self, module, args, output):
        x = output if isinstance(output, torch.Tensor) else output[0]
        return x + self.vector


@pytest.mark.parametrize(
    ("kind", "test"),
    [
        (Leaky, "test_attach_and_remove_leave_no_trace"),
        (Freezing, "test_attach_and_remove_leave_no_trace"),
        (Swapping, "test_attach_and_remove_leave_no_trace"),
        (Evaluating, "test_attach_and_remove_leave_no_trace"),
        (Noisy, "test_attach_and_remove_leave_no_trace"),
        (Leaky, "test_attach_is_all_or_nothing"),
        (Leaky, "test_exception_in_a_forward_pass_leaves_nothing"),
        (Swapping, "test_acts_while_attached_and_not_after"),
        (Nothing, "test_acts_while_attached_and_not_after"),
        (Nothing, "test_works_on_a_peft_model"),
        (ColumnWise, "test_left_padding_changes_nothing"),
        (ColumnWise, "test_cached_decoding_equals_one_pass"),
        (ColumnWise, "test_generation_with_and_without_cache_agree"),
        (Counting, "test_runs_without_grad_and_in_inference_mode"),
        (Counting, "test_two_attachments_compose_in_order"),
        (Counting, "test_works_inside_another_module"),
        (Counting, "test_identity_is_bit_identical"),
        (BoundHook, "test_copies_made_while_attached_are_plain"),
    ],
)
def test_the_contract_sees_a_broken_promise(kind, test):
    class Broken(InterventionContract):
        def make(self, model):
            return kind(Site("attn_in" if kind is Counting else "resid_post", 1), 4 * vector())

        make_identity = make

    with pytest.raises(AssertionError):
        getattr(Broken(), test)("llama")


def test_the_contract_sees_gradient_checkpointing_that_disagrees():
    class Broken(InterventionContract):
        def make(self, model):
            return Counting(Site("attn_in", 1), vector())

    with pytest.raises(AssertionError, match="with gradient checkpointing"):
        Broken().test_gradient_checkpointing_changes_nothing("llama")


def test_the_contract_sees_a_wide_activation():
    class Wide(AddVector):
        def transform(self, site, x, step):
            return x + self.vector  # float32 whatever the model

    class Broken(InterventionContract):
        def make(self, model):
            return Wide(Site("resid_post", 1), vector())

    with pytest.raises(IncompatibleModelError, match=r"resid_post\.1 is torch\.float32 .* has torch\.bfloat16"):
        Broken().test_bfloat16_stays_bfloat16("llama")


def test_make_is_asked_for():
    with pytest.raises(NotImplementedError, match="InterventionContract must define make"):
        InterventionContract().test_acts_while_attached_and_not_after("llama")
