"""Quantised bases: three choices for a full-weight donor, and adapters on 8 bits."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.tokens.positions import Last, Span
from lightning_interp.errors import QuantizedModelError, RecipeError
from lightning_interp.grafting import Graft, GraftEvaluator, GraftPlan, GraftPrompt, ModelSource
from lightning_interp.testing import byte_tokenizer, tiny_model, tiny_pair

WIDE = {"hidden_size": 64, "intermediate_size": 128}
PLANS = [
    GraftPlan.at(Span(1, 4) | Last()),
    GraftPlan.at(Last(), ["ATTN", "FFN"], layers="upper_half"),
    GraftPlan.at(~Last()),
    GraftPlan(),
]
IDS = torch.randint(5, 261, (len(PLANS), 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def quantise(tmp_path_factory, portable_4bit):
    """``quantise(model, bits)``: a copy of a model in 4 or 8 bits."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def load(model, bits):
        folder = tmp_path_factory.mktemp("tiny")
        model.save_pretrained(folder)
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        settings = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=settings, dtype=torch.float32
            ).eval()

    return load


@pytest.fixture(scope="module")
def four(quantise):
    """The dense pair, and the same in 4 bits."""
    dense = tiny_pair("llama", **WIDE)
    return dense, tuple(quantise(model, 4) for model in dense)


@torch.no_grad()
def run(model, ids=IDS):
    return model(ids).logits


@torch.no_grad()
def grafted(recipient, donor, plan, ids=IDS):
    with Graft(donor, plan).attach(recipient):
        return recipient(ids).logits


def dequantised(model):
    """A dense model with exactly the values that the 4-bit weights stand for."""
    from bitsandbytes.functional import dequantize_4bit

    dense = tiny_model("llama", **WIDE)
    for name, parameter in dense.named_parameters():
        source = model.get_parameter(name)
        state = getattr(source, "quant_state", None)
        parameter.data = dequantize_4bit(source.data, state).float() if state is not None else source.data.clone()
    return dense


def test_both_compares_the_quantised_pair(four):
    _, (recipient, donor) = four
    both = ModelSource(donor, quantized="both")
    assert torch.equal(grafted(recipient, both, GraftPlan.whole()), run(donor))
    assert torch.equal(grafted(recipient, both, GraftPlan()), run(recipient))
    expected = grafted(dequantised(recipient), dequantised(donor), PLANS)
    actual = grafted(recipient, both, PLANS)
    assert (actual - expected).abs().max() <= 2e-3 * expected.abs().max()
    assert (expected[0] - run(recipient)[0]).abs().max() > 0.1


@pytest.mark.parametrize("swap", [False, True])
def test_mixed_takes_dense_rows_and_warns(four, swap):
    (_, dense), (quantised, _) = four
    recipient, donor = (dense, quantised) if swap else (quantised, dense)
    mixed = ModelSource(donor, quantized="mixed")
    with pytest.warns(UserWarning, match=r"Linear4bit.*finetuning and quantisation error together"):
        mixed.check(ModelMap.build(recipient))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = grafted(recipient, mixed, PLANS)
        assert torch.equal(grafted(recipient, mixed, GraftPlan.whole()), run(donor))
    plain = {id(m): dequantised(m) if m is quantised else m for m in (recipient, donor)}
    expected = grafted(plain[id(recipient)], plain[id(donor)], PLANS)
    assert (actual - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_what_is_refused(four, hook_count):
    (dense, other), (quantised, second) = four
    for recipient, donor in ((quantised, other), (dense, second), (quantised, second)):
        with pytest.raises(QuantizedModelError, match=r"q_proj \(28 modules.*quantized='both' or 'mixed'"):
            Graft(donor, GraftPlan.at(Last())).attach(recipient)
        assert hook_count(recipient, donor) == 0
    with pytest.raises(QuantizedModelError, match=r"recipient has Linear4bit and the donor no quantised weights"):
        ModelSource(other, quantized="both").check(ModelMap.build(quantised))
    with pytest.raises(RecipeError, match=r"quantized='perhaps'"):
        ModelSource(other, quantized="perhaps")


def test_the_choice_reaches_the_evaluator(four):
    _, (recipient, donor) = four
    evaluator = GraftEvaluator([GraftPrompt("Ann met", "Bo", {"FE": "Ann"})], byte_tokenizer())
    rows = evaluator.evaluate(recipient, ModelSource(donor, quantized="both")).rows
    assert {row["plan"] for row in rows} == set(evaluator.plans)


# Adapters.


def test_an_adapter_on_an_eight_bit_base(quantise):
    base = quantise(tiny_model("llama", **WIDE), 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, use_rslora=True)
        model = inject_adapter_in_model(settings, copy.deepcopy(base)).eval()
    assert type(model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear8bitLt"
    assert torch.equal(grafted(model, "default", GraftPlan()), run(base))
    assert torch.equal(grafted(model, "default", GraftPlan.whole()), run(model))
    assert (run(model) - run(base)).abs().max() > 0.1
    # 8-bit maps round their inputs, so the plain model itself depends on its batch; no graft adds to that.
    floor = max(float((run(model)[i] - run(model, IDS[i : i + 1])[0]).abs().max()) for i in range(len(IDS)))
    together = grafted(model, "default", PLANS)
    for row, plan in enumerate(PLANS):
        alone = grafted(model, "default", plan, IDS[row : row + 1])[0]
        assert (together[row] - alone).abs().max() <= 2 * floor
    # In the same batch, adding the low-rank term by hand on the masked rows is the same graft.
    mask = torch.zeros(IDS.shape, dtype=torch.bool)
    mask[:, 1:4] = mask[:, -1] = True
    handles = [
        layer.register_forward_hook(
            lambda m, args, _: (
                m.base_layer(args[0])
                + mask[..., None] * m.lora_B["default"](m.lora_A["default"](args[0])) * m.scaling["default"]
            )
        )
        for layer in model.modules()
        if hasattr(layer, "lora_A")
    ]
    by_hand = run(model)
    for handle in handles:
        handle.remove()
    ours = grafted(model, "default", PLANS[0])
    assert (ours - by_hand).abs().max() <= 2 * floor
    assert (by_hand - run(model)).abs().max() > 5 * floor


def test_two_adapters_on_a_four_bit_base(four):
    _, (base, _) = four
    model = copy.deepcopy(base)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, rank in (("task", 4), ("relation", 2)):
            settings = LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
            inject_adapter_in_model(settings, model, adapter_name=name)
    model.eval()
    donors = {"task": "task", "relation": "relation"}
    for name in donors:
        for module in model.modules():
            if hasattr(module, "set_adapter") and hasattr(module, "base_layer"):
                module.set_adapter(name)
        assert (grafted(model, donors, GraftPlan.whole(name)) - run(model)).abs().max() <= 2e-3 * run(model).abs().max()
    assert torch.equal(grafted(model, donors, GraftPlan()), run(base))
