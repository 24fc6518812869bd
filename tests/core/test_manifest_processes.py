"""The manifest under kills, and seen from several processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lightning_interp.core.storage import manifest_follower
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.errors import ManifestError

ROOT = Path(__file__).parents[2]
CONFIG = {"seed": 0}
HEAD = """
import os, sys, time, signal
from pathlib import Path
from lightning_interp.core.storage.manifest import RunManifest
"""


def opened(folder, config=CONFIG):
    return RunManifest.open(folder, config=config, name="demo")


def never(folder):
    raise AssertionError("a finished phase was run again")


def run_script(code, *args, **env):
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(code), *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _hashes(entry):
    return {file: stamp["sha256"] for file, stamp in entry["files"].items()}


class TestProcesses:
    def test_one_live_process_per_folder(self, tmp_path):
        with opened(tmp_path):
            with pytest.raises(ManifestError, match=r"Run folder '.*' is in use by this process"):
                opened(tmp_path)
            other = run_script("RunManifest.open(sys.argv[1], config={'seed': 0}, name='demo')", tmp_path)
            assert f"is in use by process {os.getpid()} on " in other.communicate(timeout=60)[1]
            assert other.returncode == 1
        opened(tmp_path).close()

    def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(self, tmp_path):
        code = """
            folder, stop_at = Path(sys.argv[1]), sys.argv[2]

            def count(folder):  # a phase with a checkpoint of its own
                done = len(list(folder.glob("step-*")))
                for step in range(done, 6):
                    (folder / f"step-{step}").write_text(str(step * step))
                    if stop_at == f"step{step}":
                        child = os.fork() # a worker that outlives the run must not keep the folder locked
                        if child == 0:
                            time.sleep(60)
                        print(child, flush=True)
                        os.kill(os.getpid(), signal.SIGKILL)
                return sum(int(path.read_text()) for path in folder.glob("step-*"))

            with RunManifest.open(folder, config={"seed": 1}, name="demo") as run:
                first = run.phase("first", lambda folder: os.getpid())
                total = run.phase("count", count, inputs={})
                print("total", total, "first", first)
        """
        plain = run_script(code, tmp_path / "plain", "never")
        total = plain.communicate(timeout=60)[0].split()[1]
        killed = run_script(code, tmp_path / "killed", "step3")
        worker = int(killed.stdout.readline())
        assert killed.wait(timeout=60) == -signal.SIGKILL
        try:
            state = read_manifest(tmp_path / "killed")
            assert state["phases"]["count"]["status"] == "running"
            assert state["sessions"][-1]["status"] == "running"
            again = run_script(code, tmp_path / "killed", "never")
            out, err = again.communicate(timeout=60)
        finally:
            os.kill(worker, signal.SIGKILL)
            killed.communicate(timeout=60)
        assert again.returncode == 0, err
        assert out.split() == ["total", total, "first", str(killed.pid)]  # the first phase was not run again
        kept = [read_manifest(tmp_path / name)["phases"]["count"] for name in ("plain", "killed")]
        assert _hashes(kept[0]) == _hashes(kept[1])
        assert [entry["attempts"] for entry in kept] == [1, 2]

    def test_a_kill_at_any_moment_leaves_a_readable_manifest(self, tmp_path):
        code = """
            run = RunManifest.open(sys.argv[1], config={"seed": 1}, name="demo")
            print("go", flush=True)
            for index in range(10**6):
                run.phase(f"p{index % 50}", lambda folder: "x" * 5000, inputs={"n": index // 50})
                run._called.clear()
        """
        for delay in (0.0, 0.013, 0.05, 0.11):
            process = run_script(code, tmp_path)
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
            process.communicate(timeout=60)
            assert read_manifest(tmp_path)["sessions"][-1]["status"] == "running"


class TestFollowers:
    CODE = """
        def fit(folder):
            (folder / f"rank{os.environ['LOCAL_RANK']}").write_text("here")
            while len(list(folder.glob("rank*"))) < 2:  # as a process group would: both or none
                time.sleep(0.01)
            time.sleep(0.3 * (os.environ["LOCAL_RANK"] == "0"))
            return {"rank": os.environ["LOCAL_RANK"], "pid": os.getpid()}

        with RunManifest.open(sys.argv[1], config={"seed": 0}, name="demo") as run:
            a = run.phase("prepare", lambda folder: os.getpid())
            if os.environ["LOCAL_RANK"] == "0":
                time.sleep(0.3)
            b = run.phase("fit", fit, every_rank=True)
            c = run.phase("evaluate", lambda folder: time.sleep(0.3) or os.getpid())
            if sys.argv[2] == "fail" and os.environ["LOCAL_RANK"] == "0":
                raise RuntimeError("between phases")
            d = run.phase("last", lambda folder: [os.getpid()])
            run.record_outcome({"by": os.getpid()})
            print(a, b["rank"], b["pid"], c, d[0])
    """

    def ranks(self, folder, mode="go", order=(0, 1)):
        started = {}
        for rank in order:
            started[rank] = run_script(self.CODE, folder, mode, LOCAL_RANK=str(rank), WORLD_SIZE="2")
            time.sleep(0.2)
        return [(started[rank], *started[rank].communicate(timeout=60)) for rank in (0, 1)]

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_ranks_agree_and_only_rank_zero_writes(self, tmp_path, order):
        (zero, out0, err0), (one, out1, err1) = self.ranks(tmp_path, order=order)
        assert (zero.returncode, one.returncode) == (0, 0), err0 + err1
        pid = str(zero.pid)
        assert out0.split() == out1.split() == [pid, "0", pid, pid, pid]
        state = read_manifest(tmp_path)
        assert state["outcome"] == {"by": zero.pid}
        assert len(state["sessions"]) == 1
        (_, out0, _), (_, out1, _) = self.ranks(tmp_path)  # everything finished: nothing is run again
        assert out0.split() == out1.split() == [pid, "0", pid, pid, pid]

    def test_a_follower_ends_when_rank_zero_has_failed(self, tmp_path):
        (zero, _, err0), (one, _, err1) = self.ranks(tmp_path, "fail")
        assert "RuntimeError: between phases" in err0
        assert zero.returncode == one.returncode == 1
        assert "Rank zero ended (failed) before phase 'last' was finished" in err1

    def test_a_follower_ends_when_rank_zero_is_killed(self, tmp_path, monkeypatch):
        opened(tmp_path)._lock.release()  # as a killed rank zero leaves it: a session that says running
        follower = manifest_follower.FollowerManifest.join(tmp_path, CONFIG, "demo")
        follower._parent = -1  # the process that started this one is gone
        with pytest.raises(ManifestError, match="Rank zero is gone before phase 'fit' was finished in"):
            follower.phase("fit", never)
        assert follower.record_outcome({}) is None
        assert follower.close() is None

    def test_a_follower_does_not_wait_forever_for_a_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr(manifest_follower, "PATIENCE_SECONDS", 0.1)
        with pytest.raises(ManifestError, match=f"has not opened the run folder '{tmp_path}/run'"):
            opened(tmp_path / "run")
        assert list(tmp_path.iterdir()) == []

    def test_a_follower_waits_for_a_new_session_after_one_that_ended(self, tmp_path, monkeypatch):
        opened(tmp_path).close("failed", "yesterday")
        follower = manifest_follower.FollowerManifest.join(tmp_path, CONFIG, "demo")
        monkeypatch.setattr(manifest_follower, "PATIENCE_SECONDS", 0.3)
        with pytest.raises(ManifestError, match=f"has not opened the run folder '{tmp_path}' within 0 s"):
            follower.phase("fit", never)
        with opened(tmp_path) as run:
            run.phase("fit", lambda folder: 3)
        assert manifest_follower.FollowerManifest.join(tmp_path, CONFIG, "demo").phase("fit", never) == 3

    def test_a_follower_of_another_configuration_is_refused(self, tmp_path, monkeypatch):
        with opened(tmp_path):
            monkeypatch.setenv("LOCAL_RANK", "1")
            with pytest.raises(ManifestError, match="seed: 0 there, 5 now"):
                opened(tmp_path, CONFIG | {"seed": 5})
