"""RewardAttributeEffect in real Trainers: what it logs, what it leaves alone, what it refuses."""

from __future__ import annotations

import random

import lightning as L
import numpy as np
import pytest
import pytorch_lightning as pl
import rig
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_interp.errors import DataError, RecipeError, UnsupportedStrategyError
from lightning_interp.models import LoraSettings, PreferenceDataModule, RewardModel
from lightning_interp.rate import RewriteStore
from lightning_interp.rate.callback import RewardAttributeEffect
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.records import Unit
from lightning_interp.rate.rewriting.rewriters import CallableRewriter
from lightning_interp.rate.scoring.scores import CallableScorer, score_triples
from lightning_interp.testing import CallbackContract, byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("two_layers")

NAMES = {"ate", "att", "atu", "ate_se", "naive", "single"}
DDP = {"devices": 2, "strategy": "ddp_fork"}


def units(n=9):
    """Marked and unmarked texts; a rewrite also takes the blemishes out."""
    texts = [f"text {i}" + "~" * (i % 4) + "!" * (i % 2) for i in range(n)]
    return [Unit(id=f"u{i}", text=text, w=i % 2, prompt=f"p{i % 3}") for i, text in enumerate(texts)]


def flipped(text, prompt, target):
    return text.rstrip("!").rstrip("~") + "!" * target


def finished(path, n=9):
    store = RewriteStore.create(path, units(n), attr="marks")
    RewriteRun(store, CallableRewriter(flipped, name="rule"), attr="marks").run()
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A finished store."""
    return finished(tmp_path_factory.mktemp("rewrites") / "store")


class Simple(L.LightningModule):
    """Somebody's reward model: a weight for marks, which grows, and one for blemishes. Dropout draws at random."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 1, bias=False)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.0, -0.5]]))

    def rewards(self, texts):
        features = torch.tensor([[text.count("!"), text.count("~")] for text in texts], device=self.device)
        return self.head(self.dropout(features.float()))[:, 0]

    def training_step(self, batch, batch_idx):
        return -self.head.weight[0, 0] + 0.0 * self.dropout(torch.rand(3, device=self.device)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen = batch_idx

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(4.0), batch_size=2, shuffle=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(2.0), batch_size=1)


def score(module, prompts, texts):
    return module.rewards(texts)


def trainer(folder, callbacks, kind=L.Trainer, **options):
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    return rig.trainer(folder, *callbacks, kind=kind, **{"max_epochs": 3, **options})


def logged(run, name="marks"):
    prefix = f"rate/{name}/"
    return {k.removeprefix(prefix): float(v) for k, v in run.callback_metrics.items() if k.startswith(prefix)}


class TestRewardAttributeEffect(CallbackContract):
    libraries = ("lightning.pytorch",)

    def make_callback(self):
        path = self.folder / "store"
        return RewardAttributeEffect(path if path.exists() else finished(path, 4), score=mean_logit)


class TestRewardAttributeEffectWithUnits(CallbackContract):
    libraries = ("pytorch_lightning",)

    def make_callback(self):
        half = RewriteTriples(
            attr="loud", ids=["a", "b"], w=[1, 0], prompts=["", ""], original=["oh!", "ah"], rewrite=["oh", "ah!"],
            rewrite2=["oh!", "ah"], draw=[0, 0],
        )  # fmt: skip
        return RewardAttributeEffect(half, score=mean_logit, name="own")


def mean_logit(module, prompts, texts):
    assert not module.model.training
    torch.rand(1)
    encoded = byte_tokenizer()(list(texts), return_tensors="pt", padding=True)
    return module.model(encoded.input_ids, attention_mask=encoded.attention_mask).logits[:, -1].mean(1)


def test_the_effect_grows_with_the_weight(tmp_path, folder):
    callback, module = RewardAttributeEffect(store=folder, attribute="marks", score=score), Simple()
    run = trainer(tmp_path, callback)
    run.fit(module)
    assert [(entry["epoch"], entry["step"]) for entry in callback.history] == [(0, 2), (1, 4), (2, 6)]
    assert [entry["ate"] for entry in callback.history] == pytest.approx([1.0, 2.0, 3.0])
    assert [entry["ate_se"] for entry in callback.history] == pytest.approx([0, 0, 0], abs=1e-7)
    assert set(logged(run)) == NAMES
    assert all((entry["n"], entry["dropped"], entry["truncated"]) == (9, 0, 0) for entry in callback.history)
    last = callback.history[-1]
    assert {name: last[name] for name in NAMES} == pytest.approx(logged(run), abs=1e-6)
    assert abs(last["single"] - 3.0) > 0.01  # blemishes go where a rewrite goes
    assert abs(last["naive"] - 3.0) > 0.1


def test_numbers_are_those_of_the_estimator(tmp_path, folder):
    callback, module = RewardAttributeEffect(folder, score=score, batch_size=2), Simple()
    trainer(tmp_path, callback, max_epochs=1).fit(module)
    module.eval()
    triples = RewriteStore.open(folder).triples("marks")
    rule = CallableScorer(lambda prompts, texts: module.rewards(texts), name="rule")
    expected = score_triples(rule, triples).effects(triples)
    assert callback.result.rate.ate.value == pytest.approx(expected.rate.ate.value)
    (entry,) = callback.history
    assert entry["single"] == pytest.approx(expected.single.ate.value)
    assert entry["naive"] == pytest.approx(expected.naive.value)
    assert entry["reward_std"] == pytest.approx(expected.reward_std)
    assert (entry["att"], entry["atu"]) == pytest.approx((expected.rate.att.value, expected.rate.atu.value))
    assert (entry["naive_se"], entry["single_se"]) == pytest.approx((expected.naive.se, expected.single.ate.se))


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (5, [0])])
def test_it_scores_every_few_validations_and_never_in_the_sanity_check(tmp_path, folder, every, epochs):
    calls = []

    def noted(module, prompts, texts):
        calls.append(module.trainer.sanity_checking)
        return module.rewards(texts)

    callback = RewardAttributeEffect(folder, score=noted, every_n_validations=every, batch_size=100)
    trainer(tmp_path, callback, max_epochs=4, num_sanity_val_steps=2).fit(Simple())
    assert [entry["epoch"] for entry in callback.history] == epochs
    assert calls == [False] * len(epochs)


def test_texts_are_scored_once_each_with_like_lengths_together(tmp_path, folder):
    batches = []

    def noted(module, prompts, texts):
        batches.append(list(zip(prompts, texts, strict=True)))
        return module.rewards(texts)

    trainer(tmp_path, RewardAttributeEffect(folder, score=noted, batch_size=4), max_epochs=1).fit(Simple())
    asked = [pair for batch in batches for pair in batch]
    triples = RewriteStore.open(folder).triples("marks")
    pairs = {pair for stage in triples.stages for pair in zip(triples.prompts, triples.texts(stage), strict=True)}
    assert len(asked) == len(set(asked))
    assert set(asked) == pairs
    assert len(asked) < 27
    lengths = [len(prompt) + len(text) for prompt, text in asked]
    assert lengths == sorted(lengths, reverse=True)
    assert {len(batch) for batch in batches[:-1]} == {4}


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_a_reward_model_scores_by_itself(tmp_path, folder, lora):
    module = RewardModel("tiny:llama", lora=lora, lr=5e-3, chat=False)
    rows = [{"prompt": "p0", "chosen": f"text {i}!", "rejected": f"text {i}"} for i in range(16)]
    callback = RewardAttributeEffect(folder)
    run = trainer(tmp_path, callback, max_epochs=3)
    run.fit(module, PreferenceDataModule(rows, encoder=module.encoder, val=rows[:4], batch_size=4))
    assert set(logged(run)) == NAMES
    assert callback.history[-1]["ate"] > callback.history[0]["ate"]
    assert callback.history[-1]["ate"] > 3 * callback.history[-1]["ate_se"]
    assert all(part.training for part in module.modules())


def test_validate_logs_too(tmp_path, folder):
    module = Simple()
    callback = RewardAttributeEffect(folder, score=score)
    metrics = trainer(tmp_path, callback).validate(module, verbose=False)[0]
    assert {f"rate/marks/{name}" for name in NAMES} <= set(metrics)
    assert len(callback.history) == 1


def test_the_curves_reach_tensorboard(tmp_path, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback, logger = RewardAttributeEffect(folder, score=score), TensorBoardLogger(tmp_path)
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(Simple())
    events = EventAccumulator(logger.log_dir).Reload()
    assert {f"rate/marks/{name}" for name in NAMES} <= set(events.Tags()["scalars"])
    values = [event.value for event in events.Scalars("rate/marks/ate")]
    assert values == pytest.approx([entry["ate"] for entry in callback.history])


class PlSimple(pl.LightningModule):
    """The same in the other namespace."""

    __init__ = Simple.__init__
    rewards, training_step, validation_step = Simple.rewards, Simple.training_step, Simple.validation_step
    configure_optimizers = Simple.configure_optimizers
    train_dataloader, val_dataloader = Simple.train_dataloader, Simple.val_dataloader


def test_the_other_namespace(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(PlSimple, "__init__", _init)
    callback = RewardAttributeEffect(folder, score=score)
    run = trainer(tmp_path, callback, pl.Trainer)
    run.fit(PlSimple())
    assert [entry["ate"] for entry in callback.history] == pytest.approx([1.0, 2.0, 3.0])
    assert set(logged(run)) == NAMES


def _init(self):
    pl.LightningModule.__init__(self)
    self.head, self.dropout = nn.Linear(2, 1, bias=False), nn.Dropout(0.5)
    with torch.no_grad():
        self.head.weight.copy_(torch.tensor([[0.0, -0.5]]))


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path, folder):
    def noisy(module, prompts, texts):
        torch.rand(2), random.random(), np.random.rand()  # noqa: S311
        assert not torch.is_grad_enabled()
        assert not module.training
        return module.rewards(texts)

    final = []
    for callbacks in ([], [RewardAttributeEffect(folder, score=noisy)]):
        L.seed_everything(5, verbose=False)
        module = Simple()
        module.dropout.eval()
        trainer(tmp_path, callbacks).fit(module)
        assert (module.training, module.dropout.training) == (True, False)
        final.append((module.head.weight.detach(), torch.get_rng_state(), random.getstate(), np.random.rand()))
    assert torch.equal(final[0][0], final[1][0])
    assert torch.equal(final[0][1], final[1][1])
    assert final[0][2:] == final[1][2:]


def test_history_goes_on_after_a_resume(tmp_path, folder):
    def make():
        return RewardAttributeEffect(folder, attribute="marks", score=score, every_n_validations=2)

    whole = make()
    trainer(tmp_path, whole, max_epochs=5).fit(Simple())
    first, keep = make(), ModelCheckpoint(tmp_path, filename="one", save_top_k=-1)
    trainer(tmp_path, [first, keep], max_epochs=2, enable_checkpointing=True).fit(Simple())
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]
    assert (saved[first.state_key]["history"], saved[first.state_key]["validations"]) == (first.history, 2)
    second = make()
    trainer(tmp_path, second, max_epochs=5).fit(Simple(), ckpt_path=tmp_path / "one.ckpt")
    assert [entry["epoch"] for entry in second.history] == [0, 2, 4]
    for ours, expected in zip(second.history, whole.history, strict=True):
        assert ours == pytest.approx(expected, nan_ok=True)


class SaysWhat(L.Callback):
    """Writes down on every rank how many texts were scored, and the history."""

    def __init__(self, folder, callback):
        self.folder, self.callback = folder, callback

    def on_train_end(self, trainer, pl_module):
        ate = [entry["ate"] for entry in self.callback.history]
        (self.folder / f"rank{trainer.global_rank}").write_text(f"{pl_module.scored} {ate}")


class Noted(Simple):
    scored = 0

    def rewards(self, texts):
        self.scored += len(texts)
        return super().rewards(texts)


@pytest.mark.parametrize("count", [9, 1])
def test_two_processes_give_the_numbers_of_one(tmp_path, folder, count):
    found, parts = [], []
    for options in ({}, DDP):
        callback = RewardAttributeEffect(folder, score=score, batch_size=4)
        if count == 1:
            whole = RewriteStore.open(folder).triples("marks")
            cut = {k: v[:1] if isinstance(v, list) else v for k, v in vars(whole).items()}
            callback = RewardAttributeEffect(RewriteTriples(**cut), score=score)
        run = trainer(
            tmp_path, [callback, SaysWhat(tmp_path, callback)], max_epochs=2, limit_train_batches=1, **options
        )
        run.fit(Noted())
        found.append(logged(run))
        parts.append([(tmp_path / f"rank{rank}").read_text() for rank in range((len(options) and 2) or 1)])
    assert found[0].keys() == found[1].keys() == NAMES
    assert found[1] == pytest.approx(found[0], abs=1e-6, nan_ok=True)
    texts = [int(part.split()[0]) for part in parts[1]]
    assert sum(texts) == int(parts[0][0].split()[0])
    assert max(texts) - min(texts) <= 2
    assert len({part.split(" ", 1)[1] for part in (*parts[0], *parts[1])}) == 1  # the same history everywhere


def test_rewards_that_are_not_finite_are_dropped_with_a_warning_or_end_the_run(tmp_path, folder):
    def broken(module, prompts, texts):
        rewards = module.rewards(texts)
        rewards[[index for index, text in enumerate(texts) if text == "text 2~~"]] = float("nan")
        return rewards

    callback = RewardAttributeEffect(folder, score=broken)
    with pytest.warns(UserWarning, match=r"RewardAttributeEffect\('marks'\): .*left out"):
        trainer(tmp_path, callback, max_epochs=1).fit(Simple())
    assert [(entry["n"], entry["dropped"]) for entry in callback.history] == [(8, 1)]
    with pytest.raises(DataError, match="u2"):
        trainer(tmp_path, RewardAttributeEffect(folder, score=broken, nonfinite="raise")).fit(Simple())


@pytest.mark.parametrize("spoilt", ["one stage", "infinite"])
def test_rewards_without_a_finite_unit_leave_the_training_alone(tmp_path, folder, spoilt):
    """NaN effects are told in that validation; those after it are as if nothing had been."""

    def broken(module, prompts, texts):
        rewards = module.rewards(texts).clone()
        if module.trainer.current_epoch == 1:
            bad = [text for text in texts if spoilt != "one stage" or "~" not in text]
            value = float("inf") if spoilt == "infinite" else float("nan")
            rewards[[index for index, text in enumerate(texts) if text in bad]] = value
        return rewards

    calm, callback = (RewardAttributeEffect(folder, score=one) for one in (score, broken))
    trainer(tmp_path / "a", calm, max_epochs=3).fit(Simple())
    run = trainer(tmp_path / "b", callback, max_epochs=3)
    with pytest.warns(UserWarning, match=r"RewardAttributeEffect\('marks'\): no unit has finite rewards"):
        run.fit(Simple())
    assert [entry["n"] for entry in callback.history] == [9, 0, 9]
    assert callback.history[1].keys() == callback.history[0].keys()
    assert callback.history[1]["dropped"] == 9
    assert callback.history[1]["ate"] != callback.history[1]["ate"]
    for one, other in zip(calm.history, callback.history, strict=True):
        if other["n"]:
            assert one == pytest.approx(other, nan_ok=True)
    with pytest.raises(DataError, match="finite"):
        trainer(tmp_path / "c", RewardAttributeEffect(folder, score=broken, nonfinite="raise"), max_epochs=3).fit(
            Simple()
        )


def test_several_callbacks_have_names_of_their_own(tmp_path, folder):
    callbacks = [
        RewardAttributeEffect(folder, "marks", score=score),
        RewardAttributeEffect(folder, score=score, name="b"),
    ]
    run = trainer(tmp_path, callbacks, max_epochs=1)
    run.fit(Simple())
    assert logged(run) == logged(run, "b")
    assert len({callback.state_key for callback in callbacks}) == 2
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(tmp_path, [RewardAttributeEffect(folder, "marks") for _ in range(2)])


def test_units_in_place_of_a_store_and_an_open_store(tmp_path, folder):
    store = RewriteStore.open(folder)
    found = []
    for given in (folder, str(folder), store, store.triples("marks")):
        callback = RewardAttributeEffect(given, score=score)
        trainer(tmp_path, callback, max_epochs=1).fit(Simple())
        found.append(callback.history[0]["ate"])
    assert len(set(found)) == 1


def test_mixed_precision_is_that_of_the_run(tmp_path, folder):
    seen = []

    def noted(module, prompts, texts):
        seen.append(torch.is_autocast_enabled("cpu"))
        return module.rewards(texts)

    trainer(tmp_path, RewardAttributeEffect(folder, score=noted), max_epochs=1, precision="bf16-mixed").fit(Simple())
    assert set(seen) == {True}


# What it refuses


def test_an_unfinished_store_is_refused_before_training(tmp_path):
    store = RewriteStore.create(tmp_path / "store", units(), attr="marks")
    callback, module = RewardAttributeEffect(store, score=score), Simple()
    with pytest.raises(DataError, match="Attribute 'marks': not every unit can be used"):
        trainer(tmp_path, callback).fit(module)
    assert module.head.weight[0, 0] == 0
    with pytest.raises(DataError, match="has no attribute 'length'; it has marks"):
        trainer(tmp_path, RewardAttributeEffect(store, "length", score=score)).fit(Simple())
    RewriteStore.create(tmp_path / "store", units(), attr="other")
    with pytest.raises(DataError, match=r"store has the attributes marks, other. Name one"):
        trainer(tmp_path, RewardAttributeEffect(tmp_path / "store", score=score)).fit(Simple())


def test_a_module_that_cannot_score_needs_a_function(tmp_path, folder):
    with pytest.raises(RecipeError, match=r"RewardAttributeEffect\('marks'\) has nothing to score with: Simple has no"):
        trainer(tmp_path, RewardAttributeEffect(folder)).fit(Simple())


def test_clusters_are_asked_for_before_training(tmp_path, folder):
    with pytest.raises(RecipeError, match=r"'marks', se='cluster'\) needs the cluster of every unit"):
        trainer(tmp_path, RewardAttributeEffect(folder, score=score, se="cluster")).fit(Simple())
    whole = RewriteStore.open(folder).triples("marks")
    grouped = RewriteTriples(**{**vars(whole), "cluster": [f"c{i // 2}" for i in range(9)]})
    callback = RewardAttributeEffect(grouped, score=score, se="cluster")
    trainer(tmp_path, callback, max_epochs=1).fit(Simple())
    assert "cluster" in callback.result.rate.ate.method


@pytest.mark.parametrize("options", [{}, DDP], ids=["one", "two"])
def test_cut_texts_are_reported(tmp_path, folder, options):
    module = RewardModel("tiny:llama", chat=False, add_eos=False, max_length=9)
    triples = RewriteStore.open(folder).triples("marks")
    flags = [
        len(p) + len(t) > 9 for s in triples.stages for p, t in zip(triples.prompts, triples.texts(s), strict=True)
    ]
    assert 0 < sum(flags) < 27
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 2
    data = PreferenceDataModule(rows, encoder=module.encoder, val=rows, batch_size=1)
    callback = RewardAttributeEffect(folder)
    run = trainer(tmp_path, [callback, Writes(tmp_path, callback)], **options)
    run.validate(module, data, verbose=False)
    assert float((tmp_path / "truncated").read_text()) == pytest.approx(sum(flags) / 27)


class Writes(L.Callback):
    """Writes the share of cut texts to a file, which outlives a forked process."""

    def __init__(self, folder, callback):
        self.folder, self.callback = folder, callback

    def on_validation_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            (self.folder / "truncated").write_text(str(self.callback.history[-1]["truncated"]))


def test_what_is_no_reward_a_text_is_refused(tmp_path, folder):
    callback = RewardAttributeEffect(folder, score=lambda *_: torch.zeros(3, 2))
    with pytest.raises(DataError, match=r"score= of 'marks' gave torch.float32 of shape \(3, 2\) for \d+ texts"):
        trainer(tmp_path, callback).fit(Simple())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every_n_validations": 0}, "every_n_validations=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"nonfinite": "hide"}, "nonfinite='hide'"),
        ({"se": "robust"}, "se='robust' is unknown"),
    ],
)
def test_wrong_arguments(folder, options, match):
    with pytest.raises(RecipeError, match=match):
        RewardAttributeEffect(folder, score=score, **options)


def test_outside_of_a_trainer(folder):
    with pytest.raises(RecipeError, match=r"'marks'.* outside of a Trainer"):
        RewardAttributeEffect(folder, "marks", score=score).look(None, Simple())


def holder(name, **more):
    return type(
        "T", (), {"strategy": type(name, (), more)(), "global_rank": 1, "world_size": 2, "sanity_checking": False}
    )()


def test_strategies(folder):
    callback = RewardAttributeEffect(folder, score=score)
    with pytest.raises(UnsupportedStrategyError, match="RewardAttributeEffect does not support FSDPStrategy"):
        callback.setup(holder("FSDPStrategy"), Simple(), "fit")
    callback.setup(holder("ModelParallelStrategy"), Simple(), "fit")  # forward passes alone need no whole weights


def test_with_sharded_weights_every_process_scores_every_text(folder):
    callback, module = RewardAttributeEffect(folder, score=score), Noted().eval()
    sharded = holder("ModelParallelStrategy")
    callback.setup(sharded, module, "fit")
    scores = callback._scores(sharded, module)
    triples = RewriteStore.open(folder).triples("marks")
    pairs = {pair for stage in triples.stages for pair in zip(triples.prompts, triples.texts(stage), strict=True)}
    assert module.scored == len(pairs)
    assert scores.effects(triples).counts.n == 9


def test_testing_and_predicting_need_nothing(tmp_path, folder):
    callback = RewardAttributeEffect(folder)
    module = Simple()
    module.predict_step = lambda batch, batch_idx: batch
    trainer(tmp_path, callback).predict(module, module.val_dataloader())
    assert callback.history == []


def test_a_language_model_without_a_score_needs_a_function(tmp_path, folder):
    class Holder(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_model("llama")

        def validation_step(self, batch, batch_idx):
            pass

    loader = torch.utils.data.DataLoader(torch.zeros(2))
    metrics = trainer(tmp_path, RewardAttributeEffect(folder, score=mean_logit)).validate(
        Holder(), loader, verbose=False
    )
    assert metrics[0]["rate/marks/ate"] != 0
