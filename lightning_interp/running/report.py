"""``report.html``: one self-contained page about a run, made from the run folder alone, so it can be made again."""

from __future__ import annotations

import base64
import functools
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning_interp.core.measure.statistics import counted
from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.core.storage.run_lock import CHILDREN
from lightning_interp.core.storage.sweep_cells import GRID, value_text
from lightning_interp.errors import ManifestError
from lightning_interp.running.results import StoredRun, read_run
from lightning_interp.running.terminal import columns, shown, shown_rows

__all__ = ["duration", "render_report", "write_report"]

_TEMPLATE = Path(__file__).with_name("report.html.j2")
MAX_ROWS, MAX_ROWS_ASIDE = 500, 40  # on the page, of the main table and of the others; the files hold all
OPEN_ROWS, OPEN_ROWS_ASIDE = 24, 8  # a longer table is folded
OPEN_COLUMNS_ASIDE = 9  # a wider table is folded too
LONG_TEXT = 32  # letters from which on a column of text is given some width


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into the folder of a finished run."""
    run = read_run(Path(run_dir))
    if not run.outcome:
        phases = ", ".join(f"{name} ({phase['status']})" for name, phase in run.manifest["phases"].items())
        why = f" ({run.message})" if run.message else ""
        raise ManifestError(
            f"The run in {str(run_dir)!r} has no results yet: it is {run.state}{why}, with the phases "
            f"{phases or 'none'}. "
            "Start its command again to go on."
        )
    return atomic_write_text(run.path / "report.html", render_report(run))


def render_report(run: StoredRun) -> str:
    """Return the page, HTML that needs no other file; it links to the reports of child runs. All text is escaped."""
    summary = run.outcome["summary"]
    page: str = _template().render(
        name=run.manifest["name"],
        name_parts=re.split(r"(?<=[/_])", run.manifest["name"]),  # where a narrow page may break it
        outcome=run.outcome,
        about=run.outcome.get("about", "").split("\n\n")[0],
        main=_table(summary, run.tables[summary], MAX_ROWS, OPEN_ROWS, None) if summary else None,
        tables=[
            _table(name, rows, MAX_ROWS_ASIDE, OPEN_ROWS_ASIDE, OPEN_COLUMNS_ASIDE)
            for name, rows in run.tables.items()
            if name != summary
        ],
        figures=[
            {"title": _title(name), "caption": run.outcome["captions"].get(name, ""), **_inline(path)}
            for name, path in run.figures.items()
        ],
        metrics=list(_leaves(run.metrics)),
        counted=counted,
        settings=[(key, value) for key, value in _leaves(run.manifest["config"]) if key not in _unused(run)],
        smoke=bool(run.manifest["config"].get("smoke")),
        facts=_facts(run),
        phases=[
            {"name": name, "status": phase["status"], "time": duration(float(phase["seconds"]))}
            for name, phase in run.manifest["phases"].items()
        ],
        versions=_versions(run),
        last_start="" if run.status == "finished" else f"{run.state}{f' ({run.message})' if run.message else ''}",
        children=[_child(name, child) for name, child in run.children.items()],
        again=shlex.join(_again(run)),
    )
    return page


@functools.cache
def _template() -> Any:
    """The page's template; a sweep renders one page a cell."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _table(name: str, rows: list[dict[str, Any]], limit: int, unfolded: int, width: int | None) -> dict[str, Any]:
    names, cells = columns(rows), shown_rows(rows[:limit])
    wide = width is not None and len(names) > width
    return {
        "title": _title(name),
        "file": f"tables/{name}.csv",
        "columns": names,
        "kinds": [_kind([row.get(column) for row in rows]) for column in names],
        "rows": [list(map(_with_minus, line)) for line in cells],
        "left_out": len(rows) - len(cells),
        "size": f"{counted(len(rows), 'row')}{f', {len(names)} columns' if wide else ''}",
        "folded": len(rows) > unfolded or wide,
    }


def _kind(values: Sequence[Any]) -> str:
    if all(value is None or isinstance(value, int | float) for value in values):
        return "number"
    return "text" if any(len(str(value)) >= LONG_TEXT for value in values) else "word"


def _with_minus(text: str) -> str:
    """Return a negative number with a minus sign in place of the hyphen."""
    return f"\u2212{text[1:]}" if re.fullmatch(r"-\d[\d.e+-]*", text) else text


def _title(name: str) -> str:
    return name.replace("_", " ").strip().capitalize() if name.islower() else name.replace("_", " ")


def _inline(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(
            f"Cannot read the figure {str(path)!r}: {error.strerror}. Restore it, or start the run again."
        ) from error
    width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])  # of PNG's first chunk
    return {"data": base64.b64encode(content).decode("ascii"), "wide": width > 1.8 * height}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            text = re.sub(
                r"(?<=://)[^/\s@]+@", "***@", shown(value) if value not in ("", [], {}) else "-"
            )  # a run of old may have kept a password
            yield f"{prefix}{key}", text if len(text) <= 300 else f"{text[:300]} ..."


def _child(name: str, child: StoredRun) -> dict[str, str]:
    """A child run with the address of its report, which is empty where there is none."""
    report = child.path / "report.html"
    link = quote(f"{CHILDREN}/{name}/{report.name}") if report.is_file() else ""
    return {"name": name, "text": f"{child.state}, {duration(child.seconds)}", "link": link}


def _again(run: StoredRun) -> list[str]:
    """The command that repeats a run, in its folder."""
    grid = run.manifest["config"].get(GRID)
    if not isinstance(grid, dict):
        return ["lightning-interp", "run", "config.yaml"]
    axes = (f"--grid={key}={','.join(map(value_text, v))}" for key, v in grid.items() if isinstance(v, list))
    return ["lightning-interp", "sweep", "config.yaml", *axes]


def _unused(run: StoredRun) -> tuple[str, ...]:
    """Settings that say nothing about the numbers."""
    return ("run_dir",) if run.outcome["source"] else ("run_dir", "model")


def _facts(run: StoredRun) -> list[tuple[str, str]]:
    sessions = run.manifest["sessions"]
    started = str(sessions[0]["started"] if sessions else "unknown").replace("T", " ").replace("+00:00", " UTC")
    starts = f" in {len(sessions)} starts" if len(sessions) > 1 else ""
    facts = [
        ("Started", started),
        ("Run time", f"{duration(run.seconds)}{starts}"),
        ("Seed", shown(run.manifest["config"].get("seed"))),
    ]
    return [*facts, ("Model", run.outcome["source"])] if run.outcome["source"] else facts


def _versions(run: StoredRun) -> list[tuple[str, str]]:
    """Return each package with its version; with all of them if the run went on under another one."""
    sessions = [session.get("versions", {}) for session in run.manifest["sessions"]]
    packages = dict.fromkeys(package for versions in sessions for package in versions)
    return [
        (package, ", then ".join(dict.fromkeys(str(versions.get(package, "unknown")) for versions in sessions)))
        for package in packages
    ]


def duration(seconds: float) -> str:
    """A time as one reads it: ``35.1 s``, ``2 min 05 s``, ``3 h 07 min``."""
    if seconds < 60 or seconds > 1e9:  # of a damaged manifest
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
