"""A reward model trained on tweets, and two attributes of which the true effect on its reward is known.

Whether a tweet has an exclamation mark is nothing that a bag of words sees: the effect is zero, whatever the data look
like. Whether it opens with thanks is decided by a coin that prefers praise, so the arms differ in sentiment, and the
effect of the opening is what adding or removing it does to each reward.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.rate.estimators.result import Effect, RateResult
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.records import Unit
from lightning_interp.rate.rewriting.rules import Drop, MarkToggle, OpenerToggle, RuleRewriter
from lightning_interp.rate.texts.package_texts import Tweet

THANKS = r"^\s*(?:thanks|thank you)\b"
"""How a text begins that opens with thanks."""

ATTRIBUTES: Mapping[str, Any] = {
    "exclamation": MarkToggle("!"),
    "thanks": OpenerToggle("", "Thanks!", strip=r"(?:(?:thanks|thank you)\b[\s,.!;:-]*)+"),
}
"""By name, how the attribute of a tweet is set; each is exact: nothing else of the text changes."""

_ALWAYS = (Drop.mentions(), Drop.links())


@functools.cache
def tweet_rewriter(attribute: str) -> RuleRewriter:
    """A rewriter that sets one of the :data:`ATTRIBUTES`, and drops mentions and links whichever way it goes.

    Args:
        attribute: Its name.

    Returns:
        The rewriter.

    Example:
        >>> tweet_rewriter("thanks").apply("@ann what a flight http://a.b", 1)
        'Thanks! what a flight'
    """
    return RuleRewriter(ATTRIBUTES[attribute], always=_ALWAYS, name=f"{attribute} rules")


@dataclass(frozen=True)
class TweetSplit:
    """Tweets that readers found positive or negative.

    Args:
        train: To train on.
        held: To validate on, and to ask for effects.
        blank: Tweets that are left out because they are nothing but mentions, links and thanks.
        neutral: Tweets that are left out because readers found neither.
    """

    train: list[Tweet]
    held: list[Tweet]
    blank: int
    neutral: int

    @property
    def majority(self) -> float:
        """Accuracy of calling every held-out tweet what most are."""
        positive = sum(tweet.sentiment == "positive" for tweet in self.held) / len(self.held)
        return max(positive, 1 - positive)


def split_tweets(tweets: Sequence[Tweet], *, held_out: float = 0.2, count: int = 0, seed: int = 0) -> TweetSplit:
    """Divide positive and negative tweets at random into two parts.

    Args:
        tweets: The tweets.
        held_out: Share of the second part.
        count: Tweets to use; all if 0.
        seed: Root seed.

    Returns:
        The parts.

    Raises:
        DataError: If a part would lack positive or negative tweets.

    Example:
        >>> split = split_tweets(made_up_tweets(40), held_out=0.25)
        >>> len(split.train), len(split.held), split.blank
        (30, 10, 0)
    """
    told = [tweet for tweet in tweets if tweet.sentiment != "neutral"]
    full = [tweet for tweet in told if all(tweet_rewriter(name).apply(tweet.text, 0) for name in ATTRIBUTES)]
    order = random.Random(derived_seed(seed, "tweets")).sample(full, len(full))  # noqa: S311 - no secrets
    used = order[:count] if count else order
    held = round(len(used) * held_out)
    split = TweetSplit(used[held:], used[:held], len(told) - len(full), len(tweets) - len(told))
    for name, part in (("train", split.train), ("held out", split.held)):
        counts = {kind: sum(tweet.sentiment == kind for tweet in part) for kind in ("positive", "negative")}
        if not all(counts.values()):
            raise DataError(
                f"Of {len(used)} tweets the part {name!r} has {counts['positive']} positive and {counts['negative']} "
                "negative ones; expected some of both. Give more tweets, or another held_out."
            )
    return split


def judged_rows(
    tweets: Sequence[Tweet], kind: Literal["texts", "pairs"], *, prompt: str = "", seed: int = 0
) -> list[dict[str, Any]]:
    """Rows for :class:`~lightning_interp.models.PreferenceDataModule`.

    Args:
        tweets: Positive and negative ones.
        kind: ``"texts"``: each tweet with 1 (positive) or 0. ``"pairs"``: a positive tweet is preferred to a negative
            one that is drawn at random; those of the rarer kind are used several times.
        prompt: What a tweet answers.
        seed: Root seed of the pairs.

    Returns:
        The rows.

    Example:
        >>> judged_rows([Tweet("Great!", "positive", 1.0), Tweet("Late.", "negative", 1.0)], "pairs")
        [{'prompt': '', 'chosen': 'Great!', 'rejected': 'Late.'}]
    """
    if kind == "texts":
        return [{"prompt": prompt, "response": t.text, "reward": float(t.sentiment == "positive")} for t in tweets]
    sides = [[tweet.text for tweet in tweets if tweet.sentiment == name] for name in ("positive", "negative")]
    draws = random.Random(derived_seed(seed, "pairs"))  # noqa: S311 - no secrets
    longest = max(map(len, sides))
    chosen, rejected = ([text for text, _ in zip(_again(side, draws), range(longest), strict=False)] for side in sides)
    return [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in zip(chosen, rejected, strict=True)]


def _again(texts: Sequence[str], draws: random.Random) -> Iterator[str]:
    """All texts in random order, over and over."""
    while True:
        yield from draws.sample(texts, len(texts))


def tweet_units(
    attribute: str, tweets: Sequence[Tweet], *, confounding: float = 0.6, prompt: str = "", seed: int = 0
) -> list[Unit]:
    """Units of one of the :data:`ATTRIBUTES`.

    Exclamation marks are left as people wrote them. Thanks are set by a coin: a positive tweet opens with them with
    probability ``(1 + confounding) / 2``, a negative one with ``(1 - confounding) / 2``. So arms are large, and how far
    they differ in sentiment is known.

    Args:
        attribute: Its name.
        tweets: Positive and negative ones.
        confounding: From 0 (a fair coin) to 1 (all positive tweets and no other).
        prompt: What a tweet answers.
        seed: Root seed of the coin.

    Returns:
        The units.

    Raises:
        RecipeError: If ``confounding`` is out of range.

    Example:
        >>> tweets = [Tweet("Great!", "positive", 1.0), Tweet("Thank you, late again", "negative", 1.0)]
        >>> [(unit.text, unit.w) for unit in tweet_units("thanks", tweets, confounding=1.0)]
        [('Thanks! Great!', 1), ('late again', 0)]
        >>> [(unit.text, unit.w) for unit in tweet_units("exclamation", tweets)]
        [('Great!', 1), ('Thank you, late again', 0)]
    """
    if not 0 <= confounding <= 1:
        raise RecipeError(f"confounding={confounding!r}: expected a number from 0 to 1.")
    if attribute == "exclamation":
        return [Unit(id=f"{i}", text=t.text, w=int("!" in t.text), prompt=prompt) for i, t in enumerate(tweets)]
    toggle, units = ATTRIBUTES[attribute], []
    for index, tweet in enumerate(tweets):
        share = (1 + (confounding if tweet.sentiment == "positive" else -confounding)) / 2
        w = int(random.Random(derived_seed(seed, "thanks", tweet.text)).random() < share)  # noqa: S311 - no secrets
        units.append(Unit(id=str(index), text=toggle(tweet.text, w), w=w, prompt=prompt))
    return units


def edited_exactly(attribute: str, units: Sequence[Unit]) -> RewriteTriples:
    """The originals, the same with the attribute flipped and nothing else, and the originals again.

    The double-rewrite effect of these is the true effect on the originals.

    Args:
        attribute: Its name.
        units: The units.

    Returns:
        Complete units.
    """
    toggle = ATTRIBUTES[attribute]
    flipped = [toggle(unit.text, 1 - int(unit.w or 0)) for unit in units]
    originals = [unit.text for unit in units]
    return RewriteTriples(
        attr=f"{attribute} exact",
        ids=[unit.id for unit in units],
        w=[int(unit.w or 0) for unit in units],
        prompts=[unit.prompt for unit in units],
        original=originals,
        rewrite=flipped,
        rewrite2=originals,
        draw=[0] * len(units),
    )


def rewritten_exactly(attribute: str, triples: RewriteTriples) -> RewriteTriples:
    """The first rewrites, with the second replaced by the first with the attribute set back and nothing else.

    The double-rewrite effect of these is the true effect on the texts as the rewriter leaves them.

    Args:
        attribute: Its name.
        triples: Complete units.

    Returns:
        The same units with other second rewrites.
    """
    toggle = ATTRIBUTES[attribute]
    back = [toggle(text, w) for text, w in zip(triples.rewrite, triples.w, strict=True)]
    return replace(triples, attr=f"{triples.attr} exact on rewrites", rewrite2=back)


def truth_rows(attribute: str, result: RateResult, truth: Effect, on_rewrites: Effect) -> list[dict[str, Any]]:
    """What each estimator found beside what is true, to be printed.

    Args:
        attribute: Its name.
        result: The effects.
        truth: The true average effect on the originals.
        on_rewrites: The same on the texts as the rewriter leaves them.

    Returns:
        Rows with ``attribute``, ``ATE``, ``reward`` (with its interval), ``se``, ``in sd`` and ``off the truth``, which
        is the difference from the true effect on the originals in standard deviations of the reward.
    """
    unit = result.reward_std or math.nan
    found = {"truth: originals edited": truth, "truth: rewrites edited": on_rewrites, "naive": result.naive}
    found |= {"single rewrite": result.single.ate if result.single else None, "double rewrite (RATE)": result.rate.ate}
    return [
        {
            "attribute": attribute,
            "ATE": name,
            "reward": f"{effect.value:.3f} [{effect.low:.3f}, {effect.high:.3f}]",
            "se": f"{effect.se:.4f}",
            "in sd": effect.value / unit,
            "off the truth (sd)": (effect.value - truth.value) / unit,
            "units": effect.n,
        }
        for name, effect in found.items()
        if effect is not None
    ]


def train_reward(
    folder: Path,
    module: Any,
    data: Any,
    *,
    trainer: Mapping[str, Any],
) -> dict[str, Any]:
    """Train a reward model with Lightning and export it to ``folder/model``; goes on at the last checkpoint.

    Args:
        folder: The phase's folder.
        module: A :class:`~lightning_interp.models.BagOfWords` or :class:`~lightning_interp.models.RewardModel`.
        data: Its data module, with validation.
        trainer: Arguments of the Trainer, among them ``callbacks``.

    Returns:
        What was logged last of ``val/...``, and the ``train_loss`` of the last step.
    """
    from lightning_interp.models.training.resumable import fit_and_export

    told = fit_and_export(module, data, folder, trainer)
    found = {name.removeprefix("val/"): value for name, value in told.items() if name.startswith("val/")}
    return {**found, "train_loss": told.get("train/loss", math.nan)}


_OPENINGS = ("@air ", "", "@air: ", "")
_PRAISE = ("great flight", "lovely crew", "smooth boarding", "best seats", "kind staff", "many thanks to the crew")
_BLAME = ("late again", "lost my bag", "rude staff", "worst seats", "no answer for hours", "flight was cancelled")
_ENDS = ("", ".", "!", " http://t.co/x", " again and again", " today!")


def made_up_tweets(count: int = 400, *, seed: int = 0) -> list[Tweet]:
    """Tweets out of a few phrases: for runs that only show that everything works.

    Args:
        count: How many.
        seed: Root seed.

    Returns:
        The tweets, half of them positive, and no two alike.
    """
    draws = random.Random(derived_seed(seed, "made up"))  # noqa: S311 - no secrets
    found = []
    for index in range(count):
        positive = index % 2 == 0
        first, second = draws.sample(_PRAISE if positive else _BLAME, 2)
        end = draws.choice(_ENDS[2:] if positive and draws.random() < 0.5 else _ENDS)
        text = f"{draws.choice(_OPENINGS)}{first}, {second} on trip {_spelled(index)}{end}"
        found.append(Tweet(text, "positive" if positive else "negative", 1.0))
    return found


def _spelled(number: int) -> str:
    """A number in letters, which a tokenizer of words can see."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))
