"""The house rules: layers inside core, recipes outside the package, no circle of files, rooms of a readable size."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_interp"

# What each room of core may import of core; Lightning enters in callbacks alone.
CORE = {
    "model": {"measure", "model"},
    "tokens": {"model", "tokens"},
    "hooks": {"measure", "model", "tokens", "hooks"},  # measure: rows are read undisturbed
    # measure: dropout is drawn by derived seeds; storage: the index of a folder of shards is JSON of others
    "weights": {"model", "tokens", "hooks", "measure", "storage", "weights"},
    "measure": {"measure"},
    "storage": {"measure", "storage"},
    "callbacks": {"model", "tokens", "hooks", "measure", "storage", "callbacks"},
}
# Names that a method's room may use again, since the room says which.
SHARED_NAMES = {
    "callback",
    "figures",
    "metric",
    "metrics",
    "result",
    "intervention",
    "study",
    "words",
    "endpoint",
    "tiny",
    "recipe",
}
# A room holds about fifteen modules; these hold more for now.
FULL: dict[str, int] = {}
MOST = 16


def imports(node, inside=False):
    """Every import below a node, and whether a function holds it; expressions hold none, and are most of a tree."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        elif not isinstance(child, ast.expr):
            yield from imports(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


@cache
def imports_of(path):
    """:func:`imports` of a file."""
    return list(imports(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def modules():
    """Module -> its imports, ``__init__`` files (which only hand names on) left out."""
    paths = [path for path in PACKAGE.rglob("*.py") if "_recipes" not in path.parts and path.name != "__init__.py"]
    names = [".".join(("lightning_interp", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in paths]
    return {name: imports_of(path) for name, path in sorted(zip(names, paths, strict=True))}


def imported(found, at_import=False):
    """``(module, name)`` of imports from the package, also inside functions unless at import alone.

    What a module imports where it is imported itself, type checkers' part included, is in no function.
    """
    for node, inside in found:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_interp"):
            for alias in node.names if not (inside and at_import) else ():
                whole = f"{node.module}.{alias.name}"
                yield (whole, "") if whole in modules() else (node.module, alias.name)


def test_no_two_files_import_each_other_in_a_circle():
    arrows = {name: {to for to, _ in imported(found, True) if to in modules()} for name, found in modules().items()}
    while free := {name for name, to in arrows.items() if not to & arrows.keys()}:
        arrows = {name: to for name, to in arrows.items() if name not in free}
    assert sorted(arrows) == [], "these, or what they import, form a circle"


@pytest.mark.parametrize("room", sorted(CORE))
def test_layers_inside_core(room):
    prefix = f"lightning_interp.core.{room}."
    mine = {name: found for name, found in modules().items() if name.startswith(prefix)}
    assert mine, f"core/{room} is empty"
    for name, found in mine.items():
        rooms = {to.split(".")[2] for to, _ in imported(found) if to.startswith("lightning_interp.core.")}
        assert rooms <= CORE[room], f"{name} imports core/{sorted(rooms - CORE[room])}"


def test_no_private_name_crosses_rooms():
    wrong = [
        f"{name}: {to}.{what}"
        for name, found in modules().items()
        for to, what in imported(found)
        if what.startswith("_") and not what.startswith("__") and to.rpartition(".")[0] != name.rpartition(".")[0]
    ]
    assert wrong == []


def beside(path):
    """Names of the files beside a recipe that it imports; every one of them is a helper."""
    nodes = [node for node, _ in imports_of(path) if isinstance(node, ast.ImportFrom)]
    return {node.module or alias.name for node in nodes if node.level for alias in node.names}


def test_nothing_but_recipes_and_tests_knows_the_recipes():
    outside = [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    for path in outside:
        if "_recipes" not in path.parts:
            roots = {
                name.partition(".")[0]
                for node, _ in imports_of(path)
                for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
            }
            assert not roots & {"recipes", "lightning_interp_recipes"}, path


def test_a_helper_is_one_recipes_own_or_shared():
    users = {}
    for path in (ROOT / "recipes").glob("*/*.py"):
        for name in beside(path):
            assert name.startswith("_"), f"{path} imports the recipe {name}; what two recipes share is a helper"
            users.setdefault(path.with_name(f"{name}.py"), set()).add(path)
    helpers = set((ROOT / "recipes").glob("*/_*.py"))
    assert users.keys() == helpers, "a helper that is missing, or that nobody imports"
    for helper, path in ((h, h.with_name(h.name.removeprefix("_"))) for h in helpers):
        if path.exists():
            assert users[helper] == {path}, f"{helper} is {path}'s own"


def test_rooms_are_of_a_readable_size():
    count = Counter(
        str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"
    )
    count = {room: n for room, n in count.items() if not room.startswith("_recipes")}
    assert {room: n for room, n in count.items() if n > MOST} == FULL, "a room that shrank leaves the list"


def test_a_module_name_says_where_it_is():
    count = Counter(name.rpartition(".")[2] for name in modules())
    assert {name for name, n in count.items() if n > 1} - SHARED_NAMES == set()
