"""Tests import the helpers of recipes under the name by which the recipes do."""

import functools
import sys
from pathlib import Path

import pytest

from lightning_interp.running.catalog import recipe_module

recipe_module("grafting/_common")  # makes the package lightning_interp_recipes known
for room in ("generation", "rate"):  # their stores, servers and oracles
    sys.path.insert(0, str(Path(__file__).parents[1] / room))


@pytest.fixture
def undrawn(monkeypatch):
    """Half the time of a small run goes into its figures, which the smoke runs draw: here they are made, not drawn."""
    monkeypatch.setattr("lightning_interp.running.results.png", lambda _: b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def loaded(monkeypatch):
    """Sources of models, in the order in which they are loaded."""
    from lightning_interp.models.sources import loading

    sources, original = [], loading.load_with
    monkeypatch.setattr(loading, "load_with", lambda *given: sources.append(given[0]) or original(*given))
    return sources


@pytest.fixture
def few_dummies(monkeypatch):
    """Rewards at random are drawn ten times, not 200: for runs whose numbers are not those of a run without this."""
    from lightning_interp.rate.checks.placebo import dummy_outcome_check

    few = functools.partial(dummy_outcome_check, repeats=10)
    monkeypatch.setattr("lightning_interp.rate.report.study.dummy_outcome_check", few)
