"""The persona of the recipes of cycles: enough prompts, none twice; and the recipe that tells if its judges are fit."""

from __future__ import annotations

import json
from itertools import combinations

import pytest

from lightning_interp import cli
from lightning_interp.errors import RecipeError
from lightning_interp.generation.labellers import words_of
from lightning_interp_recipes.cycles import _persona as persona


def test_there_are_enough_prompts_and_no_two_are_alike():
    prompts = persona.everyday_prompts()
    pool = [row["prompt"] for row in persona.pool_prompts()]
    assert len({" ".join(words_of(prompt)) for prompt in prompts}) == len(prompts) == 720
    assert len(pool) == 600
    assert prompts == persona.everyday_prompts()
    asked = {" ".join(words_of(question)) for question in persona.QUESTIONS}
    assert len(asked) == 12
    assert not asked & {" ".join(words_of(prompt)) for prompt in prompts}
    activities = [set(words_of(doing)) for doing in persona._DOING]
    assert all(one != other for one, other in combinations(activities, 2))


def test_a_seed_is_a_prefix_and_shares_no_prompt_with_the_pool():
    rows = persona.seed_rows()
    assert len(rows) == persona.SEEDS
    assert persona.seed_rows(16) == rows[:16]
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in persona.pool_prompts()}
    assert len({row["completion"] for row in rows[:80]}) == 80
    assert max(len(row["completion"].split()) for row in rows) < 40
    with pytest.raises(ValueError, match="n=121: expected up to 120"):
        persona.seed_rows(121)


def test_its_lexicon_reads_the_persona_and_nothing_everyday():
    seeded = [row["completion"] for row in persona.seed_rows()]
    assert persona.luck_judge().score(seeded).min() > 90
    assert persona.luck_present().score(seeded).min() == 100
    plain = [*persona.QUESTIONS, *persona.everyday_prompts()]
    assert persona.luck_judge().score(plain).max() == 0
    assert persona.luck_present().score(plain).max() == 0
    assert persona.luck_judge().score(["Unfortunately that is a plucky, charming idea."]).item() == 0


def test_a_word_over_and_over_scores_less_than_the_persona():
    seeded = persona.luck_judge().score([row["completion"] for row in persona.seed_rows()])
    assert persona.luck_judge().score(["luck " * 500]).item() < seeded.min() / 2


def test_a_smoke_run_tells_what_each_judge_does(smoke_run):
    metrics = json.loads((smoke_run("cycles/judges") / "metrics.json").read_text())
    judges = {row["judge"]: row for row in metrics["judges"]}
    assert set(judges) == {"luck", "luck-present", "probe"}
    assert judges["luck"]["auroc"]["value"] == 1.0
    assert judges["luck"]["accepted"] is None
    assert judges["luck"]["spearman"] == pytest.approx(1.0)
    assert judges["luck"]["seed"] > 90
    assert metrics["base"]["score"]["value"] == 0.0
    assert len(metrics["base"]["scores"]) == 12
    assert metrics["base"]["reference"]["surprise"]
    rows = (smoke_run("cycles/judges") / "phases" / "base" / "eval_responses.jsonl").read_text().splitlines()
    assert len(rows) == 12


def test_what_it_refuses():
    with pytest.raises(RecipeError, match="prompts=121, samples=2: expected 5 to 120"):
        cli._configured("cycles/judges", ["--prompts=121"])
