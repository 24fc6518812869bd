"""What do rewrite-based effects cost, and do their errors equal those of scipy?

50,000 units with 1,000 bootstrap resamples (units, clusters, and within arms) against a plain loop over resamples and
against fixed limits; errors against scipy's paired and Welch's t tests; then scoring, where that part is installed.
The floor of the bootstrap is the time that drawing the indices alone takes in the same run.

    python benchmarks/rate.py [--quick] [--device cpu|cuda] [--out rate.json]
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is imported; CPU seconds count every thread

import argparse
import importlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from _measure import PeakMemory, alternate, arguments, compare, finish, row
from scipy import stats

from lightning_interp.rate import RateResult, rate_effects

UNITS, RESAMPLES, LIMIT_SECONDS, LIMIT_MEGABYTES = 50_000, 1000, 5.0, 500.0
SAME = 1e-10  # largest relative difference to scipy

Columns = tuple[Any, Any, Any, Any]


def units(n: int, seed: int = 0) -> Columns:
    """Confounded rewards with different effects in the two arms."""
    rng = np.random.default_rng(seed)
    w = rng.random(n) < 0.4
    base, effect = 1.5 * w + rng.normal(size=n), np.where(w, 1.0, 0.4) + 0.5 * rng.normal(size=n)
    flaws = [rng.random(n) < np.where(w, 0.7, 0.1), rng.random(n) < 0.2, rng.random(n) < 0.2]
    rewards = [base + effect * value - 0.8 * flaw for value, flaw in zip((w, ~w, w), flaws, strict=True)]
    return w, rewards[0], rewards[1], rewards[2]


def ours(data: Columns, **options: Any) -> Callable[[], RateResult]:
    """Effects with a bootstrap: checks, order, estimates, errors, intervals."""
    return lambda: rate_effects(*data, ci="bootstrap", n_boot=RESAMPLES, **options)


def loop(data: Columns, resamples: int) -> Callable[[], Any]:
    """The peer: one resample after another, each with whole-array numpy, and nothing but the estimates."""
    w, r_orig, r_rw, r_rw2 = data
    delta, sigma = np.where(w, r_rw2 - r_rw, r_rw - r_rw2), np.where(w, r_orig - r_rw, r_rw - r_orig)

    def run() -> Any:
        rng, found = np.random.default_rng(0), []
        for _ in range(resamples):
            drawn = rng.integers(0, w.size, size=w.size)
            arm, d, s, r = w[drawn], delta[drawn], sigma[drawn], r_orig[drawn]
            one, zero = np.flatnonzero(arm), np.flatnonzero(~arm)
            found.append(
                [
                    *(d.mean(), d[one].mean(), d[zero].mean()),
                    *(s.mean(), s[one].mean(), s[zero].mean()),
                    r[one].mean() - r[zero].mean(),
                ]
            )
        return np.quantile(np.array(found), [0.025, 0.975], axis=0)

    return run


def draws() -> None:
    """The floor: as many random indices as the bootstrap needs, in blocks that stay in the cache."""
    rng = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        rng.integers(0, UNITS, size=UNITS)


def bootstrap(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of the bootstrap."""
    data, part = units(UNITS), 20 if chosen.quick else 100
    prompts = np.arange(UNITS) // 5
    functions: dict[str, Callable[[], Any]] = {
        "units": ours(data),
        "units within arms": ours(data, se="stratified"),
        "clusters": ours(data, se="cluster", cluster=prompts),
        "loop": loop(data, part),
        "draws": draws,
    }
    times = alternate(functions, device="cpu", repeats=3 if chosen.quick else 7)
    scaled = {**times, "plain loop over resamples": [t * RESAMPLES / part for t in times["loop"]]}
    scaled["drawing the indices alone"] = times["draws"]
    what = {"units": UNITS, "resamples": RESAMPLES}
    said = {**what, "peer_resamples": part, "peer_scaled_by": RESAMPLES / part}
    size = f"{UNITS:,} units, {RESAMPLES:,} resamples"
    rows = [
        compare(f"bootstrap of {size}", scaled, "units", "plain loop over resamples", target=0.5, detail=said),
        compare(f"bootstrap of {size}", scaled, "units", "drawing the indices alone", detail=what),
    ]
    for name in ("units", "units within arms", "clusters"):
        spent = statistics.median(times[name])
        rows.append(row(f"bootstrap of {name}: {size}", spent, LIMIT_SECONDS, "limit", target=1.0, detail=what))
        with PeakMemory("cpu") as memory:
            functions[name]()
        title = f"bootstrap of {name}, memory: {size}"
        rows.append(row(title, memory.megabytes, LIMIT_MEGABYTES, "limit", unit="MB", target=1.0, detail=what))
    return rows


def gap(found: float, expected: float) -> float:
    """Relative difference."""
    return abs(float(found) / float(expected) - 1)


def equality() -> list[dict[str, Any]]:
    """Errors and interval ends against scipy: the largest relative difference over several samples."""
    worst = dict.fromkeys(("paired errors and intervals", "naive errors and intervals"), 0.0)
    for seed in range(20):
        w, *rewards = units(40 + 200 * seed, seed)
        r_orig, r_rw, r_rw2 = rewards
        found = rate_effects(w, *rewards, ci="t")
        assert found.single is not None
        assert found.naive is not None
        sides = np.where(w, r_rw2, r_rw), np.where(w, r_rw, r_rw2)
        pairs = [
            (found.rate.ate, stats.ttest_rel(*sides)),
            (found.rate.att, stats.ttest_rel(r_rw2[w], r_rw[w])),
            (found.rate.atu, stats.ttest_rel(r_rw[~w], r_rw2[~w])),
            (found.single.att, stats.ttest_rel(r_orig[w], r_rw[w])),
            (found.naive, stats.ttest_ind(r_orig[w], r_orig[~w], equal_var=False)),
        ]
        for effect, test in pairs:
            ends = test.confidence_interval(0.95)
            name = "naive errors and intervals" if effect is found.naive else "paired errors and intervals"
            gaps = (
                gap(effect.se, effect.value / test.statistic),
                gap(effect.low, ends.low),
                gap(effect.high, ends.high),
            )
            worst[name] = max(worst[name], *gaps)
    peers = ("scipy.stats.ttest_rel", "scipy.stats.ttest_ind(equal_var=False)")
    return [
        row(f"{name} as {peer}", value, SAME, "limit", unit="relative difference", target=1.0, detail={"samples": 20})
        for (name, value), peer in zip(worst.items(), peers, strict=True)
    ]


def without_bootstrap(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Every effect with a normal interval, against the scipy tests that give a part of them."""
    w, r_orig, r_rw, r_rw2 = data = units(UNITS)

    def tests() -> None:
        stats.ttest_ind(r_orig[w], r_orig[~w], equal_var=False)
        stats.ttest_rel(np.where(w, r_rw2, r_rw), np.where(w, r_rw, r_rw2))
        for arm in (w, ~w):
            for a, b in ((r_rw2, r_rw), (r_orig, r_rw), (r_rw2, r_orig)):
                stats.ttest_rel(a[arm], b[arm])

    functions: dict[str, Callable[[], Any]] = {"effects": lambda: rate_effects(*data), "the scipy tests": tests}
    times = alternate(functions, device="cpu", repeats=5 if chosen.quick else 15)
    name = f"effects of {UNITS:,} units, inputs checked and sorted"
    return [
        compare(
            name,
            times,
            "effects",
            "the scipy tests",
            detail={"tests": 8, "reading_floor_megabytes": UNITS * 25 / 2**20},
        )
    ]


def scoring(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the scoring benchmark beside this file, if it is there."""
    if importlib.util.find_spec("_rate_scoring") is None:
        return []
    rows: list[dict[str, Any]] = importlib.import_module("_rate_scoring").rows(chosen)
    return rows


def main() -> None:
    """Measure everything and print the JSON."""
    chosen = arguments(__doc__.splitlines()[0])
    rows = [*bootstrap(chosen), *without_bootstrap(chosen), *equality(), *scoring(chosen)]
    finish("cost of rewrite-based effects", rows, chosen)


if __name__ == "__main__":
    main()
