"""Rewriting runs that are killed amid every fault of a server: what was paid for is kept, and asked for once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from rewriting import ATTR, KilledError, kill_after, store_of, units

from lightning_interp.cli import main
from lightning_interp.generation.pacing import Backoff, Pace
from lightning_interp.rate.rewriting import chat_rewriters
from lightning_interp.rate.rewriting.driver import RewriteRun
from lightning_interp.rate.rewriting.store import RewriteStore
from lightning_interp.rate.rewriting.templates import RewriteTemplate

sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))
from served import Bad, serving

pytestmark = pytest.mark.skipif(find_spec("openai") is None, reason="the extra [endpoint] is not installed")

AT_ONCE, COUNT = 8, 100  # texts, each rewritten twice
TEMPLATE = RewriteTemplate(name="plain", version=1, body="{phrase}: {text}", phrases=("no", "yes"))


class Bill:
    """How many answers a server gave for nothing, counted anew after each kill."""

    def __init__(self, bad, folder):
        self.bad, self.folder, self.lost = bad, folder, 0

    def after_a_kill(self):
        before, there = self.lost, [record for record in RewriteStore.open(self.folder).records() if record.usable]
        self.lost = sum(self.bad.paid.values()) - len(there)
        assert 0 <= self.lost - before <= AT_ONCE

    def settled(self, count):
        """All texts are there and right, and none was asked for again but those that were under way."""
        found = RewriteStore.open(self.folder).triples(ATTR)
        phrases = [[TEMPLATE.phrases[w] for w in (1 - unit.w, unit.w)] for unit in units(count)]
        once = [f"answer to {to}: {unit.text}" for unit, (to, _) in zip(units(count), phrases, strict=True)]
        assert found.rewrite == once
        assert found.rewrite2 == [f"answer to {back}: {text}" for text, (_, back) in zip(once, phrases, strict=True)]
        assert len(self.bad.paid) == 2 * count
        assert sum(self.bad.paid.values()) - 2 * count == self.lost


@pytest.mark.parametrize("count", [9, pytest.param(COUNT, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_twice(tmp_path, monkeypatch, count):
    bad, store = Bad(), store_of(tmp_path, count)
    bill = Bill(bad, tmp_path)
    with serving(script=bad) as served, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of long waits
        rewriter = chat_rewriters.OpenAICompatibleRewriter(
            "m", TEMPLATE, base_url=served.url, sleep=lambda seconds: None, backoff=Backoff(first=0, most=0)
        )
        for _ in range(2):
            with monkeypatch.context() as patch:
                kill_after(patch, 2 * count // 3)
                with pytest.raises(KilledError):
                    RewriteRun(store, rewriter, attr=ATTR).run()
            store = RewriteStore.open(tmp_path)
            bill.after_a_kill()
        assert any(RewriteRun(store, rewriter, attr=ATTR).run().complete for _ in range(9))
    bill.settled(count)


def audit(command, said):
    """In a forked process: the recipe, which waits for no server."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, buffering=1) for number in (1, 2))
    chat_rewriters.Pace = lambda **how: Pace(**{**how, "sleep": lambda seconds: None})
    os._exit(main(command))


@pytest.mark.slow
def test_an_audit_whose_process_is_killed_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    template = {"name": "plain", "version": 1, "body": TEMPLATE.body, "phrases": TEMPLATE.phrases}
    (tmp_path / "plain.json").write_text(json.dumps(template))
    rows = [json.dumps({"id": unit.id, "text": unit.text, "w": unit.w}) for unit in units(COUNT)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    bad, said = Bad(), tmp_path / "said"
    bill = Bill(bad, tmp_path / "run/phases/rewrite/store")
    with serving(script=bad) as served:
        command = [
            "run", "rate/audit", f"--run_dir={tmp_path / 'run'}", f"--data={tmp_path / 'mine.jsonl'}",
            "--rewriter=endpoint", "--model=m", f"--base_url={served.url}", f"--template={tmp_path / 'plain.json'}",
            f"--attribute={ATTR}", "--reward=vader", "--max_calls=999",
        ]  # fmt: skip

        def started():
            process = multiprocessing.get_context("fork").Process(target=audit, args=(command, said))
            process.start()
            return process

        for stop_at in (70, 140):
            process = started()
            while sum(bad.paid.values()) < stop_at:
                assert process.is_alive(), said.read_text()
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            time.sleep(0.2)  # the server's threads end
            bill.after_a_kill()
        for _ in range(9):
            process = started()
            process.join(timeout=300)
            if process.exitcode == 0:
                break
    assert process.exitcode == 0, said.read_text()
    assert "Traceback" not in said.read_text()
    bill.settled(COUNT)
    sessions = json.loads((tmp_path / "run/manifest.json").read_text())["sessions"]
    assert [session["status"] for session in sessions][:2] == ["running"] * 2
