from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml

from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.errors import RecipeError
from lightning_interp.running.asked import configured
from lightning_interp.running.catalog import RecipeSource
from lightning_interp.running.settings import (
    literal,
    load_settings,
    option_key,
    print_help,
    trainer_arguments,
)


@dataclass
class Lora:
    """An adapter."""

    rank: int = 16
    """Its rank."""


@dataclass(kw_only=True)
class Study:
    """Studies something."""

    epochs: int = 3
    """How often the data is seen."""
    learning_rate: float = 1e-3
    """Step size."""
    mode: Literal["lora", "full"] = "lora"
    """What is trained."""
    warmup: int | None = None
    """Steps of warm-up."""
    lora: Lora = field(default_factory=Lora)
    words: list[str] = field(default_factory=list)
    """Words to look for."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """For the Trainer."""


def load(tmp_path, text, *overrides):
    path = atomic_write_text(tmp_path / "mine.yaml", f"recipe: x\n{text}")
    return load_settings(Study, RecipeSource("x", None, path), overrides)


def test_yaml_then_command_line_then_interpolation(tmp_path):
    text = (
        "epochs: 4\nlearning_rate: 1e-4\nlora: {rank: 8}\ntrainer:\n  max_epochs: ${epochs}\n  precision: bf16-mixed\n"
    )
    plain = load(tmp_path, text)
    assert plain == Study(
        epochs=4, learning_rate=1e-4, lora=Lora(8), trainer={"max_epochs": 4, "precision": "bf16-mixed"}
    )
    changed = load(tmp_path, text, "--epochs=9", "--trainer.devices", "2", "--trainer.logger=false", "--lora.rank=2")
    assert changed.trainer == {"max_epochs": 9, "precision": "bf16-mixed", "devices": 2, "logger": False}
    assert (changed.epochs, changed.lora) == (9, Lora(2))
    assert load(tmp_path, "words: [a]\n", "--words+=b").words == ["a", "b"]
    assert load(tmp_path, "warmup: null\n", "--trainer.max_steps=null").trainer == {"max_steps": None}
    assert load_settings(Study, RecipeSource("x", None, None)) == Study()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epocs: 4\n", "mine.yaml, line 2: there is no field 'epocs'. Did you mean 'epochs'?"),
        (
            "epochs: 4\nlora:\n  rang: 3\n",
            "mine.yaml, line 4: there is no field 'lora.rang'. Did you mean 'lora.rank'?",
        ),
        ("epochs: many\n", "mine.yaml, line 2: the value of 'epochs' does not fit: expected int, got 'many'."),
        (
            "warmup: few\n",
            "mine.yaml, line 2: the value of 'warmup' does not fit: expected int or NoneType, got 'few'.",
        ),
        ("mode: lorra\n", "expected one of 'lora', 'full', got 'lorra'. Did you mean 'lora'?"),
        ("\nepochs: ${epocs}\n", "mine.yaml, line 3: the value of 'epochs' does not fit: Interpolation key 'epocs'"),
        ("trainer: 3\n", "mine.yaml, line 2: the value of 'trainer' does not fit: expected dict, got '3'."),
        ("settings_file: a.yaml\n", "line 2: there is no field 'settings_file'"),
        ("words: [1, {a: 2}]\n", "mine.yaml, line 2: the value of 'words' does not fit"),
    ],
)
def test_a_wrong_key_or_value_in_yaml_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--lerning_rate=1", "Recipe 'mine' has no field '--lerning_rate'. Did you mean 'learning_rate'?"),
        ("--rank=1", "Recipe 'mine' has no field '--rank'. Did you mean 'lora.rank'?"),
        ("--lora.rnk=1", "no field '--lora.rnk'. Did you mean 'lora.rank'?"),
        ("--epoch=1", "no field '--epoch'. Did you mean 'epochs'?"),  # no abbreviations
        ("--zzz", "no field '--zzz'. It has epochs, learning_rate, mode, "),
        ("--recipe=other", "no field '--recipe'"),
        ("--config=other.yaml", "no field '--config'"),
        ("--epochs=x", "--epochs: the value of 'epochs' does not fit: expected int, got 'x'."),
        ("--mode=ful", "--mode: the value of 'mode' does not fit: expected one of 'lora', 'full', got 'ful'."),
        ("--epochs", "argument --epochs: expected one argument"),
        ("loose", "unrecognized arguments: loose. Give fields as --field=value."),
        ("-x", "unrecognized arguments: -x"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, override, message):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "epochs: 2\n", override)
    assert message in str(caught.value)


def test_help_shows_header_fields_types_and_the_values_of_the_yaml(tmp_path, capsys):
    path = atomic_write_text(
        tmp_path / "mine.yaml", "# Asks why.\n#   Time: 3 min\nrecipe: x\nepochs: 5\nlora: {rank: 4}\n"
    )
    print_help(Study, RecipeSource("x", None, path))
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "Asks why. Time: 3 min",
        "--epochs EPOCHS How often the data is seen. (type: int, default: 5)",
        "--mode {lora,full} What is trained. (type: Literal['lora', 'full'], default: lora)",
        "--lora.rank RANK Its rank. (type: int, default: 4)",
    ):
        assert text in out
    assert "settings_file" not in out
    assert "--recipe" not in out
    with pytest.raises(RecipeError, match="no field 'epocs'"):
        print_help(Study, RecipeSource("x", None, atomic_write_text(path, "recipe: x\nepocs: 5\n")))


def test_help_takes_a_header_for_text_and_not_for_a_format(tmp_path, capsys):
    for text in ("100% sure", "%(prog)s is 100% %(x)d sure", "%s %"):
        path = atomic_write_text(tmp_path / "mine.yaml", f"# {text}\nrecipe: x\nwords: ['5% of %(default)s']\n")
        print_help(Study, RecipeSource("x", None, path))
        out = " ".join(capsys.readouterr().out.split())
        assert f" {text} options:" in out
        assert "default: ['5% of %(default)s']" in out


def test_text_that_looks_like_an_interpolation_reads_back_from_written_settings(tmp_path):
    words = ["Pay ${amount}.", "${", "plain", "a $x {y}"]
    read = load(tmp_path, yaml.safe_dump(literal({"words": words})))
    assert read.words == words


def test_what_the_user_named():
    assert option_key("--model") == "model"
    assert option_key("--words+=x") == "words"
    assert "model" not in map(option_key, ["--modeling=x", "model", "--seed=--model"])


class TestTrainer:
    def test_arguments_pass_through_and_nothing_else_is_added(self):
        given = {"max_epochs": 3, "precision": "16-mixed", "devices": "auto", "strategy": "ddp", "logger": False}
        assert trainer_arguments(given)() == given
        assert trainer_arguments({})() == {}

    def test_callbacks_are_built_anew_on_each_call(self):
        from lightning.pytorch.callbacks import EarlyStopping

        given = {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "loss"}}]}
        build = trainer_arguments(given)
        first, second = build(), build()
        assert isinstance(first["callbacks"][0], EarlyStopping)
        assert first["callbacks"][0].monitor == "loss"
        assert first["callbacks"][0] is not second["callbacks"][0]

    def test_objects_pass_through(self):
        from lightning.pytorch.callbacks import Timer

        callbacks = [Timer()]
        assert trainer_arguments({"callbacks": callbacks, "max_steps": 1})()["callbacks"] is callbacks

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"max_epoch": 3}, "The Trainer has no argument 'max_epoch'. Did you mean 'max_epochs'?"),
            (
                {"precision": "bf17-mixed"},
                "'trainer.precision' does not fit: .*got 'bf17-mixed'. Did you mean 'bf16-mixed'",
            ),
            ({"max_epochs": "three"}, "'trainer.max_epochs' does not fit: expected int or NoneType, got 'three'"),
            ({"callbacks": [{"class_path": "EarlyStoping"}]}, "'trainer.callbacks' does not fit: .*EarlyStoping"),
        ],
    )
    def test_what_does_not_fit_is_named(self, given, message):
        with pytest.raises(RecipeError, match=message):
            trainer_arguments(given)


@pytest.mark.parametrize("where", ["store: {0}", "attributes: [{{attribute: a, store: {0}}}]"])
def test_settings_in_a_run_folder_do_not_say_where_else_to_write(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    RunManifest.open(tmp_path / "run", config={}, name="audit").close()
    rows = '{"text": "a!", "reward": 1}'
    atomic_write_text(tmp_path / "rows.jsonl", rows)
    said = "recipe: rate/audit\nrun_dir: run\ndata: rows.jsonl\nrewriter: rules\ntoggle: 'mark:!'\n" + where + "\n"
    settings = atomic_write_text(tmp_path / "run/config.yaml", said.format("../other"))
    key = where.partition(":")[0]
    with pytest.raises(RecipeError, match=rf"its {key} leads out of the run folder, to '../other'.*--{key}="):
        configured("run/config.yaml", ["--run_dir=run"])
    if key == "store":
        assert configured("run/config.yaml", ["--store=../other"]).store == "../other"
    atomic_write_text(settings, said.format("run/store"))
    configured("run/config.yaml", [])
    assert not (tmp_path.parent / "other").exists()
