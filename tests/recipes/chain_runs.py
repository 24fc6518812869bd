"""Small runs of recipes of chains, and what they leave; shared by their tests."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import tempfile
from pathlib import Path

import pytest

from lightning_interp import cli
from lightning_interp.core.storage.faults import DIE_AT
from lightning_interp.core.storage.manifest_file import read_manifest
from lightning_interp.errors import DataError


def configured(name, folder, *settings):
    return cli._configured(f"cycles/{name}", ["--smoke=true", f"--run_dir={folder}", *settings])


def ran(name, folder, *settings):
    """Run it; figures are made, not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_interp.running.results.png", lambda _: b"\x89PNG\r\n\x1a\n")
        configured(name, folder, *settings).run()


def table(folder, name):
    with (folder / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def phases(folder, arm, cycle):
    return folder / f"children/{arm}/children/cycle-{cycle:03d}/phases"


def contents(folder):
    """Bytes of everything that is left, but for times, paths, curves and checkpoints."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "tensorboard" not in path.parts)
    unstable = ("manifest.json", ".lock", "report.html", "config.yaml")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files if p.name not in unstable}


def outcome(folder):
    return read_manifest(folder)["outcome"]


def killed(folder, at, *settings, name="sft"):
    pid = os.fork()
    if pid == 0:  # pragma: no cover - dies
        os.environ[DIE_AT] = at
        try:
            ran(name, folder, *settings)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not (folder / "metrics.json").exists()
    ran(name, folder, *settings)


def differing(one, other):
    mine, whole = contents(one), contents(other)
    assert "metrics.json" in whole
    return [name for name in {**mine, **whole} if mine.get(name) != whole.get(name)]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(tmp_path, *settings, match, error=DataError, name="sft"):
    folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
    with pytest.raises(error, match=match):
        configured(name, folder, *settings).run()
    assert not list(folder.glob("children/*")), "nothing was trained"
