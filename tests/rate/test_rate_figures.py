"""Figures show the numbers of the result."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rate_oracle import GOLDEN, random_units

from lightning_interp.errors import RecipeError
from lightning_interp.rate import (
    asymmetry_line,
    effects_figure,
    overlay_figure,
    rate_effects,
    sensitivity_figure,
    trend_figure,
)


def drawn(figure):
    figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue().startswith(b"\x89PNG")


def bars(axis):
    return {c.get_label(): [bar.get_height() for bar in c] for c in axis.containers if hasattr(c, "patches")}


def test_bars_are_the_estimates_and_lines_the_intervals():
    results = {"A": rate_effects(*random_units(60, 1)), "B": rate_effects(*random_units(90, 2))}
    figure = effects_figure(results, title="Length")
    axis = figure.axes[0]
    tables = [result.standardized for result in results.values()]
    expected = {
        "naive (originals of the two arms)": [t.naive for t in tables],
        "single rewrite": [t.single.ate for t in tables],
        "double rewrite (RATE)": [t.rate.ate for t in tables],
    }
    assert bars(axis) == {name: pytest.approx([e.value for e in effects]) for name, effects in expected.items()}
    for effects, lines in zip(expected.values(), axis.collections, strict=True):
        ends = [[segment[0][1], segment[1][1]] for segment in lines.get_segments()]
        assert ends == [pytest.approx([e.low, e.high]) for e in effects]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["A", "B"]
    assert "standard deviations" in axis.get_ylabel()
    assert figure.get_suptitle() == "Length\nATE, 60 to 90 units; lines: 95 % intervals"
    assert drawn(figure)


def test_one_result_in_reward_units():
    result = rate_effects(*random_units(60), alpha=0.1)
    figure = effects_figure(result, estimand="att", standardized=False)
    assert bars(figure.axes[0])["double rewrite (RATE)"] == pytest.approx([result.rate.att.value])
    assert "reward units" in figure.axes[0].get_ylabel()
    assert figure.get_suptitle() == "ATT, 60 units; lines: 90 % intervals"
    assert drawn(figure)


def test_without_originals_there_is_one_bar():
    result = rate_effects(GOLDEN["w"], None, GOLDEN["r_rw"], GOLDEN["r_rw2"])
    assert list(bars(effects_figure(result, standardized=False).axes[0])) == ["double rewrite (RATE)"]


def test_overlay_is_drawn_by_arm():
    result = rate_effects(*random_units(80))
    figure = overlay_figure(result, title="Length", bins=12)
    units = result.units
    for axis, arm, value in zip(figure.axes, (units.w, ~units.w), (1, 0), strict=True):
        assert axis.get_title().startswith(f"w = {value}, {arm.sum()} units; mean shift ")
        means = [line.get_xdata()[0] for line in axis.lines]
        assert means == pytest.approx([units.r_orig[arm].mean(), units.r_rw2[arm].mean()])
        outlines = [p.get_xy() for p in axis.patches]
        assert len(outlines) == 4
        for outline, rewards in zip(outlines[1::2], (units.r_orig[arm], units.r_rw2[arm]), strict=True):
            edges = np.histogram_bin_edges(np.concatenate([units.r_orig, units.r_rw2]), bins=12)
            heights = np.histogram(rewards, bins=edges, density=True)[0]
            assert outline[:, 1].max() == pytest.approx(heights.max())
    assert figure.get_suptitle() == "Length"
    assert drawn(figure)


def test_overlay_of_an_empty_arm():
    with pytest.warns(UserWarning, match="No unit has w=1"):
        result = rate_effects([0] * 7, *list(GOLDEN.values())[1:])
    figure = overlay_figure(result)
    assert figure.axes[0].get_title() == "w = 1, 0 units"
    assert drawn(figure)


def test_sensitivity_line():
    result = rate_effects(*random_units(80))
    line = asymmetry_line(result, beta=1.5)
    axis = sensitivity_figure(line, title="Typos").axes[0]
    assert axis.lines[0].get_ydata() == pytest.approx([effect.value for effect in line.effect])
    assert axis.lines[-1].get_xdata() == pytest.approx([line.zero])
    assert axis.get_legend().get_texts()[0].get_text() == f"zero at D = {line.zero:.2g}"
    assert axis.get_title() == "Typos"
    weak = asymmetry_line(result, beta=0.1)
    figure = sensitivity_figure(weak)
    assert "beyond any possible asymmetry" in figure.axes[0].get_title()
    assert figure.axes[0].get_legend() is None
    assert drawn(figure)


def test_errors():
    result = rate_effects(*random_units(20), standardize=False)
    with pytest.raises(RecipeError, match="Result 'A' holds no standardised effects"):
        effects_figure({"A": result})
    with pytest.raises(RecipeError, match="got 1 results and estimand='late'"):
        effects_figure(result, estimand="late")
    with pytest.raises(RecipeError, match="got 0 results"):
        effects_figure({})
    with pytest.raises(
        RecipeError, match=r"overlay_figure\(\) compares with the original rewards, but r_orig was None"
    ):
        overlay_figure(rate_effects(GOLDEN["w"], None, GOLDEN["r_rw"], GOLDEN["r_rw2"]))


def test_lines_over_a_number_are_the_estimates_and_bands_the_intervals():
    results = {20.0: rate_effects(*random_units(60, 1)), 0.0: rate_effects(*random_units(90, 2))}
    figure = trend_figure(results, across="typos (%)", truth=0.3, title="Typos")
    axis = figure.axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    for name, of in (
        ("single rewrite", lambda t: t.single.ate),
        ("naive (originals of the two arms)", lambda t: t.naive),
    ):
        effects = [of(results[at].standardized) for at in (0.0, 20.0)]
        assert lines[name].get_xdata().tolist() == [0.0, 20.0]
        assert lines[name].get_ydata() == pytest.approx([effect.value for effect in effects])
    effects = [results[at].standardized.rate.ate for at in (0.0, 20.0)]
    corners = axis.collections[-1].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(min(effect.low for effect in effects))
    assert corners[:, 1].max() == pytest.approx(max(effect.high for effect in effects))
    assert lines["true effect"].get_ydata()[0] == pytest.approx(0.3 / results[0.0].reward_std)
    assert (axis.get_xlabel(), figure.get_suptitle()) == ("typos (%)", "Typos\nATE; bands: 95 % intervals")
    assert drawn(figure)


def test_lines_without_originals_and_wrong_settings():
    bare = rate_effects(GOLDEN["w"], None, GOLDEN["r_rw"], GOLDEN["r_rw2"])
    axis = trend_figure({0.0: bare, 1.0: bare}, across="x", standardized=False, truth=0.5).axes[0]
    assert [line.get_label() for line in axis.lines if line.get_label()[0] != "_"] == [
        "double rewrite (RATE)",
        "true effect",
    ]
    assert axis.lines[-1].get_ydata()[0] == 0.5
    with pytest.raises(RecipeError, match="got 0 results and estimand='ate'"):
        trend_figure({}, across="x")
    with pytest.raises(RecipeError, match="got 1 results and estimand='late'"):
        trend_figure({0.0: bare}, across="x", estimand="late")
    with pytest.raises(RecipeError, match=r"Result '2\.5' holds no standardised effects"):
        trend_figure({2.5: bare}, across="x")
