"""Chains as somebody outside meets them: folders, seeds, edited files, servers with faults."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from chains import POOL, SEED, chain, contents, fitting, lines, of, writing

from lightning_interp.cycles import FitDPO
from lightning_interp.errors import DataError, InterpError, ManifestError
from lightning_interp.generation import EndpointGenerator

sys.path.append(str(Path(__file__).parent.parent / "generation"))
from served import serving

LN2 = 0.6931471805599453


def fast(folder, **more):
    """Two cycles without evaluations."""
    return chain(folder, **{"cycles": 2, "phases": [writing(), fitting()], **more})


@pytest.mark.parametrize("rejected", ["base", "previous"])
@pytest.mark.parametrize(
    "init", [{"init": "reinit"}, {"init": "continual"}, {"init": "continual", "restart_cycles": {2}}]
)
def test_every_cycle_of_pairs_begins_at_its_reference(init, rejected, tmp_path):
    fit = FitDPO(batch_size=2, rejected_from=rejected)
    first = [replace(fit, data=SEED, n=4)]
    told = chain(tmp_path / "chain", cycles=4, first=first, phases=[writing(), fit], **init).run()
    for one in told["cycles"]:
        assert lines(f"{one['folder']}/phases/fit-dpo/metrics.jsonl")[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    begins = of(told, "init_adapter")
    fresh = [init["init"] == "reinit" or cycle in {0, *init.get("restart_cycles", ())} for cycle in range(4)]
    assert begins == [
        begins[0] if new else before for new, before in zip(fresh, ["", *of(told, "adapter")], strict=False)
    ]


def test_two_seeds_differ_and_one_repeats_in_any_folder(tmp_path):
    told = fast(tmp_path / "ein Mappe/für 模型").run()
    again, other = fast(tmp_path / "again").run(), fast(tmp_path / "other", seed=1).run()
    assert contents(tmp_path / "again") == contents(tmp_path / "ein Mappe/für 模型")
    for name in ("adapter", "init_adapter", "data"):
        assert of(told, name) == of(again, name)
        assert not set(of(told, name)) & set(of(other, name))


def test_a_relative_folder_is_the_same_run_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = fast("runs/chain").run()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert of(fast("../runs/chain").run(), "digest") == of(told, "digest")


@pytest.mark.parametrize(
    "file",
    ["fit-sft/adapter.safetensors", "fit-sft/init_adapter.safetensors", "generate/gen/round-00/own/shard_00000.jsonl"],
)
def test_an_edited_file_of_a_finished_stage_is_named(file, tmp_path):
    fast(tmp_path / "chain").run()
    path = tmp_path / "chain/children/cycle-001/phases" / file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ManifestError, match=rf"{Path(file).name}.* of the finished phase .* has changed"):
        fast(tmp_path / "chain").run()


def test_other_shards_are_another_chain(tmp_path):
    fast(tmp_path / "chain").run()
    with pytest.raises(ManifestError, match=r"phases\.generate\.shard_size: 2 there, 3 now"):
        fast(tmp_path / "chain", phases=[writing(shard_size=3), fitting()]).run()


def test_a_torn_line_of_the_seed_is_named(tmp_path):
    file = tmp_path / "seed.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "b", "comp')
    with pytest.raises(DataError, match=r"seed\.jsonl, line 2: no valid JSON"):
        fast(tmp_path / "chain", first=[fitting(data=file)]).run()


@pytest.mark.filterwarnings("ignore:The run ended at")
def test_a_server_that_dies_stops_the_chain_which_goes_on_behind_what_it_wrote(tmp_path):
    down, seen = [True], []

    def behave(body):
        seen.append(body["messages"][-1]["content"])
        return 400 if down[0] and len(seen) > 2 else None  # after the first file of two texts

    with serving(script=behave) as served:

        def writer(name, folder):
            return EndpointGenerator("m", base_url=served.url, api_key_env="PATH")

        def run():
            return chain(tmp_path / "chain", cycles=2, phases=[writing(slices=2), fitting()], writer=writer).run()

        with pytest.raises(InterpError, match=r"texts of .* are missing, because the writer failed"):
            run()
        down[0], before = False, len(seen)
        assert run()["cycles"][1]["counts"]["generate"]["rows"] == 4
    assert set(seen) <= set(POOL[:9])
    assert len(set(seen[before:])) == 2
    assert not set(seen[:2]) & set(seen[before:])
