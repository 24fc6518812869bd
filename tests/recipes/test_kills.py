"""Kills aimed at each phase of each recipe, cut checkpoints, full disks: nothing lost, nothing stuck, equal bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_interp.running.catalog import recipe_names

KILLS = int(os.environ.get("KILLS", "1"))  # at each phase, and between any two
SEED = int(os.environ.get("KILL_SEED", "0"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipe_names())
def test_a_killed_run_goes_on_to_the_same_bytes(recipe, tmp_path):
    driver = Path(__file__).with_name("killer.py")
    command = [sys.executable, str(driver), recipe, str(tmp_path), str(SEED), str(KILLS)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["wrong"] == []
    assert sum(row["killed"] for row in told["done"]) >= len(told["phases"]) / 2
