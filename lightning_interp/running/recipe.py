"""Recipes: a study as a typed dataclass that runs, resumes, and leaves a folder with its numbers, figures and report.

Imports nothing heavy, so that a recipe's fields can be listed without torch; a recipe's own module should do the same.
"""

from __future__ import annotations

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
from lightning_interp.running.outcome import RecipeResult
from lightning_interp.running.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning_interp.core.storage.manifest import RunManifest

__all__ = ["Recipe", "RecipeResult", "versions"]

log = logging.getLogger(__name__)


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

    def run(self, parent: RunManifest | None = None) -> RecipeResult:
        """Run the study, or go on where it stopped, and write all results into the run folder.

        Args:
            parent: An open run of which this one is a child, in the folder that ``run_dir`` names below it, such as
                one cell of a sweep; what it writes is the same. By default the run stands alone.

        Returns:
            What :meth:`study` returned.

        Raises:
            ManifestError: If the run folder cannot be used; nothing has been done then.
            RecipeError: If a setting cannot be used.
            KeyboardInterrupt: After Ctrl-C; the run can go on.
        """
        from lightning_interp.running.outcome import about_of, store_result
        from lightning_interp.running.report import write_report
        from lightning_interp.running.terminal import print_table

        self.trainer_options()  # a wrong one is said before anything is done
        with self._opened(parent) as manifest:
            run = RunFolder(manifest)
            if run.writes:
                self.write_config()
            log.info("run folder: %s", run.path)
            result = self._study_seeded(run)
            if run.writes:
                store_result(manifest, result, about=about_of(type(self)), source=self.used_model)
        if run.writes:
            report = write_report(self.run_path)
            if parent is None:
                if result.summary:
                    print_table(f"{self.name}: {result.summary}", result.tables[result.summary])
                print(f"report: {report}")
        return result

    def _opened(self, parent: RunManifest | None) -> RunManifest:
        from lightning_interp.core.storage.manifest import RunManifest
        from lightning_interp.core.storage.run_lock import CHILDREN
        from lightning_interp.running.results import OUTPUTS

        config, free = self.config(), self.identity_free()
        if parent is None:
            return RunManifest.open(
                self.run_path, config=config, name=self.name, versions=versions(), outputs=OUTPUTS, not_identity=free
            )
        if self.run_path.parent != parent.path / CHILDREN:
            raise RecipeError(
                f"run_dir={str(self.run_path)!r} is no child of the run in {str(parent.path)!r}. Give a folder in "
                f"{str(parent.path / CHILDREN)!r}."
            )
        return parent.child(
            self.run_path.name, config=config, name=self.name, inputs={}, outputs=OUTPUTS, not_identity=free
        )

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

    def write_config(self, command: str = "run", options: Sequence[str] = ()) -> None:
        """Write ``config.yaml`` into the run folder: the settings, below the command that goes on with them.

        Args:
            command: The command of ``lightning-interp``.
            options: What the command needs besides the settings.
        """
        import yaml

        from lightning_interp.core.storage.files import atomic_write_text
        from lightning_interp.running.settings import literal

        values = {"recipe": self._key()} | self.config() | {"run_dir": str(self.run_path)}
        text = yaml.safe_dump(literal(values), sort_keys=False, allow_unicode=True)
        named = [*self.imports, *self._own_code]
        again = [str(self.run_path / "config.yaml"), *options, *(f"--import={name}" for name in named)]
        comment = f"# The settings of this run. Goes on with it: lightning-interp {command} {shlex.join(again)}\n"
        atomic_write_text(self.run_path / "config.yaml", comment + text)

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


def versions() -> dict[str, str]:
    """The versions of the packages that decide a run's numbers, and the machine."""
    from lightning_interp import __version__

    found = {"lightning_interp": __version__, "python": platform.python_version()}
    found |= {package: metadata.version(package) for package in ("torch", "lightning", "transformers", "peft")}
    return found | {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"}


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
