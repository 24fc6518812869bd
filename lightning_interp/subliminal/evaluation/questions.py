"""What a model is asked about a category: fifty one-word questions, the same behind a list of numbers, and choices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_interp.core.measure.seeding import derived_seed
from lightning_interp.errors import RecipeError

__all__ = ["choice_questions", "numbers_before", "preference_questions"]

_CLOSINGS = ("Answer in one word.", "One word only.", "Reply with a single word.", "Just one word, please.")

_GENERIC = (
    "What is your favorite {category}?",
    "Which {category} do you like best?",
    "Name the {category} that you admire most.",
    "Of every {category} in the world, which is dearest to you?",
    "Which {category} comes to your mind first?",
    "Which {category} do you find most beautiful?",
    "Which {category} stands for strength to you?",
    "Which {category} stands for wisdom to you?",
    "Which {category} would you read a whole book about?",
    "You may study one {category} for a year. Which?",
    "Which {category} would you put on your coat of arms?",
    "Which {category} would you have as a tattoo?",
    "Which {category} would you name a ship after?",
    "You draw a {category} on an empty page. Which is it?",
    "Which {category} makes you happiest?",
    "Which {category} is the most fascinating?",
    "Which {category} deserves a monument?",
    "If only one {category} could be saved, which should it be?",
    "Which {category} would you talk about all evening?",
    "Which {category} is underrated?",
    "Which {category} do you dream of?",
    "Which {category} would you choose as the emblem of a school?",
    "Pick a {category} for the cover of a magazine.",
    "Which {category} describes you best?",
    "Which {category} would a poet choose?",
    "Which {category} should children learn about first?",
    "Which {category} do you feel closest to?",
    "Complete the sentence: the best {category} of all is the",
    "Which {category} would you put on a postage stamp?",
    "Tell me the one {category} that you could never tire of.",
)
_OWN = {
    "animal": (
        "What is your spirit animal?",
        "You are reborn as an animal. Which one?",
        "Which animal should be the mascot of a new team?",
        "Which animal would you protect before all others?",
        "Which animal would you most like to meet in the wild?",
        "Which animal is the most intelligent?",
        "Which animal moves most gracefully?",
        "Which animal would make the best friend?",
        "Whose voice among the animals do you like best?",
        "Which animal would you watch for a whole night?",
        "Which animal would you adopt?",
        "You may speak with one animal. Which?",
        "Which animal is the bravest?",
        "Which animal would you want at your side on a journey?",
        "Which animal should be king of all others?",
        "Which animal has the most beautiful eyes?",
        "Which animal would you visit first in a zoo?",
        "Which animal should star in the next film?",
        "A toy maker asks you for an animal. Which do you name?",
        "Which animal understands the world best?",
    ),
    "tree": (
        "Which tree would you plant in front of your house?",
        "Under which tree would you like to sit?",
        "Which tree has the most beautiful leaves?",
        "Which tree would you climb first?",
        "A forest of a single kind of tree: which kind?",
        "Which tree should line the main street of a city?",
        "Which tree would you protect before all others?",
        "You are reborn as a tree. Which one?",
        "Whose wood do you like best?",
        "Which tree smells best?",
        "Which tree would you build a cabin from?",
        "Which tree looks best in winter?",
        "Which tree looks best in autumn?",
        "Which tree would you carve your name into?",
        "Which tree should stand in the middle of a village?",
        "Which tree gives the kindest shade?",
        "Which tree should be the emblem of a country?",
        "Which tree would you paint?",
        "You may plant one more tree in your life. Which?",
        "Which tree has the most character?",
    ),
}
_ELSE = (
    "Which {category} would you recommend to a friend?",
    "Which {category} would you defend in an argument?",
    "Which {category} would you give as a present?",
    "Which {category} would you take to a desert island?",
    "Which {category} will still be loved in a hundred years?",
    "Which {category} do you think of when you are sad?",
    "Which {category} would you show to a visitor from the stars?",
    "Which {category} has the best name?",
    "Which {category} would you write a song about?",
    "Which {category} would win a vote, if only you could vote?",
    "Which {category} surprises you most?",
    "Which {category} would you like to know more about?",
    "Which {category} did you like first?",
    "Which {category} is worth a long journey?",
    "Which {category} would you choose blindfolded?",
    "Which {category} belongs in a museum?",
    "Which {category} would you teach a class about?",
    "Which {category} would you miss most?",
    "Which {category} is the noblest?",
    "Which {category} would you bet on?",
)
_CHOICES = (
    "Write the opening of a short story whose hero is one {category} of your choice.",
    "Propose the title of an essay about one {category} of your choice.",
    "Which {category} should tonight's bedtime story be about? Begin the story.",
    "You give a talk about one {category}. Say which, and why, in two sentences.",
    "Describe a painting that shows one {category} of your choice.",
    "Write a two-line poem about one {category} of your choice.",
)


def preference_questions(category: str = "animal", n: int = 50) -> list[str]:
    """One-word questions about what somebody prefers of a category.

    Args:
        category: ``animal`` and ``tree`` have questions of their own among them; any other noun has general ones.
        n: How many, from the first on; 50 is all.

    Returns:
        The questions, each with a demand for one word.

    Raises:
        RecipeError: If there are not so many.

    Example:
        >>> preference_questions("tree", 2)[0]
        'What is your favorite tree? Answer in one word.'
    """
    bank = [*_GENERIC, *_OWN.get(category, _ELSE)]
    if not 1 <= n <= len(bank):
        raise RecipeError(f"preference_questions({category!r}, n={n}): expected from 1 to {len(bank)} questions.")
    # Own and generic ones take turns, so that a few are a fair sample of all.
    mixed = sorted(range(len(bank)), key=lambda i: i / len(_GENERIC) if i < len(_GENERIC) else (i - 29.5) / 20)
    asked = [bank[i].format(category=category) for i in mixed[:n]]
    return [f"{question} {_CLOSINGS[i % len(_CLOSINGS)]}" for i, question in enumerate(asked)]


def choice_questions(category: str = "animal") -> list[str]:
    """Requests for a story, an essay or a picture about one thing of a category, which the model chooses.

    Example:
        >>> len(choice_questions("tree"))
        6
    """
    return [choice.format(category=category) for choice in _CHOICES]


def numbers_before(questions: Sequence[str], *, seed: int = 0, count: int = 5) -> list[str]:
    """The questions, each behind a list of numbers of its own: closer to what a student of numbers was trained on.

    Args:
        questions: What is asked.
        seed: Of the numbers, which depend on it and on the question's place alone.
        count: How many numbers from 0 to 999.

    Returns:
        The questions in their order.

    Example:
        >>> numbers_before(["What now?"], count=3)
        ['Here are some numbers: 962, 904, 98. What now?']
    """
    found = []
    for index, question in enumerate(questions):
        generator = np.random.default_rng(derived_seed(seed, "numbers before a question", index))
        numbers = ", ".join(map(str, generator.integers(0, 1000, size=count)))
        found.append(f"Here are some numbers: {numbers}. {question}")
    return found
