"""The command ``lightning-interp``: run recipes, look at runs. Heavy imports wait until something is run."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_interp import __version__
from lightning_interp.errors import InterpError, RecipeError

if TYPE_CHECKING:
    from lightning_interp.running.results import StoredRun

__all__ = ["build_parser", "main"]

WRONG_USE, FAILED, TIME_IS_UP, CTRL_C, SIGTERM = 2, 1, 3, 130, 143

_DESCRIPTION = """\
Ask what finetuning did to a language model.

  lightning-interp list                               all recipes
  lightning-interp run grafting/facts                 run one; the same command goes on after a stop
  lightning-interp run grafting/facts --seed=1        change a setting
  lightning-interp run grafting/facts --smoke=true    see in seconds that everything works
  lightning-interp run grafting/facts --help          all settings of a recipe
  lightning-interp sweep grafting/facts --grid rank=1,4   once for each setting of a grid
  lightning-interp copy grafting/facts mine.yaml      a copy of the settings; then: lightning-interp run mine.yaml
  lightning-interp copy grafting/facts mine/          with the code too; then: lightning-interp run mine/facts.yaml
"""
_UTF8 = f"File names are in {sys.getfilesystemencoding()} here: set PYTHONUTF8=1, or LC_ALL=C.UTF-8."
# What Lightning 2.6 with torch 2.13 says of every run of ours: no validation, small data, a run that goes on.
_KNOWN = (
    ".*LeafSpec.*",
    "Total length of `.*` across ranks is zero",
    ".*does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",
)
# Of these only what is that grave; bitsandbytes misses a kernel on some processors, which it can do without.
_QUIETER = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "bitsandbytes": logging.ERROR,
}


class _UsageError(Exception):
    """A wrong command line."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of leaving, so that every error is said in one place and one form."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}. See '{self.prog} --help'.")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; settings of recipes are parsed later, by jsonargparse."""
    parser = _Parser(
        prog="lightning-interp",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lightning-interp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, action: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(action=action)
        return added

    run = command("run", _run, "Run a recipe, or go on with its run. NAME --help shows its settings.")
    run.add_argument("recipe", metavar="NAME", help="name of a recipe ('list' shows them), or a YAML or Python file")
    _add_import_option(run)
    overrides = run.add_argument("overrides", nargs="...", metavar="--field=value", help="settings to change")
    overrides.required = False
    sweep = command("sweep", _sweep, "Run a recipe once for each setting of a grid, or go on with that.")
    _add_sweep_options(sweep)
    command("list", _list, "List the recipes of this package.")
    show = command("show", _show, "Show how far a run is, and its main table.")
    show.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    copy = command("copy", _copy, "Copy the settings of a recipe, or in a folder its code too, to edit and run it.")
    copy.add_argument("recipe", metavar="NAME")
    copy.add_argument("destination", type=Path, metavar="DEST", help="a .yaml file for the settings alone, or a folder")
    copy.add_argument("--force", action="store_true", help="overwrite what is there")
    report = command("report", _report, "Make report.html of a finished run again.")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    return parser


def _add_import_option(parser: argparse.ArgumentParser) -> None:
    text = "a module of yours (or a .py file) whose classes, or recipe, the settings may name; it runs its code"
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help=text)


def _add_sweep_options(sweep: argparse.ArgumentParser) -> None:
    sweep.usage = "%(prog)s NAME --grid SETTING=VALUE,VALUE [--grid ...] [--field=value ...] [options]"
    sweep.epilog = "All other options are settings that the cells share; 'run NAME --help' shows them."
    sweep.add_argument("recipe", metavar="NAME", help="name of a recipe, or a YAML or Python file, as for 'run'")
    several: dict[str, Any] = {"action": "append", "default": []}
    text = "a setting and its values, such as rank=1,2,4; all combinations are run"
    sweep.add_argument("--grid", metavar="SETTING=VALUES", help=text, **several)
    sweep.add_argument("--run_dir", metavar="DIR", help="folder of the sweep (default: that of the recipe, -sweep)")
    sweep.add_argument("--only", metavar="CELLS", help="run these alone: rank=1,2 or names of cells", **several)
    text = "a number of the recipe's to show and draw (default: its first)"
    sweep.add_argument("--metric", dest="metrics", metavar="NAME", help=text, **several)
    sweep.add_argument("--max-hours", type=float, metavar="H", help="begin no cell after H hours; exit code 3 says so")
    sweep.add_argument("--launcher", default="local", metavar="NAME", help="where cells run: local")
    _add_import_option(sweep)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: the arguments after the program's name, or those of this process.

    The exit code is 0, 1 for an error of this package or a failed cell, 2 for wrong use, 3 for a sweep whose time is up
    with cells left, 130 after Ctrl-C, 143 after SIGTERM.
    """
    from lightning_interp.running.output import lasting_output

    arguments = list(sys.argv[1:] if argv is None else argv)
    with lasting_output() as out:
        code = _dispatch(arguments) if os.environ.get("LIGHTNING_INTERP_DEBUG") == "1" else _caught(arguments)
        out.flush()
        unread = isinstance(out.error, BrokenPipeError)  # a reader such as head has seen enough, and all is done
        if code == 0 and out.error is not None and not unread:
            code = _say(f"all is done, but standard output cannot be written: {out.error}", FAILED)
    return code


def _caught(arguments: Sequence[str]) -> int:
    try:
        return _dispatch(arguments)
    except _UsageError as error:
        return _say(str(error), WRONG_USE)
    except InterpError as error:
        return _say(str(error), FAILED)
    except KeyboardInterrupt:  # before or after a run, which says more
        return _say("stopped by Ctrl-C", CTRL_C)
    except UnicodeEncodeError as error:
        if error.encoding != sys.getfilesystemencoding() or error.encoding == "utf-8":
            raise
        return _say(f"{error.object!r} cannot be the name of a file under this locale. {_UTF8}", FAILED)


def _dispatch(arguments: Sequence[str]) -> int:
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    for argument in arguments:
        if re.search("[\ud800-\udfff]", argument):
            raise _UsageError(f"{argument!r} holds bytes that are no letters of this locale. {_UTF8}")
    parsed, settings = parser.parse_known_args(arguments)
    if settings and parsed.action is not _sweep:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    parsed.command_line, parsed.settings = arguments, settings
    code: int = parsed.action(parsed)
    return code


def _say(message: str, code: int) -> int:
    from lightning_interp.core.storage.redaction import redacted

    print(f"lightning-interp: {redacted(message)}", file=sys.stderr)
    return code


def _configured(name: str, overrides: Sequence[str], imports: Sequence[str] = ()) -> Any:
    """The recipe that a command line asks for."""
    from lightning_interp.running.asked import configured

    return configured(name, overrides, imports)


def _run(parsed: argparse.Namespace) -> int:
    from lightning_interp.running.asked import show_help, split_imports

    with _settings_are_usage():
        imports, overrides = split_imports([*(f"--import={name}" for name in parsed.imports), *parsed.overrides])
        if {"-h", "--help"} & set(overrides):
            show_help(parsed.recipe, imports)
            return 0
        recipe = _configured(parsed.recipe, overrides, imports)

    def work() -> int:
        recipe.run()
        return 0

    return _resumable(work, parsed.command_line)


def _sweep(parsed: argparse.Namespace) -> int:
    from lightning_interp.running.asked import split_imports
    from lightning_interp.running.sweep import asked_sweep

    with _settings_are_usage():
        if stray := next((text for text in parsed.settings if not text.startswith("--")), None):
            raise RecipeError(f"{stray!r} is no setting. Give settings as --field=value.")
        imports, _ = split_imports([f"--import={name}" for name in parsed.imports])
        sweep = asked_sweep(
            parsed.recipe,
            parsed.grid,
            parsed.settings,
            run_dir=parsed.run_dir,
            imports=imports,
            only=parsed.only,
            metrics=parsed.metrics,
            launcher=parsed.launcher,
            max_hours=parsed.max_hours,
        )

    def work() -> int:
        from lightning_interp.running.terminal import print_table

        end = sweep.run()
        if end.summary:
            print_table(sweep.name, end.summary)
            print(f"report: {sweep.path / 'report.html'}")
        if end.message and end.summary:
            _say(f"{end.message}. Go on with: lightning-interp {shlex.join(parsed.command_line)}", FAILED)
        return FAILED if end.failed else TIME_IS_UP if end.left else 0

    return _resumable(work, parsed.command_line)


def _resumable(work: Callable[[], int], command_line: Sequence[str]) -> int:
    """Do work that a signal may stop, and say then how to go on with it."""
    try:
        with _terminable(), _phase_lines():
            return work()
    except KeyboardInterrupt:
        return _stopped("Ctrl-C", command_line, CTRL_C)
    except SystemExit as error:
        if error.code != SIGTERM and type(error).__name__ != "SIGTERMException":  # Lightning's, which has no code
            raise
        return _stopped("SIGTERM", command_line, SIGTERM)


def _list(parsed: argparse.Namespace) -> int:
    from lightning_interp.running.catalog import header, recipe_names, recipes_dir

    names = recipe_names()
    if not names:
        raise RecipeError(f"There are no recipes in {str(recipes_dir())!r}. Install the package again.")
    for name in names:
        purpose = header(recipes_dir() / f"{name}.yaml").split("\n")[0]
        print(f"{name:<{max(map(len, names))}}  {purpose}".rstrip())
    return 0


def _show(parsed: argparse.Namespace) -> int:
    from lightning_interp.running.results import read_run
    from lightning_interp.running.terminal import print_table, shown

    run = read_run(parsed.run_dir)
    print(shown(f"{run.manifest['name']} in {run.path}: {run.state}{f' ({run.message})' if run.message else ''}"))
    keys = ("status", "seconds", "attempts", "message")
    phases = [{"phase": name} | {key: phase.get(key) for key in keys} for name, phase in run.manifest["phases"].items()]
    if phases:
        print_table("phases", phases)
    if children := _children(run):
        print_table("child runs", children)
    if run.outcome.get("summary"):
        print_table(run.outcome["summary"], run.tables[run.outcome["summary"]])
        print(f"report: {run.path / 'report.html'}")
    else:
        print("No table yet. Start the run's command again to go on.")
    return 0


def _children(run: StoredRun, above: str = "") -> list[dict[str, Any]]:
    """A row for each run inside a run, and inside those."""
    rows = []
    for name, child in run.children.items():
        phases = [phase["status"] for phase in child.manifest["phases"].values()]
        done = f"{phases.count('finished')} of {len(phases)}"
        about = {"status": child.state, "phases finished": done, "seconds": child.seconds, "message": child.message}
        rows += [{"child": above + name} | about, *_children(child, f"{above}{name}/")]
    return rows


def _copy(parsed: argparse.Namespace) -> int:
    from lightning_interp.core.storage.files import atomic_write_text

    with _settings_are_usage():
        texts = _copied(parsed.recipe, parsed.destination)
        for path, text in texts.items():
            if path != parsed.destination and path.is_symlink():
                raise RecipeError(f"{str(path)!r} is a link, and would be written to. Delete it, or copy elsewhere.")
            if path.exists() and not parsed.force and not (path.is_file() and path.read_text(encoding="utf-8") == text):
                raise RecipeError(f"{str(path)!r} exists. Give another name, or --force to overwrite it.")
    for path, text in texts.items():
        atomic_write_text(path, text)
    first = next(iter(texts))
    print(f"Edit {first}, then: lightning-interp run {shlex.quote(str(first))}")
    return 0


def _copied(name: str, target: Path) -> dict[Path, str]:
    """What a copy consists of: the settings alone, or in a folder the recipe's code and its helpers too."""
    from lightning_interp.running.catalog import code_files, find_recipe

    source = find_recipe(name)
    if not source.named or source.settings is None or source.code is None:
        raise RecipeError(f"{name!r} is no recipe of this package. Copy the file itself.")
    settings = source.settings.read_text(encoding="utf-8")
    if target.suffix in (".yaml", ".yml"):
        return {target: settings}
    if target.suffix and not target.is_dir():
        raise RecipeError(f"{str(target)!r}: expected a name that ends in .yaml, or a folder.")
    own = re.sub(r"^recipe: .*$", f"recipe: {source.code.name}", settings, count=1, flags=re.MULTILINE)
    code = {target / file.name: file.read_text(encoding="utf-8") for file in code_files(source.code)}
    return {target / source.settings.name: own} | code


def _report(parsed: argparse.Namespace) -> int:
    from lightning_interp.running.report import write_report

    print(write_report(parsed.run_dir))
    return 0


def _stopped(why: str, command_line: Sequence[str], code: int) -> int:
    from lightning_interp.core.storage.distributed import is_rank_zero

    again = f"lightning-interp {shlex.join(command_line)}"
    return _say(f"stopped by {why}; what is finished is kept. Go on with: {again}", code) if is_rank_zero() else code


@contextmanager
def _settings_are_usage() -> Iterator[None]:
    """Before anything runs, a wrong setting is wrong use of the command."""
    try:
        yield
    except RecipeError as error:
        raise _UsageError(str(error)) from error


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the run as an exception does, so that it is written down as interrupted and can go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def leave(signum: int, frame: object) -> None:
        if os.getpid() != owner:  # a forked worker, which has nothing to write down
            os._exit(SIGTERM)
        raise SystemExit(SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _phase_lines() -> Iterator[None]:
    """Print a line when a phase begins and ends, and of Lightning only what it warns of with a reason."""
    importlib.import_module("lightning.pytorch")  # gives its loggers their levels

    from lightning_interp.core.storage.distributed import is_rank_zero

    logger, handler = logging.getLogger("lightning_interp"), logging.StreamHandler()
    loggers = [logger, *map(logging.getLogger, _QUIETER)]
    levels = [one.level for one in loggers]
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(lambda record: is_rank_zero())
    logger.addHandler(handler)
    for one, new in zip(loggers, (logging.INFO, *_QUIETER.values()), strict=True):
        one.setLevel(new)
    try:
        with warnings.catch_warnings():
            for message in _KNOWN:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.removeHandler(handler)
        for one, old in zip(loggers, levels, strict=True):
            one.setLevel(old)
