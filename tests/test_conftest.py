"""The safety nets of conftest.py catch what they are for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import budget
import pytest
import torch

ROOT = Path(__file__).parents[1]

LEAKY = """
import os, sys, types
import pytest, torch

def test_env_leak(): os.environ["LEAKED_BY_TEST"] = "1"
def test_env_restored(): assert "LEAKED_BY_TEST" not in os.environ
def test_env_deleted(): del os.environ["TOKENIZERS_PARALLELISM"]
def test_lightning_may_write(): os.environ["PL_GLOBAL_SEED"] = "1"
def test_lightning_restored(): assert "PL_GLOBAL_SEED" not in os.environ
def test_dtype_leak(): torch.set_default_dtype(torch.float64)
def test_dtype_restored(): assert torch.get_default_dtype() == torch.float32
def test_grad_leak(): torch.set_grad_enabled(False)
def test_grad_restored(): assert torch.is_grad_enabled()
def test_rank_leak():
    from lightning_utilities.core.rank_zero import rank_zero_only
    rank_zero_only.rank = 3
def test_rank_restored():
    from lightning_utilities.core.rank_zero import rank_zero_only
    assert rank_zero_only.rank == 0
@pytest.mark.bundled
def test_bundled(): pass
"""


WIDE = """
import os
import pytest

@pytest.fixture(scope="module")
def wide(): os.environ["PL_GLOBAL_SEED"] = "1"
def test_wide(wide): pass
"""


SLOW = """
import time
import budget

def burn():
    end = time.process_time() + 0.5
    while time.process_time() < end: pass
def test_slow(): burn()
def test_shared():
    with budget.apart("what many share"): burn()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a run says whose tests leak, leave a wide fixture's seed behind and take too long."""
    folder = tmp_path_factory.mktemp("suite")
    for name, code in (("before", WIDE), ("leaky", LEAKY), ("slow", SLOW)):
        (folder / f"test_{name}.py").write_text(code)
    (folder / "budgets.json").write_text(json.dumps({"yardstick": 9.0, "others": 0.2, "files": {"test_leaky.py": 9}}))
    source = (ROOT / "tests" / "conftest.py").read_text()
    (folder / "conftest.py").write_text(
        f"{source}\nfrom pathlib import Path\nimport budget\nfrom lightning_interp.testing import marks\n"
        f"marks.find_spec = find_spec = lambda name: None\nbudget.FILE = Path('budgets.json')\nbudget.FLOOR = 0\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in {"CI", "PYTEST_ADDOPTS", "PL_GLOBAL_SEED"}}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", "--rootdir", folder, folder],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    ).stdout


def outcome(report, status):
    prefix = f"{status} test_leaky.py::test_"
    return {line.split()[1].split("test_")[-1] for line in report.splitlines() if line.startswith(prefix)}


def test_leaks_fail_the_test_that_leaked_and_do_not_reach_the_next(report):
    assert outcome(report, "ERROR") == {"env_leak", "env_deleted", "dtype_leak", "grad_leak"}
    assert outcome(report, "FAILED") == set()
    assert "left them so: LEAKED_BY_TEST" in report
    assert "SKIPPED [1]" in report
    assert "the bundled SmolLM2 is not installed" in report


def test_a_file_over_its_budget_is_named_and_what_is_shared_is_booked_apart(report):
    found = re.findall(r"^(\S.*): ([\d.]+) CPU seconds, at most 0.3", report, flags=re.MULTILINE)
    assert [name for name, _ in found] == ["test_slow.py", "what many share"]
    assert all(0.5 <= float(seconds) < 5 for _, seconds in found)


def test_budgets_are_a_factor_a_floor_and_the_speed_of_the_machine():
    budgets = {"others": 1.0, "files": {"a.py": 4.0}}
    assert budget.over({"a.py": 6.9, "b.py": 2.4}, budgets, 1.0) == {}
    said = budget.over({"a.py": 7.1, "b.py": 2.4}, budgets, 1.0)
    assert list(said) == ["a.py"]
    assert said["a.py"].startswith("a.py: 7.1 CPU seconds, at most 7.0 (1.5 x 4.0 + 1")
    said = budget.over({"a.py": 13.9, "b.py": 5.1}, budgets, 2.0)
    assert said["b.py"].endswith("at most 5.0 (1.5 x 1.0 + 1, on a machine that is 2.00 times as slow)")


def test_a_file_over_its_budget_is_measured_alone_before_it_turns_a_run_red(tmp_path, monkeypatch):
    (tmp_path / "test_slow.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p budget -p xdist.plugin -p no:cacheprovider")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    taken = budget.alone(["test_slow.py", "smoke run of something"], tmp_path)
    assert taken.keys() == {"test_slow.py", "what many share"}
    assert 0.5 <= taken["test_slow.py"] < 5
    assert budget.alone(["smoke run of something"], tmp_path) == {}


@pytest.mark.parametrize("part", range(6))
def test_a_file_stays_in_one_process_with_what_its_fixtures_made(tmp_path_factory, part):
    base = tmp_path_factory.getbasetemp()
    seen = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    with seen.open("a+") as file:
        file.write(f"{os.getpid()}\n")
        file.seek(0)
        assert set(file.read().split()) == {str(os.getpid())}


@pytest.mark.parametrize("ci", [False, True])
@pytest.mark.parametrize("bundled", [False, True])
def test_a_missing_bundled_model_fails_on_ci(request, monkeypatch, bundled, ci):
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    monkeypatch.setattr(conftest, "missing_bundled", lambda: None if bundled else "not installed")
    monkeypatch.setenv("CI", str(ci).lower())
    item = SimpleNamespace(get_closest_marker=lambda name: name == "bundled")
    if bundled:
        conftest.pytest_runtest_setup(item)
    else:
        with pytest.raises(pytest.fail.Exception if ci else pytest.skip.Exception, match="not installed"):
            conftest.pytest_runtest_setup(item)


def test_the_process_runs_as_the_tests_expect():
    assert torch.get_num_threads() == 1
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["MPLBACKEND"] == "Agg"
    assert int(os.environ["MASTER_PORT"]) > 1023
