"""Tweets with attributes of known effect: exact edits, confounding as asked for, and what a study of them says."""

from __future__ import annotations

from collections import Counter

import pytest

from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate import Contains, Tweet, rate_effects
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp_recipes.rate._train_reward import (
    ATTRIBUTES,
    THANKS,
    edited_exactly,
    judged_rows,
    made_up_tweets,
    rewritten_exactly,
    split_tweets,
    truth_rows,
    tweet_rewriter,
    tweet_units,
)
from lightning_interp_recipes.rate._truth_figures import training_figure, truth_figure

TEXTS = [
    "@air thanks! thank you so much",
    "Thank you, @air. Thanks!",
    "thanks",
    "why @air, why?!",
    "http://a.b/c! so late...",
    "Thankful for nothing",
    "thanks thanks thanks again",
]


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("text", TEXTS)
def test_toggles_are_exact_and_rewrites_are_their_own_fixed_points(name, text):
    toggle, rewriter = ATTRIBUTES[name], tweet_rewriter(name)
    label = {"exclamation": Contains("!"), "thanks": Contains(THANKS)}[name].label
    for target in (0, 1):
        edited = toggle(text, target)
        assert label(edited) == target
        assert toggle(edited, target) == edited
        assert toggle(toggle(text, 1 - target), target) == edited or name == "exclamation"
        rewritten = rewriter.apply(text, target)
        assert rewriter.apply(rewritten, target) == rewritten == toggle(rewritten, target)
        assert "@" not in rewritten
        assert "http" not in rewritten


def test_thanks_follow_the_coin_and_marks_are_as_they_were():
    tweets = made_up_tweets(4000)
    units = tweet_units("thanks", tweets, confounding=0.5)
    shares = {
        kind: sum(unit.w for unit, tweet in zip(units, tweets, strict=True) if tweet.sentiment == kind) / 2000
        for kind in ("positive", "negative")
    }
    assert shares["positive"] == pytest.approx(0.75, abs=0.04)  # four standard errors
    assert shares["negative"] == pytest.approx(0.25, abs=0.04)
    assert [unit.w for unit in units] == Contains(THANKS)([unit.text for unit in units], [""] * len(units))
    assert tweet_units("thanks", tweets, seed=1) != tweet_units("thanks", tweets)
    # A coin belongs to its tweet: other tweets beside it change nothing.
    assert [unit.w for unit in tweet_units("thanks", tweets[2000:], confounding=0.5)] == [u.w for u in units[2000:]]
    marked = tweet_units("exclamation", tweets)
    assert [(unit.text, unit.w) for unit in marked] == [(t.text, int("!" in t.text)) for t in tweets]


def test_splits_are_random_whole_and_without_blank_tweets():
    tweets = [*made_up_tweets(100), *(Tweet(text, "positive", None) for text in ("@air http://a.b", "thanks!"))]
    split = split_tweets([*tweets, Tweet("so", "neutral", 1.0)], held_out=0.3)
    assert (len(split.train), len(split.held), split.blank, split.neutral) == (70, 30, 2, 1)
    assert Counter(map(str, [*split.train, *split.held])) == Counter(map(str, tweets[:100]))
    kinds = Counter(tweet.sentiment for tweet in split.held)
    assert split.majority == max(kinds.values()) / 30
    assert split_tweets(tweets, seed=1) != split_tweets(tweets, seed=2)
    assert len(split_tweets(tweets, count=50).train) == 40


def test_pairs_prefer_praise_and_use_every_tweet():
    tweets = [tweet for i, tweet in enumerate(made_up_tweets(60)) if i % 2 == 0 or i % 3 == 0]
    sides = {kind: {t.text for t in tweets if t.sentiment == kind} for kind in ("positive", "negative")}
    rows = judged_rows(tweets, "pairs", prompt="say")
    assert len(rows) == len(sides["positive"]) == 30
    assert {row["chosen"] for row in rows} == sides["positive"]
    assert {row["rejected"] for row in rows} == sides["negative"]
    assert {row["prompt"] for row in rows} == {"say"}
    assert rows != judged_rows(tweets, "pairs", prompt="say", seed=1)
    told = judged_rows(tweets, "texts")
    assert [(row["response"], row["reward"]) for row in told] == [
        (t.text, float(t.sentiment == "positive")) for t in tweets
    ]


def rewritten(units, name="thanks"):
    rewriter = tweet_rewriter(name)
    first = [rewriter.apply(unit.text, 1 - unit.w) for unit in units]
    second = [rewriter.apply(text, unit.w) for text, unit in zip(first, units, strict=True)]
    return RewriteTriples(
        attr=name, ids=[unit.id for unit in units], w=[unit.w for unit in units], prompts=[""] * len(units),
        original=[unit.text for unit in units], rewrite=first, rewrite2=second, draw=[0] * len(units),
    )  # fmt: skip


def test_exact_edits_are_the_truth():
    """Reward: two a word of thanks at the start, and a length that a rewrite changes but an edit does not."""
    units = tweet_units("thanks", [t for t in made_up_tweets(60) if "thanks" not in t.text])

    def reward(text):
        return 2.0 * text.startswith("Thanks!") - 0.5 * text.count("@")

    def effect(triples):
        return rate_effects(triples.w, *([reward(t) for t in triples.texts(s)] for s in triples.stages))

    triples = rewritten(units)
    exact, edited = edited_exactly("thanks", units), rewritten_exactly("thanks", triples)
    assert exact.original == exact.rewrite2 == triples.original
    assert effect(exact).rate.ate.value == effect(exact).rate.att.value == 2.0
    assert edited.rewrite == triples.rewrite
    assert effect(edited).rate.ate.value == effect(triples).rate.ate.value == 2.0
    assert abs(effect(triples).single.att.value - 2.0) > 0.1
    few = triples.first(7)
    assert (few.ids, few.rewrite2, len(triples.first(0)), len(triples.first(99))) == (
        triples.ids[:7], triples.rewrite2[:7], len(units), len(units),
    )  # fmt: skip


def test_rows_and_figures_hold_the_truth_beside_the_estimates():
    result = rate_effects([1, 1, 0, 0], [2.0, 3.0, 0.0, 1.0], [0.0, 1.5, 1.0, 2.0], [1.0, 2.5, 0.5, 1.0])
    truth = rate_effects([1, 1, 0, 0], None, [0.0] * 2 + [0.5] * 2, [0.5] * 2 + [0.0] * 2).rate.ate
    rows = {row["ATE"]: row for row in truth_rows("thanks", result, truth, truth)}
    assert rows["naive"]["off the truth (sd)"] == pytest.approx((2.0 - 0.5) / result.reward_std)
    assert rows["double rewrite (RATE)"]["in sd"] == pytest.approx(result.standardized.rate.ate.value)
    assert rows["truth: originals edited"]["off the truth (sd)"] == 0
    (axis,) = truth_figure({"thanks": result, "other": result}, {"thanks": truth}).axes
    (line,) = [one for one in axis.lines if "truth" in one.get_label()]
    assert line.get_ydata()[0] == pytest.approx(0.5 / result.reward_std)
    entry = {"step": 3.0, "naive": 2.0, "naive_se": 0.5, "single": 1.0, "single_se": 0.1, "ate": 1.2, "ate_se": 0.1}
    history = [{**entry, "reward_std": std, "step": step} for std, step in ((0.0, 1.0), (2.0, 2.0), (4.0, 3.0))]
    axis, empty = training_figure({"thanks": history, "none": []}, {"thanks": history}, title="t").axes
    named = {line.get_label().split()[0]: line.get_ydata() for line in axis.lines}
    assert list(named["naive"][1:]) == [1.0, 0.5]
    assert list(named["double"][1:]) == list(named["truth"][1:]) == [0.6, 0.3]
    assert named["naive"][0] != named["naive"][0]  # rewards that are all alike are no unit of measure
    assert empty.get_title() == "none"


def test_errors():
    with pytest.raises(RecipeError, match=r"confounding=1\.5"):
        tweet_units("thanks", made_up_tweets(4), confounding=1.5)
    with pytest.raises(DataError, match="Of 2 tweets the part 'train' has 1 positive and 0 negative"):
        split_tweets([Tweet("good", "positive", 1.0), Tweet("fine", "positive", 1.0)], held_out=0.5)
    with pytest.raises(RecipeError, match="got 1 histories without an entry"):
        training_figure({"thanks": []}, {})
