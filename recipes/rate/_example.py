"""A worked example whose answer is known: three exclamation marks, in texts that often open with a kind word too.

A coin decides whether a review ends with ``!!!``; those that do mostly open with a kind sentence, others seldom. Every
rewrite sets or removes the marks and leaves out that sentence. So the naive difference and the single rewrite give the
marks the sentence's reward, and the double rewrite compares texts without it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.models.scoring.text_scorer import Scorer
from lightning_interp.rate.estimators.triples import RewriteTriples
from lightning_interp.rate.rewriting.records import Unit
from lightning_interp.rate.rewriting.rules import Drop, MarkToggle, RuleRewriter
from lightning_interp.rate.scoring.scores import CallableScorer
from lightning_interp.rate.texts.package_texts import Review

_MARK = MarkToggle("!!!")
_KIND = "I love the cinema:"
_SHARES = (0.1, 0.8)  # of the texts without and with the marks that open with it


def emphatic_units(reviews: Sequence[Review], *, seed: int, clusters: bool = True) -> list[Unit]:
    """Reviews with and without the marks, and with or without the kind opening.

    Args:
        reviews: The reviews.
        seed: Of the coins.
        clusters: Units of one film share a cluster.

    Returns:
        One unit a review.

    Example:
        >>> [unit.text for unit in emphatic_units([Review("Fine.", "fresh", "heat")] * 3, seed=5)]
        ['Fine.', 'Fine.', 'I love the cinema: Fine.']
    """
    units = []
    for number, review in enumerate(reviews):
        coin = random.Random(derived_seed(seed, "emphasis", number))  # noqa: S311 - texts, no secrets
        w = int(coin.random() < 0.5)
        opening = f"{_KIND} " if coin.random() < _SHARES[w] else ""
        cluster = review.movie if clusters else None
        units.append(Unit(id=str(number), text=_MARK(opening + review.text, w), w=w, cluster=cluster))
    return units


def emphasis_rewriter() -> RuleRewriter:
    """Sets or removes the marks, and leaves out the kind opening whichever way they go."""
    return RuleRewriter(_MARK, always=[Drop.phrase(_KIND)])


def exact_effects(triples: RewriteTriples, scorer: Scorer) -> dict[str, float]:
    """What adding or removing the marks does to the reward, by exact edits and in reward units.

    Args:
        triples: The units.
        scorer: The reward.

    Returns:
        ``originals``: the mean over the originals; ``rewritten``: over the rewrites, which is what a double rewrite
        estimates. They differ where the reward of the marks depends on what else a text says.
    """
    found = {}
    for name, stage in (("originals", "original"), ("rewritten", "rewrite")):
        texts = triples.texts(stage)
        edited = [_MARK(text, w) for w in (1, 0) for text in texts]
        one, zero = scorer.score(list(triples.prompts) * 2, edited).double().chunk(2)
        found[name] = float(np.mean((one - zero).numpy()))
    return found


def made_up_scorer() -> CallableScorer:
    """A reward for runs that are to show nothing but that they work: it likes marks, love, and short texts.

    Example:
        >>> made_up_scorer().score(["", ""], ["I love it!", "I like it."]).tolist()
        [0.59, -0.01]
    """

    def reward(text: str) -> float:
        return round(0.1 * ("!" in text) + 0.5 * ("love" in text) - 0.001 * len(text), 3)

    return CallableScorer(reward, name="made-up", each=True)
