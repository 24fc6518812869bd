import json
import math
import shutil
from pathlib import Path

import pytest

from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.core.storage.manifest import RunManifest, check_name
from lightning_interp.core.storage.manifest_file import config_difference, read_manifest
from lightning_interp.errors import DataError, ManifestError

CONFIG = {"seed": 0, "trainer": {"max_epochs": 3}}


PHASE = {"status": "finished", "inputs": "", "files": {}, "seconds": 1, "attempts": 1, "result": 1}
SESSION = {"status": "finished", "started": ""}
STAMP = {"sha256": "", "size": 3}


def damaged(**sections):
    whole = {"format": 2, "name": "demo", "config": {}, "sessions": [], "phases": {}, "outcome": {}}
    return json.dumps(whole | sections)


def opened(folder, config=CONFIG, name="demo", **more):
    return RunManifest.open(folder, config=config, name=name, **more)


def never(folder):
    raise AssertionError("a finished phase was run again")


class TestPhases:
    def test_a_finished_phase_is_remembered_with_its_result_and_files(self, tmp_path):
        def fit(folder):
            assert folder == tmp_path / "run" / "phases" / "fit"
            atomic_write_text(folder / "sub" / "weights.bin", "w")
            atomic_write_text(folder / "last.ckpt", "big")
            return {"loss": 0.1 + 0.2, "shape": (1, 2), "nan": math.nan, "path": folder}

        with opened(tmp_path / "run") as run:
            first = run.phase("fit", fit)
        (tmp_path / "run/phases/fit/last.ckpt").unlink()  # checkpoints may go
        with opened(tmp_path / "run") as run:
            second = run.phase("fit", never)
        assert first["shape"] == [1, 2]
        assert first["loss"] == 0.1 + 0.2
        assert math.isnan(first["nan"])
        assert repr(first) == repr(second)
        entry = read_manifest(tmp_path / "run")["phases"]["fit"]
        assert list(entry["files"]) == ["sub/weights.bin"]
        assert (entry["status"], entry["attempts"]) == ("finished", 1)

    def test_a_result_cannot_be_changed_behind_the_manifest(self, tmp_path):
        with opened(tmp_path) as run:
            run.phase("a", lambda folder: [1], inputs={}).append(2)
            assert run.phase("a", never, inputs={}) == [1]

    @pytest.mark.parametrize("change", ["missing", "changed"])
    def test_a_file_that_is_missing_or_changed_is_named(self, tmp_path, change):
        with opened(tmp_path) as run:
            run.phase("fit", lambda folder: atomic_write_text(folder / "weights.bin", "w").name)
        file = tmp_path / "phases/fit/weights.bin"
        file.unlink() if change == "missing" else file.write_text("v")
        word = {"missing": "is missing", "changed": "has changed"}[change]
        with (
            opened(tmp_path) as run,
            pytest.raises(ManifestError, match=rf"fit/weights\.bin' of the finished phase 'fit' {word}.*delete the"),
        ):
            run.phase("fit", never)
        (tmp_path / "phases/fit/weights.bin").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "phases/fit")  # the remedy
        with opened(tmp_path) as run:
            assert run.phase("fit", lambda folder: "again") == "again"
            assert run.phases["fit"]["attempts"] == 1

    def test_an_unfinished_phase_finds_its_folder_as_it_left_it(self, tmp_path):
        def fails(folder):
            atomic_write_text(folder / "step-3", "")
            raise RuntimeError("the disk of step 3")

        with pytest.raises(RuntimeError), opened(tmp_path) as run:
            run.phase("fit", fails)
        state = read_manifest(tmp_path)
        assert (state["phases"]["fit"]["status"], state["sessions"][0]["status"]) == ("failed", "failed")
        assert state["phases"]["fit"]["message"] == "RuntimeError: the disk of step 3"
        with opened(tmp_path) as run:
            assert run.phase("fit", lambda folder: [path.name for path in folder.iterdir()]) == ["step-3"]
            assert run.phases["fit"]["attempts"] == 2

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
    def test_an_interruption_is_told_from_a_failure(self, tmp_path, error):
        def stops(folder):
            raise error

        with pytest.raises(type(error)), opened(tmp_path) as run:
            run.phase("fit", stops)
        state = read_manifest(tmp_path)
        assert (state["phases"]["fit"]["status"], state["sessions"][0]["status"]) == ("interrupted", "interrupted")

    def test_changed_inputs_run_a_phase_again_in_an_emptied_folder(self, tmp_path):
        def fit(folder):
            old = [path.name for path in folder.iterdir()]
            atomic_write_text(folder / "weights", "w")
            return old

        for inputs, expected_runs in (({"lr": 1}, 1), ({"lr": 1.0}, 1), ({"lr": 2}, 1)):
            with opened(tmp_path) as run:
                assert run.phase("fit", fit, inputs=inputs) == []
                assert run.phases["fit"]["attempts"] == expected_runs

    def test_without_inputs_a_phase_depends_on_the_phases_before_it(self, tmp_path):
        calls = []

        def chain(first, **inputs):
            calls.clear()
            with opened(tmp_path) as run:
                run.phase("a", lambda folder: calls.append("a") or first)
                run.phase("b", lambda folder: calls.append("b"))
                run.phase("c", lambda folder: calls.append("c"), inputs={})
            return list(calls)

        assert chain(1) == ["a", "b", "c"]
        assert chain(1) == []
        shutil.rmtree(tmp_path / "phases/a")
        assert chain(1) == ["a"]  # the same result again: nothing that follows is stale
        shutil.rmtree(tmp_path / "phases/a")
        assert chain(2) == ["a", "b"]

    def test_paths_in_inputs_stand_for_their_content(self, tmp_path):
        data = atomic_write_text(tmp_path / "data.jsonl", "1")
        folder = tmp_path / "run"
        with opened(folder) as run:
            run.phase("fit", lambda _: "one", inputs={"data": data})
        moved = data.rename(tmp_path / "moved.jsonl")
        with opened(folder) as run:
            assert run.phase("fit", never, inputs={"data": moved}) == "one"
        atomic_write_text(moved, "2")
        with opened(folder) as run:
            assert run.phase("fit", lambda _: "two", inputs={"data": moved}) == "two"

    def test_misuse_is_refused(self, tmp_path):
        with opened(tmp_path) as run:
            with pytest.raises(ManifestError, match="'inner' was called inside phase 'outer'"):
                run.phase("outer", lambda folder: run.phase("inner", never))
            run.phase("fit", lambda folder: 1, inputs={"lr": 1})
            with pytest.raises(ManifestError, match="'fit' was called twice in one run with different inputs"):
                run.phase("fit", never, inputs={"lr": 2})
            with pytest.raises(ManifestError, match="'FIT' and 'fit' differ only in case"):
                run.phase("FIT", never)
            with pytest.raises(DataError, match=r"the result of phase 'bad'\.model as JSON"):
                run.phase("bad", lambda folder: {"model": object()})
        assert read_manifest(tmp_path)["phases"]["bad"]["status"] == "failed"

    @pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc", "", ".hidden", "a b", "a\n", "-x", "x" * 101])
    def test_names_that_could_leave_the_folder_are_refused(self, tmp_path, name):
        with pytest.raises(ManifestError, match="cannot name a run"):
            opened(tmp_path, name=name)
        assert list(tmp_path.iterdir()) == []
        with opened(tmp_path) as run, pytest.raises(ManifestError, match="cannot name a phase"):
            run.phase(name, never)
        assert check_name("grafting/facts", "run") == "grafting/facts"

    def test_a_phase_name_has_no_parts(self, tmp_path):
        with opened(tmp_path) as run, pytest.raises(ManifestError, match="'cycle/fit' cannot name a phase"):
            run.phase("cycle/fit", never)


class TestOpening:
    def test_another_configuration_is_refused_with_both_values(self, tmp_path):
        opened(tmp_path, {"seed": 0, "lr": 1e-3, "run_dir": "a", "trainer": {"max_epochs": 3}}).close()
        before = (tmp_path / "manifest.json").read_bytes()
        with pytest.raises(ManifestError) as caught:
            opened(tmp_path, {"seed": 7, "lr": 0.001, "run_dir": "b", "trainer": {"max_epochs": 3, "devices": 4}})
        message = str(caught.value)
        assert "another configuration: seed: 0 there, 7 now; trainer.devices: not set there, 4 now." in message
        assert str(tmp_path) in message
        assert (tmp_path / "manifest.json").read_bytes() == before
        opened(tmp_path, {"seed": 0, "lr": 1e-3, "run_dir": "c", "trainer": {"max_epochs": 3}}).close()

    def test_the_difference_of_two_configurations(self):
        same = {"a": {"b": [1, 2]}, "c": math.nan, "d": {}}
        assert config_difference(same, {"d": {}, "c": math.nan, "a": {"b": [1, 2]}}) == []
        assert config_difference({"x": True}, {"x": 1}) == ["x: true there, 1 now"]
        assert config_difference({"x": None}, {}) == ["x: null there, not set now"]
        assert config_difference({"x": {}}, {"x": {"y": "z"}}) == ['x.y: not set there, "z" now']
        assert config_difference({"progress": 1, "x": 1}, {"x": 1}, ("progress",)) == []
        assert len(config_difference({"x": "long" * 1000}, {"x": "y"})[0]) < 120

    def test_another_run_is_refused(self, tmp_path):
        opened(tmp_path, name="grafting/facts").close()
        with pytest.raises(ManifestError, match="holds a run of 'grafting/facts', not of 'steering/dual'"):
            opened(tmp_path, name="steering/dual")

    def test_an_unwritable_folder_is_refused_before_anything_is_done(self, tmp_path):
        blocker = atomic_write_text(tmp_path / "file", "x")
        with pytest.raises(ManifestError, match=r"Cannot write '.*/file/run': Not a directory"):
            opened(blocker / "run")
        with pytest.raises(ManifestError, match=r"Cannot write '/proc/here/run': No such file"):
            opened("/proc/here/run")
        with pytest.raises(ManifestError, match=r"Cannot write '/proc': "):
            opened("/proc")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ('{"format": 1, "name": "demo", "con', "Unterminated string"),
            ("", "Expecting value"),
            ("[]", "not a manifest"),
            ('{"name": "demo"}', "not a manifest"),
            ('{"format": 1, "name": "demo", "config": {}, "sessions": {}, "phases": {}}', "sessions should be a list"),
            (
                '{"format": 1, "name": "demo", "config": {}, "sessions": [], "outcome": {}, "phases": {"fit": 1}}',
                "phases.fit is not an object",
            ),
            (
                '{"format": 1, "name": "demo", "config": {}, "sessions": [], "outcome": {}, "phases": {"fit": {}}}',
                "phases.fit.status should be a string",
            ),
            ("\xff", "Expecting value"),
            (damaged(sessions=[0]), r"sessions\[0\] is not an object"),
            (damaged(sessions=[{"status": 3, "started": ""}]), r"sessions\[0\]\.status should be a string"),
            (damaged(sessions=[SESSION | {"seconds": math.nan}]), r"sessions\[0\]\.seconds should be a number"),
            (damaged(sessions=[SESSION | {"parent": 0}]), r"sessions\[0\]\.parent is not an object"),
            (damaged(phases={"fit": PHASE | {"seconds": 10**400}}), "phases.fit.seconds should be a number"),
            (damaged(phases={"fit": PHASE | {"attempts": True}}), "phases.fit.attempts should be a number"),
            (damaged(phases={"fit": PHASE | {"files": {"w": 3}}}), "phases.fit.files.w is not an object"),
            (damaged(phases={"fit": PHASE | {"files": {"w": STAMP}}}), "phases.fit.files.w has no mtime_ns"),
            (damaged(phases={"fit": PHASE | {"result_file": 3}}), "phases.fit.result_file is not an object"),
            (damaged(phases={"fit": PHASE | {"result_file": STAMP}}), "phases.fit.result_file.digest should be a s"),
            (damaged(sources=[]), "sources should be an object"),
            (damaged(sources={"w": 3}), "sources.w is not an object"),
            (damaged(base=3), "base should be a string"),
            (damaged(outcome=[]), "outcome should be an object"),
            ("[" * 100_000, "nested deeper than 200 levels"),
            ('{"format": 1, "format": 2}', "the key 'format' is there twice"),
        ],
    )
    def test_a_damaged_manifest_is_refused(self, tmp_path, content, reason):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ManifestError, match=f"manifest.json' is damaged: .*{reason}.*delete the run folder"):
            opened(tmp_path)
        assert (tmp_path / "manifest.json").read_text() == content

    def test_bytes_that_are_no_text_are_damage_too(self, tmp_path):
        (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ManifestError, match="is damaged"):
            opened(tmp_path)

    def test_a_manifest_of_another_format_is_refused(self, tmp_path):
        (tmp_path / "manifest.json").write_text('{"format": 99}')
        with pytest.raises(ManifestError, match="has format 99, and this version reads the formats 1 and 2"):
            opened(tmp_path)

    def test_a_folder_in_the_place_of_the_manifest_is_refused(self, tmp_path):
        (tmp_path / "manifest.json").mkdir()
        with pytest.raises(ManifestError, match=r"Cannot read '.*manifest\.json': Is a directory"):
            opened(tmp_path)

    def test_no_run_folder_is_said(self, tmp_path):
        with pytest.raises(ManifestError, match="'/nowhere' is no run folder"):
            read_manifest(Path("/nowhere"))
        file = atomic_write_text(tmp_path / "f", "")
        with pytest.raises(ManifestError, match="f' is no run folder"):
            read_manifest(file)

    def test_files_of_somebody_else_are_not_overwritten(self, tmp_path):
        atomic_write_text(tmp_path / "notes.txt", "mine")
        opened(tmp_path / "ok", outputs=("config.yaml",)).close()
        atomic_write_text(tmp_path / "config.yaml", "mine")
        with pytest.raises(ManifestError, match=r"config\.yaml' exists, but its folder is no run folder"):
            opened(tmp_path, outputs=("config.yaml",))
        (tmp_path / "config.yaml").unlink()
        opened(tmp_path, outputs=("config.yaml",)).close()
        atomic_write_text(tmp_path / "config.yaml", "the run's own")
        opened(tmp_path, outputs=("config.yaml",)).close()

    def test_what_a_kill_left_of_a_write_is_swept(self, tmp_path):
        atomic_write_text(tmp_path / ".manifest.json.123-abcd0123.tmp", '{"for')
        opened(tmp_path).close()
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "manifest.json"]

    def test_sessions_keep_their_versions_and_the_outcome_is_kept(self, tmp_path):
        opened(tmp_path, versions={"torch": "2.13"}).close()
        with opened(tmp_path, versions={"torch": "2.14"}) as run:
            run.record_outcome({"question": "why"})
        run.close("failed")  # a second close does nothing
        state = read_manifest(tmp_path)
        assert [session["versions"]["torch"] for session in state["sessions"]] == ["2.13", "2.14"]
        assert [session["status"] for session in state["sessions"]] == ["finished", "finished"]
        assert state["outcome"] == {"question": "why"}

    def test_an_error_of_the_run_is_not_hidden_by_one_of_the_disk(self, tmp_path):
        with pytest.raises(RuntimeError, match="the real one"), opened(tmp_path / "run") as run:  # noqa: PT012
            (tmp_path / "run").rename(tmp_path / "gone")
            atomic_write_text(tmp_path / "run", "a file")
            raise RuntimeError("the real one")
        assert run._lock is None


def test_the_manifest_is_json_that_anybody_reads(tmp_path):
    with opened(tmp_path) as run:
        run.phase("a", lambda folder: 1)
    text = (tmp_path / "manifest.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["config"] == CONFIG
    assert text.endswith("}\n")
