from __future__ import annotations

import json

import peft
import pytest
import torch
from adapters_under_test import TARGETS, Waits, adapted, merged, updates
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.core.weights.low_rank import LowRank
from lightning_interp.errors import IncompatibleModelError, ManifestError, RecipeError
from lightning_interp.lora import ablated, export_ablated, singular_directions, update_norms
from lightning_interp.lora.svd import directions_of, kept_directions
from lightning_interp.testing import tiny_model

# 2026-11: peft 0.21 asks transformers for a property under its old name.
pytestmark = [
    pytest.mark.usefixtures("two_layers"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

IDS = torch.arange(20).view(2, 10)
CASES = [("llama", "lora"), ("llama", "rslora patterns"), ("llama", "wide"), ("gpt2", "patterns"), ("gpt2", "tables")]
CASES += [("gpt_neox", "rslora")]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def part(update, kept):
    """Some singular directions of a full matrix."""
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    return (left[:, kept] * values[kept]) @ right[kept]


KEEPS = {"full": slice(None), "top1": slice(1), "rest": slice(1, None), "rest2": slice(2, None), "top3": slice(3)}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_an_ablated_adapter_is_the_base_with_that_part_of_each_full_update(family, kind):
    model = adapted(family, kind, dtype=torch.float64)
    before, expected = state(model), updates(model)
    for keep, kept in KEEPS.items():
        changes = {path: part(update, kept) for path, update in expected.items()}
        with ablated(model, keep):
            for path, update in updates(model).items():
                torch.testing.assert_close(update, changes[path], atol=1e-12, rtol=0)
            if keep in ("full", "rest"):
                torch.testing.assert_close(logits(model), logits(merged(family, changes)), atol=1e-5, rtol=1e-5)
            same = {name for name, tensor in state(model).items() if torch.equal(tensor, before[name])}
            assert {name for name in before if "lora_" not in name} <= same
            assert (same == set(before)) == (keep == "full")
        assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize(("family", "kind"), [("llama", "patterns"), ("gpt2", "tables")])
def test_top1_and_rest_add_up_to_full_in_float32(family, kind):
    model = adapted(family, kind)
    whole, parts = updates(model), []
    for keep in ("top1", "rest"):
        with ablated(model, keep):
            parts.append(updates(model))
    for path, update in whole.items():
        assert float((parts[0][path] + parts[1][path] - update).abs().max()) < 1e-6
        assert float(parts[0][path].norm()) > float(parts[1][path].norm()) / 3


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_directions_rebuild_the_update_orthonormal_and_in_order(rank, wide, high, split, seed):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, wide, generator=generator), torch.randn(high, rank, generator=generator)
    pair = LowRank("", None, "", None, down, up, None, 0.5, frozenset(), False)
    product = pair.up.double() @ pair.down.double()
    found = directions_of(pair)
    assert len(found.values) == min(rank, wide, high)
    assert bool((found.values.diff() <= 0).all())
    eye = torch.eye(len(found.values), dtype=torch.float64)
    torch.testing.assert_close(found.outputs.T @ found.outputs, eye)
    torch.testing.assert_close(found.inputs @ found.inputs.T, eye)
    rebuilt = []
    for kept in (slice(None), slice(split), slice(split, None)):
        down, up = found.factors(kept, rank)
        assert (down.shape, up.shape) == (pair.down.shape, pair.up.shape)
        rebuilt.append(up @ down)
    torch.testing.assert_close(rebuilt[0], product)
    torch.testing.assert_close(rebuilt[1] + rebuilt[2], product)
    torch.testing.assert_close(rebuilt[1], part(product, slice(split)))


def test_directions_are_those_of_the_full_matrix_with_a_sign_of_their_own():
    model = adapted("gpt2", "rslora", dtype=torch.float64)
    found = singular_directions(model)
    for path, update in updates(model).items():
        one = found[path]
        torch.testing.assert_close(one.scale * one.values, torch.linalg.svdvals(update)[: len(one.values)])
        torch.testing.assert_close(update @ one.inputs.T, one.scale * one.outputs * one.values)
        assert bool((one.outputs.gather(0, one.outputs.abs().argmax(0, keepdim=True)) > 0).all())


def test_an_exception_inside_puts_the_adapter_back():
    model = adapted()
    before = state(model)
    with pytest.raises(ZeroDivisionError), ablated(model, "rest"), ablated(model, "top1"):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize(("family", "kind"), [("llama", "rslora"), ("gpt2", "patterns")])
def test_an_export_is_an_ordinary_folder_that_peft_reads(tmp_path, family, kind):
    model = adapted(family, kind, name="mine")
    changes = {path: part(update, slice(1, None)) for path, update in updates(model, "mine").items()}
    before = state(model)
    folder = export_ablated(model, tmp_path / "rest", "rest", base=f"tiny:{family}")
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    read = peft.PeftModel.from_pretrained(tiny_model(family), folder).eval()
    torch.testing.assert_close(logits(read).double(), logits(merged(family, changes)), atol=2e-5, rtol=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"]) == (4, kind == "rslora")
    with pytest.raises(ManifestError, match="rest exists already and is not empty"):
        export_ablated(model, tmp_path / "rest", "top1", base=f"tiny:{family}")


# How large the update is


@pytest.mark.parametrize(("family", "kind"), [*CASES, ("llama", "dora"), ("gpt2", "dora"), ("gpt2", "biased")])
def test_update_norms_are_those_of_full_matrices(family, kind):
    model = adapted(family, kind)
    found = update_norms(model)
    if kind == "dora":  # what each module does to the rows of an identity, less what its base does
        expected = {}
        for path in updates(model):
            layer = model.get_submodule(path).double()
            eye = torch.eye(layer.in_features, dtype=torch.float64)
            expected[path] = float((layer(eye) - layer.base_layer(eye)).detach().norm())
    else:
        expected = {path: float(update.norm()) for path, update in updates(model).items()}
    assert list(found.modules) == list(expected)
    assert found.modules == pytest.approx(expected, rel=1e-6)
    assert found.total == pytest.approx(sum(norm**2 for norm in expected.values()) ** 0.5, rel=1e-6)


def test_no_full_matrix_is_built_and_the_host_never_waits_for_one_number():
    model = adapted("llama", r=2)
    with Waits() as watch:
        update_norms(model)
    assert watch.waits == 0  # the norms come over together
    assert watch.largest <= 2 * 64  # of the MLP's inner width


# Refusals


def test_what_is_no_low_rank_pair_is_refused_by_name():
    for kind, what in (("dora", r"rescales the rows of the base \(DoRA\)"), ("biased", r"adds a bias of its own")):
        model = adapted("gpt2", kind)
        with pytest.raises(
            IncompatibleModelError, match=rf"The ablation 'top1' .* adapter 'default' {what}.*: tr.*h.0"
        ):
            ablated(model, "top1").__enter__()
    saved = adapted(modules_to_save=["lm_head"])
    for ask in (update_norms, singular_directions):
        with pytest.raises(IncompatibleModelError, match=r"has a ModulesToSaveWrapper there: lm_head of Llama"):
            ask(saved)
    with pytest.raises(IncompatibleModelError, match=r"is a KasaLinearVariant: .*Use an adapter of plain LoRA"):
        singular_directions(adapted(kasa_config=peft.tuners.lora.config.KasaConfig()))
    experts = adapted("llama", target_modules=[], target_parameters=["mlp.down_proj.weight"])
    with pytest.raises(IncompatibleModelError, match=r"has a ParamWrapper there: model.layers.0.mlp.down_proj"):
        singular_directions(experts)
    with pytest.raises(IncompatibleModelError, match=r"does not know how DoRA changes the embedding transformer.wte"):
        update_norms(adapted("gpt2", "dora", more=["wte"]))


def test_trained_biases_of_the_base_are_refused():
    model = adapted("gpt2", bias="lora_only")
    with pytest.raises(IncompatibleModelError, match=r"trained with bias='lora_only', which changed .* no part of any"):
        update_norms(model)


def test_which_adapter_is_meant_must_be_clear():
    with pytest.raises(IncompatibleModelError, match=r"carries no adapter, expected one. Inject one first"):
        update_norms(tiny_model("llama"))
    model = adapted()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TARGETS["llama"], r=1), model, adapter_name="other")
    with pytest.raises(IncompatibleModelError, match=r"carries the adapters 'default', 'other', expected one. Name it"):
        update_norms(model)
    assert update_norms(model, adapter="other").total == 0
    assert update_norms(model, adapter="default").total > 0
    with pytest.raises(IncompatibleModelError, match=r"has no adapter 'third'; its adapters are 'default', 'other'"):
        update_norms(model, adapter="third")


def test_a_merged_or_disabled_adapter_is_refused():
    model = adapted()
    layer = model.model.layers[0].self_attn.q_proj
    layer.enable_adapters(False)
    with pytest.raises(IncompatibleModelError, match=r"is disabled in .*q_proj.*Enable adapters first"):
        ablated(model, "top1").__enter__()
    layer.enable_adapters(True)
    layer.merge()
    with pytest.raises(IncompatibleModelError, match=r"is merged into .*Unmerge first"):
        ablated(model, "full").__enter__()


@pytest.mark.parametrize("keep", ["top", "top0", "rest0", "all", "", "rest-1"])
def test_an_unknown_ablation_is_refused(keep):
    with pytest.raises(RecipeError, match=rf"No ablation '{keep}'; expected 'full', 'top1'"):
        kept_directions(keep)
