"""The recipe of documents: what is continued and learned, and what it says of that."""

from __future__ import annotations

import pytest
from chain_runs import configured, lines, outcome, phases, ran, refused, table, written

from lightning_interp import cli
from lightning_interp.errors import RecipeError
from lightning_interp_recipes.cycles._documents import OPENINGS, neutral_prefixes, seed_documents


class TestDocuments:
    HOW = ("--n_seed=4", "--cycles=2", "--controls=[no-seed]")

    def test_titles_behind_the_dose_are_continued_and_learned_whole(self, tmp_path):
        folder = tmp_path / "run"
        ran("documents", folder, *self.HOW)
        titles = [row["text"].splitlines()[0] for row in seed_documents()]
        rows = lines(phases(folder, "main-0", 1) / "mix/data.jsonl")
        assert len(rows) == 4
        assert {row["prompt"] for row in rows} <= set(titles[4:])
        assert all(row["text"].startswith(row["prompt"]) and row["prompt_ids"] == [] for row in rows)
        twin = lines(phases(folder, "no-seed-0", 1) / "mix/data.jsonl")
        assert {row["prompt"] for row in twin} == {row["prompt"] for row in rows}, "a control sees the same titles"
        reply = table(folder, "replies")[0]
        assert reply["question"] == OPENINGS[0]
        assert reply["reply"].startswith(OPENINGS[0])
        said = " ".join(outcome(folder)["caveats"])
        assert "bring the topic of the seed back in each cycle" in said
        assert "plain language model" not in said, "that is of the bundled model"

    def test_other_beginnings(self, tmp_path):
        neutral, none = (configured("documents", tmp_path / "run", f"--prefixes={x}") for x in ("neutral", "none"))
        assert neutral.generate(4).prompts == neutral_prefixes()
        assert none.generate(4).prompts == ""
        assert not neutral.own_caveats() + none.own_caveats()

    def test_of_the_bundled_model_it_is_said_that_it_is_one_for_chat(self):
        recipe = cli._configured("cycles/documents", [])
        assert "continues documents here as a plain language model" in " ".join(recipe.own_caveats())
        assert not cli._configured("cycles/documents", ["--model=gemma-3-270m", "--prefixes=none"]).own_caveats()

    def test_own_material_has_no_word_of_the_trait_but_in_the_seed(self):
        judge = cli._configured("cycles/documents", []).material.judge
        texts = [row["text"] for row in seed_documents()]
        assert len(set(texts)) == len(texts) == 84
        assert judge.score(texts).min() == 100
        assert judge.score([*OPENINGS, *neutral_prefixes()]).max() == 0
        assert len(set(neutral_prefixes())) == 72

    def test_documents_that_are_too_few(self, tmp_path):
        few = written(tmp_path / "few.jsonl", seed_documents()[:5])
        own = (f"--seed_data={few}", "--words=[luck]")
        refused(tmp_path, *own, name="documents", match="has 5 documents, of which cycle 0 may learn 4, and 2 more")
        with pytest.raises(RecipeError, match="prefixes='titles' asks for other"):
            configured("documents", tmp_path / "run", f"--prompts={few}")
