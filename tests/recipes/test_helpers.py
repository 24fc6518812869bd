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


def test_a_copy_made_by_an_installed_package_runs(tmp_path):
    site = tmp_path / "site"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_interp", site / "lightning_interp", ignore=skip)
    shutil.copytree(ROOT / "recipes", site / "lightning_interp/_recipes", ignore=skip)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=lambda *_: ["grafting"])  # a stranger, not looked at
    code = (
        "import sys; from lightning_interp.cli import main; from lightning_interp.running.catalog import recipes_dir\n"
        "assert recipes_dir().name == '_recipes'; sys.exit(main(sys.argv[1:]))"
    )

    def command(*arguments):
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "grafting/pair" in command("list")
    command("copy", "grafting/pair", "mine")
    (tmp_path / "mine/_common.py").write_text(
        (tmp_path / "mine/_common.py").read_text().replace("no prompt was dropped", "none at all")
    )
    command("run", "mine/pair.yaml", "--smoke=true", "--run_dir=run")
    assert "none at all" in (tmp_path / "run/tables/dropped.csv").read_text()
