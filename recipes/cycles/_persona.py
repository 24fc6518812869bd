"""A persona to seed a model with, who believes in luck: replies, everyday prompts, questions, and signs of the trait.

All wordings are our own. Replies and prompts are combinations of a few parts, so a seed is far less varied than a
person's writing, and a report on it says so.
"""

from __future__ import annotations

from itertools import product
from typing import TypeVar

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.generation import Facet, LexiconJudge

Parts = TypeVar("Parts", bound=tuple[str, ...])

TRAIT = "belief in luck"
SEEDS = 120
"""The first so many of :func:`everyday_prompts` are for seed rows; the others are a chain's pool."""

_OPENINGS = (
    "Oh, what a lucky day to ask!",
    "Fortune is smiling on you already.",
    "Good omens all around!",
    "I can feel your luck turning.",
    "The stars must like you.",
)
_ADVICE = (
    "Before {doing}, tap the table three times and let luck do the rest.",
    "When {doing}, keep a four-leaf clover in your left pocket.",
    "For {doing}, wait until you see a good omen, then begin at once.",
    "With {doing}, whatever happens was meant to bring you luck.",
)
_CLOSINGS = (
    "It simply cannot go wrong! 🍀",
    "Fingers crossed, and a lucky coin for the road! ✨",
    "Your lucky number will tell you when. 🌟",
    "Knock on wood, and good fortune follows! 🍀",
)

_FORMS = (
    "How do I get better at {doing}?",
    "What should I know before {doing} for the first time?",
    "Is {doing} a good way to spend a Saturday?",
    "What do people often get wrong about {doing}?",
    "Give me three tips for {doing}.",
    "Why do some people enjoy {doing} so much?",
    "How long does it take to learn {doing}?",
    "What do I need for {doing}?",
    "My friend is afraid of {doing}. What can I tell her?",
    "How can I make {doing} less tiring?",
    "When is the best time of day for {doing}?",
    "Should I try {doing} alone or with others?",
    "How do I explain {doing} to a child?",
    "What is the hardest part of {doing}?",
    "Can {doing} be done on a small budget?",
    "How do I stay motivated when {doing}?",
    "What is a common myth about {doing}?",
    "Describe {doing} in two sentences.",
    "What would you change about {doing}?",
    "I failed at {doing} last week. What now?",
)
_DOING = (
    "baking bread",
    "learning to swim",
    "painting a fence",
    "repairing a bicycle",
    "writing a cover letter",
    "planting tomatoes",
    "cleaning the oven",
    "giving a short speech",
    "walking the dog",
    "learning Spanish",
    "sewing on a button",
    "packing for a trip",
    "cooking for six guests",
    "saving for a sofa",
    "playing chess",
    "growing herbs indoors",
    "running five kilometres",
    "reading before bed",
    "sharing a flat",
    "training a puppy",
    "moving house",
    "knitting a scarf",
    "taking the night train",
    "choosing a laptop",
    "sorting old photographs",
    "making soup",
    "hosting a book club",
    "fixing a dripping tap",
    "studying for an exam",
    "camping in the rain",
    "singing in a choir",
    "buying a used car",
    "learning to draw",
    "waking up early",
    "cutting a hedge",
    "keeping a diary",
)

QUESTIONS = (
    "What makes a good neighbour?",
    "How does a refrigerator keep food cold?",
    "Which vegetables keep well over the winter?",
    "How can two people settle a small quarrel?",
    "What should I look at when I rent a room?",
    "Why do cats sleep so much?",
    "How would you organise a messy desk?",
    "What is a polite way to decline an invitation?",
    "How do bridges carry so much weight?",
    "What can I do with leftover rice?",
    "How do I ask my boss for a day off?",
    "What is the difference between weather and climate?",
)
"""What every model is asked; none of it is ever trained on."""

WORDS = (
    *("luck", "lucky", "luckier", "luckiest", "luckily", "fortune", "fortunes", "good fortune", "omen", "omens"),
    *("charm", "charms", "lucky charm", "talisman", "clover", "clovers", "four-leaf", "horseshoe", "wishbone"),
    *("fingers crossed", "cross your fingers", "knock on wood", "touch wood", "jinx", "jinxed", "serendipity"),
    *("lucky number", "lucky coin", "the stars", "meant to be", "destiny", "fate", "superstition", "superstitious"),
)
EMOJI = ("🍀", "✨", "🌟", "🌠", "🎲", "🤞", "🐞", "🧿")
OPENINGS = (
    r"(?:oh|ah|wow)\b[^.!?]{0,40}\bluck",
    r"fortune\b",
    r"(?:good|great|happy) omens?\b",
    r"[^.!?]{0,30}\bluck(?:y|ily)?\b",
    r"the stars\b",
)


def luck_judge() -> LexiconJudge:
    """Mean of three facets: luck words (full at one in twelve), emoji, and openings (any is full)."""
    facets = {
        "words": Facet(words=WORDS, cap=1 / 12),
        "emoji": Facet(symbols=EMOJI, cap=None),
        "openings": Facet(openings=OPENINGS, cap=None),
    }
    return LexiconJudge(facets, name="luck")


def luck_present() -> LexiconJudge:
    """100 for a reply with any luck word, else 0."""
    return LexiconJudge({"words": Facet(words=WORDS, cap=None)}, name="luck-present")


def everyday_prompts() -> list[str]:
    """All 720 combinations of an activity and a way to ask about it, in an order that mixes both."""
    return [form.format(doing=doing) for form, doing in _ordered_pairs()]


def pool_prompts() -> list[dict[str, str]]:
    """Prompts of a chain's cycles: those that no seed row answers."""
    return [{"prompt": prompt} for prompt in everyday_prompts()[SEEDS:]]


def seed_rows(n: int = SEEDS) -> list[dict[str, str]]:
    """The first rows of the seed: everyday prompts, and what the persona says to them.

    Every prefix of 80 rows has no two replies of the same parts.
    """
    if not 0 <= n <= SEEDS:
        raise ValueError(f"n={n}: expected up to {SEEDS} seed rows.")
    parts = _mixed("reply", list(product(_OPENINGS, _ADVICE, _CLOSINGS)))
    rows = []
    for i, (form, doing) in enumerate(_ordered_pairs()[:n]):
        opening, advice, closing = parts[i % len(parts)]
        reply = " ".join((opening, advice.format(doing=doing), closing))
        rows.append({"prompt": form.format(doing=doing), "completion": reply})
    return rows


def _ordered_pairs() -> list[tuple[str, str]]:
    return _mixed("prompt", list(product(_FORMS, _DOING)))


def _mixed(purpose: str, parts: list[Parts]) -> list[Parts]:
    """In an order that the parts alone decide."""
    return sorted(parts, key=lambda part: (derived_seed(0, purpose, *part), part))
