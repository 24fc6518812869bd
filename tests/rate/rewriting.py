"""A rewriter that counts what it is asked, and stores to fill with it."""

from __future__ import annotations

import threading
import time
from collections import Counter

from lightning_interp.rate.rewriting.records import RewriteResult, Unit
from lightning_interp.rate.rewriting.store import RewriteStore

ATTR = "mark"


def units(n=6, **more):
    """Units of both arms, with a text of their own."""
    return [Unit(id=f"u{i}", text=f"text {i}", w=i % 2, prompt=f"prompt {i % 3}", **more) for i in range(n)]


def store_of(folder, n=6):
    return RewriteStore.create(folder, units(n), attr=ATTR)


def rewritten(text, target, draw=0):
    """What the counting rewriter makes of a text: the target and the draw in front of its core."""
    return f"[{target}.{draw}] {text.rpartition('] ')[2]}"


class Counting:
    """Rewrites by a rule, and counts how often each text, prompt, target and draw was asked for."""

    name = "counting"

    def __init__(self, *, batch_size=1, concurrency=1, answers=None, delay=None):
        self.batch_size, self.concurrency = batch_size, concurrency
        self.asked = Counter()
        self.most_at_once = 0
        self._answers, self._delay = dict(answers or {}), delay
        self._lock, self._running = threading.Lock(), 0

    def rewrite(self, texts, prompts, w_target, draws):
        with self._lock:
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        try:
            return [self._one(*row) for row in zip(texts, prompts, w_target, draws, strict=True)]
        finally:
            with self._lock:
                self._running -= 1

    def _one(self, text, prompt, target, draw):
        with self._lock:
            self.asked[text, prompt, target, draw] += 1
            times = self.asked[text, prompt, target, draw]
        if self._delay is not None:
            time.sleep(self._delay(text, target))
        answer = self._answers.get((text, target), None)
        if callable(answer):
            answer = answer(times)
        return answer or RewriteResult(text=rewritten(text, target, draw), tokens_in=len(text), tokens_out=target + 1)


class KilledError(BaseException):
    """Stands for a kill: nothing may catch it."""


def kill_after(monkeypatch, records):
    """Let the process die when so many records are on disk."""
    from lightning_interp.rate.rewriting.store import StoreWriter

    append, left = StoreWriter.append, [records]

    def dying(self, batch):
        append(self, batch)
        left[0] -= len(batch)
        if left[0] <= 0:
            raise KilledError

    monkeypatch.setattr(StoreWriter, "append", dying)
