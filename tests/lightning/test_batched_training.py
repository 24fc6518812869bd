"""Adapters that are trained together are those that are trained alone."""

from __future__ import annotations

import math
from dataclasses import replace

import peft
import pytest
import rig
import torch
from lightning.pytorch.callbacks import Callback
from peft.functional import get_peft_model_state_dict
from safetensors.torch import load_file

from lightning_interp.errors import IncompatibleModelError, ManifestError, RecipeError, UnsupportedStrategyError
from lightning_interp.lora import AdapterCell, train_adapters_together
from lightning_interp.lora.adapter_cells import batches_from
from lightning_interp.models import CausalLM, LoraSettings, Optimisation, TextDataModule, load_causal_lm
from lightning_interp.testing import byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("two_layers")

QUIET = {name: value for name, value in rig.QUIET.items() if name != "enable_checkpointing"}
SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(1, 4) for b in range(5, 9)]
TEXTS = [{"text": text} for text in ("one", "two and three", "a longer line of text", "xyz", "a, b, c")]


FEW = LoraSettings(r=2, target_modules=["q_proj", "down_proj"])


def data(rows, **options):
    return TextDataModule(rows, tokenizer=byte_tokenizer(), **options)


def cell(key="a", **options):
    plain = {"data": SUMS, "optimisation": Optimisation(lr=1e-2), "max_steps": 2, "lora": FEW}
    return AdapterCell(key=key, **{**plain, **options})


def together(cells, out, base=None, **options):
    trainer = {**QUIET, **options.pop("trainer", {})}
    return train_adapters_together(base or tiny_model(), byte_tokenizer(), cells, out, trainer=trainer, **options)


def trained(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}


def alone(cell, folder, base=None, **options):
    """The same cell in a CausalLM and a Trainer of its own: its weights, and the loss of each step."""
    losses = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    module = CausalLM(base or tiny_model(), lora=cell.lora, optimisation=cell.optimisation, seed=cell.seed)
    rows = cell.data if isinstance(cell.data, TextDataModule) else data(cell.data, seed=cell.seed)
    ends = {"max_steps": cell.max_steps or -1, "max_epochs": cell.max_epochs or -1}
    rig.trainer(folder, Losses(), **ends, gradient_clip_val=cell.clip, **options).fit(module, rows)
    return get_peft_model_state_dict(module.model, save_embedding_layers=False), losses


def assert_same(mine, theirs, tolerance=1e-5):
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(
            weight, theirs[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def various():
    """Cells that differ in everything that a cell may differ in."""
    # AdamW makes a step of a gradient's rounding where the gradient is small, so rates are those that are used.
    plain, steep = (
        Optimisation(lr=1e-3),
        Optimisation(lr=3e-3, schedule="linear", warmup_steps=3, weight_decay=0.1, betas=(0.8, 0.95)),
    )
    maps = ["q_proj", "down_proj"]
    return [
        cell("plain", data=data(SUMS, batch_size=4, seed=1), max_steps=20, lora=LoraSettings(r=8), optimisation=plain),
        cell("steep", data=data(TEXTS, batch_size=2, seed=2), max_epochs=5, max_steps=None, optimisation=steep, seed=7),
        cell(
            "dropped",
            data=data(TEXTS, batch_size=3),
            max_steps=20,
            lora=LoraSettings(r=3, dropout=0.3),
            clip=0.05,
            optimisation=plain,
        ),
        cell("broken", max_steps=20, optimisation=Optimisation(lr=1e39)),
        cell(
            "rooted",
            data=data(SUMS[:5], batch_size=1, seed=3),
            max_steps=7,
            lora=LoraSettings(r=1, alpha=2, target_modules=maps, layers=[1], use_rslora=True),
            optimisation=Optimisation(lr=5e-3, schedule="cosine", warmup_fraction=0.3, min_lr_fraction=0.2, eps=1e-4),
        ),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory, two_layers):
    out, ended = tmp_path_factory.mktemp("together"), []
    base = tiny_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    results = together(various(), out, base, on_end=ended.append)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not base.training
    return {result.key: result for result in results}, [result.key for result in ended]


@pytest.mark.parametrize("index", [0, 1, 2, 4])
def test_each_adapter_and_its_losses_are_those_of_training_it_alone(run, tmp_path, index):
    cell = various()[index]
    mine = run[0][cell.key]
    weights, losses = alone(cell, tmp_path)
    assert_same(trained(mine.folder), weights)
    assert mine.losses == pytest.approx(losses, abs=1e-5)
    assert (mine.status, mine.steps) == ("finished", len(losses))


def test_a_cell_that_diverges_leaves_with_the_reason_and_each_leaves_at_its_own_end(run):
    results, ended = run
    broken = results["broken"]
    assert (broken.status, broken.folder, broken.steps) == ("failed", None, 1)
    assert broken.why == "the loss is nan and the norm of the gradient nan at step 2"
    assert broken.update_norm is None
    assert ended == ["broken", "rooted", "steep", "plain", "dropped"]


def test_peft_opens_each_folder_and_its_update_is_as_large_as_told(run):
    result, base = run[0]["rooted"], tiny_model().state_dict()
    merged = peft.PeftModel.from_pretrained(tiny_model(), result.folder).merge_and_unload().state_dict()
    changes = [(merged[name] - weight).double().norm() ** 2 for name, weight in base.items()]
    assert result.update_norm == pytest.approx(math.sqrt(sum(changes)), rel=1e-4)
    assert sum(float(change) > 0 for change in changes) == 2  # of one layer


class Kill(Callback):
    """Ends the run as a crash would, behind a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise ZeroDivisionError


def test_a_killed_run_goes_on_and_gives_the_same_weights(tmp_path):
    cells = [
        cell("short", data=data(TEXTS, batch_size=2), max_steps=2),
        cell("long", data=data(SUMS, batch_size=5, seed=1), max_steps=7, lora=LoraSettings(r=3, dropout=0.2)),
        cell("broken", max_steps=7, optimisation=Optimisation(lr=1e39)),
        cell("late", data=data(TEXTS, batch_size=2, seed=4), max_epochs=2, max_steps=None, clip=0.5),
    ]
    whole, ended = together(cells, tmp_path / "whole"), []
    for step in (1, 4):  # before its first checkpoint, and behind one
        with pytest.raises(ZeroDivisionError):
            together(cells, tmp_path / "cut", checkpoint_every=3, trainer={"callbacks": [Kill(step)]})
    cut = together(cells, tmp_path / "cut", checkpoint_every=3, on_end=lambda result: ended.append(result.key))
    again = together(cells, tmp_path / "cut", checkpoint_every=3, on_end=ended.append)
    assert ended == ["late", "long"]
    assert again == cut
    for one, two in zip(whole, cut, strict=True):
        assert (one.status, one.losses, one.why) == (two.status, two.losses, two.why)
        if one.folder:
            assert_same(trained(one.folder), trained(two.folder), 0)
    with pytest.raises(ManifestError, match=r"checkpoint of other cells .*'late'"):
        together([*cells[:3], replace(cells[3], data=data(TEXTS, batch_size=2, seed=5))], tmp_path / "cut")


def test_bf16_mixed_trains_float32_weights_as_alone(tmp_path):
    cells = [cell("a", data=data(SUMS, batch_size=2), max_steps=6), cell("b", lora=LoraSettings(r=5), max_steps=6)]
    results = together(cells, tmp_path, trainer={"precision": "bf16-mixed"})
    for one, result in zip(cells, results, strict=True):
        _, losses = alone(one, tmp_path, precision="bf16-mixed")
        weights = trained(result.folder)
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert all(weight.any() for weight in weights.values())
        assert result.losses == pytest.approx(losses, rel=0.02)


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    runs = []
    for checkpointing in (False, True):
        how = Optimisation(lr=1e-2, gradient_checkpointing=checkpointing)
        out = tmp_path / str(checkpointing)
        runs.append(together([cell(key, optimisation=how, seed=i) for i, key in enumerate("ab")], out))
    for plain, recomputed in zip(*runs, strict=True):
        assert_same(trained(plain.folder), trained(recomputed.folder), 1e-7)


def test_a_pass_has_no_rows_of_cells_that_have_left(tmp_path):
    class Rows(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rows.append(len(batch["input_ids"]))

    rows, few = [], data(SUMS[:2], batch_size=2)
    cells = [cell("broken", data=few, optimisation=Optimisation(lr=1e39)), cell("b", data=few, max_steps=1)]
    cells += [cell("c", data=data(TEXTS, batch_size=1), max_steps=4)]
    together(cells, tmp_path, trainer={"callbacks": [Rows()]})
    assert rows == [5, 3, 1, 1]


def test_weights_that_are_not_finite_at_the_end_are_not_written(tmp_path):
    (result,) = together([cell(max_steps=1, optimisation=Optimisation(lr=1e39))], tmp_path)
    assert (result.status, result.why) == ("failed", "the weights are not finite after step 1")
    assert result.update_norm is None
    assert not (tmp_path / "a").exists()


def test_a_run_whose_cells_have_all_failed_ends(tmp_path):
    (result,) = together([cell(max_steps=50, optimisation=Optimisation(lr=1e39))], tmp_path)
    assert (result.status, result.steps) == ("failed", 1)


@pytest.mark.usefixtures("portable_4bit")
@pytest.mark.filterwarnings("ignore:.*no multiple of the block of 64")
def test_a_quantised_base_trains_as_alone(tmp_path):
    alike = cell(data=data(SUMS, batch_size=2), optimisation=Optimisation(lr=1e-3), max_steps=3)
    bases = [load_causal_lm("tiny:llama", quantization="4bit").model for _ in range(2)]
    results = together([alike, cell("b", data=data(TEXTS, batch_size=2))], tmp_path, bases[0])
    assert_same(trained(results[0].folder), alone(alike, tmp_path, bases[1])[0])


def test_batches_go_on_behind_those_that_are_done():
    loader, epochs = data(SUMS[:5], batch_size=2, seed=3).train_dataloader(), []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        epochs += [batch["input_ids"] for batch in loader]
    for done in (0, 2, 3, 7):
        going_on = batches_from(loader, done)
        assert all(torch.equal(next(going_on)["input_ids"], batch) for batch in epochs[done:])


# What is refused


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"key": "a/b"}, "cannot use key='a/b': expected the name of a folder"),
        ({"max_steps": None}, "cannot use max_steps=None: expected max_steps or max_epochs"),
        ({"max_epochs": 0}, "cannot use max_epochs=0: expected .* of at least 1"),
        ({"clip": 0.0}, "cannot use clip=0.0: expected a number above 0"),
        ({"lora": LoraSettings(use_dora=True)}, "expected use_dora=False"),
    ],
)
def test_a_cell_that_cannot_be_trained_is_refused(wrong, says):
    with pytest.raises(RecipeError, match=says):
        cell(**wrong)


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="got no cells"):
        train_adapters_together(tiny_model(), byte_tokenizer(), [], tmp_path)


@pytest.mark.parametrize(
    ("cells", "options", "error", "says"),
    [
        (["a", "b", "a"], {}, RecipeError, "2 cells have the key 'a'"),
        (
            ["a"],
            {"trainer": {"gradient_clip_val": 1.0}},
            RecipeError,
            r"given gradient_clip_val.*AdapterCell\(clip=...\)",
        ),
        (["a"], {"trainer": {"max_steps": 1}}, RecipeError, "given max_steps, as each cell has its own"),
        (["a"], {"trainer": {"accumulate_grad_batches": 2}}, RecipeError, "accumulate no gradients"),
        (["a"], {"trainer": {"precision": "bf16-true"}}, RecipeError, "with precision='bf16-true'"),
    ],
)
def test_a_run_that_cannot_be_right_is_refused(tmp_path, cells, options, error, says):
    with pytest.raises(error, match=says):
        together([cell(key) for key in cells], tmp_path, **options)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.Trainer.world_size", 2)
    with pytest.raises(UnsupportedStrategyError, match="this Trainer has 2"):
        together([cell()], tmp_path)


def test_checkpointing_of_some_cells_or_with_dropout_is_refused(tmp_path):
    on = Optimisation(lr=1e-2, gradient_checkpointing=True)
    for cells in (
        [cell("a"), cell("b", optimisation=on)],
        [cell(optimisation=on, lora=LoraSettings(r=1, dropout=0.1))],
    ):
        with pytest.raises(RecipeError, match="gradient_checkpointing recomputes"):
            together(cells, tmp_path)


def test_a_base_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(IncompatibleModelError, match=r"transformer.drop.p of GPT2LMHeadModel is 0.1"):
        together([cell()], tmp_path, tiny_model("gpt2", embd_pdrop=0.1))
    with pytest.raises(IncompatibleModelError, match=r"attention_dropout of .* is 0.2"):
        together([cell()], tmp_path, tiny_model("llama", attention_dropout=0.2))
    adapted = CausalLM(tiny_model(), lora=LoraSettings(r=1)).model
    with pytest.raises(IncompatibleModelError, match="carries the adapter"):
        together([cell()], tmp_path, adapted)


def test_rows_need_a_tokenizer_and_data_the_models_own(tmp_path):
    with pytest.raises(RecipeError, match="'a' is given as rows, but there is no tokenizer"):
        train_adapters_together(tiny_model(), None, [cell()], tmp_path)
    other = byte_tokenizer()
    other.eos_token = other.pad_token
    with pytest.raises(IncompatibleModelError, match="The tokenizers differ"):
        together([cell(data=TextDataModule(SUMS, tokenizer=other))], tmp_path)


def test_packed_rows_are_refused_and_a_length_window_is_kept(tmp_path):
    with pytest.raises(RecipeError, match="Cell 'a' has data with packing=True"):
        together([cell(data=data(TEXTS, packing=True))], tmp_path)
    sorted_cell = cell(data=data(TEXTS, batch_size=2, length_window=2), max_steps=5, optimisation=Optimisation(lr=1e-3))
    (result,) = together([sorted_cell], tmp_path / "together")
    weights, losses = alone(sorted_cell, tmp_path / "alone")
    assert_same(trained(result.folder), weights)
    assert result.losses == pytest.approx(losses, abs=1e-5)
