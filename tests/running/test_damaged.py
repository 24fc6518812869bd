"""Run folders that a disk, an editor or somebody else has changed: what cannot be read is said, no more raised."""

import copy
import json
import random
from contextlib import suppress

import pytest
from matplotlib.figure import Figure

from lightning_interp.cli import main
from lightning_interp.core.storage.files import atomic_write_bytes, atomic_write_text
from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.errors import InterpError, ManifestError
from lightning_interp.running.report import write_report
from lightning_interp.running.results import read_run, write_results

FILES = ("manifest.json", "metrics.json", "tables/points.csv", "children/one/manifest.json", "phases/fit/result.json")
MUTATIONS = 25  # a file


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a finished run with a child."""
    folder = tmp_path_factory.mktemp("run")
    with RunManifest.open(folder, config={"seed": 0, "trainer": {"devices": 1}}, name="demo") as run:
        run.phase("fit", lambda folder: {"loss": 0.5, "rows": [1, 2]})
        with run.child("one", config={}) as child:
            child.phase("fit", lambda folder: 1)
        tables = {"points": [{"plan": "FE", "top5": 0.25, "n": 7}, {"plan": 'a,\n"b"', "top5": None, "n": 1}]}
        figure = Figure(figsize=(1, 1))
        write_results(folder, metrics={"a": {"b": 1.5}}, tables=tables, figures={"f": figure})
        run.record_outcome({"question": "Why?", "summary": "points", "tables": ["points"], "figures": ["f"],
                            "caveats": ["Few."], "terms": {"FE": "x"}})  # fmt: skip
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def laid_out(folder, files):
    for name, data in files.items():
        atomic_write_bytes(folder / name, data)
    return folder


def looked_at(folder):
    """All that reads a run folder, without starting its run."""
    run = read_run(folder)
    for phase in run.manifest["phases"]:
        run.result(phase)
    write_report(folder)
    assert main(["show", str(folder)]) in (0, 1)


STATES = {
    "sessions of numbers": {"sessions": [0]},
    "an outcome of something else": {"outcome": {"a": 1}},
    "tables that are no list": {"outcome": {"tables": "points", "figures": [], "summary": ""}},
    "figures of numbers": {"outcome": {"tables": [], "figures": [1], "summary": ""}},
    "a summary of no table": {"outcome": {"tables": [], "figures": [], "summary": "points"}},
    "terms that are no texts": {"outcome": {"tables": [], "figures": [], "summary": "", "terms": {"a": [1]}}},
    "caveats that are no texts": {"outcome": {"tables": [], "figures": [], "summary": "", "caveats": [None]}},
    "a huge time": {
        "phases": {
            "fit": {"status": "finished", "inputs": "", "files": {}, "seconds": 10**400, "attempts": 1, "message": None}
        }
    },
    "phases of lists": {"phases": {"fit": []}},
    "config that is no object": {"config": 7},
    "another format": {"format": [[]]},
}


@pytest.mark.parametrize("state", STATES)
def test_a_manifest_that_says_something_else(state, whole, tmp_path, capsys):
    manifest = json.loads(whole["manifest.json"]) | STATES[state]
    folder = laid_out(tmp_path, whole | {"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(ManifestError, match=r"manifest\.json' (is damaged|has format)"):
        looked_at(folder)
    assert main(["show", str(folder)]) == main(["report", str(folder)]) == 1
    assert capsys.readouterr().err.startswith("lightning-interp: ")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900, b"9" * 5000, b"\xff\xfe", b"[]", b"null", b"\0"]
)
def test_a_file_that_is_something_else(name, data, whole, tmp_path):
    folder = laid_out(tmp_path, whole | {name: data})
    if name.startswith("children"):
        assert main(["show", str(folder)]) == 1
    elif name.endswith(".csv") and data != b"\xff\xfe":  # a table of one name and no row
        looked_at(folder)
        return
    with pytest.raises(InterpError, match=name.rpartition("/")[2]):
        _ = looked_at(folder), read_run(folder).children


def damaged(data, draws):
    """Bytes with a few changes, as a disk makes them, or a change of a value, as a person does."""
    if draws.random() < 0.5:
        changed = bytearray(data)
        for _ in range(draws.randrange(1, 4)):
            place = draws.randrange(len(changed))
            changed[place : place + draws.randrange(3)] = bytes(
                draws.choices(b'0"[]{}:,-e.\xff\n a', k=draws.randrange(3))
            )
        return bytes(changed[: draws.randrange(len(changed))] if draws.random() < 0.2 else changed)
    try:
        plain = json.loads(data)
    except ValueError:
        return data[: draws.randrange(len(data))]
    places, waiting = [], [copy.deepcopy(plain)]
    top = waiting[0]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            keys = list(one) if isinstance(one, dict) else range(len(one))
            places += [(one, key) for key in keys]
            waiting += [one[key] for key in keys]
    if places:
        one, key = draws.choice(places)
        one[key] = draws.choice(
            [None, 0, -1, 10**30, 1e308, float("nan"), "", "x", [], {}, [[]], {"a": {}}, True, "9" * 400]
        )
    return json.dumps(top).encode()


@pytest.mark.parametrize("name", FILES)
def test_whatever_is_changed_only_errors_of_ours_are_raised(name, whole, tmp_path, capsys):
    draws = random.Random(f"0 {name}")  # noqa: S311 - no secrets
    laid_out(tmp_path, whole)
    for _ in range(MUTATIONS):
        atomic_write_bytes(tmp_path / name, damaged(whole[name], draws))
        with suppress(InterpError):
            looked_at(tmp_path)
        capsys.readouterr()


def test_a_run_of_an_earlier_version_has_no_findings(whole, tmp_path):
    manifest = json.loads(whole["manifest.json"])
    manifest["config"]["model"] = "some/model"
    for key in ("terms", "question", "caveats"):
        del manifest["outcome"][key]
    folder = laid_out(tmp_path, whole | {"manifest.json": json.dumps(manifest).encode()})
    assert "some/model" in write_report(folder).read_text()
    atomic_write_text(folder / "tables/points.csv", "a\n" + "9" * 5000 + "\n")
    assert read_run(folder).tables["points"] == [{"a": "9" * 5000}]
