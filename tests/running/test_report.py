import base64
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from lightning_interp.core.storage.manifest import RunManifest
from lightning_interp.errors import ManifestError
from lightning_interp.running.report import write_report
from lightning_interp.running.results import write_figure, write_results

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


class Page(HTMLParser):
    """Reads a page as a browser does: tags, attributes, visible text."""

    VOID = frozenset({"meta", "img", "link", "br", "wbr"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        assert self.open == [], "tags that were never closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and data.strip():
            self.words.append(" ".join(data.split()))


def finished(folder, *, config=None, versions=({"torch": "2.13"},), seconds=0.0, **outcome):
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    tables = outcome.pop("tables", {"points": [{"plan": "FE+LT", "top5": 0.25}, {"plan": "PRE", "top5": -1.0}]})
    metrics = outcome.pop("metrics", {"best": {"top5": 0.25}})
    for number, package in enumerate(versions):
        with RunManifest.open(folder, config=config or {"seed": 7, "model": "m"}, name="demo", versions=package) as run:
            run.phase("fit", lambda folder: 1)
            run._began -= seconds
            write_results(folder, metrics=metrics, tables=tables, figures={"by_plan": figure})
            everything = {"question": "Why?", "caveats": ["Few points."], "summary": next(iter(tables), "")}
            everything |= {"tables": list(tables), "figures": ["by_plan"], "artifacts": {}, "about": "", "source": "m"}
            run.record_outcome(everything | outcome)
        assert number >= 0
    return folder


def page(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_holds_all_and_refers_to_nothing_outside(tmp_path):
    folder = finished(tmp_path, seconds=200.0, about="What it does.\n\nMore.", artifacts={"adapter": "phases/fit"})
    found = page(folder)
    text = "\n".join(found.words)
    for word in (
        "demo",
        "Why?",
        "What it does.",
        "Few points.",
        "FE+LT",
        "0.25",
        "\u22121.00",
        "7",
        "2.13",
    ):
        assert word in text
    assert re.search(r"3 min 2\d s", text)
    assert "More." not in text
    assert {"phases/fit", "tables/points.csv", "fit", "finished"} <= set(found.words)
    images = [value for tag, name, value in found.attributes if name == "src"]
    data = base64.b64decode(images[0].removeprefix("data:image/png;base64,"))
    assert data == (folder / "figures/by_plan.png").read_bytes()
    assert len(images) == 1
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert not [value for _, name, value in found.attributes if name == "href"]
    source = (folder / "report.html").read_text()
    assert "url(" not in source
    assert "@import" not in source
    assert re.findall(r"https?://[^\s\"'<]+", source) == []


def test_it_reads_in_light_in_dark_and_on_paper(tmp_path):
    write_report(finished(tmp_path))
    source = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme: dark" in source
    assert re.search(
        r"@media print {.*th, td.word { white-space: normal; }", source, re.DOTALL
    )  # a sheet does not scroll
    assert '<html lang="en">' in source


def test_whatever_a_run_says_is_text_and_never_markup(tmp_path):
    folder = finished(
        tmp_path,
        config={"seed": 0, "model": EVIL, EVIL: EVIL},
        versions=[{EVIL: EVIL}],
        question=EVIL,
        caveats=[EVIL],
        about=EVIL,
        source=EVIL,
        artifacts={EVIL: EVIL},
        tables={"t": [{EVIL: EVIL, "x": 1}]},
        metrics={EVIL: EVIL},
    )
    found = page(folder)
    assert "script" not in found.tags
    assert found.tags.count("img") == 1
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert found.words.count(EVIL) >= 10  # all there, as text


def test_the_main_table_comes_first_and_long_ones_are_cut(tmp_path):
    tables = {
        "extra": [{"i": i} for i in range(1000, 1100)],
        "main_one": [{"a": i} for i in range(5600, 6200)],
        "empty": [],
    }
    words = page(finished(tmp_path, tables=tables, summary="main_one")).words
    order = [words.index(title) for title in ("Main one", "Figures", "Extra", "Empty")]
    assert order == sorted(order)
    assert {"All digits and 100 more rows:", "6099", "All digits and 60 more rows:", "1039"} <= set(words)
    assert not {"6100", "1040"} & set(words)


def test_what_was_found_is_said_first_then_what_it_does_not_show_then_the_rest(tmp_path):
    told = {
        "findings": ["It is 0.5 [0.4, 0.6]."],
        "terms": {"FE": "the first entity"},
        "captions": {"by_plan": "See the bar."},
    }
    words = page(finished(tmp_path, **told)).words
    order = [
        "Why?",
        "What was found",
        "It is 0.5 [0.4, 0.6].",
        "What may not be concluded",
        "Few points.",
        "Seed",
    ]
    order += [
        "What the names mean",
        "FE",
        "the first entity",
        "Points",
        "Figures",
        "By plan.",
        "See the bar.",
        "All numbers",
    ]
    places = [words.index(word) for word in order]
    assert places == sorted(places)


def test_long_tables_are_folded_and_short_ones_are_not(tmp_path):
    tables = {"main_one": [{"a": i} for i in range(20)], "few": [{"a": 1}], "many": [{"a": i} for i in range(9)]}
    found = page(finished(tmp_path / "a", tables=tables))
    assert found.tags.count("details") == 2  # the longer one aside, and all numbers
    assert {"9 rows", "1 number"} <= set(found.words)
    longer = page(finished(tmp_path / "b", tables={"main_one": [{"a": i} for i in range(25)]}))
    assert "25 rows" in longer.words


def test_a_model_that_was_not_used_is_not_named(tmp_path):
    used = page(finished(tmp_path / "a", config={"seed": 0, "model": "some/model"}, source="some/model"))
    assert used.words.count("some/model") == 2
    unused = page(finished(tmp_path / "b", config={"seed": 0, "model": "some/model"}, source=""))
    assert not {"some/model", "Model"} & set(unused.words)


def test_a_smoke_run_says_that_its_numbers_mean_nothing(tmp_path):
    smoke = page(finished(tmp_path / "a", config={"seed": 0, "smoke": True}, caveats=[]))
    assert any("smoke run" in word for word in smoke.words)
    plain = page(finished(tmp_path / "b", config={"seed": 0, "smoke": False}, caveats=[]))
    assert "What may not be concluded" not in plain.words


def test_an_address_that_a_run_of_old_kept_with_its_password_is_shown_without(tmp_path):
    shown = page(finished(tmp_path, config={"seed": 0, "base_url": "http://me:word@host/v1"}))
    assert "http://***@host/v1" in shown.words
    assert not any("word@" in text for text in shown.words)


def test_a_run_that_went_on_under_other_versions_says_so(tmp_path):
    found = page(finished(tmp_path, versions=[{"torch": "2.13"}, {"torch": "2.14"}]))
    assert "2.13, then 2.14" in found.words
    assert any(word.endswith("in 2 starts") for word in found.words)


def test_it_is_made_again_from_the_folder_alone(tmp_path):
    folder = finished(tmp_path / "run")
    first = write_report(folder).read_text()
    (folder / "report.html").unlink()
    assert write_report(folder).read_text() == first
    folder.rename(tmp_path / "moved")
    assert write_report(tmp_path / "moved").read_text().replace("moved", "run") == first


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ManifestError, match=f"'{tmp_path}' is no run folder"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="half"), RunManifest.open(tmp_path / "half", config={}, name="demo") as run:
        run.phase("fit", lambda folder: int("half"))
    with pytest.raises(
        ManifestError,
        match=r"half' has no results yet: it is failed \(ValueError: .*\), with the phases fit \(failed\)",
    ):
        write_report(tmp_path / "half")
    folder = finished(tmp_path / "run")
    (folder / "figures/by_plan.png").unlink()
    with pytest.raises(ManifestError, match=r"Cannot read the figure '.*by_plan\.png': No such file"):
        write_report(folder)
    (folder / "tables/points.csv").unlink()
    with pytest.raises(ManifestError, match=r"Cannot read the table '.*points\.csv'"):
        write_report(folder)


def test_a_wide_table_aside_is_folded_and_says_its_size(tmp_path):
    wide = {f"column {number}": number for number in range(10)}
    told = page(
        finished(tmp_path, tables={"main_one": [wide], "wide": [wide], "one": [{"a": 1}] * 9}, metrics={"a": 1})
    )
    assert {"1 row, 10 columns", "9 rows", "1 number"} <= set(told.words)
    assert told.tags.count("details") == 3  # the main table stays open


def test_the_command_that_repeats_it_and_empty_settings_name_no_machine(tmp_path):
    write_report(finished(tmp_path, config={"seed": 0, "model": "m", "trainer": {}, "prompts": "", "run_dir": "x"}))
    source = (tmp_path / "report.html").read_text()
    assert str(tmp_path) not in source
    assert "<code>lightning-interp run config.yaml --run_dir=ANOTHER_FOLDER</code>" in source
    assert source.count("<td>-</td>") == 2


@pytest.mark.parametrize(("size", "wide"), [((4, 2), True), ((2, 2), False)])
def test_only_a_wide_figure_scrolls_on_a_phone(tmp_path, size, wide):
    folder = finished(tmp_path)
    write_figure(folder / "figures/by_plan.png", Figure(figsize=size))
    assert ("img", "class", "wide") in page(folder).attributes if wide else "wide" not in str(page(folder).attributes)


def test_a_later_start_that_failed_and_runs_inside_are_said(tmp_path):
    finished(tmp_path)
    assert "did not finish" not in write_report(tmp_path).read_text()
    with RunManifest.open(tmp_path, config={"seed": 7, "model": "m"}, name="demo") as run:
        run.child("cycle-0", config={}).close("failed", "no more disk")
        run.close("failed", "out of memory")
    words = " ".join(page(tmp_path).words)
    assert "The last start of this run did not finish: failed (out of memory). What stands here was written" in words
    assert "Runs inside this run cycle-0 failed, 0.0 s" in words
