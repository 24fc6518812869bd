"""The estimators once more, unit by unit in plain Python, and data whose effects are known."""

from __future__ import annotations

import math

import numpy as np

GOLDEN = {
    "w": [1, 1, 1, 0, 0, 0, 0],
    "r_orig": [3, 2, 4, 1, 0, 2, 1],
    "r_rw": [1, 0.5, 2, 2, 1.5, 2, 3],
    "r_rw2": [2.5, 1, 3.5, 1.5, 0.5, 2.5, 1],
}
IDS = ["t1", "t2", "t3", "u1", "u2", "u3", "u4"]
PROMPTS = ["1", "2", "3", "1", "2", "3", "4"]


def average(values):
    return math.fsum(values) / len(values)


def spread(values):
    """Sample variance with n - 1."""
    middle = average(values)
    return math.fsum((x - middle) ** 2 for x in values) / (len(values) - 1)


def clustered(values, clusters):
    """Error of a mean from independent clusters."""
    middle, sums = average(values), {}
    for x, g in zip(values, clusters, strict=True):
        sums[g] = sums.get(g, 0.0) + x - middle
    count = len(sums)
    return math.sqrt(count / (count - 1) * math.fsum(s * s for s in sums.values())) / len(values)


def slow(w, r_orig, r_rw, r_rw2, clusters=None):
    """Every estimate, and every error by kind, from the definitions."""
    units = [tuple(map(float, row)) for row in zip(w, r_orig, r_rw, r_rw2, strict=True)]
    clusters = list(range(len(units))) if clusters is None else list(clusters)
    n1, n0 = sum(u[0] == 1 for u in units), sum(u[0] == 0 for u in units)
    n, found = n1 + n0, {}
    one, zero = ([u[1] for u in units if u[0] == arm] for arm in (1, 0))
    found["naive"] = average(one) - average(zero)
    found["naive_se"] = math.sqrt(spread(one) / n1 + spread(zero) / n0)
    found["reward_std"] = math.sqrt(((n1 - 1) * spread(one) + (n0 - 1) * spread(zero)) / (n - 2))
    contrasts = {
        "rate": [(u[3] - u[2]) if u[0] == 1 else (u[2] - u[3]) for u in units],
        "single": [(u[1] - u[2]) if u[0] == 1 else (u[2] - u[1]) for u in units],
    }
    for name, values in contrasts.items():
        arms = {"att": 1, "atu": 0}
        parts = {e: [x for x, u in zip(values, units, strict=True) if u[0] == arm] for e, arm in arms.items()}
        groups = {e: [g for g, u in zip(clusters, units, strict=True) if u[0] == arm] for e, arm in arms.items()}
        for estimand, members, group in (
            ("ate", values, clusters),
            ("att", parts["att"], groups["att"]),
            ("atu", parts["atu"], groups["atu"]),
        ):
            found[f"{name}/{estimand}"] = average(members)
            found[f"{name}/{estimand}/paired"] = math.sqrt(spread(members) / len(members))
            found[f"{name}/{estimand}/cluster"] = clustered(members, group)
        inside = (n1 / n) ** 2 * spread(parts["att"]) / n1 + (n0 / n) ** 2 * spread(parts["atu"]) / n0
        found[f"{name}/ate/stratified"] = math.sqrt(inside)
    with_w = [u[3] if u[0] == 1 else u[2] for u in units]
    without = [u[2] if u[0] == 1 else u[3] for u in units]
    found["rate/ate/unpaired"] = math.sqrt(spread(with_w) / n + spread(without) / n)
    for estimand, arm in (("att", 1), ("atu", 0)):
        sides = [[u[k] for u in units if u[0] == arm] for k in (2, 3)]
        found[f"rate/{estimand}/unpaired"] = math.sqrt(sum(spread(side) / len(side) for side in sides))
    for name, arm in (("b1", 1), ("b0", 0)):
        trip = [u[3] - u[1] for u in units if u[0] == arm]
        found[name], found[f"{name}_se"] = average(trip), math.sqrt(spread(trip) / len(trip))
    return found


def random_units(n, seed=0, *, share=0.4):
    """Confounded rewards with heterogeneous effects: (w, r_orig, r_rw, r_rw2), both arms present."""
    rng = np.random.default_rng(seed)
    w = rng.random(n) < share
    w[:2], w[2:4] = True, False
    base = rng.normal(size=n) + 1.5 * w
    effect = np.where(w, 1.0, 0.4) + 0.5 * rng.normal(size=n)
    texts = [base + effect * value + 0.3 * rng.normal(size=n) for value in (w, ~w, w)]
    return (w, *texts)


def heterogeneous(n, rng):
    """DGP-1: ATT 1, ATU 0.4, ATE 0.64; naive 2.02 and single 0.432 in expectation."""
    w = rng.random(n) < 0.4
    base = 1.5 * w + rng.normal(size=n)
    effect = np.where(w, 1.0, 0.4) + 0.5 * rng.normal(size=n)
    flaws = [rng.random(n) < np.where(w, 0.7, 0.1), rng.random(n) < 0.2, rng.random(n) < 0.2]
    return (w, *(base + effect * value - 0.8 * flaw for value, flaw in zip((w, ~w, w), flaws, strict=True)))


def asymmetric(n, difference, asymmetry, rng):
    """DGP-2: effect 1, flag worth -0.5; rewrites to 1 carry the flag more often by ``asymmetry`` than rewrites to 0."""
    w = np.arange(n) % 2 == 0
    after_to_1, after_to_0 = 0.2 + asymmetry / 2, 0.2 - asymmetry / 2
    original = np.where(w, 0.3 + difference / 2, 0.3 - difference / 2)
    chances = [original, np.where(w, after_to_0, after_to_1), np.where(w, after_to_1, after_to_0)]
    rewards = [
        value - 0.5 * (rng.random(n) < chance) + rng.normal(size=n)
        for value, chance in zip((w, ~w, w), chances, strict=True)
    ]
    return (w, *rewards)
