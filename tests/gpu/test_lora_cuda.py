"""On a CUDA device adapters are measured, ablated, traced and trained as on a CPU, and the host does not wait."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import rig
import torch
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import nn

from lightning_interp.errors import QuantizedModelError
from lightning_interp.lora import (
    AdapterTracer,
    LoraCallback,
    ablated,
    singular_directions,
    trace_adapter,
    update_norms,
)
from lightning_interp.models import LoraSettings
from lightning_interp.models.training.lora import inject_lora
from lightning_interp.testing import FAMILIES, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IDS = torch.tensor([[0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
LORA = LoraSettings(r=4, alpha=8)


def adapted(family, device):
    """An adapter with weights that matter; drawn on the CPU, so the same on every device."""
    model = tiny_model(family)
    inject_lora(model, LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval().to(device)


def batch(device):
    return {"input_ids": IDS.to(device), "attention_mask": MASK.to(device)}


@pytest.fixture
def waits():
    """``waits(function)``: how often the host waits for the device in it."""

    def count(function):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in seen)

    return count


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_directions_are_those_of_a_cpu(family):
    cpu, cuda = adapted(family, "cpu"), adapted(family, "cuda")
    ours, theirs = update_norms(cuda), update_norms(cpu)
    assert ours.modules == pytest.approx(theirs.modules, rel=1e-6)
    for path, found in singular_directions(cuda).items():
        expected = singular_directions(cpu)[path]
        torch.testing.assert_close(found.values.cpu(), expected.values)
        rebuilt = (found.outputs * found.values) @ found.inputs
        torch.testing.assert_close(rebuilt.cpu(), (expected.outputs * expected.values) @ expected.inputs)


def test_norms_come_over_together(waits):
    model = adapted("llama", "cuda")
    update_norms(model)
    assert waits(lambda: update_norms(model)) == 1


@pytest.mark.parametrize("keep", ["top1", "rest"])
def test_an_ablated_adapter_is_what_it_is_on_a_cpu(keep):
    found = []
    for device in ("cpu", "cuda"):
        model = adapted("gpt2", device)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with ablated(model, keep), torch.no_grad():
            found.append(model(**batch(device)).logits.cpu())
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    torch.testing.assert_close(found[1][1], found[0][1], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_is_that_of_a_cpu_in_one_pass_and_in_a_generation(family):
    cpu, cuda = (trace_adapter(adapted(family, device), batch(device)) for device in ("cpu", "cuda"))
    for name in ("norms", "bases", "coordinates"):
        torch.testing.assert_close(getattr(cuda, name).cpu(), getattr(cpu, name), **CLOSE, equal_nan=True)
    grown = []
    for device in ("cpu", "cuda"):
        model, tracer = adapted(family, device), AdapterTracer()
        with tracer.attach(model):
            model.generate(**batch(device), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        grown.append(tracer.trace.norms.cpu())
    assert grown[0].shape[:2] == (2, 9)
    torch.testing.assert_close(grown[1], grown[0], **CLOSE, equal_nan=True)


def test_a_traced_pass_waits_no_more_than_a_plain_one(waits):
    model, tracer = adapted("llama", "cuda"), AdapterTracer()

    def run():
        with torch.no_grad():
            model(**batch("cuda"))

    run()
    plain = waits(run)
    with tracer.attach(model):
        run()
        assert waits(run) == plain


class Theirs(L.LightningModule):
    """A LightningModule as a user writes it."""

    def __init__(self, model=None):
        super().__init__()
        self.lm = tiny_model("llama") if model is None else model
        self.head = nn.Linear(32, 1)

    def training_step(self, ids, batch_idx):
        out = self.lm(input_ids=ids, labels=ids, output_hidden_states=True, use_cache=False)
        return out.loss + self.head(out.hidden_states[-1].to(self.head.weight)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder, module, callback, *, ckpt_path=None, **options):
    run = rig.trainer(folder, callback, **{"accelerator": "cuda", "max_epochs": 2, **options})
    run.fit(module, torch.utils.data.DataLoader(IDS, batch_size=1), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_an_adapter_trains_and_its_checkpoint_is_gone_on_with(tmp_path, precision):
    module, callback = Theirs(), LoraCallback(LORA, every=1)
    fit(tmp_path, module, callback, precision=precision).save_checkpoint(tmp_path / "last.ckpt")
    assert callback.history[-1]["update_norm"] > 0
    names = set(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert all("lora_" in name or name.startswith("head.") for name in names)
    again = Theirs()
    fit(tmp_path, again, LoraCallback(LORA), precision=precision, ckpt_path=tmp_path / "last.ckpt")
    adapter = {name: p for name, p in module.named_parameters() if "lora_" in name}
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in adapter.items())


def test_lightnings_own_quantisation_is_refused_before_it_freezes_the_adapter(tmp_path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(QuantizedModelError, match=r"LoraCallback on Theirs cannot use BitsandbytesPrecision"):
        fit(tmp_path, Theirs(), LoraCallback(LORA), plugins=[BitsandbytesPrecision("nf4")])
