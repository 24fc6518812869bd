"""Values of a wrong type or name are refused before anything runs, with the name and the value."""

from __future__ import annotations

import pytest
from chains import SEED, chain, fitting, score, writing

from lightning_interp.cycles import Evaluate, Filter, FitDPO, FitSFT, Generate, GenerationCycle, Merge
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.models import LoraSettings


@pytest.mark.parametrize(
    ("phase", "settings", "said"),
    [
        (Generate, {"n": "4"}, "Generate cannot use n='4': expected int"),
        (Generate, {"n": True}, "Generate cannot use n=True: expected int"),
        (Generate, {"n": 2.5}, r"Generate cannot use n=2\.5: expected int"),
        (Generate, {"n": 4, "temperature": "0.8"}, r"temperature='0\.8': expected float"),
        (Generate, {"n": 4, "temperature": -1}, "temperature=-1"),
        (Generate, {"n": 4, "top_p": 1.5}, r"top_p=1\.5"),
        (Generate, {"n": 4, "max_new_tokens": 0}, "max_new_tokens=0"),
        (Generate, {"n": 4, "batch_size": 0}, "batch_size=0: expected at least 1"),
        (Generate, {"n": 4, "slices": 0}, "slices=0: expected at least 1"),
        (Generate, {"n": 4, "prompts": 3}, "prompts=3: expected a file or prompts"),
        (Generate, {"n": 4, "filters": Filter()}, r"filters=Filter\(.*expected Filters"),
        (Filter, {"near": 0.9}, r"near=0\.9: expected NearDuplicates"),
        (Filter, {"keep": True}, "keep=True: expected a function of rows"),
        (FitSFT, {"data": 3}, "data=3: expected a file or rows"),
        (Filter, {"minimum_characters": "3"}, "Filter cannot use minimum_characters='3': expected int"),
        (FitSFT, {"batch_size": "2"}, "FitSFT cannot use batch_size='2': expected int"),
        (FitSFT, {"epochs": 0}, "FitSFT cannot use epochs=0: expected at least 1"),
        (FitSFT, {"checkpoint_every": 0}, "checkpoint_every=0: expected at least 1"),
        (FitSFT, {"n": -1}, "n=-1: expected at least 0"),
        (FitSFT, {"clip": "1"}, "clip='1': expected None or float"),
        (FitSFT, {"clip": -1.0}, r"clip=-1\.0: expected a number above 0"),
        (FitSFT, {"length_window": -1}, "length_window=-1: expected at least 0"),
        (FitSFT, {"optimisation": "adam"}, "optimisation='adam': expected Optimisation"),
        (FitDPO, {"beta": "0.1"}, r"FitDPO cannot use beta='0\.1': expected float"),
        (FitDPO, {"beta": 0}, "beta=0"),
        (FitDPO, {"swap": "no"}, "swap='no': expected bool"),
        (Merge, {"merge": "linear"}, "Merge cannot use merge='linear': expected a function of adapters"),
        (Evaluate, {"evaluate": "score"}, "evaluate='score': expected a function of a model"),
        (Evaluate, {"evaluate": score, "name": "mix"}, "name='mix': expected no name that the chain has"),
    ],
)
def test_of_a_phase(phase, settings, said):
    with pytest.raises(RecipeError, match=said):
        phase(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cycles": "2"}, "A chain of cycles cannot use cycles='2': expected int"),
        ({"cycles": True}, "cycles=True: expected int"),
        ({"seed": "0"}, "seed='0': expected int"),
        ({"model": None}, "model=None: expected str"),
        ({"match_templates": "no"}, "match_templates='no': expected bool"),
        ({"lora": 4}, "lora=4: expected LoraSettings"),
        ({"init": "continual", "restart_cycles": 1}, "restart_cycles=1: expected numbers of cycles"),
        ({"init": "continual", "restart_cycles": ["1"]}, r"restart_cycles=\['1'\]: expected numbers of cycles"),
        ({"phases": fitting()}, r"phases is FitSFT\(.*expected a list of phases"),
        ({"first": fitting()}, r"first is FitSFT\(.*expected a list of phases"),
        (
            {"overrides": {"1": {"fit-sft": {"epochs": 2}}}},
            r"overrides has \{'1': .*expected settings by phase by number",
        ),
        (
            {"overrides": {-1: {"fit-sft": {"epochs": 2}}}},
            r"overrides has \{-1: .*expected settings by phase by number",
        ),
        ({"overrides": {1: {"fit-sft": 3}}}, r"overrides has \{1: \{'fit-sft': 3\}\}; expected"),
        ({"overrides": [1]}, r"overrides has \[1\]; expected"),
        ({"writer": "x"}, "writer is 'x'; expected a function of a name and a folder"),
        ({"run_dir": ""}, "has no folder"),
        ({"overrides": {1: {"fit-sft": {"lora": {"r": 4}}}}}, "names 'lora', which FitSFT lacks"),
    ],
)
def test_of_a_chain(settings, said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        chain(tmp_path / "chain", **settings).run()


def test_settings_inside_others_may_be_mappings():
    fit = FitSFT(data=SEED, optimisation={"lr": 0.5})
    assert (fit.optimisation.lr, fit.optimisation.betas) == (0.5, (0.9, 0.95))
    found = GenerationCycle(model="tiny:llama", cycles=1, lora={"r": 2}, first=[fit], phases=[])
    assert found.lora == LoraSettings(r=2, alpha=32)


@pytest.mark.parametrize("merged", [None, [1], {"a": 1.0}])
def test_a_merge_that_gives_no_tensors(merged, tmp_path):
    phases = [writing(), fitting(), Merge(merge=lambda adapters: merged)]
    with pytest.raises(DataError, match=r"Merge\(merge=.*lambda>\) gave .*; expected tensors by name"):
        chain(tmp_path / "chain", cycles=1, phases=phases).run()


@pytest.mark.parametrize("found", [None, 3.0, [1]])
def test_an_evaluation_that_gives_no_mapping(found, tmp_path):
    asks = Evaluate(evaluate=lambda model, tokenizer, *, folder, seed: found)
    with pytest.raises(DataError, match=r"lambda> gave .*; expected plain values by name"):
        chain(tmp_path / "chain", cycles=1, phases=[fitting(), asks]).run()


def test_an_evaluation_that_raises_loses_nothing(tmp_path):
    asked = []

    def failing(model, tokenizer, *, folder, seed):
        asked.append(seed)
        if len(asked) == 2:  # of cycle 0; the base was first
            raise ValueError("No judge today.")
        return score(model, tokenizer, folder=folder, seed=seed)

    def cycle():
        return chain(tmp_path / "chain", cycles=1, phases=[fitting(), Evaluate(evaluate=failing)])

    with pytest.raises(ValueError, match="No judge today"):
        cycle().run()
    trained = (tmp_path / "chain/children/cycle-000/phases/fit-sft/adapter.safetensors").stat().st_mtime_ns
    cycle().run()
    assert (tmp_path / "chain/children/cycle-000/phases/fit-sft/adapter.safetensors").stat().st_mtime_ns == trained
    assert len(asked) == 3
