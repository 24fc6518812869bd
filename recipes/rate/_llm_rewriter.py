"""Attributes that a rewriter can be tried on: how it is asked, how texts are labelled, and what rules would do."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.core.storage.jsonl import json_object
from lightning_interp.errors import DataError, RecipeError
from lightning_interp.generation.labellers import (
    Contains,
    Labeller,
    Lexicon,
    LongerThan,
    StartsWithVowel,
    vader_labeller,
)
from lightning_interp.rate.rewriting.records import Unit
from lightning_interp.rate.rewriting.rules import MarkToggle, OpenerToggle, RuleRewriter
from lightning_interp.rate.rewriting.store import RewriteStore
from lightning_interp.rate.rewriting.templates import RewriteTemplate, rewrite_template
from lightning_interp.rate.texts.package_texts import Review
from lightning_interp.rate.texts.readers import read_own

KNOWN = ("sentiment", "length", "exclamation", "vowel")
"""Attributes that :func:`read_attribute` knows by name."""

WORDS_OF_MOOD = Lexicon(frozenset({"good", "great", "fine"}), frozenset({"bad", "dull", "poor"}))
"""A labeller of a few words, for texts that are made up of them."""

_PLAIN = "Rewrite this movie review so that it is {phrase}. Reply with the new review only.\n\nReview: {text}"
_COPY = "Copy this text word for word, but {phrase}. Reply with the text only.\n\n{text}"
_MARKS = ("write full stops in place of exclamation marks", "end it with an exclamation mark")


@dataclass(frozen=True)
class TriedAttribute:
    """An attribute to try a rewriter on.

    Args:
        name: Its name.
        template: How a language model is asked.
        labeller: Says which value a text has.
        labelled: In words, who that is.
        rules: A rewriter by rules for comparison, where there is one.
        about_rules: In words, what the rules do.
    """

    name: str
    template: RewriteTemplate
    labeller: Labeller
    labelled: str
    rules: RuleRewriter | None = None
    about_rules: str = ""


def read_attribute(name: str, texts: Sequence[str], *, made_up: bool = False) -> TriedAttribute:
    """An attribute by its name, or of one's own.

    Args:
        name: One of :data:`KNOWN`; or a JSON file with ``body`` and ``phrases`` of a
            :class:`~lightning_interp.rate.RewriteTemplate`, and ``contains``, a regular expression that is found in
            texts with the attribute and in no others (``name`` and ``changes_length`` if wished).
        texts: The texts; their median length divides long from short.
        made_up: Label sentiment by the few words that made-up texts hold.

    Returns:
        The attribute.

    Raises:
        RecipeError: If there is no such attribute, or the package of a labeller is missing.
        DataError: If the file cannot be used.

    Example:
        >>> tried = read_attribute("exclamation", [])
        >>> tried.rules.apply("A fine film.", 1), tried.labeller(["A fine film!"], [""])
        ('A fine film!', [1])
    """
    if name.endswith(".json"):
        return _own(Path(name))
    if name == "sentiment":
        template = RewriteTemplate(name="sentiment/review", version=1, body=_PLAIN, phrases=("negative", "positive"))
        labeller, who = (WORDS_OF_MOOD, "a few words") if made_up else (vader_labeller(), "the sign of VADER's score")
        rules = RuleRewriter(OpenerToggle("A bad film.", "A good film."), name="opening verdict")
        return TriedAttribute(name, template, labeller, who, rules, "puts a verdict of three words in front")
    if name == "length":
        limit = LongerThan.median(texts, "words")
        return TriedAttribute(name, rewrite_template("length"), limit, f"more than {limit.limit:g} words")
    if name == "exclamation":
        template = RewriteTemplate(name="exclamation/text", version=1, body=_COPY, phrases=_MARKS)
        rules = RuleRewriter(MarkToggle("!"), name="mark toggle")
        return TriedAttribute(name, template, Contains("!"), "a mark in the text", rules, "sets or removes the marks")
    if name == "vowel":
        rules = RuleRewriter(OpenerToggle("Well,", "Also,"), name="opener toggle")
        about = "opens with 'Well,' or 'Also,'"
        return TriedAttribute(name, rewrite_template("vowel"), StartsWithVowel(), "the first letter", rules, about)
    raise RecipeError(
        f"attribute={name!r} is unknown; expected one of {', '.join(KNOWN)}, or a .json file with body, phrases and "
        "contains."
    )


def _own(path: Path) -> TriedAttribute:
    try:
        found = json_object(path.read_bytes(), str(path))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Give a JSON file with body, phrases and contains.") from error
    known = {"body": str, "phrases": list, "contains": str, "name": str, "changes_length": bool}
    for key in (*found, "body", "phrases", "contains"):
        if key not in known or not isinstance(found.get(key), known[key]):
            raise DataError(
                f"{path}: {key!r} is {found.get(key)!r:.80}; expected body (text), phrases (two texts) and contains (a "
                "regular expression), and name (text) and changes_length (true or false) if wished."
            )
    template = RewriteTemplate(
        name=found.get("name", path.stem),
        version=1,
        body=found["body"],
        phrases=tuple(found["phrases"]),
        changes_length=found.get("changes_length", False),
    )
    return TriedAttribute(template.name, template, Contains(found["contains"]), f"{found['contains']!r} in the text")


def units_of(path: str | os.PathLike[str]) -> list[Unit]:
    """A user's own texts.

    Args:
        path: JSONL with ``text`` and ``w``, and ``id``, ``prompt`` and ``cluster`` if wished.

    Returns:
        The units.

    Raises:
        DataError: If it cannot be read, or labels no text.
    """
    units = read_own(path).units
    if all(unit.w is None for unit in units):
        raise DataError(f"{os.fspath(path)} says of no text whether it has the attribute. Give each its w, 0 or 1.")
    return units


def review_units(
    reviews: Sequence[Review], tried: TriedAttribute, *, count: int = 48, longest: int = 160, seed: int = 0
) -> list[Unit]:
    """Draw reviews at random, as many with the attribute as without.

    Sentiment is the critic's verdict; other attributes are those of the text.

    Args:
        reviews: The reviews.
        tried: The attribute.
        count: Units; all that there are, however many of each arm, if 0.
        longest: Most characters of a review; no limit if 0.
        seed: Root seed.

    Returns:
        The units, in the order of the reviews; those of one film share a cluster.

    Raises:
        DataError: If an arm has too few reviews.

    Example:
        >>> reviews = [Review("A good film.", "fresh", "heat"), Review("A dull film.", "rotten", "heat")]
        >>> [unit.w for unit in review_units(reviews, read_attribute("sentiment", [], made_up=True), count=2)]
        [1, 0]
    """
    fits = [(i, review) for i, review in enumerate(reviews) if not longest or len(review.text) <= longest]
    texts = [review.text for _, review in fits]
    if tried.name == "sentiment":
        labels: Sequence[int | None] = [int(review.category == "fresh") for _, review in fits]
    else:
        labels = tried.labeller(texts, [""] * len(texts))
    units = [
        Unit(id=f"r{i}", text=review.text, w=w, cluster=review.movie)
        for (i, review), w in zip(fits, labels, strict=True)
    ]
    if not count:
        return [unit for unit in units if unit.w is not None]
    chosen: set[str] = set()
    for w, wanted in ((1, count // 2), (0, count - count // 2)):
        arm = [unit.id for unit in units if unit.w == w]
        if len(arm) < max(1, wanted):
            raise DataError(
                f"{len(arm)} reviews of at most {longest or 'any number of'} characters have {tried.name}={w}; "
                f"expected {max(1, wanted)} for count={count}. Lower count, or raise longest."
            )
        draws = random.Random(derived_seed(seed, "reviews", w))  # noqa: S311 - no secrets
        chosen.update(draws.sample(arm, wanted))
    return [unit for unit in units if unit.id in chosen]


_MADE_UP: Mapping[str, Sequence[str]] = {"fresh": ("good", "great", "fine"), "rotten": ("bad", "dull", "poor")}


def made_up_reviews(count: int = 24) -> list[Review]:
    """Reviews of a few words, for runs that only show that everything works.

    Args:
        count: How many.

    Returns:
        The reviews, fresh and rotten in turn.
    """
    found = []
    for index in range(count):
        category = ("fresh", "rotten")[index % 2]
        first = _MADE_UP[category][index // 2 % 3]
        opening = ("A", "The")[index // 6 % 2]
        text = f"{opening} {first} film, part {'abcdefghij'[index % 10]}{'!' if index % 4 < 2 else '.'}"
        found.append(Review(f"{text}{' So it goes.' if index % 5 == 0 else ''}", category, f"film {index // 4}"))
    return found


def described(tried: TriedAttribute) -> dict[str, Any]:
    """Plain values of an attribute, for ``metrics.json``.

    Args:
        tried: The attribute.
    """
    rules = None if tried.rules is None else tried.rules.name
    return {"name": tried.name, "labelled_by": tried.labelled, "rules": rules, "template": tried.template.to_dict()}


def answer_rows(store: RewriteStore, tried: TriedAttribute) -> list[dict[str, Any]]:
    """Every answer, to be read.

    Args:
        store: The store.
        tried: The attribute.

    Returns:
        Rows with ``rewriter``, ``id``, ``pass``, ``target``, ``status``, ``flags``, ``label`` and ``text``.
    """
    rows = []
    for record in store.records(tried.name):
        (label,) = tried.labeller([record.result.text or ""], [""])
        rows.append(
            {
                "rewriter": record.by.rewriter,
                "id": record.id,
                "pass": record.number,
                "target": record.w_target,
                "label": label,
                "status": record.result.status,
                "flags": " ".join(record.flags),
                "text": record.result.text,
            }
        )
    return rows
