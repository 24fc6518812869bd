"""A settings file is data: whatever class it names, nothing of it is imported or made but what the user let in."""

import dataclasses
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest

from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.errors import RecipeError
from lightning_interp.running.asked import configured, show_help, split_imports
from lightning_interp.running.catalog import RecipeSource, find_recipe, load_class, recipe_names
from lightning_interp.running.named_classes import Plain, classes_of, plain_hint, takes_none
from lightning_interp.running.recipe import Recipe
from lightning_interp.running.settings import load_settings, trainer_arguments

MARK = """
from contextlib import suppress
from pathlib import Path
from lightning.pytorch.callbacks import Callback
Path("HIT").touch()

class Mark(Callback):
    def __init__(self, text: str = "", of: Callback | None = None):
        Path("HIT").touch()

def mark(*args):
    Path("HIT").touch()
"""
OBJECT = {"class_path": "leaves.Mark", "init_args": {"text": "x"}}
FORMS = [OBJECT, [OBJECT], {"inner": OBJECT}, "leaves.Mark", "leaves.mark", ["leaves.Mark"]]


@pytest.fixture(autouse=True)
def leaves(tmp_path, monkeypatch):
    """A module that leaves the file HIT behind when it is imported, and when its class is made."""
    atomic_write_text(tmp_path / "leaves.py", MARK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "HIT"
    sys.modules.pop("leaves", None)


@dataclasses.dataclass(kw_only=True)
class Free:
    """Takes anything."""

    any: Any = None
    """Anything."""
    named: dict[str, Any] = dataclasses.field(default_factory=dict)
    many: list[Any] = dataclasses.field(default_factory=list)
    text: str = ""
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize("field", ["any", "named", "many", "text", "trainer"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_field_imports_or_makes_what_a_value_names(leaves, field, form):
    import yaml

    path = atomic_write_text(Path("mine.yaml"), yaml.safe_dump({"recipe": "x", field: form}))
    option = form if isinstance(form, str) else json.dumps(form)
    for source, options in (
        (RecipeSource("x", None, path), []),
        (RecipeSource("x", None, None), [f"--{field}={option}"]),
    ):
        with suppress(RecipeError):
            read = getattr(load_settings(Free, source, options), field)
            assert read == (option if field == "text" else form)  # as it was written
    assert not leaves.exists()
    assert "leaves" not in sys.modules


def test_interpolation_makes_no_class_of_texts(leaves):
    path = atomic_write_text(
        Path("mine.yaml"), "recipe: x\ntext: leaves\nany: {class_path: '${text}.Mark'}\ntrainer: {a: '${text}.mark'}\n"
    )
    assert load_settings(Free, RecipeSource("x", None, path)).any == {"class_path": "leaves.Mark"}
    assert not leaves.exists()


class TestTrainer:
    @pytest.mark.parametrize(
        "key", ["callbacks", "logger", "strategy", "plugins", "profiler", "accelerator", "max_epochs", "precision"]
    )
    @pytest.mark.parametrize("form", FORMS[::3], ids=str)
    def test_no_argument_imports_what_it_names(self, leaves, key, form):
        with suppress(RecipeError):
            assert trainer_arguments({key: form})() == {key: form}  # a name that Lightning itself will refuse
            assert isinstance(form, str)
        assert not leaves.exists()
        assert "leaves" not in sys.modules

    def test_the_remedy_is_to_name_the_module(self, leaves):
        with pytest.raises(RecipeError, match=r"'leaves.Mark' is neither a class of Lightning's.*--import=leaves$"):
            trainer_arguments({"callbacks": [OBJECT]})
        build = trainer_arguments({"callbacks": [OBJECT]}, ["leaves"])
        assert type(build()["callbacks"][0]).__name__ == "Mark"
        assert leaves.exists()

    def test_what_is_nested_in_a_class_of_lightning_obeys_the_same_rule(self, leaves):
        for given in (
            {"class_path": "LambdaCallback", "init_args": {"on_fit_start": "leaves.mark"}},
            {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": OBJECT}},
            {"class_path": "lightning.pytorch.callbacks.callback.Any", "init_args": {}},
            {"class_path": "lightning.pytorch.callbacks.model_checkpoint.os.system", "init_args": {"command": "ls"}},
            {"class_path": "lightning.pytorch.cli.LightningCLI"},
            {"class_path": "lightning.fabric.utilities.cloud_io._load", "init_args": {"path_or_url": "x"}},
        ):
            with pytest.raises(RecipeError, match=r"trainer.callbacks"):
                trainer_arguments({"callbacks": [given]})()
        assert not leaves.exists()

    def test_every_class_that_lightning_offers_may_be_named(self):
        from jsonargparse import _common
        from lightning.pytorch import callbacks, loggers, plugins, profilers, strategies

        with classes_of():
            for offered in (callbacks, loggers, plugins, profilers, strategies):
                for name in offered.__all__:
                    found = getattr(offered, name)
                    path = f"{found.__module__}.{found.__qualname__}"
                    assert _common.denying_import_path_entry(path) is None, path

    def test_the_settings_of_another_reader_in_this_process_stay_as_they_are(self):
        from jsonargparse import _common

        before = dict(_common.parsing_settings)
        trainer_arguments({"callbacks": [{"class_path": "Timer"}]}, ["leaves"])()
        assert _common.parsing_settings == before


def paths_of(text):
    path = atomic_write_text(Path("mine.yaml"), f"recipe: x\ntrainer: {{callbacks: {text}}}\n")
    return RecipeSource("x", None, path)


@pytest.mark.parametrize("place", ["/etc/cron.d", "~/.ssh", "../../outside", "a/../../b", "s3://bucket/x", "file:///x"])
def test_a_file_sends_no_object_to_a_place_that_the_user_did_not_name(place):
    given = f"[{{class_path: ModelCheckpoint, init_args: {{dirpath: '{place}'}}}}]"
    with pytest.raises(RecipeError, match=r"mine.yaml, line 2: the Trainer is to use '.*'.*--trainer"):
        load_settings(Free, paths_of(given))
    read = load_settings(Free, paths_of("[]"), [f"--trainer.callbacks={given}"])
    assert read.trainer["callbacks"][0]["init_args"] == {"dirpath": place}
    assert load_settings(Free, paths_of(given.replace(place, "marks"))).trainer["callbacks"]
    root = paths_of(f"[], default_root_dir: '{place}'")
    with pytest.raises(RecipeError, match="the Trainer is to use"):
        load_settings(Free, root)
    assert load_settings(Free, root, [f"--trainer.default_root_dir={place}"]).trainer["default_root_dir"] == place


@dataclasses.dataclass
class Inner:
    size: int = 1
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outer:
    maybe: Inner | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_settings_of_settings(leaves):
    path = atomic_write_text(
        Path("mine.yaml"), "recipe: x\nmaybe: {size: 3}\ninner: {more: {class_path: leaves.Mark}}\n"
    )
    read = load_settings(Outer, RecipeSource("x", None, path))
    assert read == Outer(Inner(3), Inner(1, {"class_path": "leaves.Mark"}))
    for text, message in (
        ("inner: {size: null}", "line 2: the value of 'inner.size' does not fit: expected int, got null"),
        ("inner: leaves.yaml", "'leaves.yaml' is neither a class"),
        ("maybe: {class_path: leaves.Mark}", "'leaves.Mark' is neither a class"),
        ("maybe: leaves.Mark", "'leaves.Mark' is neither a class"),
    ):
        path = atomic_write_text(Path("mine.yaml"), f"recipe: x\n{text}\n")
        with pytest.raises(RecipeError, match=message):
            load_settings(Outer, RecipeSource("x", None, path))
    assert not leaves.exists()


def test_types_and_options():
    assert plain_hint(dict[str, Any]) == dict[str, Plain]
    assert plain_hint(list[Any] | None) == list[Plain] | None
    assert plain_hint(Literal["Any"]) == Literal["Any"]
    assert plain_hint(type[Any]) == type[Any]
    assert [takes_none(hint) for hint in (int, int | None, Any, str, Plain)] == [False, True, True, False, True]
    assert split_imports(["--a=1", "--import=x.y", "--import", "z", "b.py"]) == (("x.y", "z"), ["--a=1", "b.py"])
    assert split_imports(["--import", "a/b.py"])[0] == ("a/b.py",)
    for wrong in (["--import"], ["--import=a b"], ["--import=jsonargparse"], ["--import=.."]):
        with pytest.raises(RecipeError, match=r"expected a module, as package.module, or a Python file"):
            split_imports(wrong)


def fields_of(name):
    cls = load_class(find_recipe(name), Recipe)
    return [field.name for field in dataclasses.fields(cls)]


EVERY = [(name, key) for name in recipe_names() for key in ("recipe", *fields_of(name))]
SOME = [(name, key) for name, key in EVERY if key in ("recipe", "trainer", "model")][::9]


def no_field_runs_anything(name, key):
    import yaml

    for form in (OBJECT, [OBJECT], "leaves.Mark", None):
        path = atomic_write_text(Path("mine.yaml"), yaml.safe_dump({"recipe": name} | {key: form}))
        for look in (show_help, lambda path: configured(path, [])):
            with suppress(RecipeError):
                look(str(path))
    assert not Path("HIT").exists()
    assert "leaves" not in sys.modules
    assert sorted(os.listdir()) == ["leaves.py", "mine.yaml"]


@pytest.mark.parametrize(("name", "key"), SOME)
def test_a_field_of_a_recipe_runs_nothing(name, key):
    no_field_runs_anything(name, key)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), EVERY)
def test_no_field_of_any_recipe_runs_anything(name, key):
    no_field_runs_anything(name, key)


@pytest.mark.slow
def test_no_argument_of_the_trainer_imports_what_it_names(leaves):
    import inspect

    from lightning.pytorch import Trainer

    for key in list(inspect.signature(Trainer.__init__).parameters)[1:]:
        for form in FORMS:
            with suppress(RecipeError):
                trainer_arguments({key: form})()
    assert not leaves.exists()


class TestAddresses:
    """Of endpoints, in settings that somebody sent."""

    def asked(self, *lines, options=(), recipe="rate/llm_rewriter"):
        path = atomic_write_text(Path("mine.yaml"), "\n".join([f"recipe: {recipe}", *lines, ""]))
        return configured(str(path), options)

    def test_a_file_alone_does_not_send_the_users_key_elsewhere(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "sk-mine-0123456789")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-0123456789")
        there = "base_url: https://elsewhere.example/v1"
        for lines in ([there], [there, "api_key_env: AWS_SECRET_ACCESS_KEY"]):
            with pytest.raises(
                RecipeError, match=r"'https://elsewhere.*would get the key in \$.*--base_url=https://else"
            ):
                self.asked(*lines)
        assert self.asked(there, options=["--base_url=https://elsewhere.example/v1"]).base_url
        assert self.asked("base_url: http://localhost:8000/v1").base_url
        assert self.asked(there, "api_key_env: NOT_SET").base_url
        with pytest.raises(RecipeError, match="would get the key"):
            self.asked(
                there,
                "rewriter: endpoint",
                "model: m",
                "template: length",
                "data: mine.jsonl",
                "label: vowel",
                recipe="rate/audit",
            )

    @pytest.mark.parametrize("recipe", ["rate/audit", "rate/llm_rewriter"])
    def test_no_address_holds_a_secret(self, recipe):
        for address in ("http://user:word@host/v1", "https://host/v1?api_key=word"):
            for lines, options in (([f"base_url: {address}"], []), ([], [f"--base_url={address}"])):
                with pytest.raises(RecipeError, match="base_url holds a user, a password or a key") as caught:
                    self.asked(*lines, options=options, recipe=recipe)
                assert "word@" not in str(caught.value)

    def test_the_name_of_a_variable_is_no_key(self):
        with pytest.raises(RecipeError, match="api_key_env is no name of an environment variable"):
            self.asked("api_key_env: sk-mine-0123456789")
