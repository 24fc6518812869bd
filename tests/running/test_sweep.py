"""Sweeps of any recipe: cells as child runs, one table, and kills that lose nothing."""

import itertools
import json
import os
import pickle
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_interp.cli import main
from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.core.storage.sweep_cells import cell_key, cell_status, value_text
from lightning_interp.errors import ManifestError, RecipeError
from lightning_interp.running import launching
from lightning_interp.running import sweep as sweeps
from lightning_interp.running.asked import allowed_source
from lightning_interp.running.launching import run_cell
from lightning_interp.running.results import read_run, read_table
from lightning_interp.running.sweep import asked_sweep
from lightning_interp.running.sweep_grid import cells_of, chosen_cells, read_grid, split_values
from lightning_interp.running.sweep_results import CellRow, chosen_metrics, flattened, metric_figure

CODE = '''
from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_interp.errors import DataError
from lightning_interp.recipe import Recipe, RecipeResult


@dataclass
class Inner:
    r: int = 1


@dataclass(kw_only=True)
class Power(Recipe):
    """Raises a number to a power, one factor a step."""

    base: int
    exponent: float = 2.0
    word: str = "a"
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    any: Any = None

    def __post_init__(self):
        super().__post_init__()
        if self.base == 99 and self.exponent > 2:
            raise DataError("99 is never raised so far")

    def study(self, run):
        if self.base == 13:
            raise DataError("13 brings no luck")
        with open(os.environ.get("STARTS", os.devnull), "a") as file:
            file.write(f"{self.base}/{self.exponent}\\n")
        value = run.phase("raise", self.power)
        noise = run.phase("noise", self.noise)
        return RecipeResult(
            metrics={"power": {"value": value, "low": value - 1, "high": value + 1}, "noise": noise, "kind": "x"},
            tables={"numbers": [{"value": value}]},
            caveats=["Toy.", f"Base {self.base}."],
            terms={"power": "what comes out"},
        )

    def power(self, folder):
        """Goes on where it stopped: each factor leaves a file."""
        for step in range(3):
            (folder / str(step)).write_text("x")
        return self.base**self.exponent + self.seed

    def noise(self, folder):
        import torch

        return torch.rand(1).item()
'''


@pytest.fixture
def power(tmp_path, monkeypatch):
    """A file with a recipe, in a folder to work in; figures are made and not drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_interp.running.results.png", lambda _: b"\x89PNG\r\n\x1a\n")
    yield str(atomic_write_text(tmp_path / "power.py", CODE).name)
    for name in [name for name in sys.modules if name.startswith("lightning_interp_recipes_")]:
        del sys.modules[name]


def grid_of(power, *axes, overrides=()):
    return read_grid(axes, allowed_source(power), overrides)


def table(folder):
    return (Path(folder) / "tables" / "cells.csv").read_bytes()


def test_a_sweep_runs_each_cell_as_a_child_run_and_puts_them_into_one_table(power, capsys):
    assert main(["sweep", power, "--grid", "base=1,2", "--grid=exponent=2,3", "--word=b"]) == 0
    run = read_run(Path("runs/power-sweep"))
    assert (run.manifest["name"], run.state) == ("Power-sweep", "finished")
    cells = run.tables["cells"]
    assert [(row["base"], row["exponent"], row["power.value"]) for row in cells] == [
        (1, 2.0, 1.0),
        (1, 3.0, 1.0),
        (2, 2.0, 4.0),
        (2, 3.0, 8.0),
    ]
    assert list(cells[0]) == ["cell", "base", "exponent", "status", "power.value", "power.low", "power.high", "noise"]
    assert run.tables["summary"][3] == {"base": 2, "exponent": 3.0, "status": "finished", "power": "8.00 [7.00, 9.00]"}
    assert run.outcome["caveats"][-1] == "Toy."  # which all cells say; "Base 1." only some
    assert set(run.figures) == {"power"}
    for row in cells:
        child = read_run(run.path / "children" / row["cell"])
        assert child.state == "finished"
        assert child.manifest["config"]["word"] == "b"
        assert child.metrics["noise"] == row["noise"]
        assert {"config.yaml", "metrics.json", "report.html", "tables"} <= set(os.listdir(child.path))
    report = (run.path / "report.html").read_text()
    assert report.count('/report.html">') == 4
    assert "lightning-interp sweep config.yaml --grid=base=1,2 --grid=exponent=2,3 --run_dir=ANOTHER_FOLDER" in report
    said = capsys.readouterr()
    assert "4 cells to run" in said.err
    assert re.search(r"cell 4 of 4: base=2, exponent=3, about \S+ s left", said.err)
    assert "8.00 [7.00, 9.00]" in said.out
    assert main(["show", str(run.path)]) == 0
    assert main(["report", str(run.path)]) == 0


def test_a_cell_is_a_run_that_goes_on_alone(power, capsys):
    main(["sweep", power, "--grid=base=3"])
    (cell,) = Path("runs/power-sweep/children").iterdir()
    before = (cell / "metrics.json").read_bytes()
    assert main(["run", str(cell / "config.yaml"), f"--import={power}"]) == 0
    assert (cell / "metrics.json").read_bytes() == before
    assert len(read_manifest(cell)["sessions"]) == 2


def test_a_cells_numbers_are_those_of_its_recipe_alone(power):
    main(["sweep", power, "--grid=base=3,4", "--seed=5"])
    main(["run", power, "--base=4", "--seed=5", "--run_dir=alone"])
    there = asked_sweep(power, ["base=3,4"], ["--seed=5"]).cells[1]
    assert (there.recipe.run_path / "metrics.json").read_bytes() == Path("alone/metrics.json").read_bytes()


def test_more_values_go_on_in_the_same_folder_with_the_new_cells_alone(power, monkeypatch):
    monkeypatch.setenv("STARTS", "starts")
    main(["sweep", power, "--grid=base=1,2"])
    main(["sweep", power, "--grid=base=1,2,3"])
    assert Path("starts").read_text().split() == ["1/2.0", "2/2.0", "3/2.0"]
    grown = table("runs/power-sweep")
    main(["sweep", power, "--grid=base=1,2,3", "--run_dir=whole"])
    assert grown == table("whole")
    assert main(["sweep", power, "--grid=base=2"]) == 0  # cells of earlier starts stay in the table, behind the others
    assert [row["base"] for row in read_table(Path("runs/power-sweep/tables/cells.csv"))] == [2, 1, 3]


@pytest.mark.parametrize(
    ("command", "difference"),
    [
        (["--grid=base=1", "--word=b"], r'word: "a" there, "b" now'),
        (["--grid=base=1", "--grid=word=a,b"], r'word: "a" there, "\(of the grid\)" now'),
        (["--grid=base=1", "--grid=trainer.max_epochs=1"], r"trainer.max_epochs: not set there"),
        (["--grid=exponent=1", "--base=1"], r'exponent: 2.0 there, "\(of the grid\)" now'),
    ],
)
def test_a_folder_of_another_sweep_is_refused_with_what_differs(power, capsys, command, difference):
    main(["sweep", power, "--grid=base=1"])
    assert main(["sweep", power, *command]) == 1
    assert re.search(f"another configuration: .*{difference}", capsys.readouterr().err)


def test_a_folder_of_another_recipe_is_refused(power, capsys):
    main(["sweep", power, "--grid=base=1"])
    assert main(["sweep", "grafting/facts", "--grid=rank=1", "--smoke=true", "--run_dir=runs/power-sweep"]) == 1
    assert "holds a run of 'Power-sweep', not of 'grafting/facts-sweep'" in capsys.readouterr().err


def test_a_failed_cell_is_written_down_and_the_others_go_on(power, capsys):
    assert main(["sweep", power, "--grid=base=13,2"]) == 1
    said = capsys.readouterr().err
    assert "cell base=13: failed: DataError: 13 brings no luck" in said
    assert "1 of 2 cells failed. Go on with: lightning-interp sweep power.py --grid=base=13,2" in said
    run = read_run(Path("runs/power-sweep"))
    assert (run.state, run.message) == ("failed", "1 of 2 cells failed")
    rows = run.tables["cells"]
    assert [(row["status"], row["message"]) for row in rows] == [
        ("failed", "DataError: 13 brings no luck"),
        ("finished", None),
    ]
    assert run.outcome["caveats"][1] == "Some cells are missing, and figures show what there is."
    atomic_write_text(power, CODE.replace("== 13", "== -13"))
    sys.modules.pop(type(asked_sweep(power, ["base=2"]).base).__module__)
    assert main(["sweep", power, "--grid=base=13,2"]) == 0  # only what failed is run, and "message" is gone
    main(["sweep", power, "--grid=base=13,2", "--run_dir=whole"])
    assert table("runs/power-sweep") == table("whole")


def test_a_cell_that_fails_before_its_folder_is_there_is_written_down_too(power, monkeypatch):
    sweep = asked_sweep(power, ["base=1,2"])
    sweep.cells[0].recipe.run_dir = "elsewhere"
    end = sweep.run()
    assert (end.finished, end.failed, end.left) == (1, 1, 0)
    assert (
        "run_dir='elsewhere' is no child of the run in 'runs/power-sweep'"
        in read_table(sweep.path / "tables" / "cells.csv")[0]["message"]
    )


def test_the_time_is_up_between_cells(power, capsys, monkeypatch):
    clock = itertools.count(0, 20)
    for module in (sweeps, launching):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert main(["sweep", power, "--grid=base=1,2,3", "--max-hours=0.02"]) == 3
    said = capsys.readouterr()
    assert "the time is up with 2 of 3 cells left; the same command goes on" in said.err
    assert "2 of 3 cells left. Go on with: lightning-interp sweep power.py" in said.err
    assert said.out.count("not run") == 2


def test_only_some_cells(power, monkeypatch):
    monkeypatch.setenv("STARTS", "starts")
    axes = ["--grid=base=1,2,3", "--grid=exponent=1,2"]
    assert main(["sweep", power, *axes, "--only=base=1,2", "--only=exponent=2.0"]) == 0
    assert Path("starts").read_text().split() == ["1/2.0", "2/2.0"]
    assert main(["sweep", power, *axes, f"--only={cell_key({'base': 3, 'exponent': 1.0})}"]) == 0
    assert Path("starts").read_text().split()[2:] == ["3/1.0"]
    rows = read_table(Path("runs/power-sweep/tables/cells.csv"))
    assert [row["status"] for row in rows].count("not run") == 3


class TestKills:
    def swept(self, folder, kill=None):
        """Sweep in a process of its own, which dies at a file operation; its code, and how many there were."""
        said, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                os.dup2(2, 1)
                count = 0

                def see(event, args):
                    nonlocal count
                    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_CREAT | os.O_WRONLY)
                    inside = bool(args) and str(args[0]).startswith(folder)
                    if inside and (writes or event in ("os.rename", "os.mkdir", "os.remove")):
                        count += 1
                        if count == kill:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(see)
                code = main(["sweep", "power.py", "--grid=base=2,3,4", f"--run_dir={folder}", "--seed=3"])
                os.write(told, str(count).encode())
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        os.close(told)
        with os.fdopen(said) as file:
            return os.waitstatus_to_exitcode(status), int(file.read() or 0)

    def test_a_killed_sweep_goes_on_to_the_same_table_with_what_is_missing(self, power, monkeypatch):
        asked_sweep(power, ["base=2,3"]).run()  # everything is imported before the forks
        code, operations = self.swept("whole")
        assert code == 0
        for number, part in enumerate((0.5, 0.95)):
            folder = f"killed{number}"
            monkeypatch.setenv("STARTS", f"{folder}-starts")
            assert self.swept(folder, kill=int(part * operations)) == (-signal.SIGKILL, 0)
            keys = [cell.key for cell in asked_sweep(power, ["base=2,3,4"], run_dir=folder).cells]
            done = [key for key in keys if cell_status(Path(folder), key)[0] == "finished"]
            before = Path(f"{folder}-starts").read_text().split() if Path(f"{folder}-starts").exists() else []
            assert self.swept(folder)[0] == 0
            starts = Path(f"{folder}-starts").read_text().split()
            assert len(starts) - len(before) == 3 - len(done)  # what is finished is not started again
            for file in ("tables/cells.csv", "tables/summary.csv", "metrics.json"):
                assert (Path(folder) / file).read_bytes() == (Path("whole") / file).read_bytes()

    @pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_leaves_a_sweep_that_goes_on(self, power, monkeypatch, capsys, request, stop):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
        inner = sweeps.run_cell

        def stopped(cell, parent=None):
            if cell.values["base"] == 3 and not Path("stopped").exists():
                Path("stopped").touch()
                with parent.child(cell.key, config=cell.recipe.config(), name=cell.recipe.name, inputs={}):
                    os.kill(os.getpid(), stop)
            return inner(cell, parent)

        monkeypatch.setattr(sweeps, "run_cell", stopped)
        command = ["sweep", power, "--grid=base=2,3"]
        assert main(command) == (143 if stop == signal.SIGTERM else 130)
        assert "what is finished is kept. Go on with: lightning-interp sweep power.py" in capsys.readouterr().err
        assert read_run(Path("runs/power-sweep")).state == "interrupted"
        assert main(command) == 0
        main([*command, "--run_dir=whole"])
        assert table("runs/power-sweep") == table("whole")


@dataclass(frozen=True)
class Forked:
    """Cells in processes of their own, as a launcher of another machine would run them."""

    alone: bool = True

    def run(self, cells, run_one):
        failures = {}
        for cell in cells:
            read, write = os.pipe()
            if os.fork() == 0:
                try:
                    pickle.dumps(run_one)
                    os.write(write, run_one(cell).encode())
                finally:
                    os._exit(0)
            os.close(write)
            with os.fdopen(read) as file:
                failures[cell.key] = file.read()
            os.wait()
        return failures


def test_a_launcher_may_run_cells_in_other_processes(power):
    main(["sweep", power, "--grid=base=2,13", "--run_dir=whole"])
    sweep = asked_sweep(power, ["base=2,13"])
    sweep.launcher = Forked()
    assert sweep.run().message == "1 of 2 cells failed"
    assert table(sweep.path) == table("whole")


class TestGrid:
    @pytest.mark.parametrize(
        ("axes", "message"),
        [
            ([], "A sweep needs a grid"),
            (["base"], "--grid 'base': expected a setting and its values"),
            (["base=1,,2"], "expected a setting and its values"),
            (["=1"], "expected a setting and its values"),
            (["bse=1"], r"has no field '--bse'. Did you mean 'base'\?"),
            (["base=1", "exponnt=1"], r"has no field '--exponnt'. Did you mean 'exponent'\?"),
            (["base=1", "trainer.devices=1,2"], "says where or how a run is computed"),
            (["run_dir=a,b"], "says where or how a run is computed"),
            (["base=1,x"], "the value of 'base' does not fit: expected int, got 'x'"),
            (["base=1", "base=2"], "--grid base is there twice"),
            (["base=1,2,1"], "--grid base: the value 1 is there twice"),
            (["base=1", "exponent=1,1.0"], "--grid exponent: the value 1 is there twice"),
            (["base=1", "flag=yes,no"], r"--grid flag=yes: YAML reads 'yes' as true. Write true or false"),
            (["base=1", "any=on"], r"--grid any=on: YAML reads 'on' as true"),
            (["base=1", "inner.r=1", "inner={}"], "--grid inner and 'inner.r' decide the same setting"),
            (["base=1", "word=b"], "--grid word and 'word' decide the same setting"),
            (["base=" + ",".join(map(str, range(101))), "exponent=" + ",".join(map(str, range(101)))], "10,201 cells"),
        ],
    )
    def test_what_is_no_grid_is_refused(self, power, axes, message):
        with pytest.raises(RecipeError, match=message):
            grid_of(power, *axes, overrides=["--word=a"] if "word=b" in axes else [])

    def test_values_have_the_types_of_the_fields(self, power):
        grid = grid_of(power, "base=1,2", "exponent=1", "word=yes,1", "flag=true", "inner.r=4", "trainer.max_epochs=3")
        assert list(grid.values.values()) == [[1, 2], [1.0], ["yes", "1"], [True], [4], [3]]
        assert grid_of(power, "base=1", 'inner={"r":2},{"r":3}').values["inner"] == [{"r": 2}, {"r": 3}]

    def test_a_cell_that_the_recipe_refuses_is_named_before_anything_runs(self, power, capsys):
        with pytest.raises(RecipeError, match=r"Cell --base=99, --exponent=3: .*99 is never raised so far"):
            asked_sweep(power, ["base=1,99", "exponent=1,3"])
        assert main(["sweep", power, "--grid=base=1,99", "--grid=exponent=3"]) == 2
        assert not Path("runs").exists()

    def test_no_value_imports_or_makes_what_it_names(self, power):
        atomic_write_text(Path("leaves.py"), "from pathlib import Path\nPath('HIT').touch()\nclass Mark: pass\n")
        sys.path.insert(0, os.getcwd())
        try:
            named = '{"class_path":"leaves.Mark"}'
            assert grid_of(power, "base=1", f"any={named}").values["any"] == [json.loads(named)]
            with pytest.raises(RecipeError, match="neither a class of Lightning's nor of a module"):
                asked_sweep(power, ["base=1", f"trainer.callbacks={named}"])
        finally:
            sys.path.remove(os.getcwd())
        assert not Path("HIT").exists()

    def test_a_recipes_own_grid_is_a_setting_like_others(self):
        name = "steering/dual_vs_euclidean"
        cells = asked_sweep(name, ["grid=[0.2,0.6],[0.5]", "seed=0,1"]).cells
        assert [cell.recipe.grid for cell in cells] == [[0.2, 0.6]] * 2 + [[0.5]] * 2
        with pytest.raises(RecipeError, match=r"--grid '\[0.2,0.6\]': .* own setting grid, too: --grid grid=VALUE"):
            asked_sweep(name, ["[0.2,0.6]"])

    def test_splitting_keeps_brackets_and_quotes(self):
        assert split_values('[1,2],{"a":[3,4]},"x,y",z') == ["[1,2]", '{"a":[3,4]}', '"x,y"', "z"]

    def test_only_names_what_there_is(self, power):
        cells = cells_of(grid_of(power, "base=1,2", "exponent=1,2"), allowed_source(power), Path("x"))
        assert [cell.label for cell in chosen_cells(cells, ["base=2", "exponent=1"])] == ["base=2, exponent=1"]
        for only, message in (
            ("bas=1", r"the grid has no setting 'bas'. Did you mean 'base'\?"),
            ("base=3", "--only base=3: the grid has no such value. It has 1, 2"),
            ("base_1", "--only 'base_1' is no cell of this grid"),
        ):
            with pytest.raises(RecipeError, match=message):
                chosen_cells(cells, [only])


class TestCells:
    def test_a_key_is_the_hash_of_values_whatever_their_order(self):
        key = cell_key({"lora.r": 8, "lr": 1e-3})
        assert key == cell_key({"lr": 0.001, "lora.r": 8.0})
        assert re.fullmatch(r"r_8-lr_0\.001-[0-9a-f]{10}", key)
        assert cell_key({"word": "Owl"}) != cell_key({"word": "owl"})
        assert cell_key({"word": "1"}) != cell_key({"word": 1})
        assert len({cell_key({"x": "ö" * 300}), cell_key({"x": "ö" * 301})}) == 2
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", cell_key({"Ä": "../../etc", "b": [1, 2]}))

    def test_the_status_of_a_cell_is_read_from_its_folder(self, tmp_path):
        with RunManifest.open(tmp_path, config={}, name="demo") as run:
            run.child("a", config={}).close("failed", "no luck")
            assert cell_status(tmp_path, "a") == ("failed", "no luck")
            assert cell_status(tmp_path, "b") == ("not run", "")
        atomic_write_text(tmp_path / "children" / "a" / "manifest.json", "{")
        assert cell_status(tmp_path, "a")[0] == "damaged"

    def test_a_child_run_has_outputs_and_identity_of_its_own(self, tmp_path):
        with RunManifest.open(tmp_path, config={}, name="demo", not_identity=("x",)) as run:
            run.child("a", config={"x": 1, "y": 1}, not_identity=("y",)).close()
            run.child("a", config={"x": 1, "y": 2}, not_identity=("y",)).close()
            with pytest.raises(ManifestError, match="x: 1 there, 2 now"):
                run.child("a", config={"x": 2, "y": 2}, not_identity=("y",))
            atomic_write_text(tmp_path / "children" / "b" / "metrics.json", "{}")
            with pytest.raises(ManifestError, match=r"metrics.json' exists, but its folder is no run folder"):
                run.child("b", config={}, outputs=("metrics.json",))

    def test_values_as_texts(self):
        assert [value_text(value) for value in ("a b", 1, 1.0, None, False)] == ["a b", "1", "1", "null", "false"]


class TestResults:
    def row(self, status="finished", metrics=(), **values):
        return CellRow(cell_key(values), values, status, metrics=dict(metrics))

    def test_numbers_are_found_by_dotted_name(self):
        nested = {"a": {"b": 1, "c": "text", "d": [1]}, "e": True, "f": None}
        assert dict(flattened(nested)) == {"a.b": 1, "e": True}

    def test_the_first_number_is_shown_unless_others_are_asked_for(self):
        rows = [self.row("failed", x=1), self.row(metrics={"a.value": 1.0, "a.low": 0.0, "b": 2.0}, x=2)]
        assert chosen_metrics(rows) == ["a"]
        assert chosen_metrics(rows, ["b", "a.low"]) == ["b", "a.low"]
        assert chosen_metrics(rows[:1], ["b"]) == []
        with pytest.raises(
            RecipeError, match=r"--metric 'a.lw': the cells have no such number. Did you mean 'a.low'\?"
        ):
            chosen_metrics(rows, ["a.lw"])

    def figure(self, rows, **grid):
        (axis,) = metric_figure(rows, grid, "m").axes
        return axis, {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}

    def test_one_line_for_each_value_of_the_second_setting_over_the_first_that_is_a_number(self):
        rows = [self.row(metrics={"m": r * w}, word="ab"[w - 1], rank=r) for r in (1, 2, 8) for w in (1, 2)]
        axis, lines = self.figure(rows, word=["a", "b"], rank=[1, 2, 8])
        assert lines == {"word=a": [[1, 1], [2, 2], [8, 8]], "word=b": [[1, 2], [2, 4], [8, 16]]}
        assert (axis.get_xlabel(), axis.get_xscale(), axis.xaxis.get_transform().base) == ("rank", "log", 2)

    def test_seeds_are_pooled_and_missing_cells_left_out(self):
        rows = [self.row(metrics={"m": x + s}, x=x, data_seed=s) for x in (1, 3) for s in (0, 4)]
        axis, lines = self.figure(rows[:3], x=[1, 3, 4], data_seed=[0, 4])
        assert list(lines.values()) == [[[1, 3], [3, 3]]]
        assert axis.get_xscale() == "linear"
        (shade,) = axis.collections
        assert sorted(set(map(tuple, shade.get_paths()[0].vertices.tolist()))) == [(1, 1), (1, 5), (3, 3)]

    def test_names_stand_side_by_side_and_wide_numbers_on_a_log_axis(self):
        axis, lines = self.figure([self.row(metrics={"m": 1.0}, word="b")], word=["a", "b"])
        assert list(lines.values()) == [[[1, 1]]]
        assert [text.get_text() for text in axis.get_xticklabels()] == ["a", "b"]
        axis, _ = self.figure([self.row(metrics={"m": 1.0}, lr=0.1)], lr=[1e-3, 0.1])
        assert (axis.get_xscale(), axis.xaxis.get_transform().base) == ("log", 10)


class TestCommand:
    def test_wrong_use_is_said(self, power, capsys):
        for arguments, message in (
            ([power, "--grid=base=1", "--launcher=ray"], "There is no launcher 'ray'. It has local."),
            ([power, "--grid=base=1", "--max-hours=0"], "--max-hours=0.0: expected a number of hours above 0"),
            ([power, "--grid=base=1", "stray"], "'stray' is no setting. Give settings as --field=value."),
            ([power, "--grid=base=1", "--wrd=b"], "has no field '--wrd'. Did you mean 'word'?"),
            (["powr.yaml", "--grid=base=1"], "There is no file 'powr.yaml'"),
        ):
            assert main(["sweep", *arguments]) == 2
            assert message in capsys.readouterr().err
        assert main(["show", "x", "--grid=base=1"]) == 2
        assert "unrecognized arguments: --grid=base=1" in capsys.readouterr().err

    def test_a_metric_that_no_cell_has_is_said_after_the_first(self, power, capsys, monkeypatch):
        monkeypatch.setenv("STARTS", "starts")
        assert main(["sweep", power, "--grid=base=1,2", "--metric=powr"]) == 1
        assert "--metric 'powr': the cells have no such number. Did you mean 'power'?" in capsys.readouterr().err
        assert len(Path("starts").read_text().split()) == 1
        assert main(["sweep", power, "--grid=base=1,2", "--metric=noise", "--metric=power"]) == 0
        assert set(read_run(Path("runs/power-sweep")).figures) == {"noise", "power"}

    def test_the_settings_of_a_sweep_go_on_with_it(self, power, monkeypatch):
        monkeypatch.setenv("STARTS", "starts")
        main(["sweep", power, "--grid=base=1,2", "--word=b"])
        command = Path("runs/power-sweep/config.yaml").read_text().splitlines()[0].split("lightning-interp ")[1].split()
        assert main(command) == 0
        assert len(Path("starts").read_text().split()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "axis"), [("steering/calibrate", "wanted=0.3,0.4"), ("subliminal/toy", "lr=0.1,1")])
def test_a_recipe_of_the_package_in_smoke_mode(tmp_path, monkeypatch, recipe, axis):
    monkeypatch.setattr("lightning_interp.running.results.png", lambda _: b"\x89PNG\r\n\x1a\n")
    sweep = asked_sweep(recipe, [axis], ["--smoke=true"], run_dir=str(tmp_path / "x"))
    assert sweep.run().finished == 2
    one, other = read_table(sweep.path / "tables" / "cells.csv")
    assert len(one) > 6
    assert list(one.values())[3:] != list(other.values())[3:]
    assert run_cell(sweep.cells[0]) == ""  # alone: its phases are finished
