"""A chain that was killed anywhere goes on to the bytes of one that was not."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
from chains import SEED, chain, contents, fitting, score, writing

from lightning_interp.core.storage import faults
from lightning_interp.core.storage.faults import DIE_AT, die_here
from lightning_interp.cycles import Evaluate, FitDPO


def asked(model, tokenizer, **options):
    """An evaluation in the middle of which a test may kill."""
    die_here("asked")
    return score(model, tokenizer, **options)


def sft(folder):
    phases = [writing(), fitting(), Evaluate(evaluate=asked)]
    return chain(folder, init="continual", cycles=2, phases=phases)


def dpo(folder):
    fit = FitDPO(batch_size=2, checkpoint_every=1)
    phases = [writing(), fit, Evaluate(evaluate=asked)]
    return chain(folder, init="continual", cycles=2, first=[replace(fit, data=SEED, n=4)], phases=phases)


def killed(build, folder, at):
    """Run a chain in a process that is killed at a place; False if it has ended before it came there."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ[DIE_AT] = at
            faults._passed.clear()
            build(folder).run()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of chains that nobody killed, made once each."""
    made = {}

    def files(build):
        if build not in made:
            folder = tmp_path_factory.mktemp("whole") / "chain"
            build(folder).run()
            made[build] = contents(folder)
        return made[build]

    return files


def test_without_the_variable_nothing_dies(monkeypatch):
    monkeypatch.delenv(DIE_AT, raising=False)
    die_here("step")
    monkeypatch.setenv(DIE_AT, "step:99999")
    die_here("step")


@pytest.mark.parametrize(("build", "at"), [(sft, "shard:0"), (sft, "step:2"), (dpo, "written:6")])
def test_a_killed_chain_goes_on_to_the_same_bytes(build, at, whole, tmp_path):
    assert killed(build, tmp_path / "chain", at)
    assert contents(tmp_path / "chain") != whole(build)
    build(tmp_path / "chain").run()
    assert contents(tmp_path / "chain") == whole(build)


@pytest.mark.slow
@pytest.mark.parametrize("build", [sft, dpo])
@pytest.mark.parametrize("stage", ["begin", "written", "recorded", "shard", "step", "asked", "write"])
def test_wherever_it_is_killed(build, stage, whole, tmp_path):
    place, every = 0, 9 if stage == "write" else 1  # of some 150 files
    while killed(build, tmp_path / f"{place}", f"{stage}:{place}"):
        build(tmp_path / f"{place}").run()
        assert contents(tmp_path / f"{place}") == whole(build), f"{stage}:{place}"
        place += every
    assert place >= 2


@pytest.mark.slow
def test_killed_again_and_again_it_comes_to_its_end(whole, tmp_path):
    for at in ("step:0", "begin:1", "shard:0", "write:20", "step:0", "written:1"):
        killed(dpo, tmp_path / "chain", at)
    dpo(tmp_path / "chain").run()
    assert contents(tmp_path / "chain") == whole(dpo)
