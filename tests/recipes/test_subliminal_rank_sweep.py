"""The recipe of ranks and learning rates: its grid, what it puts together, and a folder that takes more cells."""

import json
import shutil

import pytest

from lightning_interp import cli
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.errors import RecipeError
from lightning_interp.running.results import read_table
from lightning_interp_recipes.subliminal._rank_sweep import caveats, norm_figure, points_of, rank_figure

NAME = "subliminal/rank_sweep"


@pytest.fixture(scope="module")
def smoke(smoke_run):
    return smoke_run(NAME)


def row(arm, readout, *, rank=1, lr=0.1, data=0, status="finished", norm=2.0):
    values = {"rank": rank, "lr": lr, "targets": "all-linear", "data_seed": data, "training_seed": 0, "arm": arm}
    return {
        "cell": f"{arm}-{rank}-{lr}-{data}", "values": values, "status": status, "why": None, "readout": readout,
        "update_norm": norm, "train_loss": 1.0, "held_out_loss": 3.0, "steps": 4,
    }  # fmt: skip


def test_a_smoke_run_pairs_students_cell_by_cell_and_says_how_large_their_updates_are(smoke):
    metrics = json.loads((smoke / "metrics.json").read_text())
    assert list(metrics["grid"]) == ["all-linear/1/0.0002", "all-linear/8/0.0002", "all-linear/full/2e-05"]
    cells = read_table(smoke / "tables" / "cells.csv")
    for one in metrics["grid"].values():
        assert one["update_norm"] > 0
        assert one["held_out_loss"] > 0
    for arm, control, found in zip(cells[::2], cells[1::2], metrics["grid"].values(), strict=True):
        assert (arm["arm"], control["arm"]) == ("trait", "control")
        assert arm["margin"] - control["margin"] == pytest.approx(found["effect"]["estimate"]["value"])
        assert arm["update_norm"] == pytest.approx(found["update_norm"])
        assert read_manifest(smoke / "children" / arm["cell"])["sessions"][-1]["status"] == "finished"
    page = (smoke / "report.html").read_text()
    assert "vanish when the learning rate is tuned for each rank" in page
    assert "independent reruns at tuned learning rates differ" in page


@pytest.mark.parametrize(("option", "most"), [("--student=soft", 6), ("--student=hard", 6), ("--teacher=prompted", 4)])
def test_the_base_is_loaded_once_for_each_part_and_for_each_full_finetuning(tmp_path, loaded, undrawn, option, most):
    cli._configured(NAME, ["--smoke=true", option, f"--run_dir={tmp_path / 'run'}"]).run()
    assert loaded == ["tiny:llama"] * most  # two by the teachers' training, two by cells that train all weights
    folder = next((tmp_path / "run").rglob("train/model"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny:llama"


def test_more_ranks_go_on_in_the_same_folder_and_no_cell_is_trained_twice(smoke, tmp_path, undrawn):
    folder = tmp_path / "grown"
    shutil.copytree(smoke, folder)
    before = {path.name: read_manifest(path) for path in (folder / "children").iterdir()}
    command = ["run", NAME, "--smoke=true", f"--run_dir={folder}", "--ranks=[8,2]", "--full_lrs=[]"]
    assert cli.main(command) == 0
    cells = read_table(folder / "tables" / "cells.csv")
    assert [cell["rank"] for cell in cells] == [8, 8, 2, 2]
    for cell in cells:
        phases = read_manifest(folder / "children" / cell["cell"])["phases"]
        assert phases["train"]["attempts"] == 1
        if cell["rank"] == 8:
            assert phases["train"]["started"] == before[cell["cell"]]["phases"]["train"]["started"]


def test_pairs_are_put_together_over_data_sets_and_half_pairs_left_out():
    rows = [
        row("trait", [1.0, 2.0], norm=1.0), row("control", [0.0, 0.0], norm=9.0),
        row("trait", [3.0, 4.0], data=1, norm=3.0), row("control", [1.0, 1.0], data=1),
        row("trait", [1.0, 1.0], rank="full"), row("control", None, rank="full", status="failed"),
        row("trait", [5.0, 5.0], rank=4, lr=0.2), row("control", [5.0, 4.0], rank=4, lr=0.2),
    ]  # fmt: skip
    first, second = points_of(rows)
    assert (first.rank, first.line, first.norm, first.held_out_loss) == (1, "lr 0.1", 2.0, 3.0)
    assert first.effect.estimate.value == pytest.approx((1.5 + 2.5) / 2)
    assert (first.effect.cluster, first.effect.n_clusters) == ("datasets", 2)
    assert first.margin.value == pytest.approx(2.5)
    assert (second.rank, second.line, second.effect.cluster) == (4, "lr 0.2", "questions")


def test_figures_have_a_line_a_learning_rate_and_full_finetuning_behind_the_ranks():
    rows = [
        one
        for rank, lr in ((1, 0.1), (4, 0.1), (1, 0.2), ("full", 0.01))
        for one in (row("trait", [1.0, 2.0], rank=rank, lr=lr), row("control", [0.5, 0.5], rank=rank, lr=lr))
    ]
    points = points_of(rows)
    effect, margin = rank_figure(points, -3.0, "title").axes
    assert [text.get_text() for text in effect.get_xticklabels()] == ["1", "4", "full"]
    assert effect.get_legend_handles_labels()[1] == ["no effect", "lr 0.1", "lr 0.2", "full, lr 0.01"]
    assert margin.get_lines()[0].get_ydata() == [-3.0, -3.0]
    (axis,) = norm_figure(points, "title").axes
    assert {text.get_text() for text in axis.texts} == {"1", "4", "full"}
    assert rank_figure([], 0.0, "nothing yet").axes


def test_settings_that_cannot_be_are_refused(tmp_path):
    for options, message in (
        (["--trait=owl", "--other=owl"], "trait='owl' and other='owl': name two"),
        (["--parallel_cells=2"], "parallel_cells is for hard students"),
        (["--datasets=0"], "datasets=0: expected at least 1"),
    ):
        with pytest.raises(RecipeError, match=message):
            cli._configured(NAME, options)
    for options, message in (
        (["--targets=[atn]"], "'atn' is no preset: expected one of all-linear, attn, ffn"),
        (["--only=[rank=3]"], "--only rank=3: the grid has no such value"),
        (["--ranks=[0]"], "0 is no whole number of at least 1"),
    ):
        with pytest.raises(RecipeError, match=message):
            cli._configured(NAME, [*options, f"--run_dir={tmp_path / message[:3]}"]).run()


def test_soft_students_are_called_so():
    soft, hard = (cli._configured(NAME, [f"--student={kind}"]) for kind in ("soft", "hard"))
    assert len(caveats(soft, "model", [])) == len(caveats(hard, "model", [])) + 1
    assert len(soft.cells()) == (3 * 2 + 1) * 2 * 2
