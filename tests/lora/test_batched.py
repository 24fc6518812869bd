"""Adapters of several owners in one pass: the algebra of their branches, and each as PEFT has it alone."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import IncompatibleModelError
from lightning_interp.lora.adapter_branch import Branch, add_branches
from lightning_interp.lora.batched import AdapterBatch, Share
from lightning_interp.models import LoraSettings
from lightning_interp.models.sources.adapters import save_adapter
from lightning_interp.models.training.lora import inject_lora
from lightning_interp.testing import tiny_model

pytestmark = pytest.mark.usefixtures("two_layers")

# The branches of one map


def drawn(*shape, seed, dtype=torch.float64):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


@st.composite
def passes(draw):
    """Sizes of groups (some empty, some rows of nobody), ranks, scales and dropout."""
    groups = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.booleans()), min_size=1, max_size=4))
    return groups, draw(st.integers(0, 3)), draw(st.booleans())


def one_by_one(out, x, weights, groups, noises):
    """The definition: each row on its own."""
    rows, start = list(out.unbind()), 0
    for (size, _, _), (down, up, scale), noise in zip(groups, weights, noises, strict=True):
        for i in range(start, start + size):
            seen = x[i] if noise is None else x[i] * noise[i - start]
            rows[i] = rows[i] + scale * up.T @ (down @ seen)
        start += size
    return torch.stack(rows) if rows else out


@given(passes(), st.booleans(), st.booleans())
def test_a_branch_and_its_gradients_are_those_of_its_own_rows(made, stacked, cubes):
    groups, free, input_is_trained = made
    n = sum(size for size, _, _ in groups) + free
    weights = [(drawn(r, 3, seed=i), drawn(r, 4, seed=50 + i), 0.5 + i) for i, (_, r, _) in enumerate(groups)]
    noises = [drawn(size, 3, seed=90).detach() if drops else None for size, _, drops in groups]
    leaves = [drawn(n, 4, seed=7), drawn(n, 3, seed=8).requires_grad_(input_is_trained)]
    trained = [leaf for leaf in leaves if leaf.requires_grad] + [m for pair in weights for m in pair[:2]]
    direction = drawn(n, 4, seed=9).detach()
    results = []
    for ours in (True, False):
        out, x = leaves[0] * 1.0, leaves[1]
        if ours:
            starts = [sum(size for size, _, _ in groups[:i]) for i in range(len(groups))]
            spans = [(start, start + size) for start, (size, _, _) in zip(starts, groups, strict=True)]
            branches = [Branch(*w, span, noise) for w, span, noise in zip(weights, spans, noises, strict=True)]
            if cubes:  # as a model has them: [batch, time, features]
                out, x = out[:, None], x[:, None]
            result = add_branches(out, x, branches, stacked=stacked).view(n, 4)
        else:
            result = one_by_one(out, x, weights, groups, noises)
        grads = torch.autograd.grad((result * direction).sum(), trained, allow_unused=True)
        results.append(
            [result, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, trained, strict=True))]
        )
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stacked", [False, True])
def test_what_is_not_finite_spoils_its_own_adapter_alone(stacked):
    x, out = drawn(4, 3, seed=0), drawn(4, 2, seed=1)
    weights = [(drawn(2, 3, seed=2), drawn(2, 2, seed=3)), (drawn(1, 3, seed=4), drawn(1, 2, seed=5))]
    with torch.no_grad():
        x[0, 0], weights[0][1][0, 0] = math.nan, math.inf
    branches = [Branch(*weights[0], 1.0, (0, 2)), Branch(*weights[1], 1.0, (2, 4))]
    result = add_branches(out * 1, x, branches, stacked=stacked)
    grads = torch.autograd.grad(result.sum(), [x, *weights[0], *weights[1]])
    assert not result[0].isfinite().any()
    assert result[2:].isfinite().all()
    assert grads[0][2:].isfinite().all()
    assert not grads[1].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads[3:])


@pytest.mark.parametrize("stacked", [False, True])
def test_under_autocast_and_on_a_half_base_weights_keep_float32_gradients(stacked):
    x = drawn(4, 3, seed=0, dtype=torch.bfloat16)
    down, up = drawn(2, 3, seed=2, dtype=torch.float32), drawn(2, 2, seed=3, dtype=torch.float32)
    exact = (x.float() @ down.T @ up).detach()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = torch.zeros(4, 2, dtype=torch.bfloat16)
            result = add_branches(out, x, [Branch(down, up, 1.0, (0, 4))], stacked=stacked)
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), exact, rtol=0.05, atol=0.05)
        grads = torch.autograd.grad(result.float().sum(), [down, up, x])
        assert [grad.dtype for grad in grads] == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_are_added_where_a_branch_says(stacked, dtype):
    x, direction = drawn(5, 3, seed=0, dtype=dtype), drawn(5, 2, seed=1, dtype=dtype).detach()
    weights = [drawn(r, n, seed=10 * r + n, dtype=torch.float32) for r in (2, 4) for n in (3, 2)]
    before = [torch.full_like(weight, 0.5).detach() for weight in weights]
    held, results = [grad.clone() for grad in before], []
    for kept in (None, held):
        pairs = [(2 * i, 2 * i + 1) for i in range(2)]
        spans = [(0, 3), (3, 5)]
        branches = [
            Branch(weights[a], weights[b], 2.0, span, grads=kept and (kept[a], kept[b]))
            for (a, b), span in zip(pairs, spans, strict=True)
        ]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = add_branches(torch.zeros(5, 2, dtype=dtype), x, branches, stacked=stacked)
        results.append(torch.autograd.grad((out * direction).sum(), [x, *weights], allow_unused=True))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[1][1:] == (None,) * 4
    for grad, start, new in zip(held, before, results[0][1:], strict=True):
        torch.testing.assert_close(grad, start + new, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


# Adapters on a model

NAMES = ["v_proj", "down_proj", "query_key_value", "c_attn"]
SETTINGS = {
    "small": (LoraSettings(r=1, alpha=3, target_modules=["q_proj", "down_proj"], layers=[1]), 3),
    "large": (LoraSettings(r=8, alpha=16, use_rslora=True), 4),
}


def moved(adapters):
    """The same adapters, away from their start, where half of the gradients are zero."""
    with torch.no_grad():
        for key in adapters._by_key:
            for i, weight in enumerate(adapters.weights(key)):
                weight.add_(drawn(*weight.shape, seed=i, dtype=torch.float32), alpha=0.1)
    return adapters


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", "all-linear"),
        ("gpt2", ["c_attn", "c_fc"]),
        ("bloom", "all-linear"),
        ("gemma2", ["lm_head", "k_proj"]),
        ("qwen2_moe", "all-linear"),
    ],
)
@pytest.mark.filterwarnings("ignore:An adapter of rank 5 is larger than 2 of its")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_rows_get_logits_and_gradients_of_their_own_peft_adapter(family, target, tmp_path):
    base = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    small = LoraSettings(r=2, alpha=5, target_modules=NAMES, layers=[1])
    given = {"a": (small, 3), "b": (LoraSettings(r=5, target_modules=target), 4)}
    adapters = moved(AdapterBatch(base, given))
    ids = torch.randint(5, 200, (3, 6), generator=torch.Generator().manual_seed(0))
    adapters.shares = [Share("a", 1, 6), Share("b", 2, 6)]
    with adapters.attached(base):
        together = base(ids).logits
        (together**2).sum().backward()
        grads = [weight.grad for weight in adapters.weights("b")]
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    for key, rows in {"a": slice(1), "b": slice(1, 3)}.items():
        with adapters.injected(key, base):
            save_adapter(base, tmp_path / key, base="tiny")
        alone = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / key, is_trainable=key == "b")
        logits = alone(ids[rows]).logits
        torch.testing.assert_close(together[rows], logits, rtol=1e-4, atol=1e-4)
    trained = {name: weight for name, weight in alone.named_parameters() if weight.requires_grad}
    given = dict(zip(trained, torch.autograd.grad((logits**2).sum(), list(trained.values())), strict=True))
    theirs = {m: {name.split(".lora_")[0]: g for name, g in given.items() if f"lora_{m}" in name} for m in "AB"}
    for name, down, up in zip(theirs["A"], grads[::2], grads[1::2], strict=True):
        torch.testing.assert_close(down, theirs["A"][name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(up.T, theirs["B"][name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("key", SETTINGS)
def test_an_adapter_starts_as_peft_starts_it(key):
    adapters, alone = AdapterBatch(tiny_model(), SETTINGS), tiny_model()
    inject_lora(alone, SETTINGS[key][0], seed=SETTINGS[key][1])
    layers = [layer for layer in alone.modules() if hasattr(layer, "lora_A")]
    weights = adapters.weights(key)
    for layer, down, up in zip(layers, weights[::2], weights[1::2], strict=True):
        assert torch.equal(down, layer.lora_A["default"].weight)
        assert torch.equal(up.T, layer.lora_B["default"].weight)


def test_gradients_of_an_adapter_lie_in_one_tensor_that_is_emptied_in_place():
    adapters, ids = moved(AdapterBatch(base := tiny_model(), SETTINGS)), torch.arange(6)[None]
    adapters.shares = [Share("large", 1, 6)]
    adapters.double().float()  # the weights lie elsewhere now
    before = [weight.clone() for weight in adapters.weights("large")]
    adapters.zero_gradients()
    with adapters.attached(base):
        base(ids).logits.square().sum().backward()
    grads = [weight.grad for weight in adapters.weights("large")]
    expected = torch.cat([grad.flatten() for grad in grads]).double().norm().float()
    assert expected > 0
    torch.testing.assert_close(adapters.gradient_norm("large"), expected)
    assert not adapters.flat("small").grad.any()
    with torch.no_grad():
        adapters.flat("large").sub_(adapters.flat("large").grad)
    for weight, start, grad in zip(adapters.weights("large"), before, grads, strict=True):
        torch.testing.assert_close(weight, start - grad)
    adapters.zero_gradients()
    assert not any(grad.any() for grad in grads)


def test_the_norm_of_millions_of_gradients_is_that_of_float64():
    adapters = AdapterBatch(tiny_model(), {"a": (LoraSettings(r=1), 0)})
    many = torch.rand(2**22, generator=torch.Generator().manual_seed(0))
    adapters._by_key["a"].gradient = many
    torch.testing.assert_close(adapters.gradient_norm("a"), many.double().norm().float(), rtol=1e-6, atol=0)


def test_without_shares_or_when_taken_off_the_base_runs_alone():
    base, ids = tiny_model(), torch.arange(6)[None]
    plain = base(ids).logits
    adapters = moved(AdapterBatch(base, SETTINGS))
    with adapters.attached(base):
        assert torch.equal(base(ids).logits, plain)
        adapters.shares = [Share("large", 1, 6)]
        assert not torch.equal(base(ids).logits, plain)
    assert torch.equal(base(ids).logits, plain)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            LoraSettings(r=17, target_modules=["k_proj"]),
            "rank 17 is larger than each of its 2 maps: the update of model.*k_proj has a rank of 16",
        ),
        (LoraSettings(r=2, target_modules=["embed_tokens"]), "embed_tokens is a Embedding that does not see one row"),
        (LoraSettings(r=2, target_modules=["nothing"]), "LoRA finds no target_modules"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_the_base_is_as_before(settings, says):
    base = tiny_model()
    asked = {name: weight.requires_grad for name, weight in base.named_parameters()}
    with pytest.raises(IncompatibleModelError, match=says):
        AdapterBatch(base, {"a": (settings, 0)})
    assert {name: weight.requires_grad for name, weight in base.named_parameters()} == asked
    assert not hasattr(base, "peft_config")


def test_a_batch_of_another_size_is_refused():
    base = tiny_model()
    adapters = AdapterBatch(base, SETTINGS)
    adapters.shares = [Share("large", 4, 3)]
    with (
        adapters.attached(base),
        pytest.raises(IncompatibleModelError, match=r"got \(1, 6, 32\) for a batch of 4 rows"),
    ):
        base(torch.arange(6)[None])


def test_a_rank_above_the_size_of_some_maps_is_counted():
    with pytest.warns(UserWarning, match=r"rank 17 is larger than 4 of its 14 maps, such as model.*k_proj"):
        AdapterBatch(tiny_model(), {"a": (LoraSettings(r=17), 0)})
