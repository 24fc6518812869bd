"""The recipe that a command line asks for: which code may run for it, and which settings it gets."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from lightning_interp.core.storage.distributed import is_rank_zero
from lightning_interp.errors import RecipeError
from lightning_interp.running.catalog import RecipeSource, find_recipe, header, load_class
from lightning_interp.running.recipe import Recipe
from lightning_interp.running.settings import load_settings, option_key, print_help

__all__ = ["allowed_source", "built", "configured", "recipe_class", "show_help", "split_imports"]


def split_imports(arguments: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return what ``--import`` options name, modules and Python files, and the other arguments."""
    found, rest, waiting = [], list[str](), list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, given, value = argument.partition("=")
        if name != "--import":
            rest.append(argument)
            continue
        value = value if given else waiting.pop(0) if waiting else ""
        if not value.endswith(".py") and not (
            all(part.isidentifier() for part in value.split(".")) and value.split(".")[0] != "jsonargparse"
        ):
            raise RecipeError(f"--import={value!r}: expected a module, as package.module, or a Python file.")
        found.append(value)
    return tuple(found), rest


def show_help(name: str, imports: Sequence[str] = ()) -> None:
    """Print what a recipe is about; code that a file brings does not run for that."""
    source = find_recipe(name)
    if source.settings is not None and (code := source.foreign_code(imports)):
        about = header(source.settings)
        print(f"{about}{about and chr(10) * 2}Its recipe is code of its own, which has not run: {code}.")
        print(f"To see the fields: lightning-interp run {shlex.quote(name)} --help --import={shlex.quote(code)}")
    else:
        print_help(recipe_class(source), source)


def configured(name: str, overrides: Sequence[str], imports: Sequence[str] = ()) -> Recipe:
    """Build the recipe from its YAML file and the command line, and check all that can be checked before it runs."""
    return built(allowed_source(name, imports), overrides, imports)


def allowed_source(name: str, imports: Sequence[str] = ()) -> RecipeSource:
    """Find a recipe whose code may run: the package's own, or what the user has named."""
    source = find_recipe(name)
    _check_code(source, imports)
    return source


def built(source: RecipeSource, overrides: Sequence[str], imports: Sequence[str] = ()) -> Recipe:
    """Build the recipe of a source that is allowed, as :func:`configured` does."""
    modules = [i for i in imports if not i.endswith(".py")]
    recipe = load_settings(recipe_class(source), source, overrides, modules)
    named = [option_key(argument) for argument in overrides]
    if "base_url" not in named:
        _check_receiver(recipe, source)
    if source.in_run_folder and source.settings is not None:
        own = source.settings.parent
        if "run_dir" not in named and recipe.run_path.resolve() != own.resolve():
            raise RecipeError(
                f"{source.settings}: its run_dir is {str(recipe.run_path)!r}, and not the run folder in which it lies. "
                f"Say which one to use: --run_dir={shlex.quote(str(own))}"
            )
        _check_written(recipe, source, named, own)
    if recipe.smoke and "model" not in named:
        recipe = dataclasses.replace(recipe, model=recipe.smoke_model)
    if recipe.run_dir is None and not source.named:
        recipe = dataclasses.replace(recipe, run_dir=f"runs/{source.title}{'-smoke' if recipe.smoke else ''}")
    functions = [argument.partition("=")[2] for argument in overrides if option_key(argument) in recipe.functions]
    named_so = [function.partition(":")[0] for function in functions if re.fullmatch(r"[\w.]+:\w+", function)]
    recipe.imports = (*recipe.imports, *modules, *named_so)
    _ = recipe.trainer_options
    return recipe


def _check_code(source: RecipeSource, imports: Sequence[str]) -> None:
    """Say that a settings file brings code, or refuse it where the user must have named that code."""
    code = source.foreign_code(imports)
    if code and (source.code is None or source.in_run_folder or str(source.settings).endswith("config.yaml")):
        raise RecipeError(
            f"{source.settings}: its recipe is code outside of this package, {code}, and would run. Look at it, and if "
            f"you trust it, name it: --import={shlex.quote(code)}"
        )
    if code and is_rank_zero():
        print(f"lightning-interp: {source.settings} runs the code of {code}", file=sys.stderr)


def _check_written(recipe: Recipe, source: RecipeSource, named: Sequence[str | None], own: Path) -> None:
    """Refuse to write outside of a run folder on the word of the settings that lie in it."""
    for key, folders in recipe.written.items():
        away = [folder for folder in folders if folder and not Path(folder).resolve().is_relative_to(own.resolve())]
        if away and key not in named:
            raise RecipeError(
                f"{source.settings}: its {key} leads out of the run folder, to {away[0]!r}, and would be written to. "
                f"If that is yours, name it: --{key}=..."
            )


def _check_receiver(recipe: Recipe, source: RecipeSource) -> None:
    """Refuse to send a key of the user's to an address that a settings file alone decides."""
    address = getattr(recipe, "base_url", None)
    variable = getattr(recipe, "api_key_env", "OPENAI_API_KEY")
    if not address or source.named or source.settings is None or not os.environ.get(variable):
        return
    if urlsplit(address).hostname not in ("localhost", "127.0.0.1", "::1"):
        raise RecipeError(
            f"{source.settings}: {address!r} would get the key in ${variable}, and a file alone names "
            f"that address. If you trust it: --base_url={address}"
        )


def recipe_class(source: RecipeSource) -> type[Recipe]:
    """Import the recipe's class."""
    return load_class(source, Recipe)  # type: ignore[type-abstract]  # it is asked for a subclass
