import sys
from pathlib import Path

import pytest

from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.errors import RecipeError
from lightning_interp.recipe import Recipe
from lightning_interp.running import catalog
from lightning_interp.running.catalog import (
    code_files,
    find_recipe,
    header,
    load_class,
    nearest,
    recipe_module,
    recipe_names,
    yaml_keys,
)

CODE = """
from dataclasses import dataclass
from lightning_interp.recipe import Recipe, RecipeResult

@dataclass(kw_only=True)
class Small(Recipe):
    epochs: int = 3

    def study(self, run):
        return RecipeResult()
"""


@pytest.fixture(autouse=True)
def _recipes(tmp_path, monkeypatch):
    """A folder of recipes in place of the package's own, and no module of it left behind."""
    monkeypatch.setattr(catalog, "recipes_dir", lambda: tmp_path / "recipes")
    atomic_write_text(tmp_path / "recipes/method/small.py", CODE)
    atomic_write_text(tmp_path / "recipes/method/small.yaml", "# What is it?\n#\n#  indented\nrecipe: method/small\n")
    atomic_write_text(tmp_path / "recipes/method/helper.py", "")
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(catalog.MODULES)}
    yield
    for name in [name for name in sys.modules if name.startswith(catalog.MODULES)]:
        del sys.modules[name]
    sys.modules.update(saved)


def settings(tmp_path, text):
    return atomic_write_text(tmp_path / "mine.yaml", text)


def test_a_recipe_is_a_python_file_with_a_yaml_file_beside_it(tmp_path):
    assert recipe_names() == ["method/small"]
    source = find_recipe("method/small")
    assert (source.title, source.named) == ("method/small", True)
    cls = load_class(source, Recipe)
    assert (cls.__name__, cls.__module__) == ("Small", "lightning_interp_recipes.method.small")
    assert cls().name == "method/small"
    assert load_class(source, Recipe) is cls  # the module is imported once
    assert header(source.settings) == "What is it?\n\n indented"


def test_a_yaml_file_names_its_recipe_in_three_ways(tmp_path, monkeypatch):
    atomic_write_text(tmp_path / "code/own.py", CODE)
    atomic_write_text(tmp_path / "pack/deep_module.py", CODE)
    monkeypatch.syspath_prepend(tmp_path / "pack")
    for key, title in (("method/small", "mine"), ("code/own.py", "mine"), ("deep_module.Small", "mine")):
        source = find_recipe(str(settings(tmp_path, f"recipe: {key}\n")))
        assert (source.key, source.title, source.named) == (key, title, False)
        assert load_class(source, Recipe).__name__ == "Small"
    del sys.modules["deep_module"]


def test_a_python_file_is_enough(tmp_path):
    source = find_recipe(str(atomic_write_text(tmp_path / "own.recipe.py", CODE)))
    assert (source.title, source.settings) == ("own.recipe", None)
    assert load_class(source, Recipe)(epochs=4).epochs == 4


HELPED = "from ._common import EPOCHS\n" + CODE.replace("epochs: int = 3", "epochs: int = EPOCHS")


def test_recipes_import_what_lies_beside_them_and_not_each_others_helpers(tmp_path):
    before = list(sys.path)
    for folder, epochs in (("recipes/one", 1), ("recipes/two", 2), ("mine", 3)):
        atomic_write_text(tmp_path / folder / "_common.py", f"from . import _deeper\nEPOCHS = _deeper.N + {epochs}\n")
        atomic_write_text(tmp_path / folder / "_deeper.py", "N = 10\n")
        atomic_write_text(tmp_path / folder / "own.py", HELPED)
        atomic_write_text(tmp_path / folder / "own.yaml", f"recipe: {folder.removeprefix('recipes/')}/own\n")
    found = [
        load_class(find_recipe(name), Recipe)().epochs for name in ("one/own", "two/own", f"{tmp_path}/mine/own.py")
    ]
    assert found == [11, 12, 13]
    assert recipe_module("two/_common").EPOCHS == 12
    assert sys.modules[catalog.MODULES].two._common.EPOCHS == 12  # a package knows its parts, as others do
    assert sys.path == before
    assert "_common" not in sys.modules


def test_a_recipe_that_python_imported_first_has_its_own_name():
    source = find_recipe("method/small")
    cls = load_class(source, Recipe)
    del vars(sys.modules[cls.__module__])["__recipe__"]  # as an ordinary import leaves it
    assert cls().name == "Small"
    assert load_class(source, Recipe)().name == "method/small"


def test_the_files_of_a_recipe_are_its_code_and_the_helpers_that_it_reaches(tmp_path):
    atomic_write_text(tmp_path / "_b.py", "def f():\n    from ._c import x\n")
    atomic_write_text(tmp_path / "_c.py", "from . import _b\nimport json\n")
    code = atomic_write_text(tmp_path / "a.py", "from ._b import f, g\nfrom lightning_interp.recipe import Recipe\n")
    assert [path.name for path in code_files(code)] == ["a.py", "_b.py", "_c.py"]
    atomic_write_text(tmp_path / "_c.py", "def broken(:")
    with pytest.raises(RecipeError, match=r"Cannot read '.*_c\.py' as Python"):
        code_files(code)


def test_the_package_finds_its_recipes_installed_or_beside_it(tmp_path, monkeypatch):
    monkeypatch.undo()
    package = Path(catalog.__file__).parents[1]
    assert catalog.recipes_dir() in (package / "_recipes", package.parent / "recipes")
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "site/lightning_interp/running/catalog.py"))
    assert catalog.recipes_dir() == tmp_path / "site/recipes"
    (tmp_path / "site/lightning_interp/_recipes").mkdir(parents=True)
    assert catalog.recipes_dir() == tmp_path / "site/lightning_interp/_recipes"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("method/smal", "There is no recipe 'method/smal'. Did you mean 'method/small'?"),
        ("../recipes/method/small", "There is no recipe '../recipes/method/small'."),
        ("method/../method/small", "There is no recipe 'method/../method/small'."),
        ("/etc/passwd", "There is no recipe '/etc/passwd'. The recipes are method/small."),
        ("method/helper", "There is no recipe 'method/helper'."),
        ("", "There is no recipe ''."),
        ("smal.yaml", "There is no file 'smal.yaml'. Did you mean 'method/small'?"),
        ("other.py", "There is no file 'other.py'."),
    ],
)
def test_what_does_not_exist_is_said_with_the_nearest(name, message):
    with pytest.raises(RecipeError) as caught:
        find_recipe(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\n", "mine.yaml: expected the key 'recipe' with a recipe's name"),
        ("a: 1\nrecipe:\n", "mine.yaml, line 2: expected the key 'recipe'"),
        ("recipe: [a]\n", "mine.yaml, line 1: expected the key 'recipe'"),
        ("recipe: method/smal\n", "mine.yaml, line 1: There is no recipe 'method/smal'. Did you mean 'method/small'?"),
        ("recipe: ../../etc/x\n", "line 1: There is no recipe '../../etc/x'"),
        ("\nrecipe: gone.py\n", "line 2: there is no file 'gone.py' (looked at "),
        ("- a\n", "mine.yaml: expected 'key: value' lines"),
        ("", "mine.yaml: expected 'key: value' lines"),
        ("recipe: x\nrecipe: y\n", "mine.yaml, line 2: the key 'recipe' is there twice (also in line 1)"),
        ("recipe: x\ntrainer:\n  a: 1\n  a: 2\n", "line 4: the key 'trainer.a' is there twice (also in line 3)"),
        ("recipe: [x\nb: 1\n", "mine.yaml, line 2: expected ',' or ']'"),
        (
            "recipe: !!python/object/apply:os.system [ls]\n",
            "line 1: 'tag:yaml.org,2002:python/object/apply:os.system' is no",
        ),
    ],
)
def test_a_settings_file_that_names_no_recipe(tmp_path, text, message):
    with pytest.raises(RecipeError) as caught:
        find_recipe(str(settings(tmp_path, text)))
    assert message in str(caught.value)


def test_a_settings_file_that_is_no_text(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"Cannot read '.*mine\.yaml'"):
        find_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("key", "code", "message"),
    [
        ("bad.py", "import nothing_of_this_name", r"bad\.py' could not be imported: ModuleNotFoundError: .*nothing_of"),
        ("bad.py", "def broken(:", r"bad\.py' could not be imported: SyntaxError"),
        ("bad.py", "x = 1", r"bad\.py' must define exactly one Recipe, and it defines none"),
        ("bad.py", CODE + CODE.replace("Small", "Other"), "exactly one Recipe, and it defines Small, Other"),
        ("bad.py", "from lightning_interp.recipe import Recipe", "exactly one Recipe, and it defines none"),
        ("nothing_here.Small", "", "'nothing_here.Small' could not be imported: ModuleNotFoundError"),
        ("json.JSONDecoder", "", "'json.JSONDecoder' is .*expected a subclass of Recipe"),
        ("json.Nothing", "", "'json.Nothing' is missing: expected a subclass of Recipe"),
    ],
)
def test_code_that_holds_no_recipe(tmp_path, key, code, message):
    atomic_write_text(tmp_path / "bad.py", code)
    source = find_recipe(str(settings(tmp_path, f"recipe: {key}\n")))
    before = set(sys.modules)
    with pytest.raises(RecipeError, match=message):
        load_class(source, Recipe)
    if "could not be imported" in message:
        assert not any(name.endswith(".bad") for name in set(sys.modules) - before)


def test_keys_have_lines_and_references_do_not_explode(tmp_path):
    text = "a: 1\nb:\n  c: &x {d: 1}\n  e: *x\n"
    assert {key: line for key, (line, _) in yaml_keys(settings(tmp_path, text)).items()} == {
        "a": 1, "b": 2, "b.c": 3, "b.c.d": 3, "b.e": 4, "b.e.d": 3,
    }  # fmt: skip
    lines = ["l0: &l0 {k0: 1, k1: 1, k2: 1, k3: 1, k4: 1, k5: 1, k6: 1, k7: 1, k8: 1}"]
    lines += [  # nine to the power of twelve keys, if it were expanded
        f"l{level}: &l{level} {{" + ", ".join(f"k{i}: *l{level - 1}" for i in range(9)) + "}" for level in range(1, 12)
    ]
    with pytest.raises(RecipeError, match=r"line 5: more than 100000 values, by references \(&, \*\). Write them out"):
        yaml_keys(settings(tmp_path, "\n".join(lines)))
    assert len(yaml_keys(settings(tmp_path, "\n".join(lines[:4])))) < 10_000


def test_the_nearest_name():
    known = ["learning_rate", "lora.rank", "epochs"]
    assert nearest("lerning_rate", known) == "Did you mean 'learning_rate'?"
    assert nearest("ranc", known) == "Did you mean 'lora.rank'?"
    assert nearest("zzz", known) == "It has learning_rate, lora.rank, epochs."
