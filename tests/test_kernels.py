"""The same numbers on other processors: marked tests run again under every kernel set that this processor has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SETS = ["default", "avx2", "avx512"]
CHOSEN = "golden_numbers or optimal_and or group_law or Targets or any_size or tiny_budgets or module_against_a_loop"
SAMPLE = ["tests/steering/test_promises.py", "tests/steering/test_dual.py", "tests/core/test_masked_linear.py"]


def known():
    """Kernel sets up to the one that torch chose, which is the best the processor has."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    return SETS[: SETS.index(best) + 1] if best in SETS else ["default"]


def run(kernels, *paths, profile="plain", names=""):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": kernels, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    code = f"""
import sys, torch, pytest
assert torch.backends.cpu.get_cpu_capability().lower() == {kernels!r}, torch.backends.cpu.get_cpu_capability()
options = ["-p", "no:xdist", "-o", "addopts=", "-q", "--budgets=off", "--hypothesis-profile={profile}"]
sys.exit(pytest.main([*options, "-k", {names!r}, "-m", "kernels and not slow", *{list(paths)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-500:]
    return int(passed[1])


@pytest.mark.skipif(len(known()) < 2, reason="this processor has one kernel set")
def test_a_sample_on_the_other_end_of_what_the_processor_has():
    other = next(name for name in known() if name != os.environ.get("ATEN_CPU_CAPABILITY", known()[-1]))
    assert run(other, *SAMPLE, profile="few", names=CHOSEN) > 30


@pytest.mark.slow
@pytest.mark.parametrize("kernels", SETS)
def test_all_marked_tests(kernels):
    if kernels not in known():
        pytest.skip(f"this processor has no {kernels}")
    assert run(kernels, "tests") > 500
