"""On a CUDA device everything is what it is on a CPU: generation under steering, grafts, dual steering, captures."""

from __future__ import annotations

import pytest
import torch

from lightning_interp import AddDirection, All, Generated, Graft, GraftPlan, Last, Site, Span
from lightning_interp.core.tokens.kv_cache import cache_argument, cache_of
from lightning_interp.lora.batched import AdapterBatch, Share
from lightning_interp.models import LoraSettings
from lightning_interp.steering import dual_steer
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry
from lightning_interp.testing import FAMILIES, tiny_model, tiny_pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IDS = torch.tensor([[0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
# Products of float32 are TF32 nowhere here, but sums come in another order.
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


def on(device, model):
    return model.to(device), IDS.to(device), MASK.to(device)


def generated(device, model, intervention):
    """Logits of each new token under an intervention, ``[steps, B, V]``."""
    model, ids, mask = on(device, model)
    more = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    with intervention().attach(model), torch.no_grad():
        found = model.generate(ids, attention_mask=mask, **SETTINGS, **more)
    return torch.stack(found.logits).cpu()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", [All(), Last(), Generated(1)], ids=["all", "last", "generated"])
def test_generation_under_steering(family, positions):
    def steer():
        width = tiny_model(family).config.hidden_size
        vector = torch.linspace(-1, 1, width)
        return AddDirection(vector, site=Site("resid_post", 0), strength=2.0, positions=positions)

    cpu, cuda = (generated(device, tiny_model(family), steer) for device in ("cpu", "cuda"))
    torch.testing.assert_close(cuda, cpu, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decode", ["recipient", "donor", "like_last"])
def test_generation_under_a_graft(family, decode):
    def found(device):
        recipient, donor = tiny_pair(family)
        plan = GraftPlan.at(Span(-3, -1), components="BLOCK")
        return generated(device, recipient, lambda: Graft(donor.to(device), plan, decode=decode))

    torch.testing.assert_close(found("cuda"), found("cpu"), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_grafts_are_the_models_themselves_to_the_bit(family):
    recipient, donor = (model.to("cuda") for model in tiny_pair(family))
    ids, mask = IDS.cuda(), MASK.cuda()
    with torch.no_grad():
        expected = donor(ids, attention_mask=mask).logits
        with Graft(donor, GraftPlan.whole()).attach(recipient):
            whole = recipient(ids, attention_mask=mask).logits
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_step_is_the_last_column_of_one_pass(family):
    model, ids, mask = on("cuda", tiny_model(family))
    vector = torch.linspace(-1, 1, model.config.hidden_size)
    steer = AddDirection(vector, site=Site("resid_post", 0), strength=2.0)
    with steer.attach(model), torch.no_grad():
        whole = model(ids, attention_mask=mask).logits[:, -1]
        first = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        step = model(ids[:, -1:], attention_mask=mask, **cache_argument(model, cache_of(first))).logits[:, -1]
    torch.testing.assert_close(step, whole, **CLOSE)


@pytest.mark.parametrize("target", [{"probe_delta": 1.0}, {"kl_budget": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dual_steering_ends_where_it_ends_on_a_cpu(target, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 16, generator=generator, dtype=dtype)
    states, beta = torch.randn(4, 16, generator=generator, dtype=dtype), torch.randn(16, generator=generator).to(dtype)

    def found(device):
        return dual_steer(SoftmaxGeometry(weight.to(device)), states.to(device), beta.to(device), **target)

    cpu, cuda = found("cpu"), found("cuda")
    assert bool(cuda.reached.all())
    assert bool(cuda.certified.all())
    tolerance = 1e-6 if dtype == torch.float64 else 5e-3
    torch.testing.assert_close(cuda.lam.cpu(), cpu.lam, atol=tolerance, rtol=tolerance)


def test_adapters_that_share_a_pass_get_the_gradients_of_a_cpu():
    found = []
    for device in ("cpu", "cuda"):
        model, ids, mask = on(device, tiny_model("llama"))
        given = {
            key: (LoraSettings(r=r, alpha=3, target_modules=["q_proj", "up_proj"]), r)
            for key, r in zip("ab", (1, 6), strict=True)
        }
        adapters = AdapterBatch(model, given).to(device)
        with torch.no_grad():
            for weight in adapters.parameters():
                weight += 0.01
        adapters.shares = [Share("a", 1, 6), Share("b", 1, 6)]
        with adapters.attached(model):
            model(ids, attention_mask=mask).logits.square().mean().backward()
        found.append([weight.grad.cpu() for weight in adapters.parameters()])
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, **CLOSE)
