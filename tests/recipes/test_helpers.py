"""What lies beside the recipes: helpers that are found from a checkout, an installed package and a copy alike."""

from __future__ import annotations

import ast
import doctest
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_interp import cli
from lightning_interp.recipe import Recipe
from lightning_interp.running.catalog import (
    code_files,
    find_recipe,
    load_class,
    recipe_module,
    recipe_names,
    recipes_dir,
)

ROOT = Path(__file__).parents[2]
HELPERS = sorted(path.relative_to(recipes_dir()).with_suffix("").as_posix() for path in recipes_dir().rglob("_*.py"))


@pytest.mark.parametrize("name", HELPERS)
def test_examples_of_a_helper(name):
    assert doctest.testmod(recipe_module(name), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("name", recipe_names())
def test_a_copy_has_all_that_it_imports(name, tmp_path):
    assert cli.main(["copy", name, str(tmp_path)]) == 0
    source = find_recipe(str(tmp_path / f"{Path(name).name}.yaml"))
    module = sys.modules[load_class(source, Recipe).__module__]
    assert Path(module.__file__).parent == tmp_path
    for path in code_files(source.code):
        assert path.parent == tmp_path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                exec(compile(ast.Module([node], []), str(path), "exec"), {"__package__": module.__package__})  # noqa: S102


RECIPE = '''"""Says a word."""
from dataclasses import dataclass

from lightning_interp.recipe import Recipe, RecipeResult

from ._small import WORD


@dataclass(kw_only=True)
class Small(Recipe):
    """Says a word."""

    def study(self, run):
        return RecipeResult(metrics={}, tables={"words": [{"word": WORD}]}, question="Which word?")
'''
SESSION = """
from pathlib import Path
from lightning_interp.cli import main
from lightning_interp.recipe import Recipe
from lightning_interp.running.catalog import find_recipe, load_class, recipes_dir
assert recipes_dir().name == "_recipes"
assert main(["list"]) == main(["copy", "grafting/small", "mine"]) == 0
Path("mine/_small.py").write_text("WORD = 'edited'")
print(load_class(find_recipe("mine/small.yaml"), Recipe).study(None, None).tables)
"""


def test_a_copy_made_by_an_installed_package_is_what_runs(tmp_path):
    site = tmp_path / "site"
    shutil.copytree(ROOT / "lightning_interp", site / "lightning_interp")
    shutil.copytree(ROOT / "recipes", site / "lightning_interp/_recipes")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=lambda *_: ["grafting"])  # a stranger, not looked at
    for name, text in {
        "small.py": RECIPE,
        "_small.py": "WORD = 'original'",
        "small.yaml": "# Which word?\nrecipe: grafting/small\n",
    }.items():
        (site / "lightning_interp/_recipes/grafting" / name).write_text(text)
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", SESSION], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "grafting/pair" in done.stdout
    assert "[{'word': 'edited'}]" in done.stdout
