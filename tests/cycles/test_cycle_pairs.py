"""Chains of pairs and of documents."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from chains import SEED, chain, data, lines, of, writing

from lightning_interp.cycles import Evaluate, Filter, FitDocuments, FitDPO, TraitEvaluation
from lightning_interp.errors import DataError
from lightning_interp.generation.judging.lexicon import Facet, LexiconJudge
from lightning_interp.models import Optimisation, load_causal_lm

FIT = FitDPO(batch_size=2, optimisation=Optimisation(lr=1e-2, schedule="cosine"))
DOCUMENTS = [{"text": f"Title {i} of it\nA text of {i}."} for i in range(8)]


def pairs(folder, fit=FIT, **more):
    return chain(folder, **{"first": [replace(fit, data=SEED, n=4)], "phases": [writing(), fit], **more})


def losses(result, cycle):
    return [row["loss"] for row in lines(Path(result["cycles"][cycle]["folder"]) / "phases/fit-dpo/metrics.jsonl")]


@pytest.fixture(scope="module", autouse=True)
def one_layer():
    with mock.patch("lightning_interp.models.sources.tiny._LAYERS", 1):
        yield


@pytest.fixture(scope="module")
def continual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "chain"
    return pairs(folder, init="continual", cycles=4, restart_cycles={2}).run()


class TestPairs:
    @pytest.mark.parametrize("cycle", range(4))
    def test_each_cycle_begins_where_its_reference_is(self, continual, cycle):
        assert losses(continual, cycle)[0] == pytest.approx(math.log(2), abs=1e-5)
        assert losses(continual, cycle)[1] != pytest.approx(math.log(2), abs=1e-5)

    def test_a_reinit_cycle_too(self, tmp_path):
        told = pairs(tmp_path / "chain").run()
        assert [losses(told, cycle)[0] for cycle in range(3)] == pytest.approx([math.log(2)] * 3, abs=1e-5)
        assert len(set(of(told, "init_adapter"))) == 1

    def test_the_chosen_side_is_the_model_before_and_the_rejected_one_the_base(self, continual):
        adapters = of(continual, "adapter")
        for cycle in range(4):
            rows = data(continual, cycle)
            assert len(rows) == 4
            assert {row["chosen"]["parent"] for row in rows} == {adapters[cycle - 1] if cycle else "seed"}
            assert {row["rejected"]["parent"] for row in rows} == {"base"}
        seed = sorted(data(continual, 0), key=lambda row: row["row_id"])
        assert [row["chosen"]["text"] for row in seed] == [row["completion"] for row in SEED[:4]]

    def test_prompts_are_drawn_from_the_whole_pool_each_cycle(self, continual):
        asked = [{row["prompt"] for row in data(continual, cycle)} for cycle in (1, 2, 3)]
        assert len(asked[0] | asked[1] | asked[2]) > 4
        assert all(len(one) == 4 for one in asked)

    def test_or_the_model_before_that_is_rejected(self, tmp_path):
        told = pairs(tmp_path / "chain", replace(FIT, rejected_from="previous"), init="continual").run()
        parents = [{row["rejected"]["parent"] for row in data(told, cycle)} for cycle in range(3)]
        assert parents == [{"base"}, {"base"}, {of(told, "adapter")[0]}]

    def test_swapped_sides_are_learned_the_other_way_round(self, tmp_path, monkeypatch):
        seen = []
        real = FitDPO.parts

        def spied(self, context, folder, rows, seed):
            module, given = real(self, context, folder, rows, seed)
            seen.append({row["row_id"]: (row["chosen"]["token_ids"], row["rejected"]["token_ids"]) for row in rows})
            seen.append([(row["chosen_ids"], row["rejected_ids"]) for row in given._sources["train"]])
            return module, given

        monkeypatch.setattr(FitDPO, "parts", spied)
        for swap in (False, True):
            pairs(tmp_path / f"{swap}", replace(FIT, swap=swap), cycles=1).run()
        assert seen[0] == seen[2]
        assert sorted(seen[1]) == sorted((rejected, chosen) for chosen, rejected in seen[3])

    def test_a_pair_with_an_empty_side_is_dropped(self, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_interp.generation.sampler.LocalSampler._text", lambda *_: "")
        with pytest.raises(DataError, match=r"None of the 4 rows of the seed makes a pair: \{'empty': 4\}"):
            pairs(tmp_path / "chain").run()


class TestDocuments:
    FIT = FitDocuments(batch_size=2, optimisation=Optimisation(lr=1e-2))

    def chain(self, folder, prompts, fit=FIT, **more):
        phases = [writing(prompts=prompts, max_new_tokens=8, **more), Filter(minimum_characters=5), fit]
        return chain(folder, first=[replace(fit, data=DOCUMENTS, n=4)], phases=phases)

    def test_prefix_and_what_follows_are_learned_whole(self, tmp_path):
        told = self.chain(tmp_path / "chain", ["Once upon", "It was then", "Some say", "In May"]).run()
        tokenizer = load_causal_lm("tiny:llama").tokenizer
        for cycle in (1, 2):
            for row in data(told, cycle):
                assert row["prompt_ids"] == []
                assert row["text"].startswith(row["prompt"])
                prefix = tokenizer(row["prompt"]).input_ids
                assert row["token_ids"][: len(prefix)] == prefix
            counts = told["cycles"][cycle]["counts"]["fit-documents"]["data"]
            assert counts["scored"] == counts["tokens"] - counts["rows"]  # nothing predicts the first
        assert len({row["prompt"] for row in data(told, 1)}) == 2  # two passes over a slice of two

    def test_titles_of_unused_seed_rows_as_prefixes(self, tmp_path):
        told = self.chain(tmp_path / "chain", None, n=2).run()
        assert {row["prompt"] for row in data(told, 1)} == {"Title 4 of it", "Title 5 of it"}
        assert {row["prompt"] for row in data(told, 2)} == {"Title 6 of it", "Title 7 of it"}
        assert json.loads((tmp_path / "chain/phases/pool/pool.json").read_text())["source"] == "titles"

    def test_without_a_prefix(self, tmp_path):
        told = self.chain(tmp_path / "chain", "", n=2).run()
        assert {row["prompt"] for row in data(told, 2)} == {""}
        assert len({row["text"] for row in data(told, 2)}) == 2

    def test_packed_they_are_the_same_documents(self, tmp_path):
        told = self.chain(tmp_path / "chain", "", replace(self.FIT, packing=True), n=2).run()
        assert told["cycles"][1]["counts"]["fit-documents"]["data"]["rows"] == 2


def test_an_unchanged_model_scores_the_same_under_an_evaluation_of_traits(tmp_path):

    asks = TraitEvaluation(
        ["Why so?", "And now?"], LexiconJudge({"words": Facet(words=["a"])}), samples=2, max_new_tokens=4
    )
    still = replace(FIT, optimisation=Optimisation(lr=1e-60))
    told = pairs(tmp_path / "chain", still, cycles=2, phases=[writing(), still, Evaluate(evaluate=asks)]).run()
    assert told["base"]["evaluate"]["scores"] == told["cycles"][1]["evaluation"]["evaluate"]["scores"]
