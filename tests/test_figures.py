"""The look that every figure has."""

from __future__ import annotations

import math
import time

import matplotlib as mpl
import pytest

from lightning_interp.core.measure.statistics import Estimate
from lightning_interp.figures import (
    BLUE,
    COLOURS,
    ORANGE,
    band,
    bars,
    heat_map,
    in_house_style,
    label,
    legend_below,
    panels,
    png,
)


def found(*values, reach=0.5):
    return [Estimate(value, value - reach, value + reach, 9, 0.95, "t") for value in values]


@in_house_style
def drawn(title="A\n3 things"):
    figure, (left, right) = panels(2, size=(6, 3), title=title, sharey=True)
    band(left, [0, 1], found(1.0, 2.0), BLUE, "one", marker="s")
    bars(right, ["x", "y"], found(1.0, 2.0), ORANGE, "two")
    bars(right, ["x", "y"], found(0.5, 0.25), BLUE, "one")
    label(left, "across", "up", title="left", zero=True)
    legend_below(figure, 2)
    return figure


def test_what_is_drawn():
    figure = drawn()
    left, right = figure.axes
    assert figure.get_suptitle() == "A\n3 things"
    assert (left.get_xlabel(), left.get_ylabel(), left.get_title()) == ("across", "up", "left")
    assert left.lines[0].get_ydata().tolist() == [1.0, 2.0]
    corners = left.collections[0].get_paths()[0].vertices[:, 1]
    assert (corners.min(), corners.max()) == (0.5, 2.5)
    assert left.lines[1].get_ydata() == [0, 0]
    assert [bar.get_height() for bar in right.containers[0]] == [1.0, 2.0]
    assert [segment[:, 1].tolist() for segment in right.collections[0].get_segments()] == [[0.5, 1.5], [1.5, 2.5]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_panels_in_rows():
    figure, axes = panels(5, size=(6, 6), columns=3)
    assert len(axes) == len(figure.axes) == 5
    assert [axis.get_subplotspec().rowspan.start for axis in axes] == [0, 0, 0, 1, 1]
    assert len(panels(2, size=(6, 3), columns=3)[1]) == 2


def test_an_interval_that_is_not_known_is_not_drawn():
    _, (axis,) = panels(1, size=(3, 3))
    band(axis, [0], [Estimate(1.0, math.nan, math.nan, 1, 0.95, "none")], BLUE)
    bars(axis, [0], [Estimate(1.0, math.nan, math.nan, 1, 0.95, "none")], BLUE, lying=True)
    corners = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert set(corners) == {1.0}
    assert axis.collections[1].get_segments()[0][:, 0].tolist() == [1.0, 1.0]


def test_a_table_is_drawn_with_its_first_row_at_the_bottom():
    figure, (axis,) = panels(1, size=(3, 3))
    heat_map(axis, [[0.0, 1.0], [2.0, 3.0]], ["a", "b"], cmap="viridis")
    assert axis.images[0].origin == "lower"
    assert axis.images[0].get_array().tolist() == [[0, 1], [2, 3]]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["a", "b"]
    assert len(figure.axes) == 2


def test_the_same_content_is_the_same_bytes_and_the_users_settings_are_left_alone(monkeypatch):
    first = png(drawn())
    assert first.startswith(b"\x89PNG")
    assert b"Software" not in first
    monkeypatch.setattr(time, "time", lambda: 2e9)
    with mpl.rc_context({"font.size": 20, "axes.grid": False, "savefig.dpi": 20, "lines.linewidth": 9}):
        before = dict(mpl.rcParams)
        assert png(drawn()) == first
        assert dict(mpl.rcParams) == before
    assert png(drawn("B")) != first


@pytest.mark.parametrize("name", ["deuteranopia", "protanopia"])
def test_people_with_colour_blindness_tell_the_colours_apart(name):
    """With the matrices of Machado, Oliveira and Fernandes (2009) for full severity, in linear light."""
    matrix = {
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    }[name]
    seen = []
    for colour in COLOURS:
        parts = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
        seen.append([max(0.0, sum(m * p for m, p in zip(row, parts, strict=True))) ** (1 / 2.2) for row in matrix])
    apart = [math.dist(a, b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(apart) > 0.15
