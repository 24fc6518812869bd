"""Recipes: a study as a typed dataclass that runs, resumes, and leaves a folder with its numbers, figures and report.

Imports nothing heavy, so that a recipe's fields can be listed without torch; a recipe's own module should do the same.
"""

from __future__ import annotations

import inspect
import logging
import os
import platform
import shlex
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_interp.core.storage.redaction import check_settings
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.running.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning_interp.core.storage.manifest import RunManifest

__all__ = ["Recipe", "RecipeResult"]

log = logging.getLogger(__name__)


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


@dataclass(kw_only=True)
class Recipe(ABC):
    """A study with its settings. Subclass it as a dataclass, add fields, and write :meth:`study`.

    Attribute docstrings below fields become the command line's help.

    Raises:
        RecipeError: If a field's value cannot be used.
    """

    smoke_model: ClassVar[str] = "tiny:llama"
    not_identity: ClassVar[tuple[str, ...]] = (
        "run_dir",
        *("trainer." + name for name in ("devices", "num_nodes", "default_root_dir", "logger", "log_every_n_steps")),
        *("trainer." + name for name in ("enable_progress_bar", "enable_model_summary", "profiler")),
    )
    """Settings, with all below them, that may differ when a run goes on: they decide where and how it is computed and
    shown, not what. A subclass names its own, which are added to those of its bases."""

    functions: ClassVar[tuple[str, ...]] = ()
    """Fields that may name a function, as module:function, of a module that the user names."""
    imports = tuple[str, ...]()  # not a field: no settings file decides it
    """Modules beside Lightning's of which ``trainer`` may name classes; ``--import`` on the command line."""

    run_dir: str | None = None
    """Folder of the run: results, checkpoints, report. By default runs/<name>; the same command goes on there."""
    seed: int = 0
    """Root of every random choice: the same seed gives the same numbers on the same machine."""
    model: str = "smollm2-135m-instruct"
    """Hugging Face id, folder, .gguf file, or a bundled name."""
    smoke: bool = False
    """A run of seconds on a tiny random model, to see that everything works; its numbers mean nothing."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of Lightning's Trainer, such as --trainer.devices=4; they win over the recipe's own."""

    def __post_init__(self) -> None:
        own = vars(type(self))
        if own.get("__annotations__") and "__dataclass_fields__" not in own:
            raise RecipeError(
                f"{type(self).__name__} has the fields {', '.join(own['__annotations__'])} but is no dataclass, so "
                "they would be ignored. Put @dataclass(kw_only=True) above the class."
            )
        if isinstance(self.seed, bool) or not hasattr(self.seed, "__index__") or not 0 <= self.seed < 2**32:
            raise RecipeError(f"seed={self.seed!r}: expected a number from 0 to 2**32 - 1.")
        if self.run_dir is not None and not str(self.run_dir).strip():
            raise RecipeError(f"run_dir={self.run_dir!r}: expected a folder, or nothing for runs/<name>.")
        if self.run_dir is not None and not str(self.run_dir).isprintable():
            raise RecipeError(f"run_dir={self.run_dir!r}: it holds a line break or another control character.")
        check_settings({entry.name: getattr(self, entry.name) for entry in fields(self)})
        if not isinstance(self.trainer, dict):
            raise RecipeError(f"trainer={self.trainer!r}: expected a dict of Trainer arguments.")

    @property
    def written(self) -> dict[str, list[str]]:
        """Folders besides its own that a run writes to, by the field that names them."""
        return {}

    @abstractmethod
    def study(self, run: RunFolder) -> RecipeResult:
        """Do the work, in phases, and return what was found; under DDP every rank calls this.

        Args:
            run: The run's folder, phases and progress bars.

        Returns:
            Metrics, tables, figures, and what they may be used for.
        """

    @property
    def name(self) -> str:
        """The recipe's name: ``grafting/facts`` for one of the package, else that of its class."""
        return getattr(self._module, "__recipe__", None) or type(self).__name__

    @property
    def _module(self) -> Any:
        return sys.modules.get(type(self).__module__)

    @property
    def source(self) -> str:
        """The model to load: that of the fields, but the tiny one for a smoke run that names no model."""
        default = next(entry.default for entry in fields(self) if entry.name == "model")
        return self.smoke_model if self.smoke and self.model == default else self.model

    @property
    def used_model(self) -> str:
        """The model that the report names; empty for a run that uses none, whatever the field says."""
        return self.source

    @property
    def run_path(self) -> Path:
        """The run folder, also where ``run_dir`` was left open."""
        return Path(self.run_dir or f"runs/{self.name}{'-smoke' if self.smoke else ''}")

    def config(self) -> dict[str, Any]:
        """Return the fields as plain values; an object in ``trainer`` stands as the name of its class."""
        from lightning_interp.core.storage.files import jsonable

        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["trainer"] = {key: _plain(value) for key, value in self.trainer.items()}
        config: dict[str, Any] = jsonable(values)
        return config

    @classmethod
    def identity_free(cls) -> tuple[str, ...]:
        """Return the settings that do not identify a run: ``not_identity`` of the class and all its bases."""
        return tuple(dict.fromkeys(key for base in cls.__mro__ for key in vars(base).get("not_identity", ())))

    @cached_property
    def trainer_options(self) -> Callable[[], dict[str, Any]]:
        """Builds the user's Trainer arguments, anew at each call; they are read and checked once.

        Raises:
            RecipeError: If they do not fit the Trainer.
        """
        from lightning_interp.running.settings import trainer_arguments

        return trainer_arguments(self.trainer, self.imports)

    def trainer_kwargs(self, run: RunFolder, **defaults: Any) -> dict[str, Any]:
        """Return arguments for a Trainer of the running phase: ours, then the recipe's, then the user's on top.

        Each phase gets a root folder and a TensorBoard run of its own. Callbacks are joined, not replaced.

        Args:
            run: The run.
            **defaults: The recipe's own arguments.

        Returns:
            Arguments for ``lightning.pytorch.Trainer``.

        Raises:
            RecipeError: Outside of a phase, or if the user's arguments do not fit the Trainer.
        """
        from lightning.pytorch.loggers import TensorBoardLogger

        phase = run.phase_name
        if phase is None:
            raise RecipeError("trainer_kwargs() was called outside of a phase. Make the Trainer inside run.phase(...).")
        user = self.trainer_options()
        merged = {
            "logger": TensorBoardLogger(run.path, name="tensorboard", version=phase),
            "enable_progress_bar": sys.stdout.isatty(),
            "enable_model_summary": False,
            **defaults,
            **user,
            "callbacks": [*_listed(defaults.get("callbacks")), *_listed(user.get("callbacks"))],
        }
        root = merged.get("default_root_dir")
        return merged | {"default_root_dir": run.folder(phase) if root is None else Path(root) / phase}

    def run(self) -> RecipeResult:
        """Run the study, or go on where it stopped, and write all results into the run folder.

        Returns:
            What :meth:`study` returned.

        Raises:
            ManifestError: If the run folder cannot be used; nothing has been done then.
            RecipeError: If a setting cannot be used.
            KeyboardInterrupt: After Ctrl-C; the run can go on.
        """
        from lightning_interp.core.storage.manifest import RunManifest
        from lightning_interp.running.report import write_report
        from lightning_interp.running.results import OUTPUTS
        from lightning_interp.running.terminal import print_table

        self.trainer_options()  # a wrong one is said before anything is done
        opened = RunManifest.open(
            self.run_path,
            config=self.config(),
            name=self.name,
            versions=_versions(),
            outputs=OUTPUTS,
            not_identity=self.identity_free(),
        )
        with opened as manifest:
            run = RunFolder(manifest)
            if run.writes:
                self._write_config()
            log.info("run folder: %s", run.path)
            result = self._study_seeded(run)
            if run.writes:
                self._write_results(manifest, result)
        if run.writes:
            report = write_report(self.run_path)
            if result.summary:
                print_table(f"{self.name}: {result.summary}", result.tables[result.summary])
            print(f"report: {report}")
        return result

    def _study_seeded(self, run: RunFolder) -> RecipeResult:
        from lightning.pytorch import seed_everything

        seed_everything(self.seed, workers=True, verbose=False)
        on_ctrl_c = signal.getsignal(signal.SIGINT)
        try:
            result = self.study(run)
        except SystemExit as error:
            # Lightning answers Ctrl-C inside a Trainer with an exit, and leaves the signal ignored.
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler if on_ctrl_c is None else on_ctrl_c)
            raise KeyboardInterrupt from error
        if not isinstance(result, RecipeResult):
            raise RecipeError(f"{type(self).__name__}.study() returned {result!r:.80}: expected a RecipeResult.")
        return result

    def _write_config(self) -> None:
        import yaml

        from lightning_interp.core.storage.files import atomic_write_text
        from lightning_interp.running.settings import literal

        values = {"recipe": self._key()} | self.config() | {"run_dir": str(self.run_path)}
        text = yaml.safe_dump(literal(values), sort_keys=False, allow_unicode=True)
        named = [*self.imports, *self._own_code]
        again = [str(self.run_path / "config.yaml"), *(f"--import={name}" for name in named)]
        command = f"# The settings of this run. Goes on with it: lightning-interp run {shlex.join(again)}\n"
        atomic_write_text(self.run_path / "config.yaml", command + text)

    def _key(self) -> str:
        """Return what the ``recipe:`` key of a YAML file in the run folder must say to find this class again."""
        module = self._module
        if getattr(module, "__recipe__", None):
            return self.name
        if hasattr(module, "__recipe__") and module.__file__:
            return os.path.relpath(module.__file__, self.run_path)
        return f"{type(self).__module__}.{type(self).__qualname__}"

    @property
    def _own_code(self) -> list[str]:
        """The file or module of a recipe that is none of the package's, which a run folder cannot name by itself."""
        module = self._module
        if getattr(module, "__recipe__", None):
            return []
        file = getattr(module, "__file__", None) if hasattr(module, "__recipe__") else None
        return [os.path.relpath(file) if file else type(self).__module__]

    def _write_results(self, manifest: RunManifest, result: RecipeResult) -> None:
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
                "about": _about(type(self)),
                "source": self.used_model,
            }
        )


def _versions() -> dict[str, str]:
    from lightning_interp import __version__

    found = {"lightning_interp": __version__, "python": platform.python_version()}
    found |= {package: metadata.version(package) for package in ("torch", "lightning", "transformers", "peft")}
    return found | {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"}


def _about(cls: type[Recipe]) -> str:
    """Return the class's own description; a dataclass without one has its signature there."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return "" if text.startswith(f"{cls.__name__}(") else text


def _plain(value: Any) -> Any:
    from lightning_interp.core.storage.files import jsonable

    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    try:
        return jsonable(value)
    except DataError:
        return f"{type(value).__module__}.{type(value).__qualname__}"


def _listed(callbacks: Any) -> list[Any]:
    return list(callbacks or ()) if isinstance(callbacks, list | tuple | None) else [callbacks]


def _relative(path: Path, run_dir: Path) -> str:
    absolute, root = Path(path).resolve(), run_dir.resolve()
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else str(absolute)
