"""A finished run on disk: metrics, tables and figures, written so that they can be read back without the recipe."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_interp.core.storage.files import atomic_write_bytes, atomic_write_json, atomic_write_text, jsonable
from lightning_interp.core.storage.inside import check_inside
from lightning_interp.core.storage.json_reading import read_json
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.core.storage.phase_results import phase_result
from lightning_interp.core.storage.run_lock import child_folders, is_in_use
from lightning_interp.errors import ManifestError, RecipeError
from lightning_interp.figures import png
from lightning_interp.running.terminal import columns

__all__ = [
    "OUTPUTS",
    "StoredRun",
    "check_output_name",
    "read_metrics",
    "read_run",
    "read_table",
    "write_figure",
    "write_results",
    "write_scalars",
    "write_table",
]

# What a run writes into its folder beside its phases and TensorBoard's files.
OUTPUTS = ("config.yaml", "metrics.json", "tables", "figures", "report.html")

_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?P<fraction>\.\d+)?(?P<exponent>[eE][+-]?\d+)?")
_WORDS = {"": None, "true": True, "false": False} | {word: float(word) for word in ("nan", "inf", "-inf")}
_REMEDY = "Restore it, or start the run again to write it anew."
_LONGEST = 300  # digits of a whole number in a table; longer ones are read as text

_TEXT, _TEXTS, _NAMED = "a string", "a list of strings", "an object of strings"
_OUTCOME = {"tables": _TEXTS, "figures": _TEXTS, "summary": _TEXT}
_MORE = {"question": _TEXT, "about": _TEXT, "source": _TEXT, "artifacts": _NAMED, "caveats": _TEXTS}
_MORE |= {"findings": _TEXTS, "captions": _NAMED, "terms": _NAMED}
_EMPTY: dict[str, Any] = {_TEXT: "", _TEXTS: [], _NAMED: {}}


@dataclass(frozen=True)
class StoredRun:
    """What a run folder holds."""

    path: Path
    manifest: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)  # empty before the run is finished
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # in the order in which the recipe gave them
    figures: dict[str, Path] = field(default_factory=dict)  # PNG files

    @property
    def outcome(self) -> dict[str, Any]:
        """What the finished run says of itself; empty before."""
        return dict(self.manifest["outcome"])

    @property
    def status(self) -> str:
        """How the last start of the run ended, or ``running`` (which it also says after a kill)."""
        return str(self._last.get("status", "not started"))

    @property
    def _last(self) -> dict[str, Any]:
        return dict((self.manifest["sessions"] or [{}])[-1])

    @property
    def state(self) -> str:
        """As ``status``, but a run that a kill has stopped is told from one that runs."""
        return "stopped by a kill" if self.status == "running" and not is_in_use(self.path) else self.status

    @property
    def message(self) -> str | None:
        """Why the last start did not finish."""
        return self._last.get("message")

    @property
    def children(self) -> dict[str, StoredRun]:
        """The runs inside this run that have begun, by name; read anew each time."""
        return {name: read_run(folder) for name, folder in child_folders(self.path).items()}

    def result(self, phase: str) -> Any:
        """Return what a phase returned, None if it is not finished."""
        phases = self.manifest["phases"]
        if phase not in phases:
            raise ManifestError(
                f"The run in {str(self.path)!r} has no phase {phase!r}; it has {', '.join(phases) or 'none yet'}."
            )
        return phase_result(self.path, phase, phases[phase])

    @property
    def seconds(self) -> float:
        """Time spent in all starts of the run; a killed one counts its phases' time only where they say it."""
        return float(sum(session.get("seconds") or 0.0 for session in self.manifest["sessions"]))


def check_output_name(name: str, what: str) -> str:
    """Return ``name`` if it can be a file's name without its ending."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise RecipeError(
            f"{name!r} cannot name a {what}: it becomes a file's name. Use letters, digits, '.', '-' and '_'."
        )
    return name


def _check_stored_names(names: Any, what: str, run_dir: Path) -> None:
    reason = "" if isinstance(names, list) and all(isinstance(name, str) for name in names) else f"no list of {what}s"
    try:
        _ = reason or [check_output_name(name, what) for name in names]
    except RecipeError as error:
        reason = str(error)
    if reason:
        raise ManifestError(f"{str(run_dir / 'manifest.json')!r} is damaged: {reason} {_REMEDY}")


def write_results(
    run_dir: Path,
    *,
    metrics: Mapping[str, Any],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    figures: Mapping[str, Any],
) -> None:
    """Write ``metrics.json``, ``tables/*.csv`` and ``figures/*.png``, each file in one step."""
    for name, rows in tables.items():
        write_table(run_dir / "tables" / f"{name}.csv", rows)
    for name, figure in figures.items():
        write_figure(run_dir / "figures" / f"{name}.png", figure)
    atomic_write_json(run_dir / "metrics.json", metrics, nan_as_null=True)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV with a header; numbers in full, nothing for None, lists and dicts as JSON."""
    names = columns(rows)
    plain = jsonable(list(rows), where=f"table {path.stem!r}")
    lines = [_line(names), *(_line([_cell(row.get(name)) for name in names]) for row in plain)]
    atomic_write_text(path, "".join(lines))


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read rows back from CSV, numbers as numbers."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # a cell may hold a whole generated text
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [_values(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise ManifestError(f"Cannot read the table {str(path)!r}: {error}. {_REMEDY}") from error


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure as PNG."""
    if hasattr(figure, "savefig"):
        atomic_write_bytes(path, png(figure))
        return
    try:
        content = Path(figure).read_bytes()
    except (TypeError, OSError) as error:
        raise RecipeError(
            f"Figure {path.stem!r} is {figure!r}: expected a matplotlib figure or the path of a PNG file ({error})."
        ) from error
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise RecipeError(f"Figure {path.stem!r}: {str(figure)!r} is no PNG file. Save it as PNG.")
    atomic_write_bytes(path, content)


def read_run(run_dir: Path) -> StoredRun:
    """Read a run folder, finished or not."""
    check_inside(run_dir)
    manifest = read_manifest(run_dir)
    if not manifest["outcome"]:
        return StoredRun(run_dir, manifest)
    outcome = manifest["outcome"] = _outcome(manifest, run_dir / "manifest.json")
    for kind in ("table", "figure"):
        _check_stored_names(outcome.get(f"{kind}s"), kind, run_dir)
    return StoredRun(
        run_dir,
        manifest,
        metrics=read_metrics(run_dir / "metrics.json"),
        tables={name: read_table(run_dir / "tables" / f"{name}.csv") for name in outcome["tables"]},
        figures={name: run_dir / "figures" / f"{name}.png" for name in outcome["figures"]},
    )


def _outcome(manifest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a finished run says of itself, with all keys; runs of earlier versions lack some."""
    found = {key: _EMPTY[kind] for key, kind in _MORE.items()}
    found |= {"source": str(manifest["config"].get("model") or "")} | manifest["outcome"]
    for key, kind in {**_OUTCOME, **_MORE}.items():
        if not _is(found.get(key), kind):
            raise ManifestError(f"{str(path)!r} is damaged: outcome.{key} should be {kind}. {_REMEDY}")
    if found["summary"] and found["summary"] not in found["tables"]:
        raise ManifestError(f"{str(path)!r} is damaged: outcome.summary names no table. {_REMEDY}")
    return found


def _is(value: Any, kind: str) -> bool:
    if kind == _TEXT:
        return isinstance(value, str)
    texts = value.values() if isinstance(value, dict) and kind == _NAMED else value
    return isinstance(value, dict if kind == _NAMED else list) and all(isinstance(text, str) for text in texts)


def read_metrics(path: Path) -> dict[str, Any]:
    """Read ``metrics.json`` of a finished run."""
    metrics = read_json(path, expected="the metrics of a run", error=ManifestError, own=True)
    if not isinstance(metrics, dict):
        raise ManifestError(f"{str(path)!r} holds a {type(metrics).__name__}; expected an object. {_REMEDY}")
    return metrics


def _line(cells: Sequence[str]) -> str:
    """One CSV row. The writer quotes only the line ends that it writes itself, so it must write both of them."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _values(row: Mapping[str | None, Any]) -> dict[str, Any]:
    if None in row:
        raise csv.Error(f"a row has more cells than the header: {row[None]}")
    return {str(name): _value(text) for name, text in row.items()}


def _value(text: str | None) -> Any:
    if text is None or text in _WORDS:
        return _WORDS[text or ""]
    match = _NUMBER.fullmatch(text)
    if match is None or len(text) > _LONGEST:
        return text
    return float(text) if match["fraction"] or match["exponent"] else int(text)


def write_scalars(folder: Path, tag: str, values: Sequence[float]) -> None:
    """Write a curve for TensorBoard that no Trainer logs."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step, value in enumerate(values):
            writer.add_scalar(tag, value, step)
