"""A run folder that somebody else prepared: nothing of ours is written, deleted or read through a link out of it."""

import os
from contextlib import nullcontext

import pytest

from lightning_interp.core.storage.content import delete_folder
from lightning_interp.core.storage.files import atomic_write_text
from lightning_interp.core.storage.inside import check_inside, is_inside_name, open_own
from lightning_interp.core.storage.jsonl import JsonlAppender
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.core.storage.run_lock import RunLock, is_in_use
from lightning_interp.errors import ManifestError


def opened(folder):
    return RunManifest.open(folder, config={"seed": 0}, name="demo")


@pytest.fixture
def outside(tmp_path):
    """Somebody's files, which must stay as they are."""
    folder = tmp_path / "outside"
    atomic_write_text(folder / "precious", "as it was")
    yield folder
    assert sorted(path.name for path in folder.iterdir()) == ["precious"]
    assert (folder / "precious").read_text() == "as it was"


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    with opened(folder) as run:
        run.phase("fit", lambda phase: atomic_write_text(phase / "x", "x").name)
        with run.child("cycle", config={}) as child:
            child.phase("fit", lambda phase: 1)
    return folder


def swap(path, target):
    """Put a link in the place of a file or folder, which is kept beside it."""
    if path.exists():
        path.rename(path.with_name(f"{path.name}.kept"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


PLACES = [
    ".lock", "manifest.json", "config.yaml", "metrics.json", "report.html", "tables", "tables/a.csv", "figures",
    "figures/a.png", "phases", "phases/fit", "phases/fit/result.json", "phases/fit/x", "phases/new",
    "phases/new/last.ckpt", "tensorboard", "tensorboard/fit", "children", "children/cycle", "children/cycle/.lock",
    "children/cycle/phases/fit",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", ["precious", "", "missing"])
def test_a_link_out_of_the_run_folder_is_refused_and_its_target_stays(run_folder, outside, place, target):
    swap(run_folder / place, outside / target)
    with pytest.raises(ManifestError, match=r"is a link to '.*outside.*Delete the link, or put what it points to"):
        opened(run_folder)


@pytest.mark.parametrize("place", [".lock", "manifest.json", "tensorboard", "phases", "report.html"])
def test_a_folder_that_holds_no_run_yet_is_looked_at_too(tmp_path, outside, place):
    swap(tmp_path / "run" / place, outside / "precious")
    with pytest.raises(ManifestError, match=r"is a link to"):
        opened(tmp_path / "run")


def test_links_within_a_phase_and_the_name_of_the_run_itself_are_let_be(tmp_path, run_folder):
    (run_folder / "phases/fit/last.ckpt").symlink_to("x")  # as Lightning makes with save_last="link"
    (run_folder / "children/cycle/phases/fit/last").symlink_to("result.json")
    (tmp_path / "name").symlink_to(run_folder)
    opened(tmp_path / "name").close()
    swap(run_folder / "tables", run_folder / "phases")  # but none among the run's own files
    with pytest.raises(ManifestError, match=r"is a link to"):
        opened(run_folder)


@pytest.mark.parametrize("place", [".lock", "manifest.json", "phases/fit/pipe"])
def test_a_pipe_is_refused_and_not_waited_for(run_folder, place):
    (run_folder / place).unlink(missing_ok=True)
    os.mkfifo(run_folder / place)
    with pytest.raises(ManifestError, match=r"is neither a file nor a folder. Delete it"):
        opened(run_folder)


def test_a_lock_with_another_name_is_not_emptied(tmp_path, outside):
    (tmp_path / "run").mkdir()
    os.link(outside / "precious", tmp_path / "run/.lock")
    with pytest.raises(ManifestError, match="is no file of its own"):
        opened(tmp_path / "run")
    assert not is_in_use(tmp_path / "run")


@pytest.mark.parametrize("place", ["tensorboard/fit/hparams.yaml", "phases/fit/last.ckpt", "manifest.json"])
def test_a_run_folder_with_hard_links_is_not_written_to(run_folder, outside, place):
    (run_folder / place).parent.mkdir(parents=True, exist_ok=True)
    (run_folder / place).unlink(missing_ok=True)
    os.link(outside / "precious", run_folder / place)
    with pytest.raises(ManifestError, match=rf"{place}' is no file of its own.*hard link.*Put a copy in its place"):
        opened(run_folder)
    check_inside(run_folder)  # to be read, it may have as many names as it likes


@pytest.mark.parametrize("torn", ["", "{"])
@pytest.mark.parametrize("linked", ["rows.jsonl", "rows.torn"])
def test_rows_are_not_appended_to_what_has_another_name(tmp_path, torn, linked):
    before = b"{}\n" + torn.encode()
    for name in ("rows.jsonl", "other"):
        (tmp_path / name).write_bytes(before)
    (tmp_path / linked).unlink(missing_ok=True)
    os.link(tmp_path / "other", tmp_path / linked)
    writes = linked == "rows.jsonl" or torn
    with pytest.raises(ManifestError, match=f"{linked}' is no file of its own") if writes else nullcontext():
        JsonlAppender(tmp_path / "rows.jsonl", torn=tmp_path / "rows.torn").append([{"a": 1}])
    assert (tmp_path / "other").read_bytes() == before


def test_a_lock_alone_follows_no_link(tmp_path, outside):
    (tmp_path / ".lock").symlink_to(outside / "precious")
    with pytest.raises(ManifestError, match=r"is a link and would be written to. Delete it"):
        RunLock(tmp_path)
    assert not is_in_use(tmp_path)


def test_a_file_that_cannot_be_opened_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_own(tmp_path / "none", os.O_RDONLY)


def test_what_is_not_of_the_run_is_none_of_its_business(run_folder, outside):
    (run_folder / "notes").symlink_to(outside)
    atomic_write_text(run_folder / ".mine.tmp", "a file of the user's")
    check_inside(run_folder)
    opened(run_folder).close()
    assert (run_folder / ".mine.tmp").exists()


def test_deleting_a_folder_that_became_a_link_deletes_the_link(tmp_path, outside):
    (tmp_path / "phase").symlink_to(outside)
    delete_folder(tmp_path / "phase")
    assert not (tmp_path / "phase").is_symlink()


@pytest.mark.parametrize("name", ["../../outside/precious", "/etc/passwd", "a/../../b", ""])
def test_a_manifest_names_files_inside_of_their_phase(run_folder, name):
    text = (run_folder / "manifest.json").read_text()
    atomic_write_text(run_folder / "manifest.json", text.replace('"x": {', f'"{name}": {{'))
    with pytest.raises(ManifestError, match=r"phases.fit.files names .*, outside of the phase's folder"):
        read_manifest(run_folder)
    assert not is_inside_name(name)
    assert is_inside_name("a/b..c")


@pytest.mark.parametrize("name", ["../x", "a b", "/x"])
def test_a_manifest_names_phases_as_they_can_be_named(run_folder, name):
    text = (run_folder / "manifest.json").read_text()
    atomic_write_text(run_folder / "manifest.json", text.replace('"fit": {', f'"{name}": {{'))
    with pytest.raises(ManifestError, match="cannot name a phase"):
        read_manifest(run_folder)
