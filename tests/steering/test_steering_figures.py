"""Figures show the numbers of the result that they were given."""

from __future__ import annotations

import math

import pytest
import torch
from matplotlib.figure import Figure

from lightning_interp.errors import RecipeError
from lightning_interp.steering.concepts.pairs import CounterfactualPairs
from lightning_interp.steering.effects.figures import LABELS, path_figure, steering_figure
from lightning_interp.steering.effects.metrics import SCORES, score_path
from lightning_interp.steering.effects.path_scores import PathScores
from lightning_interp.steering.softmax.geometry import SoftmaxGeometry


def leak(contexts=9, seed=3):
    """The closed-form family: the exact optimum moves the concept alone, the straight line leaks to neutral tokens."""
    rng = torch.Generator().manual_seed(seed)
    n, d = 5, 6
    zeta, neutral = (torch.randn(k, d, generator=rng, dtype=torch.float64) for k in (n, 9))
    zeta[:, 0], zeta[:, 1], neutral[:, :2] = 0.0, 1.0, 0.0
    e0, e1 = torch.eye(d, dtype=torch.float64)[:2]
    geometry = SoftmaxGeometry(torch.cat([zeta - e0 / 2, zeta + e0 / 2, neutral]))
    pairs = CounterfactualPairs([(i, n + i) for i in range(n)])
    s = torch.linspace(-6, 12, 60, dtype=torch.float64)
    paths = {"euclidean": {}, "exact": {}}
    for context in range(contexts):
        lam0 = 0.7 * torch.randn(d, generator=rng, dtype=torch.float64)
        lam0[0], lam0[1] = -6.0, 1.5
        straight = lam0 + (s + 6)[:, None] * e0
        best = straight - (torch.cosh(s / 2) / math.cosh(-3)).log()[:, None] * e1
        paths["euclidean"][context] = score_path(geometry, straight, pairs, probe=e0)
        paths["exact"][context] = score_path(geometry, best, pairs, probe=e0)
    return PathScores(paths)


@pytest.fixture(scope="module")
def result():
    return leak()


def saved(figure, path):
    assert isinstance(figure, Figure)
    figure.savefig(path, dpi=60)
    assert path.stat().st_size > 5000


def test_three_panels_hold_the_curves(result, tmp_path):
    figure = steering_figure(result, title="a made-up family", names={"exact": "exact optimum"})
    saved(figure, tmp_path / "figure.png")
    panels = figure.axes
    assert [axis.get_ylabel() for axis in panels] == [
        LABELS[score] for score in ("off_target_kl", "pair_mass", "rank_difference")
    ]
    curve = result.curve("euclidean", "off_target_kl")
    line = panels[0].lines[0]
    assert line.get_ydata() == pytest.approx([estimate.value for _, estimate in curve.points()])
    assert line.get_xdata() == pytest.approx([x for x, _ in curve.points()])
    start = panels[0].lines[1]
    assert (list(start.get_xdata()), list(start.get_ydata())) == ([curve.start.value], [curve.first.value])
    band = panels[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(max(e.high for _, e in curve.points()))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["euclidean", "exact optimum"]
    assert "a made-up family\n9 contexts; bands: 95 % intervals over contexts" in figure.get_suptitle()


def test_a_choice_of_scores_and_methods(result, tmp_path):
    figure = steering_figure(result, scores=["alignment"], methods=["exact"], bins=4)
    saved(figure, tmp_path / "figure.png")
    assert len(figure.axes) == 1
    assert len(figure.axes[0].lines[0].get_xdata()) == len(result.curve("exact", "alignment", bins=4).points())


def test_one_context_has_no_band_and_is_drawn(tmp_path):
    figure = steering_figure(leak(contexts=1))
    saved(figure, tmp_path / "figure.png")
    assert "1 context;" in figure.get_suptitle()


def test_every_path_on_its_own(result, tmp_path):
    figure = path_figure(result, score="pair_mass", names={"exact": "exact optimum"}, title="paths")
    saved(figure, tmp_path / "figure.png")
    assert [axis.get_title() for axis in figure.axes] == ["euclidean", "exact optimum"]
    assert [len(axis.lines) for axis in figure.axes] == [18, 18]  # a line and a dot for each context
    path = result.paths["euclidean"][0]
    shown = figure.axes[0].lines[0]
    keep = path["target_prob"] < 0.9999
    assert 0 < int(keep.sum()) < len(keep)
    assert shown.get_ydata() == pytest.approx(path["pair_mass"][keep].tolist())
    assert figure.axes[0].get_ylabel() == LABELS["pair_mass"]


def test_what_is_unknown(result):
    with pytest.raises(RecipeError, match="no score 'loss' of method 'euclidean'"):
        steering_figure(result, scores=["loss"])
    with pytest.raises(RecipeError, match="of method 'dual'"):
        path_figure(result, methods=["dual"])
    with pytest.raises(RecipeError, match="no score 'loss'"):
        path_figure(result, against="loss")


def test_every_score_has_a_label():
    assert set(LABELS) == set(SCORES)
