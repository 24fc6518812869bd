"""Grids of adapters: cells as data, trained one by one or together, killed, gone on with, and what they say."""

import json
import math
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.sweep_cells import cell_status
from lightning_interp.errors import IncompatibleModelError, ManifestError, RecipeError
from lightning_interp.lora import GridCell, GridTraining, LoraGrid, grid_training, target_modules, train_grid
from lightning_interp.lora.grid_training import change_norm
from lightning_interp.lora.rank_grid import check_ranks
from lightning_interp.models import CausalLM, Optimisation, TextDataModule, load_causal_lm
from lightning_interp.testing import byte_tokenizer, tiny_model

ROWS = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(1, 7)]
GRID = LoraGrid(ranks=[1, 4], learning_rates=[1e-2], full_finetuning=[1e-3])
CELLS = GRID.cells()[:2]
TRAINING = GridTraining(optimisation=Optimisation(lr=1.0, schedule="linear"), max_epochs=2)


def data(cell):
    start = cell.data_seed
    return TextDataModule(
        ROWS[start : start + 4], tokenizer=byte_tokenizer(), val=ROWS[4:], batch_size=2, seed=cell.training_seed
    )


def trained(folder, cells, training=TRAINING, **options):
    with RunManifest.open(folder, config={}, name="grid") as run:
        return train_grid(run, cells, model="tiny:llama", **{"data": data, "training": training, **options})


def plain(rows):
    """As a table would hold them: the same bytes after a kill."""
    return json.dumps(rows, sort_keys=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The grid, trained one by one."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(folder, GRID.cells(), evaluate=lambda model, cell: {"training": model.training})


class TestGrid:
    def test_every_combination_is_a_cell_and_full_finetuning_comes_last(self):
        grid = LoraGrid(
            ranks=[1, 2], learning_rates=[0.1], targets=["attn", ["q_proj"]], data_seeds=[0, 3], training_seeds=[5],
            full_finetuning=[0.01], more={"arm": ["trait", "control"]},
        )  # fmt: skip
        cells = grid.cells()
        assert len(cells) == 2 * 2 * 2 * 2 + 2 * 2
        assert [cell.rank for cell in cells[-4:]] == [None] * 4
        assert len({cell.key for cell in cells}) == len(cells)
        assert cells[-1].values == {
            "rank": "full", "lr": 0.01, "targets": "all-linear", "data_seed": 3, "training_seed": 5, "arm": "control",
        }  # fmt: skip

    def test_a_cell_is_called_the_same_in_every_grid(self):
        one, more = (LoraGrid(ranks=ranks, learning_rates=[1e-3]).cells() for ranks in ([4], [1, 4]))
        assert one[0].key == more[1].key == GridCell(4, 0.001).key

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"ranks": []}, r"LoraGrid\(ranks=\[\]\): expected a list of values"),
            ({"ranks": [1, 1]}, r"LoraGrid\(ranks=\[1, 1\]\): expected a list of values, each of them once"),
            ({"ranks": [0]}, r"LoraGrid\(ranks\): 0 is no whole number of at least 1"),
            ({"ranks": [True]}, r"LoraGrid\(ranks\): True is no whole number"),
            ({"data_seeds": [-1]}, r"LoraGrid\(data_seeds\): -1 is no whole number of at least 0"),
            ({"learning_rates": [0.0]}, "the learning rate 0.0 is no number above 0"),
            ({"full_finetuning": [math.inf]}, "the learning rate inf is no number above 0"),
            ({"targets": ["atn"]}, "targets='atn' is no preset: expected one of all-linear, attn, ffn"),
            ({"targets": [[]]}, r"targets=\[\]: expected a preset"),
            ({"targets": "attn"}, r"LoraGrid\(targets='attn'\): expected a list of values"),
            ({"more": {"arm": []}}, r"LoraGrid\(arm=\[\]\): expected a list of values"),
        ],
    )
    def test_what_is_no_grid_is_refused(self, changed, message):
        with pytest.raises(RecipeError, match=message):
            LoraGrid(**{"ranks": [1], "learning_rates": [0.1], **changed})

    def test_presets_name_the_maps_of_a_family(self):
        model = tiny_model("llama", num_hidden_layers=2)
        attention = target_modules(model, "attn")
        assert attention == [f"self_attn.{name}_proj" for name in "koqv"]
        assert target_modules(model, ["q_proj"]) == ["q_proj"]
        adapted = CausalLM(model, lora=GridCell(2, 0.1, "attn").lora(model)).model
        assert {name.rpartition(".lora_A")[0].rpartition("layers.1.")[2] for name, _ in adapted.named_parameters() if
                "layers.1" in name and "lora_A" in name} == set(attention)  # fmt: skip
        assert GridCell(None, 0.1).lora(model) is None

    def test_a_model_without_such_maps_is_named(self, monkeypatch):
        monkeypatch.setitem(grid_training.check_ranks.__globals__, "_paths", lambda *_: [])
        with pytest.raises(IncompatibleModelError, match="LlamaForCausalLM has no maps of 'ffn' to adapt"):
            target_modules(tiny_model("llama", num_hidden_layers=2), "ffn")

    def test_a_rank_above_every_map_is_refused(self):
        model = tiny_model("llama", num_hidden_layers=2)
        size = max(min(m.weight.shape) for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear))
        check_ranks(model, [GridCell(size, 0.1), GridCell(None, 0.1)])
        with pytest.raises(
            IncompatibleModelError, match=rf"Rank {size + 1} is above the size of every map of 'all-lin"
        ):
            check_ranks(model, [GridCell(1, 0.1), GridCell(size + 1, 0.1)])


class TestTraining:
    def test_each_cell_says_how_far_it_went_and_how_large_its_update_is(self, whole):
        folder, rows = whole
        assert [(row["values"]["rank"], row["status"], row["steps"]) for row in rows] == [
            (1, "finished", 4), (4, "finished", 4), ("full", "finished", 4),
        ]  # fmt: skip
        base = load_causal_lm("tiny:llama").model
        for row in rows[:2]:
            model = load_causal_lm(str(folder / "children" / row["cell"] / "phases" / "train" / "model")).model
            merged = [module.get_delta_weight("default") for module in model.modules() if hasattr(module, "lora_A")]
            assert row["update_norm"] == pytest.approx(
                math.sqrt(sum(float(w.square().sum()) for w in merged)), rel=1e-5
            )
            held_out = data(GridCell(1, 0.1))
            held_out.setup("validate")
            (batch,) = held_out.val_dataloader()
            with torch.no_grad():
                assert row["held_out_loss"] == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)
        assert rows[1]["update_norm"] > rows[0]["update_norm"] > 0
        assert rows[2]["update_norm"] > 0
        assert len({row["train_loss"] for row in rows}) == 3
        assert [row["readout"] for row in rows] == [{"training": False}] * 3
        assert change_norm(base, load_causal_lm("tiny:llama").model) == 0
        left = (folder / "children" / rows[2]["cell"] / "phases" / "train").iterdir()
        assert [path.name for path in left] == ["result.json"]  # all weights are not kept

    def test_together_they_are_what_they_are_alone(self, whole, tmp_path):
        together = GridTraining(optimisation=TRAINING.optimisation, max_epochs=2, parallel_cells=2)
        rows = trained(tmp_path, GRID.cells(), together)
        for row, alone in zip(rows, whole[1], strict=True):
            assert row["cell"] == alone["cell"]
            for number in ("train_loss", "held_out_loss", "update_norm", "steps"):
                assert row[number] == pytest.approx(alone[number], rel=1e-5)
        assert list((tmp_path / "together").iterdir()) == []
        assert plain(trained(tmp_path, GRID.cells(), together)) == plain(rows)

    def test_more_cells_go_on_without_those_that_are_finished(self, whole, monkeypatch):
        folder, rows = whole
        made = []
        monkeypatch.setattr(grid_training, "fit_and_export", lambda module, *_: made.append(module) or 1 / 0)
        monkeypatch.setattr(grid_training, "fit_or_go_on", lambda *_, **__: 1 / 0)
        more = trained(folder, [*GRID.cells(), GridCell(2, 0.01)], evaluate=lambda *_: None)
        assert [row["values"]["rank"] for row in more] == [1, 4, 2, "full"]
        assert [row for row in more if row["status"] == "finished"] == rows
        (failed,) = [row for row in more if row["status"] == "failed"]
        assert (failed["values"]["rank"], failed["why"]) == (2, "ZeroDivisionError: division by zero")
        assert cell_status(folder, failed["cell"]) == ("failed", failed["why"])

    def test_a_cell_that_diverges_or_has_no_data_fails_alone(self, tmp_path):
        def some(cell):
            return data(cell) if cell.data_seed == 0 else TextDataModule([], tokenizer=byte_tokenizer())

        cells = [GridCell(1, 1e30), GridCell(1, 1e-2, data_seed=1), GridCell(1, 1e-3)]
        rows = trained(tmp_path, cells, GridTraining(max_steps=3, max_epochs=None, clip=None), data=some)
        assert [row["status"] for row in rows] == ["failed", "failed", "finished"]
        assert "its training diverged: loss" in rows[0]["why"]
        assert "DataError" in rows[1]["why"]
        assert rows[2]["steps"] == 3

    def test_adapters_share_one_base_which_is_as_before_after_each(self, tmp_path, monkeypatch):
        bases, loaded = [], grid_training.load_causal_lm
        monkeypatch.setattr(grid_training, "load_causal_lm", lambda source: bases.append(loaded(source)) or bases[-1])
        given = []

        def module(cell, model, **how):
            given.append(model)
            return CausalLM(model, **how)

        rows = trained(tmp_path, GRID.cells(), GridTraining(max_steps=1), module=module)
        assert [row["status"] for row in rows] == ["finished"] * 3
        assert len(bases) == 1
        assert given == [bases[0].model, bases[0].model, "tiny:llama"]
        assert change_norm(bases[0].model, load_causal_lm("tiny:llama").model) == 0
        assert not bases[0].model.training

    def test_the_time_is_up_between_cells(self, tmp_path, monkeypatch):
        clock = iter(range(0, 10_000, 100))
        monkeypatch.setattr(grid_training, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        limited = GridTraining(max_steps=1, max_hours=0.05)
        assert [row["status"] for row in trained(tmp_path, GRID.cells(), limited)] == ["finished", "not run", "not run"]

    def test_what_cannot_be_trained_is_said_at_once(self, tmp_path):
        with pytest.raises(RecipeError, match=r"The cell 'data_seed_0-.*' is there twice"):
            trained(tmp_path, [GridCell(1, 0.1), GridCell(1, 0.1)])
        with pytest.raises(RecipeError, match="Only CausalLM is trained in common passes"):
            trained(tmp_path, [GridCell(1, 0.1)], GridTraining(parallel_cells=2), module=lambda *_, **__: None)
        for changed, message in (
            ({"max_epochs": None}, "max_epochs or max_steps"),
            ({"parallel_cells": 0}, "at least 1"),
            ({"max_hours": 0}, "a number above 0"),
        ):
            with pytest.raises(RecipeError, match=message):
                GridTraining(**changed)

    def test_a_folder_of_another_training_is_refused(self, whole):
        with pytest.raises(ManifestError, match=r"training\.max_epochs: 2 there, 3 now"):
            trained(whole[0], GRID.cells(), GridTraining(optimisation=TRAINING.optimisation, max_epochs=3))


def killed(folder, training, kill):
    """Train in a process of its own that dies at a file operation; how many there were, and how it ended."""
    said, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = 0

        def see(event, args):
            nonlocal count
            if event in ("os.rename", "os.mkdir") and str(folder) in f"{args[0]}{args[1]}":
                count += 1
                if count == kill:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(see)
        try:
            trained(folder, CELLS, training)
            os.write(told, str(count).encode())
        finally:
            os._exit(0)
    os.close(told)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(said) as file:
        return os.waitstatus_to_exitcode(status), int(file.read() or 0)


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_killed_grid_goes_on_to_the_same_rows(tmp_path, parallel):
    training = GridTraining(optimisation=TRAINING.optimisation, max_epochs=1, parallel_cells=parallel)
    code, operations = killed(tmp_path / "whole", training, None)
    assert (code, operations > 10) == (0, True)
    rows = trained(tmp_path / "whole", CELLS, training)
    assert killed(tmp_path / "killed", training, int(0.6 * operations)) == (-signal.SIGKILL, 0)
    assert plain(trained(tmp_path / "killed", CELLS, training)) == plain(rows)
