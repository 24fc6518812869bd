import io
import math

import pytest

from lightning_interp.running.terminal import (
    columns,
    plain_table,
    print_table,
    progress_bar,
    shown,
    shown_column,
)

ROWS = [{"plan": "FE", "top5": 0.25, "n": 3}, {"plan": "[bold]FE+LT", "top5": math.nan, "seed": -1}]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_cells_are_short_and_say_when_there_is_nothing():
    cells = {
        None: "-",
        math.nan: "-",
        0.89641: "0.896",
        1.0: "1",
        2e-7: "2e-07",
        123456.7: "1.235e+05",
        135_000_000: "135000000",
    }
    assert {value: shown(value) for value in cells} == cells
    assert (shown(True), shown(False), shown("x"), shown([1, 2])) == ("yes", "no", "x", "[1, 2]")


def test_numbers_of_a_column_have_equally_many_decimals_and_none_becomes_zero():
    assert shown_column([0.25, 1, 1.0, -0.5, "x", None, 0.0]) == ["0.25", "1.00", "1.00", "-0.50", "x", "-", "0.00"]
    assert shown_column([123.4, 0.04, 1e-9]) == ["123", "0.04", "1e-09"]
    assert shown_column([2.53, -0.000999]) == ["2.53", "-0.001"]
    assert shown_column([0.00331, 0.0002]) == ["0.00331", "0.00020"]
    assert shown_column([1e-5, 2e-6]) == ["1e-05", "2e-06"]
    assert shown_column([1e7, 0.5]) == ["1e+07", "0.5"]
    assert shown_column([math.inf, 2.0]) == ["inf", "2"]
    assert shown_column([3, 40, True]) == ["3", "40", "yes"]
    assert shown_column([]) == []


def test_a_plain_table_aligns_numbers_to_the_right():
    assert plain_table(ROWS) == "\n".join(
        [
            "plan         top5  n  seed",
            "-----------  ----  -  ----",
            "FE           0.25  3     -",
            "[bold]FE+LT     -  -    -1",
        ]
    )
    assert columns(ROWS) == ["plan", "top5", "n", "seed"]
    assert plain_table([]) == "\n"
    assert "a b" in plain_table([{"text": "a\nb"}])


def test_a_file_gets_plain_text_and_a_terminal_a_drawn_table():
    plain, drawn = io.StringIO(), Terminal()
    print_table("the title", ROWS, file=plain)
    assert plain.getvalue() == f"the title\n{plain_table(ROWS)}\n"
    print_table("the [red]title", ROWS, file=drawn)
    assert "│" in drawn.getvalue() or "┃" in drawn.getvalue()
    for text in ("the [red]title", "[bold]FE+LT", "0.25"):  # markup in data is text
        assert text in drawn.getvalue()


def test_progress_is_silent_without_a_terminal():
    out = io.StringIO()
    with progress_bar("score", total=2, file=out) as bar:
        bar.advance()
        bar.describe("more")
    with progress_bar("score", file=Terminal(), show=False) as bar:
        bar.advance(2)
        bar.describe("more")
    assert out.getvalue() == ""


def test_progress_on_a_terminal_shows_what_and_how_far():
    out = Terminal()
    with progress_bar("score [x]", total=2, file=out) as bar:
        bar.advance(2)
        bar.describe("write")
    assert "write" in out.getvalue()
    assert "2/2" in out.getvalue()


def test_a_second_bar_inside_a_live_one_is_silent(monkeypatch):
    from rich.console import Console
    from rich.progress import Progress

    # One console, as in a program; Rich allows one live display on each.
    console = Console(file=Terminal())
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    with Progress(console=console), progress_bar("inner", total=1, file=Terminal()) as bar:
        bar.advance()


def test_an_error_inside_the_block_is_not_swallowed():
    with pytest.raises(RuntimeError, match="inside"), progress_bar("x", file=Terminal()):
        raise RuntimeError("inside")


def test_a_bar_inside_another_is_a_second_line_while_it_lasts():
    out = Terminal()
    with progress_bar("cycles", total=2, file=out) as outer:
        with progress_bar("rows", total=3, file=out) as inner:
            inner.advance(2)
            assert inner.progress is outer.progress
            assert [(task.description, task.completed) for task in outer.progress.tasks] == [("cycles", 0), ("rows", 2)]
        outer.advance()
        assert [(task.description, task.completed) for task in outer.progress.tasks] == [("cycles", 1)]
    with progress_bar("next", total=1, file=out) as bar:
        assert bar.progress is not outer.progress
