"""What holds for a chain, slices of a pool, and that what cannot work is refused by its name and value."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
from chains import SEED, chain, fitting, writing
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.cycles import (
    PRESETS,
    ChainSettings,
    Evaluate,
    Filter,
    FitDocuments,
    FitDPO,
    FitSFT,
    Generate,
    GenerationCycle,
    prompt_slices,
)
from lightning_interp.cycles.chain_settings import changed, plain_settings, plain_value
from lightning_interp.errors import RecipeError
from lightning_interp.models import LoraSettings


def test_slices_of_the_papers_pool():
    assert {stop - start for start, stop in prompt_slices(29_280, 6)} == {4880}
    assert [stop - start for start, stop in prompt_slices(29_283, 6)] == [4880] * 5 + [4883]


@given(st.integers(1, 200), st.integers(1, 20))
def test_slices_are_contiguous_and_cover_the_pool(size, parts):
    if parts > size:
        with pytest.raises(RecipeError, match=rf"A pool of {size} prompts cannot be cut into {parts} slices"):
            prompt_slices(size, parts)
        return
    found = prompt_slices(size, parts)
    assert [index for start, stop in found for index in range(start, stop)] == list(range(size))
    assert len({stop - start for start, stop in found[:-1]} | {size // parts}) == 1


@pytest.mark.parametrize(
    ("name", "value", "more"),
    [
        ("cycles", 0, {}),
        ("init", "fresh", {}),
        ("restart_cycles", {2}, {"init": "reinit"}),
        ("data_rule", "add", {}),
        ("real_fraction", 0.0, {"data_rule": "mix"}),
        ("real_fraction", 0.5, {}),
        ("generator", "next", {}),
    ],
)
def test_a_wrong_setting_is_named(name, value, more):
    with pytest.raises(RecipeError, match=rf"{name}={re.escape(repr(value))}"):
        ChainSettings(**{"model": "tiny:llama", "cycles": 3, **more, name: value})


@pytest.mark.parametrize(("name", "value"), [("n", 0), ("draw", "all"), ("shortfall", "none"), ("shard_size", 0)])
def test_a_wrong_setting_of_writing_is_named(name, value):
    with pytest.raises(RecipeError, match=rf"Generate cannot use {name}={value!r}"):
        Generate(**{"n": 1, name: value})


def test_dpo_knows_who_writes_what_is_rejected():
    with pytest.raises(RecipeError, match="rejected_from='next'"):
        FitDPO(rejected_from="next")


WRONG = {
    "is no phase": {"phases": [writing(), "fit"]},
    "2 Generate phases": {"phases": [writing(), writing(), fitting()]},
    "first holds a Generate": {"first": [writing(), fitting(data=SEED)]},
    "stands behind no Generate": {"phases": [Filter(), fitting()]},
    "Cycle 1 has fit-sft, but no rows": {"phases": [FitSFT()]},
    "Cycle 0 has fit-sft, but no rows": {"first": [FitSFT()]},
    "Cycle 1 trains on rows of two kinds, for fit-sft and fit-dpo": {"phases": [writing(), fitting(), FitDPO()]},
    "has data of its own": {"phases": [writing(), fitting(data=SEED)]},
    r"overrides\[1\] names 'fit'; the phases are generate, fit-sft, evaluate": {"overrides": {1: {"fit": {}}}},
    r"overrides\[1\]\['fit-sft'\] names 'lr', which FitSFT lacks": {"overrides": {1: {"fit-sft": {"lr": 1}}}},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_cannot_work_is_said_before_anything_runs(said):
    with pytest.raises(RecipeError, match=said):
        chain(None, **WRONG[said])


def test_a_chain_needs_a_folder():
    with pytest.raises(RecipeError, match=r"run_dir=None"):
        chain(None).run()


def test_what_stands_behind_the_training_is_done_in_cycle_0_too():
    named = Evaluate(evaluate=len, name="coherence")
    phases = [writing(), fitting(), Evaluate(evaluate=len), named]
    assert list(chain(None, phases=phases).plan(0)) == ["seed", "mix", "fit-sft", "evaluate", "coherence"]
    alone = chain(None, phases=phases, first=[fitting(data=SEED), named])
    assert list(alone.plan(0)) == ["seed", "mix", "fit-sft", "coherence"]
    assert list(alone.plan(1)) == ["generate", "mix", "fit-sft", "evaluate", "coherence"]


def test_filters_belong_to_the_writing_before_them():
    first, second = Filter(minimum_characters=3), Filter(keep=len)
    plan = chain(None, phases=[writing(), first, second, fitting()]).plan(1)
    assert plan["generate"].filters == (first, second)
    assert list(plan) == ["generate", "mix", "fit-sft"]


@pytest.mark.parametrize(
    ("fit", "draw", "documents", "rejected"),
    [
        (FitSFT, "slice", False, None),
        (FitDocuments, "slice", True, None),
        (partial(FitDPO, rejected_from="previous"), "sample", False, "previous"),
    ],
)
def test_the_writing_is_as_the_training_needs_it(fit, draw, documents, rejected):
    one = chain(None, first=[fit(data=SEED)], phases=[writing(), fit()])
    found = one.plan(1)["generate"]
    assert (found.draw, found.documents, found.rejected_from) == (draw, documents, rejected)
    seed = one.plan(0)["seed"]
    assert (seed.documents, seed.rejected_from) == (documents, rejected and "base")
    assert one.slices == (None if draw == "sample" else 2)


def test_more_cycles_are_the_same_chain_and_other_settings_are_not():
    usual = chain(None, phases=[writing(slices=4), fitting()])
    assert usual.config() == chain(None, cycles=5, phases=[writing(slices=4), fitting()]).config()
    assert usual.config() != chain(None, phases=[writing(slices=4, shard_size=3), fitting()]).config()
    assert usual.config() != chain(None, seed=1, phases=[writing(slices=4), fitting()]).config()


def test_plain_values():
    assert plain_value(len) == "builtins.len"
    assert plain_value({"a": Path("x"), 1: {3, 2}}) == {"a": "x", "1": [2, 3]}
    assert plain_value([{"prompt": "x"}])["rows"] == 1
    assert plain_value(object()) == "object"  # an address would be another in each run
    assert plain_settings(Filter())["duplicates"] is False

    class Judge:
        def __call__(self, rows):
            return rows

        def identity(self):
            return {"name": "mine"}

    assert plain_settings(Filter(keep=Judge()))["keep"] == {"name": "mine"}


def test_changed_goes_into_settings_inside():
    fit = changed(fitting(), {"optimisation": {"lr": 2.0}, "epochs": 3}, where="x")
    assert (fit.optimisation.lr, fit.epochs) == (2.0, 3)
    with pytest.raises(RecipeError, match=r"x\.optimisation names 'rate'"):
        changed(fitting(), {"optimisation": {"rate": 2.0}}, where="x")
    with pytest.raises(RecipeError, match="alpha=0"):
        changed(LoraSettings(), {"alpha": 0}, where="x")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings(name):
    preset = PRESETS[name]
    fit = {"sft": FitSFT, "documents": FitDocuments}.get(name, FitDPO)
    built = GenerationCycle(
        model="tiny:llama",
        first=[changed(fit(data=SEED, n=preset["n_seed"]), preset["fit"], where=name)],
        phases=[Generate(prompts=["x"] * 99, **preset["generate"]), changed(fit(), preset["fit"], where=name)],
        **preset["chain"],
    )
    assert built.init == ("continual" if name == "dpo_continual" else "reinit")
    assert built.plan(1)["generate"].temperature == 0.8
    assert built.plan(0)[fit.stage].optimisation.betas == (0.9, 0.95)


def test_the_snippet_of_the_documentation():
    one = GenerationCycle(
        model="smollm2-135m-instruct", cycles=5, run_dir="runs/bliss", seed=0, init="continual",
        phases=[Generate(prompts="prompts.jsonl", n=256), FitDPO(beta=0.1)], first=[FitSFT(data="seed.jsonl")],
        trainer={"devices": 1, "precision": "bf16-mixed"},
    )  # fmt: skip
    assert list(one.plan(0)) == ["seed", "mix", "fit-sft"]
    assert list(one.plan(4)) == ["generate", "mix", "fit-dpo"]
    assert one.plan(0)["seed"].rejected_from is None
    assert one.plan(4)["generate"].rejected_from == "base"
    assert one.config()["trainer"] == {"devices": 1, "precision": "bf16-mixed"}
