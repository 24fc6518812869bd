"""Tests import the helpers of recipes under the name by which the recipes do."""

import sys
from pathlib import Path

from lightning_interp.running.catalog import recipe_module

recipe_module("grafting/_common")  # makes the package lightning_interp_recipes known
for room in ("generation", "rate"):  # their stores, servers and oracles
    sys.path.insert(0, str(Path(__file__).parents[1] / room))
