"""Figures show the numbers of the tables."""

from __future__ import annotations

import io

import pytest

from lightning_interp.grafting import GraftResult
from lightning_interp.grafting.metrics import METRICS
from lightning_interp_recipes.grafting._figures import curves_figure, plans_figure

PLANS = ["PRE", "SFT", "FE^C"]


def result(forms=("one", "two"), units=("a", "b", "c")):
    rows = []
    for f, form in enumerate(forms):
        for u, unit in enumerate(units):
            for p, plan in enumerate(PLANS):
                values = {"top5": float(p == 1 or (p == 2 and u == f)), "target_prob": 0.1 + 0.2 * p + 0.05 * u}
                base = {"prompt": u, "unit": unit, "form": form, "plan": plan, "head": "recipient"}
                rows.append({**dict.fromkeys(METRICS, 0.0), **base, **values})
    return GraftResult(PLANS, top_k=7, rows=rows)


def drawn(figure):
    figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue().startswith(b"\x89PNG")


def test_bars_are_the_estimates():
    found = result()
    figure = plans_figure(found, title="Facts")
    for axis, metric in zip(figure.axes, ("top5", "target_prob"), strict=True):
        for form, bars in zip(("one", "two"), [c for c in axis.containers if hasattr(c, "patches")], strict=True):
            widths = [bar.get_width() for bar in bars]
            assert widths == pytest.approx([found.estimate(plan, metric, form=form).value for plan in PLANS])
            assert bars.get_label() == form
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == PLANS
    assert "top 7" in figure.axes[0].get_xlabel()
    assert "Facts\n3 facts" in figure.get_suptitle()
    assert drawn(figure)


def test_error_bars_are_the_intervals():
    found = result(forms=("one",))
    axis = plans_figure(found).axes[1]
    lines = axis.collections[0].get_segments()
    for plan, segment in zip(PLANS, lines, strict=True):
        estimate = found.estimate(plan, "target_prob", form="one")
        assert [segment[0][0], segment[1][0]] == pytest.approx([estimate.low, estimate.high])


def test_many_plans_get_room_and_prompts_without_a_form_no_legend():
    few, many = plans_figure(result(forms=("",))), result(forms=("",))
    many = plans_figure(GraftResult(PLANS * 10, top_k=7, rows=many.rows))
    assert few.legends == []
    assert many.get_figheight() > 2 * few.get_figheight()


def test_one_unit_and_chosen_forms():
    figure = plans_figure(result(units=("a",)), forms=["two"])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["two"]
    assert "1 fact;" in figure.get_suptitle()
    assert drawn(figure)


HISTORY = [
    {"epoch": float(e), "step": 3.0 * e, **{f"{p}/{m}": e + i for i, p in enumerate(PLANS) for m in ("top5", "top1")}}
    for e in (0, 2, 4)
]


def test_curves_are_the_history():
    figure = curves_figure(HISTORY, metric="top5", title="While training")
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == PLANS
    assert [list(line.get_xdata()) for line in lines] == [[0, 2, 4]] * 3
    assert [list(line.get_ydata()) for line in lines] == [[0, 2, 4], [1, 3, 5], [2, 4, 6]]
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--"]
    assert (figure.axes[0].get_ylabel(), figure.axes[0].get_title()) == ("top5", "While training")
    assert drawn(figure)


def test_no_history_is_an_empty_panel():
    assert drawn(curves_figure([]))
