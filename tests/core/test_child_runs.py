"""Runs inside a run: kept apart, resumed alone or with their parent, and counted by what follows."""

import os
import shutil
import signal
import time

import pytest
from test_manifest_processes import run_script

from lightning_interp.core.storage import manifest_follower
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.core.storage.run_lock import child_folders
from lightning_interp.errors import ManifestError


def opened(folder, config=None, name="demo"):
    return RunManifest.open(folder, config=config or {"seed": 0}, name=name)


def never(folder):
    raise AssertionError("a finished phase was run again")


def last_status(folder):
    return read_manifest(folder)["sessions"][-1]["status"]


class TestChildren:
    def test_a_child_is_a_run_of_its_own(self, tmp_path):
        with opened(tmp_path) as run:
            with run.child("cycle-3", config={"number": 3}) as cycle:
                assert cycle.path == tmp_path / "children/cycle-3"
                assert cycle.phase("fit", lambda folder: 3) == 3
                with cycle.child("inner", config={}, name="grafting/inner") as inner:
                    assert inner.phase("fit", lambda folder: [4]) == [4]
                cycle.record_outcome({"loss": 0.5})
            assert run.phase("fit", lambda folder: 5) == 5
        state = read_manifest(tmp_path / "children/cycle-3")
        assert (state["name"], state["config"], state["outcome"]) == ("demo/cycle-3", {"number": 3}, {"loss": 0.5})
        assert read_manifest(tmp_path / "children/cycle-3/children/inner")["name"] == "grafting/inner"
        assert list(child_folders(tmp_path)) == ["cycle-3"]
        with opened(tmp_path) as run:
            with run.child("cycle-3", config={"number": 3}) as cycle:
                assert cycle.phase("fit", never) == 3
                with cycle.child("inner", config={}, name="grafting/inner") as inner:
                    assert inner.phase("fit", never) == [4]
            assert run.phase("fit", never) == 5

    def test_a_child_goes_on_alone(self, tmp_path):
        with opened(tmp_path) as run:
            run.phase("data", lambda folder: 1)
            with run.child("a", config={}) as child, child.child("b", config={}) as grandchild:
                grandchild.phase("fit", lambda folder: 2)
        with RunManifest.open(tmp_path / "children/a/children/b", config={}, name="demo/a/b") as alone:
            assert alone.phase("fit", never) == 2
            alone.phase("more", lambda folder: 3)
        with opened(tmp_path) as run:
            run.phase("data", never)
            with run.child("a", config={}) as child, child.child("b", config={}) as grandchild:
                assert grandchild.phase("fit", never) == 2
                assert grandchild.phase("more", never) == 3

    def test_a_child_alone_is_refused_while_a_run_above_it_is_open(self, tmp_path):
        with opened(tmp_path) as run:
            run.child("a", config={}).close()
            with pytest.raises(ManifestError, match=r"children/a' is a child of the run in .* which is in use"):
                RunManifest.open(tmp_path / "children/a", config={}, name="demo/a")
            code = "RunManifest.open(sys.argv[1], config={}, name='demo/a')"
            other = run_script(code, tmp_path / "children/a")
            assert "is a child of the run in" in other.communicate(timeout=60)[1]
        RunManifest.open(tmp_path / "children/a", config={}, name="demo/a").close()

    def test_another_configuration_of_a_child_is_refused(self, tmp_path):
        with opened(tmp_path) as run:
            run.child("a", config={"lr": 1}).close()
            with pytest.raises(ManifestError, match="lr: 1 there, 2 now"):
                run.child("a", config={"lr": 2})
            with run.child("b", config={"lr": 2}) as child:  # the parent is as it was
                child.phase("fit", lambda folder: 1)

    def test_what_may_differ_is_as_in_the_parent(self, tmp_path):
        for devices in (1, 2):
            config = {"trainer": {"devices": devices}}
            with RunManifest.open(tmp_path, config=config, name="demo", not_identity=("trainer.devices",)) as run:
                run.child("a", config=config).close()

    def test_misuse_is_refused(self, tmp_path):
        with opened(tmp_path) as run:
            child = run.child("a", config={})
            with pytest.raises(ManifestError, match="Phase 'fit' was called while the child run 'a' is open"):
                run.phase("fit", never)
            with pytest.raises(ManifestError, match="Child run 'b' was opened while the child run 'a' is open"):
                run.child("b", config={})
            child.close()
            with pytest.raises(ManifestError, match="Child run 'b' was opened inside phase 'outer'"):
                run.phase("outer", lambda folder: run.child("b", config={}))
            with pytest.raises(ManifestError, match="Child runs 'A' and 'a' differ only in case"):
                run.child("A", config={})
            for key in ("..", "a/b", "", ".x"):
                with pytest.raises(ManifestError, match="cannot name a child run"):
                    run.child(key, config={})
        (tmp_path / "other/children").mkdir(parents=True)
        with pytest.raises(ManifestError, match="children' exists, but its folder is no run folder"):
            opened(tmp_path / "other")


class TestDependence:
    def walk(self, folder, first, second, calls, **more):
        with opened(folder) as run:
            run.phase("before", lambda at: calls.append("before") or first)
            with run.child("a", config={}, **more) as child:
                child.phase("fit", lambda at: calls.append("a.fit") or second)
            run.phase("after", lambda at: calls.append("after"))

    def test_what_follows_depends_on_the_child_and_the_child_on_what_was_before(self, tmp_path):
        calls = []
        self.walk(tmp_path, 1, 1, calls)
        self.walk(tmp_path, 1, 1, calls)
        assert calls == ["before", "a.fit", "after"]
        shutil.rmtree(tmp_path / "children/a/phases/fit")
        self.walk(tmp_path, 1, 2, calls)
        assert calls[3:] == ["a.fit", "after"]
        shutil.rmtree(tmp_path / "phases/before")
        self.walk(tmp_path, 2, 2, calls)
        assert calls[5:] == ["before", "a.fit", "after"]

    def test_a_child_with_inputs_of_its_own(self, tmp_path):
        calls = []
        self.walk(tmp_path, 1, 1, calls, inputs={})
        shutil.rmtree(tmp_path / "phases/before")
        self.walk(tmp_path, 2, 1, calls, inputs={})
        assert calls[3:] == ["before", "after"]

    def test_what_follows_a_failed_child_is_run_again_when_it_is_finished(self, tmp_path):
        calls = []

        def walk(fails):
            with opened(tmp_path) as run:
                try:
                    with run.child("a", config={}) as child:
                        child.phase("fit", lambda folder: 1 // (not fails))
                except ZeroDivisionError:
                    pass
                run.phase("after", lambda folder: calls.append(fails))

        for fails in (True, True, False):
            walk(fails)
        assert calls == [True, False]


class TestEndings:
    @pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError(), "failed")])
    def test_an_error_ends_both(self, tmp_path, error, status):
        def stops(folder):
            raise error

        with pytest.raises(type(error)), opened(tmp_path) as run, run.child("a", config={}) as child:
            child.phase("fit", stops)
        assert last_status(tmp_path) == last_status(tmp_path / "children/a") == status

    @pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
    def test_a_parent_ends_a_child_that_was_left_open_as_unfinished(self, tmp_path, error):
        run = opened(tmp_path)
        child = run.child("a", config={})
        child.child("b", config={})
        run.__exit__(type(error) if error else None, error, None)
        assert last_status(tmp_path) == ("interrupted" if error else "finished")
        for folder in (tmp_path / "children/a", tmp_path / "children/a/children/b"):
            assert last_status(folder) == "interrupted"
        child.close()  # does nothing
        with opened(tmp_path) as run, run.child("a", config={}) as child, child.child("b", config={}):
            pass  # all locks are free

    def test_a_kill_inside_a_child_goes_on(self, tmp_path):
        code = """
            def count(folder):
                done = len(list(folder.glob("step-*")))
                for step in range(done, 4):
                    (folder / f"step-{step}").write_text("x")
                    if sys.argv[2] == f"step{step}":
                        os.kill(os.getpid(), signal.SIGKILL)
                return sorted(path.name for path in folder.iterdir())

            with RunManifest.open(sys.argv[1], config={"seed": 0}, name="demo") as run:
                first = run.phase("first", lambda folder: os.getpid())
                with run.child("a", config={}) as child:
                    second = child.phase("second", lambda folder: os.getpid())
                    count = child.phase("count", count)
                print(first, second, len(count), run.phase("last", lambda folder: 7))
        """
        killed = run_script(code, tmp_path, "step2")
        killed.communicate(timeout=60)
        assert killed.returncode == -signal.SIGKILL
        assert last_status(tmp_path) == last_status(tmp_path / "children/a") == "running"
        again = run_script(code, tmp_path, "never")
        out, err = again.communicate(timeout=60)
        assert out.split() == [str(killed.pid), str(killed.pid), "4", "7"], err
        assert read_manifest(tmp_path / "children/a")["phases"]["count"]["attempts"] == 2
        assert last_status(tmp_path) == last_status(tmp_path / "children/a") == "finished"


class TestFollowers:
    CODE = """
        rank = os.environ["LOCAL_RANK"]

        def fit(folder):
            (folder / f"rank{rank}").write_text("here")
            while len(list(folder.glob("rank*"))) < 2:
                time.sleep(0.01)
            return os.getpid()

        def fail(folder):
            if sys.argv[2] == "fail":
                raise RuntimeError("in the child")
            return 3

        found = []
        with RunManifest.open(sys.argv[1], config={"seed": 0}, name="demo") as run:
            found.append(run.phase("first", lambda folder: os.getpid()))
            for number in range(2):
                try:
                    with run.child(f"c{number}", config={"number": number}) as child:
                        found.append(child.phase("slow", lambda folder: time.sleep(0.3) or os.getpid()))
                        found.append(child.phase("fit", fit, every_rank=True))
                        with child.child("inner", config={}) as inner:
                            found.append(inner.phase("fail", fail))
                except Exception as error:
                    if sys.argv[2] != "fail":
                        raise
                    print(type(error).__name__, error, file=sys.stderr)
                    found.append("failed")
            found.append(run.phase("last", lambda folder: os.getpid()))
            print(*found)
    """

    def ranks(self, folder, mode, order=(0, 1)):
        started = {}
        for rank in order:
            started[rank] = run_script(self.CODE, folder, mode, LOCAL_RANK=str(rank), WORLD_SIZE="2")
            time.sleep(0.2)
        return [(started[rank], *started[rank].communicate(timeout=60)) for rank in (0, 1)]

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_ranks_agree_in_children_and_after_them(self, tmp_path, order):
        (zero, out0, err0), (one, out1, err1) = self.ranks(tmp_path, "go", order)
        assert (zero.returncode, one.returncode) == (0, 0), err0 + err1
        pid = str(zero.pid)
        assert out0.split() == out1.split() == [pid, pid, pid, "3", pid, pid, "3", pid]
        (_, out0, _), (_, out1, err1) = self.ranks(tmp_path, "go", order)
        assert out0.split() == out1.split() == [pid, pid, pid, "3", pid, pid, "3", pid], err1
        assert len(read_manifest(tmp_path / "children/c0/children/inner")["sessions"]) == 2

    def test_a_failed_child_is_failed_on_every_rank_and_the_others_go_on(self, tmp_path):
        (zero, out0, err0), (one, out1, err1) = self.ranks(tmp_path, "fail")
        assert (zero.returncode, one.returncode) == (0, 0), err0 + err1
        pid = str(zero.pid)
        assert out0.split() == out1.split() == [pid, pid, pid, "failed", pid, pid, "failed", pid]
        assert "RuntimeError in the child" in err0
        assert "Rank zero ended (failed) before phase 'fail' was finished" in err1
        (zero, out0, err0), (one, out1, err1) = self.ranks(tmp_path, "go")  # and goes on
        new = str(zero.pid)  # of all that depends on the first child, which is finished only now
        assert out0.split() == out1.split() == [pid, pid, pid, "3", new, new, "3", new], err0 + err1

    def test_a_follower_in_a_child_ends_when_the_parent_has_ended(self, tmp_path):
        run = opened(tmp_path)
        follower = manifest_follower.FollowerManifest.join(tmp_path, {"seed": 0}, "demo")
        run.child("a", config={}).close("failed")
        run.close("failed")
        child = follower.child("a", config={})
        with pytest.raises(ManifestError, match=r"Rank zero ended \(failed\) before phase 'fit' was finished in"):
            child.phase("fit", never)
        child.close("failed")
        child.close("failed")
        with pytest.raises(ManifestError, match=r"Rank zero ended .* before child run 'b' was opened in"):
            follower.child("b", config={})

    def test_a_follower_waits_for_todays_session_of_a_child(self, tmp_path):
        with pytest.raises(ValueError, match="yesterday"), opened(tmp_path) as run, run.child("a", config={}):
            raise ValueError("yesterday")
        with opened(tmp_path) as run:
            follower = manifest_follower.FollowerManifest.join(tmp_path, {"seed": 0}, "demo")
            child = follower.child("a", config={})
            child._state = read_manifest(child.path)
            assert child._session() is None
            child._check_session("phase 'fit' was finished")  # rank zero is alive and may still open it
            with run.child("a", config={}) as ours:
                assert ours.phase("fit", lambda folder: os.getpid()) == os.getpid()
                assert child.phase("fit", never) == os.getpid()
