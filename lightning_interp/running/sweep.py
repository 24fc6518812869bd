"""Sweeps: any recipe once for each setting of a grid, each a child run; killed ones go on with what is missing."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_interp.core.storage.distributed import is_rank_zero
from lightning_interp.core.storage.files import canonical_json
from lightning_interp.core.storage.manifest_file import check_name, read_manifest
from lightning_interp.core.storage.sweep_cells import GRID, cell_status
from lightning_interp.errors import RecipeError
from lightning_interp.running.asked import allowed_source
from lightning_interp.running.catalog import nearest
from lightning_interp.running.launching import LAUNCHERS, Launcher, LocalLauncher, SweepEnd, run_cell
from lightning_interp.running.recipe import Recipe, versions
from lightning_interp.running.sweep_grid import Cell, base_of, cells_of, chosen_cells, read_grid

if TYPE_CHECKING:
    from lightning_interp.core.storage.manifest import RunManifest
    from lightning_interp.running.outcome import RecipeResult

__all__ = ["Sweep", "asked_sweep"]

log = logging.getLogger(__name__)

SWEPT = "(of the grid)"  # stands in the sweep's configuration for a setting that varies


@dataclass(kw_only=True)
class Sweep:
    """A recipe once for each cell of a grid; see :func:`asked_sweep`, which builds it from texts.

    Args:
        base: The recipe with the settings that all cells share; its ``run_dir`` is the sweep's folder.
        grid: Plain values by setting.
        cells: The cells of the grid.
        only: The cells of them to run now; all if None.
        metrics: What the summary and the figures show; the recipe's first number if empty.
        launcher: Where they run.
        max_hours: No cell begins after so many hours; None for no limit.
        options: Options that the command needs to go on, for ``config.yaml``.
    """

    base: Recipe
    grid: dict[str, list[Any]]
    cells: list[Cell]
    only: list[Cell] | None = None
    metrics: Sequence[str] = ()
    launcher: Launcher = dataclasses.field(default_factory=LocalLauncher)
    max_hours: float | None = None
    options: Sequence[str] = ()

    @property
    def path(self) -> Path:
        """The sweep's folder."""
        return self.base.run_path

    @property
    def name(self) -> str:
        """The name of the sweep's run."""
        return f"{self.base.name}-sweep"

    def config(self) -> dict[str, Any]:
        """The configuration of the sweep's run: the settings that all cells share, and the values of the grid.

        The values are no part of a sweep's identity: with more of them it goes on in the same folder. Which settings
        vary is.
        """
        config = self.base.config()
        for key in self.grid:
            inside, (*groups, last) = config, key.split(".")
            for group in groups:
                inside[group] = inside[group] if isinstance(inside.get(group), dict) else {}
                inside = inside[group]
            inside[last] = SWEPT
        return config | {GRID: self._all_values()}

    def run(self) -> SweepEnd:
        """Run the cells that are missing, and write the table, the figures and the report of all that there are.

        Returns:
            How many cells are finished, failed and left.

        Raises:
            ManifestError: If the folder belongs to another run, recipe or settings; nothing has been done then.
            RecipeError: If a metric is asked for that no cell has, after the first cell.
            KeyboardInterrupt: After Ctrl-C; the sweep can go on.
        """
        from lightning_interp.running.report import write_report

        gc.freeze()  # what there is before the first cell is no cell's, and need not be looked at after each
        try:
            end = self._run()
        finally:
            gc.unfreeze()
        if is_rank_zero():
            write_report(self.path)
        return end

    def _run(self) -> SweepEnd:
        wanted = self.cells if self.only is None else self.only
        with self._opened() as manifest:
            todo = [cell for cell in wanted if cell_status(self.path, cell.key)[0] != "finished"]
            self._begin(len(wanted) - len(todo), len(todo))
            if not self.launcher.alone:
                failures = self.launcher.run(self._offered(todo), partial(run_cell, parent=manifest))
                return self._end(manifest, wanted, failures)
            manifest.close("interrupted", "Its cells run in processes of their own.")
        failures = self.launcher.run(self._offered(todo), run_cell)
        with self._opened() as manifest:
            return self._end(manifest, wanted, failures)

    def result(self, failures: Mapping[str, str]) -> RecipeResult:
        """Tables and figures of the cells in the sweep's folder.

        Args:
            failures: Why cells failed in this start, by their keys; those may not have got as far as their folder.
        """
        from lightning_interp.running.sweep_results import chosen_metrics, read_cells, sweep_result

        values = self._all_values()
        rows = [
            dataclasses.replace(row, status="failed", message=failures[row.key]) if failures.get(row.key) else row
            for row in read_cells(self.path, values, [cell.key for cell in self.cells])
        ]
        return sweep_result(self.base.name, rows, values, chosen_metrics(rows, self.metrics))

    def _opened(self) -> RunManifest:
        from lightning_interp.core.storage.manifest import RunManifest
        from lightning_interp.running.results import OUTPUTS

        free = (GRID, *self.base.identity_free())
        return RunManifest.open(
            check_name(self.name, "run") and self.path,
            config=self.config(),
            name=self.name,
            versions=versions(),
            outputs=OUTPUTS,
            not_identity=free,
        )

    def _all_values(self) -> dict[str, list[Any]]:
        """The grid's values, then those of earlier starts in the same folder."""
        there: Any = {}
        if (self.path / "manifest.json").exists():
            there = read_manifest(self.path)["config"].get(GRID)
        earlier = there if isinstance(there, dict) and there.keys() == self.grid.keys() else {}
        return {
            key: [
                *values,
                *(old for old in earlier.get(key, ()) if canonical_json(old) not in map(canonical_json, values)),
            ]
            for key, values in self.grid.items()
        }

    def _begin(self, finished: int, todo: int) -> None:
        log.info("sweep folder: %s", self.path)
        log.info("%d cells to run%s", todo, f", {finished} finished before" if finished else "")
        if is_rank_zero():
            self.base.write_config("sweep", self.options)

    def _offered(self, todo: Sequence[Cell]) -> Iterator[Cell]:
        """The cells one by one, with a line that says how long is left; none when the time is up."""
        from lightning_interp.running.report import duration
        from lightning_interp.running.sweep_results import chosen_metrics, read_cells

        began, limit = time.monotonic(), None if self.max_hours is None else self.max_hours * 3600
        for place, cell in enumerate(todo):
            spent = time.monotonic() - began
            if limit is not None and spent >= limit:
                log.info(
                    "the time is up with %d of %d cells left; the same command goes on", len(todo) - place, len(todo)
                )
                return
            left = f", about {duration(spent / place * (len(todo) - place))} left" if place else ""
            log.info("cell %d of %d: %s%s", place + 1, len(todo), cell.label, left)
            yield cell
            if place == 0:  # a metric that does not exist is said now, not at the end
                chosen_metrics(read_cells(self.path, self.grid), self.metrics)

    def _end(self, manifest: RunManifest, wanted: Sequence[Cell], failures: Mapping[str, str]) -> SweepEnd:
        """Write all results into the sweep's run, and end it as what it is."""
        from lightning_interp.running.outcome import about_of, store_result

        states = ["failed" if failures.get(cell.key) else cell_status(self.path, cell.key)[0] for cell in wanted]
        finished, failed = states.count("finished"), sum(map(bool, failures.values()))
        summary: list[dict[str, Any]] = []
        if is_rank_zero():
            result = self.result(failures)
            source = "" if "model" in self.grid else self.base.used_model
            about = f"A sweep of {self.base.name}. {about_of(type(self.base))}"
            store_result(manifest, result, about=about, source=source)
            summary = result.tables[result.summary]
        end = SweepEnd(finished, failed, len(wanted) - finished - failed, summary)
        manifest.close("failed" if end.failed else "interrupted" if end.left else "finished", end.message or None)
        return end


def asked_sweep(
    name: str,
    grid: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    imports: Sequence[str] = (),
    only: Sequence[str] = (),
    metrics: Sequence[str] = (),
    launcher: str = "local",
    max_hours: float | None = None,
) -> Sweep:
    """Build the sweep that a command line asks for; every cell is checked before anything runs.

    Args:
        name: The recipe: its name, a YAML or a Python file.
        grid: ``setting=value,value`` by axis.
        overrides: The settings that all cells share, as options.
        run_dir: The sweep's folder; by default that of the recipe with ``-sweep`` behind it.
        imports: Modules of the user's, as ``--import`` names them.
        only: Cells to run, by values or by name.
        metrics: What the summary and the figures show.
        launcher: The name of one in ``LAUNCHERS``.
        max_hours: No cell begins after so many hours.

    Raises:
        RecipeError: If the recipe, a setting, a value, a cell or the launcher does not exist or does not fit.

    Example:
        >>> sweep = asked_sweep("grafting/facts", ["rank=1,2", "lr=1e-4,1e-3"], ["--smoke=true"])
        >>> len(sweep.cells), sweep.cells[0].label, sweep.path.as_posix()
        (4, 'rank=1, lr=0.0001', 'runs/grafting/facts-smoke-sweep')
    """
    if launcher not in LAUNCHERS:
        raise RecipeError(f"There is no launcher {launcher!r}. {nearest(launcher, LAUNCHERS)}")
    if max_hours is not None and not 0 < max_hours < float("inf"):
        raise RecipeError(f"--max-hours={max_hours}: expected a number of hours above 0.")
    source = allowed_source(name, imports)
    read = read_grid(grid, source, overrides, imports)
    base = base_of(source, overrides if run_dir is None else [*overrides, f"--run_dir={run_dir}"], read.texts, imports)
    base.run_dir = run_dir or f"{base.run_path}-sweep"
    cells = cells_of(read, source, base.run_path, overrides, imports)
    return Sweep(
        base=base,
        grid=read.values,
        cells=cells,
        only=chosen_cells(cells, only) if only else None,
        metrics=metrics,
        launcher=LAUNCHERS[launcher](),
        max_hours=max_hours,
        options=[*(f"--grid={axis}" for axis in grid), f"--run_dir={base.run_path}"],
    )
