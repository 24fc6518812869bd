"""What a rewriter is worth: counts by hand, sentences that follow from them, attributes and texts to try it on."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate import (
    CallableRewriter,
    Contains,
    Review,
    RewriteResult,
    RewriteRun,
    RewriteStore,
    Unit,
    score_triples,
)
from lightning_interp.rate.report.study import study_effects
from lightning_interp_recipes.rate._llm_rewriter import (
    KNOWN,
    answer_rows,
    made_up_reviews,
    read_attribute,
    review_units,
    units_of,
)
from lightning_interp_recipes.rate._rewriter_quality import quality_figure, rewriter_quality, selected, verdict

MARK = Contains("!")


def flip(text, prompt, w):
    """Sets a mark, but copies texts with 'stubborn', refuses those with 'rude', is cut on those with 'long'."""
    for word, status in (("rude", "refused"), ("long", "truncated")):
        if word in text and w == 0:
            return RewriteResult(text="I", status=status)
    if "stubborn" in text:
        return text
    return text.rstrip("!").replace("@x ", "") + "!" * w


def filled(folder, texts, function=flip, passes=2):
    units = [Unit(id=f"u{i}", text=text, w=int("!" in text)) for i, text in enumerate(texts)]
    store = RewriteStore.create(folder, units, attr="mark")
    RewriteRun(store, CallableRewriter(function, name="flip"), attr="mark", passes=passes).run()
    return store


TEXTS = ["one!", "two", "@x three!", "stubborn four!", "stubborn five", "rude six!", "long seven!", "rude eight"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("quality") / "store", TEXTS)


def quality(store):
    return rewriter_quality(store, "mark", store.rewriters("mark")[0], MARK)


def test_counts_are_those_by_hand(store):
    found = quality(store)
    rows = {(row["pass"], row["direction"]): row for row in found.rows()}
    first = rows[1, "1->0"]  # one, three, stubborn four (copied), rude six (refused), long seven (cut)
    assert (first["asked"], first["refused"], first["truncated"], first["identical"]) == (5, 1, 1, 1)
    assert first["complied"].startswith("0.67")
    assert (rows[1, "0->1"]["asked"], rows[1, "0->1"]["complied"][:4]) == (3, "0.67")
    # Back: two, stubborn five (copied, and it never had a mark), rude eight (refused now).
    assert (rows[2, "1->0"]["asked"], rows[2, "1->0"]["refused"], rows[2, "1->0"]["identical"]) == (3, 1, 1)
    assert (found.units, found.complete, found.identical) == (8, 5, 4)
    assert found.compliant == {"u0", "u1", "u2"}
    assert found.both.value == 3 / 8
    for one in found.passes:
        assert sum(one.shares().values()) == pytest.approx(1)
    assert found.metrics()["passes"][0]["shares"] == pytest.approx(
        {"complied": 0.4, "not complied": 0.2, "cannot tell": 0, "unusable": 0.4}
    )


def test_what_the_labeller_cannot_tell_is_not_compliance(store):
    found = rewriter_quality(store, "mark", store.rewriters("mark")[0], lambda texts, prompts: [None] * len(texts))
    assert found.compliant == frozenset()
    assert all(one.complied is None for one in found.passes)
    assert [one.shares()["cannot tell"] for one in found.passes] == pytest.approx([0.6, 1.0, 2 / 3, 1.0])


def test_effects_among_the_compliant_are_those_of_a_loop(store):
    triples = store.triples("mark", missing="drop")
    scores = score_triples(lambda prompts, texts: [2.0 * ("!" in t) + len(t) for t in texts], triples)
    few = selected(triples, scores, quality(store).compliant)
    kept = [row for row, name in enumerate(triples.ids) if name in {"u0", "u1", "u2"}]
    sign = [1 if triples.w[row] else -1 for row in kept]
    delta = [
        s * float(scores.reward["rewrite2"][row] - scores.reward["rewrite"][row])
        for s, row in zip(sign, kept, strict=True)
    ]
    assert few.rate.ate.value == pytest.approx(sum(delta) / 3)
    assert sorted(few.ids) == ["u0", "u1", "u2"]
    assert selected(triples, scores, frozenset()) is None


def told(store, passes=2, reward=lambda text: float("!" in text)):
    triples = store.triples("mark", missing="drop", passes=passes)
    scores = score_triples(lambda prompts, texts: [reward(text) for text in texts], triples)
    return " ".join(verdict(quality(store), study_effects(triples, scores, labeller=MARK)))


class TestVerdict:
    def test_says_no_more_than_eight_units_carry(self, store):
        said = told(store)
        assert said.startswith(
            "The rewriter 'flip' brought usable rewrites of 5 of 8 units; on a share of 0.38 [0.14, 0.69]"
        )
        assert "on part of the units" in said
        assert "would be 1.7 times what is reported" in said  # of complete units 3 of 5 and 5 of 5 passes complied

    def test_one_that_does_it(self, tmp_path):
        texts = [f"text {i}{'!' * (i % 2)}" for i in range(60)]
        said = told(filled(tmp_path, texts, lambda text, prompt, w: text.rstrip("!") + "!" * w, passes=3), passes=3)
        assert "nearly always does what it is asked to" in said
        assert "times what is reported" not in said
        assert "A third rewrite by the rewriter 'flip' shows no other effect" in said

    def test_one_that_never_does_it(self, tmp_path):
        texts = [f"text {i}{'!' * (i % 2)}" for i in range(20)]
        store = filled(tmp_path, texts, lambda text, prompt, w: f"{text} so")
        assert "fails on most units" in told(store)

    def test_one_that_changes_more_in_one_direction(self, tmp_path):
        texts = [f"text {i}{'!' * (i % 2)}" for i in range(40)]
        lopsided = filled(tmp_path, texts, lambda text, prompt, w: text.rstrip("!") + " and more!" * w, passes=3)
        said = told(lopsided, 3, reward=lambda text: float(len(text)))
        assert "depends on the direction" in said
        assert "words +2.00 in direction 0->1 and +0.00 in direction 1->0" in said

    def test_a_third_rewrite_that_differs(self, tmp_path):
        texts = [f"text {i} ~~~{'!' * (i % 2)}" for i in range(40)]
        slow = filled(tmp_path, texts, lambda t, prompt, w: t.rstrip("!").replace("~", "", 1) + "!" * w, passes=3)
        triples = slow.triples("mark", passes=3)
        assert triples.rewrite3 is not None
        said = told(slow, 3, reward=lambda text: text.count("~") ** 2 * (2.0 if "!" in text else 1.0))
        assert "A third rewrite by the rewriter 'flip' gives another effect" in said

    def test_nothing_complete(self, tmp_path):
        store = filled(tmp_path, ["long a!", "rude b!"])
        (first, *_), found = verdict(quality(store), None), verdict(quality(store), None)
        assert "usable rewrites of 0 of 2 units" in first
        assert found[-1] == "The rewriter 'flip' left no complete unit, so there is no effect to report."


def test_the_figure_shows_the_shares(store):
    figure = quality_figure([quality(store)], title="t")
    (axis,) = figure.axes
    widths = [patch.get_width() for patch in axis.patches]
    assert widths[:4] == pytest.approx([one.shares()["complied"] for one in quality(store).passes])
    assert sum(widths) == pytest.approx(4)
    with pytest.raises(RecipeError, match="got 0 rewriters without a rewrite"):
        quality_figure([])


class TestAttributes:
    @pytest.mark.parametrize("name", KNOWN)
    def test_rules_set_what_the_labeller_sees(self, name):
        pytest.importorskip("vaderSentiment")
        tried = read_attribute(name, ["Such a film."] * 3)
        assert tried.template.render("so", w_target=1) != tried.template.render("so", w_target=0)
        if tried.rules is not None:
            for target in (0, 1):
                assert tried.labeller([tried.rules.apply("Such a film, in short.", target)], [""]) == [target]

    def test_length_is_divided_at_the_median(self):
        assert read_attribute("length", ["a", "a b", "a b c"]).labeller.limit == 2

    def test_one_of_ones_own(self, tmp_path):
        path = tmp_path / "shout.json"
        path.write_text(json.dumps({"body": "{text} {phrase}", "phrases": ["soft", "loud"], "contains": "!"}))
        tried = read_attribute(str(path), [])
        assert (tried.name, tried.template.render("a", w_target=1), tried.rules) == ("shout", "a loud", None)
        assert tried.labeller(["a!", "a"], ["", ""]) == [1, 0]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"body": "{text} {phrase}", "phrases": ["a", "b"]}, "'contains' is None"),
            ({"body": 3, "phrases": ["a", "b"], "contains": "!"}, "'body' is 3"),
            ({"body": "{text} {phrase}", "phrases": ["a", "b"], "contains": "!", "colour": 1}, "'colour' is 1"),
        ],
    )
    def test_files_that_cannot_be_used(self, tmp_path, content, message):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            read_attribute(str(path), [])
        with pytest.raises(DataError, match=r"nowhere\.json cannot be read"):
            read_attribute(str(tmp_path / "nowhere.json"), [])

    def test_unknown(self):
        with pytest.raises(RecipeError, match="attribute='mood' is unknown; expected one of sentiment, length"):
            read_attribute("mood", [])


class TestUnits:
    def test_arms_are_equal_drawn_at_random_and_short(self):
        reviews = made_up_reviews(40)
        tried = read_attribute("exclamation", [])
        units = review_units(reviews, tried, count=10, longest=30)
        assert Counter(unit.w for unit in units) == {1: 5, 0: 5}
        assert all(len(unit.text) <= 30 for unit in units)
        assert [unit.w for unit in units] == [int("!" in unit.text) for unit in units]
        assert units != review_units(reviews, tried, count=10, longest=30, seed=1)
        assert len(review_units(reviews, tried, count=0, longest=0)) == 40

    def test_sentiment_is_the_critics(self):
        reviews = [Review("It is bad.", "fresh", "a"), Review("It is good.", "rotten", "b")]
        units = review_units(reviews, read_attribute("sentiment", [], made_up=True), count=2)
        assert [(unit.id, unit.w, unit.cluster) for unit in units] == [("r0", 1, "a"), ("r1", 0, "b")]

    def test_too_few(self):
        with pytest.raises(DataError, match="0 reviews of at most 5 characters have exclamation=1"):
            review_units(made_up_reviews(4), read_attribute("exclamation", []), count=2, longest=5)

    def test_ones_own(self, tmp_path):
        path = tmp_path / "texts.jsonl"
        path.write_text('{"id": "a", "text": "oh!", "w": 1}\n{"id": "b", "text": "oh", "w": 0, "prompt": "say"}\n')
        assert [(unit.id, unit.w, unit.prompt) for unit in units_of(path)] == [("a", 1, ""), ("b", 0, "say")]
        with path.open("a") as file:
            file.write('{"id": "a", "text": "oh!", "w": 1, "attr": "other"}\n')
        with pytest.raises(DataError, match=r"texts\.jsonl: 1 ids occur more than once"):
            units_of(path)
        path.write_text('{"text": "oh!"}\n')
        with pytest.raises(DataError, match=r"texts\.jsonl says of no text whether it has the attribute"):
            units_of(path)
        with pytest.raises(DataError, match=r"nowhere\.jsonl"):
            units_of(tmp_path / "nowhere.jsonl")


def test_every_answer_can_be_read(tmp_path):
    tried = read_attribute("exclamation", [])
    units = [Unit(id="a", text="oh!", w=1), Unit(id="b", text="rude!", w=1)]
    store = RewriteStore.create(tmp_path, units, attr=tried.name)
    RewriteRun(store, CallableRewriter(flip, name="flip"), attr=tried.name).run()
    rows = answer_rows(store, tried)
    assert [(row["id"], row["pass"], row["status"], row["label"]) for row in rows] == [
        ("a", 1, "ok", 0), ("a", 2, "ok", 1), ("b", 1, "refused", 0),
    ]  # fmt: skip
    assert not any(isinstance(value, float) and math.isnan(value) for row in rows for value in row.values())
