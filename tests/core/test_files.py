import contextlib
import enum
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.core.storage.content import delete_folder, fingerprint, hash_folder
from lightning_interp.core.storage.files import (
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    atomic_writer,
    canonical_json,
    check_writable,
    digest,
    jsonable,
    sha256_file,
)
from lightning_interp.errors import DataError, ManifestError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


def test_writes_replace_the_old_content_and_leave_nothing_else(tmp_path):
    target = tmp_path / "a" / "b" / "note.txt"
    for text in ("first", "second, longer", "3", ""):
        assert atomic_write_text(target, text) == target
        assert target.read_text() == text
        assert names(target.parent) == ["note.txt"]
    atomic_write_bytes(target, bytes(range(256)))
    assert target.read_bytes() == bytes(range(256))


def test_an_error_in_the_block_keeps_the_old_file(tmp_path):
    target = atomic_write_text(tmp_path / "x", "old")
    with pytest.raises(KeyboardInterrupt), atomic_writer(target) as file:  # noqa: PT012
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_an_error_about_another_file_inside_the_block_is_not_ours(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_writer(tmp_path / "x"):
        (tmp_path / "elsewhere").read_bytes()
    assert names(tmp_path) == []


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path):
    target = atomic_write_text(tmp_path / "x", "old")
    code = (
        "import os, signal, sys\nfrom lightning_interp.core.storage.files import atomic_writer\n"
        "with atomic_writer(sys.argv[1]) as file:\n"
        "    file.write(b'new' * 10**6); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code, str(target)], env=environment).returncode == -9
    assert target.read_text() == "old"


def test_a_link_stays_a_link_and_rights_follow_the_umask(tmp_path):
    real = atomic_write_text(tmp_path / "real", "old")
    link = tmp_path / "link"
    link.symlink_to(real)
    old = os.umask(0o027)
    try:
        atomic_write_text(link, "new")
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("write", [lambda p: atomic_write_text(p, "x"), check_writable])
def test_unwritable_folders_are_named(tmp_path, write):
    blocker = atomic_write_text(tmp_path / "file", "")
    with pytest.raises(ManifestError, match=r"Cannot write '.*/file/below/x': Not a directory.*--run_dir"):
        write(blocker / "below" / "x")
    with pytest.raises(ManifestError, match=r"Cannot write '.*/file/x': Not a directory"):
        write(blocker / "x")
    with pytest.raises(ManifestError, match=r"Cannot write '/proc/nothing/x': No such file"):
        write(Path("/proc/nothing/x"))


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ManifestError, match=r"Cannot write '.*/taken': Is a directory"):
        atomic_write_text(tmp_path / "taken", "x")
    assert names(tmp_path) == ["taken"]


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path, stack):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    target = atomic_write_text(tmp_path / "x", "old")
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed by the stack
    stack.callback(full.close)
    with pytest.raises(ManifestError, match=r"Cannot write '.*/x': No space left on device"), atomic_writer(target):
        full.write(b"x")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x"]


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: float
    where: Path


def test_jsonable_makes_plain_values():
    obj = {
        "np": np.float32(0.5),
        "array": np.arange(3),
        "bool": np.bool_(True),
        "tensor": torch.tensor([[1, 2]]),
        "enum": Colour.RED,
        "point": Point(1.0, Path("a")),
        "tuple": (1, None),
        "set": {3, 1, 2},
        7: "seven",
        True: "yes",
    }
    assert jsonable(obj) == {
        "np": 0.5,
        "array": [0, 1, 2],
        "bool": True,
        "tensor": [[1, 2]],
        "enum": "red",
        "point": {"x": 1.0, "where": "a"},
        "tuple": [1, None],
        "set": [1, 2, 3],
        "7": "seven",
        "true": "yes",
    }


def test_values_without_a_json_form_are_named_by_their_key_path():
    with pytest.raises(DataError, match=r"Cannot write metrics\.layers\[1\] as JSON: builtins\.object has no"):
        jsonable({"metrics": {"layers": [1, object()]}})
    with pytest.raises(DataError, match=r"key \(1, 2\) of metrics as JSON.*got tuple"):
        jsonable({"metrics": {(1, 2): 3}})


def test_nan_is_kept_for_python_and_null_for_others(tmp_path):
    path = tmp_path / "m.json"
    atomic_write_json(path, {"a": math.nan, "b": [math.inf]})
    read = json.loads(path.read_text())
    assert math.isnan(read["a"])
    assert read["b"] == [math.inf]
    atomic_write_json(path, {"a": math.nan, "b": [math.inf, 1.5]}, nan_as_null=True)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5]}


def test_letters_stay_readable_and_half_characters_read_back(tmp_path):
    assert "Zoë ☃" in atomic_write_json(tmp_path / "a", {"name": "Zoë ☃"}).read_text()
    assert json.loads(atomic_write_json(tmp_path / "b", {"t": "\ud83d"}).read_text()) == {"t": "\ud83d"}


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)


@given(plain)
def test_canonical_json_reads_back_equal_and_does_not_see_order(obj):
    assert json.loads(canonical_json(obj)) == obj
    turned = dict(reversed(obj.items())) if isinstance(obj, dict) else obj
    assert digest(turned) == digest(obj)


def test_digest_separates_what_differs():
    values = [None, 0, False, "0", [], {}, [0], [[0]], {"a": 0}, {"a": None}, 0.5, "", "a"]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(1.0) == digest(1)
    assert digest({"a": (1, 2)}) == digest({"a": [1, 2]})


def test_sha256_is_that_of_the_system(tmp_path):
    path = atomic_write_bytes(tmp_path / "x", os.urandom(3_000_000))
    expected = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert sha256_file(path) == expected


def test_folders_by_content(tmp_path):
    for name in ("a/x.txt", "a/last.ckpt", "a/step.ckpt/shard.bin", "a/events.out.tfevents.1.host", "b/x.txt"):
        atomic_write_text(tmp_path / name, "same")
    assert list(hash_folder(tmp_path / "a")) == ["x.txt"]
    same = fingerprint({"in": [tmp_path / "a"]}), fingerprint({"in": (tmp_path / "b",)})
    assert digest(same[0]) == digest(same[1])
    assert digest(fingerprint(tmp_path / "a")) != digest(fingerprint(tmp_path / "a" / "x.txt"))
    assert fingerprint({"p": tmp_path / "nothing"}) == {"p": str(tmp_path / "nothing")}
    atomic_write_text(tmp_path / "b/x.txt", "other")
    assert digest(fingerprint({"in": [tmp_path / "b"]})) != digest(same[0])


def test_deleting_a_folder_twice(tmp_path):
    atomic_write_text(tmp_path / "scratch/deep/x", "x")
    delete_folder(tmp_path / "scratch")
    delete_folder(tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
