from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.errors import RecipeError
from lightning_interp.generation.pacing import Backoff, Bucket, retry_after


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class TestBucket:
    @given(
        rate=st.sampled_from([6.0, 60.0, 600.0]),
        amounts=st.lists(st.floats(0.1, 30.0), min_size=1, max_size=40),
        pauses=st.lists(st.floats(0.0, 5.0), min_size=40, max_size=40),
    )
    def test_no_stretch_of_time_gets_more_than_its_share(self, rate, amounts, pauses):
        """Whatever is taken, between any two uses there is no more than the rate allows and one full bucket."""
        clock = Clock()
        bucket, used = Bucket(rate, clock=clock), []
        for amount, pause in zip(amounts, pauses, strict=False):
            clock.now += pause
            clock.now += bucket.take(amount)
            used.append((clock.now, amount))
        size = max(1.0, rate / 60)
        for start in range(len(used)):
            between = 0.0
            for end in range(start + 1, len(used)):
                between += used[end - 1][1]
                assert between <= size + (used[end][0] - used[start][0]) * rate / 60 + 1e-6

    @given(rate=st.sampled_from([6.0, 60.0, 600.0]), amounts=st.lists(st.floats(0.1, 30.0), min_size=1, max_size=40))
    def test_nobody_waits_longer_than_needed(self, rate, amounts):
        clock, size = Clock(), max(1.0, rate / 60)
        bucket = Bucket(rate, clock=clock)
        for amount in amounts:
            clock.now += bucket.take(amount)
        needed = (sum(amounts[:-1]) + min(amounts[-1], size) - size) / (rate / 60)
        assert clock.now <= max(0.0, needed) + 1e-6

    def test_evenly(self):
        clock = Clock()
        bucket = Bucket(120, clock=clock)
        assert [bucket.take(1) for _ in range(5)] == [0.0, 0.0, 0.5, 1.0, 1.5]
        clock.now = 10.0
        assert bucket.take(1) == 0.0

    def test_more_than_it_holds_waits_for_a_full_one_and_leaves_a_debt(self):
        clock = Clock()
        bucket = Bucket(60, clock=clock)
        assert bucket.take(10) == 0.0
        assert bucket.take(1) == 10.0

    def test_corrections(self):
        clock = Clock()
        bucket = Bucket(60, clock=clock)
        bucket.take(10)
        bucket.give_back(8)
        assert bucket.take(1) == 2.0
        bucket.give_back(-5)
        assert bucket.take(1) == 8.0
        bucket.give_back(1000)
        assert [bucket.take(1), bucket.take(1)] == [0.0, 1.0]  # never more than full

    def test_without_a_limit(self):
        bucket = Bucket(None, clock=Clock())
        bucket.give_back(-1e9)
        assert bucket.take(1e9) == 0.0

    @pytest.mark.parametrize("rate", [0, -1, float("nan")])
    def test_no_allowance_is_refused(self, rate):
        with pytest.raises(RecipeError, match=f"A limit of {rate} a minute allows nothing"):
            Bucket(rate, clock=Clock())


class TestBackoff:
    def test_full_jitter(self):
        backoff = Backoff(first=2.0, most=20.0, seed=0)
        for attempt in range(8):
            most = min(20.0, 2.0 * 2**attempt)
            waits = [backoff.seconds(attempt) for _ in range(400)]
            assert 0 <= min(waits) < 0.05 * most
            assert 0.95 * most < max(waits) <= most
            assert sum(waits) / 400 == pytest.approx(most / 2, rel=0.15)

    def test_never_less_than_the_server_asks(self):
        backoff = Backoff(first=1.0, most=4.0, seed=0)
        assert all(backoff.seconds(attempt, at_least=5.0) == 5.0 for attempt in range(6))

    def test_seeded(self):
        first, second, other = (Backoff(seed=seed) for seed in (1, 1, 2))
        assert [first.seconds(3) for _ in range(5)] == [second.seconds(3) for _ in range(5)]
        assert first.seconds(3) != other.seconds(3)

    def test_wrong_seconds(self):
        with pytest.raises(RecipeError, match=r"Backoff\(first=-1, most=60.0\)"):
            Backoff(first=-1)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0.0),
        ({"retry-after": "12"}, 12.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "later"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "x"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:00:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 -0000"}, 0.0),
    ],
)
def test_what_a_server_asks_for(headers, seconds):
    now = datetime(2026, 10, 21, 7, 28, 0, tzinfo=UTC)
    assert retry_after(headers, now=lambda: now) == seconds
