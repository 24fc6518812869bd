"""A chain goes on in its folder, and what is wrong with its data or folder is said, with nothing lost."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from chains import POOL, SEED, chain, contents, data, fitting, lines, of, score, scores, writing

from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.cycles import Evaluate, Filter, Generate, Merge
from lightning_interp.errors import DataError, ManifestError, RecipeError


def fast(folder, **more):
    """A chain without evaluations."""
    return chain(folder, **{"phases": [writing(slices=3), fitting()], **more})


@pytest.fixture(scope="module", autouse=True)
def one_layer():
    with mock.patch("lightning_interp.models.sources.tiny._LAYERS", 1):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "chain"
    return folder, fast(folder).run()


def test_stopped_between_cycles_it_goes_on_to_the_same_bytes(whole, tmp_path):
    folder = tmp_path / "chain"
    assert len(fast(folder).run(until=1)["cycles"]) == 1
    assert len(fast(folder, cycles=2).run()["cycles"]) == 2
    assert of(fast(folder).run(), "digest") == of(whole[1], "digest")
    assert contents(folder) == contents(whole[0])


def test_a_finished_chain_loads_nothing(whole, monkeypatch):
    monkeypatch.setattr("lightning_interp.models.training.adapter_slot.load_causal_lm", None)
    assert fast(whole[0]).run() == whole[1]


def test_more_cycles_than_slices_are_refused(whole):
    with pytest.raises(ManifestError, match="slices: 3 there, 4 now"):
        chain(whole[0], cycles=5, phases=[writing(), fitting()]).run()
    with pytest.raises(RecipeError, match=r"cycles=5: the pool is cut into 3 slices"):
        fast(whole[0], cycles=5).run()


def test_another_configuration_is_refused(whole):
    with pytest.raises(ManifestError, match=r"phases\.fit-sft\.epochs: 1 there, 2 now"):
        fast(whole[0], phases=[writing(slices=3), fitting(epochs=2)]).run()
    with pytest.raises(ManifestError, match=r"phases\.generate\.n: 4 there, 2 now"):
        fast(whole[0], overrides={1: {"generate": {"n": 2}}}).run()


def test_a_changed_file_is_noticed(tmp_path):
    folder = tmp_path / "chain"
    fast(folder, cycles=2).run()
    edited = folder / "children/cycle-000/phases/mix/data.jsonl"
    edited.write_bytes(edited.read_bytes().replace(b"Ho, 0.", b"Ho, 9."))
    with pytest.raises(ManifestError, match=r"data\.jsonl' of the finished phase 'mix' has changed"):
        fast(folder, cycles=2).run()


def test_what_follows_from_new_data_is_done_again_and_nothing_else(tmp_path):
    folder = tmp_path / "chain"
    before = fast(folder).run()
    rows = [*SEED[:3], {"prompt": "Hi 3?", "completion": "No."}]
    after = fast(folder, first=[fitting(data=rows, n=4)]).run()
    assert len(set(of(before, "adapter")) & set(of(after, "adapter"))) == 0
    prompts = [*POOL[:7], "Another?", *POOL[8:]]  # in the slice of cycle 2
    last = fast(folder, first=[fitting(data=rows, n=4)], phases=[writing(prompts=prompts, slices=3), fitting()]).run()
    assert [a == b for a, b in zip(of(last, "digest"), of(after, "digest"), strict=True)] == [True, True, False]


def test_inside_another_run_it_is_its_child(whole, tmp_path):
    bars, ended = [], []

    class Bar:
        def __init__(self, title, total):
            bars.append((title, total))
            self.title, self.done = title, 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            ended.append((self.title, self.done))

        def advance(self, steps=1):
            self.done += steps

    with RunManifest.open(tmp_path / "run", config={}, name="mine") as run:
        told = fast(None).run(run, key="arm", bar=Bar)
    assert of(told, "digest") == of(whole[1], "digest")
    assert contents(tmp_path / "run/children/arm") == contents(whole[0])
    assert bars[0] == ended[-1] == ("cycles", 3)
    assert sorted(bars) == sorted(ended)
    assert ("cycle 1: writing round-00/own", 4) in bars
    assert ("cycle 2: training fit-sft", 2.0) in bars


class TestShortfall:
    @staticmethod
    def dropping(*numbers):
        """Keeps all but some of a cycle's rows, by their numbers."""
        return Filter(keep=lambda rows: [int(row["row_id"][-5:]) not in numbers for row in rows])

    def run(self, folder, **more):
        filters = more.pop("filters")
        phases = [writing(**{"slices": 3, **more}), filters, fitting()]
        return chain(folder, cycles=2, phases=phases).run()

    def test_more_prompts_come_from_the_same_slice(self, tmp_path):
        told = self.run(tmp_path / "chain", filters=self.dropping(0, 4))
        counts = told["cycles"][1]["counts"]["generate"]
        assert (counts["asked"], counts["rows"], counts["dropped"]) == (6, 4, {"filter": 2})
        rows = data(told, 1)
        assert sorted(row["row_id"][-5:] for row in rows) == ["00001", "00002", "00003", "00005"]
        assert {POOL.index(row["prompt"]) for row in rows} < set(range(6))
        dropped = lines(Path(told["cycles"][1]["folder"]) / "phases/generate/dropped.jsonl")
        assert [(row["row_id"], row["reason"]) for row in dropped] == [
            ("c001-r00000", "filter"),
            ("c001-r00004", "filter"),
        ]

    def test_or_what_there_is_is_kept(self, tmp_path):
        told = self.run(tmp_path / "chain", filters=self.dropping(0, 1), shortfall="accept")
        assert told["cycles"][1]["counts"]["mix"]["rows"] == 2

    def test_or_it_fails(self, tmp_path):
        with pytest.raises(DataError, match=r"Cycle 1 kept 3 of 4 texts, and n=4: \{'filter': 1\}"):
            self.run(tmp_path / "chain", filters=self.dropping(0), shortfall="fail")

    def test_a_slice_that_is_used_up_is_said_and_what_was_written_is_kept(self, tmp_path):
        folder = tmp_path / "chain"
        with pytest.raises(DataError, match=r"Cycle 1 kept 3 of 6 texts.* its slice has 0 more prompts"):
            self.run(folder, filters=self.dropping(0, 1, 2))
        shard = folder / "children/cycle-001/phases/generate/gen/round-00/own/shard_00000.jsonl"
        before = shard.stat().st_mtime_ns
        with pytest.raises(DataError, match="Cycle 1 kept 3 of 6"):
            self.run(folder, filters=self.dropping(0, 1, 2))
        assert shard.stat().st_mtime_ns == before

    @pytest.mark.parametrize("shortfall", ["more", "accept"])
    def test_nothing_kept_is_said(self, shortfall, tmp_path):
        filters = Filter(minimum_characters=99)
        with pytest.raises(DataError, match=r"Cycle 1 kept 0 of \d texts, and n=4: \{'short': \d\}"):
            self.run(tmp_path / "chain", filters=filters, shortfall=shortfall)

    def test_empty_texts_are_counted(self, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_interp.generation.sampler.LocalSampler._text", lambda *_: " ")
        with pytest.raises(DataError, match=r"\{'empty': 6\}"):
            self.run(tmp_path / "chain", filters=Filter())

    def test_equal_texts_are_there_once(self, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_interp.generation.sampler.LocalSampler._text", lambda *_: "Same")
        told = self.run(tmp_path / "chain", filters=Filter(), shortfall="accept")
        assert told["cycles"][1]["counts"]["generate"]["dropped"] == {"duplicate": 3}

    def test_a_filter_that_says_too_little(self, tmp_path):
        with pytest.raises(RecipeError, match="said 1 times whether 4 rows are kept"):
            self.run(tmp_path / "chain", filters=Filter(keep=lambda rows: [True]))


def test_a_pool_smaller_than_its_slices(tmp_path):
    with pytest.raises(RecipeError, match="A pool of 2 prompts cannot be cut into 3 slices"):
        fast(tmp_path / "chain", phases=[writing(prompts=["a", "b", "A"], slices=3), fitting()]).run()


def test_a_seed_smaller_than_asked(tmp_path):
    with pytest.raises(DataError, match="The seed has 6 rows, and n=9"):
        fast(tmp_path / "chain", first=[fitting(data=SEED, n=9)]).run()


def test_a_torn_line_of_the_prompts_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b')
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2: no valid JSON"):
        fast(tmp_path / "chain", phases=[Generate(prompts=file, n=1), fitting()]).run()


def test_questions_of_an_evaluation_are_no_prompts(tmp_path):
    asks = Evaluate(evaluate=len, prompts=["what  OF 3?"])
    with pytest.raises(DataError, match=r"holds 'what  OF 3\?', which Evaluate asks"):
        chain(tmp_path / "chain", phases=[writing(), fitting(), asks]).run()


def test_titles_need_documents(tmp_path):
    with pytest.raises(RecipeError, match="but first has no data"):
        chain(tmp_path / "chain", first=[], phases=[writing(prompts=None), fitting()]).run()


def test_a_training_that_diverged_is_not_kept(tmp_path):
    def broken(adapters):
        return {name: tensor / 0 for name, tensor in adapters[-1].items()}

    with pytest.raises(DataError, match=r"diverged: .*lora_A\.default\.weight holds numbers that are not finite"):
        chain(tmp_path / "chain", cycles=1, phases=[Merge(merge=broken)]).run()
    assert not list((tmp_path / "chain").rglob("merge/*.safetensors"))


def test_a_full_disk_is_said_and_the_same_call_goes_on(whole, tmp_path, monkeypatch):
    folder, real = tmp_path / "chain", os.fsync
    counted = []

    def full(descriptor):
        counted.append(descriptor)
        if len(counted) == 91:  # of a file; of a folder's names it would not matter
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ManifestError, match="No space left on device"):
        fast(folder).run()
    finished = [
        path
        for path in folder.glob("children/*/manifest.json")
        if json.loads(path.read_text())["sessions"][-1]["status"]
    ]
    assert finished
    assert of(fast(folder).run(), "digest") == of(whole[1], "digest")
    assert contents(folder) == contents(whole[0])


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    both = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork"}
    told = chain(tmp_path / "chain", cycles=2, trainer=both).run()
    assert [one["counts"]["fit-sft"]["steps"] for one in told["cycles"]] == [1, 1]
    assert len({*of(told, "adapter"), *of(told, "init_adapter")}) == 3
    assert chain(tmp_path / "chain", cycles=2, trainer=both).run() == told
    assert of(chain(tmp_path / "again", cycles=2, trainer=both).run(), "digest") == of(told, "digest")
    large = fitting(batch_size=4)
    phases = [writing(), large, Evaluate(evaluate=score)]
    alone = chain(tmp_path / "alone", cycles=2, first=[replace(large, data=SEED, n=4)], phases=phases).run()
    assert scores(told) == pytest.approx(scores(alone), rel=1e-5)
