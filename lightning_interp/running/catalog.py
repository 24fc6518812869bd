"""Where recipes are, how a name or a YAML file becomes a recipe class, and which files a recipe is made of."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from lightning_interp.errors import RecipeError

__all__ = [
    "RecipeSource",
    "code_files",
    "find_recipe",
    "header",
    "load_class",
    "nearest",
    "recipe_module",
    "recipe_names",
    "recipes_dir",
    "yaml_keys",
]

T = TypeVar("T")

MODULES = "lightning_interp_recipes"
_NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)*")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_TAGS = [f"tag:yaml.org,2002:{kind}" for kind in "str int float bool null map seq timestamp merge value".split()]
_MOST_NODES = 100_000  # of a settings file, each as often as it is referred to
_RESOLVER = re.compile(r"(?<!\\)(?:\\\\)*\$\{[^}]*:")  # ${oc.env:HOME} and its like, which OmegaConf would run


@dataclass(frozen=True)
class RecipeSource:
    """Where a recipe's class and settings come from."""

    key: str  # what the recipe: key of a YAML file says: a name, a dotted class, or the path of a Python file
    code: Path | None  # the Python file, or None for a dotted class
    settings: Path | None  # the YAML file, or None for the class's own defaults
    named: bool = False  # whether it is one of the package's own recipes, called by its name

    @property
    def in_run_folder(self) -> bool:
        """Whether the settings are those that a run wrote down, which may be somebody else's run."""
        return self.settings is not None and (self.settings.parent / "manifest.json").exists()

    def foreign_code(self, imports: Iterable[str]) -> str:
        """Return the code that the settings file brings, nothing if it is the package's own or named by the user."""
        if self.settings is None or (self.code is not None and self.code.resolve().is_relative_to(_own_root())):
            return ""
        if self.code is None:
            module = self.key.rpartition(".")[0]
            return "" if any(f"{module}.".startswith(f"{name}.") for name in imports) else module
        named = [Path(name).resolve() for name in imports if name.endswith(".py")]
        return "" if self.code.resolve() in named else os.path.relpath(self.code)

    @property
    def title(self) -> str:
        """A name for messages and for the default run folder."""
        if self.named or self.settings is None:
            return self.key if self.code is None or self.named else self.code.stem
        return self.settings.stem


def recipes_dir() -> Path:
    """Return the folder of the package's own recipes: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _own_root() -> Path:
    return recipes_dir().resolve()


def recipe_names() -> list[str]:
    """Return the names of the package's own recipes, such as ``grafting/facts``."""
    root = recipes_dir()
    files = (path.relative_to(root).with_suffix("") for path in root.rglob("*.yaml"))
    return sorted(path.as_posix() for path in files if (root / path.with_suffix(".py")).is_file())


def find_recipe(name: str) -> RecipeSource:
    """Find a recipe by its name, its YAML file, or its Python file: ``grafting/facts``, ``mine.yaml``, ``mine.py``."""
    suffix = Path(name).suffix
    if suffix in (".yaml", ".yml", ".py"):
        path = Path(name)
        if not path.is_file():
            raise RecipeError(f"There is no file {name!r}. {_known(name)}")
        return RecipeSource(str(path), path, None) if suffix == ".py" else _from_yaml(path)
    code = _named_code(name)
    return RecipeSource(name, code, code.with_suffix(".yaml"), named=True)


def load_class(source: RecipeSource, base: type[T]) -> type[T]:
    """Import a recipe's class, the one that the file defines."""
    if source.code is None:
        module_name, _, class_name = source.key.rpartition(".")
        try:
            found: Any = getattr(importlib.import_module(module_name), class_name, None)
        except Exception as error:
            raise RecipeError(
                f"Recipe {source.key!r} could not be imported: {type(error).__name__}: {error}. "
                "Put its folder on PYTHONPATH, or name its file: recipe: path/to/file.py."
            ) from error
        if not (isinstance(found, type) and issubclass(found, base)):
            raise RecipeError(
                f"{source.key!r} is {'missing' if found is None else repr(found)}: expected a subclass of "
                f"{base.__name__}. Name one as package.module.Class."
            )
        return found
    module = _module_at(source.code)
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    concrete = [value for value in own if issubclass(value, base) and not inspect.isabstract(value)]
    if len(concrete) != 1:
        listed = ", ".join(value.__name__ for value in concrete) or "none"
        raise RecipeError(
            f"{str(source.code)!r} must define exactly one {base.__name__}, and it defines {listed}. "
            "Keep one in the file, or name it as package.module.Class."
        )
    return concrete[0]


def recipe_module(name: str) -> ModuleType:
    """Import a file beside the package's own recipes, such as ``grafting/_common``, as the recipes import it."""
    return _module_at(recipes_dir() / f"{name}.py")


def code_files(code: Path) -> list[Path]:
    """Return a recipe's Python file, then the helpers beside it that it imports (``from ._common import ...``)."""
    files = [code]
    for path in files:  # grows on the way
        try:
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, SyntaxError) as error:
            raise RecipeError(f"Cannot read {str(path)!r} as Python: {error}. Install the package again.") from error
        beside = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1]
        named = [node.module or alias.name for node in beside for alias in node.names]
        files += [file for file in dict.fromkeys(path.with_name(f"{name}.py") for name in named) if file not in files]
    return files


def header(path: Path) -> str:
    """Return the comment lines that a recipe's YAML file begins with, without their signs."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line[1:].removeprefix(" ").rstrip() for line in lines).strip("\n")


def yaml_keys(path: Path) -> dict[str, tuple[int, Any]]:
    """Return ``(line, node)`` by key of a settings file, dotted for nested mappings, without building any value."""
    import yaml

    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Cannot read {str(path)!r}: {error}. Give a YAML file in UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"{path}{where}: {problem}. Correct the YAML there.") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: it is nested too deeply to be settings. Give 'key: value' lines.") from error
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path}: expected 'key: value' lines, beginning with 'recipe: NAME'.")
    _check_nodes(path, root, {})
    keys: dict[str, tuple[int, Any]] = {}

    def collect(node: yaml.MappingNode, prefix: str) -> None:
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{path}, line {key_node.start_mark.line + 1}: a key is no text. Write 'key: value'.")
            key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
            if key in keys:
                raise RecipeError(f"{path}, line {line}: the key {key!r} is there twice (also in line {keys[key][0]}).")
            keys[key] = (line, value_node)
            if isinstance(value_node, yaml.MappingNode) and prefix.count(".") < 3:
                collect(value_node, f"{key}.")

    collect(root, "")
    return keys


def _check_nodes(path: Path, node: Any, sizes: dict[int, int]) -> int:
    """Refuse what is no plain value: objects by tags, ``${...:...}``, and nodes that hold themselves or explode."""
    where, sizes[id(node)] = f"{path}, line {node.start_mark.line + 1}", _MOST_NODES  # until it is counted
    if node.tag not in _TAGS:
        raise RecipeError(f"{where}: {node.tag!r} is no plain value. Give text, numbers, true, false, lists, mappings.")
    if isinstance(node.value, str) and _RESOLVER.search(node.value):
        raise RecipeError(
            f"{where}: {node.value!r:.80} asks for more than another key's value. Write ${{key}}, or the value itself; "
            "an environment variable goes on the command line."
        )
    inside = [] if isinstance(node.value, str) else node.value
    parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
    size = 1 + sum(sizes[id(part)] if id(part) in sizes else _check_nodes(path, part, sizes) for part in parts)
    if size > _MOST_NODES:
        raise RecipeError(f"{where}: more than {_MOST_NODES} values, by references (&, *). Write them out.")
    sizes[id(node)] = size
    return size


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names what ``word`` may have meant, or all that there is."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:  # the last part alone: --rank for --lora.rank, facts for grafting/facts
        last = {re.split("[./]", name)[-1]: name for name in reversed(known)}
        close = [last[found] for found in difflib.get_close_matches(re.split("[./]", word)[-1], last, n=1, cutoff=0.6)]
    return f"Did you mean {close[0]!r}?" if close else f"It has {', '.join(known) or 'none'}."


def _known(name: str) -> str:
    sentence = nearest(name.removesuffix(".yaml"), recipe_names())
    return sentence.replace("It has ", "The recipes are ") + " 'lightning-interp list' shows all."


def _named_code(name: str) -> Path:
    code = recipes_dir() / f"{name}.py"
    if not _NAME.fullmatch(name) or not code.is_file() or not code.with_suffix(".yaml").is_file():
        raise RecipeError(f"There is no recipe {name!r}. {_known(name)}")
    return code


def _from_yaml(path: Path) -> RecipeSource:
    import yaml

    line, node = yaml_keys(path).get("recipe", (0, None))
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        where = f"{path}, line {line}" if line else str(path)
        raise RecipeError(
            f"{where}: expected the key 'recipe' with a recipe's name, such as 'recipe: grafting/facts'. {_known('')}"
        )
    key = str(node.value)
    if key.endswith(".py"):
        code = path.parent / key
        if not code.is_file():
            raise RecipeError(f"{path}, line {line}: there is no file {key!r} (looked at {str(code)!r}).")
        return RecipeSource(key, code, path)
    if _DOTTED.fullmatch(key):
        return RecipeSource(key, None, path)
    try:
        return RecipeSource(key, _named_code(key), path)
    except RecipeError as error:
        raise RecipeError(f"{path}, line {line}: {error}") from error


def _module_at(code: Path) -> ModuleType:
    """Import a Python file under a module name that is the same in every process.

    The packages above it are known by their folders, so it can import what lies beside it without ``sys.path``.
    """
    code = code.resolve()
    own = code.is_relative_to(_own_root())
    parts = code.relative_to(_own_root()).with_suffix("").parts if own else (code.stem.replace(".", "_"),)
    root = MODULES if own else f"{MODULES}_{hashlib.sha256(str(code).encode()).hexdigest()[:8]}"
    name = ".".join((root, *parts))
    recipe = "/".join(parts) if own else None
    if name in sys.modules:
        vars(sys.modules[name]).setdefault("__recipe__", recipe)  # imported by its name, as recipes import each other
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, code)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{str(code)!r} cannot be imported as Python. Give a .py file.")
    module = importlib.util.module_from_spec(spec)
    vars(module)["__recipe__"] = recipe
    _register_parents(name, code)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(f"Recipe {str(code)!r} could not be imported: {type(error).__name__}: {error}.") from error
    return module


def _register_parents(name: str, code: Path) -> None:
    """Make the packages above a module known, so that it can be imported by its name afterwards."""
    below: ModuleType | None = None
    for folder in code.parents:
        name = name.rpartition(".")[0]
        if not name:
            return
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        package = sys.modules.setdefault(name, package)
        if below is not None:
            setattr(package, below.__name__.rpartition(".")[2], below)
        below = package
