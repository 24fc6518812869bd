"""RewardModel and PreferenceDataModule inside Trainers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import rig
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from transformers import AutoModelForSequenceClassification

from lightning_interp.errors import DataError, IncompatibleModelError, UnsupportedStrategyError
from lightning_interp.models import LoraSettings, PreferenceDataModule, RewardModel, load_reward_model
from lightning_interp.models.scoring.score_head import scoring_model
from lightning_interp.testing import byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("two_layers")

LORA = LoraSettings(r=4, alpha=8)
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
MODES = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
PROMPTS, TEXTS = ["say", "say", "say more"], ["a kind one", "a rude one", "b" * 30]


def preferences(count, seed):
    """Kind words are preferred to rude ones, after the same random beginning."""
    draw = random.Random(seed)  # noqa: S311
    rows = []
    for _ in range(count):
        begin = "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(1, 5)))
        good, bad = draw.choice(["kind", "warm", "fine"]), draw.choice(["cold", "grim", "rude"])
        rows.append({"prompt": "say", "chosen": begin + good, "rejected": begin + bad})
    return rows


PAIRS, VAL = preferences(12, 0), preferences(7, 1)
POINTS = [
    {"prompt": "say", "response": row[key], "reward": v}
    for row in PAIRS
    for key, v in (("chosen", 1.0), ("rejected", -1.0))
]


def data(module, rows=PAIRS, **options):
    return PreferenceDataModule(rows, encoder=module.encoder, **{"batch_size": 4, "seed": 1, **options})


def reward(model="tiny:llama", **options):
    return RewardModel(model, tokenizer=byte_tokenizer(), **{"chat": False, **options})


def trainer(folder, **options):
    return rig.trainer(folder, **{"max_epochs": 2, **options})


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(run):
    return {name: float(value) for name, value in run.callback_metrics.items()}


def slow_scores(model, rows, encoder, key):
    """One text at a time, without padding."""
    encoded = encoder.encode_texts([row["prompt"] for row in rows], [row[key] for row in rows])
    with torch.no_grad():
        return torch.stack([model.eval()(torch.tensor([text.ids])).logits[0, 0] for text in encoded])


# Learning


@pytest.mark.parametrize(("lora", "precision"), [(LORA, "32-true"), (None, "bf16-mixed")], ids=["lora", "full, bf16"])
def test_training_learns_to_order_pairs_that_it_has_not_seen(tmp_path, lora, precision):
    module, epochs = reward(lora=lora, lr=5e-3 if lora is None else 1e-2), 4 if lora is None else 6
    rows, unseen = preferences(48, 0), preferences(24, 1)
    before = trainer(tmp_path).validate(module, data(module, val=unseen), verbose=False)[0]
    run = trainer(tmp_path, max_epochs=epochs, precision=precision, check_val_every_n_epoch=epochs)
    run.fit(module, data(module, rows, val=unseen, batch_size=8))
    assert before["val/accuracy"] < 0.8
    found = metrics(run)
    assert found["val/accuracy"] == 1.0
    assert found["val/pairs"] == 24
    assert found["val/loss"] < 0.1 < before["val/loss"]
    assert {"train/loss", "train/accuracy"} <= set(found)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    kind, rude = module.score(["say"] * 2, ["abkind", "abrude"])
    assert kind > rude + 1
    assert all(part.training for part in module.modules())


def test_training_learns_ratings(tmp_path):
    module = reward(lr=3e-3)
    run = trainer(tmp_path, max_epochs=6, check_val_every_n_epoch=6)
    before = trainer(tmp_path).validate(module, data(module, POINTS, val=POINTS), verbose=False)[0]
    run.fit(module, data(module, POINTS, val=POINTS))
    assert set(metrics(run)) == {"train/loss", "val/loss", "val/texts"}
    assert metrics(run)["val/loss"] < 0.1 < before["val/loss"]
    assert metrics(run)["val/texts"] == 24
    found = module.score(["say"] * 2, [POINTS[0]["response"], POINTS[1]["response"]])
    assert found.tolist() == pytest.approx([1, -1], abs=0.5)


def test_without_an_adapter_every_weight_moves_and_with_one_the_adapter_and_the_head(tmp_path):
    for lora in (None, LORA):
        module = reward(lora=lora, lr=1e-2)
        before = weights(module)
        trainer(tmp_path, max_steps=3).fit(module, data(module))
        moved = {name for name, tensor in weights(module).items() if not torch.equal(tensor, before[name])}
        assert moved == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert "model.score.weight" in moved
        if lora is not None:
            assert all("lora_" in name for name in moved - {"model.score.weight"})
            assert not any("score" in name and "lora_" in name for name in moved)


# Losses


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe"])
def test_losses_and_accuracy_equal_a_slow_loop(tmp_path, family):
    module = reward(tiny_model(family))
    rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(VAL)]
    found = trainer(tmp_path).validate(module, data(module, val=rows, batch_size=3), verbose=False)[0]
    plain = scoring_model(tiny_model(family), seed=0)
    chosen, rejected = (slow_scores(plain, VAL, module.encoder, key) for key in ("chosen", "rejected"))
    losses = F.softplus(rejected - chosen + 0.1 * torch.arange(7))
    assert found["val/loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert found["val/accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    assert found["val/pairs"] == 7
    batch = next(iter(data(module, rows, batch_size=7).train_dataloader()))
    module.log = lambda *_, **__: None
    assert float(module.training_step(batch, 0).detach()) == pytest.approx(float(losses.mean()), rel=1e-4)
    del module.log
    again = trainer(tmp_path).test(module, data(module, val=VAL).val_dataloader(), verbose=False)[0]
    assert again["test/accuracy"] == found["val/accuracy"]


def test_a_batch_of_neither_kind_is_refused(tmp_path):
    module = reward()
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(DataError, match=r"Batch 4 has neither 'margin' .* only input_ids, attention_mask"):
        module.validation_step(batch, 4)


# Checkpoints


class Stop(Callback):
    """Ends the run as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise ZeroDivisionError


@pytest.mark.parametrize(("lora", "steps"), [(None, [4]), (LoraSettings(r=2, dropout=0.3), [1, 3])])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, steps, lora):
    def build():
        return reward(tiny_model("gpt2", **DROPOUT), lora=lora, lr=3e-3, schedule="linear", warmup_steps=2)

    whole = build()
    trainer(tmp_path).fit(whole, data(whole))
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    broken = build()
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[keep, Stop(steps[-1] + 1)])
    with pytest.raises(ZeroDivisionError):
        run.fit(broken, data(broken))
    for step in steps:
        resumed = build()
        torch.manual_seed(1234)  # what ran before must not matter
        run = trainer(tmp_path)
        run.fit(resumed, data(resumed), ckpt_path=tmp_path / "ckpt" / f"step={step}.ckpt")
        assert run.global_step == 6
        assert equal(weights(resumed), weights(whole))


def saved(tmp_path, module, name="last.ckpt"):
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, data(module))
    run.save_checkpoint(tmp_path / name)
    return tmp_path / name


@MODES
def test_load_from_checkpoint_needs_no_arguments(tmp_path, lora):
    module = RewardModel("tiny:llama", lora=lora, lr=3e-3, chat=False, max_length=50, token_budget=77)
    path = saved(tmp_path, module)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert set(state) == {n for n, p in module.named_parameters() if p.requires_grad} or lora is None
    loaded = RewardModel.load_from_checkpoint(path)
    assert equal(weights(loaded), weights(module))
    assert loaded.training
    assert (loaded.lr, loaded.token_budget, loaded.encoder.settings()) == (3e-3, 77, module.encoder.settings())
    torch.testing.assert_close(loaded.score(PROMPTS, TEXTS), module.score(PROMPTS, TEXTS))


def test_an_adapters_checkpoint_that_lacks_its_head_is_refused(tmp_path):
    path = saved(tmp_path, RewardModel("tiny:llama", lora=LORA))
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"]["model.score.weight"]
    torch.save(checkpoint, path)
    with pytest.raises(
        IncompatibleModelError, match=r"this RewardModel on 'tiny:llama': it lacks 'model.score.weight'"
    ):
        RewardModel.load_from_checkpoint(path)


# Export


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_exported_adapter_is_read_by_us_and_by_peft(tmp_path):
    module = RewardModel("tiny:llama", lora=LORA, lr=1e-2, chat=False)
    trainer(tmp_path, max_steps=3).fit(module, data(module))
    module.export(tmp_path / "out")
    expected = module.score(PROMPTS, TEXTS)
    loaded = load_reward_model(tmp_path / "out")
    assert (loaded.fresh, loaded.label) == (False, "out on tiny:llama")
    again = RewardModel(str(tmp_path / "out"))
    assert not again.encoder.chat
    torch.testing.assert_close(again.score(PROMPTS, TEXTS), expected)

    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        found = [theirs(torch.tensor([text.ids])).logits for text in module.encoder.encode_texts(PROMPTS, TEXTS)]
    torch.testing.assert_close(torch.cat(found)[:, 0], expected, rtol=1e-4, atol=1e-5)


@MODES
def test_an_exported_model_goes_on_being_trained(tmp_path, lora):
    first = RewardModel("tiny:llama", lora=lora, lr=1e-2)
    trainer(tmp_path, max_steps=2).fit(first, data(first))
    first.export(tmp_path / "first")
    second = RewardModel(str(tmp_path / "first"), lr=1e-2)
    assert (second.has_adapter, second.fresh) == (lora is not None, False)
    assert equal(weights(second), weights(first))
    before = weights(second)
    trainer(tmp_path, max_steps=2).fit(second, data(second))
    moved = {name for name, tensor in weights(second).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    second.export(tmp_path / "second")
    third = RewardModel(str(tmp_path / "second"))
    torch.testing.assert_close(third.score(PROMPTS, TEXTS), second.score(PROMPTS, TEXTS))


def test_transformers_reads_what_was_trained_in_full(tmp_path):
    module = reward("tiny:gpt2", lr=1e-2)
    trainer(tmp_path, max_steps=3).fit(module, data(module))
    module.export(tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    found = [theirs(torch.tensor([text.ids])).logits for text in module.encoder.encode_texts(PROMPTS, TEXTS)]
    torch.testing.assert_close(torch.cat(found)[:, 0].detach(), module.score(PROMPTS, TEXTS), rtol=1e-4, atol=1e-5)


# Several processes


SAME_LENGTH = [
    {"prompt": f"{i:02d}", "chosen": f"{i * i:03d}", "rejected": f"{i:03d}", "margin": i / 9} for i in range(2, 14)
]


class SameEverywhere(Callback):
    """Compares the trained weights of all ranks at the end of training."""

    def on_train_end(self, trainer, pl_module):
        flat = torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad])
        everyone = trainer.strategy.all_gather(flat)
        if not all(torch.equal(flat, other) for other in everyone):
            raise RuntimeError("the ranks went apart")


@MODES
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, lora):
    alone = RewardModel("tiny:llama", lora=lora, lr=1e-3, chat=False)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(alone, data(alone, SAME_LENGTH, val=VAL, batch_size=4))
    both = RewardModel("tiny:llama", lora=lora, lr=1e-3, chat=False)
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="last")
    options = {"devices": 2, "strategy": "ddp_fork", "enable_checkpointing": True}
    pair = trainer(tmp_path, max_epochs=1, callbacks=[SameEverywhere(), keep], **options)
    pair.fit(both, data(both, SAME_LENGTH, val=VAL, batch_size=2))
    loaded = RewardModel.load_from_checkpoint(tmp_path / "ckpt" / "last.ckpt")
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(loaded)[name], tensor, rtol=1e-3, atol=2e-5)
    # 7 pairs on 2 processes: the filler that makes the shares equal must not count.
    assert metrics(pair)["val/pairs"] == metrics(run)["val/pairs"] == 7
    assert metrics(pair)["val/accuracy"] == pytest.approx(metrics(run)["val/accuracy"])
    assert metrics(pair)["val/loss"] == pytest.approx(metrics(run)["val/loss"], rel=1e-4)
    for name in ("train/loss", "train/accuracy"):  # of all processes, not the share of the first
        assert metrics(pair)[name] == pytest.approx(metrics(run)[name], rel=1e-4)


SHARDED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_reward_model import LORA, SAME_LENGTH, VAL, RewardModel, data, trainer
from lightning.pytorch.strategies import ModelParallelStrategy

for name, lora in (("lora", LORA), ("full", None)):
    module = RewardModel("tiny:llama", lora=lora, lr=1e-3, chat=False)
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    run = trainer(sys.argv[2], devices=2, strategy=strategy)
    run.fit(module, data(module, SAME_LENGTH, val=VAL, batch_size=2))
    found = run.callback_metrics
    if run.global_rank == 0:
        print("RESULT", name, *(float(found[f"val/{key}"]) for key in ("loss", "accuracy", "pairs")), flush=True)
"""


@pytest.mark.slow
def test_sharded_training_equals_that_of_one_process(tmp_path):
    (tmp_path / "script.py").write_text(SHARDED)
    command = [sys.executable, str(tmp_path / "script.py"), str(Path(__file__).parent), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    results = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == 2, done.stderr[-3000:]
    for (name, loss, accuracy, pairs), lora in zip(results, (LORA, None), strict=True):
        alone = RewardModel("tiny:llama", lora=lora, lr=1e-3, chat=False)
        run = trainer(tmp_path)
        run.fit(alone, data(alone, SAME_LENGTH, val=VAL, batch_size=4))
        assert float(loss) == pytest.approx(metrics(run)["val/loss"], rel=1e-4), name
        assert float(accuracy) == pytest.approx(metrics(run)["val/accuracy"]), name
        assert float(pairs) == 7


def test_strategies_that_cannot_train_it_are_refused(tmp_path):
    run, module = trainer(tmp_path), reward()
    run.strategy.__class__ = type("FSDPStrategy", (type(run.strategy),), {})
    with pytest.raises(UnsupportedStrategyError, match=r"RewardModel on 'tiny:llama' does not support FSDPStrategy"):
        run.fit(module, data(module))


# Bases


def test_an_adapter_trains_on_a_quantised_base(tmp_path):
    module = RewardModel("tiny:llama", lora=LORA, quantization="8bit", lr=1e-2)
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    rows = preferences(8, 0)
    before = trainer(tmp_path).validate(module, data(module, val=rows), verbose=False)[0]["val/loss"]
    run = trainer(tmp_path, max_epochs=2, check_val_every_n_epoch=2)
    run.fit(module, data(module, rows, val=rows))
    assert metrics(run)["val/loss"] < before
    after = dict(module.named_parameters())
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        module = reward(tiny_model("gpt2", **DROPOUT), gradient_checkpointing=checkpointing)
        module.log = lambda *_, **__: None
        batch = next(iter(data(module).train_dataloader()))
        module._trainer = type("T", (), {"global_step": 0, "global_rank": 0})()
        module.training_step(batch, 0).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    on = "is_activation_checkpointing"  # before transformers 5.23 it was called gradient checkpointing
    assert getattr(module.model, on if hasattr(module.model, on) else "is_gradient_checkpointing")
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
