"""GraftCallback in real Trainers: what it logs, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import pytorch_lightning as pl
import rig
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_interp import GraftPlan, Last
from lightning_interp.errors import (
    CompiledModelError,
    IncompatibleModelError,
    PositionError,
    RecipeError,
    UnsupportedStrategyError,
)
from lightning_interp.grafting import GraftCallback, GraftEvaluator, GraftPrompt
from lightning_interp.models import CausalLM, LoraSettings, TextDataModule
from lightning_interp.testing import byte_tokenizer
from lightning_interp.testing import tiny_model as tiny_model_of_four

TOKENIZER = byte_tokenizer()
LORA = LoraSettings(r=4, alpha=8)
ROWS = [{"prompt": f"{name} met", "completion": f" {other}"} for name, other in (("Ann", "Bo"), ("Zoë", "Al"))] * 4
PROMPTS = [
    GraftPrompt("Ann met", "Bo", {"FE": "Ann"}, unit="1"),
    GraftPrompt("Zoë met", "Al", {"FE": "Zoë"}, unit="2"),
    GraftPrompt("Who met Ann? It was", "Bo", {"FE": "Ann"}, unit="1"),
]
PLANS = ["PRE", "SFT", "FE", "LT", "FE+LT", "(FE+LT)^C", "FE^C", "LT^C"]
LOGGED = ["top1", "top5", "target_prob", "target_logprob", "target_rank", "kl_to_donor"]
MODES = pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])


def tiny_model(family, **options):
    """Two blocks: what is scored does not depend on how many there are."""
    return tiny_model_of_four(family, num_hidden_layers=2, **options)


def module(lora=LORA, family="gpt2", **options):
    return CausalLM(tiny_model(family, **options), tokenizer=TOKENIZER, lora=lora, lr=1e-2)


def data():
    return TextDataModule(ROWS, tokenizer=TOKENIZER, batch_size=4, val=ROWS[:2])


def trainer(folder, callback, kind=L.Trainer, **options):
    callbacks = [callback] if isinstance(callback, L.Callback) else callback
    return rig.trainer(folder, *callbacks, kind=kind, **{"max_epochs": 2, **options})


def mean(result, plan, metric):
    values = sorted(row[metric] for row in result.rows if row["plan"] == plan)
    return values[(len(values) - 1) // 2] if metric == "target_rank" else sum(values) / len(values)


def evaluated(recipient, donor):
    result = GraftEvaluator(PROMPTS, TOKENIZER).evaluate(recipient, donor)
    return {f"{plan}/{metric}": mean(result, plan, metric) for plan in PLANS for metric in LOGGED}


def scores(entry):
    return {key: value for key, value in entry.items() if "/" in key}


@MODES
def test_a_fit_has_a_history_of_all_plans(tmp_path, lora):
    every = 2 if lora else 1
    ours, callback = module(lora), GraftCallback(PROMPTS, every_n_epochs=every)
    run = trainer(tmp_path, callback, max_epochs=2 * every)
    run.fit(ours, data())
    epochs = [0.0, float(every), 2.0 * every]
    assert [(entry["epoch"], entry["step"]) for entry in callback.history] == [(epoch, 2 * epoch) for epoch in epochs]
    before = tiny_model("gpt2")
    start, middle, end = (scores(entry) for entry in callback.history)
    assert start == pytest.approx(evaluated(before, copy.deepcopy(before)), abs=1e-5)
    after = evaluated(before, ours.model) if lora is None else evaluated(ours.model, "default")
    assert end == pytest.approx(after, abs=1e-5)
    for key in (key for key in start if key.startswith("PRE/") and "kl" not in key):
        assert start[key] == pytest.approx(middle[key], abs=1e-6) == pytest.approx(end[key], abs=1e-6)
    assert start["SFT/target_logprob"] < middle["SFT/target_logprob"] - 0.1
    assert end["SFT/target_prob"] > start["SFT/target_prob"] + 0.1
    assert all(value == pytest.approx(0.0, abs=1e-6) for key, value in start.items() if key.endswith("kl_to_donor"))
    for key, value in end.items():
        assert float(run.callback_metrics[f"graft/{key}"]) == pytest.approx(value, abs=1e-6)


def test_sft_is_the_plain_trained_model(tmp_path):
    ours, callback = module(None, "llama"), GraftCallback(PROMPTS[:2], at_start=False)
    trainer(tmp_path, callback, max_epochs=1).fit(ours, data())
    ours.eval()
    values = []
    for prompt in PROMPTS[:2]:
        ids = TOKENIZER(prompt.text)["input_ids"]
        with torch.no_grad():
            values.append(
                float(ours.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[TOKENIZER(" ")["input_ids"][0]])
            )
    (entry,) = callback.history
    assert entry["SFT/target_logprob"] == pytest.approx(sum(values) / 2, abs=1e-5)


def test_the_curves_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback, logger = GraftCallback(PROMPTS[:1], name="facts"), TensorBoardLogger(tmp_path)
    trainer(tmp_path, callback, logger=logger, max_epochs=1, log_every_n_steps=1).fit(module(), data())
    events = EventAccumulator(logger.log_dir).Reload()
    assert {f"facts/{plan}/{metric}" for plan in PLANS for metric in LOGGED} <= set(events.Tags()["scalars"])
    values = [event.value for event in events.Scalars("facts/SFT/target_prob")]
    assert values == pytest.approx([entry["SFT/target_prob"] for entry in callback.history], abs=1e-6)
    assert len(values) == 2


class PlModule(pl.LightningModule):
    """Somebody's own module, of the other namespace and with the other optimiser."""

    def __init__(self, model):
        super().__init__()
        self.model, self.tokenizer = model.train(), TOKENIZER

    def training_step(self, batch, batch_idx):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_other_namespace(tmp_path):
    callback = GraftCallback(PROMPTS[:1])
    batch = torch.tensor([TOKENIZER("Ann met Bo")["input_ids"]] * 2)
    run = trainer(tmp_path, callback, pl.Trainer, max_epochs=1)
    run.fit(PlModule(tiny_model("llama")), torch.utils.data.DataLoader(batch, batch_size=2))
    assert [entry["epoch"] for entry in callback.history] == [0.0, 1.0]
    assert float(run.callback_metrics["graft/SFT/top5"]) == callback.history[-1]["SFT/top5"]
    assert callback.history[1]["FE/target_prob"] != callback.history[1]["PRE/target_prob"]


class Plain(L.LightningModule):
    """Dropout and the order of rows draw from the global random state."""

    def __init__(self):
        super().__init__()
        options = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2)
        self.model, self.tokenizer = tiny_model("gpt2", **options).train(), TOKENIZER

    def training_step(self, batch, batch_idx):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        rows = torch.arange(48).view(8, 6) + 5
        return torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path):
    final, draws = [], []
    for callbacks in ([], [GraftCallback(PROMPTS[:1])]):
        L.seed_everything(5, verbose=False)
        ours = Plain()
        ours.model.transformer.h[0].eval()
        drawn = ours.model.lm_head.register_forward_hook(
            lambda head, *_: None if head.training else draws.append(torch.rand(1))
        )
        trainer(tmp_path, callbacks, max_epochs=1).fit(ours)
        drawn.remove()
        final.append(ours)
        assert not ours.model.transformer.h[0].training
        assert ours.model.transformer.h[1].mlp.dropout.training
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in ours.model.modules())
    a, b = (m.state_dict() for m in final)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert draws, "a look draws random numbers"


@MODES
def test_history_goes_on_after_a_resume_and_the_reference_is_from_before_training(tmp_path, lora):
    some = {"plans": {"LT": GraftPlan.at(Last())}}
    whole = GraftCallback(PROMPTS, **some)
    trainer(tmp_path, whole, max_epochs=2).fit(module(lora), data())
    first, keep = GraftCallback(PROMPTS, **some), ModelCheckpoint(tmp_path, filename="one", save_top_k=-1)
    trainer(tmp_path, [first, keep], max_epochs=1, enable_checkpointing=True).fit(module(lora), data())
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]
    assert saved[first.state_key]["history"] == first.history
    second = GraftCallback(PROMPTS, **some)
    trainer(tmp_path, second, max_epochs=2).fit(module(lora), data(), ckpt_path=tmp_path / "one.ckpt")
    assert [entry["epoch"] for entry in second.history] == [0.0, 1.0, 2.0]
    for ours, expected in zip(second.history, whole.history, strict=True):
        assert ours == pytest.approx(expected, abs=2e-5)
    assert second.history[-1]["PRE/target_logprob"] == pytest.approx(second.history[0]["PRE/target_logprob"], abs=1e-6)


def test_two_processes_give_the_numbers_of_one(tmp_path):
    found = []
    for options in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        run = trainer(tmp_path, GraftCallback(PROMPTS), max_epochs=1, **options)
        ours = CausalLM(tiny_model("gpt2"), tokenizer=TOKENIZER, lora=None, lr=1e-9)
        run.fit(ours, data())
        found.append({k: float(v) for k, v in run.callback_metrics.items() if k.startswith("graft/")})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == len(PLANS) * len(LOGGED)
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_more_processes_than_prompts(tmp_path):
    found = []
    for options in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        run = trainer(tmp_path, GraftCallback(PROMPTS[:1], reference=tiny_model("gpt2", seed=1)), **options)
        metrics = run.validate(module(), data(), verbose=False)[0]
        found.append({k: v for k, v in metrics.items() if k.startswith("graft/")})
    assert len(found[0]) == len(PLANS) * len(LOGGED)
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_validate_scores_against_a_reference(tmp_path):
    before, ours = tiny_model("gpt2", seed=1), module(None)
    callback = GraftCallback(PROMPTS, reference=before)
    run = trainer(tmp_path, callback)
    metrics = run.validate(ours, data(), verbose=False)[0]
    assert scores(callback.history[0]) == pytest.approx(evaluated(before, ours.model), abs=1e-5)
    assert metrics["graft/LT/target_prob"] == pytest.approx(callback.history[0]["LT/target_prob"], abs=1e-6)
    again = trainer(tmp_path, GraftCallback(PROMPTS[:1]))
    again.validate(module(), data(), verbose=False)
    assert float(again.callback_metrics["graft/SFT/kl_to_donor"]) == 0.0


def test_validation_inside_of_a_fit_is_not_scored_twice(tmp_path):
    callback = GraftCallback(PROMPTS[:1])
    trainer(tmp_path, callback, max_epochs=1, num_sanity_val_steps=1).fit(module(), data())
    assert [entry["epoch"] for entry in callback.history] == [0.0, 1.0]


def test_testing_and_predicting_need_no_reference(tmp_path):
    callback = GraftCallback(PROMPTS)
    trainer(tmp_path, callback).test(module(None), data().val_dataloader(), verbose=False)
    assert callback.history == []


def test_several_callbacks_have_names_of_their_own(tmp_path):
    plans = {"LT": GraftPlan.at(Last())}
    callbacks = [GraftCallback(PROMPTS[:2]), GraftCallback(PROMPTS[:1], plans=plans, name="one", at_start=False)]
    run = trainer(tmp_path, callbacks, max_epochs=1)
    run.fit(module(), data())
    assert [len(c.history) for c in callbacks] == [2, 1]
    assert {k.split("/")[1] for k in run.callback_metrics if k.startswith("one/")} == {"PRE", "SFT", "LT"}
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(tmp_path, [GraftCallback(PROMPTS), GraftCallback(PROMPTS)])


def test_the_copy_is_let_go_and_does_not_travel(tmp_path):
    callback = GraftCallback(PROMPTS[:1])

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            assert callback._snapshot is not None
            assert copy.deepcopy(callback)._snapshot is None
            assert not any(p.requires_grad for p in callback._snapshot.parameters())

    trainer(tmp_path, [callback, Look()], max_epochs=1).fit(module(None), data())
    assert callback._snapshot is None

    class Broken(L.Callback):
        def on_train_batch_start(self, *_):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, [callback, Broken()], max_epochs=1).fit(module(None), data())
    assert callback._snapshot is None


def no_tokenizer():
    return CausalLM(tiny_model("gpt2"), lora=LORA)


class NoTokens(L.LightningDataModule):
    """Somebody's data module without a tokenizer."""

    def train_dataloader(self):
        return data().train_dataloader()

    def val_dataloader(self):
        return data().val_dataloader()


def compiled():
    ours = module()
    ours.model.transformer.h[0]._compiled_call_impl = ours.model.transformer.h[
        0
    ]._call_impl  # as its compile() leaves it
    return ours


def several_adapters():
    ours = module()
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["c_attn"]), ours.model, adapter_name="second")
    for part in ours.model.modules():
        if hasattr(part, "lora_A"):
            part.set_adapter(["default", "second"])
    return ours


@pytest.mark.parametrize(
    ("make", "prompts", "error", "match"),
    [
        (no_tokenizer, PROMPTS, RecipeError, r"GraftCallback\('graft'\) found no tokenizer"),
        (several_adapters, PROMPTS, IncompatibleModelError, r"several adapters at once \(default, second\)"),
        (module, [GraftPrompt("Bo met", "Al", {"FE": "Ann"})], PositionError, "Entity 'Ann'"),
        (compiled, PROMPTS, CompiledModelError, "is compiled"),
    ],
)
def test_what_it_refuses_before_training(tmp_path, make, prompts, error, match):
    callback, ours = GraftCallback(prompts), make()
    with pytest.raises(error, match=match):
        trainer(tmp_path, callback).fit(ours, NoTokens())
    assert callback.history == []


def test_validate_without_a_reference(tmp_path):
    with pytest.raises(IncompatibleModelError, match="compare GPT2LMHeadModel with in 'validate'"):
        trainer(tmp_path, GraftCallback(PROMPTS)).validate(module(None), data(), verbose=False)


def test_sharded_strategies():
    class FSDPStrategy: ...

    class ModelParallelStrategy: ...

    for kind in (FSDPStrategy, ModelParallelStrategy):
        holder = type("T", (), {"strategy": kind()})()
        with pytest.raises(UnsupportedStrategyError, match=kind.__name__):
            GraftCallback(PROMPTS).setup(holder, module(), "fit")


def test_settings_that_never_run():
    with pytest.raises(RecipeError, match="every_n_epochs=0"):
        GraftCallback(PROMPTS, every_n_epochs=0)
    with pytest.raises(RecipeError, match=r"'graft'.* outside of a Trainer"):
        GraftCallback(PROMPTS).look(None, module())
