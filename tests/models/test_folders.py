from __future__ import annotations

import os
import time

import pytest
import torch
from safetensors.torch import save_file

from lightning_interp.errors import ManifestError
from lightning_interp.models.sources.folders import atomic_folder, remove_stale


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_block_leaves_nothing(tmp_path):
    def write():
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a.txt").write_text("a")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write()
    assert names(tmp_path) == []


def test_overwrite_replaces_and_a_failure_keeps_the_old(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True) as folder:
        raise RuntimeError
    assert names(target) == ["old.txt"]
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        assert names(target) == ["old.txt"]
    assert names(target) == ["new.txt"]
    assert names(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    real, calls = os.rename, []

    def rename(source, to):
        calls.append(to)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(source, to)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ManifestError, match="No space left on device"), atomic_folder(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["out"]


def test_a_full_folder_is_refused_and_an_empty_one_is_not(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target) as folder:
        (folder / "a.txt").write_text("a")
    with pytest.raises(ManifestError, match=r"out exists already and is not empty"), atomic_folder(target):
        pytest.fail("the block must not run")
    with pytest.raises(ManifestError, match=r"a.txt exists already"), atomic_folder(target / "a.txt"):
        pytest.fail("the block must not run")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ManifestError, match=r"Cannot write '.*file/out'"),
        atomic_folder(tmp_path / "file" / "out", overwrite=True),
    ):
        pytest.fail("the block must not run")


def test_files_get_the_rights_of_the_umask(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        save_file({"a": torch.zeros(1)}, folder / "private.safetensors")
        (folder / "private.safetensors").chmod(0o600)
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "out" / "private.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_remove_stale_spares_young_folders_and_other_targets(tmp_path):
    for name in (".out.1-a.tmp", ".out.2-b.tmp", ".other.1-a.tmp"):
        (tmp_path / name).mkdir()
    old = time.time() - 7200
    for name in (".out.1-a.tmp", ".other.1-a.tmp"):
        os.utime(tmp_path / name, (old, old))
    remove_stale(tmp_path / "out")
    assert names(tmp_path) == [".other.1-a.tmp", ".out.2-b.tmp"]
