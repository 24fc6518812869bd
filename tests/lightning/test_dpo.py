"""DPO and DPODataModule inside Trainers."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import rig
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_interp.errors import DataError, IncompatibleModelError, UnsupportedStrategyError
from lightning_interp.models import (
    DPO,
    CausalLM,
    DPODataModule,
    DPOSettings,
    LoraSettings,
    TextDataModule,
    load_causal_lm,
    reference_logps,
)
from lightning_interp.models.training import dpo_reference
from lightning_interp.models.training.dpo import _roundoff
from lightning_interp.models.training.dpo_reference import reference_identity
from lightning_interp.testing import FAMILIES, byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("two_layers")

LORA = LoraSettings(r=4, alpha=8, target_modules=["v_proj", "down_proj", "c_attn"])
MODES = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
ROWS = [
    {"prompt": f"say {i} ", "chosen": "kind " * (1 + i % 3) + str(i), "rejected": f"{i} rude"[: 3 + i]}
    for i in range(10)
]
VAL = [{"prompt": "say a ", "chosen": "kind", "rejected": "quite rude"}, *ROWS[:4]]
LN2 = math.log(2)


def data(rows=ROWS, **options):
    return DPODataModule(rows, tokenizer=byte_tokenizer(), **{"batch_size": 4, "seed": 1, **options})


def dpo(model="tiny:llama", **options):
    return DPO(model, **{"lora": LORA, "lr": 1e-3, **options})


def trainer(folder, *callbacks, **options):
    return rig.trainer(folder, *callbacks, **{"max_epochs": 1, **options})


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(run):
    return {name: float(value) for name, value in run.callback_metrics.items()}


class Steps(Callback):
    """Writes down what was logged at each step, and the batches."""

    def __init__(self):
        self.found, self.batches = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.batches.append(batch)


def slow_logps(model, pairs):
    """Each side alone, without padding, token by token."""
    found = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            ids, scored = getattr(pair, side)
            with torch.no_grad():
                table = model.eval()(ids[None].long()).logits[0].double().log_softmax(-1)
            found.append(sum(float(table[t - 1, ids[t]]) for t in range(1, len(ids)) if scored[t]))
    return torch.tensor(found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of an adapter that was trained on text, from which a continual cycle starts."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_interp.models.sources.tiny._LAYERS", 2)
        module = CausalLM("tiny:llama", lora=LORA, lr=1e-2)
        rows = [{"prompt": f"say {i} ", "completion": "kind kind"} for i in range(8)]
        run = trainer(folder, max_epochs=4)
        run.fit(module, TextDataModule(rows, tokenizer=byte_tokenizer(), batch_size=4))
        return module.export(folder / "adapter")


# The first step


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_losses_and_the_first_step_equal_a_slow_loop(tmp_path, family):
    module, pairs = DPO(tiny_model(family), lora=None, lr=1e-3), data()
    expected = slow_logps(tiny_model(family), pairs.pairs("train"))
    steps = Steps()
    trainer(tmp_path, steps, max_steps=1).fit(module, pairs)
    found = torch.tensor([pairs.logps[pair.digest] for pair in pairs.pairs("train")])
    torch.testing.assert_close(found.T.flatten(), expected.float(), rtol=1e-5, atol=1e-4)
    assert abs(steps.found[0]["train/loss"] - LN2) < 1e-5
    assert abs(steps.found[0]["train/margin"]) < 1e-4 * 0.1
    # After the step: every number from log-probabilities of single rows.
    again = trainer(tmp_path).validate(module, pairs.train_dataloader(), verbose=False)[0]
    gain = 0.1 * (slow_logps(module.model, pairs.pairs("train")) - expected)
    chosen, rejected = gain.chunk(2)
    assert again["val/loss"] == pytest.approx(float(F.softplus(rejected - chosen).mean()), abs=1e-5)
    assert again["val/accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    assert again["val/margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-4)
    assert again["val/chosen_reward"] == pytest.approx(float(chosen.mean()), abs=1e-4)
    assert again["val/rejected_reward"] == pytest.approx(float(rejected.mean()), abs=1e-4)
    assert again["val/pairs"] == 10


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("start", ["base", "adapter", "full"])
def test_every_start_begins_at_ln_2(tmp_path, trained, start, precision):
    """The reference is the policy at its first step, in its precision; with equal batches to the last bit."""
    source = str(trained) if start == "adapter" else "tiny:llama"
    module = DPO(source, lora=LORA if start == "base" else None, lr=1e-3)
    steps = Steps()
    trainer(tmp_path, steps, precision=precision).fit(module, data(val=VAL))
    assert abs(steps.found[0]["train/loss"] - LN2) < 1e-6
    assert steps.found[0]["train/margin"] == 0
    assert steps.found[0]["train/accuracy"] == 0
    assert steps.found[-1]["train/loss"] < LN2


def test_dropout_does_not_fool_the_check(tmp_path):
    module = dpo(tiny_model("gpt2", **DROPOUT), lora=LoraSettings(r=4, dropout=0.3))
    steps = Steps()
    trainer(tmp_path, steps, max_steps=2).fit(module, data())
    assert abs(steps.found[0]["train/margin"]) > 1e-3  # under dropout


def adapters_off(module, pairs):
    """The wrong reference of a continual cycle: log-probabilities of the base."""
    base = DPO("tiny:llama", lora=None)
    reference_logps(base, pairs)
    pairs.reference_of = None
    return pairs


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_reference_with_adapters_off_is_refused_in_a_continual_cycle(tmp_path, trained, precision):
    module = DPO(str(trained), lr=1e-3)
    batches = adapters_off(module, data(seed=1)).train_dataloader()
    before = weights(module)
    with pytest.raises(
        IncompatibleModelError, match=r"in batch 0 the log-ratios .* differ by up to .* adapters switched"
    ):
        trainer(tmp_path, precision=precision).fit(module, batches)
    assert equal(weights(module), before)
    # Where the adapter starts from zero, the base is the policy at its first step.
    fresh = dpo()
    trainer(tmp_path, precision="32-true").fit(fresh, adapters_off(fresh, data(seed=1)).train_dataloader())
    # And on purpose.
    other = DPO(str(trained), lr=1e-3, check_start=False)
    trainer(tmp_path, max_steps=1).fit(other, batches)


def test_after_the_first_step_nothing_is_checked(tmp_path, trained):
    """A resumed run has moved on, and a check would ask the device at each step."""
    module, asked = dpo(), []
    module._check_start = lambda batch, batch_idx, terms: asked.append(module.global_step)
    trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2).fit(module, data(batch_size=2))
    assert asked == [0, 0]


def test_in_reduced_precision_rounding_is_told_from_another_model(tmp_path):
    """Other batches than those of training: in bfloat16 log-probabilities differ by what rounding makes."""
    module, pairs = dpo(), data(batch_size=1)
    reference_logps(module, pairs, autocast=torch.bfloat16)
    other = data(batch_size=5, seed=2)
    other.logps |= pairs.logps
    steps = Steps()
    trainer(tmp_path, steps, precision="bf16-mixed", max_steps=1).fit(module, other.train_dataloader())
    assert 0 < abs(steps.found[0]["train/margin"]) < 0.1
    for pair in other.logps:
        other.logps[pair] = (other.logps[pair][0] + 5.0, other.logps[pair][1])
    with pytest.raises(IncompatibleModelError, match=r"differ by up to [45]\.\d+ nats \(loss .* expected 0.693147"):
        trainer(tmp_path, precision="bf16-mixed", max_steps=1).fit(dpo(), other.train_dataloader())


@pytest.mark.parametrize(("precision", "expected"), [("highest", 2**-24), ("high", 2**-11), ("medium", 2**-8)])
def test_rounding_is_that_of_the_coarsest_type(precision, expected):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert _roundoff(tiny_model()) == expected
    finally:
        torch.set_float32_matmul_precision(before)
    assert _roundoff(tiny_model(dtype=torch.bfloat16)) == 2**-8


# What is learned


@MODES
def test_training_learns_to_prefer(tmp_path, lora):
    module = dpo(lora=lora, lr=3e-3 if lora is None else 1e-2, beta=0.2)
    run = trainer(tmp_path, max_epochs=4)
    run.fit(module, data(val=VAL))
    found = metrics(run)
    assert found["val/accuracy"] == found["train/accuracy"] == 1
    assert found["val/loss"] < 0.4
    assert found["val/chosen_reward"] > found["val/rejected_reward"]
    assert found["val/margin"] == pytest.approx(found["val/chosen_reward"] - found["val/rejected_reward"], rel=1e-4)
    assert found["val/pairs"] == 5


def step_gradients(module, pairs):
    """Gradients of one step with all pairs, without a Trainer."""
    reference_logps(module, pairs)
    (batch,) = pairs.train_dataloader()
    terms = module._terms(module.sequence_logps(batch), batch, 0)
    terms["loss"].mean().backward()
    return terms, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@MODES
def test_swapped_sides_turn_the_gradient_round_and_equal_ones_have_none(lora):
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    _, found = step_gradients(dpo(lora=lora), data(batch_size=10))
    _, swapped = step_gradients(dpo(lora=lora), data(turned, batch_size=10))
    for name, gradient in found.items():
        torch.testing.assert_close(swapped[name], -gradient, rtol=1e-4, atol=1e-6)
    same = [{**row, "rejected": row["chosen"]} for row in ROWS]
    with pytest.warns(UserWarning, match="10 have two equal sides"):
        terms, none = step_gradients(dpo(lora=lora), data(same, batch_size=10))
    assert max(float(gradient.abs().max()) for gradient in none.values()) < 1e-7
    assert terms["margin"].tolist() == [0.0] * 10


def test_log_ratios_are_sums_over_tokens():
    """Under a constant log-ratio a token, a completion of twice the length has twice the gain."""
    rows = [{"prompt_ids": [5], "chosen_ids": [6] * n, "rejected_ids": [7]} for n in (3, 6)]
    module = dpo(lora=None)
    (batch,) = data(rows, batch_size=2, seed=0).train_dataloader()
    uniform = -math.log(261)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        found = module.sequence_logps(batch)
    lengths = (batch["labels"] != -100).sum(dim=1)
    assert sorted(lengths.tolist()) == [1, 1, 3, 6]
    torch.testing.assert_close(found, lengths * uniform)


def test_completions_with_their_end_are_scored_and_nothing_else():
    (batch,) = data(batch_size=10).train_dataloader()
    texts = {(row["prompt"], row[side] + "<eos>") for row in ROWS for side in ("chosen", "rejected")}
    found = set()
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
        assert not (labels != -100)[~mask].any()
        scored = labels[mask] != -100
        parts = byte_tokenizer().batch_decode([ids[mask][~scored], labels[mask][scored]])
        found.add(tuple(parts))
    assert found == texts
    # What a label of a prompt says is seen nowhere: the log-probability is that of the completion alone.
    module = dpo()
    with torch.no_grad():
        expected = module.sequence_logps(batch)
        batch["labels"] = torch.where(batch["labels"] == -100, 77, batch["labels"])
        assert torch.equal(module.sequence_logps(batch), expected)


# The reference and its file


def test_a_reference_file_is_shared_by_runs_and_computed_once(tmp_path, monkeypatch):
    path = tmp_path / "reference.safetensors"
    passes = []
    run = dpo_reference._with_pairs
    monkeypatch.setattr(dpo_reference, "_with_pairs", lambda pairs, **more: passes.append(1) or run(pairs, **more))
    first = dpo()
    trainer(tmp_path).fit(first, data(reference=path, val=VAL))
    assert len(passes) == 3 + 2
    content = path.read_bytes()
    second = dpo(beta=0.5, lr=1e-4)  # another training on the same reference and rows
    trainer(tmp_path).fit(second, data(reference=path, val=VAL))
    assert len(passes) == 5
    assert path.read_bytes() == content
    again = dpo()
    trainer(tmp_path).fit(again, data(val=VAL))  # computed on the fly
    assert equal(weights(again), weights(first))


def test_cached_log_probabilities_equal_those_of_other_batches_to_1e_4(trained):
    module = DPO(str(trained))
    found = []
    for size, seed in ((1, 1), (4, 1), (4, 1), (7, 2)):
        pairs = data(batch_size=size, seed=seed)
        reference_logps(module, pairs)
        found.append(torch.tensor([pairs.logps[pair.digest] for pair in pairs.pairs("train")]))
    assert torch.equal(found[1], found[2])
    for other in found:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-4)


def test_a_killed_computation_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_reference, "_SAVE_EVERY", 1)
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    reference_logps(dpo(), data(reference=whole))
    module, done = dpo(), []
    run = module.sequence_logps

    def dies(batch):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return run(batch)

    module.sequence_logps = dies
    with pytest.raises(KeyboardInterrupt):
        reference_logps(module, data(reference=broken))
    assert len(dpo_reference.read_reference(broken, None)) == 8
    module, done[:] = dpo(), []
    run, module.sequence_logps = module.sequence_logps, lambda batch: done.append(1) or run(batch)
    reference_logps(module, data(reference=broken))
    assert len(done) == 1
    assert broken.read_bytes() == whole.read_bytes()


def test_more_rows_are_added_to_a_file(tmp_path):
    path = tmp_path / "reference.safetensors"
    reference_logps(dpo(), data(ROWS[:4], reference=path))
    before = dpo_reference.read_reference(path, None)
    reference_logps(dpo(), data(ROWS, reference=path))
    after = dpo_reference.read_reference(path, None)
    assert len(after) == 10
    assert before.items() <= after.items()


def test_a_file_of_another_adapter_is_refused(tmp_path, trained):
    path = tmp_path / "reference.safetensors"
    reference_logps(dpo(), data(reference=path))
    content = path.read_bytes()
    with pytest.raises(IncompatibleModelError, match=r"reference.safetensors holds .* another reference: its weights"):
        trainer(tmp_path).fit(DPO(str(trained)), data(reference=path))
    with pytest.raises(IncompatibleModelError, match=r"its precision is plain, .* torch.bfloat16"):
        trainer(tmp_path, precision="bf16-mixed").fit(dpo(), data(reference=path))
    assert path.read_bytes() == content
    assert reference_identity(dpo().model) != reference_identity(DPO(str(trained)).model)
    assert reference_identity(dpo().model) == reference_identity(dpo().model)
    moved = dpo()
    with torch.no_grad():  # one number of the adapter that is no sample of a digest
        next(p for n, p in moved.model.named_parameters() if "lora_A" in n).view(-1)[1] += 1e-3
    assert reference_identity(moved.model) != reference_identity(dpo().model)


def test_the_same_data_with_another_policy_are_asked_anew(tmp_path, trained):
    pairs = data()
    reference_logps(dpo(), pairs)
    before = dict(pairs.logps)
    steps = Steps()
    trainer(tmp_path, steps, max_steps=1).fit(DPO(str(trained), lr=1e-3), pairs)
    assert steps.found[0]["train/margin"] == 0
    assert pairs.logps != before


def test_the_reference_leaves_policy_and_random_numbers_as_they_were(tmp_path):
    module = dpo(tiny_model("gpt2", **DROPOUT))
    before, state = weights(module), torch.get_rng_state()
    reference_logps(module, data())
    assert equal(weights(module), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in module.modules())
    assert all(p.grad is None for p in module.parameters())


def test_a_reference_that_was_rounded_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"Batch 0 has its 'reference' in torch.bfloat16, .* 'bf16-mixed'"):
        trainer(tmp_path, precision="bf16-true").fit(dpo(), data())
    module = dpo(dtype="bfloat16")
    steps = Steps()
    trainer(tmp_path, steps).fit(module, data())
    assert steps.found[0]["train/margin"] == 0


def test_batches_without_a_reference_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"Batch 0 has 8 rows and no 'reference'; expected the chosen rows"):
        trainer(tmp_path).fit(dpo(), data().train_dataloader())
    module, pairs = dpo(), data(batch_size=10)
    reference_logps(module, pairs)
    (batch,) = pairs.train_dataloader()
    with pytest.raises(DataError, match=r"Batch 3 has 20 rows and 19 reference values"):
        module.validation_step({**batch, "reference": batch["reference"][1:]}, 3)


def test_validating_alone_reads_the_reference_and_never_computes_it(tmp_path):
    path = tmp_path / "reference.safetensors"
    module = dpo(lr=1e-2)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, data(val=VAL, reference=path))
    found = trainer(tmp_path).validate(module, data(val=VAL, reference=path), verbose=False)[0]
    assert found["val/loss"] == metrics(run)["val/loss"] < LN2
    with pytest.raises(DataError, match=r"of 5 pairs are not known .* computed before the first step"):
        trainer(tmp_path).validate(module, data(val=VAL), verbose=False)


# Checkpoints


class Stop(Callback):
    """Ends the run as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("lora", "steps", "cached"), [(None, [4], True), (LoraSettings(r=2, dropout=0.3), [1, 3], False)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, steps, lora, cached):
    def build(name):
        more = {"reference": tmp_path / f"{name}.safetensors"} if cached else {}
        module = dpo(tiny_model("gpt2", **DROPOUT), lora=lora, lr=3e-3, schedule="linear", warmup_steps=2)
        return module, data(val=VAL, **more)

    whole, pairs = build("whole")
    trainer(tmp_path, max_epochs=2).fit(whole, pairs)
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    broken, pairs = build("broken")
    run = trainer(tmp_path, keep, Stop(steps[-1] + 1), max_epochs=2, enable_checkpointing=True)
    with pytest.raises(ZeroDivisionError):
        run.fit(broken, pairs)
    for step in steps:
        resumed, pairs = build("broken")
        torch.manual_seed(1234)  # what ran before must not matter
        run = trainer(tmp_path, max_epochs=2)
        run.fit(resumed, pairs, ckpt_path=tmp_path / "ckpt" / f"step={step}.ckpt")
        assert run.global_step == 6
        assert equal(weights(resumed), weights(whole))


def saved(tmp_path, module, pairs, **options):
    run = trainer(tmp_path, **{"max_steps": 2, **options})
    run.fit(module, pairs)
    run.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    return tmp_path / "last.ckpt"


def test_a_checkpoint_goes_on_with_its_own_reference_and_rows_alone(tmp_path, trained):
    path = saved(tmp_path, DPO(str(trained), lr=1e-3), data())
    with pytest.raises(DataError, match=r"of 1 pairs are not known .* computed before the first step"):
        trainer(tmp_path).fit(DPO(str(trained), lr=1e-3), data([*ROWS, VAL[0]]), ckpt_path=path)
    reference_logps(dpo(), data(reference=tmp_path / "other.safetensors"))
    other = data(reference=tmp_path / "other.safetensors")
    with pytest.raises(IncompatibleModelError, match=r"other.safetensors holds .* another reference"):
        trainer(tmp_path).fit(DPO(str(trained), lr=1e-3), other, ckpt_path=path)


@MODES
def test_load_from_checkpoint_needs_no_arguments(tmp_path, lora):
    settings = {"beta": 0.3, "label_smoothing": 0.1, "check_start": False}
    module = dpo(lora=lora, **settings)
    path = saved(tmp_path, module, data())
    state = torch.load(path, weights_only=True)["state_dict"]
    assert set(state) == {n for n, p in module.named_parameters() if p.requires_grad} or lora is None
    loaded = DPO.load_from_checkpoint(path)
    assert equal(weights(loaded), weights(module))
    assert (loaded.preference, loaded.lr, loaded.training) == (DPOSettings(**settings), 1e-3, True)
    # As the start of another cycle it is its own reference.
    steps = Steps()
    trainer(tmp_path, steps, max_steps=1).fit(loaded, data())
    assert steps.found[0]["train/margin"] == 0


@MODES
def test_an_export_is_the_next_cycles_start(tmp_path, lora):
    module = dpo(lora=lora, lr=1e-2)
    trainer(tmp_path).fit(module, data())
    module.export(tmp_path / "out")
    loaded = load_causal_lm(tmp_path / "out").model.eval()
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(loaded(ids).logits, module.model.eval()(ids).logits)
    steps = Steps()
    trainer(tmp_path, steps, max_steps=1).fit(DPO(str(tmp_path / "out"), lr=1e-3), data())
    assert abs(steps.found[0]["train/loss"] - LN2) < 1e-6


# Several processes, quantised bases, strategies


SAME_LENGTH = [{"prompt": f"{i:02d}", "chosen": f"{i * i:03d}", "rejected": f"{i:03d}"} for i in range(2, 14)]


class SameEverywhere(Callback):
    """Compares the trained weights of all ranks at the end of training."""

    def on_train_end(self, trainer, pl_module):
        flat = torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad])
        if not all(torch.equal(flat, other) for other in trainer.strategy.all_gather(flat)):
            raise RuntimeError("the ranks went apart")


@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), LORA], ids=["full", "lora"])
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, lora):
    def options(name, size):
        return {"val": VAL, "batch_size": size, "reference": tmp_path / f"{name}.safetensors"}

    alone = dpo(lora=lora)
    run = trainer(tmp_path)
    run.fit(alone, data(SAME_LENGTH, **options("alone", 4)))
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="last", save_weights_only=False)
    pair = trainer(tmp_path, SameEverywhere(), keep, devices=2, strategy="ddp_fork", enable_checkpointing=True)
    pair.fit(dpo(lora=lora), data(SAME_LENGTH, **options("pair", 2)))
    loaded = DPO.load_from_checkpoint(tmp_path / "ckpt" / "last.ckpt")
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(loaded)[name], tensor, rtol=1e-3, atol=5e-5)
    both, one = metrics(pair), metrics(run)
    assert both.keys() == one.keys()
    assert both["val/pairs"] == 5  # the filler that makes the shares equal must not count
    for name, value in one.items():
        assert both[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    files = [dpo_reference.read_reference(tmp_path / f"{name}.safetensors", None) for name in ("alone", "pair")]
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        assert files[1][key] == pytest.approx(value, abs=1e-4)


def test_an_adapter_trains_on_a_quantised_base(tmp_path):
    module = dpo(quantization="8bit", lr=1e-2)
    steps = Steps()
    trainer(tmp_path, steps, max_epochs=3).fit(module, data())
    assert abs(steps.found[0]["train/loss"] - LN2) < 0.01  # with gradients, eight-bit maps round otherwise
    assert steps.found[-1]["train/loss"] < 0.5


def test_strategies_that_cannot_train_it_are_refused(tmp_path):
    for name, match in (
        ("FSDPStrategy", "does not support FSDPStrategy"),
        ("ModelParallelStrategy", "keeps in shards"),
    ):
        run = trainer(tmp_path)
        run.strategy.__class__ = type(name, (type(run.strategy),), {})
        with pytest.raises(UnsupportedStrategyError, match=match):
            run.fit(dpo(), data())


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = [step_gradients(dpo(gradient_checkpointing=on), data(batch_size=10))[1] for on in (False, True)]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
def test_the_loss_is_that_of_trl(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    (batch,) = data(batch_size=10).train_dataloader()
    module, other = DPO(tiny_model(), lora=None, beta=0.3), DPO(tiny_model(seed=1), lora=None)
    with torch.no_grad():
        batch["reference"] = other.sequence_logps(batch)
        terms = module._terms(module.sequence_logps(batch), batch, 0)
    theirs = DPOTrainer(
        tiny_model(),
        ref_model=tiny_model(seed=1),
        args=DPOConfig(output_dir=str(tmp_path), beta=0.3, report_to=[], use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=byte_tokenizer(),
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    loss = theirs.compute_loss(theirs.model, {**inputs, "completion_mask": (batch["labels"] != -100).long()})
    assert float(loss.detach()) == pytest.approx(float(terms["loss"].mean()), rel=1e-5)
