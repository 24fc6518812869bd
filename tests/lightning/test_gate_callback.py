"""GateCallback in real Trainers: what it logs, what it leaves alone, what it refuses."""

from __future__ import annotations

from unittest import mock

import pytest
import pytorch_lightning as pl
import rig
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, inject_adapter_in_model

from lightning_interp.errors import IncompatibleModelError, RecipeError, SiteError
from lightning_interp.lora import (
    AdapterGate,
    GateCallback,
    GateSpec,
    LoraCallback,
    MarginPrompt,
    logit_margins,
    named_gates,
)
from lightning_interp.models import CausalLM, LoraSettings, TextDataModule
from lightning_interp.testing import CallbackContract, byte_tokenizer
from lightning_interp.testing import tiny_model as tiny_model_of_four

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

TOKENIZER = byte_tokenizer()
ROWS = [{"prompt": f"{name} met", "completion": f" {other}"} for name, other in (("Ann", "Bo"), ("Zoë", "Al"))] * 4
PROMPTS = [
    MarginPrompt("Ann met", "B", ("C", "D")),
    MarginPrompt("Zoë met A", "l", ("k",)),
    MarginPrompt("A", "n", ("m",)),
]
GATES = {"all": {}, "none": {"tokens": []}, "name_only": {"tokens": "Ann"}, "no_last": {"tokens": [-1], "invert": True}}
QUIET = pytest.mark.filterwarnings("ignore:GateSpec.tokens='Ann'. finds no token")


def tiny_model():
    return tiny_model_of_four("llama", num_hidden_layers=2)


def module(**options):
    return CausalLM(tiny_model(), tokenizer=TOKENIZER, lora=LoraSettings(r=4, alpha=8), lr=1e-2, **options)


def data():
    return TextDataModule(ROWS, tokenizer=TOKENIZER, batch_size=4, val=ROWS[:2])


def measured(model, gates=GATES):
    found = {}
    for name, spec in gates.items():
        with AdapterGate("default", GateSpec.from_dict(spec)).attach(model.eval(), tokenizer=TOKENIZER):
            found[name] = float(logit_margins(model, TOKENIZER, PROMPTS).mean())
    return found


def seen(entry):
    return {name: value for name, value in entry.items() if name not in ("epoch", "step")}


def test_margins_are_read_at_the_last_token():
    model = tiny_model()
    for prompt, found in zip(PROMPTS, logit_margins(model, TOKENIZER, PROMPTS), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([TOKENIZER(prompt.text).input_ids])).logits[0, -1]
        target, *others = (float(logits[TOKENIZER(word).input_ids[0]]) for word in (prompt.target, *prompt.others))
        assert float(found) == pytest.approx(target - sum(others) / len(others), abs=1e-5)


@QUIET
def test_a_fit_has_a_history_of_all_gates(tmp_path):
    ours, callback = module(), GateCallback(PROMPTS, GATES, at_start=True)
    base = measured(ours.model)
    run = rig.trainer(tmp_path, callback, max_epochs=2)
    run.fit(ours, data())
    assert [entry["step"] for entry in callback.history] == [0, 2, 4]
    start, _, end = map(seen, callback.history)
    assert start == pytest.approx(base, abs=1e-5)
    assert max(start.values()) - min(start.values()) < 1e-5, "a new adapter changes nothing under any gate"
    assert end == pytest.approx(measured(ours.model), abs=1e-5)
    assert end["none"] == pytest.approx(base["none"], abs=1e-6)
    assert len({round(value, 3) for value in end.values()}) == 4
    for name, value in end.items():
        assert float(run.callback_metrics[f"gate/{name}"]) == pytest.approx(value, abs=1e-5)


@QUIET
def test_training_is_the_same_to_the_bit_with_and_without(tmp_path):
    final = []
    for callbacks in ([], [GateCallback(PROMPTS, GATES, every=1, at_start=True)]):
        ours = module()
        rig.trainer(tmp_path, *callbacks, max_epochs=1).fit(ours, data())
        final.append(ours.state_dict())
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


@QUIET
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["shared", "fewer_than_processes"])
def test_two_processes_give_the_numbers_of_one(tmp_path, prompts):
    found = []
    for options in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        ours = CausalLM(adapted(), tokenizer=TOKENIZER, lora=None)
        run = rig.trainer(tmp_path, GateCallback(prompts, GATES), **options)
        found.append(run.validate(ours, data(), verbose=False)[0])
    names = [f"gate/{name}" for name in GATES]
    assert [found[1][name] for name in names] == pytest.approx([found[0][name] for name in names], abs=1e-5)
    assert found[0]["gate/all"] != pytest.approx(found[0]["gate/none"], abs=1e-3)


def adapted():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return inject_adapter_in_model(config, tiny_model()).eval()


class PlModule(pl.LightningModule):
    """Somebody's own module, of the other namespace, into which another callback puts the adapter."""

    def __init__(self):
        super().__init__()
        self.model, self.tokenizer = tiny_model().train(), TOKENIZER

    def training_step(self, batch, batch_idx):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


def test_the_other_namespace_and_an_adapter_of_a_callback(tmp_path):
    batch = torch.utils.data.DataLoader(torch.tensor([TOKENIZER("Ann met Bo").input_ids] * 2), batch_size=2)
    gates = GateCallback(PROMPTS[:1], named_gates("Ann"), every=1, name="where")
    gates.gates = {name: spec for name, spec in gates.gates.items() if "template" not in name}
    run = rig.trainer(tmp_path, LoraCallback(LoraSettings(r=4, alpha=8)), gates, kind=pl.Trainer, max_epochs=3)
    run.fit(PlModule(), batch)
    assert [entry["step"] for entry in gates.history] == [1, 2, 3]
    assert gates.history[-1]["all"] != gates.history[-1]["none"]
    assert float(run.callback_metrics["where/all"]) == pytest.approx(gates.history[-1]["all"], abs=1e-5)
    late = LoraCallback(LoraSettings(r=4))
    with pytest.raises(IncompatibleModelError, match=r"carries no adapter, expected one. Inject one first"):
        rig.trainer(tmp_path, GateCallback(PROMPTS), late, kind=pl.Trainer).fit(PlModule(), batch)


@QUIET
def test_history_goes_on_after_a_resume(tmp_path):
    first, keep = GateCallback(PROMPTS, GATES), ModelCheckpoint(tmp_path, filename="one", save_top_k=-1)
    rig.trainer(tmp_path, first, keep, max_epochs=1, enable_checkpointing=True).fit(module(), data())
    second = GateCallback(PROMPTS, GATES)
    rig.trainer(tmp_path, second, max_epochs=2).fit(module(), data(), ckpt_path=tmp_path / "one.ckpt")
    assert second.history[0] == first.history[0]
    assert [entry["epoch"] for entry in second.history] == [1.0, 2.0]


def test_a_measure_of_ones_own(tmp_path):
    def length(model, tokenizer, prompts):
        assert isinstance(model, torch.nn.Module)
        return torch.tensor([float(len(tokenizer(prompt).input_ids)) for prompt in prompts])

    callback = GateCallback(["a", "abc"], {"all": GateSpec()}, measure=length, adapter="default")
    ours = CausalLM(adapted(), tokenizer=TOKENIZER, lora=None)
    assert rig.trainer(tmp_path, callback).validate(ours, data(), verbose=False)[0]["gate/all"] == 2.0
    callback.measure = lambda *_: torch.zeros(3)
    with pytest.raises(RecipeError, match=r"GateCallback\('gate'\): measure gave \(3,\); expected a tensor \[2\]"):
        rig.trainer(tmp_path, callback).validate(ours, data(), verbose=False)
    callback.measure = lambda *_: 1.0
    with pytest.raises(RecipeError, match="measure gave float"):
        rig.trainer(tmp_path, callback).validate(ours, data(), verbose=False)


def test_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"GateCallback\('gate'\) got 0 prompts and 12 gates"):
        GateCallback([], named_gates("x"))
    with pytest.raises(RecipeError, match="got 3 prompts and 0 gates"):
        GateCallback(PROMPTS, {})
    with pytest.raises(RecipeError, match="Cannot read a gate from"):
        GateCallback(PROMPTS, {"all": {"token": 1}})
    for wrong in (("", "a", ("b",)), ("a", "", ("b",)), ("a", "b", ()), ("a", "b", ("",))):
        with pytest.raises(RecipeError, match="lacks something: expected a text, a target and others"):
            MarginPrompt(*wrong)
    with pytest.raises(RecipeError, match="'owl' and 'ox' begin with the same token"):
        logit_margins(tiny_model(), TOKENIZER, [MarginPrompt("a", "owl", ("cat", "ox"))])
    bare = CausalLM(adapted(), tokenizer=TOKENIZER, lora=None)
    bare.tokenizer = None
    with pytest.raises(RecipeError, match=r"found no tokenizer. Pass GateCallback\(tokenizer=...\)"):
        rig.trainer(tmp_path, GateCallback(PROMPTS, GATES)).validate(bare, [], verbose=False)
    with pytest.raises(SiteError, match="no component 'moe'"):
        rig.trainer(tmp_path, GateCallback(PROMPTS, {"a": {"modules": "moe"}}, tokenizer=TOKENIZER)).validate(bare, [])


class TestContract(CallbackContract):
    """What every callback owes to a run."""

    alters_training = False

    def make_callback(self):
        return GateCallback(PROMPTS[:1], {"all": {}, "last": {"tokens": [-1]}}, every=1, at_start=True)

    def make_module(self, library):
        with mock.patch("lightning_interp.testing.contract_lightning.tiny_model", return_value=adapted()):
            return super().make_module(library)
