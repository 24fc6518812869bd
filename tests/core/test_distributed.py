import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_interp.core.storage.distributed import JsonlWriter, is_rank_zero, rank_and_world_size
from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.errors import DataError, ManifestError


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts(path):
    return sorted(other.name for other in path.parent.iterdir() if other != path)


class TestRanks:
    @pytest.mark.parametrize(
        ("env", "expected"),
        [
            ({}, (0, 1)),
            ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8)),
            ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}, (1, 2)),
            ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, (5, 6)),
            ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_JOB_NAME": "bash"}, (0, 1)),
            ({"NODE_RANK": "1"}, (1, 1)),
        ],
    )
    def test_the_launcher_says_it(self, monkeypatch, env, expected):
        for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
            monkeypatch.delenv(key, raising=False)
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        assert rank_and_world_size() == expected
        assert is_rank_zero() == (expected[0] == 0)

    def test_ranks_of_two_nodes_differ(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "8")
        found = set()
        for node in range(4):
            for local in range(2):
                monkeypatch.setenv("NODE_RANK", str(node))
                monkeypatch.setenv("LOCAL_RANK", str(local))
                found.add(rank_and_world_size()[0])
        assert len(found) == 8


class TestOneRank:
    def test_rows_are_on_disk_when_write_returns(self, tmp_path):
        writer = JsonlWriter(tmp_path / "a" / "out.jsonl")
        writer.write([{"index": 4, "text": "Zoë"}])
        assert rows(writer.part) == [{"index": 4, "text": "Zoë"}]
        writer.write([])
        assert writer.written() == {4}
        assert not writer.path.exists()

    def test_merge_orders_drops_duplicates_and_may_be_repeated(self, tmp_path):
        path = tmp_path / "out.jsonl"
        with JsonlWriter(path) as writer:
            writer.write({"index": index, "v": "first"} for index in (3, 0, -1, 10))
            writer.write([{"index": 3, "v": "second"}])
            assert writer.merge() == path
        assert rows(path) == [{"index": index, "v": "first"} for index in (-1, 0, 3, 10)]
        assert parts(path) == []
        with JsonlWriter(path) as writer:  # another attempt goes on from the final file
            assert writer.written() == {-1, 0, 3, 10}
            writer.write([{"index": 1, "v": "late"}, {"index": 0, "v": "late"}])
            writer.merge()
        assert [(row["index"], row["v"]) for row in rows(path)] == [
            (-1, "first"), (0, "first"), (1, "late"), (3, "first"), (10, "first"),
        ]  # fmt: skip

    def test_merge_of_nothing_is_an_empty_file(self, tmp_path):
        assert JsonlWriter(tmp_path / "x.jsonl").merge().read_bytes() == b""

    def test_parts_of_an_attempt_with_more_ranks_are_merged(self, tmp_path):
        path = tmp_path / "out.jsonl"
        for rank in range(3):
            with JsonlWriter(path, rank=rank, world_size=3) as writer:
                writer.write([{"index": 10 - rank, "rank": rank}, {"index": 0, "rank": rank}])
        atomic_write_text(tmp_path / "other.jsonl.rank00000.part", '{"index": 99}\n')
        with JsonlWriter(path) as writer:
            assert writer.written() == {0, 8, 9, 10}
            writer.merge()
        assert rows(path) == [
            {"index": 0, "rank": 0},
            {"index": 8, "rank": 2},
            {"index": 9, "rank": 1},
            {"index": 10, "rank": 0},
        ]
        assert parts(path) == ["other.jsonl.rank00000.part"]

    @pytest.mark.parametrize("length", [1, 40, 70_000, 200_000])
    def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(self, tmp_path, length):
        path = tmp_path / "out.jsonl"
        writer = JsonlWriter(path)
        writer.write([{"index": 0}, {"index": 1}])
        writer.close()
        whole = writer.part.read_bytes()
        writer.part.write_bytes(whole + (b'{"index": 2, "text": "' + b"x" * length)[:length])
        reader = JsonlWriter(path, rank=1, world_size=2)
        assert reader.written() == {0, 1}  # another rank does not trip over it
        with JsonlWriter(path) as again:
            assert again.part.read_bytes() == whole
            again.write([{"index": 2}])
        assert [row["index"] for row in rows(writer.part)] == [0, 1, 2]

    def test_a_file_of_one_torn_line_is_emptied(self, tmp_path):
        part = atomic_write_text(tmp_path / "out.jsonl.rank00000.part", '{"ind')
        JsonlWriter(tmp_path / "out.jsonl")
        assert part.read_bytes() == b""

    def test_a_kill_in_the_middle_of_writing_loses_no_finished_batch(self, tmp_path):
        code = (
            "import sys\nfrom lightning_interp.core.storage.distributed import JsonlWriter\n"
            "writer = JsonlWriter(sys.argv[1])\n"
            "for start in range(0, 10**7, 20):\n"
            "    writer.write({'index': i, 'text': 'x' * 300} for i in range(start, start + 20))\n"
            "    print(start + 20, flush=True)\n"
        )
        path = tmp_path / "out.jsonl"
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", code, str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(20):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        promised = int(([400, *process.stdout.read().split()])[-1])
        process.wait(timeout=30)
        with JsonlWriter(path) as writer:
            written = writer.written()
            assert set(range(promised)) <= written
            writer.write({"index": index} for index in range(max(written) + 10) if index not in written)
            merged = rows(writer.merge())
        assert [row["index"] for row in merged] == list(range(max(written) + 10))


class TestErrors:
    @pytest.mark.parametrize("index", [None, "7", 1.0, True])
    def test_a_row_without_an_integer_index_is_refused_and_nothing_is_written(self, tmp_path, index):
        with JsonlWriter(tmp_path / "x") as writer:
            with pytest.raises(DataError, match=f"A row has index {index!r}: .*'text': 'hello'"):
                writer.write([{"index": 0}, {"index": index, "text": "hello"}])
            assert writer.written() == set()

    def test_a_value_without_a_json_form_is_refused(self, tmp_path):
        with JsonlWriter(tmp_path / "x") as writer, pytest.raises(DataError, match="Cannot write model as JSON"):
            writer.write([{"index": 0, "model": object()}])

    @pytest.mark.parametrize("line", ["garbage", '{"no": 1}', '{"index": "1"}', "[1]", "\x00\x00"])
    def test_a_broken_line_is_named_with_file_and_number(self, tmp_path, line):
        part = atomic_write_text(tmp_path / "x.rank00000.part", f'{{"index": 0}}\n{line}\n')
        with JsonlWriter(tmp_path / "x") as writer:
            for action in (writer.written, writer.merge):
                with pytest.raises(DataError, match=rf"{part}, line 2: expected a JSON object"):
                    action()
        assert part.exists()
        assert not (tmp_path / "x").exists()

    def test_an_unwritable_folder_is_named(self, tmp_path):
        blocker = atomic_write_text(tmp_path / "file", "")
        with pytest.raises(ManifestError, match=r"Cannot write '.*/file/out\.jsonl\.rank00000\.part': Not a directory"):
            JsonlWriter(blocker / "out.jsonl")

    def test_many_ranks_without_a_way_to_wait_are_refused(self, tmp_path):
        with JsonlWriter(tmp_path / "x", rank=0, world_size=4) as writer:
            with pytest.raises(ManifestError, match=r"Cannot merge '.*x' from 4 ranks"):
                writer.merge()
            writer.write([{"index": 0}])
            waited = []
            writer.merge(barrier=lambda: waited.append(1))
            assert len(waited) == 2


def _rank(rank, port, path, failures):
    """One of two real ranks: sampled work with an overlap, as Lightning's samplers pad it."""
    import torch

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        assert rank_and_world_size() == (rank, 2)
        with JsonlWriter(path) as writer:
            for start in range(rank, 21, 4):  # several batches; index 20 is done by both
                writer.write({"index": index, "value": index * index} for index in (start, min(start + 2, 20)))
            merged = writer.merge()
            content = rows(merged)  # complete on every rank as soon as merge returns
        if [row["index"] for row in content] != list(range(21)):
            failures.put((rank, content))
    finally:
        torch.distributed.destroy_process_group()


def test_two_real_ranks_write_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    arguments = (os.environ["MASTER_PORT"], tmp_path / "out.jsonl", failures)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert failures.empty()
    assert all(row["value"] == row["index"] ** 2 for row in rows(tmp_path / "out.jsonl"))
    assert parts(tmp_path / "out.jsonl") == []
