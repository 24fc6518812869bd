"""Files that are trusted by size and time of change, and read where these differ."""

import os
import shutil

import pytest

from lightning_interp.core.storage import content
from lightning_interp.core.storage.content import checked_stamp, current_stamp, hash_folder, known_sha256, stamp_file
from lightning_interp.core.storage.files import atomic_write_text, sha256_file
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.errors import ManifestError


@pytest.fixture
def reads(monkeypatch):
    """The files that are read, in order."""
    found = []
    monkeypatch.setattr(content, "sha256_file", lambda path: found.append(path.name) or sha256_file(path))
    return found


def aged(path, seconds=100):
    """Set the time of change back."""
    then = path.stat().st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(then, then))
    return path


def opened(folder):
    return RunManifest.open(folder, config={}, name="demo")


def never(folder):
    raise AssertionError("a finished phase was run again")


class TestStamps:
    def test_a_file_that_was_just_written_is_read_again(self, tmp_path, reads):
        file = atomic_write_text(tmp_path / "a", "one")
        stamp = stamp_file(file)
        assert stamp["mtime_ns"] is None
        os.utime(atomic_write_text(file, "two"), ns=(file.stat().st_mtime_ns,) * 2)
        assert checked_stamp(file, stamp) is None
        assert reads == ["a", "a"]

    def test_same_size_and_time_are_trusted(self, tmp_path, reads):
        file = aged(atomic_write_text(tmp_path / "a", "one"))
        stamp = stamp_file(file)
        assert checked_stamp(file, stamp) == current_stamp(file, stamp) == stamp
        assert reads == ["a"]

    def test_another_size_is_a_change_without_reading(self, tmp_path, reads):
        file = aged(atomic_write_text(tmp_path / "a", "one"))
        stamp = stamp_file(file)
        atomic_write_text(file, "three")
        assert checked_stamp(file, stamp) is None
        assert reads == ["a"]

    def test_another_time_is_decided_by_the_content(self, tmp_path):
        file = aged(atomic_write_text(tmp_path / "a", "one"))
        stamp = stamp_file(file)
        found = checked_stamp(aged(file), stamp)
        assert found == stamp | {"mtime_ns": file.stat().st_mtime_ns}
        assert checked_stamp(file, stamp["sha256"]) == found  # format 1 had the hash alone
        aged(atomic_write_text(file, "two"))
        assert checked_stamp(file, stamp) is None
        assert checked_stamp(file, stamp["sha256"]) is None


class TestInARun:
    def finished(self, folder):
        with opened(folder) as run:
            run.phase("merge", lambda at: aged(atomic_write_text(at / "weights", "w" * 100)).name)

    def test_a_run_that_goes_on_reads_no_file_again(self, tmp_path, reads):
        self.finished(tmp_path / "run")
        with opened(tmp_path / "run") as run:
            run.phase("merge", never)
        assert reads == ["weights"]

    def test_a_copied_run_is_read_once(self, tmp_path, reads):
        self.finished(tmp_path / "run")
        shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
        aged(tmp_path / "copy/phases/merge/weights", 50)
        for _ in range(2):
            with opened(tmp_path / "copy") as run:
                run.phase("merge", never)
        assert reads == ["weights", "weights"]

    def test_a_changed_file_is_refused(self, tmp_path):
        self.finished(tmp_path)
        atomic_write_text(tmp_path / "phases/merge/weights", "v" * 100)
        with (
            opened(tmp_path) as run,
            pytest.raises(ManifestError, match="weights' of the finished phase 'merge' has ch"),
        ):
            run.phase("merge", never)

    @pytest.mark.parametrize("change", ["missing", "changed"])
    def test_a_result_that_is_missing_or_changed_is_named(self, tmp_path, change):
        self.finished(tmp_path)
        file = tmp_path / "phases/merge/result.json"
        file.unlink() if change == "missing" else file.write_text('"weightz"')
        word = {"missing": "is missing", "changed": "has changed"}[change]
        with (
            opened(tmp_path) as run,
            pytest.raises(ManifestError, match=rf"result\.json' of the finished phase 'merge' {word}.*delete the"),
        ):
            run.phase("merge", never)

    def test_inputs_are_trusted_too(self, tmp_path, reads, monkeypatch):
        monkeypatch.setattr(content, "_LARGE", 4)
        large = aged(atomic_write_text(tmp_path / "large", "a lot"))
        small = aged(atomic_write_text(tmp_path / "small", "few"))
        self.finished(tmp_path / "run")
        for _ in range(2):
            with opened(tmp_path / "run") as run:
                inputs = {"own": run.folder("merge"), "files": [large, small]}
                run.phase("use", lambda at: 1, inputs=inputs)
        assert reads == ["weights", "large", "small", "small"]
        assert list(read_manifest(tmp_path / "run")["sources"]) == [str(large)]
        aged(atomic_write_text(large, "a tol"), 50)
        with opened(tmp_path / "run") as run:
            assert run.phase("use", lambda at: 2, inputs={"own": run.folder("merge"), "files": [large, small]}) == 2

    def test_a_phase_cannot_write_the_file_of_its_result(self, tmp_path):
        with opened(tmp_path) as run:
            with pytest.raises(ManifestError, match=r"'fit' wrote 'result\.json' into its folder .* another name"):
                run.phase("fit", lambda at: atomic_write_text(at / "result.json", "mine").name)
            assert run.phase("fit", lambda at: [path.name for path in at.iterdir()]) == []

    def test_results_are_no_part_of_a_folders_content(self, tmp_path):
        self.finished(tmp_path)
        assert list(hash_folder(tmp_path / "phases/merge")) == ["weights"]
        atomic_write_text(tmp_path / "mine/result.json", "1")
        assert list(hash_folder(tmp_path / "mine")) == ["result.json"]
        assert known_sha256(tmp_path / "mine/result.json", tmp_path, {"phases": {}}) == sha256_file(
            tmp_path / "mine/result.json"
        )

    def test_the_bookkeeping_does_not_grow_with_the_results(self, tmp_path):
        with opened(tmp_path) as run:
            for index in range(20):
                run.phase(f"p{index}", lambda at: "x" * 50_000)
        assert (tmp_path / "manifest.json").stat().st_size < 20_000
