"""Steering recipes: their numbers against direct calls, resuming, and settings that cannot be used."""

from __future__ import annotations

import csv
import json
import math
import re
from typing import get_args

import pytest
import torch

from lightning_interp import cli, load_causal_lm
from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.steering import SoftmaxGeometry, dual_steer
from lightning_interp.steering.concepts.vocabulary import PairKind
from lightning_interp_recipes.steering import _calibrate as calibrate
from lightning_interp_recipes.steering._calibrate import chosen_strength, shortfall, strength_effects, summarised
from lightning_interp_recipes.steering._common import (
    concept_direction,
    concept_pairs,
    concept_term,
    differs,
    read_texts,
    sample_texts,
)
from lightning_interp_recipes.steering._dual_vs_euclidean import sides_of_texts, steered_paths
from lightning_interp_recipes.steering._generate import PROMPTS, generation_figure, measured_generation

MODEL = "tiny:llama"


@pytest.fixture(scope="module")
def loaded():
    found = load_causal_lm(MODEL)
    found.tokenizer.padding_side = "left"
    return found


@pytest.fixture(scope="module")
def world(loaded):
    pairs = concept_pairs(loaded.tokenizer, "letters")
    return SoftmaxGeometry.from_model(loaded.model), pairs, concept_direction(loaded.model, pairs)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_sampled_texts_belong_to_the_seed(loaded):
    state = torch.get_rng_state()
    first = sample_texts(loaded.model, loaded.tokenizer, count=3, length=5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == sample_texts(loaded.model, loaded.tokenizer, count=3, length=5, seed=1)
    assert first != sample_texts(loaded.model, loaded.tokenizer, count=3, length=5, seed=2)


def test_contexts_are_those_that_the_rule_names(loaded, world):
    geometry, pairs, _ = world
    texts = ["The cat sat", "A DOG RAN"]
    base, target, seen = sides_of_texts(loaded.model, loaded.tokenizer, texts, pairs, geometry, top=1, mass=0.0)
    expected = ([], [])
    for text in texts:
        ids = loaded.tokenizer([text], return_tensors="pt").input_ids
        with torch.no_grad():
            out = loaded.model(ids, output_hidden_states=True)
        for state, logits in zip(out.hidden_states[-1][0], out.logits[0], strict=True):
            for side, tokens in zip(expected, (pairs.base_ids, pairs.target_ids), strict=True):
                if int(logits.argmax()) in tokens.tolist():
                    side.append(state)
    assert seen == sum(len(loaded.tokenizer(text).input_ids) for text in texts)
    for found, wanted in zip((base, target), expected, strict=True):
        assert len(found) == len(wanted)
        if wanted:
            torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=1e-5)


def test_paths_are_those_of_direct_solves(world):
    geometry, pairs, direction = world
    starts = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    result, reached = steered_paths(geometry, pairs, starts, {"mean": direction}, [0.6, 0.9], alpha=0.5)
    assert reached["euclidean mean"] == 1.0
    for row in range(3):
        found = dual_steer(geometry, starts[row], direction, target_prob=0.9, pairs=pairs, alpha=0.5)
        kl = result.paths["dual mean"][row]["total_kl"]
        if bool(found.reached):
            assert float(kl[-1]) == pytest.approx(float(found.kl), rel=0.05)
        oracle = result.paths["oracle"][row]
        assert oracle["off_target_kl"].abs().max() < 1e-6
        torch.testing.assert_close(oracle["target_prob"][1:], torch.tensor([0.6, 0.9]).double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["dual", "add"])
def test_a_sweep_is_one_strength_at_a_time(loaded, world, method):
    _, pairs, direction = world
    strengths = [0.0, 0.2, 0.8]
    together = strength_effects(
        loaded.model, loaded.tokenizer, ["The cat"], pairs, direction, strengths, method=method, layer=1
    )
    for row in together:
        (alone,) = strength_effects(
            loaded.model, loaded.tokenizer, ["The cat"], pairs, direction, [row["strength"]], method=method, layer=1
        )
        assert alone["target_prob"] == pytest.approx(row["target_prob"], rel=1e-3)
        assert alone["kl"] == pytest.approx(row["kl"], rel=5e-3, abs=1e-6)
    if method == "dual":
        assert [row["kl"] for row in together] == pytest.approx(strengths, rel=5e-3, abs=1e-6)


def test_the_choice_is_interpolated_or_the_nearest():
    rows = [
        {"strength": s, "target_prob": p, "pair_mass": 1.0, "kl": s} for s, p in ((0.0, 0.1), (1.0, 0.3), (2.0, 0.7))
    ]
    assert chosen_strength(rows, 0.5) == pytest.approx(1.5)
    assert chosen_strength(rows, 0.9) == 2.0
    assert [shortfall(rows, *found) for found in ((1.5, 0.5), (0.0, 0.1))] == ["", ""]
    assert re.search(
        r"No strength from 0 to 2 .* to 0.9; the nearest candidate, 2, gives 0.7", shortfall(rows, 2.0, 0.9)
    )
    assert [row["strength"] for row in summarised(rows)] == [0.0, 1.0, 2.0]
    with pytest.raises(RecipeError, match="got no rows"):
        chosen_strength([], 0.5)


def test_a_generation_is_the_models_own(loaded, world):
    _, pairs, _ = world
    rows = measured_generation(loaded.model, loaded.tokenizer, PROMPTS[:2], pairs, None, new_tokens=4)
    ids = loaded.tokenizer([PROMPTS[0]], return_tensors="pt").input_ids
    out = loaded.model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert rows[0]["text"] == loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    with torch.no_grad():
        loss = loaded.model(out).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    expected = float((-loss[range(4), out[0, -4:]].mean()).exp())
    assert rows[0]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_both_methods_spend_the_budget(smoke_run):
    folder = smoke_run("steering/generate")
    metrics = json.loads((folder / "metrics.json").read_text())
    for method in ("dual", "euclidean"):
        assert metrics["meters"][method]["kl"] == pytest.approx(0.3, rel=0.02)
        assert metrics["meters"][method]["tokens"] == 3 * len(PROMPTS)
    assert len(rows_of(folder / "tables/texts.csv")) == 3 * len(PROMPTS)


def test_a_stopped_run_goes_on_to_the_same_result(tmp_path, monkeypatch, smoke_run):
    whole, parts = smoke_run("steering/calibrate"), tmp_path / "parts"

    original = calibrate.chosen_strength

    def boom(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "chosen_strength", boom)
    assert cli.main(["run", "steering/calibrate", "--smoke=true", f"--run_dir={parts}"]) != 0
    monkeypatch.setattr(calibrate, "chosen_strength", original)
    assert cli.main(["run", "steering/calibrate", "--smoke=true", f"--run_dir={parts}"]) == 0
    assert (whole / "metrics.json").read_bytes() == (parts / "metrics.json").read_bytes()
    settings = json.loads((parts / "phases/sweep/calibrated.json").read_text())
    metrics = json.loads((parts / "metrics.json").read_text())
    assert (settings["strength"], settings["reached"]) == (metrics["strength"], metrics["reached"])


@pytest.mark.parametrize(
    ("name", "setting", "text"),
    [
        ("calibrate", "--wanted=1.5", "wanted=1.5"),
        ("calibrate", "--strengths=[0.5,1.0]", r"strengths=\[0.5, 1.0\]"),
        ("generate", "--kl_budget=-1", "kl_budget=-1"),
        ("dual_vs_euclidean", "--grid=[0.5,0.2]", r"grid=\[0.5, 0.2\]"),
        ("dual_vs_euclidean", "--match=1", "match=1"),
    ],
)
def test_settings_that_cannot_be_used(name, setting, text, tmp_path, capsys):
    assert cli.main(["run", f"steering/{name}", setting, f"--run_dir={tmp_path / 'run'}"]) != 0
    assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_files_that_cannot_be_read(loaded, tmp_path):
    with pytest.raises(DataError, match=r"missing\.json"):
        concept_pairs(loaded.tokenizer, str(tmp_path / "missing.json"))
    (tmp_path / "pairs.json").write_text(json.dumps({"a": "b", "c": "dd"}))
    assert concept_pairs(loaded.tokenizer, str(tmp_path / "pairs.json")).dropped == {"missing": 1}
    with pytest.raises(DataError, match=r"missing\.txt"):
        read_texts(str(tmp_path / "missing.txt"))
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"words": 1}\n')
    with pytest.raises(DataError, match=r"texts.jsonl, line 2: 'text' is None; expected a string"):
        read_texts(str(tmp_path / "texts.jsonl"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.txt holds no text"):
        read_texts(str(tmp_path / "empty.txt"))
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    assert read_texts(str(tmp_path / "texts.txt")) == ["one", "two"]


def test_too_few_contexts_are_an_error_with_the_counts(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("abc\n")
    arguments = ["--smoke=true", f"--texts={tmp_path / 'texts.txt'}", f"--run_dir={tmp_path / 'run'}"]
    assert cli.main(["run", "steering/dual_vs_euclidean", *arguments]) != 0
    assert "base and" in capsys.readouterr().err


def test_no_start_is_an_error(world):
    geometry, pairs, direction = world
    with pytest.raises(RecipeError, match="no state to start from"):
        steered_paths(geometry, pairs, torch.zeros(0, 32), {"mean": direction}, [0.5], alpha=0.5)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.3, "dual is higher"), (-0.3, -0.1, "dual is lower"), (-0.1, 0.3, "no difference is shown")],
)
def test_a_difference_is_said_to_be_one_only_beyond_its_interval(low, high, said):
    gap = Estimate((low + high) / 2, low, high, 9, 0.95, "bootstrap")
    assert differs(gap) == f"dual minus Euclidean: {gap}, {said}"


def test_a_concept_is_explained_by_its_two_sides():
    kinds = [*get_args(PairKind), "letters"]
    told = [concept_term(kind, 7)["concept"] for kind in kinds]
    assert all(
        text.startswith(f"{kind!r}, ") and text.endswith(": 7 pairs of tokens")
        for kind, text in zip(kinds, told, strict=True)
    )
    assert not any("target words" in text for text in told)  # that is said of a file


def test_a_measure_without_a_value_gets_no_panel():
    known, none = (Estimate(value, math.nan, math.nan, 3, 0.95, "bootstrap") for value in (0.5, math.nan))
    figure = generation_figure({"dual": {"pair_share": known, "repeated_4": none}})
    assert [axis.get_title() for axis in figure.axes] == ["pair share"]
