"""A judge that counts words, symbols and openings in facets that are told apart; a repeated word counts little."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lightning_interp.errors import RecipeError
from lightning_interp.generation.judging.verdicts import JudgeResult, TraitJudge
from lightning_interp.generation.labellers import compiled, words_of

__all__ = ["Facet", "LexiconJudge", "without_repeated_lines"]


@dataclass(frozen=True, kw_only=True)
class Facet:
    """One way in which a trait shows.

    Args:
        words: Whole words or phrases, in any case.
        symbols: Characters such as emoji, wherever they stand.
        openings: Regular expressions, in any case, one of which the text begins with.
        cap: Hits a word of the text at which the facet is full; None: a single hit makes it full (presence).
        most: How often one word or symbol counts in a text.

    Raises:
        RecipeError: If nothing is listed, or a value is wrong.

    Example:
        >>> Facet(words=["luck", "good omen"], cap=1.0).share("Luck, luck, luck! A good  omen.")
        (0.5, 3)
    """

    words: Sequence[str] = ()
    symbols: Sequence[str] = ()
    openings: Sequence[str] = ()
    cap: float | None = 0.05
    most: int = 2

    def __post_init__(self) -> None:
        for name in ("words", "symbols", "openings"):
            listed = getattr(self, name)
            object.__setattr__(self, name, tuple(listed))
            if isinstance(listed, str) or not all(isinstance(one, str) and one.strip() for one in listed):
                raise RecipeError(f"Facet({name}={listed!r:.80}): expected a list of texts that are not blank.")
        if not (self.words or self.symbols or self.openings):
            raise RecipeError("Facet(): expected some words, symbols or openings.")
        if (self.cap is not None and not 0 < self.cap <= 1) or self.most < 1:
            raise RecipeError(
                f"Facet(cap={self.cap!r}, most={self.most!r}): expected a cap above 0 and up to 1, and most from 1 on."
            )
        for pattern in self.openings:
            compiled(pattern)

    def share(self, text: str, words: int | None = None) -> tuple[float, int]:
        """How full the facet is, from 0 to 1, and how many hits counted.

        Args:
            text: The text.
            words: Words that the hits are a share of; those of the text if None.
        """
        found = Counter(" ".join(hit.lower().split()) for hit in self._listed.findall(text)) if self._any else Counter()
        hits = sum(min(count, self.most) for count in found.values())
        hits += any(compiled(pattern).match(text.lstrip()) for pattern in self.openings)
        if self.cap is None:
            return float(hits > 0), hits
        return min(1.0, hits / max(1, len(words_of(text)) if words is None else words) / self.cap), hits

    @cached_property
    def _listed(self) -> re.Pattern[str]:
        phrases = [r"\s+".join(map(re.escape, word.split())) for word in _longest_first(self.words)]
        whole = [rf"(?<![^\W\d_])(?:{'|'.join(phrases)})(?![^\W\d_])"] if phrases else []
        return re.compile("|".join([*whole, *map(re.escape, _longest_first(self.symbols))]), re.IGNORECASE)

    @property
    def _any(self) -> bool:
        return bool(self.words or self.symbols)


@dataclass(frozen=True, eq=False)
class LexiconJudge(TraitJudge):
    """Mean over facets of how full each is, times 100; needs no model.

    Hits are counted in the text without the lines that it repeats, and are a share of the words of the whole. The
    score reads signs of a trait, not the trait: a text that says little else can be full of them, so look at how
    repetitive the texts are beside it.

    Args:
        facets: Facets by their names, which the details of a result tell apart.
        name: What to call it.
        version: Raised when the lists change.

    Raises:
        RecipeError: If there is no facet.

    Example:
        >>> judge = LexiconJudge({"words": Facet(words=["luck"]), "emoji": Facet(symbols=["🍀"], cap=None)})
        >>> judge.score(["Luck! 🍀", "Sheer luck.", "Work."]).tolist()
        [100.0, 50.0, 0.0]
    """

    facets: Mapping[str, Facet]
    name: str = "lexicon"
    version: str = "1"

    def __post_init__(self) -> None:
        if not self.facets:
            raise RecipeError(f"LexiconJudge({self.name!r}) got no facet; expected at least one.")

    def judged(self, texts: list[str], prompts: list[str]) -> list[JudgeResult]:
        """Count; prompts are not read."""
        return [self._result(text) for text in texts]

    def _result(self, text: str) -> JudgeResult:
        once, words = without_repeated_lines(text), len(words_of(text))
        found = {name: facet.share(once, words) for name, facet in self.facets.items()}
        shares = {name: share for name, (share, _) in found.items()}
        detail = {"facets": shares, "hits": {name: hits for name, (_, hits) in found.items()}}
        return JudgeResult(100 * sum(shares.values()) / len(shares), detail=detail)

    def _own(self) -> Any:
        return {name: asdict(facet) for name, facet in self.facets.items()}


def without_repeated_lines(text: str) -> str:
    r"""A text without the lines that it has said before, but for case and white space around them.

    Args:
        text: The text.

    Example:
        >>> without_repeated_lines("Good luck!\ngood luck! \nBye")
        'Good luck!\nBye'
    """
    lines: dict[str, str] = {}
    for line in text.splitlines():
        lines.setdefault(line.strip().casefold(), line)
    return "\n".join(lines.values())


def _longest_first(listed: Sequence[str]) -> list[str]:
    return sorted(listed, key=lambda one: (-len(one), one))
