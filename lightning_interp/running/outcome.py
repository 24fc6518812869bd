"""What a run has found, and how it is written into its folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_interp.errors import RecipeError

if TYPE_CHECKING:
    from lightning_interp.core.storage.manifest import RunManifest

__all__ = ["RecipeResult", "about_of", "store_result"]


@dataclass
class RecipeResult:
    """What a recipe found.

    Args:
        metrics: Numbers by name, nested as wished: ``metrics.json``.
        tables: Rows by name: ``tables/<name>.csv``.
        figures: Matplotlib figures or PNG files by name: ``figures/<name>.png``.
        artifacts: Files and folders worth keeping by name, such as a trained adapter.
        question: What was asked, for the report.
        findings: What was found, each number with its interval: a sentence each, which the report says first.
        captions: What to see in a figure, by its name.
        terms: What the names and codes in tables and figures mean.
        caveats: What the numbers may not be used for, and why.
        summary: The table to print at the end; the first one if empty.

    Raises:
        RecipeError: If a name cannot be a file's name, the summary is no table, a caption is of no figure, or an
            artifact does not exist.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Path] = field(default_factory=dict)
    question: str = ""
    findings: Sequence[str] = ()
    captions: Mapping[str, str] = field(default_factory=dict)
    terms: Mapping[str, str] = field(default_factory=dict)
    caveats: Sequence[str] = ()
    summary: str = ""

    def __post_init__(self) -> None:
        from lightning_interp.running.results import check_output_name

        for kind, named in (("table", self.tables), ("figure", self.figures)):
            for name in named:
                check_output_name(name, kind)
        if not self.summary and self.tables:
            self.summary = next(iter(self.tables))
        if self.summary and self.summary not in self.tables:
            raise RecipeError(
                f"summary={self.summary!r} names no table; the tables are {', '.join(self.tables) or 'none'}."
            )
        if lost := [name for name in self.captions if name not in self.figures]:
            raise RecipeError(
                f"captions has {lost[0]!r}, which is no figure; the figures are {', '.join(self.figures) or 'none'}."
            )
        for name, path in self.artifacts.items():
            if not Path(path).exists():
                raise RecipeError(f"Artifact {name!r} does not exist: {str(path)!r}. Write it before it is named.")


def store_result(manifest: RunManifest, result: RecipeResult, *, about: str, source: str) -> None:
    """Write a run's metrics, tables and figures into its folder, and what it says of itself into its manifest.

    Args:
        manifest: The open run.
        result: What was found.
        about: What the run is, for the report.
        source: The model that the report names; empty for none.
    """
    from lightning_interp.running.results import write_results

    write_results(manifest.path, metrics=result.metrics, tables=result.tables, figures=result.figures)
    manifest.record_outcome(
        {
            "question": result.question,
            "findings": list(result.findings),
            "captions": dict(result.captions),
            "terms": dict(result.terms),
            "caveats": list(result.caveats),
            "summary": result.summary,
            "tables": list(result.tables),
            "figures": list(result.figures),
            "artifacts": {name: _relative(path, manifest.path) for name, path in result.artifacts.items()},
            "about": about,
            "source": source,
        }
    )


def about_of(cls: type) -> str:
    """The class's own description; a dataclass without one has its signature there."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return "" if text.startswith(f"{cls.__name__}(") else text


def _relative(path: Path, run_dir: Path) -> str:
    absolute, root = Path(path).resolve(), run_dir.resolve()
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else str(absolute)
