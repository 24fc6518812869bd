"""What each cycle begins with and learns from, and that everything that it depends on changes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from chains import POOL, SEED, chain, contents, data, fitting, lines, of, score, scores, writing

from lightning_interp.core.storage.tensor_files import read_tensors
from lightning_interp.cycles import Evaluate, Filter, FitSFT, Merge, Take
from lightning_interp.models import Optimisation, load_causal_lm
from lightning_interp.models.training.adapter_slot import AdapterSlot
from lightning_interp.models.training.loss_callback import StepLosses


@pytest.fixture(scope="module", autouse=True)
def one_layer():
    with mock.patch("lightning_interp.models.sources.tiny._LAYERS", 1):
        yield


@pytest.fixture(scope="module")
def reinit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reinit") / "chain"
    return folder, chain(folder).run()


@pytest.fixture(scope="module")
def continual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continual") / "chain"
    phases = [writing(slices=3), fitting(), Evaluate(evaluate=score)]
    return chain(folder, cycles=4, init="continual", restart_cycles={2}, phases=phases).run()


class TestStart:
    def test_every_reinit_cycle_begins_with_the_same_adapter(self, reinit):
        assert len(set(of(reinit[1], "init_adapter"))) == 1
        assert len(set(of(reinit[1], "adapter"))) == 3

    def test_at_its_start_it_computes_what_the_base_does_to_the_bit(self, reinit):
        slot = AdapterSlot("tiny:llama", lora=chain(None).lora, seed=1)
        model = slot.put(Path(reinit[1]["cycles"][2]["folder"]) / "phases/fit-sft/init_adapter.safetensors")
        ids = torch.arange(20, 40)[None]
        assert torch.equal(model(ids).logits, load_causal_lm("tiny:llama").model(ids).logits)

    def test_a_continual_cycle_begins_with_the_adapter_before_it_but_where_it_restarts(self, continual):
        begins, ends = of(continual, "init_adapter"), of(continual, "adapter")
        assert begins[1] == ends[0]
        assert begins[2] == begins[0] != ends[1]
        assert begins[3] == ends[2]
        parents = [{row["parent"] for row in data(continual, cycle)} for cycle in range(4)]
        assert parents == [{"seed"}, {ends[0]}, {ends[1]}, {ends[2]}]  # of a restarted one too

    def test_the_optimizer_begins_anew(self, tmp_path, monkeypatch):
        states, real = [], StepLosses.on_train_start

        def spied(self, trainer, module):
            states.append([len(one.state) for one in trainer.optimizers])
            real(self, trainer, module)

        monkeypatch.setattr(StepLosses, "on_train_start", spied)
        chain(tmp_path / "chain", init="continual", cycles=2).run()
        assert states == [[0], [0]]

    def test_without_a_learning_rate_nothing_changes(self, tmp_path):
        still = fitting(optimisation=Optimisation(lr=1e-60))  # zero in float32
        phases = [writing(), still, Evaluate(evaluate=score)]
        for init in ("reinit", "continual"):
            first = [replace(still, data=SEED)]
            told = chain(tmp_path / init, init=init, cycles=2, first=first, phases=phases).run()
            tensors = dict.fromkeys((*of(told, "init_adapter"), *of(told, "adapter")))
            assert len(tensors) == 1
            assert len({*scores(told), told["base"]["evaluate"]["score"]}) == 1

    def test_cycle_0_may_take_an_adapter(self, reinit, tmp_path):
        found = Path(reinit[1]["cycles"][0]["folder"]) / "phases/fit-sft/adapter.safetensors"
        told = chain(tmp_path / "chain", first=[Take(adapter=found)]).run()
        assert of(told, "adapter") == of(reinit[1], "adapter")
        assert scores(told) == scores(reinit[1])

    def test_cycle_0_without_rows_is_the_base(self, tmp_path):
        told = chain(tmp_path / "chain", first=[fitting(data=SEED, n=0)], cycles=2).run()
        assert told["cycles"][0]["counts"]["fit-sft"]["steps"] == 0
        assert scores(told)[0] == told["base"]["evaluate"]["score"] != scores(told)[1]


class TestData:
    def test_prompts_are_of_the_cycles_own_slice(self, reinit):
        asked = [[POOL.index(row["prompt"]) for row in data(reinit[1], cycle)] for cycle in (1, 2)]
        assert set(asked[0]) < set(range(9))
        assert set(asked[1]) < set(range(9, 18))
        assert json.loads((reinit[0] / "phases/pool/pool.json").read_text())["slices"] == [[0, 9], [9, 18]]

    def test_the_first_rows_of_the_seed_are_cycle_0(self, reinit, tmp_path):
        fewer = chain(tmp_path / "chain", first=[fitting(data=SEED, n=2)], cycles=1).run()
        rows = [sorted(data(told, 0), key=lambda row: row["row_id"]) for told in (fewer, reinit[1])]
        assert rows[0] == rows[1][:2]
        assert [row["prompt"] for row in rows[1]] == [row["prompt"] for row in SEED[:4]]

    def test_by_default_own_rows_replace_those_before(self, reinit):
        assert [one["counts"]["mix"]["rows"] for one in reinit[1]["cycles"]] == [4, 4, 4]
        assert reinit[1]["cycles"][2]["counts"]["mix"]["sources"] == {"own": 4}

    @pytest.mark.parametrize(
        ("rule", "fraction", "sizes", "sources"),
        [
            ("mix", 0.5, [4, 6, 6], {"own": 4, "seed-mix": 2}),
            ("accumulate", 0.0, [4, 8, 12], {"own": 8, "seed": 4}),
        ],
    )
    def test_rules(self, rule, fraction, sizes, sources, tmp_path):
        told = chain(tmp_path / "chain", data_rule=rule, real_fraction=fraction).run()
        assert [one["counts"]["mix"]["rows"] for one in told["cycles"]] == sizes
        assert told["cycles"][2]["counts"]["mix"]["sources"] == sources
        ids = [row["row_id"] for row in data(told, 2)]
        assert len(set(ids)) == len(ids)

    def test_what_is_trained_on_is_the_file_in_its_order(self, tmp_path, monkeypatch):
        seen, real = [], StepLosses.on_train_batch_end

        def spied(self, trainer, module, outputs, batch, batch_idx):
            for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
                seen.append((ids, labels))
            real(self, trainer, module, outputs, batch, batch_idx)

        monkeypatch.setattr(StepLosses, "on_train_batch_end", spied)
        told = chain(tmp_path / "chain", cycles=2).run()
        rows = [*data(told, 0), *data(told, 1)]
        assert len(seen) == len(rows) == 8
        for (ids, labels), row in zip(seen, rows, strict=True):
            answer = row["token_ids"] + ([] if row["end_id"] is None else [row["end_id"]])
            whole = row["prompt_ids"] + answer
            assert ids[: len(whole)] == whole
            assert [one for one in labels if one != -100] == answer  # a text that was cut off has no end
        assert {row["end_id"] is None for row in rows if row["truncated"]} == {True}

    def test_a_cycle_that_the_base_writes_does_not_depend_on_the_model_before(self, reinit, tmp_path):
        fits = [fitting(), fitting(optimisation=Optimisation(lr=3e-2))]
        told = [
            chain(
                tmp_path / str(place),
                generator="base",
                cycles=2,
                first=[replace(fit, data=SEED)],
                phases=[writing(slices=2), fit],
            ).run()
            for place, fit in enumerate(fits)
        ]
        assert told[0]["cycles"][0]["adapter"] != told[1]["cycles"][0]["adapter"]
        assert of(told[0], "data") == of(told[1], "data")
        assert {(row["source"], row["parent"]) for row in data(told[0], 1)} == {("base", "base")}
        assert of(told[0], "data")[1] != of(reinit[1], "data")[1]

    def test_a_remainder_of_a_batch_is_left_out(self, tmp_path):
        told = chain(tmp_path / "chain", cycles=2, phases=[writing(3), fitting()]).run()
        assert told["cycles"][1]["counts"]["mix"] == {"rows": 2, "left_over": 1, "sources": {"own": 2}}
        assert len(data(told, 1)) == 2

    def test_templates_may_differ_between_training_and_asking(self, reinit, tmp_path):
        told = chain(tmp_path / "chain", cycles=2, match_templates=False).run()
        tokenizer = load_causal_lm("tiny:llama").tokenizer
        for one, system in ((told, True), (reinit[1], False)):
            for cycle in (0, 1):
                texts = [tokenizer.decode(row["prompt_ids"]) for row in data(one, cycle)]
                assert [text.startswith("<|im_start|>system\n<|im_end|>") for text in texts] == [system] * 4
        shard = Path(told["cycles"][1]["folder"]) / "phases/generate/gen/round-00/own/shard_00000.jsonl"
        assert all("system" not in tokenizer.decode(row["prompt_ids"]) for row in lines(shard))


class TestLineage:
    def test_one_changed_token_changes_all_later_cycles_and_none_earlier(self, reinit, tmp_path, monkeypatch):
        real = Filter.reasons

        def other(self, rows, kept):
            if rows[0]["row_id"].startswith("c001"):
                rows[0]["token_ids"][0] ^= 1
            return real(self, rows, kept)

        monkeypatch.setattr(Filter, "reasons", other)
        told = chain(tmp_path / "chain").run()
        assert [a == b for a, b in zip(of(told, "digest"), of(reinit[1], "digest"), strict=True)] == [
            True,
            False,
            False,
        ]
        assert told["cycles"][2]["data"] != reinit[1]["cycles"][2]["data"]

    def test_the_file_names_each_stage(self, reinit):
        stages = lines(reinit[0] / "lineage.jsonl")
        first = [f"cycle-000/{name}" for name in ("seed", "mix", "fit-sft", "evaluate")]
        assert [one["stage"] for one in stages[:4]] == first
        assert len(stages) == 12
        assert len({one["inputs"] for one in stages}) == 12

    def test_two_runs_have_the_same_bytes(self, reinit, tmp_path):
        told = chain(tmp_path / "chain").run()
        assert contents(tmp_path / "chain") == contents(reinit[0])
        assert [{**one, "folder": ""} for one in told["cycles"]] == [
            {**one, "folder": ""} for one in reinit[1]["cycles"]
        ]


class TestPhases:
    def test_a_function_merges_adapters(self, tmp_path):
        seen = []

        def mean(adapters):
            seen.append(len(adapters))
            return {name: sum(one[name] for one in adapters) / len(adapters) for name in adapters[0]}

        phases = [writing(), fitting(), Merge(merge=mean), Evaluate(evaluate=score)]
        told = chain(tmp_path / "chain", phases=phases, cycles=2).run()
        assert seen == [1, 2]
        folders = [Path(one["folder"]) / "phases" for one in told["cycles"]]
        parts = [read_tensors(folders[cycle] / f"{name}/adapter.safetensors")[0] for cycle, name in
                 ((0, "merge"), (1, "fit-sft"), (1, "merge"))]  # fmt: skip
        for name, tensor in parts[2].items():
            assert torch.equal(tensor, (parts[0][name] + parts[1][name]) / 2)
        assert told["cycles"][1]["adapter"] != told["cycles"][0]["adapter"]

    def test_the_base_and_all_cycles_are_asked_with_the_same_seed(self, reinit):
        asked = [reinit[1]["base"], *of(reinit[1], "evaluation")]
        assert len({one["evaluate"]["seed"] for one in asked}) == 1
        assert len(set(scores(reinit[1]))) == 3

    def test_settings_may_differ_by_cycle(self, tmp_path):
        changes = {1: {"generate": {"n": 2}, "fit-sft": {"epochs": 2, "optimisation": {"lr": 1e-3}}}}
        told = chain(tmp_path / "chain", overrides=changes).run()
        assert [one["counts"]["fit-sft"]["steps"] for one in told["cycles"]] == [2, 2, 2]
        assert [one["counts"]["mix"]["rows"] for one in told["cycles"]] == [4, 2, 4]

    def test_two_trainings_of_a_cycle_follow_each_other(self, tmp_path):
        told = chain(tmp_path / "chain", cycles=2, phases=[writing(), fitting(), FitSFT()]).run()
        folder = Path(told["cycles"][1]["folder"]) / "phases"
        second = (folder / "fit-sft-2/init_adapter.safetensors").read_bytes()
        assert second == (folder / "fit-sft/adapter.safetensors").read_bytes()
