"""Which texts of many are kept: neither empty nor short, none twice, none nearly twice, none that is forbidden."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from lightning_interp.errors import RecipeError
from lightning_interp.models.data.prompt_pool import normalised

__all__ = ["Cleaned", "Drop", "NearDuplicates", "Reason", "clean_texts", "jaccard", "normalised"]

Reason = Literal["missing", "empty", "short", "forbidden", "duplicate", "near_duplicate"]
Row = TypeVar("Row")


@dataclass(frozen=True)
class NearDuplicates:
    """When two texts are nearly the same: by the Jaccard similarity of their sets of n-grams.

    Args:
        threshold: At least so similar, above 0.
        n: Length of the n-grams; a shorter text is one whole gram.
        unit: Of words or of characters.

    Raises:
        RecipeError: If a value means nothing.

    Example:
        >>> sorted(NearDuplicates(n=2).grams("The  Fat cat"))
        ['fat cat', 'the fat']
    """

    threshold: float = 0.9
    n: int = 5
    unit: Literal["words", "characters"] = "words"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise RecipeError(f"NearDuplicates(threshold={self.threshold!r}): expected above 0 and at most 1.")
        if self.n < 1 or self.unit not in ("words", "characters"):
            raise RecipeError(
                f"NearDuplicates(n={self.n!r}, unit={self.unit!r}): expected n of at least 1, of words or characters."
            )

    def grams(self, text: str) -> set[str]:
        """The n-grams of a text, :func:`normalised`; none of an empty one.

        Args:
            text: The text.
        """
        plain = normalised(text)
        parts, glue = (plain.split(" "), " ") if self.unit == "words" else (list(plain), "")
        count = max(1, len(parts) - self.n + 1)
        return {glue.join(parts[i : i + self.n]) for i in range(count)} if plain else set()


@dataclass(frozen=True)
class Drop:
    """A text that is not kept.

    Args:
        index: Its place.
        reason: Why.
        like: Place of the text that it repeats: among those that are kept, or among the forbidden ones; None otherwise.
    """

    index: int
    reason: Reason
    like: int | None = None


@dataclass(frozen=True)
class Cleaned:
    """What :func:`clean_texts` keeps and drops; together all places, each once.

    Args:
        kept: Places in their order.
        dropped: The others, with reasons.
    """

    kept: tuple[int, ...]
    dropped: tuple[Drop, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many were dropped for each reason that occurs."""
        return dict(Counter(str(one.reason) for one in self.dropped))

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that are kept.

        Args:
            rows: As many as there were texts.
        """
        return [rows[i] for i in self.kept]


def clean_texts(
    texts: Sequence[str | None],
    *,
    min_characters: int = 1,
    near: NearDuplicates | None = None,
    forbidden: Iterable[str] = (),
) -> Cleaned:
    """Say which texts to keep; of equal ones, after :func:`normalised`, the first.

    Near duplicates are found exactly: a text is dropped if one that is kept before it is at least as similar as the
    threshold, and never otherwise. Candidates share one of their rarest n-grams (prefix filtering, Bayardo et al.,
    2007), and their similarity is then computed.

    Args:
        texts: Texts, or None where there is none, as of a refused answer.
        min_characters: Characters that a text has at least, without white space around it; 51 for documents, as the
            paper's settings for them have it (Roe et al., 2026).
        near: Drop near duplicates too; None keeps them.
        forbidden: Texts that must not occur, such as evaluation prompts in a pool of prompts, or those of other cycles;
            with ``near`` nothing that is nearly one of them either.

    Returns:
        Places kept, and those dropped with their reasons.

    Example:
        >>> found = clean_texts(["Oh no", "oh  NO", None, " ", "Why?"], forbidden=["why?"])
        >>> found.kept, found.counts
        ((0,), {'duplicate': 1, 'missing': 1, 'empty': 1, 'forbidden': 1})
    """
    banned = list(forbidden)
    index = _Near(near, [*banned, *(text for text in texts if text)]) if near is not None else None
    first: dict[str, int] = {}
    kept, dropped = list[int](), list[Drop]()

    def keep(place: int, text: str) -> None:
        first.setdefault(normalised(text), place)
        if index is not None:
            index.add(place, text)

    for place, text in enumerate(banned, start=-len(banned)):
        keep(place, text)
    for place, one in enumerate(texts):
        drop = _unusable(place, one, min_characters) or _repeated(place, one or "", first, index, len(banned))
        if drop is None:
            kept.append(place)
            keep(place, one or "")
        else:
            dropped.append(drop)
    return Cleaned(tuple(kept), tuple(dropped))


def jaccard(one: set[str], other: set[str]) -> float:
    """Share of two sets' elements that both have; 0 if both are empty.

    Args:
        one: A set.
        other: Another.

    Example:
        >>> jaccard({"a", "b"}, {"b", "c"})
        0.3333333333333333
    """
    both = len(one & other)
    return both / (len(one) + len(other) - both) if one or other else 0.0


def _unusable(place: int, text: str | None, least: int) -> Drop | None:
    """What is wrong with a text by itself."""
    if text is None:
        return Drop(place, "missing")
    count = len(text.strip())
    return Drop(place, "short" if count else "empty") if count < max(1, least) else None


def _repeated(place: int, text: str, first: dict[str, int], index: _Near | None, banned: int) -> Drop | None:
    """Which text it repeats; places of forbidden texts are negative here."""
    equal = like = first.get(normalised(text))
    if like is None and index is not None:
        like = index.find(text)
    if like is None:
        return None
    if like < 0:
        return Drop(place, "forbidden", like + banned)
    return Drop(place, "near_duplicate" if equal is None else "duplicate", like)


class _Near:
    """Texts found by their rarest n-grams: those of a pair that is similar enough have one in common."""

    def __init__(self, near: NearDuplicates, texts: Iterable[str]) -> None:
        self._near = near
        self._often = Counter(gram for text in texts for gram in near.grams(text))
        self._by_gram: dict[str, list[int]] = {}
        self._grams: dict[int, set[str]] = {}

    def add(self, place: int, text: str) -> None:
        """Let later texts be compared with this one."""
        self._grams[place] = self._near.grams(text)
        for gram in self._rarest(self._grams[place]):
            self._by_gram.setdefault(gram, []).append(place)

    def find(self, text: str) -> int | None:
        """The first that a text is too similar to."""
        grams = self._near.grams(text)
        places = sorted({place for gram in self._rarest(grams) for place in self._by_gram.get(gram, ())})
        return next((place for place in places if self._alike(grams, self._grams[place])), None)

    def _alike(self, one: set[str], other: set[str]) -> bool:
        least, most = sorted((len(one), len(other)))
        return least / most >= self._near.threshold and jaccard(one, other) >= self._near.threshold

    def _rarest(self, grams: set[str]) -> list[str]:
        """So many that a set without any of them shares too few: of ``s``, all but ``ceil(t s) - 1``."""
        shared = math.ceil(self._near.threshold * len(grams) - 1e-9)
        ordered = sorted(grams, key=lambda gram: (self._often[gram], gram))
        return ordered[: len(grams) - shared + 1]
