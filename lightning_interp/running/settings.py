"""From a YAML file and command-line overrides to the fields of a dataclass. jsonargparse does the reading."""

from __future__ import annotations

import argparse
import copy
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_interp.errors import RecipeError
from lightning_interp.running.catalog import RecipeSource, header, nearest, yaml_keys
from lightning_interp.running.named_classes import (
    check_paths,
    classes_of,
    dataclasses_in,
    hints_of,
    plain_hint,
    takes_none,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["literal", "load_settings", "option_key", "print_help", "read_values", "trainer_arguments"]

T = TypeVar("T")

_FILE = "settings_file"  # how the YAML file reaches the parser; not for users, who name it first
_OURS = (_FILE, "recipe")


def load_settings(cls: type[T], source: RecipeSource, overrides: Sequence[str] = (), imports: Sequence[str] = ()) -> T:
    """Build a dataclass from a YAML file and overrides such as ``--epochs=3`` or ``--trainer.devices=4``.

    ``${key}`` in the YAML stands for another key's value, after the overrides. A RecipeError names the key, the file
    and line or the option, and the nearest key that exists. Settings are data: a class is imported only for a field
    whose type is a class, and only one of Lightning's or of the modules in ``imports``.
    """
    return cls(**read_values(cls, source, overrides, imports))


def read_values(
    cls: type[Any], source: RecipeSource, overrides: Sequence[str] = (), imports: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what :func:`load_settings` builds a dataclass of: a value of the right type for each field."""
    with classes_of([*imports, *dataclasses_in(cls)]):
        return _read(cls, source, overrides)


def _read(cls: type[Any], source: RecipeSource, overrides: Sequence[str]) -> dict[str, Any]:
    parser = _parser(cls, source)
    known = _fields(parser.get_defaults())
    places = {} if source.settings is None else _checked_keys(source.settings, known)
    for key in filter(None, map(option_key, overrides)):
        if not _exists(key, known):
            raise RecipeError(f"Recipe {source.title!r} has no field '--{key}'. {nearest(key, known)}")
        places[key] = f"--{key}"
    settings = [] if source.settings is None else [f"--{_FILE}={source.settings}"]
    parsed = _parse(lambda: parser.parse_args([*settings, *overrides]), places)
    _check_nulls(cls, parsed, places)
    check_paths(parsed.get("trainer"), overrides, places.get("trainer", "trainer"))
    values = vars(_parse(lambda: parser.instantiate(parsed), places))
    return {key: value for key, value in values.items() if key not in _OURS}


def print_help(cls: type[Any], source: RecipeSource) -> None:
    """Print every field with its meaning, type and value, below the header of the YAML file."""
    values = load_settings(cls, source)
    with classes_of(dataclasses_in(cls)):
        parser = _parser(cls, source, explained=True)
        for key in _fields(parser.get_defaults()):
            parser.set_defaults({key: operator.attrgetter(key)(values)})
        parser.print_help()


def literal(value: Any) -> Any:
    """Return plain values with ``${`` in texts escaped, so that reading them from YAML takes none for a key's value."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, Mapping):
        return {key: literal(item) for key, item in value.items()}
    return [literal(item) for item in value] if isinstance(value, list) else value


def trainer_arguments(trainer: Mapping[str, Any], imports: Sequence[str] = ()) -> Callable[[], dict[str, Any]]:
    """Check arguments of Lightning's Trainer; gives a function that builds them, with new objects at each call.

    Callbacks, loggers and plugins may be objects, or mappings with ``class_path`` and ``init_args`` as on Lightning's
    own command line, of Lightning's classes or those of the modules in ``imports``.
    """
    if not trainer:
        return dict
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Trainer

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    known = [key.removeprefix("trainer.") for key in _fields(parser.get_defaults())]
    for key in trainer:
        if key not in known:
            raise RecipeError(f"The Trainer has no argument {key!r}. {nearest(key, known)}")
    plain = {key: value for key, value in trainer.items() if _is_plain(value)}
    with classes_of(imports):
        parsed = _parse(lambda: parser.parse_object({"trainer": copy.deepcopy(plain)}), {})  # it changes lists

    def build() -> dict[str, Any]:
        with classes_of(imports):
            built = vars(_parse(lambda: parser.instantiate(parsed), {})["trainer"])
        return {key: built[key] if key in plain else value for key, value in trainer.items()}

    return build


def _parser(cls: type[Any], source: RecipeSource, *, explained: bool = False) -> ArgumentParser:
    """A parser of one dataclass's fields; what each means is read from sources only to print it, as that is slow."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the lines of the YAML file's header."""

    about = header(source.settings) if source.settings else ""
    set_parsing_settings(docstring_parse_attribute_docstrings=explained)
    parser = ArgumentParser(
        prog=f"lightning-interp run {source.title}",
        description=about.replace("%", "%%") if "%(prog)" in about else about,  # which argparse fills in
        epilog="--import=MODULE: a module of yours, whose classes the settings of the Trainer may name; see README.",
        formatter_class=Formatter,
        parser_mode="omegaconf+",
        print_config=None,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(f"--{_FILE}", action="config", help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=str, help=argparse.SUPPRESS)
    _resolve_annotations(cls)
    parser.add_class_arguments(cls)
    return parser


def _resolve_annotations(cls: type[Any]) -> None:
    """Turn a dataclass's postponed annotations into types, as jsonargparse would.

    It runs the ``if TYPE_CHECKING:`` imports of the class's module on the way: seconds for a help text.
    """
    hints, annotations = hints_of(cls), cls.__init__.__annotations__  # without hints: jsonargparse's own way
    annotations.update({name: plain_hint(hints[name]) for name in annotations if name in hints})


def _check_nulls(cls: type[Any], parsed: Any, places: Mapping[str, str]) -> None:
    """Refuse ``null`` where a field has no None: jsonargparse takes it from a file for any field."""
    for key, place in places.items():
        hint: Any = cls
        for name in key.split("."):
            hint = hints_of(hint).get(name, Any)
        if parsed.get(key) is None and not takes_none(hint):
            expected = getattr(hint, "__name__", str(hint))
            raise RecipeError(f"{place}: the value of {key!r} does not fit: expected {expected}, got null.")


def _fields(defaults: Any) -> list[str]:
    return [key for key in defaults.keys() if key not in _OURS]  # noqa: SIM118 - a Namespace


def _checked_keys(path: Path, known: Sequence[str]) -> dict[str, str]:
    """Return the place of each key of the YAML file, all of which exist."""
    places = {key: f"{path}, line {line}" for key, (line, _) in yaml_keys(path).items() if key != "recipe"}
    for key, place in places.items():
        if not _exists(key, known):
            raise RecipeError(f"{place}: there is no field {key!r}. {nearest(key, known)}")
    return places


def _exists(key: str, known: Sequence[str]) -> bool:
    """Return whether a dotted key is a field, a group of fields, or lies inside a field that takes a mapping."""
    return any(key == name or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in known)


def option_key(argument: str) -> str | None:
    """Return the field that a command-line argument names."""
    match = re.match(r"--([A-Za-z_][\w.\-]*)\+?(=|$)", argument)
    return match[1] if match else None


def _parse(parse: Callable[[], Any], places: Mapping[str, str]) -> Any:
    """Run a parse and turn what jsonargparse and OmegaConf say into one message of ours."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        return parse()
    except (argparse.ArgumentError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise RecipeError(_message(str(error), places)) from error


def _message(text: str, places: Mapping[str, str]) -> str:
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", text):
        module = denied[1].rpartition(".")[0] or denied[1]
        key = (re.search(r'Parser key "([^"]+)"', text) or ["", "a setting"])[1]
        place = places.get(key) or next((where for name, where in places.items() if key.startswith(f"{name}.")), key)
        return (
            f"{place}: {denied[1]!r} is neither a class of Lightning's nor of a module that was named, and settings "
            f"import nothing else. If you trust that code, name its module: --import={module}"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else "unknown reason"
    if value := re.match(r'Parser key "([^"]+)":\s*(.*)', first):
        key, details = value[1], [value[2], *lines[1:]]
    elif interpolation := re.search(r"full_key: (\S+)", text):
        key, details = interpolation[1], [first]
    else:
        locale = " or set PYTHONUTF8=1 where the locale has no UTF-8" if "codec can't decode" in text else ""
        return f"Wrong settings: {' '.join(lines)}. Give fields as --field=value{locale}."
    place = places.get(key) or next((where for name, where in places.items() if key.startswith(f"{name}.")), key)
    return f"{place}: the value of {key!r} does not fit: {_expected(details)}"


def _expected(details: Sequence[str]) -> str:
    """Return what was expected and what was given, in one sentence."""
    text = " ".join(part for part in details if part)
    kinds = re.findall(r"Expected an? (typing\.Literal\[.*?\]|<class '[\w.]+'>|[^.]+?)(?=\. | - | Given|$)", text)
    given = re.search(r"(?:Given|Got) value: (.*)$", text)
    if not kinds or given is None:
        return text
    plain = [
        re.sub(r"^typing\.Literal\[(.*)\]$", r"one of \1", re.sub(r"<class '(.*)'>", r"\1", kind)) for kind in kinds
    ]
    choices = [choice for kind in kinds if "Literal" in kind for choice in re.findall(r"'([^']*)'", kind)]
    hint = nearest(given[1], choices) if choices else ""
    return f"expected {' or '.join(dict.fromkeys(plain))}, got {given[1]!r}. {hint if 'mean' in hint else ''}".rstrip()


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | bool | int | float)
