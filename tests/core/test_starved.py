"""A disk that is full, and checkpoints that a kill cut short: refused with the remedy, and the run goes on after it."""

import errno
import logging
import os
import random
import re
import resource
import zipfile
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lightning_interp.core.storage.content import checkpoint_fault, drop_damaged_checkpoints
from lightning_interp.core.storage.files import atomic_write_text, no_room
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.errors import DataError, ManifestError
from lightning_interp.models.sources.folders import atomic_folder
from lightning_interp.running.run_folder import RunFolder


@contextmanager
def starved(size):
    """No file of this process can grow beyond so many bytes: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def caused(error, cause):
    error.__cause__ = cause
    return error


FULL = {
    "plain": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "too large": OSError(errno.EFBIG, "File too large"),
    "read only": OSError(errno.EROFS, "Read-only file system"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc] . unexpected pos: No space left on device"),
    "wrapped": caused(RuntimeError("cannot save"), OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_known_by_whatever_a_library_says(name):
    assert no_room(FULL[name]) == os.strerror(
        {"quota": errno.EDQUOT, "too large": errno.EFBIG, "read only": errno.EROFS}.get(name, errno.ENOSPC)
    )


@pytest.mark.parametrize(
    "error", [KeyError("x"), OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt(), None]
)
def test_other_errors_are_not(error):
    assert no_room(error) is None


def opened(folder):
    return RunManifest.open(folder, config={}, name="demo")


class TestPhases:
    @pytest.mark.parametrize("name", FULL)
    def test_it_is_said_and_the_same_command_goes_on(self, name, tmp_path):
        def full(folder):
            raise FULL[name]

        said = rf"Phase 'fit' could not write .*{no_room(FULL[name])}\. Free space"
        with pytest.raises(ManifestError, match=said), opened(tmp_path) as run:
            run.phase("fit", full)
        assert read_manifest(tmp_path)["phases"]["fit"]["status"] == "failed"
        with opened(tmp_path) as run:
            assert run.phase("fit", lambda folder: 1) == 1

    @pytest.mark.parametrize("error", [ValueError("no"), DataError("x: No space left on device, says the file")])
    def test_what_else_goes_wrong_is_said_as_it_is(self, error, tmp_path):
        def fails(folder):
            raise error

        with pytest.raises(type(error), match=str(error)), opened(tmp_path) as run:
            run.phase("fit", fails)


class TestFolders:
    def test_a_model_that_does_not_fit_leaves_nothing(self, tmp_path):
        def written():
            with atomic_folder(tmp_path / "donor") as temporary:
                atomic_write_text(temporary / "config.json", "{}")
                save_file({"w": torch.zeros(10_000)}, temporary / "model.safetensors")

        with pytest.raises(ManifestError, match=r"Cannot write '.*donor': File too large"), starved(10_000):
            written()
        assert list(tmp_path.iterdir()) == []
        with atomic_folder(tmp_path / "donor") as temporary:
            atomic_write_text(temporary / "config.json", "{}")
        assert (tmp_path / "donor/config.json").exists()

    def test_another_error_is_left_alone(self, tmp_path):
        with pytest.raises(KeyError, match="x"), atomic_folder(tmp_path / "donor"):
            raise KeyError("x")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of a checkpoint of torch."""
    path = tmp_path_factory.mktemp("whole") / "last.ckpt"
    torch.save({"state_dict": {"w": torch.arange(3000.0)}, "epoch": 1}, path)
    return path.read_bytes()


class TestCheckpoints:
    def test_a_whole_one_has_no_fault(self, checkpoint, tmp_path):
        (tmp_path / "last.ckpt").write_bytes(checkpoint)
        assert checkpoint_fault(tmp_path / "last.ckpt") is None

    def test_cut_at_any_byte_it_has_one(self, checkpoint, tmp_path):
        path, draws = tmp_path / "last.ckpt", random.Random(0)  # noqa: S311 - no secrets
        for length in [0, 1, 2, 3, 4, 30, len(checkpoint) - 1, *(draws.randrange(len(checkpoint)) for _ in range(40))]:
            path.write_bytes(checkpoint[:length])
            assert checkpoint_fault(path), length

    def test_with_a_changed_byte_in_a_tensor_it_has_one(self, checkpoint, tmp_path):
        path = tmp_path / "last.ckpt"
        path.write_bytes(checkpoint)
        with zipfile.ZipFile(path) as parts:
            tensor = max(parts.infolist(), key=lambda part: part.file_size)
        changed = bytearray(checkpoint)
        changed[tensor.header_offset + 5000] ^= 1
        path.write_bytes(changed)
        assert "damaged" in checkpoint_fault(path)

    def test_a_hole_of_zeros_as_a_power_cut_leaves_it(self, checkpoint, tmp_path):
        path = tmp_path / "last.ckpt"
        path.write_bytes(checkpoint[:4096] + bytes(len(checkpoint) - 4096))
        assert checkpoint_fault(path)

    def test_files_of_another_kind_are_left_alone(self, tmp_path):
        for name, data in (("a.ckpt", b"model_checkpoint_path: 'x'"), ("b.ckpt", b"\x80\x04pickle")):
            (tmp_path / name).write_bytes(data)
        (tmp_path / "zero" / "last.ckpt").mkdir(parents=True)  # of DeepSpeed
        (tmp_path / "zero" / "last.ckpt" / "latest").write_text("x")
        assert drop_damaged_checkpoints(tmp_path) == {}
        assert len(list(tmp_path.rglob("*.ckpt"))) == 3

    def test_a_folder_of_shards_without_its_table_of_contents_goes(self, tmp_path):
        for name, files in (("whole.ckpt", ("__0_0.distcp", ".metadata")), ("cut.ckpt", ("__0_0.distcp",))):
            for file in files:
                atomic_write_text(tmp_path / name / file, "x")
        (fault,) = drop_damaged_checkpoints(tmp_path).items()
        assert fault == (tmp_path / "cut.ckpt", "it lacks its table of contents, .metadata")
        assert [path.name for path in tmp_path.iterdir()] == ["whole.ckpt"]


@pytest.fixture
def warned():
    """What the package warns of in its log."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("lightning_interp").addHandler(handler)
    yield found
    logging.getLogger("lightning_interp").removeHandler(handler)


def test_a_phase_does_not_see_what_cannot_be_read_and_says_so(checkpoint, tmp_path, warned):
    curves = tmp_path / "run/tensorboard/fit/events.out"

    def killed(folder):
        atomic_write_text(curves, "of the first attempt")
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints/last.ckpt").write_bytes(checkpoint[:2000])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "run") as run:
        RunFolder(run).phase("fit", killed)
    with opened(tmp_path / "run") as run:
        RunFolder(run).phase("fit", lambda folder: [path.name for path in folder.rglob("*")])
        assert run.phases["fit"]["status"] == "finished"
    (said,) = warned
    assert re.fullmatch(r"phase fit: .*last\.ckpt cannot be read \(File is not a zip file\); deleted, what it .*", said)
    assert not curves.exists()  # the phase begins anew, and so do its curves


def test_a_phase_goes_on_from_what_can_be_read(checkpoint, tmp_path, warned):
    def killed(folder):
        (folder / "last.ckpt").write_bytes(checkpoint)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as run:
        RunFolder(run).phase("fit", killed)
    with opened(tmp_path) as run:
        assert RunFolder(run).phase("fit", lambda folder: [path.name for path in folder.iterdir()]) == ["last.ckpt"]
    assert warned == []


def test_what_a_kill_left_of_a_write_goes_and_other_hidden_files_stay(tmp_path):
    def killed(folder):
        for name in (".a.json.12-0123abcd.tmp", ".mine.tmp", "model/.b.13-0123abcd.tmp"):
            atomic_write_text(folder / name, "half")
        (folder / ".model.12-89abcdef.tmp").mkdir()
        atomic_write_text(folder / ".model.12-89abcdef.tmp/config.json", "{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as run:
        run.phase("fit", killed)
    for name in ("figures/.f.png.12-0123abcd.tmp", ".manifest.json.12-0123abcd.tmp"):
        atomic_write_text(tmp_path / name, "half")
    with RunManifest.open(tmp_path, config={}, name="demo", outputs=("figures", "none")) as run:
        run.phase("fit", lambda folder: 1)
    assert [path.name for path in tmp_path.rglob(".*")] == [".lock", ".mine.tmp"]
