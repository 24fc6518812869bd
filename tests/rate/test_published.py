"""The published aggregates of arXiv 2410.11348, from data sets that are made to have their arm-level moments.

No texts were published, but for each experiment and reward model the notebooks print sizes, effects and errors in full
precision. For each row a data set is drawn whose arms have the printed means and (co)variances exactly. The average
effects, their errors and the weights are never put in, so they test how arms are weighted, what the variances divide
by, what is paired, and the unit of standardised effects.
"""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from lightning_interp.rate import rate_effects

pytestmark = pytest.mark.kernels

ESTIMANDS = ("ate", "att", "atu")


def table():
    lines = Path(__file__).with_name("published.csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return [
        {key: value if key in ("group", "case", "rm") else _number(value) for key, value in row.items()} for row in rows
    ]


def _number(text):
    return float(text) if text else None


ROWS = [row for row in table() if row["rw1_se"] is not None]
PAIRED = [row for row in ROWS if row["ateR_se_paired"] is not None]


def name(row):
    return f"{row['group']} {row['case']} {row['rm']}"


def original_variances(row):
    """Variance of the original rewards in each arm, from the naive error and the pooled standard deviation."""
    n1, n0 = row["n1"], row["n0"]
    if n1 == n0:
        return row["reward_std"] ** 2, row["reward_std"] ** 2
    system = [[1 / n1, 1 / n0], [n1 - 1, n0 - 1]]
    return np.linalg.solve(system, [row["naive_se"] ** 2, (n1 + n0 - 2) * row["reward_std"] ** 2])


def moments(row, arm):
    """What the row says about one arm: size, means, variance of the original, and three variances of differences."""
    if arm == 1:
        means = (row["naive"], row["naive"] - row["att1"], row["naive"] + row["attR"] - row["att1"])
        single, double, trip = row["att1_se"], row["attR_se_unp"], row["rw1_se"]
    else:
        means = (0.0, row["atu1"], row["atu1"] - row["atuR"])
        single, double, trip = row["atu1_se"], row["atuR_se_unp"], row["rw0_se"]
    n = int(row[f"n{arm}"])
    return n, means, original_variances(row)[1 - arm], n * single**2, n * double**2, n * trip**2


def covariance(row, arm, share, rho=None):
    """Covariance of (r_orig, r_rw, r_rw2) if ``share`` of var(r_rw) + var(r_rw2) is that of r_rw.

    The covariance of the two rewrites is free: given the original they are independent, or their correlation is rho.
    """
    _, _, v0, single, double, trip = moments(row, arm)
    v1, v2 = share * double, (1 - share) * double
    c01, c02 = (v0 + v1 - single) / 2, (v0 + v2 - trip) / 2
    c12 = c01 * c02 / v0 if rho is None else rho * math.sqrt(v1 * v2)
    return np.array([[v0, c01, c02], [c01, v1, c12], [c02, c12, v2]])


def margin(matrix):
    """Smallest eigenvalue as a share of the largest; positive where the matrix is a covariance."""
    values = np.linalg.eigvalsh(matrix)
    return values[0] / values[-1]


def with_moments(n, means, matrix, rng):
    """``[n, 3]`` normal numbers whose sample mean and covariance are exactly these."""
    x = rng.normal(size=(n, 3))
    x -= x.mean(axis=0)
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x.T)), x.T).T
    return x @ np.linalg.cholesky(matrix).T + means


def data_set(row, shares, rho=None):
    rng = np.random.default_rng(0)
    arms = []
    for arm, share in zip((1, 0), shares, strict=True):
        n, means, *_ = moments(row, arm)
        arms.append(with_moments(n, means, covariance(row, arm, share, rho), rng))
    w = np.repeat([1, 0], [len(arm) for arm in arms])
    return (w, *np.concatenate(arms).T)


def published(row):
    """The fifteen printed numbers, and where the result holds them."""
    expected = {"reward_std": row["reward_std"], "naive": row["naive"], "naive_se": row["naive_se"]}
    for estimand in ESTIMANDS:
        expected |= {f"single/{estimand}": row[f"{estimand}1"], f"single/{estimand}/se": row[f"{estimand}1_se"]}
        expected |= {f"rate/{estimand}": row[f"{estimand}R"], f"rate/{estimand}/se": row[f"{estimand}R_se_unp"]}
    return expected


def found(result):
    numbers = {"reward_std": result.reward_std, "naive": result.naive.value, "naive_se": result.naive.se}
    for name, effects in (("single", result.single), ("rate", result.rate)):
        for estimand, effect in zip(ESTIMANDS, effects, strict=True):
            numbers |= {f"{name}/{estimand}": effect.value, f"{name}/{estimand}/se": effect.se}
    return numbers


def test_the_table_is_whole():
    assert len(ROWS) == 42
    assert len(PAIRED) == 14
    assert len(published(ROWS[0])) == 15


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_every_published_row(row):
    shares = [max(np.linspace(0.02, 0.98, 97), key=lambda s: margin(covariance(row, arm, s))) for arm in (1, 0)]
    result = rate_effects(*data_set(row, shares), se="unpaired")
    assert (result.counts.n1, result.counts.n0) == (row["n1"], row["n0"])
    assert found(result) == pytest.approx(published(row), rel=1e-6)
    trips = [result.rewrite_effect_w1, result.rewrite_effect_w0]
    assert [trip.se for trip in trips] == pytest.approx([row["rw1_se"], row["rw0_se"]], rel=1e-6)
    standard = result.standardized
    assert standard.rate.ate.value == pytest.approx(row["ateR"] / row["reward_std"], rel=1e-6)
    assert standard.naive.se == pytest.approx(row["naive_se"] / row["reward_std"], rel=1e-6)


def correlation(row, shares):
    """The correlation of the two rewrites, the same in both arms, that gives the published paired error of the ATE."""
    n1, n0 = row["n1"], row["n0"]
    n = n1 + n0
    within = (n - 1) * n * row["ateR_se_paired"] ** 2 - n1 * n0 / n * (row["attR"] - row["atuR"]) ** 2
    sums = [(moments(row, arm)[4], share) for arm, share in zip((1, 0), shares, strict=True)]
    apart = sum((size - 1) * total for size, (total, _) in zip((n1, n0), sums, strict=True))
    joint = sum(
        2 * (size - 1) * total * math.sqrt(share * (1 - share))
        for size, (total, share) in zip((n1, n0), sums, strict=True)
    )
    return (apart - within) / joint


@pytest.mark.parametrize("row", PAIRED, ids=name)
def test_the_published_paired_errors(row):
    def fit(shares):
        rho = correlation(row, shares)
        return min(margin(covariance(row, arm, share, rho)) for arm, share in zip((1, 0), shares, strict=True))

    shares = max(itertools.product(np.linspace(0.05, 0.95, 19), repeat=2), key=fit)
    rho = correlation(row, shares)
    assert fit(shares) > 0
    data = data_set(row, shares, rho)
    assert found(rate_effects(*data, se="unpaired")) == pytest.approx(published(row), rel=1e-6)
    assert rate_effects(*data).rate.ate.se == pytest.approx(row["ateR_se_paired"], rel=1e-6)


def test_pooled_rows_are_the_sums_of_their_parts():
    """Units of several data sets are pooled; effects add up weighted by units."""
    rows = {(row["case"], row["rm"]): row for row in table()}
    for rm in ("FsfairX", "OffsetBias", "ArmoRM"):
        whole = rows["sentiment(IMDB+HH)", rm]
        parts = [rows["IMDB-sentiment", rm], rows["HH-sentiment", rm]]
        for column, size in (("attR", "n1"), ("atuR", "n0"), ("att1", "n1"), ("atu1", "n0")):
            assert sum(p[size] * p[column] for p in parts) == pytest.approx(whole[size] * whole[column], rel=1e-7)
