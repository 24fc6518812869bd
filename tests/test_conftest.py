"""The safety nets of conftest.py catch what they are for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def run(folder, *, ci, bundled):
    (folder / "test_before.py").write_text(WIDE)
    (folder / "test_leaky.py").write_text(LEAKY)
    source = (ROOT / "tests" / "conftest.py").read_text()
    (folder / "conftest.py").write_text(
        f"{source}\nfrom lightning_interp.testing import marks\n"
        f"marks.find_spec = lambda name: object() if {bundled} else None\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in {"CI", "PYTEST_ADDOPTS", "PL_GLOBAL_SEED"}}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"CI": "true"} if ci else {})
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


def test_leaks_fail_the_test_that_leaked_and_do_not_reach_the_next(tmp_path):
    report = run(tmp_path, ci=False, bundled=False)
    assert outcome(report, "ERROR") == {"env_leak", "env_deleted", "dtype_leak", "grad_leak"}
    assert outcome(report, "FAILED") == set()
    assert "left them so: LEAKED_BY_TEST" in report
    assert "SKIPPED [1]" in report
    assert "the bundled SmolLM2 is not installed" in report


@pytest.mark.parametrize(("bundled", "status"), [(False, "ERROR"), (True, "PASSED")])
def test_a_missing_bundled_model_fails_on_ci(tmp_path, bundled, status):
    assert "bundled" in outcome(run(tmp_path, ci=True, bundled=bundled), status)


def test_the_process_runs_as_the_tests_expect():
    assert torch.get_num_threads() == 1
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["MPLBACKEND"] == "Agg"
    assert int(os.environ["MASTER_PORT"]) > 1023
