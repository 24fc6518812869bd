"""CausalLM and TextDataModule inside Trainers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import rig
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import BitsandbytesPrecision

from lightning_interp.errors import (
    DataError,
    IncompatibleModelError,
    ManifestError,
    QuantizedModelError,
    RecipeError,
    UnsupportedStrategyError,
)
from lightning_interp.models import CausalLM, LoraSettings, Optimisation, RewardModel, TextDataModule, load_causal_lm
from lightning_interp.testing import byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("two_layers")


@pytest.fixture
def four_layers(monkeypatch):
    """The tiny model as it is."""
    monkeypatch.setattr("lightning_interp.models.sources.tiny._LAYERS", 4)


MAPS = ("v_proj", "down_proj", "query_key_value", "c_attn")  # two of each layer, or one; all would train more slowly
LORA = LoraSettings(r=4, alpha=8, target_modules=MAPS)
ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(1, 4) for b in range(5, 9)]
VAL = [{"prompt": "1+1=", "completion": "2"}, {"text": "two"}, {"prompt": "", "completion": "one more"}, *ROWS[:4]]
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def data(rows=ROWS, **options):
    return TextDataModule(rows, tokenizer=byte_tokenizer(), **{"batch_size": 4, "seed": 1, **options})


def trainer(folder, **options):
    return rig.trainer(folder, **{"max_epochs": 2, **options})


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_batch(**options):
    return next(iter(data(**options).train_dataloader()))


def slow_loss(model, batch):
    """Row by row without padding, token by token."""
    total, count = 0.0, 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        with torch.no_grad():
            log_probs = model(ids[None, :length]).logits[0].double().log_softmax(-1)
        for position in range(1, length):
            if labels[position] != -100:
                total -= float(log_probs[position - 1, ids[position]])
                count += 1
    return total, count


# Loss


@pytest.mark.parametrize(("family", "lora"), [("llama", None), ("bloom", LORA), ("qwen2_moe", None)])
def test_the_training_loss_equals_a_slow_loop(family, lora):
    module = CausalLM(tiny_model(family), lora=lora)
    batch = one_batch()
    total, count = slow_loss(tiny_model(family), batch)
    state = torch.get_rng_state()
    assert float(module.training_step(batch, 0).detach()) == pytest.approx(total / count, rel=2e-5)
    assert torch.equal(state, torch.get_rng_state())


def test_only_the_completions_columns_go_through_the_head():
    module, seen = CausalLM("tiny:llama"), []
    handle = module.model.lm_head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[1]))
    batch = one_batch()  # prompts of 4 bytes
    module.training_step(batch, 0)
    module.validation_step(batch, 0)
    handle.remove()
    assert seen == [batch["labels"].shape[1] - 3, batch["labels"].shape[1]]


def test_validation_weighs_every_token_the_same(tmp_path):
    module = CausalLM("tiny:llama")
    run = trainer(tmp_path)
    metrics = run.validate(module, data(val=VAL, batch_size=2), verbose=False)[0]
    batch = next(iter(data(val=VAL, batch_size=len(VAL)).val_dataloader()))
    total, count = slow_loss(tiny_model("llama"), batch)
    assert metrics["val/loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    again = trainer(tmp_path).test(module, data(val=VAL, batch_size=3).val_dataloader(), verbose=False)[0]
    assert again["test/loss"] == pytest.approx(metrics["val/loss"], rel=1e-6)


def test_a_fit_learns_and_logs(tmp_path):
    module = CausalLM("tiny:llama", lora=LORA, lr=3e-2)
    run = trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=4)
    before = trainer(tmp_path).validate(module, data(val=ROWS), verbose=False)[0]["val/loss"]
    run.fit(module, data(val=ROWS))
    assert {"train/loss", "val/loss", "val/perplexity"} <= set(run.callback_metrics)
    assert float(run.callback_metrics["val/loss"]) < before / 2
    assert all(part.training for part in module.modules())


def test_training_is_in_train_mode_from_the_first_step(tmp_path, recwarn):
    class Seen(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append(all(part.training for part in pl_module.model.modules()))

    modes = []
    trainer(tmp_path, max_steps=2, callbacks=[Seen()]).fit(CausalLM("tiny:gpt2", lora=LORA), data())
    assert modes == [True, True]
    assert not [str(warning.message) for warning in recwarn if "eval mode" in str(warning.message)]


def test_without_an_adapter_every_weight_moves_and_with_one_only_the_adapter(tmp_path):
    for lora in (None, LORA):
        module = CausalLM("tiny:llama", lora=lora, lr=1e-3)
        before = weights(module)
        trainer(tmp_path, max_steps=3).fit(module, data())
        moved = {name for name, tensor in weights(module).items() if not torch.equal(tensor, before[name])}
        assert moved == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert moved
        assert {"lora_" in name for name in moved} == {lora is not None}


def test_half_precision_models_get_float32_master_weights(tmp_path):
    module = CausalLM(tiny_model("llama", dtype=torch.bfloat16), tokenizer=byte_tokenizer())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    module.export(tmp_path / "out")
    assert load_causal_lm(tmp_path / "out").model.config.dtype == torch.float32


@pytest.mark.parametrize("lora", [None, LORA])
def test_bf16_mixed_trains_float32_weights(tmp_path, lora, four_layers):
    module = CausalLM("tiny:llama", lora=lora, lr=5e-3)
    run = trainer(tmp_path, precision="bf16-mixed", num_sanity_val_steps=0)
    before = trainer(tmp_path).validate(module, data(val=ROWS), verbose=False)[0]["val/loss"]
    run.fit(module, data(val=ROWS))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert float(run.callback_metrics["val/loss"]) < 0.9 * before
    assert run.callback_metrics["train/loss"].dtype == torch.float32


def test_a_bf16_base_under_a_float32_adapter_trains(tmp_path, four_layers):
    module = CausalLM("tiny:llama", lora=LORA, dtype="bfloat16", lr=1e-2)
    assert module.model.lm_head.weight.dtype == torch.bfloat16
    run = trainer(tmp_path)
    before = trainer(tmp_path).validate(module, data(val=ROWS), verbose=False)[0]["val/loss"]
    run.fit(module, data(val=ROWS))
    assert float(run.callback_metrics["val/loss"]) < 0.9 * before


@pytest.mark.parametrize("lora", [None, LORA])
def test_gradient_checkpointing_gives_the_same_gradients(lora):
    gradients, batch = [], one_batch()
    for checkpointing in (False, True):
        module = CausalLM(tiny_model("gpt2", **DROPOUT), lora=lora, gradient_checkpointing=checkpointing)
        calls = []
        module.model.transformer.h[1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        module.training_step(batch, 0).backward()
        # The last module of a block is not run again; the first linear map of its MLP would be.
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    on = "is_activation_checkpointing"  # before transformers 5.23 it was called gradient checkpointing
    assert getattr(module.model, on if hasattr(module.model, on) else "is_gradient_checkpointing")


# Checkpoints


class Stop(Callback):
    """Ends the process' run as a crash would, at the end of an epoch or behind a step."""

    def __init__(self, *, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise ZeroDivisionError


SETTINGS = {
    "lora": {"lora": LORA, "optimisation": Optimisation(lr=5e-3)},
    "lora dropout, linear": {
        "lora": LoraSettings(r=2, dropout=0.3, target_modules=MAPS),
        "optimisation": Optimisation(lr=5e-3, schedule="linear", warmup_steps=2),
    },
    "full dropout, cosine": {"optimisation": Optimisation(lr=1e-3, weight_decay=0.1, schedule="cosine")},
}


def build(name):
    return CausalLM(tiny_model("gpt2", **DROPOUT) if "dropout" in name else tiny_model("llama"), **SETTINGS[name])


@pytest.mark.parametrize(("name", "workers"), [("full dropout, cosine", 0), ("lora dropout, linear", 1)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name, workers):
    whole = build(name)
    trainer(tmp_path, max_epochs=2).fit(whole, data(num_workers=workers))
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, enable_checkpointing=True, callbacks=[keep, Stop(step=4)]).fit(build(name), data())
    resumed = build(name)
    torch.manual_seed(1234)  # what ran before must not matter
    run = trainer(tmp_path)
    run.fit(resumed, data(num_workers=workers), ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt")
    assert run.global_step == 6
    assert equal(weights(resumed), weights(whole))


def test_an_epoch_and_one_more_equal_two(tmp_path):
    whole, first, second = build("lora"), build("lora"), build("lora")
    trainer(tmp_path, max_epochs=2).fit(whole, data())
    run = trainer(tmp_path, max_epochs=1)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "one.ckpt")
    trainer(tmp_path, max_epochs=2).fit(second, data(), ckpt_path=tmp_path / "one.ckpt")
    assert equal(weights(second), weights(whole))
    assert not equal(weights(first), weights(whole))


def test_a_run_resumed_in_the_middle_of_an_epoch_equals_an_uninterrupted_one(tmp_path, recwarn):
    name = "lora dropout, linear"  # all that a step depends on
    whole = build(name)
    trainer(tmp_path, max_epochs=2).fit(whole, data())
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[keep, Stop(step=5)])
    with pytest.raises(ZeroDivisionError):
        run.fit(build(name), data())
    for step in (1, 3, 4):  # inside the first epoch, at its end and inside the second
        resumed = build(name)
        run = trainer(tmp_path, max_epochs=2)
        run.fit(resumed, data(), ckpt_path=tmp_path / "ckpt" / f"step={step}.ckpt")
        assert run.global_step == 6
        assert equal(weights(resumed), weights(whole))
    assert not [str(warning.message) for warning in recwarn if "not resumable" in str(warning.message)]


def test_a_run_that_broke_off_inside_a_batch_runs_that_batch_again(tmp_path):
    whole = build("lora dropout, linear")
    trainer(tmp_path, max_epochs=2).fit(whole, data())
    broken = build("lora dropout, linear")
    calls = []

    def break_off(*_):
        calls.append(1)
        if len(calls) == 5:
            raise ZeroDivisionError

    handle = broken.model.lm_head.register_forward_pre_hook(break_off)
    keep = OnExceptionCheckpoint(tmp_path, "broken")
    keep.teardown = lambda *_, **__: None  # which would delete the file that it wrote
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[keep]).fit(broken, data())
    handle.remove()
    resumed = build("lora dropout, linear")
    trainer(tmp_path, max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "broken.ckpt")
    assert equal(weights(resumed), weights(whole))


def saved(tmp_path, module, name="last.ckpt", steps=2, **options):
    run = trainer(tmp_path, max_steps=steps, **options)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / name)
    return tmp_path / name


@pytest.fixture(scope="module")
def adapter_ckpt(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("adapter"), CausalLM("tiny:llama", lora=LORA))


@pytest.fixture(scope="module")
def full_ckpt(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("full"), CausalLM("tiny:llama"))


def test_an_adapters_checkpoint_holds_the_adapter_alone(adapter_ckpt, full_ckpt):
    module, path = CausalLM("tiny:llama", lora=LORA), adapter_ckpt
    checkpoint = torch.load(path, weights_only=True)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert set(checkpoint["state_dict"]) == trained
    adapter = sum(parameter.numel() * 4 for parameter in module.parameters() if parameter.requires_grad)
    assert (
        os.path.getsize(path) < 3 * adapter + 90_000
    )  # the adapter, AdamW's two moments of it, and a kilobyte a tensor of the file format
    full = os.path.getsize(full_ckpt)
    assert full > 3 * sum(parameter.numel() * 4 for parameter in tiny_model("llama").parameters())


@pytest.mark.parametrize("lora", [None, LORA])
def test_load_from_checkpoint_needs_no_arguments(tmp_path, lora):
    settings = Optimisation(lr=3e-3, betas=(0.8, 0.9), schedule="linear", gradient_checkpointing=True)
    module = CausalLM("tiny:llama", lora=lora, optimisation=settings)
    path = saved(tmp_path, module)
    loaded = CausalLM.load_from_checkpoint(path)
    assert equal(weights(loaded), weights(module))
    assert (loaded.optimisation, loaded.has_adapter) == (settings, lora is not None)
    assert loaded.tokenizer is not None
    given = CausalLM.load_from_checkpoint(path, model=tiny_model("llama"), lr=0.5)
    assert equal(weights(given), weights(module))
    assert given.optimisation == replace(settings, lr=0.5)
    other = CausalLM.load_from_checkpoint(path, optimisation=Optimisation(lr=0.25))
    assert other.optimisation == Optimisation(lr=0.25)


def test_checkpoints_hold_settings_as_they_always_did(tmp_path):
    path = saved(tmp_path, CausalLM("tiny:llama", lora=LORA, optimisation={"lr": 0.25}))
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {
        "model": "tiny:llama",
        "lora": LORA.to_dict(),
        "lr": 0.25,
        "chunked_head": False,
        "weight_decay": 0.0,
        "betas": [0.9, 0.999],
        "warmup_steps": 0,
        "schedule": "constant",
        "gradient_checkpointing": False,
        "quantization": None,
        "dtype": "float32",
        "seed": 0,
    }


def test_the_learning_rate_finder_sets_the_learning_rate(tmp_path):
    module = CausalLM("tiny:llama", optimisation={"lr": 0.25, "schedule": "linear"})
    module.lr = 0.5
    assert (module.lr, module.optimisation) == (0.5, Optimisation(lr=0.5, schedule="linear"))


def test_a_checkpoint_of_a_given_model_asks_for_it(tmp_path):
    module = CausalLM(tiny_model("gpt2", seed=5), lora=LORA)
    path = saved(tmp_path, module)
    assert "model" not in torch.load(path, weights_only=True)["hyper_parameters"]
    loaded = CausalLM.load_from_checkpoint(path, model=tiny_model("gpt2", seed=5))
    assert equal(weights(loaded), weights(module))


def test_a_subclass_keeps_its_own_arguments(tmp_path):
    class Mine(CausalLM):
        def __init__(self, model, extra=1, **more):
            super().__init__(model, **more)
            self.extra = extra

    loaded = Mine.load_from_checkpoint(saved(tmp_path, Mine("tiny:llama", extra=7, lora={"r": 2}, lr=0.25)))
    assert (loaded.extra, loaded.lr, loaded.hparams["lora"]["r"]) == (7, 0.25, 2)


class Steer(Callback):
    """Adds a trainable vector in setup, as callbacks should."""

    def setup(self, trainer, pl_module, stage):
        if not hasattr(pl_module, "steer"):
            pl_module.steer = torch.nn.Linear(2, 1)


def test_what_a_callback_adds_to_the_module_is_saved_and_restored(tmp_path):
    path = saved(tmp_path, CausalLM("tiny:llama", lora=LORA), callbacks=[Steer()])
    assert {"steer.weight", "steer.bias"} <= set(torch.load(path, weights_only=True)["state_dict"])
    module = CausalLM("tiny:llama", lora=LORA)
    trainer(tmp_path, max_steps=4, callbacks=[Steer()]).fit(module, data(), ckpt_path=path)
    with pytest.raises(IncompatibleModelError, match=r"holds the unknown 'steer.bias' \(2 unknown\)"):
        trainer(tmp_path, max_steps=6).fit(CausalLM("tiny:llama", lora=LORA), data(), ckpt_path=path)


@pytest.mark.parametrize("lora", [None, LORA])
def test_weight_averaging_goes_on_from_a_checkpoint(tmp_path, lora):
    def averaged(ckpt=None):
        module = CausalLM("tiny:llama", lora=lora, lr=1e-2)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        callbacks = [EMAWeightAveraging(decay=0.5), keep]
        trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks).fit(module, data(), ckpt_path=ckpt)
        return module

    whole = averaged()
    resumed = averaged(tmp_path / "epoch=0.ckpt")
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], tensor)


def edited(path, change, target):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, target)
    return target


A = "model.model.layers.0.mlp.down_proj.lora_A.default.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.pop(A), rf"it lacks '{A}' \(1 missing\)"),
        (lambda state: state.update(extra=state[A]), r"it holds the unknown 'extra' \(1 unknown\)"),
        (
            lambda state: state.update({A: state[A][:2]}),
            r"with shape \(2, 64\), expected \(4, 64\) \(1 of another shape",
        ),
        (lambda state: state.clear(), r"this CausalLM on 'tiny:llama': it lacks .* \(8 missing\)"),
    ],
)
def test_an_adapters_checkpoint_that_does_not_fit_is_refused(tmp_path, adapter_ckpt, change, match):
    with pytest.raises(IncompatibleModelError, match=match):
        CausalLM.load_from_checkpoint(edited(adapter_ckpt, change, tmp_path / "last.ckpt"))


def test_a_run_does_not_go_on_from_a_checkpoint_that_does_not_fit(tmp_path, adapter_ckpt):
    path = edited(adapter_ckpt, lambda state: state.pop(A), tmp_path / "last.ckpt")
    module = CausalLM("tiny:llama", lora=LORA)
    before = weights(module)
    with pytest.raises(IncompatibleModelError, match=rf"it lacks '{A}' \(1 missing\)"):
        trainer(tmp_path, max_steps=4).fit(module, data(), ckpt_path=path)
    assert equal(before, weights(module))


def test_checkpoints_of_adapter_and_full_finetuning_do_not_mix(tmp_path, adapter_ckpt, full_ckpt):
    with pytest.raises(IncompatibleModelError, match=r"it lacks 'model.lm_head.weight'"):
        trainer(tmp_path).fit(CausalLM("tiny:llama"), data(), ckpt_path=adapter_ckpt)
    with pytest.raises(IncompatibleModelError, match=r"it lacks 'model.model.layers.0.*lora_A.default.weight'"):
        trainer(tmp_path).fit(CausalLM("tiny:llama", lora=LORA), data(), ckpt_path=full_ckpt)


# Export


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_exported_adapter_is_read_by_us_and_by_peft(tmp_path):
    module = CausalLM("tiny:llama", lora=LORA, lr=1e-2)
    trainer(tmp_path, max_steps=3).fit(module, data())
    assert module.export(tmp_path / "out") == tmp_path / "out"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = module.eval()(ids).logits
        ours = load_causal_lm(tmp_path / "out")
        theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out").eval()
        assert torch.equal(ours.model(ids).logits, expected)
        assert torch.equal(theirs(ids).logits, expected)
        assert not torch.allclose(tiny_model("llama")(ids).logits, expected, atol=1e-3)
    assert ours.tokenizer.chat_template == byte_tokenizer().chat_template
    with pytest.raises(ManifestError, match="out exists already and is not empty"):
        module.export(tmp_path / "out")
    module.export(tmp_path / "out", overwrite=True)


def test_an_exported_full_model_is_an_ordinary_folder(tmp_path):
    module = CausalLM("tiny:gpt2", lr=1e-2)
    trainer(tmp_path, max_steps=3).fit(module, data())
    module.export(tmp_path / "out")
    loaded = load_causal_lm(tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, module.eval()(ids).logits)


def test_an_adapter_folder_goes_on_being_trained(tmp_path):
    first = CausalLM("tiny:llama", lora=LORA, lr=1e-2)
    trainer(tmp_path, max_steps=2).fit(first, data())
    first.export(tmp_path / "first")
    second = CausalLM(str(tmp_path / "first"), lr=1e-2)
    before = weights(second)
    assert equal(before, weights(first))
    trainer(tmp_path, max_steps=2).fit(second, data())
    moved = {name for name, tensor in weights(second).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    second.export(tmp_path / "second")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load_causal_lm(tmp_path / "second").model(ids).logits, second.eval()(ids).logits)
    with pytest.raises(IncompatibleModelError, match="carries the adapter 'default' already"):
        CausalLM(str(tmp_path / "first"), lora=LORA)


def test_a_base_named_by_a_relative_path_is_found_again(tmp_path, monkeypatch):
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    module = CausalLM("base", lora=LORA)
    monkeypatch.chdir("/")
    module.export(tmp_path / "out")
    assert load_causal_lm(tmp_path / "out").label == "out on base"


# Several processes


SAME_LENGTH = [{"prompt": f"{i:02d}:", "completion": f"{i * i:03d}"} for i in range(12)]


class SameEverywhere(Callback):
    """Compares the trained weights of all ranks at the end of training."""

    def on_train_end(self, trainer, pl_module):
        flat = torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad])
        everyone = trainer.strategy.all_gather(flat)
        if not all(torch.equal(flat, other) for other in everyone):
            raise RuntimeError("the ranks went apart")


@pytest.mark.parametrize("lora", [LORA, None])
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, lora):
    alone = CausalLM("tiny:llama", lora=lora, lr=1e-3)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(alone, data(SAME_LENGTH, val=VAL, batch_size=4))
    both = CausalLM("tiny:llama", lora=lora, lr=1e-3)
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="last", save_weights_only=False)
    pair = trainer(
        tmp_path,
        devices=2,
        strategy="ddp_fork",
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[SameEverywhere(), keep],
    )
    pair.fit(both, data(SAME_LENGTH, val=VAL, batch_size=2))
    loaded = CausalLM.load_from_checkpoint(tmp_path / "ckpt" / "last.ckpt")
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(loaded)[name], tensor, rtol=1e-3, atol=2e-5)
    # 7 rows on 2 processes: the filler that makes the shares equal must not count.
    assert float(pair.callback_metrics["val/loss"]) == pytest.approx(float(run.callback_metrics["val/loss"]), rel=1e-4)
    # Of both processes, not the share of the first.
    logged = [float(one.callback_metrics["train/loss"]) for one in (pair, run)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


class Masks(Callback):
    """Writes down each rank's training loss on the same rows."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        (self.folder / f"rank{trainer.global_rank}").write_text(str(float(outputs["loss"])))


def test_ranks_draw_different_dropout_masks(tmp_path):
    module = CausalLM(tiny_model("gpt2", resid_pdrop=0.5), lora=LORA)
    rows = [SAME_LENGTH[0]] * 4
    trainer(tmp_path, devices=2, strategy="ddp_fork", max_steps=1, callbacks=[Masks(tmp_path)]).fit(module, data(rows))
    losses = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert losses[0] != losses[1]


SHARDED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_causal_lm import LORA, SAME_LENGTH, VAL, CausalLM, UnsupportedStrategyError, data, trainer
from lightning.pytorch.strategies import ModelParallelStrategy

def fit(lora, epochs, distributed, ckpt=None):
    module = CausalLM("tiny:llama", lora=lora, lr=1e-3)
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed)
    run = trainer(sys.argv[2], devices=2, strategy=strategy, max_epochs=epochs)
    run.fit(module, data(SAME_LENGTH, val=VAL, batch_size=2), ckpt_path=ckpt)
    return run

for name, lora, distributed in (("lora", LORA, True), ("lora-whole", LORA, False), ("full", None, False)):
    path = f"{sys.argv[2]}/{name}.ckpt"
    fit(lora, 1, distributed).save_checkpoint(path)
    run = fit(lora, 2, distributed, path)
    if run.global_rank == 0:
        print("RESULT", name, float(run.callback_metrics["val/loss"]), run.global_step, flush=True)
"""


@pytest.mark.slow
def test_sharded_training_equals_that_of_one_process(tmp_path):
    (tmp_path / "script.py").write_text(SHARDED)
    command = [sys.executable, str(tmp_path / "script.py"), str(Path(__file__).parent), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    results = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == 3, done.stderr[-3000:]
    for (name, loss, steps), lora in zip(results, (LORA, LORA, None), strict=True):
        run = trainer(tmp_path)
        run.fit(CausalLM("tiny:llama", lora=lora, lr=1e-3), data(SAME_LENGTH, val=VAL, batch_size=4))
        assert float(loss) == pytest.approx(float(run.callback_metrics["val/loss"]), rel=1e-5), name
        assert int(steps) == 6
    assert (tmp_path / "lora.ckpt").is_dir()
    checkpoint = torch.load(tmp_path / "lora-whole.ckpt", weights_only=True)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert CausalLM.load_from_checkpoint(tmp_path / "lora-whole.ckpt").has_adapter


class Mesh(dict):
    """What is read of a device mesh of two processes."""

    def size(self):
        return 2


def test_tensor_parallelism_is_refused():
    module = CausalLM("tiny:llama")
    module._device_mesh = Mesh(tensor_parallel=Mesh())
    match = r"tensor_parallel_size=2. Pass ModelParallelStrategy\(data_parallel_size=2, tensor_parallel_size=1\)"
    with pytest.raises(UnsupportedStrategyError, match=match):
        module.configure_model()


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_cannot_train_it_are_refused(tmp_path, name):
    run = trainer(tmp_path)
    run.strategy.__class__ = type(name, (type(run.strategy),), {})
    with pytest.raises(UnsupportedStrategyError, match=rf"CausalLM on 'tiny:llama' does not support {name}: .*use"):
        run.fit(CausalLM("tiny:llama"), data())


def test_a_sharded_model_is_not_exported(tmp_path):
    module = CausalLM("tiny:llama")
    module.model.lm_head.weight.ds_id = 3  # DeepSpeed's mark on a sharded parameter
    with pytest.raises(UnsupportedStrategyError, match=r"CausalLM.export needs whole weights, but lm_head.weight"):
        module.export(tmp_path / "out")


# Quantised bases


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_an_adapter_trains_on_a_quantised_base(tmp_path, full_ckpt, quantization):
    module = CausalLM("tiny:llama", lora=LORA, quantization=quantization, lr=1e-2)
    base = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    kinds = {type(part).__name__ for part in module.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization] in kinds
    module.training_step(one_batch(), 0).backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in gradients)
    # The second matrix is zero at first, so the first one's gradient is zero for one step.
    assert all(bool(grad.any()) for name, grad in gradients.items() if "lora_B" in name)
    module.zero_grad()
    path = saved(tmp_path, module, steps=3)
    after = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    assert all(torch.equal(base[name], after[name]) for name in base)
    assert all(bool(p.any()) for name, p in module.named_parameters() if "lora_B" in name)
    loaded = CausalLM.load_from_checkpoint(path)
    assert all(
        torch.equal(p, dict(loaded.named_parameters())[name])
        for name, p in module.named_parameters()
        if p.requires_grad
    )
    with pytest.raises(IncompatibleModelError, match="lacks"):
        trainer(tmp_path).fit(module, data(), ckpt_path=full_ckpt)


def test_a_quantised_base_is_not_trained_in_full():
    with pytest.raises(
        QuantizedModelError, match=r"all weights of 'tiny:llama': model.layers.0.self_attn.q_proj and 13"
    ):
        CausalLM("tiny:llama", quantization="4bit")


@pytest.mark.parametrize("lora", [None, LORA])
def test_lightnings_own_quantisation_is_refused_with_the_right_road(tmp_path, lora, monkeypatch):
    module, run = CausalLM("tiny:llama", lora=lora), trainer(tmp_path)
    plugin = BitsandbytesPrecision.__new__(BitsandbytesPrecision)  # it cannot be made without CUDA
    monkeypatch.setattr(type(run.strategy), "precision_plugin", plugin)
    with pytest.raises(
        QuantizedModelError, match=r"'tiny:llama' cannot use BitsandbytesPrecision.*quantization='4bit'"
    ):
        run.fit(module, data())


# Errors


def test_a_batch_without_labels_is_refused(tmp_path):
    module, batch = CausalLM("tiny:llama"), one_batch()
    with pytest.raises(DataError, match=r"Batch 3 has no 'labels', only input_ids, attention_mask"):
        module.training_step({name: tensor for name, tensor in batch.items() if name != "labels"}, 3)
    batch["labels"][:, 1:] = -100
    with pytest.raises(DataError, match=r"Batch 5 has no labelled token: its labels of shape \(4, \d\) are all -100"):
        module.training_step(batch, 5)
    with pytest.raises(DataError, match="No batch had a labelled token"):
        trainer(tmp_path).validate(module, torch.utils.data.DataLoader([batch], batch_size=None), verbose=False)


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"optimisation": {"lr": -1.0}}, "lr=-1.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"optimisation": Optimisation(lr=1.0), "lr": 2.0, "betas": (0, 0)}, "betas, lr is given beside Optimisation"),
        ({"schedule": "poly"}, "schedule='poly'"),
        ({"lora": {"r": 0}}, "LoRA cannot use r=0"),
        ({"dtype": "float5"}, "no type 'float5'"),
        ({"quantization": "2bit"}, "no quantization '2bit'"),
    ],
)
def test_wrong_arguments_are_refused(argument, match):
    with pytest.raises(RecipeError, match=match):
        CausalLM("tiny:llama", **argument)


@pytest.mark.parametrize(
    ("kind", "argument"),
    [(CausalLM, {"schedules": "linear"}), (RewardModel, {"chats": True}), (CausalLM, {"optimisation": {"rate": 1}})],
)
def test_unknown_arguments_are_refused(kind, argument):
    with pytest.raises(TypeError, match=r"unexpected keyword argument '(schedules|chats|rate)'"):
        kind("tiny:llama", **argument)


def test_jsonargparse_reads_settings():
    from jsonargparse import ArgumentParser

    for kind in (CausalLM, RewardModel):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind, "model", skip={"tokenizer"})
        read = parser.parse_args(["--model.model=tiny:llama", "--model.optimisation.schedule=linear"])
        module = parser.instantiate_classes(read).model
        assert module.optimisation == Optimisation(lr=1e-4, schedule="linear")


def test_a_falling_schedule_needs_an_end(tmp_path):
    run = trainer(tmp_path, max_epochs=-1)
    with pytest.raises(RecipeError, match=r"schedule='linear' falls by the last step, but this run has none"):
        run.fit(CausalLM("tiny:llama", schedule="linear"), data())
